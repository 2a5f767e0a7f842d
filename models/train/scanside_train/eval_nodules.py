"""nodule-detect measured: FROC on scans with known nodules, float beside int8, the classical baseline beside both.

    python -m scanside_train.eval_nodules --model models/nodule-detect --cases WORK/cases/heldout --lungs models/lung-seg \\
        [--float WORK/nodule-detect.pt] [--baseline WORK/cases/train]

Cases: `*.nii` and truth.csv as `cases` writes them. Lungs by lung-seg and its refinement, as the exam does. Annotated lesions
count as nodules; with `--baseline`, blob_dog candidates in thresholded lungs, ranked by a random forest trained on the folder given.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

import numpy as np

from . import detect, eval_lungs, froc, lungs, patches, readers


def read_truth(folder):
    """name -> rows (x, y, z LPS mm, diameter mm, kind, site, origin)."""
    out: dict[str, list] = {}
    with open(folder / "truth.csv", newline="") as handle:
        for r in csv.DictReader(handle):
            out.setdefault(r["seriesuid"], []).append((float(r["coordX"]), float(r["coordY"]), float(r["coordZ"]),
                                                       float(r["diameter_mm"]), r["kind"], r["site"], r["origin"]))
    return out


def lung_gate(case, lung_model, cache):
    """Refined lungs -> gate; kept beside the case for the next run."""
    kept = cache / f"{case.name}-gate.npz"
    if kept.exists():
        return np.unpackbits(np.load(kept)["bits"])[:case.hu.size].reshape(case.hu.shape).astype(bool)
    raw = eval_lungs.network_labels(eval_lungs.onnx_runner(lung_model / "model.onnx"), case.hu, case.spacing)
    inside = detect.gate(lungs.refine(raw, case.hu, case.spacing), case.spacing)
    cache.mkdir(exist_ok=True)
    np.savez_compressed(kept, bits=np.packbits(inside))
    return inside


def blobs(case, inside):
    """The guide's candidates: differences of Gaussians in the lungs, at 1.5 mm. Rows (z, y, x mm, diameter, response)."""
    from scipy import ndimage
    from skimage.feature import blob_dog

    grid = patches.isotropic(case.hu, case.spacing, patches.SPACING_MM)
    allowed = patches.isotropic(inside.astype(np.float32), case.spacing, patches.SPACING_MM, 0) > 0.5
    used = np.argwhere(allowed)
    if not len(used):
        return [], grid
    low, high = np.maximum(used.min(0) - 4, 0), used.max(0) + 5
    box = tuple(slice(a, b) for a, b in zip(low, high))
    unit = np.clip((grid[box] + 1000) / 1150, 0, 1)
    unit[~ndimage.binary_dilation(allowed[box], iterations=2)] = 0
    rows = []
    for z, y, x, sigma in blob_dog(unit, min_sigma=1, max_sigma=8, sigma_ratio=1.6, threshold=0.08):
        at = np.array([z, y, x]) + low
        if allowed[tuple(at.astype(int))]:
            mm = [(v - (g - 1) / 2) * patches.SPACING_MM + (n - 1) / 2 * s
                  for v, g, n, s in zip(at, grid.shape, case.hu.shape, case.spacing)]
            rows.append((*mm, 2 * math.sqrt(3) * sigma * patches.SPACING_MM, float(sigma), at))
    return rows, grid


def blob_features(rows, grid):
    """What the guide's forest sees: size, and brightness in and round the blob."""
    out = []
    for *_, diameter, _, at in rows:
        r = max(1, round(diameter / 2 / patches.SPACING_MM))
        z, y, x = (int(v) for v in at)
        cut = lambda n: grid[max(0, z - n):z + n + 1, max(0, y - n):y + n + 1, max(0, x - n):x + n + 1]
        inner, outer = cut(max(1, r // 2)), cut(r + 2)
        out.append([diameter, inner.mean(), inner.std(), outer.mean(), outer.std(), np.percentile(outer, 90),
                    np.percentile(outer, 10), grid[z, y, x]])
    return np.array(out)


def to_rows(truth, case):
    """LPS truth -> (z, y, x mm from voxel 0, diameter, kind, site, origin)."""
    return [(t[2] - case.origin[2], t[1] - case.origin[1], t[0] - case.origin[0], *t[3:]) for t in truth]


def table(name, scans, groups):
    """Sensitivities as one JSON line; per group the sensitivity at 1 and 4 false positives a scan."""
    points, cpm, found = froc.curve(scans)
    low, high = froc.bootstrap(scans)
    out = {"scans": len(scans), "nodules": sum(len(b) for b, _ in scans), "cpm": round(cpm, 3),
           "cpm95": [round(low, 3), round(high, 3)], "found_at_all": round(found, 3),
           "sensitivity": {str(k): round(v, 3) for k, v in points.items()}}
    false = np.sort(np.array([s for _, f in scans for s in f]))[::-1]
    # Per group without interpolation: what scores above the first false positive that is one too many.
    at = {p: false[int(p * len(scans))] if int(p * len(scans)) < len(false) else -math.inf for p in (1.0, 4.0)}
    scores = [s for best, _ in scans for s in best]
    out["groups"] = {}
    for label in sorted({g for many in groups for g in many}):
        mine = np.array([s for s, many in zip(scores, groups) if label in many])
        out["groups"][label] = [len(mine), *(round(float((mine > at[p]).mean()), 3) for p in (1.0, 4.0))]
    print(name, json.dumps(out), flush=True)


def group_of(t):
    d = t[3]
    size = "4-6 mm" if d < 6 else "6-10 mm" if d < 10 else "10-20 mm" if d < 20 else "over 20 mm"
    return [size, t[4], *([t[5]] if t[5] else []), t[6]]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lungs", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--float", type=Path, dest="weights")
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--list", action="store_true", help="name every missed nodule")
    options = parser.parse_args()
    runners = {"int8": detect.onnx_runner(options.model / "model.onnx")}
    if options.weights:
        runners["float"] = detect.float_runner(options.weights)

    def scan(folder):
        truths = read_truth(folder)
        for path in sorted(folder.glob("*.nii")):
            case = readers.nifti(path, path.stem)
            yield case, lung_gate(case, options.lungs, folder / "gates"), to_rows(truths.get(path.stem, []), case)

    forest = None
    if options.baseline:
        from sklearn.ensemble import RandomForestClassifier
        features, labels = [], []
        for case, inside, truth in scan(options.baseline):
            rows, grid = blobs(case, inside)
            features.append(blob_features(rows, grid))
            labels += [any(math.dist(r[:3], t[:3]) <= t[3] / 2 for t in truth) for r in rows]
        forest = RandomForestClassifier(100, max_depth=10, class_weight="balanced", random_state=0)
        forest.fit(np.concatenate(features), labels)
    scans: dict[str, list] = {}
    groups = []
    for case, inside, truth in scan(options.cases):
        groups += [group_of(t) for t in truth]
        for kind, run in runners.items():
            rows, runs = detect.candidates(run, case.hu, case.spacing, inside)
            best, false = froc.match(truth, rows)
            scans.setdefault(kind, []).append((best, false))
            print(case.name, kind, f"{runs} tiles, {len(rows)} candidates", flush=True)
            if options.list:
                for t, score in sorted(zip(truth, best), key=lambda v: v[1]):
                    print("   ", [round(v, 1) for v in t[:4]], t[4:], round(score, 2))
                print("    false", [round(f, 2) for f in false[:12]])
        if forest is not None:
            rows, grid = blobs(case, inside)
            p = forest.predict_proba(blob_features(rows, grid))[:, 1] if rows else []
            scans.setdefault("baseline (blob_dog and forest)", []).append(
                froc.match(truth, [(*r[:4], s) for r, s in zip(rows, p)]))
    for kind, many in scans.items():
        table(kind, many, groups)


if __name__ == "__main__":
    main()
