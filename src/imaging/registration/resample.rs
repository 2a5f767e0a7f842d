//! The moving image on the grid of the fixed one.

use ndarray::{Array3, ArrayView3};

use super::linear::{multiply, transposed};
use super::transform::Transform;
use crate::geometry::{Affine, Grid, sub};
use crate::pool::{Fault, Pool};

/// How values between voxels are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interpolation {
    /// The nearest voxel: for labels.
    Nearest,
    /// Linear between the 8 voxels around.
    Linear,
    /// Cubic convolution over 64 voxels (Keys, IEEE TASSP 29, 1981, a = -1/2): sharper, may overshoot.
    Cubic,
}

/// Reads `moving` at the places of the voxels of `onto`, taken through `transform`; `outside` where there is nothing.
///
/// Places up to half a voxel beyond the outermost voxel centres are inside, with the border continued.
///
/// # Errors
/// The pool's.
pub fn resample(
    moving: ArrayView3<'_, f32>,
    moving_affine: Affine,
    onto: Grid,
    transform: &Transform,
    interpolation: Interpolation,
    outside: f32,
    pool: &Pool,
) -> Result<Array3<f32>, Fault> {
    let [nz, ny, nx] = onto.shape;
    let mut out = Array3::from_elem((nz, ny, nx), outside);
    let zero = moving_affine.to_voxel([0.0; 3]);
    let columns = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]].map(|e| sub(moving_affine.to_voxel(e), zero));
    let steps = onto.affine.rows().map(|r| [r[0], r[1], r[2]]);
    let matrix = multiply(multiply(transposed(columns), transform.matrix()), steps);
    let origin = moving_affine.to_voxel(transform.apply(onto.affine.origin()));
    let (mz, my, mx) = moving.dim();
    let shape = [mx, my, mz];
    let data = out.as_slice_mut().expect("a fresh array is contiguous");
    pool.for_each_chunk(data, (ny * nx).max(1), |k, slice| {
        for (n, value) in slice.iter_mut().enumerate() {
            let ijk = [(n % nx) as f64, (n / nx) as f64, k as f64];
            let at: [f64; 3] = std::array::from_fn(|r| crate::geometry::dot(matrix[r], ijk) + origin[r]);
            if (0..3).all(|c| at[c] >= -0.5 && at[c] <= shape[c] as f64 - 0.5) {
                *value = match interpolation {
                    Interpolation::Nearest => {
                        let [i, j, k] = std::array::from_fn(|c| (at[c].round().max(0.0) as usize).min(shape[c] - 1));
                        moving[[k, j, i]]
                    }
                    Interpolation::Linear => weighted::<2>(moving, at, |f| [1.0 - f, f]),
                    Interpolation::Cubic => weighted::<4>(moving, at, keys),
                };
            }
        }
    })?;
    Ok(out)
}

fn keys(f: f64) -> [f64; 4] {
    let (f2, f3) = (f * f, f * f * f);
    [
        -0.5 * f + f2 - 0.5 * f3,
        1.0 - 2.5 * f2 + 1.5 * f3,
        0.5 * f + 2.0 * f2 - 1.5 * f3,
        -0.5 * f2 + 0.5 * f3,
    ]
}

/// Sum over N voxels along each axis, the middle pair round the place.
fn weighted<const N: usize>(moving: ArrayView3<'_, f32>, at: [f64; 3], weights: impl Fn(f64) -> [f64; N]) -> f32 {
    let (mz, my, mx) = moving.dim();
    let axes: [([usize; N], [f64; N]); 3] = std::array::from_fn(|c| {
        let n = [mx, my, mz][c] as i64;
        let base = at[c].floor();
        let first = base as i64 - (N as i64 / 2 - 1);
        (std::array::from_fn(|m| (first + m as i64).clamp(0, n - 1) as usize), weights(at[c] - base))
    });
    let [(is, wi), (js, wj), (ks, wk)] = axes;
    let mut sum = 0.0;
    for (k, wk) in ks.into_iter().zip(wk) {
        for (j, wj) in js.into_iter().zip(wj) {
            let row: f64 = is.into_iter().zip(wi).map(|(i, wi)| wi * f64::from(moving[[k, j, i]])).sum();
            sum += wk * wj * row;
        }
    }
    sum as f32
}
