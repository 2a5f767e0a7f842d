use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::ingest::{Intake, IntakeError, Received, Stored};
use crate::phantom::{Phantom, PhantomOptions};
use crate::report::journal::{Journal, Limits};
use crate::report::tests::complete;
use crate::study::{Rejection, RejectionCode};

/// Writes down what a door did.
#[derive(Default)]
struct Diary(Mutex<Vec<String>>);

impl Diary {
    fn note(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }

    /// Waits for a line, since a connection that ends is noticed by its own thread.
    fn wait_for(&self, wanted: &str) {
        let begin = Instant::now();
        while !self.0.lock().unwrap().iter().any(|line| line == wanted) {
            assert!(begin.elapsed() < Duration::from_secs(20), "no {wanted:?} in {:?}", self.0.lock().unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Intake for Diary {
    fn store(&self, received: Received<'_>) -> Result<Stored, IntakeError> {
        match received.file {
            b"full" => Err(IntakeError::OutOfResources("the spool".into())),
            b"wrong" => Err(Rejection::new(RejectionCode::Malformed, "not DICOM").into()),
            b"again" => Ok(Stored::Duplicate),
            file => {
                self.note(format!("stored {}", file.len()));
                Ok(Stored::New)
            }
        }
    }

    fn released(&self, _: SourceId) {
        self.note("released".into());
    }

    fn lost(&self, _: SourceId) {
        self.note("lost".into());
    }
}

impl FrameSink for Diary {
    fn frame(&self, _: SourceId, frame: RawFrame<'_>) -> Result<(), IntakeError> {
        self.note(format!("frame {}x{} {}", frame.header.rows, frame.header.columns, frame.pixels.len()));
        Ok(())
    }

    fn finished(&self, _: SourceId) {
        self.note("finished".into());
    }

    fn look(&self, after: u64, _: Duration) -> Option<(u64, Vec<u8>)> {
        (after < 3).then(|| (after + 1, format!("{{\"frame\":{after}}}").into_bytes()))
    }
}

struct Served {
    folder: tempfile::TempDir,
    diary: Arc<Diary>,
    journal: Arc<Journal>,
    write_patience: Duration,
    server: Option<SocketServer>,
}

impl Served {
    fn start() -> Self {
        Self::with_write_patience(Duration::from_secs(20))
    }

    fn with_write_patience(write_patience: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::open(folder.path(), Limits::default()).unwrap().0);
        let mut out = Self { folder, diary: Arc::default(), journal, write_patience, server: None };
        out.server = Some(out.serve().unwrap());
        out
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn serve(&self) -> Result<SocketServer, SocketError> {
        let services = Services {
            intake: self.diary.clone(),
            frames: Some(self.diary.clone()),
            journal: self.journal.clone(),
            status: Arc::new(|| serde_json::json!({"uptime_s": 7})),
            device_name: "box".into(),
        };
        let config = SocketConfig {
            connections_max: 3,
            stall: Duration::from_secs(3),
            live_patience: Duration::from_millis(600),
            write_patience: self.write_patience,
            ..SocketConfig::new(self.path())
        };
        SocketServer::start(config, services)
    }

    fn client(&self) -> Client {
        Client::connect(&self.path(), "test").unwrap()
    }

    fn report(&self, series: u32) {
        self.journal.append_once(complete(series)).unwrap();
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn numbers(client: &mut Client, count: usize) -> Vec<u64> {
    (0..count).map(|_| client.next_report(soon()).unwrap().expect("a report").sequence).collect()
}

#[test]
fn a_client_is_told_what_became_of_each_instance() {
    let served = Served::start();
    let mut client = served.client();
    assert_eq!((client.hello().protocol, client.hello().journal), (PROTOCOL, served.journal.id()));
    assert_eq!(client.push(&vec![7; 300_000], None).unwrap(), Stored::New);
    assert_eq!(client.push(b"again", None).unwrap(), Stored::Duplicate);
    let refusal = |result| match result {
        Err(ClientError::Refused { code, retry, .. }) => (code, retry),
        other => panic!("{other:?}"),
    };
    assert_eq!(refusal(client.push(b"wrong", None)), ("malformed".into(), false));
    assert_eq!(refusal(client.push(b"full", None)), ("out_of_resources".into(), true));
    client.released().unwrap();
    drop(client);
    let mut client = served.client();
    client.push(b"x", None).unwrap();
    drop(client);
    served.diary.wait_for("lost");
    assert_eq!(*served.diary.0.lock().unwrap(), ["stored 300000", "released", "stored 1", "lost"]);
}

#[test]
fn looks_at_live_streams_come_when_they_are_asked_for() {
    let served = Served::start();
    let mut client = served.client();
    client.look().unwrap();
    for number in 1..=3 {
        let look = client.next_look(Instant::now() + Duration::from_secs(20)).unwrap().unwrap();
        assert_eq!(look, (number, format!("{{\"frame\":{}}}", number - 1).into_bytes()));
    }
}

#[test]
fn raw_frames_reach_their_sink_and_a_frame_that_lies_about_its_size_does_not() {
    let served = Served::start();
    let mut client = served.client();
    let header = FrameHeader { rows: 4, columns: 5, pixel: Pixel::Rgb8, time_us: 1, spacing_mm: Some([0.2, 0.3]), region: None };
    client.push_frame(header, &[0; 60]).unwrap();
    assert!(matches!(client.push_frame(header, &[0; 59]), Err(ClientError::Refused { .. })));
    assert!(matches!(
        client.push_frame(FrameHeader { spacing_mm: Some([0.0, 1.0]), ..header }, &[0; 60]),
        Err(ClientError::Refused { .. })
    ));
    drop(client);
    served.diary.wait_for("finished");
    assert_eq!(*served.diary.0.lock().unwrap(), ["frame 4x5 60", "finished"]);
}

#[test]
fn status_answers_while_reports_are_subscribed() {
    let served = Served::start();
    served.report(1);
    let mut client = served.client();
    client.subscribe(Some("watch"), None).unwrap();
    for _ in 0..20 {
        assert_eq!(client.status().unwrap()["uptime_s"], 7);
    }
    assert_eq!(numbers(&mut client, 1), [1]);
}

#[test]
fn a_named_subscriber_gets_each_report_once_however_often_it_comes_back() {
    let served = Served::start();
    (1..=3).for_each(|n| served.report(n));
    let mut client = served.client();
    assert_eq!(client.subscribe(Some("watch"), None).unwrap(), 0);
    assert_eq!(numbers(&mut client, 3), [1, 2, 3]);
    client.acknowledge(2).unwrap();
    drop(client);
    served.report(4);
    let mut client = served.client();
    assert_eq!(client.subscribe(Some("watch"), None).unwrap(), 2);
    assert_eq!(numbers(&mut client, 2), [3, 4]);
    client.acknowledge(4).unwrap();
    assert_eq!(served.journal.status().waiting, 0);
    assert!(client.next_report(Instant::now() + Duration::from_millis(30)).unwrap().is_none());
    // A report that is written while it waits comes at once.
    served.report(5);
    assert_eq!(numbers(&mut client, 1), [5]);
}

#[test]
fn old_reports_can_be_asked_for_again_with_and_without_a_name() {
    let served = Served::start();
    (1..=4).for_each(|n| served.report(n));
    served.journal.acknowledge("watch", 4).unwrap();
    let mut client = served.client();
    client.subscribe(Some("watch"), Some(2)).unwrap();
    assert_eq!(numbers(&mut client, 3), [2, 3, 4]);
    let mut nameless = served.client();
    nameless.subscribe(None, None).unwrap();
    assert_eq!(numbers(&mut nameless, 4), [1, 2, 3, 4]);
    assert!(matches!(nameless.acknowledge(4), Err(ClientError::Refused { .. })));
}

#[test]
fn a_subscriber_who_never_reads_keeps_nobody_waiting() {
    let served = Served::start();
    let mut slow = served.client();
    slow.subscribe(None, None).unwrap();
    let mut other = served.client();
    other.subscribe(Some("other"), None).unwrap();
    // More than any socket buffer holds.
    for n in 1..=600 {
        served.report(n);
        if n % 10 == 0 {
            let taken = numbers(&mut other, 10);
            assert_eq!(taken.last(), Some(&u64::from(n)));
            other.acknowledge(n.into()).unwrap();
        }
    }
    assert_eq!(numbers(&mut slow, 600), (1..=600).collect::<Vec<u64>>(), "it catches up from the journal");
}

#[test]
fn a_named_subscriber_has_at_most_sixteen_reports_under_way() {
    let served = Served::start();
    (1..=40).for_each(|n| served.report(n));
    let mut client = served.client();
    client.subscribe(Some("watch"), None).unwrap();
    assert_eq!(numbers(&mut client, 16).last(), Some(&16));
    assert!(client.next_report(Instant::now() + Duration::from_millis(50)).unwrap().is_none());
    client.acknowledge(16).unwrap();
    assert_eq!(numbers(&mut client, 16).last(), Some(&32));
}

#[test]
fn the_socket_is_for_its_group_replaces_a_dead_one_and_yields_to_a_live_one() {
    let mut served = Served::start();
    let mode = std::fs::metadata(served.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    assert!(matches!(served.serve(), Err(SocketError::InUse(_))));
    served.server = None;
    assert!(!served.path().exists(), "it takes its file away");
    // A service that was killed leaves its file.
    drop(std::os::unix::net::UnixListener::bind(served.path()).unwrap());
    assert!(served.path().exists());
    served.server = Some(served.serve().unwrap());
    served.client().status().unwrap();
    let file = served.folder.path().join("a-file");
    std::fs::write(&file, "precious").unwrap();
    let services = served.serve_at(&file);
    assert!(matches!(services, Err(SocketError::NotASocket(_))));
    assert_eq!(std::fs::read(file).unwrap(), b"precious");
}

impl Served {
    fn serve_at(&self, path: &std::path::Path) -> Result<SocketServer, SocketError> {
        let services = Services {
            intake: self.diary.clone(),
            frames: None,
            journal: self.journal.clone(),
            status: Arc::new(|| serde_json::Value::Null),
            device_name: "box".into(),
        };
        SocketServer::start(SocketConfig::new(path), services)
    }
}

#[test]
fn one_connection_too_many_is_told_so_and_a_place_that_is_left_is_free_again() {
    let served = Served::start();
    let clients = [served.client(), served.client(), served.client()];
    let error = Client::connect(&served.path(), "test").unwrap_err();
    assert!(error.to_string().contains("3 connections"), "{error}");
    drop(clients);
    let begin = Instant::now();
    while Client::connect(&served.path(), "test").is_err() {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_hears_that_the_service_has_gone() {
    let mut served = Served::start();
    let mut client = served.client();
    client.subscribe(Some("watch"), None).unwrap();
    served.server = None;
    assert!(matches!(client.next_report(soon()), Err(ClientError::Lost { .. })));
    assert!(matches!(Client::connect(&served.path(), "test"), Err(ClientError::Lost { .. })));
}

/// What a service answers to raw bytes before it closes.
/// A way to the socket that breaks once, at the first `released`, which nobody hears.
fn breaks_at_its_first_release(socket: PathBuf, way: &std::path::Path) {
    let listener = std::os::unix::net::UnixListener::bind(way).unwrap();
    std::thread::spawn(move || {
        let mut broken = false;
        for caller in listener.incoming() {
            let (mut caller, mut called) = (caller.unwrap(), UnixStream::connect(&socket).unwrap());
            let (mut answers, mut back) = (called.try_clone().unwrap(), caller.try_clone().unwrap());
            let answering = std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
            let mut prefix = [0; 8];
            while caller.read_exact(&mut prefix).is_ok() {
                let (header, body) = super::lengths(prefix, 1 << 20).unwrap();
                let mut frame = vec![0; header + body];
                caller.read_exact(&mut frame).unwrap();
                if !broken && String::from_utf8_lossy(&frame[..header]).contains("released") {
                    break;
                }
                called.write_all(&[&prefix, &frame[..]].concat()).unwrap();
            }
            broken = true;
            for end in [&caller, &called] {
                let _ = end.shutdown(std::net::Shutdown::Both);
            }
            let _ = answering.join();
        }
    });
}

#[test]
fn a_release_that_nobody_heard_is_made_up_for_with_a_file_of_each_series() {
    let served = Served::start();
    let way = served.folder.path().join("way");
    breaks_at_its_first_release(served.path(), &way);
    let options = PhantomOptions { shape: [60, 128, 128], nodules: Vec::new(), ..PhantomOptions::default() };
    let phantom = Phantom::new(&options).unwrap();
    let files: Vec<PathBuf> = ["one", "two"]
        .iter()
        .flat_map(|name| (0..2).map(move |k| (*name, k)))
        .map(|(name, k)| {
            let path = served.folder.path().join(format!("{name}{k}"));
            std::fs::write(&path, phantom.image(&phantom.series(name), k).unwrap()).unwrap();
            path
        })
        .collect();
    let mut told = Vec::new();
    push_files(&way, &files, 2, &mut |pushed| told.push(matches!(pushed, Pushed::Stored(..)))).unwrap();
    assert_eq!(told, [true, true, true, true, false], "four are stored, and then it is tried again");
    served.diary.wait_for("released");
    served.diary.wait_for("lost");
    let stored = served.diary.0.lock().unwrap().iter().filter(|line| line.starts_with("stored")).count();
    assert_eq!(stored, 4 + 2);
}

fn answer_to(served: &Served, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(served.path()).unwrap();
    // It may close before it has read everything.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn frame(header: &str, body: &[u8]) -> Vec<u8> {
    let lengths = [(header.len() as u32).to_le_bytes(), (body.len() as u32).to_le_bytes()].concat();
    [&lengths, header.as_bytes(), body].concat()
}

#[test]
fn hostile_bytes_get_an_answer_and_do_no_harm() {
    let served = Served::start();
    let hello = frame(r#"{"type":"hello","protocol":1,"client":"x"}"#, b"");
    let connect = |bytes: &[u8]| {
        let begin = Instant::now();
        loop {
            let answer = answer_to(&served, bytes);
            // The places of earlier connections are freed by their threads.
            if !answer.contains("\"busy\"") || begin.elapsed() > Duration::from_secs(20) {
                return answer;
            }
        }
    };
    assert!(connect(&[0xff; 64]).contains("too_long"));
    assert!(connect(&frame("not JSON", b"")).contains("bad_header"));
    assert!(connect(&frame(r#"{"type":"unheard_of"}"#, b"")).contains("bad_header"));
    assert!(connect(&frame(r#"{"type":"status"}"#, b"")).contains("hello_first"));
    assert!(connect(&frame(r#"{"type":"hello","protocol":2,"client":"x"}"#, b"")).contains("speaks protocol 1"));
    // A body that is announced and never sent, at the largest allowed length.
    let mut lie = frame(r#"{"type":"instance"}"#, b"");
    lie[4..8].copy_from_slice(&(64u32 << 20).to_le_bytes());
    assert!(connect(&[hello.clone(), lie].concat()).contains("capabilities"));
    for cut in 0..hello.len() {
        assert_eq!(connect(&hello[..cut]), "");
    }
    let mut state = 1u64;
    for _ in 0..100 {
        let mut spoilt = [hello.clone(), frame(r#"{"type":"subscribe","receiver":"r"}"#, b""), frame(r#"{"type":"ack","sequence":1}"#, b"")].concat();
        for _ in 0..3 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let place = (state >> 33) as usize % spoilt.len();
            spoilt[place] ^= 1 << (state >> 61);
        }
        connect(&spoilt);
    }
    assert_eq!(served.client().status().unwrap()["uptime_s"], 7);
    assert!(served.diary.0.lock().unwrap().iter().all(|line| line != "stored 0"));
}

/// The header of a live image of 4 x 5 pixels.
const SMALL: &str = r#"{"type":"frame","rows":4,"columns":5,"pixel":"gray8","time_us":1}"#;

#[test]
fn a_sender_that_stops_in_the_middle_of_an_image_is_told_so_and_its_stream_ends() {
    let served = Served::start();
    let mut stream = UnixStream::connect(served.path()).unwrap();
    let whole = frame(SMALL, &[7; 20]);
    stream.write_all(&frame(r#"{"type":"hello","protocol":1,"client":"x"}"#, b"")).unwrap();
    stream.write_all(&whole).unwrap();
    stream.write_all(&whole[..whole.len() - 3]).unwrap();
    // Nothing more, and the connection stays open.
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).unwrap();
    let answers = String::from_utf8_lossy(&answers);
    assert!(answers.contains("taken") && answers.contains("too_slow"), "{answers}");
    served.diary.wait_for("finished");
    assert_eq!(*served.diary.0.lock().unwrap(), ["frame 4x5 20", "finished"]);
}

#[test]
fn a_stream_does_not_wait_for_one_who_holds_the_room_of_instances() {
    let served = Served::start();
    let mut slow = UnixStream::connect(served.path()).unwrap();
    slow.write_all(&frame(r#"{"type":"hello","protocol":1,"client":"slow"}"#, b"")).unwrap();
    // All that may be under way, announced and not sent.
    let mut announced = frame(r#"{"type":"instance"}"#, b"");
    announced[4..8].copy_from_slice(&(64u32 << 20).to_le_bytes());
    slow.write_all(&announced).unwrap();
    slow.write_all(&[0; 1000]).unwrap();
    // His hello is answered; then he is silent for as long as he may be.
    let mut client = served.client();
    let header = FrameHeader { rows: 4, columns: 5, pixel: Pixel::Gray8, time_us: 1, spacing_mm: None, region: None };
    for _ in 0..50 {
        client.push_frame(header, &[1; 20]).unwrap();
    }
    // An instance has to wait until he is cut off, and is stored then.
    assert_eq!(client.push(&[7; 3000], None).unwrap(), Stored::New);
    let mut answers = Vec::new();
    slow.read_to_end(&mut answers).unwrap();
    assert!(String::from_utf8_lossy(&answers).contains("too_slow"));
    let diary = served.diary.0.lock().unwrap();
    assert_eq!((diary.len(), diary.last().unwrap().as_str()), (51, "stored 3000"), "what was cut off is stored nowhere: {diary:?}");
}

#[test]
fn one_who_reads_no_answer_is_cut_off_and_keeps_no_room() {
    let served = Served::with_write_patience(Duration::from_secs(1));
    let mut deaf = UnixStream::connect(served.path()).unwrap();
    deaf.write_all(&frame(r#"{"type":"hello","protocol":1,"client":"deaf"}"#, b"")).unwrap();
    let message = frame(r#"{"type":"instance"}"#, &[7; 3000]);
    // Until his own buffer is full because the service has stopped reading, or until he is cut off.
    deaf.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let cut = (0..100_000).any(|_| deaf.write_all(&message).is_err());
    assert!(cut, "the answers of 100,000 requests fit into no buffer");
    served.diary.wait_for("lost");
    let mut client = served.client();
    assert_eq!(client.push(&[8; 4000], None).unwrap(), Stored::New);
}
