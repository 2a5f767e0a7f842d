//! From a graph to a program: every tensor gets its place in one arena, every layer its kernel.

use super::conv::{Conv, Recipe};
use super::graph::{Graph, Kind, Layer, Shape, View};
use super::memory::{LINE, Memory, SLACK};
use super::simple::{Edge, Meaning, Simple, Source, SourcePart, Work};
use super::Kernel;
use crate::pool::{Fault, Pool};
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A planned integer network.
pub struct Program {
    steps: Vec<Planned>,
    inputs: Vec<Shape>,
    outputs: Vec<Shape>,
    arena_bytes: usize,
    scratch_bytes: usize,
}

struct Planned {
    name: String,
    work: Step,
    shape: Shape,
    macs: u64,
}

enum Step {
    Conv(Box<Conv>),
    Simple(Box<Simple>),
}

/// One step of a [`Program`], for people.
pub struct ProgramStep {
    /// The ONNX node that asked for it.
    pub name: String,
    /// What it does.
    pub operator: String,
    /// Which kernel.
    pub kernel: String,
    /// What it writes.
    pub shape: Shape,
    /// Multiply-adds carried out.
    pub macs: u64,
    /// Bytes of output.
    pub bytes: u64,
}

impl Program {
    /// Plans a graph for one kernel.
    pub fn plan(graph: &Graph, kernel: Kernel) -> Self {
        let (offsets, arena_bytes) = place(graph);
        let source = |view: &View| Source {
            channels: view.shape.c,
            parts: view
                .parts
                .iter()
                .map(|part| SourcePart {
                    offset: offsets[part.tensor],
                    shape: graph.tensors[part.tensor],
                    up: part.up,
                    map: part.map.clone(),
                })
                .collect(),
        };
        let steps: Vec<Planned> = graph
            .layers
            .iter()
            .map(|layer| {
                let shape = layer.output.as_ref().or(layer.inputs.first()).expect("a layer reads or writes").shape;
                let work = step(layer, shape, &offsets, &source, kernel);
                Planned { name: layer.name.clone(), work, shape, macs: macs(layer) }
            })
            .collect();
        let scratch_bytes = steps
            .iter()
            .map(|step| match &step.work {
                Step::Conv(conv) => conv.scratch(),
                Step::Simple(simple) => simple.scratch(),
            })
            .max()
            .unwrap_or(0);
        Self { steps, inputs: graph.inputs.clone(), outputs: graph.outputs.clone(), arena_bytes, scratch_bytes }
    }

    /// Bytes of memory of one run on `threads` threads.
    pub fn memory_bytes(&self, threads: usize) -> usize {
        self.arena_bytes + threads * self.scratch_bytes.next_multiple_of(LINE)
    }

    /// Bytes of packed weights and tables.
    pub fn constant_bytes(&self) -> usize {
        self.steps.iter().map(|step| if let Step::Conv(conv) = &step.work { conv.constant_bytes() } else { 0 }).sum()
    }

    /// Memory for runs on `threads` threads.
    ///
    /// # Errors
    /// The system has not that much.
    pub fn memory(&self, threads: usize) -> Result<Memory, std::collections::TryReserveError> {
        Memory::new(self.arena_bytes, self.scratch_bytes, threads)
    }

    /// The steps, for people.
    pub fn explain(&self) -> Vec<ProgramStep> {
        self.steps
            .iter()
            .map(|step| {
                let (operator, kernel) = match &step.work {
                    Step::Conv(conv) => ("convolution".into(), conv.describe()),
                    Step::Simple(simple) => (simple.describe().to_owned(), simple.kernel.name().to_owned()),
                };
                ProgramStep {
                    name: step.name.clone(),
                    operator,
                    kernel,
                    shape: step.shape,
                    macs: step.macs,
                    bytes: step.shape.bytes() as u64,
                }
            })
            .collect()
    }

    /// Runs the program once.
    ///
    /// # Errors
    /// A panic inside (ours to mend), or memory that cannot be had for the pool's threads.
    ///
    /// # Panics
    /// When inputs or outputs do not have the planned sizes, or the memory is that of another program.
    pub fn run(
        &self,
        pool: &Pool,
        memory: &mut Memory,
        inputs: &[&[f32]],
        outputs: &mut [&mut [f32]],
    ) -> Result<(), Fault> {
        assert!(inputs.iter().map(|input| input.len()).eq(self.inputs.iter().map(|shape| shape.bytes())), "input sizes");
        assert!(outputs.iter().map(|output| output.len()).eq(self.outputs.iter().map(|shape| shape.bytes())), "output sizes");
        assert!(memory.holds(self.arena_bytes, self.scratch_bytes), "the memory of this program");
        let threads = pool.threads();
        memory.provide(threads).map_err(|error| Fault(error.to_string()))?;
        let pointers = memory.pointers();
        let outputs: SmallVec<[*mut f32; 8]> = outputs.iter_mut().map(|output| output.as_mut_ptr()).collect();
        let edge = Edge { inputs, outputs: &outputs };
        for step in &self.steps {
            let units = match &step.work {
                Step::Conv(conv) => conv.units(threads),
                Step::Simple(simple) => simple.units(),
            };
            // SAFETY: `memory` is this program's and borrowed for the whole run; sizes were checked above; each unit runs
            // once, on one thread, and layers run one after another.
            let run = |unit: usize, thread: usize| unsafe {
                match &step.work {
                    Step::Conv(conv) => conv.run(unit, threads, thread, pointers),
                    Step::Simple(simple) => simple.run(unit, thread, pointers, &edge),
                }
            };
            let light = step.macs < LIGHT_MACS && step.shape.bytes() < LIGHT_BYTES;
            if threads == 1 || units == 1 || light {
                (0..units).for_each(|unit| run(unit, 0));
            } else {
                let next = AtomicUsize::new(0);
                pool.for_each(threads.min(units), |thread| {
                    loop {
                        let unit = next.fetch_add(1, Ordering::Relaxed);
                        if unit >= units {
                            break;
                        }
                        run(unit, thread);
                    }
                })?;
            }
        }
        Ok(())
    }
}

/// Layers of less work than this stay on one thread: waking another takes some ten microseconds.
const LIGHT_MACS: u64 = 500_000;

/// As [`LIGHT_MACS`], for layers that move bytes.
const LIGHT_BYTES: usize = 32 << 10;

/// Multiply-adds of a layer.
fn macs(layer: &Layer) -> u64 {
    let (Some(output), Some(input)) = (&layer.output, layer.inputs.first()) else { return 0 };
    let each = match &layer.kind {
        Kind::Conv { window, groups, .. } => window.taps() * input.shape.c / groups,
        Kind::Spread { taps, groups, .. } => {
            return (input.shape.bytes() * taps) as u64 * (output.shape.c / groups) as u64;
        }
        _ => 0,
    };
    output.shape.bytes() as u64 * each as u64
}

fn step(
    layer: &Layer,
    shape: Shape,
    offsets: &[usize],
    source: &dyn Fn(&View) -> Source,
    kernel: Kernel,
) -> Step {
    let from = |n: usize| offsets[layer.inputs[n].plain().expect("the lowering writes views out for such layers")];
    let quant = |n: usize| layer.inputs[n].quant;
    let target = layer.output.as_ref();
    let out = target.map_or(0, |view| offsets[view.plain().expect("layers write plain tensors")]);
    let to = target.map_or_else(|| quant(0), |view| view.quant);
    let conv = |window, spread, groups, weights: &Arc<Vec<i8>>, bias: &[i32], requant| {
        let View { shape: input, quant, .. } = layer.inputs[0];
        let source = source(&layer.inputs[0]);
        let input_zero = quant.zero;
        let recipe =
            Recipe { source, input, input_zero, output: shape, out, window, spread, groups, weights, bias, requant };
        Step::Conv(Box::new(Conv::plan(recipe, kernel)))
    };
    let work = match &layer.kind {
        Kind::Conv { window, groups, weights, bias, requant } => {
            return conv(*window, [1; 3], *groups, weights, bias, requant);
        }
        Kind::Spread { window, block, groups, weights, bias, requant, .. } => {
            return conv(*window, *block, *groups, weights, bias, requant);
        }
        Kind::Quantize { input } => Work::Quantize { input: *input, quant: to },
        Kind::MaxPool(window) => Work::MaxPool { from: from(0), input: layer.inputs[0].shape, window: *window },
        Kind::AveragePool { window, count_padding } => Work::AveragePool {
            from: from(0),
            input: layer.inputs[0].shape,
            window: *window,
            count_padding: *count_padding,
            quant: [quant(0), to],
        },
        Kind::GlobalAveragePool => {
            Work::GlobalAverage { from: from(0), input: layer.inputs[0].shape, quant: [quant(0), to] }
        }
        Kind::Add { low } => Work::Add { from: [from(0), from(1)], quant: [quant(0), quant(1), to], low: *low },
        Kind::Multiply => Work::Multiply {
            from: [from(0), from(1)],
            whole: layer.inputs[1].shape == shape,
            quant: [quant(0), quant(1), to],
        },
        Kind::Resample { axes, cut } => {
            let input = layer.inputs[0].shape;
            Work::Resample { from: from(0), input, axes: axes.clone(), quant: [quant(0), to], cut: *cut }
        }
        Kind::Softmax(table) => Work::Softmax { from: from(0), table: Arc::clone(table), quant: to },
        Kind::Gather => Work::Gather { source: source(&layer.inputs[0]) },
        Kind::Pad { before, value } => {
            Work::Pad { from: from(0), input: layer.inputs[0].shape, before: *before, value: *value }
        }
        Kind::Dequantize { output, table, softmax } => {
            Work::Dequantize { from: from(0), output: *output, meaning: Meaning::new(table, *softmax, quant(0)) }
        }
    };
    Step::Simple(Box::new(Simple { work, shape, out, kernel }))
}

/// Gives each tensor a place for as long as it lives: the largest first, each at the lowest free offset.
fn place(graph: &Graph) -> (Vec<usize>, usize) {
    let count = graph.tensors.len();
    let mut life = vec![(usize::MAX, 0); count];
    for (at, layer) in graph.layers.iter().enumerate() {
        let read = layer.inputs.iter().flat_map(|view| &view.parts).map(|part| part.tensor);
        let written = layer.output.iter().flat_map(|view| &view.parts).map(|part| part.tensor);
        for tensor in read.chain(written) {
            life[tensor] = (life[tensor].0.min(at), life[tensor].1.max(at));
        }
    }
    let size = |tensor: usize| (graph.tensors[tensor].bytes() + SLACK).next_multiple_of(LINE);
    let mut order: Vec<usize> = (0..count).filter(|tensor| life[*tensor].0 != usize::MAX).collect();
    order.sort_by_key(|tensor| std::cmp::Reverse(size(*tensor)));
    let mut offsets = vec![0; count];
    let mut placed: Vec<usize> = Vec::with_capacity(count);
    let mut arena = 0;
    for tensor in order {
        let mut neighbours: Vec<(usize, usize)> = placed
            .iter()
            .filter(|other| life[**other].0 <= life[tensor].1 && life[tensor].0 <= life[**other].1)
            .map(|other| (offsets[*other], offsets[*other] + size(*other)))
            .collect();
        neighbours.sort_unstable();
        let mut at = 0;
        for (start, end) in neighbours {
            if at + size(tensor) <= start {
                break;
            }
            at = at.max(end);
        }
        offsets[tensor] = at;
        arena = arena.max(at + size(tensor));
        placed.push(tensor);
    }
    (offsets, arena)
}
