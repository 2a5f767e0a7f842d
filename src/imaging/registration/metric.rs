//! How well two images fit, and which way to move: value and gradient over the samples.
//!
//! Samples are taken in chunks of a fixed length; sums are made inside a chunk and then added chunk by chunk, so the
//! result is the same for any number of threads.

use ndarray::ArrayView3;

use super::RegistrationError;
use super::linear::{Matrix, multiply, times, transposed};
use super::pyramid::Plain;
use super::samples::Samples;
use super::transform::Transform;
use crate::geometry::sub;
use crate::pool::Pool;

/// What is compared. All are costs: less is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Negative mutual information (Mattes et al., IEEE TMI 22, 2003), in nats: a cubic B-spline window on the moving
    /// values and a box on the fixed ones, two bins of margin at either end, as ITK's `MattesMutualInformation...v4`.
    Mattes {
        /// Bins on each side of the joint histogram, 5 to [`BINS_MAX`].
        bins: usize,
    },
    /// Mean squared difference of the values.
    MeanSquares,
    /// Negative squared correlation of the values, as ITK's `CorrelationImageToImageMetricv4`.
    Correlation,
}

/// More bins than this hold less than a few samples each, and a histogram for every chunk of samples.
pub const BINS_MAX: usize = 256;

/// Bins of margin at each end, so that the window never leaves the histogram.
const MARGIN: usize = 2;

/// Samples in a chunk: large against a histogram, small against an image.
const CHUNK: usize = 16_384;

/// Samples summed in `f32` before they are added to an `f64`.
const BLOCK: usize = 128;

/// Linear map from values to bins.
#[derive(Debug, Clone, Copy)]
struct Bins {
    per_value: f32,
    offset: f32,
    count: usize,
}

impl Bins {
    fn new(values: impl Iterator<Item = f32>, count: usize, which: &'static str) -> Result<Self, RegistrationError> {
        let (low, high) = values.fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let width = (f64::from(high) - f64::from(low)) / (count - 2 * MARGIN) as f64;
        if width <= 0.0 || !width.is_finite() {
            return Err(RegistrationError::Flat { which });
        }
        Ok(Self { per_value: (1.0 / width) as f32, offset: (f64::from(low) / width) as f32 - MARGIN as f32, count })
    }

    /// The bin and how far into it.
    #[inline(always)]
    fn place(self, value: f32) -> (usize, f32) {
        let term = value * self.per_value - self.offset;
        let bin = (term.max(0.0) as i32 as usize).clamp(MARGIN, self.count - MARGIN - 1);
        (bin, term - bin as f32)
    }
}

/// What one chunk of samples works with.
struct Chunk {
    /// Moving value and its gradient over the moving index; NaN outside the moving image.
    seen: Vec<[f32; 4]>,
    /// Joint histogram of Mattes.
    histogram: Vec<f32>,
    valid: usize,
    /// Sums over valid samples of f, m, ff, mm, fm.
    sums: [f64; 5],
    /// Weighted gradient times (place, 1), row per moving axis.
    push: [[f64; 4]; 3],
}

/// The value at one transform.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Evaluation {
    pub(super) value: f64,
    /// Over the parameters; empty when it was not asked for.
    pub(super) gradient: Vec<f64>,
    /// Share of the samples that fall into the moving image.
    pub(super) overlap: f64,
}

/// A fixed and a moving image of one level, ready to be compared.
pub(super) struct Comparison<'a> {
    metric: Metric,
    fixed: crate::geometry::Affine,
    samples: Samples,
    fixed_bins: Vec<u16>,
    moving: &'a Plain,
    moving_mask: Option<ArrayView3<'a, u8>>,
    moving_bins: Bins,
    chunks: Vec<Chunk>,
}

impl<'a> Comparison<'a> {
    pub(super) fn new(
        metric: Metric,
        fixed: crate::geometry::Affine,
        samples: Samples,
        moving: &'a Plain,
        moving_mask: Option<ArrayView3<'a, u8>>,
    ) -> Result<Self, RegistrationError> {
        let count = if let Metric::Mattes { bins } = metric { bins } else { 2 * MARGIN + 1 };
        let bins = Bins::new(samples.values.iter().copied(), count, "fixed")?;
        let fixed_bins = samples.values.iter().map(|v| bins.place(*v).0 as u16).collect();
        let moving_bins = match &moving_mask {
            None => Bins::new(moving.voxels.iter().copied(), count, "moving")?,
            Some(mask) => {
                let inside = moving.voxels.iter().zip(mask.iter()).filter(|(_, m)| **m != 0).map(|(v, _)| *v);
                Bins::new(inside, count, "moving")?
            }
        };
        let histogram = if matches!(metric, Metric::Mattes { .. }) { count * count } else { 0 };
        let chunks = (0..samples.len().div_ceil(CHUNK))
            .map(|n| Chunk {
                seen: vec![[0.0; 4]; CHUNK.min(samples.len() - n * CHUNK)],
                histogram: vec![0.0; histogram],
                valid: 0,
                sums: [0.0; 5],
                push: [[0.0; 4]; 3],
            })
            .collect();
        Ok(Self { metric, fixed, samples, fixed_bins, moving, moving_mask, moving_bins, chunks })
    }

    /// Corners of the fixed lattice, LPS.
    pub(super) fn corners(&self) -> [[f64; 3]; 8] {
        std::array::from_fn(|n| {
            self.fixed.to_lps(std::array::from_fn(|c| if n >> c & 1 == 1 { 2.0 * self.samples.middle[c] } else { 0.0 }))
        })
    }

    /// Value and, if wanted, gradient.
    ///
    /// # Errors
    /// [`RegistrationError::NoOverlap`], and the pool's.
    pub(super) fn evaluate(
        &mut self,
        transform: &Transform,
        with_gradient: bool,
        pool: &Pool,
    ) -> Result<Evaluation, RegistrationError> {
        let map = IndexMap::new(self.fixed, self.samples.middle, self.moving.affine, transform);
        let mut chunks = std::mem::take(&mut self.chunks);
        let looked = pool.for_each_chunk(&mut chunks, 1, |n, chunk| self.look(n, &mut chunk[0], &map));
        let valid: usize = chunks.iter().map(|c| c.valid).sum();
        let overlap = valid as f64 / self.samples.len() as f64;
        let enough = valid >= 32.max(self.samples.len() / 100);
        let result = match looked {
            Err(fault) => Err(fault.into()),
            Ok(()) if !enough => Err(RegistrationError::NoOverlap { percent: 100.0 * overlap }),
            Ok(()) => {
                let (value, weigh) = self.judge(&chunks, valid);
                let pushed = if with_gradient {
                    pool.for_each_chunk(&mut chunks, 1, |n, chunk| self.push(n, &mut chunk[0], &weigh))
                } else {
                    Ok(())
                };
                pushed.map_err(RegistrationError::from).map(|()| {
                    let gradient = if with_gradient { self.gradient(&chunks, transform, &map) } else { Vec::new() };
                    Evaluation { value, gradient, overlap }
                })
            }
        };
        self.chunks = chunks;
        result
    }

    /// Reads the moving image at the samples of chunk `n` and counts.
    fn look(&self, n: usize, chunk: &mut Chunk, map: &IndexMap) {
        let start = n * CHUNK;
        chunk.histogram.fill(0.0);
        chunk.valid = 0;
        let mattes = matches!(self.metric, Metric::Mattes { .. });
        let mut sums = [0.0f64; 5];
        let [xs, ys, zs] = &self.samples.places;
        let length = chunk.seen.len();
        let places = xs[start..start + length].iter().zip(&ys[start..start + length]).zip(&zs[start..start + length]);
        let fixed = self.samples.values[start..start + length].iter().zip(&self.fixed_bins[start..start + length]);
        for (((seen, ((x, y), z)), value), bin) in chunk.seen.iter_mut().zip(places).zip(fixed.clone().map(|f| f.0)).zip(fixed.map(|f| f.1)) {
            let Some(found) = self.interpolate(map.apply(*x, *y, *z)) else {
                *seen = [f32::NAN; 4];
                continue;
            };
            *seen = found;
            chunk.valid += 1;
            if mattes {
                let (moving_bin, f) = self.moving_bins.place(found[0]);
                let at = usize::from(*bin) * self.moving_bins.count + moving_bin - 1;
                let window = window(f);
                if let Some(four) = chunk.histogram.get_mut(at..at + 4) {
                    four.iter_mut().zip(window).for_each(|(h, w)| *h += w);
                }
            } else {
                let (f, m) = (f64::from(*value), f64::from(found[0]));
                sums.iter_mut().zip([f, m, f * f, m * m, f * m]).for_each(|(s, v)| *s += v);
            }
        }
        chunk.sums = sums;
    }

    /// Value and gradient over the index by linear interpolation; None outside.
    #[inline(always)]
    fn interpolate(&self, at: [f32; 3]) -> Option<[f32; 4]> {
        let [nz, ny, nx] = self.moving.shape;
        let [x, y, z] = at;
        // Written so that NaN is outside.
        let inside = x >= 0.0 && y >= 0.0 && z >= 0.0 && x <= (nx - 1) as f32 && y <= (ny - 1) as f32 && z <= (nz - 1) as f32;
        if !inside {
            return None;
        }
        let (i, j, k) = ((x as i32).min(nx as i32 - 2), (y as i32).min(ny as i32 - 2), (z as i32).min(nz as i32 - 2));
        let (fx, fy, fz) = (x - i as f32, y - j as f32, z - k as f32);
        let (i, j, k) = (i as usize, j as usize, k as usize);
        if let Some(mask) = &self.moving_mask {
            let nearest = [k + usize::from(fz >= 0.5), j + usize::from(fy >= 0.5), i + usize::from(fx >= 0.5)];
            if mask[nearest] == 0 {
                return None;
            }
        }
        let near = (k * ny + j) * nx + i;
        let far = near + ny * nx;
        let near = self.moving.voxels.get(near..near + nx + 2)?;
        let far = self.moving.voxels.get(far..far + nx + 2)?;
        let [a0, a1, b0, b1] = [near[0], near[1], near[nx], near[nx + 1]];
        let [c0, c1, d0, d1] = [far[0], far[1], far[nx], far[nx + 1]];
        let (da, db, dc, dd) = (a1 - a0, b1 - b0, c1 - c0, d1 - d0);
        let (a, b, c, d) = (a0 + fx * da, b0 + fx * db, c0 + fx * dc, d0 + fx * dd);
        let (ab, cd) = (a + fy * (b - a), c + fy * (d - c));
        let (gx_near, gx_far) = (da + fy * (db - da), dc + fy * (dd - dc));
        let (gy_near, gy_far) = (b - a, d - c);
        Some([
            ab + fz * (cd - ab),
            gx_near + fz * (gx_far - gx_near),
            gy_near + fz * (gy_far - gy_near),
            cd - ab,
        ])
    }

    /// The value, and how much each sample's moving value bears on it.
    fn judge(&self, chunks: &[Chunk], valid: usize) -> (f64, Weigh) {
        let n = valid as f64;
        if let Metric::Mattes { bins } = self.metric {
            let mut joint = vec![0.0f64; bins * bins];
            for chunk in chunks {
                joint.iter_mut().zip(&chunk.histogram).for_each(|(sum, h)| *sum += f64::from(*h));
            }
            let total: f64 = joint.iter().sum();
            joint.iter_mut().for_each(|p| *p /= total);
            let fixed: Vec<f64> = joint.chunks_exact(bins).map(|row| row.iter().sum()).collect();
            let mut moving = vec![0.0; bins];
            for row in joint.chunks_exact(bins) {
                moving.iter_mut().zip(row).for_each(|(m, p)| *m += p);
            }
            let mut information = 0.0;
            let mut ratios = vec![0.0f32; bins * bins];
            let scale = f64::from(self.moving_bins.per_value) / n;
            for (f, row) in joint.chunks_exact(bins).enumerate() {
                for (m, p) in row.iter().enumerate() {
                    if *p > 1e-16 {
                        let ratio = (p / moving[m]).ln();
                        information += p * (ratio - fixed[f].ln());
                        // Of the cost, so its sign is turned.
                        ratios[f * bins + m] = (-ratio * scale) as f32;
                    }
                }
            }
            return (-information, Weigh::Ratios(ratios));
        }
        let mut sums = [0.0f64; 5];
        for chunk in chunks {
            sums.iter_mut().zip(chunk.sums).for_each(|(s, v)| *s += v);
        }
        let [f, m, ff, mm, fm] = sums.map(|s| s / n);
        if self.metric == Metric::MeanSquares {
            return (ff - 2.0 * fm + mm, Weigh::Line { fixed: -2.0 / n, moving: 2.0 / n, constant: 0.0 });
        }
        let (vf, vm, c) = (ff - f * f, mm - m * m, fm - f * m);
        if vf <= 0.0 || vm <= 0.0 {
            return (0.0, Weigh::Line { fixed: 0.0, moving: 0.0, constant: 0.0 });
        }
        // -c^2 / (vf vm), with dc = (f_s - f) / n and dvm = 2 (m_s - m) / n for the sample s.
        let (over_c, over_vm) = (-2.0 * c / (vf * vm) / n, 2.0 * c * c / (vf * vm * vm) / n);
        let weigh = Weigh::Line { fixed: over_c, moving: over_vm, constant: -over_c * f - over_vm * m };
        (-c * c / (vf * vm), weigh)
    }

    /// Sums the weighted gradients of chunk `n`.
    fn push(&self, n: usize, chunk: &mut Chunk, weigh: &Weigh) {
        let start = n * CHUNK;
        let [xs, ys, zs] = &self.samples.places;
        let mut total = [[0.0f64; 4]; 3];
        for (b, seen) in chunk.seen.chunks(BLOCK).enumerate() {
            let block = start + b * BLOCK..start + b * BLOCK + seen.len();
            let mut sum = [[0.0f32; 4]; 3];
            let places = xs[block.clone()].iter().zip(&ys[block.clone()]).zip(&zs[block.clone()]);
            let fixed = self.samples.values[block.clone()].iter().zip(&self.fixed_bins[block]);
            for ((seen, ((x, y), z)), (value, bin)) in seen.iter().zip(places).zip(fixed) {
                if seen[0].is_nan() {
                    continue;
                }
                let weight = match weigh {
                    Weigh::Ratios(ratios) => {
                        let (moving_bin, f) = self.moving_bins.place(seen[0]);
                        let at = usize::from(*bin) * self.moving_bins.count + moving_bin - 1;
                        let slopes = window_slopes(f);
                        let Some(four) = ratios.get(at..at + 4) else { continue };
                        four[0] * slopes[0] + four[1] * slopes[1] + four[2] * slopes[2] + four[3] * slopes[3]
                    }
                    Weigh::Line { fixed, moving, constant } => {
                        (fixed * f64::from(*value) + moving * f64::from(seen[0]) + constant) as f32
                    }
                };
                let place = [*x, *y, *z, 1.0];
                for (row, slope) in sum.iter_mut().zip(&seen[1..]) {
                    let pull = weight * slope;
                    row.iter_mut().zip(place).for_each(|(s, p)| *s += pull * p);
                }
            }
            total.iter_mut().flatten().zip(sum.iter().flatten()).for_each(|(t, s)| *t += f64::from(*s));
        }
        chunk.push = total;
    }

    fn gradient(&self, chunks: &[Chunk], transform: &Transform, map: &IndexMap) -> Vec<f64> {
        let mut push = [[0.0f64; 4]; 3];
        for chunk in chunks {
            push.iter_mut().flatten().zip(chunk.push.iter().flatten()).for_each(|(p, c)| *p += c);
        }
        // From gradients over the moving index to gradients over LPS, and from fixed indices to LPS about the centre.
        let over_place: Matrix = push.map(|row| [row[0], row[1], row[2]]);
        let over_one = push.map(|row| row[3]);
        let to_lps = transposed(map.into_moving);
        let from_middle = multiply(over_place, transposed(map.fixed_steps));
        let arm = sub(self.fixed.to_lps(self.samples.middle), transform.centre_lps_mm());
        let about_centre: Matrix =
            std::array::from_fn(|r| std::array::from_fn(|c| from_middle[r][c] + over_one[r] * arm[c]));
        transform.chain(&multiply(to_lps, about_centre), times(&to_lps, over_one))
    }
}

/// How much the moving value of a sample bears on the cost.
enum Weigh {
    /// Of each cell of the joint histogram, times the slope of the window.
    Ratios(Vec<f32>),
    /// A linear function of the two values.
    Line { fixed: f64, moving: f64, constant: f64 },
}

/// Cubic B-spline at the four bins round a value, `f` into the second.
#[inline(always)]
fn window(f: f32) -> [f32; 4] {
    let (g, ff) = (1.0 - f, f * f);
    let third = ff * f;
    [g * g * g / 6.0, (4.0 - 6.0 * ff + 3.0 * third) / 6.0, (1.0 + 3.0 * (f + ff - third)) / 6.0, third / 6.0]
}

/// Derivatives of [`window`] over the value.
#[inline(always)]
fn window_slopes(f: f32) -> [f32; 4] {
    let (g, ff) = (1.0 - f, f * f);
    [-0.5 * g * g, 1.5 * ff - 2.0 * f, 0.5 + f - 1.5 * ff, 0.5 * ff]
}

/// Fixed index (from the middle) to moving index.
struct IndexMap {
    matrix: [[f32; 3]; 3],
    offset: [f32; 3],
    fixed_steps: Matrix,
    into_moving: Matrix,
}

impl IndexMap {
    fn new(
        fixed: crate::geometry::Affine,
        middle: [f64; 3],
        moving: crate::geometry::Affine,
        transform: &Transform,
    ) -> Self {
        let rows = fixed.rows();
        let fixed_steps: Matrix = rows.map(|r| [r[0], r[1], r[2]]);
        let zero = moving.to_voxel([0.0; 3]);
        let columns = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]].map(|e| sub(moving.to_voxel(e), zero));
        let into_moving = transposed(columns);
        let matrix = multiply(multiply(into_moving, transform.matrix()), fixed_steps);
        let offset = moving.to_voxel(transform.apply(fixed.to_lps(middle)));
        Self { matrix: matrix.map(|r| r.map(|v| v as f32)), offset: offset.map(|v| v as f32), fixed_steps, into_moving }
    }

    #[inline(always)]
    fn apply(&self, x: f32, y: f32, z: f32) -> [f32; 3] {
        let m = &self.matrix;
        [
            m[0][0] * x + m[0][1] * y + m[0][2] * z + self.offset[0],
            m[1][0] * x + m[1][1] * y + m[1][2] * z + self.offset[1],
            m[2][0] * x + m[2][1] * y + m[2][2] * z + self.offset[2],
        ]
    }
}
