"""How good brain-extract and brain-tumour are on made images of a head they were not trained on: Dice, float beside int8.

    python -m scanside_train.eval_brain ../brain-tumour --work FOLDER [--heads NAME,…] [--cases 20] [--float WORK/brain-tumour.pt]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from . import brain_synth, export, package, train_brain


def overlap(a, b):
    """Dice of two masks; None when both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--heads", help="names of tissue maps, separated by commas (default: all)")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--float", type=Path, dest="weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = options.model.resolve().name
    maps = brain_synth.load(options.work, options.heads.split(",") if options.heads else None)
    session = export.session(options.model / "model.onnx")
    net = package.restore(train_brain.spec_of(name), options.weights) if options.weights else None
    regions = {"brain": [1]} if name == "brain-extract" else {"whole tumour": [1, 2, 3], "core": [1, 3], "enhancing": [3]}
    scores = {(kind, region): [] for kind in ("int8", "float") for region in regions}
    false_ml, both = [], []
    for n in range(options.cases):
        x, y = (v[:1] for v in train_brain.batch(name, maps, [options.seed, n]))
        truth = y[0].numpy()
        answers = {"int8": session.run(None, {"input": x.numpy()})[0][0]}
        if net is not None:
            with torch.no_grad():
                answers["float"] = net(x)[0].numpy()
        for kind, answer in answers.items():
            p = np.exp(answer - answer.max(0))
            p /= p.sum(0)
            found = np.where(p[0] < 0.5, p[1:].argmax(0) + 1, 0)
            for region, members in regions.items():
                if np.isin(truth, members).any():
                    scores[kind, region].append(overlap(np.isin(found, members), np.isin(truth, members)))
            if kind == "int8" and not truth.any():
                false_ml.append(found.astype(bool).sum() * train_brain.GRIDS[name][1] ** 3 / 1e3)
            answers[kind] = found
        if net is not None and (answers["float"] > 0).any():
            both.append(overlap(answers["int8"] > 0, answers["float"] > 0))
    for (kind, region), values in scores.items():
        if values:
            print(f"{kind:5} {region:13} Dice mean {np.mean(values):.3f} median {np.median(values):.3f} over {len(values)} cases")
    if both:
        print(f"int8 against float: Dice of the whole {np.mean(both):.4f}")
    if false_ml:
        print(f"cases without tumour: {len(false_ml)}, falsely marked {np.mean(false_ml):.2f} mL on average, at most {np.max(false_ml):.2f}")


if __name__ == "__main__":
    main()
