//! Layers with weights: their integers, scales and biases, out of constants in the ways quantizers write them.

use std::sync::Arc;

use tract_onnx::pb::{NodeProto, TensorProto};

use super::attributes::{integer, sized_window, transposed_window};
use super::kernels::graph::{Kind, Quant, Requant, Shape, View, Window};
use super::layers::{Builder, Known, Lower, Value};
use super::onnx;

/// Weights with their scales, before the scales of input and output are known.
#[derive(Clone)]
pub(super) struct Convolution {
    shape: Shape,
    window: Window,
    /// Of a transposed convolution.
    spread: Option<Spread>,
    groups: usize,
    weights: Arc<Vec<i8>>,
    scales: Vec<f32>,
    bias: Bias,
}

/// The block of outputs at each place of a transposed convolution's window, and the taps of its kernel.
#[derive(Clone, Copy)]
struct Spread {
    block: [usize; 3],
    taps: usize,
}

#[derive(Clone)]
pub(super) enum Bias {
    None,
    /// In units of input scale times weight scale.
    Units(Vec<i32>),
    Real(Vec<f32>),
}

/// Integers with their scales along one axis.
pub(super) struct Weights {
    dims: Vec<usize>,
    values: Vec<i8>,
    scales: Vec<f32>,
}

/// Rows that one window sees at once, in bytes, and weights of a layer: those of a large 3-D layer take a tenth of this.
const RING_MAX: usize = 64 << 20;

/// Entries of a table of taps; a kernel of 3 by 3 by 3 with a dilation of 16 and 512 channels has a tenth of this.
const TABLE_MAX: usize = 4 << 20;

/// Sums beyond this could leave 32 bits.
const SUM_MAX: i64 = 1 << 30;

impl Builder<'_> {
    /// Weights behind a `DequantizeLinear` of a constant.
    pub(super) fn dequantized_weights(&self, node: &NodeProto, at: usize, axis: usize) -> Lower<Weights> {
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

    pub(super) fn weights(&self, node: &NodeProto, at: usize, scale: usize, zero: usize, axis: usize) -> Lower<Weights> {
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

    pub(super) fn bias(&self, node: &NodeProto, at: usize) -> Lower<Bias> {
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

    pub(super) fn integer_bias(&self, node: &NodeProto, at: usize) -> Lower<Bias> {
        match node.input.get(at).filter(|name| !name.is_empty()) {
            None => Ok(Bias::None),
            Some(name) => Ok(Bias::Units(self.numbers(name)?.iter().map(|value| *value as i32).collect())),
        }
    }

    pub(super) fn convolution(&self, node: &NodeProto, known: &Known, weights: &Weights, bias: Bias) -> Lower<Convolution> {
        let input = known.view.shape;
        let groups = usize::try_from(integer(node, "group", 1)).ok().filter(|g| *g > 0).ok_or("its groups")?;
        let rank = known.rank;
        if rank < 4 || weights.dims.len() != rank || !input.c.is_multiple_of(groups) || weights.dims[1] * groups != input.c {
            return Err("its weights do not fit its input".into());
        }
        let outputs = weights.dims[0];
        if !outputs.is_multiple_of(groups) {
            return Err("its groups do not divide its outputs".into());
        }
        let mut kernel = [1; 3];
        kernel[5 - rank..].copy_from_slice(&weights.dims[2..]);
        let window = sized_window(node, kernel, input.space(), rank)?;
        let space = window.over(input.space()).ok_or("its kernel is larger than its input")?;
        let (taps, own) = (window.taps(), weights.dims[1]);
        let reach = |axis: usize| (kernel[axis] - 1) * window.dilation[axis] + 1;
        let columns = input.w + window.before[2] + window.after[2];
        let ring = [reach(0), reach(1), columns, input.c].into_iter().try_fold(1usize, usize::checked_mul);
        let table = reach(0).checked_mul(taps * own);
        if ring.is_none_or(|bytes| bytes > RING_MAX) || table.is_none_or(|steps| steps > TABLE_MAX) {
            return Err("its window reaches too far".into());
        }
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

    /// A transposed convolution, turned round: where an ordinary one says what each input adds to the outputs, each output
    /// asks which inputs reach it. With stride `s` that is another set of taps for each of `s` neighbouring outputs, so the
    /// layer is a convolution that makes a block of outputs at each place.
    pub(super) fn transposed(&self, node: &NodeProto, known: &Known, weights: &Weights, bias: Bias) -> Lower<Convolution> {
        let (input, rank) = (known.view.shape, known.rank);
        let groups = usize::try_from(integer(node, "group", 1)).ok().filter(|g| *g > 0).ok_or("its groups")?;
        if rank < 4 || weights.dims.len() != rank || weights.dims[0] != input.c || !input.c.is_multiple_of(groups) {
            return Err("its weights do not fit its input".into());
        }
        let own = input.c / groups;
        let each = weights.dims[1];
        let mut kernel = [1; 3];
        kernel[5 - rank..].copy_from_slice(&weights.dims[2..]);
        let given = transposed_window(node, kernel, input.space(), rank)?;
        // Output `o` hears tap `k` from input `(o + before - k * dilation) / stride`, where that is a whole number. Of the
        // outputs `stride * place + phase` those are the inputs `place + reach`, for reaches that depend on `phase` alone.
        let [stride, before] = [given.stride, given.before].map(|axes| axes.map(|n| n as i64));
        let mut window = Window::POINT;
        // For each axis and phase, the kernel's tap behind each tap of the window.
        let mut heard: [Vec<Vec<Option<usize>>>; 3] = Default::default();
        for axis in 0..3 {
            let last = (kernel[axis] as i64 - 1) * given.dilation[axis] as i64;
            let least = (before[axis] - last).div_euclid(stride[axis]).min(0);
            let most = (stride[axis] - 1 + before[axis]).div_euclid(stride[axis]).max(0);
            window.before[axis] = -least as usize;
            window.kernel[axis] = (most - least + 1) as usize;
            heard[axis] = (0..stride[axis])
                .map(|phase| {
                    let tap = |reach: i64| {
                        let steps = phase + before[axis] - stride[axis] * reach;
                        let dilation = given.dilation[axis] as i64;
                        (0..=last).contains(&steps).then_some(steps).filter(|s| s % dilation == 0).map(|s| (s / dilation) as usize)
                    };
                    (least..=most).map(tap).collect()
                })
                .collect();
        }
        let (taps, seen) = (kernel.iter().product::<usize>(), window.taps());
        let phases: usize = given.stride.iter().product();
        let outputs = each * groups;
        let size = [phases, outputs, seen, own].into_iter().try_fold(1usize, usize::checked_mul);
        let ring = [window.kernel[0], window.kernel[1], input.w + window.kernel[2], input.c];
        let ring = ring.into_iter().try_fold(1usize, usize::checked_mul);
        if size.is_none_or(|size| size > RING_MAX) || ring.is_none_or(|bytes| bytes > RING_MAX) {
            return Err("its window reaches too far".into());
        }
        // From [channel][output of its group][tap] to [phase][output][tap of the window][channel of its group].
        let mut packed = Vec::with_capacity(phases * outputs * seen * own);
        let split = |n: usize, by: [usize; 3]| [n / (by[1] * by[2]), n / by[2] % by[1], n % by[2]];
        for phase in 0..phases {
            let phase = split(phase, given.stride);
            for output in 0..outputs {
                for tap in 0..seen {
                    let at = split(tap, window.kernel);
                    let [d, h, w]: [Option<usize>; 3] = std::array::from_fn(|axis| heard[axis][phase[axis]][at[axis]]);
                    let tap = d.zip(h).zip(w).map(|((d, h), w)| (d * kernel[1] + h) * kernel[2] + w);
                    packed.extend((0..own).map(|channel| {
                        let from = output / each * own + channel;
                        tap.map_or(0, |tap| weights.values[(from * each + output % each) * taps + tap])
                    }));
                }
            }
        }
        Ok(Convolution {
            shape: Shape { c: outputs, ..input }.with_space(given.output),
            window,
            spread: Some(Spread { block: given.stride, taps }),
            groups,
            weights: Arc::new(packed),
            // One for each output of a group in the file, if there are groups.
            scales: (0..outputs).map(|output| weights.scales[output % each]).collect(),
            bias,
        })
    }

    /// A fully connected layer: a convolution whose kernel is the whole input.
    pub(super) fn connected(&self, known: &Known, weights: &Weights, transposed: bool, bias: Bias) -> Lower<Convolution> {
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
    pub(super) fn conv_layer(
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
        let phases: usize = conv.spread.map_or(1, |spread| spread.block.iter().product());
        let each = conv.weights.len() / phases / channels;
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
        let Convolution { window, groups, weights, .. } = conv;
        let kind = match conv.spread {
            Some(Spread { block, taps }) => Kind::Spread { window, block, taps, groups, weights, bias, requant },
            None => Kind::Conv { window, groups, weights, bias, requant },
        };
        let view = self.push(node, kind, vec![view], conv.shape, quant)?;
        Ok(Value::Bytes(Known { view, rank }))
    }
}
