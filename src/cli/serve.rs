//! `scanside serve`: the service, in the foreground, until it is told to stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use scanside::config::Settings;
use scanside::service::Service;
use scanside::service::supervisor::Systemd;

use super::Failure;

/// Runs the box: takes studies in through its doors and reports what it finds. Flags win over the configuration file.
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
            Some(file) => Settings::load(file).map_err(Failure::usage)?,
            None => Settings::default(),
        };
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
            return Err(Failure::usage("no door is open: give --dicom, --socket or --inbox"));
        }
        Ok(settings)
    }
}

/// How often the supervisor looks, where systemd asks for no other rhythm.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let settings = arguments.settings()?;
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT])
        .map_err(|e| Failure::impossible(format!("cannot listen for signals: {e}")))?;
    let service = Service::start(settings).map_err(Failure::impossible)?;
    let systemd = Systemd::from_environment();
    systemd.say("READY=1");
    match service.dicom_address() {
        Some(address) => eprintln!("scanside: ready, DICOM on {address}"),
        None => eprintln!("scanside: ready"),
    }
    let every = systemd.watchdog_every.unwrap_or(LOOK_EVERY);
    let (stop_in, stop) = crossbeam_channel::bounded(1);
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            let _ = stop_in.send(());
        }
    });
    while stop.recv_timeout(every).is_err() {
        match service.stalled() {
            None => systemd.say("WATCHDOG=1"),
            Some(thread) => log::error!("thread {thread} gives no sign of life"),
        }
    }
    systemd.say("STOPPING=1");
    service.stop();
    Ok(())
}
