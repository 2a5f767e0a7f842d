"""Tissue maps of whole heads, 2 mm, from templates whose licences allow it: what the brain networks' images are made of.

    python -m scanside_train.brain_maps --templates FOLDER --work FOLDER

FOLDER of templates holds, by their own names: `mni_icbm152_{t1,gm,wm}_tal_nlin_sym_09a_converted.nii.gz` (in nilearn's wheel: `pip download
--no-deps nilearn`; ICBM 152 2009a, (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, MNI, McGill University: free to use, copy, modify
and distribute with this notice) and `ch2.nii.gz`, `ch2bet.nii.gz` (in Debian's mricron-data: Colin 27, the same notice; MRIcron's licence is
BSD-3-Clause). A T1 head of one's own is added with `--head NAME T1 BRAIN`.

A map is seven fractions a voxel (0 to 255): white and grey matter, cerebrospinal fluid, bone or air inside the head, fat, soft tissue; the seventh
is how near a ventricle is. Arrays run to L, P and S; the middle of the array is the middle of the brain.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

WHITE, GREY, FLUID, BONE, FAT, SOFT, NEAR_VENTRICLE = range(7)
SPACING_MM = 2.0
SHAPE = (128, 128, 104)


def lps(path):
    """A volume as float32 [z, y, x] whose axes run to S, P and L, 1 mm, and where voxel 0 lies (LPS mm, x y z)."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(path), sitk.sitkFloat32), "LPS")
    return sitk.GetArrayFromImage(image), np.array(image.GetOrigin())


def classes_of(values, k=3, rounds=30):
    """Means and widths of `k` Gaussians that explain the values (expectation maximization), darkest first."""
    means = np.quantile(values, np.linspace(0.1, 0.9, k))
    widths, weights = np.full(k, values.std() / k), np.full(k, 1.0 / k)
    for _ in range(rounds):
        p = weights * np.exp(-0.5 * ((values[:, None] - means) / widths) ** 2) / widths + 1e-12
        p /= p.sum(1, keepdims=True)
        weights = p.mean(0)
        means = (p * values[:, None]).sum(0) / p.sum(0)
        widths = np.sqrt((p * (values[:, None] - means) ** 2).sum(0) / p.sum(0)).clip(1e-3)
    return means, widths, weights


def tissues(t1, brain):
    """Fluid, grey and white matter of a T1 brain, softly, from its intensities."""
    inside = t1[brain]
    means, widths, weights = classes_of(np.random.default_rng(3).choice(inside, 60_000))
    p = weights * np.exp(-0.5 * ((t1[..., None] - means) / widths) ** 2) / widths + 1e-9
    p /= p.sum(-1, keepdims=True)
    p[t1 < means[0]], p[t1 > means[2]] = (1, 0, 0), (0, 0, 1)
    return [p[..., n] * brain for n in range(3)]


def outside(t1, brain):
    """Bone or air, fat and soft tissue of a T1 head around its brain, softly."""
    level = np.median(t1[brain])
    head = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(t1 > 0.25 * level, 12), iterations=10))[12:-12, 12:-12, 12:-12] | brain
    fat = np.clip((t1 / level - 1.1) / 0.4, 0, 1)
    bone = np.clip((0.55 - t1 / level) / 0.25, 0, 1)
    soft = np.clip(1 - fat - bone, 0, 1)
    return [v * (head & ~brain) for v in (bone, fat, soft)]


def pack(maps, middle):
    """Fractions at 1 mm -> bytes at 2 mm, `middle` (a voxel at 1 mm) in the middle of the array."""
    out = np.zeros((7,) + SHAPE, np.uint8)
    for n, one in enumerate(maps):
        box = np.zeros([2 * s for s in SHAPE], np.float32)
        low = [int(round(m)) - s for m, s in zip(middle, SHAPE)]
        source = tuple(slice(max(l, 0), min(l + 2 * s, d)) for l, s, d in zip(low, SHAPE, one.shape))
        target = tuple(slice(s.start - l, s.stop - l) for s, l in zip(source, low))
        box[target] = one[source]
        z, y, x = SHAPE
        out[n] = np.round(255 * np.clip(box.reshape(z, 2, y, 2, x, 2).mean((1, 3, 5)), 0, 1))
    return out


def near_ventricle(fluid, brain):
    """1 in the ventricles, falling over some millimetres around them: fluid deep inside the brain."""
    deep = ndimage.distance_transform_edt(brain) > 22
    return ndimage.gaussian_filter((deep * (fluid > 0.6)).astype(np.float32), 3.0).clip(0, 0.5) * 2


def whole(t1, brain, inside=None, head=None):
    """The seven maps at 1 mm of a head."""
    fluid, grey, white = inside or tissues(t1, brain)
    bone, fat, soft = head or outside(t1, brain)
    return [white, grey, fluid, bone, fat, soft, near_ventricle(fluid, brain)]


def middle_of(brain):
    return [(np.flatnonzero(brain.any(tuple(a for a in range(3) if a != axis)))[[0, -1]]).mean() for axis in range(3)]


def colin(folder):
    t1, origin = lps(folder / "ch2.nii.gz")
    bet, _ = lps(folder / "ch2bet.nii.gz")
    core = ndimage.binary_opening(bet > 30, iterations=2)
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(core, 12), iterations=7)[12:-12, 12:-12, 12:-12])
    return t1, brain, origin


def icbm(folder):
    name = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
    (t1, origin), (grey, _), (white, _) = (lps(folder / name.format(n)) for n in ("t1", "gm", "wm"))
    brain = ndimage.binary_fill_holes(ndimage.binary_opening(t1 > 0, iterations=1))
    grey, white = grey / 255, white / 255
    fluid = np.clip(1 - grey - white, 0, 1) * brain
    return brain, (fluid, grey * brain, white * brain), origin


def moved(array, origin, shape, target):
    """`array` with its voxel 0 at `origin` (LPS mm x y z) put on a grid of 1 mm at `target`."""
    shift = [(t - o) for t, o in zip(target[::-1], origin[::-1])]
    return ndimage.shift(np.pad(array, [(0, max(0, s - d)) for s, d in zip(shape, array.shape)]).astype(np.float32), [-s for s in shift],
                         order=1)[tuple(slice(0, s) for s in shape)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--head", nargs=3, action="append", default=[], metavar=("NAME", "T1", "BRAIN"))
    options = parser.parse_args()
    out = options.work / "brain"
    out.mkdir(parents=True, exist_ok=True)
    t1, brain, origin = colin(options.templates)
    head = outside(t1, brain)
    np.savez_compressed(out / "colin.npz", maps=pack(whole(t1, brain, head=head), middle_of(brain)))
    mean_brain, inside, there = icbm(options.templates)
    # The mean brain has no head of its own: it gets Colin's, both being in the same space, and fluid where they leave a gap.
    head = [moved(v, origin, mean_brain.shape, there) * ~mean_brain for v in head]
    gap = ndimage.binary_dilation(mean_brain, iterations=2) & ~mean_brain
    head = [v * ~gap for v in head]
    inside = (np.maximum(inside[0], gap), *inside[1:])
    np.savez_compressed(out / "icbm.npz", maps=pack(whole(None, mean_brain, inside, head), middle_of(mean_brain)))
    for name, path, mask in options.head:
        t1, _ = lps(path)
        brain = lps(mask)[0] > 0
        np.savez_compressed(out / f"{name}.npz", maps=pack(whole(t1, brain), middle_of(brain)))


if __name__ == "__main__":
    main()
