//! Convolution: the input is brought, padded and merged, into a ring of planes that stays in the cache, and from there
//! every layer looks alike to the inner loop: a list of offsets, each to four bytes that meet four weights of each channel.
//!
//! The bytes of neighbouring columns follow each other, so a row of taps is one run of bytes whatever the number of
//! channels, and nothing is multiplied for padding channels to a round number: one channel of three taps takes one step.

use super::Kernel;
use super::graph::{Requant, Shape, Window};
use super::memory::Pointers;
use super::pack::{Packed, Step};
use super::simple::Source;

/// What a row kernel computes: `pixels` neighbouring outputs of up to 8 or 16 channels.
pub(super) struct RowJob {
    /// Input of the first pixel; step `s` reads four bytes at `offsets[quads + s]` from it.
    pub base: *const u8,
    pub offsets: *const u32,
    /// Runs of sixteen bytes before the steps, each with an offset and four steps' weights (aarch64 only).
    #[cfg_attr(not(target_arch = "aarch64"), allow(dead_code))]
    pub quads: usize,
    pub steps: usize,
    /// Steps whose 16-bit products may be summed before they are widened (AVX2 only).
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
    pub group: usize,
    /// `[step][channel][4]`.
    pub weights: *const i8,
    pub bias: *const i32,
    pub scale: *const f32,
    /// Bytes from the input of one pixel to that of the next.
    pub pixel: usize,
    pub pixels: usize,
    pub out: *mut u8,
    pub out_pixel: usize,
    /// Channels to be written.
    pub lanes: usize,
    pub zero: i32,
    /// Bounds of the result before the zero point is added.
    pub low: f32,
    pub high: f32,
}

pub(super) type RowKernel = unsafe fn(&RowJob);

/// Bytes of the ring: with weights and outputs it should stay in a second-level cache of 256 KiB, of which boards have
/// at least that per core.
const RING_BYTES: usize = 96 << 10;

/// Up to so many output channels are computed at a time.
struct Block {
    first: usize,
    lanes: usize,
    wide: bool,
    /// Bytes into each pixel (group of channels).
    channel_offset: usize,
    /// Which voxel of its blocks a transposed convolution makes.
    tap: [usize; 3],
    quads: usize,
    steps: usize,
    group: usize,
    weights: usize,
    parameters: usize,
    offsets: usize,
}

/// A planned convolution.
pub(super) struct Conv {
    source: Source,
    direct: bool,
    input: Shape,
    pub(super) output: Shape,
    out: usize,
    window: Window,
    /// For a transposed convolution, the block of outputs at each place of the window.
    spread: [usize; 3],
    /// Places of the window along depth, rows and columns: the outputs, or the blocks of them.
    places: [usize; 3],
    input_zero: u8,
    zero: i32,
    low: f32,
    high: f32,
    row_bytes: usize,
    plane_bytes: usize,
    planes: usize,
    columns: usize,
    strip: usize,
    blocks: Vec<Block>,
    offsets: Vec<u32>,
    weights: Vec<i8>,
    bias: Vec<i32>,
    scale: Vec<f32>,
    depthwise: Option<Depthwise>,
    kernel8: RowKernel,
    kernel16: RowKernel,
    kernel: Kernel,
}

struct Depthwise {
    /// `[tap][channel]`.
    weights: Vec<i16>,
    taps: usize,
}

/// What a convolution is made of.
pub(super) struct Recipe<'a> {
    pub source: Source,
    pub input: Shape,
    pub input_zero: u8,
    pub output: Shape,
    pub out: usize,
    pub window: Window,
    pub spread: [usize; 3],
    pub groups: usize,
    pub weights: &'a [i8],
    pub bias: &'a [i32],
    pub requant: &'a Requant,
}

impl Conv {
    pub(super) fn plan(recipe: Recipe<'_>, kernel: Kernel) -> Self {
        let Recipe { input, output, window, spread, groups, weights, .. } = recipe;
        let source = recipe.source.clone();
        let spreads: usize = spread.iter().product();
        let point = window == Window::POINT;
        let direct = point && source.plain();
        let space = output.space();
        let places: [usize; 3] = std::array::from_fn(|axis| space[axis].div_ceil(spread[axis]));
        let [kd, kh, kw] = window.kernel;
        let reach = |axis: usize| (window.kernel[axis] - 1) * window.dilation[axis] + 1;
        let columns = (places[2] - 1) * window.stride[2] + reach(2);
        let row_bytes = (columns * input.c + 4).next_multiple_of(16);
        let planes = if direct { 1 } else { reach(0) };
        let rows_for = |strip: usize| (strip - 1) * window.stride[1] + reach(1);
        let mut strip = places[1];
        while strip > 4 && planes * rows_for(strip) * row_bytes > RING_BYTES {
            strip = strip.div_ceil(2);
        }
        if kd == 1 && places[0] == 1 && places[1] >= 16 {
            // A 2-D network has no depth to share among threads: keep at least four strips.
            strip = strip.min(places[1].div_ceil(4));
        }
        let plane_bytes = if direct { 0 } else { rows_for(strip) * row_bytes };

        let own = input.c / groups;
        let outputs = output.c / groups;
        let mut conv = Self {
            source,
            direct,
            input,
            output,
            out: recipe.out,
            window,
            spread,
            places,
            input_zero: recipe.input_zero,
            zero: i32::from(recipe.requant.zero),
            low: f32::from(recipe.requant.low) - f32::from(recipe.requant.zero),
            high: f32::from(recipe.requant.high) - f32::from(recipe.requant.zero),
            row_bytes,
            plane_bytes,
            planes,
            columns,
            strip,
            blocks: Vec::new(),
            offsets: Vec::new(),
            weights: Vec::new(),
            bias: Vec::new(),
            scale: Vec::new(),
            depthwise: None,
            kernel8: kernel.row(8),
            kernel16: kernel.row(16),
            kernel,
        };
        if own == 1 && outputs == 1 && groups > 1 && spreads == 1 {
            conv.plan_depthwise(weights, recipe.bias, &recipe.requant.scale);
            return conv;
        }

        // Runs of bytes that lie side by side in the ring: a whole row of taps, or one tap.
        let merged = window.dilation[2] == 1 && groups == 1;
        let taps = window.taps();
        for tap in 0..spreads {
            let voxel = [tap / (spread[1] * spread[2]), tap / spread[2] % spread[1], tap % spread[2]];
            for group in 0..groups {
                let mut first = 0;
                while first < outputs {
                    let left = outputs - first;
                    let wide = left > 8;
                    let lanes = left.min(if wide { 16 } else { 8 });
                    let width = if wide { 16 } else { 8 };
                    let channel = group * outputs + first;
                    let weight = |lane: usize, at: usize| {
                        if lane < lanes { weights[(tap * output.c + channel + lane) * taps * own + at] } else { 0 }
                    };
                    let mut steps = Vec::new();
                    for plane in 0..kd {
                        for row in 0..kh {
                            for column in 0..if merged { 1 } else { kw } {
                                let run = if merged { kw * own } else { own };
                                let tap = (plane * kh + row) * kw + column;
                                for byte in (0..run).step_by(4) {
                                    let weights: Vec<[i8; 4]> = (0..width)
                                        .map(|lane| {
                                            std::array::from_fn(|k| {
                                                if byte + k < run { weight(lane, tap * own + byte + k) } else { 0 }
                                            })
                                        })
                                        .collect();
                                    // Each output of a block sees some of the window's taps alone.
                                    if spreads > 1 && weights.iter().all(|four| *four == [0; 4]) {
                                        continue;
                                    }
                                    let at = row * window.dilation[1] * row_bytes + column * window.dilation[2] * input.c;
                                    steps.push(Step { plane, at: at + byte, weights });
                                }
                            }
                        }
                    }
                    conv.push_block(&recipe, channel, lanes, wide, group * own, voxel, steps);
                    first += lanes;
                }
            }
        }
        conv
    }

    #[allow(clippy::too_many_arguments)]
    fn push_block(
        &mut self,
        recipe: &Recipe<'_>,
        first: usize,
        lanes: usize,
        wide: bool,
        channel_offset: usize,
        tap: [usize; 3],
        steps: Vec<Step>,
    ) {
        let width = if wide { 16 } else { 8 };
        let sums: Vec<i64> = (0..lanes)
            .map(|lane| steps.iter().flat_map(|step| step.weights[lane]).map(i64::from).sum())
            .collect();
        let Packed { offsets, quads, steps, group, weights } = self.kernel.pack(steps);
        let block = Block {
            first,
            lanes,
            wide,
            channel_offset,
            tap,
            quads,
            steps,
            group,
            weights: self.weights.len(),
            parameters: self.bias.len(),
            offsets: self.offsets.len(),
        };
        self.weights.extend(weights);
        let added = i64::from(self.kernel.added_to_activations());
        for lane in 0..width {
            let channel = first + lane.min(lanes - 1);
            let sum = sums[lane.min(lanes - 1)];
            let bias = i64::from(recipe.bias[channel]) - (i64::from(self.input_zero) + added) * sum;
            self.bias.push(i32::try_from(bias).expect("the lowering checked the range of every sum"));
            self.scale.push(recipe.requant.scale[channel]);
        }
        // The plane of tap `kd` moves through the ring: one table for each place the ring can be at.
        for residue in 0..self.planes {
            for (plane, at) in &offsets {
                let slot = (residue + plane * self.window.dilation[0]) % self.planes;
                let offset = slot * self.plane_bytes + at;
                self.offsets.push(u32::try_from(offset).expect("a ring is far below 4 GiB"));
            }
        }
        self.blocks.push(block);
    }

    fn plan_depthwise(&mut self, weights: &[i8], bias: &[i32], scale: &[f32]) {
        let (taps, channels) = (self.window.taps(), self.input.c);
        let packed = (0..taps * channels).map(|at| i16::from(weights[at % channels * taps + at / channels])).collect();
        for channel in 0..channels {
            let sum: i64 = weights[channel * taps..][..taps].iter().copied().map(i64::from).sum();
            let folded = i64::from(bias[channel]) - i64::from(self.input_zero) * sum;
            self.bias.push(i32::try_from(folded).expect("the lowering checked the range of every sum"));
        }
        self.scale = scale.to_vec();
        let [_, kh, kw] = self.window.kernel;
        for residue in 0..self.planes {
            for tap in 0..taps {
                let (plane, row, column) = (tap / (kh * kw), tap / kw % kh, tap % kw);
                let slot = (residue + plane * self.window.dilation[0]) % self.planes;
                let at = slot * self.plane_bytes
                    + row * self.window.dilation[1] * self.row_bytes
                    + column * self.window.dilation[2] * channels;
                self.offsets.push(u32::try_from(at).expect("a ring is far below 4 GiB"));
            }
        }
        self.depthwise = Some(Depthwise { weights: packed, taps });
    }

    /// What the plan prints of it.
    pub(super) fn describe(&self) -> String {
        if self.depthwise.is_some() {
            return "depthwise".into();
        }
        let group = self.blocks.iter().map(|block| block.group).min().unwrap_or(1);
        let sums = if group > 1 { format!(" x{group}") } else { String::new() };
        format!("{}{sums}{}", self.kernel.name(), if self.direct { " direct" } else { "" })
    }

    /// Bytes of weights and tables.
    pub(super) fn constant_bytes(&self) -> usize {
        self.weights.len() + 4 * (self.offsets.len() + self.bias.len() + self.scale.len())
    }

    /// Scratch that each thread needs.
    pub(super) fn scratch(&self) -> usize {
        if self.direct { 0 } else { self.planes * self.plane_bytes + 64 + self.source.scratch() }
    }

    /// Rows (or, of a point convolution, runs of pixels) are the units that threads share.
    pub(super) fn units(&self, threads: usize) -> usize {
        if self.direct {
            return if self.spread == [1; 3] {
                self.output.voxels().div_ceil(DIRECT_PIXELS)
            } else {
                self.input.d * self.input.h
            };
        }
        self.strips() * self.depth_chunks(threads)
    }

    fn strips(&self) -> usize {
        self.places[1].div_ceil(self.strip)
    }

    fn depth_chunks(&self, threads: usize) -> usize {
        let wanted = if threads == 1 { 1 } else { (3 * threads).div_ceil(self.strips()) };
        wanted.clamp(1, self.places[0].div_ceil(4))
    }

    /// Computes one unit of the output.
    ///
    /// # Safety
    /// The arena holds the tensors at the planned places, `thread` has scratch of its own, and no other thread works on
    /// the same unit or writes the inputs.
    pub(super) unsafe fn run(&self, unit: usize, threads: usize, thread: usize, memory: Pointers) {
        // SAFETY: the caller's promise, handed on; the plan keeps every access inside the ring and the tensors.
        unsafe {
            match (self.direct, self.spread) {
                (true, [1, 1, 1]) => {
                    let first = unit * DIRECT_PIXELS;
                    let pixels = DIRECT_PIXELS.min(self.output.voxels() - first);
                    let base = memory.at(self.source.offset()).add(first * self.input.c);
                    let out = memory.at(self.out).add(first * self.output.c);
                    self.row(base, 0, out, self.output.c, pixels);
                }
                (true, _) => {
                    let base = memory.at(self.source.offset()).add(unit * self.input.w * self.input.c);
                    self.spread_row([unit / self.input.h, unit % self.input.h], base, 0, memory);
                }
                _ => self.run_ring(unit, threads, thread, memory),
            }
        }
    }

    /// The blocks of outputs at one row of places, as far as they lie in the output.
    unsafe fn spread_row(&self, [d, h]: [usize; 2], base: *const u8, residue: usize, memory: Pointers) {
        for block in &self.blocks {
            let [depth, row] = [d * self.spread[0] + block.tap[0], h * self.spread[1] + block.tap[1]];
            let pixels = self.output.w.saturating_sub(block.tap[2]).div_ceil(self.spread[2]);
            if depth >= self.output.d || row >= self.output.h || pixels == 0 {
                continue;
            }
            let at = (depth * self.output.h + row) * self.output.w + block.tap[2];
            // SAFETY: as `run`; each block writes its own voxels of the output rows that belong to this row of places.
            unsafe {
                let out = memory.at(self.out).add(at * self.output.c);
                self.block(block, base, residue, out, self.spread[2] * self.output.c, pixels);
            }
        }
    }

    unsafe fn run_ring(&self, unit: usize, threads: usize, thread: usize, memory: Pointers) {
        let chunks = self.depth_chunks(threads);
        let (strip, chunk) = (unit / chunks, unit % chunks);
        let rows = strip * self.strip..((strip + 1) * self.strip).min(self.places[1]);
        let depths = self.places[0] * chunk / chunks..self.places[0] * (chunk + 1) / chunks;
        // SAFETY: as `run`.
        unsafe {
            let ring = memory.scratch(thread);
            let mut filled = depths.start * self.window.stride[0];
            for d in depths {
                let first = d * self.window.stride[0];
                for plane in filled.max(first)..first + self.planes {
                    self.fill(ring, plane, rows.clone(), memory);
                }
                filled = first + self.planes;
                for h in rows.clone() {
                    let base = ring.add((h - rows.start) * self.window.stride[1] * self.row_bytes);
                    if self.spread != [1; 3] {
                        self.spread_row([d, h], base, first % self.planes, memory);
                        continue;
                    }
                    let out = memory.at(self.out).add((d * self.output.h + h) * self.output.w * self.output.c);
                    self.row(base, first % self.planes, out, self.output.c, self.output.w);
                }
            }
        }
    }

    /// Brings the rows of one padded input plane, as far as the output rows `rows` see them, into the ring.
    unsafe fn fill(&self, ring: *mut u8, plane: usize, rows: std::ops::Range<usize>, memory: Pointers) {
        let top = rows.start * self.window.stride[1];
        let bottom = (rows.end - 1) * self.window.stride[1] + (self.window.kernel[1] - 1) * self.window.dilation[1] + 1;
        let inside = |padded: usize, axis: usize, extent: usize| {
            padded.checked_sub(self.window.before[axis]).filter(|at| *at < extent)
        };
        let depth = inside(plane, 0, self.input.d);
        let width = self.columns * self.input.c;
        let left = (self.window.before[2] * self.input.c).min(width);
        let middle = (self.input.w * self.input.c).min(width - left);
        // SAFETY: rows of this plane's slot of the ring; the source reads what the plan placed.
        unsafe {
            let slot = ring.add(plane % self.planes * self.plane_bytes);
            let scratch = ring.add(self.planes * self.plane_bytes + 64);
            for padded in top..bottom {
                let to = slot.add((padded - top) * self.row_bytes);
                match (depth, inside(padded, 1, self.input.h)) {
                    (Some(d), Some(h)) => {
                        to.write_bytes(self.input_zero, left);
                        self.source.row(d, h, middle / self.input.c, to.add(left), scratch, self.kernel, memory);
                        to.add(left + middle).write_bytes(self.input_zero, width - left - middle);
                    }
                    _ => to.write_bytes(self.input_zero, width),
                }
            }
        }
    }

    unsafe fn row(&self, base: *const u8, residue: usize, out: *mut u8, out_pixel: usize, pixels: usize) {
        // SAFETY: as `run`.
        unsafe {
            if let Some(depthwise) = &self.depthwise {
                self.depthwise_row(depthwise, base, residue, out, pixels);
            }
            for block in &self.blocks {
                self.block(block, base, residue, out, out_pixel, pixels);
            }
        }
    }

    unsafe fn block(
        &self,
        block: &Block,
        base: *const u8,
        residue: usize,
        out: *mut u8,
        out_pixel: usize,
        pixels: usize,
    ) {
        // SAFETY: the tables were made for this ring; `out` has room for `pixels` pixels of the block's channels.
        unsafe {
            let job = RowJob {
                base: base.add(block.channel_offset),
                offsets: self.offsets.as_ptr().add(block.offsets + residue * (block.quads + block.steps)),
                quads: block.quads,
                steps: block.steps,
                group: block.group,
                weights: self.weights.as_ptr().add(block.weights),
                bias: self.bias.as_ptr().add(block.parameters),
                scale: self.scale.as_ptr().add(block.parameters),
                pixel: self.window.stride[2] * self.input.c,
                pixels,
                out: out.add(block.first),
                out_pixel,
                lanes: block.lanes,
                zero: self.zero,
                low: self.low,
                high: self.high,
            };
            if block.wide { (self.kernel16)(&job) } else { (self.kernel8)(&job) }
        }
    }

    unsafe fn depthwise_row(
        &self,
        depthwise: &Depthwise,
        base: *const u8,
        residue: usize,
        out: *mut u8,
        pixels: usize,
    ) {
        const CHUNK: usize = 16;
        let channels = self.input.c;
        let offsets = &self.offsets[residue * depthwise.taps..][..depthwise.taps];
        for pixel in 0..pixels {
            for first in (0..channels).step_by(CHUNK) {
                let lanes = CHUNK.min(channels - first);
                let mut sums = [0i32; CHUNK];
                sums[..lanes].copy_from_slice(&self.bias[first..][..lanes]);
                for (tap, offset) in offsets.iter().enumerate() {
                    let weights = &depthwise.weights[tap * channels + first..][..lanes];
                    let at = *offset as usize + pixel * self.window.stride[2] * channels + first;
                    // SAFETY: inside the ring, which the plan sized for all taps of all pixels.
                    let bytes = unsafe { std::slice::from_raw_parts(base.add(at), lanes) };
                    for ((sum, weight), byte) in sums.iter_mut().zip(weights).zip(bytes) {
                        *sum += i32::from(*weight) * i32::from(*byte);
                    }
                }
                for (lane, sum) in sums[..lanes].iter().enumerate() {
                    let byte = requantize(*sum, self.scale[first + lane], self.low, self.high, self.zero);
                    // SAFETY: the output row has room for all its pixels and channels.
                    unsafe { out.add(pixel * channels + first + lane).write(byte) };
                }
            }
        }
    }
}

/// Pixels of a point convolution that are one unit of work.
const DIRECT_PIXELS: usize = 4096;

/// The rule that turns a sum into a byte; every kernel computes exactly this.
#[inline(always)]
pub(super) fn requantize(sum: i32, scale: f32, low: f32, high: f32, zero: i32) -> u8 {
    let real = (sum as f32 * scale).max(low).min(high);
    (whole(real) + zero) as u8
}

/// The nearest whole number, halves to the even one, for magnitudes below 2^22: with 1.5 * 2^23 added no bit is left for a
/// fraction, and the number stands in the low bits. A cast would test for what cannot be here, one number at a time.
#[inline(always)]
pub(super) fn whole(real: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (real + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}
