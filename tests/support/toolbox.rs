//! The program from the outside: files in, files and JSON out, failures said.

use std::path::Path;
use std::process::{Command, Output};

use ndarray::Array3;
use scanside::geometry::{Affine, Grid, Spacing};
use scanside::nifti;
use scanside::volume::{Rescale, Volume};
use serde_json::Value;

/// Runs the program.
pub fn scanside(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_scanside")).args(arguments).output().expect("the binary runs")
}

/// What it says with `--json`.
pub fn json(arguments: &[&str]) -> Value {
    let output = scanside(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// What it says when it refuses.
pub fn refusal(arguments: &[&str]) -> String {
    let output = scanside(arguments);
    assert!(matches!(output.status.code(), Some(1 | 2)), "it must fail, and not by a panic");
    String::from_utf8(output.stderr).unwrap()
}

/// An axial grid.
pub fn grid(shape: [usize; 3], spacing: [f64; 3], origin: [f64; 3]) -> Grid {
    Grid { shape, affine: Affine::axial(Spacing::new(spacing).unwrap(), origin) }
}

/// Writes a function of place (LPS) as 16-bit NIfTI.
pub fn write(folder: &Path, name: &str, grid: Grid, value: impl Fn([f64; 3]) -> f64) -> String {
    let [z, y, x] = grid.shape;
    let voxels = Array3::from_shape_fn((z, y, x), |(k, j, i)| {
        value(grid.affine.kji_to_lps([k as f64, j as f64, i as f64])).round() as i16
    });
    let path = folder.join(name);
    nifti::write(&path, &Volume::from_array(&voxels, grid.affine, Rescale::IDENTITY).unwrap(), None).unwrap();
    path.to_str().unwrap().to_owned()
}
