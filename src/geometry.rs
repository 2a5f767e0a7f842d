//! Where voxels are: spacing, affine, grid, and the lattice a stack of slices stands on. Pure values.
//!
//! Patient space is DICOM's LPS in millimetres (PS3.3 C.7.6.2.1.1): x to the patient's left, y to the back,
//! z to the head. Arrays are indexed `[slice k, row j, column i]`; an [`Affine`] takes `(i, j, k)` to LPS.

mod lattice;

use serde::{Deserialize, Serialize};

pub(crate) use lattice::median;
pub use lattice::{Lattice, Placed, Reason, Uneven, Verdict, lattice};

/// Distance between neighbouring voxel centres in millimetres, as `[z, y, x]` (array order); finite and positive.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "[f64; 3]", into = "[f64; 3]")]
pub struct Spacing([f64; 3]);

/// A geometry that cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BadGeometry {
    /// A spacing that is zero, negative, NaN or above a metre.
    #[error("spacing {0:?} mm (z, y, x) is not usable: each must be above 0 and at most 1000")]
    Spacing([f64; 3]),
    /// An affine with NaN, infinities or no inverse.
    #[error("the affine has no inverse or is not finite: {0:?}")]
    Affine(Box<[f64; 16]>),
    /// A position or orientation of a frame that is none.
    #[error("no plane: position {position_lps_mm:?}, direction cosines {orientation:?}")]
    Plane {
        /// Image Position (Patient).
        position_lps_mm: [f64; 3],
        /// Image Orientation (Patient).
        orientation: [f64; 6],
    },
}

impl Spacing {
    /// `[z, y, x]` in millimetres.
    ///
    /// # Errors
    /// [`BadGeometry::Spacing`] unless each is above zero and at most 1000.
    pub fn new(zyx_mm: [f64; 3]) -> Result<Self, BadGeometry> {
        if zyx_mm.iter().all(|s| *s > 0.0 && *s <= 1000.0) { Ok(Self(zyx_mm)) } else { Err(BadGeometry::Spacing(zyx_mm)) }
    }

    /// `[z, y, x]` in millimetres.
    pub fn zyx_mm(self) -> [f64; 3] {
        self.0
    }

    /// The volume of one voxel.
    pub fn voxel_mm3(self) -> f64 {
        self.0.iter().product()
    }
}

impl TryFrom<[f64; 3]> for Spacing {
    type Error = BadGeometry;
    fn try_from(zyx_mm: [f64; 3]) -> Result<Self, BadGeometry> {
        Self::new(zyx_mm)
    }
}

impl From<Spacing> for [f64; 3] {
    fn from(s: Spacing) -> Self {
        s.0
    }
}

/// Takes voxel indices `(i, j, k)` (column, row, slice) to LPS millimetres; always invertible.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "[f64; 16]", into = "[f64; 16]")]
pub struct Affine {
    /// Columns of the linear part: the step of i, of j, of k.
    steps: [[f64; 3]; 3],
    origin: [f64; 3],
}

impl Affine {
    /// Steps of `i`, `j` and `k` in LPS millimetres, and where voxel `(0, 0, 0)` is.
    ///
    /// # Errors
    /// [`BadGeometry::Affine`] when a number is not finite or the steps do not span space.
    pub fn new(step_i: [f64; 3], step_j: [f64; 3], step_k: [f64; 3], origin: [f64; 3]) -> Result<Self, BadGeometry> {
        let affine = Self { steps: [step_i, step_j, step_k], origin };
        let lengths: f64 = affine.steps.iter().map(|s| norm(*s)).product();
        let determinant = affine.determinant();
        let finite = affine.rows().iter().flatten().all(|v| v.is_finite());
        if finite && lengths > 0.0 && (determinant / lengths).abs() > 1e-6 {
            Ok(affine)
        } else {
            Err(BadGeometry::Affine(Box::new(affine.to_row_major())))
        }
    }

    /// An axis-aligned grid: columns to the left, rows to the back, slices to the head.
    pub fn axial(spacing: Spacing, origin: [f64; 3]) -> Self {
        let [z, y, x] = spacing.zyx_mm();
        Self { steps: [[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, z]], origin }
    }

    /// The step of axis 0 = i, 1 = j, 2 = k.
    pub fn step(&self, axis: usize) -> [f64; 3] {
        self.steps[axis]
    }

    /// Where voxel `(0, 0, 0)` is.
    pub fn origin(&self) -> [f64; 3] {
        self.origin
    }

    /// The 3 x 4 upper part, row by row.
    pub fn rows(&self) -> [[f64; 4]; 3] {
        std::array::from_fn(|r| [self.steps[0][r], self.steps[1][r], self.steps[2][r], self.origin[r]])
    }

    /// All 16 numbers, row by row, as in the report.
    pub fn to_row_major(&self) -> [f64; 16] {
        let mut out = [0.0; 16];
        for (r, row) in self.rows().iter().enumerate() {
            out[r * 4..r * 4 + 4].copy_from_slice(row);
        }
        out[15] = 1.0;
        out
    }

    /// From 16 numbers, row by row.
    ///
    /// # Errors
    /// [`BadGeometry::Affine`] as in [`Affine::new`], and when the last row is not 0 0 0 1.
    pub fn from_row_major(m: [f64; 16]) -> Result<Self, BadGeometry> {
        if m[12..] != [0.0, 0.0, 0.0, 1.0] {
            return Err(BadGeometry::Affine(Box::new(m)));
        }
        let column = |c: usize| [m[c], m[4 + c], m[8 + c]];
        Self::new(column(0), column(1), column(2), column(3))
    }

    /// LPS position of a voxel; `ijk` may be fractional.
    pub fn to_lps(&self, ijk: [f64; 3]) -> [f64; 3] {
        std::array::from_fn(|r| {
            self.steps[0][r] * ijk[0] + self.steps[1][r] * ijk[1] + self.steps[2][r] * ijk[2] + self.origin[r]
        })
    }

    /// LPS position of an array index `[k, j, i]`; may be fractional.
    pub fn kji_to_lps(&self, kji: [f64; 3]) -> [f64; 3] {
        self.to_lps([kji[2], kji[1], kji[0]])
    }

    /// Fractional voxel `(i, j, k)` at an LPS position.
    pub fn to_voxel(&self, lps: [f64; 3]) -> [f64; 3] {
        let p = sub(lps, self.origin);
        let [a, b, c] = self.steps;
        let d = self.determinant();
        [dot(p, cross(b, c)) / d, dot(p, cross(c, a)) / d, dot(p, cross(a, b)) / d]
    }

    /// Lengths of the steps, as `[z, y, x]` = k, j, i.
    pub fn spacing(&self) -> Spacing {
        Spacing([norm(self.steps[2]), norm(self.steps[1]), norm(self.steps[0])])
    }

    /// Determinant of the linear part: its magnitude is the voxel volume in mm3.
    pub fn determinant(&self) -> f64 {
        dot(self.steps[0], cross(self.steps[1], self.steps[2]))
    }

    /// The same space, seen from voxel `(i, j, k)` as the new origin.
    pub fn shifted(&self, ijk: [f64; 3]) -> Self {
        Self { steps: self.steps, origin: self.to_lps(ijk) }
    }
}

impl TryFrom<[f64; 16]> for Affine {
    type Error = BadGeometry;
    fn try_from(m: [f64; 16]) -> Result<Self, BadGeometry> {
        Self::from_row_major(m)
    }
}

impl From<Affine> for [f64; 16] {
    fn from(a: Affine) -> Self {
        a.to_row_major()
    }
}

/// The voxels of a volume in patient space: how many, and where.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Grid {
    /// `[slices, rows, columns]`.
    pub shape: [usize; 3],
    /// `(i, j, k)` to LPS millimetres.
    pub affine: Affine,
}

impl Grid {
    /// Number of voxels.
    pub fn voxels(&self) -> usize {
        self.shape.iter().product()
    }

    /// Distance between voxel centres.
    pub fn spacing(&self) -> Spacing {
        self.affine.spacing()
    }
}

/// `a . b`
pub fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// `a x b`
pub fn cross(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

/// `a - b`
pub fn sub(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

/// Length of `a`.
pub fn norm(a: [f64; 3]) -> f64 {
    dot(a, a).sqrt()
}

/// The plane of one frame in patient space (PS3.3 C.7.6.2.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Plane {
    /// Centre of the first pixel (row 0, column 0): Image Position (Patient).
    pub position_lps_mm: [f64; 3],
    /// Unit vector in which the column index grows: the first triple of Image Orientation (Patient).
    pub along_row: [f64; 3],
    /// Unit vector in which the row index grows: the second triple.
    pub along_column: [f64; 3],
    /// Distance between rows, the first value of Pixel Spacing.
    pub row_spacing_mm: f64,
    /// Distance between columns, the second value of Pixel Spacing.
    pub column_spacing_mm: f64,
}

impl Plane {
    /// A plane from the attributes of a frame.
    ///
    /// Direction cosines are normalised (scanners write them with few digits), never made perpendicular.
    ///
    /// # Errors
    /// [`BadGeometry`] for a number that is not finite, a pixel spacing that is none, or directions that are not
    /// perpendicular unit vectors within 1 %.
    pub fn new(
        position_lps_mm: [f64; 3],
        orientation: [f64; 6],
        pixel_spacing_mm: [f64; 2],
    ) -> Result<Self, BadGeometry> {
        let [a, b, c, d, e, f] = orientation;
        let (row, column) = ([a, b, c], [d, e, f]);
        let (row_length, column_length) = (norm(row), norm(column));
        let unit = |length: f64| (length - 1.0).abs() < 0.01;
        let [row_spacing_mm, column_spacing_mm] = pixel_spacing_mm;
        Spacing::new([1.0, row_spacing_mm, column_spacing_mm])?;
        if !unit(row_length)
            || !unit(column_length)
            || dot(row, column).abs() > 0.01
            || !position_lps_mm.iter().all(|v| v.abs() < 1e7)
        {
            return Err(BadGeometry::Plane { position_lps_mm, orientation });
        }
        Ok(Self {
            position_lps_mm,
            along_row: row.map(|v| v / row_length),
            along_column: column.map(|v| v / column_length),
            row_spacing_mm,
            column_spacing_mm,
        })
    }

    /// Unit normal: along the row, then along the column, then this make a right-handed system.
    pub fn normal(&self) -> [f64; 3] {
        let n = cross(self.along_row, self.along_column);
        let length = norm(n);
        n.map(|v| v / length)
    }

    /// Where the plane stands along its own normal, in millimetres from the origin of patient space.
    pub fn along_normal_mm(&self) -> f64 {
        dot(self.position_lps_mm, self.normal())
    }

    /// The affine of a stack that starts with this plane and goes on by `step_lps_mm` per slice.
    ///
    /// # Errors
    /// [`BadGeometry::Affine`] when the step lies in the plane.
    pub fn affine(&self, step_lps_mm: [f64; 3]) -> Result<Affine, BadGeometry> {
        Affine::new(
            self.along_row.map(|v| v * self.column_spacing_mm),
            self.along_column.map(|v| v * self.row_spacing_mm),
            step_lps_mm,
            self.position_lps_mm,
        )
    }
}
