//! What is read and converted here is what pydicom, SimpleITK and nibabel read: values to the bit, places to 1e-4 mm.
//!
//! Runs where `SCANSIDE_PYTHON` names a Python that has them (`.ci/run` makes one).

#[path = "support/peers.rs"]
mod peers;

use std::path::Path;

use peers::python;

use scanside::dicom::build::{SeriesTemplate, SliceTemplate};
use scanside::dicom::{Codec, TransferSyntax, decodable_transfer_syntaxes};
use scanside::geometry::Plane;
use scanside::study::{Modality, Uid};
use scanside::volume::{Rescale, VoxelType};

#[test]
fn odd_dicom_files_get_their_pixels_or_a_sentence() {
    let folder = tempfile::tempdir().expect("a folder");
    python(
        r#"
compared = refused = 0
root = os.path.join(os.path.dirname(pydicom.__file__), "data", "test_files")
for path in sorted(glob.glob(root + "/*") + glob.glob(root + "/dicomdirtests/**", recursive=True)):
    name = os.path.basename(path)
    told = subprocess.run([program, "info", path, "--json"], capture_output=True, text=True)
    assert told.returncode in (0, 1), (name, told)
    assert "panicked" not in told.stderr, (name, told.stderr)
    if os.path.isdir(path): continue
    target, done = convert(path, "odd.nii")
    assert done.returncode in (0, 1) and "panicked" not in done.stderr, (name, done)
    if target is None:
        assert name in done.stderr, (name, done.stderr)
        refused += 1
        continue
    image, ours = voxels(target)
    data = pydicom.dcmread(path, force=True)
    try:
        theirs = pydicom.pixels.pixel_array(path).astype(float)
    except Exception:
        try: theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)).astype(float)
        except Exception: continue
        data.RescaleSlope, data.RescaleIntercept = 1, 0
    if data.PhotometricInterpretation == "PALETTE COLOR":
        theirs = pydicom.pixels.apply_color_lut(pydicom.pixels.pixel_array(path), data)
        if theirs.dtype == numpy.uint16: theirs = theirs >> 8
    if theirs.shape[-1] == 3:
        theirs = numpy.round(theirs.astype(float) @ [.299, .587, .114])
    else:
        theirs = theirs * float(getattr(data, "RescaleSlope", 1)) + float(getattr(data, "RescaleIntercept", 0))
    assert theirs.size == ours.size, (name, theirs.shape, ours.shape)
    apart = numpy.abs(theirs.reshape(ours.shape) - ours).max()
    # Rounding of colour to grey, and two JPEG decoders, may differ by one; NIfTI-1 keeps a slope in 24 bits.
    allowed = 1 if data.get("SamplesPerPixel", 1) == 3 or "JPEG" in name or "JPG" in name else 1e-7 * numpy.abs(theirs).max()
    if not name.startswith("SC_rgb_jpeg.dcm"): assert apart <= allowed, (name, apart)
    compared += 1
print(compared, "compared,", refused, "refused")
assert compared > 40
"#,
        folder.path(),
    );
}

#[test]
fn odd_nifti_files_are_what_nibabel_reads() {
    let folder = tempfile::tempdir().expect("a folder");
    python(
        r#"
root = os.path.join(os.path.dirname(nibabel.__file__), "tests", "data")
paths = sorted(glob.glob(root + "/*.nii") + glob.glob(root + "/*.nii.gz"))
random = numpy.random.default_rng(0)
affine = numpy.array([[.5, .1, 0, -10], [-.1, .6, .2, 20], [0, -.2, 2, 30], [0, 0, 0, 1]])
for kind in ["<i2", ">i2", ">f4", ">f8", "<u4", ">i8", "<u8", "|u1", "|i1", ">u2"]:
    for maker in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        header = maker.header_class(endianness=">" if kind[0] == ">" else "<")
        header.set_data_dtype(numpy.dtype(kind))
        made = maker(random.integers(0, 100, (5, 6, 7)).astype(kind), affine, header, dtype=numpy.dtype(kind))
        made.header.set_slope_inter(2, 3)
        paths.append(os.path.join(folder, f"made{len(paths)}.nii"))
        nibabel.save(made, paths[-1])
both = nibabel.Nifti1Image(numpy.zeros((3, 4, 5), "i2"), affine)
both.set_qform(numpy.diag([1, 1, 1, 1]), 1)
paths.append(os.path.join(folder, "both.nii"))
nibabel.save(both, paths[-1])
only = nibabel.Nifti1Image(numpy.zeros((3, 4, 5), "i2"), None)
only.header.set_zooms((1, 2, 3))
paths.append(os.path.join(folder, "spacing.nii"))
nibabel.save(only, paths[-1])
for path in paths:
    theirs = nibabel.load(path)
    # Surfaces and connectivity in a NIfTI envelope are no images.
    if not isinstance(theirs, nibabel.Nifti1Image): continue
    for name in ("odd.nii", "odd.nii.gz"):
        target, done = convert(path, name)
        assert target, done.stderr
        ours = nibabel.load(target)
        numpy.testing.assert_array_equal(numpy.squeeze(ours.get_fdata()), numpy.squeeze(theirs.get_fdata()), path)
        assert numpy.abs(ours.affine - theirs.affine).max() < 1e-4, (path, ours.affine, theirs.affine)
        # Where the forms disagree the written distances are those of the sform, which is the one taken.
        if "both" not in path:
            assert numpy.allclose(ours.header.get_zooms()[:4], theirs.header.get_zooms()[:4]), path
print(len(paths), "files")
"#,
        folder.path(),
    );
}

/// A stack of 5 slices, 7 x 9 pixels, written as `syntax`.
struct Stack {
    orientation: [f64; 6],
    /// From slice to slice, in millimetres.
    step: [f64; 3],
    voxel: VoxelType,
    bits: u16,
    rescale: fn(usize) -> Rescale,
}

fn write_stack(folder: &Path, stack: &Stack, syntax: &TransferSyntax, enhanced: bool) {
    let template = SeriesTemplate {
        modality: Modality::Mr,
        study: Uid::derived(b"study"),
        series: Uid::derived(folder.to_string_lossy().as_bytes()),
        frame_of_reference: Uid::derived(b"frame"),
        patient_name: "Stack".into(),
        patient_id: "1".into(),
        description: String::new(),
        date_time: ["20260101".into(), "000000".into()],
        series_number: 1,
        size: [7, 9],
        voxel: stack.voxel,
        bits_stored: stack.bits,
        thickness_mm: 3.0,
        window: None,
        regions: Vec::new(),
        more: Vec::new(),
    };
    let pixels: Vec<Vec<u8>> = (0..5i16)
        .map(|k| (0..63i16).flat_map(|n| (k * 300 + n * 7 - if stack.voxel == VoxelType::I16 { 900 } else { 0 }).to_le_bytes()).collect())
        .collect();
    let slices: Vec<SliceTemplate<'_>> = pixels
        .iter()
        .enumerate()
        .map(|(k, pixels)| {
            let position = std::array::from_fn(|axis| [-31.5, 12.25, -700.0][axis] + k as f64 * stack.step[axis]);
            let plane = Plane::new(position, stack.orientation, [0.8, 0.65]).expect("a plane");
            let rescale = (stack.rescale)(k);
            SliceTemplate { number: k + 1, plane: Some(plane), rescale, image_type: "ORIGINAL\\PRIMARY", pixels }
        })
        .collect();
    std::fs::create_dir_all(folder).expect("a folder");
    if enhanced {
        std::fs::write(folder.join("all"), template.multi_frame(&slices, syntax).expect("it is built")).expect("it is written");
        return;
    }
    for (k, slice) in slices.iter().enumerate() {
        let file = folder.join(format!("{}", (k * 3) % 5));
        std::fs::write(file, template.image(slice, syntax).expect("it is built")).expect("it is written");
    }
}

#[test]
fn converted_series_have_the_values_and_places_simpleitk_gives_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let (s, c) = 0.4f64.sin_cos();
    let along = |v: [f64; 3], mm: f64| v.map(|x| x * mm);
    let hounsfield: fn(usize) -> Rescale = |_| Rescale { slope: 1.0, intercept: -1024.0 };
    let uneven: fn(usize) -> Rescale = |k| Rescale { slope: 0.5 + 0.25 * k as f64, intercept: -3.5 * k as f64 };
    let axial = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];
    let oblique = [c, s, 0.0, -s * 0.6, c * 0.6, -0.8];
    let normal = [-s * 0.8, c * 0.8, 0.6];
    let stack = |orientation, step, voxel, bits, rescale| Stack { orientation, step, voxel, bits, rescale };
    let stacks = [
        ("axial", stack(axial, [0.0, 0.0, 2.5], VoxelType::I16, 16, hounsfield)),
        ("unsigned12", stack(axial, [0.0, 0.0, 2.5], VoxelType::U16, 12, hounsfield)),
        ("reversed", stack(axial, [0.0, 0.0, -2.5], VoxelType::I16, 16, hounsfield)),
        ("sagittal", stack([0.0, 1.0, 0.0, 0.0, 0.0, -1.0], [1.25, 0.0, 0.0], VoxelType::I16, 16, hounsfield)),
        ("oblique", stack(oblique, along(normal, 3.3), VoxelType::I16, 16, hounsfield)),
        ("rescaled", stack(axial, [0.0, 0.0, 1.0], VoxelType::I16, 16, uneven)),
    ];
    for (name, stack) in &stacks {
        for (n, syntax) in decodable_transfer_syntaxes().iter().enumerate() {
            if matches!(syntax.codec, Codec::Native | Codec::Rle) && !syntax.uid.ends_with(".98") {
                write_stack(&folder.path().join(format!("single-{name}-{n}")), stack, syntax, false);
                write_stack(&folder.path().join(format!("enhanced-{name}-{n}")), stack, syntax, true);
            }
        }
    }
    python(
        r#"
def itk_series(source):
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(source)
    return SimpleITK.ReadImage(files)

checked = 0
reference = {}
for source in sorted(glob.glob(folder + "/single-*") + glob.glob(folder + "/enhanced-*"), reverse=True):
    kind, name, _ = os.path.basename(source).split("-")
    for target in ("stack.nii", "stack.nii.gz"):
        target, done = convert(source, target)
        assert target, (source, done.stderr)
        image, ours = voxels(target)
        if kind == "single":
            itk = itk_series(source)
            # A reader that takes the rescale of the first slice for all of them is no peer for the others.
            if name != "rescaled":
                numpy.testing.assert_array_equal(SimpleITK.GetArrayFromImage(itk), ours, source)
            else:
                slices = sorted((pydicom.dcmread(p) for p in glob.glob(source + "/*")), key=lambda d: d.InstanceNumber)
                theirs = [d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in slices]
                numpy.testing.assert_allclose(ours, numpy.array(theirs), atol=1e-4)
            same_places(image, itk)
            reference[name] = (ours, image.affine)
        else:
            theirs, affine = reference[name]
            numpy.testing.assert_array_equal(theirs, ours, source)
            assert numpy.abs(affine - image.affine).max() < 1e-6
        checked += 1
print(checked, "conversions")
assert checked == 2 * 2 * 6 * 5
"#,
        folder.path(),
    );
}

#[test]
fn converted_series_are_what_dcm2niix_makes_of_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let (s, c) = 0.4f64.sin_cos();
    let hounsfield: fn(usize) -> Rescale = |_| Rescale { slope: 1.0, intercept: -1024.0 };
    let halves: fn(usize) -> Rescale = |_| Rescale { slope: 0.5, intercept: 3.0 };
    let axial = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];
    let oblique = [c, s, 0.0, -s * 0.6, c * 0.6, -0.8];
    let normal = [-s * 0.8, c * 0.8, 0.6].map(|x| 3.3 * x);
    let stack = |orientation, step, voxel, bits, rescale| Stack { orientation, step, voxel, bits, rescale };
    for (name, stack) in [
        ("axial", stack(axial, [0.0, 0.0, 2.5], VoxelType::I16, 16, hounsfield)),
        ("unsigned", stack(axial, [0.0, 0.0, 2.5], VoxelType::U16, 12, hounsfield)),
        ("reversed", stack(axial, [0.0, 0.0, -2.5], VoxelType::I16, 16, hounsfield)),
        ("coronal", stack([1.0, 0.0, 0.0, 0.0, 0.0, -1.0], [0.0, 1.25, 0.0], VoxelType::I16, 16, halves)),
        ("sagittal", stack([0.0, 1.0, 0.0, 0.0, 0.0, -1.0], [1.25, 0.0, 0.0], VoxelType::I16, 16, hounsfield)),
        ("oblique", stack(oblique, normal, VoxelType::I16, 16, halves)),
    ] {
        write_stack(&folder.path().join(format!("series-{name}")), &stack, &decodable_transfer_syntaxes()[0], false);
    }
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/ct/lidc-0001/dicom");
    if Path::new(data).is_dir() {
        std::fs::create_dir(folder.path().join("series-real")).expect("a folder");
        for (n, file) in std::fs::read_dir(data).expect("it is read").flatten().enumerate() {
            std::fs::copy(file.path(), folder.path().join(format!("series-real/{n}"))).expect("it is copied");
        }
    }
    python(
        r#"
import shutil
dcm2niix = os.path.join(os.path.dirname(sys.executable), "dcm2niix")
if not os.path.exists(dcm2niix): dcm2niix = shutil.which("dcm2niix")
if not dcm2niix:
    print("skipped: dcm2niix is not installed")
    sys.exit()
sources = sorted(glob.glob(folder + "/series-*"))
for source in sources:
    # Its own name for each: it does not overwrite.
    name = os.path.basename(source)
    made = subprocess.run([dcm2niix, "-z", "n", "-b", "n", "-o", folder, "-f", name, source], capture_output=True, text=True)
    found = glob.glob(os.path.join(folder, name + "*.nii"))
    assert len(found) == 1, (name, found, made.stdout, made.stderr)
    target, done = convert(source, "ours.nii")
    assert target, done.stderr
    # dcm2niix turns rows (and slices) round: both are laid along the same axes before they are compared.
    theirs, ours = (nibabel.as_closest_canonical(nibabel.load(p)) for p in (found[0], target))
    assert numpy.abs(theirs.affine - ours.affine).max() < 1e-4, (name, theirs.affine, ours.affine)
    numpy.testing.assert_array_equal(theirs.get_fdata(), ours.get_fdata(), name)
print(len(sources), "series")
assert len(sources) >= 6
"#,
        folder.path(),
    );
}

#[test]
fn a_nifti_becomes_a_series_that_simpleitk_puts_at_the_same_place() {
    let folder = tempfile::tempdir().expect("a folder");
    python(
        r#"
import shutil
random = numpy.random.default_rng(1)
turn = SimpleITK.Euler3DTransform((0, 0, 0), .2, -.3, .4)
rotation = numpy.array(turn.GetMatrix()).reshape(3, 3)
for kind, scale in [("i2", None), ("u1", None), ("f4", None), ("i4", None), ("i2", (0.5, -7))]:
    for flip in (1, -1):
        affine = numpy.eye(4)
        affine[:3, :3] = rotation @ numpy.diag([.7 * flip, .8, 2.5])
        affine[:3, 3] = [-12.5, 40, 7]
        values = random.normal(0, 50, (6, 5, 4)) if kind == "f4" else random.integers(0, 200, (6, 5, 4))
        made = nibabel.Nifti1Image(values.astype(kind), affine)
        if scale: made.header.set_slope_inter(*scale)
        source = os.path.join(folder, "made.nii")
        nibabel.save(made, source)
        target = os.path.join(folder, "series")
        shutil.rmtree(target, ignore_errors=True)
        done = subprocess.run([program, "convert", source, target, "--modality", "MR"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        itk = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(target))
        theirs = nibabel.load(source)
        data = theirs.get_fdata()
        for index in [(0, 0, 0), (5, 0, 0), (0, 4, 0), (0, 0, 3), (2, 3, 1)]:
            place = (theirs.affine @ [*index, 1])[:3] * [-1, -1, 1]
            back = itk.TransformPhysicalPointToIndex(place.tolist())
            assert abs(itk[back] - data[index]) < (5e-3 if kind == "f4" else 1e-6), (kind, index, itk[back], data[index])
            assert numpy.abs(numpy.array(itk.TransformIndexToPhysicalPoint(back)) - place).max() < 1e-4
        again, done = convert(target, "again.nii")
        assert again, done.stderr
print("series read back")
"#,
        folder.path(),
    );
}
