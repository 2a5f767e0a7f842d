//! Claims about the ultrasound exam: lesions of drawn cines, from files and live, and what is wrong about streams.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use scanside::config::Settings;
use scanside::dicom::TransferSyntax;
use scanside::exam::registry::{ExamKind, Exams};
use scanside::exam::ultrasound::{ClipHeader, Seen, Ultrasound};
use scanside::finding::Finding;
use scanside::infer::package::{Models, Trust};
use scanside::ingest::socket::{Client, ClientError, FrameHeader, Pixel};
use scanside::phantom::ultrasound::{Cine, CineOptions, FIELD, PIXEL_MM, SIZE};
use scanside::pool::Pool;
use scanside::report::{Device, Report, Status};
use scanside::series::{Assembler, Limits};
use scanside::service::Service;
use scanside::service::analysis::Analyst;
use scanside::study::{RejectionCode, Uid};

const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";
const RLE: &str = "1.2.840.10008.1.2.5";

fn models() -> Models {
    Models::new(None, Trust::default())
}

fn header() -> ClipHeader {
    ClipHeader { rows: SIZE[0], columns: SIZE[1], spacing_mm: Some([PIXEL_MM; 2]), region: Some(FIELD) }
}

fn frames(cine: &Cine) -> Vec<Vec<u8>> {
    let mut out = vec![vec![0u8; SIZE[0] * SIZE[1]]; cine.options().frames];
    out.iter_mut().enumerate().for_each(|(k, frame)| cine.draw(k, frame));
    out
}

/// The report on DICOM files as `scanside analyze` makes it.
fn analysed(files: &[Vec<u8>]) -> Report {
    analysed_by(&[ExamKind::Ultrasound], files)
}

fn analysed_by(exams: &[ExamKind], files: &[Vec<u8>]) -> Report {
    let scratch = tempfile::tempdir().unwrap();
    let mut assembler = Assembler::new(scratch.path(), Limits::default());
    for file in files {
        assembler.add(Instant::now(), 1, file).unwrap();
    }
    assembler.finish_all(Instant::now());
    let series = assembler.take_finished().remove(0);
    let exams = Exams::load(&models(), exams).unwrap();
    let device = Device { name: "test".into(), version: "0".into(), uid: Uid::derived(b"test") };
    let analyst = Analyst::new(exams, 2, device, scratch.path().to_owned());
    let report = analyst.analyse(&series, &[], Timestamp::UNIX_EPOCH, &|_| {}).report;
    // As a receiver reads it: a number's last bit is not the same after its way through text.
    Report::from_json(&report.to_json().unwrap()).unwrap()
}

#[test]
fn where_nobody_named_the_exam_the_report_says_how_it_is_named() {
    let cine = Cine::new(CineOptions { frames: 2, ..CineOptions::default() });
    let report = analysed_by(&[], &[cine.file(TransferSyntax::find(EXPLICIT_LITTLE).unwrap(), true).unwrap()]);
    let reason = report.reason.unwrap();
    assert_eq!((report.status, reason.code.as_str()), (Status::NotAttempted, "no_exam"));
    assert!(reason.text.contains("--exam ultrasound"), "{}", reason.text);
}

#[test]
fn lesions_of_a_drawn_cine_are_found_once_each_with_their_size_in_millimetres() {
    let cine = Cine::new(CineOptions { frames: 60, ..CineOptions::default() });
    let report = analysed(&[cine.file(TransferSyntax::find(RLE).unwrap(), true).unwrap()]);
    assert_eq!(report.status, Status::Complete, "{:?}", report.reason);
    assert_eq!(report.exam, "ultrasound");
    let used = report.volume.as_ref().unwrap().cine.unwrap();
    assert!(used.calibrated && used.frame_time_ms == Some(33.0));
    for wanted in 1..=2 {
        let near = |finding: &&Finding| {
            let [k, row, column] = finding.centroid_voxel;
            let truth = cine.truth(k as usize).into_iter().find(|t| t.lesion == wanted);
            truth.is_some_and(|t| (column - t.centre[0]).hypot(row - t.centre[1]) * PIXEL_MM < t.short_axis_mm / 2.0)
        };
        let found: Vec<&Finding> = report.findings.iter().filter(near).collect();
        assert_eq!(found.len(), 1, "lesion {wanted}: {:?}", report.findings);
        let over_time = found[0].cine.as_ref().unwrap();
        let truth = cine.truth(over_time.best_frame)[wanted - 1];
        let long = found[0].long_axis_mm.unwrap();
        assert!((long / truth.long_axis_mm - 1.0).abs() < 0.2, "{long} mm, drawn with {:.1}", truth.long_axis_mm);
        assert!(found[0].in_pixels.is_none() && found[0].area_mm2.is_some() && found[0].volume_mm3.is_none());
        assert!(found[0].centroid_lps_mm.is_none(), "ultrasound has no place in patient space");
    }
}

#[test]
fn without_calibration_everything_is_in_pixels_and_says_so() {
    let cine = Cine::new(CineOptions { frames: 12, moving: false, ..CineOptions::default() });
    let file = |calibrated| cine.file(TransferSyntax::find(EXPLICIT_LITTLE).unwrap(), calibrated).unwrap();
    let (plain, scaled) = (analysed(&[file(false)]), analysed(&[file(true)]));
    assert!(!plain.volume.as_ref().unwrap().cine.unwrap().calibrated);
    assert!(!plain.findings.is_empty());
    for finding in &plain.findings {
        assert!(finding.long_axis_mm.is_none() && finding.area_mm2.is_none() && finding.in_pixels.is_some());
    }
    let pixels = plain.findings[0].in_pixels.unwrap().long_axis;
    let near = scaled.findings.iter().filter_map(|f| f.long_axis_mm).map(|mm| (mm / PIXEL_MM / pixels - 1.0).abs());
    assert!(near.fold(f64::INFINITY, f64::min) < 0.1);
}

#[test]
fn a_file_without_a_picture_is_rejected_and_a_still_image_is_read() {
    let cine = Cine::new(CineOptions { frames: 1, moving: false, ..CineOptions::default() });
    let syntax = TransferSyntax::find(EXPLICIT_LITTLE).unwrap();
    let mut black = cine.file(syntax, false).unwrap();
    let pixels = black.len() - SIZE[0] * SIZE[1];
    black[pixels..].fill(0);
    let report = analysed(&[black]);
    assert_eq!((report.status, report.reason.unwrap().code.as_str()), (Status::Rejected, "wrong_content"));
    let report = analysed(&[cine.file(syntax, true).unwrap()]);
    assert_eq!(report.status, Status::Complete);
    assert!(!report.findings.is_empty() && report.findings.iter().all(|f| f.cine.as_ref().unwrap().frames_seen == 1));
}

#[test]
fn absurd_calibration_is_no_calibration() {
    use scanside::series::Planar;
    for spacing in [[f64::NAN, 0.2], [0.0, 0.2], [1e9, 0.2], [-0.1, 0.2], [f64::INFINITY; 2]] {
        let clip = ClipHeader::of([100, 100], Planar { spacing_mm: Some(spacing), region: Some([50, 50, u32::MAX, u32::MAX]) });
        assert_eq!((clip.spacing_mm, clip.region), (None, Some([50, 50, 100, 100])));
    }
    let beyond = ClipHeader::of([100, 100], Planar { spacing_mm: None, region: Some([5000, 5000, 6000, 6000]) });
    let exam = Ultrasound::load(&models()).unwrap();
    let mut reader = exam.reader().unwrap();
    reader.start(beyond);
    assert!(reader.push(0, 0, &vec![90; 10_000], &Pool::new(1)).unwrap().is_empty());
}

/// Of the lesions of a cine, how many bear one and the same name whenever they are seen at 5 mm and more (in a quarter of the frames at
/// least), and how many there are; and in what part of the frames that show one of 5 mm and more it is seen.
fn identities(cine: &Cine, exam: &Ultrasound, pool: &Pool) -> (usize, usize, [usize; 2]) {
    let mut reader = exam.reader().unwrap();
    reader.start(header());
    let lesions = cine.options().lesions;
    let mut of: Vec<Vec<u32>> = vec![Vec::new(); lesions];
    let mut grey = vec![0u8; SIZE[0] * SIZE[1]];
    let mut shown = 0;
    for k in 0..cine.options().frames {
        cine.draw(k, &mut grey);
        let seen: Vec<Seen> = reader.push(k, 0, &grey, pool).unwrap().to_vec();
        for truth in cine.truth(k).iter().filter(|t| t.long_axis_mm >= 5.0) {
            shown += 1;
            let near = |s: &&Seen| (s.centre[0] - truth.centre[0]).hypot(s.centre[1] - truth.centre[1]) * PIXEL_MM < truth.short_axis_mm / 2.0;
            if let Some(seen) = seen.iter().find(near) {
                of[truth.lesion - 1].push(seen.track);
            }
        }
    }
    let kept = of.iter().filter(|tracks| tracks.len() * 4 > cine.options().frames && tracks.windows(2).all(|pair| pair[0] == pair[1]));
    (kept.count(), lesions, [of.iter().map(Vec::len).sum(), shown])
}

/// Two cines in the tests; `SCANSIDE_CINES=20` measures the figure of the card.
#[test]
fn a_lesion_keeps_its_identity_through_drift_rocking_and_dropout() {
    let cines = std::env::var("SCANSIDE_CINES").ok().and_then(|n| n.parse().ok()).unwrap_or(2u64);
    let (exam, pool) = (Ultrasound::load(&models()).unwrap(), Pool::new(1));
    let (mut whole, mut kept, mut lesions, mut seen, mut shown) = (0, 0, 0, 0, 0);
    for seed in 1..=cines {
        let cine = Cine::new(CineOptions { seed, frames: 300, ..CineOptions::default() });
        let (here, drawn, [sightings, chances]) = identities(&cine, &exam, &pool);
        whole += u64::from(here == drawn);
        (kept, lesions) = (kept + here, lesions + drawn);
        (seen, shown) = (seen + sightings, shown + chances);
        println!("cine {seed}: {here} of {drawn}, seen in {sightings} of {chances} frames");
    }
    println!("one identity: {kept} of {lesions} lesions, all in {whole} of {cines} cines; seen in {seen} of {shown} frames");
    assert!(kept * 4 >= lesions * 3, "{kept} of {lesions}");
}

struct Serving {
    service: Option<Service>,
    folder: tempfile::TempDir,
}

impl Serving {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = Settings::default();
        settings.spool.path = folder.path().join("spool");
        settings.socket.path = Some(folder.path().join("socket"));
        settings.exams.run = vec![ExamKind::Ultrasound];
        settings.work.threads = 2;
        Self { service: Some(Service::start(settings).unwrap()), folder }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket(), "claims").unwrap()
    }

    fn service(&self) -> &Service {
        self.service.as_ref().unwrap()
    }

    /// Waits until so many frames have been analysed since the start.
    fn wait_for_frames(&self, frames: u64) {
        let begin = Instant::now();
        while self.service().status().live.frames_analysed < frames {
            assert!(begin.elapsed() < Duration::from_secs(120), "{:?}", self.service().status().live);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn report(&self, number: u64) -> Report {
        let journal = self.service().journal();
        assert!(journal.wait_after(number - 1, Duration::from_secs(120)), "no report {number}");
        Report::from_json(&journal.next_after(number - 1).unwrap().unwrap().json).unwrap()
    }
}

fn live_header(k: usize) -> FrameHeader {
    let [top, left, bottom, right] = FIELD.map(|v| v as u32);
    FrameHeader {
        rows: SIZE[0] as u16,
        columns: SIZE[1] as u16,
        pixel: Pixel::Gray8,
        time_us: k as u64 * 33_000,
        spacing_mm: Some([PIXEL_MM; 2]),
        region: Some([left, top, right - 1, bottom - 1]),
    }
}

/// What a report says of findings, without the names that belong to the stream.
fn seen(report: &Report) -> Vec<Finding> {
    let unnamed = |f: &Finding| Finding { tracking_uid: Uid::derived(b""), ..f.clone() };
    report.findings.iter().map(unnamed).collect()
}

#[test]
fn a_cine_gives_the_same_findings_live_at_any_pace_as_from_its_file() {
    let cine = Cine::new(CineOptions { frames: 24, ..CineOptions::default() });
    let frames = frames(&cine);
    let from_file = analysed(&[cine.file(TransferSyntax::find(EXPLICIT_LITTLE).unwrap(), true).unwrap()]);
    let serving = Serving::start();
    let mut analysed = 0;
    for (number, pause_ms) in [(1, 0), (2, 7)] {
        let mut client = serving.client();
        for (k, frame) in frames.iter().enumerate() {
            client.push_frame(live_header(k), frame).unwrap();
            analysed += 1;
            // One after the other: nothing is dropped, and the pace differs.
            serving.wait_for_frames(analysed);
            std::thread::sleep(Duration::from_millis(pause_ms));
        }
        client.released().unwrap();
        let report = serving.report(number);
        assert_eq!(report.status, Status::Complete, "{:?}", report.reason);
        assert!(!report.findings.is_empty());
        assert_eq!(seen(&report), seen(&from_file));
    }
    let live = serving.service().status().live;
    assert_eq!((live.frames_in, live.frames_analysed, live.frames_dropped, live.streams), (48, 48, 0, 0));
    assert!(live.latency_p50_ms > 0.0 && live.latency_p99_ms >= live.latency_p50_ms);
}

#[test]
fn frames_faster_than_the_box_are_dropped_counted_and_reported() {
    let cine = Cine::new(CineOptions { frames: 8, ..CineOptions::default() });
    let frames = frames(&cine);
    let serving = Serving::start();
    let mut client = serving.client();
    let mut watching = serving.client();
    watching.look().unwrap();
    for k in 0..200 {
        client.push_frame(live_header(k), &frames[k % frames.len()]).unwrap();
    }
    let look = watching.next_look(Instant::now() + Duration::from_secs(60)).unwrap().unwrap();
    let look: serde_json::Value = serde_json::from_slice(&look.1).unwrap();
    assert!(look["frame"].is_u64() && look["lesions"].is_array() && look["latency_ms"].as_f64().unwrap() > 0.0);
    // The cable is pulled: the stream ends all the same.
    drop(client);
    let report = serving.report(1);
    let number = |name: &str| report.measurements[name].value as u64;
    assert_eq!((report.status, report.reason.as_ref().unwrap().code.as_str()), (Status::Partial, "frames_dropped"));
    assert!(number("frames_dropped") > 0);
    assert_eq!(number("frames_dropped") + number("frames_analysed"), 200);
}

#[test]
fn a_frame_of_another_size_is_refused_and_neither_its_stream_nor_another_suffers() {
    let cine = Cine::new(CineOptions { frames: 6, ..CineOptions::default() });
    let frames = frames(&cine);
    let serving = Serving::start();
    let (mut client, mut other) = (serving.client(), serving.client());
    other.push_frame(live_header(0), &frames[0]).unwrap();
    serving.wait_for_frames(1);
    for (k, frame) in frames.iter().enumerate() {
        client.push_frame(live_header(k), frame).unwrap();
        serving.wait_for_frames(k as u64 + 2);
        let small = FrameHeader { rows: 128, ..live_header(k) };
        match client.push_frame(small, &frame[..128 * SIZE[1]]) {
            Err(ClientError::Refused { code, retry: false, .. }) => assert_eq!(code, "mixed_geometry"),
            other => panic!("{other:?}"),
        }
    }
    let back = FrameHeader { time_us: 1, ..live_header(0) };
    assert!(matches!(client.push_frame(back, &frames[0]), Err(ClientError::Refused { code, .. }) if code == "malformed"));
    let huge = FrameHeader { rows: 4000, columns: 4000, ..live_header(0) };
    let refused = serving.client().push_frame(huge, &vec![0; 16_000_000]);
    assert!(matches!(refused, Err(ClientError::Refused { retry: true, .. })), "a third stream finds no room: {refused:?}");
    client.released().unwrap();
    let report = serving.report(1);
    assert_eq!((report.status, report.measurements["frames_refused"].value), (Status::Complete, 7.0));
    other.released().unwrap();
    assert_eq!(serving.report(2).measurements["frames_analysed"].value, 1.0);
}

/// The header of a live frame as it goes over the wire.
const FRAME_HEADER: &str = r#"{"type":"frame","rows":256,"columns":256,"pixel":"gray8","time_us":1,"spacing_mm":[0.2,0.2]}"#;

/// A message of the socket's protocol, byte by byte.
fn message(header: &str, body: &[u8]) -> Vec<u8> {
    let lengths = [header.len() as u32, body.len() as u32].map(u32::to_le_bytes).concat();
    [&lengths, header.as_bytes(), body].concat()
}

#[test]
fn a_sender_that_stops_reading_ends_as_its_own_stream_and_holds_up_no_other() {
    use std::io::Write;
    let cine = Cine::new(CineOptions { frames: 4, ..CineOptions::default() });
    let frames = frames(&cine);
    let serving = Serving::start();
    let mut deaf = std::os::unix::net::UnixStream::connect(serving.socket()).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    deaf.write_all(&message(r#"{"type":"hello","protocol":1,"client":"deaf"}"#, b"")).unwrap();
    let frame = message(FRAME_HEADER, &frames[0]);
    // It never reads an answer: at some moment nobody takes its bytes any more, or they all fit.
    let sent = (0..400).take_while(|_| deaf.write_all(&frame).is_ok()).count();
    assert!(sent > 0);
    let before = serving.service().status().live.frames_analysed;
    let mut client = serving.client();
    for (k, frame) in frames.iter().enumerate() {
        client.push_frame(live_header(k), frame).unwrap();
    }
    client.released().unwrap();
    serving.wait_for_frames(before + 1);
    drop(deaf);
    let reports = [serving.report(1), serving.report(2)];
    assert!(reports.iter().all(|r| matches!(r.status, Status::Complete | Status::Partial)), "{reports:?}");
    assert!(reports.iter().any(|r| r.volume.as_ref().unwrap().shape[0] == 4));
}

#[test]
fn a_sender_that_stops_in_the_middle_of_a_frame_is_told_and_what_it_sent_before_is_reported() {
    use std::io::{Read, Write};
    let cine = Cine::new(CineOptions { frames: 4, ..CineOptions::default() });
    let frames = frames(&cine);
    let serving = Serving::start();
    let mut other = serving.client();
    other.push_frame(live_header(0), &frames[0]).unwrap();
    serving.wait_for_frames(1);
    let mut stuck = std::os::unix::net::UnixStream::connect(serving.socket()).unwrap();
    stuck.write_all(&message(r#"{"type":"hello","protocol":1,"client":"stuck"}"#, b"")).unwrap();
    let frame = message(FRAME_HEADER, &frames[0]);
    stuck.write_all(&frame).unwrap();
    serving.wait_for_frames(2);
    stuck.write_all(&frame[..frame.len() / 2]).unwrap();
    // The other goes on as if nothing were.
    for (k, frame) in frames.iter().enumerate().skip(1) {
        other.push_frame(live_header(k), frame).unwrap();
        serving.wait_for_frames(k as u64 + 2);
    }
    let mut answers = Vec::new();
    stuck.read_to_end(&mut answers).unwrap();
    assert!(String::from_utf8_lossy(&answers).contains("too_slow"));
    let report = serving.report(1);
    assert_eq!((report.volume.as_ref().unwrap().shape[0], report.measurements["frames_analysed"].value), (1, 1.0));
    other.released().unwrap();
    let report = serving.report(2);
    assert_eq!((report.status, report.measurements["frames_analysed"].value), (Status::Complete, 4.0));
}

#[test]
fn a_black_stream_is_rejected_and_a_connection_without_frames_says_nothing() {
    let serving = Serving::start();
    let mut client = serving.client();
    client.released().unwrap();
    for k in 0..3 {
        client.push_frame(live_header(k), &vec![0; SIZE[0] * SIZE[1]]).unwrap();
    }
    drop(client);
    let report = serving.report(1);
    assert_eq!(report.status, Status::Rejected);
    assert_eq!(report.reason.unwrap().code, serde_json::to_value(RejectionCode::WrongContent).unwrap().as_str().unwrap());
    assert_eq!(serving.service().journal().newest(), 1);
}
