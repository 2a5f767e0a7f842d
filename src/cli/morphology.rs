//! `scanside morphology`: masks grown, shrunk, opened, closed, filled.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::json;

use scanside::imaging::components::fill_holes;
use scanside::imaging::morphology::{Element, Outside, Shape, close, dilate, erode, open};

use super::open::open_volume;
use super::values::{about, check_output, mask, parse_zyx, pool, write};
use super::{Failure, print, print_json};

/// Changes a mask: dilate, erode, open (erode, then dilate), close (dilate, then erode), or fill its holes.
///
/// The mask is every voxel that is not 0, or that has the label named; the result is 0 and 1. A single slice is treated in
/// two dimensions. Filling sets background that no path through voxel faces joins to the image's border.
///
///   scanside morphology close lungs.nii.gz closed.nii.gz --radius-mm 8
///   scanside morphology dilate mask.nii.gz wide.nii.gz --shape box --radius 0,2,2
///   scanside morphology fill body.nii.gz whole.nii.gz --per-slice
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// What is done.
    #[arg(value_enum)]
    operation: Operation,
    /// The mask or label map: .nii, .nii.gz, .nrrd.
    input: PathBuf,
    /// Where the result goes: .nii or .nii.gz.
    output: PathBuf,
    /// Take only the voxels of this label.
    #[arg(long, allow_negative_numbers = true)]
    label: Option<f64>,
    /// Shape of the structuring element.
    #[arg(long, value_enum, default_value_t = Form::Ball)]
    shape: Form,
    /// Its radius in voxels (one number, or Z,Y,X) [default: 1].
    #[arg(long, value_parser = parse_zyx)]
    radius: Option<[f64; 3]>,
    /// Its radius in millimetres, whatever the spacing.
    #[arg(long, value_name = "MM", conflicts_with = "radius")]
    radius_mm: Option<f64>,
    /// An erosion also eats from the image's border, as SciPy's does by default.
    #[arg(long)]
    border_erodes: bool,
    /// Work within each slice, as on so many pictures: a tube is then filled as well.
    #[arg(long)]
    per_slice: bool,
    /// Threads to compute on [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object about what was done.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Operation {
    /// Grow.
    Dilate,
    /// Shrink.
    Erode,
    /// Erode, then dilate: what is thin goes.
    Open,
    /// Dilate, then erode: gaps go.
    Close,
    /// Fill holes.
    Fill,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// Voxels within the radius.
    Ball,
    /// Voxels within the radius along each axis.
    Box,
    /// Voxels within the radius along one axis.
    Cross,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    check_output(&arguments.output)?;
    let pool = pool(arguments.threads);
    let volume = open_volume(&arguments.input)?;
    let about = about(&arguments.input);
    let before = mask(&volume, &arguments.input, arguments.label)?;
    let shape = match arguments.shape {
        Form::Ball => Shape::Ball,
        Form::Box => Shape::Box,
        Form::Cross => Shape::Cross,
    };
    let mut radius = match arguments.radius_mm {
        Some(mm) => volume.spacing().zyx_mm().map(|s| mm / s),
        None => arguments.radius.unwrap_or([1.0; 3]),
    };
    if volume.shape()[0] == 1 || arguments.per_slice {
        radius[0] = 0.0;
    }
    let element = Element::new(shape, radius).map_err(Failure::usage)?;
    let outside = if arguments.border_erodes { Outside::Background } else { Outside::Neutral };
    let view = before.view();
    let after = match arguments.operation {
        Operation::Dilate => dilate(view, &element, &pool),
        Operation::Erode => erode(view, &element, outside, &pool),
        Operation::Open => open(view, &element, outside, &pool),
        Operation::Close => close(view, &element, outside, &pool),
        Operation::Fill => Ok(fill_holes(view, arguments.per_slice, &pool).map_err(|error| about(&error))?),
    };
    let after = after.map_err(|error| about(&error))?;
    write(&arguments.output, after.view(), volume.affine(), &pool)?;
    let count = |mask: &ndarray::Array3<u8>| mask.iter().filter(|v| **v != 0).count();
    let (was, is) = (count(&before), count(&after));
    if arguments.json {
        return print_json(&json!({
            "input": arguments.input,
            "output": arguments.output,
            "operation": format!("{:?}", arguments.operation).to_lowercase(),
            "shape": format!("{:?}", arguments.shape).to_lowercase(),
            "radius_voxel": radius,
            "voxels_before": was,
            "voxels_after": is,
            "volume_ml": is as f64 * volume.spacing().voxel_mm3() / 1000.0,
        }));
    }
    print(&format!("{was} voxels before, {is} after\n"))
}
