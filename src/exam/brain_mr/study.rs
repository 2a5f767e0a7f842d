//! From the series of one study to the exam and back: which series stands for what, and what becomes of the others.

use super::contrast::{Candidate, Choice, Contrast, choose, contrast_of};
use super::{BrainMr, Source, StudyOutcome};
use crate::exam::{ExamError, Progress};
use crate::pool::Pool;
use crate::series::{Assembled, SeriesOutcome};
use crate::study::{Modality, MrAcquisition, Rejection};

/// A head is larger than this in every direction; a localizer of a few slices and a slab are not.
const EXTENT_MM_MIN: f64 = 80.0;
/// Fewer slices are a scout.
const SLICES_MIN: usize = 8;

/// What a series of the study was for.
#[derive(Debug, Clone, PartialEq)]
pub enum Role {
    /// Read as this contrast; findings refer to it.
    Reference(Contrast),
    /// Read as this contrast.
    Read(Contrast),
    /// Not read, and why.
    SetAside(String),
    /// It could not be read at all.
    Rejected(Rejection),
}

/// A study, its roles given.
#[derive(Debug)]
pub struct Study {
    /// Of each series, in the order given.
    pub roles: Vec<Role>,
    /// For people: what was done though it is not as it should be.
    pub notes: Vec<String>,
}

/// What was made of a study.
pub type Outcome = Result<StudyOutcome, ExamError>;

impl Study {
    /// Gives each series its role, by its tags; no voxel is read.
    pub fn of(series: &[&SeriesOutcome]) -> Self {
        let mut indices = Vec::new();
        let mut candidates = Vec::new();
        let mut roles: Vec<Option<Role>> = vec![None; series.len()];
        for (n, one) in series.iter().enumerate() {
            match &one.result {
                Err(rejection) => roles[n] = Some(Role::Rejected(rejection.clone())),
                Ok(assembled) => {
                    let grid = assembled.volume.grid();
                    let mut spacing_mm = grid.spacing().zyx_mm();
                    spacing_mm.sort_by(|a, b| b.total_cmp(a));
                    let contrast = fit(one.modality, assembled).and_then(|()| {
                        let none = MrAcquisition::default();
                        contrast_of(one.mr.as_deref().unwrap_or(&none)).map_err(|not| not.0.to_owned())
                    });
                    indices.push(n);
                    candidates.push(Candidate { series: one.series.clone(), contrast, spacing_mm, voxels: grid.voxels() });
                }
            }
        }
        let Choice { chosen, set_aside } = choose(&candidates);
        for (n, why) in set_aside {
            roles[indices[n]] = Some(Role::SetAside(why));
        }
        // In the exam's order of preference for the image that others are laid over.
        let mut reference = None;
        for contrast in [Contrast::T1c, Contrast::T1, Contrast::Flair, Contrast::T2] {
            let Some(n) = chosen[contrast as usize] else { continue };
            let first = reference.is_none();
            reference.get_or_insert(indices[n]);
            roles[indices[n]] = Some(if first { Role::Reference(contrast) } else { Role::Read(contrast) });
        }
        let roles: Vec<Role> = roles.into_iter().map(|role| role.expect("chosen or set aside")).collect();
        let mut notes = Vec::new();
        if let Some(reference) = reference {
            let frame = |n: usize| series[n].result.as_ref().ok().and_then(|a| a.frame_of_reference.clone());
            for (n, role) in roles.iter().enumerate() {
                if let Role::Read(contrast) = role
                    && let (Some(own), Some(first)) = (frame(n), frame(reference))
                    && own != first
                {
                    notes.push(format!("{} has another frame of reference; it was registered all the same", contrast.name()));
                }
            }
        }
        Self { roles, notes }
    }

    /// The contrasts that are there.
    pub fn contrasts(&self) -> Vec<Contrast> {
        let contrast = |role: &Role| match role {
            Role::Reference(contrast) | Role::Read(contrast) => Some(*contrast),
            _ => None,
        };
        self.roles.iter().filter_map(contrast).collect()
    }

    /// Runs the exam.
    ///
    /// # Errors
    /// [`ExamError`].
    pub fn analyze(&self, exam: &BrainMr, series: &[&SeriesOutcome], pool: &Pool, progress: &dyn Fn(Progress)) -> Outcome {
        let sources: Vec<Source<'_>> = series
            .iter()
            .zip(&self.roles)
            .filter_map(|(one, role)| match (role, &one.result) {
                (Role::Reference(contrast) | Role::Read(contrast), Ok(assembled)) => {
                    Some(Source { contrast: *contrast, series: &one.series, volume: &assembled.volume })
                }
                _ => None,
            })
            .collect();
        exam.analyze(&sources, pool, progress)
    }
}

/// Whether a stack is one that the exam can read.
fn fit(modality: Modality, assembled: &Assembled) -> Result<(), String> {
    let verdict = &assembled.verdict;
    let grid = assembled.volume.grid();
    let extent: [f64; 3] = std::array::from_fn(|a| grid.shape[a] as f64 * grid.spacing().zyx_mm()[a]);
    if !matches!(modality, Modality::Mr | Modality::Other) {
        Err(format!("it is {}, and the exam reads MR", modality.term()))
    } else if !assembled.placed {
        Err("its images have no place in patient space".into())
    } else if grid.shape[0] < SLICES_MIN || extent.iter().any(|mm| *mm < EXTENT_MM_MIN) {
        let [z, y, x] = extent.map(|mm| mm.round());
        Err(format!("{} slices over {z} x {y} x {x} mm do not cover a head", grid.shape[0]))
    } else if !verdict.missing_slices.is_empty() {
        Err(format!("{} slices are missing between others", verdict.missing_slices.len()))
    } else if verdict.uneven.is_some() {
        Err("its slices lie at uneven distances".into())
    } else {
        Ok(())
    }
}
