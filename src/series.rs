//! Instances to volumes, slice by slice and in any order. Completion is decided by geometry first, by the sender's release
//! second, by a timer last.
//!
//! Each decoded frame is written once, into the next free slot of its series' spool file; when the series is complete the
//! slots are given the order of the lattice ([`Volume::arranged`]), and nothing is copied. Time is an argument.

mod arrange;
pub mod files;

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use arrange::{Arrangement, FrameRecord, SetAside, arrange, fingerprint};

use crate::dicom::Instance;
use crate::geometry::{Affine, Grid, Plane, Spacing, Verdict};
use crate::study::{Modality, MrAcquisition, Rejection, RejectionCode, Uid};
use crate::volume::{Rescale, Volume, VolumeError, VolumeWriter, VoxelType};
use crate::with_voxel_type;

/// How much one [`Assembler`] takes on, and how long it waits.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Frames of one series. Address space and room on the disk are planned by it.
    pub slices_max: usize,
    /// Bytes of one series in the spool.
    pub series_bytes_max: usize,
    /// Series growing at once. Each costs a file and its records; senders interleave a few, never dozens.
    pub series_open_max: usize,
    /// Quiet time after which a series that has its announced number of images counts as complete though its sender
    /// stays connected.
    pub settle: Duration,
    /// The last resort: quiet time after which a series is taken as it is.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            slices_max: 4096,
            // Address space, not memory: a 32-bit board has little of it.
            series_bytes_max: if cfg!(target_pointer_width = "64") { (1usize << 30).saturating_mul(4) } else { 1 << 29 },
            series_open_max: 16,
            settle: Duration::from_secs(5),
            idle: Duration::from_secs(60),
        }
    }
}

/// Why an instance was not added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The data is wrong.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The spool would not do.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// As many series are growing as may; later there is room again.
    #[error("{0} series are being received already")]
    Busy(usize),
}

/// What an instance was to its series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// The first of a series.
    Opened,
    /// One more.
    Added,
    /// Known already, with the same pixels: taken once.
    Duplicate,
    /// Its series has been finished; it is no part of the volume.
    Late,
}

/// One frame that can be read now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AddedFrame {
    /// Its slice in [`Added::reader`], by arrival; in the finished volume it stands elsewhere ([`Assembled::slots`]).
    pub slot: usize,
    /// Where it is.
    pub plane: Option<Plane>,
    /// Its place along its normal.
    pub along_normal_mm: Option<f64>,
}

/// The outcome of one instance.
#[derive(Debug, Clone)]
pub struct Added {
    /// Series Instance UID.
    pub series: Uid,
    /// Study Instance UID.
    pub study: Uid,
    /// Modality.
    pub modality: Modality,
    /// What it was to its series.
    pub arrival: Arrival,
    /// Its frames; none for a duplicate or a late one.
    pub frames: Vec<AddedFrame>,
    /// The growing volume, slices by arrival, with a provisional affine. A later instance may move the series to another
    /// reader (when its rescale differs): slots stay the same.
    pub reader: Option<Volume>,
}

/// A finished series.
#[derive(Debug, Clone)]
pub struct SeriesOutcome {
    /// Series Instance UID.
    pub series: Uid,
    /// Study Instance UID.
    pub study: Uid,
    /// Modality.
    pub modality: Modality,
    /// Instances received.
    pub instances: usize,
    /// When its first instance came.
    pub opened: Instant,
    /// When its last instance came.
    pub last: Instant,
    /// How it was made, by its first image; magnetic resonance only.
    pub mr: Option<Box<MrAcquisition>>,
    /// The volume, or why there is none.
    pub result: Result<Assembled, Rejection>,
}

/// Where a slice comes from, for objects that refer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceSource {
    /// SOP Class UID.
    pub sop_class: Uid,
    /// SOP Instance UID.
    pub sop_instance: Uid,
    /// Frame number as DICOM counts, from 1.
    pub frame_number: usize,
}

/// What one frame says of its own pixels, where it has no place in patient space.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Planar {
    /// Distance of rows and columns; None where nothing says it.
    pub spacing_mm: Option<[f64; 2]>,
    /// The rectangle that is an image: `[left, top, right, bottom]` in pixels, the last included (PS3.3 C.8.5.5.1.3); None
    /// where the frame tells of no regions, empty where none of its regions is an image.
    pub region: Option<[u32; 4]>,
}

/// A volume with everything known about it.
#[derive(Debug, Clone)]
pub struct Assembled {
    /// The voxels. Missing slices hold the lowest stored value of the series.
    pub volume: Volume,
    /// What was found: gaps, tilt, spacing. A gap is not yet a rejection: the exam decides.
    pub verdict: Verdict,
    /// Frames left out.
    pub set_aside: Vec<SetAside>,
    /// For each slice k the slot it was written to ([`AddedFrame::slot`]); None where it is missing.
    pub slots: Vec<Option<usize>>,
    /// For each slice k the instance it came from; None where it is missing.
    pub sources: Vec<Option<SliceSource>>,
    /// For each slice k what it says of its pixels; frames of one cine may differ (depth, zoom).
    pub planar: Vec<Planar>,
    /// True place of each slice along the normal.
    pub along_normal_mm: Vec<f64>,
    /// Frames have places in patient space; without, this is a cine.
    pub placed: bool,
    /// The distance between pixels is known.
    pub calibrated: bool,
    /// Frame of Reference UID.
    pub frame_of_reference: Option<Uid>,
    /// A window the scanner suggests: centre, width.
    pub window: Option<[f64; 2]>,
    /// Stored value outside the scanned circle.
    pub padding: Option<i64>,
    /// Time between frames of a cine.
    pub frame_time_ms: Option<f64>,
    /// What told that it is complete.
    pub completed_by: Completion,
}

/// What told that a series is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// Its lattice is whole and the sender has gone in good order.
    Released,
    /// The announced number of images is there.
    Counted,
    /// Nothing came for [`Limits::idle`], and nothing speaks for more.
    Idle,
    /// Nothing came for [`Limits::idle`] from a sender that has gone without a word or is silent: slices may be missing at
    /// either end, where no lattice shows it.
    Lost,
    /// Nothing came for [`Limits::idle`], and more was announced (Images in Acquisition).
    Short {
        /// Images announced.
        announced: usize,
        /// Images that came.
        came: usize,
    },
    /// The caller said so ([`Assembler::finish_all`]).
    Told,
}

/// Takes instances of many series at once, and gives volumes.
#[derive(Debug)]
pub struct Assembler {
    spool: PathBuf,
    limits: Limits,
    growing: Vec<Growing>,
    finished: VecDeque<SeriesOutcome>,
    past: VecDeque<Past>,
    /// Senders still connected, and when each last sent anything.
    heard: HashMap<u64, Instant>,
    files: u64,
    scratch: Vec<u8>,
}

/// Finished series that are remembered, to know a late slice from a new series. A sender repeats within hours, and a
/// scanner does not make more series than this in a day.
const PAST_MAX: usize = 256;

#[derive(Debug)]
struct Past {
    series: Uid,
    instances: HashSet<Uid>,
}

/// Frames of one size and kind, in one spool file. A scout or a stray of another size gets its own.
#[derive(Debug)]
struct Group {
    size: [usize; 2],
    placed: bool,
    localizer: bool,
    /// Stored type and rescale of its frames, until two differ; then real values as floats.
    voxel: VoxelType,
    rescale: Rescale,
    writer: VolumeWriter,
    used: usize,
}

/// Kinds of frames in one series; more are no series.
const GROUPS_MAX: usize = 4;

#[derive(Debug)]
struct Growing {
    series: Uid,
    study: Uid,
    modality: Modality,
    patient: u64,
    mr: Option<Box<MrAcquisition>>,
    frame_of_reference: Option<Uid>,
    padding: Option<i64>,
    frame_time_ms: Option<f64>,
    groups: Vec<Group>,
    records: Vec<FrameRecord>,
    /// Of each record: its group and slot.
    homes: Vec<(usize, usize)>,
    instances: HashSet<Uid>,
    /// Senders still connected, and how many instances each sent.
    open_sources: HashMap<u64, usize>,
    /// A sender of it has gone without a word.
    cut: bool,
    announced: Option<usize>,
    spoilt: Option<Rejection>,
    opened: Instant,
    last: Instant,
}

impl Assembler {
    /// An assembler that keeps its volumes in the folder `spool`. The files have no name once they are open: whatever ends the process,
    /// nothing is left behind.
    pub fn new(spool: &Path, limits: Limits) -> Self {
        Self {
            spool: spool.to_owned(),
            limits,
            growing: Vec::new(),
            finished: VecDeque::new(),
            past: VecDeque::new(),
            heard: HashMap::new(),
            files: 0,
            scratch: Vec::new(),
        }
    }

    /// Adds a DICOM file (PS3.10) that came from `source`, a number the caller gives to each association, folder or client.
    ///
    /// # Errors
    /// [`AddError`]; the instance is no part of its series then. Another image under a known SOP Instance UID, a second
    /// patient and a second frame of reference spoil the whole series: it will end as a rejection.
    pub fn add(&mut self, now: Instant, source: u64, file: &[u8]) -> Result<Added, AddError> {
        self.add_instance(now, source, &Instance::parse(file)?)
    }

    /// As [`Assembler::add`], for an instance parsed already.
    ///
    /// # Errors
    /// As [`Assembler::add`].
    pub fn add_instance(&mut self, now: Instant, source: u64, instance: &Instance<'_>) -> Result<Added, AddError> {
        let header = &instance.header;
        self.heard.insert(source, now);
        let added = |arrival, frames, reader| Added {
            series: header.series.clone(),
            study: header.study.clone(),
            modality: header.modality,
            arrival,
            frames,
            reader,
        };
        if let Some(past) = self.past.iter().find(|p| p.series == header.series) {
            let known = past.instances.contains(&header.sop_instance);
            return Ok(added(if known { Arrival::Duplicate } else { Arrival::Late }, Vec::new(), None));
        }
        let at = self.growing.iter().position(|g| g.series == header.series);
        if at.is_none() && self.growing.len() >= self.limits.series_open_max {
            return Err(AddError::Busy(self.growing.len()));
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = match at {
            Some(at) => {
                let mut store = Store { spool: &self.spool, limits: &self.limits, files: &mut self.files };
                self.growing[at].add(now, source, instance, &mut store, &mut scratch)
            }
            None => {
                let mut store = Store { spool: &self.spool, limits: &self.limits, files: &mut self.files };
                let mut growing = Growing::new(now, header);
                let result = growing.add(now, source, instance, &mut store, &mut scratch);
                // A series begins with its first good instance; what was refused opens none.
                if result.is_ok() {
                    self.growing.push(growing);
                }
                result.map(|(_, frames, reader)| (Arrival::Opened, frames, reader))
            }
        };
        self.scratch = scratch;
        let (arrival, frames, reader) = result?;
        Ok(added(arrival, frames, reader))
    }

    /// The series cannot be right, as was learnt elsewhere: it will end as this rejection.
    pub fn spoil(&mut self, series: &Uid, rejection: Rejection) {
        if let Some(growing) = self.growing.iter_mut().find(|g| g.series == *series) {
            growing.spoilt.get_or_insert(rejection);
        }
    }

    /// The sender told how many images the series has.
    pub fn announce(&mut self, series: &Uid, images: usize) {
        if let Some(growing) = self.growing.iter_mut().find(|g| g.series == *series) {
            growing.announced = Some(images);
        }
    }

    /// The sender has gone in good order. Its series with a whole lattice are finished; those with a gap wait for more
    /// (a sender may use one association per image) or fewer images than announced wait for more until the timer ends them.
    pub fn released(&mut self, now: Instant, source: u64) {
        self.heard.remove(&source);
        let mut n = 0;
        while n < self.growing.len() {
            let growing = &mut self.growing[n];
            let sent = growing.open_sources.remove(&source);
            let alone = growing.open_sources.is_empty();
            // It came again and has gone in good order.
            growing.cut &= sent.is_none();
            if let Some(sent) = sent.filter(|_| alone)
                && growing.is_over(sent > 1)
            {
                self.finish(n, now, Completion::Released);
            } else {
                n += 1;
            }
        }
    }

    /// The sender has gone without a word: what it began waits for the timer, or for the sender to come again.
    pub fn lost(&mut self, source: u64) {
        self.heard.remove(&source);
        for growing in &mut self.growing {
            growing.cut |= growing.open_sources.remove(&source).is_some();
        }
    }

    /// Lets time pass: finishes the series whose announced number is there or whose timer has run out.
    pub fn tick(&mut self, now: Instant) {
        let mut n = 0;
        while n < self.growing.len() {
            let growing = &self.growing[n];
            let quiet = now.saturating_duration_since(growing.last);
            if quiet >= self.limits.idle {
                let completion = growing.at_its_timer(&self.heard);
                self.finish(n, now, completion);
            } else if quiet >= self.limits.settle && growing.is_counted() && growing.is_over(true) {
                self.finish(n, now, Completion::Counted);
            } else {
                n += 1;
            }
        }
    }

    /// Finishes everything as it is: the folder is read to its end, or the service stops.
    pub fn finish_all(&mut self, now: Instant) {
        while !self.growing.is_empty() {
            self.finish(0, now, Completion::Told);
        }
    }

    /// The series finished since the last call, in the order they were finished.
    pub fn take_finished(&mut self) -> Vec<SeriesOutcome> {
        self.finished.drain(..).collect()
    }

    /// Series that are growing: UID, frames so far.
    pub fn growing(&self) -> impl Iterator<Item = (&Uid, usize)> {
        self.growing.iter().map(|g| (&g.series, g.records.len()))
    }

    fn finish(&mut self, n: usize, _now: Instant, completed_by: Completion) {
        let mut growing = self.growing.remove(n);
        let result = growing.assemble(completed_by);
        while self.past.len() >= PAST_MAX {
            self.past.pop_front();
        }
        self.past.push_back(Past { series: growing.series.clone(), instances: std::mem::take(&mut growing.instances) });
        self.finished.push_back(SeriesOutcome {
            series: growing.series,
            study: growing.study,
            modality: growing.modality,
            instances: self.past.back().map_or(0, |past| past.instances.len()),
            opened: growing.opened,
            last: growing.last,
            mr: growing.mr,
            result,
        });
    }
}

/// Where spool files are made.
struct Store<'a> {
    spool: &'a Path,
    limits: &'a Limits,
    files: &'a mut u64,
}

impl Store<'_> {
    fn create(
        &mut self,
        size: [usize; 2],
        plane: Option<Plane>,
        voxel: VoxelType,
        rescale: Rescale,
    ) -> Result<VolumeWriter, AddError> {
        let slice_bytes = (size[0] * size[1] * voxel.bytes()).max(1);
        let slices = self.limits.slices_max.min(self.limits.series_bytes_max / slice_bytes);
        if slices == 0 {
            let text = format!("one frame of {} x {} pixels is above the limit of a series", size[0], size[1]);
            return Err(Rejection::new(RejectionCode::TooLarge, text).into());
        }
        let unit = Affine::axial(Spacing::new([1.0; 3]).expect("a millimetre is a spacing"), [0.0; 3]);
        let affine = plane.and_then(|p| p.affine(p.normal()).ok()).unwrap_or(unit);
        *self.files += 1;
        let path = self.spool.join(format!("volume-{}-{}.raw", std::process::id(), self.files));
        // One more than may come: the filler for missing slices.
        let grid = Grid { shape: [slices + 1, size[0], size[1]], affine };
        let writer = VolumeWriter::create_growing(&path, grid, voxel, rescale)?;
        let _ = std::fs::remove_file(&path);
        Ok(writer)
    }
}

type Step = (Arrival, Vec<AddedFrame>, Option<Volume>);

impl Growing {
    fn new(now: Instant, header: &crate::dicom::Header) -> Self {
        Self {
            series: header.series.clone(),
            study: header.study.clone(),
            modality: header.modality,
            patient: header.patient,
            mr: header.mr.clone(),
            frame_of_reference: header.frame_of_reference.clone(),
            padding: header.padding,
            frame_time_ms: header.frame_time_ms,
            groups: Vec::new(),
            records: Vec::new(),
            homes: Vec::new(),
            instances: HashSet::new(),
            open_sources: HashMap::new(),
            cut: false,
            announced: None,
            spoilt: None,
            opened: now,
            last: now,
        }
    }

    fn add(
        &mut self,
        now: Instant,
        source: u64,
        instance: &Instance<'_>,
        store: &mut Store<'_>,
        scratch: &mut Vec<u8>,
    ) -> Result<Step, AddError> {
        let header = &instance.header;
        self.last = now;
        self.check_identity(header)?;
        if self.instances.contains(&header.sop_instance) {
            self.check_same(instance, scratch)?;
            *self.open_sources.entry(source).or_default() += 1;
            return Ok((Arrival::Duplicate, Vec::new(), None));
        }
        let before = self.records.len();
        if before + header.frames.len() > store.limits.slices_max {
            let text = format!("more than {} frames in one series", store.limits.slices_max);
            return Err(self.spoil(RejectionCode::TooLarge, text).into());
        }
        for n in 0..header.frames.len() {
            if let Err(error) = self.add_frame(instance, n, store, scratch) {
                // Slots already written stay unused; the series is as if the instance had not come.
                self.records.truncate(before);
                self.homes.truncate(before);
                return Err(error);
            }
        }
        self.instances.insert(header.sop_instance.clone());
        *self.open_sources.entry(source).or_default() += header.frames.len();
        let frames = self.records[before..].iter().zip(&self.homes[before..]).map(|(record, (_, slot))| AddedFrame {
            slot: *slot,
            plane: record.plane,
            along_normal_mm: record.plane.map(|p| p.along_normal_mm()),
        });
        let frames = frames.collect();
        let reader = self.homes.last().map(|(group, _)| self.groups[*group].writer.reader());
        if self.announced.is_none() {
            self.announced = header.images_in_acquisition;
        }
        Ok((Arrival::Added, frames, reader))
    }

    fn spoil(&mut self, code: RejectionCode, text: impl Into<String>) -> Rejection {
        let rejection = Rejection::new(code, text);
        self.spoilt.get_or_insert_with(|| rejection.clone());
        rejection
    }

    fn check_identity(&mut self, header: &crate::dicom::Header) -> Result<(), Rejection> {
        let differs = if header.patient != self.patient {
            "two patients"
        } else if header.study != self.study {
            "two studies"
        } else if header.frame_of_reference != self.frame_of_reference
            && header.frame_of_reference.is_some()
            && self.frame_of_reference.is_some()
        {
            "two frames of reference"
        } else if header.modality != self.modality {
            "two modalities"
        } else {
            if self.frame_of_reference.is_none() {
                self.frame_of_reference.clone_from(&header.frame_of_reference);
            }
            return Ok(());
        };
        let text = format!("series {} has images of {differs}", self.series);
        Err(self.spoil(RejectionCode::MixedStudy, text))
    }

    /// An instance that came before must be the same image.
    fn check_same(&mut self, instance: &Instance<'_>, scratch: &mut Vec<u8>) -> Result<(), AddError> {
        let uid = instance.header.sop_instance.clone();
        for n in 0..instance.header.frames.len() {
            let content = fingerprint(instance.decode_frame(n, scratch)?);
            let record = FrameRecord::new(&instance.header, n, content);
            if !self.records.contains(&record) {
                let text = format!("instance {uid} came twice with different images");
                return Err(self.spoil(RejectionCode::ConflictingDuplicate, text).into());
            }
        }
        Ok(())
    }

    fn add_frame(
        &mut self,
        instance: &Instance<'_>,
        n: usize,
        store: &mut Store<'_>,
        scratch: &mut Vec<u8>,
    ) -> Result<(), AddError> {
        let stored = instance.decode_frame(n, scratch)?;
        let record = FrameRecord::new(&instance.header, n, fingerprint(stored));
        let kind = (record.size, record.plane.is_some(), record.localizer);
        let group = match self.groups.iter().position(|g| (g.size, g.placed, g.localizer) == kind) {
            Some(group) => group,
            None if self.groups.len() >= GROUPS_MAX => {
                let text = format!("series {} has images of more than {GROUPS_MAX} sizes", self.series);
                return Err(self.spoil(RejectionCode::MixedGeometry, text).into());
            }
            None => {
                let writer = store.create(record.size, record.plane, record.voxel, record.rescale)?;
                self.groups.push(Group {
                    size: record.size,
                    placed: record.plane.is_some(),
                    localizer: record.localizer,
                    voxel: record.voxel,
                    rescale: record.rescale,
                    writer,
                    used: 0,
                });
                self.groups.len() - 1
            }
        };
        let slot = self.groups[group].write(stored, &record, store)?;
        self.homes.push((group, slot));
        self.records.push(record);
        Ok(())
    }

    fn is_counted(&self) -> bool {
        self.announced.is_some_and(|n| self.records.len() == n)
    }

    /// What ends it when its timer has run out; `heard` has when each sender last sent anything.
    fn at_its_timer(&self, heard: &HashMap<u64, Instant>) -> Completion {
        // A sender that stays connected and has gone on to another series is done with this one.
        let silent = self.open_sources.keys().any(|source| heard.get(source).is_none_or(|heard| *heard <= self.last));
        match self.announced {
            Some(announced) if announced > self.records.len() => Completion::Short { announced, came: self.records.len() },
            Some(announced) if announced == self.records.len() => Completion::Idle,
            _ if self.cut || silent => Completion::Lost,
            _ => Completion::Idle,
        }
    }

    /// Whether more would change nothing: spoilt, impossible, or whole.
    fn is_over(&self, many: bool) -> bool {
        if self.spoilt.is_some() {
            return true;
        }
        match arrange(&self.records) {
            Ok(arrangement) if !arrangement.placed => true,
            // One image from one association is how some senders send them all: not yet the end.
            // A sender may use several associations: what was announced is waited for.
            Ok(_) if self.announced.is_some_and(|n| n > self.records.len()) => false,
            Ok(arrangement) => arrangement.verdict.is_whole() && (many || self.is_counted()),
            Err(_) => many,
        }
    }

    fn assemble(&mut self, completed_by: Completion) -> Result<Assembled, Rejection> {
        if let Some(rejection) = self.spoilt.take() {
            return Err(rejection);
        }
        let arrangement = arrange(&self.records)?;
        let internal = |error: VolumeError| Rejection::new(RejectionCode::TooLarge, error.to_string());
        let home = |n: &usize| self.homes[*n];
        let group = arrangement.order.iter().flatten().next().map_or(0, |n| home(n).0);
        let slots: Vec<Option<usize>> = arrangement.order.iter().map(|n| n.as_ref().map(|n| home(n).1)).collect();
        let filler = match slots.iter().any(Option::is_none) {
            true => Some(self.groups[group].write_filler().map_err(internal)?),
            false => None,
        };
        let group = &self.groups[group];
        let all: Vec<usize> = slots.iter().map(|slot| slot.or(filler).expect("a filler where one is missing")).collect();
        let volume = group.writer.reader().arranged(arrangement.grid, &all, group.rescale).map_err(internal)?;
        let source = |n: &Option<usize>| {
            n.map(|n| SliceSource {
                sop_class: self.records[n].sop_class.clone(),
                sop_instance: self.records[n].sop_instance.clone(),
                frame_number: self.records[n].frame + 1,
            })
        };
        let planar = |n: &Option<usize>| {
            n.map_or_else(Planar::default, |n| Planar {
                spacing_mm: self.records[n].plane.map(|p| [p.row_spacing_mm, p.column_spacing_mm]).or(self.records[n].flat_spacing_mm),
                region: self.records[n].region,
            })
        };
        Ok(Assembled {
            volume,
            sources: arrangement.order.iter().map(source).collect(),
            planar: arrangement.order.iter().map(planar).collect(),
            window: arrangement.order.iter().flatten().find_map(|n| self.records[*n].window),
            verdict: arrangement.verdict,
            set_aside: arrangement.set_aside,
            slots,
            along_normal_mm: arrangement.along_normal_mm,
            placed: arrangement.placed,
            calibrated: arrangement.calibrated,
            frame_of_reference: self.frame_of_reference.clone(),
            padding: self.padding,
            frame_time_ms: self.frame_time_ms,
            completed_by,
        })
    }
}

impl Group {
    fn write(&mut self, stored: &[u8], record: &FrameRecord, store: &mut Store<'_>) -> Result<usize, AddError> {
        let slot = self.used;
        if (record.voxel, record.rescale) == (self.voxel, self.rescale) {
            self.writer.write_slice(slot, stored)?;
        } else {
            self.become_real(record.plane, store)?;
            let mut real = Vec::new();
            to_real(stored, record.voxel, record.rescale, &mut real);
            self.writer.write_slice(slot, &real)?;
        }
        self.used += 1;
        Ok(slot)
    }

    /// Rewrites the group as real values: its frames differ in rescale or in type. Readers of the old file keep it.
    fn become_real(&mut self, plane: Option<Plane>, store: &mut Store<'_>) -> Result<(), AddError> {
        let real = (VoxelType::F32, Rescale::IDENTITY);
        if (self.voxel, self.rescale) == real {
            return Ok(());
        }
        let writer = store.create(self.size, plane, real.0, real.1)?;
        let old = self.writer.reader();
        let mut bytes = Vec::new();
        with_voxel_type!(self.voxel, T => {
            for (k, slice) in (0..self.used).filter_map(|k| Some((k, old.stored_slice::<T>(k)?))) {
                bytes.clear();
                // In double precision, as for the frames to come: the outcome must not depend on which came first.
                bytes.extend(slice.iter().flat_map(|v| (self.rescale.apply(f64::from(*v)) as f32).to_le_bytes()));
                writer.write_slice(k, &bytes)?;
            }
        });
        (self.voxel, self.rescale) = real;
        self.writer = writer;
        Ok(())
    }

    /// One more slice, of the lowest stored value: what missing slices show.
    fn write_filler(&mut self) -> Result<usize, VolumeError> {
        let reader = self.writer.reader();
        let [_, rows, columns] = reader.shape();
        let bytes = with_voxel_type!(self.voxel, T => {
            let mut lowest: Option<T> = None;
            for slice in (0..self.used).filter_map(|slot| reader.stored_slice::<T>(slot)) {
                for v in &slice {
                    if lowest.is_none_or(|low| *v < low) {
                        lowest = Some(*v);
                    }
                }
            }
            let value = lowest.unwrap_or_default();
            std::iter::repeat_n(value.to_le_bytes(), rows * columns).flatten().collect::<Vec<u8>>()
        });
        let slot = self.used;
        self.writer.write_slice(slot, &bytes)?;
        self.used += 1;
        Ok(slot)
    }
}

/// Stored values as little-endian 32-bit real ones.
fn to_real(stored: &[u8], voxel: VoxelType, rescale: Rescale, out: &mut Vec<u8>) {
    out.clear();
    with_voxel_type!(voxel, T => {
        for b in stored.chunks_exact(size_of::<T>()) {
            let v = T::from_le_bytes(b.try_into().expect("chunks of that size"));
            out.extend_from_slice(&(rescale.apply(f64::from(v)) as f32).to_le_bytes());
        }
    });
}
