"""The classical baseline of nodule finding, for comparison: lungs by threshold, differences of Gaussians, a random forest.

    python -m scanside_train.baseline --train WORK/cases/train --cases WORK/cases/test [--only -v0] [--excluded CSV]

Candidates are kept beside the cases (`blobs/`) for the next run. The measure is that of `eval_exam`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from scipy import ndimage

from . import eval_exam, forest, froc, lungs, patches, readers


def blobs(case):
    """Candidates at 1.5 mm: rows (z, y, x mm, diameter, response) and the features of each."""
    from skimage.feature import blob_dog

    grid = patches.isotropic(case.hu, case.spacing, patches.SPACING_MM)
    labels = lungs.threshold_baseline(case.hu, case.spacing) > 0
    inside = patches.isotropic(labels.astype(np.float32), case.spacing, patches.SPACING_MM, 0) > 0.5
    inside = ndimage.binary_closing(np.pad(inside, 5), iterations=4)[5:-5, 5:-5, 5:-5]
    used = np.argwhere(inside)
    if not len(used):
        return [], np.zeros((0, 8))
    low, high = np.maximum(used.min(0) - 4, 0), used.max(0) + 5
    box = tuple(slice(a, b) for a, b in zip(low, high))
    unit = np.clip((grid[box] + 1000) / 1150, 0, 1).astype(np.float32)
    unit[~inside[box]] = 0
    rows, values = [], []
    for z, y, x, sigma in blob_dog(unit, min_sigma=1, max_sigma=8, sigma_ratio=1.6, threshold=0.08):
        at = tuple(int(v) for v in np.array([z, y, x]) + low)
        if not inside[at]:
            continue
        mm = [(v - (g - 1) / 2) * patches.SPACING_MM + (n - 1) / 2 * s
              for v, g, n, s in zip(at, grid.shape, case.hu.shape, case.spacing)]
        diameter = 2 * math.sqrt(3) * float(sigma) * patches.SPACING_MM
        rows.append((*mm, diameter, float(sigma)))
        # What the guide's forest sees: size, and brightness in and round the blob.
        r = max(1, round(diameter / 2 / patches.SPACING_MM))
        cut = lambda n: grid[tuple(slice(max(0, v - n), v + n + 1) for v in at)]
        inner, outer = cut(max(1, r // 2)), cut(r + 2)
        values.append([diameter, inner.mean(), inner.std(), outer.mean(), outer.std(), np.percentile(outer, 90),
                       np.percentile(outer, 10), grid[at]])
    return rows, np.array(values).reshape(-1, 8)


def scans(folder, only):
    """(name, rows in LPS mm, features) of every case of a folder."""
    kept = folder / "blobs"
    kept.mkdir(exist_ok=True)
    for path in sorted(folder.glob(f"*{only}.nii")):
        known = kept / f"{path.stem}.npz"
        if not known.exists():
            case = readers.nifti(path, path.stem)
            rows, values = blobs(case)
            z, y, x = (np.array([r[n] for r in rows]) + case.origin[2 - n] for n in range(3))
            np.savez(known, rows=np.stack([x, y, z], 1), values=values)
            print(path.stem, len(rows), "blobs", flush=True)
        data = np.load(known)
        yield path.stem, data["rows"], data["values"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--only", default="", help="train on the cases whose names end like this")
    parser.add_argument("--excluded", type=Path)
    parser.add_argument("--low", type=float, default=4.0)
    options = parser.parse_args()
    from sklearn.ensemble import RandomForestClassifier

    truths, x, y = eval_exam.read_truth(options.train), [], []
    for name, rows, values in scans(options.train, options.only):
        x.append(values)
        y += [any(math.dist(r, t[:3]) <= t[3] / 2 for t in truths[name]) for r in rows]
    model = RandomForestClassifier(100, max_depth=10, class_weight="balanced", random_state=0).fit(np.concatenate(x), y)
    truths, excluded = eval_exam.read_truth(options.cases), forest.read_truth(options.excluded) if options.excluded else {}
    many, groups = [], []
    for name, rows, values in scans(options.cases, ""):
        truth, small = eval_exam.asked(truths.get(name, []), options.low)
        groups += [eval_exam.group_of(t) for t in truth]
        found = [(*r, 0.0, float(p)) for r, p in zip(rows, model.predict_proba(values)[:, 1])]
        many.append(froc.match(truth, found, small + excluded.get(name, [])))
    eval_exam.table("threshold lungs, blob_dog, random forest", many, groups)


if __name__ == "__main__":
    main()
