//! From ONNX nodes to integer graphs: what is quantized becomes our own layers, whatever is not stays with tract.
//!
//! Both ways of writing a quantized network are read: float operators between `DequantizeLinear` and `QuantizeLinear` (QDQ),
//! and operators on bytes (`QLinearConv` and its kin). The nodes are taken from the protobuf rather than from tract's graph,
//! which has folded the quantized weights into floats by the time its shapes are known.

use std::collections::{HashMap, HashSet};

use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};

use super::engine::EngineError;
use super::kernels::graph::{Graph, Kind};
use super::layers::{Builder, Trouble};
use super::onnx::{self, label, refuse};

/// A part of a network that computes in integers.
pub(crate) struct Island {
    pub graph: Graph,
    /// Tensors it reads and writes, all floats, with their shapes in the network.
    pub inputs: Vec<(String, Vec<usize>)>,
    pub outputs: Vec<(String, Vec<usize>)>,
    /// Volumes of one run; the graph is run for each.
    pub batch: usize,
}

impl Island {
    /// Orders inputs and outputs as the network has them, where it has the same ones.
    fn arrange(&mut self, inputs: &[&str], outputs: &[&str]) {
        type Edge = [(String, Vec<usize>)];
        let order = |edge: &Edge, names: &[&str]| -> Option<Vec<usize>> {
            let places = names.iter().map(|name| edge.iter().position(|(own, _)| own == name));
            let order = places.collect::<Option<Vec<_>>>()?;
            (order.len() == edge.len()).then_some(order)
        };
        let (Some(inputs), Some(outputs)) = (order(&self.inputs, inputs), order(&self.outputs, outputs)) else { return };
        let place = |order: &[usize], old: usize| order.iter().position(|from| *from == old).unwrap_or(old);
        self.inputs = inputs.iter().map(|from| self.inputs[*from].clone()).collect();
        self.outputs = outputs.iter().map(|from| self.outputs[*from].clone()).collect();
        self.graph.inputs = inputs.iter().map(|from| self.graph.inputs[*from]).collect();
        self.graph.outputs = outputs.iter().map(|from| self.graph.outputs[*from]).collect();
        for layer in &mut self.graph.layers {
            match &mut layer.kind {
                Kind::Quantize { input } => *input = place(&inputs, *input),
                Kind::Dequantize { output, .. } => *output = place(&outputs, *output),
                _ => {}
            }
        }
    }
}

/// A network after lowering.
pub(crate) struct Lowered {
    pub islands: Vec<Island>,
    /// What is left for tract, with a node for each island; nothing if one island is the whole network.
    pub rest: Option<ModelProto>,
    /// Nodes near an island that stay with tract, and why.
    pub kept: Vec<(String, String)>,
}

/// A quantized tensor that one island hands to another, as floats of its bytes.
pub(crate) struct Handed {
    pub shape: Vec<usize>,
    pub signed: bool,
}

/// The operator name of what is ours in the graph that tract sees.
pub(crate) const HOOK_OPERATOR: &str = "ScansideHook";

/// Finds the islands of a network. `shape` knows the shapes of its float tensors.
///
/// # Errors
/// A quantization that cannot be (a scale that is no positive number), with the node's name.
pub(crate) fn lower(
    model: &ModelProto,
    shape: &dyn Fn(&str) -> Option<Vec<usize>>,
) -> Result<Lowered, EngineError> {
    let graph = model.graph.as_ref().ok_or_else(|| refuse("the file has no graph"))?;
    let network = Nodes::new(graph)?;
    let mut kept: HashMap<usize, String> = HashMap::new();
    let mut candidate: Vec<bool> = (0..graph.node.len())
        .map(|n| !network.frozen[n] && Builder::knows(&graph.node[n]))
        .collect();
    let mut islands = loop {
        let mut built = Vec::new();
        let mut failed = Vec::new();
        let mut handed = HashMap::new();
        for members in network.partition(&candidate) {
            match network.build(&members, &candidate, shape, &mut handed) {
                Ok(island) => built.push((members, island)),
                Err(reasons) => failed.extend(reasons),
            }
        }
        if failed.is_empty() {
            break built;
        }
        for (node, reason) in failed {
            candidate[node] = false;
            kept.insert(node, reason);
        }
    };
    let mut kept: Vec<_> = kept.into_iter().collect();
    kept.sort_unstable();
    let kept = kept.into_iter().map(|(node, reason)| (label(&graph.node[node]).to_owned(), reason)).collect();
    let (reads, writes): (Vec<&str>, Vec<&str>) =
        (onnx::network_inputs(graph).collect(), graph.output.iter().map(|output| output.name.as_str()).collect());
    islands.iter_mut().for_each(|(_, island)| island.arrange(&reads, &writes));
    let rest = network.rest(model, &islands);
    Ok(Lowered { islands: islands.into_iter().map(|(_, island)| island).collect(), rest, kept })
}

struct Nodes<'g> {
    graph: &'g GraphProto,
    constants: HashMap<String, TensorProto>,
    producer: HashMap<&'g str, usize>,
    consumers: HashMap<&'g str, Vec<usize>>,
    outputs: HashSet<&'g str>,
    /// Nodes that compute on constants alone: they belong to whoever reads them.
    frozen: Vec<bool>,
}

impl<'g> Nodes<'g> {
    fn new(graph: &'g GraphProto) -> Result<Self, EngineError> {
        let constants = onnx::constants(graph);
        let mut producer = HashMap::new();
        let mut consumers: HashMap<&str, Vec<usize>> = HashMap::new();
        let mut known: HashSet<&str> = constants.keys().map(String::as_str).collect();
        let mut frozen = Vec::with_capacity(graph.node.len());
        for (index, node) in graph.node.iter().enumerate() {
            check_scales(node, &constants)?;
            let still = matches!(node.op_type.as_str(), "Constant" | "Identity" | "QuantizeLinear" | "DequantizeLinear")
                && node.input.iter().all(|input| input.is_empty() || known.contains(input.as_str()));
            frozen.push(still);
            for input in onnx::reads(node) {
                consumers.entry(input).or_default().push(index);
            }
            for output in node.output.iter().filter(|name| !name.is_empty()) {
                producer.insert(output.as_str(), index);
                if still {
                    known.insert(output);
                }
            }
        }
        let outputs = graph.output.iter().map(|output| output.name.as_str()).collect();
        Ok(Self { graph, constants, producer, consumers, outputs, frozen })
    }

    /// Groups of candidate nodes that hang together, and between any two of which no path leaves the group.
    ///
    /// The depth of a node counts how often the way to it crosses between candidates and others: a path that leaves a
    /// group and comes back arrives deeper, so candidates of one depth can never close a cycle through the outside.
    fn partition(&self, candidate: &[bool]) -> Vec<Vec<usize>> {
        let count = candidate.len();
        let mut depth = vec![0usize; count];
        let mut leader: Vec<usize> = (0..count).collect();
        fn find(leader: &mut [usize], mut n: usize) -> usize {
            while leader[n] != n {
                leader[n] = leader[leader[n]];
                n = leader[n];
            }
            n
        }
        for n in 0..count {
            let before = self.graph.node[n].input.iter().filter_map(|input| self.producer.get(input.as_str()));
            let before: Vec<usize> = before.copied().filter(|p| *p < n && !self.frozen[*p]).collect();
            depth[n] =
                before.iter().map(|p| depth[*p] + usize::from(candidate[*p] != candidate[n])).max().unwrap_or(0);
            // Candidates have even depths and others odd ones, wherever they begin.
            depth[n] += usize::from(depth[n].is_multiple_of(2) != candidate[n]);
            for p in before {
                if candidate[n] && candidate[p] && depth[p] == depth[n] {
                    let (a, b) = (find(&mut leader, n), find(&mut leader, p));
                    leader[a.max(b)] = a.min(b);
                }
            }
        }
        let mut groups: HashMap<usize, Vec<usize>> = HashMap::new();
        for n in (0..count).filter(|n| candidate[*n]) {
            groups.entry(find(&mut leader, n)).or_default().push(n);
        }
        let mut groups: Vec<_> = groups.into_values().collect();
        groups.sort_unstable();
        groups
    }

    /// Builds the integer graph of an island, or says which nodes cannot be in one.
    fn build(
        &self,
        members: &[usize],
        candidate: &[bool],
        shape: &dyn Fn(&str) -> Option<Vec<usize>>,
        handed: &mut HashMap<String, Handed>,
    ) -> Result<Island, Vec<(usize, String)>> {
        let inside: HashSet<usize> = members.iter().copied().collect();
        let mut builder = Builder::new(self.graph, &self.constants, &self.producer);
        let mut failed = Vec::new();
        for n in members {
            for input in self.graph.node[*n].input.iter().filter(|name| !name.is_empty()) {
                let made = self.producer.get(input.as_str());
                let outside = made.is_none_or(|p| !inside.contains(p) && !self.frozen[*p]);
                if !outside || self.constants.contains_key(input) || builder.has(input) {
                    continue;
                }
                if let Some(handed) = handed.get(input.as_str()) {
                    builder.add_byte_input(input, handed);
                } else {
                    let is_float = made.is_some() || self.is_float_input(input);
                    if let Some(shape) = shape(input).filter(|_| is_float) {
                        builder.add_input(input, &shape);
                    }
                }
            }
            // Nodes that read what an earlier one failed to make are not to blame: they get another chance without it.
            match builder.add(*n) {
                Err(Trouble::Here(reason)) => failed.push((*n, reason)),
                Err(Trouble::Before) | Ok(()) => {}
            }
        }
        if !failed.is_empty() {
            return Err(failed);
        }
        for n in members {
            for output in self.graph.node[*n].output.iter().filter(|name| !name.is_empty()) {
                let readers = self.consumers.get(output.as_str()).map_or(&[][..], Vec::as_slice);
                let outside: Vec<_> = readers.iter().filter(|reader| !inside.contains(reader)).collect();
                let asked = self.outputs.contains(output.as_str());
                if outside.is_empty() && !asked {
                    continue;
                }
                // Bytes may go to another island, or out of the network, but not to tract.
                let reads_bytes = outside.iter().any(|reader| !candidate[**reader]) || (asked && !outside.is_empty());
                match builder.add_output(output, reads_bytes) {
                    Ok(Some(bytes)) => drop(handed.insert(output.clone(), bytes)),
                    Ok(None) => {}
                    Err(reasons) => failed.extend(reasons),
                }
            }
        }
        if !failed.is_empty() {
            return Err(failed);
        }
        builder.finish().ok_or_else(|| members.iter().map(|n| (*n, "nothing to gain".to_owned())).collect())
    }

    fn is_float_input(&self, name: &str) -> bool {
        use tract_onnx::pb::type_proto::Value;
        let info = self.graph.input.iter().find(|input| input.name == name);
        let value = info.and_then(|info| info.r#type.as_ref()).and_then(|t| t.value.as_ref());
        matches!(value, Some(Value::TensorType(tensor)) if tensor.elem_type == 1)
    }

    /// The graph that is left when each island has become one node.
    fn rest(&self, model: &ModelProto, islands: &[(Vec<usize>, Island)]) -> Option<ModelProto> {
        let taken: HashMap<usize, usize> =
            islands.iter().enumerate().flat_map(|(at, (members, _))| members.iter().map(move |n| (*n, at))).collect();
        let mut nodes: Vec<NodeProto> = Vec::new();
        // An island stands where its last node stood: everything it reads is made by then, since no path returns to it.
        let mut left: Vec<usize> = islands.iter().map(|(members, _)| members.len()).collect();
        for (n, node) in self.graph.node.iter().enumerate() {
            match taken.get(&n) {
                None => nodes.push(node.clone()),
                Some(at) => {
                    left[*at] -= 1;
                    if left[*at] == 0 {
                        nodes.push(island_node(*at, &islands[*at].1));
                    }
                }
            }
        }
        let nodes = sorted(nodes, self.graph);
        let mut rest = model.clone();
        let graph = rest.graph.as_mut().expect("the model has a graph");
        graph.node = nodes;
        prune(graph);
        if let ([node], [(_, island)]) = (graph.node.as_slice(), islands)
            && node.op_type == HOOK_OPERATOR
            && self.graph.output.iter().map(|o| &o.name).eq(island.outputs.iter().map(|(name, _)| name))
            && onnx::network_inputs(self.graph).eq(island.inputs.iter().map(|(name, _)| name.as_str()))
        {
            return None;
        }
        let islands_write: HashSet<&str> =
            islands.iter().flat_map(|(_, island)| island.outputs.iter().map(|(name, _)| name.as_str())).collect();
        // Islands hand out floats, whatever the file says of the tensor.
        let stale = |info: &ValueInfoProto| islands_write.contains(info.name.as_str());
        graph.value_info.retain(|info| !stale(info));
        for output in graph.output.iter_mut().filter(|info| stale(info)) {
            output.r#type = None;
        }
        Some(rest)
    }
}

/// Takes out what no output of the graph needs.
pub(crate) fn prune(graph: &mut GraphProto) {
    let outputs: HashSet<String> = graph.output.iter().map(|output| output.name.clone()).collect();
    let mut needed = outputs.clone();
    let mut used = vec![false; graph.node.len()];
    for (n, node) in graph.node.iter().enumerate().rev() {
        if node.output.iter().any(|output| needed.contains(output)) {
            used[n] = true;
            needed.extend(onnx::reads(node).into_iter().map(str::to_owned));
        }
    }
    let mut used = used.iter();
    graph.node.retain(|_| used.next().is_some_and(|used| *used));
    graph.initializer.retain(|tensor| needed.contains(&tensor.name) || outputs.contains(&tensor.name));
    graph.value_info.retain(|info| needed.contains(&info.name));
}

/// The nodes in an order in which each comes after those it reads from (an island may stand too late for a reader).
fn sorted(nodes: Vec<NodeProto>, graph: &GraphProto) -> Vec<NodeProto> {
    let made: HashSet<&String> = nodes.iter().flat_map(|node| &node.output).collect();
    let mut ready: HashSet<String> = graph.initializer.iter().map(|tensor| tensor.name.clone()).collect();
    ready.extend(graph.input.iter().map(|input| input.name.clone()));
    let is_ready = |node: &NodeProto, ready: &HashSet<String>| {
        node.input.iter().all(|input| input.is_empty() || ready.contains(input) || !made.contains(input))
    };
    let mut waiting = nodes.clone();
    let mut order = Vec::with_capacity(waiting.len());
    loop {
        let before = order.len();
        let mut still = Vec::new();
        for node in waiting {
            if is_ready(&node, &ready) {
                ready.extend(node.output.iter().cloned());
                order.push(node);
            } else {
                still.push(node);
            }
        }
        waiting = still;
        if waiting.is_empty() || order.len() == before {
            break;
        }
    }
    order.extend(waiting);
    order
}

fn island_node(index: usize, island: &Island) -> NodeProto {
    let inputs = island.inputs.iter().map(|(name, _)| name.clone()).collect();
    hook_node(&format!("integer island {}", index + 1), index, inputs, island.outputs.clone())
}

/// A node of the graph that tract sees, for something that is ours.
pub(crate) fn hook_node(name: &str, index: usize, inputs: Vec<String>, outputs: Vec<(String, Vec<usize>)>) -> NodeProto {
    let ints = |name: &str, ints: Vec<i64>| AttributeProto { name: name.into(), r#type: 7, ints, ..Default::default() };
    // The shapes of all outputs, one after the other, each led by its rank.
    let shapes = outputs.iter().flat_map(|(_, shape)| {
        std::iter::once(shape.len() as i64).chain(shape.iter().map(|dim| *dim as i64)).collect::<Vec<_>>()
    });
    NodeProto {
        name: name.into(),
        op_type: HOOK_OPERATOR.into(),
        input: inputs,
        attribute: vec![ints("index", vec![index as i64]), ints("shapes", shapes.collect())],
        output: outputs.into_iter().map(|(name, _)| name).collect(),
        ..Default::default()
    }
}

/// Scales must be positive numbers: with others every result is meaningless, in whatever engine.
fn check_scales(node: &NodeProto, constants: &HashMap<String, TensorProto>) -> Result<(), EngineError> {
    let at: Vec<usize> = match node.op_type.as_str() {
        "QuantizeLinear" | "DequantizeLinear" => vec![1],
        "QLinearConv" => vec![1, 4, 6],
        "QLinearMatMul" | "QLinearAdd" | "QLinearMul" => vec![1, 4, 6],
        "QGemm" => vec![1, 4, 7],
        "QLinearSigmoid" | "QLinearSoftmax" | "QLinearLeakyRelu" | "QLinearAveragePool" | "QLinearGlobalAveragePool" => vec![1, 3],
        "QLinearConcat" => std::iter::once(0).chain((3..node.input.len()).step_by(3)).collect(),
        _ => return Ok(()),
    };
    for at in at {
        let Some(tensor) = node.input.get(at).and_then(|name| constants.get(name)) else { continue };
        if let Some(bad) = onnx::numbers(tensor).iter().find(|scale| !(scale.is_finite() && **scale > 0.0)) {
            return Err(refuse(format!("node {:?} ({}) has the scale {bad}", label(node), node.op_type)));
        }
    }
    Ok(())
}
