//! Cuts through a volume as pictures: the right way up, true to scale, left told from right.
//!
//! Radiological convention: axial and coronal cuts are seen from the feet and from the front, so the patient's right is
//! on the left of the picture; sagittal cuts are seen from the patient's left, the face to the left. The letters at the
//! edges are computed from the affine, never assumed.

use std::collections::BTreeSet;

use ndarray::Array2;

use super::picture::{Colour, LABEL_COLOURS, Picture, SIDE_MAX};
use crate::geometry::{Grid, dot, norm};
use crate::volume::Volume;

/// Which way a volume is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plane {
    /// Across the body.
    Axial,
    /// Parallel to the chest wall.
    Coronal,
    /// Parallel to the median plane.
    Sagittal,
}

impl Plane {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Axial => "axial",
            Self::Coronal => "coronal",
            Self::Sagittal => "sagittal",
        }
    }

    /// What points to the right, down, and to the viewer's far side; LPS.
    fn wanted(self) -> [[f64; 3]; 3] {
        const LEFT: [f64; 3] = [1.0, 0.0, 0.0];
        const BACK: [f64; 3] = [0.0, 1.0, 0.0];
        const FEET: [f64; 3] = [0.0, 0.0, -1.0];
        match self {
            Self::Axial => [LEFT, BACK, [0.0, 0.0, 1.0]],
            Self::Coronal => [LEFT, FEET, BACK],
            Self::Sagittal => [BACK, FEET, [-1.0, 0.0, 0.0]],
        }
    }
}

/// One cut along the voxel planes nearest to a [`Plane`]; an oblique volume is cut obliquely, and its letters say so.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut {
    grid: Grid,
    /// Array axes (0 = i, 1 = j, 2 = k) to the right, down, and through.
    axes: [usize; 3],
    /// Whether right and down run against their axes.
    turned: [bool; 2],
    /// Voxel number along the third axis.
    index: usize,
}

impl Cut {
    /// The cut through the middle of a volume.
    pub fn new(grid: Grid, plane: Plane) -> Self {
        let wanted = plane.wanted();
        let along = |axis: usize, direction: [f64; 3]| {
            let step = grid.affine.step(axis);
            dot(step, direction) / norm(step)
        };
        // Of the six ways to give the axes to the directions, the one that fits best.
        let ways = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let fit = |way: &[usize; 3]| (0..3).map(|n| along(way[n], wanted[n]).abs()).sum::<f64>();
        let axes = ways.into_iter().max_by(|a, b| fit(a).total_cmp(&fit(b))).unwrap_or([0, 1, 2]);
        let turned = [0, 1].map(|n| along(axes[n], wanted[n]) < 0.0);
        let mut cut = Self { grid, axes, turned, index: 0 };
        cut.index = cut.cuts() / 2;
        cut
    }

    /// The cut with this number; the last one when there are fewer.
    pub fn at(mut self, index: usize) -> Self {
        self.index = index.min(self.cuts() - 1);
        self
    }

    /// The cut nearest to a place.
    pub fn through(self, lps_mm: [f64; 3]) -> Self {
        let at = self.grid.affine.to_voxel(lps_mm)[self.axes[2]].round().max(0.0);
        self.at(at as usize)
    }

    /// The volume's grid.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// The number of this cut, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    fn count(&self, axis: usize) -> usize {
        self.grid.shape[2 - axis]
    }

    /// How many parallel cuts there are.
    pub fn cuts(&self) -> usize {
        self.count(self.axes[2]).max(1)
    }

    /// Voxels to the right and down.
    pub fn size(&self) -> [usize; 2] {
        [self.count(self.axes[0]), self.count(self.axes[1])]
    }

    /// Distances of voxels to the right and down.
    pub fn spacing_mm(&self) -> [f64; 2] {
        [0, 1].map(|n| norm(self.grid.affine.step(self.axes[n])))
    }

    /// Directions to the right and down, LPS.
    pub fn directions(&self) -> [[f64; 3]; 2] {
        [0, 1].map(|n| self.grid.affine.step(self.axes[n]).map(|v| if self.turned[n] { -v } else { v }))
    }

    /// LPS of a place on the cut, in voxels to the right and down.
    pub fn to_lps(&self, right: f64, down: f64) -> [f64; 3] {
        let mut ijk = [0.0; 3];
        for (n, v) in [right, down].into_iter().enumerate() {
            let axis = self.axes[n];
            ijk[axis] = if self.turned[n] { (self.count(axis) - 1) as f64 - v } else { v };
        }
        ijk[self.axes[2]] = self.index as f64;
        self.grid.affine.to_lps(ijk)
    }

    /// Voxels to the right and down of a place, and its distance from the cut in millimetres.
    pub fn from_lps(&self, lps_mm: [f64; 3]) -> ([f64; 2], f64) {
        let ijk = self.grid.affine.to_voxel(lps_mm);
        let place = [0, 1].map(|n| {
            let axis = self.axes[n];
            if self.turned[n] { (self.count(axis) - 1) as f64 - ijk[axis] } else { ijk[axis] }
        });
        let through = self.axes[2];
        (place, (ijk[through] - self.index as f64).abs() * norm(self.grid.affine.step(through)))
    }

    /// Real values on the cut, rows downwards; one slice is held at a time.
    pub fn read(&self, volume: &Volume) -> Array2<f32> {
        let [columns, rows] = self.size();
        let [slices, slice_rows, slice_columns] = self.grid.shape;
        let mut out = Array2::zeros((rows, columns));
        let mut slice = vec![0.0f32; slice_rows * slice_columns];
        let needed = if self.axes[2] == 2 { self.index..self.index + 1 } else { 0..slices };
        for k in needed {
            volume.read_slice_f32(k, &mut slice);
            // Every voxel of the cut that lies in this slice.
            let fixed = |axis: usize| match axis {
                2 => Some(k),
                _ if axis == self.axes[2] => Some(self.index),
                _ => None,
            };
            let range = |axis: usize| fixed(axis).map_or(0..self.count(axis), |n| n..n + 1);
            for j in range(1) {
                for i in range(0) {
                    let place = [0, 1].map(|n| {
                        let axis = self.axes[n];
                        let at = [i, j, k][axis];
                        if self.turned[n] { self.count(axis) - 1 - at } else { at }
                    });
                    out[[place[1], place[0]]] = slice[j * slice_columns + i];
                }
            }
        }
        out
    }

    /// Columns and rows of a picture of the cut.
    pub fn pixels(&self, pixel_mm: f64) -> [usize; 2] {
        let (size, spacing) = (self.size(), self.spacing_mm());
        [0, 1].map(|n| ((size[n] as f64 * spacing[n] / pixel_mm).round() as usize).clamp(1, SIDE_MAX))
    }

    /// Voxels to the right and down, of the middle of a pixel.
    fn place(&self, x: usize, y: usize, pixel_mm: f64) -> [f64; 2] {
        let spacing = self.spacing_mm();
        [(x as f64 + 0.5) * pixel_mm / spacing[0] - 0.5, (y as f64 + 0.5) * pixel_mm / spacing[1] - 0.5]
    }

    /// The pixel at voxels to the right and down.
    pub fn to_pixel(&self, place: [f64; 2], pixel_mm: f64) -> [f64; 2] {
        let spacing = self.spacing_mm();
        [0, 1].map(|n| (place[n] + 0.5) * spacing[n] / pixel_mm - 0.5)
    }

    /// Values as grey, black at `low` and white at `high`, interpolated between voxels; NaN is violet.
    pub fn grey(&self, values: &Array2<f32>, [low, high]: [f32; 2], pixel_mm: f64) -> Picture {
        const NOT_A_NUMBER: Colour = [110, 0, 110];
        let [width, height] = self.pixels(pixel_mm);
        let (rows, columns) = values.dim();
        let mut picture = Picture::new(width, height, [0; 3]);
        let span = if high > low { high - low } else { f32::MIN_POSITIVE };
        let corner = |v: f64, n: usize| {
            let v = v.clamp(0.0, (n - 1) as f64);
            let base = (v as usize).min(n.saturating_sub(2));
            (base, (base + 1).min(n - 1), (v - base as f64) as f32)
        };
        for y in 0..height {
            for x in 0..width {
                let [u, v] = self.place(x, y, pixel_mm);
                let ((i0, i1, fx), (j0, j1, fy)) = (corner(u, columns), corner(v, rows));
                let mix = |a: f32, b: f32, f: f32| if f == 0.0 { a } else { a + f * (b - a) };
                let top = mix(values[[j0, i0]], values[[j0, i1]], fx);
                let bottom = mix(values[[j1, i0]], values[[j1, i1]], fx);
                let value = mix(top, bottom, fy);
                let grey = (255.0 * ((value - low) / span).clamp(0.0, 1.0)).round() as u8;
                picture.set(x as i64, y as i64, if value.is_nan() { NOT_A_NUMBER } else { [grey; 3] });
            }
        }
        picture
    }

    /// Draws the outlines of labels, wherever in space their volume is, and adds them to those `drawn`.
    pub fn outline_labels(&self, picture: &mut Picture, labels: &Labels, pixel_mm: f64, drawn: &mut BTreeSet<i32>) {
        let [width, height] = self.pixels(pixel_mm);
        let at = |x: usize, y: usize| {
            let [u, v] = self.place(x, y, pixel_mm);
            labels.at(self.to_lps(u, v))
        };
        let seen = Array2::from_shape_fn((height, width), |(y, x)| at(x, y));
        for ((y, x), label) in seen.indexed_iter().filter(|(_, label)| **label != 0) {
            let other = |dy: isize, dx: isize| {
                let (y, x) = (y.wrapping_add_signed(dy), x.wrapping_add_signed(dx));
                seen.get([y, x]).is_none_or(|near| near != label)
            };
            if other(-1, 0) || other(1, 0) || other(0, -1) || other(0, 1) {
                picture.set(x as i64, y as i64, label_colour(*label));
                drawn.insert(*label);
            }
        }
    }
}

/// The colour of a label.
pub fn label_colour(label: i32) -> Colour {
    LABEL_COLOURS[(label - 1).rem_euclid(LABEL_COLOURS.len() as i32) as usize]
}

/// A label map.
pub struct Labels {
    grid: Grid,
    values: ndarray::Array3<f32>,
}

impl Labels {
    /// Reads the labels of a volume; None when a value is no whole number.
    pub fn new(volume: &Volume) -> Option<Self> {
        let values = volume.to_f32(0..volume.shape()[0]);
        values.iter().all(|v| v.fract() == 0.0).then_some(Self { grid: volume.grid(), values })
    }

    /// The place where the slice, the row and the column with most labelled voxels meet: cuts through it show the labels.
    /// None when there are none.
    pub fn fullest_lps_mm(&self) -> Option<[f64; 3]> {
        let mut counts = self.grid.shape.map(|n| vec![0u32; n]);
        for ((k, j, i), _) in self.values.indexed_iter().filter(|(_, v)| **v != 0.0) {
            for (count, at) in counts.iter_mut().zip([k, j, i]) {
                count[at] += 1;
            }
        }
        let fullest = |n: usize| counts[n].iter().enumerate().rev().max_by_key(|(_, count)| **count).filter(|(_, count)| **count > 0);
        let [k, j, i] = [fullest(0)?.0, fullest(1)?.0, fullest(2)?.0].map(|at| at as f64);
        Some(self.grid.affine.kji_to_lps([k, j, i]))
    }

    /// The label at a place, 0 outside.
    pub fn at(&self, lps_mm: [f64; 3]) -> i32 {
        let ijk = self.grid.affine.to_voxel(lps_mm).map(f64::round);
        let [slices, rows, columns] = self.grid.shape;
        let inside = ijk.iter().zip([columns, rows, slices]).all(|(v, n)| *v >= 0.0 && *v < n as f64);
        if inside { self.values[[ijk[2] as usize, ijk[1] as usize, ijk[0] as usize]] as i32 } else { 0 }
    }
}

/// Values below and above which a share `tail` of the finite values lies: a window that a few bright voxels do not rule.
pub fn robust_window<'a>(values: impl Iterator<Item = &'a f32>, tail: f64) -> [f32; 2] {
    let mut finite: Vec<f32> = values.copied().filter(|v| v.is_finite()).collect();
    if finite.is_empty() {
        return [0.0, 1.0];
    }
    let last = finite.len() - 1;
    let mut rank = |share: f64| {
        let n = ((last as f64 * share).round() as usize).min(last);
        *finite.select_nth_unstable_by(n, f32::total_cmp).1
    };
    [rank(tail), rank(1.0 - tail)]
}

#[cfg(test)]
mod tests {
    use ndarray::Array3;

    use super::*;
    use crate::geometry::Affine;
    use crate::imaging::picture::direction_letters;
    use crate::volume::Rescale;

    /// A volume whose value is 1 near one place in space, in any storage order.
    fn volume(affine: Affine, shape: [usize; 3], place: [f64; 3]) -> Volume {
        let [z, y, x] = shape;
        let voxels = Array3::from_shape_fn((z, y, x), |(k, j, i)| {
            let p = affine.kji_to_lps([k as f64, j as f64, i as f64]);
            f32::from(norm(crate::geometry::sub(p, place)) < 2.5)
        });
        Volume::from_array(&voxels, affine, Rescale::IDENTITY).unwrap()
    }

    #[test]
    fn the_patients_right_is_on_the_left_whatever_the_order_of_storage() {
        // Right, front, head: must come out on the left, at the top.
        let place = [-10.0, -8.0, 12.0];
        let orders = [
            Affine::new([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [-20.0, -20.0, -20.0]),
            Affine::new([-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 2.0], [20.0, 20.0, -20.0]),
            Affine::new([0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [2.0, 0.0, 0.0], [-20.0, -20.0, 20.0]),
        ];
        for affine in orders.map(Result::unwrap) {
            let volume = volume(affine, [21, 41, 41], place);
            for (plane, expected, letters) in [
                (Plane::Axial, [10.0, 12.0], ["L", "P"]),
                (Plane::Coronal, [10.0, 8.0], ["L", "F"]),
                (Plane::Sagittal, [12.0, 8.0], ["P", "F"]),
            ] {
                let cut = Cut::new(volume.grid(), plane).through(place);
                assert_eq!(cut.directions().map(direction_letters), letters);
                let picture = cut.grey(&cut.read(&volume), [0.0, 1.0], 1.0);
                let bright: Vec<[f64; 2]> = (0..picture.height())
                    .flat_map(|y| (0..picture.width()).map(move |x| (x, y)))
                    .filter(|(x, y)| picture.pixel(*x, *y)[0] > 128)
                    .map(|(x, y)| [x as f64, y as f64])
                    .collect();
                assert!(!bright.is_empty());
                let mean = [0, 1].map(|n| bright.iter().map(|p| p[n]).sum::<f64>() / bright.len() as f64);
                assert!((0..2).all(|n| (mean[n] - expected[n]).abs() < 1.6), "{plane:?} {mean:?}");
                let (at, far) = cut.from_lps(place);
                let pixel = cut.to_pixel(at, 1.0);
                assert!((0..2).all(|n| (mean[n] - pixel[n]).abs() < 1.1) && far <= 1.0);
                assert!(norm(crate::geometry::sub(cut.to_lps(at[0], at[1]), place)) <= 1.0);
            }
        }
    }

    #[test]
    fn thick_slices_are_drawn_at_their_true_height() {
        let affine = Affine::new([0.8, 0.0, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 5.0], [0.0; 3]).unwrap();
        let grid = Grid { shape: [30, 200, 250], affine };
        assert_eq!(Cut::new(grid, Plane::Coronal).pixels(0.5), [400, 300]);
        assert_eq!(Cut::new(grid, Plane::Axial).pixels(0.5), [400, 320]);
        assert_eq!(Cut::new(grid, Plane::Axial).at(99).index(), 29);
    }

    #[test]
    fn a_label_is_outlined_where_it_is_in_space_and_nan_is_not_grey() {
        let affine = Affine::new([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0; 3]).unwrap();
        let image = volume(affine, [20, 40, 40], [100.0; 3]);
        // The label map is stored the other way round, on another grid.
        let turned = Affine::new([-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [35.0, 35.0, 0.0]).unwrap();
        let labels = Labels::new(&volume(turned, [20, 36, 36], [30.0, 10.0, 10.0])).unwrap();
        let cut = Cut::new(image.grid(), Plane::Axial);
        let mut values = cut.read(&image);
        values[[0, 0]] = f32::NAN;
        let mut picture = cut.grey(&values, [0.0, 1.0], 1.0);
        let mut drawn = BTreeSet::new();
        cut.outline_labels(&mut picture, &labels, 1.0, &mut drawn);
        assert_eq!(drawn, BTreeSet::from([1]));
        let fullest = labels.fullest_lps_mm().expect("there is a label");
        assert!(norm(crate::geometry::sub(fullest, [30.0, 10.0, 10.0])) < 2.0, "{fullest:?}");
        assert_eq!(picture.pixel(32, 10), label_colour(1));
        assert_eq!(picture.pixel(30, 10), [0; 3], "only the outline");
        assert_eq!(picture.pixel(0, 0), [110, 0, 110]);
    }

    #[test]
    fn the_robust_window_leaves_out_a_few_extremes() {
        let values: Vec<f32> = (0..1000).map(|n| n as f32).chain([1e9, f32::NAN]).collect();
        let [low, high] = robust_window(values.iter(), 0.01);
        assert!((low - 10.0).abs() < 1.5 && (high - 990.0).abs() < 1.5);
        assert_eq!(robust_window([].iter(), 0.01), [0.0, 1.0]);
    }
}
