//! A volume on another grid: another spacing, another volume's grid, another orientation.
//!
//! Voxels lie at their centres; a place more than half a voxel beyond the outermost centre is outside, and takes the
//! value asked for. Between the outermost centre and that, the border voxel goes on (as in ITK).

mod orient;
mod spline;

use std::ops::Range;

use ndarray::{Array3, ArrayView3};

pub use orient::{Reorientation, orientation};

use crate::geometry::{Affine, BadGeometry, Grid, Spacing, dot};
use crate::pool::{Fault, Pool, widened};
use crate::volume::Voxel;

/// How a value between voxels is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interpolation {
    /// The nearest voxel's: for labels.
    Nearest,
    /// Linear between the eight around.
    Linear,
    /// The cubic B-spline through all voxels (Unser 1993): smooth, and may overshoot.
    Cubic,
}

/// More voxels than this are a mistake in a spacing.
pub const VOXELS_MAX: usize = match 1usize.checked_shl(33) {
    Some(voxels) => voxels,
    // 32 bits address no more.
    None => 1 << 29,
};

/// A grid that cannot be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum ResampleError {
    /// The grid would have more voxels than any image.
    #[error("a grid of {0:?} voxels (slices, rows, columns) is larger than {VOXELS_MAX} voxels")]
    TooLarge([usize; 3]),
    /// Letters that are no orientation.
    #[error("{0:?} is no orientation: three letters, one of L/R, one of P/A, one of S/I, as in LPS or RAS")]
    Orientation(String),
    /// A spacing or an affine that cannot be.
    #[error(transparent)]
    Geometry(#[from] BadGeometry),
    /// A task panicked.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// The grid of another spacing: the first voxel stays where it is, and each axis gets as many voxels as are nearest to
/// its old extent. An axis of one voxel keeps it.
///
/// # Errors
/// [`ResampleError::TooLarge`], [`ResampleError::Geometry`].
pub fn grid_of_spacing(grid: &Grid, spacing: Spacing) -> Result<Grid, ResampleError> {
    let (old, new) = (grid.spacing().zyx_mm(), spacing.zyx_mm());
    let mut shape = grid.shape;
    let mut steps = [0, 1, 2].map(|axis| grid.affine.step(axis));
    for axis in 0..3 {
        if shape[axis] > 1 {
            // Ties to even, as Python's round has it, so that scripts and we agree on half voxels.
            shape[axis] = ((shape[axis] as f64 * old[axis] / new[axis]).round_ties_even() as usize).max(1);
            steps[2 - axis] = steps[2 - axis].map(|v| v * new[axis] / old[axis]);
        }
    }
    check_size(shape)?;
    Ok(Grid { shape, affine: Affine::new(steps[0], steps[1], steps[2], grid.affine.origin())? })
}

fn check_size(shape: [usize; 3]) -> Result<(), ResampleError> {
    let voxels = shape.iter().try_fold(1usize, |n, s| n.checked_mul(*s));
    voxels.filter(|n| *n <= VOXELS_MAX).map(|_| ()).ok_or(ResampleError::TooLarge(shape))
}

/// From voxels of the new grid to voxels of the old: `(i, j, k)` to `(i, j, k)`.
struct Mapping {
    steps: [[f64; 3]; 3],
    origin: [f64; 3],
    /// Old columns, rows, slices.
    size: [usize; 3],
}

/// Places this near to a border are on it: what remains of two affines' rounding.
const HAIR: f64 = 1e-6;

impl Mapping {
    fn new(from: &Affine, shape: (usize, usize, usize), to: &Affine) -> Self {
        let origin = from.to_voxel(to.origin());
        let steps = [0, 1, 2].map(|axis| {
            let step = to.step(axis);
            // The linear part of the inverse, applied to a direction.
            let at = |lps: [f64; 3]| from.to_voxel(std::array::from_fn(|r| lps[r] + from.origin()[r]));
            let along = at(step);
            // An axis that does not move along another should not move by a rounding error either.
            let largest = along.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            along.map(|v| if v.abs() < 1e-12 * largest { 0.0 } else { v })
        });
        Self { steps, origin, size: [shape.2, shape.1, shape.0] }
    }

    /// Where voxel `(0, j, k)` of the new grid lies.
    fn row_start(&self, j: usize, k: usize) -> [f64; 3] {
        std::array::from_fn(|r| self.origin[r] + self.steps[1][r] * j as f64 + self.steps[2][r] * k as f64)
    }

    fn along(&self, start: [f64; 3], i: usize) -> [f64; 3] {
        std::array::from_fn(|r| start[r] + self.steps[0][r] * i as f64)
    }

    fn inside(&self, axis: usize, at: f64) -> bool {
        at >= -0.5 - HAIR && at < self.size[axis] as f64 - 0.5 - HAIR
    }

    /// New columns whose place lies inside, of a row that starts at `start`.
    fn columns_inside(&self, start: [f64; 3], columns: usize) -> std::ops::Range<usize> {
        let inside = |i: usize| (0..3).all(|axis| self.inside(axis, self.along(start, i)[axis]));
        // A row is a straight line and the volume is convex. Where a line enters is solved; a step either way is tried,
        // so that the answer is that of `inside` itself.
        let (mut low, mut high) = (0.0f64, columns as f64);
        for axis in 0..3 {
            let step = self.steps[0][axis];
            let (first, last) = (-0.5 - HAIR - start[axis], self.size[axis] as f64 - 0.5 - HAIR - start[axis]);
            if step == 0.0 {
                if first > 0.0 || last <= 0.0 {
                    return 0..0;
                }
            } else {
                let (a, b) = if step > 0.0 { (first / step, last / step) } else { (last / step, first / step) };
                low = low.max(a);
                high = high.min(b + 1.0);
            }
        }
        let mut low = (low.max(0.0) as usize).saturating_sub(1).min(columns);
        let mut high = (high.max(0.0) as usize + 2).min(columns);
        while low < high && !inside(low) {
            low += 1;
        }
        while high > low && !inside(high - 1) {
            high -= 1;
        }
        low..high
    }

    /// Whether the grids share their axes, so that a row of the new one stays in a row of the old one.
    fn aligned(&self) -> bool {
        let still = |axis: usize, r: usize| self.steps[axis][r] == 0.0;
        still(0, 1) && still(0, 2)
    }
}

/// Labels, or any stored values, on another grid: each voxel takes the nearest old one's value, unchanged.
///
/// # Errors
/// [`ResampleError::TooLarge`].
pub fn resample_nearest<T: Voxel>(
    values: ArrayView3<T>,
    from: &Affine,
    to: &Grid,
    outside: T,
    pool: &Pool,
) -> Result<Array3<T>, ResampleError> {
    nearest_slab(values, from, to, 0..to.shape[0], outside, pool)
}

/// As [`resample_nearest`], some slices of the new grid only.
///
/// # Errors
/// [`ResampleError::TooLarge`].
pub fn nearest_slab<T: Voxel>(
    values: ArrayView3<T>,
    from: &Affine,
    to: &Grid,
    slices: Range<usize>,
    outside: T,
    pool: &Pool,
) -> Result<Array3<T>, ResampleError> {
    check_size(to.shape)?;
    let mapping = Mapping::new(from, values.dim(), &to.affine);
    let values = values.as_standard_layout();
    let voxels = values.as_slice().expect("standard layout");
    let [columns, rows, _] = mapping.size;
    let [_, new_rows, new_columns] = to.shape;
    let mut out = Array3::from_elem([slices.len(), new_rows, new_columns], outside);
    pool.for_each_chunk(out.as_slice_mut().expect("made here"), new_rows * new_columns, |k, slice| {
        for (j, out) in slice.chunks_exact_mut(new_columns.max(1)).enumerate() {
            let start = mapping.row_start(j, slices.start + k);
            for i in mapping.columns_inside(start, new_columns) {
                let at = mapping.along(start, i);
                let [x, y, z] = std::array::from_fn(|r| nearest(at[r], mapping.size[r]));
                out[i] = voxels[(z * rows + y) * columns + x];
            }
        }
    })?;
    Ok(out)
}

/// Half-way places go up (as in ITK), whatever rounding made of them.
fn nearest(at: f64, size: usize) -> usize {
    ((at + 0.5 + HAIR).floor().max(0.0) as usize).min(size - 1)
}

/// Real values on another grid; voxels of it that lie outside the volume become `outside`.
///
/// Linear and nearest values are SimpleITK's, and cubic ones its B-spline's, within the rounding of 32-bit floats. NaN
/// spreads to the values it has a part in; to all of its row, column and stack for cubic ones.
///
/// # Errors
/// [`ResampleError::TooLarge`].
pub fn resample(
    values: ArrayView3<f32>,
    from: &Affine,
    to: &Grid,
    interpolation: Interpolation,
    outside: f32,
    pool: &Pool,
) -> Result<Array3<f32>, ResampleError> {
    if interpolation == Interpolation::Nearest || values.is_empty() {
        return resample_nearest(values, from, to, outside, pool);
    }
    let (slices, rows, columns) = values.dim();
    let grid = Grid { shape: [slices, rows, columns], affine: *from };
    if interpolation == Interpolation::Cubic {
        let coefficients = spline::coefficients(values, pool)?;
        return Slabs { cubic: true, ..Slabs::new(&grid, to, outside)? }.slab(coefficients.view(), 0, 0..to.shape[0], pool);
    }
    Slabs::new(&grid, to, outside)?.slab(values, 0, 0..to.shape[0], pool)
}

/// A linear resampling some slices at a time: neither grid is ever in memory as a whole.
pub struct Slabs {
    mapping: Mapping,
    to: Grid,
    outside: f32,
    cubic: bool,
}

impl Slabs {
    /// From one grid to another.
    ///
    /// # Errors
    /// [`ResampleError::TooLarge`].
    pub fn new(from: &Grid, to: &Grid, outside: f32) -> Result<Self, ResampleError> {
        check_size(to.shape)?;
        let [z, y, x] = from.shape;
        Ok(Self { mapping: Mapping::new(&from.affine, (z, y, x), &to.affine), to: *to, outside, cubic: false })
    }

    /// Old slices that have a part in these new ones; none where they lie outside.
    pub fn needs(&self, new: &Range<usize>) -> Range<usize> {
        let [_, rows, columns] = self.to.shape;
        if new.is_empty() || rows == 0 || columns == 0 {
            return 0..0;
        }
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for k in [new.start, new.end - 1] {
            for j in [0, rows - 1] {
                for i in [0, columns - 1] {
                    let at = self.mapping.along(self.mapping.row_start(j, k), i)[2];
                    (low, high) = (low.min(at), high.max(at));
                }
            }
        }
        let size = self.mapping.size[2];
        let clamped = |at: f64| at.clamp(0.0, size as f64) as usize;
        // Border voxels go on for half a voxel, so that the outermost slice may be needed from beyond it.
        let range = clamped((low - HAIR).floor()).min(size.saturating_sub(1))..clamped((high + HAIR).floor() + 2.0);
        if high < -0.5 - HAIR || low > size as f64 - 0.5 { 0..0 } else { range.start..range.end.max(range.start + 1) }
    }

    /// The new slices; `old` holds the old ones from `first` on, at least those they need.
    ///
    /// # Errors
    /// A task's panic.
    pub fn slab(&self, old: ArrayView3<f32>, first: usize, new: Range<usize>, pool: &Pool) -> Result<Array3<f32>, ResampleError> {
        let (mapping, cubic) = (&self.mapping, self.cubic);
        let [_, new_rows, new_columns] = self.to.shape;
        let mut out = Array3::from_elem([new.len(), new_rows, new_columns], self.outside);
        if old.is_empty() {
            return Ok(out);
        }
        let values = old.as_standard_layout();
        let source = Source { voxels: values.as_slice().expect("standard layout"), size: mapping.size, first };
        let aligned = mapping.aligned();
        pool.for_each_chunk(out.as_slice_mut().expect("made here"), new_rows * new_columns, |n, slice| {
            let k = new.start + n;
            let mut line = vec![0.0; mapping.size[0]];
            let columns_start = mapping.row_start(0, k);
            // In aligned grids every row meets the same old columns.
            let columns: Vec<Taps> = match aligned {
                true => (0..new_columns)
                    .map(|i| Taps::new(mapping.along(columns_start, i)[0], mapping.size[0], cubic))
                    .collect(),
                false => Vec::new(),
            };
            for (j, out) in slice.chunks_exact_mut(new_columns.max(1)).enumerate() {
                let start = mapping.row_start(j, k);
                let range = mapping.columns_inside(start, new_columns);
                if range.is_empty() {
                    continue;
                }
                if aligned {
                    let same = start[0] == columns_start[0];
                    let (y, z) = (Taps::new(start[1], source.size[1], cubic), Taps::new(start[2], source.size[2], cubic));
                    source.blend_rows(&y, &z, cubic, &mut line);
                    for i in range {
                        let x =
                            if same { columns[i] } else { Taps::new(mapping.along(start, i)[0], source.size[0], cubic) };
                        out[i] = x.of(&line, cubic);
                    }
                } else {
                    for i in range {
                        let at = mapping.along(start, i);
                        let [x, y, z] = std::array::from_fn(|r| Taps::new(at[r], source.size[r], cubic));
                        out[i] = source.at(&x, &y, &z, cubic);
                    }
                }
            }
        })?;
        Ok(out)
    }
}

/// The voxels along one axis that have a part in a place, and their parts.
#[derive(Debug, Clone, Copy)]
struct Taps {
    index: [u32; 4],
    weight: [f32; 4],
}

impl Taps {
    /// Two taps for linear interpolation, four for a cubic spline.
    fn new(at: f64, size: usize, cubic: bool) -> Self {
        let last = size - 1;
        // A voxel's own place gives its own value, whatever two affines' rounding made of it.
        let at = if (at - at.round()).abs() < 1e-9 { at.round() } else { at };
        if cubic {
            let floor = at.floor();
            let t = at - floor;
            let mirrored = |d: isize| spline::mirror(floor as isize + d, size) as u32;
            let weight = spline::weights(t).map(|w| w as f32);
            return Self { index: [mirrored(-1), mirrored(0), mirrored(1), mirrored(2)], weight };
        }
        let at = at.clamp(0.0, last as f64);
        let floor = at.floor();
        let t = (at - floor) as f32;
        let low = floor as usize;
        Self { index: [low as u32, (low + 1).min(last) as u32, 0, 0], weight: [1.0 - t, t, 0.0, 0.0] }
    }

    fn count(cubic: bool) -> usize {
        if cubic { 4 } else { 2 }
    }

    #[inline(always)]
    fn of(&self, line: &[f32], cubic: bool) -> f32 {
        let [a, b, c, d] = self.index;
        let [p, q, r, s] = self.weight;
        let two = if q == 0.0 { line[a as usize] * p } else { line[a as usize] * p + line[b as usize] * q };
        if cubic { two + (line[c as usize] * r + line[d as usize] * s) } else { two }
    }
}

struct Source<'a> {
    voxels: &'a [f32],
    /// Columns, rows, slices of the whole volume.
    size: [usize; 3],
    /// The first slice that is here.
    first: usize,
}

impl Source<'_> {
    fn row(&self, j: u32, k: u32) -> &[f32] {
        let [columns, rows, _] = self.size;
        &self.voxels[((k as usize - self.first) * rows + j as usize) * columns..][..columns]
    }

    fn at(&self, x: &Taps, y: &Taps, z: &Taps, cubic: bool) -> f32 {
        let n = Taps::count(cubic);
        let mut sum = 0.0;
        for c in 0..n {
            for b in 0..n {
                let weight = z.weight[c] * y.weight[b];
                // A voxel without a part is not asked: it may be NaN.
                if weight != 0.0 {
                    sum += weight * x.of(self.row(y.index[b], z.index[c]), cubic);
                }
            }
        }
        sum
    }

    /// The old rows around a new one, blended into one line.
    fn blend_rows(&self, y: &Taps, z: &Taps, cubic: bool, line: &mut [f32]) {
        let n = Taps::count(cubic);
        line.fill(0.0);
        for c in 0..n {
            for b in 0..n {
                let weight = z.weight[c] * y.weight[b];
                if weight != 0.0 {
                    add_scaled(line, self.row(y.index[b], z.index[c]), weight);
                }
            }
        }
    }
}

widened! {
    fn add_scaled(line: &mut [f32], row: &[f32], weight: f32) {
        for (l, r) in line.iter_mut().zip(row) {
            *l += weight * r;
        }
    }
}

/// Whether two grids are the same voxels at the same places, to a thousandth of a voxel.
pub fn same_grid(a: &Grid, b: &Grid) -> bool {
    let corner = |grid: &Grid, n: usize| {
        let at = |axis: usize| if n >> axis & 1 == 1 { grid.shape[2 - axis] as f64 } else { 0.0 };
        grid.affine.to_lps([at(0), at(1), at(2)])
    };
    let finest = a.spacing().zyx_mm().into_iter().fold(f64::INFINITY, f64::min);
    let far = |n: usize| {
        let (p, q) = (corner(a, n), corner(b, n));
        let d = std::array::from_fn(|r| p[r] - q[r]);
        dot(d, d).sqrt()
    };
    a.shape == b.shape && (0..8).all(|n| far(n) <= 1e-3 * finest)
}

#[cfg(test)]
mod tests;
