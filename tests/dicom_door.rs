//! Claims about the DICOM door: what it takes, what it refuses and how, and what hostile peers cannot do to it.

#[path = "support/instances.rs"]
mod instances;
#[path = "support/seeded.rs"]
mod seeded;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use instances::{CT, EXPLICIT_LITTLE, IMPLICIT_LITTLE, Slice, uid, write_series};
use scanside::dicom::association::{Association, AssociationError, Limits};
use scanside::dicom::client::{Peer, Sent, SendError, StoreAssociation, echo, find_files, send};
use scanside::dicom::dimse::{CommandSet, Status};
use scanside::dicom::negotiation::{AbortReason, AeTitle, Context, abort_pdu, release_request_pdu, request_pdu};
use scanside::ingest::dicom::{DicomConfig, DicomServer};
use scanside::ingest::spool::{Arrival, Spool, SpoolLimits};
use seeded::Seeded;

/// A door with a spool behind it, and somebody who listens to what arrives.
struct Door {
    server: DicomServer,
    arrivals: Receiver<Arrival>,
    folder: tempfile::TempDir,
}

fn config() -> DicomConfig {
    DicomConfig::new("127.0.0.1:0".parse().unwrap())
}

fn open(config: DicomConfig) -> Door {
    open_with(config, SpoolLimits::default())
}

fn open_with(config: DicomConfig, limits: SpoolLimits) -> Door {
    let folder = tempfile::tempdir().unwrap();
    let (sender, arrivals) = bounded(10_000);
    let spool = Spool::open(folder.path(), limits, sender).unwrap();
    let server = DicomServer::start(config, Arc::new(spool)).unwrap();
    Door { server, arrivals, folder }
}

impl Door {
    fn peer(&self) -> Peer {
        let mut peer = Peer::new(self.server.address(), title("CT1"), title("BOX"));
        peer.patience = Duration::from_secs(10);
        peer.attempts = 1;
        peer
    }

    fn stored(&self) -> Vec<PathBuf> {
        let all = files(&self.folder.path().join("incoming"));
        // The mark of a series whose sender has gone is no instance.
        all.into_iter().filter(|path| path.file_name().is_some_and(|name| name != "released")).collect()
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.server.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    /// A connection on which a CT context has been agreed as number 1.
    fn associated(&self) -> TcpStream {
        let mut stream = self.connect();
        stream.write_all(&request(&[(CT, EXPLICIT_LITTLE)])).unwrap();
        assert_eq!(read_pdu(&mut stream).unwrap()[0], 2, "A-ASSOCIATE-AC");
        stream
    }
}

fn title(text: &str) -> AeTitle {
    AeTitle::parse(text).unwrap()
}

fn contexts(pairs: &[(&str, &str)]) -> Vec<Context> {
    let context = |(n, (class, syntax)): (usize, &(&str, &str))| Context {
        id: 2 * n as u8 + 1,
        sop_class: uid(class),
        transfer_syntax: uid(syntax),
    };
    pairs.iter().enumerate().map(context).collect()
}

fn request(pairs: &[(&str, &str)]) -> Vec<u8> {
    request_pdu(&title("CT1"), &title("BOX"), &contexts(pairs), 16_384)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// One PDU, or None when the peer has closed.
fn read_pdu(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut pdu = vec![0; 6];
    stream.read_exact(&mut pdu).ok()?;
    let length = u32::from_be_bytes(pdu[2..6].try_into().unwrap()) as usize;
    pdu.resize(6 + length, 0);
    stream.read_exact(&mut pdu[6..]).ok()?;
    Some(pdu)
}

/// A P-DATA-TF of one fragment: control 1 is command, 2 the last.
fn fragment(control: u8, bytes: &[u8]) -> Vec<u8> {
    let mut pdu = vec![4, 0];
    pdu.extend_from_slice(&(bytes.len() as u32 + 6).to_be_bytes());
    pdu.extend_from_slice(&(bytes.len() as u32 + 2).to_be_bytes());
    pdu.extend_from_slice(&[1, control]);
    pdu.extend_from_slice(bytes);
    pdu
}

fn store_command(slice: &Slice) -> Vec<u8> {
    fragment(3, &CommandSet::store_request(1, &uid(CT), &slice.sop_instance()).encode())
}

/// Sends a C-STORE of any bytes under this name and gives the answer.
fn store_raw(stream: &mut TcpStream, slice: &Slice, data_set: &[u8]) -> (Status, String) {
    stream.write_all(&store_command(slice)).unwrap();
    let mut chunks = data_set.chunks(16_000).peekable();
    while let Some(chunk) = chunks.next() {
        stream.write_all(&fragment(if chunks.peek().is_none() { 2 } else { 0 }, chunk)).unwrap();
    }
    let answer = read_pdu(stream).expect("an answer");
    let answer = CommandSet::parse(&answer[12..]).unwrap();
    (answer.status().unwrap(), answer.error_comment().unwrap_or_default().to_owned())
}

fn installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("skipped: dcmtk is not installed");
    }
    found
}

/// Runs a program of dcmtk against the door; whether it was content, and what it said.
fn dcmtk(door: &Door, program: &str, arguments: &[&str]) -> (bool, String) {
    let address = door.server.address();
    let out = Command::new(program)
        .args(arguments.iter().take_while(|a| **a != "--"))
        .args([&address.ip().to_string(), &address.port().to_string()])
        .args(arguments.iter().skip_while(|a| **a != "--").skip(1))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.success(), said)
}

#[test]
fn dcmtk_is_answered_and_its_series_is_on_disk() {
    if !installed("storescu") {
        return;
    }
    let door = open(config());
    let (content, said) = dcmtk(&door, "echoscu", &["-v"]);
    assert!(content, "{said}");
    let series = tempfile::tempdir().unwrap();
    let sent = write_series(series.path(), "1.2.826.0.1.2", 12);
    let folder = series.path().to_str().unwrap();
    for syntax in ["-x=", "-xb", "-xi"] {
        let (content, said) = dcmtk(&door, "storescu", &["-v", syntax, "+sd", "--", folder]);
        // Where big and little endian are offered, little is agreed and all are duplicates. Implicit VR makes them
        // other bytes under known names: refused.
        assert_eq!(content && !said.contains("Failed"), syntax != "-xi", "{syntax}: {said}");
    }
    assert_eq!(door.stored().iter().filter(|path| path.extension().is_some_and(|e| e == "dcm")).count(), sent.len());
    let arrived = door.arrivals.try_iter().filter(|arrival| matches!(arrival, Arrival::Instance(_))).count();
    assert_eq!(arrived, 2 * sent.len(), "the duplicates, too");
}

#[test]
fn real_scanners_images_arrive_whole() {
    let Some(series) = instances_of_a_real_series() else {
        return println!("skipped: no real series beside the checkout");
    };
    let door = open(config());
    let (found, _) = find_files(&series).unwrap();
    assert!(send(&door.peer(), &found, &mut |_| {}).is_empty());
    assert_eq!(door.stored().len(), found.len());
    for ((sent, meta), arrival) in found.iter().zip(door.arrivals.try_iter()) {
        let Arrival::Instance(arrived) = arrival else { panic!("{arrival:?}") };
        let (sent, arrived) = (std::fs::read(sent).unwrap(), std::fs::read(arrived.path).unwrap());
        assert!(sent[meta.data_set_at..] == *scanside::dicom::file::data_set(&arrived), "the data set, to the byte");
    }
}

/// A folder of a real CT, where the checkout lies beside real data.
fn instances_of_a_real_series() -> Option<PathBuf> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    let mut open = vec![data];
    while let Some(folder) = open.pop() {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(folder).ok()?.map(|e| e.unwrap().path()).collect();
        entries.sort();
        let is_dicom = |path: &PathBuf| path.extension().is_some_and(|e| e == "dcm");
        if let Some(path) = entries.iter().find(|path| is_dicom(path) && entries.len() < 300) {
            return path.parent().map(Path::to_owned);
        }
        open.extend(entries.into_iter().filter(|path| path.is_dir()));
    }
    None
}

#[test]
fn our_client_sends_a_folder_and_sends_it_again() {
    let door = open(config());
    let series = tempfile::tempdir().unwrap();
    write_series(&series.path().join("a"), "1.2.826.0.1.2", 5);
    write_series(&series.path().join("b/c"), "1.2.826.0.1.3", 5);
    std::fs::write(series.path().join("notes.txt"), "no image").unwrap();
    let (found, others) = find_files(series.path()).unwrap();
    assert_eq!((found.len(), others.len()), (10, 1));
    for _ in 0..2 {
        let mut stored = 0;
        let failed = send(&door.peer(), &found, &mut |sent| stored += usize::from(matches!(sent, Sent::Stored(..))));
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(stored, 10, "a duplicate is acknowledged like the first");
    }
    assert_eq!(door.stored().len(), 10);
    let arrivals: Vec<Arrival> = door.arrivals.try_iter().collect();
    assert!(matches!(arrivals.last(), Some(Arrival::Released(_))));
    assert_eq!(arrivals.len(), 2 * (10 + 1), "each sender's instances, and its release");
}

/// A way to `address` that breaks once, at the first A-RELEASE-RQ, which nobody hears.
fn breaks_at_its_first_release(address: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let way = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut broken = false;
        for caller in listener.incoming() {
            let (mut caller, mut called) = (caller.unwrap(), TcpStream::connect(address).unwrap());
            let (mut answers, mut back) = (called.try_clone().unwrap(), caller.try_clone().unwrap());
            let answering = std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
            while let Some(pdu) = read_pdu(&mut caller).filter(|pdu| broken || pdu[0] != 5) {
                called.write_all(&pdu).unwrap();
            }
            broken = true;
            for end in [&caller, &called] {
                let _ = end.shutdown(std::net::Shutdown::Both);
            }
            let _ = answering.join();
        }
    });
    way
}

#[test]
fn a_release_that_nobody_heard_is_made_up_for_with_a_file_of_each_series() {
    let door = open(config());
    let folder = tempfile::tempdir().unwrap();
    write_series(&folder.path().join("a"), "1.2.826.0.1.2", 3);
    write_series(&folder.path().join("b"), "1.2.826.0.1.3", 3);
    let (found, _) = find_files(folder.path()).unwrap();
    let peer = Peer {
        address: breaks_at_its_first_release(door.server.address()),
        attempts: 2,
        pause: Duration::from_millis(1),
        ..door.peer()
    };
    let (mut stored, mut again) = (0, 0);
    let failed = send(&peer, &found, &mut |sent| match sent {
        Sent::Stored(..) => stored += 1,
        Sent::Retry(..) => again += 1,
        Sent::Failed(..) => panic!("{sent:?}"),
    });
    assert_eq!((failed.len(), stored, again), (0, 6, 1));
    let told = |arrival| match arrival {
        Arrival::Instance(instance) => instance.series.to_string(),
        Arrival::Released(_) => "released".into(),
        Arrival::Lost(_) => "lost".into(),
        other => format!("{other:?}"),
    };
    let told: Vec<String> = door.arrivals.try_iter().skip(6).map(told).collect();
    assert_eq!(told, ["lost", "1.2.826.0.1.2", "1.2.826.0.1.3", "released"]);
}

#[test]
fn what_cannot_be_decoded_is_refused_at_association() {
    let door = open(config());
    let syntax = uid("1.2.840.10008.1.2.4.201");
    let mut association = StoreAssociation::open(&door.peer(), &[(uid(CT), syntax)]).unwrap();
    let refused = association.store(&Slice::new("1.2.3", 0).file()).unwrap_err();
    assert!(matches!(refused, SendError::NotTaken { .. }), "{refused}");
    let radiograph = Slice { sop_class: "1.2.840.10008.5.1.4.1.1.1".into(), ..Slice::new("1.2.3", 0) };
    let pairs = [(uid(&radiograph.sop_class), uid(EXPLICIT_LITTLE))];
    let mut association = StoreAssociation::open(&door.peer(), &pairs).unwrap();
    assert!(matches!(association.store(&radiograph.file()), Err(SendError::NotTaken { .. })));
    assert_eq!(door.stored().len(), 0);
}

#[test]
fn strangers_are_turned_away_by_name() {
    let called = Some(title("BOX"));
    let door = open(DicomConfig { callers: vec![title("CT1")], called, ..config() });
    echo(&door.peer()).unwrap();
    for peer in [Peer { calling: title("MR9"), ..door.peer() }, Peer { called: title("PACS"), ..door.peer() }] {
        let refused = echo(&peer).unwrap_err();
        let SendError::Association(AssociationError::Rejected { transient: false, .. }) = refused else {
            panic!("{refused}")
        };
    }
    if installed("echoscu") {
        let (content, said) = dcmtk(&door, "echoscu", &["-v", "-aet", "MR9", "-aec", "BOX"]);
        assert!(!content && said.contains("Calling AE Title Not Recognized"), "{said}");
        let (content, said) = dcmtk(&door, "echoscu", &["-v", "-aet", "CT1", "-aec", "BOX"]);
        assert!(content, "{said}");
    }
}

#[test]
fn one_association_too_many_is_rejected_for_now() {
    let door = open(DicomConfig { associations_max: 2, ..config() });
    let held = [door.associated(), door.associated()];
    let refused = echo(&door.peer()).unwrap_err();
    let SendError::Association(AssociationError::Rejected { transient: true, .. }) = refused else { panic!("{refused}") };
    for mut stream in held {
        stream.write_all(&release_request_pdu()).unwrap();
        assert_eq!(read_pdu(&mut stream).unwrap()[0], 6, "A-RELEASE-RP");
    }
    // The place is free at once, however often: also while the released connections are still open.
    for _ in 0..20 {
        echo(&door.peer()).unwrap();
    }
}

#[test]
fn silent_connections_hold_no_thread_and_are_closed_in_time() {
    let artim = Duration::from_millis(300);
    let door = open(DicomConfig { associations_max: 1, artim, ..config() });
    let begun = Instant::now();
    let mut silent: Vec<TcpStream> = (0..40).map(|_| door.connect()).collect();
    echo(&door.peer()).expect("forty silent connections keep nobody out");
    let mut dribbling = door.connect();
    dribbling.write_all(&request(&[(CT, EXPLICIT_LITTLE)])[..70]).unwrap();
    for stream in &mut silent {
        assert_eq!(read_pdu(stream), None);
    }
    assert_eq!(read_pdu(&mut dribbling).unwrap(), abort_pdu(AbortReason::Unspecified));
    assert!(begun.elapsed() < Duration::from_secs(5));
    // More than the lobby has places: the oldest go, and the newest is served.
    let _crowd: Vec<TcpStream> = (0..200).map(|_| door.connect()).collect();
    echo(&door.peer()).unwrap();
}

#[test]
fn a_peer_who_dribbles_a_message_is_aborted() {
    let idle = Duration::from_millis(300);
    let door = open(DicomConfig { idle, message: Duration::from_millis(900), ..config() });
    // Half a PDU and silence.
    let mut stream = door.associated();
    stream.write_all(&store_command(&Slice::new("1.2.3", 0))[..20]).unwrap();
    assert_eq!(read_pdu(&mut stream).unwrap(), abort_pdu(AbortReason::Unspecified));
    // Whole PDUs of two bytes, each in time, and no end.
    let mut stream = door.associated();
    stream.write_all(&store_command(&Slice::new("1.2.3", 0))).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let begun = Instant::now();
    let last_word = loop {
        stream.write_all(&fragment(0, &[8, 0])).unwrap();
        if let Some(pdu) = read_pdu(&mut stream) {
            break pdu;
        }
        assert!(begun.elapsed() < Duration::from_secs(3), "held for {:?}", begun.elapsed());
    };
    assert_eq!(last_word, abort_pdu(AbortReason::Unspecified));
    assert_eq!(door.stored().len(), 0);
    echo(&door.peer()).unwrap();
}

#[test]
fn an_abort_in_mid_transfer_leaves_nothing_of_the_instance() {
    let door = open(config());
    let (first, second) = (Slice::new("1.2.3", 0), Slice::new("1.2.3", 1));
    let mut stream = door.associated();
    assert_eq!(store_raw(&mut stream, &first, &first.data_set()).0, Status::SUCCESS);
    stream.write_all(&store_command(&second)).unwrap();
    stream.write_all(&fragment(0, &second.data_set()[..1000])).unwrap();
    stream.write_all(&abort_pdu(AbortReason::Unspecified)).unwrap();
    let told: Vec<Arrival> = (0..2).map(|_| door.arrivals.recv_timeout(Duration::from_secs(5)).unwrap()).collect();
    assert!(matches!(&told[..], [Arrival::Instance(_), Arrival::Lost(_)]), "{told:?}");
    assert_eq!(door.stored().len(), 1);
}

#[test]
fn every_failure_has_its_status_and_the_association_goes_on() {
    let slice = Slice::new("1.2.3", 0);
    let sound = slice.data_set();
    let config = DicomConfig { instance_bytes_max: 20_000, ..config() };
    let door = open_with(config, SpoolLimits { bytes_max: 20_000, ..SpoolLimits::default() });
    let mut stream = door.associated();
    let mut check = |data_set: &[u8], expected: Status, word: &str| {
        let (status, comment) = store_raw(&mut stream, &slice, data_set);
        assert!(status == expected && comment.contains(word), "{status:x?} {comment:?}, not {expected:x?} {word:?}");
    };
    check(b"not DICOM at all", Status::CANNOT_UNDERSTAND, "");
    check(&sound[..sound.len() - 1], Status::CANNOT_UNDERSTAND, "");
    let mut lying = sound.clone();
    let pixel_length_at = lying.len() - 64 * 64 * 2 - 4;
    lying[pixel_length_at..pixel_length_at + 4].copy_from_slice(&100u32.to_le_bytes());
    check(&lying, Status::CANNOT_UNDERSTAND, "need 8192 bytes");
    let mut lying = sound.clone();
    lying[6..8].copy_from_slice(&0xfff0u16.to_le_bytes());
    check(&lying, Status::CANNOT_UNDERSTAND, "broken at byte 8");
    let other_class = Slice { sop_class: "1.2.840.10008.5.1.4.1.1.4".into(), ..slice.clone() };
    check(&other_class.data_set(), Status::DOES_NOT_MATCH, "class");
    check(&Slice { number: 1, ..slice.clone() }.data_set(), Status::DOES_NOT_MATCH, "1.2.3.2");
    check(&vec![0; 60_000], Status::CANNOT_UNDERSTAND, "more than 20000 bytes");
    assert_eq!(door.stored().len(), 0);
    check(&sound, Status::SUCCESS, "");
    check(&sound, Status::SUCCESS, "");
    let conflicting = Slice { stored: 5, ..slice.clone() };
    check(&conflicting.data_set(), Status::CANNOT_UNDERSTAND, "two different images");
    let mut second = door.associated();
    for number in 1..3 {
        let next = Slice { number, ..slice.clone() };
        let (status, _) = store_raw(&mut second, &next, &next.data_set());
        assert_eq!(status, if number == 1 { Status::SUCCESS } else { Status::OUT_OF_RESOURCES });
    }
    assert_eq!(door.stored().iter().filter(|path| path.extension().is_some_and(|e| e == "dcm")).count(), 2);
}

#[test]
fn a_broken_protocol_is_aborted_with_the_reason_of_the_standard() {
    let door = open(config());
    let slice = Slice::new("1.2.3", 0);
    let mut past_the_end = fragment(3, &[0; 20]);
    past_the_end[9] = 200;
    let mut foreign_context = store_command(&slice);
    foreign_context[10] = 99;
    let echo_answer = CommandSet::echo_request(1, "1.2.840.10008.1.1").response(Status::SUCCESS, None).encode();
    let cases: [(&str, Vec<u8>, AbortReason); 9] = [
        ("a fragment longer than its PDU", past_the_end, AbortReason::InvalidParameter),
        ("a context nobody agreed", foreign_context, AbortReason::InvalidParameter),
        ("a PDU of four gigabytes", vec![4, 0, 255, 255, 255, 255], AbortReason::InvalidParameter),
        ("a command of garbage", fragment(3, &[7; 40]), AbortReason::InvalidParameter),
        ("a second association request", request(&[(CT, EXPLICIT_LITTLE)]), AbortReason::UnexpectedPdu),
        ("a PDU nobody knows", vec![9, 0, 0, 0, 0, 0], AbortReason::UnrecognizedPdu),
        ("a data set without command", fragment(2, &[0; 8]), AbortReason::UnexpectedPdu),
        ("an answer to no question", fragment(3, &echo_answer), AbortReason::UnexpectedPdu),
        ("a release inside a message", [store_command(&slice), release_request_pdu()].concat(), AbortReason::UnexpectedPdu),
    ];
    for (what, bytes, reason) in cases {
        let mut stream = door.associated();
        stream.write_all(&bytes).unwrap();
        assert_eq!(read_pdu(&mut stream), Some(abort_pdu(reason)), "{what}");
    }
    let mut stream = door.connect();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(read_pdu(&mut stream), Some(abort_pdu(AbortReason::UnrecognizedPdu)));
}

#[test]
fn an_unknown_service_is_answered_and_not_fatal() {
    let door = open(config());
    let limits = Limits {
        pdu_bytes_max: 16_384,
        idle: Duration::from_secs(5),
        message: Duration::from_secs(5),
        data_set_bytes_max: 1000,
    };
    let contexts = contexts(&[(CT, IMPLICIT_LITTLE)]);
    let mut association =
        Association::request(door.server.address(), &title("CT1"), &title("BOX"), &contexts, limits).unwrap();
    // A C-STORE-RQ whose command field is made into C-FIND-RQ's.
    let mut find = CommandSet::store_request(9, &uid(CT), &uid("1.2.3")).encode();
    let at = find.windows(8).position(|w| w == [0, 0, 0, 1, 2, 0, 0, 0]).unwrap() + 8;
    find[at] = 0x20;
    association.send_command(1, &CommandSet::parse(&find).unwrap()).unwrap();
    association.send_data_set(1, &[0; 64]).unwrap();
    let event = association.next_event().unwrap();
    let scanside::dicom::association::Event::Command(_, answer) = event else { panic!("{event:?}") };
    assert_eq!(answer.status(), Ok(Status::UNRECOGNIZED_OPERATION));
    association.release().unwrap();
}

#[test]
fn shutting_down_aborts_who_is_there_and_frees_the_port() {
    let door = open(config());
    let address = door.server.address();
    let mut stream = door.associated();
    door.server.shutdown();
    assert_eq!(read_pdu(&mut stream), Some(abort_pdu(AbortReason::Unspecified)));
    drop(stream);
    assert!(TcpStream::connect(address).is_err());
}

/// A valid conversation, damaged: bits flipped, cut, doubled, swapped, or with a length that lies.
fn damaged(valid: &[u8], seed: u64) -> Vec<u8> {
    let mut random = Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    random.next();
    let mut bytes = valid.to_vec();
    // Most of the structure is at the beginning; damage in pixels teaches nothing.
    let structure = 1200.min(bytes.len());
    for _ in 0..=random.below(6) {
        let at = if random.below(3) == 0 { random.below(bytes.len()) } else { random.below(structure.min(bytes.len())) };
        match random.below(6) {
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.next() as u8,
            3 => bytes.truncate(at.max(1)),
            4 => {
                let lie = [0, 1, 0xff, 0xffff, 0x7fff_ffff, 0xffff_fffe, 0xffff_ffffu32][random.below(7)];
                let end = (at + 4).min(bytes.len());
                bytes[at..end].copy_from_slice(&lie.to_be_bytes()[..end - at]);
            }
            _ => {
                let end = (at + 1 + random.below(200)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, copy);
            }
        }
    }
    bytes
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn a_thousand_hostile_conversations_end_in_no_panic_and_no_growth() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let ours = std::thread::current().name().is_some_and(|name| name.starts_with("scanside-"));
        PANICS.fetch_add(usize::from(ours), Ordering::SeqCst);
        before(panic);
    }));
    let slice = Slice::new("1.2.826.0.1.7", 3);
    let mut valid = request(&[(CT, EXPLICIT_LITTLE), ("1.2.840.10008.1.1", IMPLICIT_LITTLE)]);
    valid.extend(store_command(&slice));
    valid.extend(fragment(2, &slice.data_set()));
    valid.extend(release_request_pdu());
    let door = open(DicomConfig { idle: Duration::from_secs(2), artim: Duration::from_secs(2), ..config() });
    let attack = |seeds: std::ops::Range<u64>| {
        for seed in seeds {
            let mut stream = door.connect();
            // A peer that is cut off while it still sends is an answer, too.
            let _ = stream.write_all(&damaged(&valid, seed));
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let ended = stream.take(1 << 20).read_to_end(&mut answer);
            assert!(ended.is_ok() || ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset), "seed {seed}");
        }
    };
    let round = |from: u64| {
        std::thread::scope(|scope| {
            for part in 0..4 {
                scope.spawn(move || attack(from + part * 125..from + (part + 1) * 125));
            }
        });
        echo(&door.peer()).expect("still answered");
        resident_bytes()
    };
    let (warm, end) = (round(0), round(500));
    assert!(end < warm + (8 << 20), "grew from {warm} to {end} bytes");
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
    let mut stream = door.associated();
    let next = Slice::new("1.2.826.0.1.8", 0);
    assert_eq!(store_raw(&mut stream, &next, &next.data_set()).0, Status::SUCCESS, "and still stores");
}

/// The other side of the next test: serves until it is killed.
#[test]
fn serve_until_killed() {
    let Ok(folder) = std::env::var("SCANSIDE_TEST_SPOOL") else { return };
    let (sender, arrivals) = bounded(4);
    let spool = Spool::open(Path::new(&folder), SpoolLimits::default(), sender).unwrap();
    let server = DicomServer::start(config(), Arc::new(spool)).unwrap();
    println!("listening {}", server.address());
    arrivals.iter().for_each(drop);
}

#[test]
fn what_was_answered_is_on_disk_after_kill_9() {
    use std::io::BufRead;
    let folder = tempfile::tempdir().unwrap();
    let mut random = Seeded(42);
    let mut answered = Vec::new();
    for round in 0..12 {
        let mut service = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "serve_until_killed", "--nocapture", "--test-threads=1"])
            .env("SCANSIDE_TEST_SPOOL", folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = std::io::BufReader::new(service.stdout.take().unwrap()).lines();
        let address = lines.map_while(Result::ok).find_map(|line| {
            line.split("listening ").nth(1).map(|address| address.trim().parse().unwrap())
        });
        let mut peer = Peer::new(address.expect("the service tells its address"), title("CT1"), title("BOX"));
        peer.patience = Duration::from_secs(10);
        // Some moments after so many answers: in the middle of whatever the service does then.
        let (answers, moment) = (random.below(20), Duration::from_micros(random.below(5_000) as u64));
        let (now, told) = bounded::<()>(0);
        let killer = std::thread::spawn(move || {
            let _ = told.recv();
            std::thread::sleep(moment);
            service.kill().unwrap();
            service.wait().unwrap();
        });
        let mut now = Some(now);
        if let Ok(mut association) = StoreAssociation::open(&peer, &[(uid(CT), uid(EXPLICIT_LITTLE))]) {
            for number in 0..10_000 {
                if number == answers {
                    now = None;
                }
                let slice = Slice::new(&format!("1.2.826.0.2.{}", round * 10 + number % 3), number);
                if association.store(&slice.file()).is_err() {
                    break;
                }
                answered.push(slice);
            }
        }
        drop(now);
        killer.join().unwrap();
    }
    let (sender, _arrivals) = bounded(4);
    let spool = Spool::open(folder.path(), SpoolLimits::default(), sender).unwrap();
    let recovered: Vec<Vec<u8>> = spool
        .recover()
        .unwrap()
        .into_iter()
        .map(|arrival| match arrival {
            Arrival::Instance(instance) => std::fs::read(instance.path).unwrap(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(answered.len() > 10, "only {} were answered: the test proves nothing", answered.len());
    for slice in &answered {
        let data_set = slice.data_set();
        assert!(recovered.iter().any(|file| scanside::dicom::file::data_set(file) == data_set), "{slice:?} is lost");
    }
    let halves = files(folder.path()).into_iter().filter(|path| path.extension().is_some_and(|e| e == "part")).count();
    assert_eq!(halves, 0);
}
