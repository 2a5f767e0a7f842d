//! The only wiring: doors, assembler, exams, journal and links on their threads.
//!
//! ```text
//! doors -> spool (disk) -> arrivals -> line -> jobs -> exam -> journal (disk) -> links
//! ```
//! Each arrow is a bounded channel; a full one blocks what is before it, and at last the sender. No cycle, so no deadlock.

mod admission;
pub mod analysis;
mod line;
pub mod live;
pub mod supervisor;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use jiff::Timestamp;
use serde::Serialize;

use self::admission::Admission;
use self::analysis::{Analyst, EarlySlice};
use self::line::{Job, Line, Part, Studies, Underway};
use self::live::{LIVE_BYTES, Live, LiveStats, LiveStatus};
use self::supervisor::{Hearts, memory_kib};
use crate::config::{MemoryPlan, OverBudget, Settings};
use crate::dicom::negotiation::AeTitle;
use crate::exam::Progress;
use crate::exam::registry::Exams;
use crate::infer::package::{Models, PackageError, Trust};
use crate::ingest::Intake;
use crate::ingest::dicom::{DicomConfig, DicomServer, DicomServerError};
use crate::ingest::inbox::{InboxConfig, InboxError, InboxWatcher};
use crate::ingest::socket::{LIVE_RECEIVING_BYTES, Services, SocketConfig, SocketError, SocketServer};
use crate::ingest::spool::{Spool, SpoolError, SpoolLimits, write_durably};
use crate::link::SerialPort;
use crate::report::{Device, Report};
use crate::report::journal::{Appended, Journal, JournalError};
use crate::report::line::send_reports;
use crate::report::wire::Pace;
use crate::series::{Assembler, Limits};
use crate::study::Uid;

/// Instances between the doors and the line. Each is a path and four UIDs; the bytes are on disk.
const ARRIVALS_MAX: usize = 64;

/// Finished series that wait for the exam: one, so that the next study's last slices are assembled while this one is
/// analysed, and a third makes its sender wait.
const JOBS_MAX: usize = 1;

/// The serial line's name among the journal's receivers.
const SERIAL_RECEIVER: &str = "serial";

/// Slices that wait to be segmented early. Each holds a reader of its growing volume, no voxels.
const EARLY_MAX: usize = 64;

/// Why the service does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The memory budget does not add up.
    #[error(transparent)]
    Budget(#[from] OverBudget),
    /// A setting that can only be judged here.
    #[error("{0}")]
    Setting(String),
    /// A model package is not what it should be.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The DICOM door.
    #[error(transparent)]
    Dicom(#[from] DicomServerError),
    /// The inbox folder.
    #[error(transparent)]
    Inbox(#[from] InboxError),
    /// The local socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The serial device is not there, or is no serial device.
    #[error("serial.device: {0}")]
    Serial(std::io::Error),
    /// The box has reported, and no longer knows under which UID.
    #[error(
        "{} holds no UID, and the reports in the journal bear one: write it there again (\"device\", \"uid\" of any report of this \
         box), or remove the file to go on under a new one; series that are reported already may then be reported twice",
        .0.display()
    )]
    DeviceUid(PathBuf),
    /// The system has no thread, file or descriptor for us.
    #[error("cannot {doing}: {source}")]
    System {
        /// What was tried.
        doing: String,
        /// The system's answer.
        source: std::io::Error,
    },
}

fn system(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> ServiceError {
    let doing = doing.into();
    move |source| ServiceError::System { doing, source }
}

/// What these locks guard is whole at every moment: a thread that ended in a panic leaves nothing half done behind.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The running service.
pub struct Service {
    shared: Arc<Shared>,
    dicom: Option<DicomServer>,
    inbox: Option<InboxWatcher>,
    socket: Option<SocketServer>,
    live: Arc<Live>,
    threads: Vec<(&'static str, JoinHandle<()>)>,
    /// Keeps the line's channel open until the doors are closed.
    spool: Option<Arc<Spool>>,
}

/// What every thread of the service may look at.
struct Shared {
    settings: Settings,
    journal: Arc<Journal>,
    analyst: Analyst,
    hearts: Arc<Hearts>,
    stop: Arc<AtomicBool>,
    started: Instant,
    reported: AtomicU64,
    working_on: Mutex<Option<(Uid, Progress)>>,
    underway: Arc<Mutex<Underway>>,
    live: LiveStats,
    plan: MemoryPlan,
}

/// The service at a glance.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Version of the firmware.
    pub version: &'static str,
    /// Seconds since the start.
    pub uptime_s: u64,
    /// Reports since the start.
    pub reported: u64,
    /// The series an exam works on: its UID, stage, steps done and of how many.
    pub working_on: Option<(Uid, &'static str, usize, usize)>,
    /// What is here and not yet at its exam.
    pub underway: Underway,
    /// Live streams.
    pub live: LiveStatus,
    /// The journal and its receivers.
    pub journal: crate::report::journal::JournalStatus,
    /// Peak memory of the process, MiB.
    pub memory_peak_mib: u64,
    /// What was promised, MiB.
    pub memory_budget_mib: u64,
    /// A thread that works and has given no sign of life; the watchdog is not fed then.
    pub stalled: Option<&'static str>,
}

/// How long a working thread may go without a sign of life.
const STALL_AFTER: Duration = Duration::from_secs(60);

impl Service {
    /// Loads the models, takes up what was left in the spool, and opens the doors.
    ///
    /// # Errors
    /// [`ServiceError`]; nothing runs then.
    pub fn start(settings: Settings) -> Result<Self, ServiceError> {
        let folder = settings.spool.path.clone();
        let scratch = scratch_folder(&folder)?;
        let models = models(&settings)?;
        let (journal, recovery) = Journal::open(&folder.join("reports"), Default::default())?;
        for damage in &recovery.damage {
            log::error!("the journal was damaged: {damage:?}");
        }
        let device = device(&folder, &settings.device.name, &journal)?;
        let exams = Exams::load(&models, &settings.exams.run)?;
        let analyst = Analyst::new(exams, settings.threads(), device, scratch.clone());
        let plan = memory_plan(&settings, &analyst).hold_against(&settings.memory)?;
        log::info!("memory: at most {} MiB ({})", plan.total_mib(), plan.terms());

        let (arrivals_in, arrivals) = bounded(ARRIVALS_MAX);
        let limits = SpoolLimits {
            bytes_max: settings.spool.mib_max << 20,
            instance_bytes_max: (settings.dicom.instance_mib_max << 20) as usize,
        };
        let spool = Arc::new(Spool::open(&folder, limits, arrivals_in.clone())?);
        let shared = Arc::new(Shared {
            journal: Arc::new(journal),
            analyst,
            hearts: Arc::default(),
            stop: Arc::default(),
            started: Instant::now(),
            reported: AtomicU64::new(0),
            working_on: Mutex::default(),
            underway: Arc::default(),
            live: LiveStats::default(),
            plan,
            settings,
        });
        let live = Arc::new(Live::new(Arc::clone(&shared)));
        let mut service = Self { shared, live, dicom: None, inbox: None, socket: None, threads: Vec::new(), spool: Some(Arc::clone(&spool)) };
        service.start_line(&spool, arrivals, &scratch)?;
        // Only now that the line reads: there may be more of them than the channel holds.
        let lost = crate::ingest::spool::Arrival::Lost(crate::ingest::SourceId::RECOVERED);
        for arrival in spool.recover()?.into_iter().chain([lost]) {
            if arrivals_in.send(arrival).is_err() {
                break;
            }
        }
        drop(arrivals_in);
        service.start_links()?;
        service.open_doors(&spool)?;
        Ok(service)
    }

    /// Where the DICOM door is, when it is open.
    pub fn dicom_address(&self) -> Option<SocketAddr> {
        self.dicom.as_ref().map(DicomServer::address)
    }

    /// The journal of reports.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.shared.journal
    }

    /// What the service uses at most, part by part.
    pub fn memory_plan(&self) -> &MemoryPlan {
        &self.shared.plan
    }

    /// The service at a glance.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// The first thread that seems to hang; a supervisor must not feed its watchdog then.
    pub fn stalled(&self) -> Option<&'static str> {
        self.shared.hearts.stalled(Instant::now(), STALL_AFTER)
    }

    /// The first thread or door that has ended, which none does before the service stops, or the journal when it can write no
    /// more: only a new start helps.
    pub fn dead(&self) -> Option<&'static str> {
        let finished = self.threads.iter().find(|(_, thread)| thread.is_finished()).map(|(name, _)| *name);
        let doors = [
            ("dicom", self.dicom.as_ref().is_none_or(DicomServer::is_alive)),
            ("inbox", self.inbox.as_ref().is_none_or(InboxWatcher::is_alive)),
            ("socket", self.socket.as_ref().is_none_or(SocketServer::is_alive)),
        ];
        let door = || doors.into_iter().find(|(_, alive)| !alive).map(|(name, _)| name);
        finished.or_else(door).or_else(|| self.shared.journal.is_unsure().then_some("journal"))
    }

    /// Closes the doors, lets the exam in progress finish its report, and waits for the threads. What is not reported yet
    /// stays in the spool for the next start.
    pub fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(dicom) = self.dicom.take() {
            dicom.shutdown();
        }
        if let Some(inbox) = self.inbox.take() {
            inbox.shutdown();
        }
        self.socket = None;
        self.live.stop();
        self.spool = None;
        for (name, thread) in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("thread {name} ended in a panic");
            }
        }
    }

    fn spawn(&mut self, name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), ServiceError> {
        let builder = std::thread::Builder::new().name(format!("scanside-{name}"));
        let thread = builder.spawn(work).map_err(system(format!("start the thread {name}")))?;
        self.threads.push((name, thread));
        Ok(())
    }

    fn start_line(
        &mut self,
        spool: &Arc<Spool>,
        arrivals: Receiver<crate::ingest::spool::Arrival>,
        scratch: &Path,
    ) -> Result<(), ServiceError> {
        let settings = &self.shared.settings;
        let limits = Limits {
            slices_max: settings.series.slices_max,
            series_open_max: settings.series.growing_max,
            idle: Duration::from_secs(settings.series.quiet_s),
            ..Limits::default()
        };
        let patience = Duration::from_secs(settings.series.quiet_s);
        let (jobs_in, jobs) = bounded::<Job>(JOBS_MAX);
        let (early_in, early) = bounded::<EarlySlice>(EARLY_MAX);
        let (reading, looking) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        let studies = Studies {
            gathers: Box::new(move |modality| reading.analyst.reads_studies(modality)),
            whole: Box::new(move |series| looking.analyst.is_whole(series)),
            patience: Duration::from_secs(settings.series.study_quiet_s),
        };
        let underway = Arc::clone(&self.shared.underway);
        let closing = Arc::clone(spool);
        let finished = Box::new(move |series: &Uid| closing.close(series));
        let line = Line::new(Assembler::new(scratch, limits), jobs_in, early_in, studies, patience, underway, finished);
        let shared = Arc::clone(&self.shared);
        self.spawn("series", move || line.run(&arrivals, &shared.stop, &shared.hearts))?;
        // Without the exam nobody listens, and the line sends no slice.
        if self.shared.analyst.exams().chest_ct().is_some() {
            let shared = Arc::clone(&self.shared);
            self.spawn("slices", move || shared.segment_early(&early))?;
        }
        let (shared, spool) = (Arc::clone(&self.shared), Arc::clone(spool));
        self.spawn("exam", move || shared.examine(&jobs, &spool))
    }

    fn start_links(&mut self) -> Result<(), ServiceError> {
        let serial = self.shared.settings.serial.clone();
        if let Some(device) = serial.device {
            let port = SerialPort { path: device, baud: serial.baud };
            // A cable may come and go later; at the start somebody is there who can be told.
            drop(port.open().map_err(ServiceError::Serial)?);
            self.shared.journal.register(SERIAL_RECEIVER)?;
            let shared = Arc::clone(&self.shared);
            self.spawn("serial", move || {
                let (pace, open) = (Pace::of_baud(port.baud), || port.open());
                if let Err(error) = send_reports(&shared.journal, SERIAL_RECEIVER, pace, open, &shared.stop) {
                    log::error!("serial: {error}");
                }
            })?;
        }
        Ok(())
    }

    fn open_doors(&mut self, spool: &Arc<Spool>) -> Result<(), ServiceError> {
        let intake: Arc<dyn Intake> = Arc::new(Admission::new(Arc::clone(spool) as _, Arc::clone(&self.shared.journal)));
        let settings = self.shared.settings.dicom.clone();
        if let Some(listen) = settings.listen {
            let title = |text: &str| AeTitle::parse(text).map_err(|e| ServiceError::Setting(format!("dicom: {e}")));
            let config = DicomConfig {
                called: settings.strict_called_ae.then(|| title(&settings.ae_title)).transpose()?,
                callers: settings.callers.iter().map(|caller| title(caller)).collect::<Result<_, _>>()?,
                associations_max: settings.associations_max,
                pdu_bytes_max: settings.pdu_bytes_max,
                instance_bytes_max: (settings.instance_mib_max << 20) as usize,
                receiving_bytes_max: RECEIVING_BYTES_MAX.max(settings.instance_mib_max << 20),
                artim: Duration::from_secs(settings.artim_s),
                idle: Duration::from_secs(settings.idle_s),
                ..DicomConfig::new(listen)
            };
            self.dicom = Some(DicomServer::start(config, Arc::clone(&intake))?);
        }
        let inbox = &self.shared.settings.inbox;
        if let Some(folder) = &inbox.path {
            let config = InboxConfig {
                folder: folder.clone(),
                settle: Duration::from_secs(inbox.settle_s),
                instance_bytes_max: (settings.instance_mib_max << 20) as usize,
            };
            self.inbox = Some(InboxWatcher::start(config, Arc::clone(&intake))?);
        }
        if let Some(path) = &self.shared.settings.socket.path {
            let bytes_max = settings.instance_mib_max << 20;
            let config = SocketConfig {
                instance_bytes_max: bytes_max as usize,
                receiving_bytes_max: bytes_max,
                ..SocketConfig::new(path)
            };
            let shared = Arc::clone(&self.shared);
            let services = Services {
                intake,
                frames: self.shared.analyst.exams().ultrasound().map(|_| Arc::clone(&self.live) as _),
                journal: Arc::clone(&self.shared.journal),
                status: Arc::new(move || serde_json::json!(shared.status())),
                device_name: self.shared.settings.device.name.clone(),
            };
            self.socket = Some(SocketServer::start(config, services)?);
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl Shared {
    fn segment_early(&self, slices: &Receiver<EarlySlice>) {
        let mut segmenter = match self.analyst.early_segmenter() {
            Ok(Some(segmenter)) => segmenter,
            Ok(None) => return,
            Err(error) => return log::warn!("slices are not segmented as they arrive: {error}"),
        };
        for slice in slices {
            let series = slice.series.clone();
            let work = std::panic::AssertUnwindSafe(|| segmenter.segment(slice));
            if let Err(payload) = std::panic::catch_unwind(work) {
                log::error!("series {series}: {}", crate::pool::Fault::from_panic(payload));
            }
        }
    }

    fn examine(&self, jobs: &Receiver<Job>, spool: &Spool) {
        loop {
            self.hearts.rest("exam");
            let Ok(job) = jobs.recv() else { return };
            let Job(parts) = job;
            let Some(series) = parts.first().map(|part| part.series.series.clone()) else { continue };
            let progress = |progress: Progress| {
                self.hearts.beat("exam", Instant::now());
                *locked(&self.working_on) = Some((series.clone(), progress));
            };
            if self.were_reported(&parts) {
                self.clear_up(&parts, spool);
                continue;
            }
            progress(Progress { stage: "segment", done: 0, total: 1 });
            for part in &parts {
                log::info!("series {}: {} instances are complete", part.series.series, part.series.instances);
            }
            let given: Vec<_> = parts.iter().map(|part| (&part.series, part.unread.as_slice())).collect();
            let analysed = self.analyst.analyse_study(&given, Timestamp::now(), &progress);
            // Before the report is out: nobody may read in the status that a series is worked on whose report he has.
            *locked(&self.working_on) = None;
            self.deliver(analysed.into_iter().map(|analysed| analysed.report), &parts, spool);
        }
    }

    /// First the journal, then the spool: a cut between the two finds the reports there and only has to clear up. The series of a
    /// study leave the spool together, so that after a cut they are gathered again as they were.
    fn deliver(&self, reports: impl Iterator<Item = Report>, parts: &[Part], spool: &Spool) {
        for (report, part) in reports.zip(parts) {
            let series = &part.series.series;
            let beat = || self.hearts.beat("exam", Instant::now());
            if !self.keep(series, report, beat) {
                return;
            }
        }
        self.clear_up(parts, spool);
    }

    /// Whether a cut came between the journal and the spool: the reports are there, and nothing is to be analysed again.
    fn were_reported(&self, parts: &[Part]) -> bool {
        parts.iter().all(|Part { series, .. }| {
            let uid = self.analyst.subject(&series.series, &series.study, series.modality).report_uid();
            self.journal.sequence_of(&uid).is_some()
        })
    }

    fn clear_up(&self, parts: &[Part], spool: &Spool) {
        for part in parts {
            if let Err(error) = spool.forget(&part.series.series, &part.instances) {
                log::error!("series {}: {error}", part.series.series);
            }
            self.analyst.forget_early(&part.series.series);
        }
    }

    /// Puts a report into the journal; false when the service stops before that is possible. A report is the one thing that must
    /// not be dropped: nothing else is begun before it is kept. `trying` is called at each attempt.
    fn keep(&self, series: &Uid, mut report: Report, trying: impl Fn()) -> bool {
        loop {
            trying();
            match append(&self.journal, &mut report) {
                Ok(appended) => {
                    self.reported.fetch_add(1, Ordering::Relaxed);
                    log::info!("series {series}: {}, report {}", report.status.word(), appended.sequence());
                    return true;
                }
                Err(error) => {
                    log::error!("series {series}: {error}");
                    if self.stop.load(Ordering::Relaxed) {
                        return false;
                    }
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }

    fn status(&self) -> Status {
        // The journal is read first: a report that comes in between is of a series that is no longer worked on.
        let (reported, journal) = (self.reported.load(Ordering::Relaxed), self.journal.status());
        let working_on = locked(&self.working_on).clone();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            uptime_s: self.started.elapsed().as_secs(),
            reported,
            working_on: working_on.map(|(series, p)| (series, p.stage, p.done, p.total)),
            underway: locked(&self.underway).clone(),
            live: self.live.status(),
            journal,
            memory_peak_mib: memory_kib().0 / 1024,
            memory_budget_mib: self.settings.memory.budget_mib,
            stalled: self.hearts.stalled(Instant::now(), STALL_AFTER),
        }
    }
}

/// A report that contradicts itself would do so at every attempt, and all others would wait behind it: its series has failed.
fn append(journal: &Journal, report: &mut Report) -> Result<Appended, JournalError> {
    match journal.append_once(report.clone()) {
        Err(JournalError::BadReport(bad)) => {
            log::error!("series {}: {bad}", report.series_uid);
            *report = report.unfit(&bad);
            journal.append_once(report.clone())
        }
        other => other,
    }
}

/// Bytes of instances coming in at one moment, over all associations.
const RECEIVING_BYTES_MAX: u64 = 64 << 20;

/// The process itself: code, stacks, allocator, parsed headers.
const PROCESS_BYTES: u64 = 48 << 20;

/// What the chest exam holds beside its networks, at most: working slabs, packed lung masks of 2,000 slices, candidates.
const EXAM_BYTES: u64 = 192 << 20;

/// What the service needs at its peak, part by part: a plan, made before anything is accepted.
fn memory_plan(settings: &Settings, analyst: &Analyst) -> MemoryPlan {
    let mut plan = MemoryPlan::default();
    plan.add("process", PROCESS_BYTES);
    let instance_bytes = settings.dicom.instance_mib_max << 20;
    if settings.dicom.listen.is_some() {
        plan.add("receiving DICOM", RECEIVING_BYTES_MAX.max(instance_bytes));
    }
    if settings.socket.path.is_some() {
        plan.add("receiving on the socket", instance_bytes);
    }
    if settings.inbox.path.is_some() {
        plan.add("reading the inbox", instance_bytes);
    }
    // The line reads one instance and decodes one frame of it at a time.
    plan.add("assembling", 2 * instance_bytes);
    plan.add("networks", analyst.exams().network_bytes() as u64);
    plan.add("exam", EXAM_BYTES);
    if let Some(exam) = analyst.exams().ultrasound().filter(|_| settings.socket.path.is_some()) {
        plan.add("live streams", LIVE_BYTES + LIVE_RECEIVING_BYTES + 2 * exam.network_bytes() as u64);
    }
    plan
}

/// Volumes lie here while they are worked on. Their files have no name, so a crash leaves nothing; the folder is ours.
fn scratch_folder(spool: &Path) -> Result<PathBuf, ServiceError> {
    let scratch = spool.join("volumes");
    std::fs::create_dir_all(&scratch).map_err(system(format!("make the folder {}", scratch.display())))?;
    Ok(scratch)
}

/// The packages of the settings.
///
/// # Errors
/// [`ServiceError::Setting`] when the key is no ed25519 key.
pub fn models(settings: &Settings) -> Result<Models, ServiceError> {
    let trust = match &settings.models.signed_by {
        None => Trust::default(),
        Some(key) => Trust::demanding(key).map_err(|e| ServiceError::Setting(format!("models.signed_by: {e}")))?,
    };
    Ok(Models::new(settings.models.path.clone(), trust))
}

/// The box's own UID is drawn once and kept beside the spool. The UIDs of its reports come from it: with another one, a series
/// whose report is in the journal would be reported again.
fn device(folder: &Path, name: &str, journal: &Journal) -> Result<Device, ServiceError> {
    let path = folder.join("device-uid");
    let kept = match std::fs::read(&path) {
        Ok(bytes) => Some(std::str::from_utf8(&bytes).ok().and_then(|text| Uid::parse(text.trim()).ok())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(system(format!("read {}", path.display()))(error)),
    };
    let uid = match kept {
        Some(Some(uid)) => uid,
        Some(None) if journal.newest() > 0 => return Err(ServiceError::DeviceUid(path)),
        _ => {
            let mut seed = [0u8; 32];
            std::fs::File::open("/dev/urandom")
                .and_then(|mut random| std::io::Read::read_exact(&mut random, &mut seed))
                .map_err(system("draw a UID for this box"))?;
            let uid = Uid::derived(&seed);
            write_durably(&path, format!("{uid}\n").as_bytes()).map_err(system(format!("write {}", path.display())))?;
            uid
        }
    };
    Ok(Device { name: name.to_owned(), version: env!("CARGO_PKG_VERSION").into(), uid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Status as Outcome;
    use crate::report::tests::complete;

    fn journal(folder: &Path) -> Journal {
        Journal::open(&folder.join("reports"), Default::default()).unwrap().0
    }

    #[test]
    fn a_report_that_contradicts_itself_is_replaced_by_a_failed_one_and_the_next_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let journal = journal(folder.path());
        let mut bad = complete(1);
        bad.measurements.get_mut("lung_volume_ml").unwrap().value = f64::NEG_INFINITY;
        let key = bad.report_uid.clone();
        assert_eq!(append(&journal, &mut bad).unwrap(), Appended::New(1));
        assert_eq!(append(&journal, &mut complete(2)).unwrap(), Appended::New(2));
        let written = Report::from_json(&journal.next_after(0).unwrap().unwrap().json).unwrap();
        assert_eq!((written.status, written.report_uid), (Outcome::Failed, key));
        assert!(written.findings.is_empty() && written.measurements.is_empty() && written.volume.is_none());
        let reason = written.reason.unwrap();
        assert_eq!(reason.code, "fault");
        assert!(reason.text.contains("lung_volume_ml"), "{}", reason.text);
    }

    #[test]
    fn a_box_that_has_reported_draws_no_second_uid() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, path) = (journal(folder.path()), folder.path().join("device-uid"));
        std::fs::write(&path, "").unwrap();
        let first = device(folder.path(), "box", &journal).expect("nothing bears a UID yet").uid;
        journal.append_once(complete(1)).unwrap();
        assert_eq!(device(folder.path(), "box", &journal).unwrap().uid, first);
        std::fs::write(&path, "").unwrap();
        let error = device(folder.path(), "box", &journal).unwrap_err();
        assert!(matches!(error, ServiceError::DeviceUid(_)), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"", "what is there is left for a person to look at");
    }

    #[test]
    fn a_journal_that_can_write_no_more_ends_the_service() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = Settings::default();
        settings.spool.path = folder.path().join("spool");
        settings.exams.run = Vec::new();
        settings.dicom.listen = None;
        settings.socket.path = None;
        settings.inbox.path = None;
        let service = Service::start(settings).unwrap();
        service.journal().append_once(complete(1)).unwrap();
        assert_eq!(service.dead(), None);
        service.journal().lose_the_disk();
        service.journal().append_once(complete(2)).unwrap_err();
        assert_eq!(service.dead(), Some("journal"));
        drop(service);
        let (again, _) = Journal::open(&folder.path().join("spool/reports"), Default::default()).unwrap();
        assert_eq!(again.append_once(complete(2)).unwrap(), Appended::New(2));
    }
}
