//! `scanside threshold`: a mask of the values in a range, or above Otsu's threshold.

use std::path::PathBuf;

use serde_json::json;

use scanside::imaging::threshold::{Inside, otsu_in_parts};
use scanside::nifti::{NiftiSpec, NiftiWriter};
use scanside::volume::{Rescale, Volume, VoxelType};

use super::open::open_volume;
use super::values::{about, check_output, pool};
use super::{Failure, print, print_json};

/// Makes a mask (1 inside, 0 outside) of the values in a range, or of those above Otsu's threshold.
///
/// Both ends of a range belong to it. Otsu's threshold is scikit-image's; the mask is what lies above it. NaN is outside.
///
///   scanside threshold ct.nii.gz bone.nii.gz --lower 200
///   scanside threshold t1.nii.gz head.nii.gz --otsu --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// The image: .nii, .nii.gz, .nrrd, a DICOM file or folder.
    input: PathBuf,
    /// Where the mask goes: .nii or .nii.gz.
    output: PathBuf,
    /// The least value inside.
    #[arg(long, allow_negative_numbers = true, required_unless_present_any = ["upper", "otsu"])]
    lower: Option<f32>,
    /// The greatest value inside.
    #[arg(long, allow_negative_numbers = true)]
    upper: Option<f32>,
    /// Find the threshold that best separates dark from bright.
    #[arg(long, conflicts_with_all = ["lower", "upper"])]
    otsu: bool,
    /// Threads to compute on [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object: the threshold, how much is inside.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    check_output(&arguments.output)?;
    let lower = arguments.lower.unwrap_or(f32::NEG_INFINITY);
    let upper = arguments.upper.unwrap_or(f32::INFINITY);
    if lower.is_nan() || upper.is_nan() || lower > upper {
        return Err(Failure::usage(format!("no value lies between --lower {lower} and --upper {upper}")));
    }
    let pool = pool(arguments.threads);
    let volume = open_volume(&arguments.input)?;
    let about = about(&arguments.input);
    let threshold = match arguments.otsu {
        true => Some(otsu_in_parts(|see| for_each_slice(&volume, see)).map_err(|error| about(&error))?),
        false => None,
    };
    let within = threshold.map_or(Inside::Between(lower, upper), Inside::Above);
    let spec = NiftiSpec {
        shape: volume.shape(),
        volumes: 1,
        affine: volume.affine(),
        voxel: VoxelType::U8,
        rescale: Rescale::IDENTITY,
        repetition_s: 0.0,
    };
    let mut writer = NiftiWriter::create(&arguments.output, &spec, Some(&pool)).map_err(Failure::impossible)?;
    let (mut inside, mut written) = (0, Ok(()));
    for_each_slice(&volume, &mut |values| {
        let mask: Vec<u8> = values.iter().map(|v| u8::from(within.holds(*v))).collect();
        inside += mask.iter().filter(|v| **v != 0).count();
        if written.is_ok() {
            written = writer.write_voxels(&mask);
        }
    });
    written.and_then(|()| writer.finish()).map_err(Failure::impossible)?;
    let volume_ml = inside as f64 * volume.spacing().voxel_mm3() / 1000.0;
    if arguments.json {
        return print_json(&json!({
            "input": arguments.input,
            "output": arguments.output,
            "lower": arguments.lower,
            "upper": arguments.upper,
            "otsu": threshold,
            "voxels": inside,
            "fraction": inside as f64 / volume.grid().voxels().max(1) as f64,
            "volume_ml": volume_ml,
        }));
    }
    let found = threshold.map(|t| format!("threshold {t}, ")).unwrap_or_default();
    print(&format!("{found}{inside} voxels inside, {volume_ml:.2} mL\n"))
}

/// Shows all real values, a slice at a time.
fn for_each_slice(volume: &Volume, see: &mut dyn FnMut(&[f32])) {
    let [slices, rows, columns] = volume.shape();
    let mut slice = vec![0.0; rows * columns];
    for k in 0..slices {
        volume.read_slice_f32(k, &mut slice);
        see(&slice);
        volume.release(k..k + 1);
    }
}
