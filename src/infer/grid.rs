//! The working grid of a network: a volume seen at the network's spacing, axes along the patient's, slab by slab.
//!
//! Positions are measured along a [`Frame`]: three orthogonal directions, those of the image plane nearest to the
//! patient's left and back, and the normal nearest to the head. A stack that is sheared against its normal (gantry
//! tilt) lands on the same upright grid as a straight one: each slice is read at its own offset.

use ndarray::{Array2, ArrayViewMut2, ArrayViewMut3};

use crate::geometry::{Affine, cross, dot, norm};
use crate::pool::{Fault, Pool};
use crate::volume::Volume;

/// The slices are not axial: nearer to a coronal or sagittal plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the slices are not axial")]
pub struct NotAxial;

/// Where an axial stack stands: patient axes, and the step and place of its voxels along them. Millimetres.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Frame {
    /// Unit vectors in LPS: towards left, back, head.
    axes: [[f64; 3]; 3],
    /// The columns run to the back and the rows to the left: `i` and `j` change places.
    transposed: bool,
    /// Along left: place of voxel 0, step per voxel, step per slice.
    x: [f64; 3],
    /// Along back: likewise.
    y: [f64; 3],
    /// Along the normal: place of slice 0, step per slice.
    z: [f64; 2],
}

impl Frame {
    /// The frame of a volume.
    ///
    /// # Errors
    /// [`NotAxial`] when the normal of the slices is nearer to another axis of the patient than head-foot.
    pub fn new(affine: &Affine) -> Result<Self, NotAxial> {
        let [i, j, k] = [affine.step(0), affine.step(1), affine.step(2)];
        let normal = cross(i, j);
        if normal[2].abs() < normal[0].abs().max(normal[1].abs()) {
            return Err(NotAxial);
        }
        let transposed = i[0].abs() < i[1].abs();
        let (along_x, along_y) = if transposed { (j, i) } else { (i, j) };
        let unit = |v: [f64; 3], sign: f64| v.map(|c| c * sign.signum() / norm(v));
        let ex = unit(along_x, along_x[0]);
        // Rows and columns are at right angles to the precision of the file; y is made exactly so.
        let rough = unit(along_y, along_y[1]);
        let lean = dot(rough, ex);
        let straight = [rough[0] - lean * ex[0], rough[1] - lean * ex[1], rough[2] - lean * ex[2]];
        let ey = unit(straight, 1.0);
        let ez = cross(ex, ey);
        let origin = affine.origin();
        Ok(Self {
            axes: [ex, ey, ez],
            transposed,
            x: [dot(origin, ex), dot(along_x, ex), dot(k, ex)],
            y: [dot(origin, ey), dot(along_y, ey), dot(k, ey)],
            z: [dot(origin, ez), dot(k, ez)],
        })
    }

    /// Whether `i` runs to the back and `j` to the left.
    pub fn transposed(&self) -> bool {
        self.transposed
    }

    /// Place of slice `k` along the normal.
    pub fn slice_mm(&self, k: f64) -> f64 {
        self.z[0] + self.z[1] * k
    }

    /// Fractional slice at a place along the normal.
    pub fn slice_at(&self, z_mm: f64) -> f64 {
        (z_mm - self.z[0]) / self.z[1]
    }

    /// Distance of neighbouring slices along the normal, negative when the slices are counted towards the feet.
    pub fn slice_step_mm(&self) -> f64 {
        self.z[1]
    }

    /// Along left: place of the first voxel of slice `k`, and step (with sign) per voxel.
    pub fn line_x(&self, k: f64) -> Line {
        Line { first_mm: self.x[0] + self.x[2] * k, step_mm: self.x[1] }
    }

    /// Along back: likewise.
    pub fn line_y(&self, k: f64) -> Line {
        Line { first_mm: self.y[0] + self.y[2] * k, step_mm: self.y[1] }
    }

    /// Whether slices lie exactly above each other.
    pub fn upright(&self) -> bool {
        // A hundredth of a millimetre over the whole stack is the rounding of a decimal string.
        self.x[2].abs() < 1e-5 && self.y[2].abs() < 1e-5
    }

    /// Voxels along left and back of a slice of `rows` x `columns`.
    pub fn extent(&self, rows: usize, columns: usize) -> [usize; 2] {
        if self.transposed { [rows, columns] } else { [columns, rows] }
    }

    /// `[z, y, x]` of the frame to LPS.
    pub fn to_lps(&self, zyx_mm: [f64; 3]) -> [f64; 3] {
        let [ex, ey, ez] = self.axes;
        std::array::from_fn(|r| ex[r] * zyx_mm[2] + ey[r] * zyx_mm[1] + ez[r] * zyx_mm[0])
    }

    /// LPS to `[z, y, x]` of the frame.
    pub fn from_lps(&self, lps: [f64; 3]) -> [f64; 3] {
        [dot(lps, self.axes[2]), dot(lps, self.axes[1]), dot(lps, self.axes[0])]
    }

    /// `[z, y, x]` of voxel `[k, j, i]`.
    pub fn voxel_mm(&self, kji: [f64; 3]) -> [f64; 3] {
        let (along_x, along_y) = if self.transposed { (kji[1], kji[2]) } else { (kji[2], kji[1]) };
        [self.slice_mm(kji[0]), self.line_y(kji[0]).at(along_y), self.line_x(kji[0]).at(along_x)]
    }

    /// Fractional voxel `[k, j, i]` at `[z, y, x]`.
    pub fn voxel_at(&self, zyx_mm: [f64; 3]) -> [f64; 3] {
        let k = self.slice_at(zyx_mm[0]);
        let (along_y, along_x) = (self.line_y(k).index(zyx_mm[1]), self.line_x(k).index(zyx_mm[2]));
        if self.transposed { [k, along_x, along_y] } else { [k, along_y, along_x] }
    }
}

/// Voxels in a row: where the first is, and the step to the next (negative when they run the other way).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    /// Place of voxel 0.
    pub first_mm: f64,
    /// Step, with sign, never zero.
    pub step_mm: f64,
}

impl Line {
    /// Place of a voxel.
    pub fn at(&self, index: f64) -> f64 {
        self.first_mm + self.step_mm * index
    }

    /// Fractional voxel at a place.
    pub fn index(&self, mm: f64) -> f64 {
        (mm - self.first_mm) / self.step_mm
    }
}

/// How one line of voxels becomes another: for each target voxel, which source voxels with what weight.
///
/// Where the target is coarser, a mean over as many source voxels as fit its spacing (rounded), then linear
/// interpolation; packages call this `box-then-linear`, and training resamples the same way.
#[derive(Debug, Clone)]
pub struct Weights {
    /// First source voxel and range in `weights`, for each target voxel; an empty range lies outside the image.
    taps: Vec<(usize, std::ops::Range<usize>)>,
    weights: Vec<f32>,
}

impl Weights {
    /// Weights that take `len` voxels on `source` to `out_len` voxels on `target`.
    pub fn new(source: Line, len: usize, target: Line, out_len: usize) -> Self {
        let width = ((target.step_mm / source.step_mm).abs() + 0.5).floor().max(1.0);
        let mut made = Self { taps: Vec::with_capacity(out_len), weights: Vec::new() };
        let mut sums: Vec<f64> = Vec::new();
        for n in 0..out_len {
            let centre = source.index(target.at(n as f64));
            let start = made.weights.len();
            // Beyond the outermost voxels' own extent is no image.
            if !(centre >= -0.5 && centre <= len as f64 - 0.5) {
                made.taps.push((0, start..start));
                continue;
            }
            // A box of an even number of voxels is centred between two of them.
            let first = centre - (width - 1.0) / 2.0;
            let part = first - first.floor();
            let last = len as i64 - 1;
            let low = (first.floor() as i64).clamp(0, last) as usize;
            let high = (first.floor() as i64 + width as i64).clamp(0, last) as usize;
            sums.clear();
            sums.resize(high - low + 1, 0.0);
            for step in 0..=width as i64 {
                let weight = match step {
                    0 => 1.0 - part,
                    w if w == width as i64 => part,
                    _ => 1.0,
                };
                let voxel = (first.floor() as i64 + step).clamp(0, last) as usize;
                sums[voxel - low] += weight / width;
            }
            // A voxel of no weight need not be read.
            let used = sums.iter().rposition(|w| *w > 1e-9).map_or(0, |n| n + 1);
            made.weights.extend(sums[..used].iter().map(|w| *w as f32));
            made.taps.push((low, start..made.weights.len()));
        }
        made
    }

    /// Source voxels and their weights for target voxel `n`, none outside the image.
    pub fn of(&self, n: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        let (first, range) = &self.taps[n];
        self.weights[range.clone()].iter().enumerate().map(move |(d, w)| (first + d, *w))
    }

    /// Target voxels.
    pub fn len(&self) -> usize {
        self.taps.len()
    }

    /// No target voxel.
    pub fn is_empty(&self) -> bool {
        self.taps.is_empty()
    }
}

/// Values outside the image, and the range values are clipped to before they are averaged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Filling {
    /// Outside the image.
    pub pad: f32,
    /// Lowest value taken; scanners mark what they have not seen with lower ones.
    pub low: f32,
    /// Highest value taken.
    pub high: f32,
}

impl Filling {
    /// Hounsfield units of 12-bit scanners, air outside.
    pub const CT: Self = Self { pad: -1000.0, low: -1024.0, high: 3071.0 };
}

/// Resamples one slice (`rows` x `columns`, real values) to the plane of a grid: rows to the back, columns to the left.
///
/// `x` and `y` are the weights along left and back.
///
/// # Panics
/// When the lengths do not agree.
pub fn resample_plane(
    slice: &[f32],
    columns: usize,
    transposed: bool,
    x: &Weights,
    y: &Weights,
    fill: Filling,
    mut out: ArrayViewMut2<'_, f32>,
) {
    assert_eq!(out.dim(), (y.len(), x.len()));
    // Rows of the array first, whichever way they run: whole rows are summed, which the compiler vectorises.
    let (over_rows, over_columns) = if transposed { (x, y) } else { (y, x) };
    let mut line = vec![0f32; columns];
    let mut short = vec![0f32; over_columns.len()];
    for r in 0..over_rows.len() {
        let mut any = false;
        line.fill(0.0);
        for (row, w) in over_rows.of(r) {
            any = true;
            for (sum, v) in line.iter_mut().zip(&slice[row * columns..(row + 1) * columns]) {
                *sum += v.clamp(fill.low, fill.high) * w;
            }
        }
        for (c, value) in short.iter_mut().enumerate() {
            let (first, range) = &over_columns.taps[c];
            *value = if !any || range.is_empty() {
                fill.pad
            } else {
                let taps = &over_columns.weights[range.clone()];
                line[*first..*first + taps.len()].iter().zip(taps).map(|(v, w)| v * w).sum()
            };
        }
        if transposed {
            out.column_mut(r).iter_mut().zip(&short).for_each(|(o, v)| *o = *v);
        } else {
            out.row_mut(r).iter_mut().zip(&short).for_each(|(o, v)| *o = *v);
        }
    }
}

/// A regular grid on a frame: shape, spacing and place of voxel `[0, 0, 0]`, all as z, y, x.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorkGrid {
    /// Its frame.
    pub frame: Frame,
    /// Voxels.
    pub shape: [usize; 3],
    /// Spacing.
    pub spacing_mm: [f64; 3],
    /// Centre of the first voxel.
    pub first_mm: [f64; 3],
}

impl WorkGrid {
    /// The grid of this spacing that covers a box (corners as z, y, x along the frame), centred on it.
    pub fn covering(frame: Frame, low_mm: [f64; 3], high_mm: [f64; 3], spacing_mm: [f64; 3]) -> Self {
        let shape = std::array::from_fn(|a| (((high_mm[a] - low_mm[a]) / spacing_mm[a]).ceil().max(0.0) as usize) + 1);
        let first_mm = std::array::from_fn(|a| {
            let span = spacing_mm[a] * (shape[a] as f64 - 1.0);
            (low_mm[a] + high_mm[a] - span) / 2.0
        });
        Self { frame, shape, spacing_mm, first_mm }
    }

    /// Place of a voxel along the frame.
    pub fn mm(&self, zyx: [f64; 3]) -> [f64; 3] {
        std::array::from_fn(|a| self.first_mm[a] + self.spacing_mm[a] * zyx[a])
    }

    /// Fractional voxel at a place along the frame.
    pub fn index(&self, zyx_mm: [f64; 3]) -> [f64; 3] {
        std::array::from_fn(|a| (zyx_mm[a] - self.first_mm[a]) / self.spacing_mm[a])
    }

    fn line(&self, axis: usize) -> Line {
        Line { first_mm: self.first_mm[axis], step_mm: self.spacing_mm[axis] }
    }

    /// Reads slices `start..start + out.len()` of the grid out of the volume; `start` may be negative and the end
    /// beyond the grid, where the padding stands. What was read of the volume is given back to the system on the way, so
    /// that a thick slab of thin slices is never in memory at once.
    ///
    /// # Errors
    /// [`Fault`] from the pool.
    pub fn read(
        &self,
        volume: &Volume,
        pool: &Pool,
        start: isize,
        fill: Filling,
        mut out: ArrayViewMut3<'_, f32>,
    ) -> Result<(), Fault> {
        let [slices, rows, columns] = volume.shape();
        let (depth, ny, nx) = out.dim();
        let frame = &self.frame;
        let source = Line { first_mm: frame.slice_mm(0.0), step_mm: frame.slice_step_mm() };
        let target = Line { first_mm: self.first_mm[0] + self.spacing_mm[0] * start as f64, step_mm: self.spacing_mm[0] };
        let along_z = Weights::new(source, slices, target, depth);
        let extent = frame.extent(rows, columns);
        let plane = |k: usize| {
            let k = k as f64;
            let x = Weights::new(frame.line_x(k), extent[0], self.line(2), nx);
            let y = Weights::new(frame.line_y(k), extent[1], self.line(1), ny);
            (x, y)
        };
        let upright = frame.upright().then(|| plane(0));
        let size = ny * nx;
        let data = out.as_slice_mut().expect("a slab is contiguous");
        let group = 4 * pool.threads();
        for (n, part) in data.chunks_mut((group * size).max(1)).enumerate() {
            let first = n * group;
            pool.for_each_chunk(part, size, |z, chunk| {
                let z = first + z;
                let mut out = ArrayViewMut2::from_shape((ny, nx), chunk).expect("a chunk is one slice");
                let taps: Vec<(usize, f32)> = along_z.of(z).filter(|(_, w)| *w != 0.0).collect();
                if taps.is_empty() {
                    out.fill(fill.pad);
                    return;
                }
                let mut slice = vec![0f32; rows * columns];
                if let Some((x, y)) = &upright {
                    // Straight stacks: blend the slices first, then resample the plane once.
                    let mut sum = vec![0f32; rows * columns];
                    for (k, w) in &taps {
                        volume.read_slice_f32(*k, &mut slice);
                        sum.iter_mut().zip(&slice).for_each(|(s, v)| *s += v.clamp(fill.low, fill.high) * w);
                    }
                    resample_plane(&sum, columns, frame.transposed, x, y, fill, out);
                } else {
                    let mut one = Array2::zeros((ny, nx));
                    out.fill(0.0);
                    for (k, w) in &taps {
                        volume.read_slice_f32(*k, &mut slice);
                        let (x, y) = plane(*k);
                        resample_plane(&slice, columns, frame.transposed, &x, &y, fill, one.view_mut());
                        out.scaled_add(*w, &one);
                    }
                }
            })?;
            let read = || (first..(first + group).min(depth)).flat_map(|z| along_z.of(z).map(|(k, _)| k));
            if let (Some(low), Some(high)) = (read().min(), read().max()) {
                volume.release(low..high + 1);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array3;

    use crate::geometry::Spacing;
    use crate::volume::Rescale;

    const FILL: Filling = Filling { pad: -1000.0, low: -1000.0, high: 1000.0 };

    /// A volume whose value is a linear function of LPS, whatever way its axes run.
    fn ramp(affine: Affine, shape: [usize; 3]) -> Volume {
        let voxels = Array3::from_shape_fn(shape, |(k, j, i)| {
            let [x, y, z] = affine.kji_to_lps([k as f64, j as f64, i as f64]);
            (x + 2.0 * y + 4.0 * z) as f32
        });
        Volume::from_array(&voxels, affine, Rescale::IDENTITY).unwrap()
    }

    fn affines() -> Vec<(&'static str, Affine)> {
        let new = |i, j, k| Affine::new(i, j, k, [3.0, -20.0, 7.0]).unwrap();
        vec![
            ("straight", Affine::axial(Spacing::new([2.0, 0.8, 0.7]).unwrap(), [3.0, -20.0, 7.0])),
            ("to the right", new([-0.7, 0.0, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 2.0])),
            ("to the feet", new([0.7, 0.0, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, -2.0])),
            ("transposed", new([0.0, 0.8, 0.0], [-0.7, 0.0, 0.0], [0.0, 0.0, 2.0])),
            ("tilted", new([0.7, 0.0, 0.0], [0.0, 0.8, 0.0], [0.0, 0.5, 2.0])),
            ("oblique", new([0.7, 0.0, 0.1], [0.0, 0.8, 0.0], [-0.3, 0.0, 2.0])),
        ]
    }

    #[test]
    fn a_linear_image_is_the_same_on_any_grid_however_the_slices_lie() {
        for (what, affine) in affines() {
            let volume = ramp(affine, [12, 40, 50]);
            let frame = Frame::new(&affine).unwrap();
            let middle = frame.voxel_mm([5.5, 19.5, 24.5]);
            let low = middle.map(|m| m - 6.0);
            let high = middle.map(|m| m + 6.0);
            let grid = WorkGrid::covering(frame, low, high, [1.5, 1.5, 1.5]);
            let mut out = Array3::zeros(grid.shape);
            grid.read(&volume, &Pool::new(2), 0, FILL, out.view_mut()).unwrap();
            for ((z, y, x), v) in out.indexed_iter() {
                let [px, py, pz] = frame.to_lps(grid.mm([z as f64, y as f64, x as f64]));
                let want = px + 2.0 * py + 4.0 * pz;
                assert!((f64::from(*v) - want).abs() < 2e-2, "{what} at {z} {y} {x}: {v} for {want}");
            }
        }
    }

    #[test]
    fn places_and_voxels_are_each_others_inverse() {
        for (what, affine) in affines() {
            let frame = Frame::new(&affine).unwrap();
            let kji = [3.25, 7.5, 11.0];
            let lps = affine.kji_to_lps(kji);
            let place = frame.voxel_mm(kji);
            let back = frame.voxel_at(place);
            let there = frame.to_lps(place);
            assert!((0..3).all(|a| (there[a] - lps[a]).abs() < 1e-9), "{what}: {there:?} {lps:?}");
            assert!((0..3).all(|a| (back[a] - kji[a]).abs() < 1e-9), "{what}: {back:?}");
        }
    }

    #[test]
    fn coronal_slices_are_not_axial() {
        let coronal = Affine::new([1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [0.0; 3]).unwrap();
        assert_eq!(Frame::new(&coronal), Err(NotAxial));
    }

    #[test]
    fn outside_the_image_is_padding() {
        let affine = affines()[0].1;
        let volume = ramp(affine, [4, 8, 8]);
        let frame = Frame::new(&affine).unwrap();
        let grid = WorkGrid { frame, shape: [2, 4, 4], spacing_mm: [2.0; 3], first_mm: frame.voxel_mm([0.0; 3]) };
        let mut out = Array3::zeros([6, 4, 4]);
        grid.read(&volume, &Pool::new(1), -3, FILL, out.view_mut()).unwrap();
        assert!(out.slice(ndarray::s![..3, .., ..]).iter().all(|v| *v == FILL.pad));
        assert!(out[[3, 0, 0]] != FILL.pad && out[[3, 0, 3]] == FILL.pad);
    }
}
