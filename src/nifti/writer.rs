//! NIfTI out: the header first, then voxels as they come, in bounded memory; the file gets its name when it is whole.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use ndarray::ArrayView3;

use super::deflate::GzipWriter;
use super::header::quaternion_of;
use super::{ImageFileError, code_of};
use crate::geometry::{Affine, norm};
use crate::pool::Pool;
use crate::volume::{Rescale, Volume, Voxel, VoxelType};
use crate::with_voxel_type;

/// What is to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct NiftiSpec {
    /// `[slices, rows, columns]` of one volume.
    pub shape: [usize; 3],
    /// Volumes; 1 writes a 3-D file.
    pub volumes: usize,
    /// `(i, j, k)` to LPS millimetres.
    pub affine: Affine,
    /// What one voxel is.
    pub voxel: VoxelType,
    /// From stored to real values, kept as `scl_slope` and `scl_inter`.
    pub rescale: Rescale,
    /// Time between volumes in seconds, 0 where there is none.
    pub repetition_s: f64,
}

const BUFFER_BYTES: usize = 256 << 10;

#[derive(Debug)]
enum Out<'p> {
    Plain(BufWriter<File>),
    Gzip(GzipWriter<'p, BufWriter<File>>),
}

impl Out<'_> {
    fn as_write(&mut self) -> &mut dyn Write {
        match self {
            Self::Plain(out) => out,
            Self::Gzip(out) => out,
        }
    }
}

/// A NIfTI file being written: `.nii`, or `.nii.gz` by its name. NIfTI-1 where it can hold the shape, else NIfTI-2.
///
/// Voxels are given in the file's order: columns fastest, then rows, slices, volumes. Dropped before [`NiftiWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct NiftiWriter<'p> {
    path: PathBuf,
    partial: PathBuf,
    out: Option<Out<'p>>,
    expected: u64,
    written: u64,
    voxel: VoxelType,
}

impl<'p> NiftiWriter<'p> {
    /// Begins a file. A `.nii.gz` is packed on the pool, if there is one; its bytes do not depend on that.
    ///
    /// # Errors
    /// [`ImageFileError::Io`].
    pub fn create(path: &Path, spec: &NiftiSpec, pool: Option<&'p Pool>) -> Result<Self, ImageFileError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        let gzip = name.to_string_lossy().ends_with(".gz");
        name.push(format!(".{}.partial", std::process::id()));
        let partial = path.with_file_name(name);
        let io = |source| ImageFileError::Io { doing: "write", path: path.to_owned(), source };
        let file = File::create(&partial).map_err(io)?;
        let buffered = BufWriter::with_capacity(BUFFER_BYTES, file);
        let mut out = match gzip {
            true => Out::Gzip(GzipWriter::new(buffered, pool).map_err(io)?),
            false => Out::Plain(buffered),
        };
        let voxels = spec.shape.iter().map(|n| *n as u64).product::<u64>() * spec.volumes as u64;
        let header = encode(spec);
        let begun = out.as_write().write_all(&header);
        let writer = Self {
            path: path.to_owned(),
            partial,
            out: Some(out),
            expected: voxels * spec.voxel.bytes() as u64,
            written: 0,
            voxel: spec.voxel,
        };
        begun.map_err(io)?;
        Ok(writer)
    }

    /// The next voxels, stored values in little-endian bytes.
    ///
    /// # Errors
    /// [`ImageFileError::Io`].
    pub fn write_stored(&mut self, bytes: &[u8]) -> Result<(), ImageFileError> {
        self.written += bytes.len() as u64;
        let out = self.out.as_mut().expect("only `finish` takes it").as_write();
        out.write_all(bytes).map_err(|source| ImageFileError::Io { doing: "write", path: self.path.clone(), source })
    }

    /// The next voxels.
    ///
    /// # Errors
    /// [`ImageFileError::Io`].
    ///
    /// # Panics
    /// When `T` is not the type of the file.
    pub fn write_voxels<T: Voxel>(&mut self, voxels: &[T]) -> Result<(), ImageFileError> {
        assert_eq!(T::TYPE, self.voxel);
        self.write_stored(crate::volume::bytes_of_voxels(voxels))
    }

    /// Ends the file and gives it its name.
    ///
    /// # Errors
    /// [`ImageFileError::Io`], also when fewer or more voxels were written than announced.
    pub fn finish(mut self) -> Result<(), ImageFileError> {
        let done = match self.out.take().expect("`finish` takes it once") {
            _ if self.written != self.expected => {
                let text = format!("{} bytes of voxels instead of {}", self.written, self.expected);
                Err(io::Error::new(io::ErrorKind::InvalidInput, text))
            }
            Out::Plain(mut out) => out.flush(),
            Out::Gzip(out) => out.finish().and_then(|mut out| out.flush()),
        };
        done.and_then(|()| std::fs::rename(&self.partial, &self.path))
            .map_err(|source| ImageFileError::Io { doing: "write", path: self.path.clone(), source })
    }
}

impl Drop for NiftiWriter<'_> {
    fn drop(&mut self) {
        // After `finish` the name is gone and this does nothing.
        let _ = std::fs::remove_file(&self.partial);
    }
}

/// Writes a volume, slice by slice: `.nii`, or `.nii.gz` by the name.
///
/// # Errors
/// [`ImageFileError::Io`].
pub fn write(path: &Path, volume: &Volume, pool: Option<&Pool>) -> Result<(), ImageFileError> {
    let spec = NiftiSpec {
        shape: volume.shape(),
        volumes: 1,
        affine: volume.affine(),
        voxel: volume.voxel_type(),
        rescale: volume.rescale(),
        repetition_s: 0.0,
    };
    let mut writer = NiftiWriter::create(path, &spec, pool)?;
    write_slices(&mut writer, volume)?;
    writer.finish()
}

/// Appends all slices of a volume.
fn write_slices(writer: &mut NiftiWriter<'_>, volume: &Volume) -> Result<(), ImageFileError> {
    with_voxel_type!(volume.voxel_type(), T => {
        for k in 0..volume.shape()[0] {
            let slice = volume.stored_slice::<T>(k).expect("the type is the volume's");
            writer.write_voxels(slice.as_slice().expect("a slice is contiguous"))?;
            volume.release(k..k + 1);
        }
    });
    Ok(())
}

impl NiftiWriter<'_> {
    /// The next volume, slice by slice.
    ///
    /// # Errors
    /// [`ImageFileError::Io`].
    ///
    /// # Panics
    /// When its voxels are not of the file's type.
    pub fn write_volume(&mut self, volume: &Volume) -> Result<(), ImageFileError> {
        write_slices(self, volume)
    }
}

/// Writes an array `[k, j, i]`: `.nii`, or `.nii.gz` by the name.
///
/// # Errors
/// [`ImageFileError::Io`].
pub fn write_array<T: Voxel>(
    path: &Path,
    voxels: ArrayView3<'_, T>,
    affine: Affine,
    rescale: Rescale,
    pool: Option<&Pool>,
) -> Result<(), ImageFileError> {
    let (z, y, x) = voxels.dim();
    let spec = NiftiSpec { shape: [z, y, x], volumes: 1, affine, voxel: T::TYPE, rescale, repetition_s: 0.0 };
    let mut writer = NiftiWriter::create(path, &spec, pool)?;
    for slice in voxels.outer_iter() {
        writer.write_voxels(slice.as_standard_layout().as_slice().expect("standard layout"))?;
    }
    writer.finish()
}

/// The header, its four bytes of "no extension" included.
fn encode(spec: &NiftiSpec) -> Vec<u8> {
    let [z, y, x] = spec.shape;
    let dim = [if spec.volumes > 1 { 4 } else { 3 }, x, y, z, spec.volumes, 1, 1, 1];
    let v1 = dim.iter().all(|n| *n <= i16::MAX as usize);
    let rows = spec.affine.rows();
    let sign = [-1.0, -1.0, 1.0];
    let ras: [[f64; 4]; 3] = std::array::from_fn(|r| rows[r].map(|v| if v == 0.0 { 0.0 } else { sign[r] * v }));
    let lengths: [f64; 3] = std::array::from_fn(|c| norm(spec.affine.step(c)));
    let units = std::array::from_fn(|c| std::array::from_fn(|r| ras[r][c] / lengths[c]));
    let quaternion = quaternion_of(units);
    let (bcd, qfac) = quaternion.unwrap_or(([0.0; 3], 1.0));
    let pixdim = [qfac, lengths[0], lengths[1], lengths[2], spec.repetition_s, 1.0, 1.0, 1.0];
    let code = code_of(spec.voxel);
    // Millimetres and seconds.
    let unit_codes = if spec.volumes > 1 { 10u8 } else { 2u8 };
    // Scanner coordinates; a sheared affine fits no quaternion, and the sform alone tells it.
    let (sform_code, qform_code) = (1i16, i16::from(quaternion.is_some()));
    let mut h = vec![0u8; if v1 { 352 } else { 544 }];
    let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
    if v1 {
        let f = |v: f64| (v as f32).to_le_bytes();
        put(0, &348i32.to_le_bytes());
        // Readers of ANALYZE look for this letter.
        put(38, b"r");
        for n in 0..8 {
            put(40 + 2 * n, &(dim[n] as i16).to_le_bytes());
            put(76 + 4 * n, &f(pixdim[n]));
        }
        put(70, &code.to_le_bytes());
        put(72, &(spec.voxel.bytes() as i16 * 8).to_le_bytes());
        put(108, &f(352.0));
        put(112, &f(spec.rescale.slope));
        put(116, &f(spec.rescale.intercept));
        put(123, &[unit_codes]);
        put(148, b"scanside");
        put(252, &qform_code.to_le_bytes());
        put(254, &sform_code.to_le_bytes());
        for n in 0..3 {
            put(256 + 4 * n, &f(bcd[n]));
            put(268 + 4 * n, &f(ras[n][3]));
            for c in 0..4 {
                put(280 + 16 * n + 4 * c, &f(ras[n][c]));
            }
        }
        put(344, b"n+1\0");
    } else {
        put(0, &540i32.to_le_bytes());
        put(4, b"n+2\0\r\n\x1a\n");
        put(12, &code.to_le_bytes());
        put(14, &(spec.voxel.bytes() as i16 * 8).to_le_bytes());
        for n in 0..8 {
            put(16 + 8 * n, &(dim[n] as i64).to_le_bytes());
            put(104 + 8 * n, &pixdim[n].to_le_bytes());
        }
        put(168, &544i64.to_le_bytes());
        put(176, &spec.rescale.slope.to_le_bytes());
        put(184, &spec.rescale.intercept.to_le_bytes());
        put(240, b"scanside");
        put(344, &i32::from(qform_code).to_le_bytes());
        put(348, &i32::from(sform_code).to_le_bytes());
        for n in 0..3 {
            put(352 + 8 * n, &bcd[n].to_le_bytes());
            put(376 + 8 * n, &ras[n][3].to_le_bytes());
            for c in 0..4 {
                put(400 + 32 * n + 8 * c, &ras[n][c].to_le_bytes());
            }
        }
        put(500, &i32::from(unit_codes).to_le_bytes());
    }
    h
}
