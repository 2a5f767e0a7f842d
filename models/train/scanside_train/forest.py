"""nodule-class: a random forest on the features that `scanside model features` gives for every candidate, as data.

    scanside model features CASE.nii --json > WORK/features/CASE.json       for every case of WORK/cases/train
    python -m scanside_train.forest --features WORK/features --truth WORK/cases/train/truth.csv --out models/nodule-class

The candidate within a nodule's radius (at least 2.5 mm) of its centre that the detector is surest of is a nodule; others in and round it
teach nothing. The forest does not see what the detector says: on the lungs the detector was trained on it would learn to believe it. The
two opinions are added as log odds, `heat_weight * logit + forest_weight * ln((p + 0.01) / (1.01 - p)) + offset`, weighed and
calibrated on patients whom the forest had not seen. scikit-learn compares 32-bit features with thresholds and averages the leaves' class parts: the
file holds just that, so that the box computes the same number (schema `scanside.forest/1`).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
from pathlib import Path

import numpy as np

from . import cards, export, froc


def read_truth(path):
    """Case name -> rows (x, y, z LPS mm, diameter mm)."""
    out: dict[str, list] = {}
    with open(path, newline="") as handle:
        for r in csv.DictReader(handle):
            out.setdefault(r["seriesuid"], []).append(
                tuple(float(r[c]) for c in ("coordX", "coordY", "coordZ", "diameter_mm")))
    return out


def candidates(path):
    """One features file -> (feature names, rows of (LPS mm centre, values))."""
    data = json.loads(Path(path).read_text())
    names = data["features"]
    # A feature that is not a number goes right at every branch: so does a very large one.
    number = lambda v: 1e9 if v is None or v != v else float(v)
    rows = [(tuple(c["centroid_lps_mm"]), [number(c["features"][n]) for n in names]) for c in data["candidates"]]
    return names, rows


def label(rows, truth, heat):
    """(1 nodule / 0 not) and a weight for each candidate; `heat`: index of the detector's logit."""
    labels, weights = [0] * len(rows), [1.0] * len(rows)
    hits = []
    for t in truth:
        apart = [math.dist(r[0], t[:3]) for r in rows]
        for n, d in enumerate(apart):
            if d <= t[3] / 2 + 4:
                weights[n] = 0.0
        hits.append(max((n for n, d in enumerate(apart) if d <= max(t[3] / 2, 2.5)), key=lambda n: rows[n][1][heat], default=None))
    for n in hits:
        if n is not None:
            labels[n], weights[n] = 1, 1.0
    return labels, weights


HEAT_MIN = -4.0  # what the network did not mark at all


def log_odds(p):
    return np.log((np.asarray(p) + 0.01) / (1.01 - np.asarray(p)))


def combined(heat, p, weights):
    """The exam's confidence: detector and forest as one. `weights`: heat_weight, forest_weight, offset."""
    a, b, c = weights
    return 1 / (1 + np.exp(-(a * np.maximum(heat, HEAT_MIN) + b * log_odds(p) + c)))


def as_data(model, names):
    """A fitted RandomForestClassifier -> the contents of forest.json."""
    trees = []
    for estimator in model.estimators_:
        tree = estimator.tree_
        counts = tree.value[:, 0, :]
        parts = counts[:, 1] / np.maximum(counts.sum(1), 1e-12)
        leaf = tree.children_left < 0
        trees.append(dict(
            feature=[-1 if l else int(f) for l, f in zip(leaf, tree.feature)],
            threshold=[0.0 if l else float(t) for l, t in zip(leaf, tree.threshold)],
            left=[int(v) for v in tree.children_left], right=[int(v) for v in tree.children_right],
            value=[round(float(p), 7) if l else 0.0 for l, p in zip(leaf, parts)]))
    return dict(schema="scanside.forest/1", features=list(names), trees=trees)


def evaluate(data, values):
    """forest.json on rows of features: what the Rust side does."""
    out = []
    for row in np.asarray(values, np.float32):
        total = 0.0
        for tree in data["trees"]:
            n = 0
            while tree["feature"][n] >= 0:
                n = tree["left"][n] if row[tree["feature"][n]] <= tree["threshold"][n] else tree["right"][n]
            total += tree["value"][n]
        out.append(total / len(data["trees"]))
    return np.array(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True, action="append")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drop", action="append", default=["heat", "heat_fine", "heat_coarse"], help="a feature not to use")
    parser.add_argument("--low", type=float, default=4.0, help="nodules below this diameter are not asked for")
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--false-positives", type=float, default=2.0, help="a scan, at the reporting threshold")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--version", default="0.1.0")
    options = parser.parse_args()
    from sklearn.ensemble import RandomForestClassifier

    truths = {}
    for path in options.truth:
        truths.update(read_truth(path))
    names, cases = None, []
    for path in sorted(options.features.glob("*.json")):
        found, rows = candidates(path)
        if names is not None and found != names:
            raise SystemExit(f"{path.name}: other features than the files before it")
        names = found
        if path.stem not in truths:
            raise SystemExit(f"{path.name}: no truth for it")
        cases.append((path.stem, rows, truths[path.stem]))
    keep = [n for n, name in enumerate(names) if name not in options.drop]
    used = [names[n] for n in keep]

    heat = names.index("heat")

    def stack(many):
        x, y, w = [], [], []
        for _, rows, truth in many:
            labels, weights = label(rows, truth, heat)
            x += [[r[1][n] for n in keep] for r in rows]
            y += labels
            w += weights
        return np.clip(np.array(x), -1e9, 1e9), np.array(y), np.array(w)

    def fit(many):
        x, y, w = stack(many)
        w = w * np.where(y == 1, w.sum() / 2 / max(1, y.sum()), 0.5)
        model = RandomForestClassifier(options.trees, max_depth=options.depth, min_samples_leaf=5, max_features="sqrt",
                                       random_state=7, n_jobs=1)
        return model.fit(x, y, sample_weight=w)

    # Each patient left out in turn: the honest figure of the second stage on the training scans.
    patient = lambda case: case[0].rsplit("-", 1)[0]
    left_out = []
    for one in sorted({patient(c) for c in cases}):
        model = fit([c for c in cases if patient(c) != one])
        for case in (c for c in cases if patient(c) == one):
            x, y, w = stack([case])
            p = model.predict_proba(x)[:, 1] if len(x) else np.zeros(0)
            left_out.append((case, np.array([r[1][heat] for r in case[1]]), p, y, w))

    def measure(name, score):
        scans = []
        for (_, rows, truth), heats, p, _, _ in left_out:
            small = [t for t in truth if t[3] < options.low]
            found = [(*r[0], 0.0, float(v)) for r, v in zip(rows, score(heats, p))]
            scans.append(froc.match([t for t in truth if t[3] >= options.low], found, small))
        points, cpm, found = froc.curve(scans)
        print(f"{name}, patients left out in turn: CPM {cpm:.3f}, found at all {found:.3f}, "
              + " ".join(f"{k:g}:{v:.2f}" for k, v in points.items()), flush=True)
        return cpm, scans

    measure("detector alone", lambda h, p: h)
    measure("forest alone", lambda h, p: p)
    part = max((0.1, 0.2, 0.3, 0.5, 0.8), key=lambda b: measure(f"detector and {b} forest", lambda h, p: combined(h, p, (1.0, b, 0.0)))[0])
    # Scale and offset: what the score means on candidates of patients left out.
    from sklearn.linear_model import LogisticRegression

    heats, p, y, w = (np.concatenate([v[n] for v in left_out]) for n in (1, 2, 3, 4))
    score = np.maximum(heats, HEAT_MIN) + part * log_odds(p)
    line = LogisticRegression(C=100.0).fit(score[w > 0, None], y[w > 0])
    scale = float(line.coef_[0, 0])
    weights = tuple(round(float(v), 4) for v in (scale, scale * part, line.intercept_[0]))
    _, after = measure("as the exam does it", lambda h, p: combined(h, p, weights))
    false = sorted((s for _, many in after for s in many), reverse=True)
    limit = options.false_positives * len(after)
    report = float(np.clip(false[int(limit)] if int(limit) < len(false) else 0.5, 0.02, 0.95))
    print(f"confidence_min {report:.3f}: {options.false_positives:g} false positives a scan in patients left out; weights {weights}", flush=True)
    model = fit(cases)
    x, y, _ = stack(cases)
    data = as_data(model, used)
    worst = np.abs(evaluate(data, x[:200]) - model.predict_proba(x[:200])[:, 1]).max()
    print(f"{len(y)} candidates, {y.sum()} of them nodules; forest.json differs from scikit-learn by at most {worst:.1e}")
    order = np.argsort(model.feature_importances_)[::-1]
    print("most used:", ", ".join(f"{used[n]} {model.feature_importances_[n]:.2f}" for n in order[:10]))

    out = options.out
    (out / "golden").mkdir(parents=True, exist_ok=True)
    (out / "forest.json").write_text(json.dumps(data, separators=(",", ":")))
    rows = np.concatenate([x[y == 1][:8], x[y == 0][:8]]).astype("<f4")
    rows.tofile(out / "golden/input.bin")
    evaluate(data, rows).astype("<f4").tofile(out / "golden/probability.bin")
    (out / "CARD.md").write_text(cards.nodule_class(options.results, len(y), int(y.sum()), used))
    export.write_manifest(out, {
        "schema": "scanside.model/1", "name": "nodule-class", "version": options.version, "kind": "forest",
        "summary": "Nodule or not, for each candidate, from named features", "licence": "MIT OR Apache-2.0",
    }, {
        "input": {"modality": "CT"},
        "output": {"kind": "probability", "labels": ["nodule"]},
        "thresholds": {"confidence_min": round(report, 3), "heat_weight": weights[0], "forest_weight": weights[1],
                       "offset": weights[2], "heat_min": HEAT_MIN},
        "golden": {"input": "golden/input.bin", "input_shape": list(rows.shape), "outputs": ["golden/probability.bin"],
                   "output_shapes": [[len(rows)]], "tolerance": 0.0},
        "provenance": {"training_data": "candidates of nodule-detect in synthetic scans made from its training cases",
                       "date": datetime.date.today().isoformat(), "command": "python -m scanside_train.forest",
                       "intended_use": "research; not a medical device"},
    })


if __name__ == "__main__":
    main()
