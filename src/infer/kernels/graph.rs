//! An integer network before it is planned: tensors, views of them, and layers.

use std::sync::Arc;

/// Extent of one activation: depth, rows, columns, channels. A 2-D network has depth 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Slices.
    pub d: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl Shape {
    /// Voxels, each of `c` channels.
    pub fn voxels(self) -> usize {
        self.d * self.h * self.w
    }

    /// Bytes of an 8-bit activation of this shape.
    pub fn bytes(self) -> usize {
        self.voxels() * self.c
    }

    /// Extents along depth, rows and columns.
    pub fn space(self) -> [usize; 3] {
        [self.d, self.h, self.w]
    }

    /// The same channels in another space.
    pub fn with_space(self, [d, h, w]: [usize; 3]) -> Self {
        Self { d, h, w, c: self.c }
    }
}

/// How bytes mean numbers: `real = scale * (byte - zero)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quant {
    /// Positive and finite.
    pub scale: f32,
    /// The byte that means 0, in the unsigned storage.
    pub zero: u8,
    /// Whether the network itself calls the bytes signed, 128 less than they are stored. Only operations that compute
    /// in floats with the bytes' own values need it, to round as others do.
    pub signed: bool,
}

impl Quant {
    /// What is added to a value of the network to store it.
    pub fn offset(self) -> i32 {
        if self.signed { 128 } else { 0 }
    }

    /// The zero point as the network gives it.
    pub fn network_zero(self) -> i32 {
        i32::from(self.zero) - self.offset()
    }

    /// The real number that a stored byte means.
    pub fn real(self, byte: u8) -> f32 {
        (i32::from(byte) - i32::from(self.zero)) as f32 * self.scale
    }

    /// The stored byte nearest to a real number, as ONNX's `QuantizeLinear` rounds; not a number becomes the lowest byte.
    pub fn byte(self, real: f32) -> u8 {
        let zero = f32::from(self.zero);
        ((real / self.scale).max(-zero).min(255.0 - zero).round_ties_even() + zero) as u8
    }
}

/// A function of one byte, as its 256 values.
pub type Map = Arc<[u8; 256]>;

/// One tensor as a layer sees it: enlarged by repeating voxels, and each byte passed through a map.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Index into [`Graph::tensors`].
    pub tensor: usize,
    /// How often each voxel is repeated along depth, rows, columns.
    pub up: [usize; 3],
    /// What each byte becomes.
    pub map: Option<Map>,
}

/// What a layer reads: parts side by side along the channels. Concatenation and nearest resizing cost nothing here;
/// convolutions read views as they are, other layers have them written out first.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// From the first channel to the last.
    pub parts: Vec<Part>,
    /// Of the whole.
    pub shape: Shape,
    /// Of the whole, after the maps.
    pub quant: Quant,
}

impl View {
    /// A whole tensor as it is.
    pub fn of(tensor: usize, shape: Shape, quant: Quant) -> Self {
        Self { parts: vec![Part { tensor, up: [1; 3], map: None }], shape, quant }
    }

    /// The tensor, if the view is just that.
    pub fn plain(&self) -> Option<usize> {
        match self.parts.as_slice() {
            [Part { tensor, up: [1, 1, 1], map: None }] => Some(*tensor),
            _ => None,
        }
    }

    /// The view with every byte passed through `map`.
    #[must_use]
    pub fn mapped(&self, map: &[u8; 256], quant: Quant) -> Self {
        let identity = map.iter().enumerate().all(|(byte, to)| byte == usize::from(*to));
        let mut view = Self { quant, ..self.clone() };
        if !identity {
            for part in &mut view.parts {
                let before = part.map.take();
                part.map = Some(Arc::new(std::array::from_fn(|byte| {
                    map[usize::from(before.as_ref().map_or(byte as u8, |before| before[byte]))]
                })));
            }
        }
        view
    }

    /// The view with every voxel repeated.
    #[must_use]
    pub fn enlarged(&self, by: [usize; 3]) -> Self {
        let mut view = self.clone();
        for part in &mut view.parts {
            part.up = std::array::from_fn(|axis| part.up[axis] * by[axis]);
        }
        let space = self.shape.space();
        view.shape = self.shape.with_space(std::array::from_fn(|axis| space[axis] * by[axis]));
        view
    }
}

/// A window that slides over the input: kernel, stride, dilation and padding along depth, rows, columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Taps.
    pub kernel: [usize; 3],
    /// Steps between outputs.
    pub stride: [usize; 3],
    /// Steps between taps.
    pub dilation: [usize; 3],
    /// Padding before the first voxel.
    pub before: [usize; 3],
    /// Padding after the last voxel.
    pub after: [usize; 3],
}

impl Window {
    /// One voxel at a time.
    pub const POINT: Self =
        Self { kernel: [1; 3], stride: [1; 3], dilation: [1; 3], before: [0; 3], after: [0; 3] };

    /// The window with as much more padding at the end as gives an output to what is left over there, unless that lay in the
    /// padding alone: ONNX's `ceil_mode`.
    #[must_use]
    pub fn rounded_up(mut self, input: [usize; 3]) -> Self {
        for axis in 0..3 {
            let reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1;
            let padded = input[axis] + self.before[axis] + self.after[axis];
            let left = padded.saturating_sub(reach) % self.stride[axis];
            if left > 0 && padded - reach - left + self.stride[axis] < input[axis] + self.before[axis] {
                self.after[axis] += self.stride[axis] - left;
            }
        }
        self
    }

    /// Taps of the whole kernel.
    pub fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// Extent of the output over an input, or `None` if the kernel is larger than the padded input.
    pub fn over(&self, input: [usize; 3]) -> Option<[usize; 3]> {
        let mut output = [0; 3];
        for axis in 0..3 {
            let reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1;
            let padded = input[axis] + self.before[axis] + self.after[axis];
            output[axis] = padded.checked_sub(reach)? / self.stride[axis] + 1;
        }
        Some(output)
    }
}

/// A place between two voxels of an axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Between {
    /// The two voxels.
    pub at: [usize; 2],
    /// How much of each.
    pub weight: [f32; 2],
}

/// How accumulators become bytes: `clamp(round(acc * scale[channel]) + zero, low, high)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Requant {
    /// One for each output channel.
    pub scale: Vec<f32>,
    /// Zero point of the output.
    pub zero: u8,
    /// Smallest byte (a fused ReLU raises it to `zero`).
    pub low: u8,
    /// Largest byte.
    pub high: u8,
}

/// What a layer computes.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// Takes floats of the given network input, `[channel, depth, row, column]`, to bytes.
    Quantize {
        /// Which input.
        input: usize,
    },
    /// A convolution.
    Conv {
        /// Where it looks.
        window: Window,
        /// Groups of channels that do not see each other.
        groups: usize,
        /// `[output channel][tap][input channel of its group]`.
        weights: Arc<Vec<i8>>,
        /// One for each output channel, in units of input scale times weight scale.
        bias: Vec<i32>,
        /// To bytes.
        requant: Requant,
    },
    /// A transposed convolution: at each place of a window over the input, a block of outputs.
    Spread {
        /// Where a whole block looks; its stride is 1.
        window: Window,
        /// Extent of the block: the stride of the transposed convolution. The last blocks may reach beyond the output.
        block: [usize; 3],
        /// Taps that the network gives to each input voxel, for counting work.
        taps: usize,
        /// Groups of channels that do not see each other.
        groups: usize,
        /// `[voxel of the block][output channel][tap][input channel of its group]`, zero where a voxel sees no tap.
        weights: Arc<Vec<i8>>,
        /// One for each output channel.
        bias: Vec<i32>,
        /// To bytes.
        requant: Requant,
    },
    /// The largest byte of each window; padding never wins.
    MaxPool(Window),
    /// The mean of each window.
    AveragePool {
        /// Where it looks.
        window: Window,
        /// Whether padding counts as zeros.
        count_padding: bool,
    },
    /// The mean of each channel.
    GlobalAveragePool,
    /// The sum of two tensors of one shape.
    Add {
        /// Smallest byte (a fused ReLU raises it).
        low: u8,
    },
    /// The product of two tensors of one shape, or with a second tensor of one voxel that scales channels.
    Multiply,
    /// Resized by interpolation between two voxels along each axis.
    Resample {
        /// For each output voxel, which and how much of each.
        axes: [Vec<Between>; 3],
        /// Whether fractions of the network's bytes are cut off instead of rounded.
        cut: bool,
    },
    /// Each channel's part of the whole: the table holds exponentials of differences of bytes.
    Softmax(Arc<[f32; 256]>),
    /// The view written out as a tensor.
    Gather,
    /// A frame of one value around the input.
    Pad {
        /// Before the first voxel.
        before: [usize; 3],
        /// The byte of the frame.
        value: u8,
    },
    /// Bytes to floats of the given network output, `[channel, depth, row, column]`, through a table.
    Dequantize {
        /// Which output.
        output: usize,
        /// What each byte means.
        table: Arc<[f32; 256]>,
        /// Whether the channels of a voxel are then brought to sum 1 (the table holds exponentials of differences).
        softmax: bool,
    },
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Name of the ONNX node that asked for it.
    pub name: String,
    /// What it computes.
    pub kind: Kind,
    /// What it reads.
    pub inputs: Vec<View>,
    /// What it writes; `None` for a network output.
    pub output: Option<View>,
}

/// An integer network: layers in the order of running.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    /// Shapes of the tensors.
    pub tensors: Vec<Shape>,
    /// In the order of running.
    pub layers: Vec<Layer>,
    /// Shapes of the float inputs.
    pub inputs: Vec<Shape>,
    /// Shapes of the float outputs.
    pub outputs: Vec<Shape>,
}

impl Graph {
    /// Adds a layer that writes a new tensor, and gives the view of it.
    pub fn push(&mut self, name: &str, kind: Kind, inputs: Vec<View>, shape: Shape, quant: Quant) -> View {
        self.tensors.push(shape);
        let output = View::of(self.tensors.len() - 1, shape, quant);
        self.layers.push(Layer { name: name.into(), kind, inputs, output: Some(output.clone()) });
        output
    }

    /// The view as one plain tensor, written out by a layer if need be.
    pub fn plain(&mut self, name: &str, view: &View) -> View {
        if view.plain().is_some() {
            return view.clone();
        }
        let same = self.layers.iter().find(|layer| layer.kind == Kind::Gather && layer.inputs[0] == *view);
        match same {
            Some(layer) => layer.output.clone().expect("a gather writes a tensor"),
            None => self.push(name, Kind::Gather, vec![view.clone()], view.shape, view.quant),
        }
    }
}
