"""Trained weights -> a model package: QDQ ONNX, its QOperator twin, a golden pair, digests.

Opset 13; weights s8 symmetric per channel with one bit in reserve (`reduce_range`: no 16-bit pair sum can saturate on
AVX2); activations s8 asymmetric, so that ReLU is the clip of the quantization itself. Calibration sees augmented
training data, never a test case.
"""

from __future__ import annotations

import gzip
import hashlib
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static


def float_onnx(network, shape, path):
    """The layer list with folded weights, written as ONNX opset 13."""
    spec, weights = network.spec, network.folded()
    nodes, initializers = [], []
    dims = spec["dims"]
    scales = numpy_helper.from_array(np.array([1, 1] + [2] * dims, np.float32), "up_scales")
    for layer in spec["layers"]:
        name, inputs = layer["name"], layer["inputs"]
        if layer["op"] == "conv":
            weight, bias = weights[name]
            initializers += [numpy_helper.from_array(weight.astype(np.float32), f"{name}_w"),
                             numpy_helper.from_array(bias.astype(np.float32), f"{name}_b")]
            pad = layer["kernel"] // 2
            target = f"{name}_conv" if layer["relu"] else name
            nodes.append(helper.make_node("Conv", [inputs[0], f"{name}_w", f"{name}_b"], [target], f"{name}_conv",
                                          kernel_shape=[layer["kernel"]] * dims, strides=[layer["stride"]] * dims,
                                          pads=[pad] * 2 * dims))
            if layer["relu"]:
                nodes.append(helper.make_node("Relu", [target], [name], f"{name}_relu"))
        elif layer["op"] == "pool":
            nodes.append(helper.make_node("MaxPool", inputs, [name], name, kernel_shape=[2] * dims, strides=[2] * dims))
        elif layer["op"] == "up":
            nodes.append(helper.make_node("Resize", [inputs[0], "", "up_scales"], [name], name, mode="nearest",
                                          coordinate_transformation_mode="asymmetric", nearest_mode="floor"))
            if scales not in initializers:
                initializers.append(scales)
        else:
            nodes.append(helper.make_node("Concat", inputs, [name], name, axis=1))
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in spec["outputs"]]
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))],
                              outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], producer_name="scanside-train")
    model.ir_version = 8
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(model)
    onnx.save(model, path)


class _Samples(CalibrationDataReader):
    def __init__(self, samples):
        self.samples = iter(samples)

    def get_next(self):
        sample = next(self.samples, None)
        return None if sample is None else {"input": sample}


def session(path, threads=1):
    """ONNX Runtime with no graph rewriting: the reference that the integer kernels are held to."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, batch, threads=2):
    """All outputs, by name, of one network on a list of inputs of one run each."""
    network = session(path, threads)
    names = [o.name for o in network.get_outputs()]
    results = [network.run(None, {"input": x.astype(np.float32)}) for x in batch]
    return {n: np.concatenate([r[i] for r in results]) for i, n in enumerate(names)}


def quantize(float_path, out, samples, operator_form=False):
    """Static quantization of every layer, calibrated (min and max) on `samples`."""
    quantize_static(
        str(float_path), str(out), _Samples(samples),
        quant_format=QuantFormat.QOperator if operator_form else QuantFormat.QDQ,
        per_channel=True, reduce_range=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options=dict(ActivationSymmetric=False, WeightSymmetric=True))
    model = onnx.load(out)
    model.producer_name, model.producer_version, model.doc_string = "scanside-train", "", ""
    onnx.save(model, out)


def cost_of(float_path, quantized_path, samples):
    """Mean output, float beside int8, and the largest differences: what the quantization did."""
    a, b = run(float_path, samples), run(quantized_path, samples)
    return {n: (float(np.abs(a[n] - b[n]).mean()), float(np.abs(a[n] - b[n]).max()), float((b[n] - a[n]).mean()))
            for n in a}


def output_scales(path, names):
    """The quantization step of each output of a QDQ file."""
    graph = onnx.load(path).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    made = {o: n for n in graph.node for o in n.output}
    return [float(constants[made[n].input[1]]) for n in names]


def toml(value):
    """The few TOML values a manifest needs."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_manifest(folder, top, tables):
    """model.toml: top-level keys, then tables; [files] with the SHA-256 of everything else in the folder."""
    lines = [f"{k} = {toml(v)}" for k, v in top.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]"] + [f"{k} = {toml(v)}" for k, v in table.items()]
    lines += ["", "[files]"]
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "model.toml"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f'"{path.relative_to(folder).as_posix()}" = "{digest}"')
    (folder / "model.toml").write_text("\n".join(lines) + "\n")


def write_packed(path, array):
    """Little-endian numbers, gzip, no time in it: the same numbers are the same file."""
    path.write_bytes(gzip.compress(array.tobytes(), 9, mtime=0))


def package(network, shape, samples, golden_input, folder, card, top, tables, quantized=True):
    """Write the whole package. Returns what the quantization cost on `samples`. Without `quantized` the float network alone, to
    measure int8 beside it in the same exam."""
    folder.mkdir(parents=True, exist_ok=True)
    if not quantized:
        float_onnx(network, shape, folder / "model.onnx")
        write_manifest(folder, top, tables)
        return {}
    (folder / "golden").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "float.onnx"
        float_onnx(network, shape, plain)
        quantize(plain, folder / "model.onnx", samples)
        quantize(plain, folder / "golden/model.qop.onnx", samples, operator_form=True)
        cost = cost_of(plain, folder / "model.onnx", samples[:8])
    # In steps of 1/128: noise of 24 bits would be most of the package.
    golden_input = (np.round(golden_input * 128) / 128).astype("<f4")
    write_packed(folder / "golden/input.bin.gz", golden_input)
    # The pair is of exact integer arithmetic, which every machine does alike: no tolerance.
    golden = {"input": "golden/input.bin.gz", "input_shape": list(golden_input.shape), "outputs": [], "output_shapes": []}
    for name, value in run(folder / "golden/model.qop.onnx", [golden_input]).items():
        write_packed(folder / f"golden/{name}.bin.gz", value.astype("<f4"))
        golden["outputs"].append(f"golden/{name}.bin.gz")
        golden["output_shapes"].append(list(value.shape))
    tables = dict(tables)
    golden["output_scales"] = output_scales(folder / "model.onnx", network.spec["outputs"])
    golden["tolerance"] = 0.0
    tables["golden"] = golden
    (folder / "CARD.md").write_text(card)
    write_manifest(folder, top, tables)
    return cost
