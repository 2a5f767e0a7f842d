"""brain-extract and brain-tumour: train on made brains, first at twice the spacing, then at the network's own. Resumable: run again to go on.

    python -m scanside_train.train_brain brain-tumour --work FOLDER [--steps 4000]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch.nn import functional

from . import brain_synth, nets
from .learning import Learning


def spec_of(name):
    return nets.brain_net(4, 4) if name == "brain-tumour" else nets.brain_net(1, 2)


def loss_of(logits, target, name):
    """Cross-entropy and soft Dice: of each label, and for the tumour of the whole and of its core as well (what is reported)."""
    weight = logits.new_tensor([0.5, 1.0, 1.0, 1.5] if name == "brain-tumour" else [1.0, 1.0])
    entropy = functional.cross_entropy(logits, target, weight=weight)
    p = logits.softmax(1)
    one = functional.one_hot(target, logits.shape[1]).movedim(-1, 1).float()
    regions = [([n], 1.0) for n in range(1, logits.shape[1])]
    if name == "brain-tumour":
        regions += [([1, 2, 3], 3.0), ([1, 3], 1.0)]
    dice, total = 0.0, 0.0
    for members, share in regions:
        a, b = p[:, members].sum(1), one[:, members].sum(1)
        overlap, sizes = (a * b).sum((1, 2, 3)), a.sum((1, 2, 3)) + b.sum((1, 2, 3))
        # A crop without the region counts by its false voxels: 40 of them cost half.
        dice = dice + share * (1 - (2 * overlap + 40) / (sizes + 40)).mean()
        total += share
    return entropy + dice / total


GRIDS = {"brain-tumour": ((64, 80, 64), 2.5), "brain-extract": ((48, 64, 48), 4.0)}
COARSE = 0.5


def batch(name, maps, seed, coarse=False):
    """One whole brain, or two whole heads; `coarse` at twice the spacing, where a step costs an eighth."""
    shape, spacing = GRIDS[name]
    if coarse:
        shape, spacing = tuple(n // 2 for n in shape), spacing * 2
    if name == "brain-extract":
        made = [brain_synth.head(maps, seed + [n], shape, spacing) for n in range(2)]
    else:
        made = [brain_synth.sample(maps, seed + [n], shape, spacing)[:2] for n in range(2 if coarse else 1)]
    return torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("brain-extract", "brain-tumour"))
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=4000, help="of the whole training, over all runs")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--without", action="append", default=[], help="leave this head out (evaluation)")
    parser.add_argument("--out", type=Path, help="checkpoint (default WORK/NAME.pt)")
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for machines where it is slow")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long; run again to go on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    maps = {n: m for n, m in brain_synth.load(options.work).items() if n not in options.without}
    net = nets.Network(spec_of(options.name)).to(memory_format=torch.channels_last_3d)
    for norm in net.norms.values():
        norm.momentum = 0.03  # one brain at a time
    learning = Learning(net, options.out or options.work / f"{options.name}.pt", options.rate)
    print(f"{options.name}: {list(maps)}, step {learning.step}, {nets.macs(net.spec, (64,) * 3) / 64 ** 3:.0f} MAC a voxel", flush=True)
    began = time.time()
    while learning.step < options.steps and time.time() - began < options.minutes * 60:
        part = learning.step / options.steps
        x, y = batch(options.name, maps, [len(options.name), learning.step], coarse=part < COARSE)
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            logits = net(x.to(memory_format=torch.channels_last_3d))
        learning.learn(loss_of(logits.float(), y, options.name), part)
    learning.done()


if __name__ == "__main__":
    main()
