//! What is done to one kind of study: an exam takes a volume and gives findings, measurements and label maps.
//!
//! An exam is a function: the same volume and the same model packages give the same outcome, to the bit, on any number
//! of threads, streamed or at once.

pub mod attempt;
pub mod brain_mr;
mod callipers;
pub mod chest_ct;
mod hull;
pub mod registry;
pub mod ultrasound;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use crate::finding::{Finding, Measurement};
use crate::imaging::components::ComponentError;
use crate::imaging::morphology::MorphologyError;
use crate::infer::engine::EngineError;
use crate::infer::package::ModelId;
use crate::pool::Fault;
use crate::study::Rejection;
use crate::volume::Volume;

/// Why an exam has no outcome.
#[derive(Debug, thiserror::Error)]
pub enum ExamError {
    /// The images are not for this exam: the report says so.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// A network failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A mistake of ours.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl From<ComponentError> for ExamError {
    fn from(error: ComponentError) -> Self {
        match error {
            ComponentError::Fault(fault) => fault.into(),
            other => Fault(other.to_string()).into(),
        }
    }
}

impl From<MorphologyError> for ExamError {
    fn from(error: MorphologyError) -> Self {
        match error {
            MorphologyError::Fault(fault) => fault.into(),
            other => Fault(other.to_string()).into(),
        }
    }
}

/// How far an exam is; steps of one stage count up to `total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// `segment`, `detect`, `classify`, `measure`.
    pub stage: &'static str,
    /// Steps done.
    pub done: usize,
    /// Steps of this stage.
    pub total: usize,
}

/// Wall-clock time of each stage; it goes into the report's timing and decides nothing.
struct Clock {
    last: Instant,
    laps: BTreeMap<&'static str, u64>,
}

impl Clock {
    fn start() -> Self {
        Self { last: Instant::now(), laps: BTreeMap::new() }
    }

    fn lap(&mut self, stage: &'static str) {
        let ms = self.last.elapsed().as_millis() as u64;
        self.last = Instant::now();
        self.laps.insert(stage, ms);
        *self.laps.entry("total").or_default() += ms;
    }
}

/// `1 / (1 + e^-x)`, the same bits on every board.
fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

/// What an exam saw.
#[derive(Debug)]
pub struct ExamOutcome {
    /// Name of the exam, as reports have it: `chest-ct`.
    pub exam: &'static str,
    /// Most certain first.
    pub findings: Vec<Finding>,
    /// By name, the unit closing it.
    pub measurements: BTreeMap<String, Measurement>,
    /// What is where; drawn slice by slice.
    pub labels: Vec<Box<dyn LabelMap>>,
    /// The packages that took part.
    pub models: Vec<ModelId>,
    /// Wall-clock milliseconds of each stage, by its name; `total` is their sum.
    pub timing_ms: BTreeMap<&'static str, u64>,
}

/// A label for every voxel of the series, drawn when it is asked for: a map of 2,000 slices need not fit the memory.
pub trait LabelMap: Send + Sync + fmt::Debug {
    /// Name of the map, and of its file: `lungs`, `nodules`.
    fn name(&self) -> &str;

    /// What each value means; 0 is nothing.
    fn values(&self) -> Vec<(u8, String)>;

    /// Draws slice `k` of the volume that was analysed, row by row.
    ///
    /// # Panics
    /// When `out` is not one slice long or `k` is outside.
    fn draw(&self, volume: &Volume, k: usize, out: &mut [u8]);
}
