//! Brain MR: a tumour in the series of one study, T1, T1 with contrast agent, T2 and FLAIR.
//!
//! ```text
//! series -> thinned -> laid over the T1c -> brain -> evened out -> network -> labels at 1 mm -> findings, labels on each series
//! ```
//! Everything between the series and the labels happens on grids along the axes of patient space: columns to the left, rows to the
//! back, slices to the head.

pub mod contrast;
mod extract;
mod measure;
mod prepare;
pub mod study;

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::{Array3, Axis};

use self::contrast::Contrast;
use self::extract::Brain;
use self::prepare::Thinned;
use super::{Clock, ExamError, ExamOutcome, LabelMap, Progress};
use crate::finding::Measurement;
use crate::geometry::Grid;
use crate::imaging::components::{self, Connectivity};
use crate::imaging::registration::Transform;
use crate::imaging::resample::{self, Interpolation, ResampleError, same_grid};
use crate::infer::engine::Network;
use crate::infer::manifest::Manifest;
use crate::infer::package::{Models, Package, PackageError};
use crate::infer::tiles::{self, SegmentError};
use crate::pool::{Fault, Pool};
use crate::study::{Rejection, RejectionCode, Uid};
use crate::volume::Volume;

/// Distance of voxels of the labels that are measured.
const LABELS_MM: f64 = 1.0;

/// One series of the study, and what it is.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Its contrast.
    pub contrast: Contrast,
    /// Series Instance UID.
    pub series: &'a Uid,
    /// Its voxels.
    pub volume: &'a Volume,
}

/// The exam with its model packages.
pub struct BrainMr {
    extract: (Package, Network),
    tumour: (Package, Network),
}

/// What a study showed.
#[derive(Debug)]
pub struct StudyOutcome {
    /// Findings, measurements and models; its label maps are those of the first series of `drawn`.
    pub outcome: ExamOutcome,
    /// The series that findings and measurements refer to.
    pub reference: Uid,
    /// Contrasts that were not there.
    pub missing: Vec<Contrast>,
    /// The label map on each series' own grid.
    pub drawn: Vec<(Uid, Contrast, Box<dyn LabelMap>)>,
}

/// Labels, and where their voxels are.
#[derive(Debug)]
struct Labelled {
    labels: Array3<u8>,
    grid: Grid,
}

impl BrainMr {
    /// Name of the exam in reports and on the command line.
    pub const NAME: &'static str = "brain-mr";

    /// Loads the packages `brain-extract` and `brain-tumour`.
    ///
    /// # Errors
    /// [`PackageError`].
    pub fn load(models: &Models) -> Result<Self, PackageError> {
        Ok(Self { extract: models.network("brain-extract")?, tumour: models.network("brain-tumour")? })
    }

    /// Bytes of memory the networks hold beside the exam's own, for the plan of a board.
    pub fn network_bytes(&self) -> usize {
        self.extract.1.arena_bytes().max(self.tumour.1.arena_bytes())
    }

    /// Whether these contrasts suffice: the package says which it cannot do without, and how many of the four it needs.
    ///
    /// # Errors
    /// The [`Rejection`] that names what is missing.
    pub fn accepts(&self, contrasts: &[Contrast]) -> Result<(), Rejection> {
        let manifest = &self.tumour.0.manifest;
        let missing: Vec<&str> = Contrast::ALL.iter().filter(|c| !contrasts.contains(c)).map(|c| c.name()).collect();
        let needs = |c: Contrast| manifest.threshold(&format!("needs_{}", c.name().to_lowercase()), 0.0) > 0.0;
        let lacking = Contrast::ALL.iter().any(|c| needs(*c) && !contrasts.contains(c));
        let fluid = contrasts.contains(&Contrast::Flair) || contrasts.contains(&Contrast::T2);
        let enough = contrasts.len() as f64 >= manifest.threshold("contrasts_min", 4.0);
        if lacking || !enough || !fluid {
            let text = format!("brain-mr needs T1, T1c, T2 and FLAIR of one study; missing: {}", missing.join(", "));
            return Err(Rejection::new(RejectionCode::MissingContrast, text));
        }
        Ok(())
    }

    /// Analyses the series of one study, one for each contrast; in any order.
    ///
    /// # Errors
    /// [`ExamError`].
    pub fn analyze(&self, sources: &[Source<'_>], pool: &Pool, progress: &dyn Fn(Progress)) -> Result<StudyOutcome, ExamError> {
        let stage = |stage, done, total| progress(Progress { stage, done, total });
        let mut clock = Clock::start();
        let contrasts: Vec<Contrast> = sources.iter().map(|s| s.contrast).collect();
        self.accepts(&contrasts)?;
        let mut sources = sources.to_vec();
        // The first is what the others are laid over: the T1c, which shows most; without it the best of the rest.
        let rank = |c: Contrast| [1, 0, 3, 2][c as usize];
        sources.sort_by_key(|s| rank(s.contrast));
        let mut series = Vec::with_capacity(sources.len());
        for (n, source) in sources.iter().enumerate() {
            stage("read", n, sources.len());
            series.push(Thinned::read(source)?);
        }
        clock.lap("read");
        let stripped = prepare::is_stripped(&series[0]);
        let grids: Vec<Grid> = sources.iter().map(|s| s.volume.grid()).collect();
        // Stripped images on one grid have been laid over each other by whoever stripped them.
        let registered = stripped && grids.iter().all(|g| same_grid(g, &grids[0]));
        let (reference, others) = series.split_first_mut().expect("a contrast at least");
        for (n, other) in others.iter_mut().enumerate() {
            stage("register", n, sources.len() - 1);
            if !registered {
                prepare::align(reference, other, pool)?;
            }
        }
        clock.lap("register");
        stage("brain", 0, 1);
        let (package, network) = &self.extract;
        let spacing_mm = self.tumour.0.manifest.input.spacing_mm[0];
        let brain = match stripped {
            true => extract::given(&series, spacing_mm, pool)?,
            false => extract::extracted(&package.manifest, network, &series, spacing_mm, pool)?,
        };
        clock.lap("brain");
        stage("segment", 0, 1);
        let mut measurements = BTreeMap::from([("brain_ml".to_owned(), Measurement { value: brain.volume_ml(), unit: "mL".into() })]);
        let middle = { let (low, high) = prepare::bounds(&brain.grid); std::array::from_fn(|a| (low[a] + high[a]) / 2.0) };
        for other in series.iter().skip(1).filter(|_| !registered) {
            let (shift, angle) = prepare::movement(&other.onto, middle);
            let name = other.contrast.name().to_lowercase();
            measurements.insert(format!("{name}_registration_mm"), Measurement { value: shift, unit: "mm".into() });
            measurements.insert(format!("{name}_registration_deg"), Measurement { value: angle, unit: "deg".into() });
        }
        let (labelled, probability, inside) = self.segment(&series, &brain, pool)?;
        clock.lap("segment");
        stage("measure", 0, 1);
        let findings =
            measure::findings(&labelled, probability.view(), inside.view(), sources[0].volume, sources[0].series, pool)?;
        for (name, members) in [("whole_tumour_ml", [1, 2, 3]), ("tumour_core_ml", [1, 3, 3]), ("enhancing_tumour_ml", [3, 3, 3])] {
            let voxels = labelled.labels.iter().filter(|v| members.contains(v)).count();
            let value = voxels as f64 * LABELS_MM.powi(3) * 1e-3;
            measurements.insert(name.to_owned(), Measurement { value, unit: "mL".into() });
        }
        clock.lap("measure");
        let labelled = Arc::new(labelled);
        let values = self.tumour.0.manifest.output.labels.iter().enumerate().skip(1);
        let values: Vec<(u8, String)> = values.map(|(n, label)| (n as u8, label.clone())).collect();
        let drawn = sources.iter().zip(&series).enumerate().map(|(n, (source, thin))| {
            let name = if n == 0 { "tumour".into() } else { format!("tumour-{}", source.contrast.name().to_lowercase()) };
            let map = TumourMap { name, labelled: Arc::clone(&labelled), onto: thin.onto.clone(), values: values.clone() };
            (source.series.clone(), source.contrast, Box::new(map) as Box<dyn LabelMap>)
        });
        let mut models = vec![self.tumour.0.id().clone()];
        if !stripped {
            models.insert(0, self.extract.0.id().clone());
        }
        Ok(StudyOutcome {
            reference: sources[0].series.clone(),
            missing: Contrast::ALL.into_iter().filter(|c| !contrasts.contains(c)).collect(),
            drawn: drawn.collect(),
            outcome: ExamOutcome { exam: Self::NAME, findings, measurements, labels: Vec::new(), models, timing_ms: clock.laps },
        })
    }

    /// Labels at 1 mm over the brain, the probability of tumour, and the brain there.
    fn segment(
        &self,
        series: &[Thinned],
        brain: &Brain,
        pool: &Pool,
    ) -> Result<(Labelled, Array3<f32>, Array3<u8>), ExamError> {
        let (package, network) = &self.tumour;
        let manifest = &package.manifest;
        let (mask, grid) = cropped(brain);
        let mut images = Vec::new();
        for contrast in Contrast::ALL {
            images.push(match series.iter().find(|s| s.contrast == contrast) {
                Some(one) => prepare::channel(one.on(grid, 0.0, pool)?, mask.view(), manifest.input.range),
                // As in training: a contrast that is not there is 0 everywhere.
                None => Array3::zeros(grid.shape),
            });
        }
        let mut scores = probabilities(manifest, network, &images, pool)?;
        // Both ways round: what is left and right in the image is by chance, and two looks are better than one.
        images.iter_mut().for_each(|image| {
            image.invert_axis(Axis(2));
            *image = image.as_standard_layout().into_owned();
        });
        for (map, mut other) in scores.iter_mut().zip(probabilities(manifest, network, &images, pool)?) {
            other.invert_axis(Axis(2));
            map.zip_mut_with(&other, |a, b| *a = 0.5 * (*a + b));
        }
        drop(images);
        let fine = fine_grid(&grid);
        let linear = |map: &Array3<f32>| {
            resample::resample(map.view(), &grid.affine, &fine, Interpolation::Linear, 0.0, pool).map_err(of_resample)
        };
        let inside = resample::resample_nearest(mask.view(), &grid.affine, &fine, 0, pool).map_err(of_resample)?;
        let mut probability = Array3::<f32>::zeros(fine.shape);
        let mut best = Array3::<f32>::zeros(fine.shape);
        let mut labels = Array3::<u8>::zeros(fine.shape);
        for (n, map) in scores.iter().enumerate().skip(1) {
            let map = linear(map)?;
            ndarray::Zip::from(&mut probability).and(&mut best).and(&mut labels).and(&map).for_each(|p, best, label, v| {
                *p += v;
                if *v > *best {
                    *best = *v;
                    *label = n as u8;
                }
            });
        }
        let least = manifest.threshold("whole_min", 0.5) as f32;
        ndarray::Zip::from(&mut labels).and(&probability).and(&inside).for_each(|label, p, inside| {
            if *p < least || *inside == 0 {
                *label = 0;
            }
        });
        let labels = without_specks(labels, &probability, manifest, pool)?;
        Ok((Labelled { labels, grid: fine }, probability, inside))
    }
}

/// Softmax of the network's scores, one map for each label.
fn probabilities(manifest: &Manifest, network: &Network, images: &[Array3<f32>], pool: &Pool) -> Result<Vec<Array3<f32>>, ExamError> {
    let mut session = network.session()?;
    let mut maps = tiles::scores(manifest, network, &mut session, images, pool).map_err(of_tiles)?;
    let voxels = maps[0].len();
    let mut views: Vec<&mut [f32]> = maps.iter_mut().map(|map| map.as_slice_mut().expect("made contiguous")).collect();
    for n in 0..voxels {
        let top = views.iter().map(|view| view[n]).fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for view in &mut views {
            view[n] = libm::expf(view[n] - top);
            sum += view[n];
        }
        views.iter_mut().for_each(|view| view[n] /= sum);
    }
    Ok(maps)
}

/// The part of the mask that holds something, and its grid.
fn cropped(brain: &Brain) -> (Array3<u8>, Grid) {
    let ends: [(usize, usize); 3] = std::array::from_fn(|a| {
        let full = |n: &usize| brain.mask.index_axis(Axis(a), *n).iter().any(|v| *v != 0);
        let count = brain.mask.len_of(Axis(a));
        let first = (0..count).find(full).unwrap_or(0);
        let last = (0..count).rev().find(full).unwrap_or(0);
        (first, last)
    });
    let [z, y, x] = ends;
    let mask = brain.mask.slice(ndarray::s![z.0..=z.1, y.0..=y.1, x.0..=x.1]).to_owned();
    let affine = brain.grid.affine.shifted([x.0 as f64, y.0 as f64, z.0 as f64]);
    let (a, b, c) = mask.dim();
    (mask, Grid { shape: [a, b, c], affine })
}

/// The grid at 1 mm that fills the same box.
fn fine_grid(grid: &Grid) -> Grid {
    let step = grid.spacing().zyx_mm()[0];
    let edge = grid.affine.to_lps([-0.5; 3]).map(|v| v + LABELS_MM / 2.0);
    prepare::grid_at(LABELS_MM, grid.shape.map(|n| (n as f64 * step / LABELS_MM) as usize), edge)
}

/// Only the pieces that are large and sure enough.
fn without_specks(labels: Array3<u8>, probability: &Array3<f32>, manifest: &Manifest, pool: &Pool) -> Result<Array3<u8>, ExamError> {
    let pieces = components::label(labels.mapv(|v| u8::from(v != 0)).view(), Connectivity::Corners, pool)?;
    let least = (manifest.threshold("lesion_ml_min", 0.5) * 1e3 / LABELS_MM.powi(3)) as u64;
    let numbers = pieces.paint(pool)?;
    let mut peak = vec![0f32; pieces.list().len() + 1];
    ndarray::Zip::from(&numbers).and(probability).for_each(|n, p| peak[*n as usize] = peak[*n as usize].max(*p));
    let sure = manifest.threshold("peak_min", 0.7) as f32;
    let keep: Vec<bool> = std::iter::once(false)
        .chain(pieces.list().iter().map(|piece| piece.voxels >= least && peak[piece.label as usize] >= sure))
        .collect();
    let mut labels = labels;
    labels.zip_mut_with(&numbers, |label, n| {
        if !keep[*n as usize] {
            *label = 0;
        }
    });
    Ok(labels)
}

fn of_tiles(error: SegmentError) -> ExamError {
    match error {
        SegmentError::Engine(engine) => engine.into(),
        other => ExamError::Fault(Fault(other.to_string())),
    }
}

fn of_resample(error: ResampleError) -> ExamError {
    ExamError::Fault(Fault(error.to_string()))
}

/// The tumour's parts on the grid of one series.
#[derive(Debug)]
struct TumourMap {
    name: String,
    labelled: Arc<Labelled>,
    /// From the labels' space to the series'.
    onto: Transform,
    values: Vec<(u8, String)>,
}

impl LabelMap for TumourMap {
    fn name(&self) -> &str {
        &self.name
    }

    fn values(&self) -> Vec<(u8, String)> {
        self.values.clone()
    }

    fn draw(&self, volume: &Volume, k: usize, out: &mut [u8]) {
        let [slices, rows, columns] = volume.shape();
        assert!(k < slices && out.len() == rows * columns);
        out.fill(0);
        let (affine, grid) = (volume.affine(), &self.labelled.grid);
        // A rigid map is undone by its transposed matrix, so three places tell where a whole slice goes.
        let index = |j: f64, i: f64| grid.affine.to_voxel(self.back(affine.kji_to_lps([k as f64, j, i])));
        let origin = index(0.0, 0.0);
        let along = |to: [f64; 3]| std::array::from_fn::<f64, 3, _>(|a| to[a] - origin[a]);
        let (down, right) = (along(index(1.0, 0.0)), along(index(0.0, 1.0)));
        let [z, y, x] = grid.shape;
        for (j, row) in out.chunks_exact_mut(columns).enumerate() {
            for (i, label) in row.iter_mut().enumerate() {
                let at: [f64; 3] = std::array::from_fn(|a| (origin[a] + down[a] * j as f64 + right[a] * i as f64 + 0.5 + 1e-6).floor());
                if (0..3).all(|a| at[a] >= 0.0 && at[a] < [x, y, z][a] as f64) {
                    let [i, j, k] = at.map(|v| v as usize);
                    *label = self.labelled.labels[[k, j, i]];
                }
            }
        }
    }
}

impl TumourMap {
    /// From a place in the series to the place in the labels' space.
    fn back(&self, lps: [f64; 3]) -> [f64; 3] {
        let moved = self.onto.apply([0.0; 3]);
        let d = crate::geometry::sub(lps, moved);
        let m = self.onto.matrix();
        std::array::from_fn(|c| m[0][c] * d[0] + m[1][c] * d[1] + m[2][c] * d[2])
    }
}
