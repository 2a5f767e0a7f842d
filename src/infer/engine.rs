//! A network from ONNX bytes to outputs: the only user of tract.
//!
//! Parts that compute in integers run in our own kernels, everything else in tract.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ndarray::{ArrayD, ArrayViewD, IxDyn};
use smallvec::SmallVec;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::{ModelProto, NodeProto};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::ops::Cost;
use tract_onnx::tract_hir::internal::*;
use tract_onnx::tract_core;

use super::kernels::{Kernel, Memory, Program};
use super::floats::FloatLayer;
use super::{checks, floats, lower, onnx};
use crate::pool::{Fault, Pool};

/// A network that cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The bytes are not a network this engine can plan; names the node where there is one.
    #[error("the network cannot be loaded: {0}")]
    Load(String),
    /// An input of another shape than the network's.
    #[error("input {index} has the shape {got:?}, the network takes {want:?}")]
    InputShape {
        /// Which input.
        index: usize,
        /// Its shape.
        got: Vec<usize>,
        /// The network's.
        want: Vec<usize>,
    },
    /// It failed while running.
    #[error("the network failed: {0}")]
    Run(String),
}

/// A planned network, shared by the sessions that run it.
pub struct Network {
    input_shapes: Vec<Vec<usize>>,
    output_shapes: Vec<Vec<usize>>,
    islands: Vec<Planned>,
    /// Our own layers among what is left.
    floats: Vec<FloatLayer>,
    /// What is not an island, if anything.
    rest: Option<Arc<TypedSimplePlan>>,
    kept: Vec<(String, String)>,
    runs: AtomicU64,
}

/// An island, ready to run.
struct Planned {
    program: Program,
    batch: usize,
}

/// One step of a plan, for people to read: see [`Network::explain`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Step {
    /// Name of the ONNX node (or of the first of those that became one step).
    pub name: String,
    /// What it does.
    pub operator: String,
    /// Who runs it: `integer` or `float` (our kernels), or `tract`.
    pub place: &'static str,
    /// Which kernel, where there is a choice.
    pub kernel: String,
    /// Shape of its first output, as ONNX orders it.
    pub shape: Vec<usize>,
    /// Multiply-adds that are carried out.
    pub macs: u64,
    /// Bytes of its outputs.
    pub bytes: u64,
}

/// The caught panic of `work` as an error: tract asserts where it meets the unexpected, and outside data can be that.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T, EngineError>, wrap: fn(String) -> EngineError) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(wrap(Fault::from_panic(payload).0)))
}

fn chain(error: TractError) -> String {
    format!("{error:#}").chars().take(600).collect()
}

impl Network {
    /// Parses, shapes, lowers and plans an ONNX network, for the kernels of [`Kernel::best`].
    ///
    /// # Errors
    /// [`EngineError::Load`].
    pub fn load(onnx: &[u8]) -> Result<Self, EngineError> {
        Self::load_for(onnx, Some(Kernel::best()))
    }

    /// As [`Network::load`], for given kernels; with none, all of it runs in tract.
    ///
    /// # Errors
    /// [`EngineError::Load`].
    pub fn load_for(onnx: &[u8], kernel: Option<Kernel>) -> Result<Self, EngineError> {
        let model = onnx::decode(onnx)?;
        guarded(|| Self::plan(&model, kernel), EngineError::Load)
    }

    fn plan(model: &ModelProto, kernel: Option<Kernel>) -> Result<Self, EngineError> {
        let graph = model.graph.as_ref().ok_or_else(|| onnx::refuse("the file has no graph"))?;
        let known: OnceCell<HashMap<String, Vec<usize>>> = OnceCell::new();
        let shape = |name: &str| match onnx::network_inputs(graph).find(|input| *input == name) {
            Some(input) => onnx::input_shape(graph, input).ok(),
            None => known.get_or_init(|| inferred_shapes(model)).get(name).cloned(),
        };
        let Some(kernel) = kernel else {
            checks::windows(model, &shape)?;
            let rest = plan_rest(model)?;
            let (input_shapes, output_shapes) = edge_shapes(&rest)?;
            return Ok(Self { input_shapes, output_shapes, islands: vec![], floats: vec![], rest: Some(rest), kept: vec![], runs: AtomicU64::new(0) });
        };
        let mut lowered = lower::lower(model, &shape)?;
        lowered.rest.as_ref().map_or(Ok(()), |rest| checks::windows(rest, &shape))?;
        let islands = lowered.islands.len();
        let floats = lowered.rest.as_mut().map_or_else(Vec::new, |rest| floats::lower(rest, islands, kernel, &shape));
        let rest = lowered.rest.as_ref().map(plan_rest).transpose()?;
        let islands: Vec<Planned> = lowered
            .islands
            .iter()
            .map(|island| Planned {
                program: Program::plan(&island.graph, kernel),
                batch: island.batch,
            })
            .collect();
        let (input_shapes, output_shapes) = match &rest {
            Some(rest) => edge_shapes(rest)?,
            None => {
                let island = &lowered.islands[0];
                let shapes = |edge: &[(String, Vec<usize>)]| edge.iter().map(|(_, shape)| shape.clone()).collect();
                (shapes(&island.inputs), shapes(&island.outputs))
            }
        };
        Ok(Self { input_shapes, output_shapes, islands, floats, rest, kept: lowered.kept, runs: AtomicU64::new(0) })
    }

    /// Shapes of the inputs, as in the file (N first).
    pub fn input_shapes(&self) -> &[Vec<usize>] {
        &self.input_shapes
    }

    /// Shapes of the outputs, as in the file.
    pub fn output_shapes(&self) -> &[Vec<usize>] {
        &self.output_shapes
    }

    /// Whether all of it runs in integers, and tract has no part in it.
    pub fn is_all_integer(&self) -> bool {
        self.rest.is_none()
    }

    /// Bytes that one [`Session`] on one thread holds at its peak, weights excluded; known before the first run. Of a part
    /// that runs in tract, the tensors alive at once are counted.
    pub fn arena_bytes(&self) -> usize {
        let islands: usize = self.islands.iter().map(|island| island.program.memory_bytes(1)).sum();
        let floats: usize = self.floats.iter().map(|layer| layer.conv.scratch_bytes()).sum();
        islands + floats + self.rest.as_ref().map_or(0, |rest| tract_bytes(rest))
    }

    /// Bytes of packed weights and tables of the parts that are ours.
    pub fn weight_bytes(&self) -> usize {
        let floats: usize = self.floats.iter().map(|layer| layer.conv.constant_bytes()).sum();
        floats + self.islands.iter().map(|island| island.program.constant_bytes()).sum::<usize>()
    }

    /// Nodes that could have been lowered but were not, and why.
    pub fn kept(&self) -> &[(String, String)] {
        &self.kept
    }

    /// The plan, step by step in the order of running.
    pub fn explain(&self) -> Vec<Step> {
        let Some(rest) = &self.rest else { return self.islands.iter().flat_map(island_steps).collect() };
        let model = rest.model();
        let steps = rest.order_without_consts().iter().map(|id| {
            let node = model.node(*id);
            if let Some(hook) = node.op_as::<Hook>() {
                return match self.islands.get(hook.index) {
                    Some(island) => island_steps(island),
                    None => vec![float_step(&self.floats[hook.index - self.islands.len()])],
                };
            }
            let bytes = |fact: &TypedFact| {
                let count: usize = fact.shape.as_concrete().map_or(0, |dims| dims.iter().product());
                (count * fact.datum_type.size_of()) as u64
            };
            let inputs = model.node_input_facts(*id).map(|facts| facts.to_vec()).unwrap_or_default();
            let costs = node.op.cost(&inputs).unwrap_or_default();
            let macs = costs.iter().filter(|(cost, _)| matches!(cost, Cost::FMA(_)));
            vec![Step {
                name: node.name.clone(),
                operator: node.op.name().to_string(),
                place: "tract",
                kernel: String::new(),
                shape: node.outputs.first().and_then(|o| o.fact.shape.as_concrete()).unwrap_or(&[]).to_vec(),
                macs: macs.filter_map(|(_, count)| count.to_i64().ok()).sum::<i64>() as u64,
                bytes: node.outputs.iter().map(|outlet| bytes(&outlet.fact)).sum(),
            }]
        });
        steps.flatten().collect()
    }

    /// Multiply-adds carried out so far by all sessions: runs times those of the plan.
    pub fn macs_done(&self) -> u64 {
        self.runs.load(Ordering::Relaxed) * self.explain().iter().map(|step| step.macs).sum::<u64>()
    }

    /// A session: the arena and state of one run at a time. Make one per concurrent user, and keep it.
    ///
    /// # Errors
    /// [`EngineError::Run`] when there is no room for it.
    pub fn session(&self) -> Result<Session<'_>, EngineError> {
        let islands = self.islands.iter().map(|island| island.program.memory(1));
        let memories = islands.chain(self.floats.iter().map(|layer| layer.conv.memory(1)));
        let memories =
            memories.collect::<Result<_, _>>().map_err(|error| EngineError::Run(format!("no memory: {error}")))?;
        let state = self.rest.as_ref().map(|rest| rest.spawn()).transpose();
        let state = state.map_err(|error| EngineError::Run(chain(error)))?;
        Ok(Session { network: self, memories, state })
    }
}

fn island_steps(island: &Planned) -> Vec<Step> {
    let steps = island.program.explain().into_iter().map(|step| Step {
        name: step.name,
        operator: step.operator,
        place: "integer",
        kernel: step.kernel,
        shape: vec![island.batch, step.shape.c, step.shape.d, step.shape.h, step.shape.w],
        macs: step.macs * island.batch as u64,
        bytes: step.bytes,
    });
    steps.collect()
}

fn float_step(layer: &FloatLayer) -> Step {
    Step {
        name: layer.name.clone(),
        operator: "convolution".into(),
        place: "float",
        kernel: layer.conv.kernel().into(),
        shape: layer.output.clone(),
        macs: layer.conv.macs() * layer.output[0] as u64,
        bytes: 4 * layer.output.iter().product::<usize>() as u64,
    }
}

/// The tensors of a tract plan that are alive at once, in bytes, at most.
fn tract_bytes(plan: &TypedSimplePlan) -> usize {
    let model = plan.model();
    let order = plan.order_without_consts();
    let place: HashMap<usize, usize> = order.iter().enumerate().map(|(at, id)| (*id, at)).collect();
    let mut change = vec![0isize; order.len() + 1];
    for (at, id) in order.iter().enumerate() {
        for outlet in &model.node(*id).outputs {
            let count: usize = outlet.fact.shape.as_concrete().map_or(0, |dims| dims.iter().product());
            let bytes = (count * outlet.fact.datum_type.size_of()) as isize;
            let last = outlet.successors.iter().filter_map(|inlet| place.get(&inlet.node)).max().copied();
            change[at] += bytes;
            change[last.unwrap_or(order.len() - 1) + 1] -= bytes;
        }
    }
    let mut alive = 0;
    change.iter().map(|bytes| { alive += bytes; alive }).max().unwrap_or(0).max(0) as usize
}

/// Shapes that tract infers for the floats of a network; those the file states where tract cannot read it.
fn inferred_shapes(model: &ModelProto) -> HashMap<String, Vec<usize>> {
    let mut shapes = HashMap::new();
    if let Some(graph) = &model.graph {
        for info in &graph.value_info {
            if let Some(shape) = onnx::stated_shape(info) {
                shapes.insert(info.name.clone(), shape);
            }
        }
    }
    shapes.extend(tract_shapes(model));
    shapes
}

/// Shapes that tract infers. What was inferred before an operator that nobody has, or that it stumbles over, still holds.
pub(super) fn tract_shapes(model: &ModelProto) -> HashMap<String, Vec<usize>> {
    let mut shapes = HashMap::new();
    let Ok(mut parsed) = tract_onnx::onnx().parse(model, None) else { return shapes };
    let _ = guarded(|| parsed.model.analyse(true).map(drop).map_err(|error| EngineError::Load(chain(error))), EngineError::Load);
    for (name, outlet) in &parsed.outlets_by_name {
        let dims = parsed.model.outlet_fact(*outlet).ok().and_then(|fact| fact.shape.concretize());
        let dims = dims.and_then(|dims| dims.iter().map(|dim| dim.to_usize().ok()).collect::<Option<Vec<_>>>());
        if let Some(dims) = dims {
            shapes.insert(name.clone(), dims);
        }
    }
    shapes
}

/// Plans what tract runs.
fn plan_rest(model: &ModelProto) -> Result<Arc<TypedSimplePlan>, EngineError> {
    let fail = |error: TractError| EngineError::Load(chain(error));
    let mut framework = tract_onnx::onnx();
    framework.op_register.insert(lower::HOOK_OPERATOR, Hook::parse);
    let typed = framework.model_for_proto_model(model).map_err(fail)?.into_typed().map_err(fail)?;
    for node in typed.nodes() {
        for outlet in &node.outputs {
            let at = || format!("node {:?} ({})", node.name, node.op.name());
            let dims = outlet.fact.shape.as_concrete();
            let dims = dims.ok_or_else(|| onnx::refuse(format!("{}: its shape is not fixed", at())))?;
            if !dims.is_empty() && onnx::elements(dims.iter().map(|d| *d as i64)).is_none() {
                return Err(onnx::refuse(format!("{} has the shape {dims:?}", at())));
            }
        }
    }
    TypedSimplePlan::new(typed.into_optimized().map_err(fail)?).map_err(fail)
}

type Shapes = Vec<Vec<usize>>;

fn edge_shapes(plan: &TypedSimplePlan) -> Result<(Shapes, Shapes), EngineError> {
    let fail = |error: TractError| EngineError::Load(chain(error));
    let model = plan.model();
    let shapes = |outlets: &[OutletId]| -> Result<Shapes, EngineError> {
        let shape = |outlet: &OutletId| {
            let fact = model.outlet_fact(*outlet).map_err(fail)?;
            fact.shape.as_concrete().map(<[usize]>::to_vec).ok_or_else(|| onnx::refuse("an open shape at the edge"))
        };
        outlets.iter().map(shape).collect()
    };
    Ok((shapes(model.input_outlets().map_err(fail)?)?, shapes(model.output_outlets().map_err(fail)?)?))
}

/// What is ours as tract sees it: an operator of known shapes. The session runs it itself, with its pool and memory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hook {
    index: usize,
    outputs: Vec<Vec<usize>>,
}

impl Hook {
    fn parse(_: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
        let ints = |name: &str| node.attribute.iter().find(|a| a.name == name).map_or(&[][..], |a| &a.ints);
        let index = ints("index").first().copied().unwrap_or_default() as usize;
        let mut outputs = Vec::new();
        let mut shapes = ints("shapes");
        while let Some((rank, dims)) = shapes.split_first() {
            let (shape, others) = dims.split_at_checked(*rank as usize).context("the shapes of an island")?;
            outputs.push(shape.iter().map(|dim| *dim as usize).collect());
            shapes = others;
        }
        Ok((expand(Self { index, outputs }), vec![]))
    }
}

impl Expansion for Hook {
    fn name(&self) -> StaticName {
        "Ours".into()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Ok(self.outputs.len())
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        _inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        for (output, shape) in outputs.iter().zip(&self.outputs) {
            solver.equals(&output.datum_type, f32::datum_type())?;
            solver.equals(&output.shape, shape.iter().map(|dim| dim.to_dim()).collect::<TVec<_>>())?;
        }
        Ok(())
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for Hook {
    fn name(&self) -> StaticName {
        "Ours".into()
    }

    op_as_typed_op!();
}

impl EvalOp for Hook {
    not_out_of_plan!();
}

impl TypedOp for Hook {
    as_op!();

    fn output_facts(&self, _inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(self.outputs.iter().map(f32::fact).collect())
    }
}

/// One runner of a network; reuses its memory from run to run.
pub struct Session<'n> {
    network: &'n Network,
    memories: Vec<Memory>,
    state: Option<TypedSimpleState>,
}

impl Session<'_> {
    /// Runs the network once, split over the pool; the result does not depend on the number of threads.
    ///
    /// # Errors
    /// [`EngineError::InputShape`] and [`EngineError::Run`].
    pub fn run(&mut self, pool: &Pool, inputs: &[ArrayViewD<'_, f32>]) -> Result<Vec<ArrayD<f32>>, EngineError> {
        let mut outputs: Vec<_> =
            self.network.output_shapes.iter().map(|shape| ArrayD::zeros(IxDyn(shape))).collect();
        self.run_into(pool, inputs, &mut outputs)?;
        Ok(outputs)
    }

    /// As [`Session::run`], into arrays of the caller. A network that is all integer then allocates nothing.
    ///
    /// # Errors
    /// [`EngineError::InputShape`] and [`EngineError::Run`], also for outputs of other shapes than the network's.
    pub fn run_into(
        &mut self,
        pool: &Pool,
        inputs: &[ArrayViewD<'_, f32>],
        outputs: &mut [ArrayD<f32>],
    ) -> Result<(), EngineError> {
        let wanted = &self.network.input_shapes;
        if inputs.len() != wanted.len() {
            return Err(EngineError::Run(format!("{} inputs were given, it takes {}", inputs.len(), wanted.len())));
        }
        for (index, (input, want)) in inputs.iter().zip(wanted).enumerate() {
            if input.shape() != want.as_slice() {
                return Err(EngineError::InputShape { index, got: input.shape().to_vec(), want: want.clone() });
            }
        }
        if !outputs.iter().map(|output| output.shape()).eq(self.network.output_shapes.iter().map(Vec::as_slice)) {
            return Err(EngineError::Run("the outputs have other shapes than the network's".into()));
        }
        self.network.runs.fetch_add(1, Ordering::Relaxed);
        guarded(
            || if self.state.is_some() { self.run_mixed(pool, inputs, outputs) } else { self.run_island(pool, inputs, outputs) },
            EngineError::Run,
        )
    }

    fn run_island(
        &mut self,
        pool: &Pool,
        inputs: &[ArrayViewD<'_, f32>],
        outputs: &mut [ArrayD<f32>],
    ) -> Result<(), EngineError> {
        // Few networks have more edges than fit here without an allocation.
        let dense: SmallVec<[_; EDGES]> = inputs.iter().map(|input| input.to_slice().map_or_else(|| Cow::Owned(input.iter().copied().collect()), Cow::Borrowed)).collect();
        let inputs: SmallVec<[&[f32]; EDGES]> = dense.iter().map(|input: &Cow<'_, [f32]>| &**input).collect();
        let mut slices = SmallVec::<[&mut [f32]; EDGES]>::new();
        for output in outputs {
            slices.push(output.as_slice_mut().ok_or_else(|| EngineError::Run("an output is not contiguous".into()))?);
        }
        run_planned(&self.network.islands[0], &mut self.memories[0], pool, &inputs, &mut slices)
    }

    fn run_mixed(
        &mut self,
        pool: &Pool,
        inputs: &[ArrayViewD<'_, f32>],
        outputs: &mut [ArrayD<f32>],
    ) -> Result<(), EngineError> {
        let fail = |error: TractError| EngineError::Run(chain(error));
        let (Some(state), Some(rest)) = (&mut self.state, &self.network.rest) else { return Ok(()) };
        let model = rest.model();
        let values = inputs.iter().enumerate().map(|(index, input)| {
            let dense = input.as_standard_layout();
            let slice = dense.as_slice().expect("the standard layout is contiguous");
            let tensor = Tensor::from_shape(input.shape(), slice)?;
            let wanted = model.input_fact(index)?.datum_type;
            Ok(tensor.cast_to_dt(wanted)?.into_owned().into_tvalue())
        });
        let values = values.collect::<TractResult<TVec<TValue>>>().map_err(fail)?;
        let (network, memories) = (self.network, &mut self.memories);
        let results = state.run_plan_with_eval(values, |context, op_state, node, inputs| {
            let Some(hook) = node.op_as::<Hook>() else { return tract_core::plan::eval(context, op_state, node, inputs) };
            let views = inputs.iter().map(|input| input.try_as_plain_ram()).collect::<TractResult<Vec<_>>>()?;
            let inputs = views.iter().map(|view| view.as_slice::<f32>()).collect::<TractResult<Vec<_>>>()?;
            let mut results: Vec<Vec<f32>> = hook.outputs.iter().map(|shape| vec![0.0; shape.iter().product()]).collect();
            let mut slices: Vec<&mut [f32]> = results.iter_mut().map(Vec::as_mut_slice).collect();
            let memory = &mut memories[hook.index];
            match network.islands.get(hook.index) {
                Some(island) => run_planned(island, memory, pool, &inputs, &mut slices),
                None => run_float(&network.floats[hook.index - network.islands.len()], memory, pool, inputs[0], slices[0]),
            }
            .map_err(|error| TractError::msg(error.to_string()))?;
            let tensors = results.iter().zip(&hook.outputs).map(|(values, shape)| Tensor::from_shape(shape, values));
            tensors.map(|tensor| Ok(tensor?.into_tvalue())).collect::<TractResult<TVec<TValue>>>()
        });
        for (result, output) in results.map_err(fail)?.iter().zip(outputs) {
            let result = result.cast_to::<f32>().map_err(fail)?;
            let plain = result.try_as_plain_ram().map_err(fail)?;
            let values = plain.as_slice::<f32>().map_err(fail)?;
            let output = output.as_slice_mut().ok_or_else(|| EngineError::Run("an output is not contiguous".into()))?;
            output.copy_from_slice(values);
        }
        Ok(())
    }
}

/// So many inputs, or outputs, are listed without an allocation.
const EDGES: usize = 8;

/// Runs an island for each volume of its batch.
fn run_planned(
    island: &Planned,
    memory: &mut Memory,
    pool: &Pool,
    inputs: &[&[f32]],
    outputs: &mut [&mut [f32]],
) -> Result<(), EngineError> {
    for n in 0..island.batch {
        let part = |len: usize| n * (len / island.batch)..(n + 1) * (len / island.batch);
        let inputs: SmallVec<[&[f32]; EDGES]> = inputs.iter().map(|input| &input[part(input.len())]).collect();
        let mut outputs: SmallVec<[&mut [f32]; EDGES]> = outputs
            .iter_mut()
            .map(|output| {
                let range = part(output.len());
                &mut output[range]
            })
            .collect();
        let run = island.program.run(pool, memory, &inputs, &mut outputs);
        run.map_err(|fault| EngineError::Run(fault.to_string()))?;
    }
    Ok(())
}

/// Runs a layer of floats for each volume of its batch.
fn run_float(
    layer: &FloatLayer,
    memory: &mut Memory,
    pool: &Pool,
    input: &[f32],
    output: &mut [f32],
) -> Result<(), EngineError> {
    let batch = layer.output[0];
    let (from, to) = (input.len() / batch, output.len() / batch);
    for (input, output) in input.chunks_exact(from).zip(output.chunks_exact_mut(to)) {
        layer.conv.run(pool, memory, input, output).map_err(|fault| EngineError::Run(fault.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod whole_networks;
