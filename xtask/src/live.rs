//! `cargo xtask bench live`: what the README promises of live streams, measured: latency on one core, memory as the minutes go by, and
//! the latency beside a chest CT and a brain MR on two.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cross::host_binary;
use crate::service::{Service, start};
use crate::{Made, Outcome, process, service};

/// Ten seconds at thirty frames a second.
const FRAMES: u32 = 300;

/// Streams for so many minutes alone, then beside other work.
pub fn bench(root: &Path, minutes: u32) -> Outcome {
    let binary = host_binary(root)?;
    let folder = root.join("target/bench-live");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    let draw = |kind: &str, more: &[&str]| -> Made<PathBuf> {
        let out = folder.join(kind);
        let drawn = Command::new(&binary).args(["phantom", "--kind", kind, "--out"]).arg(&out).args(more).stdout(Stdio::null()).status()?;
        if drawn.success() { Ok(out) } else { Err(format!("the phantom {kind} cannot be drawn").into()) }
    };
    let cine = draw("ultrasound", &["--frames", &FRAMES.to_string()])?.join("cine.dcm");
    let chest = draw("chest", &["--format", "dicom", "--slices", "200"])?.join("dicom");
    let brain = draw("brain", &[])?.join("dicom");
    let config = folder.join("service.toml");
    std::fs::write(&config, "[exams]\nrun = [\"chest-ct\", \"brain-mr\", \"ultrasound\"]\n")?;
    let config = config.to_str().ok_or("the checkout's path is not UTF-8")?;

    println!("{minutes} minutes at 30 frames a second of 256 x 256 to a service on one core, one thread");
    println!("{:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}", "s", "frames", "dropped", "p50 ms", "p99 ms", "held MiB", "CPU %");
    let service = start(&binary, &folder.join("alone"), &["taskset", "-c", "0"], &["--threads", "1", "--config", config])?;
    let mut sender = stream(&binary, &service, &cine, minutes * 60 * 30 / FRAMES)?;
    let (begun, mut before_s) = (Instant::now(), 0.0);
    let mut held: Vec<f64> = Vec::new();
    let mut worst = 0f64;
    while sender.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_secs(1));
        let second = begun.elapsed().as_secs();
        if second > 0 && second.is_multiple_of(30) {
            let live = status(&binary, &service)?["live"].clone();
            let used_s = process::cpu_s(service.child.id(), false).unwrap_or(f64::NAN);
            // What the process holds now, its own pages and the file's.
            let mib = process::memory_mib(service.child.id(), "VmRSS").unwrap_or(f64::NAN);
            held.push(mib);
            worst = worst.max(number(&live, "latency_p99_ms"));
            let cpu = (used_s - before_s) / 30.0 * 100.0;
            before_s = used_s;
            println!(
                "{second:>8} {:>9} {:>9} {:>9.1} {:>9.1} {mib:>9.1} {cpu:>9.0}",
                number(&live, "frames_analysed"), number(&live, "frames_dropped"), number(&live, "latency_p50_ms"), number(&live, "latency_p99_ms")
            );
        }
    }
    let (least, most) = held.iter().fold((f64::INFINITY, 0f64), |(a, b), mib| (a.min(*mib), b.max(*mib)));
    println!("  worst p99 {worst:.1} ms (25 wanted); memory held by the process {least:.1} to {most:.1} MiB");
    drop(service);

    println!("\na stream, a chest CT of 200 slices and a brain MR at once: two cores, two threads");
    let service = start(&binary, &folder.join("together"), &[], &["--threads", "2", "--config", config])?;
    let mut sender = stream(&binary, &service, &cine, 1000)?;
    std::thread::sleep(Duration::from_secs(2));
    let begun = Instant::now();
    let send = |path: &Path| service::send(&binary, path, &service.address).spawn();
    let mut senders = [send(&chest)?, send(&brain)?];
    loop {
        let status = status(&binary, &service)?;
        if number(&status, "reported") >= 5.0 {
            break;
        }
        if begun.elapsed() > Duration::from_secs(600) {
            return Err(format!("the exams do not come to their end: {status}").into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let seconds = begun.elapsed().as_secs_f64();
    let status = status(&binary, &service)?;
    let live = &status["live"];
    println!(
        "  both exams {seconds:.1} s; {} frames analysed, {} dropped, p50 {:.1} ms, p99 {:.1} ms; peak {} of {} MiB",
        number(live, "frames_analysed"), number(live, "frames_dropped"), number(live, "latency_p50_ms"), number(live, "latency_p99_ms"),
        status["memory_peak_mib"], status["memory_budget_mib"]
    );
    for sender in &mut senders {
        sender.wait()?;
    }
    sender.kill()?;
    sender.wait()?;
    drop(service);
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

fn stream(binary: &Path, service: &Service, cine: &Path, times: u32) -> std::io::Result<Child> {
    let mut send = Command::new(binary);
    send.arg("send").arg(cine).arg("--socket").arg(&service.socket).args(["--fps", "30", "--repeat", &times.to_string()]);
    send.stdout(Stdio::null()).spawn()
}

fn status(binary: &Path, service: &Service) -> Made<Value> {
    let output = Command::new(binary).args(["status", "--json", "--socket"]).arg(&service.socket).output()?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn number(status: &Value, name: &str) -> f64 {
    status[name].as_f64().unwrap_or(f64::NAN)
}
