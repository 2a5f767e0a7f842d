"""lung-seg: train on the prepared cases. Resumable: run again to go on from the last checkpoint.

    python -m scanside_train.train_lungs --work FOLDER [--minutes 20] [--without CASE]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from . import nets
from .learning import Learning

SIZE, GRID_MM, PLANE_MM, CANVAS = 160, 3.0, 1.5, 352
WINDOW = (-1000.0, 400.0)


def surround(plane, labels, rng):
    """A box cut out of a scan, put back into a body: soft tissue, then an ellipse of skin, then air and a table."""
    k, h, w = plane.shape
    canvas = np.empty((k, CANVAS, CANVAS), np.int16)
    marks = np.zeros((k, CANVAS, CANVAS), np.uint8)
    top, left = (CANVAS - h) // 2, (CANVAS - w) // 2
    y, x = np.mgrid[:CANVAS, :CANVAS] - CANVAS / 2
    body = (x / (w / 2 + rng.uniform(22, 40))) ** 2 + (y / (h / 2 + rng.uniform(18, 36))) ** 2 < 1
    tissue = rng.normal(0, 25, (CANVAS, CANVAS))
    depth = np.hypot(x / (w / 2), y / (h / 2))
    tissue += np.where(depth > 1.12, -90, 45)  # fat under the skin, muscle at the chest wall
    outside = np.where(body, tissue, -1000)
    outside[top + h + 45:top + h + 52, 60:-60] = -300  # the table
    for n in range(k):
        canvas[n] = outside
        box = plane[n].copy()
        box[box < -960] = np.where(labels[n] > 0, box, -1000)[box < -960]
        canvas[n, top:top + h, left:left + w] = box
        marks[n, top:top + h, left:left + w] = labels[n]
    return canvas, marks


def centre(plane, labels):
    """Every other case on the same canvas, padded with air or cut."""
    k, h, w = plane.shape
    canvas = np.full((k, CANVAS, CANVAS), -1000, np.int16)
    marks = np.zeros((k, CANVAS, CANVAS), np.uint8)
    ch, cw = min(h, CANVAS), min(w, CANVAS)
    a, b, c, d = (CANVAS - ch) // 2, (CANVAS - cw) // 2, (h - ch) // 2, (w - cw) // 2
    canvas[:, a:a + ch, b:b + cw] = plane[:, c:c + ch, d:d + cw]
    marks[:, a:a + ch, b:b + cw] = labels[:, c:c + ch, d:d + cw]
    return canvas, marks


def load(folder, without=()):
    """Prepared cases -> (hu int16 [n, C, C], labels, weight a slice) so that each case counts alike per millimetre."""
    rng = np.random.default_rng(5)
    images, marks, weights = [], [], []
    for path in sorted(folder.glob("*.npz")):
        if path.stem in without:
            continue
        data = np.load(path)
        plane, labels = data["plane"], data["labels"]
        put = surround(plane, labels, rng) if data["cropped"] else centre(plane, labels)
        images.append(put[0])
        marks.append(put[1])
        weights.append(np.full(len(plane), min(float(data["plane_spacing"][0]), 5.0)))
    return np.concatenate(images), np.concatenate(marks), np.concatenate(weights)


def blobs(n, generator):
    """Soft ellipses of tumour, consolidation and effusion size: [n, 1, CANVAS, CANVAS] in 0..1, about half of them empty."""
    y, x = torch.meshgrid(torch.arange(CANVAS), torch.arange(CANVAS), indexing="ij")
    out = torch.zeros(n, 1, CANVAS, CANVAS)
    for b in range(n):
        if torch.rand(1, generator=generator) < 0.5:
            continue
        for _ in range(int(torch.randint(1, 5, (1,), generator=generator))):
            cy, cx, r, q, a = torch.rand(5, generator=generator).tolist()
            cy, cx = CANVAS * (0.2 + 0.6 * cy), CANVAS * (0.15 + 0.7 * cx)
            r = 3 + 24 * r * r
            u = (x - cx) * math.cos(3 * a) + (y - cy) * math.sin(3 * a)
            v = (y - cy) * math.cos(3 * a) - (x - cx) * math.sin(3 * a)
            d = torch.sqrt((u / r) ** 2 + (v / (r * (0.5 + q))) ** 2)
            out[b, 0] = torch.maximum(out[b, 0], torch.sigmoid((1 - d) * r / 1.2))
    return out


def augment(hu, labels, generator):
    """[n, CANVAS, CANVAS] at 1.5 mm -> network input [n, 1, SIZE, SIZE] and labels, seen through another scanner."""
    n = len(hu)
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    x = hu.float().unsqueeze(1)
    inside = (labels > 0).float().unsqueeze(1)
    # Lungs less inflated, denser at the back; tumours and consolidation that stay lung.
    depth = torch.linspace(-0.5, 1, CANVAS).view(1, 1, -1, 1)
    x = x + inside * (rand(n, 1, 1, 1) < 0.4) * rand(n, 1, 1, 1) * (120 + 160 * depth) * (x < -300)
    x = x + inside * blobs(n, generator) * (30 + 60 * rand(n, 1, 1, 1) - x)
    # Geometry: rotation, scale, shift, mirror.
    angle = (rand(n) - 0.5) * 2 * math.radians(12)
    scale_x = GRID_MM / PLANE_MM * SIZE / CANVAS * torch.exp((rand(n) - 0.5) * 0.5)
    scale_y = scale_x * torch.exp((rand(n) - 0.5) * 0.2)
    mirror = torch.where(rand(n) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = scale_x * torch.cos(angle) * mirror
    theta[:, 0, 1] = -scale_x * torch.sin(angle)
    theta[:, 1, 0] = scale_y * torch.sin(angle) * mirror
    theta[:, 1, 1] = scale_y * torch.cos(angle)
    theta[:, 0, 2] = (rand(n) - 0.5) * 2 * 0.16
    theta[:, 1, 2] = (rand(n) - 0.5) * 2 * 0.16
    x = torch.where((rand(n, 1, 1, 1) < 0.7), functional.avg_pool2d(x, 3, 1, 1), x)
    grid = functional.affine_grid(theta, (n, 1, SIZE, SIZE), align_corners=False)
    x = functional.grid_sample(x + 1000, grid, align_corners=False) - 1000
    y = functional.grid_sample(labels.float().unsqueeze(1), grid, mode="nearest", align_corners=False)[:, 0].long()
    y = torch.where((mirror < 0).view(-1, 1, 1) & (y > 0), 3 - y, y)
    # Intensity: offset, gain, noise (white and smooth), blur.
    x = torch.where(rand(n, 1, 1, 1) < 0.25, functional.avg_pool2d(x, 3, 1, 1), x)
    noise = torch.randn(x.shape, generator=generator)
    smooth = functional.avg_pool2d(noise, 3, 1, 1) * 2
    x = x + torch.where(rand(n, 1, 1, 1) < 0.5, noise, smooth) * 90 * rand(n, 1, 1, 1) ** 2
    x = (x + 1000) * (1 + (rand(n, 1, 1, 1) - 0.5) * 0.12) - 1000 + (rand(n, 1, 1, 1) - 0.5) * 60
    # A smaller field of view: air (or the scanner's padding) outside a box or a circle.
    v, u = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    for b in range(n):
        draw = float(rand(1))
        if draw < 0.2:
            limit = 0.6 + 0.35 * float(rand(1))
            outside = (u.abs() > limit) | (v.abs() > limit) if draw < 0.08 else u * u + v * v > limit * limit
            x[b, 0][outside] = -1000
            y[b][outside] = 0
    x = ((x - WINDOW[0]) / (WINDOW[1] - WINDOW[0])).clamp(0, 1)
    return x, y


def loss_of(logits, y):
    """Cross-entropy and soft Dice, half each."""
    entropy = functional.cross_entropy(logits, y)
    p = torch.softmax(logits, 1)
    target = functional.one_hot(y, 3).permute(0, 3, 1, 2).float()
    overlap = (p * target).sum((0, 2, 3))
    dice = (2 * overlap + 1) / (p.sum((0, 2, 3)) + target.sum((0, 2, 3)) + 1)
    return entropy + 1 - dice[1:].mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=20, help="CPU-minutes of the whole training, over all runs")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--without", action="append", default=[], help="leave this case out (evaluation models)")
    parser.add_argument("--name", default="lung-seg")
    parser.add_argument("--start", type=Path, help="weights to start from")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    images, marks, weights = load(options.work / "prepared", options.without)
    # Slices without lung teach little each: half the weight.
    weights = weights * np.where((marks > 0).any((1, 2)), 1.0, 0.5)
    print(f"{len(images)} slices, {nets.macs(nets.lung_net(), (SIZE, SIZE)) / 1e9:.3f} GMAC a slice", flush=True)
    net = nets.Network(nets.lung_net())
    if options.start:
        net.load_state_dict(torch.load(options.start, weights_only=False)["net"])
    learning = Learning(net, options.work / f"{options.name}.pt", options.rate)
    generator, rng = torch.Generator().manual_seed(1000 + learning.step), np.random.default_rng(learning.step)
    chance = weights / weights.sum()
    while (part := learning.cpu_s() / (options.minutes * 60)) < 1:
        pick = rng.choice(len(images), options.batch, p=chance)
        x, y = augment(torch.from_numpy(images[pick]), torch.from_numpy(marks[pick]), generator)
        learning.learn(loss_of(net(x), y), part)
    learning.done()


if __name__ == "__main__":
    main()
