//! Filters, masks, grids, blobs, surfaces and registrations have the values of the packages they were learnt from, on a
//! made image and, where it is at hand, a patient's.
//!
//! Runs where `SCANSIDE_PYTHON` names a Python that has them (`.ci/run` makes one).

#[path = "support/peers.rs"]
mod peers;

use std::path::Path;

use peers::python;

/// The chest of lidc-0001, or nothing.
fn real() -> &'static str {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/ct/lidc-0001/dicom");
    if Path::new(data).is_dir() { data } else { "" }
}

#[test]
fn filters_have_the_values_of_scipy_scikit_image_and_simpleitk() {
    let folder = tempfile::tempdir().expect("a folder");
    let script = format!("real = {:?}\n{FILTERS}", real());
    python(&script, folder.path());
}

const FILTERS: &str = r#"
import scipy.ndimage as ndi
import skimage.feature, skimage.filters, skimage.measure

def run(*arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stderr)
    return json.loads(done.stdout) if "--json" in arguments else done.stdout

def array(name):
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(os.path.join(folder, name)))

def close(ours, theirs, what, tolerance=2e-6):
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    apart = numpy.abs(ours.astype(float) - theirs.astype(float)).max()
    allowed = tolerance * numpy.abs(theirs.astype(float)).max()
    assert apart <= allowed, (what, apart, allowed)

# A chest that is not there: noise, two lungs, vessels; oblique, thick slices.
random = numpy.random.default_rng(5)
z, y, x = numpy.mgrid[0:22, 0:60, 0:70].astype(float)
made = numpy.where(((y - 30) / 26) ** 2 + ((x - 35) / 32) ** 2 < 1, 40., -1000.)
for middle in (20, 50):
    made[((z - 11) / 9) ** 2 + ((y - 28) / 17) ** 2 + ((x - middle) / 10) ** 2 < 1] = -850
for place in random.uniform([3, 15, 12], [19, 40, 58], (25, 3)):
    made[((z - place[0]) * 2.5) ** 2 + (y - place[1]) ** 2 + (x - place[2]) ** 2 < 9] = 60
made = numpy.round(made + random.normal(0, 25, made.shape)).astype("i2")
image = SimpleITK.GetImageFromArray(made)
image.SetSpacing((.9, .8, 2.5))
image.SetOrigin((-31, 12, 400))
turn = SimpleITK.Euler3DTransform((0, 0, 0), .15, -.1, .3)
image.SetDirection(turn.GetMatrix())
source = os.path.join(folder, "ct.nii.gz")
SimpleITK.WriteImage(image, source)
out = os.path.join(folder, "out.nii.gz")
cases = [(source, made)]
if real:
    # A patient: the box that the box is cut out of is the test's own.
    run("crop", real, os.path.join(folder, "real.nii.gz"), "--box", "80:100,300:420,260:370")
    cases.append((os.path.join(folder, "real.nii.gz"), array("real.nii.gz").astype("i2")))

for source, values in cases:
    name = os.path.basename(source)
    # Smoothing.
    for sigma in ("1.5", "0,2,0.8"):
        run("smooth", source, out, "--gaussian", sigma)
        widths = [float(s) for s in sigma.split(",")]
        close(array("out.nii.gz"), ndi.gaussian_filter(values.astype("f4"), widths * 3 if len(widths) == 1 else widths), (name, sigma))
    for radius, size in (("1", 3), ("0,2,1", (1, 5, 3))):
        run("smooth", source, out, "--median", radius)
        close(array("out.nii.gz"), ndi.median_filter(values, size), (name, "median", radius), 0)
    run("smooth", source, out, "--curvature", 4)
    itk = SimpleITK.CurvatureFlow(SimpleITK.ReadImage(source, SimpleITK.sitkFloat32), 0.05, 4)
    close(array("out.nii.gz"), SimpleITK.GetArrayFromImage(itk), (name, "curvature"), 1e-4)

    # Masks.
    told = run("threshold", source, out, "--otsu", "--json")
    assert told["otsu"] == skimage.filters.threshold_otsu(values), told
    close(array("out.nii.gz"), values > told["otsu"], (name, "otsu"), 0)
    lungs = os.path.join(folder, "lungs.nii.gz")
    told = run("threshold", source, lungs, "--upper", -400, "--json")
    mask = values <= -400
    assert told["voxels"] == mask.sum()
    def element(shape, radius, flat):
        reach = [0 if flat else radius, radius, radius]
        g = numpy.mgrid[tuple(slice(-r, r + 1) for r in reach)]
        if shape == "box": return numpy.ones(g.shape[1:], bool)
        if shape == "cross": return (g != 0).sum(0) <= 1
        return (g ** 2).sum(0) <= radius ** 2
    for shape in ("ball", "box", "cross"):
        for flat in (False, True):
            more = ["--shape", shape, "--radius", 2, *(["--per-slice"] if flat else [])]
            e = element(shape, 2, flat)
            dilate = lambda m: ndi.binary_dilation(m, e)
            erode = lambda m: ndi.binary_erosion(m, e, border_value=1)
            for operation, theirs in (("dilate", dilate), ("erode", erode), ("open", lambda m: dilate(erode(m))), ("close", lambda m: erode(dilate(m)))):
                run("morphology", operation, lungs, out, *more)
                close(array("out.nii.gz"), theirs(mask), (name, operation, shape, flat), 0)
    ball = SimpleITK.BinaryDilate(SimpleITK.ReadImage(lungs, SimpleITK.sitkUInt8), (3, 3, 1), SimpleITK.sitkBox)
    run("morphology", "dilate", lungs, out, "--shape", "box", "--radius", "1,3,3")
    close(array("out.nii.gz"), SimpleITK.GetArrayFromImage(ball), (name, "SimpleITK's dilation"), 0)
    run("morphology", "fill", lungs, out)
    close(array("out.nii.gz"), ndi.binary_fill_holes(mask), (name, "fill"), 0)
    run("morphology", "fill", lungs, out, "--per-slice")
    close(array("out.nii.gz"), numpy.array([ndi.binary_fill_holes(s) for s in mask]), (name, "fill in 2-D"), 0)

    # Components and numbers.
    labels = os.path.join(folder, "labels.nii.gz")
    for n, neighbours in ((1, 6), (2, 18), (3, 26)):
        told = run("components", lungs, labels, "--connectivity", neighbours, "--json")
        theirs, count = ndi.label(mask, ndi.generate_binary_structure(3, n))
        close(array("labels.nii.gz"), theirs, (name, "components", neighbours), 0)
        assert told["found"] == count
    sizes = ndi.sum_labels(mask, theirs, range(1, count + 1))
    centres = ndi.center_of_mass(mask, theirs, range(1, count + 1))
    boxes = ndi.find_objects(theirs)
    for c, size, centre, box in zip(told["components"], sizes, centres, boxes):
        assert c["voxels"] == size and numpy.allclose(c["centroid_voxel"], centre), c
        assert c["box_first_voxel"] == [s.start for s in box] and c["box_last_voxel"] == [s.stop - 1 for s in box]
        itk = SimpleITK.ReadImage(labels).TransformContinuousIndexToPhysicalPoint(centre[::-1])
        assert numpy.allclose(c["centroid_lps_mm"], itk, atol=1e-3)
    for s in run("stats", source, "--labels", labels, "--json")["statistics"]:
        under = values[theirs == s["label"]].astype(float)
        mine = [s["mean"], s["std"], s["min"], s["max"], *(s["percentiles"][p] for p in ("5", "25", "50", "75", "95"))]
        want = [under.mean(), under.std(), under.min(), under.max(), *numpy.percentile(under, [5, 25, 50, 75, 95])]
        assert s["voxels"] == under.size and numpy.allclose(mine, want, rtol=1e-5, atol=1e-3), (s, want)

    # Other grids.
    itk = SimpleITK.ReadImage(source, SimpleITK.sitkFloat32)
    other = SimpleITK.Image([40, 44, 30], SimpleITK.sitkInt16)
    other.SetSpacing((1.3, 1.1, 1.2))
    other.SetOrigin(itk.TransformContinuousIndexToPhysicalPoint((6, 4, 2)))
    other.SetDirection(SimpleITK.Euler3DTransform((0, 0, 0), -.2, .1, .25).GetMatrix())
    like = os.path.join(folder, "like.nii.gz")
    SimpleITK.WriteImage(other, like)
    other = SimpleITK.ReadImage(like)
    size = [round(n * s / 1.07) for n, s in zip(itk.GetSize(), itk.GetSpacing())]
    ways = {"nearest": SimpleITK.sitkNearestNeighbor, "linear": SimpleITK.sitkLinear, "cubic": SimpleITK.sitkBSpline}
    for how, way in ways.items():
        run("resample", source, out, "--spacing", "1.07", "--interpolation", how, "--float", "--outside", -77)
        theirs = SimpleITK.Resample(itk, size, SimpleITK.Transform(), way, itk.GetOrigin(), (1.07,) * 3, itk.GetDirection(), -77)
        a, b = array("out.nii.gz"), SimpleITK.GetArrayFromImage(theirs)
        # A border that rounding puts inside or outside likewise.
        wrong = numpy.abs(a - b) > 1e-3 * numpy.abs(b).max()
        assert a.shape == b.shape and wrong.mean() < (1e-2 if how == "nearest" else 1e-4), (name, how, wrong.mean())
        run("resample", source, out, "--like", like, "--interpolation", how, "--float", "--outside", -77)
        theirs = SimpleITK.GetArrayFromImage(SimpleITK.Resample(itk, other, SimpleITK.Transform(), way, -77))
        wrong = numpy.abs(array("out.nii.gz") - theirs) > 1e-3 * numpy.abs(theirs).max()
        assert wrong.mean() < 1e-3, (name, "like", how, wrong.mean())
    run("resample", source, out, "--orient", "RAS")
    canonical = nibabel.as_closest_canonical(nibabel.load(source))
    ours = nibabel.load(out)
    assert numpy.abs(ours.affine - canonical.affine).max() < 1e-4
    assert numpy.array_equal(ours.get_fdata(), canonical.get_fdata())

    # Blobs and surfaces.
    grid = os.path.join(folder, "isotropic.nii.gz")
    cube = SimpleITK.GetImageFromArray(values.astype("f4") / 1000)
    SimpleITK.WriteImage(cube, grid)
    for more, theirs in (([], skimage.feature.blob_dog), (["--log", "--num-sigma", 4], skimage.feature.blob_log)):
        extra = {} if theirs is skimage.feature.blob_dog else {"num_sigma": 4}
        told = run("blobs", grid, "--min-sigma", 1.5, "--max-sigma", 6, "--threshold", 0.15, *more, "--json")
        want = theirs(values.astype("f4") / 1000, min_sigma=1.5, max_sigma=6, threshold=0.15, **extra)
        found = {(*b["peak_voxel"], round(b["sigma"], 3)) for b in told["blobs"]}
        wanted = {(*map(int, b[:3]), round(float(b[3]), 3)) for b in want}
        # Which of a chain of overlapping blobs stay depends there on the order of a hash set: one more may stay here.
        assert wanted <= found and len(found) <= 1.04 * len(wanted) and len(wanted) > 3, (name, more, len(found), len(wanted))
    told = run("mesh", source, "--level", -400, "--out", os.path.join(folder, "s.stl"), "--json")
    spacing = SimpleITK.ReadImage(source).GetSpacing()[::-1]
    v, f, _, _ = skimage.measure.marching_cubes(values.astype("f4"), -400, spacing=spacing)
    area = skimage.measure.mesh_surface_area(v, f)
    assert abs(told["area_mm2"] / area - 1) < 1e-3, (told, area)
    v, f, _, _ = skimage.measure.marching_cubes(numpy.pad(values.astype("f4"), 1, constant_values=-1e9), -400, spacing=spacing)
    t = v.astype(float)[f]
    volume = abs(numpy.einsum("ij,ij->i", t[:, 0], numpy.cross(t[:, 1], t[:, 2])).sum() / 6)
    assert abs(told["volume_mm3"] / volume - 1) < 1e-3, (told, volume)
print(len(cases), "images")
"#;

#[test]
fn a_series_over_time_has_numpys_values() {
    let folder = tempfile::tempdir().expect("a folder");
    python(
        r#"
random = numpy.random.default_rng(3)
run4d = (900 + random.normal(0, 15, (7, 8, 6, 40))).astype("i2")
run4d[:2] = 0
affine = numpy.array([[-3, 0, 0, 90], [0, 2.9, .4, -120], [0, -.3, 3.5, -60], [0, 0, 0, 1.]])
made = nibabel.Nifti1Image(run4d, affine)
made.header.set_zooms((3, 3, 3.5, 2.2))
made.header.set_slope_inter(0.5, 10)
source, out = (os.path.join(folder, n) for n in ("run.nii.gz", "out.nii.gz"))
nibabel.save(made, source)
data = nibabel.load(source).get_fdata()
for chosen, part in (([], slice(None)), (["--range", "5:-3"], slice(5, -3))):
    of = data[..., part]
    mean, std = of.mean(3, keepdims=True), of.std(3, keepdims=True)
    safe = numpy.where(std == 0, 1, std)
    wanted = {
        "normalize": numpy.where(std == 0, 0, (of - mean) / safe),
        "percent": 100 * (of - mean) / mean,
        "mean": mean[..., 0],
        "std": std[..., 0],
        "tsnr": numpy.where(std == 0, 0, mean / safe)[..., 0],
    }
    for action, want in wanted.items():
        for threads in (1, 3):
            done = subprocess.run([program, "timeseries", action, source, out, *chosen, "--threads", str(threads)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            image = nibabel.load(out)
            assert numpy.abs(image.get_fdata() - want).max() < 1e-5 * numpy.abs(want).max() + 1e-6, (action, chosen)
            assert numpy.abs(image.affine - nibabel.load(source).affine).max() < 1e-5
            if want.ndim == 4: assert abs(image.header.get_zooms()[3] - 2.2) < 1e-6
            packed = open(out, "rb").read()
            if threads == 1: first = packed
            assert packed == first, "the file depends on the threads"
# Through DICOM and back: the same frames, the same time between them.
series = os.path.join(folder, "series")
done = subprocess.run([program, "convert", source, series, "--modality", "MR"], capture_output=True, text=True)
assert done.returncode == 0, done.stderr
done = subprocess.run([program, "timeseries", "mean", series, out], capture_output=True, text=True)
assert done.returncode == 0, done.stderr
back = nibabel.as_closest_canonical(nibabel.load(out))
want = nibabel.as_closest_canonical(nibabel.Nifti1Image(data.mean(3), nibabel.load(source).affine))
assert numpy.abs(back.get_fdata() - want.get_fdata()).max() < 1e-2
target, done = convert(series, "again.nii")
assert abs(nibabel.load(target).header.get_zooms()[3] - 2.2) < 1e-6, nibabel.load(target).header
print("five actions, two ranges")
"#,
        folder.path(),
    );
}

#[test]
fn a_registration_agrees_with_simpleitk_and_its_transform_is_read_by_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/mr/tcga-fg-6692/native");
    if !Path::new(data).is_dir() {
        println!("skipped: there is no patient to register");
        return;
    }
    python(&format!("native = {data:?}\n{REGISTRATION}"), folder.path());
}

const REGISTRATION: &str = r#"
fixed, moving = (os.path.join(native, n) for n in ("flair.nii.gz", "t1.nii.gz"))
tfm, out = (os.path.join(folder, n) for n in ("ours.tfm", "ours.nii.gz"))
command = [program, "register", "--fixed", fixed, "--moving", moving, "--out", out, "--save-transform", tfm, "--json"]
told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
f, m = (SimpleITK.ReadImage(p, SimpleITK.sitkFloat32) for p in (fixed, moving))

# The file is SimpleITK's own kind, and lays the image where ours lies.
ours = SimpleITK.ReadTransform(tfm)
laid = SimpleITK.GetArrayFromImage(SimpleITK.Resample(m, f, ours, SimpleITK.sitkLinear, 0.0))
mine = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(out)).astype(float)
wrong = numpy.abs(laid - mine) > 1
assert wrong.mean() < 1e-4, wrong.mean()

# SimpleITK from there on, with the gradient of the metric itself, stays within 0.3 mm and finds no more information.
r = SimpleITK.ImageRegistrationMethod()
r.SetMetricAsMattesMutualInformation(50)
r.SetInterpolator(SimpleITK.sitkLinear)
r.MetricUseFixedImageGradientFilterOff()
r.MetricUseMovingImageGradientFilterOff()
r.SetOptimizerAsRegularStepGradientDescent(0.5, 1e-3, 40, 0.6, 1e-8)
r.SetOptimizerScalesFromPhysicalShift()
ours = SimpleITK.Euler3DTransform(ours)
r.SetInitialTransform(ours, inPlace=False)
before = r.MetricEvaluate(f, m)
theirs = r.Execute(f, m)
assert abs(before - told["final_metric"]) < 5e-3, (before, told["final_metric"])
assert -told["final_metric"] > -r.GetMetricValue() - 2e-3, (told["final_metric"], r.GetMetricValue())
middle = numpy.array(f.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in f.GetSize()]))
places = [tuple(middle + 60 * (numpy.array(p) - 1.0)) for p in numpy.ndindex(3, 3, 3)]
far = max(numpy.linalg.norm(numpy.subtract(ours.TransformPoint(p), theirs.TransformPoint(p))) for p in places)
assert far < 0.3, far
print("metric", told["final_metric"], "SimpleITK's own of it", before, "after its steps", r.GetMetricValue(), "apart", far, "mm")

# A transform of SimpleITK's is where ours may begin.
start = SimpleITK.Euler3DTransform(tuple(middle), 0.02, 0.05, 0.04, (4.0, 2.0, 15.0))
SimpleITK.WriteTransform(start, tfm)
more = ["--initial-transform", tfm, "--shrink", "1", "--smooth", "0", "--sampling", "regular", "--fraction", "0.2"]
again = json.loads(subprocess.run([*command[:-3], *more, "--json"], capture_output=True, text=True, check=True).stdout)
assert again["start"] == "given" and numpy.allclose(again["matrix"], told["matrix"], atol=1), (again["matrix"], told["matrix"])
"#;
