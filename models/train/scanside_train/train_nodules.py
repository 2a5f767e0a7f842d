"""nodule-detect: train on the prepared cases with inserted nodules. Resumable: run again to go on.

    python -m scanside_train.train_nodules --work FOLDER [--minutes 60] [--without CASE]
"""

from __future__ import annotations

import argparse
import math
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="CPU-minutes of the whole training, over all runs")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--without", action="append", default=[], help="leave this case out (evaluation models)")
    parser.add_argument("--name", default="nodule-detect")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for machines where it is slow")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(2)
    lungs = {f: [patches.load(p, f) for p in sorted((options.work / "prepared").glob("*.npz"))
                 if p.stem not in options.without] for f in patches.FACTORS}
    library = nodules.Library(options.work / "shapes.npz", (0, 4))
    # Thin slices teach the fine level most.
    chance = {f: np.array([3.0 if l.slice_mm < 2 else 1.0 for l in lungs[f]]) for f in lungs}
    net = nets.Network(nets.nodule_net())
    with torch.no_grad():
        net.convs["heatmap"].bias.fill_(-4.0)
        net.convs["box"].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    net = net.to(memory_format=torch.channels_last_3d)
    print(f"{len(library.shapes)} shapes, {len(lungs[1.0])} cases, "
          f"{nets.macs(net.spec, (options.size,) * 3) / options.size ** 3:.0f} MAC a voxel", flush=True)
    optimiser = torch.optim.AdamW(net.parameters(), lr=options.rate, weight_decay=1e-4)
    out = options.work / f"{options.name}.pt"
    step, spent = 0, 0.0
    if out.exists():
        state = torch.load(out, weights_only=False)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent = state["step"], state["spent"]
    rng = np.random.default_rng(77 + step)
    begin, running, saved = time.process_time(), np.zeros(2), time.time()
    total = options.minutes * 60
    net.train()
    making = 0.0
    while True:
        used = spent + time.process_time() - begin
        if used >= total:
            break
        part = used / total
        for group in optimiser.param_groups:
            group["lr"] = options.rate * min(1.0, 25 * part + 0.05) * 0.5 * (1 + math.cos(math.pi * part))
        start = time.process_time()
        batch = []
        for _ in range(options.batch):
            f = 2.0 if rng.random() < 0.25 else 1.0
            lung = lungs[f][int(rng.choice(len(lungs[f]), p=chance[f] / chance[f].sum()))]
            batch.append(patches.make(lung, library, options.size, rng)[:5])
        x, heat, weight, box, mask = (torch.from_numpy(np.stack(v)) for v in zip(*batch))
        making += time.process_time() - start
        x = x.to(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            heatmap, predicted = net(x)
        focal, where = loss_of(heatmap, predicted, heat, weight, box, mask)
        optimiser.zero_grad()
        (focal + 0.5 * where).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        now = np.array([float(focal.detach()), float(where.detach())])
        running = now if step == 0 else 0.98 * running + 0.02 * now
        step += 1
        if step % 50 == 0:
            print(f"step {step} focal {running[0]:.3f} box {running[1]:.3f} cpu {used / 60:.1f} min "
                  f"(patches {making / max(1e-9, time.process_time() - begin):.0%})", flush=True)
        if time.time() - saved > 60:
            torch.save(dict(net=net.state_dict(), optimiser=optimiser.state_dict(), step=step, spent=used), out)
            saved = time.time()
    used = spent + time.process_time() - begin
    torch.save(dict(net=net.state_dict(), optimiser=optimiser.state_dict(), step=step, spent=used), out)
    print(f"done: {step} steps, {used / 60:.1f} CPU-minutes")


if __name__ == "__main__":
    main()
