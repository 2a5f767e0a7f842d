//! Convolution in floats, for layers that no quantizer touched: `[channel, depth, row, column]` in and out.
//!
//! Each output is one chain of fused multiply-adds, input channel by input channel and tap by tap, whatever the width of the
//! vectors: all processors give the same bits. A tile of outputs, some channels by some columns, stays in registers; the
//! rows it reads are copied once for each row of outputs, padded, and with a stride taken apart so that columns lie together.

use super::Kernel;
use super::graph::{Shape, Window};
use super::memory::Memory;
use crate::pool::{Fault, Pool};

/// Columns of the widest tile. With six channels of it sixteen registers suffice; a sum that had to wait in memory would
/// hold up all others.
const TILE: usize = 16;

/// Channels of a block of weights.
const BLOCK: usize = 12;

/// Columns that one unit of work makes: whole tiles, and few enough that the rows below them stay in the cache.
const COLUMNS: usize = 15 * TILE;

/// What a tile kernel computes: for some channels, `VECTORS` times eight columns.
struct Job {
    /// Input of the first column; step `s` reads at `offsets[s]` from it.
    base: *const f32,
    offsets: *const u32,
    steps: usize,
    /// `[step][BLOCK]`.
    weights: *const f32,
    bias: *const f32,
}

/// Channels of one tile by its columns.
type Tile = [[f32; TILE]; BLOCK];

type TileKernel = unsafe fn(&Job, &mut Tile);

/// A planned convolution of floats.
pub struct FloatConv {
    input: Shape,
    output: Shape,
    window: Window,
    groups: usize,
    /// Smallest output: 0 for a fused ReLU.
    low: f32,
    /// Floats of a copied row, and of each of the parts that a stride makes of it.
    row: usize,
    part: usize,
    chunk: usize,
    offsets: Vec<u32>,
    blocks: Vec<Block>,
    weights: Vec<f32>,
    bias: Vec<f32>,
    kernel: Kernel,
}

struct Block {
    first: usize,
    lanes: usize,
    group: usize,
    weights: usize,
}

impl FloatConv {
    /// Plans a convolution with weights `[output channel][input channel of its group][tap]`.
    #[allow(clippy::too_many_arguments)]
    pub fn plan(
        mut input: Shape,
        mut output: Shape,
        window: Window,
        groups: usize,
        weights: &[f32],
        bias: &[f32],
        relu: bool,
        kernel: Kernel,
    ) -> Self {
        if window == Window::POINT {
            // Rows mean nothing to a point: one long row leaves the least of tiles unfilled.
            (input, output) = (flat(input), flat(output));
        }
        let [kd, kh, kw] = window.kernel;
        let [own, outputs, taps] = [input.c / groups, output.c / groups, window.taps()];
        let chunk = output.w.div_ceil(output.w.div_ceil(COLUMNS)).next_multiple_of(TILE);
        let stride = window.stride[2];
        let part = chunk + (kw - 1) * window.dilation[2] / stride + 1;
        let row = stride * part;
        let mut offsets = Vec::with_capacity(own * taps);
        for line in 0..own * kd * kh {
            for tap in 0..kw {
                let column = tap * window.dilation[2];
                offsets.push((line * row + column % stride * part + column / stride) as u32);
            }
        }
        let (mut blocks, mut packed) = (Vec::new(), Vec::new());
        for group in 0..groups {
            for first in (0..outputs).step_by(BLOCK) {
                let lanes = (outputs - first).min(BLOCK);
                blocks.push(Block { first: group * outputs + first, lanes, group, weights: packed.len() });
                for step in 0..own * taps {
                    packed.extend((0..BLOCK).map(|lane| {
                        if lane < lanes { weights[(group * outputs + first + lane) * own * taps + step] } else { 0.0 }
                    }));
                }
            }
        }
        let mut bias = bias.to_vec();
        bias.resize(output.c + BLOCK, 0.0);
        let low = if relu { 0.0 } else { f32::NEG_INFINITY };
        Self { input, output, window, groups, low, row, part, chunk, offsets, blocks, weights: packed, bias, kernel }
    }

    /// Whether this processor has fused multiply-adds: without, the same bits cost a hundred times as much.
    pub fn is_fast() -> bool {
        #[cfg(target_arch = "x86_64")]
        return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        #[cfg(not(target_arch = "x86_64"))]
        return cfg!(target_arch = "aarch64");
    }

    /// Multiply-adds of one volume.
    pub fn macs(&self) -> u64 {
        self.output.bytes() as u64 * self.offsets.len() as u64
    }

    /// What the plan prints.
    pub fn kernel(&self) -> &'static str {
        if self.kernel == Kernel::Portable { "portable" } else { "fma" }
    }

    /// Bytes of weights and tables.
    pub fn constant_bytes(&self) -> usize {
        4 * (self.weights.len() + self.offsets.len() + self.bias.len())
    }

    /// Bytes of scratch of each thread.
    pub fn scratch_bytes(&self) -> usize {
        4 * self.input.c * self.window.kernel[0] * self.window.kernel[1] * self.row
    }

    /// Scratch for `threads` threads.
    ///
    /// # Errors
    /// The system has not that much.
    pub fn memory(&self, threads: usize) -> Result<Memory, std::collections::TryReserveError> {
        Memory::new(0, self.scratch_bytes(), threads)
    }

    /// Convolves one volume.
    ///
    /// # Errors
    /// A panic inside, or no memory for the pool's threads.
    ///
    /// # Panics
    /// When input or output do not have the planned sizes, or the memory is another's.
    pub fn run(&self, pool: &Pool, memory: &mut Memory, input: &[f32], output: &mut [f32]) -> Result<(), Fault> {
        assert_eq!((input.len(), output.len()), (self.input.bytes(), self.output.bytes()), "sizes of a float layer");
        assert!(memory.holds(0, self.scratch_bytes()), "the memory of this layer");
        memory.provide(pool.threads()).map_err(|error| Fault(error.to_string()))?;
        let pointers = memory.pointers();
        let out = Output(output.as_mut_ptr());
        let chunks = self.output.w.div_ceil(self.chunk);
        let units = self.output.d * self.output.h * chunks;
        let next = std::sync::atomic::AtomicUsize::new(0);
        pool.for_each(pool.threads().min(units), |thread| {
            let out = &out;
            loop {
                let unit = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if unit >= units {
                    break;
                }
                let (row, chunk) = (unit / chunks, unit % chunks);
                // SAFETY: each thread has scratch of the planned size of its own, and each unit writes its own columns.
                unsafe {
                    let floats = self.scratch_bytes() / 4;
                    let scratch = std::slice::from_raw_parts_mut(pointers.scratch(thread).cast::<f32>(), floats);
                    self.unit([row / self.output.h, row % self.output.h], chunk * self.chunk, input, scratch, out.0);
                }
            }
        })
    }

    unsafe fn unit(&self, [d, h]: [usize; 2], first: usize, input: &[f32], scratch: &mut [f32], out: *mut f32) {
        self.copy([d, h], first, input, scratch);
        let columns = self.chunk.min(self.output.w - first);
        let steps = self.offsets.len();
        let lines = self.input.c / self.groups * self.window.kernel[0] * self.window.kernel[1];
        let mut tile: Tile = [[0.0; TILE]; BLOCK];
        // All channels of a tile before the next tile: its columns of all rows stay in the first cache.
        let mut done = 0;
        while done < columns {
            let vectors = (columns - done).div_ceil(8).min(TILE / 8);
            let taken = (8 * vectors).min(columns - done);
            // Wide tiles hold up to six channels, narrow ones twelve: as many sums as hide the time of an addition.
            let most = if vectors == 1 { 12 } else { 6 };
            let at = (d * self.output.h + h) * self.output.w + first + done;
            for block in &self.blocks {
                let base = &scratch[block.group * lines * self.row + done..];
                let each = block.lanes.div_ceil(block.lanes.div_ceil(most));
                for lane in (0..block.lanes).step_by(each) {
                    let lanes = (block.lanes - lane).min(each);
                    let job = Job {
                        base: base.as_ptr(),
                        offsets: self.offsets.as_ptr(),
                        steps,
                        weights: self.weights[block.weights + lane..].as_ptr(),
                        bias: self.bias[block.first + lane..].as_ptr(),
                    };
                    // SAFETY: rows were copied with room for whole tiles behind each offset; the kernel is one of this
                    // processor's; the columns lie in the output, whose channels are whole volumes apart.
                    unsafe {
                        self.tile(lanes, vectors)(&job, &mut tile);
                        for (lane, row) in (block.first + lane..).zip(&tile[..lanes]) {
                            let out = std::slice::from_raw_parts_mut(out.add(lane * self.output.voxels() + at), taken);
                            out.iter_mut().zip(row).for_each(|(o, x)| *o = if *x < self.low { self.low } else { *x });
                        }
                    }
                }
            }
            done += taken;
        }
    }

    /// Brings the rows that one row of outputs sees, padded, into scratch.
    fn copy(&self, [d, h]: [usize; 2], first: usize, input: &[f32], scratch: &mut [f32]) {
        let [kd, kh, _] = self.window.kernel;
        let [stride, before] = [self.window.stride, self.window.before];
        let inside = |at: usize, tap: usize, axis: usize, extent: usize| {
            (at * stride[axis] + tap * self.window.dilation[axis]).checked_sub(before[axis]).filter(|at| *at < extent)
        };
        for (line, to) in scratch.chunks_exact_mut(self.row).enumerate() {
            let (channel, plane, row) = (line / (kd * kh), line / kh % kd, line % kh);
            let place = inside(d, plane, 0, self.input.d).zip(inside(h, row, 1, self.input.h));
            let Some((d, h)) = place else {
                to.fill(0.0);
                continue;
            };
            let w = self.input.w;
            let from = &input[((channel * self.input.d + d) * self.input.h + h) * w..][..w];
            for (phase, to) in to.chunks_exact_mut(self.part).enumerate() {
                // Entry `n` is the padded column `(first + n) * stride + phase`.
                let start = first * stride[2] + phase;
                let left = before[2].saturating_sub(start).div_ceil(stride[2]).min(self.part);
                let seen = (start + left * stride[2]).saturating_sub(before[2]);
                let count = w.saturating_sub(seen).div_ceil(stride[2]).min(self.part - left);
                to[..left].fill(0.0);
                if stride[2] == 1 {
                    to[left..left + count].copy_from_slice(&from[seen.min(w)..][..count]);
                } else {
                    let every = from[seen.min(w)..].iter().step_by(stride[2]);
                    to[left..left + count].iter_mut().zip(every).for_each(|(to, from)| *to = *from);
                }
                to[left + count..].fill(0.0);
            }
        }
    }

    fn tile(&self, lanes: usize, vectors: usize) -> TileKernel {
        macro_rules! sizes {
            ($tile:ident) => {
                match (lanes, vectors) {
                    (1, 1) => $tile::<1, 1>,
                    (1, _) => $tile::<1, 2>,
                    (2..=4, 1) => $tile::<4, 1>,
                    (5..=8, 1) => $tile::<8, 1>,
                    (_, 1) => $tile::<12, 1>,
                    (2..=4, _) => $tile::<4, 2>,
                    _ => $tile::<6, 2>,
                }
            };
        }
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        if self.kernel != Kernel::Portable {
            use wide::tile;
            return sizes!(tile);
        }
        sizes!(portable)
    }
}

fn flat(shape: Shape) -> Shape {
    Shape { d: 1, h: 1, w: shape.voxels(), c: shape.c }
}

/// The output, shared by threads that write different parts of it.
struct Output(*mut f32);

// SAFETY: the pointer is to an output borrowed for the whole run, and each unit writes columns of its own.
unsafe impl Sync for Output {}

/// # Safety
/// The job's offsets lead to `8 * VECTORS` readable floats each, and it has weights and biases for `LANES` channels.
unsafe fn portable<const LANES: usize, const VECTORS: usize>(job: &Job, tile: &mut Tile) {
    // SAFETY: the caller's promise.
    unsafe {
        for (lane, row) in tile[..LANES].iter_mut().enumerate() {
            row[..8 * VECTORS].fill(*job.bias.add(lane));
            for step in 0..job.steps {
                let at = job.base.add(*job.offsets.add(step) as usize);
                let weight = *job.weights.add(step * BLOCK + lane);
                for (column, sum) in row[..8 * VECTORS].iter_mut().enumerate() {
                    *sum = (*at.add(column)).mul_add(weight, *sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::*;

    use super::{BLOCK, Job, Tile};

    /// # Safety
    /// AVX2 and FMA; otherwise as [`super::portable`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn tile<const LANES: usize, const VECTORS: usize>(job: &Job, tile: &mut Tile) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums: [[__m256; VECTORS]; LANES] =
                std::array::from_fn(|lane| [_mm256_broadcast_ss(&*job.bias.add(lane)); VECTORS]);
            let mut weights = job.weights;
            for step in 0..job.steps {
                let at = job.base.add(*job.offsets.add(step) as usize);
                let x: [__m256; VECTORS] = std::array::from_fn(|v| _mm256_loadu_ps(at.add(8 * v)));
                for (lane, sums) in sums.iter_mut().enumerate() {
                    let w = _mm256_broadcast_ss(&*weights.add(lane));
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = _mm256_fmadd_ps(x, w, *sum);
                    }
                }
                weights = weights.add(BLOCK);
            }
            for (row, sums) in tile.iter_mut().zip(sums) {
                for (v, sum) in sums.into_iter().enumerate() {
                    _mm256_storeu_ps(row.as_mut_ptr().add(8 * v), sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod wide {
    use std::arch::aarch64::*;

    use super::{BLOCK, Job, Tile};

    /// # Safety
    /// As [`super::portable`].
    pub(super) unsafe fn tile<const LANES: usize, const VECTORS: usize>(job: &Job, tile: &mut Tile) {
        // SAFETY: the caller's promise; NEON is always there.
        unsafe {
            let mut sums: [[[float32x4_t; 2]; VECTORS]; LANES] =
                std::array::from_fn(|lane| [[vdupq_n_f32(*job.bias.add(lane)); 2]; VECTORS]);
            let mut weights = job.weights;
            for step in 0..job.steps {
                let at = job.base.add(*job.offsets.add(step) as usize);
                let x: [[float32x4_t; 2]; VECTORS] =
                    std::array::from_fn(|v| [vld1q_f32(at.add(8 * v)), vld1q_f32(at.add(8 * v + 4))]);
                for (lane, sums) in sums.iter_mut().enumerate() {
                    let w = *weights.add(lane);
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = [vfmaq_n_f32(sum[0], x[0], w), vfmaq_n_f32(sum[1], x[1], w)];
                    }
                }
                weights = weights.add(BLOCK);
            }
            for (row, sums) in tile.iter_mut().zip(sums) {
                for (v, sum) in sums.into_iter().enumerate() {
                    vst1q_f32(row.as_mut_ptr().add(8 * v), sum[0]);
                    vst1q_f32(row.as_mut_ptr().add(8 * v + 4), sum[1]);
                }
            }
        }
    }
}
