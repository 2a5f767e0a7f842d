//! A chest CT, a brain MR and a live ultrasound stream at once on two threads: the stream's frames go before the exams' work, and the
//! exams finish all the same. The claims are about what comes before what, not about seconds.

#[path = "support/serving.rs"]
mod serving;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use scanside::exam::brain_mr::contrast::Contrast;
use scanside::geometry::Spacing;
use scanside::ingest::socket::{Client, FrameHeader, Pixel};
use scanside::phantom::brain::BrainPhantom;
use scanside::phantom::ultrasound::{Cine, CineOptions, FIELD, PIXEL_MM, SIZE};
use scanside::phantom::{NoduleKind, NoduleWish, Phantom, PhantomOptions};
use scanside::report::{Report, Status};
use serde_json::Value;

const SCANSIDE: &str = env!("CARGO_BIN_EXE_scanside");
/// Thirty frames a second, as a cart sends them.
const FRAME_TIME: Duration = Duration::from_millis(33);

fn scanside(arguments: &[&str]) -> Output {
    Command::new(SCANSIDE).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A service with all exams, and the address of its DICOM door.
fn serve(folder: &Path) -> (Serving, String) {
    let config = folder.join("service.toml");
    std::fs::write(&config, "[series]\nquiet_s = 30\n[exams]\nrun = [\"chest-ct\", \"brain-mr\", \"ultrasound\"]\n").unwrap();
    let (child, address) = serving::serve(folder, &["--threads", "2", "--config", config.to_str().unwrap()]);
    (Serving(child), address.to_string())
}

fn chest(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    let options = PhantomOptions {
        shape: [60, 192, 192],
        spacing: Spacing::new([5.0, 1.87, 1.87]).unwrap(),
        seed: 7,
        nodules: vec![NoduleWish { kind: NoduleKind::Solid, diameter_mm: 20.0 }],
        ..PhantomOptions::default()
    };
    let phantom = Phantom::new(&options).unwrap();
    let series = phantom.series("side by side");
    for k in 0..phantom.grid().shape[0] {
        std::fs::write(folder.join(format!("{k:03}")), phantom.image(&series, k).unwrap()).unwrap();
    }
}

fn brain(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    let phantom = BrainPhantom::default();
    for contrast in Contrast::ALL {
        let images = phantom.images(contrast, &phantom.series(contrast, "side by side")).unwrap();
        for (k, image) in images.into_iter().enumerate() {
            std::fs::write(folder.join(format!("{}-{k:03}", contrast.name())), image).unwrap();
        }
    }
}

/// Sends frames at their pace until it is told to stop; how many.
fn stream(socket: &Path, over: &AtomicBool) -> u64 {
    let cine = Cine::new(CineOptions { frames: 8, ..CineOptions::default() });
    let mut frames = vec![vec![0u8; SIZE[0] * SIZE[1]]; 8];
    frames.iter_mut().enumerate().for_each(|(k, frame)| cine.draw(k, frame));
    let [top, left, bottom, right] = FIELD.map(|v| v as u32);
    let mut client = Client::connect(socket, "cart").unwrap();
    let (begun, mut sent) = (Instant::now(), 0u32);
    while !over.load(Ordering::Relaxed) {
        let header = FrameHeader {
            rows: SIZE[0] as u16,
            columns: SIZE[1] as u16,
            pixel: Pixel::Gray8,
            time_us: u64::from(sent) * FRAME_TIME.as_micros() as u64,
            spacing_mm: Some([PIXEL_MM; 2]),
            region: Some([left, top, right - 1, bottom - 1]),
        };
        client.push_frame(header, &frames[sent as usize % frames.len()]).unwrap();
        sent += 1;
        std::thread::sleep((begun + FRAME_TIME * sent).saturating_duration_since(Instant::now()));
    }
    client.released().unwrap();
    sent.into()
}

/// While an exam worked on a series: how long, and what the stream did meanwhile.
#[derive(Clone, Copy)]
struct Meanwhile {
    begun: Instant,
    ended: Instant,
    analysed: [u64; 2],
}

#[test]
fn a_stream_goes_before_a_chest_ct_and_a_brain_mr_and_both_finish_within_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let (chest_images, brain_images) = (folder.path().join("chest"), folder.path().join("brain"));
    chest(&chest_images);
    brain(&brain_images);
    let (_serving, address) = serve(folder.path());
    let socket = folder.path().join("socket");
    let over = AtomicBool::new(false);
    let mut worked: BTreeMap<String, Meanwhile> = BTreeMap::new();
    let mut client = Client::connect(&socket, "observer").unwrap();
    let sent = std::thread::scope(|scope| {
        let streaming = scope.spawn(|| stream(&socket, &over));
        let send = |path: &Path| Command::new(SCANSIDE).arg("send").arg(path).args(["--dicom", &address]).stdout(Stdio::null()).spawn().unwrap();
        let mut senders = [send(&chest_images), send(&brain_images)];
        // One report of the CT, four of the MR.
        let begun = Instant::now();
        loop {
            let status = client.status().unwrap();
            let now = Instant::now();
            assert!(now - begun < Duration::from_secs(300), "{status}");
            if let Some(series) = status["working_on"][0].as_str() {
                let analysed = status["live"]["frames_analysed"].as_u64().unwrap();
                let seen = worked.entry(series.to_owned());
                let seen = seen.or_insert(Meanwhile { begun: now, ended: now, analysed: [analysed; 2] });
                (seen.ended, seen.analysed[1]) = (now, analysed);
            }
            if status["reported"] == 5 {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(senders.iter_mut().all(|sender| sender.wait().unwrap().success()));
        over.store(true, Ordering::Relaxed);
        streaming.join().unwrap()
    });

    let socket = socket.to_str().unwrap();
    let watched = scanside(&["watch", "--socket", socket, "--count", "6", "--timeout", "120", "--json"]);
    assert!(watched.status.success(), "{}", text(&watched.stderr));
    let reports: Vec<Report> = text(&watched.stdout).lines().map(|line| Report::from_json(line.as_bytes()).unwrap()).collect();
    let of = |exam: &str| reports.iter().filter(|report| report.exam == exam).collect::<Vec<_>>();
    let (chest, brain, live) = (of("chest-ct"), of("brain-mr"), of("ultrasound"));
    assert_eq!((chest.len(), brain.len(), live.len()), (1, 4, 1));
    assert_eq!(chest[0].status, Status::Complete, "{:?}", chest[0].reason);
    let found: Vec<_> = brain.iter().filter(|report| report.status == Status::Complete).collect();
    assert!(found.len() == 1 && found[0].measurements.contains_key("whole_tumour_ml"));
    // The stream came first to the end of its life, and first at every moment of it.
    assert!(matches!(live[0].status, Status::Complete | Status::Partial), "{:?}", live[0].reason);
    assert!(live[0].sequence > chest[0].sequence.max(found[0].sequence), "it went on until both had finished");
    let number = |name: &str| live[0].measurements[name].value as u64;
    assert_eq!((number("frames_analysed") + number("frames_dropped"), number("frames_refused")), (sent, 0));
    let mut longest = Duration::ZERO;
    for series in [&chest[0].series_uid, &found[0].study_uid] {
        let own = |report: &&Report| report.series_uid == *series || report.study_uid == *series;
        let names: Vec<String> = reports.iter().filter(own).map(|report| report.series_uid.to_string()).collect();
        let meanwhile = names.iter().find_map(|name| worked.get(name)).expect("each exam was seen at work");
        longest = longest.max(meanwhile.ended - meanwhile.begun);
        let [before, after] = meanwhile.analysed;
        println!("{} frames while an exam worked for {:?}", after - before, meanwhile.ended - meanwhile.begun);
        assert!(after > before, "frames are analysed while an exam works on {series}");
    }

    // How the service says it.
    let status: Value = serde_json::from_slice(&scanside(&["status", "--socket", socket, "--json"]).stdout).unwrap();
    let live = &status["live"];
    let count = |name: &str| live[name].as_u64().unwrap();
    assert_eq!((count("streams"), count("frames_in"), count("frames_refused")), (0, sent, 0));
    assert_eq!(count("frames_analysed") + count("frames_dropped"), sent);
    let (p50, p99) = (live["latency_p50_ms"].as_f64().unwrap(), live["latency_p99_ms"].as_f64().unwrap());
    println!("{sent} frames, {} dropped, p50 {p50} ms, p99 {p99} ms, peak {} MiB", count("frames_dropped"), status["memory_peak_mib"]);
    assert!(p50 > 0.0 && p50 <= p99);
    assert!(p99 < longest.as_secs_f64() * 1e3 / 2.0, "no frame waited for an exam to end: {p99} ms of {longest:?}");
    assert!(count("frames_analysed") > count("frames_dropped"), "most frames are seen: {live}");
    assert!(status["memory_peak_mib"].as_u64() <= status["memory_budget_mib"].as_u64(), "{status}");
    let said = text(&scanside(&["status", "--socket", socket]).stdout);
    for (name, value) in [("frames_in", sent), ("frames_analysed", count("frames_analysed")), ("frames_dropped", count("frames_dropped"))] {
        let line = said.lines().find(|line| line.contains(&format!("live.{name} "))).unwrap_or_else(|| panic!("no {name} in {said}"));
        assert_eq!(line.split_whitespace().last(), Some(value.to_string().as_str()), "{line}");
    }
    assert!(said.contains("live.latency_p50_ms") && said.contains("live.latency_p99_ms"), "{said}");

    // Company changes nothing that is computed.
    let out = folder.path().join("alone");
    let alone = scanside(&["analyze", chest_images.to_str().unwrap(), "--out", out.to_str().unwrap(), "--threads", "1"]);
    assert!(alone.status.success(), "{}", text(&alone.stderr));
    let alone = Report::from_json(&std::fs::read(out.join("findings.json")).unwrap()).unwrap();
    assert_eq!(text(&alone.deterministic_json()), text(&chest[0].deterministic_json()));
}
