//! NIfTI-1 and NIfTI-2 in and out, 3-D and 4-D, plain and gzipped, in bounded memory.
//!
//! In memory an array is `[k, j, i]`, which is the order of the file; nothing is ever flipped. Affines are LPS here and
//! RAS in the file. Sources: nifti1.h, nifti2.h (nifti.nimh.nih.gov).

mod deflate;
mod header;
pub(crate) mod source;
mod writer;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

pub use header::{AffineSource, DataType, NiftiHeader};
pub use writer::{NiftiSpec, NiftiWriter, write, write_array};

use self::source::ByteSource;
use crate::geometry::Grid;
use crate::volume::{Rescale, Volume, VolumeError, VoxelType};
use crate::with_voxel_type;

/// A NIfTI or NRRD file that cannot be used, or a disk that would not do.
#[derive(Debug, thiserror::Error)]
pub enum ImageFileError {
    /// The system's answer, with the file and what was done to it.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// `open`, `read`, `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A header field that cannot be.
    #[error("{}: header field {field}: {why}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Name of the field, as nifti1.h or the NRRD format has it.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// One volume was wanted of a file that has several.
    #[error("{}: a series of {volumes} volumes where one is wanted", path.display())]
    Series {
        /// The file.
        path: PathBuf,
        /// How many it has.
        volumes: usize,
    },
    /// The voxels cannot be kept.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// An open NIfTI file: its header, and its voxels in any range.
///
/// Reading forwards streams; reading backwards in a gzipped file inflates it from its start again.
#[derive(Debug)]
pub struct NiftiReader {
    path: PathBuf,
    header: NiftiHeader,
    source: ByteSource,
    bytes: Vec<u8>,
}

/// Voxels converted at a time: small enough to stay in the cache.
const BLOCK_VOXELS: usize = 1 << 15;

impl NiftiReader {
    /// Opens a `.nii` or `.nii.gz` (told by its bytes, not by its name) and checks that the file can hold what its header claims.
    ///
    /// # Errors
    /// [`ImageFileError::Io`], [`ImageFileError::Header`].
    pub fn open(path: &Path) -> Result<Self, ImageFileError> {
        let io = |doing| move |source| ImageFileError::Io { doing, path: path.to_owned(), source };
        let mut source = ByteSource::open(path).map_err(io("open"))?;
        let start = source.start(header::HEADER_BYTES).map_err(io("read"))?;
        let lies = |field, why| ImageFileError::Header { path: path.to_owned(), field, why };
        let header = NiftiHeader::parse(&start).map_err(|bad| lies(bad.field, bad.why))?;
        let end = header.voxels() * header.data_type.bytes() as u64 + header.voxels_at;
        if !source.can_hold(end) {
            return Err(lies("dim", format!("{:?} voxels are more than the file can hold", header.shape)));
        }
        Ok(Self { path: path.to_owned(), header, source, bytes: Vec::new() })
    }

    /// What the file says about itself.
    pub fn header(&self) -> &NiftiHeader {
        &self.header
    }

    /// Stored values of the voxels from `start` (counted through all volumes, in the file's order), little endian, of
    /// `header().data_type.voxel_type()`.
    ///
    /// # Errors
    /// [`ImageFileError::Io`], also when the file ends before its header says.
    ///
    /// # Panics
    /// When `out` is no whole number of voxels or goes beyond the last.
    pub fn read_stored(&mut self, start: u64, out: &mut [u8]) -> Result<(), ImageFileError> {
        let data_type = self.header.data_type;
        let width = data_type.bytes();
        assert!(out.len() % width == 0 && start + (out.len() / width) as u64 <= self.header.voxels());
        let at = self.header.voxels_at + start * width as u64;
        let io = |source| ImageFileError::Io { doing: "read", path: self.path.clone(), source };
        self.source.read_at(at, out).map_err(io)?;
        if self.header.big_endian && width > 1 {
            out.chunks_exact_mut(width).for_each(<[u8]>::reverse);
        }
        match data_type {
            DataType::Plain(_) => {}
            // 64-bit integers become floats in place: both have eight bytes.
            DataType::I64 => out.chunks_exact_mut(8).for_each(|b| {
                let v = i64::from_le_bytes((&*b).try_into().expect("chunks of 8")) as f64;
                b.copy_from_slice(&v.to_le_bytes());
            }),
            DataType::U64 => out.chunks_exact_mut(8).for_each(|b| {
                let v = u64::from_le_bytes((&*b).try_into().expect("chunks of 8")) as f64;
                b.copy_from_slice(&v.to_le_bytes());
            }),
        }
        Ok(())
    }

    /// Real values (scaled) of the voxels from `start`.
    ///
    /// # Errors
    /// As [`NiftiReader::read_stored`].
    ///
    /// # Panics
    /// When `out` goes beyond the last voxel.
    pub fn read_f32(&mut self, start: u64, out: &mut [f32]) -> Result<(), ImageFileError> {
        let Rescale { slope, intercept } = self.header.rescale;
        let voxel = self.header.data_type.voxel_type();
        let mut bytes = std::mem::take(&mut self.bytes);
        for (n, block) in out.chunks_mut(BLOCK_VOXELS).enumerate() {
            bytes.resize(block.len() * self.header.data_type.bytes(), 0);
            self.read_stored(start + (n * BLOCK_VOXELS) as u64, &mut bytes)?;
            with_voxel_type!(voxel, T => {
                for (o, b) in block.iter_mut().zip(bytes.chunks_exact(size_of::<T>())) {
                    let v = T::from_le_bytes(b.try_into().expect("chunks of that size"));
                    *o = (f64::from(v) * slope + intercept) as f32;
                }
            });
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Volume `t` (from 0). A plain little-endian file is mapped, not copied; others are read slice by slice.
    ///
    /// # Errors
    /// As [`NiftiReader::read_stored`], and [`ImageFileError::Volume`] when there is no room for a temporary file.
    ///
    /// # Panics
    /// When there is no volume `t`.
    pub fn volume(&mut self, t: usize) -> Result<Volume, ImageFileError> {
        assert!(t < self.header.volumes(), "volume {t} of {}", self.header.volumes());
        let h = &self.header;
        let (grid, rescale) = (Grid { shape: h.volume_shape(), affine: h.affine }, h.rescale);
        let voxel = h.data_type.voxel_type();
        let start = (t * grid.voxels()) as u64;
        let at = h.voxels_at + start * h.data_type.bytes() as u64;
        let plain = !self.source.is_gzip() && !h.big_endian && h.data_type == DataType::Plain(voxel);
        if plain && at % voxel.bytes() as u64 == 0 {
            return Ok(Volume::open_at(&self.path, at as usize, grid, voxel, rescale)?);
        }
        let slice = (grid.shape[1] * grid.shape[2]) as u64;
        Volume::build(grid, voxel, rescale, |k, out| self.read_stored(start + k as u64 * slice, out))
    }
}

/// Reads a file with one volume (a fourth dimension of 1 is no series).
///
/// # Errors
/// [`ImageFileError`]; [`ImageFileError::Series`] for a file with more than one.
pub fn read(path: &Path) -> Result<Volume, ImageFileError> {
    let mut reader = NiftiReader::open(path)?;
    match reader.header().volumes() {
        1 => reader.volume(0),
        volumes => Err(ImageFileError::Series { path: path.to_owned(), volumes }),
    }
}

/// NIfTI's code of a type that a volume holds.
pub(crate) fn code_of(voxel: VoxelType) -> i16 {
    match voxel {
        VoxelType::U8 => 2,
        VoxelType::I16 => 4,
        VoxelType::I32 => 8,
        VoxelType::F32 => 16,
        VoxelType::F64 => 64,
        VoxelType::I8 => 256,
        VoxelType::U16 => 512,
        VoxelType::U32 => 768,
    }
}
