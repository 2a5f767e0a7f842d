"""nodule-detect as an exam runs it: pyramid, tiles, decoding, suppression. The reference for the Rust side."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
from skimage import morphology

from . import export, nets, patches

# Of a tile of 64 the inner 56 count: patches were trained to their edges, and a halo of 8 would cost a third more work.
TILE, HALO = 64, 4


def gate(labels, spacing, grow_mm=4.0, hull_limit=1.6):
    """Where candidates may lie: each lung closed by its per-slice convex hull (used only where the hull's area is at
    most `hull_limit` times the lung's, so that a crescent does not swallow the heart), then grown by `grow_mm` in plane.
    Never the other lung's hull."""
    out = np.zeros(labels.shape, bool)
    reach = max(1, round(grow_mm / spacing[1]))
    y, x = np.ogrid[-reach:reach + 1, -reach:reach + 1]
    disc = y * y + x * x <= reach * reach
    for side in (1, 2):
        for k in np.nonzero((labels == side).any((1, 2)))[0]:
            lung = labels[k] == side
            rows, columns = np.nonzero(lung.any(1))[0], np.nonzero(lung.any(0))[0]
            box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            hull = morphology.convex_hull_image(lung[box]) if lung.sum() > 20 else lung[box]
            if hull.sum() <= hull_limit * lung.sum():
                lung = lung.copy()
                lung[box] |= hull
            out[k] |= ndimage.binary_dilation(lung, disc)
    return out


def tiles(inside, tile=TILE, halo=HALO):
    """Origins (may be negative) of tiles whose inner parts, `tile - 2 halo` wide, cover the gate's bounding box. The
    first inner part starts at the box's low corner, rounded down to a multiple of 4 voxels."""
    inner = tile - 2 * halo
    starts = []
    for axis in range(3):
        used = np.nonzero(inside.any(tuple(a for a in range(3) if a != axis)))[0]
        if len(used) == 0:
            return []
        low = int(used[0]) // 4 * 4
        starts.append([low - halo + n * inner for n in range(max(1, -(-(int(used[-1]) + 1 - low) // inner)))])
    return [(z, y, x) for z in starts[0] for y in starts[1] for x in starts[2]]


def level(run, hu, inside, factor, low_logit=-4.0, tile=TILE, halo=HALO):
    """Peaks of one pyramid level. `hu` isotropic at 1.5 mm * factor, `inside` the gate on that grid. Returns rows
    (k, j, i in voxels of this grid, diameter mm, logit) and the number of tiles run."""
    stride, found, runs = patches.STRIDE, [], 0
    unit = np.clip((hu - patches.WINDOW[0]) / (patches.WINDOW[1] - patches.WINDOW[0]), 0, 1).astype(np.float32)
    p = tile // stride
    h = halo // stride
    for origin in tiles(inside, tile, halo):
        cut = tuple(slice(max(0, o + halo), min(n, o + tile - halo)) for o, n in zip(origin, hu.shape))
        if not inside[cut].any():
            continue
        x = np.zeros((tile,) * 3, np.float32)
        source = tuple(slice(max(0, o), min(n, o + tile)) for o, n in zip(origin, hu.shape))
        x[tuple(slice(s.start - o, s.stop - o) for s, o in zip(source, origin))] = unit[source]
        heat, box = run(x[None, None])
        runs += 1
        heat, box = heat[0, 0], box[0]
        # A peak is no lower than its 26 neighbours; of equals the first in array order wins at suppression.
        peak = (heat >= ndimage.maximum_filter(heat, 3, mode="constant", cval=-np.inf)) & (heat > low_logit)
        inner = np.zeros_like(peak)
        inner[(slice(h, p - h),) * 3] = True
        for c in np.argwhere(peak & inner):
            c = tuple(c)
            at = [o + stride * v + (stride - 1) / 2 + float(box[(n, *c)]) / patches.SPACING_MM
                  for n, (o, v) in enumerate(zip(origin, c))]
            where = tuple(int(math.floor(v + 0.5)) for v in at)
            if all(0 <= w < n for w, n in zip(where, hu.shape)) and inside[where]:
                found.append((*at, math.exp(float(np.clip(box[(3, *c)], 0.5, 4.0))) * factor, float(heat[c])))
    return found, runs


def suppress(rows):
    """Strongest first; a candidate whose centre lies within half the larger diameter of a stronger one goes."""
    kept = []
    for row in sorted(rows, key=lambda r: -r[4]):
        if all(math.dist(row[:3], other[:3]) > 0.5 * max(row[3], other[3]) for other in kept):
            kept.append(row)
    return kept


def candidates(run, hu, spacing, inside, tile=TILE, halo=HALO, factors=patches.FACTORS, low_logit=-4.0):
    """All candidates of a volume: rows (k, j, i in mm from voxel 0 of `hu`, diameter mm, logit), strongest first."""
    rows, runs = [], 0
    for factor in factors:
        target = patches.SPACING_MM * factor
        grid = patches.isotropic(hu, spacing, target)
        allowed = patches.isotropic(inside.astype(np.float32), spacing, target, 0) > 0.5
        found, n = level(run, grid, allowed, factor, low_logit, tile, halo)
        runs += n
        low, high = patches.TARGETS[factor]
        for k, j, i, d, logit in found:
            if factor > 1 and d < 1.25 * low:
                continue  # the fine level's business
            mm = [(v - (g - 1) / 2) * target + (n - 1) / 2 * s for v, g, n, s in zip((k, j, i), grid.shape, hu.shape, spacing)]
            rows.append((*mm, d, logit))
    return suppress(rows), runs


def onnx_runner(path, threads=1):
    session = export.session(path, threads)
    shape = session.get_inputs()[0].shape
    run = lambda x: session.run(["heatmap", "box"], {"input": x.astype(np.float32)})
    run.tile = shape[2]
    return run


def float_runner(weights):
    net = nets.Network(nets.nodule_net())
    net.load_state_dict(torch.load(weights, weights_only=False, map_location="cpu")["net"])
    net.eval()
    def run(x):
        with torch.no_grad():
            return [v.float().numpy() for v in net(torch.from_numpy(x))]
    run.tile = TILE
    return run
