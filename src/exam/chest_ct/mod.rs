//! Chest CT: lungs, nodule candidates, false positives taken out, each survivor segmented and measured.
//!
//! ```text
//! slices -> lungs (network, sides, hull) -> candidates (network + blobs) -> nodules (segmented, features) -> forest -> findings
//! ```

pub mod blobs;
pub mod candidates;
mod distance;
pub mod features;
pub mod lungs;
mod measure;
mod nodule;

use std::sync::Arc;

use candidates::{Candidate, Detector, Scales};
pub use lungs::{LungSegmenter, LungSlice, Lungs, PlaneGeometry};
use nodule::Nodule;

use super::{Clock, ExamError, ExamOutcome, LabelMap, Progress, sigmoid};
use crate::finding::{Finding, Measurement, Site};
use crate::geometry::Affine;
use crate::infer::engine::{EngineError, Network};
use crate::infer::forest::Forest;
use crate::infer::grid::{Frame, NotAxial};
use crate::infer::package::{Models, Package, PackageError};
use crate::pool::Pool;
use crate::study::{Rejection, RejectionCode, Uid};
use crate::volume::Volume;

/// Findings of one report. A reader needs the first ten, an evaluation (FROC) a few times more; a label map has 255 values.
const FINDINGS_MAX: usize = 50;
/// Findings below it are not reported. Low on purpose: the receiver chooses its operating point (the manifests recommend
/// one), and what a box never says cannot be chosen.
const CONFIDENCE_MIN: f64 = 0.05;

/// The chest CT exam with its model packages.
pub struct ChestCt {
    lung: (Package, Network),
    detect: Option<(Package, Network)>,
    class: Option<(Package, Forest, Vec<usize>)>,
}

/// A candidate with its features, for training a forest on exactly what the box computes.
#[derive(Debug, Clone)]
pub struct CandidateFeatures {
    /// Centre of mass of what was segmented, LPS.
    pub centroid_lps_mm: [f64; 3],
    /// Equivalent diameter of what was segmented.
    pub diameter_mm: f64,
    /// What the exam would say now.
    pub confidence: f64,
    /// By name, in the order of [`features::NAMES`].
    pub features: Vec<f64>,
}

impl ChestCt {
    /// Name of the exam in reports and on the command line.
    pub const NAME: &'static str = "chest-ct";

    /// Loads the packages `lung-seg`, `nodule-detect` and `nodule-class`; without the latter two, candidates come from
    /// the blob detector alone and confidence from the detector.
    ///
    /// # Errors
    /// [`PackageError`] when `lung-seg` is not there, or a package is not what it should be.
    pub fn load(models: &Models) -> Result<Self, PackageError> {
        let lung = models.network("lung-seg")?;
        let detect = models.has("nodule-detect").then(|| models.network("nodule-detect")).transpose()?;
        let class = match models.has("nodule-class") {
            false => None,
            true => {
                let package = models.package("nodule-class")?;
                let forest = package.forest()?;
                let bound = forest
                    .bind(features::NAMES)
                    .map_err(|source| PackageError::Forest { package: package.id().name.clone(), source })?;
                Some((package, forest, bound))
            }
        };
        Ok(Self { lung, detect, class })
    }

    /// Runs the lung network on single slices, in any order, before the volume is whole.
    ///
    /// # Errors
    /// [`EngineError`] when there is no room for a session.
    pub fn lung_segmenter(&self) -> Result<LungSegmenter<'_>, EngineError> {
        let (package, network) = &self.lung;
        Ok(LungSegmenter::new(&package.manifest, network.session()?))
    }

    /// Whether slice `k` of a volume with this affine is one of those that the exam wants segmented.
    pub fn wants_slice(affine: &Affine, k: usize) -> bool {
        Frame::new(affine).is_ok_and(|frame| LungSlice::wanted(frame.slice_mm(k as f64), frame.slice_step_mm()))
    }

    /// Bytes of memory the networks hold beside the exam's own, for the plan of a board.
    pub fn network_bytes(&self) -> usize {
        self.lung.1.arena_bytes() + self.detect.as_ref().map_or(0, |(_, network)| network.arena_bytes())
    }

    /// Multiply-adds that its networks have carried out so far.
    pub fn macs_done(&self) -> u64 {
        self.lung.1.macs_done() + self.detect.as_ref().map_or(0, |(_, network)| network.macs_done())
    }

    /// Analyses a whole volume. `presegmented` gives the slices that were segmented as they arrived, by their index;
    /// those it does not have are segmented now, and the outcome is the same. `progress` is called on this thread.
    ///
    /// # Errors
    /// [`ExamError::Rejected`] when the images are not axial or show no lungs; [`ExamError::Engine`]; [`ExamError::Fault`].
    pub fn analyze(
        &self,
        series: &Uid,
        volume: &Volume,
        pool: &Pool,
        presegmented: &dyn Fn(usize) -> Option<LungSlice>,
        progress: &dyn Fn(Progress),
    ) -> Result<ExamOutcome, ExamError> {
        let mut clock = Clock::start();
        let lungs = self.lungs(volume, pool, presegmented, progress)?;
        clock.lap("segment");
        let candidates = self.candidates(volume, &lungs, pool, progress)?;
        clock.lap("detect");
        let nodules = self.nodules(volume, &lungs, &candidates, pool, progress)?;
        clock.lap("classify");
        let measurements = measure::lungs(volume, &lungs, pool, progress)?;
        let kept = self.keep(nodules);
        let findings = kept.iter().enumerate().map(|(n, (nodule, confidence))| finding(n, nodule, *confidence, series, volume));
        let findings = findings.collect();
        clock.lap("measure");
        let spans = kept.into_iter().map(|(nodule, _)| nodule.spans).collect();
        let labels: Vec<Box<dyn LabelMap>> =
            vec![Box::new(LungMap { lungs: Arc::new(lungs) }), Box::new(NoduleMap { spans, shape: volume.shape() })];
        Ok(ExamOutcome {
            exam: Self::NAME,
            findings,
            measurements,
            labels,
            models: self.packages().map(|p| p.id().clone()).collect(),
            timing_ms: clock.laps,
        })
    }

    /// Every candidate with its features, before the forest and the threshold.
    ///
    /// # Errors
    /// As [`ChestCt::analyze`].
    pub fn features(&self, volume: &Volume, pool: &Pool, progress: &dyn Fn(Progress)) -> Result<Vec<CandidateFeatures>, ExamError> {
        let lungs = self.lungs(volume, pool, &|_| None, progress)?;
        let candidates = self.candidates(volume, &lungs, pool, progress)?;
        let nodules = self.nodules(volume, &lungs, &candidates, pool, progress)?;
        let rows = nodules.into_iter().map(|nodule| CandidateFeatures {
            centroid_lps_mm: volume.affine().kji_to_lps(nodule.centroid_voxel),
            diameter_mm: nodule.equivalent_diameter_mm,
            confidence: self.confidence(&nodule),
            features: nodule.features,
        });
        Ok(rows.collect())
    }

    fn packages(&self) -> impl Iterator<Item = &Package> {
        let lung = std::iter::once(&self.lung.0);
        lung.chain(self.detect.iter().map(|(p, _)| p)).chain(self.class.iter().map(|(p, _, _)| p))
    }

    /// Both lungs of a volume.
    ///
    /// # Errors
    /// As [`ChestCt::analyze`].
    pub fn lungs(
        &self,
        volume: &Volume,
        pool: &Pool,
        presegmented: &dyn Fn(usize) -> Option<LungSlice>,
        progress: &dyn Fn(Progress),
    ) -> Result<Lungs, ExamError> {
        let reject = |text: &str| ExamError::Rejected(Rejection::new(RejectionCode::WrongContent, text));
        let not_axial = |_: NotAxial| reject("the chest exam reads axial slices, and these are not");
        let frame = Frame::new(&volume.affine()).map_err(not_axial)?;
        let plane = PlaneGeometry::of(volume.shape(), &volume.affine()).map_err(not_axial)?;
        let [slices, rows, columns] = volume.shape();
        if slices == 0 || rows < 16 || columns < 16 {
            return Err(reject("the slices are too small to show a chest"));
        }
        let wanted = Lungs::slices_wanted(&frame, slices);
        let mut segmenter = self.lung_segmenter()?;
        let mut slice = vec![0f32; rows * columns];
        let mut segmented = Vec::with_capacity(wanted.len());
        for (n, k) in wanted.iter().enumerate() {
            progress(Progress { stage: "segment", done: n, total: wanted.len() });
            let done = match presegmented(*k) {
                Some(done) => done,
                None => {
                    volume.read_slice_f32(*k, &mut slice);
                    let done = segmenter.segment(pool, &plane, &slice)?;
                    volume.release(*k..*k + 1);
                    done
                }
            };
            segmented.push((*k, done));
        }
        let (package, _) = &self.lung;
        let lungs = Lungs::assemble(frame, volume.shape(), &package.manifest, segmented.into_iter());
        let ml = lungs.rough_ml();
        if ml[0] + ml[1] < package.manifest.threshold("lungs_ml_min", 150.0) {
            return Err(reject("no lungs are in these images"));
        }
        Ok(lungs)
    }

    fn candidates(
        &self,
        volume: &Volume,
        lungs: &Lungs,
        pool: &Pool,
        progress: &dyn Fn(Progress),
    ) -> Result<Vec<Candidate>, ExamError> {
        let scales = Scales::new(self.detect.as_ref().map(|(package, _)| &package.manifest));
        let detector = match &self.detect {
            Some((package, network)) => Some(Detector::new(&package.manifest, network.session()?)),
            None => None,
        };
        candidates::find(volume, *lungs.frame(), lungs, &scales, detector, pool, progress)
    }

    /// Segments every candidate and computes its features; two that turn out to be the same thing become one.
    fn nodules(
        &self,
        volume: &Volume,
        lungs: &Lungs,
        candidates: &[Candidate],
        pool: &Pool,
        progress: &dyn Fn(Progress),
    ) -> Result<Vec<Nodule>, ExamError> {
        progress(Progress { stage: "classify", done: 0, total: candidates.len() });
        let bounds = lungs.bounds_mm();
        let mut found = Vec::with_capacity(candidates.len());
        for (n, group) in candidates.chunks(GROUP).enumerate() {
            let made = pool.map(group.len(), |c| Nodule::segment(volume, lungs, bounds.as_ref(), &group[c]))?;
            found.extend(made.into_iter().flatten());
            progress(Progress { stage: "classify", done: n * GROUP + group.len(), total: candidates.len() });
        }
        Ok(found)
    }

    fn confidence(&self, nodule: &Nodule) -> f64 {
        match &self.class {
            Some((package, forest, bound)) => {
                let values: Vec<f64> = bound.iter().map(|n| nodule.features[*n]).collect();
                let says = |name: &str, default| package.manifest.threshold(name, default);
                combine(nodule.logit, forest.evaluate(&values), says)
            }
            None if self.detect.is_some() => sigmoid(nodule.logit),
            // The blob detector alone: its response for a solid sphere is about 0.25.
            None => sigmoid(24.0 * (nodule.blob - 0.16)),
        }
    }

    /// The nodules worth reporting, most certain first, each voxel in one only.
    fn keep(&self, nodules: Vec<Nodule>) -> Vec<(Nodule, f64)> {
        let least = match (&self.class, &self.detect) {
            (Some((package, ..)), _) => package.manifest.threshold("confidence_min", CONFIDENCE_MIN),
            (None, Some((package, _))) => package.manifest.threshold("confidence_min", CONFIDENCE_MIN),
            (None, None) => 0.3,
        };
        let least_mm = self.class.as_ref().map_or(3.0, |(package, ..)| package.manifest.threshold("diameter_mm_min", 3.0));
        let mut scored: Vec<(Nodule, f64)> = nodules.into_iter().map(|n| (self.confidence(&n), n)).map(|(c, n)| (n, c)).collect();
        scored.retain(|(nodule, confidence)| *confidence >= least && nodule.axes.mean_mm() >= least_mm);
        scored.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.volume_mm3.total_cmp(&a.0.volume_mm3)));
        let mut kept: Vec<(Nodule, f64)> = Vec::new();
        for (nodule, confidence) in scored {
            if kept.len() < FINDINGS_MAX && !kept.iter().any(|(k, _)| k.is_same(&nodule)) {
                kept.push((nodule, confidence));
            }
        }
        kept
    }
}

/// Candidates between two words of progress.
const GROUP: usize = 16;

/// The detector's opinion and the forest's as one, added as log odds; the forest's alone for a package without weights.
fn combine(logit: f64, forest: f64, says: impl Fn(&str, f64) -> f64) -> f64 {
    let heat_weight = says("heat_weight", 0.0);
    if heat_weight == 0.0 {
        return forest;
    }
    let log_odds = libm::log((forest + 0.01) / (1.01 - forest));
    sigmoid(heat_weight * logit.max(says("heat_min", candidates::NO_HEAT)) + says("forest_weight", 1.0) * log_odds + says("offset", 0.0))
}

fn finding(n: usize, nodule: &Nodule, confidence: f64, series: &Uid, volume: &Volume) -> Finding {
    let centroid_lps_mm = volume.affine().kji_to_lps(nodule.centroid_voxel);
    // Micrometres: the same lesion keeps its UID however the numbers are printed.
    let place = centroid_lps_mm.map(|v| (v * 1000.0).round() as i64);
    Finding {
        id: n as u32 + 1,
        tracking_uid: Uid::derived(format!("{series} nodule {place:?}").as_bytes()),
        kind: "nodule".into(),
        confidence: confidence as f32,
        centroid_lps_mm: Some(centroid_lps_mm),
        centroid_voxel: nodule.centroid_voxel,
        long_axis_mm: Some(nodule.axes.long_mm),
        short_axis_mm: Some(nodule.axes.short_mm),
        mean_diameter_mm: Some(nodule.axes.mean_mm()),
        volume_mm3: Some(nodule.volume_mm3),
        area_mm2: None,
        in_pixels: None,
        mean_hu: Some(nodule.mean_hu),
        site: Site { organ: "lung".into(), laterality: nodule.side },
        cine: None,
    }
}

/// 1 right lung, 2 left lung.
#[derive(Debug)]
struct LungMap {
    lungs: Arc<Lungs>,
}

impl LabelMap for LungMap {
    fn name(&self) -> &str {
        "lungs"
    }

    fn values(&self) -> Vec<(u8, String)> {
        vec![(1, "right lung".into()), (2, "left lung".into())]
    }

    fn draw(&self, volume: &Volume, k: usize, out: &mut [u8]) {
        self.lungs.draw_from(volume, k, out);
    }
}

/// Each nodule with the id of its finding.
#[derive(Debug)]
struct NoduleMap {
    spans: Vec<Vec<nodule::Span>>,
    shape: [usize; 3],
}

impl LabelMap for NoduleMap {
    fn name(&self) -> &str {
        "nodules"
    }

    fn values(&self) -> Vec<(u8, String)> {
        (1..=self.spans.len()).map(|n| (n as u8, format!("nodule {n}"))).collect()
    }

    fn draw(&self, _: &Volume, k: usize, out: &mut [u8]) {
        let [slices, rows, columns] = self.shape;
        assert!(k < slices && out.len() == rows * columns);
        out.fill(0);
        // The most certain last, so that it lies on top.
        for (n, spans) in self.spans.iter().enumerate().rev() {
            for span in spans.iter().filter(|s| s.k == k) {
                out[span.j * columns + span.columns.start..span.j * columns + span.columns.end].fill(n as u8 + 1);
            }
        }
    }
}

impl Measurement {
    fn of(value: f64, unit: &str) -> Self {
        Self { value, unit: unit.into() }
    }
}
