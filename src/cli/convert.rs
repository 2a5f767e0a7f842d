//! `scanside convert`: DICOM series to NIfTI and back, geometry kept to the last written digit.

use std::path::{Path, PathBuf};

use scanside::dicom::build::{SeriesTemplate, SliceTemplate, decimal_string};
use scanside::dicom::{TransferSyntax, decodable_transfer_syntaxes, tags};
use scanside::geometry::{Affine, Plane, norm};
use scanside::nifti::{NiftiSpec, NiftiWriter};
use scanside::pool::Pool;
use scanside::study::{Modality, Uid};
use scanside::volume::{Rescale, Volume, VoxelType};
use scanside::with_voxel_type;
use serde_json::json;

use super::values::pool;
use super::volumes::Volumes;
use super::{Failure, print_json};

/// Converts between DICOM series, NIfTI and NRRD.
///
/// OUT ending in .nii or .nii.gz is written as NIfTI (stored values and rescale are kept, so nothing is rounded); any other
/// OUT is a folder that is made and filled with a DICOM series. A series with several images at each place becomes a 4-D
/// NIfTI, and a 4-D NIfTI a series with temporal positions. A tilted gantry stays in the affine.
#[derive(clap::Args)]
pub struct Arguments {
    /// A DICOM folder or file, a .nii, .nii.gz or .nrrd.
    input: PathBuf,
    /// A .nii or .nii.gz, or a folder for a DICOM series (made; must be empty if there).
    output: PathBuf,
    /// Series Instance UID, where the input has several.
    #[arg(long, value_name = "UID")]
    series: Option<String>,
    /// Convert a series with gaps (filled with its lowest value) or uneven spacing (called even) all the same.
    #[arg(long)]
    accept_incomplete: bool,
    /// Modality of a DICOM series made from NIfTI or NRRD: CT, MR or OT.
    #[arg(long, default_value = "OT")]
    modality: String,
    /// Patient's Name of a DICOM series made from NIfTI or NRRD.
    #[arg(long, default_value = "Anonymous")]
    patient_name: String,
    /// Patient ID of a DICOM series made from NIfTI or NRRD.
    #[arg(long, default_value = "")]
    patient_id: String,
    /// Threads to pack a .nii.gz on [default: all cores]. Its bytes do not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object: shape, volumes, affine.
    #[arg(long)]
    json: bool,
}

/// Ends of names that ask for a file: none of them is a folder somebody means.
const FORMATS: &[&str] = &[".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".img", ".dcm", ".png", ".jpg", ".npy", ".gz", ".nii.gzz", ".zip"];

/// Converts.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let name = arguments.output.to_string_lossy().to_lowercase();
    let nifti = name.ends_with(".nii") || name.ends_with(".nii.gz");
    if !nifti && !arguments.output.is_dir() && FORMATS.iter().any(|format| name.ends_with(format)) {
        let text = "what is written is .nii, .nii.gz, or a folder of DICOM files";
        return Err(Failure::usage(format!("{}: {text}", arguments.output.display())));
    }
    if !["CT", "MR", "OT"].contains(&arguments.modality.as_str()) {
        return Err(Failure::usage(format!("--modality {}: CT, MR or OT", arguments.modality)));
    }
    let mut volumes = Volumes::open(&arguments.input, arguments.series.as_deref(), arguments.accept_incomplete)?;
    if nifti {
        to_nifti(&mut volumes, &arguments.output, &pool(arguments.threads))?;
    } else {
        to_dicom(&mut volumes, &arguments)?;
    }
    if !arguments.json {
        return Ok(());
    }
    let grid = volumes.grid()?;
    print_json(&json!({
        "input": arguments.input,
        "output": arguments.output,
        "format": if nifti { "nifti" } else { "dicom" },
        "shape": grid.shape,
        "volumes": volumes.count(),
        "spacing_mm": grid.spacing().zyx_mm(),
        "affine_lps": grid.affine.to_row_major(),
    }))
}

fn to_nifti(volumes: &mut Volumes, output: &Path, pool: &Pool) -> Result<(), Failure> {
    let (voxel, rescale) = volumes.voxel()?;
    let count = volumes.count();
    let first = volumes.get(0)?;
    let repetition_s = if count > 1 { volumes.repetition_s() } else { 0.0 };
    let spec = NiftiSpec { shape: first.shape(), volumes: count, affine: first.affine(), voxel, rescale, repetition_s };
    let mut writer = NiftiWriter::create(output, &spec, Some(pool)).map_err(Failure::impossible)?;
    let progress = super::Steps::new();
    let mut volume = Some(first);
    for n in 0..count {
        let volume = match volume.take() {
            Some(first) => first,
            None => volumes.get(n)?,
        };
        if (volume.voxel_type(), volume.rescale()) == (voxel, rescale) {
            writer.write_volume(&volume).map_err(Failure::impossible)?;
        } else {
            let [slices, rows, columns] = volume.shape();
            let mut slice = vec![0.0f32; rows * columns];
            for k in 0..slices {
                volume.read_slice_f32(k, &mut slice);
                writer.write_voxels(&slice).map_err(Failure::impossible)?;
            }
        }
        progress.show("volumes", n + 1, count);
    }
    writer.finish().map_err(Failure::impossible)?;
    progress.clear();
    Ok(())
}

/// How a volume's values become 16-bit stored ones.
struct Quantized {
    voxel: VoxelType,
    rescale: Rescale,
}

impl Quantized {
    /// Integers of 8 and 16 bits as they are; others stretched over 16 bits, exactly where they are whole numbers that fit.
    fn of(volumes: &mut Volumes) -> Result<Self, Failure> {
        let (voxel, rescale) = volumes.voxel()?;
        if matches!(voxel, VoxelType::U8 | VoxelType::I8 | VoxelType::U16 | VoxelType::I16) {
            return Ok(Self { voxel, rescale });
        }
        let (mut low, mut high, mut whole) = (f64::INFINITY, f64::NEG_INFINITY, true);
        for n in 0..volumes.count() {
            let volume = volumes.get(n)?;
            let [slices, rows, columns] = volume.shape();
            let mut slice = vec![0.0f32; rows * columns];
            for k in 0..slices {
                volume.read_slice_f32(k, &mut slice);
                for v in slice.iter().map(|v| f64::from(*v)).filter(|v| v.is_finite()) {
                    (low, high) = (low.min(v), high.max(v));
                    whole &= v.fract() == 0.0;
                }
                volume.release(k..k + 1);
            }
        }
        if low > high {
            (low, high) = (0.0, 0.0);
        }
        let fits = whole && low >= f64::from(i16::MIN) && high <= f64::from(i16::MAX);
        let rescale = match fits {
            true => Rescale::IDENTITY,
            false => {
                // As text the slope has 16 characters at most; what is written must be what was divided by.
                let written = |v: f64| decimal_string(v).parse::<f64>().unwrap_or(v);
                let slope = written(((high - low) / 65_535.0).max(f64::MIN_POSITIVE));
                eprintln!("scanside: values of {low} to {high} are rounded to steps of {slope}");
                Rescale { slope, intercept: written(low + 32_768.0 * slope) }
            }
        };
        Ok(Self { voxel: VoxelType::I16, rescale })
    }

    fn slice(&self, volume: &Volume, k: usize, out: &mut Vec<u8>) {
        out.clear();
        if volume.voxel_type() == self.voxel && volume.rescale() == self.rescale {
            with_voxel_type!(self.voxel, T => {
                let slice = volume.stored_slice::<T>(k).expect("the type is the volume's");
                out.extend(slice.iter().flat_map(|v| v.to_le_bytes()));
            });
            return;
        }
        let [_, rows, columns] = volume.shape();
        let mut slice = vec![0.0f32; rows * columns];
        volume.read_slice_f32(k, &mut slice);
        let Rescale { slope, intercept } = self.rescale;
        // A float that is no number has no stored value: it becomes the lowest.
        let stored = |v: f32| if v.is_nan() { i16::MIN } else { ((f64::from(v) - intercept) / slope).round() as i16 };
        out.extend(slice.iter().flat_map(|v| stored(*v).to_le_bytes()));
    }
}

fn to_dicom(volumes: &mut Volumes, arguments: &Arguments) -> Result<(), Failure> {
    let output = &arguments.output;
    let world = |error: std::io::Error| Failure::impossible(format!("cannot write {}: {error}", output.display()));
    if output.is_file() {
        return Err(Failure::usage(format!("{}: a file, where a folder or a .nii is wanted", output.display())));
    }
    std::fs::create_dir_all(output).map_err(world)?;
    if std::fs::read_dir(output).map_err(world)?.next().is_some() {
        return Err(Failure::usage(format!("{}: the folder is not empty", output.display())));
    }
    let syntax = &decodable_transfer_syntaxes()[0];
    let quantized = Quantized::of(volumes)?;
    let count = volumes.count();
    let first = volumes.get(0)?;
    let [slices, rows, columns] = first.shape();
    let (affine, flipped) = ascending(first.affine(), slices);
    let template = template(volumes, arguments, &quantized, [rows, columns], &affine);
    let progress = super::Steps::new();
    let mut pixels = Vec::new();
    for t in 0..count {
        let volume = volumes.get(t)?;
        let mut template = template.clone();
        if count > 1 {
            template.more.push((tags::TEMPORAL_POSITION_IDENTIFIER, *b"IS", (t + 1).to_string()));
            template.more.push((tags::NUMBER_OF_TEMPORAL_POSITIONS, *b"IS", count.to_string()));
            let repetition_s = volumes.repetition_s();
            if repetition_s > 0.0 {
                template.more.push((tags::REPETITION_TIME, *b"DS", decimal_string(1000.0 * repetition_s)));
            }
        }
        for k in 0..slices {
            quantized.slice(&volume, if flipped { slices - 1 - k } else { k }, &mut pixels);
            let number = t * slices + k + 1;
            write_slice(&template, &quantized, &affine, k, number, &pixels, syntax, output)?;
            progress.show("images", number, count * slices);
        }
    }
    progress.clear();
    Ok(())
}

/// The affine with slices that ascend along the normal of their rows and columns, which is how DICOM stacks are read; whether
/// the slices had to be turned round for it.
fn ascending(affine: Affine, slices: usize) -> (Affine, bool) {
    if affine.determinant() > 0.0 {
        return (affine, false);
    }
    let origin = affine.to_lps([0.0, 0.0, (slices - 1) as f64]);
    let turned = Affine::new(affine.step(0), affine.step(1), affine.step(2).map(|v| -v), origin);
    (turned.expect("turning an axis keeps an affine invertible"), true)
}

fn template(
    volumes: &Volumes,
    arguments: &Arguments,
    quantized: &Quantized,
    size: [usize; 2],
    affine: &Affine,
) -> SeriesTemplate {
    let mut template = SeriesTemplate {
        modality: Modality::parse(&arguments.modality),
        study: unique("study"),
        series: unique("series"),
        frame_of_reference: unique("frame of reference"),
        patient_name: arguments.patient_name.clone(),
        patient_id: arguments.patient_id.clone(),
        description: "converted by scanside".into(),
        date_time: Default::default(),
        series_number: 1,
        size,
        voxel: quantized.voxel,
        bits_stored: quantized.voxel.bytes() as u16 * 8,
        thickness_mm: norm(affine.step(2)),
        window: None,
        regions: Vec::new(),
        more: Vec::new(),
    };
    if let Volumes::Series(all) = volumes {
        let wanted = [tags::PATIENT_NAME, tags::PATIENT_ID, tags::STUDY_DATE, tags::STUDY_TIME];
        let texts = all[0].text(&wanted).unwrap_or_else(|_| vec![None; 4]);
        let text = |n: usize| texts[n].clone().unwrap_or_default();
        template.modality = all[0].modality;
        template.study = all[0].study.clone();
        (template.patient_name, template.patient_id) = (text(0), text(1));
        template.date_time = [text(2), text(3)];
        if let Some(uid) = &all[0].frame_of_reference {
            template.frame_of_reference = uid.clone();
        }
    }
    template
}

/// A UID that no other run of this program makes.
fn unique(what: &str) -> Uid {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Uid::derived(format!("{what} {} {}", std::process::id(), now.as_nanos()).as_bytes())
}

#[expect(clippy::too_many_arguments, reason = "each is another thing, and it has one caller")]
fn write_slice(
    template: &SeriesTemplate,
    quantized: &Quantized,
    affine: &Affine,
    k: usize,
    number: usize,
    pixels: &[u8],
    syntax: &TransferSyntax,
    output: &Path,
) -> Result<(), Failure> {
    let unit = |v: [f64; 3]| v.map(|x| x / norm(v));
    let cosines = [unit(affine.step(0)), unit(affine.step(1))].concat();
    let cosines: [f64; 6] = cosines.try_into().expect("two times three");
    let spacing = [norm(affine.step(1)), norm(affine.step(0))];
    let plane = Plane::new(affine.to_lps([0.0, 0.0, k as f64]), cosines, spacing).map_err(Failure::impossible)?;
    let slice = SliceTemplate {
        number,
        plane: Some(plane),
        rescale: quantized.rescale,
        image_type: "DERIVED\\SECONDARY",
        pixels,
    };
    let bytes = template.image(&slice, syntax).map_err(Failure::impossible)?;
    let path = output.join(format!("{number:06}.dcm"));
    std::fs::write(&path, bytes).map_err(|error| Failure::impossible(format!("cannot write {}: {error}", path.display())))
}
