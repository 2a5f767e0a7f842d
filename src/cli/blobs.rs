//! `scanside blobs`: bright round things of any size.

use std::path::PathBuf;

use clap::ValueEnum;
use ndarray::Array3;
use serde_json::json;

use scanside::imaging::blobs::{Method, Search, Unit, find};
use scanside::volume::{Volume, Voxel, VoxelType};
use scanside::with_voxel_type;

use super::open::open_volume;
use super::values::{about, pool, real};
use super::{Failure, print, print_json};

/// Finds bright blobs over a range of sizes, by the difference (or the Laplacian) of Gaussians.
///
/// On voxels of one size the blobs are those of scikit-image's blob_dog (blob_log); where slices are thicker than
/// pixels, blobs are round in millimetres and not in voxels. A blob's radius is its sigma times the root of 3 (of 2 in a
/// single slice). The strongest comes first.
///
///   scanside blobs t1.nii.gz --min-sigma 1 --max-sigma 30 --threshold 0.2 --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// The image: .nii, .nii.gz, .nrrd, a DICOM file or folder.
    input: PathBuf,
    /// The smallest sigma.
    #[arg(long, default_value_t = 1.0, value_name = "SIGMA")]
    min_sigma: f64,
    /// The largest sigma.
    #[arg(long, default_value_t = 50.0, value_name = "SIGMA")]
    max_sigma: f64,
    /// What sigma is measured in.
    #[arg(long, value_enum, default_value_t = SigmaUnit::Voxel)]
    unit: SigmaUnit,
    /// How much a blob must stand out, in the image's own values (see --scale).
    #[arg(long, default_value_t = 0.5, allow_negative_numbers = true)]
    threshold: f64,
    /// Of two blobs that share more than this fraction of the smaller one, the larger stays.
    #[arg(long, default_value_t = 0.5, value_name = "FRACTION")]
    overlap: f64,
    /// From one sigma to the next.
    #[arg(long, default_value_t = 1.6, conflicts_with = "log")]
    sigma_ratio: f64,
    /// The Laplacian of Gaussians instead of their difference: slower, more exact about the size.
    #[arg(long)]
    log: bool,
    /// Sigmas tried by --log.
    #[arg(long, default_value_t = 10, requires = "log", value_name = "N")]
    num_sigma: usize,
    /// Space those sigmas evenly in their logarithm.
    #[arg(long, requires = "log")]
    log_scale: bool,
    /// Drop blobs whose centre is nearer to the border than this many voxels.
    #[arg(long, default_value_t = 0, value_name = "VOXELS")]
    exclude_border: usize,
    /// What is done to the values before: nothing, so that the threshold is in the image's own (a CT's HU).
    #[arg(long, value_enum, default_value_t = Scale::None)]
    scale: Scale,
    /// Threads to compute on [default: all cores]. The blobs do not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SigmaUnit {
    /// The finest of the three voxel spacings; blobs are round in millimetres.
    Voxel,
    /// Millimetres; blobs are round in millimetres.
    Mm,
    /// One index along every axis, as scikit-image has it; where spacings differ, blobs are not round in millimetres.
    Index,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scale {
    /// The real values (slope and intercept applied).
    None,
    /// Integers divided by their type's largest value, as scikit-image's img_as_float does; floats as they are.
    Dtype,
    /// The least value becomes 0 and the greatest 1.
    Range,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let pool = pool(arguments.threads);
    let volume = open_volume(&arguments.input)?;
    let about = about(&arguments.input);
    let values = scaled(&volume, arguments.scale);
    let (grid, affine) = (volume.grid(), volume.affine());
    drop(volume);
    let method = match arguments.log {
        true => Method::Laplacian { scales: arguments.num_sigma, logarithmic: arguments.log_scale },
        false => Method::Difference { ratio: arguments.sigma_ratio },
    };
    let search = Search {
        method,
        sigma_min: arguments.min_sigma,
        sigma_max: arguments.max_sigma,
        unit: match arguments.unit {
            SigmaUnit::Voxel => Unit::Voxel,
            SigmaUnit::Mm => Unit::Millimetre,
            SigmaUnit::Index => Unit::Index,
        },
        threshold: arguments.threshold,
        overlap: arguments.overlap,
        border_voxels: arguments.exclude_border,
    };
    let sigmas = search.sigmas().map_err(Failure::usage)?;
    let blobs = find(values.view(), grid.spacing(), &search, &pool).map_err(|error| about(&error))?;
    if arguments.json {
        let list: Vec<_> = blobs
            .iter()
            .map(|b| {
                json!({
                    "centre_lps_mm": affine.kji_to_lps(b.centre_voxel),
                    "centre_voxel": b.centre_voxel,
                    "peak_voxel": b.peak_voxel,
                    "sigma": b.sigma,
                    "sigma_mm": b.sigma_mm,
                    "radius_mm": b.radius_mm,
                    "response": b.response,
                })
            })
            .collect();
        return print_json(&json!({
            "input": arguments.input,
            "shape": grid.shape,
            "spacing_mm": grid.spacing().zyx_mm(),
            "method": if arguments.log { "laplacian_of_gaussian" } else { "difference_of_gaussians" },
            "unit": format!("{:?}", arguments.unit).to_lowercase(),
            "scale": format!("{:?}", arguments.scale).to_lowercase(),
            "sigmas": sigmas,
            "threshold": arguments.threshold,
            "overlap": arguments.overlap,
            "count": blobs.len(),
            "blobs": list,
        }));
    }
    let mut text = format!("{} blobs\n", blobs.len());
    if !blobs.is_empty() {
        text += "    k      j      i          x mm      y mm      z mm  radius mm    response\n";
    }
    for b in &blobs {
        let [k, j, i] = b.centre_voxel;
        let [x, y, z] = affine.kji_to_lps(b.centre_voxel);
        text +=
            &format!("{k:6.1} {j:6.1} {i:6.1}    {x:10.2}{y:10.2}{z:10.2} {:10.2} {:11.5}\n", b.radius_mm, b.response);
    }
    print(&text)
}

fn scaled(volume: &Volume, scale: Scale) -> Array3<f32> {
    let largest = match volume.voxel_type() {
        VoxelType::U8 => 255.0,
        VoxelType::I8 => 127.0,
        VoxelType::U16 => 65_535.0,
        VoxelType::I16 => 32_767.0,
        VoxelType::U32 => f64::from(u32::MAX),
        VoxelType::I32 => f64::from(i32::MAX),
        VoxelType::F32 | VoxelType::F64 => {
            return if scale == Scale::Range { to_range(real(volume)) } else { real(volume) };
        }
    };
    match scale {
        Scale::None => real(volume),
        Scale::Range => to_range(real(volume)),
        Scale::Dtype => with_voxel_type!(volume.voxel_type(), T => {
            let stored = volume.stored::<T>().expect("the type is the volume's");
            stored.mapv(|v| (v.to_f64() / largest).max(-1.0) as f32)
        }),
    }
}

fn to_range(mut values: Array3<f32>) -> Array3<f32> {
    let finite = || values.iter().filter(|v| v.is_finite());
    let low = finite().fold(f32::INFINITY, |a, b| a.min(*b));
    let high = finite().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    if high > low {
        values.mapv_inplace(|v| (v - low) / (high - low));
    }
    values
}
