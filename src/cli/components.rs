//! `scanside components`: the connected parts of a mask.

use std::path::{Path, PathBuf};

use serde_json::json;

use scanside::imaging::components::{Components, Connectivity, label};
use scanside::nifti::{NiftiSpec, NiftiWriter};
use scanside::pool::Pool;
use scanside::volume::{Rescale, Volume, Voxel, VoxelType};
use scanside::with_voxel_type;

use super::open::open_volume;
use super::values::{about, check_output, mask, pool};
use super::{Failure, print, print_json};

/// Numbers the connected parts of a mask, and measures each: size, box, centroid.
///
/// Parts are numbered from 1 in the order of their first voxel, as scipy.ndimage.label numbers them; --by-size numbers
/// the largest first. 4 and 8 neighbours stay within a slice: every slice stands alone.
///
///   scanside components lungs.nii.gz labels.nii.gz --by-size --min-voxels 100 --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// The mask or label map: .nii, .nii.gz, .nrrd.
    input: PathBuf,
    /// Where the numbered parts go, if anywhere: .nii or .nii.gz.
    output: Option<PathBuf>,
    /// Take only the voxels of this label.
    #[arg(long, allow_negative_numbers = true)]
    label: Option<f64>,
    /// Neighbours of a voxel: 6, 18 or 26; 4 or 8 within a slice.
    #[arg(long, default_value_t = 6, value_parser = parse_neighbours)]
    connectivity: u32,
    /// Number them by size, the largest first.
    #[arg(long)]
    by_size: bool,
    /// Leave out parts of fewer voxels.
    #[arg(long, default_value_t = 1, value_name = "N")]
    min_voxels: u64,
    /// Keep only so many, the largest; implies --by-size.
    #[arg(long, value_name = "N")]
    largest: Option<u32>,
    /// Threads to compute on [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

fn parse_neighbours(text: &str) -> Result<u32, String> {
    let count = text.parse().ok().filter(|n| Connectivity::from_neighbours(*n).is_some());
    count.ok_or_else(|| "4, 6, 8, 18 or 26".into())
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    if let Some(output) = &arguments.output {
        check_output(output)?;
    }
    let pool = pool(arguments.threads);
    let volume = open_volume(&arguments.input)?;
    let about = about(&arguments.input);
    let mask = mask(&volume, &arguments.input, arguments.label)?;
    let connectivity = Connectivity::from_neighbours(arguments.connectivity).expect("the parser has checked it");
    let mut found = label(mask.view(), connectivity, &pool).map_err(|error| about(&error))?;
    let all = found.list().len();
    found = found.retain(|c| c.voxels >= arguments.min_voxels);
    if arguments.by_size || arguments.largest.is_some() {
        found = found.by_size();
    }
    if let Some(most) = arguments.largest {
        found = found.retain(|c| c.label <= most);
    }
    let affine = volume.affine();
    let voxel_ml = volume.spacing().voxel_mm3() / 1000.0;
    if let Some(output) = &arguments.output {
        // As small as the labels fit.
        let voxel = match found.list().len() {
            0..=255 => VoxelType::U8,
            256..=65_535 => VoxelType::U16,
            _ => VoxelType::U32,
        };
        write_labels(output, &found, &volume, voxel, &pool)?;
    }
    if arguments.json {
        let list: Vec<_> = found
            .list()
            .iter()
            .map(|c| {
                json!({
                    "label": c.label,
                    "voxels": c.voxels,
                    "volume_ml": c.voxels as f64 * voxel_ml,
                    "box_first_voxel": c.first,
                    "box_last_voxel": c.last,
                    "centroid_voxel": c.centroid_voxel,
                    "centroid_lps_mm": affine.kji_to_lps(c.centroid_voxel),
                })
            })
            .collect();
        return print_json(&json!({
            "input": arguments.input,
            "output": arguments.output,
            "connectivity": arguments.connectivity,
            "found": all,
            "kept": list.len(),
            "components": list,
        }));
    }
    let mut text = format!("{all} components, {} kept\n", found.list().len());
    if !found.list().is_empty() {
        text += "label      voxels          mL    box (k, j, i)                  centroid LPS mm\n";
    }
    for c in found.list() {
        let [x, y, z] = affine.kji_to_lps(c.centroid_voxel);
        let reach: Vec<String> = (0..3).map(|a| format!("{}-{}", c.first[a], c.last[a])).collect();
        let ml = c.voxels as f64 * voxel_ml;
        text +=
            &format!("{:5} {:11} {ml:11.3}    {:28} {x:9.2} {y:9.2} {z:9.2}\n", c.label, c.voxels, reach.join(", "));
    }
    print(&text)
}

/// Slice by slice: the numbers of a mask are never in memory as a whole.
fn write_labels(output: &Path, found: &Components, volume: &Volume, voxel: VoxelType, pool: &Pool) -> Result<(), Failure> {
    let [slices, rows, columns] = volume.shape();
    let spec = NiftiSpec {
        shape: volume.shape(),
        volumes: 1,
        affine: volume.affine(),
        voxel,
        rescale: Rescale::IDENTITY,
        repetition_s: 0.0,
    };
    let mut writer = NiftiWriter::create(output, &spec, Some(pool)).map_err(Failure::impossible)?;
    with_voxel_type!(voxel, T => {
        for k in 0..slices {
            let mut slice = vec![T::default(); rows * columns];
            found.paint_slice(k, &mut slice, |label| T::from_f64(f64::from(label)));
            writer.write_voxels(&slice).map_err(Failure::impossible)?;
        }
    });
    writer.finish().map_err(Failure::impossible)
}
