"""nodule-detect: train on the prepared cases with inserted nodules. Resumable: run again to go on.

    python -m scanside_train.train_nodules --work FOLDER [--steps 8000] [--minutes 90] [--without CASE]

The learning rate falls to nothing along a cosine, over the steps or over the minutes of this run, whichever ends first.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import queue
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from . import nets, nodules, patches


def loss_of(heatmap, box, heat, weight, want, mask):
    """Penalty-reduced focal loss on the centres (CenterNet, Zhou et al. 2019) and smooth L1 on the box."""
    logit = heatmap[:, 0].float()
    p = torch.sigmoid(logit).clamp(1e-5, 1 - 1e-5)
    positive = (heat > 0.999).float()
    gain = positive * (1 - p) ** 2 * functional.logsigmoid(logit)
    loss = (1 - positive) * (1 - heat) ** 4 * p ** 2 * functional.logsigmoid(-logit)
    count = positive.sum().clamp(min=4.0)
    focal = -((gain + loss) * weight).sum() / count
    scale = torch.tensor([1.0, 1.0, 1.0, 3.0]).view(1, 4, 1, 1, 1)
    error = functional.smooth_l1_loss(box.float(), want, reduction="none", beta=0.5) * mask[:, None] * scale
    return focal, error.sum() / mask.sum().clamp(min=8.0)


def mirrored(batch, axes):
    """A batch seen in a mirror along `axes` (0 z, 1 y, 2 x): cells map onto cells, offsets change sign."""
    x, heat, weight, box, mask = batch
    if axes:
        x = torch.flip(x, [a + 2 for a in axes])
        heat, weight, mask = (torch.flip(v, [a + 1 for a in axes]) for v in (heat, weight, mask))
        box = torch.flip(box, [a + 2 for a in axes])
        box[:, axes] *= -1
    return x, heat, weight, box, mask


def make_batch(options, lungs, library, rng, chance):
    batch = []
    for _ in range(options.batch):
        f = 2.0 if rng.random() < 0.25 else 1.0
        lung = lungs[f][int(rng.choice(len(lungs[f]), p=chance[f]))]
        batch.append(patches.make(lung, library, options.size, rng)[:5])
    return [torch.from_numpy(np.stack(v)) for v in zip(*batch)]


def worker(options, lungs, library, net, seed, step, report):
    """Makes batches and learns from them on the shared weights (Hogwild, Niu et al. 2011: few weights, few workers)."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    # Thin slices teach the fine level most.
    chance = {f: np.array([3.0 if l.slice_mm < 2 else 1.0 for l in lungs[f]]) for f in lungs}
    chance = {f: c / c.sum() for f, c in chance.items()}
    optimiser = torch.optim.AdamW(net.parameters(), lr=options.rate, weight_decay=1e-4)
    warm, started, first = 0, time.monotonic(), step.value / options.steps

    def progress():
        gone = (time.monotonic() - started) / 60 / options.minutes if options.minutes else 0.0
        return max(step.value / options.steps, first + (1 - first) * gone)

    while progress() < 1:
        made = make_batch(options, lungs, library, rng, chance)
        for _ in range(3):  # making a batch costs as much as learning from it: each is used three times, mirrored anew
            part = progress()
            warm += 1
            for group in optimiser.param_groups:
                group["lr"] = options.rate * min(1.0, 25 * part + 0.05, warm / 20) * 0.5 * (1 + math.cos(math.pi * min(part, 1)))
            x, heat, weight, box, mask = mirrored(made, [a for a in range(3) if rng.random() < 0.5])
            x = x.to(memory_format=torch.channels_last_3d)
            with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
                heatmap, predicted = net(x)
            focal, where = loss_of(heatmap, predicted, heat, weight, box, mask)
            optimiser.zero_grad()
            (focal + 0.5 * where).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimiser.step()
            with step.get_lock():
                step.value += 1
            report.put((float(focal.detach()), float(where.detach())))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=8000, help="of the whole training, over all runs and workers")
    parser.add_argument("--minutes", type=float, help="end after so many, at whatever step")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--without", action="append", default=[], help="leave this case out (evaluation models)")
    parser.add_argument("--name", default="nodule-detect")
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for machines where it is slow")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(2)
    lungs = {f: [patches.load(p, f) for p in sorted((options.work / "prepared").glob("*.npz"))
                 if p.stem not in options.without] for f in patches.FACTORS}
    library = nodules.Library(options.work / "shapes.npz", (0, 4))
    net = nets.Network(nets.nodule_net())
    with torch.no_grad():
        net.convs["heatmap"].bias.fill_(-4.0)
        net.convs["box"].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    out = options.work / f"{options.name}.pt"
    done = 0
    if out.exists():
        state = torch.load(out, weights_only=False)
        net.load_state_dict(state["net"])
        done = state["step"]
    net = net.to(memory_format=torch.channels_last_3d).share_memory().train()
    print(f"{len(library.shapes)} shapes, {len(lungs[1.0])} cases, step {done}, "
          f"{nets.macs(net.spec, (options.size,) * 3) / options.size ** 3:.0f} MAC a voxel", flush=True)
    context = multiprocessing.get_context("fork")
    step, report = context.Value("l", done), context.Queue()
    workers = [context.Process(target=worker, daemon=True,
                               args=(options, lungs, library, net, [77, done, n], step, report))
               for n in range(options.workers)]
    for one in workers:
        one.start()
    running, saved, seen = np.zeros(2), time.time(), done
    while any(one.is_alive() for one in workers) or not report.empty():
        try:
            now = np.array(report.get(timeout=10))
        except queue.Empty:
            continue
        running = now if not running.any() else 0.98 * running + 0.02 * now
        seen += 1
        if seen % 50 == 0:
            print(f"step {seen} focal {running[0]:.3f} box {running[1]:.3f}", flush=True)
        if time.time() - saved > 60:
            torch.save(dict(net=net.state_dict(), step=seen), out)
            saved = time.time()
    torch.save(dict(net=net.state_dict(), step=seen), out)
    print(f"done: {seen} steps")


if __name__ == "__main__":
    main()
