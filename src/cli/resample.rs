//! `scanside resample`: another spacing, another image's grid, another orientation.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::json;

use scanside::geometry::{Affine, Grid, Spacing};
use scanside::imaging::resample::{
    Interpolation, Reorientation, Slabs, grid_of_spacing, nearest_slab, orientation, resample,
};
use scanside::nifti::{NiftiSpec, NiftiWriter, write_array};
use scanside::pool::Pool;
use scanside::volume::{Rescale, Volume, Voxel, VoxelType};
use scanside::with_voxel_type;

use super::open::open_volume;
use super::values::{about, check_output, parse_zyx, pool, real, stored_like, write_real};
use super::{Failure, Steps, print, print_json};

/// Puts an image on another grid: another spacing, the grid of another image, another orientation.
///
/// A new spacing keeps the first voxel where it is. An orientation reorders voxels and changes no value; its letters say
/// towards what columns, rows and slices run: LPS is DICOM's axial order, RAS the usual one of NIfTI. Values are
/// SimpleITK's; integers are rounded to the nearest unless --float. Label maps want --interpolation nearest. Volumes larger
/// than memory are taken some slices at a time (but for cubic values, which each voxel has a part in).
///
///   scanside resample ct-series/ iso.nii.gz --spacing 1
///   scanside resample flair.nii.gz on-t1.nii.gz --like t1.nii.gz --interpolation cubic
///   scanside resample labels.nii.gz out.nii.gz --like ct.nii.gz --interpolation nearest
///   scanside resample t1.nii.gz t1-ras.nii.gz --orient RAS
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
#[command(group(clap::ArgGroup::new("target").required(true).args(["spacing", "like", "orient"])))]
pub struct Arguments {
    /// The image: .nii, .nii.gz, .nrrd, a DICOM file or folder.
    input: PathBuf,
    /// Where the result goes: .nii or .nii.gz.
    output: PathBuf,
    /// Distance between voxel centres in millimetres (one number, or Z,Y,X).
    #[arg(long, value_name = "MM", value_parser = parse_zyx)]
    spacing: Option<[f64; 3]>,
    /// An image whose grid is taken.
    #[arg(long, value_name = "IMAGE")]
    like: Option<PathBuf>,
    /// Three letters, as LPS or RAS.
    #[arg(long, value_name = "CODE")]
    orient: Option<String>,
    /// How values between voxels are made.
    #[arg(long, value_enum, default_value_t = How::Linear, conflicts_with = "orient")]
    interpolation: How,
    /// The value beyond the image.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    outside: f64,
    /// Write 32-bit floats, whatever the image's type.
    #[arg(long, conflicts_with = "orient")]
    float: bool,
    /// Threads to compute on [default: all cores]. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object: the new geometry.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// The nearest voxel's value: for labels.
    Nearest,
    /// Linear between the eight voxels around.
    Linear,
    /// The cubic B-spline through all voxels.
    Cubic,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    check_output(&arguments.output)?;
    let pool = pool(arguments.threads);
    let spacing = arguments.spacing.map(Spacing::new).transpose().map_err(Failure::usage)?;
    let volume = open_volume(&arguments.input)?;
    let about = about(&arguments.input);
    if let Some(code) = &arguments.orient {
        let order = Reorientation::new(&volume.grid(), code).map_err(Failure::usage)?;
        with_voxel_type!(volume.voxel_type(), T => {
            let stored = order.apply(volume.stored::<T>().expect("the type is the volume's"));
            write_array(&arguments.output, stored.view(), order.grid.affine, volume.rescale(), Some(&pool)).map_err(Failure::impossible)?;
        });
        return tell(&arguments, &order.grid);
    }
    let to = match (spacing, &arguments.like) {
        (Some(spacing), _) => grid_of_spacing(&volume.grid(), spacing).map_err(|error| about(&error))?,
        (None, Some(path)) => open_volume(path)?.grid(),
        (None, None) => unreachable!("the group asks for one of the three"),
    };
    let job = Job {
        volume: &volume,
        how: arguments.interpolation,
        places: to,
        affine: to.affine,
        outside: arguments.outside,
        float: arguments.float,
    };
    job.write(&arguments.input, &arguments.output, &pool)?;
    tell(&arguments, &to)
}

/// An image on another grid, into a file.
pub struct Job<'a> {
    /// The image.
    pub volume: &'a Volume,
    /// How values between voxels are made.
    pub how: How,
    /// Where in the image's space the new voxels are.
    pub places: Grid,
    /// Where the file says they are: elsewhere, when a registration has moved them.
    pub affine: Affine,
    /// The value beyond the image.
    pub outside: f64,
    /// 32-bit floats, whatever the image's type.
    pub float: bool,
}

/// Bytes of real values made at a time: enough to share among the threads, little beside a volume.
const SLAB_BYTES: usize = 16 << 20;

impl Job<'_> {
    /// Writes it, some slices at a time.
    ///
    /// # Errors
    /// [`Failure::Impossible`] for a grid too large or a disk that would not do.
    pub fn write(&self, input: &Path, output: &Path, pool: &Pool) -> Result<(), Failure> {
        let about = about(input);
        let volume = self.volume;
        let nearest = self.how == How::Nearest && !self.float;
        let (voxel, rescale) = match (nearest, self.float) {
            (true, _) => (volume.voxel_type(), volume.rescale()),
            (_, true) => (VoxelType::F32, Rescale::IDENTITY),
            _ => stored_like(volume),
        };
        let spec =
            NiftiSpec { shape: self.places.shape, volumes: 1, affine: self.affine, voxel, rescale, repetition_s: 0.0 };
        let slabs = Slabs::new(&volume.grid(), &self.places, self.outside as f32).map_err(|error| about(&error))?;
        // A cubic value has a part of every voxel; nearest ones as floats are a rarity not worth a way of their own.
        let whole = match self.how {
            How::Cubic => Some(Interpolation::Cubic),
            How::Nearest if self.float => Some(Interpolation::Nearest),
            _ => None,
        };
        let whole = whole.map(|how| {
            resample(real(volume).view(), &volume.affine(), &self.places, how, self.outside as f32, pool)
        });
        let whole = whole.transpose().map_err(|error| about(&error))?;
        let mut writer = NiftiWriter::create(output, &spec, Some(pool)).map_err(Failure::impossible)?;
        let [slices, rows, columns] = self.places.shape;
        let step = (SLAB_BYTES / (4 * rows * columns).max(1)).max(pool.threads());
        let steps = Steps::new();
        for start in (0..slices).step_by(step) {
            let new = start..(start + step).min(slices);
            let old = slabs.needs(&new);
            match &whole {
                Some(whole) => {
                    let part = whole.slice(ndarray::s![new.clone(), .., ..]);
                    write_real(&mut writer, part.as_slice().expect("whole slices"), (voxel, rescale))?;
                }
                None if nearest => with_voxel_type!(voxel, T => {
                    let stored = volume.stored::<T>().expect("the type is the volume's");
                    let outside = T::from_f64((self.outside - rescale.intercept) / rescale.slope);
                    let out = nearest_slab(stored, &volume.affine(), &self.places, new.clone(), outside, pool);
                    let out = out.map_err(|error| about(&error))?;
                    writer.write_voxels(out.as_slice().expect("made here")).map_err(Failure::impossible)?;
                }),
                None => {
                    let values = volume.to_f32(old.clone());
                    let out = slabs.slab(values.view(), old.start, new.clone(), pool).map_err(|error| about(&error))?;
                    write_real(&mut writer, out.as_slice().expect("made here"), (voxel, rescale))?;
                }
            }
            volume.release(0..old.start);
            steps.show("slices", new.end, slices);
        }
        steps.clear();
        writer.finish().map_err(Failure::impossible)
    }
}

fn tell(arguments: &Arguments, grid: &Grid) -> Result<(), Failure> {
    let code = orientation(&grid.affine);
    if arguments.json {
        return print_json(&json!({
            "input": arguments.input,
            "output": arguments.output,
            "shape": grid.shape,
            "spacing_mm": grid.spacing().zyx_mm(),
            "orientation": code,
            "affine_lps": grid.affine.to_row_major(),
        }));
    }
    let ([z, y, x], [dz, dy, dx]) = (grid.shape, grid.spacing().zyx_mm());
    print(&format!("{z} slices of {y} x {x}, {dz:.3} x {dy:.3} x {dx:.3} mm, {code}\n"))
}
