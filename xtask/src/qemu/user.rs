//! The cross-built binaries, processor by processor, under QEMU's user mode: the library's tests, and the program itself.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::system::compare;
use super::{Begun, done, phantom};
use crate::image::run;
use crate::{Made, Outcome, cross};

/// A target, its emulator, and processors that differ in what the kernels ask for: without dot products, with them, and
/// with matrix products.
const TARGETS: &[(&str, &str, &[&str])] = &[
    ("aarch64-unknown-linux-gnu", "qemu-aarch64-static", &["cortex-a72", "cortex-a76", "max"]),
    ("armv7-unknown-linux-gnueabihf", "qemu-arm-static", &["cortex-a7", "cortex-a15", "max"]),
];

/// What is run: everything where the processor decides the way (kernels, networks), and what must not depend on it
/// (geometry, the wire, the order of float operations). Tests of whole studies take too long emulated; the program itself
/// reads one.
const CHOSEN: &[&str] = &["infer::", "geometry::", "pool::", "volume::", "report::wire", "imaging::resample", "imaging::smooth"];

/// Builds and runs the tests and the program of every target that can be built, or of `only` one.
pub fn test(root: &Path, host: &Path, folder: &Path, only: Option<&str>) -> Outcome {
    let wanted: Vec<&str> =
        TARGETS.iter().map(|(target, ..)| *target).filter(|target| only.is_none_or(|only| only == *target)).collect();
    let targets = cross::ready(&wanted)?;
    let programs = cross::programs(root, &targets)?;
    let tests = cross::test_programs(root, &targets)?;
    let study = Study::new(host, folder)?;
    for (target, emulator, processors) in TARGETS.iter().filter(|(target, ..)| targets.contains(target)) {
        let of = |built: &[(&str, PathBuf)]| built.iter().find(|(t, _)| t == target).expect("it was built").1.clone();
        let (program, tests) = (of(&programs), of(&tests));
        for (n, processor) in processors.iter().enumerate() {
            let begun = Begun::now();
            let emulated = |path: &Path| {
                let mut command = Command::new(emulator);
                command.current_dir(root).args(["-cpu", processor]).arg(path).stdin(Stdio::null());
                command
            };
            run(emulated(&tests).arg("-q").args(CHOSEN)).map_err(|e| format!("the tests on {processor}: {e}"))?;
            check_models(root, || emulated(&program)).map_err(|e| format!("the program on {processor}: {e}"))?;
            done(&format!("{target} on {processor}: the library's tests, the models' golden outputs"), begun);
            // Minutes each: the parts of it that ask for the processor were tested on all of them.
            if n == 0 {
                let begun = Begun::now();
                compare(&study.report, &study.analyze(&mut emulated(&program), &root.join("models"))?)
                    .map_err(|e| format!("the program on {processor}: {e}"))?;
                done(&format!("{target} on {processor}: the program analyses a study"), begun);
            }
        }
    }
    Ok(())
}

/// Every package gives its golden output.
fn check_models(root: &Path, program: impl Fn() -> Command) -> Outcome {
    run(program().arg("--version").stdout(Stdio::null()))?;
    for (name, _) in crate::dist::root::models(root)? {
        let package = root.join("models").join(&name);
        run(program().args(["model", "check"]).arg(package).stdout(Stdio::null())).map_err(|e| format!("model check {name}: {e}"))?;
    }
    Ok(())
}

/// A small chest CT, and what this machine finds in it.
struct Study {
    images: PathBuf,
    out: PathBuf,
    report: String,
}

impl Study {
    fn new(host: &Path, folder: &Path) -> Made<Self> {
        let images = phantom(host, folder, "user", 5, 24, 96)?;
        let mut study = Self { images, out: folder.join("user"), report: String::new() };
        study.report = study.analyze(&mut Command::new(host), &crate::root().join("models"))?;
        Ok(study)
    }

    fn analyze(&self, program: &mut Command, models: &Path) -> Made<String> {
        program.arg("analyze").arg(&self.images).arg("--out").arg(&self.out).arg("--models").arg(models).arg("--json");
        let output = program.output()?;
        if !output.status.success() {
            return Err(format!("analyze: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}
