"""lung-seg measured: Dice and 95 % Hausdorff per side, float beside int8, the threshold baseline beside both.

    python -m scanside_train.eval_lungs --model models/lung-seg --work FOLDER [--float WEIGHTS.pt] [--case NAME ...]
    python -m scanside_train.eval_lungs --model models/lung-seg --dicom FOLDER --lobes LABELS.nii.gz
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from . import export, lungs, nets, readers


def network_labels(run, hu, spacing):
    """Labels of a network on the image's grid, before refinement. `run`: [n, 1, s, s] -> logits."""
    chosen, planes = lungs.network_planes(hu, spacing)
    logits = np.concatenate([run(p[None, None]) for p in planes])
    return lungs.to_full_grid(logits.argmax(1).astype(np.uint8), chosen, hu.shape, spacing)


def onnx_runner(path):
    session = export.session(path, 1)
    return lambda x: session.run(None, {"input": x.astype(np.float32)})[0]


def float_runner(weights):
    net = nets.Network(nets.lung_net())
    net.load_state_dict(torch.load(weights, weights_only=False, map_location="cpu")["net"])
    net.eval()
    def run(x):
        with torch.no_grad():
            return net(torch.from_numpy(x.astype(np.float32))).numpy()
    return run


def score(labels, truth, spacing, surface=True):
    """Per side and both: Dice, HD95 mm; and the part of each side called by the other's name."""
    out = {"dice": lungs.dice(labels > 0, truth > 0)}
    for side, name in ((1, "right"), (2, "left")):
        out[f"dice_{name}"] = lungs.dice(labels == side, truth == side)
        if surface:
            out[f"hd95_{name}_mm"] = lungs.hausdorff95(labels == side, truth == side, spacing)
        out[f"swapped_{name}"] = float(((labels == 3 - side) & (truth == side)).sum() / max(1, (truth == side).sum()))
    return {k: round(v, 4) for k, v in out.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--float", type=Path, dest="weights")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--case", action="append")
    parser.add_argument("--dicom", type=Path)
    parser.add_argument("--lobes", type=Path)
    options = parser.parse_args()
    runners = {"int8": onnx_runner(options.model / "model.onnx")}
    if options.weights:
        runners["float"] = float_runner(options.weights)
    todo = []
    if options.dicom:
        case = readers.dicom_series(options.dicom)
        lobes = readers.nifti(options.lobes).hu.astype(np.int16)
        truth = np.zeros(case.hu.shape, np.uint8)
        if lobes.shape != case.hu.shape:
            raise SystemExit(f"labels are {lobes.shape}, the series {case.hu.shape}")
        truth[np.isin(lobes, (12, 13, 14))], truth[np.isin(lobes, (10, 11))] = 1, 2
        todo.append((options.dicom.parent.name, case.hu, case.spacing, truth, False))
    else:
        for path in sorted((options.work / "prepared").glob("*.npz")):
            if not options.case or path.stem in options.case:
                data = np.load(path)
                todo.append((path.stem, data["plane"].astype(np.float32), tuple(data["plane_spacing"]), data["labels"],
                             bool(data["cropped"])))
    for name, hu, spacing, truth, cropped in todo:
        for kind, run in runners.items():
            raw = network_labels(run, hu, spacing)
            print(name, kind, "network alone", json.dumps(score(raw, truth, spacing, False)))
            print(name, kind, "refined", json.dumps(score(lungs.refine(raw, hu, spacing), truth, spacing)), flush=True)
        if not cropped:
            print(name, "threshold baseline", json.dumps(score(lungs.threshold_baseline(hu, spacing), truth, spacing)), flush=True)


if __name__ == "__main__":
    main()
