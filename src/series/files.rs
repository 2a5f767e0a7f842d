//! Series of DICOM files in a folder, in any order and under any names, to volumes: headers first, then each slice once, to
//! its final place.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::arrange::{Arrangement, FrameRecord, arrange, fingerprint};
use super::to_real;
use crate::dicom::file::files_below;
use crate::dicom::{Header, Instance};
use crate::geometry::Reason;
use crate::study::{Modality, Rejection, RejectionCode, Uid};
use crate::volume::{MappedFile, Rescale, Volume, VolumeError, VoxelType};
use crate::with_voxel_type;

/// Bytes that hold the header of nearly every image; where they do not, all of the file is read.
const HEADER_BYTES: usize = 16 << 10;

/// Files up to this size are read, larger ones are mapped.
const READ_BYTES_MAX: u64 = 8 << 20;

/// Files that cannot be read, or cannot be one volume.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The system's answer.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The data is wrong.
    #[error("{}: {rejection}", path.display())]
    Rejected {
        /// The file or folder it is about.
        path: PathBuf,
        /// What is wrong.
        rejection: Rejection,
    },
    /// No room for the volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> FilesError + '_ {
    move |source| FilesError::Io { path: path.to_owned(), source }
}

fn rejected(path: &Path) -> impl FnOnce(Rejection) -> FilesError + '_ {
    move |rejection| FilesError::Rejected { path: path.to_owned(), rejection }
}

/// One series found in files, headers only.
#[derive(Debug, Clone)]
pub struct FileSeries {
    /// Series Instance UID.
    pub series: Uid,
    /// Study Instance UID.
    pub study: Uid,
    /// Modality.
    pub modality: Modality,
    /// Fingerprint of the patient.
    pub patient: u64,
    /// Frame of Reference UID.
    pub frame_of_reference: Option<Uid>,
    /// Header of its first file.
    pub first: Arc<Header>,
    /// Its files.
    pub files: Arc<Vec<PathBuf>>,
    records: Vec<FrameRecord>,
    /// Of each record: its file and whether that has more than one frame.
    homes: Vec<(usize, bool)>,
}

/// What a folder or file holds.
#[derive(Debug, Clone, Default)]
pub struct Scan {
    /// Series with images, the one with most frames first.
    pub series: Vec<FileSeries>,
    /// Files that are no images, and why.
    pub others: Vec<(PathBuf, Rejection)>,
}

/// A series as a volume.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The voxels, slices in their order.
    pub volume: Volume,
    /// How they were ordered, and what was found.
    pub arrangement: Arrangement,
}

/// Reads the headers of all DICOM files under `path`: a folder, one file, or the DICOMDIR of a medium (whose folder is then
/// searched: names inside files are not followed).
///
/// # Errors
/// [`FilesError::Io`] for a path that cannot be read; files that are no images are named in the result.
pub fn scan(path: &Path) -> Result<Scan, FilesError> {
    let is_folder = std::fs::metadata(path).map_err(io_error(path))?.is_dir();
    let medium = !is_folder && path.file_name().is_some_and(|name| name.eq_ignore_ascii_case("DICOMDIR"));
    let top = match path.parent() {
        Some(folder) if medium && folder.as_os_str().is_empty() => ".".as_ref(),
        Some(folder) if medium => folder,
        _ => path,
    };
    let files = files_below(top).map_err(io_error(top))?;
    let mut scan = Scan::default();
    let mut buffer = Vec::new();
    for file in files {
        match read_header(&file, &mut buffer)? {
            Ok(header) => scan.take(file, &header),
            Err(rejection) => scan.others.push((file, rejection)),
        }
    }
    scan.series.sort_by_key(|series| std::cmp::Reverse(series.records.len()));
    Ok(scan)
}

fn read_header(path: &Path, buffer: &mut Vec<u8>) -> Result<Result<Header, Rejection>, FilesError> {
    let file = File::open(path).map_err(io_error(path))?;
    buffer.clear();
    (&file).take(HEADER_BYTES as u64).read_to_end(buffer).map_err(io_error(path))?;
    match Header::parse_start(buffer) {
        Ok(Some(header)) => Ok(Ok(header)),
        Ok(None) => Ok(with_instance(path, buffer, |instance| Ok(instance.header.clone()))?),
        Err(rejection) => Ok(Err(rejection)),
    }
}

/// Opens an instance, in `buffer` where it is small, and looks at it.
fn with_instance<T>(
    path: &Path,
    buffer: &mut Vec<u8>,
    look: impl FnOnce(&Instance<'_>) -> Result<T, Rejection>,
) -> Result<Result<T, Rejection>, FilesError> {
    let file = File::open(path).map_err(io_error(path))?;
    let length = file.metadata().map_err(io_error(path))?.len();
    if length > READ_BYTES_MAX {
        let mapped = MappedFile::open(path)?;
        return Ok(Instance::parse_mapped(mapped).and_then(|instance| look(&instance)));
    }
    // The buffer keeps its length between files of one size: no byte is zeroed only to be overwritten.
    buffer.resize(length as usize, 0);
    file.read_exact_at(buffer, 0).map_err(io_error(path))?;
    Ok(Instance::parse(buffer).and_then(|instance| look(&instance)))
}

impl Scan {
    fn take(&mut self, file: PathBuf, header: &Header) {
        let known = self.series.iter().position(|s| s.series == header.series && s.patient == header.patient);
        let series = match known {
            Some(n) => &mut self.series[n],
            None => {
                self.series.push(FileSeries {
                    series: header.series.clone(),
                    study: header.study.clone(),
                    modality: header.modality,
                    patient: header.patient,
                    frame_of_reference: header.frame_of_reference.clone(),
                    first: Arc::new(header.clone()),
                    files: Arc::default(),
                    records: Vec::new(),
                    homes: Vec::new(),
                });
                self.series.last_mut().expect("just pushed")
            }
        };
        for n in 0..header.frames.len() {
            // Until pixels are read, every frame counts as a different image.
            let content = series.records.len() as u64;
            series.records.push(FrameRecord::new(header, n, content));
            series.homes.push((series.files.len(), header.frames.len() > 1));
        }
        Arc::make_mut(&mut series.files).push(file);
    }

    /// Whether all images are of one patient.
    pub fn one_patient(&self) -> bool {
        self.series.windows(2).all(|pair| pair[0].patient == pair[1].patient)
    }
}

impl FileSeries {
    /// Frames, scouts and strays included.
    pub fn frames(&self) -> usize {
        self.records.len()
    }

    /// The frames, without their pixels.
    pub fn records(&self) -> &[FrameRecord] {
        &self.records
    }

    fn folder(&self) -> &Path {
        self.files[0].parent().unwrap_or(&self.files[0])
    }

    /// Orders the frames. Pixels are read only where two frames claim one place.
    ///
    /// # Errors
    /// [`FilesError::Rejected`] as of [`arrange`].
    pub fn arrange(&mut self) -> Result<Arrangement, FilesError> {
        match arrange(&self.records) {
            Err(rejection) if rejection.code == RejectionCode::ConflictingDuplicate => {
                self.read_contents()?;
                arrange(&self.records).map_err(rejected(self.folder()))
            }
            other => other.map_err(rejected(self.folder())),
        }
    }

    fn read_contents(&mut self) -> Result<(), FilesError> {
        let mut buffer = Vec::new();
        let mut scratch = Vec::new();
        for (n, file) in self.files.iter().enumerate() {
            let contents = with_instance(file, &mut buffer, |instance| {
                (0..instance.header.frames.len())
                    .map(|frame| instance.decode_frame(frame, &mut scratch).map(fingerprint))
                    .collect::<Result<Vec<u64>, Rejection>>()
            })?
            .map_err(rejected(file))?;
            for (record, home) in self.records.iter_mut().zip(&self.homes) {
                if home.0 == n && let Some(content) = contents.get(record.frame) {
                    record.content = *content;
                }
            }
        }
        Ok(())
    }

    /// The volumes of a series that has several images at each place (times, echoes, b-values), as series of their own in
    /// the order of their passes and instance numbers. One, when it has not.
    pub fn passes(&self) -> Vec<FileSeries> {
        let one = || vec![self.clone()];
        let mut placed: Vec<(f64, usize)> = (0..self.records.len())
            .filter(|n| !self.records[*n].localizer)
            .filter_map(|n| self.records[n].plane.map(|plane| (plane, n)))
            .map(|(plane, n)| (plane.along_normal_mm(), n))
            .collect();
        placed.sort_by(|a, b| a.0.total_cmp(&b.0));
        let places: Vec<&[(f64, usize)]> = placed.chunk_by(|a, b| b.0 - a.0 < 0.01).collect();
        let count = places.first().map_or(0, |place| place.len());
        if count < 2 || places.iter().any(|place| place.len() != count) {
            return one();
        }
        let mut members: Vec<Vec<usize>> = vec![Vec::new(); count];
        for place in places {
            let mut here: Vec<usize> = place.iter().map(|(_, n)| *n).collect();
            let key = |n: usize| {
                let r = &self.records[n];
                (r.pass[..3].to_vec(), r.instance_number, r.pass[3], &r.sop_instance, r.frame)
            };
            here.sort_by(|a, b| key(*a).cmp(&key(*b)));
            for (volume, n) in members.iter_mut().zip(here) {
                volume.push(n);
            }
        }
        let volume = |members: Vec<usize>| FileSeries {
            records: members.iter().map(|n| self.records[*n].clone()).collect(),
            homes: members.iter().map(|n| self.homes[*n]).collect(),
            series: self.series.clone(),
            study: self.study.clone(),
            modality: self.modality,
            patient: self.patient,
            frame_of_reference: self.frame_of_reference.clone(),
            first: Arc::clone(&self.first),
            files: Arc::clone(&self.files),
        };
        members.into_iter().map(volume).collect()
    }

    /// Reads the pixels. Missing slices hold the lowest stored value of the series, and the arrangement's verdict names them.
    ///
    /// # Errors
    /// [`FilesError`].
    pub fn load(&mut self) -> Result<Loaded, FilesError> {
        let arrangement = self.arrange()?;
        let (voxel, rescale) = arrangement.voxel(&self.records);
        let mut reader = FrameReader { series: self, open: None, buffer: Vec::new(), real: Vec::new(), scratch: Vec::new() };
        let missing = arrangement.order.iter().any(Option::is_none);
        let filler = if missing { reader.lowest(&arrangement, voxel, rescale)? } else { Vec::new() };
        let order = &arrangement.order;
        let volume = Volume::build(arrangement.grid, voxel, rescale, |k, out| match order[k] {
            Some(n) => reader.read(n, voxel, rescale, out),
            None => {
                out.chunks_exact_mut(filler.len()).for_each(|o| o.copy_from_slice(&filler));
                Ok(())
            }
        })?;
        Ok(Loaded { volume, arrangement })
    }

    /// The text of a top-level element of the first file, for a person's own eyes only.
    pub fn text(&self, tags: &[crate::dicom::Tag]) -> Result<Vec<Option<String>>, FilesError> {
        let mut buffer = Vec::new();
        let texts = |instance: &Instance<'_>| Ok(tags.iter().map(|tag| instance.text(*tag)).collect());
        with_instance(&self.files[0], &mut buffer, texts)?.map_err(rejected(&self.files[0]))
    }
}

/// Reads frames of a series one by one; a file with many frames stays open.
struct FrameReader<'s> {
    series: &'s FileSeries,
    open: Option<(usize, Instance<'static>)>,
    buffer: Vec<u8>,
    scratch: Vec<u8>,
    real: Vec<u8>,
}

impl FrameReader<'_> {
    fn read(&mut self, n: usize, voxel: VoxelType, rescale: Rescale, out: &mut [u8]) -> Result<(), FilesError> {
        let record = &self.series.records[n];
        let (file, many) = self.series.homes[n];
        let path = &self.series.files[file];
        let (scratch, real) = (&mut self.scratch, &mut self.real);
        let mut put = |instance: &Instance<'_>| -> Result<(), Rejection> {
            let same_size = [instance.header.rows, instance.header.columns] == record.size;
            if !same_size || record.frame >= instance.header.frames.len() {
                return Err(Rejection::new(RejectionCode::Malformed, "the file has changed while it was read"));
            }
            let mut stored = instance.decode_frame(record.frame, scratch)?;
            if (record.voxel, record.rescale) != (voxel, rescale) {
                to_real(stored, record.voxel, record.rescale, real);
                stored = real;
            }
            out.copy_from_slice(stored);
            Ok(())
        };
        if !many {
            return with_instance(path, &mut self.buffer, put)?.map_err(rejected(path));
        }
        if self.open.as_ref().is_none_or(|(open, _)| *open != file) {
            let instance = Instance::parse_mapped(MappedFile::open(path)?).map_err(rejected(path))?;
            self.open = Some((file, instance));
        }
        let (_, instance) = self.open.as_ref().expect("just opened");
        put(instance).map_err(rejected(path))
    }

    /// The lowest stored value of all slices, as bytes.
    fn lowest(&mut self, arrangement: &Arrangement, voxel: VoxelType, rescale: Rescale) -> Result<Vec<u8>, FilesError> {
        let [_, rows, columns] = arrangement.grid.shape;
        let mut slice = vec![0; rows * columns * voxel.bytes()];
        let mut lowest: Option<f64> = None;
        for n in arrangement.order.iter().flatten() {
            self.read(*n, voxel, rescale, &mut slice)?;
            let here = with_voxel_type!(voxel, T => {
                let values = slice.chunks_exact(size_of::<T>());
                values.map(|b| f64::from(T::from_le_bytes(b.try_into().expect("chunks of that size")))).fold(f64::NAN, f64::min)
            });
            lowest = Some(lowest.map_or(here, |low| low.min(here)));
        }
        let value = lowest.unwrap_or(0.0);
        Ok(with_voxel_type!(voxel, T => (value as T).to_le_bytes().to_vec()))
    }
}

/// One sentence per frame kind left out, for a person: `2 localizer, 1 duplicate`.
pub fn set_aside_words(arrangement: &Arrangement) -> String {
    let word = |reason| match reason {
        Reason::Localizer => "localizer",
        Reason::OtherOrientation => "of another orientation",
        Reason::OtherSize => "of another size",
        Reason::OffTheLine => "beside the stack",
        Reason::Duplicate => "duplicate",
        Reason::NoPlace => "without a place",
    };
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for aside in &arrangement.set_aside {
        match counts.iter_mut().find(|(w, _)| *w == word(aside.reason)) {
            Some((_, count)) => *count += 1,
            None => counts.push((word(aside.reason), 1)),
        }
    }
    counts.iter().map(|(word, count)| format!("{count} {word}")).collect::<Vec<_>>().join(", ")
}
