//! Smoothing: Gaussian.

use ndarray::{Array3, ArrayView3};

pub use super::lines::Edge;
use super::lines::LineFilter;
use crate::pool::{Fault, Pool};

/// Wider Gaussians than this many voxels are a mistake of unit; the cap also bounds the kernel's memory.
pub const SIGMA_VOXELS_MAX: f64 = 10_000.0;

/// Kernels end at this many standard deviations, as SciPy's do by default.
const TRUNCATE: f64 = 4.0;

/// A filter that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SmoothError {
    /// A width that is negative, NaN or absurd.
    #[error("a Gaussian of sigma {0} voxels cannot be computed: sigma must lie between 0 and {SIGMA_VOXELS_MAX}")]
    Sigma(f64),
    /// A task panicked.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Smooths with a Gaussian of `sigma_voxel` (`[z, y, x]`, in voxels of each axis; 0 leaves an axis alone).
///
/// The values are those of `scipy.ndimage.gaussian_filter(…, truncate=4)` on 32-bit floats, within their rounding. A NaN
/// or infinity spreads over the kernel's support, as there.
///
/// # Errors
/// [`SmoothError::Sigma`].
pub fn gaussian(
    volume: ArrayView3<f32>,
    sigma_voxel: [f64; 3],
    edge: Edge,
    pool: &Pool,
) -> Result<Array3<f32>, SmoothError> {
    let mut out = volume.as_standard_layout().into_owned();
    gaussian_in_place(&mut out, sigma_voxel, edge, pool)?;
    Ok(out)
}

/// As [`gaussian`], over a contiguous volume's own voxels.
pub(super) fn gaussian_in_place(
    volume: &mut Array3<f32>,
    sigma_voxel: [f64; 3],
    edge: Edge,
    pool: &Pool,
) -> Result<(), SmoothError> {
    for (axis, sigma) in sigma_voxel.into_iter().enumerate() {
        let kernel = gaussian_kernel(sigma)?;
        if volume.shape()[axis] > 1 {
            LineFilter::new(&kernel, volume.shape()[axis], edge).run(volume, axis, pool)?;
        }
    }
    Ok(())
}

/// Weights of the centre, the first neighbours, … of a sampled Gaussian that ends at four sigma; their sum is 1.
pub(super) fn gaussian_kernel(sigma: f64) -> Result<Vec<f64>, SmoothError> {
    if !(0.0..=SIGMA_VOXELS_MAX).contains(&sigma) {
        return Err(SmoothError::Sigma(sigma));
    }
    if sigma < 1e-15 {
        return Ok(vec![1.0]);
    }
    let radius = (TRUNCATE * sigma + 0.5) as usize;
    let weight = |j: usize| (-0.5 * (j as f64 / sigma).powi(2)).exp();
    let sum = 1.0 + 2.0 * (1..=radius).rev().map(weight).sum::<f64>();
    Ok((0..=radius).map(|j| weight(j) / sum).collect())
}

/// Weights of the second derivative of that Gaussian.
pub(super) fn gaussian_second_derivative(sigma: f64) -> Result<Vec<f64>, SmoothError> {
    let s2 = sigma * sigma;
    let weights = gaussian_kernel(sigma)?;
    Ok(weights.into_iter().enumerate().map(|(j, w)| w * ((j * j) as f64 / s2 - 1.0) / s2).collect())
}
