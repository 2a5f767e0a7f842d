//! `scanside resample`: another spacing, another image's grid, another orientation.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::json;

use scanside::geometry::{Grid, Spacing};
use scanside::imaging::resample::{
    Interpolation, Reorientation, grid_of_spacing, orientation, resample, resample_nearest,
};
use scanside::nifti::write_array;
use scanside::with_voxel_type;

use super::open::open_volume;
use super::values::{about, check_output, parse_zyx, pool, real, write, write_as};
use super::{Failure, print, print_json};

/// Puts an image on another grid: another spacing, the grid of another image, another orientation.
///
/// A new spacing keeps the first voxel where it is. An orientation reorders voxels and changes no value; its letters say
/// towards what columns, rows and slices run: LPS is DICOM's axial order, RAS the usual one of NIfTI. Values are
/// SimpleITK's; integers are rounded to the nearest unless --float. Label maps want --interpolation nearest.
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
enum How {
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
    let from = volume.affine();
    if arguments.interpolation == How::Nearest && !arguments.float {
        let rescale = volume.rescale();
        with_voxel_type!(volume.voxel_type(), T => {
            let stored = volume.stored::<T>().expect("the type is the volume's");
            let outside = <T as scanside::volume::Voxel>::from_f64((arguments.outside - rescale.intercept) / rescale.slope);
            let out = resample_nearest(stored, &from, &to, outside, &pool).map_err(|error| about(&error))?;
            write_array(&arguments.output, out.view(), to.affine, rescale, Some(&pool)).map_err(Failure::impossible)?;
        });
        return tell(&arguments, &to);
    }
    let how = match arguments.interpolation {
        How::Nearest => Interpolation::Nearest,
        How::Linear => Interpolation::Linear,
        How::Cubic => Interpolation::Cubic,
    };
    let values = real(&volume);
    let out =
        resample(values.view(), &from, &to, how, arguments.outside as f32, &pool).map_err(|error| about(&error))?;
    match arguments.float {
        true => write(&arguments.output, out.view(), to.affine, &pool)?,
        false => write_as(&arguments.output, out.view(), to.affine, &volume, &pool)?,
    }
    tell(&arguments, &to)
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
