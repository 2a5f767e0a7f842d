//! The third door: a folder that is watched. What is put there, in subfolders and under any names, is taken in and
//! moved to `done`, or to `failed` with a sentence beside it.
//!
//! ```text
//! <inbox>/anything/at/all          put there by a person, a script, a mounted stick
//! <inbox>/done/anything/at/all     taken in
//! <inbox>/failed/anything/at/all   not taken in; all.txt says why
//! ```
//! A file is read once it has stood still for a while; looked for, not notified, since network folders and sticks
//! notify nobody. Where files cannot be moved away (a stick that is read-only, or another file system) they stay, and
//! are not read again while they stay as they are.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};

use super::{Intake, IntakeError, Received, SourceId};

/// Files that are looked at in one round; what lies beyond waits until these are gone. A list without end would be
/// built of a stick with a million files.
const FILES_MAX: usize = 20_000;

/// Folders in folders.
const DEPTH_MAX: usize = 16;

/// Pause before a file is tried again that found no room.
const RETRY: Duration = Duration::from_secs(5);

/// Basic Directory: the DICOMDIR of a medium holds no image, and is nobody's mistake.
const MEDIA_DIRECTORY_NAME: &str = "DICOMDIR";

/// What the watcher obeys.
#[derive(Debug, Clone)]
pub struct InboxConfig {
    /// The folder; it is made if it is missing.
    pub folder: PathBuf,
    /// How long a file must stand still before it is read.
    pub settle: Duration,
    /// Largest file that is taken for an instance.
    pub instance_bytes_max: usize,
}

/// Why the folder cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum InboxError {
    /// The folder is not there and cannot be made.
    #[error("cannot watch the inbox {}: {source}", path.display())]
    Folder {
        /// Which one.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// The thread that watches; it ends with [`InboxWatcher::shutdown`] or when dropped.
pub struct InboxWatcher {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl InboxWatcher {
    /// Watches from now on.
    ///
    /// # Errors
    /// [`InboxError`]
    pub fn start(config: InboxConfig, intake: Arc<dyn Intake>) -> Result<Self, InboxError> {
        let folder = |source| InboxError::Folder { path: config.folder.clone(), source };
        fs::create_dir_all(&config.folder).map_err(folder)?;
        let pause = (config.settle / 2).clamp(Duration::from_millis(50), Duration::from_secs(1));
        let (stop, stopped) = bounded::<()>(0);
        let mut inbox = Inbox::new(config.clone(), intake);
        let watch = move || {
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                inbox.look(Instant::now());
            }
        };
        let thread = std::thread::Builder::new().name("scanside-inbox".into()).spawn(watch).map_err(folder)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }

    /// Whether the thread that looks is there.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Stops after the file that is being read.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for InboxWatcher {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What is known of the folder between two looks.
pub struct Inbox {
    config: InboxConfig,
    intake: Arc<dyn Intake>,
    seen: HashMap<PathBuf, Seen>,
    batch: Option<Batch>,
    readable: bool,
}

/// Everything that comes in until the folder is quiet, as one source.
struct Batch {
    source: SourceId,
    /// Something could not be read to its end: a stick was pulled.
    broken: bool,
}

/// A file as it was when it was last looked at.
#[derive(Clone, Copy)]
struct Seen {
    bytes: u64,
    modified: SystemTime,
    since: Instant,
    state: State,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    /// Not yet read; after a failure to find room, not before this moment.
    Waiting(Option<Instant>),
    /// Read, and it could not be moved away.
    Left,
}

impl Inbox {
    /// Nothing is known yet.
    pub fn new(config: InboxConfig, intake: Arc<dyn Intake>) -> Self {
        Self { config, intake, seen: HashMap::new(), batch: None, readable: true }
    }

    /// One look into the folder: takes in what has stood still since `now` minus the settling time.
    pub fn look(&mut self, now: Instant) {
        let mut found = Vec::new();
        let listed = list(&self.config.folder, &mut found);
        if let Err(error) = &listed
            && self.readable
        {
            log::error!("the inbox cannot be read: {error}");
        }
        self.readable = listed.is_ok();
        let mut seen = HashMap::with_capacity(found.len());
        for (path, bytes, modified) in found {
            let fresh = Seen { bytes, modified, since: now, state: State::Waiting(None) };
            let known = self.seen.get(&path).filter(|known| (known.bytes, known.modified) == (bytes, modified));
            seen.insert(path, known.copied().unwrap_or(fresh));
        }
        self.seen = seen;
        let ready = |seen: &Seen| {
            let due = matches!(seen.state, State::Waiting(after) if after.is_none_or(|after| after <= now));
            due && now.saturating_duration_since(seen.since) >= self.config.settle
        };
        let mut due: Vec<PathBuf> = self.seen.iter().filter(|(_, seen)| ready(seen)).map(|(path, _)| path.clone()).collect();
        due.sort();
        for path in due {
            let state = self.take_in(&path, now);
            match (state, self.seen.get_mut(&path)) {
                (Some(state), Some(seen)) => seen.state = state,
                _ => drop(self.seen.remove(&path)),
            }
        }
        if self.seen.values().all(|seen| seen.state == State::Left)
            && let Some(batch) = self.batch.take()
        {
            if batch.broken { self.intake.lost(batch.source) } else { self.intake.released(batch.source) }
        }
    }

    /// Reads one file and puts it in its place; what is still known of it afterwards.
    fn take_in(&mut self, path: &Path, now: Instant) -> Option<State> {
        let batch = self.batch.get_or_insert_with(|| Batch { source: SourceId::fresh(), broken: false });
        let file = match read(path, self.config.instance_bytes_max) {
            Ok(file) => file,
            Err(error) => {
                log::warn!("a file in the inbox cannot be read: {error}");
                batch.broken = true;
                return None;
            }
        };
        let directory = path.file_name().is_some_and(|name| name == MEDIA_DIRECTORY_NAME);
        let refused = match file {
            None => Some(format!("larger than {} bytes, the most that is taken", self.config.instance_bytes_max)),
            Some(_) if directory => None,
            Some(file) => {
                match self.intake.store(Received { source: batch.source, sop_instance: None, file: &file }) {
                    Ok(_) => None,
                    Err(IntakeError::Rejected(rejection)) => Some(rejection.text),
                    Err(error) => {
                        log::warn!("a file in the inbox waits: {error}");
                        return Some(State::Waiting(Some(now + RETRY)));
                    }
                }
            }
        };
        let moved = match &refused {
            None => self.put_away("done", path),
            Some(why) => self.put_away("failed", path).inspect(|to| {
                let mut note = to.as_os_str().to_owned();
                note.push(".txt");
                if let Err(error) = fs::write(note, format!("{why}\n")) {
                    log::error!("cannot write into the inbox's folder of failures: {error}");
                }
            }),
        };
        if refused.is_some() {
            log::warn!("source {}: a file in the inbox was refused; the reason is in its folder of failures", batch_id(&self.batch));
        }
        moved.is_none().then_some(State::Left)
    }

    /// Moves a file below `done` or `failed`, and removes the folders that are empty then.
    fn put_away(&self, to: &str, path: &Path) -> Option<PathBuf> {
        let below = path.strip_prefix(&self.config.folder).ok()?;
        let mut target = self.config.folder.join(to).join(below);
        fs::create_dir_all(target.parent()?).ok()?;
        let name = target.file_name()?.to_owned();
        for n in 2.. {
            if !target.exists() {
                break;
            }
            let mut other = OsString::from(&name);
            other.push(format!(".{n}"));
            target.set_file_name(other);
        }
        fs::rename(path, &target).ok()?;
        let mut folder = path.parent()?;
        while folder != self.config.folder && fs::remove_dir(folder).is_ok() {
            folder = folder.parent()?;
        }
        Some(target)
    }
}

fn batch_id(batch: &Option<Batch>) -> u64 {
    batch.as_ref().map_or(0, |batch| batch.source.0)
}

/// Every file that may be an image: no hidden ones, no links, nothing of what was put away.
fn list(inbox: &Path, found: &mut Vec<(PathBuf, u64, SystemTime)>) -> io::Result<()> {
    let mut open = vec![(inbox.to_owned(), 0)];
    while let Some((folder, depth)) = open.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            // A folder that went while we looked is no trouble; the inbox itself is.
            Err(_) if depth > 0 => continue,
            Err(error) => return Err(error),
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let put_away = depth == 0 && (name == "done" || name == "failed");
            if put_away || name.as_encoded_bytes().starts_with(b".") || found.len() >= FILES_MAX {
                continue;
            }
            // Not followed: a link could lead out of the inbox.
            let Ok(about) = entry.metadata() else { continue };
            if about.is_dir() && depth < DEPTH_MAX {
                open.push((entry.path(), depth + 1));
            } else if about.is_file() {
                found.push((entry.path(), about.len(), about.modified().unwrap_or(SystemTime::UNIX_EPOCH)));
            }
        }
    }
    Ok(())
}

/// The bytes of a file, or None when there are more than `bytes_max`.
fn read(path: &Path, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    file.take(bytes_max as u64 + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() <= bytes_max).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::ingest::Stored;
    use crate::study::{Rejection, RejectionCode};

    /// An intake that takes files that begin with `ok`, has no room for `full`, and writes down what happens.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>);

    impl Recorder {
        fn note(&self, what: impl Into<String>) {
            self.0.lock().unwrap().push(what.into());
        }

        fn notes(&self) -> Vec<String> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    impl Intake for Recorder {
        fn store(&self, received: Received<'_>) -> Result<Stored, IntakeError> {
            let text = String::from_utf8_lossy(received.file).into_owned();
            self.note(text.clone());
            match &text {
                text if text.starts_with("ok") => Ok(Stored::New),
                text if text.starts_with("full") => Err(IntakeError::OutOfResources("no room".into())),
                _ => Err(Rejection::new(RejectionCode::Malformed, "this is no DICOM file").into()),
            }
        }

        fn released(&self, _: SourceId) {
            self.note("released");
        }

        fn lost(&self, _: SourceId) {
            self.note("lost");
        }
    }

    struct Bench {
        folder: tempfile::TempDir,
        inbox: Inbox,
        recorder: Arc<Recorder>,
        begun: Instant,
    }

    fn bench() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let recorder = Arc::new(Recorder::default());
        let settle = Duration::from_secs(2);
        let config = InboxConfig { folder: folder.path().to_owned(), settle, instance_bytes_max: 100 };
        Bench { inbox: Inbox::new(config, recorder.clone()), folder, recorder, begun: Instant::now() }
    }

    impl Bench {
        fn put(&self, name: &str, text: &str) {
            let path = self.folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        /// Looks at that second and gives what the intake was told.
        fn look_at(&mut self, second: u64) -> Vec<String> {
            self.inbox.look(self.begun + Duration::from_secs(second));
            self.recorder.notes()
        }

        fn has(&self, name: &str) -> bool {
            self.folder.path().join(name).exists()
        }
    }

    #[test]
    fn a_file_is_read_once_it_has_stood_still_and_the_batch_ends_when_all_are_read() {
        let mut bench = bench();
        bench.put("stick/a/IM1", "ok 1");
        assert_eq!(bench.look_at(0), [] as [&str; 0]);
        bench.put("stick/a/IM2", "ok");
        assert_eq!(bench.look_at(1), [] as [&str; 0]);
        assert_eq!(bench.look_at(2), ["ok 1"], "the second is still new, and holds the batch open");
        bench.put("stick/a/IM2", "ok, grown");
        assert_eq!(bench.look_at(3), [] as [&str; 0]);
        assert_eq!(bench.look_at(5), ["ok, grown", "released"]);
        assert!(bench.has("done/stick/a/IM1") && bench.has("done/stick/a/IM2"));
        assert!(!bench.has("stick"), "folders that are empty go");
        assert_eq!(bench.look_at(9), [] as [&str; 0]);
    }

    #[test]
    fn what_is_refused_lies_in_failed_with_a_sentence() {
        let mut bench = bench();
        bench.put("notes.txt", "no image");
        bench.put("huge", &"x".repeat(101));
        bench.put("DICOMDIR", "a directory of a medium");
        bench.put(".hidden", "ok");
        bench.look_at(0);
        assert_eq!(bench.look_at(2), ["no image", "released"]);
        let sentence = fs::read_to_string(bench.folder.path().join("failed/notes.txt.txt")).unwrap();
        assert_eq!(sentence, "this is no DICOM file\n");
        assert!(bench.has("failed/huge.txt") && bench.has("done/DICOMDIR") && bench.has(".hidden"));
    }

    #[test]
    fn a_file_without_room_waits_and_is_tried_again() {
        let mut bench = bench();
        bench.put("IM1", "full");
        bench.look_at(0);
        assert_eq!(bench.look_at(2), ["full"]);
        assert_eq!(bench.look_at(3), [] as [&str; 0]);
        assert_eq!(bench.look_at(7), ["full"]);
        assert!(bench.has("IM1"));
        bench.put("IM1", "ok, room");
        bench.look_at(8);
        assert_eq!(bench.look_at(10), ["ok, room", "released"]);
    }

    #[test]
    fn a_stick_that_is_pulled_ends_its_batch_as_lost() {
        let mut bench = bench();
        bench.put("stick/IM1", "ok");
        bench.put("stick/IM2", "ok");
        bench.look_at(0);
        // What was listed cannot be read any more.
        let second = bench.folder.path().join("stick/IM2");
        fs::remove_file(&second).unwrap();
        std::os::unix::fs::symlink("nowhere", &second).unwrap();
        let gone = bench.inbox.take_in(&second, bench.begun);
        assert!(gone.is_none());
        assert_eq!(bench.look_at(2), ["ok", "lost"]);
    }

    #[test]
    fn the_same_name_twice_keeps_both() {
        let mut bench = bench();
        for (second, text) in [(0, "ok 1"), (10, "ok 2")] {
            bench.put("IM1", text);
            bench.look_at(second);
            assert_eq!(bench.look_at(second + 2), [text, "released"]);
        }
        assert!(bench.has("done/IM1") && bench.has("done/IM1.2"));
    }
}
