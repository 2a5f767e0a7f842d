//! `scanside analyze`: one study from a folder or a file to findings.json and label maps, here and now.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use jiff::Timestamp;
use scanside::dicom::Instance;
use scanside::dicom::file::files_below;
use scanside::exam::brain_mr::contrast::{Contrast, contrast_of};
use scanside::exam::registry::{ExamKind, Exams};
use scanside::exam::{LabelMap, Progress};
use scanside::geometry::Verdict;
use scanside::infer::package::{Models, Trust};
use scanside::nifti::{NiftiSpec, NiftiWriter};
use scanside::report::{Device, Report, Status};
use scanside::series::{AddError, Assembled, Assembler, Completion, Limits, Planar, SeriesOutcome};
use scanside::service::analysis::{Analysed, Analyst, Unread};
use scanside::study::{Modality, MrAcquisition, Rejection, RejectionCode, Uid};
use scanside::volume::{Rescale, Volume, VoxelType};

use super::open::{Form, form, open_told, open_volume};
use super::{Failure, Scratch, Steps};

/// Analyses a study and writes DIR/findings.json (schema scanside.report/1) and the label maps as .nii.gz.
///
/// PATH may be a folder of DICOM files in any order and under any names, a DICOMDIR medium, one multi-frame file, or a
/// NIfTI in Hounsfield units. For brain-mr it may also be a folder of NIfTI files named as in BraTS (…_t1, …_t1ce, …_t2,
/// …_flair), or the files are given one by one: --role t1c=FILE --role flair=FILE … What is found is printed too.
/// Exit code 0: analysed (also when nothing was found); 1: the images cannot be analysed, findings.json says why;
/// 2: there is nothing to analyse at PATH.
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder or file
    #[arg(required_unless_present = "role")]
    path: Option<PathBuf>,
    /// One series of a brain MR study: t1, t1c, t2 or flair, and its file or folder; once for each
    #[arg(long, value_name = "ROLE=PATH", value_parser = role, conflicts_with_all = ["path", "series"])]
    role: Vec<(Contrast, PathBuf)>,
    /// Where the results go; made when it is not there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Which exam; without it chest-ct for CT, and brain-mr for a study of several MR series
    #[arg(long, value_name = "NAME", value_parser = exam_names())]
    exam: Option<ExamKind>,
    /// Which series, when there are several; without it, the one with the most slices
    #[arg(long, value_name = "UID")]
    series: Option<String>,
    /// Threads that compute; without it, one per core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Folder of model packages that replace the built-in ones
    #[arg(long, value_name = "DIR", value_parser = super::values::folder)]
    models: Option<PathBuf>,
    /// Prints the report as one line of JSON
    #[arg(long)]
    json: bool,
}

/// What was found at the path: one series, or those of a study.
type Found = Vec<(SeriesOutcome, Vec<Unread>)>;

fn role(text: &str) -> Result<(Contrast, PathBuf), String> {
    let (word, path) = text.split_once('=').ok_or("ROLE=PATH is wanted, such as t1c=post.nii.gz")?;
    let contrast = Contrast::of_word(word).ok_or_else(|| format!("{word:?} is none of t1, t1c, t2, flair"))?;
    Ok((contrast, path.into()))
}

fn exam_names() -> impl TypedValueParser<Value = ExamKind> {
    let names = PossibleValuesParser::new(ExamKind::ALL.map(ExamKind::name));
    names.map(|name| ExamKind::named(&name).expect("one of the names above"))
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let scratch = Scratch::new()?;
    let path = arguments.path.clone().unwrap_or_else(|| arguments.role.first().map(|(_, path)| path.clone()).unwrap_or_default());
    let path = path.as_path();
    let found = if arguments.path.is_none() {
        if arguments.exam.is_some_and(|exam| exam != ExamKind::BrainMr) {
            return Err(Failure::usage("--role is for --exam brain-mr"));
        }
        from_roles(&arguments.role)?
    } else {
        let form = form(path)?;
        let brain = arguments.exam.is_none_or(|exam| exam == ExamKind::BrainMr);
        let named = if brain && path.is_dir() { named_niftis(path)? } else { Vec::new() };
        match form {
            _ if named.len() >= 2 => from_roles(&named)?,
            Form::Dicom => from_dicom(path, &scratch.0, arguments.series.as_deref(), arguments.exam)?,
            Form::Nifti | Form::Nrrd => from_volume(path, open_volume(path)?, arguments.exam),
        }
    };
    // Whoever gives several images by their contrasts asks for the exam that reads them.
    let study = found.len() > 1 && found[0].0.modality == Modality::Mr && path.is_dir() | arguments.path.is_none();
    let threads = arguments.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let models = Models::new(arguments.models.clone(), Trust::default());
    let device = Device {
        name: "scanside analyze".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        uid: Uid::derived(b"scanside analyze"),
    };
    let exams = match arguments.exam {
        Some(kind) => Exams::only(&models, kind),
        None => {
            let fitting = ExamKind::ALL.into_iter().filter(|kind| (kind.runs_by_default() || study) && kind.modality() == found[0].0.modality);
            Exams::load(&models, &fitting.collect::<Vec<_>>())
        }
    };
    let analyst = Analyst::new(exams.map_err(Failure::impossible)?, threads, device, scratch.0.clone());
    let steps = Steps::new();
    let progress = |p: Progress| steps.show(p.stage, p.done, p.total);
    let parts: Vec<_> = found.iter().map(|(series, unread)| (series, unread.as_slice())).collect();
    let mut analysed = analyst.analyse_study(&parts, Timestamp::now(), &progress);
    steps.clear();
    std::fs::create_dir_all(&arguments.out).map_err(|e| cannot_write(&arguments.out, &e))?;
    for (volume, labels) in analysed.iter().filter_map(|one| one.drawn.as_ref()) {
        for map in labels {
            write_labels(&arguments.out, volume, map.as_ref())?;
        }
    }
    // Of a study, the report that has the findings, or else the one that says most about why there are none.
    analysed.sort_by_key(|one| match one.report.status {
        Status::Complete | Status::Partial => 0,
        Status::Failed => 1,
        Status::Rejected => 2,
        Status::NotAttempted => 3,
    });
    let Analysed { report, .. } = analysed.remove(0);
    // Last, so that a findings.json that is there has its label maps beside it.
    let json = report.to_json_pretty().map_err(Failure::impossible)?;
    let findings = arguments.out.join("findings.json");
    std::fs::write(&findings, json).map_err(|e| cannot_write(&findings, &e))?;
    if arguments.json { super::print_json(&report)? } else { super::print(&table(&report))? }
    match (&report.reason, report.status) {
        (_, Status::Complete | Status::Partial) | (None, _) => Ok(()),
        (Some(reason), status) => Err(Failure::Impossible(format!("{}: {} ({})", path.display(), reason.text, status.word()))),
    }
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::Impossible(format!("cannot write {}: {error}", path.display()))
}

fn is_nifti(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    name.ends_with(".nii") || name.ends_with(".nii.gz")
}

/// A NIfTI or NRRD file as a series of its own.
fn from_volume(path: &Path, volume: Volume, exam: Option<ExamKind>) -> Found {
    // The file does not say what made it; CT is what most are.
    let modality = exam.map_or(Modality::Ct, ExamKind::modality);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    vec![(series_of(path, volume, modality, &name), Vec::new())]
}

/// Files whose names tell their contrasts, as a study.
fn from_roles(roles: &[(Contrast, PathBuf)]) -> Result<Found, Failure> {
    let (mut found, mut patients): (Found, Vec<(&PathBuf, u64)>) = Default::default();
    for (n, (contrast, path)) in roles.iter().enumerate() {
        if let Some((_, other)) = roles[..n].iter().find(|(c, _)| c == contrast) {
            let both = format!("{} and {}", other.display(), path.display());
            return Err(Failure::usage(format!("two images for {}: {both}; --role chooses", contrast.name())));
        }
        let told = open_told(path)?;
        if let Some(modality) = told.modality().filter(|modality| *modality != Modality::Mr) {
            let text = format!("{}: {} is given as {}, which is an MR image", path.display(), modality.term(), contrast.name());
            return Err(Failure::Impossible(text));
        }
        let series = series_of(path, told.volume, Modality::Mr, contrast.name());
        if let Some(twin) = found.iter().position(|(other, _): &(SeriesOutcome, _)| other.series == series.series) {
            let both = format!("{} and {}", roles[twin].1.display(), path.display());
            return Err(Failure::Impossible(format!("{both} are the same image, given for two contrasts")));
        }
        let patient = told.series.map(|series| series.patient);
        if patients.last().is_some_and(|(_, other)| patient.is_some_and(|patient| patient != *other)) {
            let both = format!("{} and {}", patients[0].0.display(), path.display());
            return Err(Failure::Impossible(format!("{both} are of two patients")));
        }
        patients.extend(patient.map(|patient| (path, patient)));
        found.push((series, Vec::new()));
    }
    let uids: Vec<String> = found.iter().map(|(series, _)| series.series.to_string()).collect();
    let study = Uid::derived(uids.join(" ").as_bytes());
    found.iter_mut().for_each(|(series, _)| series.study = study.clone());
    Ok(found)
}

/// The NIfTI files of a folder whose names tell a contrast; label maps and the like are left out.
fn named_niftis(folder: &Path) -> Result<Vec<(Contrast, PathBuf)>, Failure> {
    let cannot = |e: std::io::Error| Failure::usage(format!("cannot read {}: {e}", folder.display()));
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(cannot)? {
        let path = entry.map_err(cannot)?.path();
        if is_nifti(&path) {
            paths.push(path);
        }
    }
    paths.sort();
    let told = |path: &PathBuf| {
        let name = path.file_name()?.to_string_lossy().into_owned();
        let mr = MrAcquisition { description: name, ..MrAcquisition::default() };
        contrast_of(&mr).ok().map(|contrast| (contrast, path.clone()))
    };
    Ok(paths.iter().filter_map(told).collect())
}

/// A volume without DICOM as a series; its UID depends on its voxels, so that the same file gives the same report.
fn series_of(path: &Path, volume: Volume, modality: Modality, description: &str) -> SeriesOutcome {
    let mut seed = Vec::new();
    let grid = volume.grid();
    seed.extend(grid.affine.to_row_major().iter().flat_map(|v| v.to_le_bytes()));
    let [slices, rows, columns] = grid.shape;
    let mut slice = vec![0f32; rows * columns];
    let mut finite = true;
    for k in 0..slices {
        volume.read_slice_f32(k, &mut slice);
        finite &= slice.iter().all(|v| v.is_finite());
        let bytes: Vec<u8> = slice.iter().flat_map(|v| v.to_le_bytes()).collect();
        seed.extend(crc32c::crc32c(&bytes).to_le_bytes());
    }
    let uid = Uid::derived(&seed);
    let now = Instant::now();
    let result = if finite {
        let [step_mm, row_mm, column_mm] = volume.spacing().zyx_mm();
        Ok(Assembled {
            verdict: Verdict { missing_slices: Vec::new(), set_aside: Vec::new(), tilt_degrees: 0.0, uneven: None },
            set_aside: Vec::new(),
            slots: (0..slices).map(Some).collect(),
            sources: vec![None; slices],
            planar: vec![Planar { spacing_mm: Some([row_mm, column_mm]), region: None }; slices],
            along_normal_mm: (0..slices).map(|k| k as f64 * step_mm).collect(),
            placed: true,
            calibrated: true,
            frame_of_reference: None,
            window: None,
            padding: None,
            frame_time_ms: None,
            completed_by: Completion::Told,
            volume,
        })
    } else {
        let text = format!("{} has voxels that are not numbers", path.display());
        Err(Rejection::new(RejectionCode::Malformed, text))
    };
    let mr = MrAcquisition { description: description.into(), ..MrAcquisition::default() };
    SeriesOutcome {
        series: uid.clone(),
        study: uid,
        modality,
        instances: 1,
        opened: now,
        last: now,
        mr: (modality == Modality::Mr).then(|| Box::new(mr)),
        result,
    }
}

/// All DICOM below the path, put together, and of several series the one that is asked for or the largest.
fn from_dicom(path: &Path, scratch: &Path, wanted: Option<&str>, exam: Option<ExamKind>) -> Result<Found, Failure> {
    let files = files_below(path).map_err(|e| Failure::usage(format!("cannot read {}: {e}", path.display())))?;
    // A folder is complete when it has been read: no timer may end its series before.
    let hour = Duration::from_secs(3600);
    let limits = Limits { idle: 24 * hour, settle: 24 * hour, series_open_max: 256, ..Limits::default() };
    let mut assembler = Assembler::new(scratch, limits);
    let mut unread: Vec<(Option<Uid>, Unread)> = Vec::new();
    let mut patients = Vec::new();
    let (mut images, mut strange) = (0usize, 0usize);
    let steps = Steps::new();
    for (n, file) in files.iter().enumerate() {
        steps.show("read", n, files.len());
        let bytes = std::fs::read(file).map_err(|e| Failure::impossible(format!("cannot read {}: {e}", file.display())))?;
        if is_directory_record(&bytes) {
            continue;
        }
        let instance = match Instance::parse(&bytes) {
            Ok(instance) => instance,
            Err(rejection) if bytes.get(128..132) == Some(b"DICM") => {
                log::warn!("{}: {rejection}", file.display());
                let sop_instance = Uid::derived(file.as_os_str().as_encoded_bytes());
                unread.push((None, Unread { sop_instance, rejection }));
                continue;
            }
            Err(_) => {
                strange += 1;
                continue;
            }
        };
        let header = &instance.header;
        if !patients.contains(&header.patient) {
            patients.push(header.patient);
        }
        match assembler.add_instance(Instant::now(), 1, &instance) {
            Ok(_) => images += 1,
            Err(AddError::Rejected(rejection)) => {
                log::warn!("{}: {rejection}", file.display());
                let sop_instance = header.sop_instance.clone();
                unread.push((Some(header.series.clone()), Unread { sop_instance, rejection }));
            }
            Err(other) => return Err(Failure::impossible(format!("{}: {other}", file.display()))),
        }
    }
    steps.clear();
    assembler.finish_all(Instant::now());
    let mut finished = assembler.take_finished();
    if finished.is_empty() {
        return Err(Failure::usage(match unread.first() {
            Some((_, first)) => format!("no image at {} can be read: {}", path.display(), first.rejection),
            None => format!("no image at {} ({} files, none of them DICOM or NIfTI)", path.display(), strange.max(files.len())),
        }));
    }
    log::info!("{}: {images} images, {} series", path.display(), finished.len());
    let fits = |series: &SeriesOutcome| match exam {
        Some(exam) => exam.modality() == series.modality,
        None => ExamKind::ALL.iter().any(|kind| kind.modality() == series.modality),
    };
    finished.sort_by_key(|series| std::cmp::Reverse((fits(series), series.instances)));
    let mut series = match wanted {
        None => finished.remove(0),
        Some(uid) => match finished.iter().position(|series| series.series.as_str() == uid) {
            Some(at) => finished.remove(at),
            None => return Err(Failure::usage(format!("no series {uid} at {}", path.display()))),
        },
    };
    let reads_studies = match exam {
        Some(exam) => exam.reads_studies(),
        None => ExamKind::ALL.iter().any(|kind| kind.reads_studies() && kind.modality() == series.modality),
    };
    // The exam wants the study; the series that was named tells which.
    let mut together = Vec::new();
    if reads_studies {
        let (others, left): (Vec<_>, Vec<_>) =
            finished.into_iter().partition(|other| other.study == series.study && other.modality == series.modality);
        together = others;
        finished = left;
    }
    if wanted.is_none() {
        for other in &finished {
            eprintln!("scanside: not analysed: series {} ({} instances); --series chooses", other.series, other.instances);
        }
        if patients.len() > 1 {
            let text = format!("{} holds images of {} patients; --series chooses one", path.display(), patients.len());
            series.result = Err(Rejection::new(RejectionCode::MixedStudy, text));
        }
    }
    let with_unread = |series: SeriesOutcome| {
        let own = unread.iter().filter(|(uid, _)| uid.as_ref().is_none_or(|uid| *uid == series.series));
        let own = own.map(|(_, unread)| unread.clone()).collect();
        (series, own)
    };
    Ok(std::iter::once(series).chain(together).map(with_unread).collect())
}

/// A DICOMDIR names the files of a medium; they are found without it (PS3.10 8.6).
fn is_directory_record(file: &[u8]) -> bool {
    const MEDIA_STORAGE_DIRECTORY: &[u8] = b"1.2.840.10008.1.3.10";
    let head = &file[..file.len().min(512)];
    head.windows(MEDIA_STORAGE_DIRECTORY.len()).any(|w| w == MEDIA_STORAGE_DIRECTORY)
}

fn write_labels(out: &Path, volume: &Volume, map: &dyn LabelMap) -> Result<(), Failure> {
    let path = out.join(format!("{}.nii.gz", map.name()));
    let [slices, rows, columns] = volume.shape();
    let spec = NiftiSpec {
        shape: [slices, rows, columns],
        volumes: 1,
        affine: volume.affine(),
        voxel: VoxelType::U8,
        rescale: Rescale::IDENTITY,
        repetition_s: 0.0,
    };
    let mut writer = NiftiWriter::create(&path, &spec, None).map_err(Failure::impossible)?;
    let mut slice = vec![0u8; rows * columns];
    for k in 0..slices {
        map.draw(volume, k, &mut slice);
        writer.write_voxels(&slice).map_err(Failure::impossible)?;
        volume.release(k..k + 1);
    }
    writer.finish().map_err(Failure::impossible)
}

/// The report for a person.
pub fn table(report: &Report) -> String {
    use std::fmt::Write;
    let mut text = format!("{}: {}", report.exam, report.status.word());
    if let Some(reason) = &report.reason {
        let _ = write!(text, " ({}: {})", reason.code, reason.text);
    }
    text.push('\n');
    if let Some(volume) = &report.volume {
        let [k, j, i] = volume.shape;
        let [z, y, x] = volume.spacing_mm.zyx_mm();
        let _ = match volume.cine {
            None => writeln!(text, "{k} slices of {j} x {i}, {z:.3} x {y:.3} x {x:.3} mm"),
            Some(cine) if cine.calibrated => writeln!(text, "{k} frames of {j} x {i}, {y:.3} x {x:.3} mm"),
            Some(_) => writeln!(text, "{k} frames of {j} x {i}, not calibrated: measures are in pixels"),
        };
    }
    for (name, measurement) in &report.measurements {
        let _ = writeln!(text, "{name}: {}", measurement.text());
    }
    if !matches!(report.status, Status::Complete | Status::Partial) {
        return text;
    }
    if report.findings.is_empty() {
        text.push_str("nothing found\n");
        return text;
    }
    if report.findings.iter().any(|f| f.centroid_lps_mm.is_none()) {
        for f in &report.findings {
            let _ = writeln!(text, "{:>3}  {}  {:.2}  {}, {}", f.id, f.kind, f.confidence, f.size_text(), f.place_text());
        }
        return text;
    }
    text.push_str(" id  kind              conf.  long x short mm  volume mm3     HU  side   centre LPS mm\n");
    for f in &report.findings {
        let side = f.site.laterality.map_or("-", |side| match side {
            scanside::finding::Laterality::Left => "left",
            scanside::finding::Laterality::Right => "right",
        });
        let [x, y, z] = f.centroid_lps_mm.unwrap_or([f64::NAN; 3]);
        let mm = |v: Option<f64>| v.unwrap_or(f64::NAN);
        let hu = f.mean_hu.map_or_else(|| "-".into(), |hu| format!("{hu:.0}"));
        let _ = writeln!(
            text,
            "{:>3}  {:<17} {:>4.2}   {:>5.1} x {:<5.1}    {:>10.0}  {hu:>5}  {side:<5}  {x:.1} {y:.1} {z:.1}",
            f.id, f.kind, f.confidence, mm(f.long_axis_mm), mm(f.short_axis_mm), mm(f.volume_mm3)
        );
    }
    text
}
