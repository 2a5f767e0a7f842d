"""Whole synthetic scans with known nodules, for the forest and for measuring: NIfTI and a truth table in LUNA16's columns.

    python -m scanside_train.cases --work FOLDER --out WORK/cases/heldout --case lidc-0002 --variants 3 [--held-out-shapes]

Truth CSV: seriesuid (the file's name), coordX, coordY, coordZ (LPS mm), diameter_mm, kind, site, origin (inserted, annotated).
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import numpy as np
from scipy import ndimage

from . import nodules, patches


def body_round(hu, labels_outside, spacing, rng, margin_mm=60.0):
    """A cropped box set into a drawn body, so that a lung segmentation has a chest wall to see."""
    pad = [0, round(margin_mm / spacing[1]), round(margin_mm / spacing[2])]
    h, w = hu.shape[1:]
    y = (np.arange(h + 2 * pad[1]) - (h + 2 * pad[1] - 1) / 2)[:, None] * spacing[1]
    x = (np.arange(w + 2 * pad[2]) - (w + 2 * pad[2] - 1) / 2)[None, :] * spacing[2]
    a, b = w * spacing[2] / 2, h * spacing[1] / 2
    body = (x / (a + 34)) ** 2 + (y / (b + 30)) ** 2 < 1
    tissue = np.where(np.hypot(x / a, y / b) > 1.12, -95.0, 45.0)
    plane = np.where(body, tissue, -1000.0)
    plane[(y[:, 0] > b + 38) & (y[:, 0] < b + 44)] = np.where(np.abs(x) < a + 30, -300.0, -1000.0)
    out = np.empty((len(hu), *plane.shape), np.float32)
    for k in range(len(hu)):
        out[k] = plane + np.where(body, rng.normal(0, 18, plane.shape), 0)
        box = hu[k].astype(np.float32).copy()
        box[labels_outside[k]] = -1000
        out[k, pad[1]:pad[1] + h, pad[2]:pad[2] + w] = box
    return out, pad


def corner_air(hu):
    """Air outside the patient in a cropped box: connected in the slice to a front corner."""
    out = np.zeros(hu.shape, bool)
    for k in range(len(hu)):
        labels, _ = ndimage.label(hu[k] < -930)
        for corner in ((0, 0), (0, -1)):
            if labels[corner]:
                out[k] |= labels == labels[corner]
    return out


def make(path, library, rng, count, variant, low=4.0, high=30.0):
    """One scan: (hu int16, spacing, origin LPS, truth rows)."""
    data = np.load(path)
    level = patches.load(path, 1.0)
    spacing = tuple(float(s) for s in data["spacing"])
    origin = np.array(data["origin"], float)
    hu = data["hu"].astype(np.float32)
    lesions = [tuple(l) for l in data["lesions"]]
    near, depth = level.hu.numpy(), level.depth.numpy()
    noise = float(np.std(np.diff(hu[:, ::3, ::3], axis=2)[(hu[:, ::3, ::3] < -700)[:, :, 1:]])) / 1.41 if (hu < -700).any() else 20
    truth, centre = [], [(n - 1) / 2 for n in hu.shape]
    tries = 0
    while len(truth) < count and tries < 40 * count:
        tries += 1
        d = nodules.draw_diameter(rng, low, high)
        place = nodules.draw_site(near, level.inside, depth, (patches.SPACING_MM,) * 3, d, rng)
        if place is None:
            continue
        at, site = place
        native = [(v - (m - 1) / 2) * patches.SPACING_MM / s + c for v, m, s, c in zip(at, near.shape, spacing, centre)]
        mm = np.array(native) * spacing
        if any(math.dist(mm, np.array(t[:3]) * spacing) < 0.5 * (d + t[3]) + 6 for t in [*lesions, *truth]):
            continue
        n = nodules.insert(hu, spacing, native, d, library, rng, slice_mm=spacing[0], site=site, noise_hu=min(noise, 60))
        truth.append((*n.centre, n.diameter_mm, n.kind, n.site, "inserted"))
    truth += [(*l[:3], l[3], "solid", "", "annotated") for l in lesions]
    if variant % 3 == 1 and spacing[0] < 1.6:  # 2.5 mm or so: the mean of two slices
        n = len(hu) // 2
        hu = 0.5 * (hu[0:2 * n:2] + hu[1:2 * n:2])
        truth = [((t[0] - 0.5) / 2, *t[1:]) for t in truth]
        origin[2] += 0.5 * spacing[0]
        spacing = (2 * spacing[0], *spacing[1:])
    elif variant % 3 == 2:  # a sharper kernel, more noise
        hu = hu + 0.5 * (hu - ndimage.gaussian_filter(hu, (0, 0.9, 0.9)))
        hu += rng.normal(0, 25, hu.shape).astype(np.float32)
    if bool(data["cropped"]):
        hu, pad = body_round(hu, corner_air(hu), spacing, rng)
        truth = [(t[0], t[1] + pad[1], t[2] + pad[2], *t[3:]) for t in truth]
        origin[0] -= pad[2] * spacing[2]
        origin[1] -= pad[1] * spacing[1]
    return np.clip(np.round(hu), -1024, 3071).astype(np.int16), spacing, origin, truth


def write(folder, name, hu, spacing, origin, truth):
    """NAME.nii (RAS affine of an LPS array) and the rows of truth.csv."""
    import nibabel

    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = [-origin[0], -origin[1], origin[2]]
    image = nibabel.Nifti1Image(hu.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nibabel.save(image, folder / f"{name}.nii")
    rows = []
    for t in truth:
        x, y, z = (origin[n] + t[2 - n] * spacing[2 - n] for n in range(3))
        rows.append([name, f"{x:.2f}", f"{y:.2f}", f"{z:.2f}", f"{t[3]:.2f}", *t[4:]])
    table = folder / "truth.csv"
    fresh = not table.exists()
    with open(table, "a", newline="") as handle:
        out = csv.writer(handle)
        if fresh:
            out.writerow(["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm", "kind", "site", "origin"])
        out.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", action="append", required=True)
    parser.add_argument("--folder", default="prepared", help="of WORK: prepared, or evaluation")
    parser.add_argument("--suffix", default="v", help="between a case's name and the number of its variant")
    parser.add_argument("--variants", type=int, default=2)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--held-out-shapes", action="store_true", help="nodule outlines that no training patch used")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    library = nodules.Library(options.work / "shapes.npz", (4, 5) if options.held_out_shapes else (0, 4))
    for case in options.case:
        for variant in range(options.variants):
            name = f"{case}-{options.suffix}{variant}"
            if (options.out / f"{name}.nii").exists():
                continue
            rng = np.random.default_rng([options.seed, variant, *case.encode()])
            made = make(options.work / options.folder / f"{case}.npz", library, rng, options.count, variant)
            write(options.out, name, *made)
            print(name, made[0].shape, len(made[3]), "nodules", flush=True)


if __name__ == "__main__":
    main()
