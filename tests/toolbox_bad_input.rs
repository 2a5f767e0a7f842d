//! What the toolbox does with files that lie, numbers that are none, and questions without an answer: a sentence that names
//! the file and the field, or a choice that is said; never a wrong answer.

#[path = "support/toolbox.rs"]
mod toolbox;

use std::io::Write;
use std::path::Path;

use ndarray::Array3;
use scanside::geometry::Affine;
use scanside::nifti;
use scanside::volume::{Rescale, Volume};
use toolbox::{grid, json, refusal, scanside, write};

/// A ball of 100 in a NIfTI of 16-bit voxels.
fn ball(folder: &Path) -> String {
    write(folder, "ball.nii", grid([12, 20, 22], [2.0, 1.0, 1.0], [-11.0, -10.0, -12.0]), |p| {
        if p.iter().map(|v| v * v).sum::<f64>() < 50.0 { 100.0 } else { 0.0 }
    })
}

/// The same file with other bytes somewhere, under another name.
fn patched(folder: &Path, from: &str, name: &str, at: usize, bytes: &[u8]) -> String {
    let mut file = std::fs::read(from).unwrap();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    let path = folder.join(name);
    std::fs::write(&path, file).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A NIfTI of 32-bit floats.
fn floats(folder: &Path, name: &str, value: impl Fn(usize, usize, usize) -> f32) -> String {
    let g = grid([12, 20, 22], [2.0, 1.0, 1.0], [-11.0, -10.0, -12.0]);
    let voxels = Array3::from_shape_fn((12, 20, 22), |(k, j, i)| value(k, j, i));
    let path = folder.join(name);
    nifti::write(&path, &Volume::from_array(&voxels, g.affine, Rescale::IDENTITY).unwrap(), None).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Every command that opens one image, with what it needs beside it.
fn readers<'a>(image: &'a str, out: &'a str, surface: &'a str, picture: &'a str) -> Vec<Vec<&'a str>> {
    vec![
        vec!["info", image],
        vec!["convert", image, out],
        vec!["preview", image, "--out", picture],
        vec!["resample", image, out, "--spacing", "1"],
        vec!["smooth", image, out, "--gaussian", "1"],
        vec!["threshold", image, out, "--lower", "50"],
        vec!["morphology", "dilate", image, out],
        vec!["components", image],
        vec!["crop", image, out, "--box", "0:5,0:5,0:5"],
        vec!["stats", image],
        vec!["blobs", image],
        vec!["mesh", image, "--level", "50", "--out", surface],
        vec!["register", "--fixed", image, "--moving", image, "--out", out],
        vec!["timeseries", "normalize", image, out],
    ]
}

#[test]
fn a_header_that_lies_is_refused_by_every_command_with_the_file_and_the_field() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, good) = (folder.path(), ball(folder.path()));
    let out = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (nii, stl, png) = (out("out.nii.gz"), out("out.stl"), out("out.png"));
    let lies: [(&str, usize, &[u8], &str); 7] = [
        ("larger.nii", 42, &30_000i16.to_le_bytes(), "dim"),
        ("negative.nii", 44, &(-3i16).to_le_bytes(), "dim"),
        ("dimensions.nii", 40, &9i16.to_le_bytes(), "dim"),
        ("colour.nii", 70, &128i16.to_le_bytes(), "datatype"),
        ("offset.nii", 108, &1e9f32.to_le_bytes(), "vox_offset"),
        ("flat.nii", 280, &[0; 16], "srow"),
        ("magic.nii", 344, b"nope", "magic"),
    ];
    for (name, at, bytes, field) in lies {
        let bad = patched(dir, &good, name, at, bytes);
        for command in readers(&bad, &nii, &stl, &png) {
            let said = refusal(&command);
            assert!(said.contains(name) && said.contains(&format!("field {field}")), "{command:?}: {said}");
        }
    }
    // Without forms the distances are all there is; none of them may be 0.
    let formless = patched(dir, &good, "formless.nii", 252, &[0; 4]);
    let zero = patched(dir, &formless, "zero.nii", 80, &0f32.to_le_bytes());
    let said = refusal(&["convert", &zero, &nii]);
    assert!(said.contains("zero.nii") && said.contains("field pixdim"), "{said}");
    for path in [nii, stl, png] {
        assert!(!Path::new(&path).exists(), "{path}: a command that refuses leaves no file");
    }
}

#[test]
fn every_help_teaches_and_an_output_that_cannot_be_written_is_not_made_a_folder() {
    for (command, example) in [("threshold", "--otsu --json"), ("phantom", "scanside analyze"), ("analyze", "Exit code 0")] {
        let help = String::from_utf8(scanside(&[command, "--help"]).stdout).unwrap();
        assert!(help.contains(example), "{help}");
    }
    let folder = tempfile::tempdir().unwrap();
    let image = ball(folder.path());
    for name in ["out.nrrd", "out.mha", "out.png", "out.dcm"] {
        let out = folder.path().join(name);
        let output = scanside(&["convert", &image, out.to_str().unwrap()]);
        assert!(output.status.code() == Some(2) && !out.exists(), "{name}");
    }
    let output = scanside(&["analyze", &image, "--out", folder.path().to_str().unwrap(), "--models", "/no/such/folder"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_gzip_bomb_costs_no_more_than_its_header_says() {
    let folder = tempfile::tempdir().unwrap();
    let good = ball(folder.path());
    let out = folder.path().join("out.nii");
    let bomb = |name: &str, header: &str, zeros: usize| {
        let path = folder.path().join(name);
        let mut gz = flate2::write::GzEncoder::new(std::fs::File::create(&path).unwrap(), flate2::Compression::fast());
        gz.write_all(&std::fs::read(header).unwrap()).unwrap();
        let block = vec![0; 1 << 20];
        (0..zeros).for_each(|_| gz.write_all(&block).unwrap());
        gz.finish().unwrap();
        path.to_str().unwrap().to_owned()
    };
    // 256 MiB behind an honest header are never inflated.
    let long = bomb("long.nii.gz", &good, 256);
    let output = scanside(&["convert", &long, out.to_str().unwrap()]);
    assert!(output.status.success());
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&good).unwrap());
    // A header of 30,000 slices before a few bytes.
    let header = patched(folder.path(), &good, "header.nii", 46, &30_000i16.to_le_bytes());
    let short = bomb("short.nii.gz", &header, 0);
    let said = refusal(&["convert", &short, out.to_str().unwrap()]);
    assert!(said.contains("short.nii.gz") && said.contains("field dim"), "{said}");
    // One that deflate could just hold, but that is not there.
    let header = patched(folder.path(), &good, "header.nii", 46, &40i16.to_le_bytes());
    let cut = bomb("cut.nii.gz", &header, 0);
    let said = refusal(&["convert", &cut, out.to_str().unwrap()]);
    assert!(said.contains("cut.nii.gz"), "{said}");
}

#[test]
fn forms_that_disagree_are_told_and_the_sform_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let good = ball(folder.path());
    // The quaternion's offset 40 mm to the right of the sform's.
    let two = patched(folder.path(), &good, "two.nii", 268, &52.0f32.to_le_bytes());
    let told = json(&["info", &two, "--json"]);
    assert_eq!((&told["forms_disagree"], &told["affine_from"]), (&true.into(), &"sform".into()));
    let out = folder.path().join("out.nii");
    let output = scanside(&["convert", &two, out.to_str().unwrap()]);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("sform and qform disagree; the sform is taken"));
    let again = json(&["info", out.to_str().unwrap(), "--json"]);
    assert_eq!((&again["forms_disagree"], &again["affine_lps"]), (&false.into(), &told["affine_lps"]));
}

#[test]
fn nan_is_outside_of_masks_counted_in_numbers_and_refused_by_a_registration() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let out = dir.join("out.nii.gz").to_str().unwrap().to_owned();
    let holed = floats(dir, "holed.nii", |k, j, i| if (k, j, i) == (5, 9, 9) { f32::NAN } else { (k + j + i) as f32 });
    assert_eq!(json(&["threshold", &holed, &out, "--lower=-1000", "--json"])["voxels"], 12 * 20 * 22 - 1);
    let stats = json(&["stats", &holed, "--json"]);
    assert_eq!((&stats["statistics"][0]["not_finite"], &stats["statistics"][0]["max"]), (&1.into(), &51.0.into()));
    let alone = floats(dir, "alone.nii", |k, j, i| if (k, j, i) == (5, 9, 9) { f32::NAN } else { 0.0 });
    assert_eq!(json(&["components", &alone, "--json"])["found"], 0);
    let surface = dir.join("s.stl").to_str().unwrap().to_owned();
    assert_eq!(json(&["mesh", &holed, "--level", "20.5", "--out", &surface, "--json"])["nan_voxels"], 1);
    let said = refusal(&["register", "--fixed", &holed, "--moving", &holed, "--out", &out]);
    assert!(said.contains("holed.nii") && said.contains("[5, 9, 9]"), "{said}");
    let said = refusal(&["stats", &holed, "--labels", &holed]);
    assert!(said.contains("holed.nii") && said.contains("no label"), "{said}");
    let infinite = floats(dir, "infinite.nii", |k, _, _| if k == 3 { f32::INFINITY } else { k as f32 });
    assert!(refusal(&["threshold", &infinite, &out, "--otsu"]).contains("infinite.nii"));
}

#[test]
fn two_dimensions_do_where_they_can_and_are_refused_where_they_cannot() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let out = dir.join("out.nii.gz").to_str().unwrap().to_owned();
    let spot = |p: [f64; 3]| 200.0 * (-(p[0] * p[0] + p[1] * p[1]) / 18.0).exp();
    let flat = write(dir, "flat.nii", grid([1, 40, 40], [1.0; 3], [-20.0, -20.0, 0.0]), spot);
    let blobs = json(&["blobs", &flat, "--min-sigma", "2", "--max-sigma", "5", "--threshold", "20", "--json"]);
    assert_eq!(blobs["count"], 1);
    assert_eq!(blobs["blobs"][0]["peak_voxel"], serde_json::json!([0, 20, 20]));
    for command in [
        vec!["smooth", &flat, &out, "--gaussian", "2"],
        vec!["smooth", &flat, &out, "--median", "1"],
        vec!["smooth", &flat, &out, "--curvature", "2"],
        vec!["resample", &flat, &out, "--spacing", "0.5"],
        vec!["threshold", &flat, &out, "--otsu"],
        vec!["morphology", "close", &flat, &out],
        vec!["components", &flat, "--connectivity", "8"],
    ] {
        let output = scanside(&command);
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let surface = dir.join("s.stl").to_str().unwrap().to_owned();
    for command in [
        vec!["mesh", &flat, "--level", "50", "--out", &surface],
        vec!["register", "--fixed", &flat, "--moving", &flat, "--out", &out],
    ] {
        let said = refusal(&command);
        assert!(said.contains("flat.nii") && said.contains("3-D"), "{command:?}: {said}");
    }
    let said = refusal(&["timeseries", "normalize", &flat, &out]);
    assert!(said.contains("flat.nii") && said.contains("field dim"), "{said}");
}

#[test]
fn a_label_that_is_not_there_is_refused_with_those_that_are() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let out = dir.join("out.nii.gz").to_str().unwrap().to_owned();
    let surface = dir.join("s.stl").to_str().unwrap().to_owned();
    let labels = write(dir, "labels.nii", grid([6, 20, 20], [1.0; 3], [0.0; 3]), |p| if p[0] < 9.0 { 3.0 } else { 0.0 });
    for command in [
        vec!["mesh", &labels, "--labels", "7", "--out", &surface],
        vec!["morphology", "dilate", &labels, &out, "--label", "7"],
        vec!["components", &labels, "--label", "7"],
        vec!["crop", &labels, &out, "--mask", &labels, "--label", "7"],
    ] {
        let said = refusal(&command);
        assert!(said.contains("labels.nii") && said.contains("label 7 does not occur; it has 0, 3"), "{command:?}: {said}");
    }
    let fractions = floats(dir, "fractions.nii", |k, _, _| k as f32 / 2.0);
    assert!(refusal(&["stats", &labels, "--labels", &fractions]).contains("not on the grid"));
    assert!(refusal(&["stats", &fractions, "--labels", &fractions]).contains("0.5 is no label"));
    assert!(refusal(&["morphology", "erode", &fractions, &out, "--label", "1"]).contains("not a label map"));
    assert!(refusal(&["preview", &labels, "--labels", &fractions, "--out", "p.png"]).contains("not a label map"));
}

#[test]
fn grids_and_images_that_cannot_meet_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let out = dir.join("out.nii.gz").to_str().unwrap().to_owned();
    let good = ball(dir);
    assert!(refusal(&["resample", &good, &out, "--spacing", "0"]).contains("spacing"));
    assert!(refusal(&["resample", &good, &out, "--spacing", "nan"]).contains("spacing"));
    assert!(refusal(&["resample", &good, &out, "--spacing", "0.00001"]).contains("larger than"));
    assert!(refusal(&["smooth", &good, &out, "--gaussian=-1"]).contains("sigma"));
    let far = write(dir, "far.nii", grid([12, 20, 22], [2.0, 1.0, 1.0], [9000.0, 0.0, 0.0]), |p| p[1] + p[2]);
    let said = refusal(&["register", "--fixed", &good, "--moving", &far, "--out", &out, "--init", "patient-space"]);
    assert!(said.contains("far.nii") && said.contains("do not overlap"), "{said}");
    let flat = write(dir, "one-value.nii", grid([12, 20, 22], [2.0, 1.0, 1.0], [-11.0, -10.0, -12.0]), |_| 7.0);
    assert!(refusal(&["register", "--fixed", &good, "--moving", &flat, "--out", &out]).contains("one-value.nii"));
    assert!(refusal(&["register", "--fixed", &good, "--moving", &good, "--out", &out, "--fixed-mask", &far]).contains("not on the grid"));
    assert!(Affine::new([1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0; 3]).is_err());
    assert!(!Path::new(&out).exists());
}
