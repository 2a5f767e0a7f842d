//! TOML fragments to [`Settings`]: built once, checked once, nothing left to check behind.
//!
//! A fragment may name the one it builds on (`inherits = "base.toml"`, relative to itself); its own keys win. A key
//! nobody knows is an error with its name, since a misspelt limit would silently not hold.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::exam::registry::ExamKind;
use crate::pool::THREADS_MAX;

/// Fragments that inherit may be this deep; more is a circle.
const INHERITANCE_MAX: usize = 8;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The text is not the TOML that is expected; names line and key.
    #[error("{}: {text}", path.display())]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// What and where.
        text: String,
    },
    /// Fragments that inherit from each other.
    #[error("{}: inherits more than {INHERITANCE_MAX} fragments deep", .0.display())]
    Circle(PathBuf),
    /// A value that makes no sense.
    #[error("{key}: {why}")]
    Value {
        /// `work.threads`
        key: &'static str,
        /// One clause.
        why: String,
    },
    /// The memory budget does not add up.
    #[error("{0}")]
    Budget(#[from] OverBudget),
}

/// What the service needs at most, part by part, and that it is more than the board grants.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the memory budget does not add up: {} MiB granted (memory.budget_mib), {} MiB needed ({})",
    granted_mib, plan.total_mib(), plan.terms())]
pub struct OverBudget {
    /// `memory.budget_mib`.
    pub granted_mib: u64,
    /// The sum and its parts.
    pub plan: MemoryPlan,
}

/// Everything `scanside serve` obeys.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Who this box is.
    pub device: Device,
    /// The DICOM door.
    pub dicom: Dicom,
    /// The local socket.
    pub socket: Socket,
    /// The serial line.
    pub serial: Serial,
    /// The folder that is watched.
    pub inbox: Inbox,
    /// Where instances and volumes lie while they are worked on.
    pub spool: Spool,
    /// How series are put together.
    pub series: Series,
    /// Threads.
    pub work: Work,
    /// The promise.
    pub memory: Memory,
    /// What is done to series.
    pub exams: Exams,
    /// Model packages.
    pub models: Models,
    /// Updates of firmware and models.
    pub update: Update,
    /// The hardware watchdog.
    pub watchdog: Watchdog,
}

/// `[device]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Device {
    /// Name in reports.
    pub name: String,
}

/// `[dicom]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dicom {
    /// Address and port to listen on; none: the door stays shut.
    pub listen: Option<SocketAddr>,
    /// Our AE title.
    pub ae_title: String,
    /// Whether an association must call us by that title.
    pub strict_called_ae: bool,
    /// AE titles that may call; empty: any.
    pub callers: Vec<String>,
    /// Associations at once; one more is rejected as a local limit (PS3.8 9.3.4).
    pub associations_max: usize,
    /// Largest PDU we take, as negotiated (PS3.8 D.1).
    pub pdu_bytes_max: u32,
    /// Seconds to wait for an association request, or for the peer to close (ARTIM, PS3.8 9.1.5).
    pub artim_s: u64,
    /// Seconds of silence inside an association before it is aborted.
    pub idle_s: u64,
    /// Largest instance taken, MiB.
    pub instance_mib_max: u64,
}

/// `[socket]`
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Socket {
    /// Path of the Unix socket; none: no socket.
    pub path: Option<PathBuf>,
}

/// `[serial]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Serial {
    /// Device; none: no serial line.
    pub device: Option<PathBuf>,
    /// Bits a second.
    pub baud: u32,
}

/// `[inbox]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Inbox {
    /// Folder to watch; none: no inbox.
    pub path: Option<PathBuf>,
    /// Seconds a file's size must stand still before it is read.
    pub settle_s: u64,
}

/// `[spool]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Spool {
    /// The folder; everything below it is ours.
    pub path: PathBuf,
    /// Most MiB of accepted instances and volumes.
    pub mib_max: u64,
}

/// `[series]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Series {
    /// Seconds without a new slice after which an incomplete series is closed as it is: the last resort.
    pub quiet_s: u64,
    /// Seconds without a new series after which a study that lacks some is analysed as it is: sequences of an MR protocol take minutes.
    pub study_quiet_s: u64,
    /// Most slices of one series.
    pub slices_max: usize,
    /// Series growing at once; one more waits at the door.
    pub growing_max: usize,
}

/// `[work]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Work {
    /// Threads that compute; 0: one per core.
    pub threads: usize,
}

/// `[memory]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// What the service may use at its peak, networks included.
    pub budget_mib: u64,
}

/// `[exams]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Exams {
    /// Those whose packages are loaded, by name; a series of another modality is reported as `not_attempted`.
    pub run: Vec<ExamKind>,
}

impl Default for Exams {
    fn default() -> Self {
        Self { run: ExamKind::ALL.into_iter().filter(|kind| kind.runs_by_default()).collect() }
    }
}

/// `[models]`
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Models {
    /// Folder of packages that replace the built-in ones of the same name.
    pub path: Option<PathBuf>,
    /// Hex of the ed25519 key that must have signed every package; none: unsigned ones are taken.
    pub signed_by: Option<String>,
}

/// `[update]`
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Update {
    /// Folder of the two slots; none: this box takes no updates (a package manager replaces its files).
    pub slots: Option<PathBuf>,
    /// The board's name, which an update has to name.
    pub board: Option<String>,
    /// Hex of the ed25519 key that must have signed every update; none: no update is taken.
    pub signed_by: Option<String>,
}

/// `[watchdog]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Watchdog {
    /// Device that the service feeds while it lives; none: somebody else does (systemd), or nobody.
    pub device: Option<PathBuf>,
    /// Seconds without food until it resets the board.
    pub timeout_s: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            device: Device { name: "scanside".into() },
            dicom: Dicom::default(),
            socket: Socket::default(),
            serial: Serial { device: None, baud: 115_200 },
            inbox: Inbox { path: None, settle_s: 2 },
            spool: Spool { path: "/var/lib/scanside/spool".into(), mib_max: 8192 },
            series: Series { quiet_s: 60, study_quiet_s: 600, slices_max: 4096, growing_max: 8 },
            work: Work { threads: 0 },
            memory: Memory { budget_mib: 768 },
            exams: Exams { run: ExamKind::ALL.into_iter().filter(|kind| kind.runs_by_default()).collect() },
            models: Models::default(),
            update: Update::default(),
            watchdog: Watchdog { device: None, timeout_s: 30 },
        }
    }
}

impl Default for Device {
    fn default() -> Self {
        Settings::default().device
    }
}

impl Default for Dicom {
    fn default() -> Self {
        Self {
            listen: None,
            ae_title: "SCANSIDE".into(),
            strict_called_ae: false,
            callers: Vec::new(),
            associations_max: 8,
            pdu_bytes_max: 131_072,
            artim_s: 30,
            idle_s: 60,
            instance_mib_max: 64,
        }
    }
}

macro_rules! default_from_settings {
    ($($t:ident, $field:ident;)*) => {$(
        impl Default for $t {
            fn default() -> Self { Settings::default().$field }
        }
    )*};
}
default_from_settings! { Serial, serial; Inbox, inbox; Spool, spool; Series, series; Work, work; Memory, memory; Watchdog, watchdog; }

impl Settings {
    /// Reads a fragment and those it inherits.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file and the key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let table = merged(path, 0)?;
        let text = toml::to_string(&table).map_err(|e| syntax(path, &e))?;
        let settings: Self = toml::from_str(&text).map_err(|e| syntax(path, &e))?;
        settings.check()
    }

    /// Checks every value against its meaning; called by [`Settings::load`] and again once flags have been laid over.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check(self) -> Result<Self, ConfigError> {
        let wrong = |key, why: &str| Err(ConfigError::Value { key, why: why.into() });
        let title = &self.dicom.ae_title;
        if title.is_empty() || title.len() > 16 || !title.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'\\') {
            return wrong("dicom.ae_title", "an AE title has 1 to 16 printable characters and no backslash");
        }
        if !(1..=64).contains(&self.dicom.associations_max) {
            return wrong("dicom.associations_max", "1 to 64");
        }
        if !(4096..=16 << 20).contains(&self.dicom.pdu_bytes_max) {
            return wrong("dicom.pdu_bytes_max", "4096 to 16777216");
        }
        if self.dicom.artim_s == 0 || self.dicom.idle_s == 0 || self.series.quiet_s == 0 {
            return wrong("dicom.artim_s, dicom.idle_s, series.quiet_s", "a timer of zero seconds never lets anything in");
        }
        if !(self.series.quiet_s..=86_400).contains(&self.series.study_quiet_s) {
            return wrong("series.study_quiet_s", "a study waits at least as long as a series (series.quiet_s), and a day at most");
        }
        if !(1..=4096).contains(&self.dicom.instance_mib_max) {
            return wrong("dicom.instance_mib_max", "1 to 4096");
        }
        if !(1..=65_536).contains(&self.series.slices_max) || !(1..=256).contains(&self.series.growing_max) {
            return wrong("series.slices_max, series.growing_max", "1 to 65536 slices, 1 to 256 series");
        }
        if self.work.threads > THREADS_MAX {
            return wrong("work.threads", "at most 256");
        }
        if !(4..=600).contains(&self.watchdog.timeout_s) {
            return wrong("watchdog.timeout_s", "4 to 600");
        }
        Ok(self)
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        match self.work.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }

    /// As TOML, with every default written out.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("settings are plain tables")
    }
}

fn syntax(path: &Path, error: &impl std::fmt::Display) -> ConfigError {
    ConfigError::Syntax { path: path.to_owned(), text: error.to_string().trim_end().replace('\n', " ") }
}

fn merged(path: &Path, depth: usize) -> Result<toml::Table, ConfigError> {
    if depth > INHERITANCE_MAX {
        return Err(ConfigError::Circle(path.to_owned()));
    }
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let mut own: toml::Table = toml::from_str(&text).map_err(|e| syntax(path, &e))?;
    // Told here, while the file that holds a wrong key is still known.
    let mut alone = own.clone();
    let base = alone.remove("inherits");
    own.remove("inherits");
    toml::from_str::<Settings>(&toml::to_string(&alone).map_err(|e| syntax(path, &e))?).map_err(|e| syntax(path, &e))?;
    match base {
        None => Ok(own),
        Some(toml::Value::String(name)) => {
            let mut table = merged(&path.parent().unwrap_or(Path::new(".")).join(name), depth + 1)?;
            overlay(&mut table, own);
            Ok(table)
        }
        Some(_) => Err(syntax(path, &"inherits: the name of a file is expected")),
    }
}

fn overlay(base: &mut toml::Table, own: toml::Table) {
    for (key, value) in own {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(value)) => overlay(inner, value),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// The most memory the service uses, part by part, known before the first study is accepted.
#[derive(Debug, Clone, Default)]
pub struct MemoryPlan {
    /// What for, and bytes.
    pub parts: Vec<(&'static str, u64)>,
}

impl MemoryPlan {
    /// Adds a part.
    pub fn add(&mut self, what: &'static str, bytes: u64) {
        self.parts.push((what, bytes));
    }

    /// The sum, rounded up.
    pub fn total_mib(&self) -> u64 {
        self.parts.iter().map(|(_, bytes)| bytes).sum::<u64>().div_ceil(1 << 20)
    }

    /// `networks 60 + exam 120 + …`
    pub fn terms(&self) -> String {
        let terms: Vec<String> =
            self.parts.iter().map(|(what, bytes)| format!("{what} {}", bytes.div_ceil(1 << 20))).collect();
        terms.join(" + ")
    }

    /// Holds the plan against what the board grants.
    ///
    /// # Errors
    /// [`OverBudget`].
    pub fn hold_against(self, memory: &Memory) -> Result<Self, OverBudget> {
        if self.total_mib() <= memory.budget_mib {
            Ok(self)
        } else {
            Err(OverBudget { granted_mib: memory.budget_mib, plan: self })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn a_fragment_wins_over_the_one_it_inherits_from() {
        let dir = folder(&[
            ("base.toml", "[dicom]\nae_title = 'BASE'\nidle_s = 7\n[work]\nthreads = 3\n"),
            ("board.toml", "inherits = 'base.toml'\n[dicom]\nae_title = 'BOARD'\n"),
        ]);
        let settings = Settings::load(&dir.path().join("board.toml")).unwrap();
        assert_eq!(settings.dicom.ae_title, "BOARD");
        assert_eq!(settings.dicom.idle_s, 7);
        assert_eq!(settings.threads(), 3);
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        let text = Settings::default().to_toml();
        let dir = folder(&[("all.toml", &text)]);
        assert_eq!(Settings::load(&dir.path().join("all.toml")).unwrap().to_toml(), text);
    }

    #[test]
    fn a_misspelt_key_is_named_with_its_file() {
        let dir = folder(&[("base.toml", "[dicom]\nae_tilte = 'X'\n"), ("b.toml", "inherits = 'base.toml'\n")]);
        let error = Settings::load(&dir.path().join("b.toml")).unwrap_err().to_string();
        assert!(error.contains("base.toml") && error.contains("ae_tilte"), "{error}");
    }

    #[test]
    fn fragments_in_a_circle_are_an_error() {
        let dir = folder(&[("a.toml", "inherits = 'b.toml'"), ("b.toml", "inherits = 'a.toml'")]);
        assert!(matches!(Settings::load(&dir.path().join("a.toml")), Err(ConfigError::Circle(_))));
    }

    #[test]
    fn a_budget_that_does_not_add_up_says_why() {
        let mut plan = MemoryPlan::default();
        plan.add("networks", 100 << 20);
        plan.add("exam", 200 << 20);
        let error = plan.hold_against(&Memory { budget_mib: 256 }).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the memory budget does not add up: 256 MiB granted (memory.budget_mib), 300 MiB needed (networks 100 + exam 200)"
        );
    }
}
