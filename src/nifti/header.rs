//! The header of NIfTI-1 (348 bytes) and NIfTI-2 (540 bytes), in either byte order.

use crate::geometry::{Affine, Spacing};
use crate::volume::{Rescale, VoxelType};

/// What one voxel is in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataType {
    /// A type that a volume can hold as it is.
    Plain(VoxelType),
    /// 64-bit signed; read as 64-bit float.
    I64,
    /// 64-bit unsigned; read as 64-bit float.
    U64,
}

impl DataType {
    fn from_code(code: i16) -> Result<Self, String> {
        use VoxelType::{F32, F64, I8, I16, I32, U8, U16, U32};
        Ok(Self::Plain(match code {
            2 => U8,
            4 => I16,
            8 => I32,
            16 => F32,
            64 => F64,
            256 => I8,
            512 => U16,
            768 => U32,
            1024 => return Ok(Self::I64),
            1280 => return Ok(Self::U64),
            32 | 1792 | 2048 => return Err("complex voxels are not read".into()),
            128 | 2304 => return Err("colour voxels are not read".into()),
            1536 => return Err("128-bit floats are not read".into()),
            other => return Err(format!("{other} is no type")),
        }))
    }

    /// Bytes of one voxel in the file.
    pub fn bytes(self) -> usize {
        match self {
            Self::Plain(voxel) => voxel.bytes(),
            Self::I64 | Self::U64 => 8,
        }
    }

    /// What it becomes in a volume.
    pub fn voxel_type(self) -> VoxelType {
        match self {
            Self::Plain(voxel) => voxel,
            Self::I64 | Self::U64 => VoxelType::F64,
        }
    }

    /// Its name, as numpy says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain(VoxelType::U8) => "uint8",
            Self::Plain(VoxelType::I8) => "int8",
            Self::Plain(VoxelType::U16) => "uint16",
            Self::Plain(VoxelType::I16) => "int16",
            Self::Plain(VoxelType::U32) => "uint32",
            Self::Plain(VoxelType::I32) => "int32",
            Self::Plain(VoxelType::F32) => "float32",
            Self::Plain(VoxelType::F64) => "float64",
            Self::I64 => "int64",
            Self::U64 => "uint64",
        }
    }
}

/// Which part of the header the affine was taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AffineSource {
    /// The sform, preferred whenever its code is set (as nibabel does).
    Sform,
    /// The qform.
    Qform,
    /// Neither is set: the spacing alone, centred, columns to the patient's left, as nibabel assumes. Left and right are a guess.
    Spacing,
}

/// A NIfTI header, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct NiftiHeader {
    /// 1 or 2.
    pub version: u8,
    /// The file's byte order.
    pub big_endian: bool,
    /// Extents: columns i, rows j, slices k, times, then whatever follows. At least three, of which each is 1 or more.
    pub shape: Vec<usize>,
    /// Number of dimensions as written (2 for one slice).
    pub dimensions: usize,
    /// What one voxel is.
    pub data_type: DataType,
    /// Where voxels start, in bytes.
    pub voxels_at: u64,
    /// Distances as written: millimetres (or the file's unit) for i, j, k, then seconds or whatever follows.
    pub zooms: Vec<f64>,
    /// `scl_slope` and `scl_inter`.
    pub rescale: Rescale,
    /// `(i, j, k)` to LPS millimetres (the file says RAS; x and y change their sign here).
    pub affine: Affine,
    /// Where the affine is from.
    pub affine_source: AffineSource,
    /// sform and qform are both set and put a corner of the volume more than 0.01 mm apart. The sform is taken.
    pub forms_disagree: bool,
    /// `sform_code` and `qform_code`.
    pub form_codes: [i16; 2],
    /// Unit of the distances: `mm`, `m`, `um` or `unknown`. Metres and micrometres are converted in `affine`.
    pub space_unit: &'static str,
    /// Unit of the fourth zoom: `s`, `ms`, `us`, `Hz`, `ppm`, `rad/s` or `unknown`.
    pub time_unit: &'static str,
    /// Free text.
    pub description: String,
}

/// The field that cannot be, and why.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BadField {
    pub field: &'static str,
    pub why: String,
}

fn bad<T>(field: &'static str, why: impl Into<String>) -> Result<T, BadField> {
    Err(BadField { field, why: why.into() })
}

/// Voxels of one file. 2^40 is beyond any disk these files come from, and leaves room to multiply.
const VOXELS_MAX: u64 = 1 << 40;

struct Fields<'a> {
    bytes: &'a [u8],
    big: bool,
}

impl Fields<'_> {
    fn raw<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut b: [u8; N] = self.bytes[at..at + N].try_into().expect("the length was checked");
        if self.big {
            b.reverse();
        }
        b
    }
    fn i16(&self, at: usize) -> i16 {
        i16::from_le_bytes(self.raw(at))
    }
    fn i32(&self, at: usize) -> i32 {
        i32::from_le_bytes(self.raw(at))
    }
    fn i64(&self, at: usize) -> i64 {
        i64::from_le_bytes(self.raw(at))
    }
    fn f32(&self, at: usize) -> f64 {
        f32::from_le_bytes(self.raw(at)).into()
    }
    fn f64(&self, at: usize) -> f64 {
        f64::from_le_bytes(self.raw(at))
    }
}

/// Bytes that decide everything: NIfTI-2's header.
pub(super) const HEADER_BYTES: usize = 540;

impl NiftiHeader {
    /// Reads the header from the first bytes of a file.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, BadField> {
        let Some(size) = bytes.first_chunk::<4>() else { return bad("sizeof_hdr", "the file is empty or cut") };
        let (version, big) = match (i32::from_le_bytes(*size), i32::from_be_bytes(*size)) {
            (348, _) => (1, false),
            (540, _) => (2, false),
            (_, 348) => (1, true),
            (_, 540) => (2, true),
            (other, _) => return bad("sizeof_hdr", format!("{other} is neither 348 (NIfTI-1) nor 540 (NIfTI-2)")),
        };
        let needed = if version == 1 { 348 } else { 540 };
        if bytes.len() < needed {
            return bad("sizeof_hdr", format!("the file ends after {} bytes", bytes.len()));
        }
        let f = Fields { bytes, big };
        let v1 = version == 1;
        let magic = if v1 { &bytes[344..348] } else { &bytes[4..8] };
        match magic {
            b"n+1\0" | b"n+2\0" => {}
            b"ni1\0" | b"ni2\0" => return bad("magic", "the voxels are in a second file (.img), which is not read"),
            _ => return bad("magic", "this is no NIfTI file (an ANALYZE file has no orientation and is not read)"),
        }
        let dim = |n: usize| if v1 { i64::from(f.i16(40 + 2 * n)) } else { f.i64(16 + 8 * n) };
        let pixdim = |n: usize| if v1 { f.f32(76 + 4 * n) } else { f.f64(104 + 8 * n) };
        let real = |at1: usize, at2: usize| if v1 { f.f32(at1) } else { f.f64(at2) };
        let dimensions = match dim(0) {
            n @ 1..=7 => n as usize,
            n => return bad("dim[0]", format!("{n} dimensions")),
        };
        let mut shape = Vec::new();
        for n in 1..=dimensions {
            match usize::try_from(dim(n)) {
                Ok(extent) if extent > 0 => shape.push(extent),
                _ => return bad("dim", format!("extent {n} is {}", dim(n))),
            }
        }
        shape.resize(dimensions.max(3), 1);
        let voxels = shape.iter().try_fold(1u64, |all, n| all.checked_mul(*n as u64)).filter(|n| *n <= VOXELS_MAX);
        if voxels.is_none() {
            return bad("dim", format!("{shape:?} is beyond any file"));
        }
        let code = f.i16(if v1 { 70 } else { 12 });
        let data_type = DataType::from_code(code).map_err(|why| BadField { field: "datatype", why })?;
        let voxels_at = match if v1 { f.f32(108) } else { f.i64(168) as f64 } {
            // Left out by some writers of single files: behind the header and its extension flag.
            0.0 => (needed + 4) as f64,
            at => at,
        };
        if !(voxels_at >= needed as f64 && voxels_at < 1e9 && voxels_at.fract() == 0.0) {
            return bad("vox_offset", format!("the voxels cannot start at {voxels_at}"));
        }
        let (slope, intercept) = (real(112, 176), real(116, 184));
        let rescale = match slope.is_finite() && slope != 0.0 {
            true => Rescale { slope, intercept: if intercept.is_finite() { intercept } else { 0.0 } },
            false => Rescale::IDENTITY,
        };
        let units = if v1 { i32::from(bytes[123]) } else { f.i32(500) };
        let (space_unit, to_mm) = match units & 7 {
            1 => ("m", 1000.0),
            2 => ("mm", 1.0),
            3 => ("um", 0.001),
            _ => ("unknown", 1.0),
        };
        let time_unit = match units & 0x38 {
            8 => "s",
            16 => "ms",
            24 => "us",
            32 => "Hz",
            40 => "ppm",
            48 => "rad/s",
            _ => "unknown",
        };
        let form_codes = if v1 { [f.i16(254), f.i16(252)] } else { [f.i32(348) as i16, f.i32(344) as i16] };
        let row = |r: usize, c: usize| if v1 { f.f32(280 + 16 * r + 4 * c) } else { f.f64(400 + 32 * r + 8 * c) };
        let sform = || -> [[f64; 4]; 3] { std::array::from_fn(|r| std::array::from_fn(|c| row(r, c))) };
        // A distance of a dimension that has one entry only may be left out.
        let zoom = |n: usize| match pixdim(n).abs() {
            0.0 if shape.get(n - 1) == Some(&1) => 1.0,
            mm => mm,
        };
        let steps_mm = [zoom(1), zoom(2), zoom(3)];
        let qform = || {
            let at = |n: usize| real(256 + 4 * n, 352 + 8 * n);
            let qfac = if pixdim(0) < 0.0 { -1.0 } else { 1.0 };
            rows_of_quaternion([at(0), at(1), at(2)], [at(3), at(4), at(5)], steps_mm, qfac)
        };
        let usable = |field, rows: [[f64; 4]; 3]| match lps(rows, to_mm) {
            Ok(affine) => Ok(affine),
            Err(why) => bad(field, why),
        };
        let spacing_is_good = Spacing::new([steps_mm[2] * to_mm, steps_mm[1] * to_mm, steps_mm[0] * to_mm]);
        let (affine_source, affine) = match form_codes {
            [s, _] if s > 0 => (AffineSource::Sform, usable("srow", sform())?),
            _ if spacing_is_good.is_err() => return bad("pixdim", format!("spacing {steps_mm:?} and no sform")),
            [_, q] if q > 0 => (AffineSource::Qform, usable("quatern", qform())?),
            _ => {
                let centre = |n: usize| (shape[n] - 1) as f64 / 2.0 * steps_mm[n];
                let [x, y, z] = steps_mm;
                let rows = [[-x, 0.0, 0.0, centre(0)], [0.0, y, 0.0, -centre(1)], [0.0, 0.0, z, -centre(2)]];
                (AffineSource::Spacing, usable("pixdim", rows)?)
            }
        };
        let corner = [0, 1, 2].map(|n| (shape[n] - 1) as f64);
        let apart = |other: Affine| {
            let worst = |p| crate::geometry::norm(crate::geometry::sub(affine.to_lps(p), other.to_lps(p)));
            worst([0.0; 3]).max(worst(corner)) > 0.01
        };
        let forms_disagree =
            form_codes.iter().all(|code| *code > 0) && usable("quatern", qform()).map_or(true, apart);
        let text = if v1 { &bytes[148..228] } else { &bytes[240..320] };
        let text = text.split(|b| *b == 0).next().unwrap_or_default();
        let zooms = (1..=shape.len()).map(|n| if n <= dimensions { pixdim(n).abs() } else { 1.0 }).collect();
        Ok(Self {
            version,
            big_endian: big,
            dimensions,
            data_type,
            voxels_at: voxels_at as u64,
            zooms,
            rescale,
            affine,
            affine_source,
            forms_disagree,
            form_codes,
            space_unit,
            time_unit,
            description: String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect(),
            shape,
        })
    }

    /// `[slices, rows, columns]` of one volume.
    pub fn volume_shape(&self) -> [usize; 3] {
        [self.shape[2], self.shape[1], self.shape[0]]
    }

    /// Volumes in the file: 1 for a 3-D one.
    pub fn volumes(&self) -> usize {
        self.shape[3..].iter().product()
    }

    /// Voxels of all volumes.
    pub fn voxels(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product()
    }

    /// Time between volumes in seconds; None where the header gives none.
    pub fn repetition_s(&self) -> Option<f64> {
        let unit = match self.time_unit {
            "ms" => 1e-3,
            "us" => 1e-6,
            _ => 1.0,
        };
        self.zooms.get(3).map(|t| t * unit).filter(|t| *t > 0.0)
    }
}

/// RAS rows in the file's unit to an LPS affine in millimetres.
fn lps(rows: [[f64; 4]; 3], to_mm: f64) -> Result<Affine, String> {
    let sign = [-1.0, -1.0, 1.0];
    let column = |c: usize| -> [f64; 3] { std::array::from_fn(|r| sign[r] * rows[r][c] * to_mm) };
    Affine::new(column(0), column(1), column(2), column(3)).map_err(|bad| bad.to_string())
}

/// The qform as rows (nifti1.h, method 2).
fn rows_of_quaternion(bcd: [f64; 3], offset: [f64; 3], steps: [f64; 3], qfac: f64) -> [[f64; 4]; 3] {
    let [mut b, mut c, mut d] = bcd;
    let rest = 1.0 - (b * b + c * c + d * d);
    let a = if rest < 1e-7 {
        // A rotation by 180 degrees, to the precision of the file.
        let length = (b * b + c * c + d * d).sqrt();
        (b, c, d) = (b / length, c / length, d / length);
        0.0
    } else {
        rest.sqrt()
    };
    let r = [
        [a * a + b * b - c * c - d * d, 2.0 * (b * c - a * d), 2.0 * (b * d + a * c)],
        [2.0 * (b * c + a * d), a * a + c * c - b * b - d * d, 2.0 * (c * d - a * b)],
        [2.0 * (b * d - a * c), 2.0 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ];
    std::array::from_fn(|n| [r[n][0] * steps[0], r[n][1] * steps[1], r[n][2] * steps[2] * qfac, offset[n]])
}

/// Quaternion `b, c, d` and `qfac` of orthogonal RAS columns with their lengths taken out; None where they are sheared.
pub(super) fn quaternion_of(columns: [[f64; 3]; 3]) -> Option<([f64; 3], f64)> {
    use crate::geometry::{cross, dot};
    let [x, y, mut z] = columns;
    if dot(x, y).abs().max(dot(y, z).abs()).max(dot(x, z).abs()) > 1e-5 {
        return None;
    }
    let qfac = if dot(cross(x, y), z) < 0.0 { -1.0 } else { 1.0 };
    z = z.map(|v| v * qfac);
    let r = |row: usize, column: usize| [x, y, z][column][row];
    let trace = 1.0 + r(0, 0) + r(1, 1) + r(2, 2);
    let [a, b, c, d];
    if trace > 0.5 {
        let s = 2.0 * trace.sqrt();
        [a, b, c, d] = [s / 4.0, (r(2, 1) - r(1, 2)) / s, (r(0, 2) - r(2, 0)) / s, (r(1, 0) - r(0, 1)) / s];
    } else if r(0, 0) > r(1, 1) && r(0, 0) > r(2, 2) {
        let s = 2.0 * (1.0 + r(0, 0) - r(1, 1) - r(2, 2)).sqrt();
        [a, b, c, d] = [(r(2, 1) - r(1, 2)) / s, s / 4.0, (r(0, 1) + r(1, 0)) / s, (r(0, 2) + r(2, 0)) / s];
    } else if r(1, 1) > r(2, 2) {
        let s = 2.0 * (1.0 + r(1, 1) - r(0, 0) - r(2, 2)).sqrt();
        [a, b, c, d] = [(r(0, 2) - r(2, 0)) / s, (r(0, 1) + r(1, 0)) / s, s / 4.0, (r(1, 2) + r(2, 1)) / s];
    } else {
        let s = 2.0 * (1.0 + r(2, 2) - r(0, 0) - r(1, 1)).sqrt();
        [a, b, c, d] = [(r(1, 0) - r(0, 1)) / s, (r(0, 2) + r(2, 0)) / s, (r(1, 2) + r(2, 1)) / s, s / 4.0];
    }
    let sign = if a < 0.0 { -1.0 } else { 1.0 };
    Some(([b * sign, c * sign, d * sign], qfac))
}
