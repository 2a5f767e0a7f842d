//! Row kernels for aarch64.
//!
//! SDOT and SMULL multiply signed bytes with signed ones, so activations lose 128 on the way into a register, and the
//! packing adds 128 times the weights to the bias. USMMLA and USDOT take them as they are. The instructions of `dotprod` and
//! `i8mm` have no stable intrinsics, hence the assembly, one instruction at a time.

use std::arch::aarch64::*;
use std::arch::asm;

use super::conv::RowJob;
use super::graph::Quant;

pub(super) fn has_sdot() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

pub(super) fn has_i8mm() -> bool {
    has_sdot() && std::arch::is_aarch64_feature_detected!("i8mm")
}

/// A row kernel: tiles of `$most` pixels, then smaller ones.
macro_rules! row {
    ($name:ident, $vectors:literal, $tile:ident, $features:literal, $most:literal, [$($size:literal),*]) => {
        /// # Safety
        /// The processor's features; the job's pointers are valid (see [`RowJob`]).
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(job: &RowJob) {
            // SAFETY: the caller's promise; tiles stay within the row.
            unsafe {
                let (mut done, ends) = (0, Ends::of(job));
                while job.pixels - done >= $most {
                    $tile::<$most, $vectors>(job, ends, done);
                    done += $most;
                }
                $(while job.pixels - done >= $size {
                    $tile::<$size, $vectors>(job, ends, done);
                    done += $size;
                })*
            }
        }
    };
}

row!(row_sdot_16, 4, tile_sdot, "neon,dotprod", 4, [2, 1]);
row!(row_sdot_8, 2, tile_sdot, "neon,dotprod", 8, [4, 2, 1]);
row!(row_i8mm_16, 4, tile_i8mm, "neon,dotprod,i8mm", 4, [2, 1]);
row!(row_i8mm_8, 2, tile_i8mm, "neon,dotprod,i8mm", 8, [4, 2, 1]);

/// # Safety
/// As [`row_sdot_16`]; the steps were arranged so that no 16-bit sum overflows.
pub(super) unsafe fn row_neon_16(job: &RowJob) {
    // SAFETY: the caller's promise.
    unsafe { neon::<4>(job) }
}

/// # Safety
/// As [`row_neon_16`].
pub(super) unsafe fn row_neon_8(job: &RowJob) {
    // SAFETY: the caller's promise.
    unsafe { neon::<2>(job) }
}

#[inline(always)]
unsafe fn neon<const V: usize>(job: &RowJob) {
    // SAFETY: as the caller's; tiles stay within the row.
    unsafe {
        let (mut done, ends) = (0, Ends::of(job));
        while job.pixels - done >= 2 {
            match job.group {
                6 => tile_neon::<2, V, 6>(job, ends, done),
                4 => tile_neon::<2, V, 4>(job, ends, done),
                3 => tile_neon::<2, V, 3>(job, ends, done),
                2 => tile_neon::<2, V, 2>(job, ends, done),
                _ => tile_neon::<2, V, 1>(job, ends, done),
            }
            done += 2;
        }
        if done < job.pixels {
            match job.group {
                6 => tile_neon::<1, V, 6>(job, ends, done),
                4 => tile_neon::<1, V, 4>(job, ends, done),
                3 => tile_neon::<1, V, 3>(job, ends, done),
                2 => tile_neon::<1, V, 2>(job, ends, done),
                _ => tile_neon::<1, V, 1>(job, ends, done),
            }
        }
    }
}

#[inline(always)]
unsafe fn biases<const V: usize>(job: &RowJob) -> [int32x4_t; V] {
    // SAFETY: the job has a bias for each lane.
    std::array::from_fn(|v| unsafe { vld1q_s32(job.bias.add(4 * v)) })
}

/// What ends the work on each pixel of a row.
#[derive(Clone, Copy)]
struct Ends {
    zero: int16x8_t,
    low: uint8x16_t,
    high: uint8x16_t,
}

impl Ends {
    #[inline(always)]
    unsafe fn of(job: &RowJob) -> Self {
        let byte = |bound: f32| (bound as i32 + job.zero) as u8;
        // SAFETY: NEON is always there.
        unsafe { Self { zero: vdupq_n_s16(job.zero as i16), low: vdupq_n_u8(byte(job.low)), high: vdupq_n_u8(byte(job.high)) } }
    }
}

/// Sums to bytes, and the bytes to their places. Rounding keeps order and narrowing saturates, so the bounds, which are whole
/// numbers, may wait until the numbers are bytes, sixteen to a register.
#[inline(always)]
unsafe fn finish<const V: usize>(job: &RowJob, ends: Ends, pixel: usize, sums: &[int32x4_t; V]) {
    // SAFETY: NEON is always there; the job has a scale for each lane and room for its channels at each pixel.
    unsafe {
        let whole = |v: usize| vcvtnq_s32_f32(vmulq_f32(vcvtq_f32_s32(sums[v]), vld1q_f32(job.scale.add(4 * v))));
        let eight = |v: usize| vqaddq_s16(vqmovn_high_s32(vqmovn_s32(whole(v)), whole(v + 1)), ends.zero);
        let bytes = if V == 4 { vqmovun_high_s16(vqmovun_s16(eight(0)), eight(2)) } else {
            vcombine_u8(vqmovun_s16(eight(0)), vdup_n_u8(0))
        };
        let bytes = vminq_u8(vmaxq_u8(bytes, ends.low), ends.high);
        let out = job.out.add(pixel * job.out_pixel);
        match job.lanes {
            16 => vst1q_u8(out, bytes),
            8 => vst1_u8(out, vget_low_u8(bytes)),
            lanes => {
                let mut narrow = [0u8; 16];
                vst1q_u8(narrow.as_mut_ptr(), bytes);
                for (lane, byte) in narrow.iter().take(lanes).enumerate() {
                    out.add(lane).write(*byte);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn word(at: *const u8) -> u32 {
    // SAFETY: the caller gives four readable bytes.
    unsafe { at.cast::<u32>().read_unaligned() }
}

macro_rules! sdot {
    ($sum:expr, $weights:expr, $x:expr, $lane:literal) => {
        asm!(concat!("sdot {s:v}.4s, {w:v}.16b, {x:v}.4b[", $lane, "]"), s = inout(vreg) $sum, w = in(vreg) $weights,
             x = in(vreg) $x, options(pure, nomem, nostack, preserves_flags))
    };
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn tile_sdot<const T: usize, const V: usize>(job: &RowJob, ends: Ends, first: usize) {
    // SAFETY: the job's pointers; a quad reads sixteen bytes of one run of taps.
    unsafe {
        let base = job.base.add(first * job.pixel);
        let flip = vdupq_n_u8(0x80);
        let mut sums = [biases::<V>(job); T];
        let mut weights = job.weights;
        for quad in 0..job.quads {
            let at = base.add(*job.offsets.add(quad) as usize);
            let x: [uint8x16_t; T] = std::array::from_fn(|t| veorq_u8(vld1q_u8(at.add(t * job.pixel)), flip));
            macro_rules! quarter {
                ($lane:literal) => {
                    for v in 0..V {
                        let w = vld1q_s8(weights);
                        weights = weights.add(16);
                        for t in 0..T {
                            sdot!(sums[t][v], w, x[t], $lane);
                        }
                    }
                };
            }
            quarter!("0");
            quarter!("1");
            quarter!("2");
            quarter!("3");
        }
        for step in 0..job.steps {
            let at = base.add(*job.offsets.add(job.quads + step) as usize);
            let x: [uint8x16_t; T] =
                std::array::from_fn(|t| veorq_u8(vreinterpretq_u8_u32(vdupq_n_u32(word(at.add(t * job.pixel)))), flip));
            for v in 0..V {
                let w = vld1q_s8(weights);
                weights = weights.add(16);
                for t in 0..T {
                    sdot!(sums[t][v], w, x[t], "0");
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            finish(job, ends, first + t, sums);
        }
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn tile_i8mm<const T: usize, const V: usize>(job: &RowJob, ends: Ends, first: usize) {
    // SAFETY: the job's pointers; a quad reads sixteen bytes of one run of taps.
    unsafe {
        let base = job.base.add(first * job.pixel);
        let mut sums = [biases::<V>(job); T];
        let mut weights = job.weights;
        // Two pixels by two channels in each register: [pair of pixels][vector of four channels][half of it].
        let pairs = T.div_ceil(2);
        let mut squares = [[[vdupq_n_s32(0); 2]; V]; T];
        for quad in 0..job.quads {
            let at = base.add(*job.offsets.add(quad) as usize);
            for half in 0..2 {
                let x: [uint8x16_t; T] = std::array::from_fn(|pair| {
                    let (a, b) = ((2 * pair).min(T - 1), (2 * pair + 1).min(T - 1));
                    let load = |t: usize| vld1_u8(at.add(t * job.pixel + 8 * half));
                    vcombine_u8(load(a), load(b))
                });
                for v in 0..V {
                    for o in 0..2 {
                        let w = vld1q_s8(weights);
                        weights = weights.add(16);
                        for pair in 0..pairs {
                            asm!("usmmla {s:v}.4s, {x:v}.16b, {w:v}.16b", s = inout(vreg) squares[pair][v][o],
                                 x = in(vreg) x[pair], w = in(vreg) w, options(pure, nomem, nostack, preserves_flags));
                        }
                    }
                }
            }
        }
        for (t, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                let [a, b] = squares[t / 2][v].map(|square| vreinterpretq_s64_s32(square));
                let four = if t % 2 == 0 { vzip1q_s64(a, b) } else { vzip2q_s64(a, b) };
                *sum = vaddq_s32(*sum, vreinterpretq_s32_s64(four));
            }
        }
        for step in 0..job.steps {
            let at = base.add(*job.offsets.add(job.quads + step) as usize);
            let x: [uint32x4_t; T] = std::array::from_fn(|t| vdupq_n_u32(word(at.add(t * job.pixel))));
            for v in 0..V {
                let w = vld1q_s8(weights);
                weights = weights.add(16);
                for t in 0..T {
                    asm!("usdot {s:v}.4s, {x:v}.16b, {w:v}.16b", s = inout(vreg) sums[t][v], x = in(vreg) x[t],
                         w = in(vreg) w, options(pure, nomem, nostack, preserves_flags));
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            finish(job, ends, first + t, sums);
        }
    }
}

/// Four steps of four channels for two pixels, each weight loaded once. A compiler that may order these as it likes loads
/// early and runs out of registers.
macro_rules! two_pixels {
    ($x:ident, $w:ident, $a:expr, $b:expr, $second:literal, $third:literal, $fourth:literal) => {
        asm!(
            "ldr {w:q}, [{p}]",
            concat!("ldr {u:q}, [{p}, #", $second, "]"),
            "smull {al:v}.8h, {x0:v}.8b, {w:v}.8b",
            "smull2 {ah:v}.8h, {x0:v}.16b, {w:v}.16b",
            "smull {bl:v}.8h, {y0:v}.8b, {w:v}.8b",
            "smull2 {bh:v}.8h, {y0:v}.16b, {w:v}.16b",
            concat!("ldr {w:q}, [{p}, #", $third, "]"),
            "smlal {al:v}.8h, {x1:v}.8b, {u:v}.8b",
            "smlal2 {ah:v}.8h, {x1:v}.16b, {u:v}.16b",
            "smlal {bl:v}.8h, {y1:v}.8b, {u:v}.8b",
            "smlal2 {bh:v}.8h, {y1:v}.16b, {u:v}.16b",
            concat!("ldr {u:q}, [{p}, #", $fourth, "]"),
            "smlal {al:v}.8h, {x2:v}.8b, {w:v}.8b",
            "smlal2 {ah:v}.8h, {x2:v}.16b, {w:v}.16b",
            "smlal {bl:v}.8h, {y2:v}.8b, {w:v}.8b",
            "smlal2 {bh:v}.8h, {y2:v}.16b, {w:v}.16b",
            "smlal {al:v}.8h, {x3:v}.8b, {u:v}.8b",
            "smlal2 {ah:v}.8h, {x3:v}.16b, {u:v}.16b",
            "smlal {bl:v}.8h, {y3:v}.8b, {u:v}.8b",
            "smlal2 {bh:v}.8h, {y3:v}.16b, {u:v}.16b",
            "sadalp {s0:v}.4s, {al:v}.8h",
            "sadalp {s1:v}.4s, {ah:v}.8h",
            "sadalp {t0:v}.4s, {bl:v}.8h",
            "sadalp {t1:v}.4s, {bh:v}.8h",
            p = in(reg) $w,
            x0 = in(vreg) $x[0][0], x1 = in(vreg) $x[0][1], x2 = in(vreg) $x[0][2], x3 = in(vreg) $x[0][3],
            y0 = in(vreg) $x[1][0], y1 = in(vreg) $x[1][1], y2 = in(vreg) $x[1][2], y3 = in(vreg) $x[1][3],
            s0 = inout(vreg) $a[0], s1 = inout(vreg) $a[1], t0 = inout(vreg) $b[0], t1 = inout(vreg) $b[1],
            al = out(vreg) _, ah = out(vreg) _, bl = out(vreg) _, bh = out(vreg) _, w = out(vreg) _, u = out(vreg) _,
            options(pure, readonly, nostack, preserves_flags)
        )
    };
}

/// Without dot products: bytes multiply into 16 bits, a quad or a group of steps is summed there, and pairs are widened.
#[inline(always)]
unsafe fn tile_neon<const T: usize, const V: usize, const G: usize>(job: &RowJob, ends: Ends, first: usize) {
    // SAFETY: the job's pointers; NEON is always there.
    unsafe {
        let base = job.base.add(first * job.pixel);
        let flip = vdup_n_u8(0x80);
        // Each register holds two channels, each as two sums of pairs.
        let mut sums = [[[vdupq_n_s32(0); 2]; V]; T];
        let mut weights = job.weights;
        for quad in 0..job.quads {
            let at = base.add(*job.offsets.add(quad) as usize);
            let x: [[int8x16_t; 4]; T] = std::array::from_fn(|t| {
                let x = vreinterpretq_s32_u8(veorq_u8(vld1q_u8(at.add(t * job.pixel)), vdupq_n_u8(0x80)));
                [
                    vreinterpretq_s8_s32(vdupq_laneq_s32::<0>(x)),
                    vreinterpretq_s8_s32(vdupq_laneq_s32::<1>(x)),
                    vreinterpretq_s8_s32(vdupq_laneq_s32::<2>(x)),
                    vreinterpretq_s8_s32(vdupq_laneq_s32::<3>(x)),
                ]
            });
            for v in 0..V {
                let w = weights.add(v * 16);
                match (sums.as_mut_slice(), V) {
                    ([a, b], 4) => two_pixels!(x, w, a[v], b[v], "64", "128", "192"),
                    ([a, b], _) => two_pixels!(x, w, a[v], b[v], "32", "64", "96"),
                    (sums, _) => {
                        let w: [int8x16_t; 4] = std::array::from_fn(|step| vld1q_s8(w.add(step * V * 16)));
                        for (sums, x) in sums.iter_mut().zip(x) {
                            let (mut low, mut high) = (vmull_s8(vget_low_s8(x[0]), vget_low_s8(w[0])), vmull_high_s8(x[0], w[0]));
                            for (x, w) in x.into_iter().zip(w).skip(1) {
                                low = vmlal_s8(low, vget_low_s8(x), vget_low_s8(w));
                                high = vmlal_high_s8(high, x, w);
                            }
                            sums[v] = [vpadalq_s16(sums[v][0], low), vpadalq_s16(sums[v][1], high)];
                        }
                    }
                }
            }
            weights = weights.add(4 * V * 16);
        }
        for group in 0..job.steps / G {
            let at: [*const u8; G] = std::array::from_fn(|g| base.add(*job.offsets.add(job.quads + group * G + g) as usize));
            for (t, sums) in sums.iter_mut().enumerate() {
                let mut products = [[vdupq_n_s16(0); 2]; V];
                for (g, at) in at.iter().enumerate() {
                    let x = veor_u8(vreinterpret_u8_u32(vdup_n_u32(word(at.add(t * job.pixel)))), flip);
                    let x = vreinterpret_s8_u8(x);
                    for (v, product) in products.iter_mut().enumerate() {
                        let w = vld1q_s8(weights.add((g * V + v) * 16));
                        if g == 0 {
                            *product = [vmull_s8(x, vget_low_s8(w)), vmull_s8(x, vget_high_s8(w))];
                        } else {
                            product[0] = vmlal_s8(product[0], x, vget_low_s8(w));
                            product[1] = vmlal_s8(product[1], x, vget_high_s8(w));
                        }
                    }
                }
                for (sum, product) in sums.iter_mut().zip(products) {
                    *sum = [vpadalq_s16(sum[0], product[0]), vpadalq_s16(sum[1], product[1])];
                }
            }
            weights = weights.add(G * V * 16);
        }
        let bias = biases::<V>(job);
        for (t, sums) in sums.iter().enumerate() {
            let whole: [int32x4_t; V] = std::array::from_fn(|v| vaddq_s32(bias[v], vpaddq_s32(sums[v][0], sums[v][1])));
            finish(job, ends, first + t, &whole);
        }
    }
}

/// Floats of four channels, four pixels at a time, to bytes side by side; gives the number of pixels done. What is not a
/// number becomes the lowest byte.
///
/// # Safety
/// `pixels` floats at each of `channels`, and room for four bytes at each pixel of `out`, `stride` bytes apart.
pub(super) unsafe fn quantize_four(channels: [*const f32; 4], pixels: usize, quant: Quant, out: *mut u8, stride: usize) -> usize {
    // SAFETY: NEON is always there; the caller's promise.
    unsafe {
        let scale = vdupq_n_f32(quant.scale);
        let (low, zero) = (vdupq_n_f32(-f32::from(quant.zero)), vdupq_n_s16(i16::from(quant.zero)));
        let turn = vld1q_u8([0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15].as_ptr());
        let done = pixels & !3;
        let mut out = out;
        for first in (0..done).step_by(4) {
            // Above, narrowing saturates.
            let whole = |c: usize| vcvtnq_s32_f32(vmaxnmq_f32(vdivq_f32(vld1q_f32(channels[c].add(first)), scale), low));
            let eight = |c: usize| vqaddq_s16(vqmovn_high_s32(vqmovn_s32(whole(c)), whole(c + 1)), zero);
            let words = vreinterpretq_u32_u8(vqtbl1q_u8(vqmovun_high_s16(vqmovun_s16(eight(0)), eight(2)), turn));
            vst1q_lane_u32::<0>(out.cast(), words);
            vst1q_lane_u32::<1>(out.add(stride).cast(), words);
            vst1q_lane_u32::<2>(out.add(2 * stride).cast(), words);
            vst1q_lane_u32::<3>(out.add(3 * stride).cast(), words);
            out = out.wrapping_add(4 * stride);
        }
        done
    }
}

/// Bytes of four channels that lie side by side, four pixels at a time, to the floats they mean; gives the number of pixels
/// done.
///
/// # Safety
/// Four bytes at each of `pixels` pixels of `from`, `stride` bytes apart, and room for as many floats at each of `channels`.
pub(super) unsafe fn dequantize_four(from: *const u8, stride: usize, pixels: usize, quant: Quant, channels: [*mut f32; 4]) -> usize {
    const NONE: u8 = 255;
    // SAFETY: NEON is always there; the caller's promise.
    unsafe {
        let (zero, scale) = (vdupq_n_s32(i32::from(quant.zero)), vdupq_n_f32(quant.scale));
        // Of each pixel the byte of one channel, as a word.
        let pick: [uint8x16_t; 4] = std::array::from_fn(|c| {
            let byte = |n: usize| if n.is_multiple_of(4) { (n + c) as u8 } else { NONE };
            vld1q_u8(std::array::from_fn::<u8, 16, _>(byte).as_ptr())
        });
        let done = pixels & !3;
        let mut from = from;
        for first in (0..done).step_by(4) {
            let words = vld1q_lane_u32::<0>(from.cast(), vdupq_n_u32(0));
            let words = vld1q_lane_u32::<1>(from.add(stride).cast(), words);
            let words = vld1q_lane_u32::<2>(from.add(2 * stride).cast(), words);
            let words = vld1q_lane_u32::<3>(from.add(3 * stride).cast(), words);
            for (channel, pick) in channels.iter().zip(pick) {
                let bytes = vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(words), pick));
                vst1q_f32(channel.add(first), vmulq_f32(vcvtq_f32_s32(vsubq_s32(bytes, zero)), scale));
            }
            from = from.wrapping_add(4 * stride);
        }
        done
    }
}

/// Multiply-adds of one round of a loop of SDOT alone, on ten independent sums.
///
/// # Safety
/// Dot products.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn peak_sdot(rounds: usize) -> usize {
    // SAFETY: registers only.
    unsafe {
        let mut sums = [vdupq_n_s32(1); 10];
        let (mut x, w) = (vdupq_n_s8(3), vdupq_n_s8(5));
        for _ in 0..rounds {
            x = std::hint::black_box(x);
            for sum in &mut sums {
                sdot!(*sum, w, x, "0");
            }
        }
        std::hint::black_box(sums);
    }
    10 * 16
}
