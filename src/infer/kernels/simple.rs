//! Layers that are no convolution: each computes rows of its output, and moves bytes more than it computes.

use std::sync::Arc;

use super::Kernel;
use super::conv::whole;
use super::graph::{Between, Map, Quant, Shape, Window};
use super::memory::Pointers;

/// One tensor of the arena as part of a view.
#[derive(Clone)]
pub(super) struct SourcePart {
    pub offset: usize,
    /// Of the tensor, before it is enlarged.
    pub shape: Shape,
    pub up: [usize; 3],
    pub map: Option<Map>,
}

/// A view, placed in the arena.
#[derive(Clone)]
pub(super) struct Source {
    pub parts: Vec<SourcePart>,
    pub channels: usize,
}

impl Source {
    pub(super) fn plain(&self) -> bool {
        matches!(self.parts.as_slice(), [SourcePart { up: [1, 1, 1], map: None, .. }])
    }

    /// Where the tensor of a plain view lies.
    pub(super) fn offset(&self) -> usize {
        self.parts[0].offset
    }

    /// Bytes of scratch that [`Source::row`] needs.
    pub(super) fn scratch(&self) -> usize {
        let mapped = self.parts.iter().filter(|part| part.map.is_some());
        mapped.map(|part| part.shape.w * part.shape.c + 64).max().unwrap_or(0)
    }

    /// Writes the first `columns` pixels of row `(d, h)` to `to`.
    ///
    /// # Safety
    /// The arena is as planned, `to` has room for the pixels and `scratch` for [`Source::scratch`] bytes.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn row(
        &self,
        d: usize,
        h: usize,
        columns: usize,
        to: *mut u8,
        scratch: *mut u8,
        kernel: Kernel,
        memory: Pointers,
    ) {
        let mut first = 0;
        for part in &self.parts {
            let channels = part.shape.c;
            let row = (d / part.up[0] * part.shape.h + h / part.up[1]) * part.shape.w * channels;
            let repeat = part.up[2];
            let needed = columns.div_ceil(repeat);
            // SAFETY: row `(d, h)` of the view lies inside the tensor; the rest is the caller's promise.
            unsafe {
                let mut from = memory.at(part.offset).add(row).cast_const();
                let whole = self.parts.len() == 1 && repeat == 1;
                if let Some(map) = &part.map {
                    let mapped = if whole { to } else { scratch };
                    map_bytes(kernel, map, from, mapped, needed * channels);
                    from = mapped;
                } else if whole {
                    from.copy_to_nonoverlapping(to, columns * channels);
                }
                if !whole {
                    scatter(from, channels, repeat, to.add(first), self.channels, columns);
                }
            }
            first += channels;
        }
    }
}

/// Copies pixels of `channels` bytes, each `repeat` times, to places `stride` bytes apart.
unsafe fn scatter(from: *const u8, channels: usize, repeat: usize, to: *mut u8, stride: usize, pixels: usize) {
    // SAFETY: the caller gives rows of that many pixels.
    unsafe {
        match channels {
            8 => scatter_as::<8>(from, 1, repeat, to, stride, pixels),
            c if c % 16 == 0 => scatter_as::<16>(from, c / 16, repeat, to, stride, pixels),
            c if c % 8 == 0 => scatter_as::<8>(from, c / 8, repeat, to, stride, pixels),
            c if c % 4 == 0 => scatter_as::<4>(from, c / 4, repeat, to, stride, pixels),
            c => scatter_as::<1>(from, c, repeat, to, stride, pixels),
        }
    }
}

unsafe fn scatter_as<const N: usize>(
    mut from: *const u8,
    pieces: usize,
    repeat: usize,
    mut to: *mut u8,
    stride: usize,
    pixels: usize,
) {
    let mut done = 0;
    while done < pixels {
        let copies = repeat.min(pixels - done);
        for _ in 0..copies {
            for piece in 0..pieces {
                // SAFETY: as `scatter`.
                unsafe { to.add(piece * N).cast::<[u8; N]>().write_unaligned(from.add(piece * N).cast::<[u8; N]>().read_unaligned()) };
            }
            // SAFETY: the address is used for the next pixel only if there is one.
            to = to.wrapping_add(stride);
        }
        done += copies;
        from = from.wrapping_add(pieces * N);
    }
}

unsafe fn map_bytes(kernel: Kernel, map: &[u8; 256], from: *const u8, to: *mut u8, count: usize) {
    #[cfg(target_arch = "x86_64")]
    if kernel == Kernel::Vnni && super::x86_64::has_vbmi() {
        // SAFETY: the processor has VBMI.
        unsafe { super::x86_64::map_bytes(map, from, to, count) };
        return;
    }
    let _ = kernel;
    for at in 0..count {
        // SAFETY: the caller gives `count` bytes on both sides.
        unsafe { to.add(at).write(map[usize::from(*from.add(at))]) };
    }
}

/// A planned layer of this file. Offsets are places in the arena.
pub(super) enum Work {
    Quantize { input: usize, quant: Quant },
    MaxPool { from: usize, input: Shape, window: Window },
    AveragePool { from: usize, input: Shape, window: Window, count_padding: bool, quant: [Quant; 2] },
    GlobalAverage { from: usize, input: Shape, quant: [Quant; 2] },
    Add { from: [usize; 2], quant: [Quant; 3], low: u8 },
    Multiply { from: [usize; 2], whole: bool, quant: [Quant; 3] },
    Resample { from: usize, input: Shape, axes: [Vec<Between>; 3], quant: [Quant; 2], cut: bool },
    Softmax { from: usize, table: Arc<[f32; 256]>, quant: Quant },
    Gather { source: Source },
    Pad { from: usize, input: Shape, before: [usize; 3], value: u8 },
    Dequantize { from: usize, output: usize, meaning: Meaning },
}

/// What bytes mean where they leave the network.
pub(super) enum Meaning {
    /// Real numbers of a scale.
    Linear(Quant),
    /// Any function of the byte.
    Table(Arc<[f32; 256]>),
    /// Parts of a whole along the channels; the table holds exponentials of differences.
    Softmax(Arc<[f32; 256]>),
}

impl Meaning {
    /// A table is looked up one byte at a time, a line computed eight at a time: to the same bits, or it stays a table.
    pub(super) fn new(table: &Arc<[f32; 256]>, softmax: bool, quant: Quant) -> Self {
        let linear = || (0..=255).all(|byte: u8| quant.real(byte).to_bits() == table[usize::from(byte)].to_bits());
        match softmax {
            true => Self::Softmax(Arc::clone(table)),
            false if linear() => Self::Linear(quant),
            false => Self::Table(Arc::clone(table)),
        }
    }
}

/// One layer of this file, planned.
pub(super) struct Simple {
    pub work: Work,
    /// Of the output (of the input, where that is floats).
    pub shape: Shape,
    pub out: usize,
    pub kernel: Kernel,
}

/// Rows of one unit: enough to be worth a thread's while.
const UNIT_BYTES: usize = 64 << 10;

impl Simple {
    pub(super) fn describe(&self) -> &'static str {
        match self.work {
            Work::Quantize { .. } => "quantize",
            Work::MaxPool { .. } => "max pool",
            Work::AveragePool { .. } => "average pool",
            Work::GlobalAverage { .. } => "global average",
            Work::Add { .. } => "add",
            Work::Multiply { .. } => "multiply",
            Work::Resample { .. } => "resample",
            Work::Softmax { .. } => "softmax",
            Work::Gather { .. } => "gather",
            Work::Pad { .. } => "pad",
            Work::Dequantize { meaning: Meaning::Softmax(_), .. } => "softmax",
            Work::Dequantize { .. } => "dequantize",
        }
    }

    pub(super) fn scratch(&self) -> usize {
        match &self.work {
            Work::MaxPool { input, .. } => input.w * input.c + 64,
            Work::Gather { source } => source.scratch(),
            Work::Resample { input, .. } => 4 * input.w * input.c,
            Work::Quantize { .. } | Work::Dequantize { .. } => 4 * self.shape.w,
            _ => 0,
        }
    }

    fn rows_each(&self) -> usize {
        (UNIT_BYTES / (self.shape.w * self.shape.c).max(1)).max(1)
    }

    pub(super) fn units(&self) -> usize {
        match self.work {
            Work::GlobalAverage { .. } => 1,
            _ => (self.shape.d * self.shape.h).div_ceil(self.rows_each()),
        }
    }

    /// Computes one unit.
    ///
    /// # Safety
    /// As `Conv::run`; the inputs and outputs have the shapes of the plan.
    pub(super) unsafe fn run(&self, unit: usize, thread: usize, memory: Pointers, edge: &Edge<'_>) {
        // SAFETY: the caller's promise; the wide version only where the processor has AVX2.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if self.kernel != Kernel::Portable {
                return self.run_avx2(unit, thread, memory, edge);
            }
            self.run_rows(unit, thread, memory, edge);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn run_avx2(&self, unit: usize, thread: usize, memory: Pointers, edge: &Edge<'_>) {
        // SAFETY: as `run`.
        unsafe { self.run_rows(unit, thread, memory, edge) }
    }

    #[inline(always)]
    unsafe fn run_rows(&self, unit: usize, thread: usize, memory: Pointers, edge: &Edge<'_>) {
        let each = self.rows_each();
        let rows = unit * each..((unit + 1) * each).min(self.shape.d * self.shape.h);
        let Shape { h: height, w, c, .. } = self.shape;
        // SAFETY: tensors lie at their planned places, and this unit alone writes these rows of the output.
        unsafe {
            let tensor = |offset: usize, bytes: usize| std::slice::from_raw_parts(memory.at(offset).cast_const(), bytes);
            if let Work::GlobalAverage { from, input, quant } = &self.work {
                let out = std::slice::from_raw_parts_mut(memory.at(self.out), c);
                return global_average(tensor(*from, input.bytes()), *quant, out);
            }
            for row in rows {
                let (d, h) = (row / height, row % height);
                let at = row * w * c;
                let same = |offset: usize| &tensor(offset, at + w * c)[at..];
                let out = || std::slice::from_raw_parts_mut(memory.at(self.out).add(at), w * c);
                match &self.work {
                    Work::Quantize { input, quant } => {
                        let words = std::slice::from_raw_parts_mut(memory.scratch(thread).cast(), w);
                        quantize(edge.inputs[*input], self.shape, row, *quant, self.kernel, words, out());
                    }
                    Work::MaxPool { from, input, window } => {
                        let scratch = std::slice::from_raw_parts_mut(memory.scratch(thread), input.w * input.c);
                        max_pool(tensor(*from, input.bytes()), *input, window, [d, h], w, scratch, out());
                    }
                    Work::AveragePool { from, input, window, count_padding, quant } => {
                        average_pool(tensor(*from, input.bytes()), *input, window, *count_padding, *quant, [d, h], c, out());
                    }
                    Work::GlobalAverage { .. } => {}
                    Work::Add { from, quant, low } => add(same(from[0]), same(from[1]), quant, *low, out()),
                    Work::Multiply { from, whole, quant } => {
                        if *whole {
                            multiply(same(from[0]), same(from[1]), quant, out());
                        } else {
                            let factors = tensor(from[1], c);
                            let pixels = same(from[0]).chunks_exact(c).zip(out().chunks_exact_mut(c));
                            pixels.for_each(|(pixel, out)| multiply(pixel, factors, quant, out));
                        }
                    }
                    Work::Resample { from, input, axes, quant, cut } => {
                        let blend = std::slice::from_raw_parts_mut(memory.scratch(thread).cast(), input.w * c);
                        resample(tensor(*from, input.bytes()), *input, axes, *quant, *cut, [d, h], blend, out());
                    }
                    Work::Softmax { from, table, quant } => {
                        for (pixel, out) in same(*from).chunks_exact(c).zip(out().chunks_exact_mut(c)) {
                            let (largest, sum) = whole_of(pixel, table);
                            for (byte, out) in pixel.iter().zip(out) {
                                *out = quant.byte(table[usize::from(largest - byte)] / sum);
                            }
                        }
                    }
                    Work::Gather { source } => {
                        let to = out().as_mut_ptr();
                        source.row(d, h, w, to, memory.scratch(thread), self.kernel, memory);
                    }
                    Work::Pad { from, input, before, value } => {
                        let out = out();
                        out.fill(*value);
                        let inside = |at: usize, axis: usize, extent: usize| {
                            at.checked_sub(before[axis]).filter(|at| *at < extent)
                        };
                        if let (Some(d), Some(h)) = (inside(d, 0, input.d), inside(h, 1, input.h)) {
                            let bytes = input.w * c;
                            let from = &tensor(*from, input.bytes())[(d * input.h + h) * bytes..][..bytes];
                            out[before[2] * c..][..bytes].copy_from_slice(from);
                        }
                    }
                    Work::Dequantize { from, output, meaning } => {
                        let at = row * w;
                        let from = &tensor(*from, self.shape.bytes())[at * c..][..w * c];
                        let words = std::slice::from_raw_parts_mut(memory.scratch(thread).cast(), w);
                        dequantize(from, meaning, self.kernel, words, edge.outputs[*output].add(at), self.shape.voxels(), c);
                    }
                }
            }
        }
    }
}

/// The float inputs and outputs of a run, each `[channel, depth, row, column]`.
pub(super) struct Edge<'a> {
    pub inputs: &'a [&'a [f32]],
    pub outputs: &'a [*mut f32],
}

// SAFETY: the pointers are to outputs borrowed exclusively for the run, and each unit writes rows of its own.
unsafe impl Sync for Edge<'_> {}

/// Floats of a row to bytes. Four channels make one word of each pixel: the bytes of one channel lie apart.
#[inline(always)]
fn quantize(input: &[f32], shape: Shape, row: usize, quant: Quant, kernel: Kernel, words: &mut [u32], out: &mut [u8]) {
    let zero = f32::from(quant.zero);
    let (low, high) = (-zero, 255.0 - zero);
    let byte = |real: f32| (whole((real / quant.scale).max(low).min(high)) + i32::from(quant.zero)) as u32;
    let channel = |channel: usize| &input[(channel * shape.d * shape.h + row) * shape.w..][..shape.w];
    if shape.c == 1 {
        return out.iter_mut().zip(channel(0)).for_each(|(out, real)| *out = byte(*real) as u8);
    }
    for first in (0..shape.c).step_by(4) {
        let lanes = (shape.c - first).min(4);
        let done = quantized(kernel, lanes, shape.w, |lane| channel(first + lane), quant, &mut out[first..], shape.c);
        let words = &mut words[done..];
        words.fill(0);
        for lane in 0..lanes {
            words.iter_mut().zip(&channel(first + lane)[done..]).for_each(|(word, real)| *word |= byte(*real) << (8 * lane));
        }
        for (pixel, word) in out.chunks_exact_mut(shape.c).skip(done).zip(&*words) {
            let bytes = word.to_le_bytes();
            match pixel[first..].first_chunk_mut::<4>() {
                Some(whole) => *whole = bytes,
                None => pixel[first..].copy_from_slice(&bytes[..lanes]),
            }
        }
    }
}

/// Four channels on the processor's own instructions, where that is worth it; gives the number of pixels done.
#[inline(always)]
fn quantized<'a>(
    kernel: Kernel,
    lanes: usize,
    pixels: usize,
    channel: impl Fn(usize) -> &'a [f32],
    quant: Quant,
    out: &mut [u8],
    stride: usize,
) -> usize {
    #[cfg(target_arch = "aarch64")]
    if lanes == 4 && kernel != Kernel::Portable {
        let channels = std::array::from_fn(|lane| channel(lane)[..pixels].as_ptr());
        assert!(out.len() + stride >= pixels * stride + lanes, "room for each pixel");
        // SAFETY: the lengths were just checked.
        return unsafe { super::aarch64::quantize_four(channels, pixels, quant, out.as_mut_ptr(), stride) };
    }
    let _ = (kernel, lanes, pixels, channel, quant, out, stride);
    0
}

#[inline(always)]
fn max_into(out: &mut [u8], bytes: &[u8]) {
    out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = (*out).max(*byte));
}

#[inline(always)]
fn max_pool(
    from: &[u8],
    input: Shape,
    window: &Window,
    [d, h]: [usize; 2],
    columns: usize,
    tallest: &mut [u8],
    out: &mut [u8],
) {
    let c = input.c;
    // Over depth and rows first, whole rows at a time; then over columns.
    let mut any = false;
    for kd in 0..window.kernel[0] {
        for kh in 0..window.kernel[1] {
            let depth = (d * window.stride[0] + kd * window.dilation[0]).checked_sub(window.before[0]);
            let row = (h * window.stride[1] + kh * window.dilation[1]).checked_sub(window.before[1]);
            let (Some(depth), Some(row)) = (depth.filter(|d| *d < input.d), row.filter(|h| *h < input.h)) else {
                continue;
            };
            let bytes = &from[(depth * input.h + row) * input.w * c..][..input.w * c];
            if any { max_into(tallest, bytes) } else { tallest.copy_from_slice(bytes) }
            any = true;
        }
    }
    if !any {
        tallest.fill(0);
    }
    let pairs = window.kernel[2] == 2 && window.stride[2] == 2 && window.before[2] == 0 && 2 * columns <= input.w;
    match (pairs, c) {
        (true, 8) => pairs_of::<8>(tallest, out),
        (true, 16) => pairs_of::<16>(tallest, out),
        (true, 32) => pairs_of::<32>(tallest, out),
        _ => {
            for (column, out) in out.chunks_exact_mut(c).enumerate() {
                out.fill(0);
                for kw in 0..window.kernel[2] {
                    let at = (column * window.stride[2] + kw * window.dilation[2]).checked_sub(window.before[2]);
                    if let Some(at) = at.filter(|at| *at < input.w) {
                        max_into(out, &tallest[at * c..][..c]);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn pairs_of<const C: usize>(row: &[u8], out: &mut [u8]) {
    for (out, pair) in out.as_chunks_mut::<C>().0.iter_mut().zip(row.chunks_exact(2 * C)) {
        for channel in 0..C {
            out[channel] = pair[channel].max(pair[C + channel]);
        }
    }
}

/// As ONNX Runtime's `QLinearAveragePool`: the sum of the real numbers, in the order of the taps, divided, and rounded
/// with the zero point already added.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn average_pool(
    from: &[u8],
    input: Shape,
    window: &Window,
    count_padding: bool,
    [quant, to]: [Quant; 2],
    [d, h]: [usize; 2],
    c: usize,
    out: &mut [u8],
) {
    const CHUNK: usize = 16;
    let range = |at: usize, axis: usize, extent: usize| {
        let start = at * window.stride[axis];
        let end = (start + window.kernel[axis]).saturating_sub(window.before[axis]).min(extent);
        start.saturating_sub(window.before[axis])..end
    };
    let (depths, rows) = (range(d, 0, input.d), range(h, 1, input.h));
    for (column, out) in out.chunks_exact_mut(c).enumerate() {
        let columns = range(column, 2, input.w);
        let seen = depths.len() * rows.len() * columns.len();
        let count = if count_padding { window.taps() } else { seen } as f32;
        for first in (0..c).step_by(CHUNK) {
            let lanes = CHUNK.min(c - first);
            let mut sums = [0f32; CHUNK];
            for d in depths.clone() {
                for h in rows.clone() {
                    for w in columns.clone() {
                        let bytes = &from[((d * input.h + h) * input.w + w) * c + first..][..lanes];
                        for (sum, byte) in sums.iter_mut().zip(bytes) {
                            *sum += quant.real(*byte);
                        }
                    }
                }
            }
            for (out, sum) in out[first..].iter_mut().zip(&sums[..lanes]) {
                *out = with_zero_added(sum / count, to);
            }
        }
    }
}

/// Four rows become one of floats, then its columns are blended. Products and sums are separate operations in one order,
/// so all processors agree; where the weights are quarters, as in doubling, everything up to the rounding is exact.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn resample(
    from: &[u8],
    input: Shape,
    [depths, rows, columns]: &[Vec<Between>; 3],
    [quant, to]: [Quant; 2],
    cut: bool,
    [d, h]: [usize; 2],
    blend: &mut [f32],
    out: &mut [u8],
) {
    let c = input.c;
    let (depth, row) = (depths[d], rows[h]);
    let line = |d: usize, h: usize| &from[(depth.at[d] * input.h + row.at[h]) * input.w * c..][..input.w * c];
    let corners = line(0, 0).iter().zip(line(0, 1)).zip(line(1, 0).iter().zip(line(1, 1)));
    // What is cut off is cut off the network's own bytes, so those are blended, not their meanings.
    let zero = if cut { quant.offset() } else { i32::from(quant.zero) };
    let real = |byte: u8| (i32::from(byte) - zero) as f32;
    for (out, ((a, b), (c, d))) in blend.iter_mut().zip(corners) {
        let near = real(*a) * row.weight[0] + real(*b) * row.weight[1];
        let far = real(*c) * row.weight[0] + real(*d) * row.weight[1];
        *out = near * depth.weight[0] + far * depth.weight[1];
    }
    let scale = quant.scale / to.scale;
    let zero = f32::from(to.zero);
    for (out, column) in out.chunks_exact_mut(c).zip(columns) {
        let (a, b) = (&blend[column.at[0] * c..][..c], &blend[column.at[1] * c..][..c]);
        if cut {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                *out = ((a * column.weight[0] + b * column.weight[1]) as i32 + quant.offset()) as u8;
            }
            continue;
        }
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            let real = (a * column.weight[0] + b * column.weight[1]) * scale;
            *out = (whole(real.max(-zero).min(255.0 - zero)) + i32::from(to.zero)) as u8;
        }
    }
}

/// `clamp(round(real / scale + zero))` with the zero point as the network has it.
#[inline(always)]
fn with_zero_added(real: f32, quant: Quant) -> u8 {
    let offset = quant.offset() as f32;
    let value = (real / quant.scale + quant.network_zero() as f32).max(-offset).min(255.0 - offset);
    (whole(value) + quant.offset()) as u8
}

/// As MLAS's `QLinearGlobalAveragePool`: an exact sum, one scale.
#[inline(always)]
fn global_average(from: &[u8], [quant, to]: [Quant; 2], out: &mut [u8]) {
    let c = out.len();
    let voxels = from.len() / c;
    let scale = quant.scale / (to.scale * voxels as f32);
    for (channel, out) in out.iter_mut().enumerate() {
        let sum: i64 = from[channel..].iter().step_by(c).map(|byte| i64::from(*byte)).sum();
        let sum = (sum - voxels as i64 * i64::from(quant.zero)) as i32;
        let zero = f32::from(to.zero);
        *out = super::conv::requantize(sum, scale, -zero, 255.0 - zero, i32::from(to.zero));
    }
}

/// As MLAS's `QLinearAdd` on x86: two products and a fixed part, in that order.
#[inline(always)]
fn add(a: &[u8], b: &[u8], [qa, qb, to]: &[Quant; 3], low: u8, out: &mut [u8]) {
    let (ra, rb) = (qa.scale / to.scale, qb.scale / to.scale);
    let fixed = to.network_zero() as f32 - (ra * qa.network_zero() as f32 + rb * qb.network_zero() as f32);
    let offset = to.offset();
    let (oa, ob) = (qa.offset(), qb.offset());
    let (least, most) = ((i32::from(low) - offset) as f32, (255 - offset) as f32);
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        let (a, b) = ((i32::from(*a) - oa) as f32, (i32::from(*b) - ob) as f32);
        let sum = ((fixed + a * ra) + b * rb).max(least).min(most);
        *out = (whole(sum) + offset) as u8;
    }
}

/// As MLAS's `QLinearMul`: the exact product, one scale.
#[inline(always)]
fn multiply(a: &[u8], b: &[u8], [qa, qb, to]: &[Quant; 3], out: &mut [u8]) {
    let scale = qa.scale * qb.scale / to.scale;
    let zero = f32::from(to.zero);
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        let product = (i32::from(*a) - i32::from(qa.zero)) * (i32::from(*b) - i32::from(qb.zero));
        *out = super::conv::requantize(product, scale, -zero, 255.0 - zero, i32::from(to.zero));
    }
}

/// The largest byte, and the sum over the channels. The table holds exp(-difference * scale): differences are exact.
#[inline(always)]
fn whole_of(pixel: &[u8], table: &[f32; 256]) -> (u8, f32) {
    let largest = pixel.iter().copied().max().unwrap_or(0);
    (largest, pixel.iter().map(|byte| table[usize::from(largest - byte)]).sum())
}

/// Bytes of a row to floats, one channel after the other: `out` has a whole volume between them.
///
/// # Safety
/// `out` is the place of this row in an output of `c` times `voxels` floats, and nobody else writes there.
#[inline(always)]
unsafe fn dequantize(
    from: &[u8],
    meaning: &Meaning,
    kernel: Kernel,
    words: &mut [u32],
    out: *mut f32,
    voxels: usize,
    c: usize,
) {
    if let Meaning::Softmax(table) = meaning {
        for (column, pixel) in from.chunks_exact(c).enumerate() {
            let (largest, sum) = whole_of(pixel, table);
            for (channel, byte) in pixel.iter().enumerate() {
                let value = table[usize::from(largest - byte)] / sum;
                // SAFETY: the caller's promise.
                unsafe { out.add(channel * voxels + column).write(value) };
            }
        }
        return;
    }
    for first in (0..c).step_by(4) {
        let lanes = (c - first).min(4);
        // SAFETY: the caller's promise.
        let (done, out) = unsafe {
            let done = dequantized(kernel, meaning, lanes, &from[first..], words.len(), c, out.add(first * voxels), voxels);
            (done, out.add(done))
        };
        let words = &mut words[done..];
        for (word, pixel) in words.iter_mut().zip(from.chunks_exact(c).skip(done)) {
            *word = match pixel[first..].first_chunk::<4>() {
                Some(whole) => u32::from_le_bytes(*whole),
                None => pixel[first..].iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte)),
            };
        }
        for lane in 0..lanes {
            let byte = |word: u32| word >> (8 * lane) & 255;
            // SAFETY: the caller's promise.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add((first + lane) * voxels), words.len()) };
            match meaning {
                Meaning::Linear(quant) => {
                    let zero = i32::from(quant.zero);
                    out.iter_mut().zip(&*words).for_each(|(o, word)| *o = (byte(*word) as i32 - zero) as f32 * quant.scale);
                }
                Meaning::Table(table) | Meaning::Softmax(table) => {
                    out.iter_mut().zip(&*words).for_each(|(o, word)| *o = table[byte(*word) as usize]);
                }
            }
        }
    }
}

/// As [`quantized`], the other way.
///
/// # Safety
/// Four channels of `pixels` floats at `out`, `voxels` apart.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn dequantized(
    kernel: Kernel,
    meaning: &Meaning,
    lanes: usize,
    from: &[u8],
    pixels: usize,
    stride: usize,
    out: *mut f32,
    voxels: usize,
) -> usize {
    #[cfg(target_arch = "aarch64")]
    if let (4, Meaning::Linear(quant), true) = (lanes, meaning, kernel != Kernel::Portable) {
        assert!(from.len() + stride >= pixels * stride + lanes, "all bytes of each pixel");
        // SAFETY: the bytes were just counted, the floats are the caller's promise.
        return unsafe {
            let channels = std::array::from_fn(|lane| out.add(lane * voxels));
            super::aarch64::dequantize_four(from.as_ptr(), stride, pixels, *quant, channels)
        };
    }
    let _ = (kernel, meaning, lanes, from, pixels, stride, out, voxels);
    0
}
