//! `scanside segment`: any segmentation package over any image.

use std::path::PathBuf;

use serde_json::json;

use scanside::infer::package::{Models, Trust};
use scanside::infer::tiles::segment;

use super::open::open_told;
use super::values::{check_output, pool, write};
use super::{Failure, Steps, print, print_json};

/// Runs a segmentation package over an image and writes its labels on the image's own grid.
///
/// A package of several channels takes as many images, in the order of its manifest (`scanside model info NAME`); the
/// labels are on the grid of the first. `--model` names an installed or built-in package, or is its folder.
///
///   scanside segment ct/ --model lung-seg --out lungs.nii.gz
///   scanside segment flair.nii.gz t1.nii.gz t1c.nii.gz t2.nii.gz --model packages/brats-unet2d --out tumour.nii.gz
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// The image, or one for each channel: .nii, .nii.gz, .nrrd, a DICOM file or folder.
    #[arg(required = true)]
    inputs: Vec<PathBuf>,
    /// The package: its name or its folder.
    #[arg(long, value_name = "NAME")]
    model: String,
    /// Where the labels go: .nii or .nii.gz.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Folder of packages that replace the built-in ones.
    #[arg(long, value_name = "DIR", value_parser = super::values::folder)]
    models: Option<PathBuf>,
    /// Blend overlapping tiles instead of letting each decide its own part.
    #[arg(long)]
    blend: bool,
    /// Threads to compute on [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object: voxels and volume of each label.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    check_output(&arguments.out)?;
    let folder = PathBuf::from(&arguments.model);
    let package = if folder.join("model.toml").is_file() {
        scanside::infer::package::Package::read(&folder, &Trust::default())
    } else {
        Models::new(arguments.models.clone(), Trust::default()).package(&arguments.model)
    };
    let package = package.map_err(Failure::usage)?;
    let network = package.network().map_err(Failure::impossible)?;
    let (mut volumes, mut placed) = (Vec::new(), true);
    for path in &arguments.inputs {
        let told = open_told(path)?;
        let reads = &package.manifest.input.modality;
        if let Some(modality) = told.modality().filter(|modality| modality.term() != reads) {
            let (path, name) = (path.display(), &package.id().name);
            return Err(Failure::Impossible(format!("{path}: {name} reads {reads}, this is {}", modality.term())));
        }
        placed &= told.placed;
        volumes.push(told.volume);
    }
    let channels: Vec<_> = volumes.iter().collect();
    let steps = Steps::new();
    let progress = |done, total| steps.show("segment", done, total);
    let pool = pool(arguments.threads);
    let labels = segment(&package.manifest, &network, &channels, arguments.blend, &pool, &progress);
    let labels = labels.map_err(|e| Failure::Impossible(format!("{}: {e}", arguments.inputs[0].display())))?;
    steps.clear();
    let affine = volumes[0].affine();
    write(&arguments.out, labels.view(), affine, &pool)?;
    let mut counts = vec![0u64; 256];
    labels.iter().for_each(|label| counts[usize::from(*label)] += 1);
    let voxel_ml = affine.spacing().voxel_mm3() / 1000.0;
    let names = package.manifest.output.labels.iter().enumerate().skip(1);
    // Frames over time fill no volume.
    let rows: Vec<_> = names.map(|(n, name)| (n, name, counts[n], placed.then_some(counts[n] as f64 * voxel_ml))).collect();
    if arguments.json {
        let labels: Vec<_> = rows
            .iter()
            .map(|(label, name, voxels, ml)| json!({"label": label, "name": name, "voxels": voxels, "volume_ml": ml}))
            .collect();
        let id = package.id();
        return print_json(&json!({"model": {"name": id.name, "version": id.version, "sha256": id.sha256}, "labels": labels}));
    }
    let ml = |ml: &Option<f64>| ml.map_or_else(String::new, |ml| format!(" {ml:>10.1} mL"));
    print(&rows.iter().map(|(label, name, voxels, m)| format!("{label:>3}  {name:<24} {voxels:>10} voxels{}\n", ml(m))).collect::<String>())
}
