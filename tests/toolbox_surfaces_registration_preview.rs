//! `scanside mesh`, `register` and `preview` from the outside: files in, files and JSON out, failures said.

#[path = "support/toolbox.rs"]
mod toolbox;

use std::path::{Path, PathBuf};

use scanside::nifti;
use toolbox::{grid, json, refusal, scanside, write};

fn within(folder: &Path, name: &str) -> (PathBuf, String) {
    let path = folder.join(name);
    (path.clone(), path.to_str().unwrap().to_owned())
}

fn distance(p: [f64; 3], c: [f64; 3]) -> f64 {
    p.iter().zip(c).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn a_ball_becomes_a_surface_of_its_size_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let g = grid([30, 50, 60], [2.0, 1.0, 1.0], [-30.0, -25.0, -30.0]);
    let ball = write(folder.path(), "ball.nii.gz", g, |p| 100.0 * (15.0 - distance(p, [2.0, -1.0, 1.0])));
    let volume = 4.0 / 3.0 * std::f64::consts::PI * 15f64.powi(3);
    for extension in ["stl", "ply", "obj", "glb", "gltf"] {
        let (path, out) = within(folder.path(), &format!("s.{extension}"));
        let said = json(&["mesh", &ball, "--level", "0", "--out", &out, "--json", "--threads", "2"]);
        assert!((said["volume_mm3"].as_f64().unwrap() / volume - 1.0).abs() < 0.01, "{said}");
        assert!(path.metadata().unwrap().len() > 10_000);
    }
    let (stl, out) = within(folder.path(), "s.stl");
    let (png, picture) = within(folder.path(), "s.png");
    let said = json(&["mesh", &ball, "--level", "0", "--out", &out, "--png", &picture, "--view", "30,20", "--json"]);
    let bytes = std::fs::read(stl).unwrap();
    assert_eq!(bytes.len() as u64, 84 + 50 * said["triangles"].as_u64().unwrap());
    assert!(std::fs::read(png).unwrap().starts_with(b"\x89PNG"));
    let smaller = json(&["mesh", &ball, "--level", "0", "--out", &out, "--smooth", "5", "--decimate", "0.2", "--json"]);
    assert!(smaller["triangles"].as_f64().unwrap() <= 0.2 * said["triangles"].as_f64().unwrap());
    assert!((smaller["volume_mm3"].as_f64().unwrap() / volume - 1.0).abs() < 0.02);
}

#[test]
fn a_surface_that_is_not_there_is_said_and_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let labels = write(folder.path(), "labels.nii", grid([6, 20, 20], [1.0; 3], [0.0; 3]), |p| if p[0] < 9.0 { 3.0 } else { 0.0 });
    let flat = write(folder.path(), "flat.nii", grid([1, 20, 20], [1.0; 3], [0.0; 3]), |p| p[0]);
    let (path, out) = within(folder.path(), "s.stl");
    assert!(refusal(&["mesh", &labels, "--labels", "7", "--out", &out]).contains("label 7 does not occur; it has 0, 3"));
    assert!(refusal(&["mesh", &labels, "--level", "50", "--out", &out]).contains("no voxel crosses 50"));
    assert!(refusal(&["mesh", &flat, "--level", "5", "--out", &out]).contains("3-D"));
    assert!(refusal(&["mesh", &labels, "--level", "1", "--out", "s.xyz"]).contains("extension"));
    assert!(!path.exists());
    assert_eq!(json(&["mesh", &labels, "--labels", "3", "--cap", "--out", &out, "--json"])["nan_voxels"], 0);
}

/// A head with a nose and a lump on one side.
fn head(p: [f64; 3]) -> f64 {
    let part = |c: [f64; 3], r: f64, v: f64| v / (1.0 + (distance(p, c) - r).min(40.0).exp());
    part([0.0; 3], 30.0, 400.0) + part([0.0, -30.0, 4.0], 8.0, 300.0) + part([16.0, 6.0, 10.0], 8.0, -250.0)
        + part([-10.0, 12.0, -10.0], 7.0, 350.0)
}

#[test]
fn a_shifted_head_is_laid_back_and_the_transform_says_how() {
    let folder = tempfile::tempdir().unwrap();
    let fixed = write(folder.path(), "fixed.nii", grid([24, 42, 44], [3.5, 2.0, 2.0], [-43.0, -41.0, -40.0]), head);
    let shift = [5.0, -4.0, 6.0];
    let g = grid([26, 46, 46], [3.5, 2.0, 2.0], [-40.0, -48.0, -38.0]);
    let moving = write(folder.path(), "moving.nii.gz", g, |p| head([p[0] - shift[0], p[1] - shift[1], p[2] - shift[2]]));
    let (laid, out) = within(folder.path(), "out.nii.gz");
    let (tfm_path, tfm) = within(folder.path(), "t.tfm");
    let (plot_path, plot) = within(folder.path(), "plot.png");
    let base = ["register", "--fixed", &fixed, "--moving", &moving, "--out", &out, "--json"];
    let said = json(&[&base[..], &["--save-transform", &tfm, "--plot", &plot, "--bins", "32"]].concat());
    let matrix: Vec<f64> = said["matrix"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    for (r, s) in shift.iter().enumerate() {
        assert!((matrix[4 * r + 3] - s).abs() < 0.5, "{said}");
        assert!((matrix[4 * r + r] - 1.0).abs() < 0.005);
    }
    assert_eq!(said["parameters"].as_array().unwrap().len(), 6);
    assert!(std::fs::read_to_string(tfm_path).unwrap().contains("Transform: Euler3DTransform_double_3_3"));
    assert!(std::fs::read(plot_path).unwrap().starts_with(b"\x89PNG"));
    let laid = nifti::read(&laid).unwrap();
    let onto = nifti::read(Path::new(&fixed)).unwrap();
    assert_eq!(laid.shape(), onto.shape());
    let middle = laid.to_f32(0..24)[[12, 20, 20]] - onto.to_f32(0..24)[[12, 20, 20]];
    assert!(middle.abs() < 20.0);
    let one = json(&[&base[..], &["--sampling", "random", "--fraction", "0.3", "--threads", "1"]].concat());
    assert_eq!(one, json(&[&base[..], &["--sampling", "random", "--fraction", "0.3", "--threads", "8"]].concat()));
    let flat = write(folder.path(), "flat.nii", grid([1, 20, 20], [1.0; 3], [0.0; 3]), |p| p[0]);
    assert!(refusal(&["register", "--fixed", &fixed, "--moving", &flat, "--out", &out]).contains("3-D"));
    let far = write(folder.path(), "far.nii", grid([24, 42, 44], [3.5, 2.0, 2.0], [9000.0, 0.0, 0.0]), |p| p[0] / 9.0);
    let apart = ["register", "--fixed", &fixed, "--moving", &far, "--out", &out, "--init", "patient-space"];
    assert!(refusal(&apart).contains("do not overlap"));
}

#[test]
fn a_preview_shows_planes_labels_and_findings() {
    let folder = tempfile::tempdir().unwrap();
    let g = grid([20, 60, 50], [3.0, 1.0, 1.0], [-25.0, -30.0, -30.0]);
    let image = write(folder.path(), "head.nii", g, head);
    let labels = write(folder.path(), "labels.nii.gz", g, |p| f64::from(distance(p, [10.0, 0.0, 0.0]) < 9.0));
    let report = folder.path().join("findings.json");
    let finding = r#"{"findings": [{"id": 1, "tracking_uid": "1.2.3", "kind": "nodule", "confidence": 0.9,
        "centroid_lps_mm": [10.0, 0.0, 0.0], "centroid_voxel": [10, 30, 35], "long_axis_mm": 18.0, "short_axis_mm": 17.0,
        "mean_diameter_mm": 17.5, "volume_mm3": 3000.0, "site": {"organ": "brain"}}]}"#;
    std::fs::write(&report, finding).unwrap();
    let (png, out) = within(folder.path(), "p.png");
    let draw = |more: &[&str]| {
        let output = scanside(&[&["preview", &image, "--out", &out][..], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(&png).unwrap()
    };
    let plain = draw(&[]);
    assert!(plain.starts_with(b"\x89PNG"));
    assert_ne!(draw(&["--labels", &labels, "--findings", report.to_str().unwrap()]), plain);
    draw(&["--plane", "coronal", "--slice", "3", "--window", "0,400", "--title", "a head"]);
    draw(&["--montage", "12"]);
    let blocks = scanside(&["preview", &image, "--terminal"]);
    assert!(blocks.status.success() && String::from_utf8(blocks.stdout).unwrap().contains('\u{2580}'));
    assert!(refusal(&["preview", &image, "--out", &out, "--slice", "20"]).contains("20 slices, numbered from 0"));
    assert!(refusal(&["preview", &image, "--out", &out, "--window", "5,5"]).contains("LOW must be below HIGH"));
}
