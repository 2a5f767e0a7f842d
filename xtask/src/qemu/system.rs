//! The whole machine: a study in by every way, the report out by the serial line, and what it cost.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::machine::{Bench, Machine, Power};
use super::{Begun, PATIENCE, Place, Receiver, done, field, parsed, word};
use crate::{Made, Outcome};

/// What a board may need for one chest exam, page cache and all: the second machine has no more.
const EXAM_MIB: u32 = 768;

/// From the kernel's handing over to the service's being ready, of guest time.
const READY_S_MAX: f64 = 1.0;

/// A series on this machine, and what it comes to here.
struct Study {
    name: &'static str,
    folder: PathBuf,
    report: String,
}

/// Boots, sends, receives, compares, counts; prints the table.
pub fn test(place: &Place, data: &Path) -> Outcome {
    let study = study(place, data)?;
    let ready = by_the_network(place, &study)?;
    let memory = from_a_stick(place, &study)?;
    let counted = counted(place, &study)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("\n| on QEMU's virt machine | |\n|---|---|");
    println!("| kernel hands over to service ready, one instruction counted as a nanosecond | {:.2} s |", counted.ready_s);
    println!("| the same by the clock of a Cortex-A76 emulated here | {ready:.2} s |");
    println!("| one chest exam ({}) from stick to report | {:.1} G instructions |", study.name, counted.exam_ginstructions);
    println!("| service at the peak of it, networks included | {} MiB |", memory.service_mib);
    println!("| board memory then in use beside what the kernel can free, of {} MiB | {} MiB |", EXAM_MIB, memory.board_mib);
    println!("| static binary | {:.1} MiB |", mib(place.image.binary_bytes));
    println!("| image: kernel, initramfs, root with binary and models | {:.1} MiB |\n", mib(place.image.bytes));
    if counted.ready_s > READY_S_MAX {
        return Err(format!("ready after {:.2} s, {READY_S_MAX} s are promised", counted.ready_s).into());
    }
    Ok(())
}

fn study(place: &Place, data: &Path) -> Made<Study> {
    let real = data.join("ct/4dlung-113/dicom");
    let (name, folder) = if real.is_dir() {
        ("99 slices of 512 x 512, a patient", real)
    } else {
        println!("skipped: {} is not there, a phantom is sent", real.display());
        ("99 slices of 512 x 512, a phantom", place.phantom("chest", 11, 99, 512)?)
    };
    let out = place.folder.join("host");
    let output = Command::new(&place.host).arg("analyze").arg(&folder).arg("--out").arg(&out).arg("--json").output()?;
    if !output.status.success() {
        return Err(format!("analyze on this machine: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(Study { name, folder, report: String::from_utf8(output.stdout)? })
}

/// The findings of the board must be those of this machine, to the byte.
pub fn compare(here: &str, there: &str) -> Outcome {
    for name in ["status", "findings", "measurements", "volume", "models", "series_uid", "study_uid", "exam"] {
        let (ours, theirs) = (field(here, name)?, field(there, name)?);
        if ours != theirs {
            return Err(format!("{name} of the board differs\n  here:  {ours}\n  board: {theirs}").into());
        }
    }
    let findings = parsed(there)?["findings"].as_array().map_or(0, Vec::len);
    if findings == 0 {
        return Err("the study has no findings, so that nothing was compared".into());
    }
    println!("    {findings} findings, byte for byte as on this machine");
    Ok(())
}

/// A C-STORE client that is none of ours, where there is one.
fn send(place: &Place, bench: &Bench, folder: &Path) -> Outcome {
    let dcmtk = Command::new("storescu").arg("--version").output().is_ok_and(|o| o.status.success());
    let mut client = if dcmtk {
        let mut storescu = Command::new("storescu");
        storescu.args(["+sd", "127.0.0.1", &bench.port.to_string()]).arg(folder);
        storescu
    } else {
        println!("    skipped: dcmtk is not installed, `scanside send` sends");
        let mut send = Command::new(&place.host);
        send.arg("send").arg(folder).args(["--dicom", &bench.address()]);
        send
    };
    crate::image::run(client.stdout(Stdio::null()))
}

/// Guest seconds at the beginning of a console line, `[ 1.23] …`.
fn stamp(line: &str) -> f64 {
    line.trim_start_matches('[').split(']').next().and_then(|s| s.trim().parse().ok()).unwrap_or(f64::NAN)
}

/// Waits until the service is ready; guest seconds since the kernel handed over.
pub fn ready(machine: &mut Machine) -> Made<f64> {
    let handed = machine.wait("handed over at ", PATIENCE)?;
    let handed: f64 = handed.rsplit(' ').next().unwrap_or_default().parse()?;
    Ok(stamp(&machine.wait("scanside: ready", PATIENCE)?) - handed)
}

fn by_the_network(place: &Place, study: &Study) -> Made<f64> {
    let begun = Begun::now();
    let bench = place.bench("network")?;
    let mut machine = bench.start(&Power::default())?;
    let ready = ready(&mut machine)?;
    let receiver = Receiver::new(place, &bench)?;
    send(place, &bench, &study.folder)?;
    let reports = receiver.wait(1, PATIENCE)?;
    compare(&study.report, &reports[0])?;
    done("by C-STORE into 1,024 MiB and two Cortex-A76, out by the serial line", begun);
    Ok(ready)
}

/// What the exam needed of the board's memory.
struct Memory {
    service_mib: u64,
    board_mib: u64,
}

/// On the smallest memory that is promised, and without dot products.
fn from_a_stick(place: &Place, study: &Study) -> Made<Memory> {
    let begun = Begun::now();
    let bench = place.bench("stick")?;
    let stick = stick(&place.folder.join("study.fat"), &study.folder, "study")?;
    let mut machine = bench.start(&Power { cpu: "cortex-a72", memory_mib: EXAM_MIB, words: "scanside.stats", ..Power::default() })?;
    ready(&mut machine)?;
    let receiver = Receiver::new(place, &bench)?;
    machine.plug(&stick, "study")?;
    machine.wait("stick ended with 0", PATIENCE)?;
    let reports = receiver.wait(1, PATIENCE)?;
    compare(&study.report, &reports[0])?;
    machine.wait("stats ", PATIENCE)?;
    machine.unplug("study")?;
    let stats: Vec<Stats> = machine.lines().iter().filter_map(|line| Stats::read(line)).collect();
    let service_mib = stats.iter().map(|s| s.peak_kib).max().unwrap_or(0) >> 10;
    let board_mib = stats.iter().map(|s| s.total_kib - s.available_kib).max().unwrap_or(0) >> 10;
    done(&format!("from a USB stick into {EXAM_MIB} MiB and two Cortex-A72, out by the serial line"), begun);
    Ok(Memory { service_mib, board_mib })
}

/// A stick of FAT with a folder on it.
pub fn stick(path: &Path, folder: &Path, name: &str) -> Made<PathBuf> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        // A cluster each for names and ends.
        bytes += entry?.metadata()?.len() + 32_768;
    }
    let _ = fs::remove_file(path);
    let sbin = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let kib = bytes / 1024 + 8192;
    crate::image::run(Command::new("mkfs.vfat").env("PATH", sbin).arg("-C").arg(path).arg(kib.to_string()).stdout(Stdio::null()))?;
    crate::image::run(Command::new("mcopy").arg("-s").arg("-Q").arg("-i").arg(path).arg(folder).arg(format!("::/{name}")))?;
    Ok(path.to_owned())
}

/// A line the bench's init prints with `scanside.stats`.
struct Stats {
    total_kib: u64,
    available_kib: u64,
    peak_kib: u64,
    cpu_ticks: u64,
}

impl Stats {
    fn read(line: &str) -> Option<Self> {
        let words = line.split_once("stats ")?.1;
        let number = |key: &str| words.split_whitespace().find_map(|word| word.strip_prefix(key)?.parse().ok());
        Some(Self {
            total_kib: number("MemTotal:")?,
            available_kib: number("MemAvailable:")?,
            peak_kib: number("VmHWM:")?,
            cpu_ticks: number("cpu:")?,
        })
    }
}

/// Instructions, where one is a nanosecond of guest time.
struct Counted {
    ready_s: f64,
    exam_ginstructions: f64,
}

fn counted(place: &Place, study: &Study) -> Made<Counted> {
    let begun = Begun::now();
    let bench = place.bench("counted")?;
    let stick = place.folder.join("study.fat");
    let mut machine = bench.start(&Power { cores: 1, counted: true, words: "scanside.stats", ..Power::default() })?;
    let ready_s = ready(&mut machine)?;
    let before = Stats::read(&machine.wait("stats ", PATIENCE)?).ok_or("no figures before the exam")?;
    let receiver = Receiver::new(place, &bench)?;
    machine.plug(&stick, "study")?;
    let reports = receiver.wait(1, 2 * PATIENCE)?;
    compare(&study.report, &reports[0])?;
    if word(&parsed(&reports[0])?, "status") == "failed" {
        return Err("the exam failed".into());
    }
    machine.wait("stick ended with 0", PATIENCE)?;
    machine.wait_from_now();
    let after = Stats::read(&machine.wait("stats ", PATIENCE)?).ok_or("no figures after the exam")?;
    // Ticks of 10 ms, each 10 million instructions.
    let exam_ginstructions = (after.cpu_ticks - before.cpu_ticks) as f64 / 100.0;
    done("instructions counted", begun);
    Ok(Counted { ready_s, exam_ginstructions })
}
