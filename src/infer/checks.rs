//! What of a network is refused before anything is planned: claims that nothing backs, and numbers that no network has.

use std::collections::{HashMap, HashSet};

use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};

use super::attributes::{self, integer, ints, sized_window, text, transposed_window};
use super::engine::EngineError;
use super::layers::Trouble;
use super::onnx::{self, TENSOR_ELEMENTS_MAX, elements, label, network_inputs, numbers, reads, refuse};

/// Largest kernel, stride, dilation, pad or factor. Larger ones are no network, and products of them overflow.
const WINDOW_MAX: i64 = 4096;

/// Most nodes. Planning is worse than linear in them.
const NODES_MAX: usize = 20_000;

/// Refuses what could hurt whoever reads on: external data, tensors without their data, windows of absurd extent, tensors
/// that nothing makes.
///
/// # Errors
/// [`EngineError::Load`], naming the tensor or node.
pub(crate) fn form(model: &ModelProto) -> Result<(), EngineError> {
    let graph = model.graph.as_ref().ok_or_else(|| refuse("the file has no graph"))?;
    if graph.node.len() > NODES_MAX {
        return Err(refuse(format!("{} nodes are more than the {NODES_MAX} allowed", graph.node.len())));
    }
    if graph.output.is_empty() {
        return Err(refuse("the graph has no output"));
    }
    check_graph(graph, 0)?;
    for input in network_inputs(graph) {
        onnx::input_shape(graph, input)?;
    }
    Ok(())
}

fn check_graph(graph: &GraphProto, depth: usize) -> Result<(), EngineError> {
    if depth > 4 {
        return Err(refuse("graphs are nested too deeply"));
    }
    if !graph.sparse_initializer.is_empty() {
        return Err(refuse("sparse weights are not supported"));
    }
    for tensor in &graph.initializer {
        check_tensor(tensor, &tensor.name)?;
    }
    let mut made: HashSet<&str> = graph.initializer.iter().map(|t| t.name.as_str()).collect();
    made.extend(graph.input.iter().map(|input| input.name.as_str()));
    for node in &graph.node {
        for attribute in &node.attribute {
            check_attribute(node, attribute, depth)?;
        }
        for output in node.output.iter().filter(|name| !name.is_empty()) {
            if !made.insert(output) {
                return Err(refuse(format!("node {:?}: the tensor {output:?} is made twice", label(node))));
            }
        }
    }
    if depth == 0 {
        for output in &graph.output {
            if !made.contains(output.name.as_str()) {
                return Err(refuse(format!("no node makes the output {:?}", output.name)));
            }
        }
        for node in &graph.node {
            if let Some(input) = node.input.iter().find(|i| !i.is_empty() && !made.contains(i.as_str())) {
                return Err(refuse(format!("node {:?} reads {input:?}, which nothing makes", label(node))));
            }
        }
    }
    Ok(())
}

fn check_tensor(tensor: &TensorProto, name: &str) -> Result<(), EngineError> {
    if tensor.data_location.is_some_and(|place| place != 0) || !tensor.external_data.is_empty() {
        return Err(refuse(format!("tensor {name:?} lies in another file, which is not allowed")));
    }
    let count = if tensor.dims.contains(&0) { 0 } else {
        elements(tensor.dims.iter().copied())
            .ok_or_else(|| refuse(format!("tensor {name:?} claims the shape {:?}", tensor.dims)))?
    };
    // What each type takes in `raw_data`, or how many entries of the typed field; a claim without data behind it is refused.
    let (bytes, typed) = match tensor.data_type {
        1 => (4, tensor.float_data.len()),
        2 | 3 | 9 => (1, tensor.int32_data.len()),
        4 | 5 | 10 | 16 => (2, tensor.int32_data.len()),
        6 => (4, tensor.int32_data.len()),
        7 => (8, tensor.int64_data.len()),
        11 => (8, tensor.double_data.len()),
        12 => (4, tensor.uint64_data.len()),
        13 => (8, tensor.uint64_data.len()),
        8 => (1, tensor.string_data.len()),
        other => return Err(refuse(format!("tensor {name:?} has the unknown data type {other}"))),
    };
    let have = if tensor.raw_data.is_empty() { typed } else if tensor.raw_data.len().is_multiple_of(bytes) {
        tensor.raw_data.len() / bytes
    } else {
        usize::MAX
    };
    if have != count {
        return Err(refuse(format!("tensor {name:?} of shape {:?} does not have the data for it", tensor.dims)));
    }
    Ok(())
}

fn check_attribute(node: &NodeProto, attribute: &AttributeProto, depth: usize) -> Result<(), EngineError> {
    let name = format!("{}.{}", label(node), attribute.name);
    if let Some(tensor) = &attribute.t {
        check_tensor(tensor, &name)?;
    }
    for tensor in &attribute.tensors {
        check_tensor(tensor, &name)?;
    }
    if attribute.sparse_tensor.is_some() || !attribute.sparse_tensors.is_empty() {
        return Err(refuse(format!("{name}: sparse tensors are not supported")));
    }
    for graph in attribute.g.iter().chain(&attribute.graphs) {
        check_graph(graph, depth + 1)?;
    }
    let least = match attribute.name.as_str() {
        "kernel_shape" | "strides" | "dilations" => 1,
        "output_padding" | "output_shape" => 0,
        "pads" if node.op_type == "Pad" => -WINDOW_MAX,
        "pads" => 0,
        "group" if attribute.i < 1 || attribute.i > WINDOW_MAX => return Err(refuse(format!("{name} is {}", attribute.i))),
        _ => return Ok(()),
    };
    match attribute.ints.iter().find(|value| !(least..=WINDOW_MAX).contains(*value)) {
        Some(value) => Err(refuse(format!("{name} has the value {value}, outside {least} to {WINDOW_MAX}"))),
        None => Ok(()),
    }
}

/// A tensor known from the file alone: how many elements it has, and in which shape if that is known without computing it.
#[derive(Clone)]
struct Constant {
    count: usize,
    dims: Option<Vec<i64>>,
}

impl Constant {
    fn of(dims: &[i64]) -> Self {
        let count = dims.iter().map(|dim| usize::try_from(*dim).unwrap_or(0)).product();
        Self { count, dims: Some(dims.to_vec()) }
    }
}

/// Refuses nodes that would make more than a board can hold, or out of nothing. tract computes what hangs on constants while
/// it is still planning, before it knows how large the results are.
///
/// # Errors
/// [`EngineError::Load`], naming the node.
pub(crate) fn sizes(model: &ModelProto) -> Result<(), EngineError> {
    model.graph.as_ref().map_or(Ok(()), |graph| graph_sizes(graph, &graph.node, onnx::version(model)))
}

/// As [`sizes`], of the first nodes alone.
///
/// # Errors
/// As [`sizes`].
pub(crate) fn sizes_until(model: &ModelProto, end: usize) -> Result<(), EngineError> {
    model.graph.as_ref().map_or(Ok(()), |graph| graph_sizes(graph, &graph.node[..end], onnx::version(model)))
}

fn graph_sizes(graph: &GraphProto, nodes: &[NodeProto], version: i64) -> Result<(), EngineError> {
    let mut known: HashMap<&str, Constant> =
        graph.initializer.iter().map(|tensor| (tensor.name.as_str(), Constant::of(&tensor.dims))).collect();
    for node in nodes {
        for inner in node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs)) {
            graph_sizes(inner, &inner.node, version)?;
        }
        let asked = check_asked(node, &known, graph, version)?;
        check_weights(node, &known)?;
        let inputs: Vec<&Constant> = reads(node).iter().filter_map(|name| known.get(name)).collect();
        let made = match node.op_type.as_str() {
            "Constant" => onnx::constant(node).map(|tensor| Constant::of(&tensor.dims)),
            _ if inputs.is_empty() || inputs.len() < reads(node).len() => None,
            _ => Some(computed(node, &inputs, asked)?),
        };
        if let Some(made) = made {
            known.extend(node.output.iter().map(|output| (output.as_str(), made.clone())));
        }
    }
    Ok(())
}

/// What a node makes of constants alone; `asked` is what numbers in its inputs ask for.
fn computed(node: &NodeProto, inputs: &[&Constant], asked: usize) -> Result<Constant, EngineError> {
    let same = |dims| Ok(Constant { count: inputs[0].count, dims });
    let total = inputs.iter().map(|input| input.count).sum();
    let count = match node.op_type.as_str() {
        "Identity" | "Cast" | "QuantizeLinear" | "DequantizeLinear" | "Relu" | "Neg" | "Abs" | "Sqrt" | "Exp" | "Log"
        | "Reciprocal" | "Floor" | "Ceil" | "Round" | "Sign" | "Not" | "Clip" => return same(inputs[0].dims.clone()),
        "Reshape" | "Transpose" | "Squeeze" | "Unsqueeze" | "Flatten" | "Slice" | "Concat" | "Split" => {
            return Ok(Constant { count: total, dims: None });
        }
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Min" | "Max" | "Equal" | "Greater" | "Less" | "Where" => {
            let dims: Option<Vec<&Vec<i64>>> = inputs.iter().map(|input| input.dims.as_ref()).collect();
            let dims = dims.map(|all| {
                let rank = all.iter().map(|dims| dims.len()).max().unwrap_or(0);
                let at = |dims: &[i64], axis: usize| (axis + dims.len()).checked_sub(rank).map_or(1, |axis| dims[axis]);
                (0..rank).map(|axis| all.iter().map(|dims| at(dims, axis)).max().unwrap_or(1)).collect::<Vec<i64>>()
            });
            match dims {
                Some(dims) if elements(dims.iter().copied()).is_some() => return Ok(Constant::of(&dims)),
                Some(_) => None,
                None => inputs.iter().try_fold(1usize, |all, input| all.checked_mul(input.count)),
            }
        }
        // A product of matrices, a table looked up, and whatever else: no more than each with each.
        _ => inputs.iter().try_fold(asked, |all, input| all.checked_mul(input.count.max(1))),
    };
    match count.filter(|count| *count <= TENSOR_ELEMENTS_MAX) {
        Some(count) => Ok(Constant { count, dims: None }),
        None => Err(refuse(format!("node {:?} ({}) computes too much from constants alone", label(node), node.op_type))),
    }
}

/// The inputs that say how large an operator's output is.
pub(crate) fn sized_by(node: &NodeProto, version: i64) -> &'static [usize] {
    match node.op_type.as_str() {
        "ConstantOfShape" => &[0],
        "Expand" | "Tile" | "Pad" | "OneHot" | "Upsample" => &[1],
        "Range" => &[0, 1, 2],
        "Resize" if version < 11 => &[1],
        "Resize" => &[2, 3],
        _ => &[],
    }
}

/// Operators whose output is as large as numbers in their inputs say: those numbers must be in the file, and modest. Gives
/// their product.
fn check_asked(node: &NodeProto, known: &HashMap<&str, Constant>, graph: &GraphProto, version: i64) -> Result<usize, EngineError> {
    let at = || format!("node {:?} ({})", label(node), node.op_type);
    let first = node.input.first().and_then(|input| known.get(input.as_str()));
    match node.op_type.as_str() {
        "Conv" | "ConvTranspose" | "ConvInteger" | "QLinearConv" | "MaxPool" | "AveragePool" if first.is_some() => {
            return Err(refuse(format!("{} works on a constant", at())));
        }
        "RandomNormal" | "RandomUniform" | "RandomNormalLike" | "RandomUniformLike" | "Multinomial" | "EyeLike" | "Loop"
        | "SequenceAt" | "SequenceConstruct" | "HannWindow" | "HammingWindow" | "BlackmanWindow" | "MelWeightMatrix" => {
            return Err(refuse(format!("node {:?}: the operator {} is not supported", label(node), node.op_type)));
        }
        _ => {}
    }
    let factor = |value: &f64| value.is_finite() && (1.0 / WINDOW_MAX as f64..=WINDOW_MAX as f64).contains(value);
    if let Some(bad) = attributes::numbers(node, "scales").iter().map(|scale| f64::from(*scale)).find(|scale| !factor(scale)) {
        return Err(refuse(format!("{} has the factor {bad}", at())));
    }
    let mut asked = 1.0;
    for which in sized_by(node, version) {
        let Some(input) = node.input.get(*which).filter(|name| !name.is_empty()) else { continue };
        let tensor = graph.initializer.iter().find(|t| t.name == *input).cloned();
        let tensor = tensor.or_else(|| graph.node.iter().find(|n| n.output.contains(input)).and_then(onnx::constant));
        let tensor = tensor.ok_or_else(|| refuse(format!("{}: its size {input:?} is not a constant of the file", at())))?;
        let values = numbers(&tensor);
        let factors = matches!(node.op_type.as_str(), "Resize" | "Upsample") && tensor.data_type == 1;
        if let Some(bad) = values.iter().find(|value| factors && !factor(value)) {
            return Err(refuse(format!("{} has the factor {bad}", at())));
        }
        if node.op_type == "Resize" && !factors && values.iter().any(|value| *value < 1.0) {
            return Err(refuse(format!("{} asks for the size {values:?}", at())));
        }
        let product: f64 = values.iter().map(|v| v.abs().max(1.0)).product();
        if product.is_nan() || product > TENSOR_ELEMENTS_MAX as f64 {
            return Err(refuse(format!("{} asks for the size {values:?}", at())));
        }
        asked = product.max(asked);
    }
    Ok(asked as usize)
}

/// Operators that compute with each element of their constants: there must be some, and a kernel of the stated extent.
fn check_weights(node: &NodeProto, known: &HashMap<&str, Constant>) -> Result<(), EngineError> {
    let kind = node.op_type.trim_start_matches("QLinear");
    let works = matches!(
        kind,
        "Conv" | "ConvInteger" | "ConvTranspose" | "Gemm" | "QGemm" | "MatMul" | "MatMulInteger" | "Add" | "Sub" | "Mul" | "Div"
            | "BatchNormalization" | "InstanceNormalization" | "PRelu" | "QuantizeLinear" | "DequantizeLinear" | "Sigmoid"
            | "LeakyRelu" | "Softmax" | "AveragePool" | "GlobalAveragePool"
    );
    let at = || format!("node {:?} ({})", label(node), node.op_type);
    // An empty tensor that is only requantized is told of where it is used.
    let from = usize::from(matches!(node.op_type.as_str(), "QuantizeLinear" | "DequantizeLinear"));
    let mut inputs = node.input.iter().skip(from);
    let empty = inputs.find(|input| known.get(input.as_str()).is_some_and(|constant| constant.count == 0));
    if let Some(empty) = empty.filter(|_| works) {
        return Err(refuse(format!("{}: its input {empty:?} has no elements", at())));
    }
    let is_scalar = |input: &String| known.get(input.as_str()).is_some_and(|constant| constant.dims.as_deref() == Some(&[]));
    if matches!(node.op_type.as_str(), "MatMul" | "Gemm") && node.input.iter().take(2).any(is_scalar) {
        return Err(refuse(format!("{} multiplies with a matrix that is a single number", at())));
    }
    if !matches!(node.op_type.as_str(), "Conv" | "ConvTranspose" | "QLinearConv" | "ConvInteger") {
        return Ok(());
    }
    let weights = node.input.get(if node.op_type == "QLinearConv" { 3 } else { 1 });
    let Some(dims) = weights.and_then(|name| known.get(name.as_str())).and_then(|weights| weights.dims.as_ref()) else {
        return Ok(());
    };
    let stated = ints(node, "kernel_shape");
    let spatial = dims.len().saturating_sub(2);
    let group = integer(node, "group", 1);
    let divided = if node.op_type == "ConvTranspose" { 0 } else { dims.first().map_or(0, |outputs| outputs % group) };
    let lists = [("strides", 1), ("dilations", 1), ("pads", 2), ("output_padding", 1)];
    let fits = lists.iter().all(|(name, times)| [0, times * spatial].contains(&ints(node, name).len()));
    if spatial == 0 || divided != 0 || !fits || !(stated.is_empty() || stated == dims[2..]) {
        return Err(refuse(format!("{}: its attributes do not fit its weights of shape {dims:?}", at())));
    }
    Ok(())
}

/// Refuses windows that do not fit the tensors they slide over, in what tract is going to run: it would find out by
/// counting below zero.
///
/// # Errors
/// [`EngineError::Load`], naming the node.
pub(crate) fn windows(model: &ModelProto, shape: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<(), EngineError> {
    let Some(graph) = &model.graph else { return Ok(()) };
    let constants = onnx::constants(graph);
    let dims = |name: &String| match constants.get(name) {
        Some(tensor) => tensor.dims.iter().map(|dim| usize::try_from(*dim).ok()).collect(),
        None => shape(name),
    };
    for node in &graph.node {
        let wrong = |why: &str| Err(refuse(format!("node {:?} ({}): {why}", label(node), node.op_type)));
        let weights = match node.op_type.as_str() {
            "Conv" | "ConvTranspose" | "ConvInteger" => node.input.get(1),
            "QLinearConv" => node.input.get(3),
            "MaxPool" | "AveragePool" => None,
            "Resize" | "Upsample" if ints(node, "axes").is_empty() => {
                let mut given = node.input.iter().skip(1).filter_map(|name| constants.get(name)).map(|tensor| numbers(tensor).len());
                let rank = node.input.first().and_then(dims).map_or(0, |dims| dims.len());
                let stated = attributes::numbers(node, "scales").len();
                if rank > 0 && stated != rank && !given.any(|count| count == rank) {
                    return wrong("it has neither a factor nor a size for each dimension of its input");
                }
                continue;
            }
            _ => continue,
        };
        let Some(input) = node.input.first().and_then(dims).filter(|dims| matches!(dims.len(), 4 | 5)) else { continue };
        let rank = input.len();
        let mut space = [1; 3];
        space[5 - rank..].copy_from_slice(&input[2..]);
        let (mut kernel, mut outputs) = ([1; 3], input[1]);
        match weights.map(dims) {
            Some(None) => continue,
            Some(Some(weights)) => {
                let group = integer(node, "group", 1).max(1) as usize;
                let channels = if node.op_type == "ConvTranspose" { weights.first().copied() } else {
                    weights.get(1).and_then(|each| each.checked_mul(group))
                };
                if weights.len() != rank || channels != Some(input[1]) || !input[1].is_multiple_of(group) {
                    return wrong(&format!("its weights of shape {weights:?} do not fit its input of shape {input:?}"));
                }
                kernel[5 - rank..].copy_from_slice(&weights[2..]);
                outputs = if node.op_type == "ConvTranspose" { weights[1].saturating_mul(group) } else { weights[0] };
            }
            None => {
                let stated = ints(node, "kernel_shape");
                if stated.len() != rank - 2 {
                    return wrong("its kernel does not fit its input");
                }
                kernel[5 - rank..].iter_mut().zip(&stated).for_each(|(to, from)| *to = *from as usize);
            }
        }
        let made = if node.op_type == "ConvTranspose" {
            transposed_window(node, kernel, space, rank).map(|window| window.output)
        } else {
            let window = sized_window(node, kernel, space, rank);
            window.and_then(|window| window.over(space).ok_or("its kernel is larger than its padded input".into()))
        };
        // Ways of padding that have no layer of ours may have one in tract.
        let ours = matches!(text(node, "auto_pad", "NOTSET"), "NOTSET" | "VALID" | "SAME_UPPER" | "SAME_LOWER");
        match made {
            Err(Trouble::Here(why)) if ours => return wrong(&why),
            Ok([d, h, w]) => {
                let dims = [input[0], outputs, d, h, w];
                if elements(dims.map(|dim| i64::try_from(dim).unwrap_or(-1))).is_none() {
                    return wrong(&format!("its result would have the shape {dims:?}"));
                }
            }
            Err(_) => {}
        }
    }
    Ok(())
}
