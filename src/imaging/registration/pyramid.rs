//! One level of the pyramid: an image, smoothed, and the places where it is looked at.

use ndarray::ArrayView3;

use super::RegistrationError;
use crate::geometry::{Affine, Spacing};
use crate::imaging::smooth::{self, Edge, SmoothError};
use crate::pool::Pool;

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
    pub(super) fn smoothed(&self, sigma_mm: f64, pool: &Pool) -> Result<Self, RegistrationError> {
        let mut out = self.clone();
        if sigma_mm > 0.0 {
            let [z, y, x] = self.shape;
            let view = ArrayView3::from_shape((z, y, x), &self.voxels).expect("the voxels fill the shape");
            let sigma_voxel = self.affine.spacing().zyx_mm().map(|s| sigma_mm / s);
            out.voxels = smooth::gaussian(view, sigma_voxel, Edge::Nearest, pool)
                .map_err(|error| match error {
                    SmoothError::Fault(fault) => fault.into(),
                    _ => RegistrationError::Setting("smoothing is too wide for the voxels"),
                })?
                .into_iter()
                .collect();
        }
        Ok(out)
    }
}

/// By how much each axis `[z, y, x]` is thinned: voxels that are already coarse are kept, so that thick slices are not
/// thinned with the rest.
pub(super) fn shrink_factors(spacing: Spacing, factor: usize) -> [usize; 3] {
    let zyx = spacing.zyx_mm();
    let finest = zyx.iter().copied().fold(f64::INFINITY, f64::min);
    zyx.map(|s| ((factor as f64 * finest / s).round() as usize).clamp(1, factor.max(1)))
}
