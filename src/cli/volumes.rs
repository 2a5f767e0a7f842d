//! The volumes of a series, one after the other: 4-D NIfTI, DICOM with several images at each place.

use std::path::Path;

use scanside::dicom::tags;
use scanside::geometry::Grid;
use scanside::nifti::NiftiReader;
use scanside::series::files::{FileSeries, Loaded};
use scanside::volume::{Rescale, Volume, VoxelType};

use super::Failure;
use super::open::{Image, choose, incomplete, look, notes};

/// An image as one volume after the other, never all at once.
pub enum Volumes {
    /// A single one.
    One(Volume),
    /// A NIfTI file.
    Nifti(Box<NiftiReader>),
    /// The passes of a DICOM series.
    Series(Vec<FileSeries>),
}

impl Volumes {
    /// Opens whatever is at `path`; of several DICOM series the one named, else the largest. `tolerant` takes a series with
    /// gaps or uneven spacing, saying so.
    ///
    /// # Errors
    /// As `open::look` and `open::choose`; [`Failure::Impossible`] for a series that is no even stack.
    pub fn open(path: &Path, named: Option<&str>, tolerant: bool) -> Result<Self, Failure> {
        let input = path.display();
        let scan = match look(path)? {
            Image::Nrrd(volume) => return Ok(Self::One(volume)),
            Image::Nifti(reader) => {
                if reader.header().forms_disagree {
                    eprintln!("scanside: {input}: sform and qform disagree; the sform is taken");
                }
                return Ok(Self::Nifti(reader));
            }
            Image::Dicom(scan) => scan,
        };
        let mut series = choose(scan, path, named)?;
        let passes = series.passes();
        let mut all = if passes.len() > 1 && series.arrange().is_err() { passes } else { vec![series] };
        let mut grids = Vec::new();
        for (n, one) in all.iter_mut().enumerate() {
            let arrangement = one.arrange().map_err(Failure::impossible)?;
            if n == 0 {
                notes(&arrangement).iter().for_each(|note| eprintln!("scanside: {input}: {note}"));
            }
            match incomplete(&arrangement) {
                Some(why) if !tolerant => {
                    return Err(Failure::impossible(format!("{input}: {why} (scanside convert --accept-incomplete takes it all the same)")));
                }
                Some(why) => eprintln!("scanside: {input}: {why}"),
                None => {}
            }
            grids.push(arrangement.grid);
        }
        if grids.iter().any(|grid| *grid != grids[0]) {
            let text = format!("{input}: the volumes of the series have different places");
            return Err(Failure::impossible(text));
        }
        Ok(Self::Series(all))
    }

    /// How many volumes there are.
    pub fn count(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Nifti(reader) => reader.header().volumes(),
            Self::Series(all) => all.len(),
        }
    }

    /// Volume `n`, from 0.
    ///
    /// # Errors
    /// [`Failure::Impossible`] when it cannot be read.
    pub fn get(&mut self, n: usize) -> Result<Volume, Failure> {
        match self {
            Self::One(volume) => Ok(volume.clone()),
            Self::Nifti(reader) => reader.volume(n).map_err(Failure::impossible),
            Self::Series(all) => {
                let Loaded { volume, .. } = all[n].load().map_err(Failure::impossible)?;
                Ok(volume)
            }
        }
    }

    /// Type and rescale that hold all volumes without loss: their own where all agree, else real values.
    ///
    /// # Errors
    /// [`Failure::Impossible`] for frames that are no stack.
    pub fn voxel(&mut self) -> Result<(VoxelType, Rescale), Failure> {
        match self {
            Self::One(volume) => Ok((volume.voxel_type(), volume.rescale())),
            Self::Nifti(reader) => Ok((reader.header().data_type.voxel_type(), reader.header().rescale)),
            Self::Series(all) => {
                let mut found = Vec::new();
                for one in all {
                    let arrangement = one.arrange().map_err(Failure::impossible)?;
                    found.push(arrangement.voxel(one.records()));
                }
                let same = found.iter().all(|v| *v == found[0]);
                Ok(if same { found[0] } else { (VoxelType::F32, Rescale::IDENTITY) })
            }
        }
    }

    /// Real values of volume `n`, in the file's order.
    ///
    /// # Errors
    /// As [`Volumes::get`].
    ///
    /// # Panics
    /// When `out` is not one volume long.
    pub fn read_f32(&mut self, n: usize, out: &mut [f32]) -> Result<(), Failure> {
        if let Self::Nifti(reader) = self {
            // Without a volume between: a gzipped series is read on from where it is.
            return reader.read_f32((n * out.len()) as u64, out).map_err(Failure::impossible);
        }
        let volume = self.get(n)?;
        let [_, rows, columns] = volume.shape();
        for (k, slice) in out.chunks_exact_mut(rows * columns).enumerate() {
            volume.read_slice_f32(k, slice);
        }
        Ok(())
    }

    /// Where the voxels of all volumes are.
    ///
    /// # Errors
    /// [`Failure::Impossible`] for frames that are no stack.
    pub fn grid(&mut self) -> Result<Grid, Failure> {
        Ok(match self {
            Self::One(volume) => volume.grid(),
            Self::Nifti(reader) => Grid { shape: reader.header().volume_shape(), affine: reader.header().affine },
            Self::Series(all) => all[0].arrange().map_err(Failure::impossible)?.grid,
        })
    }

    /// Time between volumes in seconds; 0 where it is not known.
    pub fn repetition_s(&self) -> f64 {
        match self {
            Self::Nifti(reader) => reader.header().repetition_s().unwrap_or(0.0),
            Self::Series(all) => {
                let text = all[0].text(&[tags::REPETITION_TIME]).ok().and_then(|mut t| t.swap_remove(0));
                text.and_then(|t| t.parse::<f64>().ok()).map_or(0.0, |ms| ms / 1000.0)
            }
            Self::One(_) => 0.0,
        }
    }
}
