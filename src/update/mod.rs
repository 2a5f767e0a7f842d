//! Updates: two slots for firmware and models beside the factory's, and a power cut at any byte leaves one that boots.
//!
//! ```text
//! SLOTS/state.json                     which slot is what; replaced whole, never changed in place
//! SLOTS/{a,b}/scanside, models/        what runs
//! SLOTS/{a,b}/manifest.{toml,sig}      what it is, and who has made it
//!
//! install -> trial -> choose (once) -> confirm -> active          the active one before stays as previous
//!                          └─ no confirm before the next choose ─> failed, and the active one runs again
//! ```
//! An update is written into the slot that nothing refers to; only when all of it is safe and has been read back does
//! the state name it. Whoever boots asks [`Slots::choose`], which believes nothing that it has not verified: a slot with
//! one wrong bit is passed over, and the factory's firmware on the read-only root is always there.

pub mod disk;
pub mod release;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use ed25519_dalek::VerifyingKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::disk::{Disk, RealDisk};
use self::release::{BINARY, MANIFEST, Release, SIGNATURE, Version};
use crate::config;
use crate::infer::package::FILE_BYTES_MAX;
use crate::infer::signature::{self, hex};

/// How often a slot on trial is started without being confirmed: once. A fault that shows late would otherwise keep a
/// box from its work again and again.
const TRIES_MAX: u32 = 1;

/// Manifest and state are short; a longer one is something else.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// Bytes of a file held at a time.
const CHUNK: usize = 128 << 10;

const STATE: &str = "state.json";

/// Why an update does not take place; the state is the old one then.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The update is not what it should be.
    #[error("the update in {} is refused: {why}", folder.display())]
    Refused {
        /// Where it lies.
        folder: PathBuf,
        /// One clause, naming the file.
        why: String,
    },
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
    /// Not at this moment.
    #[error("{0}")]
    Busy(String),
    /// The settings do not allow updates.
    #[error("{0}")]
    Setting(String),
}

fn disk_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> UpdateError {
    let path = path.to_owned();
    move |source| UpdateError::Disk { doing, path, source }
}

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Slot {
    /// `a`
    A,
    /// `b`
    B,
}

impl Slot {
    fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Its folder's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }
}

/// A slot that has still to prove itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// Which.
    pub slot: Slot,
    /// Its version.
    pub version: String,
    /// How often it was started.
    pub tries: u32,
}

/// An update that was taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failed {
    /// Its version.
    pub version: String,
    /// One clause.
    pub why: String,
}

/// What `state.json` holds. Without one the factory's firmware runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The slot that runs; none: the factory's firmware.
    pub active: Option<Slot>,
    /// The slot that ran before it and is still whole.
    pub previous: Option<Slot>,
    /// The slot that runs next, once.
    pub trial: Option<Trial>,
    /// The last update that was taken back.
    pub failed: Option<Failed>,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// The folder with `scanside` and `models`.
    pub folder: PathBuf,
    /// Which slot; none: the factory's.
    pub slot: Option<Slot>,
    /// Its version; none: the factory's.
    pub version: Option<String>,
    /// Whether it has to be confirmed.
    pub trial: bool,
    /// What was not taken, and why: for the log.
    pub passed_over: Vec<String>,
}

/// What a confirmation has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "confirmed", content = "version")]
pub enum Confirmation {
    /// No slot is on trial.
    Nothing,
    /// There is one, and it has not been started yet.
    NotStarted(String),
    /// The slot on trial is the active one now.
    Active(String),
}

/// The slots of one board.
pub struct Slots<D = RealDisk> {
    disk: D,
    folder: PathBuf,
    board: String,
    target: String,
    key: VerifyingKey,
    chunk: usize,
}

impl Slots {
    /// The slots these settings name.
    ///
    /// # Errors
    /// [`UpdateError::Setting`] when they name no board, no folder or no key: nobody could tell then whose update it is.
    pub fn of(settings: &config::Update) -> Result<Self, UpdateError> {
        let missing = |what: &str| UpdateError::Setting(format!("update.{what} is not set: this box takes no updates"));
        let folder = settings.slots.clone().ok_or_else(|| missing("slots"))?;
        let board = settings.board.clone().ok_or_else(|| missing("board"))?;
        let key = settings.signed_by.as_ref().ok_or_else(|| missing("signed_by"))?;
        let key = signature::public_key(key).map_err(|e| UpdateError::Setting(format!("update.signed_by: {e}")))?;
        Ok(Self::on(RealDisk, folder, board, release::TARGET.into(), key))
    }
}

impl<D: Disk> Slots<D> {
    fn on(disk: D, folder: PathBuf, board: String, target: String, key: VerifyingKey) -> Self {
        Self { disk, folder, board, target, key, chunk: CHUNK }
    }

    /// Checks the update in `from`, copies it into the slot that nothing refers to, reads it back, and puts it on trial.
    /// What is no newer than the active one (`running`, where that is the factory's), or was tried and taken back, is taken
    /// only when `downgrade` says so.
    ///
    /// # Errors
    /// [`UpdateError`]; what was active, and what boots next, is then as before.
    pub fn install(&self, from: &Path, running: Version, downgrade: bool) -> Result<Trial, UpdateError> {
        let refuse = |why| UpdateError::Refused { folder: from.to_owned(), why };
        let release = self.verify(from)?;
        let version = release.version();
        self.make_own_folder()?;
        let _alone = self.alone()?;
        let mut state = self.state();
        let active = state.active.and_then(|slot| self.version(slot).ok()).unwrap_or(running);
        let failed = state.failed.as_ref().filter(|failed| failed.version == version.to_string());
        // A stick that is left in the box must not be taken again at every boot.
        let why = match failed {
            _ if downgrade => None,
            _ if version < active => Some(format!("its version {version} is older than the active {active}")),
            _ if version == active => Some(format!("its version {version} is the active one already")),
            Some(failed) => Some(format!("its version {version} was taken back: {}", failed.why)),
            None => None,
        };
        if let Some(why) = why {
            return Err(refuse(format!("{why} (--allow-downgrade takes it)")));
        }
        if let Some(trial) = state.trial.as_ref().filter(|trial| trial.tries > 0) {
            let text = format!("slot {} with {} is being tried: confirm it, or restart the box", trial.slot.name(), trial.version);
            return Err(UpdateError::Busy(text));
        }
        let slot = state.active.map_or(Slot::A, Slot::other);
        // From here until the end nothing in the state refers to the slot that is written.
        let untouched = State { previous: state.previous.filter(|previous| *previous != slot), trial: None, ..state.clone() };
        if untouched != state {
            self.write_state(&untouched)?;
            state = untouched;
        }
        let folder = self.slot_folder(slot);
        self.copy(from, &folder, &release)?;
        let safe = self.verify(&folder)?;
        if safe.files != release.files || safe.version() != version {
            return Err(refuse("it changed while it was copied".into()));
        }
        let trial = Trial { slot, version: version.to_string(), tries: 0 };
        self.write_state(&State { trial: Some(trial.clone()), failed: None, ..state })?;
        Ok(trial)
    }

    /// What to run now; for whoever boots, once per boot. A slot on trial is given out once, and that is on the disk
    /// before it is; it is given out again only when it was confirmed. Always has an answer: the factory's firmware needs
    /// no state, no key and no disk.
    pub fn choose(&self, factory: &Path) -> Choice {
        let mut passed_over = Vec::new();
        let alone = match self.alone() {
            Ok(lock) => Some(lock),
            Err(UpdateError::Disk { source, .. }) if source.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                passed_over.push(error.to_string());
                None
            }
        };
        let mut state = self.read_state().unwrap_or_else(|error| {
            passed_over.push(error.to_string());
            State::default()
        });
        if let Some(trial) = state.trial.clone() {
            let why = if alone.is_none() {
                Err("the slots cannot be locked".to_owned())
            } else if trial.tries >= TRIES_MAX {
                Err("it was not confirmed after it was started".to_owned())
            } else {
                self.verify(&self.slot_folder(trial.slot)).map_err(|error| error.to_string())
            };
            let tried = match &why {
                Ok(_) => State { trial: Some(Trial { tries: trial.tries + 1, ..trial.clone() }), ..state.clone() },
                Err(why) => {
                    let failed = Failed { version: trial.version.clone(), why: why.clone() };
                    State { trial: None, failed: Some(failed), ..state.clone() }
                }
            };
            // What cannot be counted is not tried.
            let why = match alone.as_ref().map(|_| self.write_state(&tried)) {
                Some(Ok(())) => why,
                Some(Err(error)) => why.and(Err(error.to_string())),
                None => why,
            };
            match why {
                Ok(release) => return self.chosen(trial.slot, &release, true, passed_over),
                Err(why) => passed_over.push(format!("slot {} with {}: {why}", trial.slot.name(), trial.version)),
            }
            state = tried;
        }
        for slot in [state.active, state.previous].into_iter().flatten() {
            match self.verify(&self.slot_folder(slot)) {
                Ok(release) => return self.chosen(slot, &release, false, passed_over),
                Err(error) => passed_over.push(format!("slot {}: {error}", slot.name())),
            }
        }
        Choice { folder: factory.to_owned(), slot: None, version: None, trial: false, passed_over }
    }

    fn chosen(&self, slot: Slot, release: &Release, trial: bool, passed_over: Vec<String>) -> Choice {
        let version = Some(release.version().to_string());
        Choice { folder: self.slot_folder(slot), slot: Some(slot), version, trial, passed_over }
    }

    /// The slot on trial has shown that it is healthy: it is the active one from now on.
    ///
    /// # Errors
    /// [`UpdateError::Busy`], [`UpdateError::Disk`]; it stays on trial then.
    pub fn confirm(&self) -> Result<Confirmation, UpdateError> {
        if self.state().trial.is_none() {
            return Ok(Confirmation::Nothing);
        }
        let _alone = self.alone()?;
        let state = self.state();
        let Some(trial) = state.trial.clone() else { return Ok(Confirmation::Nothing) };
        if trial.tries == 0 {
            return Ok(Confirmation::NotStarted(trial.version));
        }
        self.write_state(&State { active: Some(trial.slot), previous: state.active, trial: None, failed: None })?;
        Ok(Confirmation::Active(trial.version))
    }

    /// Which slot is what. A state that cannot be read counts as none, as it does at boot.
    pub fn state(&self) -> State {
        self.read_state().unwrap_or_else(|error| {
            log::warn!("{error}");
            State::default()
        })
    }

    /// The version in a slot.
    ///
    /// # Errors
    /// [`UpdateError`] when anything in the slot is not as its maker signed it.
    pub fn version(&self, slot: Slot) -> Result<Version, UpdateError> {
        Ok(self.verify(&self.slot_folder(slot))?.version())
    }

    fn slot_folder(&self, slot: Slot) -> PathBuf {
        self.folder.join(slot.name())
    }

    /// Checks everything there is to check about an update or a slot: signature, machine, board, every byte.
    fn verify(&self, folder: &Path) -> Result<Release, UpdateError> {
        let refuse = |why| UpdateError::Refused { folder: folder.to_owned(), why };
        let text = self.read_text(folder, MANIFEST)?;
        let signature = self.read_text(folder, SIGNATURE)?;
        // Raw bytes only: the case of a hexadecimal digit could change unseen.
        if signature.len() != 64 || signature::verify(&self.key, &text, &signature).is_err() {
            return Err(refuse(format!("{SIGNATURE} does not sign this {MANIFEST} with the key this board trusts")));
        }
        let release = Release::parse(&text).map_err(refuse)?;
        release.suits(&self.board, &self.target).map_err(|why| refuse(format!("it {why}")))?;
        for (name, want) in &release.files {
            let got = self.walk(folder, name, |_| Ok(()))?;
            if got != *want {
                return Err(refuse(format!("{name}: its SHA-256 is {got}, the manifest says {want}")));
            }
        }
        Ok(release)
    }

    fn read_text(&self, folder: &Path, name: &str) -> Result<Vec<u8>, UpdateError> {
        let mut text = Vec::new();
        self.walk(folder, name, |bytes| {
            text.extend_from_slice(bytes);
            match text.len() as u64 > TEXT_BYTES_MAX {
                true => Err(disk_error("read", &folder.join(name))(ErrorKind::FileTooLarge.into())),
                false => Ok(()),
            }
        })?;
        Ok(text)
    }

    /// Reads a file of an update from end to end and gives its SHA-256.
    fn walk(
        &self,
        folder: &Path,
        name: &str,
        mut each: impl FnMut(&[u8]) -> Result<(), UpdateError>,
    ) -> Result<String, UpdateError> {
        let path = folder.join(name);
        let refuse = |why: String| UpdateError::Refused { folder: folder.to_owned(), why };
        let mut file = self.disk.open(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => refuse(format!("{name} is missing")),
            _ => disk_error("read", &path)(error),
        })?;
        let (mut digest, mut bytes, mut chunk) = (Sha256::new(), 0, vec![0; self.chunk]);
        loop {
            let count = match file.read(&mut chunk) {
                Ok(0) => return Ok(hex(&digest.finalize())),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(disk_error("read", &path)(error)),
            };
            bytes += count as u64;
            if bytes > FILE_BYTES_MAX {
                return Err(refuse(format!("{name} is longer than {FILE_BYTES_MAX} bytes")));
            }
            digest.update(&chunk[..count]);
            each(&chunk[..count])?;
        }
    }

    /// Copies the files of a release, and at last its manifest, into a slot that is emptied first; safe when it returns.
    fn copy(&self, from: &Path, slot: &Path, release: &Release) -> Result<(), UpdateError> {
        self.disk.remove_tree(slot).map_err(disk_error("clear", slot))?;
        let mut folders = BTreeSet::from([slot.to_owned()]);
        for name in release.files.keys() {
            let path = slot.join(name);
            folders.extend(path.ancestors().skip(1).take_while(|above| *above != slot).map(Path::to_owned));
        }
        for folder in &folders {
            self.disk.make_folder(folder).map_err(disk_error("make the folder", folder))?;
        }
        for name in release.files.keys().map(String::as_str).chain([MANIFEST, SIGNATURE]) {
            let path = slot.join(name);
            let mut file = self.disk.create(&path, name == BINARY).map_err(disk_error("make", &path))?;
            self.walk(from, name, |bytes| file.write_all(bytes).map_err(disk_error("write", &path)))?;
            file.sync().map_err(disk_error("sync", &path))?;
        }
        for folder in folders.iter().rev().map(PathBuf::as_path).chain([self.folder.as_path()]) {
            self.disk.sync_folder(folder).map_err(disk_error("sync", folder))?;
        }
        Ok(())
    }

    fn read_state(&self) -> Result<State, UpdateError> {
        let path = self.folder.join(STATE);
        let mut text = Vec::new();
        let read = self.disk.open(&path).and_then(|file| file.take(TEXT_BYTES_MAX).read_to_end(&mut text));
        match read {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(State::default()),
            Err(error) => return Err(disk_error("read", &path)(error)),
            Ok(_) => {}
        }
        serde_json::from_slice(&text).map_err(|error| disk_error("read", &path)(error.into()))
    }

    fn write_state(&self, state: &State) -> Result<(), UpdateError> {
        let (path, fresh) = (self.folder.join(STATE), self.folder.join("state.json.new"));
        let text = serde_json::to_string(state).expect("a plain structure") + "\n";
        let mut file = self.disk.create(&fresh, false).map_err(disk_error("make", &fresh))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync()).map_err(disk_error("write", &fresh))?;
        drop(file);
        self.disk.rename(&fresh, &path).map_err(disk_error("replace", &path))?;
        self.disk.sync_folder(&self.folder).map_err(disk_error("sync", &self.folder))
    }

    fn make_own_folder(&self) -> Result<(), UpdateError> {
        self.disk.make_folder(&self.folder).map_err(disk_error("make the folder", &self.folder))?;
        match self.folder.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            Some(parent) => self.disk.sync_folder(parent).map_err(disk_error("sync", parent)),
            None => Ok(()),
        }
    }

    fn alone(&self) -> Result<Box<dyn Any>, UpdateError> {
        let path = self.folder.join("lock");
        let lock = self.disk.lock(&path).map_err(disk_error("lock", &path))?;
        lock.ok_or_else(|| UpdateError::Busy("another update is at work in these slots".into()))
    }
}
