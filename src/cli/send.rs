//! `scanside send`: images out, by DICOM or over the local socket.

use std::io::IsTerminal;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use scanside::dicom::client::{NotSent, Peer, Sent, echo, find_files, send};
use scanside::dicom::negotiation::AeTitle;
use scanside::ingest::socket::{Pushed, push_files};

use super::{Failure, print};

/// Sends DICOM files to a scanside service, or to any other DICOM application.
///
/// PATH may be one file or a folder with any depth and any file names; files that are no DICOM are named and left out.
/// Each file goes out as it is, in its own transfer syntax. An association that breaks is made anew and goes on where
/// it broke. The exit code is 0 only when the receiver has acknowledged every file.
///
///   scanside send ct-series/ --dicom 127.0.0.1:11112
///   scanside send --echo --dicom 127.0.0.1:11112        # only asks whether somebody is there (C-ECHO)
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// A DICOM file, or a folder of them.
    #[arg(required_unless_present = "echo")]
    path: Option<PathBuf>,
    /// Where the DICOM application listens: host:port.
    #[arg(long, value_name = "ADDR:PORT", conflicts_with = "socket", required_unless_present = "socket")]
    dicom: Option<String>,
    /// The local socket of a scanside service on this machine.
    #[arg(long, value_name = "PATH", conflicts_with = "echo")]
    socket: Option<PathBuf>,
    /// Sends the frames of a cine as a live stream, so many a second, to the ultrasound exam of the service
    #[arg(long, value_name = "FPS", requires = "socket", value_parser = frames_a_second)]
    fps: Option<f64>,
    /// Sends the cine so many times over
    #[arg(long, value_name = "N", requires = "fps", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Our AE title.
    #[arg(long, value_name = "TITLE", default_value = "SCANSIDE-SCU", value_parser = AeTitle::parse)]
    aet: AeTitle,
    /// The AE title that is called.
    #[arg(long, value_name = "TITLE", default_value = "SCANSIDE", value_parser = AeTitle::parse)]
    aec: AeTitle,
    /// Only check the connection: association, C-ECHO, release.
    #[arg(long)]
    echo: bool,
    /// Tries before giving up when no association comes about, or one breaks.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    attempts: u16,
    /// Longest wait for an answer of the DICOM application, in seconds.
    #[arg(long, value_name = "SECONDS", requires = "dicom", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
    /// Prints one JSON object about what was sent.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    if let (Some(socket), Some(path), Some(fps)) = (&arguments.socket, &arguments.path, arguments.fps) {
        return super::stream::send_live(socket, path, fps, arguments.repeat as usize, arguments.json);
    }
    if let (Some(socket), Some(path)) = (&arguments.socket, &arguments.path) {
        return send_path(&Way::Socket(socket, arguments.attempts.into()), path, arguments.json);
    }
    let Some(address) = &arguments.dicom else {
        return Err(Failure::usage("one of --dicom and --socket is needed"));
    };
    let mut peer = Peer::new(resolve(address)?, arguments.aet.clone(), arguments.aec.clone());
    peer.attempts = arguments.attempts.into();
    peer.patience = Duration::from_secs(arguments.timeout.into());
    if arguments.echo {
        let took = echo(&peer).map_err(|e| Failure::Impossible(format!("{address}: {e}")))?;
        let ms = took.as_secs_f64() * 1000.0;
        return print(&match arguments.json {
            true => format!("{}\n", json!({"echo_ms": ms})),
            false => format!("{} at {address} answers C-ECHO in {ms:.1} ms\n", arguments.aec),
        });
    }
    match &arguments.path {
        Some(path) => send_path(&Way::Dicom(&peer), path, arguments.json),
        None => Ok(()),
    }
}

fn frames_a_second(text: &str) -> Result<f64, String> {
    let fps: f64 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if (0.1..=1000.0).contains(&fps) { Ok(fps) } else { Err("0.1 to 1000 frames a second".into()) }
}

fn resolve(address: &str) -> Result<SocketAddr, Failure> {
    let found = address.to_socket_addrs().map_err(|e| Failure::usage(format!("--dicom {address}: {e}")))?;
    found.into_iter().next().ok_or_else(|| Failure::usage(format!("--dicom {address}: no such host")))
}

/// Where to.
enum Way<'a> {
    Dicom(&'a Peer),
    /// The path, and how often a file is tried.
    Socket(&'a Path, u32),
}

fn send_path(way: &Way<'_>, path: &Path, as_json: bool) -> Result<(), Failure> {
    if !path.exists() {
        return Err(Failure::usage(format!("{}: no such file or folder", path.display())));
    }
    let unreadable = |e| Failure::Impossible(format!("{}: {e}", path.display()));
    let (files, others) = find_files(path).map_err(unreadable)?;
    for NotSent { path, why } in &others {
        eprintln!("scanside: {}: left out: {why}", path.display());
    }
    if files.is_empty() {
        let is_update = path.join("scanside-update").is_dir();
        let but = if is_update { ", but an update, which `scanside update` takes" } else { "" };
        return Err(Failure::Impossible(format!("{}: no DICOM file in it{but}", path.display())));
    }
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new(files.len() as u64),
        false => ProgressBar::hidden(),
    };
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} files, {per_sec}, {msg}").expect("a fixed template"));
    let (begun, mut stored, mut bytes) = (Instant::now(), 0, 0);
    let mut failed: Vec<(PathBuf, String)> = Vec::new();
    let again = |why: &dyn std::fmt::Display, pause: Duration| {
        bar.suspend(|| eprintln!("scanside: {why}; trying again in {:.1} s", pause.as_secs_f64()));
    };
    let mut has = |size| {
        (stored, bytes) = (stored + 1, bytes + size);
        bar.set_message(format!("{} MiB", bytes >> 20));
        bar.inc(1);
    };
    match way {
        Way::Dicom(peer) => {
            let rest = send(peer, &files, &mut |sent| match sent {
                Sent::Stored(_, size) => has(size),
                Sent::Failed(..) => bar.inc(1),
                Sent::Retry(why, pause) => again(why, pause),
            });
            failed.extend(rest.into_iter().map(|NotSent { path, why }| (path, why.to_string())));
        }
        Way::Socket(socket, attempts) => {
            let paths: Vec<PathBuf> = files.iter().map(|(path, _)| path.clone()).collect();
            let result = push_files(socket, &paths, *attempts, &mut |pushed| match pushed {
                Pushed::Stored(_, size) => has(size),
                Pushed::Failed(path, why) => failed.push((path.to_owned(), why)),
                Pushed::Retry(why, pause) => again(why, pause),
            });
            if let Err(error) = result {
                let told = stored + failed.len();
                if told == paths.len() {
                    eprintln!("scanside: everything is stored, but the service could not be told that this was all: {error}");
                }
                failed.extend(paths.into_iter().skip(told).map(|path| (path, error.to_string())));
            }
        }
    }
    bar.finish_and_clear();
    for (path, why) in &failed {
        eprintln!("scanside: {}: {why}", path.display());
    }
    let seconds = begun.elapsed().as_secs_f64();
    let not_sent: Vec<_> = failed.iter().map(|(path, why)| json!({"path": path, "why": why})).collect();
    print(&match as_json {
        true => format!("{}\n", json!({"sent": stored, "bytes": bytes, "seconds": seconds, "failed": not_sent})),
        false => format!("sent {stored} of {} files, {:.1} MB, in {seconds:.1} s\n", files.len(), bytes as f64 / 1e6),
    })?;
    match failed.len() {
        0 => Ok(()),
        n => Err(Failure::Impossible(format!("{n} of {} files were not sent", files.len()))),
    }
}
