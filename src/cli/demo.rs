//! `scanside demo` and `scanside selftest`: the whole way of a study, from pixels to serial bytes, against the truth.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use scanside::config::Settings;
use scanside::dicom::client::{Peer, StoreAssociation};
use scanside::dicom::file::FileMeta;
use scanside::dicom::negotiation::AeTitle;
use scanside::finding::Finding;
use scanside::geometry::{Spacing, norm, sub};
use scanside::ingest::socket::Client;
use scanside::link::{Link, Pty};
use scanside::phantom::{NoduleTruth, Phantom, PhantomOptions};
use scanside::report::line::LineReceiver;
use scanside::report::wire::Memory;
use scanside::report::{Report, Status};
use scanside::service::Service;

use super::{Failure, Scratch, Steps};

/// Nodules of this diameter and more have to come out of both links.
const MUST_BE_FOUND_MM: f64 = 6.0;

/// The service runs for this long at most before the demo gives up.
const PATIENCE: Duration = Duration::from_secs(600);

/// Shows the appliance at work: makes a phantom chest CT with known nodules, starts the service on loopback, a
/// pseudo-terminal and a socket, sends the phantom slice by slice through a DICOM association, and prints the findings as
/// they arrive on the serial line and on the socket, next to the truth.
///
/// Exit code 0 only when every nodule of 6 mm and more came out of both links.
#[derive(clap::Args)]
pub struct Arguments {
    /// Another number is another phantom
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Slices of the phantom, 2.5 mm apart
    #[arg(long, default_value_t = 120)]
    slices: usize,
    /// Slices sent a second; without it, as fast as they are taken
    #[arg(long, value_name = "N")]
    pace: Option<f64>,
    /// Threads that compute; without it, one per core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Folder of model packages that replace the built-in ones
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
}

/// Checks the box with the built-in phantom through the whole path, pixels to serial bytes; exit code 0 when all is well.
#[derive(clap::Args)]
pub struct SelftestArguments {
    /// Threads that compute; without it, one per core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Folder of model packages that replace the built-in ones
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let options = PhantomOptions {
        shape: [arguments.slices, 512, 512],
        spacing: Spacing::new([2.5, 0.7, 0.7]).map_err(Failure::impossible)?,
        seed: arguments.seed,
        ..PhantomOptions::default()
    };
    whole_way(&options, arguments.pace, arguments.threads, arguments.models)
}

/// Runs the self-test: the demo's way on a smaller phantom.
pub fn selftest(arguments: SelftestArguments) -> Result<(), Failure> {
    let options = PhantomOptions {
        shape: [120, 256, 256],
        spacing: Spacing::new([2.5, 1.4, 1.4]).map_err(Failure::impossible)?,
        ..PhantomOptions::default()
    };
    whole_way(&options, None, arguments.threads, arguments.models)
}

/// What came out of one link.
struct Arrived {
    link: &'static str,
    after: Duration,
    report: Report,
}

fn whole_way(
    options: &PhantomOptions,
    pace: Option<f64>,
    threads: Option<usize>,
    models: Option<PathBuf>,
) -> Result<(), Failure> {
    let scratch = Scratch::new()?;
    let phantom = Phantom::new(options).map_err(Failure::usage)?;
    let [slices, rows, columns] = phantom.grid().shape;
    eprintln!("a phantom of {slices} slices of {rows} x {columns} with {} nodules", phantom.truth().len());

    let pty = Pty::open().map_err(|e| Failure::impossible(format!("no pseudo-terminal: {e}")))?;
    let socket = scratch.0.join("scanside.sock");
    let mut settings = Settings::default();
    settings.device.name = "scanside demo".into();
    settings.dicom.listen = Some(([127, 0, 0, 1], 0).into());
    settings.socket.path = Some(socket.clone());
    settings.serial.device = Some(pty.path().to_owned());
    settings.spool.path = scratch.0.join("spool");
    settings.work.threads = threads.unwrap_or(0);
    settings.models.path = models;
    let service = Service::start(settings).map_err(Failure::impossible)?;
    let address = service.dicom_address().ok_or_else(|| Failure::impossible("the DICOM door is shut"))?;
    eprintln!("the service listens on {address}, {} and {}", pty.path().display(), socket.display());

    let begun = Instant::now();
    let stop = AtomicBool::new(false);
    let arrived = Mutex::new(Vec::new());
    let came = |link, report: Report| {
        let after = begun.elapsed();
        show(link, after, &report, phantom.truth());
        let mut arrived = arrived.lock().unwrap_or_else(|e| e.into_inner());
        arrived.push(Arrived { link, after, report });
        if arrived.len() == 2 {
            stop.store(true, Ordering::SeqCst);
        }
    };
    let (sent, line) = std::thread::scope(|scope| {
        let (stop, serial_came, socket_came) = (&stop, &came, &came);
        let mut near = Some(pty);
        let serial = scope.spawn(move || {
            let gone = || std::io::Error::from(std::io::ErrorKind::NotConnected);
            let open = move || near.take().map(|link| Box::new(link) as Box<dyn Link>).ok_or_else(gone);
            let mut receiver = LineReceiver::new(Memory::default(), None, open);
            if let Some(incoming) = receiver.next(Some(begun + PATIENCE), stop) {
                receiver.accept(incoming.sequence);
                receiver.settle(Duration::from_secs(2));
                if let Ok(report) = Report::from_json(&incoming.json) {
                    serial_came("serial", report);
                }
            }
            receiver
        });
        let listener = scope.spawn(move || -> Result<(), String> {
            let mut client = Client::connect(&socket, "demo").map_err(|e| e.to_string())?;
            client.subscribe(Some("demo"), None).map_err(|e| e.to_string())?;
            while !stop.load(Ordering::SeqCst) && begun.elapsed() < PATIENCE {
                let deadline = Instant::now() + Duration::from_millis(200);
                if let Some(entry) = client.next_report(deadline).map_err(|e| e.to_string())? {
                    client.acknowledge(entry.sequence).map_err(|e| e.to_string())?;
                    socket_came("socket", Report::from_json(&entry.json).map_err(|e| e.to_string())?);
                    break;
                }
            }
            Ok(())
        });
        let sent = send(&phantom, address, pace);
        if sent.is_err() {
            stop.store(true, Ordering::SeqCst);
        }
        let line = serial.join();
        let heard = listener.join().unwrap_or_else(|_| Err("its reader failed".into()));
        (sent.and_then(|()| heard.map_err(|e| Failure::impossible(format!("the socket: {e}")))), line)
    });
    sent?;
    let arrived = arrived.into_inner().unwrap_or_else(|e| e.into_inner());
    service.stop();
    // Not before: the service would call it a cable that was pulled.
    drop(line);
    verdict(phantom.truth(), &arrived)
}

/// Sends the phantom slice by slice over one association.
fn send(phantom: &Phantom, address: std::net::SocketAddr, pace: Option<f64>) -> Result<(), Failure> {
    let title = |text: &str| AeTitle::parse(text).map_err(Failure::impossible);
    let peer = Peer::new(address, title("PHANTOM")?, title("SCANSIDE")?);
    let series = phantom.series(&std::process::id().to_string());
    let slices = phantom.grid().shape[0];
    let mut association = None;
    let (steps, begun) = (Steps::new(), Instant::now());
    for k in 0..slices {
        steps.show("send", k, slices);
        let file = phantom.image(&series, k).map_err(Failure::impossible)?;
        let association = match &mut association {
            Some(association) => association,
            none => {
                let meta = FileMeta::parse(&file).map_err(Failure::impossible)?;
                let pairs = [(meta.sop_class, meta.transfer_syntax)];
                none.insert(StoreAssociation::open(&peer, &pairs).map_err(Failure::impossible)?)
            }
        };
        if let Some(pace) = pace.filter(|pace| *pace > 0.0) {
            std::thread::sleep((begun + Duration::from_secs_f64(k as f64 / pace)).saturating_duration_since(Instant::now()));
        }
        association.store(&file).map_err(Failure::impossible)?;
    }
    steps.clear();
    if let Some(association) = association {
        association.release().map_err(Failure::impossible)?;
    }
    eprintln!("{slices} slices sent and acknowledged in {:.2} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// The finding nearest to a nodule: one whose centre lies inside it.
fn hit<'r>(nodule: &NoduleTruth, report: &'r Report) -> Option<&'r Finding> {
    let distance = |f: &Finding| f.centroid_lps_mm.map_or(f64::INFINITY, |centre| norm(sub(centre, nodule.centre_lps_mm)));
    let near = report.findings.iter().filter(|f| distance(f) <= (nodule.diameter_mm / 2.0).max(3.0));
    near.min_by(|a, b| distance(a).total_cmp(&distance(b)))
}

fn show(link: &str, after: Duration, report: &Report, truth: &[NoduleTruth]) {
    let mut text = format!("\n{link}, {:.2} s after the start:\n{}", after.as_secs_f64(), super::analyze::table(report));
    for nodule in truth {
        let [x, y, z] = nodule.centre_lps_mm;
        let kind = format!("{:?}", nodule.kind).to_lowercase();
        let outcome = match hit(nodule, report) {
            Some(f) => format!("finding {} ({:.1} mm)", f.id, f.mean_diameter_mm.unwrap_or(f64::NAN)),
            None => "not found".into(),
        };
        text += &format!("  truth: {kind:<13} {:>4.1} mm at {x:.1} {y:.1} {z:.1}: {outcome}\n", nodule.diameter_mm);
    }
    let _ = super::print(&text);
}

fn verdict(truth: &[NoduleTruth], arrived: &[Arrived]) -> Result<(), Failure> {
    let mut faults = Vec::new();
    for link in ["serial", "socket"] {
        let Some(arrived) = arrived.iter().find(|a| a.link == link) else {
            faults.push(format!("no report came out of the {link} link"));
            continue;
        };
        if arrived.report.status != Status::Complete {
            faults.push(format!("the report on the {link} link is {}", arrived.report.status.word()));
        }
        for nodule in truth.iter().filter(|n| n.diameter_mm >= MUST_BE_FOUND_MM) {
            match hit(nodule, &arrived.report) {
                None => faults.push(format!("{link}: the nodule of {:.1} mm was not found", nodule.diameter_mm)),
                Some(f) if f.site.laterality != Some(nodule.side) => {
                    faults.push(format!("{link}: finding {} is on the wrong side", f.id));
                }
                Some(_) => {}
            }
        }
        log::debug!("{link} after {:?}", arrived.after);
    }
    if faults.is_empty() {
        return super::print("\nevery nodule of 6 mm and more came out of both links, on its side\n");
    }
    Err(Failure::Impossible(faults.join("; ")))
}
