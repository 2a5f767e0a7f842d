//! The nodes of an island, one by one, as layers of an integer graph.

use std::collections::HashMap;
use std::sync::Arc;

use tract_onnx::pb::{GraphProto, NodeProto, TensorProto};

use super::attributes::{function, integer, number, window};
use super::kernels::graph::{Between, Graph, Kind, Layer, Quant, Shape, View, Window};
use super::lower::{Handed, Island};
use super::onnx::{self, label};
use super::weights::{Bias, Convolution};

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

pub(super) type Lower<T> = Result<T, Trouble>;

/// What a tensor of the network is, inside an island.
#[derive(Clone)]
pub(super) enum Value {
    /// A float that comes from outside, still to be quantized.
    Input(usize),
    /// A quantized tensor.
    Bytes(Known),
    /// The real numbers that a quantized tensor means.
    Real(Known),
    /// Real numbers that become bytes when their `QuantizeLinear` tells the scale.
    Pending(Box<Pending>),
    /// Made by a node that failed.
    Lost,
}

#[derive(Clone)]
pub(super) struct Known {
    pub(super) view: View,
    /// Dimensions of the ONNX tensor; 2 after a flattening, whose order of elements is the network's.
    pub(super) rank: usize,
}

#[derive(Clone)]
pub(super) struct Pending {
    pub(super) what: What,
    pub(super) rank: usize,
    /// Bounds from ReLU and Clip nodes since.
    pub(super) low: f32,
    pub(super) high: f32,
    /// The nodes it stands for: if nothing quantizes it, they all stay outside.
    pub(super) nodes: Vec<usize>,
}

#[derive(Clone)]
pub(super) enum What {
    Conv { view: View, conv: Convolution },
    Add([View; 2]),
    Multiply([View; 2]),
    Concat(Vec<View>),
    AveragePool { view: View, window: Window, count_padding: bool },
    GlobalAveragePool(View),
    Resample { view: View, shape: Shape, axes: [Vec<Between>; 3], cut: bool },
    /// A function of each number, applied to each byte's meaning.
    Function { view: View, table: Arc<[f32; 256]> },
    /// Probabilities along the channels; only as an output.
    Softmax(View),
}

pub(crate) struct Builder<'g> {
    pub(super) network: &'g GraphProto,
    pub(super) constants: &'g HashMap<String, TensorProto>,
    pub(super) producer: &'g HashMap<&'g str, usize>,
    values: HashMap<String, Value>,
    pub(super) graph: Graph,
    inputs: Vec<(String, Vec<usize>)>,
    outputs: Vec<(String, Vec<usize>)>,
    batch: Option<usize>,
    pub(super) at: usize,
}

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
                | "QLinearAveragePool" | "QLinearGlobalAveragePool" | "QLinearSigmoid" | "QLinearSoftmax" | "QLinearLeakyRelu" | "QGemm"
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
                self.resolve(node, *pending, to)
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
                    Value::Pending(pending) => self.resolve(node, *pending, to),
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
                    Value::Pending(pending) => {
                        let Pending { what: What::Function { view, table }, low, high, rank, mut nodes } = *pending else {
                            return Err("its input is not quantized".into());
                        };
                        let table = Arc::new(table.map(|real| function(real.max(low).min(high))));
                        nodes.push(self.at);
                        let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
                        let what = What::Function { view, table };
                        Ok(Value::Pending(Box::new(Pending { what, low, high, rank, nodes })))
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
                let window = window(node, known.view.shape.space(), known.rank)?;
                let window = if integer(node, "ceil_mode", 0) != 0 { window.rounded_up(known.view.shape.space()) } else { window };
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
                self.resolve(node, *pending, to)
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
                self.resolve(node, *pending, to)
            }
            "Resize" | "Upsample" => self.resize(node),
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
                let rank = known.rank;
                along_channels(node, rank)?;
                self.pending(What::Softmax(known.view), rank)
            }
            "QLinearSoftmax" => {
                let known = self.bytes(node, 0, 1, 2)?;
                along_channels(node, known.rank)?;
                let to = self.quant(node, 3, 4, None)?;
                let Value::Pending(pending) = self.pending(What::Softmax(known.view), known.rank)? else {
                    unreachable!("parts are pending")
                };
                self.resolve(node, *pending, to)
            }
            _ => Err("there is no layer for it".into()),
        }
    }

    pub(super) fn value(&self, node: &NodeProto, at: usize) -> Lower<Value> {
        let name = node.input.get(at).filter(|name| !name.is_empty()).ok_or("an input is missing")?;
        match self.values.get(name) {
            Some(Value::Lost) => Err(Trouble::Before),
            Some(value) => Ok(value.clone()),
            None => Err(Trouble::Here(format!("its input {name:?} is not quantized"))),
        }
    }

    pub(super) fn real(&self, node: &NodeProto, at: usize) -> Lower<Known> {
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
    pub(super) fn same(&mut self, node: &'g NodeProto, work: impl FnOnce(&mut Self, Known) -> Lower<Known>) -> Lower<Value> {
        match self.value(node, 0)? {
            Value::Bytes(known) => work(self, known).map(Value::Bytes),
            Value::Real(known) => work(self, known).map(Value::Real),
            _ => Err("its input is not quantized".into()),
        }
    }

    pub(super) fn pending(&self, what: What, rank: usize) -> Lower<Value> {
        let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
        Ok(Value::Pending(Box::new(Pending { what, rank, low, high, nodes: vec![self.at] })))
    }

    pub(super) fn push(&mut self, node: &NodeProto, kind: Kind, inputs: Vec<View>, shape: Shape, quant: Quant) -> Lower<View> {
        check_size(shape)?;
        Ok(self.graph.push(label(node), kind, inputs, shape, quant))
    }

    pub(super) fn numbers(&self, name: &str) -> Lower<Vec<f64>> {
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
            Value::Pending(pending) => self.resolve(node, *pending, quant),
            _ => Err("it quantizes bytes".into()),
        }
    }

    /// Makes the layers of pending numbers, now that their quantization is known.
    pub(super) fn resolve(&mut self, node: &'g NodeProto, pending: Pending, quant: Quant) -> Lower<Value> {
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
            What::Resample { view, shape, axes, cut } => {
                let view = self.graph.plain(label(node), &view);
                self.push(node, Kind::Resample { axes, cut }, vec![view], shape, quant)?
            }
            What::GlobalAveragePool(view) => {
                let view = self.graph.plain(label(node), &view);
                let shape = view.shape.with_space([1; 3]);
                self.push(node, Kind::GlobalAveragePool, vec![view], shape, quant)?
            }
            What::Softmax(view) => {
                let view = self.graph.plain(label(node), &view);
                let (shape, table) = (view.shape, Arc::new(exponentials(view.quant)));
                self.push(node, Kind::Softmax(table), vec![view], shape, quant)?
            }
        };
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
                    let table = exponentials(view.quant);
                    (view, pending.rank, table, true)
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
        self.graph.layers.push(Layer { name: name.into(), kind, inputs: vec![view], output: None });
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

fn along_channels(node: &NodeProto, rank: usize) -> Lower<()> {
    let axis = integer(node, "axis", -1);
    if axis == 1 || axis + rank as i64 == 1 { Ok(()) } else { Err("it is not along the channels".into()) }
}

/// exp(-difference * scale) of each difference of two bytes.
fn exponentials(quant: Quant) -> [f32; 256] {
    std::array::from_fn(|byte| (-(byte as f64) * f64::from(quant.scale)).exp() as f32)
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

pub(super) fn check_size(shape: Shape) -> Lower<()> {
    let dims = [shape.d, shape.h, shape.w, shape.c];
    match onnx::elements(dims.map(|dim| i64::try_from(dim).unwrap_or(-1))) {
        Some(_) => Ok(()),
        None => Err(Trouble::Here(format!("its result would have the shape {dims:?}"))),
    }
}
