"""FROC by the rules of LUNA16's own script (noduleCADEvaluationLUNA16): a candidate nearer to a nodule's centre than its radius is
a hit, of several the surest counts and the others are neither hit nor false; a candidate on an excluded finding is neither (one of
unknown size counts as 10 mm); at most 100 marks a scan. CPM is the mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives a
scan, read off the curve by linear interpolation. `scanside eval froc` gives the same numbers."""

from __future__ import annotations

import math

import numpy as np

POINTS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
MARKS_MAX = 100


def match(truth, found, excluded=()):
    """truth, excluded: rows (z, y, x mm, diameter mm, ...); found: rows (z, y, x mm, diameter, score).
    -> (score of each nodule or -inf, scores of the false positives)."""
    best = [-math.inf] * len(truth)
    false = []
    for row in sorted(found, key=lambda r: -r[4])[:MARKS_MAX]:
        hit = False
        for n, t in enumerate(truth):
            if math.dist(row[:3], t[:3]) < t[3] / 2:
                best[n] = max(best[n], row[4])
                hit = True
        if not hit and not any(math.dist(row[:3], t[:3]) < (t[3] / 2 if t[3] >= 0 else 5.0) for t in excluded):
            false.append(row[4])
    return best, false


def curve(scans):
    """scans: list of (scores of nodules, scores of false positives) -> {point: sensitivity}, CPM, total found."""
    nodules = sum(len(best) for best, _ in scans)
    marks = [(s, 1) for best, _ in scans for s in best if s > -math.inf] + [(s, 0) for _, f in scans for s in f]
    marks.sort(key=lambda m: -m[0])
    false, hits, x, y = 0, 0, [0.0], [0.0]
    for n, (score, hit) in enumerate(marks):
        hits, false = hits + hit, false + 1 - hit
        if n + 1 == len(marks) or marks[n + 1][0] < score:
            x.append(false / max(1, len(scans)))
            y.append(hits / max(1, nodules))
    out = dict(zip(POINTS, (float(v) for v in np.interp(POINTS, x, y))))
    return out, float(np.mean(list(out.values()))), hits / nodules if nodules else float("nan")


def bootstrap(scans, draws=200, seed=4):
    """95 % interval of the CPM, scans drawn with replacement."""
    rng = np.random.default_rng(seed)
    values = [curve([scans[i] for i in rng.integers(0, len(scans), len(scans))])[1] for _ in range(draws)]
    return float(np.nanpercentile(values, 2.5)), float(np.nanpercentile(values, 97.5))
