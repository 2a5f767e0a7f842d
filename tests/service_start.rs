//! What a box says when something is wrong at its start, to systemd, to its watchdog and to the person in front of it.

#[path = "support/instances.rs"]
mod instances;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use instances::{CT, EXPLICIT_LITTLE, Slice, uid};
use rustix::process::{Pid, Signal, kill_process};
use scanside::dicom::client::{Peer, SendError, StoreAssociation};
use scanside::dicom::negotiation::AeTitle;
use scanside::ingest::socket::Client;

const PATIENCE: Duration = Duration::from_secs(120);

struct Bench {
    folder: tempfile::TempDir,
    spool: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let spool = folder.path().join("spool");
        Self { folder, spool }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `serve` with a configuration file of this text, on a socket and a spool of this test's own.
    fn serve(&self, config: &str) -> Command {
        std::fs::write(self.path("scanside.toml"), config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_scanside"));
        command.args(["serve", "--threads", "1"]);
        command.arg("--config").arg(self.path("scanside.toml")).arg("--socket").arg(self.path("socket"));
        command.arg("--spool").arg(&self.spool);
        command.env_remove("NOTIFY_SOCKET").env_remove("WATCHDOG_USEC").env("RUST_LOG", "error");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Exit code and what it said, of a service that does not start.
    fn refusal(&self, config: &str, more: &[&str]) -> (i32, String) {
        let begun = Instant::now();
        let mut child = self.serve(config).args(more).spawn().unwrap();
        while child.try_wait().unwrap().is_none() {
            if begun.elapsed() > PATIENCE {
                child.kill().unwrap();
                panic!("it runs with {config:?} {more:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (child.wait().unwrap().code().unwrap(), said)
    }

    /// A service that has said that it is ready, and the line it said it with.
    fn started(&self, config: &str, more: &[&str]) -> (Running, String) {
        let mut child = self.serve(config).args(more).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let ready = lines.find(|line| line.contains("ready")).expect("it starts");
        std::thread::spawn(move || lines.for_each(|line| println!("service: {line}")));
        (Running(child), ready)
    }
}

struct Running(Child);

impl Running {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn stop(mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.0.wait().unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_keeps_the_service_from_starting_is_named_and_has_its_exit_code() {
    let bench = Bench::new();
    let mut faults = Vec::new();
    let mut expect = |config: &str, more: &[&str], code: i32, words: &[&str]| {
        let (got, said) = bench.refusal(config, more);
        if got != code || !words.iter().all(|word| said.contains(word)) || said.lines().count() != 1 {
            faults.push(format!("{config:?} {more:?}: exit code {got}, {said:?}"));
        }
    };
    expect("[dicom]\nae_tilte = 'X'\n", &[], 78, &["scanside.toml", "ae_tilte"]);
    expect("[memory]\nbudget_mib = 60\n", &[], 78, &["does not add up", "60 MiB granted", "needed"]);
    expect("[watchdog]\ntimeout_s = 0\n", &[], 78, &["watchdog.timeout_s"]);
    expect("[models]\nsigned_by = 'abc'\n", &[], 78, &["models.signed_by"]);
    expect("", &["--serial", "/dev/ttyNONE7"], 69, &["serial", "/dev/ttyNONE7", "No such file"]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    expect("", &["--dicom", &taken], 69, &[&taken]);
    expect("[watchdog]\ndevice = '/dev/watchdogNONE'\n", &[], 74, &["watchdog.device", "/dev/watchdogNONE"]);
    let models = bench.path("models");
    std::fs::create_dir_all(models.join("lung-seg")).unwrap();
    std::fs::write(models.join("lung-seg/model.toml"), "name = 'x'\n").unwrap();
    expect("", &["--models", models.to_str().unwrap()], 65, &["lung-seg"]);
    std::fs::remove_dir_all(&bench.spool).unwrap();
    std::fs::write(&bench.spool, "").unwrap();
    expect("", &[], 74, &["spool"]);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn systemd_and_the_watchdog_hear_of_a_service_only_while_it_lives() {
    let bench = Bench::new();
    let notify = UnixDatagram::bind(bench.path("notify")).unwrap();
    notify.set_read_timeout(Some(PATIENCE)).unwrap();
    std::fs::write(bench.path("watchdog"), "").unwrap();
    let config = format!("[watchdog]\ndevice = {:?}\ntimeout_s = 4\n", bench.path("watchdog"));
    let mut command = bench.serve(&config);
    command.env("NOTIFY_SOCKET", bench.path("notify")).env("WATCHDOG_USEC", "400000");
    let service = Running(command.spawn().unwrap());
    let hear = || {
        let mut word = [0; 64];
        let count = notify.recv(&mut word).unwrap();
        String::from_utf8_lossy(&word[..count]).into_owned()
    };
    let food = || std::fs::read(bench.path("watchdog")).unwrap();
    assert_eq!(hear(), "READY=1");
    assert!(food().starts_with(b"\0"), "the watchdog was fed before it was said to be ready");
    assert_eq!([hear(), hear()], ["WATCHDOG=1", "WATCHDOG=1"]);

    service.signal(Signal::STOP);
    // What was said before the stop may still lie in the socket.
    notify.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    while notify.recv(&mut [0; 64]).is_ok() {}
    let hungry = food();
    assert!(notify.recv(&mut [0; 64]).is_err(), "a service that hangs says nothing");
    assert_eq!(food(), hungry, "and feeds nothing: the board is reset");

    service.signal(Signal::CONT);
    notify.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(hear(), "WATCHDOG=1");
    assert_eq!(service.stop(), Some(0));
    assert_eq!(food().last(), Some(&b'V'), "an orderly stop is no reason for a reset");
    let words: Vec<String> = std::iter::repeat_with(hear).take_while(|word| word != "STOPPING=1").collect();
    assert!(words.iter().all(|word| word == "WATCHDOG=1"), "{words:?}");
}

#[test]
fn a_full_spool_at_the_start_refuses_what_is_new_and_delivers_what_it_holds() {
    let bench = Bench::new();
    let config = |quiet_s: u32| format!("[spool]\nmib_max = 1\n[series]\nquiet_s = {quiet_s}\n");
    let slice = |series: &str| Slice { rows: 512, columns: 512, ..Slice::new(series, 0) };
    let (held, refused) = (slice("1.2.826.0.1.7.1"), slice("1.2.826.0.1.7.2"));
    let (service, _) = bench.started(&config(600), &[]);
    let mut client = Client::connect(&bench.path("socket"), "test").unwrap();
    client.push(&held.file(), None).unwrap();
    let error = client.push(&refused.file(), None).unwrap_err().to_string();
    assert!(error.contains("the spool holds"), "{error}");
    drop(service);

    let (service, ready) = bench.started(&config(5), &["--dicom", "127.0.0.1:0"]);
    let mut client = Client::connect(&bench.path("socket"), "test").unwrap();
    let error = client.push(&refused.file(), None).unwrap_err().to_string();
    assert!(error.contains("the spool holds"), "{error}");
    let title = |text| AeTitle::parse(text).unwrap();
    let address = ready.split("DICOM on ").nth(1).unwrap().trim().parse().unwrap();
    let peer = Peer::new(address, title("CT1"), title("SCANSIDE"));
    let mut association = StoreAssociation::open(&peer, &[(uid(CT), uid(EXPLICIT_LITTLE))]).unwrap();
    match association.store(&refused.file()) {
        Err(SendError::Status { status, .. }) => assert_eq!(status.0, 0xA700, "out of resources, PS3.4 B.2.3"),
        other => panic!("{other:?}"),
    }
    association.release().unwrap();

    client.subscribe(Some("test"), None).unwrap();
    let report = client.next_report(Instant::now() + PATIENCE).unwrap().expect("the series that is held has its report");
    let json = String::from_utf8(report.json).unwrap();
    assert!(json.contains(&held.series), "{json}");
    client.acknowledge(report.sequence).unwrap();
    let begun = Instant::now();
    while let Err(error) = client.push(&refused.file(), None) {
        assert!(begun.elapsed() < PATIENCE, "there is room again: {error}");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(service.stop(), Some(0));
}

#[test]
fn a_disk_without_a_free_byte_at_the_start_does_not_keep_reports_from_their_receiver() {
    let mut bench = Bench::new();
    let disk = bench.path("disk");
    std::fs::create_dir(&disk).unwrap();
    let Some(mounted) = Mounted::new(&disk) else {
        println!("skipped: no file system of a chosen size may be mounted here");
        return;
    };
    bench.spool = disk.join("spool");
    let config = "[series]\nquiet_s = 2\n";
    let slice = Slice::new("1.2.826.0.1.7.3", 0);
    let (service, _) = bench.started(config, &[]);
    let mut client = Client::connect(&bench.path("socket"), "test").unwrap();
    client.subscribe(Some("test"), None).unwrap();
    client.push(&slice.file(), None).unwrap();
    client.released().unwrap();
    client.next_report(Instant::now() + PATIENCE).unwrap().expect("a report that is not acknowledged yet");
    // What it reported it forgets a moment later; cut off before that, the next start would find room there.
    let forgotten = Instant::now() + PATIENCE;
    while std::fs::read_dir(bench.spool.join("incoming")).unwrap().next().is_some() {
        assert!(Instant::now() < forgotten, "the spool keeps what was reported");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(service);

    let mut fill = std::fs::File::create(disk.join("fill")).unwrap();
    while std::io::Write::write_all(&mut fill, &[0; 4096]).is_ok() {}
    let (service, _) = bench.started(config, &[]);
    let mut client = Client::connect(&bench.path("socket"), "test").unwrap();
    let error = client.push(&Slice::new("1.2.826.0.1.7.4", 0).file(), None).unwrap_err().to_string();
    assert!(error.contains("the disk has 0 bytes left"), "{error}");
    client.subscribe(Some("test"), None).unwrap();
    let report = client.next_report(Instant::now() + PATIENCE).unwrap().expect("it is delivered from the full disk");
    assert!(String::from_utf8(report.json).unwrap().contains(&slice.series));
    assert_eq!(service.stop(), Some(0));
    drop(mounted);
}

/// A file system in memory of 96 MiB; only root may mount one.
struct Mounted<'p>(&'p Path);

impl<'p> Mounted<'p> {
    fn new(path: &'p Path) -> Option<Self> {
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", "size=96m", "none"]).arg(path).stderr(Stdio::null()).status();
        done.is_ok_and(|status| status.success()).then_some(Self(path))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}
