//! `scanside phantom`: images of nobody, with nodules, lesions or a tumour at known places.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use scanside::dicom::TransferSyntax;
use scanside::exam::brain_mr::contrast::Contrast;
use scanside::finding::Laterality;
use scanside::geometry::Spacing;
use scanside::nifti::{NiftiSpec, NiftiWriter};
use scanside::phantom::brain::BrainPhantom;
use scanside::phantom::ultrasound::{Cine, CineOptions, PIXEL_MM};
use scanside::phantom::{NoduleKind, NoduleWish, Phantom, PhantomOptions};
use scanside::pool::Pool;
use scanside::volume::{Rescale, VoxelType};
use serde_json::json;

use super::{Failure, Steps, print, print_json};

/// Draws a chest CT with nodules at known places: DIR/phantom.nii.gz or DIR/dicom/, and DIR/truth.json; or a cine, or a brain.
///
/// The same options and seed give the same voxels on every machine. Nodules are asked for as KIND:DIAMETER, kinds being
/// solid, ground-glass, juxtapleural (on the chest wall) and diaphragm.
///
///   scanside phantom --out c --kind ultrasound --frames 300    # a cine instead: c/cine.dcm
///   scanside phantom --out b --kind brain                      # four contrasts and a tumour: b/dicom
///   scanside phantom --out p --nodule solid:8 --nodule diaphragm:20
///   scanside analyze p/phantom.nii.gz --out p
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// Where it goes; made when it is not there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What is drawn
    #[arg(long, value_enum, default_value_t = Kind::Chest)]
    kind: Kind,
    /// Frames of an ultrasound cine
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    frames: u32,
    /// Lesions of an ultrasound cine, at most 3
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=3))]
    lesions: u32,
    /// How the images are written
    #[arg(long, value_enum, default_value_t = Format::Nifti)]
    format: Format,
    /// Slices
    #[arg(long, default_value_t = 120)]
    slices: usize,
    /// Rows and columns of a slice
    #[arg(long, default_value_t = 512)]
    rows: usize,
    /// Distance of slices in mm
    #[arg(long, value_name = "MM", default_value_t = 2.5)]
    slice_mm: f64,
    /// Distance of rows and columns in mm; without it, what fits a chest into the image
    #[arg(long, value_name = "MM")]
    pixel_mm: Option<f64>,
    /// Another number is another patient
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A nodule, KIND:DIAMETER in mm; may be given more than once; without it, six of 6 to 18 mm
    #[arg(long, value_name = "KIND:MM", value_parser = nodule)]
    nodule: Vec<NoduleWish>,
    /// Standard deviation of the noise in Hounsfield units
    #[arg(long, value_name = "HU", default_value_t = 22.0)]
    noise: f64,
    /// Threads that draw; without it, one per core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Prints the truth as one JSON object
    #[arg(long)]
    json: bool,
}

/// How the images are written.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One phantom.nii.gz.
    Nifti,
    /// A DICOM series, one file a slice, in DIR/dicom.
    Dicom,
}

fn nodule(text: &str) -> Result<NoduleWish, String> {
    let (kind, diameter) = text.split_once(':').ok_or("KIND:DIAMETER is wanted, such as solid:8")?;
    let kind = match kind {
        "solid" => NoduleKind::Solid,
        "ground-glass" => NoduleKind::GroundGlass,
        "juxtapleural" => NoduleKind::Juxtapleural,
        "diaphragm" => NoduleKind::Diaphragm,
        _ => return Err(format!("{kind:?} is none of solid, ground-glass, juxtapleural, diaphragm")),
    };
    let diameter_mm = diameter.parse().map_err(|_| format!("{diameter:?} is not a diameter in mm"))?;
    Ok(NoduleWish { kind, diameter_mm })
}

/// What is drawn.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A chest CT with nodules.
    Chest,
    /// An ultrasound cine with lesions, a multi-frame DICOM file.
    Ultrasound,
    /// A brain MR study with a tumour: T1, T1c, T2 and FLAIR, each with a grid of its own, as DICOM.
    Brain,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.kind {
        Kind::Chest => {}
        Kind::Ultrasound => return ultrasound(&arguments),
        Kind::Brain => return brain(&arguments),
    }
    let pixel_mm = arguments.pixel_mm.unwrap_or(358.4 / arguments.rows.max(1) as f64);
    let spacing = Spacing::new([arguments.slice_mm, pixel_mm, pixel_mm]).map_err(Failure::usage)?;
    let mut options = PhantomOptions {
        shape: [arguments.slices, arguments.rows, arguments.rows],
        spacing,
        seed: arguments.seed,
        noise_hu: arguments.noise,
        ..PhantomOptions::default()
    };
    if !arguments.nodule.is_empty() {
        options.nodules.clone_from(&arguments.nodule);
    }
    let phantom = Phantom::new(&options).map_err(Failure::usage)?;
    std::fs::create_dir_all(&arguments.out).map_err(cannot_write(&arguments.out))?;
    let threads = arguments.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    match arguments.format {
        Format::Nifti => write_nifti(&phantom, &arguments.out.join("phantom.nii.gz"), &Pool::new(threads))?,
        Format::Dicom => write_dicom(&phantom, &arguments.out.join("dicom"), &Pool::new(threads))?,
    }
    let truth = json!({ "seed": arguments.seed, "nodules": phantom.truth() });
    write_truth(&arguments.out, &truth)?;
    if arguments.json {
        return print_json(&truth);
    }
    let mut text = String::new();
    for n in phantom.truth() {
        let [x, y, z] = n.centre_lps_mm;
        let kind = json!(n.kind);
        let side = json!(n.side);
        text += &format!(
            "{:<13} {:>5.1} mm  {:<5}  {x:.1} {y:.1} {z:.1} mm LPS\n",
            kind.as_str().unwrap_or_default(),
            n.diameter_mm,
            side.as_str().unwrap_or_default()
        );
    }
    print(&text)
}

/// DIR/cine.dcm, and the outlines of every frame in DIR/truth.json.
fn ultrasound(arguments: &Arguments) -> Result<(), Failure> {
    let options = CineOptions {
        seed: arguments.seed,
        frames: arguments.frames as usize,
        lesions: arguments.lesions as usize,
        ..CineOptions::default()
    };
    std::fs::create_dir_all(&arguments.out).map_err(cannot_write(&arguments.out))?;
    let cine = Cine::new(options);
    let syntax = TransferSyntax::find("1.2.840.10008.1.2.1").expect("every box reads explicit little endian");
    let path = arguments.out.join("cine.dcm");
    std::fs::write(&path, cine.file(syntax, true).map_err(Failure::impossible)?).map_err(cannot_write(&path))?;
    let frames: Vec<_> = (0..options.frames).map(|k| cine.truth(k)).collect();
    let truth = json!({ "seed": options.seed, "pixel_mm": PIXEL_MM, "frames": frames });
    write_truth(&arguments.out, &truth)?;
    if arguments.json {
        return print_json(&truth);
    }
    print(&format!("{} frames of {} lesions in {}\n", options.frames, options.lesions, arguments.out.join("cine.dcm").display()))
}

/// DIR/dicom/CONTRAST-SLICE.dcm, and the tumour's place and side in DIR/truth.json.
fn brain(arguments: &Arguments) -> Result<(), Failure> {
    let side = if arguments.seed % 2 == 1 { Laterality::Left } else { Laterality::Right };
    let phantom = BrainPhantom { side, seed: arguments.seed, ..BrainPhantom::default() };
    let folder = arguments.out.join("dicom");
    std::fs::create_dir_all(&folder).map_err(cannot_write(&folder))?;
    for contrast in Contrast::ALL {
        let images = phantom.images(contrast, &phantom.series(contrast, "")).map_err(Failure::impossible)?;
        for (k, image) in images.iter().enumerate() {
            let path = folder.join(format!("{}-{:04}.dcm", contrast.name(), k + 1));
            std::fs::write(&path, image).map_err(cannot_write(&path))?;
        }
    }
    let centre = phantom.centre_lps_mm();
    let truth = json!({ "seed": arguments.seed, "side": side, "centre_lps_mm": centre, "oedema_radius_mm": phantom.radius_mm });
    write_truth(&arguments.out, &truth)?;
    if arguments.json {
        return print_json(&truth);
    }
    let [x, y, z] = centre;
    let side = json!(side);
    let side = side.as_str().unwrap_or_default();
    print(&format!("a tumour on the {side} at {x:.1} {y:.1} {z:.1} mm LPS, four series in {}\n", folder.display()))
}

fn write_truth(out: &Path, truth: &serde_json::Value) -> Result<(), Failure> {
    let path = out.join("truth.json");
    std::fs::write(&path, format!("{truth:#}\n")).map_err(cannot_write(&path))
}

fn cannot_write(path: &Path) -> impl FnOnce(std::io::Error) -> Failure + '_ {
    move |e| Failure::Impossible(format!("cannot write {}: {e}", path.display()))
}

fn write_dicom(phantom: &Phantom, folder: &Path, pool: &Pool) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(cannot_write(folder))?;
    let series = phantom.series("");
    let written = pool.map(phantom.grid().shape[0], |k| {
        let file = phantom.image(&series, k).map_err(Failure::impossible)?;
        let path = folder.join(format!("{:04}.dcm", k + 1));
        std::fs::write(&path, file).map_err(cannot_write(&path))
    });
    written.map_err(Failure::impossible)?.into_iter().collect()
}

fn write_nifti(phantom: &Phantom, path: &Path, pool: &Pool) -> Result<(), Failure> {
    let [slices, rows, columns] = phantom.grid().shape;
    let spec = NiftiSpec {
        shape: phantom.grid().shape,
        volumes: 1,
        affine: phantom.grid().affine,
        voxel: VoxelType::I16,
        rescale: Rescale::IDENTITY,
        repetition_s: 0.0,
    };
    let mut writer = NiftiWriter::create(path, &spec, Some(pool)).map_err(Failure::impossible)?;
    let steps = Steps::new();
    let group = 2 * pool.threads();
    let mut voxels = vec![0i16; group * rows * columns];
    for start in (0..slices).step_by(group) {
        steps.show("draw", start, slices);
        let part = &mut voxels[..group.min(slices - start) * rows * columns];
        pool.for_each_chunk(part, rows * columns, |n, slice| phantom.draw(start + n, slice)).map_err(Failure::impossible)?;
        writer.write_voxels(part).map_err(Failure::impossible)?;
    }
    steps.clear();
    writer.finish().map_err(Failure::impossible)
}
