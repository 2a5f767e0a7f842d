//! The service is killed at random moments while three senders stream series into it, and started again. Whatever it
//! has answered for is analysed, and every series ends in one report, delivered once over the serial line.
//!
//! `SCANSIDE_KILLS=200 cargo test --release --test kill_nine` for as many kills as the promise says; the ordinary run of
//! the tests kills a few times only.

#[path = "support/instances.rs"]
mod instances;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use instances::{CT, EXPLICIT_LITTLE, Slice, uid};
use scanside::dicom::client::{Peer, SendError, StoreAssociation};
use scanside::dicom::negotiation::AeTitle;
use scanside::link::{Link, Pty};
use scanside::report::line::LineReceiver;
use scanside::report::wire::Memory;

const SENDERS: usize = 3;
const SLICES: usize = 30;
const PATIENCE: Duration = Duration::from_secs(120);

/// The near end of a pseudo-terminal that outlives every service that writes into the far one.
struct Near(Arc<Mutex<Pty>>);

impl Link for Near {
    fn read(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<usize> {
        self.0.lock().unwrap().read(buffer, patience)
    }

    fn write(&mut self, bytes: &[u8], patience: Duration) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes, patience)
    }
}

/// What the senders and the killer share.
#[derive(Default)]
struct Scene {
    /// Where the service listens at the moment.
    address: Mutex<Option<SocketAddr>>,
    /// Finish the series that is on its way, and begin no other.
    enough: AtomicBool,
    answered: AtomicUsize,
    /// What was refused though nothing was wrong with it.
    refused: Mutex<Vec<String>>,
    series: Mutex<BTreeSet<String>>,
}

fn start(folder: &Path, serial: &Path) -> (Child, std::sync::mpsc::Receiver<SocketAddr>) {
    let mut service = Command::new(env!("CARGO_BIN_EXE_scanside"))
        .args(["serve", "--dicom", "127.0.0.1:0", "--threads", "1"])
        .arg("--spool")
        .arg(folder.join("spool"))
        .arg("--config")
        .arg(folder.join("service.toml"))
        .arg("--serial")
        .arg(serial)
        .env("RUST_LOG", "error")
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (told, address) = std::sync::mpsc::channel();
    let lines = BufReader::new(service.stderr.take().unwrap()).lines();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            match line.split("DICOM on ").nth(1).and_then(|address| address.trim().parse().ok()) {
                Some(address) => drop(told.send(address)),
                None => println!("service: {line}"),
            }
        }
    });
    (service, address)
}

/// Streams series after series: each slice until it is answered for, each series until it is released.
fn stream(scene: &Scene, sender: usize) {
    let title = |text| AeTitle::parse(text).unwrap();
    for n in 0.. {
        if scene.enough.load(Ordering::SeqCst) {
            return;
        }
        let series = format!("1.2.826.0.1.9.{}.{}", sender + 1, n + 1);
        scene.series.lock().unwrap().insert(series.clone());
        let mut association: Option<StoreAssociation> = None;
        let mut number = 0;
        while number < SLICES {
            let slice = Slice { study: format!("1.2.826.0.1.8.{}", sender + 1), ..Slice::new(&series, number) };
            let outcome = match association.as_mut() {
                Some(open) => open.store(&slice.file()),
                None => {
                    let Some(address) = *scene.address.lock().unwrap() else {
                        std::thread::sleep(Duration::from_millis(5));
                        continue;
                    };
                    let mut peer = Peer::new(address, title("CT1"), title("SCANSIDE"));
                    peer.patience = Duration::from_secs(30);
                    match StoreAssociation::open(&peer, &[(uid(CT), uid(EXPLICIT_LITTLE))]) {
                        Ok(open) => association.insert(open).store(&slice.file()),
                        Err(error) => Err(error.into()),
                    }
                }
            };
            match outcome {
                Ok(()) => {
                    number += 1;
                    scene.answered.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(SendError::Association(_)) => {
                    association = None;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => {
                    scene.refused.lock().unwrap().push(format!("{series} slice {number}: {error}"));
                    number += 1;
                }
            }
        }
        // A release that the kill swallows leaves the series to the timer.
        if let Some(open) = association {
            let _ = open.release();
        }
    }
}

#[test]
fn what_was_answered_is_analysed_and_every_report_is_delivered_once() {
    let kills: usize = std::env::var("SCANSIDE_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(8);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("service.toml"), "[series]\nquiet_s = 4\n").unwrap();
    let pty = Arc::new(Mutex::new(Pty::open().unwrap()));
    let serial = pty.lock().unwrap().path().to_owned();
    let (scene, stop) = (Scene::default(), AtomicBool::new(false));
    // Sequence number and report, as they came.
    let delivered: Mutex<Vec<(u64, serde_json::Value)>> = Mutex::default();
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS).map(|n| scope.spawn({ let scene = &scene; move || stream(scene, n) })).collect();
        let receiving = scope.spawn(|| {
            let mut receiver = LineReceiver::new(Memory::default(), None, || Ok(Box::new(Near(Arc::clone(&pty))) as Box<dyn Link>));
            while let Some(incoming) = receiver.next(None, &stop) {
                let report = serde_json::from_slice(&incoming.json).expect("a whole report");
                delivered.lock().unwrap().push((incoming.sequence, report));
                receiver.accept(incoming.sequence);
            }
        });
        // xorshift64: the same moments on every run, as far as the machine allows.
        let mut seed = 0x5ca1_ab1e_u64;
        let mut random = |n: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % n
        };
        for kill in 0..kills {
            let (mut service, address) = start(folder.path(), &serial);
            // Every tenth time already while it starts, and takes up what it finds.
            if kill % 10 == 9 {
                std::thread::sleep(Duration::from_millis(random(150)));
            } else {
                let found = address.recv_timeout(PATIENCE).expect("the service starts");
                *scene.address.lock().unwrap() = Some(found);
                std::thread::sleep(Duration::from_millis(random(700)));
            }
            service.kill().unwrap();
            service.wait().unwrap();
            *scene.address.lock().unwrap() = None;
        }
        let (mut service, address) = start(folder.path(), &serial);
        *scene.address.lock().unwrap() = Some(address.recv_timeout(PATIENCE).expect("the service starts"));
        scene.enough.store(true, Ordering::SeqCst);
        for sender in senders {
            sender.join().unwrap();
        }
        let expected = scene.series.lock().unwrap().len();
        let begun = Instant::now();
        // What was killed before its release waits for the timer, a few series at a time.
        let patience = PATIENCE + Duration::from_secs(expected as u64);
        while delivered.lock().unwrap().len() < expected && begun.elapsed() < patience {
            std::thread::sleep(Duration::from_millis(50));
        }
        // Longer than any timer: a second report would come now.
        std::thread::sleep(Duration::from_secs(6));
        stop.store(true, Ordering::SeqCst);
        receiving.join().unwrap();
        let left = std::fs::read_dir(folder.path().join("spool/incoming")).unwrap().count();
        let terminated = rustix::process::Pid::from_child(&service);
        rustix::process::kill_process(terminated, rustix::process::Signal::TERM).unwrap();
        assert!(service.wait().unwrap().success());
        assert_eq!(left, 0, "what is reported leaves the spool");
    });

    let delivered = delivered.into_inner().unwrap();
    let series = scene.series.into_inner().unwrap();
    let answered = scene.answered.load(Ordering::SeqCst);
    println!("{kills} kills, {} series, {answered} slices answered, {} reports", series.len(), delivered.len());
    assert_eq!(scene.refused.into_inner().unwrap(), [] as [String; 0]);
    assert!(delivered.windows(2).all(|pair| pair[0].0 < pair[1].0), "in order, and none twice");
    let mut reports: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, report) in &delivered {
        let series = report["series_uid"].as_str().unwrap();
        *reports.entry(series).or_default() += 1;
        assert_eq!(report["volume"]["shape"][0], SLICES, "every slice that was answered is in it: {report}");
    }
    assert_eq!(reports.keys().copied().collect::<Vec<_>>(), series.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(reports.values().all(|n| *n == 1), "one report each: {reports:?}");
}
