//! `cargo xtask qemu test`: the binaries that go onto a board, proven by running them: their tests one processor at a time,
//! the whole machine with a study, and the machine with everything that goes wrong beside a scanner.

mod faults;
mod machine;
mod system;
mod user;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use self::machine::Bench;
use crate::image::{self, Image};
use crate::{Made, Outcome, cross, process};

/// An emulated machine on a busy host: what takes a second on a board takes a minute there.
const PATIENCE: Duration = Duration::from_secs(600);

/// What the emulated machine runs.
const MACHINE: &str = "aarch64-unknown-linux-gnu";

/// Which parts, and how much of them.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only the library's tests and the program on one study, processor by processor, without a machine.
    #[arg(long)]
    user: bool,
    /// Of those only one target's.
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
    /// Only the whole machine: a chest CT by C-STORE, then from a USB stick, and what it cost.
    #[arg(long)]
    system: bool,
    /// Only what goes wrong: power cuts, cable, full disk, bad update, hung service.
    #[arg(long)]
    faults: bool,
    /// Moments at which the power is cut while studies stream in.
    #[arg(long, value_name = "N", default_value_t = 20)]
    cuts: u32,
    /// Makes the moments of the cuts; without it, another one each time, which is printed.
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// The folder of real images; a phantom stands in where it is not there.
    #[arg(long, default_value = "../shared/data")]
    data: PathBuf,
}

/// Runs the parts asked for, or all.
pub fn test(root: &Path, arguments: &Arguments) -> Outcome {
    let all = !(arguments.user || arguments.system || arguments.faults);
    let host = cross::host_binary(root)?;
    let folder = root.join("target/qemu/test");
    // Drawn anew: by this program, and as these tests want them.
    let _ = fs::remove_dir_all(folder.join("phantoms"));
    fs::create_dir_all(&folder)?;
    if all || arguments.user {
        user::test(root, &host, &folder, arguments.target.as_deref())?;
    }
    if !(all || arguments.system || arguments.faults) {
        return Ok(());
    }
    if cross::ready(&[MACHINE]).is_err() {
        println!("not run: the whole machine and its faults, which need {MACHINE}");
        return Ok(());
    }
    let key = faults::update_key(&host, &folder)?;
    let image = image::build(root, "qemu-virt", Some(&key.public))?;
    image.hold()?;
    let place = Place { host, folder, image };
    if all || arguments.system {
        system::test(&place, &arguments.data)?;
    }
    if all || arguments.faults {
        let seed = arguments.seed.unwrap_or_else(|| {
            std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_nanos() as u64)
        });
        faults::test(&place, &key, arguments.cuts, seed)?;
    }
    Ok(())
}

/// What every part needs.
pub struct Place {
    /// `scanside` of this machine.
    host: PathBuf,
    /// For what is only needed here.
    folder: PathBuf,
    image: Image,
}

impl Place {
    fn bench(&self, name: &str) -> Made<Bench> {
        Bench::new(&self.folder.join(name), &self.image)
    }

    fn phantom(&self, name: &str, seed: u64, slices: u32, rows: u32) -> Made<PathBuf> {
        phantom(&self.host, &self.folder, name, seed, slices, rows)
    }
}

/// A folder with a phantom's DICOM files, drawn once.
fn phantom(host: &Path, folder: &Path, name: &str, seed: u64, slices: u32, rows: u32) -> Made<PathBuf> {
    let out = folder.join("phantoms").join(name);
    if !out.join("truth.json").is_file() {
        let numbers = [("--seed", seed), ("--slices", slices.into()), ("--rows", rows.into())];
        let mut command = Command::new(host);
        command.args(["phantom", "--format", "dicom", "--slice-mm", "5", "--nodule", "solid:14", "--out"]).arg(&out);
        for (key, value) in numbers {
            command.args([key, &value.to_string()]);
        }
        image::run(command.stdout(Stdio::null()))?;
    }
    Ok(out.join("dicom"))
}

/// The device at the other end of the cable: `scanside watch` on the emulated serial line. It outlives the machine, and
/// goes on where it was when it is started again.
struct Receiver {
    watch: Option<Child>,
    host: PathBuf,
    folder: PathBuf,
    line: PathBuf,
}

impl Receiver {
    fn new(place: &Place, bench: &Bench) -> Made<Self> {
        let mut receiver = Self { watch: None, host: place.host.clone(), folder: bench.folder.clone(), line: bench.line.clone() };
        receiver.plug()?;
        Ok(receiver)
    }

    /// Puts the cable in.
    fn plug(&mut self) -> Outcome {
        let output = |name: &str| File::options().create(true).append(true).open(self.folder.join(name));
        let mut watch = ends_with_us(&self.host);
        watch.args(["watch", "--json", "--serial"]).arg(&self.line).arg("--state").arg(self.folder.join("taken.json"));
        self.watch = Some(watch.stdout(output("reports.jsonl")?).stderr(output("watch.log")?).spawn()?);
        Ok(())
    }

    /// Pulls it out, though never in the moment between a report's being printed and remembered: nobody can say then which of
    /// the two came to be.
    fn unplug(&mut self) -> Outcome {
        if let Some(mut watch) = self.watch.take() {
            let signal = |name: &str| image::run(Command::new("kill").args([name, &watch.id().to_string()]));
            signal("-STOP")?;
            while !self.has_remembered()? {
                signal("-CONT")?;
                std::thread::sleep(Duration::from_millis(20));
                signal("-STOP")?;
            }
            watch.kill()?;
            watch.wait()?;
        }
        Ok(())
    }

    /// Whether the report printed last is the one that a new start begins behind.
    fn has_remembered(&self) -> Made<bool> {
        let Some(last) = self.reports()?.pop() else { return Ok(true) };
        let Ok(taken) = fs::read(self.folder.join("taken.json")) else { return Ok(false) };
        let taken: Value = serde_json::from_slice(&taken)?;
        let latest = taken["journals"].as_array().and_then(|journals| journals.last()).map(|journal| &journal[1]);
        Ok(latest == Some(&parsed(&last)?["sequence"]))
    }

    /// What came so far, as it came.
    fn reports(&self) -> Made<Vec<String>> {
        let text = fs::read_to_string(self.folder.join("reports.jsonl"))?;
        Ok(text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(str::to_owned).collect())
    }

    /// Waits until so many reports are there.
    fn wait(&self, count: usize, patience: Duration) -> Made<Vec<String>> {
        let until = Instant::now() + patience;
        loop {
            let reports = self.reports()?;
            if reports.len() >= count {
                return Ok(reports);
            }
            if Instant::now() > until {
                return Err(format!("{} of {count} reports came over the serial line within {patience:?}", reports.len()).into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(mut watch) = self.watch.take() {
            let _ = watch.kill();
            let _ = watch.wait();
        }
    }
}

/// A program that is not left behind when this one is killed: it would hold the serial line of the next.
fn ends_with_us(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// The text of one field of a JSON object, as it stands there but for spaces between its words.
fn field<'a>(json: &'a str, name: &str) -> Made<std::borrow::Cow<'a, str>> {
    let key = format!("\"{name}\":");
    let at = json.find(&key).ok_or_else(|| format!("no {name} in {json}"))? + key.len();
    let (mut depth, mut quoted, mut escaped) = (0_i32, false, false);
    for (n, c) in json[at..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            _ if quoted => {}
            '[' | '{' => depth += 1,
            ']' | '}' | ',' if depth == 0 => return Ok(json[at..at + n].trim().into()),
            ']' | '}' => depth -= 1,
            _ => {}
        }
    }
    Err(format!("{name} does not end in {json}").into())
}

fn parsed(report: &str) -> Made<Value> {
    Ok(serde_json::from_str(report)?)
}

fn word(report: &Value, name: &str) -> String {
    report[name].as_str().unwrap_or_default().to_owned()
}

/// When a step was begun: by the clock, and of the processor time that this program and those it waited for had used.
struct Begun {
    at: Instant,
    used_s: f64,
}

impl Begun {
    fn now() -> Self {
        Self { at: Instant::now(), used_s: process::cpu_s("self", true).unwrap_or(0.0) }
    }
}

/// One line of progress.
fn done(what: &str, begun: Begun) {
    let Begun { at, used_s } = Begun::now();
    println!("{what} ({:.0} s, {:.0} s of a core)", (at - begun.at).as_secs_f64(), used_s - begun.used_s);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_taken_as_it_stands() {
        let json = r#"{"a":[1.50,{"b":"],}\""}],"c":2,"findings":[]}"#;
        assert_eq!(field(json, "a").unwrap(), r#"[1.50,{"b":"],}\""}]"#);
        assert_eq!(field(json, "c").unwrap(), "2");
        assert_eq!(field(json, "findings").unwrap(), "[]");
        assert!(field(json, "d").is_err());
    }
}
