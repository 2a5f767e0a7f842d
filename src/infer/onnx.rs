//! An ONNX file as bytes from outside: what is refused before anything is planned, and readers of its small parts.

use std::collections::{HashMap, HashSet};

use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use tract_onnx::prelude::Framework;

use super::engine::EngineError;

/// Longest file taken. The largest networks of this trade have some tens of megabytes.
const FILE_BYTES_MAX: usize = 1 << 30;

/// Most elements of one tensor: 2^28 floats are 1 GiB, more than a board has. A file can claim any shape in a few bytes.
pub(crate) const TENSOR_ELEMENTS_MAX: usize = 1 << 28;

/// Largest kernel, stride, dilation or pad. Larger ones are no network, and products of them overflow.
const WINDOW_MAX: i64 = 4096;

/// Most nodes. Planning is worse than linear in them.
const NODES_MAX: usize = 20_000;

pub(crate) fn refuse(text: impl Into<String>) -> EngineError {
    EngineError::Load(text.into())
}

/// Product of the dimensions, when each is positive and the whole below [`TENSOR_ELEMENTS_MAX`].
pub(crate) fn elements(dims: impl IntoIterator<Item = i64>) -> Option<usize> {
    dims.into_iter().try_fold(1usize, |product, dim| {
        let dim = usize::try_from(dim).ok().filter(|dim| *dim > 0)?;
        product.checked_mul(dim).filter(|product| *product <= TENSOR_ELEMENTS_MAX)
    })
}

/// Decodes the protobuf and refuses what could hurt: external data, claimed sizes that nothing backs, and operators that
/// would fill memory while the network is still being planned.
///
/// # Errors
/// [`EngineError::Load`], naming the tensor or node.
pub(crate) fn decode(bytes: &[u8]) -> Result<ModelProto, EngineError> {
    if bytes.len() > FILE_BYTES_MAX {
        return Err(refuse(format!("{} bytes are more than the {FILE_BYTES_MAX} allowed", bytes.len())));
    }
    let mut reader = bytes;
    let model = tract_onnx::onnx()
        .proto_model_for_read(&mut reader)
        .map_err(|error| refuse(format!("not an ONNX protobuf: {error}")))?;
    check(&model)?;
    Ok(model)
}

/// What [`decode`] refuses of a protobuf that can be read.
///
/// # Errors
/// [`EngineError::Load`], naming the tensor or node.
pub(crate) fn check(model: &ModelProto) -> Result<(), EngineError> {
    let graph = model.graph.as_ref().ok_or_else(|| refuse("the file has no graph"))?;
    if graph.node.len() > NODES_MAX {
        return Err(refuse(format!("{} nodes are more than the {NODES_MAX} allowed", graph.node.len())));
    }
    if graph.output.is_empty() {
        return Err(refuse("the graph has no output"));
    }
    check_graph(graph, 0)?;
    for input in network_inputs(graph) {
        input_shape(graph, input)?;
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
    let mut constants: HashSet<&str> = graph.initializer.iter().map(|t| t.name.as_str()).collect();
    let mut made: HashSet<&str> = constants.iter().copied().collect();
    made.extend(graph.input.iter().map(|input| input.name.as_str()));
    for node in &graph.node {
        for attribute in &node.attribute {
            check_attribute(node, attribute, depth)?;
        }
        check_node(node, &constants, graph)?;
        for output in node.output.iter().filter(|name| !name.is_empty()) {
            if !made.insert(output) {
                return Err(refuse(format!("node {:?}: the tensor {output:?} is made twice", label(node))));
            }
        }
        let constant = matches!(node.op_type.as_str(), "Constant" | "Identity" | "DequantizeLinear" | "Cast")
            && node.input.iter().all(|input| input.is_empty() || constants.contains(input.as_str()));
        if constant {
            constants.extend(node.output.iter().map(String::as_str));
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
    let window = matches!(
        attribute.name.as_str(),
        "kernel_shape" | "strides" | "dilations" | "pads" | "output_padding" | "output_shape" | "group"
    );
    if window && attribute.ints.iter().chain([&attribute.i]).any(|v| v.abs() > WINDOW_MAX) {
        return Err(refuse(format!("{name} has a value above {WINDOW_MAX}: {:?}", attribute.ints)));
    }
    Ok(())
}

/// Operators whose output is as large as numbers in their inputs say: those numbers must be in the file, and modest.
/// Others that compute on constants alone would be evaluated while planning, before their sizes are known.
fn check_node(node: &NodeProto, constants: &HashSet<&str>, graph: &GraphProto) -> Result<(), EngineError> {
    let sized_by: &[usize] = match node.op_type.as_str() {
        "ConstantOfShape" => &[0],
        "Expand" | "Tile" | "Pad" | "OneHot" => &[1],
        "Range" => &[0, 1, 2],
        "Resize" => &[2, 3],
        "Upsample" => &[1],
        "Conv" | "ConvTranspose" | "MaxPool" | "AveragePool" => {
            return if node.input.first().is_some_and(|input| constants.contains(input.as_str())) {
                Err(refuse(format!("node {:?} ({}) works on a constant", label(node), node.op_type)))
            } else {
                Ok(())
            };
        }
        "RandomNormal" | "RandomUniform" | "RandomNormalLike" | "RandomUniformLike" | "Multinomial" | "EyeLike" | "Loop"
        | "SequenceAt" | "SequenceConstruct" => {
            return Err(refuse(format!("node {:?}: the operator {} is not supported", label(node), node.op_type)));
        }
        _ => return Ok(()),
    };
    for input in sized_by.iter().filter_map(|at| node.input.get(*at)).filter(|name| !name.is_empty()) {
        let tensor = graph.initializer.iter().find(|t| t.name == *input).or_else(|| constant_node(graph, input));
        let numbers = tensor.map(numbers).ok_or_else(|| {
            refuse(format!("node {:?} ({}): its size {input:?} is not a constant of the file", label(node), node.op_type))
        })?;
        let product: f64 = numbers.iter().map(|v| v.abs().max(1.0)).product();
        if product.is_nan() || product > TENSOR_ELEMENTS_MAX as f64 {
            return Err(refuse(format!("node {:?} ({}) asks for the size {numbers:?}", label(node), node.op_type)));
        }
    }
    Ok(())
}

fn constant_node<'g>(graph: &'g GraphProto, output: &str) -> Option<&'g TensorProto> {
    let node = graph.node.iter().find(|n| n.op_type == "Constant" && n.output.iter().any(|o| o == output))?;
    node.attribute.iter().find(|a| a.name == "value")?.t.as_ref()
}

/// Every tensor whose value is in the file: initializers, `Constant` nodes, and what `Identity` hands on of them.
pub(crate) fn constants(graph: &GraphProto) -> HashMap<String, TensorProto> {
    let mut found: HashMap<String, TensorProto> =
        graph.initializer.iter().map(|tensor| (tensor.name.clone(), tensor.clone())).collect();
    for node in &graph.node {
        let value = match node.op_type.as_str() {
            "Constant" => node.attribute.iter().find_map(constant_value),
            "Identity" => node.input.first().and_then(|input| found.get(input)).cloned(),
            _ => None,
        };
        if let (Some(value), Some(output)) = (value, node.output.first()) {
            found.insert(output.clone(), value);
        }
    }
    found
}

fn constant_value(attribute: &AttributeProto) -> Option<TensorProto> {
    let mut tensor = TensorProto::default();
    match attribute.name.as_str() {
        "value" => return attribute.t.clone(),
        "value_float" => (tensor.data_type, tensor.float_data) = (1, vec![attribute.f]),
        "value_floats" => {
            tensor.dims = vec![attribute.floats.len() as i64];
            (tensor.data_type, tensor.float_data) = (1, attribute.floats.clone());
        }
        "value_int" => (tensor.data_type, tensor.int64_data) = (7, vec![attribute.i]),
        "value_ints" => {
            tensor.dims = vec![attribute.ints.len() as i64];
            (tensor.data_type, tensor.int64_data) = (7, attribute.ints.clone());
        }
        _ => return None,
    }
    Some(tensor)
}

/// The numbers of a tensor of any numeric type of up to 64 bits, as `f64` (exact for all but the longest integers).
pub(crate) fn numbers(tensor: &TensorProto) -> Vec<f64> {
    let raw = &tensor.raw_data;
    match tensor.data_type {
        1 if raw.is_empty() => tensor.float_data.iter().map(|v| f64::from(*v)).collect(),
        1 => raw.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect(),
        7 if raw.is_empty() => tensor.int64_data.iter().map(|v| *v as f64).collect(),
        7 => raw.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as f64).collect(),
        11 if raw.is_empty() => tensor.double_data.clone(),
        11 => raw.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))).collect(),
        2 | 3 | 6 | 9 if raw.is_empty() => tensor.int32_data.iter().map(|v| f64::from(*v)).collect(),
        2 | 9 => raw.iter().map(|b| f64::from(*b)).collect(),
        3 => raw.iter().map(|b| f64::from(*b as i8)).collect(),
        6 => raw.chunks_exact(4).map(|b| f64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect(),
        _ => Vec::new(),
    }
}

/// A name for messages: the node's own, or that of its first output.
pub(crate) fn label(node: &NodeProto) -> &str {
    if node.name.is_empty() { node.output.first().map_or("", String::as_str) } else { &node.name }
}

/// The tensors a node reads, also in graphs inside it.
pub(crate) fn reads(node: &NodeProto) -> Vec<&str> {
    let inside = node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs));
    let inner = inside.flat_map(|graph| {
        graph.node.iter().flat_map(reads).chain(graph.output.iter().map(|output| output.name.as_str()))
    });
    node.input.iter().map(String::as_str).filter(|name| !name.is_empty()).chain(inner).collect()
}

/// The inputs a caller must give: those of the graph that no initializer fills.
pub(crate) fn network_inputs(graph: &GraphProto) -> impl Iterator<Item = &str> {
    graph
        .input
        .iter()
        .map(|input| input.name.as_str())
        .filter(|name| !graph.initializer.iter().any(|tensor| tensor.name == *name))
}

/// The shape that the file states for a tensor, if it is complete.
pub(crate) fn stated_shape(info: &ValueInfoProto) -> Option<Vec<usize>> {
    use tract_onnx::pb::tensor_shape_proto::dimension::Value;
    let type_proto::Value::TensorType(tensor) = info.r#type.as_ref()?.value.as_ref()?;
    let dims = tensor.shape.as_ref()?.dim.iter().map(|dim| match dim.value {
        Some(Value::DimValue(value)) => usize::try_from(value).ok(),
        _ => None,
    });
    dims.collect()
}

/// The shape of a graph input, every dimension known and positive.
///
/// # Errors
/// [`EngineError::Load`] for a dynamic, empty or huge shape.
pub(crate) fn input_shape(graph: &GraphProto, name: &str) -> Result<Vec<usize>, EngineError> {
    use tract_onnx::pb::tensor_shape_proto::dimension::Value;
    let info = graph.input.iter().find(|input| input.name == name);
    let Some(type_proto::Value::TensorType(tensor)) =
        info.and_then(|info| info.r#type.as_ref()).and_then(|t| t.value.as_ref())
    else {
        return Err(refuse(format!("input {name:?} has no tensor type")));
    };
    let shape = tensor.shape.as_ref().ok_or_else(|| refuse(format!("input {name:?} has no shape")))?;
    let dims: Vec<i64> = shape
        .dim
        .iter()
        .map(|dim| match &dim.value {
            Some(Value::DimValue(value)) => Ok(*value),
            Some(Value::DimParam(symbol)) => {
                Err(refuse(format!("input {name:?} has the open dimension {symbol:?}; fix the shape when exporting")))
            }
            None => Err(refuse(format!("input {name:?} has an open dimension; fix the shape when exporting"))),
        })
        .collect::<Result<_, _>>()?;
    elements(dims.iter().copied()).ok_or_else(|| refuse(format!("input {name:?} claims the shape {dims:?}")))?;
    Ok(dims.into_iter().map(|dim| dim as usize).collect())
}
