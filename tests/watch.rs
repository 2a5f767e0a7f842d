//! Claims about `scanside watch`, `status` and `send --socket`: the program itself, against a journal and its two links.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use scanside::ingest::socket::{Services, SocketConfig, SocketServer};
use scanside::ingest::{Intake, IntakeError, Received, SourceId, Stored};
use scanside::link::{Link, Pty};
use scanside::report::journal::{Journal, Limits};
use scanside::report::line::send_reports;
use scanside::report::wire::Pace;
use scanside::report::{Device, Report, Results, Subject};
use scanside::study::{Modality, Uid};

fn scanside(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scanside"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(arguments: &[&str]) -> Output {
    scanside(arguments).output().unwrap()
}

/// A watcher that runs, and its lines.
struct Watcher(Child, BufReader<ChildStdout>);

impl Watcher {
    fn start(arguments: &[&str]) -> Self {
        let mut child = scanside(&[&["watch", "--json"], arguments].concat()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self(child, lines)
    }

    fn next(&mut self) -> u64 {
        let mut line = String::new();
        self.1.read_line(&mut line).unwrap();
        Report::from_json(line.as_bytes()).expect("one report per line").sequence
    }

    fn rest(mut self) -> (Vec<u64>, Option<i32>) {
        let lines = self.1.by_ref().lines().map(|line| Report::from_json(line.unwrap().as_bytes()).unwrap().sequence);
        (lines.collect(), self.0.wait().unwrap().code())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[derive(Default)]
struct Diary(Mutex<Vec<String>>);

impl Intake for Diary {
    fn store(&self, received: Received<'_>) -> Result<Stored, IntakeError> {
        self.0.lock().unwrap().push(format!("{} bytes", received.file.len()));
        Ok(Stored::New)
    }

    fn released(&self, _: SourceId) {
        self.0.lock().unwrap().push("released".into());
    }

    fn lost(&self, _: SourceId) {
        self.0.lock().unwrap().push("lost".into());
    }
}

struct Bench {
    folder: tempfile::TempDir,
    journal: Arc<Journal>,
    diary: Arc<Diary>,
}

impl Bench {
    fn new(reports: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::open(folder.path(), Limits::default()).unwrap().0);
        let bench = Self { folder, journal, diary: Arc::default() };
        (1..=reports).for_each(|n| bench.report(n));
        bench
    }

    fn report(&self, n: u32) {
        let uid = |text: &str| Uid::parse(text).unwrap();
        let subject = Subject {
            exam: "chest-ct".into(),
            study_uid: uid("1.2.3"),
            series_uid: uid(&format!("1.2.3.{n}")),
            modality: Modality::Ct,
            device: Device { name: "box".into(), version: "0".into(), uid: uid("2.25.1") },
            key: format!("series {n}"),
        };
        self.journal.append_once(Report::complete(subject, Results::default(), Timestamp::UNIX_EPOCH)).unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().into()
    }

    fn serve(&self) -> SocketServer {
        let services = Services {
            intake: self.diary.clone(),
            frames: None,
            journal: self.journal.clone(),
            status: Arc::new(|| serde_json::json!({"reported": 3, "journal": {"waiting": 2}})),
            device_name: "box beside CT 1".into(),
        };
        SocketServer::start(SocketConfig::new(self.path("socket")), services).unwrap()
    }

    /// Runs `body` while the journal is sent over this line.
    fn while_sending<T>(&self, line: impl Link + 'static, body: impl FnOnce() -> T) -> T {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let stop = AtomicBool::new(false);
        let mut line = Some(line);
        let open = move || match line.take() {
            Some(line) => Ok(Box::new(line) as Box<dyn Link>),
            None => Err(std::io::Error::other("unplugged")),
        };
        std::thread::scope(|scope| {
            let _stop = Stop(&stop);
            let (journal, stop) = (&self.journal, &stop);
            scope.spawn(move || send_reports(journal, "serial", Pace::of_baud(115_200), open, stop).unwrap());
            body()
        })
    }
}

#[test]
fn watchers_on_socket_and_serial_line_each_get_every_report_once_over_restarts_of_their_own() {
    let bench = Bench::new(5);
    let _server = bench.serve();
    let pty = Pty::open().unwrap();
    let (socket, serial) = (bench.path("socket"), pty.path().to_str().unwrap().to_owned());
    bench.while_sending(pty, || {
        for link in [["--socket", &socket], ["--serial", &serial]] {
            let part = |count: &str| Watcher::start(&[&link[..], &["--count", count]].concat()).rest();
            assert_eq!(part("2"), (vec![1, 2], Some(0)), "{link:?}");
            assert_eq!(part("1"), (vec![3], Some(0)), "{link:?}");
            assert_eq!(part("2"), (vec![4, 5], Some(0)), "{link:?}");
        }
    });
    assert_eq!(bench.journal.status().waiting, 0);
}

#[test]
fn a_watcher_waits_for_a_service_that_goes_and_comes_back() {
    let bench = Bench::new(0);
    let mut watcher = Watcher::start(&["--socket", &bench.path("socket"), "--count", "3"]);
    for n in 1..=2 {
        let _server = bench.serve();
        bench.report(n);
        assert_eq!(watcher.next(), u64::from(n));
    }
    let _server = bench.serve();
    bench.report(3);
    assert_eq!(watcher.rest(), (vec![3], Some(0)));
}

#[test]
fn a_watcher_that_is_killed_after_printing_prints_nothing_twice_with_a_state_file() {
    let bench = Bench::new(1);
    let (pty, state) = (Pty::open().unwrap(), bench.path("state"));
    let serial = pty.path().to_str().unwrap().to_owned();
    let arguments = ["--serial", &serial, "--state", &state];
    let mut taken = Vec::new();
    bench.while_sending(pty, || {
        for n in 2..=6 {
            let mut watcher = Watcher::start(&arguments);
            taken.push(watcher.next());
            // The state is written right after the line; the acknowledgement may or may not get out.
            let begin = Instant::now();
            while std::fs::read_to_string(&state).map_or(true, |text| !text.contains(&format!(",{}]", n - 1))) {
                assert!(begin.elapsed() < Duration::from_secs(20));
            }
            drop(watcher);
            bench.report(n);
        }
    });
    assert_eq!(taken, [1, 2, 3, 4, 5]);
}

#[test]
fn a_watcher_waits_for_a_serial_device_that_appears_later() {
    let bench = Bench::new(2);
    let device = bench.path("ttyUSB0");
    let watcher = Watcher::start(&["--serial", &device, "--count", "2"]);
    let pty = Pty::open().unwrap();
    symlink(pty.path(), &device).unwrap();
    bench.while_sending(pty, || assert_eq!(watcher.rest(), (vec![1, 2], Some(0))));
}

#[test]
fn too_few_reports_in_time_and_wrong_arguments_have_their_exit_codes() {
    let bench = Bench::new(1);
    let _server = bench.serve();
    let socket = bench.path("socket");
    let output = run(&["watch", "--socket", &socket, "--count", "2", "--timeout", "1", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1);
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 of 2 reports"), "{output:?}");
    assert_eq!(run(&["watch"]).status.code(), Some(2));
    assert_eq!(run(&["watch", "--serial", file!()]).status.code(), Some(2), "a file is no serial device");
    assert_eq!(run(&["status", "--socket", &bench.path("nobody")]).status.code(), Some(1));
}

#[test]
fn people_see_a_table_and_an_empty_report_says_that_it_was_analysed() {
    let bench = Bench::new(1);
    let _server = bench.serve();
    let output = run(&["watch", "--socket", &bench.path("socket"), "--count", "1"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("chest-ct") && text.contains("complete") && text.contains("nothing was found"), "{text}");
    let output = run(&["status", "--socket", &bench.path("socket")]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("box beside CT 1") && text.contains("journal.waiting"), "{text}");
    bench.journal.register("old").unwrap();
    assert!(run(&["status", "--socket", &bench.path("socket"), "--forget", "old"]).status.success());
    assert!(!bench.journal.status().receivers.contains_key("old"));
}

/// The least that is a DICOM file: preamble, magic, and file meta information of one instance.
fn dicom_file(folder: &Path, name: &str) -> PathBuf {
    let element = |element: u16, vr: &[u8; 2], value: &str| {
        let mut value = value.as_bytes().to_vec();
        if value.len() % 2 == 1 {
            value.push(0);
        }
        let head = [&2u16.to_le_bytes()[..], &element.to_le_bytes(), vr, &(value.len() as u16).to_le_bytes()].concat();
        [head, value].concat()
    };
    let meta = [
        element(2, b"UI", "1.2.840.10008.5.1.4.1.1.2"),
        element(3, b"UI", "1.2.3.4"),
        element(0x10, b"UI", "1.2.840.10008.1.2.1"),
    ]
    .concat();
    let length = [&2u16.to_le_bytes()[..], &0u16.to_le_bytes(), b"UL", &4u16.to_le_bytes(), &(meta.len() as u32).to_le_bytes()];
    let path = folder.join(name);
    std::fs::write(&path, [&[0; 128][..], b"DICM", &length.concat(), &meta].concat()).unwrap();
    path
}

#[test]
fn send_hands_in_every_file_over_the_socket_and_says_when_it_is_done() {
    let bench = Bench::new(0);
    let _server = bench.serve();
    let images = bench.folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let bytes = std::fs::metadata(dicom_file(&images, "a")).unwrap().len();
    dicom_file(&images, "b");
    std::fs::write(images.join("notes.txt"), "no image").unwrap();
    let output = run(&["send", images.to_str().unwrap(), "--socket", &bench.path("socket"), "--json"]);
    assert!(output.status.success(), "{output:?}");
    let sent: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&sent["sent"], &sent["bytes"]), (&2.into(), &(2 * bytes).into()));
    let line = format!("{bytes} bytes");
    assert_eq!(*bench.diary.0.lock().unwrap(), [line.as_str(), line.as_str(), "released"]);
    let output = run(&["send", images.to_str().unwrap(), "--socket", &bench.path("nobody"), "--attempts", "1"]);
    assert_eq!(output.status.code(), Some(1));
}
