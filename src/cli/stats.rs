//! `scanside stats`: numbers about the values under each label.

use std::path::PathBuf;

use ndarray::Array3;
use serde_json::json;

use scanside::imaging::resample::same_grid;
use scanside::imaging::stats::per_label;

use super::open::{open_told, open_volume};
use super::values::{about, labels, pool, real};
use super::{Failure, print, print_json};

/// Measures the values under each label: mean, standard deviation, percentiles, volume, centroid.
///
/// Without a label map the whole image is one label. Label 0 is background and left out. Standard deviations divide by n,
/// percentiles lie between neighbouring values (both numpy's defaults). NaN and infinite values count in the volume
/// and in nothing else, and are told.
///
///   scanside stats ct.nii.gz --labels organs.nii.gz --json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// The image: .nii, .nii.gz, .nrrd, a DICOM file or folder.
    input: PathBuf,
    /// A label map on the same grid.
    #[arg(long)]
    labels: Option<PathBuf>,
    /// Percentiles, 0 to 100.
    #[arg(long, value_delimiter = ',', default_values_t = [5.0, 25.0, 50.0, 75.0, 95.0])]
    percentiles: Vec<f64>,
    /// Threads to compute on [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    if let Some(p) = arguments.percentiles.iter().find(|p| !(0.0..=100.0).contains(*p)) {
        return Err(Failure::usage(format!("--percentiles {p}: they lie between 0 and 100")));
    }
    let pool = pool(arguments.threads);
    let told = open_told(&arguments.input)?;
    let (volume, placed) = (told.volume, told.placed);
    let map = match &arguments.labels {
        None => Array3::from_elem(volume.shape(), 1),
        Some(path) => {
            let map = open_volume(path)?;
            if !same_grid(&volume.grid(), &map.grid()) {
                let text = "is not on the grid of the image: scanside resample --like puts it there";
                return Err(Failure::impossible(format!("{} {text}", path.display())));
            }
            labels(&map, path)?
        }
    };
    let found = per_label(real(&volume).view(), map.view(), &volume.affine(), &arguments.percentiles, &pool)
        .map_err(|error| about(&arguments.input)(&error))?;
    if arguments.json {
        // JSON has no NaN: a label without a finite value has null.
        let list: Vec<_> = found
            .iter()
            .map(|s| {
                let percentiles: serde_json::Map<String, serde_json::Value> =
                    arguments.percentiles.iter().zip(&s.percentiles).map(|(p, v)| (p.to_string(), json!(v))).collect();
                json!({
                    "label": s.label,
                    "voxels": s.voxels,
                    "not_finite": s.not_finite,
                    "volume_mm3": placed.then_some(s.volume_mm3),
                    "volume_ml": placed.then_some(s.volume_mm3 / 1000.0),
                    "mean": s.mean,
                    "std": s.std,
                    "min": s.min,
                    "max": s.max,
                    "percentiles": percentiles,
                    "centroid_voxel": s.centroid_voxel,
                    "centroid_lps_mm": placed.then_some(s.centroid_lps_mm),
                })
            })
            .collect();
        return print_json(&json!({"input": arguments.input, "labels": arguments.labels, "statistics": list}));
    }
    let mut text = String::from("label      voxels          mL        mean         std         min         max");
    arguments.percentiles.iter().for_each(|p| text += &format!(" {:>11}", format!("p{p}")));
    text.push('\n');
    for s in &found {
        // Frames over time fill no volume.
        let ml = if placed { format!("{:.3}", s.volume_mm3 / 1000.0) } else { "-".into() };
        text += &format!("{:5} {:11} {ml:>11}", s.label, s.voxels);
        for v in [s.mean, s.std, s.min, s.max].iter().chain(&s.percentiles) {
            text += &format!(" {v:11.4}");
        }
        if s.not_finite > 0 {
            text += &format!("   ({} NaN or infinite)", s.not_finite);
        }
        text.push('\n');
    }
    print(&text)
}
