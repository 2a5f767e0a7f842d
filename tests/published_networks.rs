//! Networks that others published run from a manifest alone, and say what ONNX Runtime says.
//!
//! Runs where the networks and images lie beside the checkout (`../shared/data`) and `SCANSIDE_PYTHON` has onnxruntime.

use std::path::{Path, PathBuf};
use std::process::Command;

use ndarray::{Array3, s};
use scanside::infer::package::{Package, Trust};
use scanside::infer::tiles::segment;
use scanside::nifti;
use scanside::pool::Pool;
use scanside::volume::{Rescale, Volume};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data")
}

/// A Python with onnxruntime, where there is one and the data is there too.
fn python() -> Option<std::ffi::OsString> {
    if !data().join("models/meshnet").is_dir() {
        println!("skipped: the published networks are not at hand");
        return None;
    }
    let python = std::env::var_os("SCANSIDE_PYTHON");
    let runs = |python: &std::ffi::OsString| {
        Command::new(python).args(["-c", "import onnx, onnxruntime"]).output().is_ok_and(|o| o.status.success())
    };
    let found = python.filter(runs);
    if found.is_none() {
        println!("skipped: SCANSIDE_PYTHON names no Python with onnx and onnxruntime");
    }
    found
}

fn package(name: &str, onnx: &str, folder: &Path) -> Package {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/published").join(name).join("model.toml");
    std::fs::copy(manifest, folder.join("model.toml")).unwrap();
    std::fs::copy(data().join("models").join(onnx), folder.join("model.onnx")).unwrap();
    Package::read(folder, &Trust::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// A part of a NIfTI image, in its own order of voxels.
fn part(path: &str, low: [usize; 3], size: [usize; 3]) -> (Volume, Array3<f32>) {
    let whole = nifti::read(&data().join(path)).unwrap();
    let voxels = whole.to_f32(low[0]..low[0] + size[0]);
    let voxels = voxels.slice(s![.., low[1]..low[1] + size[1], low[2]..low[2] + size[2]]).as_standard_layout().to_owned();
    let corner = whole.affine().kji_to_lps(low.map(|v| v as f64));
    let affine = whole.affine();
    let affine = scanside::geometry::Affine::new(affine.step(0), affine.step(1), affine.step(2), corner).unwrap();
    (Volume::from_array(&voxels, affine, Rescale::IDENTITY).unwrap(), voxels)
}

/// What ONNX Runtime says to `inputs` (32-bit floats), with the input's shape set to `shape`: the number of the largest map.
fn onnx_runtime(python: &std::ffi::OsString, folder: &Path, shape: &[usize], inputs: &[f32]) -> Vec<u8> {
    let bytes: Vec<u8> = inputs.iter().flat_map(|v| v.to_le_bytes()).collect();
    std::fs::write(folder.join("input.bin"), bytes).unwrap();
    let script = r#"
import sys, json, numpy, onnx, onnxruntime
folder, shape = sys.argv[1], json.loads(sys.argv[2])
model = onnx.load(folder + "/model.onnx")
runs = shape.pop(0)
for value in [*model.graph.input, *model.graph.output]:
    for dim, size in zip(value.type.tensor_type.shape.dim[2:], shape[2:]): dim.dim_value = size
del model.graph.value_info[:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(model.SerializeToString(), options)
data = numpy.fromfile(folder + "/input.bin", "<f4").reshape(runs, *shape)
name = session.get_inputs()[0].name
numpy.stack([session.run(None, {name: x})[0][0].argmax(0) for x in data]).astype("u1").tofile(folder + "/labels.bin")
"#;
    let output = Command::new(python).args(["-c", script]).arg(folder).arg(format!("{shape:?}")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(folder.join("labels.bin")).unwrap()
}

/// The part of the voxels whose labels are equal; both maps have more than one label.
fn agreement(ours: &[u8], theirs: &[u8]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    assert!(theirs.iter().any(|v| *v > 0) && theirs.contains(&0), "a map without a border says little");
    ours.iter().zip(theirs).filter(|(a, b)| a == b).count() as f64 / ours.len() as f64
}

/// Tiles with a halo as wide as the network's reach give what the whole image at once gives: no seams.
#[test]
fn meshnet_in_tiles_is_onnx_runtime_on_the_whole_head() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let package = package("meshnet-gwm", "meshnet/model5_gw_ae_128.onnx", folder.path());
    // The file is LIA: what the network calls slices, rows and columns are its i, j and k.
    let (volume, voxels) = part("mr/t1-256.nii.gz", [64, 66, 46], [128, 128, 164]);
    let network = package.network().unwrap();
    let labels = segment(&package.manifest, &network, &[&volume], false, &Pool::new(2), &|_, _| {}).unwrap();
    let (low, high) = voxels.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    let unit: Vec<f32> = voxels.permuted_axes([2, 1, 0]).iter().map(|v| (v - low) / (high - low)).collect();
    let theirs = onnx_runtime(&python, folder.path(), &[1, 1, 1, 164, 128, 128], &unit);
    let ours: Vec<u8> = labels.permuted_axes([2, 1, 0]).iter().copied().collect();
    let same = agreement(&ours, &theirs);
    println!("MeshNet: {:.5} of the labels are equal", same);
    assert!(same >= 0.999, "{same}");
}

#[test]
fn a_tumour_network_of_four_channels_is_onnx_runtime_slice_by_slice() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let package = package("brats-unet2d", "brats-unet2d/brats_unet2d_axial_4x240x240.onnx", folder.path());
    let truth = part("mr/tcga-fg-6692/registered/tumour-labels.nii.gz", [0; 3], [155, 240, 240]).1;
    let tumour = |k: usize| truth.slice(s![k, .., ..]).iter().filter(|v| **v > 0.0).count();
    let middle = (0..155).max_by_key(|k| tumour(*k)).unwrap().clamp(2, 152);
    let slices = 4;
    let parts = ["flair", "t1", "t1c", "t2"]
        .map(|name| part(&format!("mr/tcga-fg-6692/registered/{name}.nii.gz"), [middle - 2, 0, 0], [slices, 240, 240]));
    let volumes: Vec<&Volume> = parts.iter().map(|(volume, _)| volume).collect();
    let network = package.network().unwrap();
    let labels = segment(&package.manifest, &network, &volumes, false, &Pool::new(2), &|_, _| {}).unwrap();
    let mut inputs = Vec::new();
    for k in 0..slices {
        for (_, voxels) in &parts {
            // Rows run along x, columns along y.
            let slice = voxels.slice(s![k, .., ..]).reversed_axes().mapv(f64::from);
            let (mean, deviation) = (slice.mean().unwrap(), slice.std(0.0));
            inputs.extend(slice.iter().map(|v| ((v - mean) / deviation) as f32));
        }
    }
    let theirs = onnx_runtime(&python, folder.path(), &[slices, 1, 4, 240, 240], &inputs);
    let ours: Vec<u8> = labels.permuted_axes([0, 2, 1]).iter().copied().collect();
    let same = agreement(&ours, &theirs);
    let (mut both, mut sum) = (0, 0);
    for ((k, j, i), label) in ndarray::Array3::from_shape_vec((slices, 240, 240), ours).unwrap().indexed_iter() {
        let (a, b) = (*label > 0, truth[[middle - 2 + k, i, j]] > 0.0);
        both += usize::from(a && b);
        sum += usize::from(a) + usize::from(b);
    }
    let dice = 2.0 * both as f64 / sum as f64;
    println!("tumour U-Net: {same:.5} of the labels are equal; whole tumour Dice {dice:.3} in {slices} slices");
    assert!(same >= 0.999, "{same}");
    // The truth is a fusion of algorithms: enough to see that sides, channels and scaling are not mixed up.
    assert!(dice > 0.6, "{dice}");
}
