//! Which exams there are, and which one a series gets: the one that is named, else the one for its modality.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Progress;
use super::attempt::{self, Attempt, AttemptError};
use super::brain_mr::BrainMr;
use super::chest_ct::{ChestCt, LungSlice};
use super::ultrasound::Ultrasound;
use crate::infer::package::{Models, PackageError};
use crate::pool::Pool;
use crate::series::Assembled;
use crate::study::{Modality, Rejection, RejectionCode, Uid};

/// An exam this firmware knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExamKind {
    /// Lungs and nodules in chest CT.
    ChestCt,
    /// Focal lesions in ultrasound cines and live streams.
    Ultrasound,
    /// A tumour in the brain, from the series of one MR study.
    BrainMr,
}

impl ExamKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::ChestCt, Self::BrainMr, Self::Ultrasound];

    /// As reports, settings and the command line have it: `chest-ct`.
    pub fn name(self) -> &'static str {
        match self {
            Self::ChestCt => ChestCt::NAME,
            Self::Ultrasound => Ultrasound::NAME,
            Self::BrainMr => BrainMr::NAME,
        }
    }

    /// The exam of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// What it reads.
    pub fn modality(self) -> Modality {
        match self {
            Self::ChestCt => Modality::Ct,
            Self::Ultrasound => Modality::Us,
            Self::BrainMr => Modality::Mr,
        }
    }

    /// Whether it runs without being asked for. The ultrasound network has seen simulated frames alone; the brain exam makes the
    /// series of a study wait for each other. They run only where somebody names them.
    pub fn runs_by_default(self) -> bool {
        self == Self::ChestCt
    }

    /// Whether it looks at all series of a study together.
    pub fn reads_studies(self) -> bool {
        self == Self::BrainMr
    }

    /// Whether it can be asked for images of this modality. Where a file does not say what made it (a secondary capture),
    /// whoever names the exam is believed.
    pub fn reads(self, modality: Modality) -> bool {
        modality == self.modality() || modality == Modality::Other
    }
}

/// Exams with their model packages, ready to run.
pub struct Exams {
    chest_ct: Option<ChestCt>,
    ultrasound: Option<Ultrasound>,
    brain_mr: Option<BrainMr>,
    named: Option<ExamKind>,
}

/// One assembled series, and what an exam may use to look at it.
pub struct Work<'a> {
    /// Series Instance UID.
    pub series: &'a Uid,
    /// Modality.
    pub modality: Modality,
    /// The volume, and what is known of it.
    pub assembled: &'a Assembled,
    /// Threads.
    pub pool: &'a Pool,
    /// A folder for volumes that an exam makes on the way.
    pub scratch: &'a Path,
    /// Lung slices that were segmented while the series grew, by slice.
    pub presegmented: &'a dyn Fn(usize) -> Option<LungSlice>,
    /// Told how far it is.
    pub progress: &'a dyn Fn(Progress),
}

impl Exams {
    /// Loads the packages of these exams; a series gets the one for its modality.
    ///
    /// # Errors
    /// [`PackageError`]
    pub fn load(models: &Models, kinds: &[ExamKind]) -> Result<Self, PackageError> {
        let wanted = |kind| kinds.contains(&kind);
        Ok(Self {
            chest_ct: wanted(ExamKind::ChestCt).then(|| ChestCt::load(models)).transpose()?,
            ultrasound: wanted(ExamKind::Ultrasound).then(|| Ultrasound::load(models)).transpose()?,
            brain_mr: wanted(ExamKind::BrainMr).then(|| BrainMr::load(models)).transpose()?,
            named: None,
        })
    }

    /// Loads one exam, which every series gets.
    ///
    /// # Errors
    /// [`PackageError`]
    pub fn only(models: &Models, kind: ExamKind) -> Result<Self, PackageError> {
        Ok(Self { named: Some(kind), ..Self::load(models, &[kind])? })
    }

    /// The exam that a series of this modality gets; None when there is none here.
    pub fn choose(&self, modality: Modality) -> Option<ExamKind> {
        let has = |kind: &ExamKind| match kind {
            ExamKind::ChestCt => self.chest_ct.is_some(),
            ExamKind::Ultrasound => self.ultrasound.is_some(),
            ExamKind::BrainMr => self.brain_mr.is_some(),
        };
        self.named.or_else(|| ExamKind::ALL.into_iter().filter(has).find(|kind| kind.modality() == modality))
    }

    /// The chest CT exam, when it is loaded.
    pub fn chest_ct(&self) -> Option<&ChestCt> {
        self.chest_ct.as_ref()
    }

    /// The ultrasound exam, when it is loaded.
    pub fn ultrasound(&self) -> Option<&Ultrasound> {
        self.ultrasound.as_ref()
    }

    /// The brain MR exam, when it is loaded.
    pub fn brain_mr(&self) -> Option<&BrainMr> {
        self.brain_mr.as_ref()
    }

    /// Bytes of memory that the networks of the largest exam hold: studies are analysed one after the other.
    pub fn network_bytes(&self) -> usize {
        let chest = self.chest_ct.as_ref().map_or(0, ChestCt::network_bytes);
        let ultrasound = self.ultrasound.as_ref().map_or(0, Ultrasound::network_bytes);
        chest.max(ultrasound).max(self.brain_mr.as_ref().map_or(0, BrainMr::network_bytes))
    }

    /// Runs the exam for this series; None when there is none, or when it wants the whole study.
    ///
    /// # Errors
    /// [`AttemptError`]
    pub fn attempt(&self, work: &Work<'_>) -> Option<Result<Attempt, AttemptError>> {
        let kind = self.choose(work.modality)?;
        if !kind.reads(work.modality) {
            let (exam, wanted, found) = (kind.name(), kind.modality().term(), work.modality.term());
            let text = format!("the exam {exam} reads {wanted}, and this series is {found}");
            return Some(Err(AttemptError::Exam(Rejection::new(RejectionCode::WrongContent, text).into())));
        }
        match kind {
            ExamKind::ChestCt => self.chest_ct.as_ref().map(|exam| attempt::chest_ct(exam, work)),
            ExamKind::Ultrasound => self.ultrasound.as_ref().map(|exam| exam.attempt(work)),
            ExamKind::BrainMr => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::package::Trust;

    #[test]
    fn a_series_gets_the_exam_of_its_modality_or_the_one_that_is_named() {
        let models = Models::new(None, Trust::default());
        let all = Exams::load(&models, &ExamKind::ALL).unwrap();
        for kind in ExamKind::ALL {
            assert_eq!(all.choose(kind.modality()), Some(kind));
            assert_eq!(ExamKind::named(kind.name()), Some(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
        assert_eq!(all.choose(Modality::Other), None);
        assert_eq!(Exams::load(&models, &[]).unwrap().choose(Modality::Ct), None);
        let chest = Exams::only(&models, ExamKind::ChestCt).unwrap();
        assert_eq!(chest.choose(Modality::Mr), Some(ExamKind::ChestCt));
        assert!(ExamKind::ChestCt.reads(Modality::Other) && !ExamKind::ChestCt.reads(Modality::Mr));
    }
}
