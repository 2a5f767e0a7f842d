//! Convolutions that stay in floats: found in what the islands leave to tract, and handed to a kernel of our own.

use std::collections::HashMap;

use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto};

use super::attributes::{integer, sized_window};
use super::kernels::graph::Shape;
use super::kernels::{FloatConv, Kernel};
use super::lower::{hook_node, prune};
use super::onnx::{self, label};

/// A layer of floats, planned.
pub(crate) struct FloatLayer {
    pub name: String,
    pub conv: FloatConv,
    /// Shape of its output in the network; the first dimension counts volumes.
    pub output: Vec<usize>,
}

/// Longest rows that one row of outputs may need, and most entries of a table: a layer beyond stays with tract.
const SCRATCH_MAX: usize = 64 << 20;

/// Takes convolutions of constant weights out of the network, with the ReLU behind them. `shape` knows the shapes of its
/// tensors, and `first` is the index that the first of them gets among the hooks.
pub(crate) fn lower(
    model: &mut ModelProto,
    first: usize,
    kernel: Kernel,
    shape: &dyn Fn(&str) -> Option<Vec<usize>>,
) -> Vec<FloatLayer> {
    let mut layers = Vec::new();
    // Without fused multiply-adds in hardware tract is the faster one; the portable kernel is asked for by name alone.
    let Some(graph) = model.graph.as_mut().filter(|_| FloatConv::is_fast()) else { return layers };
    let constants = onnx::constants(graph);
    let mut readers: HashMap<&str, Vec<usize>> = HashMap::new();
    for (index, node) in graph.node.iter().enumerate() {
        onnx::reads(node).into_iter().for_each(|name| readers.entry(name).or_default().push(index));
    }
    let (mut replaced, mut dropped) = (Vec::new(), Vec::new());
    for (index, node) in graph.node.iter().enumerate().filter(|(_, node)| node.op_type == "Conv") {
        let own = node.output.first().map_or("", String::as_str);
        let asked = |name: &str| graph.output.iter().any(|output| output.name == name);
        let next = match readers.get(own).map(Vec::as_slice) {
            Some([next]) if !asked(own) => Some(*next).filter(|next| graph.node[*next].op_type == "Relu"),
            _ => None,
        };
        let Some((conv, output)) = plan(graph, node, next.is_some(), &constants, kernel, shape) else { continue };
        let made = next.map_or(own, |next| graph.node[next].output[0].as_str());
        let at = first + layers.len();
        let hook = hook_node(label(node), at, vec![node.input[0].clone()], vec![(made.to_owned(), output.clone())]);
        layers.push(FloatLayer { name: label(node).to_owned(), conv, output });
        replaced.push((index, hook));
        dropped.extend(next);
    }
    for (index, hook) in replaced {
        graph.node[index] = hook;
    }
    let mut index = 0;
    graph.node.retain(|_| {
        index += 1;
        !dropped.contains(&(index - 1))
    });
    if !layers.is_empty() {
        prune(graph);
    }
    layers
}

fn plan(
    graph: &GraphProto,
    node: &NodeProto,
    relu: bool,
    constants: &HashMap<String, TensorProto>,
    kernel: Kernel,
    shape: &dyn Fn(&str) -> Option<Vec<usize>>,
) -> Option<(FloatConv, Vec<usize>)> {
    let dims = shape(node.input.first()?)?;
    let (weight_dims, weights) = reals(graph, constants, node.input.get(1)?)?;
    let groups = usize::try_from(integer(node, "group", 1)).ok().filter(|groups| *groups > 0)?;
    let rank = dims.len();
    if !matches!(rank, 4 | 5) || weight_dims.len() != rank || weight_dims.contains(&0) {
        return None;
    }
    let [outputs, own] = [weight_dims[0], weight_dims[1]];
    if own.checked_mul(groups)? != dims[1] || outputs % groups != 0 {
        return None;
    }
    let bias = match node.input.get(2).filter(|name| !name.is_empty()) {
        Some(name) => reals(graph, constants, name)?.1,
        None => vec![0.0; outputs],
    };
    let mut kernel_extent = [1; 3];
    kernel_extent[5 - rank..].copy_from_slice(&weight_dims[2..]);
    let input = Shape { d: if rank == 5 { dims[2] } else { 1 }, h: dims[rank - 2], w: dims[rank - 1], c: dims[1] };
    let window = sized_window(node, kernel_extent, input.space(), rank).ok()?;
    let space = window.over(input.space())?;
    let output = Shape { c: outputs, ..input }.with_space(space);
    let row = window.stride[2] * (256 + window.kernel[2] * window.dilation[2]);
    let scratch = [input.c, window.kernel[0], window.kernel[1], row, 4].into_iter().try_fold(1usize, usize::checked_mul);
    let count = [output.d, output.h, output.w, output.c].map(|dim| i64::try_from(dim).unwrap_or(-1));
    if scratch? > SCRATCH_MAX || bias.len() != outputs || onnx::elements(count).is_none() {
        return None;
    }
    let conv = FloatConv::plan(input, output, window, groups, &weights, &bias, relu, kernel);
    let mut made = vec![dims[0], outputs];
    made.extend(&space[5 - rank..]);
    Some((conv, made))
}

/// A constant of floats, or one that is dequantized from bytes.
fn reals(graph: &GraphProto, constants: &HashMap<String, TensorProto>, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
    let dims = |tensor: &TensorProto| -> Option<Vec<usize>> {
        tensor.dims.iter().map(|dim| usize::try_from(*dim).ok()).collect()
    };
    if let Some(tensor) = constants.get(name) {
        let values = onnx::numbers(tensor).iter().map(|value| *value as f32).collect();
        return (tensor.data_type == 1).then_some((dims(tensor)?, values));
    }
    let made = graph.node.iter().find(|made| made.op_type == "DequantizeLinear" && made.output.iter().any(|o| o == name))?;
    let tensor = constants.get(made.input.first()?)?;
    let scales = onnx::numbers(constants.get(made.input.get(1)?)?);
    let zeros = match made.input.get(2).filter(|name| !name.is_empty()) {
        Some(name) => onnx::numbers(constants.get(name)?),
        None => vec![0.0],
    };
    let dims = dims(tensor)?;
    let axis = integer(made, "axis", 1);
    let axis = if axis < 0 { axis + dims.len() as i64 } else { axis } as usize;
    let channels = if scales.len() == 1 { 1 } else { *dims.get(axis)? };
    let inner: usize = if scales.len() == 1 { 1 } else { dims[axis + 1..].iter().product() };
    if scales.len() != channels || !(zeros.len() == 1 || zeros.len() == channels) || inner == 0 {
        return None;
    }
    let pick = |all: &[f64], n: usize| all[if all.len() == 1 { 0 } else { n / inner % channels }];
    let values = onnx::numbers(tensor);
    let reals = values.iter().enumerate().map(|(n, value)| (value - pick(&zeros, n)) as f32 * pick(&scales, n) as f32);
    Some((dims, reals.collect()))
}
