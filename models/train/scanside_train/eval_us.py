"""us-lesion on simulated frames it was not trained on: Dice, sensitivity against false positives, int8 beside float.

    python -m scanside_train.eval_us --model ../us-lesion [--float WORK/us-lesion.pt] [--frames 400]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from scipy import ndimage

from . import bmode, export, nets, train_us

PIXELS_MIN = 16
GAP_PIXELS = 3
DIAMETER_MIN = 5.0


def lesions_of(logits):
    """Candidates of a frame: (confidence, mask), the most certain first."""
    # A lesion that speckle has broken to pieces is one lesion.
    j, i = np.mgrid[-GAP_PIXELS:GAP_PIXELS + 1, -GAP_PIXELS:GAP_PIXELS + 1]
    shown = np.pad(logits > 0, GAP_PIXELS)
    joined = ndimage.binary_closing(shown, i ** 2 + j ** 2 <= GAP_PIXELS ** 2)[(slice(GAP_PIXELS, -GAP_PIXELS),) * 2]
    labels, count = ndimage.label(joined)
    found = []
    for n, box in enumerate(ndimage.find_objects(labels), 1):
        mask = labels == n
        if mask.sum() >= PIXELS_MIN:
            found.append((float((1 / (1 + np.exp(-logits[mask & (logits > 0)]))).mean()), mask))
    return sorted(found, key=lambda f: -f[0])


def measure(network, frames):
    """Every candidate as (confidence, hit of which lesion or None), the lesions of 5 mm and more, and Dice of those found."""
    candidates, wanted, dice = [], 0, {}
    for n, (image, labels, scene) in enumerate(frames):
        logits = network(image.astype(np.float32)[None, None] / 255)[0, 0]
        counted = []
        for k, lesion in enumerate(scene.lesions, 1):
            if lesion.diameter >= DIAMETER_MIN and (labels == k).sum() >= PIXELS_MIN:
                counted.append(k)
        wanted += len(counted)
        for confidence, mask in lesions_of(logits):
            overlap = np.bincount(labels[mask], minlength=len(scene.lesions) + 1)
            overlap[0] = 0
            k = int(overlap.argmax())
            if not overlap[k] or overlap[k] < 0.3 * min(mask.sum(), (labels == k).sum()):
                candidates.append((confidence, None))
                continue
            truth = labels == k
            if k in counted:
                candidates.append((confidence, (n, k)))
                dice[(n, k)] = max(dice.get((n, k), 0), 2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    return candidates, wanted, dice


def operating_point(candidates, wanted, frames, false_positives):
    """The lowest confidence with at most so many false positives a frame, and the sensitivity there."""
    best = (1.0, 0.0)
    for least in sorted({c for c, _ in candidates}, reverse=True):
        wrong = sum(1 for c, hit in candidates if c >= least and hit is None)
        if wrong > false_positives * frames:
            break
        best = (least, len({hit for c, hit in candidates if c >= least and hit}) / max(wanted, 1))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--float", type=Path, help="checkpoint to compare with")
    parser.add_argument("--frames", type=int, default=400)
    options = parser.parse_args()
    frames = [bmode.sample(train_us.EVALUATION_SEEDS + n) for n in range(options.frames)]
    with tempfile.TemporaryDirectory() as scratch:
        networks = {"int8": options.model / "golden/model.qop.onnx"}
        if options.float:
            from . import package
            plain = Path(scratch) / "float.onnx"
            export.float_onnx(package.restore(nets.us_net(), options.float), (1, 1, bmode.SIZE, bmode.SIZE), plain)
            networks["float"] = plain
        print("| | lesions of 5 mm and more | mean Dice of those found | mean Dice of all | sensitivity at 0.2 FP a frame | confidence there "
              "| sensitivity at 0.05 |\n|---|---|---|---|---|---|---|")
        for name, path in networks.items():
            session = export.session(path, 1)
            run = lambda x: session.run(None, {"input": x})[0]
            candidates, wanted, dice = measure(run, frames)
            least, sensitivity = operating_point(candidates, wanted, len(frames), 0.2)
            strict = operating_point(candidates, wanted, len(frames), 0.05)[1]
            total = sum(dice.values())
            print(f"| {name} | {wanted} | {total / max(len(dice), 1):.3f} | {total / max(wanted, 1):.3f} | {sensitivity:.3f} "
                  f"| {least:.3f} | {strict:.3f} |", flush=True)


if __name__ == "__main__":
    main()
