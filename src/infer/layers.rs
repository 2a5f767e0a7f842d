//! The nodes of an island, one by one, as layers of an integer graph.

use std::collections::HashMap;
use std::sync::Arc;

use tract_onnx::pb::{GraphProto, NodeProto, TensorProto};

use super::kernels::graph::{Graph, Kind, Quant, Requant, Shape, View, Window};
use super::lower::{Handed, Island};
use super::onnx::{self, label};

/// Why a node is not in an island.
pub(crate) enum Trouble {
    /// Because of itself.
    Here(String),
    /// Because of one before it.
    Before,
}

impl From<&str> for Trouble {
    fn from(text: &str) -> Self {
        Self::Here(text.into())
    }
}

type Lower<T> = Result<T, Trouble>;

/// What a tensor of the network is, inside an island.
#[derive(Clone)]
enum Value {
    /// A float that comes from outside, still to be quantized.
    Input(usize),
    /// A quantized tensor.
    Bytes(Known),
    /// The real numbers that a quantized tensor means.
    Real(Known),
    /// Real numbers that become bytes when their `QuantizeLinear` tells the scale.
    Pending(Pending),
    /// Made by a node that failed.
    Lost,
}

#[derive(Clone)]
struct Known {
    view: View,
    /// Dimensions of the ONNX tensor; 2 after a flattening, whose order of elements is the network's.
    rank: usize,
}

#[derive(Clone)]
struct Pending {
    what: What,
    rank: usize,
    /// Bounds from ReLU and Clip nodes since.
    low: f32,
    high: f32,
    /// The nodes it stands for: if nothing quantizes it, they all stay outside.
    nodes: Vec<usize>,
}

#[derive(Clone)]
enum What {
    Conv { view: View, conv: Convolution },
    Add([View; 2]),
    Multiply([View; 2]),
    Concat(Vec<View>),
    AveragePool { view: View, window: Window, count_padding: bool },
    GlobalAveragePool(View),
    /// A function of each number, applied to each byte's meaning.
    Function { view: View, table: Arc<[f32; 256]> },
    /// Probabilities along the channels; only as an output.
    Softmax(View),
}

/// Weights with their scales, before the scales of input and output are known.
#[derive(Clone)]
struct Convolution {
    shape: Shape,
    window: Window,
    /// Block of a transposed convolution.
    spread: Option<[usize; 3]>,
    groups: usize,
    weights: Arc<Vec<i8>>,
    scales: Vec<f32>,
    bias: Bias,
}

#[derive(Clone)]
enum Bias {
    None,
    /// In units of input scale times weight scale.
    Units(Vec<i32>),
    Real(Vec<f32>),
}

/// Integers with their scales along one axis.
struct Weights {
    dims: Vec<usize>,
    values: Vec<i8>,
    scales: Vec<f32>,
}

pub(crate) struct Builder<'g> {
    network: &'g GraphProto,
    constants: &'g HashMap<String, TensorProto>,
    producer: &'g HashMap<&'g str, usize>,
    values: HashMap<String, Value>,
    graph: Graph,
    inputs: Vec<(String, Vec<usize>)>,
    outputs: Vec<(String, Vec<usize>)>,
    batch: Option<usize>,
    at: usize,
}

/// More channels or taps than this in one sum could leave 32 bits.
const SUM_MAX: i64 = 1 << 30;

impl<'g> Builder<'g> {
    pub(crate) fn new(
        network: &'g GraphProto,
        constants: &'g HashMap<String, TensorProto>,
        producer: &'g HashMap<&'g str, usize>,
    ) -> Self {
        Self {
            network,
            constants,
            producer,
            values: HashMap::new(),
            graph: Graph::default(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            batch: None,
            at: 0,
        }
    }

    /// Whether there is a layer for this operator, if its circumstances allow.
    pub(crate) fn knows(node: &NodeProto) -> bool {
        matches!(
            node.op_type.as_str(),
            "QuantizeLinear" | "DequantizeLinear" | "Conv" | "ConvTranspose" | "Relu" | "Clip" | "LeakyRelu" | "Sigmoid"
                | "Tanh" | "HardSigmoid" | "HardSwish" | "Elu" | "MaxPool" | "AveragePool" | "GlobalAveragePool" | "Resize"
                | "Upsample" | "Concat" | "Add" | "Mul" | "Flatten" | "Reshape" | "Gemm" | "MatMul" | "Pad" | "Softmax"
                | "Identity" | "Dropout" | "QLinearConv" | "QLinearAdd" | "QLinearMul" | "QLinearConcat"
                | "QLinearAveragePool" | "QLinearGlobalAveragePool" | "QLinearSigmoid" | "QLinearLeakyRelu" | "QGemm"
                | "QLinearMatMul"
        )
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// A float tensor from outside.
    pub(crate) fn add_input(&mut self, name: &str, shape: &[usize]) {
        let Some((batch, extent)) = volume(shape) else { return };
        if *self.batch.get_or_insert(batch) != batch {
            return;
        }
        self.graph.inputs.push(extent);
        self.inputs.push((name.into(), shape.to_vec()));
        self.values.insert(name.into(), Value::Input(self.inputs.len() - 1));
    }

    /// A quantized tensor that another island hands over: its bytes are floats on the way, and its scale is told by
    /// whoever reads it.
    pub(crate) fn add_byte_input(&mut self, name: &str, handed: &Handed) {
        self.add_input(name, &handed.shape);
        if let Some(Value::Input(input)) = self.values.get(name).cloned() {
            let quant = Quant { scale: 1.0, zero: if handed.signed { 128 } else { 0 }, signed: handed.signed };
            let shape = self.graph.inputs[input];
            let view = self.graph.push(name, Kind::Quantize { input }, vec![], shape, quant);
            self.values.insert(name.into(), Value::Bytes(Known { view, rank: handed.shape.len() }));
        }
    }

    /// Adds a node of the network.
    pub(crate) fn add(&mut self, index: usize) -> Lower<()> {
        let node = &self.network.node[index];
        self.at = index;
        let result = self.node(node);
        let value = match &result {
            Ok(_) if node.output.iter().skip(1).any(|output| !output.is_empty()) => {
                Err(Trouble::from("it has more than one output"))
            }
            Ok(value) => Ok(value.clone()),
            Err(_) => Ok(Value::Lost),
        };
        for output in node.output.iter().filter(|output| !output.is_empty()) {
            self.values.insert(output.clone(), value.as_ref().map_or(Value::Lost, Value::clone));
        }
        result?;
        value.map(|_| ())
    }

    fn node(&mut self, node: &'g NodeProto) -> Lower<Value> {
        match node.op_type.as_str() {
            "Identity" | "Dropout" => self.value(node, 0),
            "QuantizeLinear" => self.quantize(node),
            "DequantizeLinear" => match self.value(node, 0)? {
                Value::Bytes(known) if self.quant(node, 1, 2, Some(known.view.quant))? == known.view.quant => {
                    Ok(Value::Real(known))
                }
                Value::Bytes(mut known) => {
                    // The same bytes under another meaning.
                    known.view.quant = self.quant(node, 1, 2, Some(known.view.quant))?;
                    Ok(Value::Real(known))
                }
                _ => Err("it dequantizes what is no quantized tensor here".into()),
            },
            "Conv" => {
                let known = self.real(node, 0)?;
                let weights = self.dequantized_weights(node, 1, 0)?;
                let conv = self.convolution(node, &known, &weights, self.bias(node, 2)?)?;
                self.pending(What::Conv { view: known.view, conv }, known.rank)
            }
            "ConvTranspose" => {
                let known = self.real(node, 0)?;
                let weights = self.dequantized_weights(node, 1, 1)?;
                let conv = self.transposed(node, &known, &weights, self.bias(node, 2)?)?;
                self.pending(What::Conv { view: known.view, conv }, known.rank)
            }
            "Gemm" | "MatMul" => {
                let known = self.real(node, 0)?;
                let gemm = node.op_type == "Gemm";
                let transposed = gemm && integer(node, "transB", 0) == 1;
                if gemm && (number(node, "alpha", 1.0) != 1.0 || number(node, "beta", 1.0) != 1.0 || integer(node, "transA", 0) == 1)
                {
                    return Err("a Gemm with factors".into());
                }
                let weights = self.dequantized_weights(node, 1, if transposed { 0 } else { 1 })?;
                let bias = if gemm { self.bias(node, 2)? } else { Bias::None };
                let conv = self.connected(&known, &weights, transposed, bias)?;
                self.pending(What::Conv { view: known.view, conv }, 2)
            }
            "QLinearConv" => {
                let known = self.bytes(node, 0, 1, 2)?;
                let weights = self.weights(node, 3, 4, 5, 0)?;
                let bias = self.integer_bias(node, 8)?;
                let conv = self.convolution(node, &known, &weights, bias)?;
                let to = self.quant(node, 6, 7, None)?;
                self.conv_layer(node, known.view, conv, to, f32::NEG_INFINITY, f32::INFINITY, known.rank)
            }
            "QGemm" => {
                let known = self.bytes(node, 0, 1, 2)?;
                let transposed = integer(node, "transB", 0) == 1;
                if number(node, "alpha", 1.0) != 1.0 || integer(node, "transA", 0) == 1 || node.input.len() < 8 {
                    return Err("a QGemm with factors or a float output".into());
                }
                let weights = self.weights(node, 3, 4, 5, if transposed { 0 } else { 1 })?;
                let bias = self.integer_bias(node, 6)?;
                let conv = self.connected(&known, &weights, transposed, bias)?;
                let to = self.quant(node, 7, 8, None)?;
                self.conv_layer(node, known.view, conv, to, f32::NEG_INFINITY, f32::INFINITY, 2)
            }
            "QLinearMatMul" => {
                let known = self.bytes(node, 0, 1, 2)?;
                let weights = self.weights(node, 3, 4, 5, 1)?;
                let conv = self.connected(&known, &weights, false, Bias::None)?;
                let to = self.quant(node, 6, 7, None)?;
                self.conv_layer(node, known.view, conv, to, f32::NEG_INFINITY, f32::INFINITY, 2)
            }
            "Add" | "Mul" => {
                let (a, b) = (self.real(node, 0)?, self.real(node, 1)?);
                self.two(node, [a, b])
            }
            "QLinearAdd" | "QLinearMul" => {
                let (a, b) = (self.bytes(node, 0, 1, 2)?, self.bytes(node, 3, 4, 5)?);
                let to = self.quant(node, 6, 7, None)?;
                let Value::Pending(pending) = self.two(node, [a, b])? else { unreachable!("sums are pending") };
                self.resolve(node, pending, to)
            }
            "Concat" => {
                let views = (0..node.input.len()).map(|n| self.real(node, n)).collect::<Lower<Vec<_>>>()?;
                self.concat(node, views)
            }
            "QLinearConcat" => {
                let views = (2..node.input.len())
                    .step_by(3)
                    .map(|n| self.bytes(node, n, n + 1, n + 2))
                    .collect::<Lower<Vec<_>>>()?;
                let to = self.quant(node, 0, 1, None)?;
                match self.concat(node, views)? {
                    Value::Pending(pending) => self.resolve(node, pending, to),
                    Value::Real(known) => Ok(requantized(known, to)),
                    _ => unreachable!("a concatenation is real or pending"),
                }
            }
            "Relu" => self.clamp(node, 0.0, f32::INFINITY),
            "Clip" => {
                let bound = |at: usize, name: &str, default: f32| -> Lower<f32> {
                    match node.input.get(at).filter(|name| !name.is_empty()) {
                        Some(input) => self.numbers(input)?.first().map(|v| *v as f32).ok_or("an empty bound".into()),
                        None => Ok(number(node, name, default)),
                    }
                };
                let (low, high) = (bound(1, "min", f32::NEG_INFINITY)?, bound(2, "max", f32::INFINITY)?);
                self.clamp(node, low, high)
            }
            "LeakyRelu" | "Sigmoid" | "Tanh" | "HardSigmoid" | "HardSwish" | "Elu" => {
                let function = function(node);
                match self.value(node, 0)? {
                    Value::Real(known) => {
                        let table = std::array::from_fn(|byte| function(known.view.quant.real(byte as u8)));
                        self.pending(What::Function { view: known.view, table: Arc::new(table) }, known.rank)
                    }
                    Value::Pending(Pending { what: What::Function { view, table }, low, high, rank, mut nodes }) => {
                        let table = Arc::new(table.map(|real| function(real.max(low).min(high))));
                        nodes.push(self.at);
                        let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
                        Ok(Value::Pending(Pending { what: What::Function { view, table }, low, high, rank, nodes }))
                    }
                    _ => Err("its input is not quantized".into()),
                }
            }
            "QLinearSigmoid" | "QLinearLeakyRelu" => {
                let known = self.bytes(node, 0, 1, 2)?;
                let to = self.quant(node, 3, 4, None)?;
                let function = function(node);
                let map = std::array::from_fn(|byte| to.byte(function(known.view.quant.real(byte as u8))));
                Ok(Value::Bytes(Known { view: known.view.mapped(&map, to), rank: known.rank }))
            }
            "MaxPool" => self.same(node, |builder, known| {
                let window = window(node, &known)?;
                if integer(node, "ceil_mode", 0) != 0 {
                    return Err("ceil_mode".into());
                }
                let space = window.over(known.view.shape.space()).ok_or("its kernel is larger than its input")?;
                let plain = builder.graph.plain(label(node), &known.view);
                let (shape, quant) = (plain.shape.with_space(space), plain.quant);
                let view = builder.push(node, Kind::MaxPool(window), vec![plain], shape, quant)?;
                Ok(Known { view, rank: known.rank })
            }),
            "AveragePool" => {
                let known = self.real(node, 0)?;
                self.average(node, known)
            }
            "QLinearAveragePool" => {
                let known = self.bytes(node, 0, 1, 2)?;
                let to = self.quant(node, 3, 4, None)?;
                let Value::Pending(pending) = self.average(node, known)? else { unreachable!("means are pending") };
                self.resolve(node, pending, to)
            }
            "GlobalAveragePool" => {
                let known = self.real(node, 0)?;
                self.pending(What::GlobalAveragePool(known.view), known.rank)
            }
            "QLinearGlobalAveragePool" => {
                if integer(node, "channels_last", 0) != 0 {
                    return Err("channels last".into());
                }
                let known = self.bytes(node, 0, 1, 2)?;
                let to = self.quant(node, 3, 4, None)?;
                let Value::Pending(pending) = self.pending(What::GlobalAveragePool(known.view), known.rank)? else {
                    unreachable!("means are pending")
                };
                self.resolve(node, pending, to)
            }
            "Resize" | "Upsample" => self.same(node, |builder, known| {
                let by = builder.repeats(node, &known)?;
                let view = known.view.enlarged(by);
                check_size(view.shape)?;
                Ok(Known { view, rank: known.rank })
            }),
            "Pad" => self.same(node, |builder, known| builder.pad(node, known)),
            "Flatten" | "Reshape" => self.same(node, |builder, known| {
                if node.op_type == "Flatten" {
                    if integer(node, "axis", 1) != 1 {
                        return Err("its axis is not 1".into());
                    }
                } else {
                    let shape = builder.numbers(node.input.get(1).ok_or("no shape")?)?;
                    let all = known.view.shape.bytes() as f64;
                    let batch = builder.batch.unwrap_or(1) as f64;
                    let flat = shape.len() == 2
                        && (shape[0] == batch || shape[0] == -1.0 || (shape[0] == 0.0 && integer(node, "allowzero", 0) == 0))
                        && (shape[1] == all || (shape[1] == -1.0 && shape[0] != -1.0));
                    if !flat {
                        return Err("it is no flattening".into());
                    }
                }
                Ok(Known { rank: 2, ..known })
            }),
            "Softmax" => {
                let known = self.real(node, 0)?;
                let axis = integer(node, "axis", -1);
                if axis != 1 && axis + known.rank as i64 != 1 {
                    return Err("it is not along the channels".into());
                }
                self.pending(What::Softmax(known.view), known.rank)
            }
            _ => Err("there is no layer for it".into()),
        }
    }

    fn value(&self, node: &NodeProto, at: usize) -> Lower<Value> {
        let name = node.input.get(at).filter(|name| !name.is_empty()).ok_or("an input is missing")?;
        match self.values.get(name) {
            Some(Value::Lost) => Err(Trouble::Before),
            Some(value) => Ok(value.clone()),
            None => Err(Trouble::Here(format!("its input {name:?} is not quantized"))),
        }
    }

    fn real(&self, node: &NodeProto, at: usize) -> Lower<Known> {
        match self.value(node, at)? {
            Value::Real(known) => Ok(known),
            _ => Err("its input is not a dequantized tensor".into()),
        }
    }

    fn bytes(&self, node: &NodeProto, at: usize, scale: usize, zero: usize) -> Lower<Known> {
        match self.value(node, at)? {
            Value::Bytes(mut known) => {
                known.view.quant = self.quant(node, scale, zero, Some(known.view.quant))?;
                Ok(known)
            }
            _ => Err("its input is not a quantized tensor".into()),
        }
    }

    /// For operators that do to real numbers what they do to bytes.
    fn same(&mut self, node: &'g NodeProto, work: impl FnOnce(&mut Self, Known) -> Lower<Known>) -> Lower<Value> {
        match self.value(node, 0)? {
            Value::Bytes(known) => work(self, known).map(Value::Bytes),
            Value::Real(known) => work(self, known).map(Value::Real),
            _ => Err("its input is not quantized".into()),
        }
    }

    fn pending(&self, what: What, rank: usize) -> Lower<Value> {
        let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
        Ok(Value::Pending(Pending { what, rank, low, high, nodes: vec![self.at] }))
    }

    fn push(&mut self, node: &NodeProto, kind: Kind, inputs: Vec<View>, shape: Shape, quant: Quant) -> Lower<View> {
        check_size(shape)?;
        Ok(self.graph.push(label(node), kind, inputs, shape, quant))
    }

    fn numbers(&self, name: &str) -> Lower<Vec<f64>> {
        self.constants.get(name).map(onnx::numbers).ok_or_else(|| Trouble::Here(format!("{name:?} is not a constant")))
    }

    /// Scale and zero point of an activation: one of each. Without a zero point, the type is that of `like`, or u8.
    fn quant(&self, node: &NodeProto, scale: usize, zero: usize, like: Option<Quant>) -> Lower<Quant> {
        let scale = self.numbers(node.input.get(scale).ok_or("no scale")?)?;
        let [scale] = scale.as_slice() else { return Err("an activation with more than one scale".into()) };
        let zero = match node.input.get(zero).filter(|name| !name.is_empty()) {
            None => (0, like.is_some_and(|like| like.signed)),
            Some(name) => {
                let tensor = self.constants.get(name).ok_or("its zero point is not a constant")?;
                let signed = match tensor.data_type {
                    2 => false,
                    3 => true,
                    _ => return Err("its bytes have another type than u8 and s8".into()),
                };
                let values = onnx::numbers(tensor);
                let [value] = values.as_slice() else { return Err("more than one zero point".into()) };
                (*value as i32, signed)
            }
        };
        let stored = zero.0 + if zero.1 { 128 } else { 0 };
        let zero_byte = u8::try_from(stored).map_err(|_| "a zero point out of range")?;
        Ok(Quant { scale: *scale as f32, zero: zero_byte, signed: zero.1 })
    }

    fn quantize(&mut self, node: &'g NodeProto) -> Lower<Value> {
        let quant = self.quant(node, 1, 2, None)?;
        match self.value(node, 0)? {
            Value::Input(input) => {
                let shape = self.graph.inputs[input];
                let rank = self.inputs[input].1.len();
                let view = self.push(node, Kind::Quantize { input }, vec![], shape, quant)?;
                Ok(Value::Bytes(Known { view, rank }))
            }
            Value::Real(known) => Ok(requantized(known, quant)),
            Value::Pending(pending) => self.resolve(node, pending, quant),
            _ => Err("it quantizes bytes".into()),
        }
    }

    /// Makes the layers of pending numbers, now that their quantization is known.
    fn resolve(&mut self, node: &'g NodeProto, pending: Pending, quant: Quant) -> Lower<Value> {
        let Pending { what, rank, low, high, .. } = pending;
        // Rounding keeps order, so bounds on the numbers are bounds on the bytes.
        let least = if low == f32::NEG_INFINITY { 0 } else { quant.byte(low) };
        let bounded = low != f32::NEG_INFINITY || high != f32::INFINITY;
        let view = match what {
            What::Conv { view, conv } => return self.conv_layer(node, view, conv, quant, low, high, rank),
            What::Function { view, table } => {
                let map = std::array::from_fn(|byte| quant.byte(table[byte].max(low).min(high)));
                view.mapped(&map, quant)
            }
            What::Concat(views) => {
                let parts = views.iter().flat_map(|view| {
                    let map = std::array::from_fn(|byte| quant.byte(view.quant.real(byte as u8)));
                    view.mapped(&map, quant).parts
                });
                let channels = views.iter().map(|view| view.shape.c).sum();
                View { parts: parts.collect(), shape: Shape { c: channels, ..views[0].shape }, quant }
            }
            What::Add([a, b]) => {
                if high != f32::INFINITY {
                    return Err("a sum with an upper bound".into());
                }
                let (a, b) = (self.graph.plain(label(node), &a), self.graph.plain(label(node), &b));
                let shape = a.shape;
                self.push(node, Kind::Add { low: least }, vec![a, b], shape, quant)?
            }
            _ if bounded => return Err("a bound on such a result".into()),
            What::Multiply([a, b]) => {
                let (a, b) = (self.graph.plain(label(node), &a), self.graph.plain(label(node), &b));
                let shape = a.shape;
                self.push(node, Kind::Multiply, vec![a, b], shape, quant)?
            }
            What::AveragePool { view, window, count_padding } => {
                let space = window.over(view.shape.space()).ok_or("its kernel is larger than its input")?;
                let view = self.graph.plain(label(node), &view);
                let shape = view.shape.with_space(space);
                self.push(node, Kind::AveragePool { window, count_padding }, vec![view], shape, quant)?
            }
            What::GlobalAveragePool(view) => {
                let view = self.graph.plain(label(node), &view);
                let shape = view.shape.with_space([1; 3]);
                self.push(node, Kind::GlobalAveragePool, vec![view], shape, quant)?
            }
            What::Softmax(_) => return Err("a softmax inside the network".into()),
        };
        Ok(Value::Bytes(Known { view, rank }))
    }

    fn clamp(&mut self, node: &NodeProto, low: f32, high: f32) -> Lower<Value> {
        if low.is_nan() || high.is_nan() || low > high {
            return Err("its bounds are in the wrong order".into());
        }
        match self.value(node, 0)? {
            Value::Pending(mut pending) => {
                pending.low = pending.low.max(low).min(high);
                pending.high = pending.high.min(high).max(low);
                pending.nodes.push(self.at);
                Ok(Value::Pending(pending))
            }
            Value::Real(known) if low == 0.0 && high == f32::INFINITY => {
                // Zero is a byte, so the result is again what bytes mean.
                let quant = known.view.quant;
                let map = std::array::from_fn(|byte| (byte as u8).max(quant.zero));
                Ok(Value::Real(Known { view: known.view.mapped(&map, quant), rank: known.rank }))
            }
            Value::Real(known) => {
                let table = std::array::from_fn(|byte| known.view.quant.real(byte as u8).max(low).min(high));
                self.pending(What::Function { view: known.view, table: Arc::new(table) }, known.rank)
            }
            Value::Bytes(_) => Err("it works on bytes".into()),
            _ => Err("its input is not quantized".into()),
        }
    }

    fn two(&mut self, node: &NodeProto, [a, b]: [Known; 2]) -> Lower<Value> {
        let multiply = matches!(node.op_type.as_str(), "Mul" | "QLinearMul");
        if a.rank == 2 && a.view.shape.voxels() > 1 {
            return Err("flattened tensors".into());
        }
        let rank = a.rank;
        if a.rank != b.rank {
            return Err("tensors of different rank".into());
        }
        if !multiply {
            if a.view.shape != b.view.shape {
                return Err("a sum of tensors of different shape".into());
            }
            return self.pending(What::Add([a.view, b.view]), rank);
        }
        let point = b.view.shape.voxels() == 1 && a.view.shape.c == b.view.shape.c;
        let first = a.view.shape.voxels() == 1 && a.view.shape.c == b.view.shape.c;
        if a.view.shape == b.view.shape || point {
            self.pending(What::Multiply([a.view, b.view]), rank)
        } else if first {
            self.pending(What::Multiply([b.view, a.view]), rank)
        } else {
            Err("a product of tensors of different shape".into())
        }
    }

    fn concat(&mut self, node: &NodeProto, parts: Vec<Known>) -> Lower<Value> {
        let first = parts.first().ok_or("nothing to join")?;
        let (rank, shape, quant) = (first.rank, first.view.shape, first.view.quant);
        let axis = integer(node, "axis", 1);
        if axis != 1 && axis + rank as i64 != 1 {
            return Err("it does not join channels".into());
        }
        if parts.iter().any(|part| part.rank != rank || part.view.shape.space() != shape.space()) {
            return Err("it joins different shapes".into());
        }
        if rank == 2 && shape.voxels() > 1 {
            return Err("flattened tensors".into());
        }
        let channels = parts.iter().map(|part| part.view.shape.c).sum();
        check_size(Shape { c: channels, ..shape })?;
        if parts.iter().all(|part| part.view.quant == quant) {
            let parts = parts.into_iter().flat_map(|part| part.view.parts).collect();
            let view = View { parts, shape: Shape { c: channels, ..shape }, quant };
            return Ok(Value::Real(Known { view, rank }));
        }
        self.pending(What::Concat(parts.into_iter().map(|part| part.view).collect()), rank)
    }

    fn average(&mut self, node: &NodeProto, known: Known) -> Lower<Value> {
        if integer(node, "ceil_mode", 0) != 0 || integer(node, "channels_last", 0) != 0 {
            return Err("ceil_mode or channels_last".into());
        }
        let window = window(node, &known)?;
        if window.dilation != [1; 3] || (0..3).any(|axis| window.before[axis].max(window.after[axis]) >= window.kernel[axis]) {
            return Err("a dilated window, or more padding than kernel".into());
        }
        let count_padding = integer(node, "count_include_pad", 0) != 0;
        self.pending(What::AveragePool { view: known.view, window, count_padding }, known.rank)
    }

    /// How often a nearest resizing repeats each voxel.
    fn repeats(&self, node: &NodeProto, known: &Known) -> Lower<[usize; 3]> {
        if text(node, "mode", "nearest") != "nearest" {
            return Err("it interpolates".into());
        }
        let mut factors: Vec<f64> = Vec::new();
        let resize = node.op_type == "Resize";
        if let Some(scales) = node.input.get(if resize { 2 } else { 1 }).filter(|name| !name.is_empty()) {
            factors = self.numbers(scales)?;
        }
        if factors.is_empty()
            && let Some(sizes) = node.input.get(3).filter(|name| !name.is_empty())
        {
            let sizes = self.numbers(sizes)?;
            let space = &known.view.shape.space()[5 - known.rank.clamp(4, 5)..];
            if sizes.len() != known.rank || sizes[1] != known.view.shape.c as f64 {
                return Err("it resizes channels".into());
            }
            factors = vec![1.0, 1.0];
            factors.extend(sizes[2..].iter().zip(space).map(|(size, from)| size / *from as f64));
        }
        if factors.len() != known.rank || factors[..2] != [1.0, 1.0] {
            return Err("it resizes channels, or its scales are unknown".into());
        }
        if factors.iter().any(|factor| factor.fract() != 0.0 || !(1.0..=64.0).contains(factor)) {
            return Err("its scale is not a whole number".into());
        }
        if resize {
            // These two ways of choosing the nearest voxel repeat each voxel equally often.
            let way = text(node, "coordinate_transformation_mode", "half_pixel");
            let nearest = text(node, "nearest_mode", "round_prefer_floor");
            let repeats = match way {
                "asymmetric" => nearest == "floor",
                "half_pixel" => nearest.starts_with("round_prefer"),
                _ => false,
            };
            if !repeats {
                return Err("its nearest voxels are not repeats".into());
            }
        }
        let mut by = [1; 3];
        for (axis, factor) in factors[2..].iter().enumerate() {
            by[axis + 5 - known.rank] = *factor as usize;
        }
        Ok(by)
    }

    fn pad(&mut self, node: &'g NodeProto, known: Known) -> Lower<Known> {
        let pads: Vec<f64> = match node.input.get(1) {
            Some(name) => self.numbers(name)?,
            None => ints(node, "pads").iter().map(|pad| *pad as f64).collect(),
        };
        let rank = known.rank;
        if text(node, "mode", "constant") != "constant" || rank < 4 || pads.len() != 2 * rank {
            return Err("it pads in another way than with a constant".into());
        }
        if pads.iter().any(|pad| *pad < 0.0) || [0, 1, rank, rank + 1].iter().any(|at| pads[*at] != 0.0) {
            return Err("it crops, or pads channels".into());
        }
        let quant = known.view.quant;
        let real = match node.input.get(2).filter(|name| !name.is_empty()) {
            Some(name) => self.numbers(name)?.first().copied().unwrap_or(0.0) as f32,
            None => 0.0,
        };
        let on_bytes = matches!(self.value(node, 0)?, Value::Bytes(_));
        let value = if on_bytes { (real as i32 + quant.offset()) as u8 } else { quant.byte(real) };
        if !on_bytes && quant.real(value) != real {
            return Err("its value is not one of the quantized numbers".into());
        }
        let (mut before, mut after) = ([0; 3], [0; 3]);
        for axis in 2..rank {
            before[axis + 3 - rank] = pads[axis] as usize;
            after[axis + 3 - rank] = pads[rank + axis] as usize;
        }
        let space = known.view.shape.space();
        let shape = known.view.shape.with_space(std::array::from_fn(|a| space[a] + before[a] + after[a]));
        let plain = self.graph.plain(label(node), &known.view);
        let view = self.push(node, Kind::Pad { before, value }, vec![plain], shape, quant)?;
        Ok(Known { view, rank })
    }

    /// Weights behind a `DequantizeLinear` of a constant.
    fn dequantized_weights(&self, node: &NodeProto, at: usize, axis: usize) -> Lower<Weights> {
        let name = node.input.get(at).ok_or("no weights")?;
        let made = self.producer.get(name.as_str()).map(|n| &self.network.node[*n]);
        match made {
            Some(made) if made.op_type == "DequantizeLinear" => {
                let dims = match self.constants.get(&made.input[0]) {
                    Some(tensor) => tensor.dims.len(),
                    None => 0,
                };
                let along = integer(made, "axis", 1);
                let along = if along < 0 { along + dims as i64 } else { along };
                let scales = self.constants.get(made.input.get(1).ok_or("no scale")?);
                let per_axis = scales.is_some_and(|scales| !scales.dims.is_empty() && scales.dims[0] > 1);
                if per_axis && along != axis as i64 {
                    return Err("its weights are quantized along another axis".into());
                }
                self.weights(made, 0, 1, 2, axis)
            }
            _ => Err("its weights are not quantized".into()),
        }
    }

    fn weights(&self, node: &NodeProto, at: usize, scale: usize, zero: usize, axis: usize) -> Lower<Weights> {
        let input = |at: usize| node.input.get(at).filter(|name| !name.is_empty());
        let tensor = self.quantized_constant(input(at).ok_or("no weights")?)?;
        let dims: Vec<usize> = tensor.dims.iter().map(|dim| *dim as usize).collect();
        if !matches!(tensor.data_type, 2 | 3) || dims.contains(&0) || dims.len() < 2 || axis >= dims.len() {
            return Err("its weights are not bytes".into());
        }
        let scales = self.numbers(input(scale).ok_or("no scale")?)?;
        let zeros = match input(zero) {
            Some(name) => self.numbers(name)?,
            None => vec![0.0],
        };
        let channels = dims[axis];
        let fits = |len: usize| len == 1 || len == channels;
        if !fits(scales.len()) || !fits(zeros.len()) {
            return Err("its weights have a number of scales that fits no axis".into());
        }
        let inner: usize = dims[axis + 1..].iter().product();
        let values = onnx::numbers(&tensor)
            .iter()
            .enumerate()
            .map(|(n, value)| {
                let zero = zeros[if zeros.len() == 1 { 0 } else { n / inner % channels }];
                let value = *value - zero;
                if (-128.0..=127.0).contains(&value) { Some(value as i8) } else { None }
            })
            .collect::<Option<Vec<i8>>>()
            .ok_or("its weights do not fit into signed bytes")?;
        let scales = (0..channels).map(|n| scales[if scales.len() == 1 { 0 } else { n }] as f32).collect();
        Ok(Weights { dims, values, scales })
    }

    /// A constant of bytes, or the bytes a `QuantizeLinear` makes of float constants.
    fn quantized_constant(&self, name: &str) -> Lower<TensorProto> {
        if let Some(tensor) = self.constants.get(name) {
            return Ok(tensor.clone());
        }
        let made = self.producer.get(name).map(|n| &self.network.node[*n]).filter(|made| made.op_type == "QuantizeLinear");
        let made = made.ok_or("its weights are not constant")?;
        let floats = self.constants.get(&made.input[0]).ok_or("its weights are not constant")?;
        let scales = self.numbers(made.input.get(1).ok_or("no scale")?)?;
        let zeros = made.input.get(2).and_then(|zero| self.constants.get(zero)).ok_or("no zero point")?;
        let (low, high) = match zeros.data_type {
            2 => (0.0, 255.0),
            3 => (-128.0, 127.0),
            _ => return Err("its weights are not bytes".into()),
        };
        let axis = integer(made, "axis", 1);
        let axis = (if axis < 0 { axis + floats.dims.len() as i64 } else { axis }) as usize;
        let (channels, inner) = match floats.dims.get(axis) {
            Some(channels) if scales.len() > 1 => (*channels as usize, floats.dims[axis + 1..].iter().product::<i64>() as usize),
            _ => (1, usize::MAX),
        };
        if scales.len() != channels {
            return Err("its weights have a number of scales that fits no axis".into());
        }
        let zero_values = onnx::numbers(zeros);
        let pick = |all: &[f64], n: usize| all[if all.len() == 1 { 0 } else { n / inner % channels }];
        let values = onnx::numbers(floats);
        let bytes = values.iter().enumerate().map(|(n, value)| {
            let scaled = (*value as f32 / pick(&scales, n) as f32).round_ties_even() + pick(&zero_values, n) as f32;
            scaled.max(low).min(high) as i32
        });
        Ok(TensorProto {
            dims: floats.dims.clone(),
            data_type: zeros.data_type,
            int32_data: bytes.collect(),
            ..Default::default()
        })
    }

    fn bias(&self, node: &NodeProto, at: usize) -> Lower<Bias> {
        let Some(name) = node.input.get(at).filter(|name| !name.is_empty()) else { return Ok(Bias::None) };
        if let Some(tensor) = self.constants.get(name) {
            let values = onnx::numbers(tensor).iter().map(|value| *value as f32).collect();
            return if tensor.data_type == 1 { Ok(Bias::Real(values)) } else { Err("its bias is not float".into()) };
        }
        let made = self.producer.get(name.as_str()).map(|n| &self.network.node[*n]);
        match made {
            Some(made) if made.op_type == "DequantizeLinear" => {
                let tensor = self.constants.get(&made.input[0]).ok_or("its bias is not constant")?;
                let integers = onnx::numbers(tensor);
                if tensor.data_type == 6 {
                    return Ok(Bias::Units(integers.iter().map(|value| *value as i32).collect()));
                }
                let scales = self.numbers(&made.input[1])?;
                let zeros = made.input.get(2).map_or(Ok(vec![0.0]), |zero| self.numbers(zero))?;
                let pick = |all: &[f64], n: usize| all.get(if all.len() == 1 { 0 } else { n }).copied().unwrap_or(0.0);
                let reals = integers.iter().enumerate();
                Ok(Bias::Real(reals.map(|(n, v)| ((v - pick(&zeros, n)) * pick(&scales, n)) as f32).collect()))
            }
            _ => Err("its bias is not constant".into()),
        }
    }

    fn integer_bias(&self, node: &NodeProto, at: usize) -> Lower<Bias> {
        match node.input.get(at).filter(|name| !name.is_empty()) {
            None => Ok(Bias::None),
            Some(name) => Ok(Bias::Units(self.numbers(name)?.iter().map(|value| *value as i32).collect())),
        }
    }

    fn convolution(&self, node: &NodeProto, known: &Known, weights: &Weights, bias: Bias) -> Lower<Convolution> {
        let input = known.view.shape;
        let groups = usize::try_from(integer(node, "group", 1)).ok().filter(|g| *g > 0).ok_or("its groups")?;
        let rank = known.rank;
        if rank < 4 || weights.dims.len() != rank || input.c % groups != 0 || weights.dims[1] * groups != input.c {
            return Err("its weights do not fit its input".into());
        }
        let outputs = weights.dims[0];
        if outputs % groups != 0 {
            return Err("its groups do not divide its outputs".into());
        }
        let mut kernel = [1; 3];
        kernel[5 - rank..].copy_from_slice(&weights.dims[2..]);
        let window = sized_window(node, kernel, known)?;
        let space = window.over(input.space()).ok_or("its kernel is larger than its input")?;
        let (taps, own) = (window.taps(), weights.dims[1]);
        // From [output][channel][tap] to [output][tap][channel].
        let packed = (0..weights.values.len()).map(|n| {
            let (output, tap, channel) = (n / (taps * own), n / own % taps, n % own);
            weights.values[(output * own + channel) * taps + tap]
        });
        Ok(Convolution {
            shape: Shape { c: outputs, ..input }.with_space(space),
            window,
            spread: None,
            groups,
            weights: Arc::new(packed.collect()),
            scales: weights.scales.clone(),
            bias,
        })
    }

    fn transposed(&self, node: &NodeProto, known: &Known, weights: &Weights, bias: Bias) -> Lower<Convolution> {
        let (input, rank) = (known.view.shape, known.rank);
        if rank < 4 || weights.dims.len() != rank || weights.dims[0] != input.c || integer(node, "group", 1) != 1 {
            return Err("its weights do not fit its input".into());
        }
        let kernel: Vec<i64> = weights.dims[2..].iter().map(|dim| *dim as i64).collect();
        let plain = |name: &str, all: i64| ints(node, name).iter().all(|value| *value == all);
        if ints(node, "strides") != kernel || !plain("pads", 0) || !plain("output_padding", 0) || !plain("dilations", 1)
            || !ints(node, "output_shape").is_empty() || !matches!(text(node, "auto_pad", "NOTSET"), "NOTSET" | "VALID")
        {
            return Err("its stride is not its kernel".into());
        }
        let mut spread = [1; 3];
        spread[5 - rank..].copy_from_slice(&weights.dims[2..]);
        let (outputs, taps) = (weights.dims[1], spread.iter().product::<usize>());
        let space = input.space();
        // From [channel][output][tap] to [tap][output][channel].
        let packed = (0..weights.values.len()).map(|n| {
            let (tap, output, channel) = (n / (outputs * input.c), n / input.c % outputs, n % input.c);
            weights.values[(channel * outputs + output) * taps + tap]
        });
        Ok(Convolution {
            shape: Shape { c: outputs, ..input }.with_space(std::array::from_fn(|a| space[a] * spread[a])),
            window: Window::POINT,
            spread: Some(spread),
            groups: 1,
            weights: Arc::new(packed.collect()),
            scales: weights.scales.clone(),
            bias,
        })
    }

    /// A fully connected layer: a convolution whose kernel is the whole input.
    fn connected(&self, known: &Known, weights: &Weights, transposed: bool, bias: Bias) -> Lower<Convolution> {
        let input = known.view.shape;
        if known.rank != 2 || weights.dims.len() != 2 {
            return Err("it is not on a flat tensor".into());
        }
        let (outputs, inputs) =
            if transposed { (weights.dims[0], weights.dims[1]) } else { (weights.dims[1], weights.dims[0]) };
        if inputs != input.bytes() {
            return Err("its weights do not fit its input".into());
        }
        let voxels = input.voxels();
        // The network counts [channel][voxel], we lay [voxel][channel].
        let packed = (0..outputs * inputs).map(|n| {
            let (output, voxel, channel) = (n / inputs, n % inputs / input.c, n % input.c);
            let at = channel * voxels + voxel;
            weights.values[if transposed { output * inputs + at } else { at * outputs + output }]
        });
        Ok(Convolution {
            shape: Shape { d: 1, h: 1, w: 1, c: outputs },
            window: Window { kernel: input.space(), ..Window::POINT },
            spread: None,
            groups: 1,
            weights: Arc::new(packed.collect()),
            scales: weights.scales.clone(),
            bias,
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn conv_layer(
        &mut self,
        node: &NodeProto,
        view: View,
        conv: Convolution,
        quant: Quant,
        low: f32,
        high: f32,
        rank: usize,
    ) -> Lower<Value> {
        let channels = conv.shape.c;
        let input = view.quant;
        let scale: Vec<f32> = conv.scales.iter().map(|weight| input.scale * weight / quant.scale).collect();
        let bias: Vec<i32> = match conv.bias {
            Bias::None => vec![0; channels],
            Bias::Units(values) => values,
            Bias::Real(values) => {
                let units = values.iter().zip(&conv.scales);
                units.map(|(value, weight)| (f64::from(*value) / f64::from(input.scale * weight)).round_ties_even() as i32).collect()
            }
        };
        if scale.len() != channels || bias.len() != channels {
            return Err("its scales or biases do not fit its channels".into());
        }
        if scale.iter().any(|scale| !scale.is_finite()) {
            return Err("its combined scale is not a number".into());
        }
        let taps = conv.spread.map_or(1, |spread| spread.iter().product());
        let each = conv.weights.len() / taps / channels;
        for (n, weights) in conv.weights.chunks(each).enumerate() {
            let reach: i64 = weights.iter().map(|weight| i64::from(*weight).abs() * 255).sum();
            if reach + i64::from(bias[n % channels]).abs() > SUM_MAX {
                return Err("its sums could leave 32 bits".into());
            }
        }
        let requant = Requant {
            scale,
            zero: quant.zero,
            low: if low == f32::NEG_INFINITY { 0 } else { quant.byte(low) },
            high: if high == f32::INFINITY { 255 } else { quant.byte(high) },
        };
        // A point convolution gives the same for each copy of a voxel: compute it before the enlargement.
        let ups: Vec<[usize; 3]> = view.parts.iter().map(|part| part.up).collect();
        let by = ups[0];
        let point = conv.window == Window::POINT && conv.spread.is_none();
        if point && by != [1; 3] && ups.iter().all(|up| *up == by) {
            let mut small = view;
            small.parts.iter_mut().for_each(|part| part.up = [1; 3]);
            let space = small.shape.space();
            small.shape = small.shape.with_space(std::array::from_fn(|axis| space[axis] / by[axis]));
            let shape = Shape { c: channels, ..small.shape };
            let kind = Kind::Conv { window: conv.window, groups: conv.groups, weights: conv.weights, bias, requant };
            let view = self.push(node, kind, vec![small], shape, quant)?;
            return Ok(Value::Bytes(Known { view: view.enlarged(by), rank }));
        }
        let (kind, view) = match conv.spread {
            Some(kernel) => {
                let view = self.graph.plain(label(node), &view);
                (Kind::Spread { kernel, weights: conv.weights, bias, requant }, view)
            }
            None => {
                (Kind::Conv { window: conv.window, groups: conv.groups, weights: conv.weights, bias, requant }, view)
            }
        };
        let view = self.push(node, kind, vec![view], conv.shape, quant)?;
        Ok(Value::Bytes(Known { view, rank }))
    }

    /// Hands a tensor out of the island, as floats: of what its bytes mean, or of the bytes themselves, which is told.
    ///
    /// # Errors
    /// The nodes that must stay outside, because the tensor has no quantization here.
    pub(crate) fn add_output(
        &mut self,
        name: &str,
        reads_bytes: bool,
    ) -> Result<Option<Handed>, Vec<(usize, String)>> {
        let mut handed = None;
        let made = self.producer[name];
        let only = |reason: &str| vec![(made, reason.to_owned())];
        let (view, rank, table, softmax) = match self.values.get(name).cloned() {
            Some(Value::Real(Known { view, rank })) => {
                let quant = view.quant;
                (view, rank, std::array::from_fn(|byte| quant.real(byte as u8)), false)
            }
            Some(Value::Bytes(Known { view, rank })) if !reads_bytes => {
                let offset = view.quant.offset();
                handed = Some(view.quant.signed);
                (view, rank, std::array::from_fn(|byte| (byte as i32 - offset) as f32), false)
            }
            Some(Value::Bytes(_)) => return Err(only("its bytes are read by an operator that has no layer")),
            Some(Value::Pending(pending)) => match pending.what {
                What::Function { view, table } => {
                    let table = table.map(|real| real.max(pending.low).min(pending.high));
                    (view, pending.rank, table, false)
                }
                What::Softmax(view) if pending.low == f32::NEG_INFINITY && pending.high == f32::INFINITY => {
                    let scale = f64::from(view.quant.scale);
                    (view, pending.rank, std::array::from_fn(|byte| (-(byte as f64) * scale).exp() as f32), true)
                }
                _ => {
                    let reason = "nothing quantizes its result";
                    return Err(pending.nodes.iter().map(|node| (*node, reason.to_owned())).collect());
                }
            },
            _ => return Err(only("its result is not quantized")),
        };
        let view = self.graph.plain(name, &view);
        let shape = view.shape;
        let output = self.graph.outputs.len();
        self.graph.outputs.push(shape);
        let batch = self.batch.unwrap_or(1);
        let dims = match rank {
            2 => vec![batch, shape.bytes()],
            4 => vec![batch, shape.c, shape.h, shape.w],
            _ => vec![batch, shape.c, shape.d, shape.h, shape.w],
        };
        self.outputs.push((name.into(), dims.clone()));
        let kind = Kind::Dequantize { output, table: Arc::new(table), softmax };
        self.graph.layers.push(super::kernels::graph::Layer { name: name.into(), kind, inputs: vec![view], output: None });
        Ok(handed.map(|signed| Handed { shape: dims, signed }))
    }

    /// The island, if it is worth having: pairs of quantizing and dequantizing alone are left to tract.
    pub(crate) fn finish(self) -> Option<Island> {
        let works = |kind: &Kind| !matches!(kind, Kind::Quantize { .. } | Kind::Dequantize { .. } | Kind::Gather);
        let worth = self.graph.layers.iter().any(|layer| works(&layer.kind)) && !self.outputs.is_empty();
        worth.then(|| Island {
            graph: self.graph,
            inputs: self.inputs,
            outputs: self.outputs,
            batch: self.batch.unwrap_or(1),
        })
    }
}

fn requantized(known: Known, quant: Quant) -> Value {
    if known.view.quant == quant {
        return Value::Bytes(known);
    }
    let map = std::array::from_fn(|byte| quant.byte(known.view.quant.real(byte as u8)));
    Value::Bytes(Known { view: known.view.mapped(&map, quant), rank: known.rank })
}

/// Batch and extent of an ONNX shape.
fn volume(shape: &[usize]) -> Option<(usize, Shape)> {
    let (d, h, w) = match shape {
        [_, _] => (1, 1, 1),
        [_, _, h, w] => (1, *h, *w),
        [_, _, d, h, w] => (*d, *h, *w),
        _ => return None,
    };
    Some((shape[0], Shape { d, h, w, c: shape[1] }))
}

fn check_size(shape: Shape) -> Lower<()> {
    let dims = [shape.d, shape.h, shape.w, shape.c];
    match onnx::elements(dims.map(|dim| i64::try_from(dim).unwrap_or(-1))) {
        Some(_) => Ok(()),
        None => Err(Trouble::Here(format!("its result would have the shape {dims:?}"))),
    }
}

fn attribute<'n>(node: &'n NodeProto, name: &str) -> Option<&'n tract_onnx::pb::AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name == name)
}

fn integer(node: &NodeProto, name: &str, default: i64) -> i64 {
    attribute(node, name).map_or(default, |attribute| attribute.i)
}

fn number(node: &NodeProto, name: &str, default: f32) -> f32 {
    attribute(node, name).map_or(default, |attribute| attribute.f)
}

fn ints(node: &NodeProto, name: &str) -> Vec<i64> {
    attribute(node, name).map_or_else(Vec::new, |attribute| attribute.ints.clone())
}

fn text<'n>(node: &'n NodeProto, name: &str, default: &'n str) -> &'n str {
    attribute(node, name).and_then(|attribute| std::str::from_utf8(&attribute.s).ok()).unwrap_or(default)
}

fn window(node: &NodeProto, known: &Known) -> Lower<Window> {
    let mut kernel = [1; 3];
    let shape = ints(node, "kernel_shape");
    if known.rank < 4 || shape.len() != known.rank - 2 || shape.iter().any(|k| *k < 1) {
        return Err("its kernel does not fit its input".into());
    }
    for (to, from) in kernel[5 - known.rank..].iter_mut().zip(&shape) {
        *to = *from as usize;
    }
    sized_window(node, kernel, known)
}

fn sized_window(node: &NodeProto, kernel: [usize; 3], known: &Known) -> Lower<Window> {
    let spatial = known.rank - 2;
    let list = |name: &str, default: usize| -> Lower<[usize; 3]> {
        let values = ints(node, name);
        if values.is_empty() {
            return Ok([default; 3]);
        }
        if values.len() != spatial || values.iter().any(|value| *value < 1) {
            return Err(Trouble::Here(format!("its {name}")));
        }
        let mut all = [1; 3];
        all[3 - spatial..].iter_mut().zip(&values).for_each(|(to, from)| *to = *from as usize);
        Ok(all)
    };
    let mut window = Window { kernel, stride: list("strides", 1)?, dilation: list("dilations", 1)?, ..Window::POINT };
    for axis in 0..3 - spatial {
        (window.stride[axis], window.dilation[axis]) = (1, 1);
    }
    let pads = ints(node, "pads");
    match text(node, "auto_pad", "NOTSET") {
        "NOTSET" if pads.is_empty() => {}
        "NOTSET" if pads.len() == 2 * spatial && pads.iter().all(|pad| *pad >= 0) => {
            for axis in 0..spatial {
                window.before[3 - spatial + axis] = pads[axis] as usize;
                window.after[3 - spatial + axis] = pads[spatial + axis] as usize;
            }
        }
        "VALID" => {}
        way @ ("SAME_UPPER" | "SAME_LOWER") => {
            let space = known.view.shape.space();
            for axis in 3 - spatial..3 {
                let reach = (kernel[axis] - 1) * window.dilation[axis] + 1;
                let output = space[axis].div_ceil(window.stride[axis]);
                let pad = ((output - 1) * window.stride[axis] + reach).saturating_sub(space[axis]);
                let (less, more) = (pad / 2, pad - pad / 2);
                (window.before[axis], window.after[axis]) = if way == "SAME_UPPER" { (less, more) } else { (more, less) };
            }
        }
        _ => return Err("its padding".into()),
    }
    Ok(window)
}

/// Elementwise operators. Exponentials are computed in `f64`, so that their bytes do not hang on a library's last bit.
fn function(node: &NodeProto) -> impl Fn(f32) -> f32 + use<> {
    let kind = node.op_type.trim_start_matches("QLinear").to_owned();
    let alpha = number(node, "alpha", match kind.as_str() { "HardSigmoid" => 0.2, "Elu" => 1.0, _ => 0.01 });
    let beta = number(node, "beta", 0.5);
    move |x: f32| {
        let wide = f64::from(x);
        match kind.as_str() {
            "LeakyRelu" => if x >= 0.0 { x } else { alpha * x },
            "Sigmoid" => (1.0 / (1.0 + (-wide).exp())) as f32,
            "Tanh" => wide.tanh() as f32,
            "Elu" => if x >= 0.0 { x } else { (f64::from(alpha) * wide.exp_m1()) as f32 },
            "HardSigmoid" => (alpha * x + beta).clamp(0.0, 1.0),
            _ => x * (x / 6.0 + 0.5).clamp(0.0, 1.0),
        }
    }
}
