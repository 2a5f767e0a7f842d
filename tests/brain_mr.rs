//! Claims about the brain MR exam on a drawn head: its tumour is found, on its side, the series are laid over each other, and through
//! every door a study ends in one report with the findings and one for each of its other series, whatever else came with them.
//!
//! How well the network finds tumours is asked once, by the first claim; the others compare reports with each other.

#[path = "support/serving.rs"]
mod serving;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use scanside::dicom::TransferSyntax;
use scanside::dicom::build::{SeriesTemplate, SliceTemplate};
use scanside::dicom::client::{Peer, StoreAssociation};
use scanside::dicom::negotiation::AeTitle;
use scanside::exam::brain_mr::contrast::Contrast;
use scanside::exam::brain_mr::{BrainMr, Source, StudyOutcome};
use scanside::finding::{Finding, Laterality};
use scanside::geometry::{Plane, norm, sub};
use scanside::infer::package::{Models, Trust};
use scanside::nifti;
use scanside::phantom::brain::BrainPhantom;
use scanside::pool::Pool;
use scanside::report::{Report, SeriesUsed, Status};
use scanside::study::{Modality, Uid};
use scanside::volume::{Rescale, Volume};

const SCANSIDE: &str = env!("CARGO_BIN_EXE_scanside");
const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";

fn exam() -> BrainMr {
    BrainMr::load(&Models::new(None, Trust::default())).unwrap()
}

fn analyze(phantom: &BrainPhantom, contrasts: &[Contrast]) -> StudyOutcome {
    let images: Vec<(Contrast, Uid, Volume)> =
        contrasts.iter().map(|c| (*c, Uid::derived(c.name().as_bytes()), phantom.volume(*c))).collect();
    let source = |(contrast, series, volume): &'static (Contrast, Uid, Volume)| Source { contrast: *contrast, series, volume };
    // Sources borrow their volumes; a test's few are kept until it ends.
    let images: &'static [_] = Box::leak(images.into_boxed_slice());
    exam().analyze(&images.iter().map(source).collect::<Vec<_>>(), &Pool::new(2), &|_| {}).unwrap()
}

#[test]
fn a_tumour_is_found_at_its_place_and_on_its_side() {
    for side in [Laterality::Left, Laterality::Right] {
        let phantom = BrainPhantom { side, ..BrainPhantom::default() };
        let study = analyze(&phantom, &Contrast::ALL);
        assert_eq!(study.reference, Uid::derived(b"T1c"), "findings refer to the T1c");
        let tumour = &study.outcome.findings[0];
        assert_eq!((tumour.kind.as_str(), tumour.site.laterality), ("tumour", Some(side)));
        let far = norm(sub(tumour.centroid_lps_mm.unwrap(), phantom.centre_lps_mm()));
        assert!(far < 8.0, "{far} mm from its place: {tumour:?}");
        let ml = tumour.volume_mm3.unwrap() / 1000.0;
        assert!((20.0..90.0).contains(&ml), "a ball of 45 mL was drawn, {ml} mL are found");
        // The patient turned between the series, by angles that are known.
        for (name, radians) in [("t1", 0.03f64), ("t2", 0.04), ("flair", 0.05)] {
            let found = study.outcome.measurements[&format!("{name}_registration_deg")].value;
            assert!((found - radians.to_degrees()).abs() < 0.6, "{name}: {found}");
        }
    }
}

fn scanside(arguments: &[&str]) -> Output {
    Command::new(SCANSIDE).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn phantom() -> BrainPhantom {
    BrainPhantom::default()
}

fn series(contrast: Contrast) -> SeriesTemplate {
    phantom().series(contrast, "claims")
}

fn write(folder: &Path, contrast: Contrast, template: &SeriesTemplate, name: &str) {
    for (k, image) in phantom().images(contrast, template).unwrap().into_iter().enumerate() {
        std::fs::write(folder.join(format!("{name}-{k:03}")), image).unwrap();
    }
}

/// The four series as a folder of DICOM files, drawn once for all claims.
fn study() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        Contrast::ALL.into_iter().for_each(|c| write(folder.path(), c, &series(c), c.name()));
        folder
    });
    folder.path()
}

/// Copies the series of these contrasts from the study.
fn copy(to: &Path, contrasts: &[Contrast]) {
    for entry in std::fs::read_dir(study()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if contrasts.iter().any(|c| name.starts_with(&format!("{}-", c.name()))) {
            std::fs::copy(&path, to.join(name)).unwrap();
        }
    }
}

/// What a disk in a hospital has between the images.
fn litter(folder: &Path) {
    std::fs::write(folder.join("notes.txt"), "no image").unwrap();
    std::fs::write(folder.join("empty"), "").unwrap();
    let image = std::fs::read(study().join("T1-003")).unwrap();
    // Of another name than any image, and half of one: neither belongs to a series.
    std::fs::write(folder.join("half"), &image[..image.len() / 2]).unwrap();
    std::fs::create_dir_all(folder.join("deeper/still")).unwrap();
    std::fs::write(folder.join("deeper/still/thumbs.db"), [0xd0, 0xcf, 0x11, 0xe0].repeat(100)).unwrap();
}

/// The report that `scanside analyze` writes, what it said on stderr, its exit code, and the folder of results.
fn command(arguments: &[&str]) -> (i32, Option<Report>, String, tempfile::TempDir) {
    let out = tempfile::tempdir().unwrap();
    let output = scanside(&[&["analyze", "--out", out.path().to_str().unwrap()], arguments].concat());
    let report = std::fs::read(out.path().join("findings.json")).ok().map(|json| Report::from_json(&json).unwrap());
    (output.status.code().unwrap(), report, text(&output.stderr), out)
}

/// What the study shows when it is read from its folder: every door must come to the same.
fn from_folder() -> &'static (Report, tempfile::TempDir) {
    static REPORT: OnceLock<(Report, tempfile::TempDir)> = OnceLock::new();
    REPORT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        copy(folder.path(), &Contrast::ALL);
        litter(folder.path());
        let (code, report, said, out) = command(&[folder.path().to_str().unwrap(), "--threads", "1"]);
        let report = report.unwrap_or_else(|| panic!("{code}: {said}"));
        assert_eq!(code, 0, "{said}");
        (report, out)
    })
}

fn note(report: &Report, series: &SeriesTemplate) -> SeriesUsed {
    report.series_used.iter().find(|used| used.series_uid == series.series).unwrap().clone()
}

#[test]
fn from_a_folder_of_dicom_each_series_is_named_with_its_part_and_labelled_on_its_own_grid() {
    let (report, out) = from_folder();
    assert_eq!((report.exam.as_str(), report.modality.term()), ("brain-mr", "MR"));
    // The half of an image among the files may have been one of the study's.
    assert!(matches!(report.status, Status::Complete | Status::Partial), "{:?}", report.reason);
    assert_eq!(report.series_uid, series(Contrast::T1c).series, "findings refer to the T1c");
    assert_eq!(report.series_used.len(), 4);
    for contrast in Contrast::ALL {
        assert_eq!(note(report, &series(contrast)).role.as_deref(), Some(contrast.name()));
    }
    let ml = |name: &str| report.measurements[name].value;
    assert!((900.0..2000.0).contains(&ml("brain_ml")), "a brain of 1.4 L was drawn: {}", ml("brain_ml"));
    assert!(ml("whole_tumour_ml") >= ml("tumour_core_ml") && ml("tumour_core_ml") >= ml("enhancing_tumour_ml"));
    let maps = ["tumour-t1", "tumour", "tumour-t2", "tumour-flair"];
    for (name, contrast) in maps.into_iter().zip(Contrast::ALL) {
        let labels = nifti::read(&out.path().join(format!("{name}.nii.gz"))).unwrap();
        let grid = BrainPhantom::grid(contrast);
        assert_eq!(labels.shape(), grid.shape);
        assert!(norm(sub(labels.affine().origin(), grid.affine.origin())) < 1e-3);
        let marked = labels.to_f32(0..grid.shape[0]).iter().filter(|v| **v > 0.0).count() as f64;
        let off = marked * labels.spacing().voxel_mm3() / 1000.0 - ml("whole_tumour_ml");
        assert!(off.abs() < 0.1 * ml("whole_tumour_ml") + 0.5, "{name} is {off} mL off");
    }
}

#[test]
fn files_named_as_in_brats_and_files_given_by_role_are_the_same_study() {
    let folder = tempfile::tempdir().unwrap();
    let mut roles = Vec::new();
    for (contrast, name) in Contrast::ALL.into_iter().zip(["t1", "t1ce", "t2", "flair"]) {
        let path = folder.path().join(format!("BraTS20_Training_001_{name}.nii.gz"));
        nifti::write(&path, &phantom().volume(contrast), None).unwrap();
        roles.push(format!("{name}={}", path.display()));
    }
    let truth = folder.path().join("BraTS20_Training_001_seg.nii.gz");
    nifti::write(&truth, &phantom().volume(Contrast::T1c), None).unwrap();
    let (code, report, said, _) = command(&[folder.path().to_str().unwrap(), "--threads", "1"]);
    let report = report.unwrap_or_else(|| panic!("{code}: {said}"));
    assert_eq!((code, report.status, report.series_used.len()), (0, Status::Complete, 4), "{said}");
    // In another order, and on more threads.
    let given: Vec<&str> = roles.iter().rev().flat_map(|role| ["--role", role.as_str()]).collect();
    let (_, again, said, _) = command(&[&given[..], &["--exam", "brain-mr", "--threads", "2"]].concat());
    let again = again.expect(&said);
    assert_eq!((&again.measurements, &again.findings), (&report.measurements, &report.findings));
    // NIfTI keeps its affine in 32 bits, DICOM in decimal text: the same but for that.
    let ml = |report: &Report| report.measurements["brain_ml"].value;
    assert!((ml(&report) / ml(&from_folder().0) - 1.0).abs() < 0.01);
    let twice = format!("t1ce={}", truth.display());
    let (code, report, said, _) = command(&[&given[..], &["--role", &twice]].concat());
    assert!(code == 2 && report.is_none() && said.contains("two images for T1c"), "{said}");
    let (code, _, said, _) = command(&["--role", "pd=x.nii"]);
    assert!(code == 2 && said.contains("none of t1, t1c, t2, flair"), "{said}");
}

#[test]
fn images_given_for_a_contrast_that_are_not_of_one_patients_mr_or_given_twice_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let part = |name: &str, contrast: Contrast, template: &SeriesTemplate| {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        write(&path, contrast, template, "image");
        path.display().to_string()
    };
    let t1 = part("t1", Contrast::T1, &series(Contrast::T1));
    let other = part("other", Contrast::T2, &SeriesTemplate { patient_id: "another".into(), ..series(Contrast::T2) });
    let ct = part("ct", Contrast::T2, &SeriesTemplate { modality: Modality::Ct, ..series(Contrast::T2) });
    for (second, said) in [(&other, "two patients"), (&ct, "CT is given as T2"), (&t1, "the same image")] {
        let (code, report, told, _) = command(&["--role", &format!("t1={t1}"), "--role", &format!("t2={second}")]);
        assert!(code == 1 && report.is_none() && told.contains(said), "{told}");
    }
}

#[test]
fn four_images_without_a_head_in_them_are_rejected() {
    let folder = tempfile::tempdir().unwrap();
    let empty = phantom().volume(Contrast::T2);
    let mut roles = Vec::new();
    for (level, name) in ["t1", "t1c", "t2", "flair"].into_iter().enumerate() {
        let level = empty.to_f32(0..empty.shape()[0]) * 0.0 + level as f32;
        let flat = Volume::from_array(&level, empty.affine(), Rescale::IDENTITY).unwrap();
        let path = folder.path().join(format!("{name}.nii"));
        nifti::write(&path, &flat, None).unwrap();
        roles.extend(["--role".to_owned(), format!("{name}={}", path.display())]);
    }
    let roles: Vec<&str> = roles.iter().map(String::as_str).collect();
    let (code, report, said, _) = command(&roles);
    let reason = report.expect(&said).reason.unwrap();
    assert_eq!((code, reason.code.as_str()), (1, "wrong_content"), "{}", reason.text);
}

/// A running `scanside serve` with the brain exam, killed when dropped.
struct Serving {
    child: Child,
    dicom: SocketAddr,
    folder: PathBuf,
}

impl Serving {
    fn start(folder: &Path, quiet_s: u32) -> Self {
        Self::start_patient(folder, quiet_s, quiet_s)
    }

    fn start_patient(folder: &Path, quiet_s: u32, study_quiet_s: u32) -> Self {
        let config = folder.join("service.toml");
        let series = format!("[series]\nquiet_s = {quiet_s}\nstudy_quiet_s = {study_quiet_s}\n");
        let text = format!("{series}[exams]\nrun = [\"brain-mr\"]\n[inbox]\nsettle_s = 1\n");
        std::fs::write(&config, text).unwrap();
        let inbox = folder.join("inbox");
        let more = ["--threads", "2", "--config", config.to_str().unwrap(), "--inbox", inbox.to_str().unwrap()];
        let (child, dicom) = serving::serve(folder, &more);
        Self { child, dicom, folder: folder.to_owned() }
    }

    /// The power goes.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The next reports, each acknowledged.
    fn watch(&self, count: usize) -> Vec<Report> {
        let (socket, count) = (self.folder.join("socket"), count.to_string());
        let socket = socket.to_str().unwrap();
        let output = scanside(&["watch", "--socket", socket, "--count", &count, "--timeout", "240", "--json"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).lines().map(|line| Report::from_json(line.as_bytes()).unwrap()).collect()
    }

    /// Longer than any timer of these claims, and no report more.
    fn has_no_more(&self, seconds: &str) {
        let socket = self.folder.join("socket");
        let more = scanside(&["watch", "--socket", socket.to_str().unwrap(), "--count", "1", "--timeout", seconds, "--json"]);
        assert_eq!((more.status.code(), text(&more.stdout).as_str()), (Some(1), ""));
        assert_eq!(std::fs::read_dir(self.folder.join("spool/incoming")).unwrap().count(), 0, "what is reported leaves the spool");
    }

    fn status(&self) -> serde_json::Value {
        let socket = self.folder.join("socket");
        let status = scanside(&["status", "--socket", socket.to_str().unwrap(), "--json"]);
        serde_json::from_slice(&status.stdout).unwrap()
    }

    fn works_on_something(&self) -> bool {
        !self.status()["working_on"].is_null()
    }

    fn send(&self, folder: &Path) {
        let output = scanside(&["send", folder.to_str().unwrap(), "--dicom", &self.dicom.to_string()]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }

    /// Sends some images of a series and then neither goes on nor says goodbye.
    fn send_some(&self, contrast: Contrast, count: usize) -> StoreAssociation {
        let title = |text| AeTitle::parse(text).unwrap();
        let uid = |text| Uid::parse(text).unwrap();
        let peer = Peer::new(self.dicom, title("MR1"), title("SCANSIDE"));
        let mut open = StoreAssociation::open(&peer, &[(uid("1.2.840.10008.5.1.4.1.1.4"), uid(EXPLICIT_LITTLE))]).unwrap();
        for k in 0..count {
            open.store(&std::fs::read(study().join(format!("{}-{k:03}", contrast.name()))).unwrap()).unwrap();
        }
        open
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What comes in the end, within two minutes.
fn wait<T>(claim: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "{claim}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The report of a series among others.
fn of<'a>(reports: &'a [Report], series: &SeriesTemplate) -> &'a Report {
    let own: Vec<&Report> = reports.iter().filter(|report| report.series_uid == series.series).collect();
    assert_eq!(own.len(), 1, "one report for each series");
    own[0]
}

fn reason(report: &Report) -> (Status, &str, &str) {
    let reason = report.reason.as_ref().expect("a reason");
    (report.status, &reason.code, &reason.text)
}

/// The findings of the study are in the report of its T1c, the same as from the folder, and the others' reports say where they are.
fn check(reports: &[Report], templates: &[SeriesTemplate; 4]) {
    let reference = &templates[Contrast::T1c as usize];
    let found = of(reports, reference);
    assert_eq!((found.status, found.exam.as_str()), (Status::Complete, "brain-mr"), "{:?}", found.reason);
    let same = &from_folder().0;
    assert_eq!(found.measurements, same.measurements);
    // Names are of the series they were found in; the rest is the same to the bit.
    let unnamed = |report: &Report| {
        let unnamed = |f: &Finding| Finding { tracking_uid: Uid::derived(b""), ..f.clone() };
        report.findings.iter().map(unnamed).collect::<Vec<_>>()
    };
    assert_eq!(unnamed(found), unnamed(same));
    for contrast in [Contrast::T1, Contrast::T2, Contrast::Flair] {
        let report = of(reports, &templates[contrast as usize]);
        let (status, code, text) = reason(report);
        assert_eq!((status, code), (Status::NotAttempted, "part_of_study"));
        assert!(text.contains(reference.series.as_str()) && text.contains(contrast.name()), "{text}");
        assert!(report.findings.is_empty() && report.measurements.is_empty(), "no number stands twice");
    }
}

/// The study once more under other names, its series as `change` makes them.
fn renamed(name: &str, change: impl Fn(Contrast, &mut SeriesTemplate)) -> [SeriesTemplate; 4] {
    Contrast::ALL.map(|contrast| {
        let mut template = phantom().series(contrast, name);
        change(contrast, &mut template);
        template
    })
}

/// Three images at right angles, as every protocol begins.
fn localizer(folder: &Path, study: &Uid) -> SeriesTemplate {
    let template = SeriesTemplate { study: study.clone(), series: Uid::derived(b"localizer"), size: [64, 64], ..series(Contrast::T1) };
    let directions = [[1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, -1.0], [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]];
    for (k, direction) in directions.into_iter().enumerate() {
        let plane = Plane::new([-120.0, -120.0, 0.0], direction, [4.0, 4.0]).ok();
        let pixels = [100u8, 1].repeat(64 * 64);
        let slice = SliceTemplate { number: k + 1, plane, rescale: Rescale::IDENTITY, image_type: "ORIGINAL\\PRIMARY\\LOCALIZER", pixels: &pixels };
        let image = template.image(&slice, TransferSyntax::find(EXPLICIT_LITTLE).unwrap()).unwrap();
        std::fs::write(folder.join(format!("localizer-{k}")), image).unwrap();
    }
    template
}

#[test]
fn by_c_store_a_study_is_reported_once_and_what_is_not_of_the_four_is_set_aside_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    // The T2 was made after the patient had been out of the scanner.
    let templates = renamed("by C-STORE", |contrast, template| {
        if contrast == Contrast::T2 {
            template.frame_of_reference = Uid::derived(b"after a break");
        }
    });
    let [t1, t1c, t2, _] = &templates;
    Contrast::ALL.into_iter().zip(&templates).for_each(|(c, template)| write(&images, c, template, c.name()));
    // With contrast agent once more, in fewer and thicker slices.
    let agent = t1c.more.iter().find(|(tag, ..)| *tag == (0x0018, 0x0010).into()).unwrap().clone();
    let mut second = SeriesTemplate { series: Uid::derived(b"second T1c"), ..t1.clone() };
    second.more.push(agent);
    write(&images, Contrast::T1, &second, "second");
    let scout = SeriesTemplate { series: Uid::derived(b"scout"), ..t1c.clone() };
    for (k, image) in phantom().images(Contrast::T1c, &scout).unwrap().into_iter().enumerate().take(4) {
        std::fs::write(images.join(format!("scout-{k}")), image).unwrap();
    }
    let localizer = localizer(&images, &t1c.study);

    let serving = Serving::start(folder.path(), 30);
    let port = serving.dicom.port().to_string();
    let dcmtk = Command::new("storescu").arg("--version").output().is_ok_and(|o| o.status.success());
    if dcmtk {
        let sent = Command::new("storescu").args(["+sd", "127.0.0.1", &port]).arg(&images).status().unwrap();
        assert!(sent.success());
    } else {
        eprintln!("skipped: dcmtk is not installed; our own client sends instead");
        serving.send(&images);
    }
    let reports = serving.watch(7);
    check(&reports, &templates);
    let (status, code, text) = reason(of(&reports, &second));
    assert_eq!((status, code), (Status::NotAttempted, "set_aside"));
    assert!(text.contains("another T1c series"), "{text}");
    let (status, code, text) = reason(of(&reports, &scout));
    assert_eq!((status, code), (Status::NotAttempted, "set_aside"));
    assert!(text.contains("4 slices") && text.contains("do not cover a head"), "{text}");
    let (status, code, _) = reason(of(&reports, &localizer));
    assert_eq!((status, code), (Status::Rejected, "mixed_orientation"));
    // The one report tells what became of each series.
    let found = of(&reports, t1c);
    assert_eq!(found.series_used.len(), 7);
    assert!(note(found, t2).note.unwrap().contains("another frame of reference"));
    assert!([&second, &scout, &localizer].into_iter().all(|s| note(found, s).role.is_none() && note(found, s).note.is_some()));
    // A sender who repeats himself is content, and nothing is reported again.
    serving.send(&images);
    serving.has_no_more("3");
}

#[test]
fn through_the_inbox_the_same_study_gives_the_same_report_and_what_is_no_image_is_put_aside() {
    let folder = tempfile::tempdir().unwrap();
    let serving = Serving::start(folder.path(), 30);
    let put = tempfile::tempdir_in(folder.path()).unwrap();
    copy(put.path(), &Contrast::ALL);
    litter(put.path());
    std::fs::rename(put.path(), folder.path().join("inbox/stick")).unwrap();
    let reports = serving.watch(4);
    check(&reports, &Contrast::ALL.map(series));
    let failed = folder.path().join("inbox/failed/stick");
    for rubbish in ["notes.txt", "empty", "half", "deeper/still/thumbs.db"] {
        assert!(failed.join(rubbish).exists(), "{rubbish}");
        let why = std::fs::read_to_string(failed.join(format!("{rubbish}.txt"))).unwrap();
        assert!(!why.trim().is_empty(), "{rubbish}");
    }
    assert_eq!(std::fs::read_dir(folder.path().join("inbox/done/stick")).unwrap().count(), std::fs::read_dir(study()).unwrap().count());
    serving.has_no_more("2");
}

#[test]
fn a_missing_contrast_is_named_and_too_few_are_rejected_by_name_and_two_studies_of_one_sender_are_not_mixed() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let there = [Contrast::T1c, Contrast::T2, Contrast::Flair];
    copy(&images, &there);
    let alone = phantom().series(Contrast::T2, "one contrast alone");
    write(&images, Contrast::T2, &alone, "alone");
    let serving = Serving::start(folder.path(), 3);
    serving.send(&images);
    let reports = serving.watch(4);
    let (status, code, text) = reason(of(&reports, &alone));
    assert_eq!((status, code), (Status::Rejected, "missing_contrast"));
    assert!(text.ends_with("missing: T1, T1c, FLAIR"), "{text}");
    let found = of(&reports, &series(Contrast::T1c));
    match exam().accepts(&there) {
        Ok(()) => {
            assert_eq!(reason(found), (Status::Partial, "missing_contrast", "analysed without T1"));
            assert!(found.measurements.contains_key("whole_tumour_ml"));
            assert_eq!(reason(of(&reports, &series(Contrast::T2))).1, "part_of_study");
        }
        Err(rejection) => {
            assert!(rejection.text.ends_with("missing: T1"));
            for contrast in there {
                assert_eq!(reason(of(&reports, &series(contrast))), (Status::Rejected, "missing_contrast", rejection.text.as_str()));
            }
        }
    }
    assert_eq!(found.series_used.len(), 3, "nothing of the other study");
    serving.has_no_more("4");
}

#[test]
fn sequences_that_come_longer_apart_than_a_series_is_waited_for_are_one_study_and_status_says_that_it_waits() {
    let folder = tempfile::tempdir().unwrap();
    let part = |name: &str, contrasts: &[Contrast]| {
        let images = folder.path().join(name);
        std::fs::create_dir(&images).unwrap();
        copy(&images, contrasts);
        images
    };
    let serving = Serving::start_patient(folder.path(), 1, 600);
    serving.send(&part("first", &[Contrast::T2, Contrast::Flair]));
    let gathered = |count: u64| {
        wait("the series gather", || {
            let gathering = serving.status()["underway"]["gathering"][0].clone();
            (gathering[1] == count).then_some(gathering)
        })
    };
    assert_eq!(gathered(2)[0], series(Contrast::T2).study.as_str());
    std::thread::sleep(Duration::from_secs(3));
    assert!(gathered(2)[2].as_u64().unwrap() > 500, "it still waits for the others");
    // What is there already comes once more: its series do not grow again.
    serving.send(&folder.path().join("first"));
    serving.send(&part("second", &[Contrast::T1]));
    gathered(3);
    serving.send(&part("third", &[Contrast::T1c]));
    check(&serving.watch(4), &Contrast::ALL.map(series));
    serving.has_no_more("2");
    assert_eq!(serving.status()["underway"], serde_json::json!({"growing": [], "gathering": []}));
}

#[test]
fn a_service_killed_while_it_gathers_receives_and_analyses_a_study_loses_nothing_and_reports_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    let part = |contrasts: &[Contrast]| {
        let part = tempfile::tempdir().unwrap();
        copy(part.path(), contrasts);
        part
    };
    // Two of four series are whole, and wait for the others.
    let serving = Serving::start(folder.path(), 6);
    serving.send(part(&[Contrast::T1, Contrast::T1c]).path());
    serving.kill();
    // A third is on its way.
    let serving = Serving::start(folder.path(), 6);
    let cut = serving.send_some(Contrast::T2, 12);
    serving.kill();
    drop(cut);
    // Its sender begins anew, and the fourth comes: all are together, and looked at.
    let serving = Serving::start(folder.path(), 6);
    serving.send(part(&[Contrast::T2, Contrast::Flair]).path());
    wait("gathered after a while without news", || serving.works_on_something().then_some(()));
    serving.kill();
    // As the disk was at this moment.
    let spool = folder.path().join("spool/incoming");
    let kept: Vec<_> = std::fs::read_dir(&spool).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(kept.len(), 4);
    let aside = folder.path().join("aside");
    std::fs::create_dir(&aside).unwrap();
    for series in &kept[1..] {
        let to = aside.join(series.file_name().unwrap());
        std::fs::create_dir(&to).unwrap();
        for file in std::fs::read_dir(series).unwrap() {
            let file = file.unwrap().path();
            std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    }
    let serving = Serving::start(folder.path(), 6);
    check(&serving.watch(4), &Contrast::ALL.map(series));
    serving.has_no_more("7");
    serving.kill();
    // A cut between the journal and the spool, when the first of four had left it: the other three are found again.
    for series in std::fs::read_dir(&aside).unwrap() {
        let series = series.unwrap().path();
        std::fs::rename(&series, spool.join(series.file_name().unwrap())).unwrap();
    }
    let serving = Serving::start(folder.path(), 2);
    wait("what is reported leaves the spool", || std::fs::read_dir(&spool).unwrap().next().is_none().then_some(()));
    serving.has_no_more("1");
}
