//! Reports on disk until they are acknowledged: append-only, checksummed, synced, and whole again after a cut anywhere.
//!
//! What [`Journal::append_once`] and [`Journal::acknowledge`] have returned for survives the power going away. Sequence
//! numbers only rise; a number that may have been given out before a crash is never given to another report, so a gap
//! in the numbers is possible and harmless.

mod record;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{BadReport, Report};
use crate::study::Uid;
pub use record::Damage;
use record::{Header, Kind};

/// Receivers a journal keeps a place for. Each is one more that every report waits for, so a client that makes up a new
/// name at each start would fill the disk.
pub const RECEIVERS_MAX: usize = 32;

/// Keys of compacted reports that are still known, so that work repeated after a crash is not reported twice.
const KEYS_KEPT_MAX: usize = 4096;

/// The sizes of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most the reports may take on disk. Above it [`JournalError::Full`] is the answer, and the service must take no
    /// new series, rather than drop a report nobody has read.
    pub bytes_max: u64,
    /// Acknowledged reports are kept up to this size, for a receiver that asks for old ones.
    pub history_bytes: u64,
}

impl Default for Limits {
    /// 64 MiB, some ten thousand reports; 8 MiB of it for history.
    fn default() -> Self {
        Self { bytes_max: 64 << 20, history_bytes: 8 << 20 }
    }
}

/// Why the journal could not do it.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk.
    #[error("journal {path}: cannot {doing}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
    /// Another process has this journal open.
    #[error("journal {0} is in use by another process")]
    InUse(PathBuf),
    /// An earlier write failed in a way that leaves the disk's state unknown: open the journal again.
    #[error("journal {0}: an earlier write failed, so nothing more is written until it is opened again")]
    Unsure(PathBuf),
    /// No room: the reports in it wait for receivers.
    #[error("the journal is full: {waiting} reports ({bytes} bytes of {bytes_max}) wait to be acknowledged{slowest}")]
    Full {
        /// Reports not yet acknowledged by all.
        waiting: usize,
        /// Their size.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
        /// ` by "name"`, or ` and no receiver has ever asked for them`.
        slowest: String,
    },
    /// The report is not fit to be sent.
    #[error(transparent)]
    BadReport(#[from] BadReport),
    /// A receiver's name is 1 to 64 of `a-z A-Z 0-9 . _ -`.
    #[error("not a name for a receiver (1 to 64 letters, digits, '.', '_' and '-'): {0:?}")]
    BadReceiver(String),
    /// See [`RECEIVERS_MAX`].
    #[error("{RECEIVERS_MAX} receivers have a place in the journal already; forget one before {0:?} can have one")]
    TooManyReceivers(String),
    /// The number acknowledged was never given out.
    #[error("{receiver:?} acknowledges report {sequence}, but the newest is {newest}")]
    NotYetWritten {
        /// Who.
        receiver: String,
        /// What was acknowledged.
        sequence: u64,
        /// The newest there is.
        newest: u64,
    },
}

/// What [`Journal::append_once`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appended {
    /// The report is on disk under this sequence number.
    New(u64),
    /// A report with this UID was there before, under this number; the new one was not written.
    Already(u64),
}

impl Appended {
    /// The number either way.
    pub fn sequence(self) -> u64 {
        match self {
            Self::New(sequence) | Self::Already(sequence) => sequence,
        }
    }
}

/// What was found when a journal was opened.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// Reports that are whole.
    pub reports: usize,
    /// Bytes of an unfinished record at the end, now cut off. Nobody was told that it was safe.
    pub cut_bytes: u64,
    /// Damage before the end: reports may be lost there, and an operator should know.
    pub damage: Vec<Damage>,
    /// The file was no journal at all and now lies here.
    pub set_aside: Option<PathBuf>,
}

/// One report of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub sequence: u64,
    /// One line of JSON.
    pub json: Vec<u8>,
}

/// The journal at a glance, for `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalStatus {
    /// The journal's identity; sequence numbers mean something only with it.
    pub journal: u64,
    /// The oldest report still there; 0 for none.
    pub oldest: u64,
    /// The newest number given out; 0 for none.
    pub newest: u64,
    /// Reports not yet acknowledged by every receiver.
    pub waiting: usize,
    /// Bytes on disk.
    pub bytes: u64,
    /// The limit.
    pub bytes_max: u64,
    /// Damaged places met since the journal was opened.
    pub damaged: usize,
    /// How far each receiver has acknowledged.
    pub receivers: BTreeMap<String, u64>,
}

/// An open journal; share it with `Arc`.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    limits: Limits,
    state: Mutex<State>,
    news: Condvar,
    /// Held while the journal is open.
    _lock: File,
}

#[derive(Debug)]
struct State {
    file: Arc<File>,
    length: u64,
    id: u64,
    /// The next report's number.
    next: u64,
    reports: BTreeMap<u64, Slot>,
    keys: HashMap<Uid, u64>,
    /// Keys of compacted reports, oldest first; they are in `keys` too.
    old_keys: VecDeque<(Uid, u64)>,
    cursors: BTreeMap<String, u64>,
    damaged: usize,
    unsure: bool,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    offset: u64,
    header: Header,
}

#[derive(Serialize, Deserialize)]
struct Start {
    journal: u64,
    next: u64,
    keys: VecDeque<(Uid, u64)>,
}

#[derive(Serialize, Deserialize)]
struct Cursor {
    receiver: String,
    sequence: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    forgotten: bool,
}

impl Journal {
    /// Opens the journal in `directory`, or begins one there.
    ///
    /// # Errors
    /// [`JournalError::InUse`] and [`JournalError::Io`]. Damage is no error: it is in [`Recovery`], for the log and `status`.
    pub fn open(directory: &Path, limits: Limits) -> Result<(Self, Recovery), JournalError> {
        let path = directory.join("journal");
        let at = io_error;
        fs::create_dir_all(directory).map_err(at(directory, "make the folder"))?;
        let lock_path = directory.join("journal.lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(at(&lock_path, "open the lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => JournalError::InUse(path.clone()),
            other => at(&lock_path, "lock it")(other.into()),
        })?;
        match fs::remove_file(fresh_path(&path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path, "clear up after a crash")(error)),
            _ => {}
        }

        let mut recovery = Recovery::default();
        let existing = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(at(&path, "open it")(error)),
        };
        let mut state = State::empty();
        let mut started = false;
        if let Some(file) = existing {
            started = state.load(file, &mut recovery).map_err(at(&path, "read it"))?;
            if state.length == 0 {
                let aside = directory.join("journal.damaged");
                fs::rename(&path, &aside).map_err(at(&path, "set aside what is no journal"))?;
                recovery.set_aside = Some(aside);
            } else if recovery.cut_bytes > 0 {
                state.file.set_len(state.length).map_err(at(&path, "cut the unfinished record off"))?;
                state.file.sync_all().map_err(at(&path, "sync it"))?;
            }
        }
        let journal = Self { path, limits, state: Mutex::new(state), news: Condvar::new(), _lock: lock };
        if !started {
            journal.rewrite(&mut journal.lock(), u64::MAX)?;
        }
        Ok((journal, recovery))
    }

    /// Writes a report and syncs it; gives it its number. A report whose `report_uid` is known is not written again.
    ///
    /// # Errors
    /// [`JournalError::Full`], [`JournalError::BadReport`], [`JournalError::Io`]; nothing is kept of the report then.
    pub fn append_once(&self, mut report: Report) -> Result<Appended, JournalError> {
        let mut state = self.lock();
        if let Some(sequence) = state.keys.get(&report.report_uid) {
            return Ok(Appended::Already(*sequence));
        }
        let sequence = state.next;
        report.sequence = sequence;
        let key = report.report_uid.as_str();
        let payload = [&[key.len() as u8][..], key.as_bytes(), &report.to_json()?].concat();
        let bytes = record::encode(Kind::Report, sequence, &payload);
        if state.length + bytes.len() as u64 > self.limits.bytes_max {
            // Worth it only when what compaction drops makes the room.
            if state.length - state.waiting_bytes().min(state.length) >= bytes.len() as u64 {
                self.rewrite(&mut state, 0)?;
            }
            if state.length + bytes.len() as u64 > self.limits.bytes_max {
                return Err(state.full(self.limits.bytes_max));
            }
        }
        let offset = state.length;
        self.write(&mut state, &bytes)?;
        let header = Header { kind: Kind::Report, sequence, length: payload.len() as u32, payload_crc: crc32c::crc32c(&payload) };
        state.next += 1;
        state.reports.insert(sequence, Slot { offset, header });
        state.keys.insert(report.report_uid, sequence);
        drop(state);
        self.news.notify_all();
        Ok(Appended::New(sequence))
    }

    /// The number of the report with this UID, if the journal has or remembers it.
    pub fn sequence_of(&self, report_uid: &Uid) -> Option<u64> {
        self.lock().keys.get(report_uid).copied()
    }

    /// Whether a failed sync has closed it to writing: only [`Journal::open`] finds out what the disk has.
    pub fn is_unsure(&self) -> bool {
        self.lock().unsure
    }

    /// From now on the disk takes nothing, not even the file's old length.
    #[cfg(test)]
    pub(crate) fn lose_the_disk(&self) {
        self.lock().file = Arc::new(OpenOptions::new().write(true).open("/dev/full").unwrap());
    }

    /// Whether a report of any size would be taken now; ask before a series is accepted.
    pub fn has_room(&self) -> bool {
        let state = self.lock();
        let longest = (record::HEADER_BYTES + record::PAYLOAD_BYTES_MAX) as u64;
        !state.unsure && state.waiting_bytes() + 2 * longest <= self.limits.bytes_max
    }

    /// The first report after `sequence` that can be read. One that has gone bad on disk is passed over, logged and counted.
    ///
    /// # Errors
    /// [`JournalError::Io`]
    pub fn next_after(&self, sequence: u64) -> Result<Option<Entry>, JournalError> {
        loop {
            let (file, number, slot) = {
                let state = self.lock();
                let Some((number, slot)) = state.reports.range(sequence.saturating_add(1)..).next() else { return Ok(None) };
                (state.file.clone(), *number, *slot)
            };
            let payload = record::read_payload(&file, slot.offset, slot.header).map_err(io_error(&self.path, "read a report"))?;
            if let Some(json) = payload.as_deref().and_then(report_of) {
                return Ok(Some(Entry { sequence: number, json: json.1.to_vec() }));
            }
            log::error!("journal {}: report {number} cannot be read any more and is passed over", self.path.display());
            let mut state = self.lock();
            state.damaged += 1;
            state.reports.remove(&number);
        }
    }

    /// Waits until there is a report after `sequence`, at most for `patience`; whether there is one.
    pub fn wait_after(&self, sequence: u64, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if state.reports.range(sequence.saturating_add(1)..).next().is_some() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.news.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives a receiver its place; a new one begins before the oldest report, and every report waits for it from now on.
    /// Returns how far it has acknowledged.
    ///
    /// # Errors
    /// [`JournalError::BadReceiver`], [`JournalError::TooManyReceivers`], [`JournalError::Io`]
    pub fn register(&self, receiver: &str) -> Result<u64, JournalError> {
        let mut state = self.lock();
        if let Some(sequence) = state.cursors.get(receiver) {
            return Ok(*sequence);
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if !(1..=64).contains(&receiver.len()) || !receiver.chars().all(fits) {
            return Err(JournalError::BadReceiver(receiver.chars().take(80).collect()));
        }
        if state.cursors.len() >= RECEIVERS_MAX {
            return Err(JournalError::TooManyReceivers(receiver.into()));
        }
        self.write_cursor(&mut state, receiver, 0, false)?;
        Ok(0)
    }

    /// The receiver has every report up to `sequence`: on disk when this returns. Never goes back.
    ///
    /// # Errors
    /// [`JournalError::NotYetWritten`], and as [`Journal::register`].
    pub fn acknowledge(&self, receiver: &str, sequence: u64) -> Result<(), JournalError> {
        let before = self.register(receiver)?;
        let mut state = self.lock();
        let newest = state.next - 1;
        if sequence > newest {
            return Err(JournalError::NotYetWritten { receiver: receiver.into(), sequence, newest });
        }
        if sequence > state.cursors.get(receiver).copied().unwrap_or(before) {
            self.write_cursor(&mut state, receiver, sequence, false)?;
            let history = self.limits.history_bytes.min(self.limits.bytes_max / 4);
            if state.length - state.waiting_bytes().min(state.length) > 2 * history.max(4096)
                && let Err(error) = self.rewrite(&mut state, history)
            {
                // The acknowledgement is safe; the space is won back another time.
                log::warn!("{error}");
            }
        }
        Ok(())
    }

    /// The receiver is gone for good: nothing waits for it any more.
    ///
    /// # Errors
    /// [`JournalError::Io`]
    pub fn forget(&self, receiver: &str) -> Result<(), JournalError> {
        let mut state = self.lock();
        match state.cursors.get(receiver).copied() {
            Some(sequence) => self.write_cursor(&mut state, receiver, sequence, true),
            None => Ok(()),
        }
    }

    /// How far a receiver has acknowledged; 0 for nothing.
    pub fn cursor(&self, receiver: &str) -> u64 {
        self.lock().cursors.get(receiver).copied().unwrap_or(0)
    }

    /// The newest number given out; 0 for none.
    pub fn newest(&self) -> u64 {
        self.lock().next - 1
    }

    /// The journal's identity, drawn when it was begun. A receiver that meets another identity starts over at its reports.
    pub fn id(&self) -> u64 {
        self.lock().id
    }

    /// The journal at a glance.
    pub fn status(&self) -> JournalStatus {
        let state = self.lock();
        JournalStatus {
            journal: state.id,
            oldest: state.reports.keys().next().copied().unwrap_or(0),
            newest: state.next - 1,
            waiting: state.waiting().count(),
            bytes: state.length,
            bytes_max: self.limits.bytes_max,
            damaged: state.damaged,
            receivers: state.cursors.clone(),
        }
    }

    /// A panic while the lock was held leaves `state` whole: it is changed only after the disk has agreed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_cursor(&self, state: &mut State, receiver: &str, sequence: u64, forgotten: bool) -> Result<(), JournalError> {
        let cursor = Cursor { receiver: receiver.into(), sequence, forgotten };
        let payload = serde_json::to_vec(&cursor).expect("a cursor has a JSON form");
        self.write(state, &record::encode(Kind::Cursor, sequence, &payload))?;
        state.place(cursor);
        Ok(())
    }

    /// Appends and syncs. After a failure the file is as it was, or the journal is closed to writing.
    fn write(&self, state: &mut State, bytes: &[u8]) -> Result<(), JournalError> {
        if state.unsure {
            return Err(JournalError::Unsure(self.path.clone()));
        }
        if let Err(error) = state.file.write_all_at(bytes, state.length) {
            state.unsure = state.file.set_len(state.length).is_err();
            return Err(io_error(&self.path, "append to it")(error));
        }
        if let Err(error) = state.file.sync_data() {
            // Linux may drop the dirty pages after a failed sync and report success the next time: trust nothing more.
            state.unsure = true;
            return Err(io_error(&self.path, "sync it")(error));
        }
        state.length += bytes.len() as u64;
        Ok(())
    }

    /// Writes the journal anew beside the old one and renames it over: identity, cursors, the reports that wait, and of
    /// the acknowledged ones the newest up to `history_bytes`. A crash leaves the old file or the new one.
    fn rewrite(&self, state: &mut State, history_bytes: u64) -> Result<(), JournalError> {
        if state.unsure {
            return Err(JournalError::Unsure(self.path.clone()));
        }
        let acknowledged = state.acknowledged();
        let mut history = 0;
        let old_enough = |(_, slot): &(&u64, &Slot)| {
            history += slot.header.record_bytes();
            history > history_bytes
        };
        let keep_from = state.reports.range(..=acknowledged).rev().find(old_enough).map_or(0, |(sequence, _)| sequence + 1);

        let path = fresh_path(&self.path);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(io_error(&path, "begin a new file"))?;
        let written = state.copy_to(&file, keep_from).and_then(|fresh| file.sync_all().map(|()| fresh));
        let mut fresh = match written {
            Ok(fresh) => fresh,
            Err(error) => {
                let _ = fs::remove_file(&path);
                return Err(io_error(&path, "write the journal anew")(error));
            }
        };
        fs::rename(&path, &self.path).map_err(io_error(&self.path, "put the new file in place"))?;
        let directory = self.path.parent().expect("the journal lies in a folder");
        if let Err(error) = File::open(directory).and_then(|folder| folder.sync_all()) {
            // Which of the two files a power cut would leave is not known now.
            state.unsure = true;
            return Err(io_error(directory, "sync the folder")(error));
        }
        fresh.file = Arc::new(file);
        *state = fresh;
        Ok(())
    }
}

impl State {
    fn empty() -> Self {
        use std::hash::{BuildHasher, RandomState};
        // The hasher is seeded by the system: a number no other journal has. 0 means "none" on the wire.
        let id = RandomState::new().hash_one("journal").max(1);
        let file = Arc::new(File::open("/dev/null").expect("there is a /dev/null"));
        Self {
            file,
            length: 0,
            id,
            next: 1,
            reports: BTreeMap::new(),
            keys: HashMap::new(),
            old_keys: VecDeque::new(),
            cursors: BTreeMap::new(),
            damaged: 0,
            unsure: false,
        }
    }

    /// Reads a journal; whether its start record is whole.
    fn load(&mut self, file: File, recovery: &mut Recovery) -> io::Result<bool> {
        let length = file.metadata()?.len();
        // A journal begins with its start record; when that is damaged the scan begins at the next header there is.
        let begin = record::find_header(&file, 0, length)?.unwrap_or(length);
        let mut started = false;
        let mut newest = 0;
        let scan = record::scan(&file, begin, length, |offset, header, payload| match header.kind {
            Kind::Start => {
                if let Ok(start) = serde_json::from_slice::<Start>(payload) {
                    started = true;
                    self.id = start.journal;
                    newest = newest.max(start.next.saturating_sub(1));
                    self.keys.extend(start.keys.iter().cloned());
                    self.old_keys = start.keys;
                }
            }
            Kind::Report => {
                newest = newest.max(header.sequence);
                if let Some((key, _)) = report_of(payload) {
                    self.keys.insert(key, header.sequence);
                    self.reports.insert(header.sequence, Slot { offset, header });
                }
            }
            Kind::Cursor => {
                newest = newest.max(header.sequence);
                if let Ok(cursor) = serde_json::from_slice::<Cursor>(payload) {
                    self.place(cursor);
                }
            }
        })?;
        if begin > 0 && begin < length {
            recovery.damage.push(Damage { bytes: 0..begin, sequence: None });
        }
        recovery.damage.extend(scan.damage);
        recovery.reports = self.reports.len();
        if scan.end == 0 || begin == length {
            return Ok(false);
        }
        recovery.cut_bytes = length - scan.end;
        newest = recovery.damage.iter().filter_map(|d| d.sequence).fold(newest, u64::max);
        // Reports whose records were cut off, or made illegible, may have been sent: their numbers are not used again.
        // No report takes less than 256 bytes, so this is more numbers than were there.
        let illegible: u64 = recovery.damage.iter().filter(|d| d.sequence.is_none()).map(|d| d.bytes.end - d.bytes.start).sum();
        let lost = (illegible + recovery.cut_bytes).div_ceil(256);
        self.next = newest.saturating_add(1 + lost).min(u64::MAX / 2);
        self.damaged = recovery.damage.len();
        self.length = scan.end;
        self.file = Arc::new(file);
        Ok(started)
    }

    /// Writes identity, cursors and the reports from `keep_from` on; gives the state that matches what was written.
    fn copy_to(&self, file: &File, keep_from: u64) -> io::Result<Self> {
        let mut fresh = Self { id: self.id, next: self.next, damaged: self.damaged, ..Self::empty() };
        fresh.cursors = self.cursors.clone();
        fresh.old_keys = self.old_keys.clone();
        let mut dropped: Vec<_> = self.keys.iter().filter(|(_, s)| !self.reports.contains_key(s) || **s < keep_from).collect();
        dropped.sort_by_key(|(_, sequence)| **sequence);
        fresh.old_keys = dropped.into_iter().map(|(key, sequence)| (key.clone(), *sequence)).collect();
        while fresh.old_keys.len() > KEYS_KEPT_MAX {
            fresh.old_keys.pop_front();
        }
        fresh.keys = fresh.old_keys.iter().cloned().collect();
        let kept: HashMap<u64, &Uid> = self.keys.iter().map(|(key, sequence)| (*sequence, key)).collect();

        let put = |fresh: &mut Self, bytes: &[u8]| {
            file.write_all_at(bytes, fresh.length)?;
            fresh.length += bytes.len() as u64;
            Ok::<(), io::Error>(())
        };
        let start = Start { journal: self.id, next: self.next, keys: fresh.old_keys.clone() };
        put(&mut fresh, &record::encode(Kind::Start, self.next - 1, &serde_json::to_vec(&start)?))?;
        for (receiver, sequence) in &self.cursors {
            let cursor = Cursor { receiver: receiver.clone(), sequence: *sequence, forgotten: false };
            put(&mut fresh, &record::encode(Kind::Cursor, *sequence, &serde_json::to_vec(&cursor)?))?;
        }
        for (sequence, slot) in self.reports.range(keep_from..) {
            let Some(payload) = record::read_payload(&self.file, slot.offset, slot.header)? else {
                log::error!("journal: report {sequence} cannot be read any more and is left behind");
                fresh.damaged += 1;
                continue;
            };
            let offset = fresh.length;
            put(&mut fresh, &record::encode(Kind::Report, *sequence, &payload))?;
            fresh.reports.insert(*sequence, Slot { offset, header: slot.header });
            if let Some(key) = kept.get(sequence) {
                fresh.keys.insert((*key).clone(), *sequence);
            }
        }
        Ok(fresh)
    }

    fn place(&mut self, cursor: Cursor) {
        if cursor.forgotten {
            self.cursors.remove(&cursor.receiver);
        } else {
            self.cursors.insert(cursor.receiver, cursor.sequence);
        }
    }

    /// Everything up to here has been acknowledged by every receiver; 0 while there is none.
    fn acknowledged(&self) -> u64 {
        self.cursors.values().min().copied().unwrap_or(0)
    }

    fn waiting(&self) -> impl Iterator<Item = (&u64, &Slot)> {
        self.reports.range(self.acknowledged().saturating_add(1)..)
    }

    fn waiting_bytes(&self) -> u64 {
        self.waiting().map(|(_, slot)| slot.header.record_bytes()).sum()
    }

    fn full(&self, bytes_max: u64) -> JournalError {
        let slowest = match self.cursors.iter().min_by_key(|(_, sequence)| **sequence) {
            Some((name, _)) => format!(" by {name:?}"),
            None => ", and no receiver has ever asked for them".into(),
        };
        let bytes = self.waiting_bytes();
        JournalError::Full { waiting: self.waiting().count(), bytes, bytes_max, slowest }
    }
}

/// The key and the JSON of a report record.
fn report_of(payload: &[u8]) -> Option<(Uid, &[u8])> {
    let (&length, rest) = payload.split_first()?;
    let (key, json) = rest.split_at_checked(length.into())?;
    Some((Uid::parse(std::str::from_utf8(key).ok()?).ok()?, json))
}

fn fresh_path(path: &Path) -> PathBuf {
    path.with_extension("new")
}

fn io_error<'a>(path: &'a Path, doing: &'static str) -> impl Fn(io::Error) -> JournalError + use<'a> {
    move |source| JournalError::Io { path: path.into(), doing, source }
}

#[cfg(test)]
mod tests;
