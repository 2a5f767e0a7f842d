"""What the box itself finds: FROC of `scanside model features CASE --json` files, for the detector's own score, the forest's, and both.

    python -m scanside_train.eval_exam --features WORK/features/test --truth WORK/cases/test/truth.csv [--forest models/nodule-class]

For float beside int8, package the detector with `--float` and compute the features with it (`--models`): the same exam, another network.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import tomllib
from pathlib import Path

import numpy as np

from . import forest, froc


def read_truth(folder):
    """truth.csv as `cases` writes it: name -> rows (x, y, z LPS mm, diameter mm, kind, site, origin)."""
    out: dict[str, list] = {}
    with open(folder / "truth.csv", newline="") as handle:
        for r in csv.DictReader(handle):
            out.setdefault(r["seriesuid"], []).append((float(r["coordX"]), float(r["coordY"]), float(r["coordZ"]),
                                                       float(r["diameter_mm"]), r["kind"], r["site"], r["origin"]))
    return out


def asked(truth, low):
    """Nodules asked for, and those too small to be: neither missed nor false."""
    return [t for t in truth if t[3] >= low], [t for t in truth if t[3] < low]


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
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--forest", type=Path)
    parser.add_argument("--excluded", type=Path, help="findings that are neither asked for nor false, in LUNA16's columns")
    parser.add_argument("--low", type=float, default=4.0, help="nodules below this diameter are neither asked for nor false")
    parser.add_argument("--list", action="store_true", help="name every nodule with its score, and the surest false positives")
    options = parser.parse_args()
    truths = read_truth(options.truth.parent)
    excluded = forest.read_truth(options.excluded) if options.excluded else {}
    data = weights = None
    if options.forest:
        data = json.loads((options.forest / "forest.json").read_text())
        said = tomllib.loads((options.forest / "model.toml").read_text())["thresholds"]
        weights = [said[k] for k in ("heat_weight", "forest_weight", "offset")]
    scans: dict[str, list] = {}
    groups = []
    for path in sorted(options.features.glob("*.json")):
        names, rows = forest.candidates(path)
        truth, small = asked(truths.get(path.stem, []), options.low)
        groups += [group_of(t) for t in truth]
        scores = {name: [r[1][names.index(name)] for r in rows] for name in ("heat", "blob")}
        if data:
            order = [names.index(n) for n in data["features"]]
            scores["forest alone"] = forest.evaluate(data, [[r[1][n] for n in order] for r in rows])
            scores["exam"] = forest.combined(np.array(scores["heat"]), scores["forest alone"], weights)
        for name, values in scores.items():
            found = [(*r[0], 0.0, float(v)) for r, v in zip(rows, values)]
            scans.setdefault(name, []).append(froc.match(truth, found, small + excluded.get(path.stem, [])))
        if options.list:
            best, false = scans["exam" if data else "heat"][-1]
            print(path.stem, *(f"\n  {s:.3f} {t[3]:.1f} mm {t[4:]}" for t, s in sorted(zip(truth, best), key=lambda v: v[1])),
                  "\n  false", [round(v, 3) for v in sorted(false)[:-9:-1]])
    for name, many in scans.items():
        table(name, many, groups)


if __name__ == "__main__":
    main()
