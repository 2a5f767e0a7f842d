"""What the trainings share: AdamW with a warm-up and a cosine, and a checkpoint a minute, from which a later run goes on."""

from __future__ import annotations

import copy
import math
import time

import torch


class Learning:
    """A network on its way. `memory` above 0 keeps the mean of its weights instead of the last ones (Polyak averaging)."""

    def __init__(self, net, out, rate, memory=0.0):
        self.net, self.out, self.rate, self.memory = net.train(), out, rate, memory
        self.optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-4)
        self.mean = copy.deepcopy(net) if memory else net
        self.step, self.spent, self.extra, self.loss = 0, 0.0, {}, None
        if out.exists():
            state = torch.load(out, weights_only=False)
            net.load_state_dict(state.pop("learning", state["net"]))
            self.mean.load_state_dict(state.pop("net"))
            if "optimiser" in state:
                self.optimiser.load_state_dict(state.pop("optimiser"))
            self.step, self.spent = state.pop("step"), state.pop("spent", 0.0)
            self.extra = state
        self.begun, self.saved = time.process_time(), time.time()

    def cpu_s(self):
        """CPU-seconds of this process, those of earlier runs included."""
        return self.spent + time.process_time() - self.begun

    def learn(self, loss, part):
        """One step; `part` of the whole training is behind us."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * min(1.0, 40 * part + 0.05) * 0.5 * (1 + math.cos(math.pi * part))
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 2.0)
        self.optimiser.step()
        if self.memory:
            memory = min(self.memory, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                for old, new in zip(self.mean.state_dict().values(), self.net.state_dict().values()):
                    old.copy_(old * memory + new * (1 - memory) if old.is_floating_point() else new)
        now = float(loss.detach())
        self.loss = now if self.loss is None else 0.98 * self.loss + 0.02 * now
        self.step += 1
        if self.step % 50 == 0:
            print(f"step {self.step} loss {self.loss:.4f} cpu {self.cpu_s() / 60:.1f} min", flush=True)
        if time.time() - self.saved > 60:
            self.save()

    def save(self):
        """Whole, or not at all."""
        state = dict(net=self.mean.state_dict(), optimiser=self.optimiser.state_dict(), step=self.step, spent=self.cpu_s(), **self.extra)
        if self.memory:
            state["learning"] = self.net.state_dict()
        scratch = self.out.with_suffix(".new")
        torch.save(state, scratch)
        scratch.replace(self.out)
        self.saved = time.time()

    def done(self):
        """The last word."""
        self.save()
        print(f"done: {self.step} steps, {self.cpu_s() / 60:.1f} CPU-minutes, loss {self.loss or 0:.4f}", flush=True)
