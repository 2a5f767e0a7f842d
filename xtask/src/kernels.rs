//! `cargo xtask bench kernels`: whole networks in ONNX Runtime, stock tract and scanside, in turn.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Made, Outcome};

/// What the table has when nothing else is asked for.
const NETWORKS: [&str; 9] = [
    "unet3-64",
    "unet3-96",
    "unet3-64-transposed",
    "unet3-96-transposed",
    "retina-64",
    "densenet-32",
    "unet2-256",
    "unet2-512",
    "layer-16-16-64",
];

/// Makes the networks that are not there yet, builds scanside, and prints the table.
pub fn bench(root: &Path, rounds: u32, names: &[String]) -> Outcome {
    let python = python(root)?;
    let networks = root.join("target/networks");
    let names: Vec<&str> = if names.is_empty() { NETWORKS.to_vec() } else { names.iter().map(String::as_str).collect() };
    let missing: Vec<&str> =
        names.iter().copied().filter(|name| !networks.join(format!("{name}.qop.onnx")).exists()).collect();
    let scripts = root.join("xtask/python");
    if !missing.is_empty() {
        run(Command::new(&python).arg(scripts.join("networks.py")).arg(&networks).args(&missing))?;
    }
    run(Command::new(env!("CARGO")).current_dir(root).args(["build", "--release", "--package", "scanside"]))?;
    let binary = root.join("target/release/scanside");
    let rounds = rounds.to_string();
    run(Command::new(&python).arg(scripts.join("compare.py")).arg(binary).arg(networks).arg(rounds).args(names))
}

/// The Python of `SCANSIDE_PYTHON`, or one of our own with what the scripts import.
pub fn python(root: &Path) -> Made<PathBuf> {
    if let Some(python) = std::env::var_os("SCANSIDE_PYTHON") {
        return Ok(python.into());
    }
    let home = root.join("target/python");
    let python = home.join("bin/python");
    if !python.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&home))?;
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "numpy", "onnx", "onnxruntime", "SimpleITK", "scikit-image", "nibabel"]))?;
    }
    Ok(python)
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Outcome {
    let status = command.status().map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}
