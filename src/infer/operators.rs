//! Operators whose layers take more than a line: bounds, sums, products, joints, means, frames and resizing.

use std::sync::Arc;

use tract_onnx::pb::NodeProto;

use super::attributes::{integer, ints, text, window};
use super::kernels::graph::{Between, Kind, Shape, View};
use super::layers::{Builder, Known, Lower, Trouble, Value, What, check_size};
use super::onnx::label;

/// Longest axis that is resized into: each voxel of it has an entry in a table.
const EXTENT_MAX: usize = 1 << 16;

impl<'g> Builder<'g> {
    pub(super) fn clamp(&mut self, node: &NodeProto, low: f32, high: f32) -> Lower<Value> {
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

    pub(super) fn two(&mut self, node: &NodeProto, [a, b]: [Known; 2]) -> Lower<Value> {
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

    pub(super) fn concat(&mut self, node: &NodeProto, parts: Vec<Known>) -> Lower<Value> {
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

    pub(super) fn average(&mut self, node: &NodeProto, known: Known) -> Lower<Value> {
        if integer(node, "ceil_mode", 0) != 0 || integer(node, "channels_last", 0) != 0 {
            return Err("ceil_mode or channels_last".into());
        }
        let window = window(node, known.view.shape.space(), known.rank)?;
        if window.dilation != [1; 3] || (0..3).any(|axis| window.before[axis].max(window.after[axis]) >= window.kernel[axis]) {
            return Err("a dilated window, or more padding than kernel".into());
        }
        let count_padding = integer(node, "count_include_pad", 0) != 0;
        self.pending(What::AveragePool { view: known.view, window, count_padding }, known.rank)
    }

    /// Resizing: by whole numbers to the nearest voxel it is a way of looking, anything else a layer.
    pub(super) fn resize(&mut self, node: &'g NodeProto) -> Lower<Value> {
        let value = self.value(node, 0)?;
        let (Value::Bytes(known) | Value::Real(known)) = &value else { return Err("its input is not quantized".into()) };
        let (way, scales, sizes) = self.scales(node, known)?;
        let rank = known.rank;
        if let Some(by) = way.repeats(scales) {
            return self.same(node, |_, known| {
                let view = known.view.enlarged(by);
                check_size(view.shape)?;
                Ok(Known { view, rank })
            });
        }
        let (view, space) = (known.view.clone(), known.view.shape.space());
        let shape = view.shape.with_space(sizes);
        check_size(shape)?;
        let axes = std::array::from_fn(|axis| way.places(space[axis], sizes[axis], scales[axis]));
        // On bytes ONNX Runtime interpolates and cuts off the fraction; real numbers meet their quantizer later, which rounds.
        let cut = matches!((&value, &way), (Value::Bytes(_), Resizing::Linear { .. }));
        let what = What::Resample { view: view.clone(), shape, axes, cut };
        match (value, self.pending(what, rank)?) {
            (Value::Bytes(_), Value::Pending(pending)) => self.resolve(node, *pending, view.quant),
            (_, pending) => Ok(pending),
        }
    }

    /// How a resizing looks for its voxels, its factors, and the extents it makes.
    fn scales(&self, node: &NodeProto, known: &Known) -> Lower<(Resizing, [f32; 3], [usize; 3])> {
        let resize = node.op_type == "Resize";
        let (rank, space) = (known.rank, known.view.shape.space());
        if rank < 4 || integer(node, "antialias", 0) != 0 || integer(node, "exclude_outside", 0) != 0 || !ints(node, "axes").is_empty() {
            return Err("it resizes in a way that has no layer".into());
        }
        let way = Resizing::of(node)?;
        let given = |at: usize| match node.input.get(at).filter(|name| !name.is_empty()) {
            Some(name) => self.numbers(name),
            None => Ok(Vec::new()),
        };
        let factors = given(if resize { 2 } else { 1 })?;
        let lengths = if factors.is_empty() && resize { given(3)? } else { Vec::new() };
        let (mut scales, mut sizes) = ([1f32; 3], space);
        let numbers = if factors.is_empty() { &lengths } else { &factors };
        let channels = if factors.is_empty() { known.view.shape.c as f64 } else { 1.0 };
        if numbers.len() != rank || numbers[1] != channels || (!factors.is_empty() && numbers[0] != 1.0) {
            return Err("it resizes channels, or its scales are unknown".into());
        }
        for (axis, number) in numbers[2..].iter().enumerate().map(|(n, number)| (n + 5 - rank, number)) {
            (scales[axis], sizes[axis]) = match factors.is_empty() {
                true => ((*number / space[axis] as f64) as f32, *number as usize),
                false => (*number as f32, (space[axis] as f32 * *number as f32).floor() as usize),
            };
            if !(1.0 / 64.0..=64.0).contains(&scales[axis]) || sizes[axis] == 0 || sizes[axis] > EXTENT_MAX {
                return Err("its scale is out of bounds".into());
            }
        }
        Ok((way, scales, sizes))
    }

    pub(super) fn pad(&mut self, node: &'g NodeProto, known: Known) -> Lower<Known> {
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
}

/// How a resizing finds the place of an output voxel among the inputs, and what it takes from there.
enum Resizing {
    /// The voxel that the rounding chooses.
    Nearest { coordinates: Coordinates, rounding: fn(f32) -> f32 },
    /// Of two voxels, in proportion to how near they are.
    Linear { coordinates: Coordinates },
}

/// ONNX's `coordinate_transformation_mode`.
#[derive(Clone, Copy, PartialEq)]
enum Coordinates {
    HalfPixel,
    PytorchHalfPixel,
    Asymmetric,
    AlignCorners,
}

impl Resizing {
    fn of(node: &NodeProto) -> Lower<Self> {
        let resize = node.op_type == "Resize";
        let coordinates = match text(node, "coordinate_transformation_mode", if resize { "half_pixel" } else { "asymmetric" }) {
            "half_pixel" => Coordinates::HalfPixel,
            "pytorch_half_pixel" => Coordinates::PytorchHalfPixel,
            "asymmetric" => Coordinates::Asymmetric,
            "align_corners" => Coordinates::AlignCorners,
            other => return Err(Trouble::Here(format!("its coordinates are {other}"))),
        };
        match text(node, "mode", "nearest") {
            "linear" | "bilinear" | "trilinear" => Ok(Self::Linear { coordinates }),
            "nearest" => {
                let rounding: fn(f32) -> f32 = match text(node, "nearest_mode", if resize { "round_prefer_floor" } else { "floor" }) {
                    "floor" => f32::floor,
                    "ceil" => f32::ceil,
                    "round_prefer_ceil" => |x| (x + 0.5).floor(),
                    _ => |x| (x - 0.5).ceil(),
                };
                Ok(Self::Nearest { coordinates, rounding })
            }
            other => Err(Trouble::Here(format!("its mode is {other}"))),
        }
    }

    /// How often it repeats each voxel, if that is all it does.
    fn repeats(&self, scales: [f32; 3]) -> Option<[usize; 3]> {
        let Self::Nearest { .. } = self else { return None };
        let mut by = [1; 3];
        for (by, scale) in by.iter_mut().zip(scales) {
            if scale.fract() != 0.0 || scale < 1.0 {
                return None;
            }
            *by = scale as usize;
            // What happens to some voxels at the start happens to all.
            let some = self.places(8, 8 * *by, scale);
            if some.iter().enumerate().any(|(n, place)| place.at[0] != n / *by) {
                return None;
            }
        }
        Some(by)
    }

    /// Where each of `to` voxels lies among `from`, in the floats of ONNX Runtime.
    fn places(&self, from: usize, to: usize, scale: f32) -> Vec<Between> {
        let last = (from - 1) as f32;
        let (Self::Nearest { coordinates, .. } | Self::Linear { coordinates }) = self;
        let place = |n: usize| {
            let n = n as f32;
            match coordinates {
                _ if scale == 1.0 && from == to => n,
                Coordinates::PytorchHalfPixel if to == 1 => 0.0,
                Coordinates::HalfPixel | Coordinates::PytorchHalfPixel => (n + 0.5) / scale - 0.5,
                Coordinates::Asymmetric => n / scale,
                Coordinates::AlignCorners if to == 1 => 0.0,
                Coordinates::AlignCorners => n * last / (to - 1) as f32,
            }
        };
        let between = |n: usize| match self {
            Self::Nearest { rounding, .. } => {
                let at = rounding(place(n)).clamp(0.0, last) as usize;
                Between { at: [at, at], weight: [1.0, 0.0] }
            }
            Self::Linear { .. } => {
                let place = place(n).clamp(0.0, last);
                let at = [place as usize, (place as usize + 1).min(from - 1)];
                let far = if at[0] == at[1] { 0.0 } else { place - at[0] as f32 };
                Between { at, weight: [1.0 - far, far] }
            }
        };
        (0..to).map(between).collect()
    }
}
