//! The unit and kernel tests of the cross-built binaries, processor by processor, under QEMU's user mode.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::done;
use crate::{Outcome, cross};

/// A target, its emulator, and processors that differ in what the kernels ask for: without dot products, with them, and
/// with matrix products.
const TARGETS: &[(&str, &str, &[&str])] = &[
    ("aarch64-unknown-linux-gnu", "qemu-aarch64-static", &["cortex-a72", "cortex-a76", "max"]),
    ("armv7-unknown-linux-gnueabihf", "qemu-arm-static", &["cortex-a7", "cortex-a15", "max"]),
];

/// What is run: everything where the processor decides the way (kernels, networks), and what must not depend on it
/// (geometry, the wire, the order of float operations). Tests of whole studies take too long emulated; the whole machine runs one.
const CHOSEN: &[&str] = &["infer::", "geometry::", "pool::", "volume::", "report::wire", "imaging::resample", "imaging::smooth"];

/// Builds and runs the tests of every target that can be built, or of `only` one.
pub fn test(root: &Path, only: Option<&str>) -> Outcome {
    let mut ran = 0;
    for (target, emulator, processors) in TARGETS.iter().filter(|(target, ..)| only.is_none_or(|only| only == *target)) {
        let tests = match cross::test_binaries(root, target) {
            Ok(tests) => tests,
            Err(error) if cross::lacks_std(target) => {
                println!("skipped: {error}");
                continue;
            }
            Err(error) => return Err(error),
        };
        for processor in *processors {
            let begun = Instant::now();
            for test in &tests {
                let mut command = Command::new(emulator);
                command.current_dir(root).args(["-cpu", processor]).arg(&test.path).arg("-q");
                if test.is_library {
                    command.args(CHOSEN);
                }
                let status = command.stdin(Stdio::null()).status().map_err(|e| format!("{emulator}: {e}; `cargo xtask setup`"))?;
                if !status.success() {
                    return Err(format!("{} fails on {processor}", test.path.display()).into());
                }
            }
            done(&format!("{target} on {processor}"), begun);
            ran += 1;
        }
    }
    if ran == 0 { Err("no target can be built; `cargo xtask setup`".into()) } else { Ok(()) }
}
