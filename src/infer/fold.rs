//! What a network computes from constants alone, computed before it is planned: exporters write the sizes of borders and of
//! enlarged images as little programs, and an engine for boards takes sizes only where the file states them.

use std::collections::HashMap;

use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::internal::*;

use super::checks::{self, sized_by};
use super::engine::{EngineError, guarded, tract_shapes};
use super::onnx::{self, numbers};

/// Most elements of a tensor that is computed here. Sizes have a handful; weights are left as they are.
const FOLDED_MAX: usize = 1 << 10;

/// Most elements that such a computation may put together. What is looked up or broadcast is no more than each with each.
const WORK_MAX: usize = 1 << 20;

/// Sizes that hang on the shape of a tensor inside the network are followed so many times.
const ROUNDS_MAX: usize = 32;

/// Replaces nodes that compute small tensors from constants by their results, as far as a size of some other node may hang on
/// them, and gives every `Pad` its value as a scalar. What cannot be computed stays.
pub(crate) fn fold(model: &mut ModelProto) {
    let version = onnx::version(model);
    let mut shapes = HashMap::new();
    for _ in 0..ROUNDS_MAX {
        fold_once(model, &shapes);
        // Shapes can be inferred up to the first node whose size is still unknown; those inside may give just that size.
        let Some(graph) = &model.graph else { return };
        let known = small_constants(graph);
        let open = |node: &NodeProto| {
            let mut sizes = sized_by(node, version).iter().filter_map(|at| node.input.get(*at));
            sizes.any(|name| !name.is_empty() && !known.contains_key(name))
        };
        let Some(end) = graph.node.iter().position(open) else { break };
        let asked = graph.node[..end].iter().any(|node| node.op_type == "Shape");
        if !asked || checks::sizes_until(model, end).is_err() {
            break;
        }
        let found = tract_shapes(&beginning(model, end));
        let told = |node: &NodeProto| node.op_type == "Shape" && node.input.first().is_some_and(|input| found.contains_key(input));
        if !graph.node[..end].iter().any(told) {
            break;
        }
        shapes = found;
    }
    if let Some(graph) = &mut model.graph {
        scalar_pads(graph);
    }
}

/// The network's first nodes.
fn beginning(model: &ModelProto, end: usize) -> ModelProto {
    let mut model = model.clone();
    if let Some(graph) = &mut model.graph {
        graph.node.truncate(end);
        graph.output.clear();
        graph.value_info.clear();
    }
    model
}

fn small_constants(graph: &GraphProto) -> HashMap<String, TensorProto> {
    let stored = graph.initializer.iter().filter(|tensor| tensor.dims.iter().product::<i64>() <= FOLDED_MAX as i64);
    onnx::constants_among(stored, &graph.node, |tensor| numbers(tensor).len() <= FOLDED_MAX)
}

fn fold_once(model: &mut ModelProto, shapes: &HashMap<String, Vec<usize>>) {
    let Some(graph) = &model.graph else { return };
    let mut known = small_constants(graph);
    let mut folded = vec![None; graph.node.len()];
    for (node, folded) in graph.node.iter().zip(&mut folded) {
        let [output] = node.output.as_slice() else { continue };
        if graph.output.iter().any(|asked| asked.name == *output) {
            continue;
        }
        let Some(result) = result_of(model, graph, node, &known, shapes) else { continue };
        let result = TensorProto { name: output.clone(), ..result };
        known.insert(output.clone(), result.clone());
        *folded = Some(result);
    }
    let Some(graph) = &mut model.graph else { return };
    let mut done = folded.iter().map(Option::is_some);
    graph.node.retain(|_| done.next() != Some(true));
    graph.initializer.extend(folded.into_iter().flatten());
}

/// The value of a node, if it is small and known.
fn result_of(
    model: &ModelProto,
    graph: &GraphProto,
    node: &NodeProto,
    known: &HashMap<String, TensorProto>,
    shapes: &HashMap<String, Vec<usize>>,
) -> Option<TensorProto> {
    if node.op_type == "Shape" {
        let input = node.input.first()?;
        let is_input = onnx::network_inputs(graph).any(|name| name == input);
        let dims = if is_input { onnx::input_shape(graph, input).ok()? } else { shapes.get(input)?.clone() };
        let values = dims.iter().map(|dim| *dim as i64).collect();
        let whole = TensorProto { dims: vec![dims.len() as i64], data_type: 7, int64_data: values, ..Default::default() };
        return node.attribute.is_empty().then_some(whole);
    }
    let arithmetic = matches!(
        node.op_type.as_str(),
        "Concat" | "Cast" | "ConstantOfShape" | "Reshape" | "Slice" | "Transpose" | "Gather" | "Squeeze" | "Unsqueeze" | "Add"
            | "Sub" | "Mul" | "Div" | "Floor" | "Ceil" | "Equal" | "Where" | "Min" | "Max" | "Neg" | "Range" | "Expand"
    );
    if !arithmetic || node.input.is_empty() {
        return None;
    }
    let inputs: Option<Vec<&TensorProto>> =
        node.input.iter().filter(|name| !name.is_empty()).map(|name| known.get(name)).collect();
    let inputs = inputs?;
    let all = inputs.iter().try_fold(1usize, |all, input| all.checked_mul(numbers(input).len().max(1)));
    let asked = || inputs.iter().flat_map(|input| numbers(input)).map(|value| value.abs().max(1.0)).product::<f64>();
    let sized = matches!(node.op_type.as_str(), "ConstantOfShape" | "Range" | "Expand");
    let too_large = |asked: f64| asked.is_nan() || asked > FOLDED_MAX as f64;
    if all.is_none_or(|all| all > WORK_MAX) || (sized && too_large(asked())) {
        return None;
    }
    guarded(|| compute(model, node, &inputs).map_err(|error| onnx::refuse(error.to_string())), EngineError::Load).ok()
}

/// Lets tract run one node on constants.
fn compute(model: &ModelProto, node: &NodeProto, inputs: &[&TensorProto]) -> TractResult<TensorProto> {
    let mut initializer: Vec<TensorProto> = Vec::new();
    let names = node.input.iter().filter(|name| !name.is_empty());
    for (name, tensor) in names.zip(inputs) {
        if initializer.iter().all(|other| other.name != *name) {
            initializer.push(TensorProto { name: name.clone(), ..(*tensor).clone() });
        }
    }
    let output = vec![ValueInfoProto { name: node.output[0].clone(), ..Default::default() }];
    let graph = GraphProto { node: vec![node.clone()], initializer, output, ..Default::default() };
    let (ir_version, opset_import) = (model.ir_version, model.opset_import.clone());
    let alone = ModelProto { ir_version, opset_import, graph: Some(graph), ..Default::default() };
    let typed = tract_onnx::onnx().model_for_proto_model(&alone)?.into_typed()?;
    let result = TypedSimplePlan::new(typed)?.run(tvec![])?.remove(0);
    ensure!(result.len() <= FOLDED_MAX, "too large");
    let mut tensor = TensorProto { dims: result.shape().iter().map(|dim| *dim as i64).collect(), ..Default::default() };
    match result.datum_type() {
        DatumType::F32 => {
            tensor.data_type = 1;
            tensor.float_data = result.try_as_plain_ram()?.as_slice::<f32>()?.to_vec();
        }
        DatumType::I32 => {
            tensor.data_type = 6;
            tensor.int32_data = result.try_as_plain_ram()?.as_slice::<i32>()?.to_vec();
        }
        DatumType::Bool => {
            tensor.data_type = 9;
            tensor.int32_data = result.try_as_plain_ram()?.as_slice::<bool>()?.iter().map(|yes| i32::from(*yes)).collect();
        }
        DatumType::I64 | DatumType::TDim => {
            tensor.data_type = 7;
            tensor.int64_data = result.cast_to::<i64>()?.try_as_plain_ram()?.as_slice::<i64>()?.to_vec();
        }
        other => bail!("{other:?} is no type of sizes"),
    }
    Ok(tensor)
}

/// tract wants the value of a border as a scalar, exporters write it as a list of one.
fn scalar_pads(graph: &mut GraphProto) {
    let known = small_constants(graph);
    for node in graph.node.iter_mut().filter(|node| node.op_type == "Pad") {
        let Some(value) = node.input.get(2).and_then(|name| known.get(name)).filter(|value| value.dims == [1]) else { continue };
        let name = format!("{} as a scalar", value.name);
        if graph.initializer.iter().all(|tensor| tensor.name != name) {
            graph.initializer.push(TensorProto { name: name.clone(), dims: vec![], ..value.clone() });
        }
        node.input[2] = name;
    }
}
