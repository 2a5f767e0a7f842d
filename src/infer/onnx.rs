//! An ONNX file as bytes from outside: what is refused before anything is planned, and readers of its small parts.

use std::collections::HashMap;

use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use tract_onnx::prelude::Framework;

use super::engine::EngineError;
use super::{checks, fold};

/// Longest file taken. The largest networks of this trade have some tens of megabytes.
const FILE_BYTES_MAX: usize = 1 << 30;

/// Most elements of one tensor: 2^28 floats are 1 GiB, more than a board has. A file can claim any shape in a few bytes.
pub(crate) const TENSOR_ELEMENTS_MAX: usize = 1 << 28;

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
    let mut model = tract_onnx::onnx()
        .proto_model_for_read(&mut reader)
        .map_err(|error| refuse(format!("not an ONNX protobuf: {error}")))?;
    prepare(&mut model)?;
    Ok(model)
}

/// Makes a protobuf fit to be planned: refuses what could hurt, and computes what hangs on constants alone.
///
/// # Errors
/// [`EngineError::Load`], naming the tensor or node.
pub(crate) fn prepare(model: &mut ModelProto) -> Result<(), EngineError> {
    checks::form(model)?;
    fold::fold(model);
    checks::sizes(model)
}

/// The version of ONNX's own operators.
pub(crate) fn version(model: &ModelProto) -> i64 {
    model.opset_import.iter().find(|set| set.domain.is_empty()).map_or(0, |set| set.version)
}

/// Every tensor whose value is in the file: initializers, `Constant` nodes, and what `Identity` hands on of them.
pub(crate) fn constants(graph: &GraphProto) -> HashMap<String, TensorProto> {
    constants_among(graph.initializer.iter(), &graph.node, |_| true)
}

/// As [`constants`], of these initializers and of the `Constant` nodes whose value is wanted.
pub(crate) fn constants_among<'t>(
    initializers: impl Iterator<Item = &'t TensorProto>,
    nodes: &[NodeProto],
    wanted: impl Fn(&TensorProto) -> bool,
) -> HashMap<String, TensorProto> {
    let mut found: HashMap<String, TensorProto> = initializers.map(|tensor| (tensor.name.clone(), tensor.clone())).collect();
    for node in nodes {
        let value = match node.op_type.as_str() {
            "Constant" => constant(node).filter(&wanted),
            "Identity" => node.input.first().and_then(|input| found.get(input)).cloned(),
            _ => None,
        };
        if let (Some(value), Some(output)) = (value, node.output.first()) {
            found.insert(output.clone(), value);
        }
    }
    found
}

/// What a `Constant` node holds.
pub(crate) fn constant(node: &NodeProto) -> Option<TensorProto> {
    if node.op_type == "Constant" { node.attribute.iter().find_map(constant_value) } else { None }
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
