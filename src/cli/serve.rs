//! `scanside serve`: the service, in the foreground, until it is told to stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use scanside::config::Settings;
use scanside::ingest::spool::SpoolError;
use scanside::service::supervisor::{Systemd, Watchdog};
use scanside::service::{Service, ServiceError};

use super::{Failure, exit};

/// Runs the box: takes studies in through its doors and reports what it finds. Flags win over the configuration file.
///
/// Exit codes: 0 stopped by SIGTERM or SIGINT, 2 wrong arguments, 65 a model package is refused or the box has lost its UID, 69 a serial port, an
/// address or the spool is not to be had, 70 a thread has died or the journal cannot be synced, 74 the disk or the watchdog cannot be used, 78 the
/// configuration is wrong (its sentence names file, key or budget). With 65 and 78 starting again does not help.
/// A spool that is full at the start is no failure: new images are refused (DICOM 0xA700), what is held is analysed and
/// delivered. Under systemd it says READY=1 and, while every thread lives, WATCHDOG=1.
#[derive(clap::Args)]
pub struct Arguments {
    /// Address and port of the DICOM door (C-ECHO, C-STORE), such as 0.0.0.0:11112
    #[arg(long, value_name = "ADDR:PORT")]
    dicom: Option<SocketAddr>,
    /// Path of the local socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Serial device the reports leave by
    #[arg(long, value_name = "DEV")]
    serial: Option<PathBuf>,
    /// Speed of the serial line, bits a second
    #[arg(long, value_name = "BAUD")]
    baud: Option<u32>,
    /// Folder to watch for studies
    #[arg(long, value_name = "DIR")]
    inbox: Option<PathBuf>,
    /// Folder for what is being worked on and the journal of reports
    #[arg(long, value_name = "DIR")]
    spool: Option<PathBuf>,
    /// Folder of model packages that replace the built-in ones
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Threads that compute; without it, one per core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Configuration file; `scanside config print` shows all settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Arguments {
    fn settings(self) -> Result<Settings, Failure> {
        let mut settings = match &self.config {
            Some(file) => Settings::load(file).map_err(|e| Failure::because(exit::CONFIG, e))?,
            None => Settings::default(),
        };
        let configured = self.config.is_some();
        settings.dicom.listen = self.dicom.or(settings.dicom.listen);
        settings.socket.path = self.socket.or(settings.socket.path);
        settings.serial.device = self.serial.or(settings.serial.device);
        settings.serial.baud = self.baud.unwrap_or(settings.serial.baud);
        settings.inbox.path = self.inbox.or(settings.inbox.path);
        settings.spool.path = self.spool.unwrap_or(settings.spool.path);
        settings.models.path = self.models.or(settings.models.path);
        settings.work.threads = self.threads.unwrap_or(settings.work.threads);
        let settings = settings.check().map_err(Failure::usage)?;
        if settings.dicom.listen.is_none() && settings.socket.path.is_none() && settings.inbox.path.is_none() {
            let code = if configured { exit::CONFIG } else { 2 };
            return Err(Failure::because(code, "no door is open: give --dicom, --socket or --inbox"));
        }
        Ok(settings)
    }
}

/// How often the supervisor looks, where nobody asks for a faster rhythm.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What systemd and the person in front of the box are told when the service does not start. With 65 and 78 starting
/// again does not help, and `RestartPreventExitStatus=` says so in the unit.
fn not_started(error: ServiceError) -> Failure {
    let code = match &error {
        ServiceError::Budget(_) | ServiceError::Setting(_) => exit::CONFIG,
        ServiceError::Package(_) | ServiceError::DeviceUid(_) => exit::DATAERR,
        ServiceError::Serial(_) | ServiceError::Dicom(_) | ServiceError::Socket(_) => exit::UNAVAILABLE,
        ServiceError::Spool(SpoolError::InUse(_)) => exit::UNAVAILABLE,
        ServiceError::Spool(_) | ServiceError::Journal(_) | ServiceError::Inbox(_) | ServiceError::System { .. } => exit::IOERR,
    };
    Failure::because(code, error)
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let settings = arguments.settings()?;
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT])
        .map_err(|e| Failure::impossible(format!("cannot listen for signals: {e}")))?;
    let wanted = settings.watchdog.clone();
    let service = Service::start(settings).map_err(not_started)?;
    let mut watchdog = match &wanted.device {
        None => None,
        Some(device) => {
            let cannot = |e| Failure::because(exit::IOERR, format!("watchdog.device: cannot open {}: {e}", device.display()));
            Some(Watchdog::open(device, wanted.timeout_s).map_err(cannot)?)
        }
    };
    let systemd = Systemd::from_environment();
    systemd.say("READY=1");
    match service.dicom_address() {
        Some(address) => eprintln!("scanside: ready, DICOM on {address}"),
        None => eprintln!("scanside: ready"),
    }
    let rhythms = [systemd.watchdog_every, watchdog.as_ref().map(|watchdog| watchdog.every), Some(LOOK_EVERY)];
    let every = rhythms.into_iter().flatten().min().unwrap_or(LOOK_EVERY);
    let (stop_in, stop) = crossbeam_channel::bounded(1);
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            let _ = stop_in.send(());
        }
    });
    while stop.recv_timeout(every).is_err() {
        if let Some(name) = service.dead() {
            // Not stopped in order: what is acknowledged is on disk, and the next start takes it up.
            let text = match name {
                "journal" => "a sync of the journal failed, and only a new start tells what the disk has".to_owned(),
                _ => format!("thread {name} has ended, and only a new start brings it back"),
            };
            systemd.say("STOPPING=1");
            Failure::because(exit::SOFTWARE, text).report();
            std::process::exit(exit::SOFTWARE.into());
        }
        match service.stalled() {
            None => {
                systemd.say("WATCHDOG=1");
                if let Some(Err(error)) = watchdog.as_mut().map(Watchdog::feed) {
                    log::error!("the watchdog cannot be fed: {error}");
                }
            }
            Some(thread) => log::error!("thread {thread} gives no sign of life"),
        }
    }
    systemd.say("STOPPING=1");
    service.stop();
    if let Some(Err(error)) = watchdog.map(Watchdog::disarm) {
        log::error!("the watchdog cannot be told that we stop, and will reset the board: {error}");
    }
    Ok(())
}
