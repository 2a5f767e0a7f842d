//! What the attributes of ONNX nodes say: numbers, windows, and functions of one number.

use tract_onnx::pb::NodeProto;

use super::kernels::graph::Window;
use super::layers::{Lower, Trouble};

fn attribute<'n>(node: &'n NodeProto, name: &str) -> Option<&'n tract_onnx::pb::AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name == name)
}

pub(super) fn integer(node: &NodeProto, name: &str, default: i64) -> i64 {
    attribute(node, name).map_or(default, |attribute| attribute.i)
}

pub(super) fn number(node: &NodeProto, name: &str, default: f32) -> f32 {
    attribute(node, name).map_or(default, |attribute| attribute.f)
}

pub(super) fn ints(node: &NodeProto, name: &str) -> Vec<i64> {
    attribute(node, name).map_or_else(Vec::new, |attribute| attribute.ints.clone())
}

pub(super) fn numbers(node: &NodeProto, name: &str) -> Vec<f32> {
    attribute(node, name).map_or_else(Vec::new, |attribute| attribute.floats.clone())
}

pub(super) fn text<'n>(node: &'n NodeProto, name: &str, default: &'n str) -> &'n str {
    attribute(node, name).and_then(|attribute| std::str::from_utf8(&attribute.s).ok()).unwrap_or(default)
}

pub(super) fn window(node: &NodeProto, space: [usize; 3], rank: usize) -> Lower<Window> {
    let mut kernel = [1; 3];
    let shape = ints(node, "kernel_shape");
    if rank < 4 || shape.len() != rank - 2 || shape.iter().any(|k| *k < 1) {
        return Err("its kernel does not fit its input".into());
    }
    for (to, from) in kernel[5 - rank..].iter_mut().zip(&shape) {
        *to = *from as usize;
    }
    sized_window(node, kernel, space, rank)
}

pub(super) fn sized_window(node: &NodeProto, kernel: [usize; 3], space: [usize; 3], rank: usize) -> Lower<Window> {
    let spatial = rank - 2;
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

/// Where a transposed convolution puts its outputs.
pub(super) struct Transposed {
    pub stride: [usize; 3],
    pub dilation: [usize; 3],
    /// Outputs cut off before the first one.
    pub before: [usize; 3],
    pub output: [usize; 3],
}

/// As ONNX's `ConvTranspose` defines it; where the shape of the output is given, padding is shared out as ONNX Runtime does.
pub(super) fn transposed_window(node: &NodeProto, kernel: [usize; 3], space: [usize; 3], rank: usize) -> Lower<Transposed> {
    let spatial = rank - 2;
    let list = |name: &str, default: i64, count: usize| -> Lower<Vec<i64>> {
        let values = ints(node, name);
        match values.len() {
            0 => Ok(vec![default; count]),
            len if len == count && values.iter().all(|value| *value >= 0) => Ok(values),
            _ => Err(Trouble::Here(format!("its {name}"))),
        }
    };
    let (strides, dilations) = (list("strides", 1, spatial)?, list("dilations", 1, spatial)?);
    let (pads, more) = (list("pads", 0, 2 * spatial)?, list("output_padding", 0, spatial)?);
    let shape = ints(node, "output_shape");
    let shape = if shape.len() == rank { &shape[2..] } else { &shape };
    let way = text(node, "auto_pad", "NOTSET");
    let same = way.starts_with("SAME");
    if strides.contains(&0) || dilations.contains(&0) || !matches!(way, "NOTSET" | "VALID" | "SAME_UPPER" | "SAME_LOWER") {
        return Err("its strides, dilations or padding".into());
    }
    if !shape.is_empty() && shape.len() != spatial {
        return Err("its output shape".into());
    }
    let mut all = Transposed { stride: [1; 3], dilation: [1; 3], before: [0; 3], output: [1; 3] };
    for n in 0..spatial {
        let axis = 3 - spatial + n;
        let full = strides[n] * (space[axis] as i64 - 1) + (kernel[axis] as i64 - 1) * dilations[n] + 1 + more[n];
        let wanted = if same { Some(space[axis] as i64 * strides[n]) } else { None };
        let (before, output) = match shape.get(n).copied().or(wanted) {
            None if way == "VALID" => (0, full),
            None => (pads[n], full - pads[n] - pads[spatial + n]),
            Some(output) => {
                let cut = (full - output).max(0);
                (if way == "SAME_UPPER" { cut / 2 } else { cut - cut / 2 }, output)
            }
        };
        if output < 1 || output + before > full {
            return Err("its output shape".into());
        }
        all.stride[axis] = strides[n] as usize;
        all.dilation[axis] = dilations[n] as usize;
        all.before[axis] = before as usize;
        all.output[axis] = output as usize;
    }
    Ok(all)
}

/// Elementwise operators. Exponentials are computed in `f64`, so that their bytes do not hang on a library's last bit.
pub(super) fn function(node: &NodeProto) -> impl Fn(f32) -> f32 + use<> {
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
