//! Claims about the whole way: images in by a real client, reports out on a serial line and a socket.

#[path = "support/serving.rs"]
mod serving;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use scanside::dicom::client::{Peer, StoreAssociation};
use scanside::dicom::negotiation::AeTitle;
use scanside::geometry::{Spacing, norm, sub};
use scanside::link::{Link, Pty};
use scanside::phantom::{NoduleKind, NoduleWish, Phantom, PhantomOptions};
use scanside::report::{Report, Status};
use scanside::study::{RejectionCode, Uid};

const SCANSIDE: &str = env!("CARGO_BIN_EXE_scanside");

fn scanside(arguments: &[&str]) -> Output {
    Command::new(SCANSIDE).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn options() -> PhantomOptions {
    PhantomOptions {
        shape: [60, 192, 192],
        spacing: Spacing::new([5.0, 1.87, 1.87]).unwrap(),
        seed: 7,
        nodules: vec![NoduleWish { kind: NoduleKind::Solid, diameter_mm: 20.0 }],
        ..PhantomOptions::default()
    }
}

/// The phantom as a folder of DICOM files, drawn once for all claims.
fn study() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let phantom = Phantom::new(&options()).unwrap();
        let series = phantom.series("claims");
        for k in 0..phantom.grid().shape[0] {
            std::fs::write(folder.path().join(format!("{k:03}")), phantom.image(&series, k).unwrap()).unwrap();
        }
        folder
    });
    folder.path()
}

/// The study without some of its slices.
fn study_without(missing: &[usize]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(study()).unwrap() {
        let path = entry.unwrap().path();
        let k: usize = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        if !missing.contains(&k) {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    folder
}

/// Analyses a path; the exit code, the report where one was written, and what was said on stderr.
fn analyze(path: &Path, more: &[&str]) -> (i32, Option<Report>, String) {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("out");
    let arguments = [&["analyze", path.to_str().unwrap(), "--out", folder.to_str().unwrap()], more].concat();
    let output = scanside(&arguments);
    let report = std::fs::read(folder.join("findings.json")).ok().map(|json| Report::from_json(&json).unwrap());
    if report.is_none() {
        assert!(!folder.exists(), "nothing is left behind");
    }
    (output.status.code().unwrap(), report, text(&output.stderr))
}

/// A running `scanside serve`, killed when dropped.
struct Serving {
    child: Child,
    dicom: SocketAddr,
    folder: tempfile::TempDir,
}

impl Serving {
    fn start(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (child, dicom) = serving::serve(folder.path(), more);
        Self { child, dicom, folder }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Reports from the socket, as `scanside watch` prints them.
    fn watch(&self, count: usize) -> Vec<Report> {
        let (socket, count) = (self.socket(), count.to_string());
        let socket = socket.to_str().unwrap();
        let output = scanside(&["watch", "--socket", socket, "--count", &count, "--timeout", "120", "--json"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).lines().map(|line| Report::from_json(line.as_bytes()).unwrap()).collect()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(path: &Path, to: SocketAddr) {
    let output = scanside(&["send", path.to_str().unwrap(), "--dicom", &to.to_string()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// A null modem: what one pseudo-terminal says, the other hears.
fn null_modem(mut a: Pty, mut b: Pty) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            for (from, to) in [(0, 1), (1, 0)] {
                let ends: [&mut Pty; 2] = [&mut a, &mut b];
                let Ok(count) = ends[from].read(&mut buffer, Duration::from_millis(5)) else { return };
                let mut sent = 0;
                while sent < count {
                    match ends[to].write(&buffer[sent..count], Duration::from_millis(100)) {
                        Ok(n) => sent += n,
                        Err(_) => return,
                    }
                }
            }
        }
    });
}

#[test]
fn a_study_from_a_real_scanners_client_is_reported_on_the_serial_line() {
    let (box_side, device_side) = (Pty::open().unwrap(), Pty::open().unwrap());
    let (box_path, device_path) = (box_side.path().to_owned(), device_side.path().to_owned());
    null_modem(box_side, device_side);
    let serving = Serving::start(&["--serial", box_path.to_str().unwrap()]);
    let dcmtk = Command::new("storescu").arg("--version").output().is_ok_and(|o| o.status.success());
    if dcmtk {
        let port = serving.dicom.port().to_string();
        let status = Command::new("storescu").args(["+sd", "127.0.0.1", &port]).arg(study()).status().unwrap();
        assert!(status.success());
    } else {
        eprintln!("skipped: dcmtk is not installed; our own client sends instead");
        send(study(), serving.dicom);
    }
    let device = device_path.to_str().unwrap();
    let output = scanside(&["watch", "--serial", device, "--count", "1", "--timeout", "120", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let from_serial = Report::from_json(text(&output.stdout).trim().as_bytes()).unwrap();
    assert_eq!(from_serial.status, Status::Complete);
    assert_eq!(from_serial.volume.as_ref().unwrap().shape, [60, 192, 192]);
    assert_eq!(serving.watch(1), [from_serial]);
}

#[test]
fn streamed_or_batch_in_any_order_and_by_any_number_of_threads_the_findings_are_the_same() {
    let (code, one, _) = analyze(study(), &["--threads", "1"]);
    let one = one.unwrap();
    assert_eq!((code, one.status), (0, Status::Complete));
    for threads in ["2", "8"] {
        let (_, other, _) = analyze(study(), &["--threads", threads]);
        assert_eq!(text(&other.unwrap().deterministic_json()), text(&one.deterministic_json()));
    }
    // Backwards, over two associations, while the first is still open in the middle of the series.
    let backwards = tempfile::tempdir().unwrap();
    for k in 0..60 {
        std::fs::copy(study().join(format!("{k:03}")), backwards.path().join(format!("{:03}", 59 - k))).unwrap();
    }
    let serving = Serving::start(&["--threads", "2"]);
    send(backwards.path(), serving.dicom);
    let streamed = &serving.watch(1)[0];
    assert_eq!(text(&streamed.deterministic_json()), text(&one.deterministic_json()));
}

#[test]
fn a_large_nodule_is_found_at_its_place_and_on_its_side() {
    let truth = Phantom::new(&options()).unwrap().truth()[0];
    let (_, report, _) = analyze(study(), &[]);
    let report = report.unwrap();
    let near = |f: &&scanside::finding::Finding| norm(sub(f.centroid_lps_mm.unwrap(), truth.centre_lps_mm)) < 5.0;
    let finding = report.findings.iter().take(10).find(near).expect("a 20 mm nodule is among the first ten findings");
    assert_eq!(finding.site.laterality, Some(truth.side));
    assert!((finding.mean_diameter_mm.unwrap() - 20.0).abs() < 4.0, "{finding:?}");
    let volume = report.volume.unwrap();
    let back = volume.affine_lps.kji_to_lps(finding.centroid_voxel);
    assert!(norm(sub(back, finding.centroid_lps_mm.unwrap())) < 1e-6, "voxel and millimetres name one place");
}

#[test]
fn a_gap_is_reported_with_its_places_and_what_was_analysed() {
    let folder = study_without(&[20, 21]);
    let (code, report, _) = analyze(folder.path(), &[]);
    let report = report.unwrap();
    assert_eq!((code, report.status), (0, Status::Partial));
    assert_eq!(report.volume.unwrap().missing_slices, [20, 21]);
    let reason = report.reason.unwrap();
    assert_eq!(reason.code, "gap");
    assert!(reason.text.contains("0 to 19, 22 to 59"), "{}", reason.text);
}

#[test]
fn a_series_cut_short_by_its_sender_is_not_reported_as_a_whole_one() {
    let folder = tempfile::tempdir().unwrap();
    let config = quick(folder.path());
    let serving = Serving::start(&["--config", config.to_str().unwrap()]);
    let uid = |text| Uid::parse(text).unwrap();
    let peer = Peer::new(serving.dicom, AeTitle::parse("CT1").unwrap(), AeTitle::parse("SCANSIDE").unwrap());
    let contexts = [(uid("1.2.840.10008.5.1.4.1.1.2"), uid("1.2.840.10008.1.2.1"))];
    let mut open = StoreAssociation::open(&peer, &contexts).unwrap();
    for k in 0..40 {
        open.store(&std::fs::read(study().join(format!("{k:03}"))).unwrap()).unwrap();
    }
    open.abort();
    let report = serving.watch(1).remove(0);
    assert_eq!((report.status, report.volume.unwrap().shape[0]), (Status::Partial, 40));
    assert_eq!(report.reason.unwrap().code, "cut_short");
}

#[test]
fn two_images_that_claim_one_name_spoil_their_series() {
    let folder = study_without(&[]);
    let first = std::fs::read(study().join("010")).unwrap();
    let mut other = first.clone();
    let last = other.len() - 1000;
    other[last] ^= 0x10;
    std::fs::write(folder.path().join("once-more"), other).unwrap();
    let (code, report, said) = analyze(folder.path(), &[]);
    let reason = report.unwrap().reason.unwrap();
    assert_eq!((code, reason.code.as_str()), (1, "conflicting_duplicate"), "{said}");
    // The same image once more is no harm.
    std::fs::write(folder.path().join("once-more"), first).unwrap();
    let (code, report, _) = analyze(folder.path(), &[]);
    assert_eq!((code, report.unwrap().status), (0, Status::Complete));
}

#[test]
fn a_path_without_images_is_a_usage_error_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let (code, report, said) = analyze(folder.path(), &[]);
    assert_eq!((code, report), (2, None));
    assert_eq!(said.lines().count(), 1, "{said}");
    std::fs::write(folder.path().join("notes.txt"), "no image").unwrap();
    let (code, _, said) = analyze(folder.path(), &[]);
    assert!(code == 2 && said.contains(folder.path().to_str().unwrap()), "{said}");
    let (code, _, said) = analyze(&folder.path().join("notes.txt"), &[]);
    assert!(code == 2 && said.contains("notes.txt"), "{said}");
    let (code, _, said) = analyze(Path::new("/nowhere/at/all"), &[]);
    assert!(code == 2 && said.contains("/nowhere/at/all"), "{said}");
}

#[test]
fn one_slice_is_rejected_and_two_patients_are_not_mixed() {
    let folder = study_without(&(1..60).collect::<Vec<_>>());
    let (code, report, _) = analyze(folder.path(), &[]);
    assert_eq!((code, report.unwrap().status), (1, Status::Rejected));

    let folder = study_without(&[]);
    let phantom = Phantom::new(&PhantomOptions { seed: 8, ..options() }).unwrap();
    let series = phantom.series("another");
    for k in 0..10 {
        std::fs::write(folder.path().join(format!("other-{k}")), phantom.image(&series, k).unwrap()).unwrap();
    }
    let (code, report, said) = analyze(folder.path(), &[]);
    let reason = report.unwrap().reason.unwrap();
    assert_eq!(code, 1);
    assert_eq!(serde_json::to_value(RejectionCode::MixedStudy).unwrap(), reason.code.as_str(), "{said}");
}

#[test]
fn what_was_acknowledged_is_reported_once_however_often_the_power_goes() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = 12345u64;
    let mut sent = 0;
    // Parts of the study are sent to one life of the box after the other.
    for life in 0..5 {
        let (mut child, dicom) = serving::serve(folder.path(), &["--config", quick(folder.path()).to_str().unwrap()]);
        // Never at even distances, which would be a whole series of fewer slices.
        let others: Vec<usize> = (0..60).filter(|k| k * k % 61 % 5 != life).collect();
        send(study_without(&others).path(), dicom);
        sent += 60 - others.len();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_millis(random >> 56));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(sent, 60);
    let (child, dicom) = serving::serve(folder.path(), &["--config", quick(folder.path()).to_str().unwrap()]);
    let serving = Serving { child, dicom, folder };
    let reports = serving.watch(1);
    assert_eq!(reports[0].status, Status::Complete, "{:?}", reports[0].reason);
    assert_eq!(reports[0].volume.as_ref().unwrap().shape[0], 60);
    // Sending it all again is acknowledged and makes no second report.
    send(study(), serving.dicom);
    let socket = serving.socket();
    let arguments = ["watch", "--socket", socket.to_str().unwrap(), "--count", "1", "--timeout", "3", "--json"];
    let again = scanside(&arguments);
    assert_eq!((again.status.code(), text(&again.stdout).as_str()), (Some(1), ""));
}

/// A configuration whose last resort comes soon, though later than any pause in these claims.
fn quick(folder: &Path) -> PathBuf {
    let path = folder.join("quick.toml");
    std::fs::write(&path, "[series]\nquiet_s = 8\n").unwrap();
    path
}

#[test]
fn a_budget_that_does_not_add_up_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("small.toml");
    std::fs::write(&config, "[memory]\nbudget_mib = 100\n").unwrap();
    let spool = folder.path().join("spool");
    let output = scanside(&[
        "serve",
        "--dicom",
        "127.0.0.1:0",
        "--spool",
        spool.to_str().unwrap(),
        "--config",
        config.to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(78), "EX_CONFIG");
    let said = text(&output.stderr);
    assert!(said.contains("100 MiB granted") && said.contains("networks"), "{said}");
}

#[test]
fn the_service_ends_in_good_order_when_it_is_told_to() {
    let mut serving = Serving::start(&[]);
    let pid = i32::try_from(serving.child.id()).unwrap();
    let process = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    let begun = Instant::now();
    while serving.child.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it ends within seconds");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(serving.child.wait().unwrap().success());
    assert!(!serving.socket().exists());
}
