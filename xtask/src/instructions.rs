//! `cargo xtask bench instructions`: what each aarch64 kernel needs for a multiply-add, counted where no board is at hand.
//!
//! An emulated processor's times mean nothing, its instructions do: with QEMU's `-icount shift=0` one guest instruction is one
//! guest nanosecond, so the CPU time that `scanside model bench` measures inside the guest is a count of instructions.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::{Compression, write::GzEncoder};
use serde_json::Value;

use crate::image::{self, Cpio};
use crate::kernels::{python, run};
use crate::{Outcome, cross};

/// Small ones: a hundred million multiply-adds take minutes under emulation.
const NETWORKS: [&str; 6] = ["layer-16-16-32", "layer-8-8-32", "point-32-32-32", "unet3-32", "unet2-64", "retina-32"];

/// A processor, and the kernels that are counted on it.
const PROCESSORS: [(&str, &str); 3] = [("cortex-a72", "portable neon"), ("cortex-a76", "sdot"), ("max", "i8mm")];

/// Multiply-adds that one instruction of each kernel does, as its reciprocal, nothing else counted. SMULL and SMLAL do
/// eight, and one SADALP for every four of them adds their sums up.
fn floor(kernel: &str) -> f64 {
    match kernel {
        "neon" => 1.25 / 8.0,
        "sdot" => 1.0 / 16.0,
        "i8mm" => 1.0 / 32.0,
        "float" | "tract" => 1.0 / 4.0,
        _ => 1.0,
    }
}

const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
for word in $(/bin/busybox cat /proc/cmdline); do case $word in kernels=*) kernels=${word#kernels=};; floats=*) floats=${word#floats=};; esac; done
cd /n
for name in *.qdq.onnx; do
    for kernel in $(echo $kernels | /bin/busybox tr , ' '); do SCANSIDE_KERNEL=$kernel /scanside model bench $name --runs 1 --json; done
    if [ $floats = 1 ]; then
        /scanside model bench ${name%.qdq.onnx}.onnx --runs 1 --json
        /scanside model bench ${name%.qdq.onnx}.onnx --runs 1 --json --tract
    fi
done
echo counted everything
/bin/busybox poweroff -f
";

/// Makes networks and binary where they are not given, boots each processor, and prints the table.
pub fn bench(root: &Path, binary: Option<PathBuf>) -> Outcome {
    let networks = root.join("target/networks");
    let missing: Vec<&str> =
        NETWORKS.iter().copied().filter(|name| !networks.join(format!("{name}.qop.onnx")).exists()).collect();
    if !missing.is_empty() {
        run(Command::new(python(root)?).arg(root.join("xtask/python/networks.py")).arg(&networks).args(&missing))?;
    }
    let binary = binary.map_or_else(|| cross::build(root, "aarch64-unknown-linux-gnu"), Ok)?;
    let debian = image::debian(root)?;
    let folder = root.join("target/instructions");
    fs::create_dir_all(&folder)?;
    let initramfs = folder.join("initramfs");
    let mut cpio = Cpio::new(GzEncoder::new(File::create(&initramfs)?, Compression::new(1)));
    for name in ["bin", "dev", "proc", "n"] {
        cpio.add(name, image::FOLDER, (0, 0), &[])?;
    }
    cpio.add("dev/console", image::TERMINAL, (5, 1), &[])?;
    cpio.add("init", image::PROGRAM, (0, 0), INIT.as_bytes())?;
    cpio.add("bin/busybox", image::PROGRAM, (0, 0), &fs::read(&debian.busybox)?)?;
    cpio.add("bin/sh", 0o120_777, (0, 0), b"busybox")?;
    cpio.add("scanside", image::PROGRAM, (0, 0), &fs::read(&binary)?)?;
    for name in NETWORKS {
        for tag in ["", ".qdq"] {
            let file = format!("{name}{tag}.onnx");
            cpio.add(&format!("n/{file}"), image::FILE, (0, 0), &fs::read(networks.join(&file))?)?;
        }
    }
    cpio.end()?.finish()?;

    println!("instructions per multiply-add (least possible), CPU time of one thread under QEMU -icount shift=0");
    println!("{:<16} {:<12} {:<10} {:>12} {:>10} {:>8}  output", "network", "processor", "kernel", "instructions", "each", "least");
    let mut hashes: Vec<(String, String)> = Vec::new();
    for (at, (processor, kernels)) in PROCESSORS.into_iter().enumerate() {
        let words = format!("console=ttyAMA0 quiet panic=1 kernels={} floats={}", kernels.replace(' ', ","), u8::from(at == 0));
        let mut qemu = Command::new("qemu-system-aarch64");
        qemu.args(["-M", "virt", "-cpu", processor, "-smp", "1", "-m", "1G", "-nographic", "-no-reboot", "-net", "none"]);
        qemu.args(["-icount", "shift=0,sleep=off", "-append", &words]);
        qemu.arg("-kernel").arg(&debian.kernel).arg("-initrd").arg(&initramfs);
        let output = qemu.output().map_err(|e| format!("qemu-system-aarch64: {e}; `cargo xtask setup` installs it"))?;
        let console = String::from_utf8_lossy(&output.stdout).into_owned();
        if !console.contains("counted everything") {
            let end: Vec<&str> = console.lines().rev().take(12).collect();
            return Err(format!("{processor}: the guest did not come to its end: {}", end.join(" / ")).into());
        }
        for answer in console.lines().filter_map(|line| serde_json::from_str::<Value>(line.trim()).ok()) {
            let text = |key: &str| answer[key].as_str().unwrap_or_default();
            let quantized = text("file").ends_with(".qdq.onnx");
            let kernel = if quantized || text("kernel") == "tract" { text("kernel") } else { "float" };
            let instructions = answer["cpu_ms_min"].as_f64().unwrap_or_default() * 1e6;
            let each = instructions / answer["macs"].as_f64().unwrap_or(1.0);
            let name = text("file").trim_end_matches(".onnx").trim_end_matches(".qdq").to_owned();
            let hash = text("output_sha256").to_owned();
            if quantized {
                if hashes.iter().any(|(other, first)| *other == name && *first != hash) {
                    return Err(format!("{name}: {kernel} on {processor} gives other bits").into());
                }
                hashes.push((name.clone(), hash.clone()));
            }
            let least = floor(kernel);
            println!("{name:<16} {processor:<12} {kernel:<10} {instructions:>12.0} {each:>10.3} {least:>8.3}  {}", &hash[..8]);
        }
    }
    Ok(())
}
