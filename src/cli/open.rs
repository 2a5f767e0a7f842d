//! Any image a command is given: NIfTI, NRRD, a DICOM file, a folder of them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use scanside::nifti::{ImageFileError, NiftiReader};
use scanside::nrrd;
use scanside::series::Arrangement;
use scanside::series::files::{FileSeries, FilesError, Scan, scan, set_aside_words};
use scanside::study::Modality;
use scanside::volume::Volume;

use super::Failure;

/// What a path turned out to be.
pub enum Image {
    /// A NIfTI file, of one volume or a series of them.
    Nifti(Box<NiftiReader>),
    /// A NRRD file.
    Nrrd(Volume),
    /// DICOM files, headers only.
    Dicom(Scan),
}

/// The forms a file can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// NIfTI, plain or gzipped.
    Nifti,
    /// NRRD.
    Nrrd,
    /// A folder, or a file that is DICOM or nothing.
    Dicom,
}

/// What is at a path, told by its bytes; a name that promises a NIfTI is held to it.
///
/// # Errors
/// [`Failure::Usage`] when there is nothing there, [`Failure::Impossible`] when it cannot be read.
pub fn form(path: &Path) -> Result<Form, Failure> {
    let kind = std::fs::metadata(path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    if kind.is_dir() {
        return Ok(Form::Dicom);
    }
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(132).read_to_end(&mut start));
    read.map_err(|error| Failure::impossible(format!("cannot read {}: {error}", path.display())))?;
    if nrrd::is_nrrd(&start) {
        return Ok(Form::Nrrd);
    }
    let size = start.first_chunk::<4>().map(|b| [i32::from_le_bytes(*b), i32::from_be_bytes(*b)]);
    let named = path.file_name().is_some_and(|name| {
        let name = name.to_string_lossy().to_lowercase();
        name.ends_with(".nii") || name.ends_with(".nii.gz")
    });
    let nifti = size.is_some_and(|sizes| sizes.iter().any(|n| [348, 540].contains(n)));
    Ok(if named || nifti || start.starts_with(&[0x1F, 0x8B]) { Form::Nifti } else { Form::Dicom })
}

/// Looks at a path and finds out what it is, by its bytes and not by its name.
///
/// # Errors
/// As [`form`], and [`Failure::Impossible`] when it is no image.
pub fn look(path: &Path) -> Result<Image, Failure> {
    match form(path)? {
        Form::Nrrd => nrrd::read(path).map(Image::Nrrd).map_err(Failure::impossible),
        Form::Nifti => NiftiReader::open(path).map(|reader| Image::Nifti(Box::new(reader))).map_err(Failure::impossible),
        Form::Dicom => dicom(path),
    }
}

fn dicom(path: &Path) -> Result<Image, Failure> {
    let scan = scan(path).map_err(Failure::impossible)?;
    if !scan.series.is_empty() {
        return Ok(Image::Dicom(scan));
    }
    Err(Failure::impossible(match scan.others.as_slice() {
        [] => format!("{}: the folder is empty", path.display()),
        [(file, why)] => format!("{}: {why}", file.display()),
        [(file, why), ..] => {
            format!("{}: none of {} files is an image ({}: {why})", path.display(), scan.others.len(), file.display())
        }
    }))
}

/// The series that is meant: the one named, else the largest, with a note about the others.
///
/// # Errors
/// [`Failure::Usage`] when the named one is not there, [`Failure::Impossible`] when the images are of two patients and none
/// is named.
pub fn choose(mut scan: Scan, path: &Path, named: Option<&str>) -> Result<FileSeries, Failure> {
    let list = |scan: &Scan| {
        let line = |s: &FileSeries| format!("  {} ({}, {} images)", s.series, s.modality.term(), s.frames());
        scan.series.iter().map(line).collect::<Vec<_>>().join("\n")
    };
    let at = match named {
        Some(uid) => scan.series.iter().position(|s| s.series.as_str() == uid).ok_or_else(|| {
            Failure::usage(format!("{}: no series {uid}; there are\n{}", path.display(), list(&scan)))
        })?,
        None if !scan.one_patient() => {
            let text = "the images are of more than one patient; convert --series takes one of them out";
            return Err(Failure::impossible(format!("{}: {text}\n{}", path.display(), list(&scan))));
        }
        None => 0,
    };
    if named.is_none() && scan.series.len() > 1 {
        eprintln!("scanside: {}: taking the largest of {} series; convert --series takes another out", path.display(), scan.series.len());
        eprintln!("{}", list(&scan));
    }
    Ok(scan.series.swap_remove(at))
}

/// What keeps a series from being an even stack, in words; None when nothing does.
pub fn incomplete(arrangement: &Arrangement) -> Option<String> {
    let verdict = &arrangement.verdict;
    if !verdict.missing_slices.is_empty() {
        let places = verdict.missing_slices.iter().take(8).map(|k| format!("{:.2}", arrangement.along_normal_mm[*k]));
        let places = places.collect::<Vec<_>>().join(", ");
        let more = if verdict.missing_slices.len() > 8 { ", …" } else { "" };
        return Some(format!("{} slices are missing (at {places}{more} mm)", verdict.missing_slices.len()));
    }
    verdict.uneven.map(|u| {
        format!("the slices are {:.3} to {:.3} mm apart; no even grid can hold them", u.smallest_mm, u.largest_mm)
    })
}

/// What a person should know of a series though it does not stop the work.
pub fn notes(arrangement: &Arrangement) -> Vec<String> {
    let mut notes = Vec::new();
    if !arrangement.set_aside.is_empty() {
        notes.push(format!("set aside: {}", set_aside_words(arrangement)));
    }
    if arrangement.verdict.is_tilted() {
        notes.push(format!("tilted gantry: the stack is sheared by {:.2} degrees", arrangement.verdict.tilt_degrees));
    }
    if !arrangement.calibrated {
        notes.push("the distance between pixels is not known: 1 mm is assumed".to_owned());
    }
    notes
}

/// One volume of whatever is at `path`. Notes go to stderr.
///
/// # Errors
/// As [`look`] and [`choose`]; [`Failure::Impossible`] for a series with gaps, uneven spacing or several volumes.
pub fn open_volume(path: &Path) -> Result<Volume, Failure> {
    open_series(path, None, false)
}

/// A volume, and what its files tell of it.
pub struct Told {
    /// The voxels.
    pub volume: Volume,
    /// It has a place in patient space; a cine has none, and no left and right.
    pub placed: bool,
    /// The series it was read from, where it is DICOM.
    pub series: Option<FileSeries>,
}

impl Told {
    /// The modality, where it is told.
    pub fn modality(&self) -> Option<Modality> {
        self.series.as_ref().map(|series| series.modality)
    }

    fn plain(volume: Volume) -> Self {
        Self { volume, placed: true, series: None }
    }
}

/// As [`open_volume`], with what the files tell.
///
/// # Errors
/// As [`open_volume`].
pub fn open_told(path: &Path) -> Result<Told, Failure> {
    open(path, None, false)
}

/// As [`open_volume`], of the series named; `tolerant` takes a series with gaps (filled with its lowest value) or uneven
/// spacing (called even), saying so.
///
/// # Errors
/// As [`open_volume`].
pub fn open_series(path: &Path, named: Option<&str>, tolerant: bool) -> Result<Volume, Failure> {
    open(path, named, tolerant).map(|told| told.volume)
}

fn open(path: &Path, named: Option<&str>, tolerant: bool) -> Result<Told, Failure> {
    let scan = match look(path)? {
        Image::Nrrd(volume) => return Ok(Told::plain(volume)),
        Image::Nifti(mut reader) => {
            let header = reader.header();
            if header.forms_disagree {
                eprintln!("scanside: {}: sform and qform disagree; the sform is taken", path.display());
            }
            let volumes = header.volumes();
            if volumes != 1 {
                return Err(Failure::impossible(ImageFileError::Series { path: path.to_owned(), volumes }));
            }
            return reader.volume(0).map(Told::plain).map_err(Failure::impossible);
        }
        Image::Dicom(scan) => scan,
    };
    let mut series = choose(scan, path, named)?;
    let passes = series.passes();
    let loaded = match series.load() {
        Err(FilesError::Rejected { .. }) if passes.len() > 1 => {
            let text = format!("{}: a series of {} volumes where one is wanted", path.display(), passes.len());
            return Err(Failure::impossible(text));
        }
        other => other.map_err(Failure::impossible)?,
    };
    for note in notes(&loaded.arrangement) {
        eprintln!("scanside: {}: {note}", path.display());
    }
    match incomplete(&loaded.arrangement) {
        Some(why) if !tolerant => return Err(Failure::impossible(format!("{}: {why}", path.display()))),
        Some(why) => eprintln!("scanside: {}: {why}", path.display()),
        None => {}
    }
    Ok(Told { volume: loaded.volume, placed: loaded.arrangement.placed, series: Some(series) })
}
