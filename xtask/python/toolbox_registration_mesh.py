"""DICOM, registration and isosurface against SimpleITK, pydicom and scikit-image: CPU seconds, peak memory, and whether they agree.

Run by `cargo xtask bench toolbox`, or alone:

    python toolbox_registration_mesh.py SCANSIDE DATA [--repeat 3] [--offsets 50]

SCANSIDE is the release binary, DATA the folder of real images. Every job is a process of its own on one thread, ours and
the peer's in turn; the figures are the least CPU time and the peak memory of the runs. Needs SimpleITK, scikit-image,
nibabel, pydicom and numpy.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

PEER_REGISTRATION = """
import json, sys, time
import SimpleITK as sitk
fixed, moving, share, gradient, out = sys.argv[1:6]
sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
f, m = (sitk.ReadImage(p, sitk.sitkFloat32) for p in (fixed, moving))
r = sitk.ImageRegistrationMethod()
r.SetMetricAsMattesMutualInformation(50)
if float(share) < 1:
    r.SetMetricSamplingStrategy(r.RANDOM)
    r.SetMetricSamplingPercentage(float(share), 1)
r.SetInterpolator(sitk.sitkLinear)
if gradient == "default":
    r.SetOptimizerAsGradientDescent(learningRate=1.0, numberOfIterations=100)
else:
    # The gradient of the metric itself, and steps until they no longer matter.
    r.MetricUseFixedImageGradientFilterOff()
    r.MetricUseMovingImageGradientFilterOff()
    r.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-4, 100, 0.7, 1e-8)
r.SetOptimizerScalesFromPhysicalShift()
start = sitk.CenteredTransformInitializer(f, m, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.GEOMETRY)
r.SetInitialTransform(start, inPlace=False)
t = r.Execute(f, m)
sitk.WriteImage(sitk.Cast(sitk.Resample(m, f, t, sitk.sitkLinear, 0.0), sitk.sitkInt16), out + ".nii.gz")
t = sitk.Euler3DTransform(t.GetNthTransform(0)) if t.GetName() == "CompositeTransform" else t
sitk.WriteTransform(t, out + ".tfm")
print(json.dumps({"metric": r.GetMetricValue(), "iterations": r.GetOptimizerIteration()}))
"""

PEER_MESH = """
import json, sys
import numpy as np, SimpleITK as sitk
from skimage.measure import marching_cubes, mesh_surface_area
sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
a = sitk.ReadImage(sys.argv[1])
spacing = a.GetSpacing()[::-1]
a = sitk.GetArrayFromImage(a).astype(np.float32)
v, f, _, _ = marching_cubes(a, -300, spacing=spacing)
if len(sys.argv) == 3:
    t = v[f]
    record = np.zeros(len(f), np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("more", "<u2")]))
    record["corners"] = t
    record["normal"] = np.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0])
    with open(sys.argv[2], "wb") as out:
        out.write(bytes(80) + np.uint32(len(f)).tobytes())
        record.tofile(out)
print(json.dumps({"triangles": len(f), "vertices": len(v), "area_mm2": float(mesh_surface_area(v, f))}))
if len(sys.argv) == 2:
    v, f, _, _ = marching_cubes(np.pad(a, 1, constant_values=-1e9), -300, spacing=spacing)
    t = v.astype(float)[f]
    volume = abs(np.einsum("ij,ij->i", t[:, 0], np.cross(t[:, 1], t[:, 2])).sum() / 6)
    print(json.dumps({"volume_mm3": float(volume)}))
"""

PEER_DICOM = """
import sys
import numpy as np
if sys.argv[1] == "SimpleITK":
    import SimpleITK as sitk
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    if len(sys.argv) > 2:
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(sys.argv[2])
        sitk.WriteImage(sitk.ReadImage(files), sys.argv[3])
else:
    import glob, pydicom
    if len(sys.argv) > 2:
        slices = [pydicom.dcmread(p) for p in glob.glob(sys.argv[2] + "/*")]
        slices.sort(key=lambda d: float(d.ImagePositionPatient[2]))
        np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in slices]).astype(np.int16).tofile(sys.argv[3])
"""

IMPORT_ONLY = """
import SimpleITK, numpy
from skimage.measure import marching_cubes, mesh_surface_area
"""


def measured(command):
    """What it printed, its CPU seconds and its peak memory in MiB."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(command, stdout=out, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{command[:2]} ended with {child.returncode}")
        out.seek(0)
        text = out.read().decode()
    return text, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def best(commands, repeat):
    """Runs the commands in turn; of each the last output, least time, least peak."""
    results = [None] * len(commands)
    for _ in range(repeat):
        for n, command in enumerate(commands):
            text, seconds, peak = measured(command)
            old = results[n]
            results[n] = (text, min(seconds, old[1]), min(peak, old[2])) if old else (text, seconds, peak)
    return results


def row(job, ours, peer, note):
    print(
        f"| {job} | {ours[1]:.2f} s, {ours[2]:.0f} MiB | {peer[1]:.2f} s, {peer[2]:.0f} MiB "
        f"| {peer[1] / ours[1]:.1f}x faster, {100 * ours[2] / peer[2]:.0f} % of the memory | {note} |",
        flush=True,
    )


def difference(a, b, places):
    """Greatest distance in mm and turn in degrees between two ITK transform files."""
    import SimpleITK as sitk

    a, b = (sitk.ReadTransform(p) for p in (a, b))
    far = max(np.linalg.norm(np.subtract(a.TransformPoint(p), b.TransformPoint(p))) for p in places)
    turns = []
    for t in (a, b):
        origin = np.array(t.TransformPoint((0, 0, 0)))
        turns.append(np.array([np.array(t.TransformPoint(e)) - origin for e in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]))
    cosine = (np.trace(turns[0] @ turns[1].T) - 1) / 2
    return far, np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def head_places(fixed):
    """A lattice of places over the head."""
    import SimpleITK as sitk

    image = sitk.ReadImage(fixed)
    middle = np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    return [tuple(middle + 60 * np.array(p)) for p in np.ndindex(3, 3, 3) for p in [np.array(p) - 1.0]]


def registration(scanside, data, repeat, folder):
    native = os.path.join(data, "mr", "tcga-fg-6692", "native")
    fixed, moving = os.path.join(native, "flair.nii.gz"), os.path.join(native, "t1.nii.gz")
    places = head_places(fixed)
    reference = os.path.join(folder, "peer-converged")
    for name, sampling, share, gradient, turns in [
        ("all voxels, 100 steps", "none", 1.0, "default", 1),
        ("all voxels, SimpleITK to its end", "none", 1.0, "own", 1),
        ("5 % of the voxels, 100 steps", "random", 0.05, "default", repeat),
    ]:
        peer_out = reference if gradient == "own" else os.path.join(folder, "peer")
        tfm = os.path.join(folder, "ours.tfm")
        ours = [scanside, "register", "--fixed", fixed, "--moving", moving, "--out", os.path.join(folder, "o.nii.gz"),
                "--sampling", sampling, "--fraction", str(min(share, 1.0)), "--save-transform", tfm, "--threads", "1", "--json"]
        peer = [sys.executable, "-c", PEER_REGISTRATION, fixed, moving, str(share), gradient, peer_out]
        ours, peer = best([ours, peer], turns)
        said, theirs = json.loads(ours[0]), json.loads(peer[0])
        far, turn = difference(tfm, peer_out + ".tfm", places)
        row(f"rigid Mattes, {name}", ours, peer,
            f"mutual information {-said['final_metric']:.4f} in {said['iterations']} steps, "
            f"SimpleITK {-theirs['metric']:.4f} in {theirs['iterations']}; {far:.2f} mm, {turn:.2f} degrees apart")


def dicom(scanside, data, repeat, folder):
    """A series to a volume on disk; of the peers' time the imports are taken away, of their memory nothing."""
    for case in ("4dlung-113", "lidc-0001"):
        series = os.path.join(data, "ct", case, "dicom")
        for peer in ("SimpleITK", "pydicom"):
            out = os.path.join(folder, "volume.nii")
            ours = [scanside, "convert", series, out, "--threads", "1"]
            theirs = [sys.executable, "-c", PEER_DICOM, peer]
            ours, work, imports = best([ours, [*theirs, series, os.path.join(folder, "peer.nii")], theirs], repeat)
            work = (work[0], work[1] - imports[1], work[2])
            row(f"DICOM {case}, {len(os.listdir(series))} files, to a volume", ours, work, peer)


def mesh(scanside, data, repeat, folder):
    series = os.path.join(data, "ct", "4dlung-113", "dicom")
    volume = os.path.join(folder, "ct.nii")
    measured([scanside, "convert", series, volume])
    ours = [scanside, "mesh", volume, "--level", "-300", "--out", os.path.join(folder, "s.stl"), "--threads", "1", "--json"]
    peer = [sys.executable, "-c", PEER_MESH, volume, os.path.join(folder, "p.stl")]
    ours, peer, imports = best([ours, peer, [sys.executable, "-c", IMPORT_ONLY]], repeat)
    # Reading, marching and writing are compared; starting Python is not.
    peer = (peer[0], peer[1] - imports[1], peer[2])
    closed, _, _ = measured([sys.executable, "-c", PEER_MESH, volume])
    said, theirs = json.loads(ours[0]), [json.loads(line) for line in closed.splitlines()]
    area, solid = theirs[0]["area_mm2"], theirs[1]["volume_mm3"]
    row("isosurface at -300 HU, .nii to STL", ours, peer,
        f"{said['triangles']} triangles, scikit-image {theirs[0]['triangles']}; area "
        f"{100 * (said['area_mm2'] / area - 1):+.3f} %, volume {100 * (said['volume_mm3'] / solid - 1):+.3f} %")


def offsets(scanside, data, count, folder):
    """Rigid offsets up to 20 mm and 15 degrees on the T1: how many come back within 1 mm of the registration without."""
    import nibabel
    import SimpleITK as sitk

    native = os.path.join(data, "mr", "tcga-fg-6692", "native")
    fixed, moving = os.path.join(native, "flair.nii.gz"), os.path.join(native, "t1.nii.gz")
    places = head_places(fixed)
    image = nibabel.load(moving)
    random = np.random.default_rng(7)

    def register(path):
        tfm = os.path.join(folder, "offset.tfm")
        measured([scanside, "register", "--fixed", fixed, "--moving", path, "--out", os.path.join(folder, "o.nii"),
                  "--save-transform", tfm, "--json"])
        found = sitk.ReadTransform(tfm)
        return np.array([found.TransformPoint(p) for p in places])

    truth = register(moving)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    middle = (flip @ image.affine @ np.append((np.array(image.shape) - 1) / 2, 1))[:3]
    errors = []
    for _ in range(count):
        axis, direction = (v / np.linalg.norm(v) for v in random.normal(size=(2, 3)))
        angle, far = np.radians(random.uniform(-15, 15)), random.uniform(-20, 20)
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        move = np.eye(4)
        move[:3, :3] = turn
        move[:3, 3] = middle - turn @ middle + far * direction
        path = os.path.join(folder, "offset.nii")
        nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), flip @ move @ flip @ image.affine), path)
        expected = truth @ turn.T + move[:3, 3]
        errors.append(float(np.linalg.norm(register(path) - expected, axis=1).mean()))
    good = sum(e < 1 for e in errors)
    print(f"\n{count} rigid offsets up to 20 mm and 15 degrees: {good} recovered within 1 mm "
          f"(target registration error: median {np.median(errors):.3f}, worst {max(errors):.3f} mm)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scanside")
    parser.add_argument("data")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--offsets", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("| job | scanside | peer | | what they found |\n|---|---|---|---|---|")
        dicom(arguments.scanside, arguments.data, arguments.repeat, folder)
        mesh(arguments.scanside, arguments.data, arguments.repeat, folder)
        registration(arguments.scanside, arguments.data, arguments.repeat, folder)
        if arguments.offsets:
            offsets(arguments.scanside, arguments.data, arguments.offsets, folder)


if __name__ == "__main__":
    main()
