"""Lungs without a network: training labels, the threshold baseline, and the refinement of a network's mask.

Labels are made once, from real scans, with more care than an exam could afford; nobody drew them. They say right and
left by anatomy (patient right is towards small i). The exam uses `refine` alone.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage import measure, morphology, segmentation

AIR_HU = -400.0
RIGHT, LEFT = 1, 2


def resample_plane(hu, spacing, target_mm, order=1):
    """In-plane resampling of [k, j, i] to `target_mm`, with the smoothing that keeps it from aliasing."""
    factors = (spacing[1] / target_mm, spacing[2] / target_mm)
    out = np.asarray(hu, np.float32)
    if order > 0:
        sigma = [0.0] + [max(0.0, 0.5 * (1 / f - 1)) for f in factors]
        if max(sigma) > 0:
            out = ndimage.gaussian_filter(out, sigma)
    shape = [max(1, round(out.shape[1] * factors[0])), max(1, round(out.shape[2] * factors[1]))]
    grid = (len(out), *shape)
    return sample_to(out, (spacing[0], spacing[1], spacing[2]), grid, (spacing[0], target_mm, target_mm), order)


def sample_to(volume, spacing, shape, target, order=1):
    """Sample `volume` on a grid of `shape` and `target` mm with the same centre (in every axis)."""
    ratio = [t / s for t, s in zip(target, spacing)]
    centre = [(n - 1) / 2 for n in volume.shape]
    offset = [c - r * (n - 1) / 2 for c, r, n in zip(centre, ratio, shape)]
    return ndimage.affine_transform(volume, ratio, offset=offset, output_shape=tuple(shape), order=order, mode="nearest")


def ball(radius_mm, spacing):
    """A solid sphere as a structuring element; at least one voxel in plane."""
    r = [max(0, int(radius_mm / s)) for s in spacing]
    grid = np.ogrid[tuple(slice(-n, n + 1) for n in r)]
    return sum((g * s / radius_mm) ** 2 for g, s in zip(grid, spacing)) <= 1.0


def body_mask(hu, cropped):
    """The patient: the largest piece of not-air, holes in each slice filled. A cropped box has air only at its edge."""
    if cropped:
        outside = hu < -960
        labels = np.zeros(hu.shape, np.int32)
        for k, plane in enumerate(outside):
            labels[k] = measure.label(plane, connectivity=1)
        body = np.ones(hu.shape, bool)
        for k in range(len(hu)):
            for corner in ((0, 0), (0, -1)):
                label = labels[k][corner]
                if label:
                    body[k] &= labels[k] != label
        return body
    tissue = ndimage.binary_opening(hu > -300, ball(4.0, (1e9, 1.5, 1.5)))
    labels, count = ndimage.label(tissue)
    if count == 0:
        return np.zeros(hu.shape, bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    body = labels == int(np.argmax(sizes))
    for k in range(len(body)):
        body[k] = ndimage.binary_fill_holes(body[k])
    return body


def airways(hu, candidates, spacing):
    """Trachea and main bronchi: followed slice by slice from the top, while the cross-section stays small."""
    area = spacing[1] * spacing[2]
    found = np.zeros(hu.shape, bool)
    previous = None
    for k in range(len(hu) - 1, -1, -1):
        labels = measure.label((hu[k] < -850) & candidates[k], connectivity=1)
        regions = measure.regionprops(labels)
        mine = np.zeros(labels.shape, bool)
        if previous is None:
            columns = np.nonzero(candidates[k].any(0))[0]
            for r in regions:
                round_ = r.eccentricity < 0.9 and r.solidity > 0.85
                middle = abs(r.centroid[1] - labels.shape[1] / 2) * spacing[2] < 45
                if 60 < r.area * area < 700 and round_ and middle and len(columns):
                    if previous is None or r.area > previous.sum():
                        mine = labels == r.label
                        previous = mine
        else:
            before = previous.sum()
            for r in regions:
                piece = labels == r.label
                if (piece & previous).any() and r.area * area < 900 and r.area < 2.2 * before + 60:
                    mine |= piece
            if not mine.any() or k < len(hu) * 0.25:
                if (found.any(axis=(1, 2)).sum()) * spacing[0] > 40:
                    break
                previous = None  # that was something else: start again lower down
                continue
            previous = mine
        found[k] = mine
    return found


def split(mask, spacing):
    """Both lungs in one mask -> labels RIGHT and LEFT, by the largest pieces and, where they touch, a watershed."""
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel()) if count else np.zeros(1)
    sizes[0] = 0
    voxel = float(np.prod(spacing)) / 1000
    big = [n for n in np.argsort(sizes)[::-1][:2] if sizes[n] * voxel > 150]
    # Both must be lungs: neither may sit on both sides, and the smaller must not be a trifle.
    if len(big) == 2 and sizes[big[1]] > 0.2 * sizes[big[0]]:
        markers = np.zeros(mask.shape, np.int32)
        for n in big:
            markers[labels == n] = n
        out = markers
        pair = big
    elif len(big) >= 1:
        whole = labels == big[0]
        distance = ndimage.distance_transform_edt(whole, sampling=spacing)
        pair = None
        for depth in (3, 5, 8, 11, 15, 20):
            cores, n = ndimage.label(distance > depth)
            size = np.bincount(cores.ravel())
            size[0] = 0
            order = np.argsort(size)[::-1][:2]
            if n >= 2 and size[order[1]] > 0.25 * size[order[0]]:
                seeds = np.zeros(mask.shape, np.int32)
                seeds[cores == order[0]] = 1
                seeds[cores == order[1]] = 2
                out = segmentation.watershed(-distance, seeds, mask=whole)
                pair = [1, 2]
                break
        if pair is None:
            return np.zeros(mask.shape, np.uint8)
    else:
        return np.zeros(mask.shape, np.uint8)
    columns = [ndimage.center_of_mass(out == n)[2] for n in pair]
    result = np.zeros(mask.shape, np.uint8)
    result[out == pair[int(np.argmin(columns))]] = RIGHT
    result[out == pair[int(np.argmax(columns))]] = LEFT
    return result


def close_lung(lung, spacing, radius_mm):
    """Closing in plane (vessels, nodules at the wall) and holes of each slice filled."""
    pad = int(radius_mm / spacing[1]) + 1
    element = ball(radius_mm, (1e9, spacing[1], spacing[2]))
    out = np.pad(lung, ((0, 0), (pad, pad), (pad, pad)))
    out = ndimage.binary_closing(out, element)
    for k in range(len(out)):
        out[k] = ndimage.binary_fill_holes(out[k])
    return out[:, pad:-pad, pad:-pad]


def classical(hu, spacing, cropped=False, close_mm=7.0, lesions=()):
    """Label lungs by thresholds alone. [k, j, i] HU at about 1.5 mm in plane -> uint8 labels. `lesions` known to lie in
    a lung are filled in within the slice's convex hull, which no threshold could do."""
    smooth = ndimage.gaussian_filter(hu, [0.0, 0.7, 0.7])
    air = (smooth < AIR_HU) & body_mask(smooth, cropped)
    tubes = ndimage.binary_dilation(airways(smooth, air, spacing), ball(2.5, (1e9, *spacing[1:])))
    lungs = ndimage.binary_opening(air & ~tubes, ball(2.0, (1e9, *spacing[1:])))
    labels = split(lungs, spacing)
    result = np.zeros(hu.shape, np.uint8)
    for side in (RIGHT, LEFT):
        lung = close_lung(labels == side, spacing, close_mm)
        for k, j, i, diameter in lesions:
            grid = np.ogrid[tuple(slice(0, n) for n in hu.shape)]
            near = sum(((g - c) * s) ** 2 for g, c, s in zip(grid, (k, j, i), spacing)) < (0.6 * diameter + 4) ** 2
            if not (near & lung).any():
                continue
            for z in np.nonzero(near.any(axis=(1, 2)))[0]:
                if lung[z].any():
                    hull = morphology.convex_hull_image(lung[z])
                    lung[z] |= hull & near[z] & (smooth[z] > -700) & (smooth[z] < 120)
        lung &= ~tubes
        result[lung & (result == 0)] = side
    return result


def threshold_baseline(hu, spacing):
    """The guide's segmentation: HU < -400 inside the body, two largest pieces, split by side, small closing."""
    body = body_mask(hu, False)
    return_labels = split((hu < AIR_HU) & body, spacing)
    return return_labels


def network_planes(hu, spacing, size=160, grid_mm=3.0, window=(-1000.0, 400.0), step_mm=2.5):
    """What the network sees: (indices of the slices it is run on, input [n, size, size] in 0..1).

    Every `max(1, floor(step_mm / dz + 0.5))`-th slice from slice 0, and the last one. In plane a box mean over
    `max(1, floor(grid_mm / spacing + 0.5))` pixels each way (edge pixels repeated), then linear sampling at `grid_mm`,
    centre on centre; outside the image -1000 HU.
    """
    every = max(1, int(step_mm / spacing[0] + 0.5))
    chosen = list(range(0, len(hu), every))
    if chosen[-1] != len(hu) - 1:
        chosen.append(len(hu) - 1)
    out = np.empty((len(chosen), size, size), np.float32)
    width = [max(1, int(grid_mm / s + 0.5)) for s in spacing[1:]]
    ratio = [grid_mm / s for s in spacing[1:]]
    offset = [(n - 1) / 2 - r * (size - 1) / 2 for n, r in zip(hu.shape[1:], ratio)]
    for n, k in enumerate(chosen):
        plane = ndimage.uniform_filter(np.asarray(hu[k], np.float32), width, mode="nearest")
        out[n] = ndimage.affine_transform(plane, ratio, offset=offset, output_shape=(size, size), order=1,
                                          mode="constant", cval=-1000.0)
    return chosen, np.clip((out - window[0]) / (window[1] - window[0]), 0, 1)


def to_full_grid(labels, chosen, shape, spacing, grid_mm=3.0):
    """Network labels [n, size, size] -> the image's own grid by nearest neighbour, in plane and along slices (of two
    slices equally near the lower)."""
    size = labels.shape[1]
    pick = []
    for axis in (0, 1):
        n, s = shape[1 + axis], spacing[1 + axis]
        where = ((np.arange(n) - (n - 1) / 2) * s / grid_mm + (size - 1) / 2)
        pick.append(np.floor(where + 0.5).astype(int))
    out = np.zeros(shape, np.uint8)
    rows, columns = pick
    ok = np.ix_((rows >= 0) & (rows < size), (columns >= 0) & (columns < size))
    inner = np.ix_(rows[(rows >= 0) & (rows < size)], columns[(columns >= 0) & (columns < size)])
    for k in range(shape[0]):
        n = int(np.argmin(np.abs(np.array(chosen) - k)))
        plane = np.zeros(shape[1:], np.uint8)
        plane[ok] = labels[n][inner]
        out[k] = plane
    return out


def refine(labels, hu, spacing, *, out_mm=3.0, in_mm=4.5, air_hu=-500.0, close_mm=6.0):
    """A network's labels (already on the grid of `hu`) -> labels at full resolution.

    Right first, then left; each on its own:
    1. Keep the largest 3-D piece and every piece of at least 5 % of it (6-connected).
    2. `core` = the mask eroded in plane by a disc of `in_mm`; `wide` = dilated in plane by a disc of `out_mm`, less
       what the network gave to the other side. The lung is `core`, and of `wide` the voxels below `air_hu`.
    3. Close in plane by a disc of `close_mm`, fill the holes of each slice, cut back to `wide`.
    No voxel is given to two sides.
    """
    inner, outer = (ball(r, (1e9, spacing[1], spacing[2])) for r in (in_mm, out_mm))
    result = np.zeros(hu.shape, np.uint8)
    for side in (RIGHT, LEFT):
        mask = labels == side
        pieces, count = ndimage.label(mask)
        if count == 0:
            continue
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        mask = (sizes >= 0.05 * sizes.max())[pieces]
        core = ndimage.binary_erosion(mask, inner, border_value=1)
        wide = ndimage.binary_dilation(mask, outer) & (labels != 3 - side)
        lung = core | (wide & (hu < air_hu))
        lung = close_lung(lung, spacing, close_mm) & wide
        result[lung & (result == 0)] = side
    return result


def dice(a, b):
    """Dice of two masks; 1 where both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


def hausdorff95(a, b, spacing):
    """95th percentile of the distances between the two surfaces, both ways, mm."""
    if not a.any() or not b.any():
        return float("inf")
    both = np.argwhere(a | b)
    low, high = np.maximum(both.min(0) - 1, 0), both.max(0) + 2
    box = tuple(slice(x, y) for x, y in zip(low, high))
    a, b = a[box], b[box]
    edge_a, edge_b = a & ~ndimage.binary_erosion(a), b & ~ndimage.binary_erosion(b)
    to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing)[edge_a]
    to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing)[edge_b]
    return float(np.percentile(np.concatenate([to_a, to_b]), 95))
