"""us-lesion: train on simulated B-mode frames. Needs no data. Resumable: run again to go on from the last checkpoint.

    python -m scanside_train.train_us --work FOLDER [--minutes 120] [--drawers 1]
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

from . import bmode, nets
from .learning import Learning

SIZE = bmode.SIZE
#: Seeds of training frames are below it, those of evaluation above: no frame is both.
EVALUATION_SEEDS = 1 << 30
#: Bright lesions and rims are learnt late: they are drawn more often than they are met.
KINDS = (0.42, 0.3, 0.28)
#: Of the mean network that is kept.
MEMORY = 0.999
#: Frames that are drawn before learning begins or goes on: few would be learnt by heart.
FIRST = 1500


def nearest_lesion(labels):
    """Each pixel's nearest lesion, 0 in frames without one."""
    numbers = np.unique(labels)
    if len(numbers) < 3:
        return np.full_like(labels, numbers[-1])
    near = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    return labels[tuple(near)]


def draw_frames(first, step, out):
    """Draws frames for ever: image, lesion or not, nearest lesion."""
    seed = first
    while True:
        image, labels, _ = bmode.sample(seed, KINDS)
        out.put((seed, np.stack([image, labels > 0, nearest_lesion(labels)])))
        seed += step


class Frames:
    """Frames as other processes draw them, each used several times, turned over and with other gains."""

    def __init__(self, first, drawers, kept=12000):
        self.queue, self.kept, self.frames, self.last = multiprocessing.Queue(64), kept, [], first
        for n in range(drawers):
            multiprocessing.Process(target=draw_frames, args=(first + n, drawers, self.queue), daemon=True).start()

    def take(self, least, fresh=1):
        """At most `fresh` more, if they are there; waits for the first `least`."""
        while fresh or len(self.frames) < least:
            try:
                seed, frame = self.queue.get(block=len(self.frames) < least)
            except queue.Empty:
                break
            self.frames.append(frame)
            self.last, fresh = max(self.last, seed), max(fresh - 1, 0)
        del self.frames[:-self.kept]

    def batch(self, size, crop, rng):
        self.take(FIRST)
        x, y, near = np.empty((3, size, crop, crop), np.float32)
        for n in range(size):
            frame = self.frames[rng.integers(0, len(self.frames))]
            top, left = rng.integers(0, SIZE - crop + 1, 2)
            part = frame[:, top:top + crop, left:left + crop]
            part = part[:, :, ::-1] if rng.random() < 0.5 else part
            x[n], y[n], near[n] = part[0] / np.float32(255), part[1], part[2]
            x[n] = np.clip(x[n] ** np.exp(rng.normal(0, 0.15)) * np.exp(rng.normal(0, 0.12)), 0, 1)
        return [torch.from_numpy(v)[:, None] for v in (x, y, near)]


def loss_of(logits, y, near):
    """Cross-entropy, soft Dice of the batch, and soft Dice of each lesion where it is the nearest, so that every lesion counts
    alike whatever its size (as blob loss, Kofler et al. 2022)."""
    entropy = functional.binary_cross_entropy_with_logits(logits, y)
    p = torch.sigmoid(logits)
    batch = (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    numbers = bmode.LESIONS_MAX + 1
    rows = torch.arange(len(y)).view(-1, 1, 1, 1) * numbers
    where = (rows + near.long()).flatten()
    total = lambda v: torch.zeros(len(y) * numbers).scatter_add(0, where, v.flatten())
    inside, overlap, both = total(y), total(p * y), total(p + y)
    # Frames without a lesion would be won by calling nothing a lesion anywhere; cross-entropy answers for them.
    shown = (inside >= 12).float()
    each = ((2 * overlap + 1) / (both + 1) * shown).sum() / shown.sum().clamp(min=1)
    return entropy + 0.5 * (1 - batch) + 1.5 * (1 - each)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=120, help="CPU-minutes of learning, over all runs; drawing not counted")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=160, help="side of the crops that the first three quarters learn from")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--drawers", type=int, default=1, help="processes that draw frames")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for machines where it is slow")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    options.work.mkdir(parents=True, exist_ok=True)
    net = nets.Network(nets.us_net()).to(memory_format=torch.channels_last)
    # One pixel in twenty is a lesion's: to begin at one half would drive everything to nothing first.
    torch.nn.init.constant_(net.convs["logits"].bias, -3.0)
    print(f"{nets.macs(net.spec, (SIZE, SIZE)) / 1e9:.3f} GMAC a frame", flush=True)
    learning = Learning(net, options.work / "us-lesion.pt", options.rate, MEMORY)
    frames, rng = Frames(learning.extra.get("seed", 0), options.drawers), np.random.default_rng(learning.step)
    while (part := learning.cpu_s() / (options.minutes * 60)) < 1:
        # Crops are cheaper; at the end, whole frames, so that the network learns what lies round a field.
        x, y, near = frames.batch(*(options.batch, options.crop) if part < 0.75 else (options.batch // 2, SIZE), rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            logits = net(x.contiguous(memory_format=torch.channels_last))
        learning.extra["seed"] = frames.last + 1
        learning.learn(loss_of(logits.float(), y, near), part)
    learning.done()


if __name__ == "__main__":
    main()
