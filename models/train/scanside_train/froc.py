"""FROC with LUNA16's rules: a candidate within a nodule's radius of its centre is a hit, further ones of the same nodule
are neither hit nor false, CPM is the mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives a scan."""

from __future__ import annotations

import math

import numpy as np

POINTS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def match(truth, found, ignored=()):
    """truth: rows (z, y, x mm, diameter mm, ...); found: rows (z, y, x mm, diameter, score).
    -> (score of each nodule or -inf, scores of the false positives)."""
    best = [-math.inf] * len(truth)
    false = []
    for row in found:
        hit = False
        for n, t in enumerate(truth):
            if math.dist(row[:3], t[:3]) <= max(t[3] / 2, 1e-6):
                best[n] = max(best[n], row[4])
                hit = True
        if not hit and not any(math.dist(row[:3], t[:3]) <= 0.5 * t[3] + 2 for t in ignored):
            false.append(row[4])
    return best, false


def curve(scans):
    """scans: list of (scores of nodules, scores of false positives) -> {point: sensitivity}, CPM, total found."""
    nodules = np.array([s for best, _ in scans for s in best])
    false = np.sort(np.array([s for _, f in scans for s in f]))[::-1]
    out = {}
    for point in POINTS:
        allowed = int(math.floor(point * len(scans) + 1e-9))
        threshold = false[allowed] if allowed < len(false) else -math.inf
        out[point] = float((nodules > threshold).mean()) if len(nodules) else float("nan")
    return out, float(np.mean(list(out.values()))), float((nodules > -math.inf).mean()) if len(nodules) else float("nan")


def bootstrap(scans, draws=200, seed=4):
    """95 % interval of the CPM, scans drawn with replacement."""
    rng = np.random.default_rng(seed)
    values = [curve([scans[i] for i in rng.integers(0, len(scans), len(scans))])[1] for _ in range(draws)]
    return float(np.nanpercentile(values, 2.5)), float(np.nanpercentile(values, 97.5))
