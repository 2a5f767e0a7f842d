//! Smoothing that keeps real values real: Gaussian, and curvature flow, which keeps edges.

#![allow(clippy::needless_range_loop, reason = "lanes of several arrays move together; the index is what they share")]

use ndarray::{Array3, ArrayView3};

pub use super::lines::Edge;
use super::lines::LineFilter;
use crate::geometry::Spacing;
use crate::pool::{Fault, Pool, widened};

/// Wider Gaussians than this many voxels are a mistake of unit; the cap also bounds the kernel's memory.
pub const SIGMA_VOXELS_MAX: f64 = 10_000.0;

/// Longer steps of curvature flow overshoot: half of what three dimensions allow.
pub const TIME_STEP_MAX: f64 = 0.25;

/// Kernels end at this many standard deviations, as SciPy's do by default.
const TRUNCATE: f64 = 4.0;

/// A filter that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SmoothError {
    /// A width that is negative, NaN or absurd.
    #[error("a Gaussian of sigma {0} voxels cannot be computed: sigma must lie between 0 and {SIGMA_VOXELS_MAX}")]
    Sigma(f64),
    /// A step too long for curvature flow to stay stable, or not a number.
    #[error("a time step of {0} cannot be used: it must be above 0 and at most {TIME_STEP_MAX}")]
    TimeStep(f64),
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
///
/// # Errors
/// [`SmoothError::Sigma`].
///
/// # Panics
/// When the array is not in standard layout.
pub fn gaussian_in_place(
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

/// Smooths along level sets and not across them: `iterations` steps of curvature flow (Sethian 1996, as in ITK's
/// `CurvatureFlowImageFilter`). Beyond the border the border voxel goes on for ever.
///
/// `spacing` enters as in ITK: derivatives are per millimetre. Fine voxels want shorter steps.
///
/// # Errors
/// [`SmoothError::TimeStep`].
pub fn curvature_flow(
    volume: Array3<f32>,
    spacing: Spacing,
    iterations: usize,
    time_step: f64,
    pool: &Pool,
) -> Result<Array3<f32>, SmoothError> {
    if !(time_step > 0.0 && time_step <= TIME_STEP_MAX) {
        return Err(SmoothError::TimeStep(time_step));
    }
    let (slices, rows, columns) = volume.dim();
    let scales = spacing.zyx_mm().map(|s| (1.0 / s) as f32);
    let mut from = volume;
    if !from.is_standard_layout() {
        from = from.as_standard_layout().into_owned();
    }
    if from.is_empty() {
        return Ok(from);
    }
    let mut to = from.clone();
    for _ in 0..iterations {
        let voxels = from.as_slice().expect("made here");
        pool.for_each_chunk(to.as_slice_mut().expect("made here"), rows * columns, |k, slice| {
            let near = |at: usize, n: usize| [at.saturating_sub(1), at, (at + 1).min(n - 1)];
            let (ks, padded) = (near(k, slices), columns + 2);
            let mut nine = vec![0.0; 9 * padded];
            for (j, out) in slice.chunks_exact_mut(columns).enumerate() {
                for (n, row) in nine.chunks_exact_mut(padded).enumerate() {
                    let start = (ks[n / 3] * rows + near(j, rows)[n % 3]) * columns;
                    row[1..=columns].copy_from_slice(&voxels[start..start + columns]);
                    (row[0], row[columns + 1]) = (row[1], row[columns]);
                }
                flow_row(&nine, scales, time_step as f32, out);
            }
        })?;
        std::mem::swap(&mut from, &mut to);
    }
    Ok(from)
}

widened! {
    /// One step for one row; `nine` are the padded rows around it, slice by slice.
    fn flow_row(nine: &[f32], scales: [f32; 3], time_step: f32, out: &mut [f32]) {
        let width = out.len();
        let row = |dz: usize, dy: usize| &nine[(dz * 3 + dy) * (width + 2)..][..width + 2];
        let (centre, north, south, below, above) = (row(1, 1), row(1, 0), row(1, 2), row(0, 1), row(2, 1));
        let (bn, bs, an, a_s) = (row(0, 0), row(0, 2), row(2, 0), row(2, 2));
        let [sz, sy, sx] = scales;
        for i in 0..width {
            let c = centre[i + 1];
            let (w, e, n, s, b, a) = (centre[i], centre[i + 2], north[i + 1], south[i + 1], below[i + 1], above[i + 1]);
            let (x, y, z) = (0.5 * (e - w) * sx, 0.5 * (s - n) * sy, 0.5 * (a - b) * sz);
            let xx = (e - 2.0 * c + w) * sx * sx;
            let yy = (s - 2.0 * c + n) * sy * sy;
            let zz = (a - 2.0 * c + b) * sz * sz;
            let xy = 0.25 * (north[i] - south[i] - north[i + 2] + south[i + 2]) * sx * sy;
            let xz = 0.25 * (below[i] - above[i] - below[i + 2] + above[i + 2]) * sx * sz;
            let yz = 0.25 * (bn[i + 1] - an[i + 1] - bs[i + 1] + a_s[i + 1]) * sy * sz;
            let slope = x * x + y * y + z * z;
            let bend = (yy + zz) * x * x + (xx + zz) * y * y + (xx + yy) * z * z - 2.0 * (x * y * xy + x * z * xz + y * z * yz);
            let change = if slope < 1e-9 { 0.0 } else { bend / slope };
            out[i] = c + time_step * change;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GAUSSIANS: [(Edge, [f32; 3]); 2] =
        [(Edge::Reflect, [64.313_47, 74.650_58, 74.101_814]), (Edge::Nearest, [35.110_04, 74.649_376, 74.308_15])];
    const FLOW: [f32; 4] = [23.088_806, 73.608_28, 80.504_8, 75.129_64];

    fn pattern() -> Array3<f32> {
        Array3::from_shape_fn((6, 9, 11), |(k, j, i)| ((k * 7919 + j * 10473 + i * 12997) % 251) as f32 - 40.0)
    }

    #[test]
    fn gaussians_are_scipys() {
        let pool = Pool::new(2);
        let image = pattern();
        // scipy.ndimage.gaussian_filter(image, (0.8, 0, 2.5), mode=…)[[0, 3, 5], [0, 4, 8], [0, 5, 10]]
        for (edge, golden) in GAUSSIANS {
            let found = gaussian(image.view(), [0.8, 0.0, 2.5], edge, &pool).unwrap();
            for (at, golden) in [[0, 0, 0], [3, 4, 5], [5, 8, 10]].into_iter().zip(golden) {
                assert!((found[at] - golden).abs() < 2e-5 * golden.abs(), "{edge:?} {at:?}: {} {golden}", found[at]);
            }
        }
        assert!(matches!(gaussian(image.view(), [-1.0, 0.0, 0.0], Edge::Reflect, &pool), Err(SmoothError::Sigma(_))));
        assert!(matches!(gaussian(image.view(), [f64::NAN; 3], Edge::Reflect, &pool), Err(SmoothError::Sigma(_))));
    }

    #[test]
    fn curvature_flow_is_itks() {
        // SimpleITK.CurvatureFlow(image, timeStep=0.05, numberOfIterations=5), spacing 1, 1 and 1.5 mm
        let spacing = Spacing::new([1.5, 1.0, 1.0]).unwrap();
        let found = curvature_flow(pattern(), spacing, 5, 0.05, &Pool::new(2)).unwrap();
        for (at, golden) in [[0, 0, 0], [3, 4, 5], [5, 8, 10], [2, 0, 7]].into_iter().zip(FLOW) {
            assert!((found[at] - golden).abs() < 1e-3, "{at:?}: {} {golden}", found[at]);
        }
        assert!(matches!(
            curvature_flow(pattern(), spacing, 5, 0.5, &Pool::new(1)),
            Err(SmoothError::TimeStep(_))
        ));
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let of = |threads| {
            let pool = Pool::new(threads);
            let smooth = gaussian(pattern().view(), [1.0, 2.0, 3.0], Edge::Reflect, &pool).unwrap();
            curvature_flow(smooth.clone(), Spacing::new([1.0; 3]).unwrap(), 2, 0.1, &pool).unwrap()
        };
        assert_eq!(of(1), of(4));
    }
}
