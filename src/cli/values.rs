//! What the toolbox commands share: real values, masks and labels of a volume, and results with its geometry.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ndarray::{Array3, ArrayView3};

use scanside::geometry::Affine;
use scanside::nifti::{self, NiftiWriter};
use scanside::pool::{Pool, THREADS_MAX};
use scanside::volume::{Rescale, Volume, Voxel, VoxelType};
use scanside::with_voxel_type;

use super::Failure;
use super::output::cores;

/// A pool of the threads asked for, or of all cores.
pub fn pool(threads: Option<usize>) -> Pool {
    Pool::new(threads.unwrap_or_else(cores).clamp(1, THREADS_MAX))
}

/// An error with the file it is about.
pub fn about(path: &Path) -> impl Fn(&dyn std::fmt::Display) -> Failure + '_ {
    move |error| Failure::Impossible(format!("{}: {error}", path.display()))
}

/// Refuses a name that is no NIfTI's before any work is done.
pub fn check_output(path: &Path) -> Result<(), Failure> {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    if name.ends_with(".nii") || name.ends_with(".nii.gz") {
        return Ok(());
    }
    Err(Failure::usage(format!("{}: the output must be named .nii or .nii.gz", path.display())))
}

/// A folder named on the command line, which has to be there.
pub fn folder(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_dir() { Ok(path) } else { Err("no such folder".into()) }
}

/// All real values.
pub fn real(volume: &Volume) -> Array3<f32> {
    volume.to_f32(0..volume.shape()[0])
}

/// 1 where the real value is the label, or is not 0 when none is named. NaN is nothing.
///
/// # Errors
/// As [`check_labels`] when the label does not occur.
pub fn mask(volume: &Volume, path: &Path, label: Option<f64>) -> Result<Array3<u8>, Failure> {
    if let Some(label) = label {
        check_labels(volume, path, &[label])?;
    }
    let rescale = volume.rescale();
    let inside = |value: f64| label.map_or(value != 0.0 && !value.is_nan(), |label| value == label);
    Ok(with_voxel_type!(volume.voxel_type(), T => {
        volume.stored::<T>().expect("the type is the volume's").mapv(|v| u8::from(inside(rescale.apply(v.to_f64()))))
    }))
}

/// A label that does not occur is a mistake, not an empty mask.
///
/// # Errors
/// [`Failure::Impossible`] for it, and for an image that is no label map.
pub fn check_labels(volume: &Volume, path: &Path, wanted: &[f64]) -> Result<(), Failure> {
    /// A label map has few labels; an image has thousands of values.
    const LABELS_MAX: usize = 4096;
    let about = about(path);
    let mut seen = BTreeSet::new();
    let [slices, rows, columns] = volume.shape();
    let mut slice = vec![0.0f32; rows * columns];
    for k in 0..slices {
        volume.read_slice_f32(k, &mut slice);
        let mut last = f32::NAN;
        for v in &slice {
            if *v != last {
                last = *v;
                if v.fract() != 0.0 {
                    return Err(about(&format!("not a label map: it has the value {v}")));
                }
                seen.insert(*v as i64);
            }
        }
        volume.release(k..k + 1);
        if seen.len() > LABELS_MAX {
            return Err(about(&format!("not a label map: it has more than {LABELS_MAX} values")));
        }
    }
    match wanted.iter().find(|label| label.fract() != 0.0 || !seen.contains(&(**label as i64))) {
        Some(label) => {
            let some: Vec<String> = seen.iter().take(20).map(i64::to_string).collect();
            Err(about(&format!("label {label} does not occur; it has {}", some.join(", "))))
        }
        None => Ok(()),
    }
}

/// The labels of a label map.
///
/// # Errors
/// [`Failure::Impossible`] when a value is no whole number from 0 on.
pub fn labels(volume: &Volume, path: &Path) -> Result<Array3<u32>, Failure> {
    let rescale = volume.rescale();
    let mut wrong = None;
    let labels = with_voxel_type!(volume.voxel_type(), T => {
        volume.stored::<T>().expect("the type is the volume's").mapv(|v| {
            let value = rescale.apply(v.to_f64());
            if !(value >= 0.0 && value <= f64::from(u32::MAX) && value.fract() == 0.0) {
                wrong.get_or_insert(value);
            }
            value as u32
        })
    });
    match wrong {
        Some(value) => Err(about(path)(&format!("{value} is no label: labels are whole numbers from 0 on"))),
        None => Ok(labels),
    }
}

/// Writes an array with a geometry.
pub fn write<T: Voxel>(path: &Path, voxels: ArrayView3<T>, affine: Affine, pool: &Pool) -> Result<(), Failure> {
    nifti::write_array(path, voxels, affine, Rescale::IDENTITY, Some(pool)).map_err(Failure::impossible)
}

/// How real values of `like` are stored: as it stores its own, floats in 32 bits.
pub fn stored_like(like: &Volume) -> (VoxelType, Rescale) {
    match like.voxel_type() {
        VoxelType::F32 | VoxelType::F64 => (VoxelType::F32, Rescale::IDENTITY),
        voxel => (voxel, like.rescale()),
    }
}

/// The next real values of a file; integers are rounded to the nearest and kept in range.
pub fn write_real(writer: &mut NiftiWriter<'_>, values: &[f32], (voxel, rescale): (VoxelType, Rescale)) -> Result<(), Failure> {
    let written = match voxel {
        VoxelType::F32 if rescale == Rescale::IDENTITY => writer.write_voxels(values),
        voxel => with_voxel_type!(voxel, T => {
            let stored = |v: &f32| T::from_f64((f64::from(*v) - rescale.intercept) / rescale.slope);
            writer.write_voxels(&values.iter().map(stored).collect::<Vec<T>>())
        }),
    };
    written.map_err(Failure::impossible)
}

/// One number for all axes, or three for `z,y,x`.
pub fn parse_zyx(text: &str) -> Result<[f64; 3], String> {
    let numbers: Result<Vec<f64>, _> = text.split(',').map(|n| n.trim().parse()).collect();
    match numbers.as_deref() {
        Ok([all]) => Ok([*all; 3]),
        Ok([z, y, x]) => Ok([*z, *y, *x]),
        _ => Err("one number, or three as Z,Y,X".into()),
    }
}

/// Whole numbers, one for all axes or three for `z,y,x`.
pub fn parse_zyx_whole(text: &str) -> Result<[usize; 3], String> {
    let zyx = parse_zyx(text)?;
    if zyx.iter().all(|v| *v >= 0.0 && v.fract() == 0.0 && *v < 1e6) {
        Ok(zyx.map(|v| v as usize))
    } else {
        Err("whole numbers from 0 on".into())
    }
}

/// `A:B` as Python slices: from A up to B and not with it; negative numbers count from the end, and either may be left out.
pub fn parse_slice(text: &str) -> Result<(Option<i64>, Option<i64>), String> {
    let number = |t: &str| match t.trim() {
        "" => Ok(None),
        n => n.parse().map(Some).map_err(|_| format!("{n:?} is no whole number")),
    };
    let (a, b) = text.split_once(':').ok_or("a range is A:B")?;
    Ok((number(a)?, number(b)?))
}

/// The indices a slice means of `count`, cut to what is there; None when that is nothing.
pub fn resolve_slice((a, b): (Option<i64>, Option<i64>), count: usize) -> Option<std::ops::Range<usize>> {
    let n = count as i64;
    let at = |v: i64| (if v < 0 { v + n } else { v }).clamp(0, n) as usize;
    let range = a.map_or(0, at)..b.map_or(count, at);
    (range.start < range.end).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_mean_what_they_mean_in_python() {
        let of = |text: &str| resolve_slice(parse_slice(text).unwrap(), 10);
        assert_eq!((of("2:5"), of(":"), of("-3:"), of(":-8")), (Some(2..5), Some(0..10), Some(7..10), Some(0..2)));
        assert_eq!((of("5:5"), of("8:2"), of("4:99"), of("20:30")), (None, None, Some(4..10), None));
        assert!(parse_slice("5").is_err() && parse_slice("a:b").is_err());
    }
}
