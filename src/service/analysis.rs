//! One finished series to its one report: which exam, what it gave, or why there is nothing to say.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::exam::attempt::{Attempt, AttemptError};
use crate::exam::brain_mr::contrast::Contrast;
use crate::exam::brain_mr::study::{Role, Study};
use crate::exam::brain_mr::{BrainMr, StudyOutcome};
use crate::exam::chest_ct::{LungSegmenter, LungSlice, PlaneGeometry};
use crate::exam::registry::{ExamKind, Exams, Work};
use crate::exam::{ExamError, ExamOutcome, LabelMap, Progress};
use crate::geometry::Affine;
use crate::infer::engine::EngineError;
use crate::infer::package::ModelId;
use crate::pool::{Fault, Pool};
use crate::report::{CineUsed, Device, ModelUsed, Reason, Report, Results, SeriesUsed, SetAside, Subject, VolumeUsed};
use crate::series::{Assembled, Completion, SeriesOutcome};
use crate::study::{Modality, Rejection, Uid};
use crate::volume::Volume;

/// What the exams need on this box: packages, threads, a folder for scratch volumes, and who signs.
pub struct Analyst {
    exams: Exams,
    pool: Pool,
    device: Device,
    scratch: PathBuf,
    early: EarlySlices,
}

/// Lung slices segmented while their series was growing, by instance and frame.
#[derive(Default)]
struct EarlySlices(Mutex<HashMap<Uid, SlicesOfSeries>>);

/// By SOP Instance UID and frame number.
type SlicesOfSeries = HashMap<(Uid, usize), LungSlice>;

impl EarlySlices {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uid, SlicesOfSeries>> {
        super::locked(&self.0)
    }
}

/// An image that was accepted and then could not be read.
#[derive(Debug, Clone)]
pub struct Unread {
    /// Which.
    pub sop_instance: Uid,
    /// Why.
    pub rejection: Rejection,
}

/// A report, and what can be drawn of it.
#[derive(Debug)]
pub struct Analysed {
    /// The one report of the series.
    pub report: Report,
    /// The volume and the label maps on it; none where nothing was analysed.
    pub drawn: Option<(Volume, Vec<Box<dyn LabelMap>>)>,
}

/// A slice that can be segmented before its series is whole.
pub struct EarlySlice {
    /// Series Instance UID.
    pub series: Uid,
    /// SOP Instance UID and frame number from 1.
    pub image: (Uid, usize),
    /// The growing volume.
    pub reader: Volume,
    /// Its slice there.
    pub slot: usize,
}

impl Analyst {
    /// Starts the pool.
    pub fn new(exams: Exams, threads: usize, device: Device, scratch: PathBuf) -> Self {
        Self { exams, pool: Pool::new(threads), device, scratch, early: EarlySlices::default() }
    }

    /// The threads that all analysis shares.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The box, as reports name it.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The exams.
    pub fn exams(&self) -> &Exams {
        &self.exams
    }

    /// What a report is about: the key is the series, so a series has one report whatever happens to the box.
    pub fn subject(&self, series: &Uid, study: &Uid, modality: Modality) -> Subject {
        Subject {
            exam: self.exams.choose(modality).map_or("none", ExamKind::name).into(),
            study_uid: study.clone(),
            series_uid: series.clone(),
            modality,
            device: self.device.clone(),
            key: series.to_string(),
        }
    }

    /// Segments chest slices on one thread of their own while their series grows; make one, and keep it. None without the
    /// chest CT exam.
    ///
    /// # Errors
    /// [`EngineError`] when there is no room for a session.
    pub fn early_segmenter(&self) -> Result<Option<EarlySegmenter<'_>>, EngineError> {
        let Some(exam) = self.exams.chest_ct() else { return Ok(None) };
        Ok(Some(EarlySegmenter { analyst: self, segmenter: exam.lung_segmenter()?, slice: Vec::new(), pool: Pool::new(1) }))
    }

    /// Forgets the slices segmented early for a series.
    pub fn forget_early(&self, series: &Uid) {
        self.early.lock().remove(series);
    }

    /// Whether a series of this modality waits for the others of its study.
    pub fn reads_studies(&self, modality: Modality) -> bool {
        self.exams.choose(modality).is_some_and(ExamKind::reads_studies)
    }

    /// Whether these series of one study are all that their exam can use, so that it need not wait for more.
    pub fn is_whole(&self, series: &[&SeriesOutcome]) -> bool {
        Study::of(series).contrasts().len() == Contrast::ALL.len()
    }

    /// The reports of the series of one study, one for each, in the order given: the findings are in that of the series they refer
    /// to, and the others say so. A panic becomes `failed` reports of this study alone.
    pub fn analyse_study(&self, parts: &[(&SeriesOutcome, &[Unread])], now: Timestamp, progress: &dyn Fn(Progress)) -> Vec<Analysed> {
        let started = Instant::now();
        let series: Vec<&SeriesOutcome> = parts.iter().map(|(series, _)| *series).collect();
        let exam = self.exams.brain_mr().filter(|_| series.iter().all(|s| self.reads_studies(s.modality)));
        let Some(exam) = exam else {
            return parts.iter().map(|(series, unread)| self.analyse(series, unread, now, progress)).collect();
        };
        let study = Study::of(&series);
        let attempt = catch_unwind(AssertUnwindSafe(|| study.analyze(exam, &series, &self.pool, progress)));
        let outcome = attempt.map_err(Fault::from_panic).unwrap_or_else(|fault| Err(fault.into()));
        let analysed = self.study_concluded(&study, parts, outcome, now).into_iter().zip(parts);
        analysed
            .map(|(one, (series, _))| {
                let ingest = series.last.saturating_duration_since(series.opened);
                Analysed { report: one.report.with_timing("ingest", ingest).with_timing("total", started.elapsed()), ..one }
            })
            .collect()
    }

    fn subject_of(&self, series: &SeriesOutcome) -> Subject {
        self.subject(&series.series, &series.study, series.modality)
    }

    fn study_concluded(
        &self,
        study: &Study,
        parts: &[(&SeriesOutcome, &[Unread])],
        outcome: Result<StudyOutcome, ExamError>,
        now: Timestamp,
    ) -> Vec<Analysed> {
        let used = parts.iter().zip(&study.roles).map(|((series, _), role)| {
            let (role, note) = match role {
                Role::Reference(contrast) | Role::Read(contrast) => {
                    let name = contrast.name();
                    (Some(name.to_owned()), study.notes.iter().find(|note| note.starts_with(&format!("{name} "))).cloned())
                }
                Role::SetAside(why) => (None, Some(why.clone())),
                Role::Rejected(rejection) => (None, Some(rejection.text.clone())),
            };
            SeriesUsed { series_uid: series.series.clone(), role, note }
        });
        let used: Vec<SeriesUsed> = used.collect();
        let (mut outcome, trouble) = match outcome {
            Ok(outcome) => (Some(outcome), None),
            Err(error) => {
                if !matches!(error, ExamError::Rejected(_)) {
                    log::error!("study {}: {error}", parts[0].0.study);
                }
                (None, Some(error))
            }
        };
        let reference = parts.iter().zip(&study.roles).find(|(_, role)| matches!(role, Role::Reference(_)));
        let reference = reference.map(|((series, _), _)| series.series.clone());
        parts
            .iter()
            .zip(&study.roles)
            .map(|((series, unread), role)| {
                let subject = self.subject_of(series);
                let mut drawn = None;
                let report = match (role, &trouble) {
                    (Role::Rejected(rejection), _) => Report::rejected(subject, rejection, now),
                    (Role::SetAside(why), _) => {
                        let text = format!("set aside by {}: {why}", BrainMr::NAME);
                        Report::not_attempted(subject, Reason::new("set_aside", text), now)
                    }
                    (_, Some(ExamError::Rejected(rejection))) => Report::rejected(subject, rejection, now),
                    (_, Some(error)) => Report::failed(subject, Reason::new("fault", error.to_string()), now),
                    (role, None) => {
                        let outcome = outcome.as_mut().expect("no trouble, so an outcome");
                        if let Some(at) = outcome.drawn.iter().position(|(uid, ..)| *uid == series.series)
                            && let Ok(assembled) = &series.result
                        {
                            drawn = Some((assembled.volume.clone(), vec![outcome.drawn.remove(at).2]));
                        }
                        match role {
                            Role::Read(contrast) => {
                                let reference = reference.as_ref().map_or_else(String::new, ToString::to_string);
                                let name = contrast.name();
                                let text = format!("read as {name} with the series {reference}, whose report has the findings");
                                Report::not_attempted(subject, Reason::new("part_of_study", text), now)
                            }
                            _ => {
                                let missing: Vec<&str> = outcome.missing.iter().map(|contrast| contrast.name()).collect();
                                let lacks = !missing.is_empty();
                                let partial = lacks.then(|| ("missing_contrast", format!("analysed without {}", missing.join(", "))));
                                let volume = series.result.as_ref().ok().map(volume_used);
                                let read = parts.iter().zip(&study.roles).filter(|(_, role)| matches!(role, Role::Reference(_) | Role::Read(_)));
                                let cut = read.filter_map(|((series, _), _)| cut_short(series.result.as_ref().ok()?.completed_by));
                                let partial = partial.into_iter().chain(cut).collect();
                                found(&mut outcome.outcome, subject, volume, partial, unread, now)
                            }
                        }
                    }
                };
                let report = match &series.result {
                    Ok(assembled) => report.with_volume(volume_used(assembled)),
                    Err(_) => report,
                };
                Analysed { report: report.with_series(used.clone()), drawn }
            })
            .collect()
    }

    /// The report of a finished series. A panic anywhere below becomes a `failed` report of this series alone.
    pub fn analyse(&self, series: &SeriesOutcome, unread: &[Unread], now: Timestamp, progress: &dyn Fn(Progress)) -> Analysed {
        if self.reads_studies(series.modality) {
            return self.analyse_study(&[(series, unread)], now, progress).remove(0);
        }
        let started = Instant::now();
        let subject = self.subject(&series.series, &series.study, series.modality);
        let early = self.early.lock().remove(&series.series).unwrap_or_default();
        let analysed = match &series.result {
            Err(rejection) => Analysed { report: Report::rejected(subject, rejection, now), drawn: None },
            Ok(assembled) => {
                let attempt = catch_unwind(AssertUnwindSafe(|| self.attempt(series, assembled, &early, progress)));
                self.concluded(subject, assembled, unread, attempt.map_err(Fault::from_panic), now)
            }
        };
        let ingest = series.last.saturating_duration_since(series.opened);
        let report = analysed.report.with_timing("ingest", ingest).with_timing("total", started.elapsed());
        Analysed { report, ..analysed }
    }

    fn attempt(
        &self,
        series: &SeriesOutcome,
        assembled: &Assembled,
        early: &SlicesOfSeries,
        progress: &dyn Fn(Progress),
    ) -> Option<Result<Attempt, AttemptError>> {
        let presegmented = |k: usize| {
            let source = assembled.sources.get(k)?.as_ref()?;
            early.get(&(source.sop_instance.clone(), source.frame_number)).cloned()
        };
        self.exams.attempt(&Work {
            series: &series.series,
            modality: series.modality,
            assembled,
            pool: &self.pool,
            scratch: &self.scratch,
            presegmented: &presegmented,
            progress,
        })
    }

    fn concluded(
        &self,
        subject: Subject,
        assembled: &Assembled,
        unread: &[Unread],
        attempt: Result<Option<Result<Attempt, AttemptError>>, Fault>,
        now: Timestamp,
    ) -> Analysed {
        let volume = volume_used(assembled);
        let failed = |text: String, subject| Report::failed(subject, Reason::new("fault", text), now);
        let (report, drawn) = match attempt {
            Err(fault) | Ok(Some(Err(AttemptError::Exam(ExamError::Fault(fault))))) => {
                log::error!("series {}: {fault}", subject.series_uid);
                (failed(fault.to_string(), subject), None)
            }
            Ok(None) => {
                let modality = subject.modality.term();
                let text = match ExamKind::ALL.into_iter().find(|kind| kind.modality() == subject.modality).map(ExamKind::name) {
                    Some(name) => format!("the exam for {modality}, {name}, runs only where it is named (--exam {name}; [exams] run)"),
                    None => format!("there is no exam for {modality} here"),
                };
                (Report::not_attempted(subject, Reason::new("no_exam", text), now), None)
            }
            Ok(Some(Err(AttemptError::Exam(ExamError::Rejected(rejection))))) => {
                (Report::rejected(subject, &rejection, now), None)
            }
            Ok(Some(Err(AttemptError::Exam(ExamError::Engine(error))))) => {
                log::error!("series {}: {error}", subject.series_uid);
                (failed(error.to_string(), subject), None)
            }
            Ok(Some(Err(AttemptError::Volume(error)))) => {
                log::error!("series {}: {error}", subject.series_uid);
                let reason = Reason::new("disk", error.to_string());
                (Report::failed(subject, reason, now), None)
            }
            Ok(Some(Ok(attempt))) => {
                let mut outcome = attempt.outcome;
                let partial = attempt.partial.into_iter().chain(cut_short(assembled.completed_by)).collect();
                let report = found(&mut outcome, subject, Some(volume.clone()), partial, unread, now);
                (report, Some((attempt.volume, outcome.labels)))
            }
        };
        Analysed { report: report.with_volume(volume), drawn }
    }
}

/// Why a series may lack slices at its ends, where no lattice shows it: a word and a sentence.
fn cut_short(completed_by: Completion) -> Option<(&'static str, String)> {
    match completed_by {
        Completion::Released | Completion::Counted | Completion::Idle | Completion::Told => None,
        Completion::Lost => {
            Some(("cut_short", "its sender went silent without having ended in good order: images may be missing at either end".into()))
        }
        Completion::Short { announced, came } => Some(("cut_short", format!("{came} of {announced} announced images came"))),
    }
}

/// The report of what was found, which leaves the outcome with its label maps; partial for reasons of the exam's or its series',
/// or because some images could not be read.
fn found(
    outcome: &mut ExamOutcome,
    subject: Subject,
    volume: Option<VolumeUsed>,
    mut partial: Vec<(&'static str, String)>,
    unread: &[Unread],
    now: Timestamp,
) -> Report {
    let results = Results {
        models: outcome.models.iter().map(model_used).collect(),
        volume,
        findings: std::mem::take(&mut outcome.findings),
        measurements: std::mem::take(&mut outcome.measurements),
    };
    partial.extend(unread.first().map(|first| {
        let text = format!("{} accepted images could not be read, the first because: {}", unread.len(), first.rejection);
        ("unread", text)
    }));
    let report = match partial.first() {
        None => Report::complete(subject, results, now),
        Some((code, _)) => {
            let texts: Vec<&str> = partial.iter().map(|(_, text)| text.as_str()).collect();
            Report::partial(subject, results, Reason::new(*code, texts.join("; ")), now)
        }
    };
    outcome.timing_ms.iter().fold(report, |report, (stage, ms)| report.with_timing(stage, Duration::from_millis(*ms)))
}

/// A package as reports name it.
pub(super) fn model_used(model: &ModelId) -> ModelUsed {
    ModelUsed { name: model.name.clone(), version: model.version.clone(), sha256: model.sha256.clone() }
}

fn volume_used(assembled: &Assembled) -> VolumeUsed {
    let mut used = VolumeUsed::whole(&assembled.volume.grid());
    used.missing_slices = assembled.verdict.missing_slices.iter().map(|k| *k as u32).collect();
    used.tilt_degrees = assembled.verdict.is_tilted().then_some(assembled.verdict.tilt_degrees);
    used.cine = (!assembled.placed).then(|| CineUsed {
        frame_time_ms: assembled.frame_time_ms,
        calibrated: assembled.planar.iter().all(|frame| frame.spacing_mm.is_some()),
    });
    used.uneven_mm = assembled.verdict.uneven.map(|uneven| [uneven.smallest_mm, uneven.largest_mm]);
    used.set_aside = assembled
        .set_aside
        .iter()
        .map(|aside| SetAside { sop_instance_uid: aside.sop_instance.clone(), frame: aside.frame, reason: aside.reason })
        .collect();
    used
}

/// Segments slices before their series is whole; what it gets wrong about which are wanted costs time and nothing else.
pub struct EarlySegmenter<'a> {
    analyst: &'a Analyst,
    segmenter: LungSegmenter<'a>,
    slice: Vec<f32>,
    pool: Pool,
}

impl EarlySegmenter<'_> {
    /// Segments one slice and remembers it for its series' exam.
    pub fn segment(&mut self, early: EarlySlice) {
        self.analyst.pool.step_aside();
        let [_, rows, columns] = early.reader.shape();
        let Ok(plane) = PlaneGeometry::of(early.reader.shape(), &early.reader.affine()) else { return };
        self.slice.resize(rows * columns, 0.0);
        early.reader.read_slice_f32(early.slot, &mut self.slice);
        match self.segmenter.segment(&self.pool, &plane, &self.slice) {
            Ok(slice) => {
                self.analyst.early.lock().entry(early.series).or_default().insert(early.image, slice);
            }
            Err(error) => log::warn!("early segmentation: {error}"),
        }
        early.reader.release(early.slot..early.slot + 1);
    }
}

/// Whether the slice at `along_normal_mm` is likely to be wanted, the others known so far being at `places_mm`.
pub fn wants_early(affine: &Affine, along_normal_mm: f64, places_mm: &[f64]) -> bool {
    let nearest = places_mm.iter().map(|p| (p - along_normal_mm).abs()).filter(|d| *d > 0.01).fold(f64::INFINITY, f64::min);
    // With one slice alone the distance is not known; most series that matter are thicker than a millimetre.
    let step_mm = if nearest.is_finite() { nearest } else { affine.spacing().zyx_mm()[0] };
    LungSlice::wanted(along_normal_mm, step_mm)
}
