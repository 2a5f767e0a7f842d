"""What the box itself finds: FROC of `scanside model features CASE --json` files, for the detector's own score, the forest's, and both.

    python -m scanside_train.eval_exam --features WORK/features/test --truth WORK/cases/test/truth.csv [--forest models/nodule-class]
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

import numpy as np

from . import eval_nodules, forest, froc


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--forest", type=Path)
    parser.add_argument("--excluded", type=Path, help="findings that are neither asked for nor false, in LUNA16's columns")
    parser.add_argument("--low", type=float, default=0.0, help="nodules below this diameter are neither asked for nor false")
    options = parser.parse_args()
    truths = eval_nodules.read_truth(options.truth.parent)
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
        everything = truths.get(path.stem, [])
        truth = [t for t in everything if t[3] >= options.low]
        small = [t for t in everything if t[3] < options.low] + excluded.get(path.stem, [])
        groups += [eval_nodules.group_of(t) for t in truth]
        scores = {name: [r[1][names.index(name)] for r in rows] for name in ("heat", "blob") if name in names}
        if data:
            order = [names.index(n) for n in data["features"]]
            scores["forest alone"] = forest.evaluate(data, [[r[1][n] for n in order] for r in rows])
            scores["exam"] = forest.combined(np.array(scores["heat"]), scores["forest alone"], weights)
        for name, values in scores.items():
            found = [(*r[0], 0.0, float(v)) for r, v in zip(rows, values)]
            scans.setdefault(name, []).append(froc.match(truth, found, small))
    for name, many in scans.items():
        eval_nodules.table(name, many, groups)


if __name__ == "__main__":
    main()
