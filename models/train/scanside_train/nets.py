"""The networks, as short lists of layers that PyTorch trains and `export` writes as ONNX, so both are one description.

Only what the integer kernels run well: 3x3(x3) convolutions (stride 1 or 2) with BatchNorm (folded on export) and ReLU,
1x1 before nearest upsampling, concatenation of two, channels in eights, plain 1x1 heads.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def conv(name, source, cin, cout, kernel=3, stride=1, relu=True):
    return dict(op="conv", name=name, inputs=[source], cin=cin, cout=cout, kernel=kernel, stride=stride, relu=relu)


def pool(name, source):
    return dict(op="pool", name=name, inputs=[source])


def up(name, source):
    return dict(op="up", name=name, inputs=[source])


def cat(name, a, b):
    return dict(op="cat", name=name, inputs=[a, b])


def lung_net():
    """2-D U-Net, four poolings, 5.5 kMAC a pixel. Input [n, 1, s, s] (s a multiple of 16), output 3 logits a pixel."""
    return dict(dims=2, outputs=["logits"], layers=[
        conv("e0", "input", 1, 8), pool("p0", "e0"),
        conv("e1", "p0", 8, 16), pool("p1", "e1"),
        conv("e2a", "p1", 16, 32), conv("e2", "e2a", 32, 32), pool("p2", "e2"),
        conv("e3a", "p2", 32, 64), conv("e3", "e3a", 64, 64), pool("p3", "e3"),
        conv("e4", "p3", 64, 64),
        conv("s3", "e4", 64, 32, 1), up("u3", "s3"), cat("c3", "u3", "e3"), conv("d3", "c3", 96, 32),
        conv("s2", "d3", 32, 16, 1), up("u2", "s2"), cat("c2", "u2", "e2"), conv("d2", "c2", 48, 32),
        conv("s1", "d2", 32, 8, 1), up("u1", "s1"), cat("c1", "u1", "e1"), conv("d1", "c1", 24, 16),
        conv("s0", "d1", 16, 8, 1), up("u0", "s0"), cat("c0", "u0", "e0"), conv("d0", "c0", 16, 8),
        conv("logits", "d0", 8, 3, 1, relu=False),
    ])


def us_net():
    """2-D U-Net, five poolings, one logit a pixel. Input [n, 1, s, s] (s a multiple of 32)."""
    return dict(dims=2, outputs=["logits"], layers=[
        conv("e0", "input", 1, 8), pool("p0", "e0"),
        conv("e1", "p0", 8, 24), pool("p1", "e1"),
        conv("e2a", "p1", 24, 48), conv("e2", "e2a", 48, 48), pool("p2", "e2"),
        conv("e3a", "p2", 48, 64), conv("e3", "e3a", 64, 64), pool("p3", "e3"),
        conv("e4a", "p3", 64, 96), conv("e4", "e4a", 96, 96), pool("p4", "e4"),
        conv("e5a", "p4", 96, 96), conv("e5", "e5a", 96, 96),
        conv("s4", "e5", 96, 48, 1), up("u4", "s4"), cat("c4", "u4", "e4"), conv("d4", "c4", 144, 64),
        conv("s3", "d4", 64, 32, 1), up("u3", "s3"), cat("c3", "u3", "e3"), conv("d3", "c3", 96, 48),
        conv("s2", "d3", 48, 24, 1), up("u2", "s2"), cat("c2", "u2", "e2"), conv("d2", "c2", 72, 32),
        conv("s1", "d2", 32, 16, 1), up("u1", "s1"), cat("c1", "u1", "e1"), conv("d1", "c1", 40, 16),
        conv("s0", "d1", 16, 8, 1), up("u0", "s0"), cat("c0", "u0", "e0"), conv("d0", "c0", 16, 8),
        conv("logits", "d0", 8, 1, 1, relu=False),
    ])


def nodule_net():
    """3-D, two poolings by stride, outputs at stride 2. Input [n, 1, p, p, p] (p a multiple of 4)."""
    return dict(dims=3, outputs=["heatmap", "box"], layers=[
        conv("e0", "input", 1, 8),
        conv("e1a", "e0", 8, 16, stride=2), conv("e1", "e1a", 16, 16),
        conv("e2a", "e1", 16, 32, stride=2), conv("e2b", "e2a", 32, 32), conv("e2", "e2b", 32, 32),
        conv("s1", "e2", 32, 8, 1), up("u1", "s1"), cat("c1", "u1", "e1"), conv("d1", "c1", 24, 16),
        conv("heatmap", "d1", 16, 1, 1, relu=False), conv("box", "d1", 16, 4, 1, relu=False),
    ])


def dense(name, source, cin, growth, layers):
    """A dense block (Huang et al. 2017): every layer sees all before it. Returns its layers, the name of its output and its channels."""
    made, seen = [], source
    for n in range(layers):
        made.append(conv(f"{name}{n}", seen, cin, growth))
        made.append(cat(f"{name}{n}c", seen, f"{name}{n}"))
        seen, cin = f"{name}{n}c", cin + growth
    return made, seen, cin


def brain_net(channels, labels):
    """3-D, dense blocks at a half and a quarter of the resolution. Input [n, channels, z, y, x] (multiples of 8), output `labels` logits."""
    one, a, wide = dense("a", "e1", 16, 8, 3)
    two, b, deep = dense("b", "e2", 32, 16, 3)
    three, c, deepest = dense("c", "e3", 32, 16, 2)
    return dict(dims=3, outputs=["logits"], layers=[
        conv("e0", "input", channels, 8),
        conv("e1", "e0", 8, 16, stride=2), *one, conv("t1", a, wide, 24, 1),
        conv("e2", "t1", 24, 32, stride=2), *two, conv("t2", b, deep, 40, 1),
        conv("e3", "t2", 40, 32, stride=2), *three,
        conv("s2", c, deepest, 24, 1), up("u2", "s2"), cat("m2", "u2", "t2"), conv("d2", "m2", 64, 24),
        conv("s1", "d2", 24, 16, 1), up("u1", "s1"), cat("m1", "u1", "t1"), conv("d1", "m1", 40, 16),
        conv("s0", "d1", 16, 8, 1), up("u0", "s0"), cat("m0", "u0", "e0"), conv("d0", "m0", 16, 16, 1),
        conv("logits", "d0", 16, labels, 1, relu=False),
    ])


class Network(nn.Module):
    """A layer list with weights."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        two = spec["dims"] == 2
        make, norm = (nn.Conv2d, nn.BatchNorm2d) if two else (nn.Conv3d, nn.BatchNorm3d)
        self.convs, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for layer in spec["layers"]:
            if layer["op"] == "conv":
                pad = layer["kernel"] // 2
                self.convs[layer["name"]] = make(layer["cin"], layer["cout"], layer["kernel"], layer["stride"], pad,
                                                 bias=not layer["relu"])
                if layer["relu"]:
                    self.norms[layer["name"]] = norm(layer["cout"])
                    nn.init.kaiming_normal_(self.convs[layer["name"]].weight, nonlinearity="relu")

    def forward(self, x):
        values = {"input": x}
        pooling = functional.max_pool2d if self.spec["dims"] == 2 else functional.max_pool3d
        for layer in self.spec["layers"]:
            inputs = [values[n] for n in layer["inputs"]]
            if layer["op"] == "conv":
                y = self.convs[layer["name"]](inputs[0])
                if layer["relu"]:
                    y = functional.relu(self.norms[layer["name"]](y), inplace=True)
            elif layer["op"] == "pool":
                y = pooling(inputs[0], 2)
            elif layer["op"] == "up":
                y = functional.interpolate(inputs[0], scale_factor=2, mode="nearest")
            else:
                y = torch.cat(inputs, 1)
            values[layer["name"]] = y
        outputs = [values[n] for n in self.spec["outputs"]]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def folded(self):
        """name -> (weight, bias) with the BatchNorm of each convolution folded into it."""
        out = {}
        for name, layer in self.convs.items():
            weight = layer.weight.detach()
            bias = layer.bias.detach() if layer.bias is not None else torch.zeros(len(weight))
            if name in self.norms:
                norm = self.norms[name]
                scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
                weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
                bias = (bias - norm.running_mean) * scale + norm.bias.detach()
            out[name] = (weight.numpy().copy(), bias.numpy().copy())
        return out


def macs(spec, shape):
    """Multiply-accumulates of one run on an input of `shape` (spatial)."""
    sizes, total = {"input": list(shape)}, 0
    for layer in spec["layers"]:
        size = sizes[layer["inputs"][0]]
        if layer["op"] == "conv":
            size = [-(-n // layer["stride"]) for n in size]
            count = 1
            for n in size:
                count *= n
            total += count * layer["cin"] * layer["cout"] * layer["kernel"] ** spec["dims"]
        elif layer["op"] == "pool":
            size = [n // 2 for n in size]
        elif layer["op"] == "up":
            size = [n * 2 for n in size]
        sizes[layer["name"]] = size
    return total
