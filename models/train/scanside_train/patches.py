"""Training patches for nodule-detect: a piece of a real lung, turned and scaled, nodules inserted, seen through another
scanner, with the targets of the network.

Everything inserted or annotated is a nodule; everything else inside the lungs (vessels, bifurcations, fissures, scars,
the diaphragm and the ribs at their edge) is not, and needs no drawing: these are the hard negatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

from . import lungs, nodules

SPACING_MM = 1.5
STRIDE = 2
FACTORS = (1.0, 2.0)  # the pyramid: the same network on 1.5 mm and on 3 mm voxels
# Diameters (mm) that each level answers for; outside them a lesion is neither asked for nor forbidden.
TARGETS = {1.0: (3.0, 32.0), 2.0: (8.0, 90.0)}
WINDOW = (-1000.0, 400.0)


@dataclass
class Lung:
    """One prepared case at one pyramid level: `hu` and signed distance to the lung's edge (mm, inside positive)."""

    name: str
    factor: float
    hu: torch.Tensor
    depth: torch.Tensor
    inside: np.ndarray
    lesions: np.ndarray
    slice_mm: float
    cropped: bool

    def __post_init__(self):
        self.both = torch.stack([self.hu, self.depth])[None]


def isotropic(hu, spacing, target_mm, order=1):
    """Resample [k, j, i] to cubes of `target_mm`, centre on centre, with a box mean over each axis that is shrunk: width
    `max(1, floor(target / spacing + 0.5))` voxels, edge voxels repeated; then linear sampling. The exam does the same."""
    shape = [max(8, round(n * s / target_mm)) for n, s in zip(hu.shape, spacing)]
    out = np.asarray(hu, np.float32)
    if order:
        width = [max(1, int(target_mm / s + 0.5)) for s in spacing]
        if max(width) > 1:
            out = ndimage.uniform_filter(out, width, mode="nearest")
    return lungs.sample_to(out, spacing, shape, (target_mm,) * 3, order)


def load(path, factor):
    """A prepared .npz -> Lung at SPACING_MM * factor. Kept beside it in `levels/` for the next run."""
    data = np.load(path)
    kept = path.parent.parent / "levels" / f"{path.stem}-{factor:g}.npz"
    if kept.exists() and kept.stat().st_mtime > path.stat().st_mtime:
        k = np.load(kept)
        return Lung(path.stem, factor, torch.from_numpy(k["hu"].astype(np.float32)),
                    torch.from_numpy(k["depth"].astype(np.float32)), np.argwhere(k["depth"] > 0), k["lesions"],
                    float(data["spacing"][0]), bool(data["cropped"]))
    target = SPACING_MM * factor
    spacing = tuple(float(v) for v in data["spacing"])
    hu = isotropic(data["hu"].astype(np.float32), spacing, target)
    plane = tuple(float(v) for v in data["plane_spacing"])
    labels = lungs.sample_to((data["labels"] > 0).astype(np.float32), plane, hu.shape, (target,) * 3, 1) > 0.5
    for k in range(len(labels)):  # thick slices leave steps
        labels[k] = ndimage.binary_closing(labels[k], np.ones((3, 3)))
    depth = ndimage.distance_transform_edt(labels) - ndimage.distance_transform_edt(~labels)
    depth = (depth * target).astype(np.float32)
    middle, centre = [(n - 1) / 2 for n in hu.shape], [(n - 1) / 2 for n in data["hu"].shape]
    lesions = np.array([[*[(v - c) * s / target + m for v, c, s, m in zip(l[:3], centre, spacing, middle)], l[3]]
                        for l in data["lesions"]], np.float32).reshape(-1, 4)
    kept.parent.mkdir(exist_ok=True)
    np.savez(kept, hu=np.round(hu).astype(np.int16), depth=depth.astype(np.float16), lesions=lesions)
    return Lung(path.stem, factor, torch.from_numpy(hu), torch.from_numpy(depth), np.argwhere(labels), lesions, spacing[0],
                bool(data["cropped"]))


def view(lung, size, centre, rng, strength=1.0):
    """A turned, scaled, mirrored patch: (hu, depth, lesions in patch voxels, weight of what lies inside the volume)."""
    angles = rng.uniform(-1, 1, 3) * math.radians(12) * strength
    cx, cy, cz = np.cos(angles)
    sx, sy, sz = np.sin(angles)
    turn = (np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
            @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]))
    zoom = math.exp(rng.uniform(-0.2, 0.15) * strength)
    flip = rng.choice([-1, 1], 3) if strength else np.ones(3)
    matrix = turn @ np.diag(flip * zoom)  # patch offset (z, y, x) -> volume offset
    shape = np.array(lung.hu.shape)
    # torch's grid is (x, y, z) in -1..1 at the outer faces of the voxels.
    order = [2, 1, 0]
    theta = np.empty((1, 3, 4), np.float32)
    theta[0, :, :3] = (matrix * (size / shape)[:, None])[order][:, order]
    theta[0, :, 3] = ((2 * np.asarray(centre) + 1) / shape - 1)[order]
    unit = functional.affine_grid(torch.from_numpy(theta), (1, 1, size, size, size), align_corners=False)
    both = functional.grid_sample(lung.both, unit, padding_mode="border", align_corners=False)[0].numpy()
    hu, depth = both[0], both[1] / zoom
    known = (unit[0].abs() < 1).all(-1).numpy()
    if not lung.cropped:
        hu[~known] = -1000
    lesions = []
    for l in lung.lesions:
        p = np.linalg.solve(matrix, l[:3] - np.asarray(centre)) + (size - 1) / 2
        lesions.append((*p, l[3] / zoom))
    return hu, depth, lesions, known


def through_scanner(hu, spacing_mm, rng):
    """Another scanner's slice thickness, kernel, noise and calibration, on a patch of HU (in place or new)."""
    draw = rng.random()
    if draw < 0.4:
        # Thick slices: the mean over a slice, kept only at the slice positions, linear between them.
        thick = rng.choice([2.0, 2.5, 3.0, 5.0])
        step = max(thick / spacing_mm, 1.0)
        hu = ndimage.gaussian_filter1d(hu, 0.29 * thick / spacing_mm, axis=0)
        if step > 1.2:
            where = (np.arange(hu.shape[0]) - rng.uniform(0, step)) / step
            low = np.floor(where)
            a = np.clip(np.round(low * step + (np.arange(hu.shape[0])[0])), 0, hu.shape[0] - 1).astype(int)
            b = np.clip(np.round((low + 1) * step), 0, hu.shape[0] - 1).astype(int)
            part = (where - low)[:, None, None].astype(np.float32)
            hu = hu[a] * (1 - part) + hu[b] * part
    draw = rng.random()
    if draw < 0.25:
        hu = ndimage.gaussian_filter(hu, rng.uniform(0.3, 0.7))
    elif draw < 0.5:
        hu = hu + rng.uniform(0.2, 0.8) * (hu - ndimage.gaussian_filter(hu, 0.8))
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    if rng.random() < 0.5:
        noise = ndimage.gaussian_filter(noise, 0.6) * 2.2
    hu = hu + noise * (70 * rng.random() ** 2.2)
    return (hu + 1000) * rng.uniform(0.94, 1.06) - 1000 + rng.uniform(-25, 25)


def targets(lesions, ignored, size, factor):
    """(heat [p,p,p], weight [p,p,p], box [4,p,p,p], mask of cells whose box counts) for lesions (k, j, i, mm)."""
    p = size // STRIDE
    spacing = SPACING_MM * factor
    heat = np.zeros((p, p, p), np.float32)
    weight = np.ones((p, p, p), np.float32)
    box = np.zeros((4, p, p, p), np.float32)
    mask = np.zeros((p, p, p), np.float32)
    # The centre of cell c lies at voxel 2 c + 0.5.
    axes = [(np.arange(p) * STRIDE + (STRIDE - 1) / 2).astype(np.float32) for _ in range(3)]
    for k, j, i, d in ignored:
        square = sum(np.square((a - c) * spacing).reshape([-1 if n == axis else 1 for n in range(3)])
                     for axis, (a, c) in enumerate(zip(axes, (k, j, i))))
        weight[square < (0.6 * d + 3) ** 2] = 0
    for k, j, i, d in sorted(lesions, key=lambda l: -l[3]):
        delta = [(c - a) * SPACING_MM for a, c in zip(axes, (k, j, i))]  # mm at factor 1: the network knows no factor
        parts = [v.reshape([-1 if n == axis else 1 for n in range(3)]) for axis, v in enumerate(delta)]
        square = sum(np.square(v) for v in parts)
        apparent = d / factor
        sigma = float(np.clip(apparent / 7, 1.1, 3.2))
        blob = np.exp(-square / (2 * sigma * sigma))
        blob[square < 0.5 * square.min() + 1e-6] = 1
        nearest = tuple(int(np.argmin(np.abs(v))) for v in delta)
        if all(-STRIDE * SPACING_MM < float(np.min(np.abs(v))) < STRIDE * SPACING_MM for v in delta):
            blob[nearest] = 1
        heat = np.maximum(heat, blob)
        reach = max(0.2 * apparent, 2.4)
        mine = square < reach * reach
        for n in range(3):
            box[n] = np.where(mine, np.broadcast_to(parts[n], mine.shape), box[n])
        box[3][mine] = math.log(max(apparent, 1.0))
        mask[mine] = 1
        weight[mine] = 1
    return heat, weight, box, mask


def make(lung, library, size, rng, augment=True):
    """One training patch: (input [1,s,s,s], heat, weight, box, mask, what was inserted)."""
    spacing = (SPACING_MM * lung.factor,) * 3
    low, high = TARGETS[lung.factor]
    if len(lung.lesions) and rng.random() < (0.12 if lung.factor == 1 else 0.3):
        centre = lung.lesions[int(rng.integers(len(lung.lesions))), :3] + rng.uniform(-12, 12, 3)
    else:
        centre = lung.inside[int(rng.integers(len(lung.inside)))] + rng.uniform(-6, 6, 3)
    hu, depth, lesions, known = view(lung, size, centre, rng, 1.0 if augment else 0.0)
    hu = np.ascontiguousarray(hu)
    # Lungs breathe out: denser, and denser at the back.
    if rng.random() < 0.3:
        hu += (depth > 1) * (hu < -400) * np.float32(rng.uniform(0, 140))
    wanted = [l for l in lesions if low <= l[3] <= high]
    ignored = [l for l in lesions if not low <= l[3] <= high]
    inside = np.argwhere(depth > 0)
    inserted = []
    if len(inside) > 200:
        for _ in range(int(rng.integers(1, 5)) if lung.factor == 1 else int(rng.integers(1, 6))):
            d = nodules.draw_diameter(rng, 3.2, 30.0) if lung.factor == 1 else nodules.draw_diameter(rng, 7.0, 70.0)
            place = nodules.draw_site(hu, inside, depth, spacing, d, rng)
            if place is None:
                continue
            at, site = place
            if any(math.dist(at, l[:3]) * spacing[0] < 0.5 * (d + l[3]) + 4 for l in lesions + inserted):
                continue
            n = nodules.insert(hu, spacing, at, d, library, rng, slice_mm=min(lung.slice_mm, 5.0), site=site,
                               noise_hu=rng.uniform(5, 40))
            inserted.append((*n.centre, n.diameter_mm, n))
    for k, j, i, d, _ in inserted:
        (wanted if low <= d <= high else ignored).append((k, j, i, d))
    if augment:
        hu = through_scanner(hu, spacing[0], rng)
    heat, weight, box, mask = targets(wanted, ignored, size, lung.factor)
    near = depth[::STRIDE, ::STRIDE, ::STRIDE]
    weight = weight * np.where(near > -8, 1.0, np.where(near > -25, 0.2, 0.05)) * known[::STRIDE, ::STRIDE, ::STRIDE]
    # Beyond the edge of what the scan holds a target cannot be asked for.
    heat, mask = heat * (weight > 0), mask * (weight > 0)
    x = np.clip((hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1).astype(np.float32)
    return x[None], heat, weight.astype(np.float32), box, mask, inserted
