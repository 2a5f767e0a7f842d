"""us-lesion: train on simulated B-mode frames. Needs no data. Resumable: run again to go on from the last checkpoint.

    python -m scanside_train.train_us --work FOLDER [--minutes 60]
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from . import bmode, nets

SIZE = bmode.SIZE
#: Seeds of training frames are below it, those of evaluation above: no frame is both.
EVALUATION_SEEDS = 1 << 30


class Frames:
    """Frames as they are drawn, each used a few times: drawing one costs as much as learning from it."""

    def __init__(self, first, kept=1500):
        self.next, self.kept, self.images, self.labels = first, kept, [], []

    def draw(self, n):
        for _ in range(n):
            image, labels, _ = bmode.sample(self.next)
            self.next += 1
            self.images.append(image)
            self.labels.append(labels > 0)
        del self.images[:-self.kept], self.labels[:-self.kept]

    def batch(self, fresh, size, rng):
        self.draw(fresh)
        have = len(self.images)
        pick = list(range(have - fresh, have)) + list(rng.integers(0, have, size - fresh))
        x = np.stack([self.images[n] for n in pick]).astype(np.float32) / 255
        y = np.stack([self.labels[n] for n in pick]).astype(np.float32)
        for n in range(size):
            if rng.random() < 0.5:
                x[n], y[n] = x[n, :, ::-1].copy(), y[n, :, ::-1].copy()
            if n >= fresh:
                x[n] = np.clip(x[n] ** np.exp(rng.normal(0, 0.15)) * np.exp(rng.normal(0, 0.12)), 0, 1)
        return torch.from_numpy(x)[:, None], torch.from_numpy(y)[:, None]


def loss_of(logits, y):
    """Cross-entropy and soft Dice, per frame and over the batch, so that small lesions count too."""
    entropy = functional.binary_cross_entropy_with_logits(logits, y)
    p = torch.sigmoid(logits)
    overlap, total = (p * y).sum((1, 2, 3)), p.sum((1, 2, 3)) + y.sum((1, 2, 3))
    batch = (2 * overlap.sum() + 1) / (total.sum() + 1)
    # Frames without a lesion would be won by calling nothing a lesion anywhere; cross-entropy answers for them.
    shown = y.amax((1, 2, 3))
    each = ((2 * overlap + 1) / (total + 1) * shown).sum() / shown.sum().clamp(min=1)
    return entropy + (1 - batch) + (1 - each)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="CPU-minutes of the whole training, over all runs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--fresh", type=int, default=2, help="frames of a batch that are new")
    parser.add_argument("--crop", type=int, default=160, help="side of the crops that the first four fifths learn from")
    parser.add_argument("--rate", type=float, default=1.5e-3)
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
    optimiser = torch.optim.AdamW(net.parameters(), lr=options.rate, weight_decay=1e-4)
    out = options.work / "us-lesion.pt"
    step, spent, first = 0, 0.0, 0
    if out.exists():
        state = torch.load(out, weights_only=False)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent, first = state["step"], state["spent"], state["seed"]
    frames, rng = Frames(first), np.random.default_rng(step)
    frames.draw(32)
    begin, running, saved = time.process_time(), None, time.time()
    total = options.minutes * 60
    net.train()

    def save():
        state = dict(net=net.state_dict(), optimiser=optimiser.state_dict(), step=step, spent=used, seed=frames.next)
        torch.save(state, out.with_suffix(".new"))
        out.with_suffix(".new").replace(out)

    while True:
        used = spent + time.process_time() - begin
        if used >= total:
            break
        part = used / total
        for group in optimiser.param_groups:
            group["lr"] = options.rate * min(1.0, 40 * part + 0.05) * 0.5 * (1 + math.cos(math.pi * part))
        x, y = frames.batch(options.fresh, options.batch, rng)
        if part < 0.8:  # crops are cheaper; the rest of the time, whole frames
            top, left = rng.integers(0, SIZE - options.crop + 1, 2)
            x, y = (v[:, :, top:top + options.crop, left:left + options.crop] for v in (x, y))
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            logits = net(x.contiguous(memory_format=torch.channels_last))
        loss = loss_of(logits.float(), y)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimiser.step()
        running = float(loss.detach()) if running is None else 0.98 * running + 0.02 * float(loss.detach())
        step += 1
        if step % 50 == 0:
            print(f"step {step} loss {running:.4f} cpu {used / 60:.1f} min", flush=True)
        if time.time() - saved > 60:
            save()
            saved = time.time()
    used = spent + time.process_time() - begin
    save()
    print(f"done: {step} steps, {used / 60:.1f} CPU-minutes, loss {running or 0:.4f}")


if __name__ == "__main__":
    main()
