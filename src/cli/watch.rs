//! `scanside watch`: reports as they come, from the serial line or the local socket.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use scanside::finding::Laterality;
use scanside::ingest::socket::{Client, ClientError};
use scanside::link::{BAUD_DEFAULT, SerialPort};
use scanside::report::line::LineReceiver;
use scanside::report::wire::Memory;
use scanside::report::{Report, Status};

use super::Failure;

/// How often a service that is not there is tried again.
const RECONNECT: Duration = Duration::from_millis(300);

/// How long to wait at the end for the box to confirm the last acknowledgement on a serial line.
const SETTLE: Duration = Duration::from_secs(3);

/// Prints reports as they come, and acknowledges each one after it was printed.
///
/// The box keeps every report until it is acknowledged, so a watcher that is stopped and started again goes on where it
/// was: nothing is lost, nothing comes twice. A service or a cable that goes away is waited for.
///
///   scanside watch --socket /run/scanside.sock
///   scanside watch --serial /dev/ttyUSB0 --json --count 1     # one report, one line of JSON
///   scanside watch --socket /run/scanside.sock --from 1       # all that the box still has
///   scanside watch --socket /run/scanside.sock --live         # the lesions of a live stream, frame by frame
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// The local socket of a scanside service on this machine.
    #[arg(long, value_name = "PATH", conflicts_with = "serial", required_unless_present = "serial")]
    socket: Option<PathBuf>,
    /// The serial line to the box.
    #[arg(long, value_name = "DEV")]
    serial: Option<PathBuf>,
    /// Bits per second of the serial line.
    #[arg(long, value_name = "BAUD", default_value_t = BAUD_DEFAULT, value_parser = clap::value_parser!(u32).range(300..))]
    baud: u32,
    /// Stop after so many reports; without it, never.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Begin with this report, even if it was acknowledged before; those before it count as acknowledged.
    #[arg(long, value_name = "SEQ", value_parser = clap::value_parser!(u64).range(1..))]
    from: Option<u64>,
    /// Give up after so many seconds without a report; exit code 1 when fewer than --count came.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    /// The name under which the box keeps what was acknowledged over the socket. Watchers with different names each get
    /// every report.
    #[arg(long, value_name = "NAME", default_value = "watch")]
    name: String,
    /// Where to remember the last report taken from the serial line, so that a restart between taking a report and
    /// acknowledging it prints nothing twice. Only what is cut off between the two writes, of the report and of this
    /// file, prints that one report again.
    #[arg(long, value_name = "FILE", requires = "serial")]
    state: Option<PathBuf>,
    /// Shows what live ultrasound streams show, frame by frame and without acknowledging anything; --count counts frames.
    #[arg(long, requires = "socket")]
    live: bool,
    /// One report per line, as JSON (schema scanside.report/1).
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let mut printer = Printer { json: arguments.json, left: arguments.count.unwrap_or(u64::MAX), table: false };
    if let (Some(path), true) = (&arguments.socket, arguments.live) {
        return watch_live(&arguments, path);
    }
    match (&arguments.socket, &arguments.serial) {
        (Some(path), _) => watch_socket(&arguments, path, &mut printer),
        (None, Some(device)) => watch_serial(&arguments, device, &mut printer),
        (None, None) => Err(Failure::usage("one of --socket and --serial is needed")),
    }
}

impl Arguments {
    fn deadline(&self) -> Option<Instant> {
        self.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds))
    }

    /// The time is over.
    fn gave_up(&self, printer: &Printer) -> Result<(), Failure> {
        match self.count {
            None => Ok(()),
            Some(count) => {
                let seconds = self.timeout.unwrap_or(0);
                let came = count - printer.left;
                Err(Failure::Impossible(format!("{came} of {count} reports came, and none for {seconds} seconds")))
            }
        }
    }
}

fn watch_serial(arguments: &Arguments, device: &Path, printer: &mut Printer) -> Result<(), Failure> {
    let memory = match &arguments.state {
        Some(file) => read_memory(file)?,
        None => Memory::default(),
    };
    let port = SerialPort { path: device.into(), baud: arguments.baud };
    if let Err(error) = port.open() {
        match error.kind() {
            std::io::ErrorKind::NotFound => eprintln!("scanside: {error}; waiting for it"),
            std::io::ErrorKind::InvalidInput => return Err(Failure::usage(error)),
            _ => return Err(Failure::impossible(error)),
        }
    }
    let stop = AtomicBool::new(false);
    let mut receiver = LineReceiver::new(memory, arguments.from, || port.open());
    while printer.left > 0 {
        let Some(incoming) = receiver.next(arguments.deadline(), &stop) else { return arguments.gave_up(printer) };
        if let Some(skipped) = incoming.skipped {
            let (first, last) = skipped.into_inner();
            eprintln!("scanside: reports {first} to {last} were acknowledged elsewhere before; --from {first} shows them");
        }
        printer.print(incoming.sequence, &incoming.json)?;
        if let Some(file) = &arguments.state {
            let mut memory = receiver.memory().clone();
            memory.take(incoming.journal, incoming.sequence);
            write_memory(file, &memory)?;
        }
        receiver.accept(incoming.sequence);
    }
    if !receiver.settle(SETTLE) {
        eprintln!("scanside: the box has not confirmed the last acknowledgement; it may send that report again");
    }
    Ok(())
}

/// Looks at live streams, the newest first; those in between are passed over when this is slower than they come.
fn watch_live(arguments: &Arguments, path: &Path) -> Result<(), Failure> {
    let mut client = Client::connect(path, "scanside watch --live").map_err(Failure::impossible)?;
    client.look().map_err(Failure::impossible)?;
    let mut left = arguments.count.unwrap_or(u64::MAX);
    while left > 0 {
        let deadline = arguments.deadline().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
        let Some((_, look)) = client.next_look(deadline).map_err(Failure::impossible)? else {
            if arguments.timeout.is_none() {
                continue;
            }
            return match arguments.count {
                None => Ok(()),
                Some(count) => Err(Failure::Impossible(format!("{} of {count} frames came", count - left))),
            };
        };
        left -= 1;
        let text = String::from_utf8_lossy(&look).replace(['\n', '\r'], " ");
        if arguments.json {
            super::print(&format!("{text}\n"))?;
            continue;
        }
        let look: serde_json::Value = serde_json::from_str(&text).map_err(|e| Failure::Impossible(format!("a look cannot be understood: {e}")))?;
        let mut line = format!("frame {:>6}  {:>5.1} ms", look["frame"], look["latency_ms"].as_f64().unwrap_or(0.0));
        for lesion in look["lesions"].as_array().into_iter().flatten() {
            let number = |key: &str| lesion[key].as_f64().unwrap_or(0.0);
            let unit = lesion["unit"].as_str().unwrap_or_default();
            line += &format!("   lesion {}: {:.1} x {:.1} {unit}, {:.2}", lesion["track"], number("long_axis"), number("short_axis"), number("confidence"));
        }
        super::print(&(line + "\n"))?;
    }
    Ok(())
}

fn watch_socket(arguments: &Arguments, path: &Path, printer: &mut Printer) -> Result<(), Failure> {
    let mut watch = SocketWatch { arguments, path, memory: Memory::default(), from: arguments.from, deadline: arguments.deadline() };
    let mut waiting = false;
    while printer.left > 0 {
        match watch.session(printer, &mut waiting) {
            Ok(()) if printer.left == 0 => {}
            Ok(()) => return arguments.gave_up(printer),
            Err(Trouble::Service(ClientError::Lost { path, source })) => {
                if !std::mem::replace(&mut waiting, true) {
                    eprintln!("scanside: {}: {source}; waiting for the service", path.display());
                }
                if watch.is_over() {
                    return arguments.gave_up(printer);
                }
                std::thread::sleep(RECONNECT);
            }
            Err(Trouble::Service(error)) => return Err(Failure::impossible(error)),
            Err(Trouble::Output(failure)) => return Err(failure),
        }
    }
    Ok(())
}

/// What outlives one connection.
struct SocketWatch<'a> {
    arguments: &'a Arguments,
    path: &'a Path,
    memory: Memory,
    from: Option<u64>,
    deadline: Option<Instant>,
}

enum Trouble {
    Service(ClientError),
    Output(Failure),
}

impl From<ClientError> for Trouble {
    fn from(error: ClientError) -> Self {
        Self::Service(error)
    }
}

impl SocketWatch<'_> {
    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// One connection, until enough reports came or the time is over.
    fn session(&mut self, printer: &mut Printer, waiting: &mut bool) -> Result<(), Trouble> {
        let mut client = Client::connect(self.path, "scanside watch")?;
        client.subscribe(Some(&self.arguments.name), self.from)?;
        *waiting = false;
        let journal = client.hello().journal;
        while printer.left > 0 && !self.is_over() {
            // Without a deadline the wait is only cut into pieces.
            let until = self.deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            let Some(entry) = client.next_report(until)? else { continue };
            // It may have been printed before the last connection broke, and only its acknowledgement was lost.
            if entry.sequence > self.memory.last(journal) {
                printer.print(entry.sequence, &entry.json).map_err(Trouble::Output)?;
                self.memory.take(journal, entry.sequence);
                self.from = None;
                self.deadline = self.arguments.deadline();
            }
            client.acknowledge(entry.sequence)?;
        }
        Ok(())
    }
}

/// Prints reports, as JSON Lines or as a table.
struct Printer {
    json: bool,
    left: u64,
    /// The head of the table has been printed.
    table: bool,
}

impl Printer {
    /// Returns only when the report has left this process: it is acknowledged next.
    fn print(&mut self, sequence: u64, json: &[u8]) -> Result<(), Failure> {
        let bad = |error| Failure::Impossible(format!("report {sequence} cannot be understood: {error}"));
        let report = Report::from_json(json).map_err(bad)?;
        let text = if self.json {
            // As it came: fields that this version does not know stay in it.
            let line = String::from_utf8_lossy(json).replace(['\n', '\r'], " ");
            line + "\n"
        } else {
            let head = if std::mem::replace(&mut self.table, true) { "" } else { HEAD };
            format!("{head}{}", table(&report))
        };
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Failure::Impossible(format!("stdout: {e}")))?;
        self.left -= 1;
        Ok(())
    }
}

const HEAD: &str = "  report  status         exam        findings  series\n";

fn table(report: &Report) -> String {
    let (status, findings) = (report.status.word(), report.findings.len());
    let mut out = format!(
        "{:>8}  {status:<13}  {:<10}  {findings:>8}  {}\n",
        report.sequence, report.exam, report.series_uid
    );
    if let Some(reason) = &report.reason {
        out += &format!("          {}: {}\n", reason.code, reason.text);
    }
    if report.status == Status::Complete && report.findings.is_empty() {
        out += "          analysed; nothing was found\n";
    }
    for finding in &report.findings {
        let side = match finding.site.laterality {
            Some(Laterality::Left) => "left ",
            Some(Laterality::Right) => "right ",
            None => "",
        };
        let (kind, organ) = (&finding.kind, &finding.site.organ);
        out += &format!(
            "          {:>3}  {kind} {}, {side}{organ}, at {}, confidence {:.2}\n",
            finding.id, finding.size_text(), finding.place_text(), finding.confidence
        );
    }
    for (name, measurement) in &report.measurements {
        out += &format!("               {name}: {}\n", measurement.text());
    }
    out
}

fn read_memory(file: &Path) -> Result<Memory, Failure> {
    match fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).map_err(|e| Failure::usage(format!("--state {}: {e}", file.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Memory::default()),
        Err(error) => Err(Failure::usage(format!("--state {}: {error}", file.display()))),
    }
}

/// Beside it, synced, and renamed over it: a cut leaves the old one or the new one.
fn write_memory(file: &Path, memory: &Memory) -> Result<(), Failure> {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let fresh = file.with_file_name(name);
    let write = || {
        let mut out = fs::File::create(&fresh)?;
        out.write_all(&serde_json::to_vec(memory)?)?;
        out.sync_all()?;
        fs::rename(&fresh, file)
    };
    write().map_err(|e: std::io::Error| Failure::Impossible(format!("--state {}: {e}", file.display())))
}
