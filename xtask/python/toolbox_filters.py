"""Blobs, filters, masks and time series against scikit-image, SciPy, SimpleITK and nibabel: CPU time, peak memory, agreement.

Run by `cargo xtask bench toolbox`, or alone:

    python toolbox_filters.py SCANSIDE DATA [--repeat 3] [--job NAME ...]

Each job runs `repeat` times on either side, in turn, one thread each, in a process of its own; the median counts. For
scanside the time is that of the whole process; for the peer that of the job alone, without the imports. Inputs are made
from a seed, so DATA is not read. Needs numpy, scipy, scikit-image, SimpleITK and nibabel.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
}


# --- inputs ------------------------------------------------------------------------------------------------------------


def save(path, array_kji, spacing_xyz, dtype):
    import nibabel
    import numpy as np

    image = nibabel.Nifti1Image(array_kji.T.astype(dtype), np.diag([*spacing_xyz, 1.0]))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)


def make_inputs(folder):
    """spots.nii.gz 40x256x256, ct.nii 99x512x512, mask.nii of it, fmri.nii.gz 64x64x36x200."""
    import numpy as np

    rng = np.random.default_rng(20)
    if not (folder / "spots.nii.gz").exists():
        z, y, x = np.mgrid[0:40, 0:256, 0:256].astype(np.float32)
        spots = rng.normal(0, 0.02, z.shape).astype(np.float32)
        for _ in range(60):
            cz, cy, cx = rng.uniform([3, 10, 10], [37, 246, 246])
            s = rng.uniform(1.2, 12)
            spots += rng.uniform(0.4, 1) * np.exp(-((z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2) / (2 * s * s))
        save(folder / "spots.nii.gz", spots, (1, 1, 1), np.float32)
    if not (folder / "mask.nii").exists():
        z, y, x = np.mgrid[0:99, 0:512, 0:512].astype(np.float32)
        body = ((y - 256) / 200) ** 2 + ((x - 256) / 240) ** 2 < 1
        lung = (((y - 250) / 130) ** 2 + ((np.abs(x - 256) - 110) / 80) ** 2 + ((z - 50) / 60) ** 2) < 1
        ct = np.where(lung, -850, np.where(body, 40, -1000)).astype(np.float32)
        ct += rng.normal(0, 30, ct.shape).astype(np.float32)
        save(folder / "ct.nii", np.round(ct), (0.9, 0.9, 3), np.int16)
        save(folder / "mask.nii", ct < -400, (0.9, 0.9, 3), np.uint8)
    if not (folder / "fmri.nii.gz").exists():
        base = rng.random((36, 64, 64)) * 200 + 800
        base[rng.random(base.shape) < 0.4] = 0
        fmri = np.empty((200, 36, 64, 64), np.int16)
        for t in range(200):
            fmri[t] = np.where(base > 0, base + rng.normal(0, 12, base.shape), rng.random(base.shape) * 4)
        save(folder / "fmri.nii.gz", fmri, (3, 3, 3), np.int16)


# --- peers -------------------------------------------------------------------------------------------------------------


def load(path):
    import nibabel
    import numpy as np

    return np.asarray(nibabel.load(path).dataobj).T


def peer_blobs(folder, out):
    import numpy as np
    from skimage.feature import blob_dog

    start = time.process_time()
    np.save(out, blob_dog(load(folder / "spots.nii.gz"), min_sigma=1, max_sigma=30, threshold=0.2))
    return time.process_time() - start


def peer_zscore(folder, out):
    import nibabel

    start = time.process_time()
    image = nibabel.load(folder / "fmri.nii.gz")
    data = image.get_fdata()
    deviation = data.std(axis=3, keepdims=True)
    deviation[deviation == 0] = 1
    z = (data - data.mean(axis=3, keepdims=True)) / deviation
    nibabel.save(nibabel.Nifti1Image(z.astype("float32"), image.affine), out)
    return time.process_time() - start


def filtered(name, function):
    def peer(folder, out):
        import scipy.ndimage

        start = time.process_time()
        result = function(scipy.ndimage, load(folder / name))
        save(out, result, (0.9, 0.9, 3), result.dtype)
        return time.process_time() - start

    return peer


def peer_resample(folder, out):
    import SimpleITK as sitk

    start = time.process_time()
    image = sitk.ReadImage(str(folder / "ct.nii"), sitk.sitkFloat32)
    size = [round(n * s) for n, s in zip(image.GetSize(), image.GetSpacing())]
    result = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), (1, 1, 1), image.GetDirection(), 0.0
    )
    sitk.WriteImage(result, str(out))
    return time.process_time() - start


def peer_closing(folder, out):
    import SimpleITK as sitk

    start = time.process_time()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    mask = sitk.ReadImage(str(folder / "mask.nii"))
    sitk.WriteImage(sitk.BinaryMorphologicalClosing(mask, (3, 3, 3), sitk.sitkBox, 1.0, False), str(out))
    return time.process_time() - start


def peer_otsu(folder, out):
    from skimage.filters import threshold_otsu

    start = time.process_time()
    values = load(folder / "ct.nii")
    save(out, values > threshold_otsu(values), (0.9, 0.9, 3), "uint8")
    return time.process_time() - start


# --- agreement ---------------------------------------------------------------------------------------------------------


def same_blobs(ours, theirs):
    import numpy as np

    found = {(*b["peak_voxel"], round(b["sigma"], 3)) for b in json.loads(ours.read_text())["blobs"]}
    wanted = {(int(z), int(y), int(x), round(float(s), 3)) for z, y, x, s in np.load(theirs)}
    return f"{len(found & wanted)} of {len(wanted)} blobs the same, {len(found - wanted)} others"


def same_values(ours, theirs):
    import numpy as np

    a, b = load(ours).astype(np.float64), load(theirs).astype(np.float64)
    if a.shape != b.shape:
        return f"shapes {a.shape} and {b.shape}"
    return f"largest difference {np.abs(a - b).max():.2g}"


# Name: (arguments of scanside with {folder} and {out}, name of the result, peer, agreement). `{out}` absent: its stdout.
JOBS = {
    "blobs": (
        "blobs {folder}/spots.nii.gz --min-sigma 1 --max-sigma 30 --threshold 0.2 --threads 1 --json",
        ("blobs.json", "blobs.npy"),
        peer_blobs,
        same_blobs,
    ),
    "zscore": (
        "timeseries normalize {folder}/fmri.nii.gz {out} --threads 1",
        ("z.nii.gz", "z-peer.nii.gz"),
        peer_zscore,
        same_values,
    ),
    "gaussian": (
        "smooth {folder}/ct.nii {out} --gaussian 2 --threads 1",
        ("gaussian.nii", "gaussian-peer.nii"),
        filtered("ct.nii", lambda ndi, v: ndi.gaussian_filter(v.astype("float32"), 2)),
        same_values,
    ),
    "median": (
        "smooth {folder}/ct.nii {out} --median 1 --threads 1",
        ("median.nii", "median-peer.nii"),
        filtered("ct.nii", lambda ndi, v: ndi.median_filter(v, 3)),
        same_values,
    ),
    "resample": (
        "resample {folder}/ct.nii {out} --spacing 1 --float --threads 1",
        ("resample.nii", "resample-peer.nii"),
        peer_resample,
        same_values,
    ),
    "components": (
        "components {folder}/mask.nii {out} --threads 1",
        ("components.nii", "components-peer.nii"),
        filtered("mask.nii", lambda ndi, v: ndi.label(v)[0]),
        same_values,
    ),
    "dilate": (
        "morphology dilate {folder}/mask.nii {out} --shape cross --radius 2 --threads 1",
        ("dilate.nii", "dilate-peer.nii"),
        filtered("mask.nii", lambda ndi, v: ndi.binary_dilation(v, cross(2)).astype("uint8")),
        same_values,
    ),
    "close": (
        "morphology close {folder}/mask.nii {out} --shape box --radius 3 --threads 1",
        ("close.nii", "close-peer.nii"),
        peer_closing,
        same_values,
    ),
    "otsu": (
        "threshold {folder}/ct.nii {out} --otsu --threads 1",
        ("otsu.nii", "otsu-peer.nii"),
        peer_otsu,
        same_values,
    ),
    "fill": (
        "morphology fill {folder}/mask.nii {out} --threads 1",
        ("fill.nii", "fill-peer.nii"),
        filtered("mask.nii", lambda ndi, v: ndi.binary_fill_holes(v).astype("uint8")),
        same_values,
    ),
}


def cross(radius):
    import numpy as np

    element = np.zeros((2 * radius + 1,) * 3, bool)
    for axis in range(3):
        at = [radius] * 3
        at[axis] = slice(None)
        element[tuple(at)] = True
    return element


# --- measuring ---------------------------------------------------------------------------------------------------------


def child(arguments, stdout):
    """CPU seconds and peak MiB of a process."""
    with open(stdout, "wb") as out:
        process = subprocess.Popen(arguments, stdout=out, env={**os.environ, **ENVIRONMENT})
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments}: status {status}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main():
    if sys.argv[1] == "--peer":
        name, folder, out = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
        print(JOBS[name][2](folder, out), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    if sys.argv[1] == "--agree":
        print(JOBS[sys.argv[2]][3](Path(sys.argv[3]), Path(sys.argv[4])))
        return
    if sys.argv[1] == "--inputs":
        make_inputs(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("scanside")
    parser.add_argument("data")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--offsets", type=int, default=0, help="not used here")
    parser.add_argument("--job", action="append", choices=list(JOBS))
    parser.add_argument("--folder", type=Path, help="keep inputs and results here")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        bench(options, options.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            bench(options, Path(folder))


def bench(options, folder):
    # In a process of its own: what this one holds counts in the peak memory of the children it starts.
    subprocess.run([sys.executable, __file__, "--inputs", str(folder)], check=True)
    print(f"{'job':12}{'scanside':>20}{'peer':>22}{'faster':>9}{'memory':>9}  agreement")
    for name in options.job or JOBS:
        command, (ours, theirs), _, agree = JOBS[name]
        ours, theirs = folder / ours, folder / theirs
        arguments = [options.scanside, *(a.format(folder=folder, out=ours) for a in command.split())]
        scratch = ours if "{out}" not in command else folder / "stdout"
        mine, peers = [], []
        for _ in range(options.repeat):
            mine.append(child(arguments, scratch))
            child([sys.executable, __file__, "--peer", name, str(folder), str(theirs)], folder / "peer.txt")
            peers.append(tuple(map(float, (folder / "peer.txt").read_text().split())))
        (a, b), (c, d) = (map(statistics.median, zip(*runs)) for runs in (mine, peers))
        agreement = subprocess.run(
            [sys.executable, __file__, "--agree", name, str(ours), str(theirs)], check=True, capture_output=True, text=True
        ).stdout.strip()
        print(f"{name:12}{a:9.2f} s{b:6.0f} MiB{c:11.2f} s{d:6.0f} MiB{c / a:8.1f}x{d / b:8.1f}x  {agreement}", flush=True)


if __name__ == "__main__":
    main()
