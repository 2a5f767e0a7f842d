//! `scanside info`: what an image says about itself, and what its geometry is worth.

use std::path::{Path, PathBuf};

use scanside::dicom::tags;
use scanside::geometry::{Affine, Verdict};
use scanside::nifti::{AffineSource, NiftiHeader};
use scanside::series::Arrangement;
use scanside::series::files::{FileSeries, Scan};
use serde_json::{Value, json};

use super::Failure;
use super::open::{Image, incomplete, look, notes};

/// Shows the metadata of a DICOM folder or file, a NIfTI or a NRRD.
///
/// For DICOM: who, what, when, and the geometry measured from the positions of the slices: is the stack complete, even,
/// straight? For NIfTI: shape, zooms, affine (RAS, as nibabel shows it), type and units.
#[derive(clap::Args)]
pub struct Arguments {
    /// A DICOM folder or file, a .nii, .nii.gz or .nrrd.
    path: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Prints what is known of the path.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let value = match look(&arguments.path)? {
        Image::Nifti(reader) => nifti(reader.header()),
        Image::Nrrd(volume) => json!({
            "kind": "nrrd",
            "shape": volume.shape(),
            "spacing_mm": volume.spacing().zyx_mm(),
            "affine_lps": volume.affine().to_row_major(),
            "dtype": format!("{:?}", volume.voxel_type()).to_lowercase(),
        }),
        Image::Dicom(scan) => dicom(&arguments.path, scan)?,
    };
    if arguments.json {
        return super::print_json(&value);
    }
    let mut text = String::new();
    write_text(&value, 0, &mut text);
    super::print(&text)
}

fn rows_ras(affine: &Affine) -> Vec<Vec<f64>> {
    let sign = [-1.0, -1.0, 1.0];
    let mut rows: Vec<Vec<f64>> =
        affine.rows().iter().zip(sign).map(|(row, s)| row.iter().map(|v| if *v == 0.0 { 0.0 } else { v * s }).collect()).collect();
    rows.push(vec![0.0, 0.0, 0.0, 1.0]);
    rows
}

fn nifti(h: &NiftiHeader) -> Value {
    let source = match h.affine_source {
        AffineSource::Sform => "sform",
        AffineSource::Qform => "qform",
        AffineSource::Spacing => "spacing alone: left and right are a guess",
    };
    json!({
        "kind": "nifti",
        "version": h.version,
        "shape": &h.shape[..h.dimensions.max(2)],
        "zooms": &h.zooms[..h.dimensions.max(2)],
        "dtype": h.data_type.name(),
        "byte_order": if h.big_endian { "big" } else { "little" },
        "units": {"space": h.space_unit, "time": h.time_unit},
        "affine_ras": rows_ras(&h.affine),
        "affine_lps": h.affine.to_row_major(),
        "affine_from": source,
        "sform_code": h.form_codes[0],
        "qform_code": h.form_codes[1],
        "forms_disagree": h.forms_disagree,
        "rescale": {"slope": h.rescale.slope, "intercept": h.rescale.intercept},
        "description": h.description,
    })
}

/// The series with most images at the top level, as the guide reads one; every series in the list.
fn dicom(path: &Path, scan: Scan) -> Result<Value, Failure> {
    let one_patient = scan.one_patient();
    let others = scan.others.len();
    let mut all = Vec::new();
    for series in scan.series {
        all.push(series_value(path, series)?);
    }
    let mut value = all[0].clone();
    let object = value.as_object_mut().expect("made as an object");
    object.insert("kind".into(), "dicom".into());
    object.insert("one_patient".into(), one_patient.into());
    object.insert("other_files".into(), others.into());
    if all.len() > 1 {
        object.insert("series".into(), all.into());
    }
    Ok(value)
}

fn series_value(path: &Path, mut series: FileSeries) -> Result<Value, Failure> {
    let wanted = [
        tags::PATIENT_NAME,
        tags::PATIENT_ID,
        tags::STUDY_DATE,
        tags::STUDY_DESCRIPTION,
        tags::SERIES_DESCRIPTION,
        tags::MANUFACTURER,
        tags::MODALITY,
        tags::KVP,
        tags::CONVOLUTION_KERNEL,
        tags::REPETITION_TIME,
        tags::ECHO_TIME,
    ];
    let texts = series.text(&wanted).map_err(Failure::impossible)?;
    let text = |n: usize| texts[n].clone().filter(|t| !t.is_empty());
    let passes = series.passes().len();
    let first = series.first.clone();
    let frame = &first.frames[0];
    let mut value = json!({
        "patient_name": text(0),
        "patient_id": text(1),
        "modality": text(6),
        "study_date": text(2),
        "study_description": text(3),
        "series_description": text(4),
        "manufacturer": text(5),
        "study_uid": series.study,
        "series_uid": series.series,
        "files": series.files.len(),
        "images": series.frames(),
        "rows": first.rows,
        "columns": first.columns,
        "pixel_spacing_mm": first.pixel_spacing_mm,
        "slice_thickness_mm": frame.slice_thickness_mm,
        "window": frame.window,
        "rescale": {"slope": frame.rescale.slope, "intercept": frame.rescale.intercept},
        "bits_stored": first.pixel.bits_stored,
        "signed": first.pixel.signed,
        "photometric": first.pixel.photometric,
        "transfer_syntax": first.transfer_syntax.name,
    });
    let object = value.as_object_mut().expect("made as an object");
    for (name, n) in [("kvp", 7), ("convolution_kernel", 8), ("repetition_time_ms", 9), ("echo_time_ms", 10)] {
        if let Some(text) = text(n) {
            object.insert(name.into(), text.into());
        }
    }
    let arranged = match series.arrange() {
        Err(_) if passes > 1 => {
            object.insert("volumes".into(), passes.into());
            series.passes().swap_remove(0).arrange()
        }
        other => other,
    };
    match arranged {
        Ok(arrangement) => geometry(object, &arrangement),
        Err(error) => {
            let text = error.to_string().replace(&format!("{}: ", path.display()), "");
            object.insert("geometry".into(), json!({"verdict": "rejected", "why": text}));
        }
    }
    Ok(value)
}

fn word(verdict: &Verdict) -> &'static str {
    match verdict {
        v if !v.missing_slices.is_empty() => "gap",
        v if v.uneven.is_some() => "uneven",
        v if v.is_tilted() => "tilted",
        _ => "complete",
    }
}

fn geometry(object: &mut serde_json::Map<String, Value>, arrangement: &Arrangement) {
    let grid = arrangement.grid;
    object.insert("shape".into(), json!(grid.shape));
    object.insert("spacing_mm".into(), json!(grid.spacing().zyx_mm()));
    object.insert("affine_lps".into(), json!(grid.affine.to_row_major()));
    object.insert("first_position_lps_mm".into(), json!(grid.affine.origin()));
    let last = grid.affine.to_lps([0.0, 0.0, (grid.shape[0] - 1) as f64]);
    object.insert("last_position_lps_mm".into(), json!(last));
    let verdict = &arrangement.verdict;
    let words: Vec<String> = notes(arrangement).into_iter().chain(incomplete(arrangement)).collect();
    object.insert(
        "geometry".into(),
        json!({
            "verdict": if arrangement.placed { word(verdict) } else { "no place in patient space" },
            "missing_slices": verdict.missing_slices,
            "tilt_degrees": verdict.tilt_degrees,
            "uneven": verdict.uneven,
            "set_aside": arrangement.set_aside,
            "notes": words,
        }),
    );
}

/// What a person looks for first; the rest follows by the alphabet.
const FIRST: [&str; 24] = [
    "kind", "patient_name", "patient_id", "modality", "study_date", "study_description", "series_description", "manufacturer",
    "files", "images", "volumes", "rows", "columns", "pixel_spacing_mm", "slice_thickness_mm", "shape", "zooms", "spacing_mm",
    "dtype", "units", "geometry", "verdict", "affine_from", "affine_ras",
];

/// The same as text: a line per value, groups indented.
fn write_text(value: &Value, indent: usize, out: &mut String) {
    let Some(object) = value.as_object() else { return };
    let plain = |v: &Value| match v {
        Value::String(s) => s.clone(),
        Value::Array(items) => items.iter().map(ToString::to_string).collect::<Vec<_>>().join("  "),
        other => other.to_string(),
    };
    let mut entries: Vec<_> = object.iter().collect();
    entries.sort_by_key(|(name, _)| FIRST.iter().position(|first| first == name).unwrap_or(FIRST.len()));
    for (name, v) in entries {
        let label = format!("{:indent$}{}", "", name.replace('_', " "));
        match v {
            Value::Null => {}
            Value::Array(items) if items.is_empty() => {}
            Value::Object(_) => {
                *out += &format!("{label}\n");
                write_text(v, indent + 2, out);
            }
            Value::Array(items) if name == "series" => {
                for (n, item) in items.iter().enumerate() {
                    *out += &format!("{label} {}\n", n + 1);
                    write_text(item, indent + 2, out);
                }
            }
            Value::Array(items) if name == "notes" => {
                *out += &format!("{label:<24}{}\n", items.iter().map(plain).collect::<Vec<_>>().join("; "));
            }
            Value::Array(items) if items.iter().any(|i| i.is_array() || i.is_object()) => {
                *out += &format!("{label}\n");
                for item in items {
                    *out += &format!("{:indent$}  {}\n", "", plain(item));
                }
            }
            _ => *out += &format!("{label:<24}{}\n", plain(v)),
        }
    }
}
