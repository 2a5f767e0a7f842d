//! A thousand damaged images, and the odd files other projects keep for such days, put through every door of the running
//! service: each gets an answer, and the service stays up, small, and open.

#[path = "support/instances.rs"]
mod instances;
#[path = "support/seeded.rs"]
mod seeded;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use instances::{CT, EXPLICIT_LITTLE, Slice, uid};
use scanside::dicom::client::{Peer, SendError, StoreAssociation, echo};
use scanside::dicom::file;
use scanside::dicom::negotiation::AeTitle;
use scanside::ingest::socket::{Client, ClientError};
use seeded::Seeded;

const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
const RLE: &str = "1.2.840.10008.1.2.5";
const PATIENCE: Duration = Duration::from_secs(60);

/// The service with all its doors open, killed at the end of the test.
struct Service {
    process: Child,
    folder: tempfile::TempDir,
    address: SocketAddr,
    said: Arc<Mutex<String>>,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Service {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = "[series]\nquiet_s = 1\n[inbox]\nsettle_s = 1\n[spool]\nmib_max = 512\n";
        std::fs::write(folder.path().join("service.toml"), settings).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_scanside"));
        command.args(["serve", "--dicom", "127.0.0.1:0", "--threads", "2"]);
        for (flag, name) in [("--socket", "socket"), ("--inbox", "inbox"), ("--spool", "spool"), ("--config", "service.toml")] {
            command.arg(flag).arg(folder.path().join(name));
        }
        let mut process =
            command.env("RUST_LOG", "error").stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address = lines.find_map(|line| line.split("DICOM on ").nth(1).map(|address| address.trim().parse().unwrap()));
        let said = Arc::new(Mutex::new(String::new()));
        let hears = Arc::clone(&said);
        std::thread::spawn(move || lines.for_each(|line| *hears.lock().unwrap() += &(line + "\n")));
        Self { process, address: address.expect("the service starts"), folder, said }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn inbox(&self) -> PathBuf {
        self.folder.path().join("inbox")
    }

    fn peer(&self) -> Peer {
        let title = |text| AeTitle::parse(text).unwrap();
        let mut peer = Peer::new(self.address, title("HOSTILE"), title("SCANSIDE"));
        peer.patience = PATIENCE;
        peer
    }

    fn resident_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    }

    fn check_alive(&mut self) {
        assert!(self.process.try_wait().unwrap().is_none(), "the service has ended");
        echo(&self.peer()).expect("C-ECHO is answered");
        Client::connect(&self.socket(), "test").unwrap().status().expect("the socket answers");
        let said = self.said.lock().unwrap();
        assert!(!said.contains("panicked") && !said.contains("internal fault"), "{said}");
    }
}

/// A slice in one of three transfer syntaxes: plain, deflated, run lengths.
fn sound(slice: &Slice, kind: usize) -> Vec<u8> {
    let data_set = slice.data_set();
    let with = |syntax: &str, data_set: &[u8]| {
        let mut file = file::head(&uid(&slice.sop_class), &slice.sop_instance(), &uid(syntax));
        file.extend_from_slice(data_set);
        file
    };
    match kind {
        0 => with(EXPLICIT_LITTLE, &data_set),
        1 => {
            let mut deflater = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
            deflater.write_all(&data_set).unwrap();
            with(DEFLATED, &deflater.finish().unwrap())
        }
        _ => {
            let pixels = usize::from(slice.rows) * usize::from(slice.columns);
            let mut encapsulated = data_set[..data_set.len() - 2 * pixels - 12].to_vec();
            encapsulated.extend_from_slice(&[0xe0, 0x7f, 0x10, 0, b'O', b'B', 0, 0, 255, 255, 255, 255]);
            encapsulated.extend_from_slice(&[0xfe, 0xff, 0, 0xe0, 0, 0, 0, 0]);
            // PS3.5 G: two segments, the high bytes first, each a row of runs of 128 equal bytes.
            let run = |byte: u8| [0x81, byte].repeat(pixels / 128);
            let [low, high] = slice.stored.to_le_bytes();
            let segments = [run(high), run(low)];
            let mut frame: Vec<u8> = [2u32, 64, 64 + segments[0].len() as u32].iter().flat_map(|n| n.to_le_bytes()).collect();
            frame.resize(64, 0);
            frame.extend(segments.concat());
            encapsulated.extend_from_slice(&[0xfe, 0xff, 0, 0xe0]);
            encapsulated.extend_from_slice(&(frame.len() as u32).to_le_bytes());
            encapsulated.extend(frame);
            encapsulated.extend_from_slice(&[0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0]);
            with(RLE, &encapsulated)
        }
    }
}

/// Bits flipped, bytes replaced, lengths that lie, pieces doubled or cut out: from `from` on, where the head ends.
fn damaged(file: &[u8], from: usize, seed: u64) -> Vec<u8> {
    let mut random = Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    random.next();
    let mut bytes = file.to_vec();
    for _ in 0..=random.below(5) {
        if bytes.len() <= from + 8 {
            break;
        }
        // Damage in the header teaches more than damage in the pixels.
        let reach = if random.below(4) == 0 { bytes.len() } else { bytes.len().min(from + 700) };
        let at = from + random.below(reach - from);
        let end = (at + 1 + random.below(100)).min(bytes.len());
        match random.below(7) {
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.next() as u8,
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..end)),
            5 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => {
                let lie = [0, 1, 0xfe, 0xffff, 0x7fff_ffff, 0xffff_fffe, 0xffff_ffffu32][random.below(7)];
                let end = (at + 4).min(bytes.len());
                bytes[at..end].copy_from_slice(&lie.to_le_bytes()[..end - at]);
            }
        }
    }
    bytes
}

/// The `n`-th attack: a damaged slice of one of a few series.
fn attack(n: usize, from_start: bool) -> Vec<u8> {
    let slice = Slice::new(&format!("1.2.826.0.1.6.{}", n / 25 + 1), n % 25);
    let file = sound(&slice, n % 3);
    let head = file.len() - file::data_set(&file).len();
    damaged(&file, if from_start { 132 } else { head }, n as u64 + 1)
}

/// Answers, by what was said.
type Answers = BTreeMap<String, usize>;

fn by_dicom(service: &Service, attacks: std::ops::Range<usize>, answers: &mut Answers) {
    let pairs: Vec<_> = [EXPLICIT_LITTLE, DEFLATED, RLE].map(|syntax| (uid(CT), uid(syntax))).into();
    let mut association = StoreAssociation::open(&service.peer(), &pairs).unwrap();
    for n in attacks {
        let answer = match association.store(&attack(n, false)) {
            Ok(()) => "stored".to_owned(),
            Err(SendError::Status { status, .. }) => format!("{:04x}", status.0),
            Err(error) => panic!("attack {n}: no answer, but {error}"),
        };
        *answers.entry(answer).or_default() += 1;
    }
    association.release().unwrap();
}

fn by_socket(service: &Service, files: impl Iterator<Item = Vec<u8>>, answers: &mut Answers) {
    let mut client = Client::connect(&service.socket(), "hostile").unwrap();
    for file in files {
        let answer = match client.push(&file, None) {
            Ok(_) => "stored".to_owned(),
            Err(ClientError::Refused { code, .. }) => code.to_string(),
            Err(error) => panic!("no answer, but {error}"),
        };
        *answers.entry(answer).or_default() += 1;
    }
    client.released().unwrap();
}

fn by_folder(service: &Service, attacks: std::ops::Range<usize>) {
    let folder = service.inbox().join("stick");
    std::fs::create_dir_all(&folder).unwrap();
    for n in attacks {
        std::fs::write(folder.join(format!("{n}")), attack(n, true)).unwrap();
    }
    let begun = Instant::now();
    while folder.exists() {
        assert!(begun.elapsed() < PATIENCE, "the inbox is still not empty");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_thousand_damaged_images_through_every_door_do_no_harm() {
    let mut service = Service::start();
    let mut answers = Answers::new();
    // Warm: buffers, threads and the allocator's own holdings.
    by_dicom(&service, 0..100, &mut answers);
    by_socket(&service, (100..200).map(|n| attack(n, true)), &mut answers);
    by_folder(&service, 200..300);
    service.check_alive();
    let warm = service.resident_mib();
    by_dicom(&service, 300..600, &mut answers);
    by_socket(&service, (600..850).map(|n| attack(n, true)), &mut answers);
    by_folder(&service, 850..1000);
    // The last series are closed by their timer and reported.
    std::thread::sleep(Duration::from_secs(3));
    service.check_alive();
    let end = service.resident_mib();
    println!("answers: {answers:?}; {warm} MiB warm, {end} MiB at the end");
    assert!(answers["stored"] > 50 && answers.len() > 1, "some damage is harmless and some is not: {answers:?}");
    assert!(end < warm + 48, "grew from {warm} to {end} MiB");
    let failures = std::fs::read_dir(service.inbox().join("failed/stick")).unwrap().count();
    assert!(failures > 20, "what a folder holds and cannot be read is set aside with a sentence");
}

#[test]
fn odd_files_of_other_projects_get_an_answer() {
    let Some(folder) = odd_files() else { return println!("skipped: pydicom is not installed") };
    let mut service = Service::start();
    let mut answers = Answers::new();
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.is_file() && path.metadata().is_ok_and(|about| about.len() < 8 << 20));
    files.sort();
    by_socket(&service, files.iter().map(|path| std::fs::read(path).unwrap()), &mut answers);
    println!("{} files: {answers:?}", files.len());
    std::thread::sleep(Duration::from_secs(3));
    service.check_alive();
}

/// The test files that pydicom brings along.
fn odd_files() -> Option<PathBuf> {
    let python = std::env::var("SCANSIDE_PYTHON").unwrap_or_else(|_| "python3".into());
    let program = "import pydicom.data, os; print(os.path.join(os.path.dirname(pydicom.data.__file__), 'test_files'))";
    let out = Command::new(python).args(["-c", program]).output().ok().filter(|out| out.status.success())?;
    let folder = PathBuf::from(String::from_utf8(out.stdout).ok()?.trim());
    Path::is_dir(&folder).then_some(folder)
}
