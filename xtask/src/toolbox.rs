//! `cargo xtask bench toolbox`: the commands against the Python packages they stand beside, in turn.

use std::path::Path;
use std::process::Command;

use crate::Outcome;
use crate::kernels::{python, run};

/// Runs every `xtask/python/toolbox_*.py`, each of which prints a table; `data` is the folder of real images.
pub fn bench(root: &Path, data: &Path, repeat: u32, offsets: u32) -> Outcome {
    if !data.is_dir() {
        return Err(format!("{}: no such folder; --data names the folder of real images", data.display()).into());
    }
    let python = python(root)?;
    run(Command::new(env!("CARGO")).current_dir(root).args(["build", "--release", "--package", "scanside"]))?;
    let mut scripts: Vec<_> = std::fs::read_dir(root.join("xtask/python"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("toolbox_")))
        .collect();
    scripts.sort();
    for script in scripts {
        let (repeat, offsets) = (repeat.to_string(), offsets.to_string());
        let mut command = Command::new(&python);
        command.arg(script).arg(root.join("target/release/scanside")).arg(data);
        run(command.args(["--repeat", &repeat, "--offsets", &offsets]))?;
    }
    Ok(())
}
