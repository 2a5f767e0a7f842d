//! Scripts for the Python packages the toolbox is held against.

use std::path::Path;
use std::process::Command;

const SCANSIDE: &str = env!("CARGO_BIN_EXE_scanside");

/// Runs a script with the program, a folder and its own arguments; false when there is no Python to run it.
pub fn python(script: &str, folder: &Path) -> bool {
    let Some(python) = std::env::var_os("SCANSIDE_PYTHON") else {
        println!("skipped: SCANSIDE_PYTHON names no Python with the peers");
        return false;
    };
    let imports = Command::new(&python).args(["-c", "import pydicom, SimpleITK, nibabel, numpy, scipy, skimage"]).output();
    if !imports.is_ok_and(|output| output.status.success()) {
        println!("skipped: pydicom, SimpleITK, nibabel, scipy or scikit-image is not installed");
        return false;
    }
    let output = Command::new(&python)
        .args(["-c", &format!("{PRELUDE}\n{script}"), SCANSIDE])
        .arg(folder)
        .output()
        .expect("Python starts");
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
    assert!(output.status.success(), "{}\n{}", text[0], text[1]);
    println!("{}", text[0]);
    true
}

const PRELUDE: &str = r#"
import glob, json, os, subprocess, sys, warnings
import nibabel, numpy, pydicom, SimpleITK
warnings.simplefilter("ignore")
SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
program, folder = sys.argv[1:3]

def convert(source, name, *more):
    target = os.path.join(folder, name)
    if os.path.exists(target): os.remove(target)
    done = subprocess.run([program, "convert", source, target, *more], capture_output=True, text=True)
    return (target if done.returncode == 0 else None), done

def voxels(path):
    image = nibabel.load(path)
    data = image.get_fdata()
    return image, numpy.transpose(data, tuple(range(data.ndim))[::-1])

def same_places(image, itk, tolerance=1e-4):
    size = itk.GetSize()
    for corner in [(0, 0, 0), (size[0] - 1, 0, 0), (0, size[1] - 1, 0), (0, 0, size[2] - 1), tuple(n - 1 for n in size)]:
        theirs = numpy.array(itk.TransformIndexToPhysicalPoint(corner))
        ours = (image.affine @ [*corner, 1])[:3] * [-1, -1, 1]
        assert numpy.abs(theirs - ours).max() < tolerance, (corner, theirs, ours)
"#;
