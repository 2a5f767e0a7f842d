//! Updates with the real binary: pack, install, choose, confirm, and what becomes of a bad one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const BINARY: &str = env!("CARGO_BIN_EXE_scanside");

fn run(arguments: &[&str]) -> Output {
    Command::new(BINARY).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

struct Bench {
    folder: tempfile::TempDir,
    config: String,
}

impl Bench {
    /// A box that trusts a key drawn for this test.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let public = stdout(&run(&["update", "keygen", &path("key")]));
        assert_eq!(run(&["update", "keygen", &path("key")]).status.code(), Some(2), "a key is never overwritten");
        let text = format!("[update]\nslots = {:?}\nboard = 'sim'\nsigned_by = '{}'\n", path("slots"), public.trim());
        std::fs::write(path("scanside.toml"), text).unwrap();
        let config = path("scanside.toml");
        Self { folder, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A signed update whose firmware is a few bytes.
    fn update(&self, version: &str) -> PathBuf {
        let folder = self.path(version);
        std::fs::create_dir_all(folder.join("models/lungs")).unwrap();
        std::fs::write(folder.join("scanside"), format!("#!/bin/sh\necho {version}\n")).unwrap();
        std::fs::write(folder.join("models/lungs/model.toml"), "name = 'lungs'\n").unwrap();
        let key = self.path("key");
        let (folder_text, key) = (folder.to_str().unwrap(), key.to_str().unwrap());
        stdout(&run(&["update", "pack", folder_text, "--board", "sim", "--key", key, "--release", version]));
        folder
    }

    fn ask(&self, words: &[&str]) -> Output {
        run(&[&["update"], words, &["--config", &self.config]].concat())
    }

    fn install(&self, folder: &Path) -> Output {
        self.ask(&[folder.to_str().unwrap()])
    }

    fn choose(&self) -> String {
        stdout(&self.ask(&["choose", "--factory", "/factory"])).trim().to_owned()
    }

    fn status(&self) -> serde_json::Value {
        serde_json::from_str(&stdout(&self.ask(&["status", "--json"]))).unwrap()
    }
}

#[test]
fn an_update_is_started_once_and_without_a_healthy_service_the_old_firmware_comes_back() {
    let bench = Bench::new();
    assert_eq!(bench.choose(), "/factory");
    let update = bench.update("7.0.0");
    let installed = stdout(&bench.install(&update));
    assert!(installed.contains("7.0.0 is in slot a"), "{installed}");
    let slot = bench.path("slots/a");
    assert_eq!(bench.choose(), slot.to_str().unwrap());
    let firmware = Command::new(slot.join("scanside")).output().unwrap();
    assert_eq!(firmware.stdout, b"7.0.0\n", "it may be executed");
    let socket = bench.path("nobody");
    let unhealthy = bench.ask(&["confirm", "--socket", socket.to_str().unwrap(), "--wait-s", "0"]);
    assert_eq!(unhealthy.status.code(), Some(1), "{}", String::from_utf8_lossy(&unhealthy.stderr));
    assert_eq!(bench.choose(), "/factory");
    assert_eq!(bench.status()["failed"]["version"], "7.0.0");
    assert!(stdout(&bench.ask(&["confirm"])).contains("no slot is on trial"));
}

#[test]
fn one_flipped_bit_is_refused_with_its_file_and_the_old_state_is_kept() {
    let bench = Bench::new();
    let update = bench.update("7.0.0");
    for name in ["manifest.toml", "manifest.sig", "scanside", "models/lungs/model.toml"] {
        let before = bench.status();
        let whole = std::fs::read(update.join(name)).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 4;
        std::fs::write(update.join(name), flipped).unwrap();
        let output = bench.install(&update);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(65), "{error}");
        assert!(error.contains("is refused") && error.contains(name), "{error}");
        assert_eq!((bench.status(), bench.choose().as_str()), (before, "/factory"));
        std::fs::write(update.join(name), whole).unwrap();
    }
    std::fs::remove_file(update.join("scanside")).unwrap();
    let error = String::from_utf8(bench.install(&update).stderr).unwrap();
    assert!(error.contains("scanside is missing"), "{error}");
}

#[test]
fn what_may_not_be_updated_says_so_in_its_exit_code() {
    let bench = Bench::new();
    let older = bench.update("0.0.1");
    let output = bench.install(&older);
    assert_eq!(output.status.code(), Some(65));
    assert!(String::from_utf8_lossy(&output.stderr).contains("older than the active"));
    let output = bench.ask(&[older.to_str().unwrap(), "--allow-downgrade"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let folder = older.to_str().unwrap();
    assert_eq!(run(&["update", folder]).status.code(), Some(78), "no slots, no key");
    let typo = bench.path("typo.toml");
    std::fs::write(&typo, "[update]\nslot = 'x'\n").unwrap();
    let output = run(&["update", folder, "--config", typo.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&output.stderr).contains("slot"));
    assert_eq!(run(&["update"]).status.code(), Some(2));
    // Whoever boots gets an answer even then.
    let output = run(&["update", "choose", "--factory", "/factory", "--config", typo.to_str().unwrap()]);
    assert_eq!(stdout(&output), "/factory\n");

    // A file where the folder of the slots should be.
    std::fs::write(bench.path("blocked"), "").unwrap();
    let blocked = bench.path("blocked/slots");
    let output = bench.ask(&[folder, "--allow-downgrade", "--slots", blocked.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(74), "{}", String::from_utf8_lossy(&output.stderr));
}
