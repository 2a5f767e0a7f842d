//! `scanside crop`: a part of an image, where it was.

use std::ops::Range;
use std::path::PathBuf;

use ndarray::{Array3, s};
use serde_json::json;

use scanside::imaging::resample::same_grid;
use scanside::nifti::{NiftiSpec, NiftiWriter};
use scanside::volume::Volume;
use scanside::with_voxel_type;

use super::open::open_volume;
use super::values::{check_output, mask, parse_slice, pool, resolve_slice};
use super::{Failure, print, print_json};

/// Cuts a box out of an image; every voxel keeps its place in the patient.
///
/// The box is given as slices, rows and columns, as in Python (from A up to B and not with it; negative numbers count from
/// the end), or as what a mask reaches, with a margin.
///
///   scanside crop ct.nii.gz part.nii.gz --box 40:90,100:400,80:430
///   scanside crop ct.nii.gz lungs.nii.gz --mask lungs-mask.nii.gz --margin-mm 10
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// The image: .nii, .nii.gz, .nrrd, a DICOM file or folder.
    input: PathBuf,
    /// Where the part goes: .nii or .nii.gz.
    output: PathBuf,
    /// Slices, rows and columns: K0:K1,J0:J1,I0:I1.
    #[arg(long = "box", value_name = "K,J,I", allow_hyphen_values = true, required_unless_present = "mask")]
    area: Option<String>,
    /// A mask or label map on the same grid: the box is what it reaches.
    #[arg(long, conflicts_with = "area")]
    mask: Option<PathBuf>,
    /// Take only this label of it.
    #[arg(long, requires = "mask", allow_negative_numbers = true)]
    label: Option<f64>,
    /// So much more on each side, as far as there is image.
    #[arg(long, requires = "mask", default_value_t = 0.0, value_name = "MM")]
    margin_mm: f64,
    /// Threads to pack a .nii.gz on [default: all cores]. Its bytes do not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object: the box, the new geometry.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    check_output(&arguments.output)?;
    if !(arguments.margin_mm >= 0.0 && arguments.margin_mm.is_finite()) {
        return Err(Failure::usage("--margin-mm: a number from 0 on"));
    }
    let volume = open_volume(&arguments.input)?;
    let ranges = match (&arguments.area, &arguments.mask) {
        (Some(text), _) => box_of(text, volume.shape())?,
        (None, Some(path)) => {
            let map = open_volume(path)?;
            if !same_grid(&volume.grid(), &map.grid()) {
                let text = "is not on the grid of the image: scanside resample --like puts it there";
                return Err(Failure::impossible(format!("{} {text}", path.display())));
            }
            let reach = reach(&mask(&map, path, arguments.label)?);
            let reach = reach.ok_or_else(|| Failure::impossible(format!("{}: no voxel is inside", path.display())))?;
            let zyx_mm = volume.spacing().zyx_mm();
            std::array::from_fn(|a| {
                let margin = (arguments.margin_mm / zyx_mm[a] - 1e-9).ceil().max(0.0) as usize;
                reach[a].start.saturating_sub(margin)..reach[a].end.saturating_add(margin).min(volume.shape()[a])
            })
        }
        (None, None) => unreachable!("the parser asks for one of the two"),
    };
    let [k, j, i] = &ranges;
    let affine = volume.affine().shifted([i.start as f64, j.start as f64, k.start as f64]);
    let shape = [k.len(), j.len(), i.len()];
    write(&arguments, &volume, &ranges, affine)?;
    if arguments.json {
        return print_json(&json!({
            "input": arguments.input,
            "output": arguments.output,
            "box": ranges.clone().map(|r| [r.start, r.end]),
            "shape": shape,
            "spacing_mm": affine.spacing().zyx_mm(),
            "affine_lps": affine.to_row_major(),
        }));
    }
    let text = ranges.map(|r| format!("{}:{}", r.start, r.end)).join(",");
    print(&format!("{text}: {} slices of {} x {}\n", shape[0], shape[1], shape[2]))
}

/// Slice by slice, so that a part of a volume larger than memory can be taken.
fn write(
    arguments: &Arguments,
    volume: &Volume,
    [k, j, i]: &[Range<usize>; 3],
    affine: scanside::geometry::Affine,
) -> Result<(), Failure> {
    let spec = NiftiSpec {
        shape: [k.len(), j.len(), i.len()],
        volumes: 1,
        affine,
        voxel: volume.voxel_type(),
        rescale: volume.rescale(),
        repetition_s: 0.0,
    };
    let pool = pool(arguments.threads);
    let mut writer = NiftiWriter::create(&arguments.output, &spec, Some(&pool)).map_err(Failure::impossible)?;
    with_voxel_type!(volume.voxel_type(), T => {
        for slice in k.clone() {
            let stored = volume.stored_slice::<T>(slice).expect("the type is the volume's");
            let part = stored.slice(s![j.clone(), i.clone()]).as_standard_layout().into_owned();
            writer.write_voxels(part.as_slice().expect("standard layout")).map_err(Failure::impossible)?;
            volume.release(slice..slice + 1);
        }
    });
    writer.finish().map_err(Failure::impossible)
}

fn box_of(text: &str, shape: [usize; 3]) -> Result<[Range<usize>; 3], Failure> {
    let parts: Vec<&str> = text.split(',').collect();
    let wrong = |why: String| Failure::usage(format!("--box {text}: {why}"));
    let [k, j, i] = parts.as_slice() else { return Err(wrong("three ranges, K0:K1,J0:J1,I0:I1".into())) };
    let mut ranges = [0..0, 0..0, 0..0];
    for (axis, part) in [k, j, i].into_iter().enumerate() {
        let slice = parse_slice(part).map_err(wrong)?;
        ranges[axis] = resolve_slice(slice, shape[axis]).ok_or_else(|| {
            wrong(format!("{part} holds none of the {} {}", shape[axis], ["slices", "rows", "columns"][axis]))
        })?;
    }
    Ok(ranges)
}

/// The box that holds all voxels that are not 0.
fn reach(mask: &Array3<u8>) -> Option<[Range<usize>; 3]> {
    let mut reach: Option<[Range<usize>; 3]> = None;
    for ((k, j, i), _) in mask.indexed_iter().filter(|(_, v)| **v != 0) {
        let at = [k, j, i];
        match &mut reach {
            None => reach = Some(at.map(|a| a..a + 1)),
            Some(reach) => {
                for (range, a) in reach.iter_mut().zip(at) {
                    *range = range.start.min(a)..range.end.max(a + 1);
                }
            }
        }
    }
    reach
}
