"""Reference networks with random weights, and their quantized twins.

    python networks.py DIRECTORY NAME...

writes DIRECTORY/NAME.onnx (float), NAME.qdq.onnx (float operators between DequantizeLinear and QuantizeLinear, the format
the networks of this project ship in) and NAME.qop.onnx (operators on bytes, from the same calibration). Opset 13; weights
s8, symmetric, per channel, of 7 bits; activations s8, asymmetric. Needs numpy, onnx and onnxruntime.
"""

import logging
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Graph:
    """Nodes and weights in the making."""

    def __init__(self, rank, seed=0):
        self.rank, self.nodes, self.weights, self.count = rank, [], [], 0
        self.random = np.random.default_rng(seed)

    def name(self, stem):
        self.count += 1
        return f"{stem}_{self.count}"

    def const(self, array, stem="w"):
        name = self.name(stem)
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def op(self, kind, inputs, **attributes):
        output = self.name(kind.lower())
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output + "_n", **attributes))
        return output

    def conv(self, x, inputs, outputs, kernel, stride=1, relu=True, groups=1, dilation=1):
        rank = self.rank
        spread = np.sqrt(2 / (inputs / groups * kernel**rank))
        w = (self.random.standard_normal((outputs, inputs // groups) + (kernel,) * rank) * spread).astype(np.float32)
        b = (self.random.standard_normal(outputs) * 0.05).astype(np.float32)
        pad = kernel // 2 * dilation
        y = self.op("Conv", [x, self.const(w), self.const(b, "b")], kernel_shape=[kernel] * rank, pads=[pad] * 2 * rank,
                    strides=[stride] * rank, dilations=[dilation] * rank, group=groups)
        return self.op("Relu", [y]) if relu else y

    def resize(self, x):
        scales = self.const(np.array([1, 1] + [2] * self.rank, np.float32), "scales")
        return self.op("Resize", [x, "", scales], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")

    def up(self, x, inputs, outputs, transposed):
        if not transposed:
            return self.conv(self.resize(x), inputs, outputs, 1, relu=False)
        w = (self.random.standard_normal((inputs, outputs) + (2,) * self.rank) * np.sqrt(1 / inputs)).astype(np.float32)
        return self.op("ConvTranspose", [x, self.const(w), self.const(np.zeros(outputs, np.float32), "b")],
                       kernel_shape=[2] * self.rank, strides=[2] * self.rank)

    def pool(self, x, kind="MaxPool"):
        return self.op(kind, [x], kernel_shape=[2] * self.rank, strides=[2] * self.rank)

    def model(self, shape, outputs):
        info = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "network", info, outs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model)
        return model


def unet(rank, channels, size, transposed=False, classes=2):
    g, x, skips, c = Graph(rank), "x", [], 1
    for level, ch in enumerate(channels):
        if level:
            x = g.pool(x)
        x = g.conv(g.conv(x, c, ch, 3), ch, ch, 3)
        c = ch
        if level < len(channels) - 1:
            skips.append((x, ch))
    for skip, ch in reversed(skips):
        x = g.op("Concat", [skip, g.up(x, c, ch, transposed)], axis=1)
        x = g.conv(g.conv(x, 2 * ch, ch, 3), ch, ch, 3)
        c = ch
    x = g.conv(x, c, classes, 1, relu=False)
    return g.model([1, 1] + [size] * rank, [x])


def retina(size, channels=(16, 32, 64), width=32):
    g = Graph(3)
    x, c, features = g.conv("x", 1, channels[0], 3, stride=2), channels[0], []
    for level, ch in enumerate(channels):
        for block in range(2):
            stride = 2 if level and not block else 1
            identity = x if stride == 1 and c == ch else g.conv(x, c, ch, 1, stride=stride, relu=False)
            y = g.conv(g.conv(x, c, ch, 3, stride=stride), ch, ch, 3, relu=False)
            x, c = g.op("Relu", [g.op("Add", [y, identity])]), ch
        features.append((x, ch))
    lateral = [g.conv(f, ch, width, 1, relu=False) for f, ch in features]
    pyramid = [lateral[-1]]
    for l in reversed(lateral[:-1]):
        pyramid.append(g.op("Add", [l, g.resize(pyramid[-1])]))
    outputs = []
    for p in pyramid[-2:]:
        t = g.conv(g.conv(p, width, width, 3), width, width, 3)
        outputs.append(g.op("Sigmoid", [g.conv(t, width, 3, 3, relu=False)]))
        outputs.append(g.conv(t, width, 12, 3, relu=False))
    return g.model([1, 1] + [size] * 3, outputs)


def densenet(size, growth=16, blocks=3, layers=4, first=32):
    g = Graph(3)
    x, c = g.conv("x", 1, first, 3), first
    for block in range(blocks):
        for _ in range(layers):
            y = g.conv(g.conv(x, c, 4 * growth, 1), 4 * growth, growth, 3)
            x, c = g.op("Concat", [x, y], axis=1), c + growth
        if block < blocks - 1:
            x, c = g.conv(x, c, c // 2, 1), c // 2
            x = g.pool(x, "AveragePool")
    x = g.op("Flatten", [g.op("GlobalAveragePool", [x])], axis=1)
    w = (g.random.standard_normal((c, 2)) * 0.1).astype(np.float32)
    x = g.op("Gemm", [x, g.const(w), g.const(np.zeros(2, np.float32), "b")])
    return g.model([1, 1] + [size] * 3, [x])


def odd(size):
    """Depthwise, grouped, dilated and 5-wide convolutions, channel counts that are no multiples of anything, a stride of 2."""
    g = Graph(2)
    x = g.conv("x", 3, 10, 5, stride=2)
    x = g.conv(x, 10, 10, 3, groups=10)
    x = g.conv(x, 10, 7, 1)
    x = g.conv(x, 7, 14, 3, dilation=2)
    x = g.conv(x, 14, 6, 3, groups=2)
    x = g.op("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = g.conv(x, 6, 5, 3, relu=False)
    return g.model([1, 3, size, size + 3], [x])


def layer(inputs, outputs, size, rank=3, kernel=3):
    g = Graph(rank)
    return g.model([1, inputs] + [size] * rank, [g.conv("x", inputs, outputs, kernel)])


NETWORKS = {
    "unet3-64": lambda: unet(3, [8, 16, 32], 64),
    "unet3-96": lambda: unet(3, [8, 16, 32, 64], 96),
    "unet3-64-transposed": lambda: unet(3, [8, 16, 32], 64, transposed=True),
    "unet3-96-transposed": lambda: unet(3, [8, 16, 32, 64], 96, transposed=True),
    "retina-64": lambda: retina(64),
    "densenet-32": lambda: densenet(32),
    "unet2-256": lambda: unet(2, [16, 32, 64, 128], 256),
    "unet2-512": lambda: unet(2, [16, 32, 64, 128], 512),
    "layer-16-16-64": lambda: layer(16, 16, 64),
    # Small enough to count instructions under emulation.
    "layer-16-16-32": lambda: layer(16, 16, 32),
    "layer-8-8-32": lambda: layer(8, 8, 32),
    "point-32-32-32": lambda: layer(32, 32, 32, kernel=1),
    "unet3-32": lambda: unet(3, [8, 16, 32], 32),
    "unet2-64": lambda: unet(2, [16, 32, 64, 128], 64),
    "retina-32": lambda: retina(32),
    # A few kilobytes each, for the tests.
    "tiny-unet2": lambda: unet(2, [6, 9], 20, classes=3),
    "tiny-unet3": lambda: unet(3, [4, 8], 12),
    "tiny-unet3-transposed": lambda: unet(3, [4, 8], 12, transposed=True),
    "tiny-retina": lambda: retina(16, (4, 8), 8),
    "tiny-densenet": lambda: densenet(8, 4, 2, 2, 8),
    "tiny-odd": lambda: odd(21),
}


class Calibration(CalibrationDataReader):
    def __init__(self, shape):
        samples = [np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n in range(2)]
        self.samples = iter([{"x": sample} for sample in samples])

    def get_next(self):
        return next(self.samples, None)


def make(directory, name):
    logging.disable(logging.WARNING)
    plain = directory / f"{name}.onnx"
    prepared = directory / f"{name}.prepared.onnx"
    model = NETWORKS[name]()
    onnx.save(model, plain)
    quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    for tag, form in (("qdq", QuantFormat.QDQ), ("qop", QuantFormat.QOperator)):
        quantize_static(prepared, directory / f"{name}.{tag}.onnx", Calibration(shape), quant_format=form, per_channel=True,
                        reduce_range=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
                        calibrate_method=CalibrationMethod.MinMax,
                        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True})
    prepared.unlink()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    for wanted in sys.argv[2:] or NETWORKS:
        make(where, wanted)
        print(wanted, flush=True)
