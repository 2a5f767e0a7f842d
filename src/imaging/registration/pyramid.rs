//! One level of the pyramid: an image, smoothed, and the places where it is looked at.

use ndarray::ArrayView3;

use crate::geometry::{Affine, Spacing};
use crate::pool::{Fault, Pool};

/// A contiguous copy of an image, in `f32`.
#[derive(Debug, Clone)]
pub(super) struct Plain {
    pub(super) voxels: Vec<f32>,
    /// `[slices, rows, columns]`
    pub(super) shape: [usize; 3],
    pub(super) affine: Affine,
}

impl Plain {
    pub(super) fn new(voxels: ArrayView3<'_, f32>, affine: Affine) -> Self {
        let (z, y, x) = voxels.dim();
        Self { voxels: voxels.iter().copied().collect(), shape: [z, y, x], affine }
    }

    /// Linear interpolation at a fractional index `(i, j, k)` inside the lattice.
    pub(super) fn at(&self, ijk: [f64; 3]) -> f32 {
        let [nz, ny, nx] = self.shape;
        let cell: [(usize, f32); 3] = std::array::from_fn(|axis| {
            let n = [nx, ny, nz][axis];
            let base = (ijk[axis].max(0.0) as usize).min(n.saturating_sub(2));
            (base, (ijk[axis] - base as f64) as f32)
        });
        let [(i, fx), (j, fy), (k, fz)] = cell;
        let row = |j: usize, k: usize| {
            let at = (k * ny + j) * nx + i;
            self.voxels[at] + fx * (self.voxels[at + 1] - self.voxels[at])
        };
        let plane = |k: usize| {
            let near = row(j, k);
            near + fy * (row(j + 1, k) - near)
        };
        let near = plane(k);
        near + fz * (plane(k + 1) - near)
    }

    /// Smoothed by a Gaussian of `sigma_mm` along each axis, the border value continued outside.
    pub(super) fn smoothed(&self, sigma_mm: f64, pool: &Pool) -> Result<Self, Fault> {
        let mut out = self.clone();
        if sigma_mm <= 0.0 {
            return Ok(out);
        }
        let [nz, ny, nx] = self.shape;
        let [sz, sy, sx] = self.affine.spacing().zyx_mm();
        let kernels = [sz, sy, sx].map(|spacing| gaussian(sigma_mm / spacing));
        pool.for_each_chunk(&mut out.voxels, ny * nx, |_, slice| {
            let mut line = Vec::new();
            slice.chunks_exact_mut(nx).for_each(|row| convolve(row, 0, 1, nx, &kernels[2], &mut line));
            (0..nx).for_each(|i| convolve(slice, i, nx, ny, &kernels[1], &mut line));
        })?;
        if kernels[0].len() > 1 {
            // Columns of voxels through the slices: one row of them at a time.
            let source = &out.voxels;
            let rows = pool.map(ny, |j| {
                let mut row = vec![0.0; nz * nx];
                let mut line = Vec::new();
                for k in 0..nz {
                    row[k * nx..(k + 1) * nx].copy_from_slice(&source[(k * ny + j) * nx..][..nx]);
                }
                (0..nx).for_each(|i| convolve(&mut row, i, nx, nz, &kernels[0], &mut line));
                row
            })?;
            for (j, row) in rows.iter().enumerate() {
                for k in 0..nz {
                    out.voxels[(k * ny + j) * nx..][..nx].copy_from_slice(&row[k * nx..(k + 1) * nx]);
                }
            }
        }
        Ok(out)
    }
}

/// Half of a normalised Gaussian, its middle first; out to four sigma.
fn gaussian(sigma: f64) -> Vec<f32> {
    let radius = (4.0 * sigma).ceil().min(256.0) as usize;
    let half: Vec<f64> = (0..=radius).map(|n| (-0.5 * (n as f64 / sigma).powi(2)).exp()).collect();
    let sum = half[0] + 2.0 * half[1..].iter().sum::<f64>();
    half.iter().map(|w| (w / sum) as f32).collect()
}

/// Convolves `n` values, `stride` apart from `start` on.
fn convolve(data: &mut [f32], start: usize, stride: usize, n: usize, half: &[f32], line: &mut Vec<f32>) {
    let radius = half.len() - 1;
    line.clear();
    line.extend((0..n + 2 * radius).map(|m| data[start + stride * m.saturating_sub(radius).min(n - 1)]));
    for m in 0..n {
        let middle = m + radius;
        let sides: f32 = (1..=radius).map(|r| half[r] * (line[middle - r] + line[middle + r])).sum();
        data[start + stride * m] = half[0] * line[middle] + sides;
    }
}

/// By how much each axis `[z, y, x]` is thinned: voxels that are already coarse are kept, so that thick slices are not
/// thinned with the rest.
pub(super) fn shrink_factors(spacing: Spacing, factor: usize) -> [usize; 3] {
    let zyx = spacing.zyx_mm();
    let finest = zyx.iter().copied().fold(f64::INFINITY, f64::min);
    zyx.map(|s| ((factor as f64 * finest / s).round() as usize).clamp(1, factor.max(1)))
}
