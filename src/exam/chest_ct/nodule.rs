//! One candidate, segmented at the resolution of the series and measured.
//!
//! The threshold lies midway between the surrounding lung and the candidate's own core, so that the edge of a blurred
//! sphere is where the sphere's is. What grows beyond a bounded ball or out of the closed lung is cut; vessels are cut
//! by an opening with half the radius of the largest sphere that fits inside.

use std::ops::Range;

use ndarray::Array3;

use super::candidates::Candidate;
use super::features::{self, Region};
use super::lungs::Lungs;
use crate::exam::callipers::{Axes, axes};
use super::distance;
use crate::finding::Laterality;
use crate::volume::{Rescale, Volume};
use crate::with_voxel_type;

/// Marked voxels of one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Slice.
    pub k: usize,
    /// Row.
    pub j: usize,
    /// Columns.
    pub columns: Range<usize>,
}

/// A segmented candidate.
#[derive(Debug, Clone)]
pub struct Nodule {
    /// Mean of the voxels' indices, `[k, j, i]`.
    pub centroid_voxel: [f64; 3],
    /// Their volume.
    pub volume_mm3: f64,
    /// Of a sphere of that volume.
    pub equivalent_diameter_mm: f64,
    /// Their mean.
    pub mean_hu: f64,
    /// Callipers in the axial plane.
    pub axes: Axes,
    /// Which lung.
    pub side: Option<Laterality>,
    /// Where they are.
    pub spans: Vec<Span>,
    /// The network's highest logit.
    pub logit: f64,
    /// The blob detector's response.
    pub blob: f64,
    /// In the order of [`features::NAMES`].
    pub features: Vec<f64>,
    centroid_mm: [f64; 3],
}

/// Nodules end at 30 mm and masses are larger: what does not fit a box of twice this is measured as far as it goes.
const REACH_MM_MAX: f64 = 45.0;
/// Room for the features' surroundings.
const REACH_MM_MIN: f64 = 14.0;
/// No nodule is measured better than to half a millimetre: in finer voxels every second or third is read.
const CELL_MM_MIN: f64 = 0.5;
/// Cells of a candidate's box: 90 mm of a chest at 0.7 mm and 1 mm. A large mass in finer voxels is thinned to it, so that
/// the memory it takes depends on its size and not on the number of slices.
const CELLS_MAX: usize = 1_600_000;

impl Nodule {
    /// Segments and measures a candidate; None when nothing there is brighter than the lung around it.
    pub fn segment(
        volume: &Volume,
        lungs: &Lungs,
        bounds: Option<&([f64; 3], [f64; 3])>,
        candidate: &Candidate,
    ) -> Option<Self> {
        let reach = (0.9 * candidate.diameter_mm + 6.0).clamp(REACH_MM_MIN, REACH_MM_MAX);
        let cut = Cut::out_of(volume, lungs, candidate.centre_mm, reach)?;
        let lung_hu = cut.lung_hu();
        let allowed = cut.inside(lungs);
        let (seed, core_hu) = cut.core(candidate, &allowed)?;
        let threshold = ((lung_hu + core_hu.min(60.0)) / 2.0).clamp(-720.0, -300.0);
        let ball = (0.8 * candidate.diameter_mm + 3.0).min(reach);
        let mut grown = cut.grow(seed, threshold, ball, &allowed);
        if cut.spills(&grown, ball) {
            // It sits on something large, the diaphragm or the chest wall: no further than the detector saw it.
            grown = cut.grow(seed, threshold, (0.5 * candidate.diameter_mm + 1.5).min(reach), &allowed);
        }
        let opened = cut.open(&grown, seed, candidate.diameter_mm);
        let mask = if opened.count >= 3 { opened } else { grown.clone_mask() };
        if mask.count == 0 {
            return None;
        }
        Some(Self::measure(volume, lungs, bounds, candidate, &cut, &grown, mask, core_hu))
    }

    #[allow(clippy::too_many_arguments, reason = "the last step of one chain, called once")]
    fn measure(
        volume: &Volume,
        lungs: &Lungs,
        bounds: Option<&([f64; 3], [f64; 3])>,
        candidate: &Candidate,
        cut: &Cut,
        grown: &Mask,
        mask: Mask,
        core_hu: f64,
    ) -> Self {
        let mut sum = [0.0; 3];
        let mut hu = 0.0;
        let mut spans: Vec<Span> = Vec::new();
        let mut best = Axes::default();
        for k in 0..cut.shape[0] {
            let mut pixels = Vec::new();
            for j in 0..cut.shape[1] {
                for i in 0..cut.shape[2] {
                    if !mask.marked[[k, j, i]] {
                        continue;
                    }
                    pixels.push((j, i));
                    let at = cut.voxel([k, j, i].map(|v| v as f64));
                    sum.iter_mut().zip(at).for_each(|(s, v)| *s += v);
                    hu += f64::from(cut.hu[[k, j, i]]);
                }
            }
            cut.spans(&mask, k, volume.shape(), &mut spans);
            let marked = |y: isize, x: isize| {
                let inside = y >= 0 && x >= 0 && (y as usize) < cut.shape[1] && (x as usize) < cut.shape[2];
                inside && mask.marked[[k, y as usize, x as usize]]
            };
            let here = axes(&pixels, marked, [cut.spacing_mm[1], cut.spacing_mm[2]]);
            if here.long_mm > best.long_mm {
                best = here;
            }
        }
        let count = mask.count as f64;
        let centroid_voxel = sum.map(|s| s / count);
        let centroid_mm = lungs.frame().voxel_mm(centroid_voxel);
        let cell_mm3 = volume.affine().determinant().abs() * cut.step.iter().product::<usize>() as f64;
        let volume_mm3 = count * cell_mm3;
        let equivalent_diameter_mm = libm::cbrt(6.0 * volume_mm3 / std::f64::consts::PI);
        let side = lungs.closed_side(centroid_mm).or_else(|| lungs.closed_side(candidate.centre_mm));
        let region = Region {
            hu: &cut.hu,
            spacing_mm: cut.spacing_mm,
            mask: &mask.marked,
            grown: &grown.marked,
            centroid: cut.cell(centroid_voxel),
            voxel_mm3: cell_mm3,
        };
        let place = features::Place {
            depth_mm: lungs.depth_mm(centroid_mm, 25.0),
            in_lung: lungs.is_lung_at(centroid_mm),
            relative: bounds.map_or([0.5; 3], |(low, high)| {
                std::array::from_fn(|a| ((centroid_mm[a] - low[a]) / (high[a] - low[a]).max(1.0)).clamp(0.0, 1.0))
            }),
        };
        Self {
            centroid_voxel,
            volume_mm3,
            equivalent_diameter_mm,
            mean_hu: hu / count,
            axes: best,
            side,
            spans,
            logit: candidate.logit(),
            blob: candidate.blob,
            features: features::compute(candidate, &region, &place, &best, core_hu),
            centroid_mm,
        }
    }

    /// Whether both are the same thing: the centre of one lies well inside the other.
    pub fn is_same(&self, other: &Self) -> bool {
        let d: f64 = (0..3).map(|a| (self.centroid_mm[a] - other.centroid_mm[a]).powi(2)).sum();
        d.sqrt() < (0.5 * self.equivalent_diameter_mm.max(other.equivalent_diameter_mm)).max(2.0)
    }
}

/// A box round a candidate, in cells: single voxels, or one voxel of every few.
struct Cut {
    first: [usize; 3],
    /// Voxels from one cell to the next.
    step: [usize; 3],
    shape: [usize; 3],
    /// Of the cells.
    spacing_mm: [f64; 3],
    centre: [f64; 3],
    hu: Array3<f32>,
}

/// Marked voxels of a box.
struct Mask {
    marked: Array3<bool>,
    count: usize,
}

impl Mask {
    fn clone_mask(&self) -> Self {
        Self { marked: self.marked.clone(), count: self.count }
    }
}

impl Cut {
    fn out_of(volume: &Volume, lungs: &Lungs, centre_mm: [f64; 3], reach_mm: f64) -> Option<Self> {
        let frame = lungs.frame();
        let mut low = [f64::INFINITY; 3];
        let mut high = [f64::NEG_INFINITY; 3];
        for corner in 0..8 {
            let at = std::array::from_fn(|a| centre_mm[a] + if corner >> a & 1 == 0 { -reach_mm } else { reach_mm });
            for (a, v) in frame.voxel_at(at).into_iter().enumerate() {
                low[a] = low[a].min(v);
                high[a] = high[a].max(v);
            }
        }
        let shape = volume.shape();
        let first: [usize; 3] = std::array::from_fn(|a| low[a].floor().clamp(0.0, shape[a] as f64) as usize);
        let end: [usize; 3] = std::array::from_fn(|a| (high[a].ceil() + 1.0).clamp(0.0, shape[a] as f64) as usize);
        if (0..3).any(|a| end[a] <= first[a]) {
            return None;
        }
        let voxel_mm = volume.spacing().zyx_mm();
        let extent: [usize; 3] = std::array::from_fn(|a| end[a] - first[a]);
        let step = steps(extent, voxel_mm);
        let size: [usize; 3] = std::array::from_fn(|a| extent[a].div_ceil(step[a]));
        let mut cut = Self {
            first,
            step,
            shape: size,
            spacing_mm: std::array::from_fn(|a| voxel_mm[a] * step[a] as f64),
            centre: [0.0; 3],
            hu: read_box(volume, first, step, size),
        };
        let centre = cut.cell(frame.voxel_at(centre_mm));
        cut.centre = std::array::from_fn(|a| centre[a].clamp(0.0, size[a] as f64 - 1.0));
        Some(cut)
    }

    /// The voxel that a cell was read from.
    fn voxel(&self, cell: [f64; 3]) -> [f64; 3] {
        std::array::from_fn(|a| cell[a] * self.step[a] as f64 + self.first[a] as f64)
    }

    /// Where a voxel lies among the cells.
    fn cell(&self, voxel: [f64; 3]) -> [f64; 3] {
        std::array::from_fn(|a| (voxel[a] - self.first[a] as f64) / self.step[a] as f64)
    }

    /// The voxels that a marked cell stands for along one axis: those nearest to the one it was read from.
    fn covered(&self, axis: usize, cell: usize, length: usize) -> Range<usize> {
        let step = self.step[axis];
        let at = self.first[axis] + cell * step;
        at.saturating_sub((step - 1) / 2)..(at + step / 2 + 1).min(length)
    }

    /// The voxels of the marked cells of one slice of the box, in order of slice, row and column.
    fn spans(&self, mask: &Mask, cell: usize, [slices, rows, columns]: [usize; 3], spans: &mut Vec<Span>) {
        for k in self.covered(0, cell, slices) {
            for y in 0..self.shape[1] {
                for j in self.covered(1, y, rows) {
                    for x in (0..self.shape[2]).filter(|x| mask.marked[[cell, y, *x]]) {
                        let run = self.covered(2, x, columns);
                        match spans.last_mut() {
                            Some(s) if (s.k, s.j, s.columns.end) == (k, j, run.start) => s.columns.end = run.end,
                            _ => spans.push(Span { k, j, columns: run }),
                        }
                    }
                }
            }
        }
    }

    fn mm2(&self, a: [usize; 3], b: [f64; 3]) -> f64 {
        (0..3).map(|n| ((a[n] as f64 - b[n]) * self.spacing_mm[n]).powi(2)).sum()
    }

    /// Median of what is clearly lung; that of a healthy lung when there is next to none.
    fn lung_hu(&self) -> f64 {
        // Counted by whole units: a box may have more than a million cells.
        let mut counts = [0usize; 400];
        for v in self.hu.iter().filter(|v| (-1000.0..-600.0).contains(*v)) {
            counts[(v + 1000.0) as usize] += 1;
        }
        let total: usize = counts.iter().sum();
        if total < 50 {
            return -850.0;
        }
        let mut below = 0;
        let median = counts.iter().position(|count| {
            below += count;
            below > total / 2
        });
        median.map_or(-850.0, |bin| bin as f64 - 1000.0)
    }

    /// The brightest spot near the centre, as mean over its neighbours in plane: where, and how bright.
    fn core(&self, candidate: &Candidate, allowed: &Array3<bool>) -> Option<([usize; 3], f64)> {
        // Of a nodule on the pleura the middle may lie outside the closed lung: then the brightest of its near side.
        let near = (0.3 * candidate.diameter_mm).clamp(1.5, 6.0);
        let wide = 0.5 * candidate.diameter_mm + 1.5;
        let found = [near, wide].into_iter().find_map(|reach_mm| self.brightest(reach_mm, allowed));
        // Slices further apart than the search reaches: the nearest voxel.
        found.or_else(|| {
            let at = self.centre.map(|v| v.round() as usize);
            self.hu.get(at).map(|v| (at, f64::from(*v)))
        })
    }

    /// The voxel whose in-plane neighbourhood is brightest, of those allowed within a reach of the centre.
    fn brightest(&self, reach_mm: f64, allowed: &Array3<bool>) -> Option<([usize; 3], f64)> {
        let mut best: Option<([usize; 3], f64)> = None;
        let near = |a: usize| {
            let reach = reach_mm / self.spacing_mm[a] + 1.0;
            let (low, high) = ((self.centre[a] - reach).max(0.0) as usize, (self.centre[a] + reach) as usize + 1);
            (low, high.min(self.shape[a]))
        };
        let ([k0, j0, i0], [k1, j1, i1]) = ([0, 1, 2].map(|a| near(a).0), [0, 1, 2].map(|a| near(a).1));
        for k in k0..k1 {
            for j in j0.max(1)..j1.min(self.shape[1].saturating_sub(1)) {
                for i in i0.max(1)..i1.min(self.shape[2].saturating_sub(1)) {
                    if !allowed[[k, j, i]] || self.mm2([k, j, i], self.centre) > reach_mm * reach_mm {
                        continue;
                    }
                    let mut sum = 0.0;
                    for q in j - 1..=j + 1 {
                        for r in i - 1..=i + 1 {
                            sum += f64::from(self.hu[[k, q, r]]);
                        }
                    }
                    if best.is_none_or(|(_, most)| sum / 9.0 > most) {
                        best = Some(([k, j, i], sum / 9.0));
                    }
                }
            }
        }
        best
    }

    /// The voxels of the closed lungs.
    fn inside(&self, lungs: &Lungs) -> Array3<bool> {
        let mut inside = Array3::from_elem(self.shape, false);
        for (k, mut slice) in inside.outer_iter_mut().enumerate() {
            let [rows, columns] = [1, 2].map(|a| [self.first[a], self.step[a]]);
            lungs.closed_window(self.first[0] + k * self.step[0], rows, columns, slice.view_mut());
        }
        inside
    }

    /// What is connected with the seed above the threshold, inside a ball round the centre and inside the closed lung.
    fn grow(&self, seed: [usize; 3], threshold: f64, ball_mm: f64, allowed: &Array3<bool>) -> Mask {
        let ball = ball_mm * ball_mm;
        let mut marked = Array3::from_elem(self.shape, false);
        let mut count = 0;
        let fits = |at: [usize; 3]| {
            f64::from(self.hu[at]) >= threshold && allowed[at] && self.mm2(at, self.centre) <= ball
        };
        if !fits(seed) {
            return Mask { marked, count };
        }
        marked[seed] = true;
        let mut stack = vec![short(seed)];
        while let Some(at) = stack.pop().map(long) {
            count += 1;
            for axis in 0..3 {
                for up in [false, true] {
                    let mut next = at;
                    if up { next[axis] += 1 } else { next[axis] = next[axis].wrapping_sub(1) }
                    if next[axis] < self.shape[axis] && !marked[next] && fits(next) {
                        marked[next] = true;
                        stack.push(short(next));
                    }
                }
            }
        }
        Mask { marked, count }
    }

    /// Whether what was grown fills a good part of the ball's outermost fifth: a nodule ends before, a vessel is thin.
    fn spills(&self, grown: &Mask, ball_mm: f64) -> bool {
        let (inner, outer) = ((0.8 * ball_mm).powi(2), ball_mm.powi(2));
        let in_shell = |at: [usize; 3]| (inner..=outer).contains(&self.mm2(at, self.centre));
        let marked = grown.marked.indexed_iter().filter(|((k, j, i), m)| **m && in_shell([*k, *j, *i])).count();
        let voxel_mm3: f64 = self.spacing_mm.iter().product();
        let shell_mm3 = 4.0 / 3.0 * std::f64::consts::PI * (1.0 - 0.8f64.powi(3)) * ball_mm.powi(3);
        marked as f64 * voxel_mm3 > 0.2 * shell_mm3
    }

    /// Cuts vessels: an opening whose ball has half the radius of the largest that fits, and what is left round it.
    fn open(&self, grown: &Mask, seed: [usize; 3], diameter_mm: f64) -> Mask {
        let empty = || Mask { marked: Array3::from_elem(self.shape, false), count: 0 };
        if grown.count == 0 {
            return empty();
        }
        // Distances matter within the thing only: its own box and the cells next to it say them all.
        let (low, size) = distance::bounds(&grown.marked, [1; 3]);
        let within = |at: [usize; 3]| -> [usize; 3] { std::array::from_fn(|a| at[a] - low[a]) };
        let whole = |at: [usize; 3]| -> [usize; 3] { std::array::from_fn(|a| at[a] + low[a]) };
        let inside = distance::squared_mm(size, self.spacing_mm, |at| !grown.marked[whole(at)]);
        let near = (0.5 * diameter_mm).max(3.0).powi(2);
        let mut deepest = (seed, 0.0f32);
        let seed_at = seed.map(|v| v as f64);
        for ((k, j, i), d) in inside.indexed_iter() {
            let at = whole([k, j, i]);
            if d.is_finite() && *d > deepest.1 && self.mm2(at, seed_at) <= near {
                deepest = (at, *d);
            }
        }
        let pixel = self.spacing_mm[1].max(self.spacing_mm[2]);
        let radius = (0.5 * f64::from(deepest.1).sqrt()).clamp(0.6 * pixel, 5.0);
        let eroded = |at: [usize; 3]| f64::from(inside[at]) > radius * radius;
        if !eroded(within(deepest.0)) {
            return empty();
        }
        let mut core = Array3::from_elem(size, false);
        core[within(deepest.0)] = true;
        let mut stack = vec![short(within(deepest.0))];
        while let Some(at) = stack.pop().map(long) {
            for axis in 0..3 {
                for up in [false, true] {
                    let mut next = at;
                    if up { next[axis] += 1 } else { next[axis] = next[axis].wrapping_sub(1) }
                    if next[axis] < size[axis] && !core[next] && eroded(next) {
                        core[next] = true;
                        stack.push(short(next));
                    }
                }
            }
        }
        drop(inside);
        let outside = distance::squared_mm(size, self.spacing_mm, |at| core[at]);
        let mut opened = empty();
        for ((k, j, i), d) in outside.indexed_iter() {
            let at = whole([k, j, i]);
            if grown.marked[at] && f64::from(*d) <= (radius * radius) * 1.000_001 {
                opened.marked[at] = true;
                opened.count += 1;
            }
        }
        opened
    }
}

/// A cell in six bytes: what is still to be visited of a large mass are hundreds of thousands. A box of [`CELLS_MAX`] cells
/// at [`CELL_MM_MIN`] is far shorter than 65,536 along each axis.
fn short(cell: [usize; 3]) -> [u16; 3] {
    cell.map(|v| v as u16)
}

fn long(cell: [u16; 3]) -> [usize; 3] {
    cell.map(usize::from)
}

/// How many voxels to go from one cell to the next: as many as [`CELL_MM_MIN`] holds, and more, the finest axis first,
/// until a box of this extent has no more than [`CELLS_MAX`].
fn steps(extent: [usize; 3], voxel_mm: [f64; 3]) -> [usize; 3] {
    let mut step = voxel_mm.map(|mm| (CELL_MM_MIN / mm).floor().clamp(1.0, 1e6) as usize);
    let cells = |step: [usize; 3]| (0..3).map(|a| extent[a].div_ceil(step[a])).product::<usize>();
    while cells(step) > CELLS_MAX {
        let mm = |a: &usize| voxel_mm[*a] * step[*a] as f64;
        let finest = (0..3).min_by(|a, b| mm(a).total_cmp(&mm(b))).unwrap_or(0);
        step[finest] += 1;
    }
    step
}

/// Real values of a box of cells.
fn read_box(volume: &Volume, first: [usize; 3], step: [usize; 3], size: [usize; 3]) -> Array3<f32> {
    let Rescale { slope, intercept } = volume.rescale();
    let (a, b) = (slope as f32, intercept as f32);
    let mut out = Array3::zeros(size);
    let (dj, di) = (step[1] as isize, step[2] as isize);
    for (n, mut slice) in out.outer_iter_mut().enumerate() {
        let k = first[0] + n * step[0];
        with_voxel_type!(volume.voxel_type(), T => {
            use crate::volume::Voxel;
            let stored = volume.stored_slice::<T>(k).expect("the type is the volume's own");
            let part = stored.slice(ndarray::s![first[1]..first[1] + (size[1] - 1) * step[1] + 1;dj, first[2]..first[2] + (size[2] - 1) * step[2] + 1;di]);
            slice.zip_mut_with(&part, |o, v| *o = v.to_f32() * a + b);
        });
        // Boxes of many candidates touch the whole series in the end.
        volume.release(k..k + 1);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_is_read_whole_until_it_is_too_large_and_then_thinned_along_its_finest_axis() {
        assert_eq!(steps([90, 129, 129], [1.0, 0.7, 0.7]), [1, 1, 1]);
        assert_eq!(steps([200, 40, 40], [0.15, 0.7, 0.7]), [3, 1, 1]);
        assert_eq!(steps([600, 129, 129], [0.15, 0.7, 0.7]), [5, 2, 1]);
        let step = steps([600, 450, 450], [0.15, 0.2, 0.2]);
        assert!((0..3).map(|a| [600usize, 450, 450][a].div_ceil(step[a])).product::<usize>() <= CELLS_MAX, "{step:?}");
    }
}
