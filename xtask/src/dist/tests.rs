use std::path::PathBuf;
use std::process::Output;

use super::*;

const BINARY: &[u8] = b"#!/bin/sh\nexit 0\n";

fn sim() -> Board {
    board::parse(&board::expand(&crate::root(), "sim").unwrap()).unwrap()
}

fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().is_ok_and(|o| o.status.success());
    if !found {
        println!("skipped: {program} is not installed");
    }
    found
}

/// A folder of this test's own, gone when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("scanside-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.0.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_package_made_twice_is_the_same_to_the_byte_and_has_one_time_and_owner() {
    if !has("zstd") {
        return;
    }
    let make = || make(&crate::root(), &sim(), BINARY, 1_700_000_000, None).unwrap();
    let (one, two) = (make(), make());
    assert!(one.deb == two.deb && one.tar_zst == two.tar_zst);
    let mut tar = Command::new("zstd").args(["-dc"]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut input = tar.stdin.take().unwrap();
    let feeder = std::thread::spawn(move || std::io::Write::write_all(&mut input, &one.tar_zst).unwrap());
    let tar = tar.wait_with_output().unwrap().stdout;
    feeder.join().unwrap();
    let mut archive = tar::Archive::new(tar.as_slice());
    let mut paths = Vec::new();
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let header = entry.header();
        assert_eq!((header.mtime().unwrap(), header.uid().unwrap(), header.gid().unwrap()), (1_700_000_000, 0, 0));
        paths.push(entry.path().unwrap().display().to_string());
    }
    for wanted in ["usr/lib/scanside/scanside", "usr/lib/scanside/models/lung-seg/model.toml", "usr/share/doc/scanside/sbom.cdx.json",
        "usr/share/doc/scanside/licences.txt", "usr/lib/udev/rules.d/65-scanside-serial.rules", "etc/scanside/scanside.toml"] {
        assert!(paths.iter().any(|path| path.ends_with(wanted)), "{wanted} is not in {paths:?}");
    }
    let here = crate::root().display().to_string();
    assert!(!tar.windows(here.len()).any(|window| window == here.as_bytes()), "the path of the checkout is in it");
}

#[test]
fn the_bill_of_materials_names_what_is_linked_and_nothing_else() {
    let target = "x86_64-unknown-linux-gnu";
    let materials = Materials::of(&crate::root(), target).unwrap();
    let text = materials.cyclonedx(target, BINARY, &[("m".into(), b"version = '1'\nlicence = 'MIT'\n".to_vec())]).unwrap();
    let bom: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((bom["bomFormat"].as_str(), bom["specVersion"].as_str()), (Some("CycloneDX"), Some("1.5")));
    let components = bom["components"].as_array().unwrap();
    let find = |name: &str| components.iter().find(|c| c["name"] == name);
    for linked in ["tract-core", "clap", "ed25519-dalek", "m"] {
        assert!(find(linked).is_some(), "{linked}");
    }
    for apart in ["syn", "clap_derive", "serde_derive", "proptest", "tempfile", "cc", "xtask"] {
        assert!(find(apart).is_none(), "{apart} is not in the firmware");
    }
    let refs: std::collections::BTreeSet<&str> = components.iter().filter_map(|c| c["bom-ref"].as_str()).collect();
    assert_eq!(refs.len(), components.len(), "each once");
    for dependency in bom["dependencies"].as_array().unwrap() {
        for needed in dependency["dependsOn"].as_array().unwrap() {
            assert!(refs.contains(needed.as_str().unwrap()), "{needed} is no component");
        }
    }
    for component in components.iter().filter(|c| c["purl"].is_string()) {
        assert!(component["hashes"][0]["content"].as_str().is_some_and(|h| h.len() == 64), "{component}");
        assert!(component["licenses"][0]["expression"].as_str().is_some_and(|l| !l.contains('/')), "{component}");
    }
    let licences = materials.licences().unwrap();
    assert!(licences.contains("tract-core") && licences.contains("Permission is hereby granted"));
}

#[test]
fn every_boards_units_are_sound_and_shut_in() {
    if !has("systemd-analyze") {
        return;
    }
    let root = crate::root();
    for name in board::names(&root).unwrap() {
        let board = board::parse(&board::expand(&root, &name).unwrap()).unwrap();
        let tree = root::tree(&root, &board, BINARY, None).unwrap();
        let folder = Folder::new(&format!("units-{name}"));
        for (path, entry) in &tree.0 {
            if let Entry::File { bytes, executable } = entry {
                folder.write(path, bytes);
                if *executable {
                    std::fs::set_permissions(folder.0.join(path), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
                }
            }
        }
        // What the units lean on, and every Debian has.
        for unit in ["sysinit", "basic", "shutdown", "network", "local-fs", "multi-user"] {
            folder.write(&format!("usr/lib/systemd/system/{unit}.target"), b"[Unit]\nDescription=stub\n");
        }
        let stub = b"[Service]\nExecStart=/usr/bin/mount\n";
        folder.write("usr/lib/systemd/system/systemd-tmpfiles-setup.service", stub);
        for program in ["usr/bin/mount", "usr/bin/umount"] {
            folder.write(program, BINARY);
            std::fs::set_permissions(folder.0.join(program), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let root_flag = format!("--root={}", folder.0.display());
        let verify = Command::new("systemd-analyze")
            .args(["verify", &root_flag, "--man=no", "scanside.service", "scanside-usb@sda1.service"])
            .output()
            .unwrap();
        assert!(verify.status.success() && said(&verify).is_empty(), "{name}: {}", said(&verify));
        for (unit, exposure_max) in [("scanside.service", 20), ("scanside-usb@.service", 45)] {
            let security = Command::new("systemd-analyze")
                .args(["security", "--offline=yes", &root_flag, &format!("--threshold={exposure_max}"), unit])
                .output()
                .unwrap();
            let last = said(&security);
            assert!(security.status.success(), "{name}: {unit}: {}", last.lines().last().unwrap_or_default());
        }
        let limits = std::fs::read_to_string(folder.0.join("usr/lib/systemd/system/scanside.service.d/50-board.conf")).unwrap();
        let memory = format!("MemoryMax={}M", board.service_mib() + board.memory.page_cache_mib);
        assert!(limits.contains(&memory), "{name}: {limits}");
    }
}

/// A tree in which dpkg works, without a Debian in it.
struct Chroot(Folder);

impl Chroot {
    fn new() -> Self {
        let folder = Folder::new("dpkg");
        for path in ["var/lib/dpkg/info/.keep", "var/lib/dpkg/updates/.keep", "var/lib/dpkg/status", "var/lib/dpkg/available"] {
            folder.write(path, b"");
        }
        Self(folder)
    }

    fn dpkg(&self, arguments: &[&str]) -> String {
        let root = format!("--root={}", self.0.0.display());
        let output = Command::new("dpkg")
            .args([&root, "--force-script-chrootless", "--force-depends", "--force-not-root", "--force-confold", "--force-bad-path"])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "dpkg {arguments:?}: {}", said(&output));
        said(&output)
    }

    fn has(&self, path: &str) -> bool {
        std::fs::symlink_metadata(self.0.0.join(path)).is_ok()
    }
}

#[test]
fn the_package_installs_upgrades_with_the_configuration_kept_removes_and_purges() {
    if !has("dpkg-deb") || !has("zstd") {
        return;
    }
    if !Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.trim_ascii() == b"0") {
        println!("skipped: dpkg unpacks as root only");
        return;
    }
    let chroot = Chroot::new();
    let packages = Folder::new("packages");
    let package = |version: &str, binary: &[u8]| {
        let tree = root::tree(&crate::root(), &sim(), binary, None).unwrap();
        packages.write(&format!("{version}.deb"), &deb::package(&tree, &sim(), version, 1_700_000_000).unwrap());
        packages.0.join(format!("{version}.deb")).display().to_string()
    };
    let (first, second) = (package("0.1.0", BINARY), package("0.2.0", b"#!/bin/sh\necho 2\n"));
    let info = Command::new("dpkg-deb").args(["--info", &first]).output().unwrap();
    assert!(info.status.success() && said(&info).contains("Architecture: amd64"), "{}", said(&info));

    chroot.dpkg(&["--install", &first]);
    for path in ["usr/lib/scanside/scanside", "usr/bin/scanside", "usr/lib/systemd/system/scanside.service", "etc/scanside/scanside.toml"] {
        assert!(chroot.has(path), "{path}");
    }
    if has("systemd-sysusers") {
        let users = std::fs::read_to_string(chroot.0.0.join("etc/passwd")).unwrap();
        assert!(users.contains("scanside:"), "{users}");
        assert!(chroot.has("var/lib/scanside/spool"));
    }
    assert_eq!(chroot.has("etc/systemd/system/multi-user.target.wants/scanside.service"), has("deb-systemd-helper"));

    let configuration = chroot.0.0.join("etc/scanside/scanside.toml");
    std::fs::write(&configuration, "# mine\n").unwrap();
    chroot.0.write("var/lib/scanside/spool/report", b"waits");
    chroot.dpkg(&["--install", &second]);
    assert_eq!(std::fs::read(chroot.0.0.join("usr/lib/scanside/scanside")).unwrap(), b"#!/bin/sh\necho 2\n");
    assert_eq!(std::fs::read(&configuration).unwrap(), b"# mine\n");
    assert!(chroot.has("var/lib/scanside/spool/report"));
    assert!(chroot.dpkg(&["--status", "scanside"]).contains("Version: 0.2.0"));

    chroot.dpkg(&["--remove", "scanside"]);
    assert!(!chroot.has("usr/lib/scanside") && !chroot.has("usr/bin/scanside"));
    assert!(chroot.has("etc/scanside/scanside.toml") && chroot.has("var/lib/scanside/spool/report"));

    chroot.dpkg(&["--install", &second]);
    chroot.dpkg(&["--purge", "scanside"]);
    for path in ["usr/lib/scanside", "etc/scanside", "var/lib/scanside", "usr/lib/systemd/system/scanside.service",
        "etc/systemd/system/multi-user.target.wants/scanside.service"] {
        assert!(!chroot.has(path), "{path} is left");
    }
}

#[test]
fn a_binary_that_tells_where_it_was_built_is_refused() {
    let root = crate::root();
    assert!(no_traces(&root, BINARY).is_ok());
    let error = no_traces(&root, format!("panicked at {}/src/main.rs", root.display()).as_bytes()).unwrap_err();
    assert!(error.contains("of this machine"), "{error}");
}
