//! Where nodules may be: peaks of the detection network's heat map and of a multi-scale blob detector, inside the
//! closed lungs, merged.
//!
//! Both look at the same working grids, read slab by slab from foot to head: the finest at the network's spacing, the
//! others coarser by the factors of its pyramid, for larger nodules.

use ndarray::{Array3, ArrayD, ArrayView3, IxDyn, s};

use super::blobs::{self, Blob};
use super::lungs::Lungs;
use crate::exam::{ExamError, Progress};
use crate::infer::engine::{EngineError, Session};
use crate::infer::grid::{Line, Filling, Frame, WorkGrid};
use crate::infer::manifest::Manifest;
use crate::pool::Pool;
use crate::volume::Volume;

/// A place that may be a nodule.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Centre as z, y, x along the frame.
    pub centre_mm: [f64; 3],
    /// Estimate of its detector.
    pub diameter_mm: f64,
    /// Highest logit of the network near it, at each level of the pyramid; [`NO_HEAT`] where it saw nothing.
    pub heat: Vec<f64>,
    /// Highest response of the blob detector near it; 0 where it saw nothing.
    pub blob: f64,
}

impl Candidate {
    /// Highest logit at any level.
    pub fn logit(&self) -> f64 {
        self.heat.iter().copied().fold(NO_HEAT, f64::max)
    }
}

/// The logit of a place where the network saw nothing worth a peak.
pub const NO_HEAT: f64 = -12.0;

/// Candidates measured in one series. Real series have tens; noise or a wrong body part must not cost minutes.
const CANDIDATES_MAX: usize = 160;
/// Peaks kept of one detector and level, the highest first; without a limit noise would fill the memory.
const PEAKS_MAX: usize = 4000;
/// Blobs that the network did not mark and that are measured all the same, largest response first.
const LONE_BLOBS_MAX: usize = 80;

/// A maximum of the heat map.
#[derive(Debug, Clone, Copy)]
struct Peak {
    centre_mm: [f64; 3],
    diameter_mm: f64,
    score: f64,
    level: usize,
}

/// The detection network, ready to run.
pub(super) struct Detector<'n> {
    session: Session<'n>,
    patch: [usize; 3],
    halo: [usize; 3],
    stride: [usize; 3],
    window: [f32; 2],
    range: [f32; 2],
    pad: f32,
    logit_min: f64,
    /// What a coarser level finds below it is the finest level's business.
    coarse_diameter_mm_min: f64,
    diameter_mm_max: f64,
}

/// Spacing and pyramid of the grids.
#[derive(Debug, Clone)]
pub(super) struct Scales {
    spacing_mm: f64,
    pyramid: Vec<f64>,
    patch: [usize; 3],
    halo: [usize; 3],
    fill: Filling,
}

impl Scales {
    /// Those of the detection package; without one, grids that suit the blob detector.
    pub fn new(manifest: Option<&Manifest>) -> Self {
        let Some(manifest) = manifest else {
            let fill = Filling::CT;
            return Self { spacing_mm: 1.5, pyramid: vec![1.0, 2.0], patch: [64; 3], halo: [8; 3], fill };
        };
        let input = &manifest.input;
        let spacing_mm = if input.spacing_mm[2] > 0.0 { input.spacing_mm[2] } else { 1.5 };
        let fill = Filling { pad: input.pad_value as f32, ..Filling::CT };
        Self { spacing_mm, pyramid: input.pyramid.clone(), patch: manifest.patch(), halo: input.halo, fill }
    }
}

impl<'n> Detector<'n> {
    pub fn new(manifest: &Manifest, session: Session<'n>) -> Self {
        let input = &manifest.input;
        Self {
            session,
            patch: manifest.patch(),
            halo: input.halo,
            stride: manifest.output.stride,
            window: input.window.unwrap_or([-1000.0, 400.0]).map(|v| v as f32),
            range: input.range.map(|v| v as f32),
            pad: input.pad_value as f32,
            logit_min: manifest.threshold("candidate_logit_min", -4.0),
            coarse_diameter_mm_min: manifest.threshold("coarse_diameter_mm_min", 0.0),
            diameter_mm_max: manifest.threshold("diameter_mm_max", 100.0),
        }
    }

    /// Runs one patch of the slab, whose corner is `corner`; returns the heat map and the boxes, channel by channel.
    fn run(&mut self, pool: &Pool, slab: ArrayView3<'_, f32>, corner: [usize; 3]) -> Result<(Array3<f32>, ArrayD<f32>), EngineError> {
        let [d, h, w] = self.patch;
        let [low, high] = self.window;
        let [from, to] = self.range;
        let mut input = Array3::from_elem((d, h, w), self.pad);
        let [z, y, x] = corner;
        input.assign(&slab.slice(s![z..z + d, y..y + h, x..x + w]));
        input.mapv_inplace(|v| (v.clamp(low, high) - low) / (high - low) * (to - from) + from);
        let input = input.into_shape_with_order(IxDyn(&[1, 1, d, h, w])).expect("one channel is the patch itself");
        let outputs = self.session.run(pool, &[input.view()])?;
        let cells: [usize; 3] = std::array::from_fn(|a| self.patch[a] / self.stride[a]);
        let size: usize = cells.iter().product();
        // One output of five channels, or two of one and four.
        let all: Vec<f32> = outputs.iter().flat_map(|o| o.iter().copied()).collect();
        if all.len() != 5 * size {
            let text = format!("the detection network says {} numbers for {size} cells of five", all.len());
            return Err(EngineError::Run(text));
        }
        let heat = Array3::from_shape_vec(cells, all[..size].to_vec()).expect("its size was checked");
        let boxes = ArrayD::from_shape_vec(IxDyn(&[4, cells[0], cells[1], cells[2]]), all[size..].to_vec());
        Ok((heat, boxes.expect("its size was checked")))
    }
}

/// Finds candidates in the whole volume.
pub(super) fn find(
    volume: &Volume,
    frame: Frame,
    lungs: &Lungs,
    scales: &Scales,
    mut detector: Option<Detector<'_>>,
    pool: &Pool,
    progress: &dyn Fn(Progress),
) -> Result<Vec<Candidate>, ExamError> {
    let Some((low, high)) = lungs.bounds_mm() else { return Ok(Vec::new()) };
    let mut peaks: Vec<Peak> = Vec::new();
    let mut spots: Vec<Blob> = Vec::new();
    let levels: Vec<Level> = scales.pyramid.iter().enumerate().map(|(n, f)| Level::new(n, *f, frame, low, high, scales)).collect();
    let total: usize = levels.iter().map(|l| l.slabs).sum();
    let mut done = 0;
    for level in &levels {
        let mut slab = Array3::from_elem(level.slab_shape(), scales.fill.pad);
        for n in 0..level.slabs {
            let alive = || progress(Progress { stage: "detect", done, total });
            alive();
            level.read(volume, pool, n, scales.fill, &mut slab)?;
            if let Some(detector) = &mut detector {
                level.detect(detector, pool, lungs, &slab, n, &mut peaks, &alive)?;
                keep_highest(&mut peaks, |p| p.score);
            }
            level.blobs(pool, lungs, &slab, n, &mut spots)?;
            keep_highest(&mut spots, |b| b.response);
            done += 1;
        }
    }
    progress(Progress { stage: "detect", done, total });
    Ok(merge(&mut peaks, &mut spots, scales.pyramid.len(), detector.is_some()))
}

fn keep_highest<T>(found: &mut Vec<T>, score: impl Fn(&T) -> f64) {
    if found.len() > 2 * PEAKS_MAX {
        found.sort_by(|a, b| score(b).total_cmp(&score(a)));
        found.truncate(PEAKS_MAX);
    }
}

/// One level of the pyramid: a grid, cut into slabs of patches.
struct Level {
    number: usize,
    finest_mm: f64,
    grid: WorkGrid,
    /// The grid with a margin in plane, on which slabs are read.
    padded: WorkGrid,
    margin: usize,
    core: [usize; 3],
    tiles: [usize; 2],
    slabs: usize,
}

impl Level {
    fn new(number: usize, factor: f64, frame: Frame, low: [f64; 3], high: [f64; 3], scales: &Scales) -> Self {
        let spacing = scales.spacing_mm * factor;
        let grid = WorkGrid::covering(frame, low.map(|v| v - 3.0), high.map(|v| v + 3.0), [spacing; 3]);
        let core: [usize; 3] = std::array::from_fn(|a| scales.patch[a] - 2 * scales.halo[a]);
        let margin = scales.halo.iter().copied().max().unwrap_or(0).max(blobs::MARGIN);
        let tiles = [grid.shape[1].div_ceil(core[1]), grid.shape[2].div_ceil(core[2])];
        let padded = WorkGrid {
            shape: [grid.shape[0], tiles[0] * core[1] + 2 * margin, tiles[1] * core[2] + 2 * margin],
            first_mm: [grid.first_mm[0], grid.first_mm[1] - spacing * margin as f64, grid.first_mm[2] - spacing * margin as f64],
            ..grid
        };
        let slabs = grid.shape[0].div_ceil(core[0]);
        Self { number, finest_mm: scales.spacing_mm, grid, padded, margin, core, tiles, slabs }
    }

    fn slab_shape(&self) -> [usize; 3] {
        [self.core[0] + 2 * self.margin, self.padded.shape[1], self.padded.shape[2]]
    }

    /// Reads slab `n`: its core with the margin below and above; what it shares with the slab before is moved, not read.
    fn read(
        &self,
        volume: &Volume,
        pool: &Pool,
        n: usize,
        fill: Filling,
        slab: &mut Array3<f32>,
    ) -> Result<(), ExamError> {
        let start = (n * self.core[0]) as isize - self.margin as isize;
        let shared = if n == 0 { 0 } else { 2 * self.margin };
        let plane = slab.dim().1 * slab.dim().2;
        let data = slab.as_slice_mut().expect("a slab is contiguous");
        data.copy_within(data.len() - shared * plane.., 0);
        let fresh = slab.slice_mut(s![shared.., .., ..]);
        Ok(self.padded.read(volume, pool, start + shared as isize, fill, fresh)?)
    }

    /// Place of a (fractional) voxel of slab `n`.
    fn mm(&self, n: usize, zyx: [f64; 3]) -> [f64; 3] {
        let start = (n * self.core[0]) as f64 - self.margin as f64;
        self.padded.mm([zyx[0] + start, zyx[1], zyx[2]])
    }

    /// Peaks of the detector in slab `n`; `alive` is called at each patch.
    #[allow(clippy::too_many_arguments)]
    fn detect(
        &self,
        detector: &mut Detector<'_>,
        pool: &Pool,
        lungs: &Lungs,
        slab: &Array3<f32>,
        n: usize,
        peaks: &mut Vec<Peak>,
        alive: &dyn Fn(),
    ) -> Result<(), ExamError> {
        for (ty, tx) in (0..self.tiles[0]).flat_map(|ty| (0..self.tiles[1]).map(move |tx| (ty, tx))) {
            let core_at = [self.margin, self.margin + ty * self.core[1], self.margin + tx * self.core[2]];
            let low = self.mm(n, core_at.map(|v| v as f64 - 0.5));
            let high = self.mm(n, std::array::from_fn(|a| (core_at[a] + self.core[a]) as f64 - 0.5));
            if !lungs.touches(low, high) {
                continue;
            }
            alive();
            let corner: [usize; 3] = std::array::from_fn(|a| core_at[a] - detector.halo[a]);
            let (heat, boxes) = detector.run(pool, slab.view(), corner)?;
            let first: [usize; 3] = std::array::from_fn(|a| detector.halo[a] / detector.stride[a]);
            let last: [usize; 3] = std::array::from_fn(|a| first[a] + self.core[a].div_ceil(detector.stride[a]));
            for z in first[0]..last[0] {
                for y in first[1]..last[1] {
                    for x in first[2]..last[2] {
                        let score = f64::from(heat[[z, y, x]]);
                        if !(score >= detector.logit_min) || !is_peak(&heat, [z, y, x]) {
                            continue;
                        }
                        let said: [f64; 4] = std::array::from_fn(|c| f64::from(boxes[[c, z, y, x]]));
                        if !said.iter().all(|v| v.is_finite()) {
                            continue;
                        }
                        let voxel = std::array::from_fn(|a| {
                            let stride = detector.stride[a] as f64;
                            corner[a] as f64 + ([z, y, x][a] as f64 + 0.5) * stride - 0.5
                        });
                        let at = self.mm(n, voxel);
                        // The network does not know its level: what it says is in mm of the finest.
                        let factor = self.grid.spacing_mm[0] / self.finest_mm;
                        // Its offset reaches the next cell; further away another cell would have the peak.
                        let reach = |a: usize| 1.5 * detector.stride[a] as f64 * self.grid.spacing_mm[a];
                        let centre_mm: [f64; 3] = std::array::from_fn(|a| at[a] + (said[a] * factor).clamp(-reach(a), reach(a)));
                        let diameter_mm = (libm::exp(said[3].clamp(0.5, 4.0)) * factor).min(detector.diameter_mm_max);
                        let own_business = self.number == 0 || diameter_mm >= detector.coarse_diameter_mm_min;
                        if own_business && lungs.gate(centre_mm) {
                            peaks.push(Peak { centre_mm, diameter_mm, score, level: self.number });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Blobs of slab `n`, sought in blocks that touch the lungs.
    fn blobs(&self, pool: &Pool, lungs: &Lungs, slab: &Array3<f32>, n: usize, found: &mut Vec<Blob>) -> Result<(), ExamError> {
        let margin = self.margin;
        let (depth, rows, columns) = slab.dim();
        let blocks = [(rows - 2 * margin).div_ceil(BLOB_BLOCK), (columns - 2 * margin).div_ceil(BLOB_BLOCK)];
        let of_block = pool.map(blocks[0] * blocks[1], |block| {
            let (y, x) = (margin + block / blocks[1] * BLOB_BLOCK, margin + block % blocks[1] * BLOB_BLOCK);
            let end = [depth - margin, (y + BLOB_BLOCK).min(rows - margin), (x + BLOB_BLOCK).min(columns - margin)];
            let low = self.mm(n, [margin, y, x].map(|v| v as f64 - 0.5));
            let high = self.mm(n, end.map(|v| v as f64 - 0.5));
            if !lungs.touches(low, high) {
                return Vec::new();
            }
            let m = blobs::MARGIN;
            let seen = slab.slice(s![margin - m..end[0] + m, y - m..end[1] + m, x - m..end[2] + m]);
            let mut blobs = blobs::find(seen);
            // Once more without what surrounds the lungs: a nodule on the pleura is no blob beside the chest wall.
            let mut alone = seen.to_owned();
            let [_, _, first_mm] = self.mm(n, [0.0, 0.0, (x - m) as f64]);
            let along_x = Line { first_mm, step_mm: self.grid.spacing_mm[2] };
            for (k, mut plane) in alone.outer_iter_mut().enumerate() {
                for (j, mut row) in plane.outer_iter_mut().enumerate() {
                    let [z_mm, y_mm, _] = self.mm(n, [(margin - m + k) as f64, (y - m + j) as f64, 0.0]);
                    let row = row.as_slice_mut().expect("a fresh array is contiguous");
                    lungs.fill_outside(z_mm, y_mm, along_x, LUNG_HU, row);
                }
            }
            blobs.extend(blobs::find(alone.view()));
            for blob in &mut blobs {
                let [bz, by, bx] = blob.centre;
                blob.centre = self.mm(n, [bz + (margin - m) as f64, by + (y - m) as f64, bx + (x - m) as f64]);
                blob.diameter *= self.grid.spacing_mm[0];
            }
            blobs.retain(|blob| lungs.gate(blob.centre));
            blobs
        })?;
        found.extend(of_block.into_iter().flatten());
        Ok(())
    }
}

/// What stands for everything outside the lungs: lung.
const LUNG_HU: f32 = -850.0;

/// Voxels of a block in plane: its six copies fit a cache of megabytes, and the margin is not yet most of the work.
const BLOB_BLOCK: usize = 64;

/// Whether a cell is the highest of its neighbourhood; of equals the first counts.
fn is_peak(heat: &Array3<f32>, [z, y, x]: [usize; 3]) -> bool {
    let (depth, rows, columns) = heat.dim();
    let own = heat[[z, y, x]];
    for p in z.saturating_sub(1)..(z + 2).min(depth) {
        for q in y.saturating_sub(1)..(y + 2).min(rows) {
            for r in x.saturating_sub(1)..(x + 2).min(columns) {
                let other = heat[[p, q, r]];
                if other > own || (other == own && (p, q, r) < (z, y, x)) {
                    return false;
                }
            }
        }
    }
    true
}

fn distance(a: [f64; 3], b: [f64; 3]) -> f64 {
    ((a[0] - b[0]).powi(2) + (a[1] - b[1]).powi(2) + (a[2] - b[2]).powi(2)).sqrt()
}

/// Non-maximum suppression by distance: the highest peak stands for those within its radius. Blobs come after peaks.
fn merge(peaks: &mut [Peak], spots: &mut [Blob], levels: usize, network: bool) -> Vec<Candidate> {
    peaks.sort_by(|a, b| b.score.total_cmp(&a.score));
    spots.sort_by(|a, b| b.response.total_cmp(&a.response));
    let mut merged: Vec<Candidate> = Vec::new();
    let near = |c: &Candidate, at: [f64; 3], diameter: f64| {
        distance(c.centre_mm, at) < (0.5 * c.diameter_mm.max(diameter)).max(3.0)
    };
    for peak in peaks.iter() {
        if let Some(kept) = merged.iter_mut().find(|c| near(c, peak.centre_mm, peak.diameter_mm)) {
            kept.heat[peak.level] = kept.heat[peak.level].max(peak.score);
        } else if merged.len() < CANDIDATES_MAX {
            let mut heat = vec![NO_HEAT; levels];
            heat[peak.level] = peak.score;
            merged.push(Candidate { centre_mm: peak.centre_mm, diameter_mm: peak.diameter_mm, heat, blob: 0.0 });
        }
    }
    let lone_max = if network { LONE_BLOBS_MAX } else { CANDIDATES_MAX };
    let mut lone = 0;
    for spot in spots.iter() {
        if let Some(kept) = merged.iter_mut().find(|c| near(c, spot.centre, 0.0)) {
            kept.blob = kept.blob.max(spot.response);
        } else if lone < lone_max && merged.len() < CANDIDATES_MAX + LONE_BLOBS_MAX {
            lone += 1;
            let heat = vec![NO_HEAT; levels];
            merged.push(Candidate { centre_mm: spot.centre, diameter_mm: spot.diameter, heat, blob: spot.response });
        }
    }
    merged
}
