//! What goes wrong beside a scanner: the power, the cable, the disk, an update, the service itself.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::machine::{Bench, Power};
use super::{Begun, PATIENCE, Place, Receiver, done, parsed, system, word};
use crate::{Made, Outcome, image};

/// Slices and rows of a study of these tests: enough for an exam, little to emulate.
const SLICES: u32 = 24;
const ROWS: u32 = 96;

/// Studies that stream in at once.
const SENDERS: u64 = 2;

/// A machine lives at most so many times as long between two cuts as it takes from its start to its first report: some cuts
/// come before it, some behind.
const LIFE_MAX: f64 = 1.6;

/// Studies that may wait for their report; the next is sent when one has come.
const WAITING_MAX: usize = 8;

/// Longest wait of a sender for one answer: it calls again long before the box gives up waiting for the rest of its study.
const ANSWER_S_MAX: u32 = 20;

/// The key updates of these tests are signed with.
pub struct UpdateKey {
    file: PathBuf,
    /// 64 hexadecimal digits.
    pub public: String,
}

/// Makes a key.
pub fn update_key(host: &Path, folder: &Path) -> Made<UpdateKey> {
    let file = folder.join("update.key");
    let _ = fs::remove_file(&file);
    let output = Command::new(host).args(["update", "keygen"]).arg(&file).output()?;
    if !output.status.success() {
        return Err(format!("update keygen: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let text = String::from_utf8(output.stdout)?;
    let public = text.split_whitespace().find(|word| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit()));
    Ok(UpdateKey { file, public: public.ok_or("update keygen prints no key")?.to_owned() })
}

/// One fault after the other.
pub fn test(place: &Place, key: &UpdateKey, cuts: u32, seed: u64) -> Outcome {
    updates(place, key)?;
    power_cuts(place, cuts, seed)?;
    full_disk(place)?;
    hung_service(place)?;
    cable(place)
}

fn send(place: &Place, bench: &Bench, study: &Path, attempts: u32) -> Command {
    let mut send = Command::new(&place.host);
    send.arg("send").arg(study).args(["--dicom", &bench.address(), "--json"]);
    send.args(["--attempts", &attempts.to_string(), "--timeout", &ANSWER_S_MAX.to_string()]);
    send
}

/// Refused while there is no room, at boot and after; taken once there is.
fn full_disk(place: &Place) -> Outcome {
    let begun = Begun::now();
    let bench = place.bench("full")?;
    let study = place.phantom("full", 21, 40, 192)?;
    let receiver = Receiver::new(place, &bench)?;
    let mut machine = bench.start(&Power { words: "scanside.full=1", ..Power::default() })?;
    machine.wait("MiB left", PATIENCE)?;
    machine.wait("scanside: ready", PATIENCE)?;
    let output = send(place, &bench, &study, 3).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() || !said.to_lowercase().contains("a700") {
        return Err(format!("a full spool must refuse with A700; the sender says: {said}").into());
    }
    machine.cut();
    let mut machine = bench.start(&Power::default())?;
    machine.wait("scanside: ready", PATIENCE)?;
    image::run(send(place, &bench, &study, 5).stdout(Stdio::null()))?;
    let reports = receiver.wait(1, PATIENCE)?;
    expect_complete(&reports[reports.len() - 1])?;
    done("a spool that is full at boot: refused with A700, taken when there is room again", begun);
    Ok(())
}

/// Stopped from outside, it feeds no watchdog; the board starts again by itself and works.
fn hung_service(place: &Place) -> Outcome {
    let begun = Begun::now();
    let bench = place.bench("hung")?;
    let study = place.phantom("hung", 22, SLICES, ROWS)?;
    let mut machine = bench.start(&Power { words: "scanside.hang=5", ..Power::default() })?;
    machine.wait("scanside: ready", PATIENCE)?;
    machine.wait("stopped for the watchdog to notice", PATIENCE)?;
    let hung = Instant::now();
    system::ready(&mut machine)?;
    let took = hung.elapsed().as_secs_f64();
    let receiver = Receiver::new(place, &bench)?;
    image::run(send(place, &bench, &study, 100).stdout(Stdio::null()))?;
    expect_complete(&receiver.wait(1, PATIENCE)?[0])?;
    done(&format!("a service that hangs: the watchdog bites, ready again after {took:.0} s, and works"), begun);
    Ok(())
}

/// Pulled out before and while reports are on their way, and put back: each comes once.
fn cable(place: &Place) -> Outcome {
    let begun = Begun::now();
    let bench = place.bench("cable")?;
    let mut machine = bench.start(&Power::default())?;
    machine.wait("scanside: ready", PATIENCE)?;
    let mut receiver = Receiver::new(place, &bench)?;
    receiver.unplug()?;
    for seed in [31, 32] {
        let study = place.phantom(&format!("cable{seed}"), seed, SLICES, ROWS)?;
        image::run(send(place, &bench, &study, 5).stdout(Stdio::null()))?;
    }
    for _ in 0..2 {
        machine.wait(", report ", PATIENCE)?;
    }
    // In for moments, as a loose plug is, then for good.
    for moment_ms in [1000, 1200, 1500] {
        receiver.plug()?;
        std::thread::sleep(Duration::from_millis(moment_ms));
        receiver.unplug()?;
    }
    receiver.plug()?;
    let reports = receiver.wait(2, PATIENCE)?;
    std::thread::sleep(Duration::from_secs(5));
    hold_once(&receiver.reports()?, &reports.iter().map(|r| Ok((word(&parsed(r)?, "series_uid"), ()))).collect::<Made<_>>()?)?;
    done("the serial cable pulled while two reports were due: each came once when it was back", begun);
    Ok(())
}

/// A folder for a stick, signed, with the binary given.
fn pack(place: &Place, key: &UpdateKey, name: &str, release: &str, binary: &[u8]) -> Made<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let folder = place.folder.join("updates").join(name).join("scanside-update");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("scanside"), binary)?;
    fs::set_permissions(folder.join("scanside"), fs::Permissions::from_mode(0o755))?;
    let mut pack = Command::new(&place.host);
    pack.args(["update", "pack"]).arg(&folder).args(["--board", "qemu-virt", "--target", "aarch64-unknown-linux-gnu", "--release", release, "--key"]).arg(&key.file);
    image::run(pack.stdout(Stdio::null()))?;
    Ok(folder)
}

/// One flipped bit is refused; a good one is tried, confirmed and kept; one that does not run is left again.
fn updates(place: &Place, key: &UpdateKey) -> Outcome {
    let begun = Begun::now();
    let bench = place.bench("updates")?;
    let binary = fs::read(&place.image.binary)?;
    let good = pack(place, key, "good", "9.1.0", &binary)?;
    let flipped = pack(place, key, "flipped", "9.1.0", &binary)?;
    let mut bytes = binary.clone();
    bytes[binary.len() / 2] ^= 1;
    fs::write(flipped.join("scanside"), bytes)?;
    let broken = pack(place, key, "broken", "9.2.0", b"#!/bin/busybox sh\nexit 1\n")?;
    let stick = |name: &str, folder: &Path| system::stick(&place.folder.join(format!("{name}.fat")), folder, "scanside-update");

    let mut machine = bench.start(&Power::default())?;
    machine.wait("runs from /usr/lib/scanside", PATIENCE)?;
    machine.wait("scanside: ready", PATIENCE)?;
    machine.plug(&stick("flipped", &flipped)?, "flipped")?;
    machine.wait("update ended with 65", PATIENCE)?;
    machine.unplug("flipped")?;
    machine.plug(&stick("good", &good)?, "good")?;
    machine.wait("update ended with 0", PATIENCE)?;
    machine.unplug("good")?;
    machine.wait("runs from /data/slots/a", PATIENCE)?;
    machine.wait("scanside: ready", PATIENCE)?;
    machine.wait("is the active firmware", PATIENCE)?;
    machine.plug(&stick("broken", &broken)?, "broken")?;
    machine.wait("update ended with 0", PATIENCE)?;
    machine.unplug("broken")?;
    machine.wait("runs from /data/slots/b", PATIENCE)?;
    machine.wait("runs from /data/slots/a", PATIENCE)?;
    machine.wait("scanside: ready", PATIENCE)?;
    done("updates: a flipped bit refused, a good one tried and kept, one that does not run left for the slot before it", begun);
    Ok(())
}

/// The power is cut at random moments, boots included, while studies stream in.
fn power_cuts(place: &Place, cuts: u32, seed: u64) -> Outcome {
    let begun = Begun::now();
    println!("{cuts} power cuts, seed {seed}");
    let mut random = Random(seed | 1);
    let bench = place.bench("cuts")?;
    let receiver = Receiver::new(place, &bench)?;
    let started = Instant::now();
    let machine = bench.start(&Power::default())?;
    let study = place.phantom("stream", 999, SLICES, ROWS)?;
    image::run(send(place, &bench, &study, 1000).stdout(Stdio::null()))?;
    receiver.wait(1, PATIENCE)?;
    let life_s_max = LIFE_MAX * started.elapsed().as_secs_f64();
    machine.cut();

    let mut sent = BTreeMap::from([(series_of(place, &study)?, ())]);
    let streams = Streams { place, bench: &bench, receiver: &receiver, begun: AtomicUsize::new(1), last_call: OnceLock::new() };
    std::thread::scope(|scope| -> Outcome {
        let streams = &streams;
        let senders: Vec<_> = (0..SENDERS).map(|n| scope.spawn(move || streams.send(n).map_err(|e| e.to_string()))).collect();
        let cutting = (|| -> Outcome {
            for cut in 1..=cuts {
                let life_s = random.unit() * life_s_max;
                let machine = bench.start(&Power::default())?;
                std::thread::sleep(Duration::from_secs_f64(life_s));
                println!("    cut {cut} after {life_s:.1} s, {} reports so far", receiver.reports()?.len());
                machine.cut();
            }
            Ok(())
        })();
        // The last life: long enough for all that is under way.
        let machine = cutting.and_then(|()| bench.start(&Power::default()));
        let patience = if machine.is_ok() { 2 * PATIENCE } else { Duration::ZERO };
        streams.last_call.set(Instant::now() + patience).map_err(|_| "the last call is made once")?;
        let series: Vec<_> = senders.into_iter().map(|sender| sender.join().map_err(|_| "a sender ended in a panic")).collect();
        let machine = machine?;
        for series in series {
            sent.extend(series??.into_iter().map(|uid| (uid, ())));
        }
        receiver.wait(sent.len(), 2 * PATIENCE)?;
        // What came twice would come now.
        std::thread::sleep(Duration::from_secs(10));
        drop(machine);
        Ok(())
    })?;
    hold_once(&receiver.reports()?, &sent)?;
    done(&format!("{cuts} power cuts: {} studies acknowledged, as many reports, none twice, none incomplete", sent.len()), begun);
    Ok(())
}

/// Studies that stream in while the power comes and goes.
struct Streams<'a> {
    place: &'a Place,
    bench: &'a Bench,
    receiver: &'a Receiver,
    /// Studies that were begun.
    begun: AtomicUsize,
    /// Until when senders go on with the study they are at; no other is begun once this is set.
    last_call: OnceLock<Instant>,
}

impl Streams<'_> {
    /// Sends study after study, each until all of it is acknowledged; the series that were.
    fn send(&self, sender: u64) -> Made<Vec<String>> {
        let mut sent = Vec::new();
        let log = File::options().create(true).append(true).open(self.bench.folder.join(format!("sender{sender}.log")))?;
        while self.last_call.get().is_none() {
            if self.begun.load(Ordering::SeqCst) >= self.receiver.reports()?.len() + WAITING_MAX {
                std::thread::sleep(Duration::from_millis(200));
                continue;
            }
            self.begun.fetch_add(1, Ordering::SeqCst);
            let seed = 1000 * (sender + 1) + sent.len() as u64;
            let study = self.place.phantom(&format!("stream{seed}"), seed, SLICES, ROWS)?;
            let mut child: Child =
                send(self.place, self.bench, &study, 1000).stdout(Stdio::null()).stderr(log.try_clone()?).spawn()?;
            let ended = loop {
                if let Some(ended) = child.try_wait()? {
                    break ended;
                }
                if self.last_call.get().is_some_and(|until| Instant::now() >= *until) {
                    child.kill()?;
                }
                std::thread::sleep(Duration::from_millis(50));
            };
            if !ended.success() {
                return Err(format!("{} was not sent to its end", study.display()).into());
            }
            sent.push(series_of(self.place, &study)?);
        }
        Ok(sent)
    }
}

/// The series' UID, as this machine reads it.
fn series_of(place: &Place, study: &Path) -> Made<String> {
    let output = Command::new(&place.host).arg("info").arg(study).arg("--json").output()?;
    let text = String::from_utf8(output.stdout)?;
    let uid = super::field(&text, "series_uid")?.trim_matches('"').to_owned();
    Ok(uid)
}

/// Each series sent has one report, which is complete; nothing else was reported, nothing twice, numbers rise.
fn hold_once(reports: &[String], sent: &BTreeMap<String, ()>) -> Outcome {
    let (mut seen, mut last) = (BTreeMap::new(), 0);
    for report in reports {
        expect_complete(report)?;
        let report = parsed(report)?;
        let (series, sequence) = (word(&report, "series_uid"), report["sequence"].as_u64().unwrap_or(0));
        if sequence <= last {
            return Err(format!("report {sequence} came after report {last}").into());
        }
        last = sequence;
        if !sent.contains_key(&series) {
            return Err(format!("{series} was reported and never sent to its end").into());
        }
        if seen.insert(series.clone(), sequence).is_some() {
            return Err(format!("{series} was reported twice").into());
        }
    }
    match sent.keys().find(|series| !seen.contains_key(*series)) {
        None => Ok(()),
        Some(lost) => Err(format!("{lost} was acknowledged and never reported").into()),
    }
}

fn expect_complete(report: &str) -> Outcome {
    let parsed = parsed(report)?;
    let missing = parsed["volume"]["missing_slices"].as_array().is_some_and(|slices| !slices.is_empty());
    if word(&parsed, "status") == "complete" && !missing { Ok(()) } else { Err(format!("not complete: {report}").into()) }
}

/// xorshift64: moments need no better.
struct Random(u64);

impl Random {
    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(series: &str, sequence: u64, status: &str) -> String {
        format!(r#"{{"series_uid":"{series}","sequence":{sequence},"status":"{status}","volume":{{"missing_slices":[]}}}}"#)
    }

    #[test]
    fn a_report_that_is_lost_doubled_or_incomplete_is_noticed() {
        let sent: BTreeMap<_, _> = [("1.1".to_owned(), ()), ("1.2".to_owned(), ())].into();
        let told = |reports: &[String]| hold_once(reports, &sent).map_err(|e| e.to_string());
        let (one, two) = (report("1.1", 1, "complete"), report("1.2", 2, "complete"));
        assert_eq!(told(&[one.clone(), two.clone()]), Ok(()));
        assert_eq!(told(std::slice::from_ref(&one)), Err("1.2 was acknowledged and never reported".into()));
        assert_eq!(told(&[one.clone(), two.clone(), report("1.1", 3, "complete")]), Err("1.1 was reported twice".into()));
        assert_eq!(told(&[two, one.clone()]), Err("report 1 came after report 2".into()));
        assert!(told(&[one, report("1.2", 2, "partial")]).unwrap_err().starts_with("not complete"));
        assert!(told(&[report("1.3", 1, "complete")]).unwrap_err().contains("never sent"));
    }
}
