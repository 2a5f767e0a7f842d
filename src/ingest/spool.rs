//! The durable [`Intake`]: every instance that was acknowledged lies in a file of its own until its series is reported.
//!
//! ```text
//! <spool>/lock                                  one service per spool
//! <spool>/incoming/<series>/<instance>.dcm      acknowledged, not yet reported
//! <spool>/incoming/<series>/<instance>.conflict other bytes came under the same SOP Instance UID
//! <spool>/incoming/<series>/released            everybody who sent of it has gone in good order
//! <spool>/reported/<series>                     which instances a reported series had
//! ```
//! Names are hashes of UIDs, never text from the wire. A file is written under another name, flushed, renamed, and its
//! folder flushed, before anybody is told; a report is in the journal before [`Spool::forget`] removes what it was made
//! from. So a cut at any moment leaves an instance acknowledged and on disk, or neither; and a series that was reported
//! but not yet removed is seen by the service in its journal, and forgotten again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, RwLock};

use crossbeam_channel::Sender;
use sha2::{Digest, Sha256};

use super::{Intake, IntakeError, Received, SourceId, Stored};
use crate::dicom::{Header, Instance, file};
use crate::study::{Modality, Rejection, RejectionCode, Uid};

/// Locks that keep two senders of one instance apart. More senders than this at once are rare, and only wait.
const STRIPES: usize = 16;

/// Space that stays free on the disk beside the instance itself: journal and reports must be written on a full spool.
const FREE_BYTES_MIN: u64 = 32 << 20;

/// Name of the mark of a series that is released.
const RELEASED: &str = "released";

/// Reported series that are remembered, so that a sender who repeats himself gets no second report. The oldest go
/// first; a series of 2,000 instances takes 100 KiB here.
const REPORTED_MAX: usize = 4096;

/// Why the spool cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// Another process works in it.
    #[error("the spool {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The disk.
    #[error("cannot {doing} {}: {source}", path.display())]
    Disk {
        /// `read`, `write`, …
        doing: &'static str,
        /// Which file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

fn disk(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| SpoolError::Disk { doing, path, source }
}

/// Sizes of a [`Spool`].
#[derive(Debug, Clone)]
pub struct SpoolLimits {
    /// Most bytes of instances at a time, all series together.
    pub bytes_max: u64,
    /// Most bytes of one instance, also after inflation, and of one of its frames when decoded.
    pub instance_bytes_max: usize,
}

impl Default for SpoolLimits {
    fn default() -> Self {
        Self { bytes_max: 8 << 30, instance_bytes_max: 64 << 20 }
    }
}

/// An instance on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpooledInstance {
    /// The file; it does not change, and goes with [`Spool::forget`].
    pub path: PathBuf,
    /// Who sent it.
    pub source: SourceId,
    /// SOP Instance UID (0008,0018).
    pub sop_instance: Uid,
    /// Series Instance UID (0020,000E).
    pub series: Uid,
    /// Study Instance UID (0020,000D).
    pub study: Uid,
    /// Modality (0008,0060).
    pub modality: Modality,
    /// Size of the file.
    pub bytes: u64,
}

/// What the doors report to the assembler, in the order in which it happened to each source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arrival {
    /// An instance is on disk and will be acknowledged.
    Instance(SpooledInstance),
    /// Other bytes came under a SOP Instance UID that is on disk: refused, and the series is spoilt by it.
    Conflict {
        /// Who sent the second one.
        source: SourceId,
        /// Which series of the spool.
        series: Uid,
        /// Which instance.
        sop_instance: Uid,
        /// [`RejectionCode::ConflictingDuplicate`] and the sentence.
        rejection: Rejection,
    },
    /// Nothing more comes from this source.
    Released(SourceId),
    /// The source has gone without a word.
    Lost(SourceId),
}

/// The durable intake. Doors call it through [`Intake`] from any number of threads.
pub struct Spool {
    folder: PathBuf,
    limits: SpoolLimits,
    arrivals: Sender<Arrival>,
    /// Bytes of instances on disk or being written.
    bytes: AtomicU64,
    /// Stores hold it to read, forgetting to write: no file comes into a folder that is going.
    gate: RwLock<()>,
    stripes: [Mutex<()>; STRIPES],
    index: Mutex<Index>,
    _lock: File,
}

#[derive(Default)]
struct Index {
    incoming: HashMap<Name, BTreeMap<Name, Stamp>>,
    /// Which series each sender that is still there has sent of, and how many instances.
    senders: HashMap<SourceId, BTreeMap<Name, usize>>,
    /// Series with a mark that all their senders have gone in good order.
    released: HashSet<Name>,
    /// Series that are finished and not yet reported.
    closed: HashSet<Name>,
    /// Names of the files in `reported`, oldest first.
    reported: Vec<Name>,
}

/// Size and CRC-32C of a transfer syntax and a data set: enough to know an instance again once its bytes are gone.
/// While they are there, the bytes themselves decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    file_bytes: u64,
    data_set_bytes: u64,
    crc: u32,
}

impl Stamp {
    fn of(file: &[u8], header: &Header) -> Self {
        let data_set = file::data_set(file);
        let crc = crc32c::crc32c_append(crc32c::crc32c(header.transfer_syntax.uid.as_bytes()), data_set);
        Self { file_bytes: file.len() as u64, data_set_bytes: data_set.len() as u64, crc }
    }

    fn same_content(&self, other: &Self) -> bool {
        (self.data_set_bytes, self.crc) == (other.data_set_bytes, other.crc)
    }
}

/// File name of a UID: the first 128 bits of its SHA-256, in hex.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Name([u8; 16]);

impl Name {
    fn of(uid: &Uid) -> Self {
        Self(Sha256::digest(uid.as_str().as_bytes())[..16].try_into().expect("a SHA-256 digest has 32 bytes"))
    }

    fn parse(hex: &str) -> Option<Self> {
        let bits = u128::from_str_radix(hex, 16).ok().filter(|_| hex.len() == 32)?;
        Some(Self(bits.to_be_bytes()))
    }

    fn hex(&self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.0))
    }
}

impl Spool {
    /// Takes hold of a spool folder, making it where it is missing, and clears what a cut left half written. The
    /// assembler reads `arrivals`; when that channel is full the doors wait.
    ///
    /// # Errors
    /// [`SpoolError`]
    pub fn open(folder: &Path, limits: SpoolLimits, arrivals: Sender<Arrival>) -> Result<Self, SpoolError> {
        for part in [folder.to_owned(), folder.join("incoming"), folder.join("reported")] {
            make_folder(&part).map_err(disk("make the folder", &part))?;
        }
        let lock_path = folder.join("lock");
        let mut options = OpenOptions::new();
        let lock = options.create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
        let lock = lock.map_err(disk("open", &lock_path))?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(SpoolError::InUse(folder.to_owned())),
            Err(e) => return Err(disk("lock", &lock_path)(e.into())),
        }
        let spool = Self {
            folder: folder.to_owned(),
            limits,
            arrivals,
            bytes: AtomicU64::new(0),
            gate: RwLock::new(()),
            stripes: Default::default(),
            index: Mutex::default(),
            _lock: lock,
        };
        spool.clear_halves()?;
        Ok(spool)
    }

    /// What was acknowledged before this start and not yet reported, series by series in a stable order. Each series
    /// whose senders had all gone in good order comes from a source of its own, and is released again; the source of the
    /// others is [`SourceId::RECOVERED`], which has to be taken as lost: the rest of them may still come from elsewhere.
    /// Call it once, before the doors open.
    ///
    /// # Errors
    /// [`SpoolError`] when a folder cannot be read. A file that cannot be read, or is no sound instance any more, is set aside under
    /// `damaged` in the spool, with an error in the log, and its series counts as one whose sender was lost.
    pub fn recover(&self) -> Result<Vec<Arrival>, SpoolError> {
        let incoming = self.folder.join("incoming");
        let mut arrivals = Vec::new();
        for (series_name, series_folder) in self.series_folders()? {
            let (mut found, mut conflicts, mut damaged) = (Vec::new(), Vec::new(), false);
            let mark = series_folder.join(RELEASED);
            for path in sorted_entries(&series_folder)? {
                let (name, kind) = (name_of_file(&path), path.extension().and_then(|e| e.to_str()).unwrap_or(""));
                match (name, kind) {
                    (Some(_), "conflict") => conflicts.push(path),
                    (Some(name), "dcm") => {
                        let unreadable = |e: io::Error| Rejection::new(RejectionCode::Malformed, format!("cannot be read: {e}"));
                        let read = fs::read(&path).map_err(unreadable);
                        match read.and_then(|file| self.header(&file).map(|header| (Stamp::of(&file, &header), header))) {
                            Ok((stamp, header)) => found.push((name, path, stamp, header)),
                            Err(damage) => {
                                self.set_aside(&path, &damage);
                                damaged = true;
                            }
                        }
                    }
                    _ if path == mark => {}
                    _ => log::warn!("{}: not a file of the spool, left alone", path.display()),
                }
            }
            if damaged {
                // What its sender has sent in good order is not all here any more.
                remove(&mark)?;
            }
            let release = Release::read(&mark)?;
            let together = SourceId::fresh();
            let mut stamps = BTreeMap::new();
            for (name, path, stamp, header) in found {
                self.bytes.fetch_add(stamp.file_bytes, Ordering::Relaxed);
                stamps.insert(name, stamp);
                let source = match release {
                    None => SourceId::RECOVERED,
                    Some(Release::OfMany) => together,
                    Some(Release::OfOne) => SourceId::fresh(),
                };
                arrivals.push(arrival(path, source, header, stamp.file_bytes));
                if release == Some(Release::OfOne) {
                    arrivals.push(Arrival::Released(source));
                }
            }
            for path in conflicts {
                arrivals.extend(recovered_conflict(&path, &arrivals));
            }
            if stamps.is_empty() {
                remove(&mark)?;
                let _ = fs::remove_dir(&series_folder);
            } else {
                flush_folder(&series_folder).map_err(disk("flush", &series_folder))?;
                let mut index = self.index();
                index.incoming.insert(series_name, stamps);
                if release.is_some() {
                    index.released.insert(series_name);
                }
                if release == Some(Release::OfMany) {
                    arrivals.push(Arrival::Released(together));
                }
            }
        }
        flush_folder(&incoming).map_err(disk("flush", &incoming))?;
        Ok(arrivals)
    }

    /// Removes the instances that a report was made from, once that report is in the journal. What came too late to be
    /// part of it stays. Doing it twice does no harm.
    ///
    /// # Errors
    /// [`SpoolError`]; call it again then, or after the next start.
    pub fn forget(&self, series: &Uid, instances: &[Uid]) -> Result<(), SpoolError> {
        let names: Vec<Name> = instances.iter().map(Name::of).collect();
        self.forget_names(Name::of(series), Some(&names))
    }

    /// As [`Spool::forget`], for all that is there of the series.
    ///
    /// # Errors
    /// [`SpoolError`]
    pub fn forget_series(&self, series: &Uid) -> Result<(), SpoolError> {
        self.forget_names(Name::of(series), None)
    }

    /// Nothing is added to a series from here on: it is finished, and its report will not cover what comes later.
    pub fn close(&self, series: &Uid) {
        self.index().closed.insert(Name::of(series));
    }

    /// Whether a series was reported and forgotten; more of it is not taken.
    pub fn is_reported(&self, series: &Uid) -> bool {
        self.index().reported.contains(&Name::of(series))
    }

    /// Bytes of instances that wait for their report.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn forget_names(&self, series: Name, instances: Option<&[Name]>) -> Result<(), SpoolError> {
        let _alone = self.gate.write().unwrap_or_else(|e| e.into_inner());
        let stamps = self.index().incoming.get(&series).cloned().unwrap_or_default();
        let going: Vec<(Name, Stamp)> = match instances {
            Some(names) => names.iter().filter_map(|name| Some((*name, *stamps.get(name)?))).collect(),
            None => stamps.into_iter().collect(),
        };
        self.remember(series, &going)?;
        let folder = self.series_folder(series);
        for (name, stamp) in &going {
            remove(&folder.join(name.hex()).with_extension("dcm"))?;
            remove(&folder.join(name.hex()).with_extension("conflict"))?;
            self.bytes.fetch_sub(stamp.file_bytes, Ordering::Relaxed);
            if let Some(stamps) = self.index().incoming.get_mut(&series) {
                stamps.remove(name);
            }
        }
        // What is left came too late; nobody has said that it is all.
        self.unmark_released(series, &folder)?;
        let mut index = self.index();
        if index.incoming.get(&series).is_some_and(BTreeMap::is_empty) {
            index.incoming.remove(&series);
        }
        drop(index);
        // Fails while later instances are in it, which is as it should be.
        let _ = fs::remove_dir(&folder);
        let incoming = self.folder.join("incoming");
        flush_folder(&incoming).map_err(disk("flush", &incoming))
    }

    /// Writes down which instances a reported series had: those of an earlier call, and these.
    fn remember(&self, series: Name, instances: &[(Name, Stamp)]) -> Result<(), SpoolError> {
        let path = self.folder.join("reported").join(series.hex());
        let mut known = read_reported(&path)?;
        known.extend(instances.iter().map(|(name, stamp)| (*name, *stamp)));
        let lines: String = known
            .iter()
            .map(|(name, stamp)| format!("{} {} {} {:08x}\n", name.hex(), stamp.file_bytes, stamp.data_set_bytes, stamp.crc))
            .collect();
        write_durably(&path, lines.as_bytes()).map_err(disk("write", &path))?;
        let mut index = self.index();
        index.closed.remove(&series);
        index.reported.retain(|name| *name != series);
        index.reported.push(series);
        while index.reported.len() > REPORTED_MAX {
            let oldest = index.reported.remove(0);
            remove(&self.folder.join("reported").join(oldest.hex()))?;
        }
        Ok(())
    }

    fn keep(&self, received: &Received<'_>, header: Header) -> Result<(Stored, Option<Arrival>), Refused> {
        let (series, name) = (Name::of(&header.series), Name::of(&header.sop_instance));
        let stamp = Stamp::of(received.file, &header);
        let _open = self.gate.read().unwrap_or_else(|e| e.into_inner());
        let _mine = self.stripes[usize::from(name.0[0]) % STRIPES].lock().unwrap_or_else(|e| e.into_inner());
        let folder = self.series_folder(series);
        let path = folder.join(name.hex()).with_extension("dcm");
        let (there, reported, closed) = {
            let index = self.index();
            let there = index.incoming.get(&series).and_then(|stamps| stamps.get(&name)).copied();
            (there, index.reported.contains(&series), index.closed.contains(&series))
        };
        if let Some(there) = there {
            return if there.same_content(&stamp) && self.same_data_set(&path, received.file, &header)? {
                // Counted and told again, since the one who sends it now may be the one whose release completes the series.
                self.count(received.source, series);
                Ok((Stored::Duplicate, Some(arrival(path, received.source, header, stamp.file_bytes))))
            } else {
                Err(self.conflict(received.source, &path, header))
            };
        }
        if reported {
            let known = read_reported(&self.folder.join("reported").join(series.hex())).map_err(io_error)?;
            return match known.get(&name) {
                Some(known) if known.same_content(&stamp) => Ok((Stored::Duplicate, None)),
                _ => Err(too_late(&header.series, "was reported already")),
            };
        }
        if closed {
            return Err(too_late(&header.series, "is complete and being looked at"));
        }
        // The series grows again: until its new sender has gone, too, a restart must not take it as sent.
        self.unmark_released(series, &folder).map_err(io_error)?;
        self.reserve(stamp.file_bytes)?;
        let written = self.write_instance(series, &folder, &path, received.file);
        if let Err(error) = written {
            self.bytes.fetch_sub(stamp.file_bytes, Ordering::Relaxed);
            let _ = fs::remove_file(&path);
            let _ = fs::remove_dir(&folder);
            return Err(Refused::Told(out_of_space(error)));
        }
        self.index().incoming.entry(series).or_default().insert(name, stamp);
        self.count(received.source, series);
        Ok((Stored::New, Some(arrival(path, received.source, header, stamp.file_bytes))))
    }

    fn write_instance(&self, series: Name, folder: &Path, path: &Path, file: &[u8]) -> io::Result<()> {
        // A folder that another sender is just making counts only once something in it was acknowledged.
        if !self.index().incoming.contains_key(&series) {
            make_folder(folder)?;
            flush_folder(&self.folder.join("incoming"))?;
        }
        write_durably(path, file)
    }

    /// One more instance of this series from this sender.
    fn count(&self, source: SourceId, series: Name) {
        *self.index().senders.entry(source).or_default().entry(series).or_default() += 1;
    }

    fn unmark_released(&self, series: Name, folder: &Path) -> Result<(), SpoolError> {
        if self.index().released.remove(&series) {
            remove(&folder.join(RELEASED))?;
        }
        Ok(())
    }

    /// Marks the series that this sender was the last to send of: should the power go now, the next start knows that he
    /// has gone in good order, and whether to wait for another.
    fn mark_released(&self, source: SourceId) -> Result<(), SpoolError> {
        let _open = self.gate.read().unwrap_or_else(|e| e.into_inner());
        let done: Vec<(Name, usize)> = {
            let mut index = self.index();
            let sent = index.senders.remove(&source).unwrap_or_default();
            let others = |series: &Name| index.senders.values().any(|sent| sent.contains_key(series));
            // A mark that is there still holds: the series has not grown since.
            let over = |series: &Name| index.incoming.contains_key(series) && !index.released.contains(series) && !others(series);
            sent.into_iter().filter(|(series, _)| over(series)).collect()
        };
        for (series, sent) in done {
            let mark = self.series_folder(series).join(RELEASED);
            let release = if sent > 1 { Release::OfMany } else { Release::OfOne };
            write_durably(&mark, release.text()).map_err(disk("write", &mark))?;
            self.index().released.insert(series);
        }
        Ok(())
    }

    /// Claims room in the budget and makes sure that the disk has it.
    fn reserve(&self, bytes: u64) -> Result<(), Refused> {
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let full = |text: String| {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            Err(Refused::Told(IntakeError::OutOfResources(text)))
        };
        if before.saturating_add(bytes) > self.limits.bytes_max {
            return full(format!("the spool holds {before} of at most {} bytes", self.limits.bytes_max));
        }
        let free = rustix::fs::statvfs(&self.folder).map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize));
        match free {
            Ok(free) if free < bytes.saturating_add(FREE_BYTES_MIN) => full(format!("the disk has {free} bytes left")),
            Ok(_) => Ok(()),
            Err(e) => {
                self.bytes.fetch_sub(bytes, Ordering::Relaxed);
                Err(Refused::Told(IntakeError::Io(e.into())))
            }
        }
    }

    /// The mark is on disk before the sender hears of it, so that a restart does not make a good series of a bad one.
    fn conflict(&self, source: SourceId, path: &Path, header: Header) -> Refused {
        let rejection = conflict_rejection(&header.sop_instance);
        let mark = path.with_extension("conflict");
        if let Err(error) = write_durably(&mark, &[]) {
            return Refused::Told(out_of_space(error));
        }
        let (series, sop_instance) = (header.series, header.sop_instance);
        Refused::AndReported(Arrival::Conflict { source, series, sop_instance, rejection })
    }

    /// What an instance says of itself; structure and sizes are sound then.
    fn header(&self, file: &[u8]) -> Result<Header, Rejection> {
        file::check_inflated_size(file, self.limits.instance_bytes_max)?;
        let instance = Instance::parse(file)?;
        // A few bytes of RLE may become gigabytes: what the memory plan has for an instance holds for a decoded frame, too.
        let (frame_bytes, most) = (instance.decoded_bytes(), self.limits.instance_bytes_max);
        if frame_bytes > most {
            let text = format!("a frame of {frame_bytes} bytes when decoded, at most {most} are taken");
            return Err(Rejection::new(RejectionCode::TooLarge, text));
        }
        Ok(instance.header)
    }

    /// Whether the file on disk holds the same transfer syntax and data set; file meta information may differ, since
    /// every sender writes his own.
    fn same_data_set(&self, path: &Path, file: &[u8], header: &Header) -> io::Result<bool> {
        let kept = fs::read(path)?;
        let Ok(theirs) = self.header(&kept) else { return Ok(false) };
        Ok(theirs.transfer_syntax == header.transfer_syntax && file::data_set(file) == file::data_set(&kept))
    }

    /// One bad file must not keep all others from their reports: where it cannot be moved it stays, and is passed over.
    fn set_aside(&self, path: &Path, damage: &Rejection) {
        let folder = self.folder.join("damaged");
        let aside = folder.join(path.file_name().unwrap_or_default());
        match make_folder(&folder).and_then(|()| fs::rename(path, &aside)) {
            Ok(()) => log::error!("{}: {damage}; set aside as {}", path.display(), aside.display()),
            Err(error) => log::error!("{}: {damage}; cannot be set aside: {error}", path.display()),
        }
    }

    fn clear_halves(&self) -> Result<(), SpoolError> {
        let reported = self.folder.join("reported");
        let mut remembered = Vec::new();
        for path in sorted_entries(&reported)? {
            match name_of_file(&path).filter(|_| path.extension().is_none()) {
                Some(name) => {
                    let written = fs::metadata(&path).and_then(|m| m.modified()).map_err(disk("read", &path))?;
                    remembered.push((written, name));
                }
                None => remove(&path)?,
            }
        }
        remembered.sort();
        self.index().reported = remembered.into_iter().map(|(_, name)| name).collect();
        for (_, folder) in self.series_folders()? {
            for path in sorted_entries(&folder)? {
                if path.extension().is_some_and(|e| e == "part") {
                    remove(&path)?;
                }
            }
        }
        Ok(())
    }

    fn series_folders(&self) -> Result<Vec<(Name, PathBuf)>, SpoolError> {
        let incoming = self.folder.join("incoming");
        let entries = sorted_entries(&incoming)?.into_iter();
        Ok(entries.filter(|path| path.is_dir()).filter_map(|path| Some((name_of_file(&path)?, path))).collect())
    }

    fn series_folder(&self, series: Name) -> PathBuf {
        self.folder.join("incoming").join(series.hex())
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // A panic elsewhere leaves the maps whole: every change to them is one call.
        self.index.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits while the assembler is behind. When it is gone the service is going down, and what is on disk is found
    /// again at the next start.
    fn announce(&self, arrival: Arrival) {
        let _ = self.arrivals.send(arrival);
    }
}

/// How the last sender of a series has gone, in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Release {
    /// After several instances: nothing more comes.
    OfMany,
    /// After one, which is how some scanners send them all: the next may come.
    OfOne,
}

impl Release {
    fn text(self) -> &'static [u8] {
        match self {
            Self::OfMany => b"",
            Self::OfOne => b"one",
        }
    }

    /// What a mark says; `None` where there is none.
    fn read(mark: &Path) -> Result<Option<Self>, SpoolError> {
        match fs::read(mark) {
            Ok(text) if text == Self::OfOne.text() => Ok(Some(Self::OfOne)),
            Ok(_) => Ok(Some(Self::OfMany)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(disk("read", mark)(e)),
        }
    }
}

/// An instance that is not kept.
enum Refused {
    Told(IntakeError),
    /// The assembler has to know, too.
    AndReported(Arrival),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Told(error.into())
    }
}

impl Intake for Spool {
    fn store(&self, received: Received<'_>) -> Result<Stored, IntakeError> {
        if received.file.len() > self.limits.instance_bytes_max {
            let text = format!("{} bytes in one instance, at most {} are taken", received.file.len(), self.limits.instance_bytes_max);
            return Err(Rejection::new(RejectionCode::TooLarge, text).into());
        }
        let header = self.header(received.file)?;
        if let Some(announced) = received.sop_instance.filter(|uid| **uid != header.sop_instance) {
            let text = format!("announced as instance {announced}, but the data set is {}", header.sop_instance);
            return Err(Rejection::new(RejectionCode::Malformed, text).into());
        }
        match self.keep(&received, header) {
            Ok((stored, arrival)) => {
                arrival.into_iter().for_each(|arrival| self.announce(arrival));
                Ok(stored)
            }
            Err(Refused::Told(error)) => Err(error),
            Err(Refused::AndReported(arrival)) => {
                let Arrival::Conflict { rejection, .. } = &arrival else { unreachable!("only conflicts are reported") };
                let error = IntakeError::Rejected(rejection.clone());
                self.announce(arrival);
                Err(error)
            }
        }
    }

    fn released(&self, source: SourceId) {
        if let Err(error) = self.mark_released(source) {
            log::error!("source {}: {error}; after a restart its series would wait for the timer", source.0);
        }
        self.announce(Arrival::Released(source));
    }

    fn lost(&self, source: SourceId) {
        self.index().senders.remove(&source);
        self.announce(Arrival::Lost(source));
    }
}

fn too_late(series: &Uid, why: &str) -> Refused {
    let text = format!("series {series} {why}; nothing is added to it");
    Refused::Told(Rejection::new(RejectionCode::ConflictingDuplicate, text).into())
}

fn conflict_rejection(sop_instance: &Uid) -> Rejection {
    let text = format!("two different images came as instance {sop_instance}");
    Rejection::new(RejectionCode::ConflictingDuplicate, text)
}

/// The conflict a mark stands for; the instance it spoils is among those just recovered.
fn recovered_conflict(mark: &Path, recovered: &[Arrival]) -> Option<Arrival> {
    let spoilt = mark.with_extension("dcm");
    recovered.iter().rev().find_map(|arrival| match arrival {
        Arrival::Instance(instance) if instance.path == spoilt => Some(Arrival::Conflict {
            source: instance.source,
            series: instance.series.clone(),
            sop_instance: instance.sop_instance.clone(),
            rejection: conflict_rejection(&instance.sop_instance),
        }),
        _ => None,
    })
}

fn arrival(path: PathBuf, source: SourceId, header: Header, bytes: u64) -> Arrival {
    let Header { sop_instance, series, study, modality, .. } = header;
    Arrival::Instance(SpooledInstance { path, source, sop_instance, series, study, modality, bytes })
}

fn read_reported(path: &Path) -> Result<BTreeMap<Name, Stamp>, SpoolError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(disk("read", path)(e)),
    };
    let entry = |line: &str| {
        let mut words = line.split(' ');
        let name = Name::parse(words.next()?)?;
        let (file_bytes, data_set_bytes) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let crc = u32::from_str_radix(words.next()?, 16).ok()?;
        Some((name, Stamp { file_bytes, data_set_bytes, crc }))
    };
    Ok(text.lines().filter_map(entry).collect())
}

fn out_of_space(error: io::Error) -> IntakeError {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            IntakeError::OutOfResources(error.to_string())
        }
        _ => IntakeError::Io(error),
    }
}

fn io_error(error: SpoolError) -> Refused {
    Refused::Told(IntakeError::Io(io::Error::other(error.to_string())))
}

/// Writes beside, flushes, renames, flushes the folder. On failure nothing is left, under either name.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension("part");
    let written = (|| {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        flush_folder(path.parent().unwrap_or(Path::new(".")))
    })();
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn flush_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn remove(path: &Path) -> Result<(), SpoolError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(disk("remove", path)(e)),
        _ => Ok(()),
    }
}

fn name_of_file(path: &Path) -> Option<Name> {
    path.file_stem()?.to_str().and_then(Name::parse)
}

fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>, SpoolError> {
    let entries = fs::read_dir(folder).map_err(disk("list", folder))?;
    let mut paths = entries.map(|e| e.map(|e| e.path())).collect::<io::Result<Vec<_>>>().map_err(disk("list", folder))?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::{Receiver, unbounded};

    use super::*;

    const CT: &str = "1.2.840.10008.5.1.4.1.1.2";

    fn uid(text: &str) -> Uid {
        Uid::parse(text).unwrap()
    }

    /// A CT instance with `pixels` behind its UIDs.
    fn instance(series: &str, sop_instance: &str, pixels: &[u8]) -> Vec<u8> {
        let mut file = file::head(&uid(CT), &uid(sop_instance), &uid("1.2.840.10008.1.2.1"));
        for (group, element, text) in
            [(8, 0x16, CT), (8, 0x18, sop_instance), (0x20, 0xd, "1.2.3"), (0x20, 0xe, series)]
        {
            let odd = text.len() % 2;
            file.extend_from_slice(&[group, 0, element, 0, b'U', b'I', (text.len() + odd) as u8, 0]);
            file.extend_from_slice(text.as_bytes());
            file.extend_from_slice(&[0][..odd]);
        }
        // One row of as many 8-bit pixels.
        for (element, value) in [(0x10, 1), (0x11, pixels.len() as u8), (0x100, 8), (0x101, 8), (0x102, 7), (0x103, 0)] {
            let [low, high] = u16::to_le_bytes(element);
            file.extend_from_slice(&[0x28, 0, low, high, b'U', b'S', 2, 0, value, 0]);
        }
        file.extend_from_slice(&[0xe0, 0x7f, 0x10, 0, b'O', b'W', 0, 0]);
        file.extend_from_slice(&(pixels.len() as u32).to_le_bytes());
        file.extend_from_slice(pixels);
        file
    }

    struct Bench {
        spool: Spool,
        arrivals: Receiver<Arrival>,
    }

    fn bench(folder: &Path, limits: SpoolLimits) -> Bench {
        let (sender, arrivals) = unbounded();
        Bench { spool: Spool::open(folder, limits, sender).unwrap(), arrivals }
    }

    impl Bench {
        fn store(&self, file: &[u8]) -> Result<Stored, IntakeError> {
            self.spool.store(Received { source: SourceId(7), sop_instance: None, file })
        }
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for path in sorted_entries(folder).unwrap() {
            if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
        }
        found.retain(|path| path.file_name().unwrap() != "lock");
        found
    }

    #[test]
    fn what_is_acknowledged_is_found_again_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let first = bench(dir.path(), SpoolLimits::default());
        let pairs = [("1.2.3.1", "1.2.3.1.1"), ("1.2.3.2", "1.2.3.2.1"), ("1.2.3.1", "1.2.3.1.2")];
        for (series, sop) in pairs {
            assert_eq!(first.store(&instance(series, sop, b"12")).unwrap(), Stored::New);
        }
        let told: Vec<Arrival> = first.arrivals.try_iter().collect();
        let bytes = first.spool.bytes();
        drop(first);
        let second = bench(dir.path(), SpoolLimits::default());
        let mut again = second.spool.recover().unwrap();
        assert_eq!(second.spool.bytes(), bytes);
        let mut expected: Vec<Arrival> = told
            .into_iter()
            .map(|arrival| match arrival {
                Arrival::Instance(i) => Arrival::Instance(SpooledInstance { source: SourceId::RECOVERED, ..i }),
                other => other,
            })
            .collect();
        let key = |arrival: &Arrival| match arrival {
            Arrival::Instance(i) => i.path.clone(),
            _ => PathBuf::new(),
        };
        assert!(again.is_sorted_by_key(key), "the order is stable: by path");
        expected.sort_by_key(key);
        again.sort_by_key(key);
        assert_eq!(again, expected);
    }

    #[test]
    fn an_identical_duplicate_is_kept_once_whoever_wrote_its_file_meta() {
        let dir = tempfile::tempdir().unwrap();
        let bench = bench(dir.path(), SpoolLimits::default());
        let file = instance("1.2.3.1", "1.2.3.1.1", b"12");
        assert_eq!(bench.store(&file).unwrap(), Stored::New);
        let mut other_preamble = file.clone();
        other_preamble[5] = b'X';
        assert_eq!(bench.store(&other_preamble).unwrap(), Stored::Duplicate);
        assert_eq!(bench.arrivals.try_iter().count(), 2, "the assembler hears of it from each sender");
        assert_eq!(files(dir.path()).len(), 1);
    }

    #[test]
    fn other_bytes_under_the_same_uid_are_refused_and_the_assembler_learns_of_it_even_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let first = bench(dir.path(), SpoolLimits::default());
        first.store(&instance("1.2.3.1", "1.2.3.1.1", b"12")).unwrap();
        let refused = first.store(&instance("1.2.3.1", "1.2.3.1.1", b"34")).unwrap_err();
        let IntakeError::Rejected(rejection) = refused else { panic!("{refused}") };
        assert_eq!(rejection.code, RejectionCode::ConflictingDuplicate);
        let conflict = first.arrivals.try_iter().nth(1).unwrap();
        assert!(matches!(&conflict, Arrival::Conflict { series, .. } if *series == uid("1.2.3.1")));
        drop(first);
        let second = bench(dir.path(), SpoolLimits::default());
        let again = second.spool.recover().unwrap();
        assert!(matches!(&again[..], [Arrival::Instance(_), Arrival::Conflict { .. }]), "{again:?}");
        second.spool.forget_series(&uid("1.2.3.1")).unwrap();
        assert_eq!(files(&dir.path().join("incoming")), [] as [PathBuf; 0]);
    }

    #[test]
    fn a_full_spool_says_so_and_keeps_nothing_of_the_instance() {
        let dir = tempfile::tempdir().unwrap();
        let file = instance("1.2.3.1", "1.2.3.1.1", &[0; 100]);
        let bench = bench(dir.path(), SpoolLimits { bytes_max: file.len() as u64, ..SpoolLimits::default() });
        bench.store(&file).unwrap();
        let more = instance("1.2.3.2", "1.2.3.2.1", b"1");
        assert!(matches!(bench.store(&more), Err(IntakeError::OutOfResources(_))));
        assert_eq!(files(dir.path()).len(), 1);
        assert_eq!(bench.spool.bytes(), file.len() as u64);
        bench.spool.forget_series(&uid("1.2.3.1")).unwrap();
        assert_eq!(bench.spool.bytes(), 0);
        assert_eq!(bench.store(&more).unwrap(), Stored::New, "room again once the report is out");
    }

    #[test]
    fn a_finished_series_takes_nothing_more_while_its_report_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let bench = bench(dir.path(), SpoolLimits::default());
        let first = instance("1.2.3.1", "1.2.3.1.1", b"12");
        assert_eq!(bench.store(&first).unwrap(), Stored::New);
        bench.spool.close(&uid("1.2.3.1"));
        assert_eq!(bench.store(&first).unwrap(), Stored::Duplicate);
        assert!(matches!(bench.store(&instance("1.2.3.1", "1.2.3.1.2", b"34")), Err(IntakeError::Rejected(_))));
        assert_eq!(bench.store(&instance("1.2.3.2", "1.2.3.2.1", b"12")).unwrap(), Stored::New);
    }

    #[test]
    fn a_reported_series_is_not_reported_twice_and_takes_nothing_more() {
        let dir = tempfile::tempdir().unwrap();
        let first = bench(dir.path(), SpoolLimits::default());
        let file = instance("1.2.3.1", "1.2.3.1.1", b"12");
        first.store(&file).unwrap();
        for _ in 0..2 {
            first.spool.forget(&uid("1.2.3.1"), &[uid("1.2.3.1.1")]).unwrap();
        }
        assert_eq!(first.spool.bytes(), 0);
        drop(first);
        let second = bench(dir.path(), SpoolLimits::default());
        assert_eq!(second.spool.recover().unwrap(), []);
        assert!(second.spool.is_reported(&uid("1.2.3.1")));
        assert_eq!(second.store(&file).unwrap(), Stored::Duplicate, "a sender who repeats himself is content");
        assert!(second.store(&instance("1.2.3.1", "1.2.3.1.2", b"12")).is_err());
        assert_eq!(second.arrivals.try_iter().count(), 0);
    }

    #[test]
    fn what_came_too_late_for_the_report_stays() {
        let dir = tempfile::tempdir().unwrap();
        let bench = bench(dir.path(), SpoolLimits::default());
        bench.store(&instance("1.2.3.1", "1.2.3.1.1", b"12")).unwrap();
        bench.store(&instance("1.2.3.1", "1.2.3.1.2", b"12")).unwrap();
        bench.spool.forget(&uid("1.2.3.1"), &[uid("1.2.3.1.1")]).unwrap();
        assert_eq!(files(&dir.path().join("incoming")).len(), 1);
        assert!(bench.spool.bytes() > 0);
    }

    #[test]
    fn a_release_is_remembered_until_the_series_grows_again() {
        let dir = tempfile::tempdir().unwrap();
        let series = |n: u64| format!("1.2.3.{n}");
        let first = bench(dir.path(), SpoolLimits::default());
        let store = |bench: &Bench, source, n: u64, sop: &str| {
            let file = instance(&series(n), &format!("{}.{sop}", series(n)), b"12");
            bench.spool.store(Received { source: SourceId(source), sop_instance: None, file: &file }).unwrap()
        };
        for (source, n, sop) in [(11, 1, "1"), (11, 1, "3"), (11, 2, "1"), (11, 2, "3"), (12, 2, "2"), (13, 3, "1")] {
            store(&first, source, n, sop);
        }
        first.spool.released(SourceId(11));
        first.spool.lost(SourceId(13));
        drop(first);
        let released = |bench: &Bench| {
            let arrivals = bench.spool.recover().unwrap();
            let sources: Vec<SourceId> =
                arrivals.iter().filter_map(|a| if let Arrival::Released(source) = a { Some(*source) } else { None }).collect();
            let of_released = |a: &Arrival| match a {
                Arrival::Instance(instance) if sources.contains(&instance.source) => Some(instance.series.to_string()),
                Arrival::Instance(instance) => {
                    assert_eq!(instance.source, SourceId::RECOVERED);
                    None
                }
                _ => None,
            };
            arrivals.iter().filter_map(of_released).collect::<Vec<_>>()
        };
        let second = bench(dir.path(), SpoolLimits::default());
        assert_eq!(released(&second), ["1.2.3.1"; 2], "not where another sender is there or one was lost");
        store(&second, 14, 1, "2");
        // Who sends all of it again has sent all of it.
        assert_eq!([store(&second, 15, 2, "1"), store(&second, 15, 2, "2")], [Stored::Duplicate; 2]);
        second.spool.released(SourceId(15));
        drop(second);
        let third = bench(dir.path(), SpoolLimits::default());
        assert_eq!(released(&third), ["1.2.3.2"; 3]);
        third.spool.forget_series(&uid("1.2.3.1")).unwrap();
    }

    #[test]
    fn images_from_a_sender_each_are_recovered_from_a_sender_each() {
        let dir = tempfile::tempdir().unwrap();
        let first = bench(dir.path(), SpoolLimits::default());
        for n in 1..=3 {
            let file = instance("1.2.3.1", &format!("1.2.3.1.{n}"), b"12");
            first.spool.store(Received { source: SourceId(n), sop_instance: None, file: &file }).unwrap();
            first.spool.released(SourceId(n));
        }
        drop(first);
        let recovered = bench(dir.path(), SpoolLimits::default()).spool.recover().unwrap();
        let sources = recovered.chunks(2).map(|pair| match pair {
            [Arrival::Instance(instance), Arrival::Released(source)] if instance.source == *source => *source,
            other => panic!("{other:?}"),
        });
        assert_eq!(sources.collect::<HashSet<_>>().len(), 3);
    }

    #[test]
    fn a_series_with_a_damaged_image_is_not_taken_for_one_sent_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let first = bench(dir.path(), SpoolLimits::default());
        for n in 1..=3 {
            first.store(&instance("1.2.3.1", &format!("1.2.3.1.{n}"), b"12")).unwrap();
        }
        first.spool.released(SourceId(7));
        drop(first);
        let image = files(dir.path()).into_iter().find(|path| path.extension().is_some_and(|e| e == "dcm")).unwrap();
        fs::write(image, b"not DICOM any more").unwrap();
        for start in 1..=2 {
            let recovered = bench(dir.path(), SpoolLimits::default()).spool.recover().unwrap();
            assert_eq!(recovered.len(), 2, "start {start}: {recovered:?}");
            let lost = |a: &Arrival| matches!(a, Arrival::Instance(instance) if instance.source == SourceId::RECOVERED);
            assert!(recovered.iter().all(lost), "start {start}: {recovered:?}");
        }
    }

    #[test]
    fn halves_of_a_cut_are_cleared_and_damage_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let first = bench(dir.path(), SpoolLimits::default());
        first.store(&instance("1.2.3.1", "1.2.3.1.1", b"12")).unwrap();
        let whole = files(dir.path()).pop().unwrap();
        drop(first);
        fs::write(whole.with_extension("part"), b"half").unwrap();
        fs::write(&whole, b"not DICOM any more").unwrap();
        let second = bench(dir.path(), SpoolLimits::default());
        assert_eq!(second.spool.recover().unwrap(), []);
        assert_eq!(files(dir.path()), [dir.path().join("damaged").join(whole.file_name().unwrap())]);
    }

    #[test]
    fn a_file_that_cannot_be_read_does_not_keep_the_others_from_their_report() {
        let dir = tempfile::tempdir().unwrap();
        let first = bench(dir.path(), SpoolLimits::default());
        for sop in ["1.2.3.1.1", "1.2.3.1.2"] {
            first.store(&instance("1.2.3.1", sop, b"12")).unwrap();
        }
        drop(first);
        let spoilt = files(&dir.path().join("incoming")).remove(0);
        fs::remove_file(&spoilt).unwrap();
        fs::create_dir(&spoilt).unwrap();
        let second = bench(dir.path(), SpoolLimits::default());
        assert_eq!(second.spool.recover().unwrap().len(), 1);
        assert!(!spoilt.exists() && dir.path().join("damaged").join(spoilt.file_name().unwrap()).is_dir());
    }

    #[test]
    fn a_frame_that_would_outgrow_the_memory_plan_when_decoded_is_refused_at_the_door() {
        let dir = tempfile::tempdir().unwrap();
        let bench = bench(dir.path(), SpoolLimits { instance_bytes_max: 64 << 20, ..SpoolLimits::default() });
        let mut file = instance("1.2.3.1", "1.2.3.1.1", &[]);
        // An RLE frame of 8192 x 8193 pixels of 8 bits in some bytes.
        let pixels = file.len() - 12;
        file.truncate(pixels);
        for (tag, value) in [(0x10u8, 8193u16), (0x11, 8192)] {
            let at = file.windows(6).position(|w| w == [0x28, 0, tag, 0, b'U', b'S']).unwrap();
            file[at + 8..at + 10].copy_from_slice(&value.to_le_bytes());
        }
        let syntax = file.windows(19).position(|w| w == b"1.2.840.10008.1.2.1").unwrap();
        file[syntax..syntax + 20].copy_from_slice(b"1.2.840.10008.1.2.5\0");
        file.extend_from_slice(&[0xe0, 0x7f, 0x10, 0, b'O', b'B', 0, 0, 0xff, 0xff, 0xff, 0xff]);
        file.extend_from_slice(&[0xfe, 0xff, 0, 0xe0, 0, 0, 0, 0, 0xfe, 0xff, 0, 0xe0, 64, 0, 0, 0]);
        file.extend_from_slice(&[1, 0, 0, 0, 64]);
        file.extend_from_slice(&[0; 59]);
        file.extend_from_slice(&[0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0]);
        let error = bench.store(&file).unwrap_err();
        assert!(matches!(&error, IntakeError::Rejected(r) if r.code == RejectionCode::TooLarge), "{error}");
        assert!(files(dir.path()).is_empty());
    }

    #[test]
    fn one_spool_serves_one_process() {
        let dir = tempfile::tempdir().unwrap();
        let _first = bench(dir.path(), SpoolLimits::default());
        let second = Spool::open(dir.path(), SpoolLimits::default(), unbounded().0);
        assert!(matches!(second, Err(SpoolError::InUse(_))));
    }

    #[test]
    fn an_instance_that_is_not_the_one_announced_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let bench = bench(dir.path(), SpoolLimits::default());
        let (file, other) = (instance("1.2.3.1", "1.2.3.1.1", b"12"), uid("1.2.3.9"));
        let received = Received { source: SourceId(7), sop_instance: Some(&other), file: &file };
        assert!(matches!(bench.spool.store(received), Err(IntakeError::Rejected(_))));
        assert_eq!(files(dir.path()), [] as [PathBuf; 0]);
    }
}
