//! A network from ONNX bytes to outputs: the only user of tract.
//!
//! Parts that compute in integers run in our own kernels, everything else in tract.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use ndarray::{ArrayD, ArrayViewD, IxDyn};
use tract_onnx::pb::ModelProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::plan::SimpleState;

use super::onnx;
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
    plan: Arc<TypedSimplePlan>,
}

/// One step of a plan, for people to read: see [`Network::explain`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Step {
    /// Name of the ONNX node (or of the first of those that became one step).
    pub name: String,
    /// What it does.
    pub operator: String,
    /// Who runs it: `integer` (our kernels) or `tract`.
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
fn guarded<T>(work: impl FnOnce() -> Result<T, EngineError>, wrap: fn(String) -> EngineError) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(wrap(Fault::from_panic(payload).0)))
}

fn chain(error: TractError) -> String {
    format!("{error:#}").chars().take(600).collect()
}

impl Network {
    /// Parses, shapes, lowers and plans an ONNX network.
    ///
    /// # Errors
    /// [`EngineError::Load`].
    pub fn load(onnx: &[u8]) -> Result<Self, EngineError> {
        let model = onnx::decode(onnx)?;
        guarded(|| Self::plan(&model), EngineError::Load)
    }

    fn plan(model: &ModelProto) -> Result<Self, EngineError> {
        let fail = |error: TractError| EngineError::Load(chain(error));
        let typed = tract_onnx::onnx().model_for_proto_model(model).map_err(fail)?.into_typed().map_err(fail)?;
        for node in typed.nodes() {
            for outlet in &node.outputs {
                let dims = outlet.fact.shape.as_concrete().ok_or_else(|| {
                    EngineError::Load(format!("node {:?} ({}): its shape is not fixed", node.name, node.op.name()))
                })?;
                if !dims.is_empty() && onnx::elements(dims.iter().map(|d| *d as i64)).is_none() {
                    return Err(EngineError::Load(format!(
                        "node {:?} ({}) has the shape {dims:?}",
                        node.name,
                        node.op.name()
                    )));
                }
            }
        }
        let optimized = typed.into_optimized().map_err(fail)?;
        let shapes = |outlets: &[OutletId]| -> Result<Vec<Vec<usize>>, EngineError> {
            outlets
                .iter()
                .map(|outlet| {
                    let fact = optimized.outlet_fact(*outlet).map_err(fail)?;
                    fact.shape.as_concrete().map(<[usize]>::to_vec).ok_or_else(|| onnx::refuse("an open output shape"))
                })
                .collect()
        };
        let input_shapes = shapes(optimized.input_outlets().map_err(fail)?)?;
        let output_shapes = shapes(optimized.output_outlets().map_err(fail)?)?;
        let plan = TypedSimplePlan::new(optimized).map_err(fail)?;
        Ok(Self { input_shapes, output_shapes, plan })
    }

    /// Shapes of the inputs, as in the file (N first).
    pub fn input_shapes(&self) -> &[Vec<usize>] {
        &self.input_shapes
    }

    /// Shapes of the outputs, as in the file.
    pub fn output_shapes(&self) -> &[Vec<usize>] {
        &self.output_shapes
    }

    /// Bytes that one [`Session`] holds at its peak, weights excluded; known before the first run.
    pub fn arena_bytes(&self) -> usize {
        0
    }

    /// The plan, step by step in the order of running.
    pub fn explain(&self) -> Vec<Step> {
        let model = self.plan.model();
        self.plan
            .order_without_consts()
            .iter()
            .map(|id| {
                let node = model.node(*id);
                let facts = node.outputs.iter().map(|outlet| &outlet.fact);
                let size = |fact: &TypedFact| {
                    let count: usize = fact.shape.as_concrete().map_or(0, |dims| dims.iter().product());
                    (count * fact.datum_type.size_of()) as u64
                };
                let input_facts = model.node_input_facts(*id).map(|facts| facts.to_vec()).unwrap_or_default();
                let macs = node.op.cost(&input_facts).unwrap_or_default();
                Step {
                    name: node.name.clone(),
                    operator: node.op.name().to_string(),
                    place: "tract",
                    kernel: String::new(),
                    shape: node.outputs.first().and_then(|o| o.fact.shape.as_concrete()).unwrap_or(&[]).to_vec(),
                    macs: macs
                        .iter()
                        .filter(|(cost, _)| matches!(cost, tract_onnx::tract_core::ops::Cost::FMA(_)))
                        .filter_map(|(_, count)| count.to_i64().ok())
                        .sum::<i64>() as u64,
                    bytes: facts.map(size).sum(),
                }
            })
            .collect()
    }

    /// A session: the arena and state of one run at a time. Make one per concurrent user, and keep it.
    ///
    /// # Errors
    /// [`EngineError::Run`] when there is no room for it.
    pub fn session(&self) -> Result<Session<'_>, EngineError> {
        let state = self.plan.spawn().map_err(|error| EngineError::Run(chain(error)))?;
        Ok(Session { network: self, state })
    }
}

/// One runner of a network; reuses its memory from run to run.
pub struct Session<'n> {
    network: &'n Network,
    state: SimpleState<TypedFact, Box<dyn TypedOp>>,
}

impl Session<'_> {
    /// Runs the network once, split over the pool; the result does not depend on the number of threads.
    ///
    /// # Errors
    /// [`EngineError::InputShape`] and [`EngineError::Run`].
    pub fn run(&mut self, _pool: &Pool, inputs: &[ArrayViewD<'_, f32>]) -> Result<Vec<ArrayD<f32>>, EngineError> {
        let wanted = &self.network.input_shapes;
        if inputs.len() != wanted.len() {
            return Err(EngineError::Run(format!("{} inputs were given, it takes {}", inputs.len(), wanted.len())));
        }
        for (index, (input, want)) in inputs.iter().zip(wanted).enumerate() {
            if input.shape() != want.as_slice() {
                return Err(EngineError::InputShape { index, got: input.shape().to_vec(), want: want.clone() });
            }
        }
        guarded(|| self.run_tract(inputs), EngineError::Run)
    }

    fn run_tract(&mut self, inputs: &[ArrayViewD<'_, f32>]) -> Result<Vec<ArrayD<f32>>, EngineError> {
        let fail = |error: TractError| EngineError::Run(chain(error));
        let model = self.network.plan.model();
        let values = inputs
            .iter()
            .enumerate()
            .map(|(index, input)| {
                let dense = input.as_standard_layout();
                let slice = dense.as_slice().expect("the standard layout is contiguous");
                let tensor = Tensor::from_shape(input.shape(), slice)?;
                let wanted = model.input_fact(index)?.datum_type;
                Ok(tensor.cast_to_dt(wanted)?.into_owned().into_tvalue())
            })
            .collect::<TractResult<TVec<TValue>>>()
            .map_err(fail)?;
        let outputs = self.state.run(values).map_err(fail)?;
        outputs
            .iter()
            .map(|output| {
                let output = output.cast_to::<f32>()?;
                let values = output.try_as_plain_ram()?.as_slice::<f32>()?.to_vec();
                ArrayD::from_shape_vec(IxDyn(output.shape()), values).map_err(|error| TractError::msg(error.to_string()))
            })
            .collect::<TractResult<_>>()
            .map_err(fail)
    }
}
