//! From series as they were scanned to images on one grid: thinned, laid over each other, evened out.

use ndarray::{Array3, ArrayView3};

use super::Source;
use super::contrast::Contrast;
use crate::exam::ExamError;
use crate::geometry::{Affine, Grid, Spacing};
use crate::imaging::registration::{self, Image, Kind, Level, Metric, Optimiser, Sampling, Settings, Start, Transform};
use crate::imaging::resample::{self, Interpolation};
use crate::infer::tiles;
use crate::pool::Pool;
use crate::study::{Rejection, RejectionCode};

/// Voxels finer than this are averaged to about it: what the networks look at is 2 mm apart, and averages carry less noise.
const THINNED_MM: f64 = 1.9;
/// Voxels of a thinned series. A head at 1.4 mm has 10 million; more is no head.
const THINNED_MAX: usize = 1 << 25;

/// A series in memory, averaged to about 2 mm, and how it lies on the reference.
pub(super) struct Thinned {
    pub contrast: Contrast,
    pub voxels: Array3<f32>,
    pub affine: Affine,
    /// From places of the reference to places of this series.
    pub onto: Transform,
}

impl Thinned {
    /// Reads a series slice by slice; whole blocks of voxels are averaged, and what is left at the far ends is dropped.
    pub fn read(source: &Source<'_>) -> Result<Self, ExamError> {
        let volume = source.volume;
        let shape = volume.shape();
        let name = source.contrast.name();
        let reject = |code, text: String| ExamError::Rejected(Rejection::new(code, text));
        let spacing = volume.spacing().zyx_mm();
        let by: [usize; 3] = std::array::from_fn(|a| ((THINNED_MM / spacing[a]).round() as usize).clamp(1, shape[a].max(1)));
        let thin: [usize; 3] = std::array::from_fn(|a| shape[a] / by[a]);
        let voxels: usize = thin.iter().product();
        if thin.iter().any(|n| *n < 4) {
            return Err(reject(RejectionCode::TooFewSlices, format!("the {name} series has too few slices, rows or columns")));
        }
        if voxels > THINNED_MAX {
            return Err(reject(RejectionCode::TooLarge, format!("the {name} series has more voxels than a head")));
        }
        let mut out = Array3::<f32>::zeros(thin);
        let (rows, columns) = (shape[1], shape[2]);
        let mut slice = vec![0f32; rows * columns];
        let share = 1.0 / (by[0] * by[1] * by[2]) as f32;
        for (k, mut plane) in out.outer_iter_mut().enumerate() {
            for z in k * by[0]..(k + 1) * by[0] {
                volume.read_slice_f32(z, &mut slice);
                if !slice.iter().all(|v| v.is_finite()) {
                    return Err(reject(RejectionCode::Malformed, format!("the {name} series has voxels that are not numbers")));
                }
                for (j, mut row) in plane.outer_iter_mut().enumerate() {
                    for y in j * by[1]..(j + 1) * by[1] {
                        let line = &slice[y * columns..][..thin[2] * by[2]];
                        for (sum, block) in row.iter_mut().zip(line.chunks_exact(by[2])) {
                            *sum += block.iter().sum::<f32>() * share;
                        }
                    }
                }
            }
            volume.release(k * by[0]..(k + 1) * by[0]);
        }
        let whole = volume.affine();
        let step = |axis: usize| whole.step(axis).map(|v| v * by[2 - axis] as f64);
        let middle = [by[2], by[1], by[0]].map(|n| (n - 1) as f64 / 2.0);
        let affine = Affine::new(step(0), step(1), step(2), whole.to_lps(middle))
            .map_err(|e| reject(RejectionCode::Malformed, format!("the {name} series: {e}")))?;
        let onto = Transform::identity(Kind::Rigid, [0.0; 3]);
        Ok(Self { contrast: source.contrast, voxels: out, affine, onto })
    }

    pub fn grid(&self) -> Grid {
        let (z, y, x) = self.voxels.dim();
        Grid { shape: [z, y, x], affine: self.affine }
    }

    /// This series at the voxels of a grid in the reference's space.
    pub fn on(&self, grid: Grid, outside: f32, pool: &Pool) -> Result<Array3<f32>, ExamError> {
        // The grid as it lies in this series' own space: turning and shifting it is turning and shifting its axes.
        let turn = self.onto.matrix();
        let step = |axis: usize| turn.map(|row| crate::geometry::dot(row, grid.affine.step(axis)));
        let there = Affine::new(step(0), step(1), step(2), self.onto.apply(grid.affine.origin()))
            .map_err(|e| ExamError::Fault(crate::pool::Fault(e.to_string())))?;
        let there = Grid { shape: grid.shape, affine: there };
        resample::resample(self.voxels.view(), &self.affine, &there, Interpolation::Linear, outside, pool).map_err(super::of_resample)
    }
}

/// Shares of voxels that are exactly 0, and litres of those that are not: a brain without its head lies in zeros, and no head is
/// as small as a brain.
pub(super) fn is_stripped(reference: &Thinned) -> bool {
    let zeros = reference.voxels.iter().filter(|v| **v == 0.0).count();
    let all = reference.voxels.len();
    let litres = (all - zeros) as f64 * reference.affine.determinant().abs() * 1e-6;
    zeros * 2 > all && litres < 2.2
}

/// Lays a series over the reference, rigidly (Mattes' mutual information on a pyramid of two levels).
pub(super) fn align(reference: &Thinned, moving: &mut Thinned, pool: &Pool) -> Result<(), ExamError> {
    let settings = Settings {
        kind: Kind::Rigid,
        metric: Metric::Mattes { bins: 40 },
        sampling: Sampling::All,
        optimiser: Optimiser::QuasiNewton { least_step_mm: 0.02 },
        steps: 60,
        levels: [(3, 3.0), (1, 1.0)].map(|(shrink, sigma_mm)| Level { shrink, sigma_mm }).to_vec(),
        start: Start::Best,
    };
    let fixed = Image { voxels: reference.voxels.view(), affine: reference.affine, mask: None };
    let other = Image { voxels: moving.voxels.view(), affine: moving.affine, mask: None };
    match registration::register(&fixed, &other, &settings, pool, |_| {}) {
        Ok(outcome) => moving.onto = outcome.transform,
        Err(registration::RegistrationError::Fault(fault)) => return Err(fault.into()),
        Err(error) => {
            let name = moving.contrast.name();
            let text = format!("the {name} series cannot be laid over the {} series: {error}", reference.contrast.name());
            return Err(Rejection::new(RejectionCode::WrongContent, text).into());
        }
    }
    Ok(())
}

/// Millimetres that the middle of a volume is moved by a transform, and the angle it is turned by.
pub(super) fn movement(onto: &Transform, middle: [f64; 3]) -> (f64, f64) {
    let moved = onto.apply(middle);
    let shift = crate::geometry::norm(crate::geometry::sub(moved, middle));
    let m = onto.matrix();
    let cosine = ((m[0][0] + m[1][1] + m[2][2] - 1.0) / 2.0).clamp(-1.0, 1.0);
    (shift, libm::acos(cosine).to_degrees())
}

/// A grid along the axes of patient space: columns to the left, rows to the back, slices to the head.
pub(super) fn grid_at(spacing_mm: f64, shape: [usize; 3], first_lps_mm: [f64; 3]) -> Grid {
    let spacing = Spacing::new([spacing_mm; 3]).expect("a spacing of this code's own");
    Grid { shape, affine: Affine::axial(spacing, first_lps_mm) }
}

/// The box of patient space a grid fills: lowest and highest corner.
#[allow(clippy::needless_range_loop)]
pub(super) fn bounds(grid: &Grid) -> ([f64; 3], [f64; 3]) {
    let (mut low, mut high) = ([f64::INFINITY; 3], [f64::NEG_INFINITY; 3]);
    for corner in 0..8 {
        let at = |axis: usize| if corner >> axis & 1 == 1 { (grid.shape[2 - axis] - 1) as f64 } else { 0.0 };
        let place = grid.affine.to_lps([at(0), at(1), at(2)]);
        for a in 0..3 {
            low[a] = low[a].min(place[a]);
            high[a] = high[a].max(place[a]);
        }
    }
    (low, high)
}

/// Where the upper part of the head is: the middle of what is bright, below the highest slice that is.
pub(super) fn head_middle(reference: &Thinned, height_mm: f64, pool: &Pool) -> Result<[f64; 3], ExamError> {
    const COARSE_MM: f64 = 4.0;
    let (low, high) = bounds(&reference.grid());
    let shape: [usize; 3] = std::array::from_fn(|a| (((high[2 - a] - low[2 - a]) / COARSE_MM).ceil() as usize + 1).min(512));
    let coarse = reference.on(grid_at(COARSE_MM, shape, low), 0.0, pool)?;
    let mut values: Vec<f32> = coarse.iter().copied().filter(|v| *v > 0.0).collect();
    let nothing = || Rejection::new(RejectionCode::WrongContent, "no head is in these images");
    if values.len() < 1000 {
        return Err(nothing().into());
    }
    let at = (values.len() - 1) * 98 / 100;
    let level = 0.2 * *values.select_nth_unstable_by(at, f32::total_cmp).1;
    // 15 square centimetres of head make a slice of it.
    let enough = (1500.0 / (COARSE_MM * COARSE_MM)) as usize;
    let is_head = |k: &usize| coarse.index_axis(ndarray::Axis(0), *k).iter().filter(|v| **v > level).count() >= enough;
    let top = (0..shape[0]).rev().find(is_head).ok_or_else(nothing)?;
    let bottom = top.saturating_sub((0.75 * height_mm / COARSE_MM) as usize);
    // Per column and row, so that a hand or a noisy corner does not count.
    let mut counts = [vec![0usize; shape[1]], vec![0usize; shape[2]]];
    for k in bottom..=top {
        for ((j, i), v) in coarse.index_axis(ndarray::Axis(0), k).indexed_iter() {
            if *v > level {
                counts[0][j] += 1;
                counts[1][i] += 1;
            }
        }
    }
    let middle = |counts: &[usize]| {
        let most = counts.iter().copied().max().unwrap_or(0);
        let first = counts.iter().position(|c| *c * 10 >= most).unwrap_or(0);
        let last = counts.iter().rposition(|c| *c * 10 >= most).unwrap_or(0);
        (first + last) as f64 / 2.0
    };
    let y = low[1] + middle(&counts[0]) * COARSE_MM;
    let x = low[0] + middle(&counts[1]) * COARSE_MM;
    let z = low[2] + top as f64 * COARSE_MM + 6.0 - height_mm / 2.0;
    Ok([x, y, z])
}

/// Takes the slow changes of brightness out of a brain: a quadratic is fitted to the logarithms, again and again without what lies far
/// off it (fluid, lesions), and divided out by at most a third. Voxels outside the mask become 0.
#[allow(clippy::needless_range_loop)]
pub(super) fn even_out(image: &mut Array3<f32>, mask: ArrayView3<'_, u8>) {
    ndarray::Zip::from(&mut *image).and(mask).for_each(|v, m| *v = if *m == 0 { 0.0 } else { v.max(1e-3) });
    let (z, y, x) = image.dim();
    let half = [z, y, x].map(|n| (n.max(2) - 1) as f64 / 2.0);
    let terms = |k: usize, j: usize, i: usize| {
        let [c, b, a] = [k as f64 / half[0] - 1.0, j as f64 / half[1] - 1.0, i as f64 / half[2] - 1.0];
        [1.0, a, b, c, a * a, b * b, c * c, a * b, b * c, c * a]
    };
    let mut samples: Vec<([f64; 10], f64)> = Vec::new();
    for k in (0..z).step_by(2) {
        for j in (0..y).step_by(2) {
            for i in (0..x).step_by(2) {
                if mask[[k, j, i]] != 0 {
                    samples.push((terms(k, j, i), libm::log(f64::from(image[[k, j, i]]))));
                }
            }
        }
    }
    if samples.len() < 500 {
        return;
    }
    let mut field = [0.0; 10];
    let mut logs: Vec<f64> = samples.iter().map(|s| s.1).collect();
    let at = logs.len() / 2;
    field[0] = *logs.select_nth_unstable_by(at, f64::total_cmp).1;
    for _ in 0..4 {
        let value = |t: &[f64; 10]| t.iter().zip(&field).map(|(a, b)| a * b).sum::<f64>();
        let rest: Vec<f64> = samples.iter().map(|(t, v)| v - value(t)).collect();
        let mut sizes: Vec<f64> = rest.iter().map(|r| r.abs()).collect();
        let reach = 2.0 * *sizes.select_nth_unstable_by(at, f64::total_cmp).1 + 1e-6;
        let (mut matrix, mut right) = ([[0.0; 10]; 10], [0.0; 10]);
        for ((t, _), r) in samples.iter().zip(&rest).filter(|(_, r)| r.abs() < reach) {
            for a in 0..10 {
                right[a] += t[a] * r;
                for b in 0..=a {
                    matrix[a][b] += t[a] * t[b];
                }
            }
        }
        let Some(change) = solve(matrix, right) else { return };
        field.iter_mut().zip(change).for_each(|(f, c)| *f += c);
    }
    // Brightness as a whole is not ours to change.
    let mean = samples.iter().map(|(t, _)| t[1..].iter().zip(&field[1..]).map(|(a, b)| a * b).sum::<f64>()).sum::<f64>();
    let mean = mean / samples.len() as f64;
    for ((k, j, i), v) in image.indexed_iter_mut() {
        if mask[[k, j, i]] != 0 {
            let t = terms(k, j, i);
            let log = t[1..].iter().zip(&field[1..]).map(|(a, b)| a * b).sum::<f64>() - mean;
            *v = (f64::from(*v) / libm::exp(log.clamp(-0.3, 0.3))) as f32;
        }
    }
}

/// Solves a symmetric positive system given by its lower half (Cholesky).
#[allow(clippy::needless_range_loop)]
fn solve(mut m: [[f64; 10]; 10], mut v: [f64; 10]) -> Option<[f64; 10]> {
    let trace = (0..10).map(|n| m[n][n]).sum::<f64>();
    for n in 0..10 {
        // What the samples leave open stays as it is.
        m[n][n] += 1e-9 * trace;
        for k in 0..n {
            let inner: f64 = (0..k).map(|p| m[n][p] * m[k][p]).sum();
            m[n][k] = (m[n][k] - inner) / m[k][k];
        }
        let inner: f64 = (0..n).map(|p| m[n][p] * m[n][p]).sum();
        let pivot = m[n][n] - inner;
        if pivot.is_nan() || pivot <= 0.0 {
            return None;
        }
        m[n][n] = pivot.sqrt();
    }
    for n in 0..10 {
        let inner: f64 = (0..n).map(|p| m[n][p] * v[p]).sum();
        v[n] = (v[n] - inner) / m[n][n];
    }
    for n in (0..10).rev() {
        let inner: f64 = (n + 1..10).map(|p| m[p][n] * v[p]).sum();
        v[n] = (v[n] - inner) / m[n][n];
    }
    Some(v)
}

/// A channel as the tumour network sees it: evened out, median 0 and mean deviation 1 in the brain.
pub(super) fn channel(mut image: Array3<f32>, mask: ArrayView3<'_, u8>, range: [f64; 2]) -> Array3<f32> {
    even_out(&mut image, mask);
    let voxels = image.as_slice_mut().expect("made contiguous");
    tiles::robust_z_score(voxels, |v| v > 0.0, range);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_change_of_brightness_is_taken_out_and_a_lesion_is_not() {
        let shape = (30, 36, 30);
        let mask = Array3::from_elem(shape, 1u8);
        let lesion = |k: usize, j: usize, i: usize| (k as i32 - 15).pow(2) + (j as i32 - 10).pow(2) + (i as i32 - 20).pow(2) < 36;
        let mut image = Array3::from_shape_fn(shape, |(k, j, i)| {
            let tissue = if lesion(k, j, i) { 200.0 } else { [100.0, 120.0][(k / 3 + j / 3 + i / 3) % 2] };
            tissue * (1.0 + 0.25 * (j as f32 / 36.0 - 0.5) + 0.15 * (i as f32 / 30.0 - 0.5))
        });
        even_out(&mut image, mask.view());
        let mean = |pick: &dyn Fn(usize, usize, usize) -> bool| {
            let values: Vec<f32> = image.indexed_iter().filter(|((k, j, i), _)| pick(*k, *j, *i)).map(|(_, v)| *v).collect();
            values.iter().sum::<f32>() / values.len() as f32
        };
        let front = mean(&|k, j, i| j < 9 && !lesion(k, j, i));
        let back = mean(&|k, j, i| j >= 27 && !lesion(k, j, i));
        assert!((front / back - 1.0).abs() < 0.03, "{front} {back}");
        assert!(mean(&lesion) > 1.6 * front);
    }

    #[test]
    fn a_system_is_solved() {
        let mut m = [[0.0; 10]; 10];
        for (a, row) in m.iter_mut().enumerate() {
            for (b, v) in row.iter_mut().enumerate().take(a + 1) {
                *v = if a == b { 60.0 + a as f64 } else { ((a * 7 + b * 3) % 5) as f64 };
            }
        }
        let x: [f64; 10] = std::array::from_fn(|n| n as f64 - 4.0);
        let full = |a: usize, b: usize| if a >= b { m[a][b] } else { m[b][a] };
        let right = std::array::from_fn(|a| (0..10).map(|b| full(a, b) * x[b]).sum());
        let solved = solve(m, right).unwrap();
        assert!(solved.iter().zip(x).all(|(a, b)| (a - b).abs() < 1e-5), "{solved:?}");
    }
}
