//! `cargo xtask bench service`: what the README promises of the service, measured: memory for 200 and for 2,000 slices,
//! time from the last slice to the report, and a real chest CT where there is one.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cross::host_binary;
use crate::{Made, Outcome, process};

/// What a process used, read from proc(5) until it ended.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    cpu_s: f64,
    peak_mib: f64,
    wall_s: f64,
}

/// Runs all parts; `data` is the folder of real images, left out where it is not there.
pub fn bench(root: &Path, data: &Path) -> Outcome {
    let binary = host_binary(root)?;
    let folder = root.join("target/bench-service");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    println!("{:<44} {:>8} {:>9} {:>9}", "", "CPU s", "peak MiB", "wall s");
    for (slices, slice_mm) in [(200, 1.5), (2000, 0.15)] {
        let study = folder.join(slices.to_string());
        phantom(&binary, &study, slices, slice_mm)?;
        let usage = analyze(&binary, &study.join("dicom"), &folder, 1)?;
        row(&format!("analyze, {slices} x 512 x 512, 1 thread"), usage);
        row(&format!("serve, {slices} x 512 x 512 by C-STORE"), serve(&binary, &study.join("dicom"), &folder)?);
        std::fs::remove_dir_all(&study)?;
    }
    for series in ["lidc-0001", "4dlung-113", "lungdx-a0001"] {
        let study = data.join("ct").join(series).join("dicom");
        if study.is_dir() {
            row(&format!("analyze, {series}, 1 thread"), analyze(&binary, &study, &folder, 1)?);
        } else {
            println!("skipped: {} is not there", study.display());
        }
    }
    println!("\n100 slices of 512 x 512 sent at 20 a second, 2 threads: from the last acknowledgement to the report");
    for _ in 0..3 {
        println!("  {:.2} s", latency(&binary)?);
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

fn row(what: &str, usage: Usage) {
    println!("{what:<44} {:>8.2} {:>9.0} {:>9.2}", usage.cpu_s, usage.peak_mib, usage.wall_s);
}

fn phantom(binary: &Path, out: &Path, slices: usize, slice_mm: f64) -> Outcome {
    let status = Command::new(binary)
        .args(["phantom", "--format", "dicom", "--slices", &slices.to_string(), "--slice-mm", &slice_mm.to_string()])
        .args(["--nodule", "solid:9", "--out"])
        .arg(out)
        .stdout(Stdio::null())
        .status()?;
    if status.success() { Ok(()) } else { Err("the phantom cannot be drawn".into()) }
}

fn analyze(binary: &Path, study: &Path, folder: &Path, threads: usize) -> Made<Usage> {
    let mut command = Command::new(binary);
    command.arg("analyze").arg(study).arg("--out").arg(folder.join("out"));
    let child = command.args(["--threads", &threads.to_string()]).stdout(Stdio::null()).spawn()?;
    watch(child)
}

/// Follows a process to its end. What it used in its last milliseconds is missed.
fn watch(mut child: Child) -> Made<Usage> {
    let begun = Instant::now();
    let mut usage = Usage::default();
    let status = loop {
        look(child.id(), &mut usage);
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    usage.wall_s = begun.elapsed().as_secs_f64();
    if status.success() { Ok(usage) } else { Err(format!("scanside ended with {status}").into()) }
}

/// Reads what a process has used so far.
fn look(pid: u32, usage: &mut Usage) {
    usage.peak_mib = usage.peak_mib.max(process::memory_mib(pid, "VmHWM").unwrap_or(0.0));
    usage.cpu_s = usage.cpu_s.max(process::cpu_s(pid, false).unwrap_or(0.0));
}

/// A running service, ended when dropped.
pub struct Service {
    pub child: Child,
    pub address: String,
    pub socket: PathBuf,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a service on a spool and a socket in `folder`; `before` is the program that runs it, if any, with its arguments.
pub fn start(binary: &Path, folder: &Path, before: &[&str], more: &[&str]) -> Made<Service> {
    std::fs::create_dir_all(folder)?;
    let (spool, socket) = (folder.join("spool"), folder.join("socket"));
    let mut command = match before {
        [] => Command::new(binary),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(binary);
            command
        }
    };
    command.args(["serve", "--dicom", "127.0.0.1:0", "--spool"]).arg(&spool).arg("--socket").arg(&socket);
    let mut child = command.args(more).stderr(Stdio::piped()).spawn()?;
    let stderr = child.stderr.take().ok_or("no stderr")?;
    let mut lines = BufReader::new(stderr).lines();
    loop {
        let line = lines.next().ok_or("the service did not start")??;
        if let Some(address) = line.strip_prefix("scanside: ready, DICOM on ") {
            let address = address.to_owned();
            std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| eprintln!("{line}")));
            return Ok(Service { child, address, socket });
        }
    }
}

/// The command that sends a study by C-STORE.
pub fn send(binary: &Path, study: &Path, address: &str) -> Command {
    let mut command = Command::new(binary);
    command.arg("send").arg(study).args(["--dicom", address]).stdout(Stdio::null());
    command
}

/// A study through the running service; what the service used until its report was out.
fn serve(binary: &Path, study: &Path, folder: &Path) -> Made<Usage> {
    let service = start(binary, folder, &[], &["--threads", "2"])?;
    let begun = Instant::now();
    let sent = send(binary, study, &service.address).status()?;
    let mut watch = Command::new(binary);
    watch.arg("watch").arg("--socket").arg(&service.socket).args(["--count", "1", "--timeout", "300", "--json"]);
    let watched = watch.stdout(Stdio::null()).status()?;
    let mut usage = Usage::default();
    look(service.child.id(), &mut usage);
    usage.wall_s = begun.elapsed().as_secs_f64();
    drop(service);
    std::fs::remove_dir_all(folder.join("spool"))?;
    if sent.success() && watched.success() { Ok(usage) } else { Err("the study did not come through".into()) }
}

/// Seconds from the last acknowledgement to the report, as `scanside demo` tells them.
fn latency(binary: &Path) -> Made<f64> {
    let output = Command::new(binary).args(["demo", "--slices", "100", "--pace", "20", "--threads", "2"]).output()?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let sent = stderr.lines().find_map(|l| l.split_once("sent and acknowledged in ")?.1.strip_suffix(" s")?.parse::<f64>().ok());
    let came = stdout.lines().find_map(|l| l.strip_prefix("serial, ")?.split_once(" s after")?.0.parse::<f64>().ok());
    match (sent, came) {
        (Some(sent), Some(came)) => Ok(came - sent),
        _ => Err(format!("the demo told no times: {stderr}").into()),
    }
}
