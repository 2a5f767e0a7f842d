//! Row kernels for x86-64.
//!
//! A tile of neighbouring pixels is kept in registers, a vector of channels each; each step broadcasts four bytes of every
//! pixel against one vector of weights.

use std::arch::x86_64::*;

use super::conv::RowJob;

pub(super) fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

pub(super) fn has_avxvnni() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni")
}

/// Computes some neighbouring pixels of a row, from the given one on.
type Tile = unsafe fn(&RowJob, usize);

/// Walks a row in tiles, given with their sizes, which ascend from 1: as many of the widest as fit, then the smallest that
/// covers the rest, shifted back over pixels already done (they are computed again, to the same bytes) where the row is long
/// enough.
///
/// # Safety
/// The processor has what the tiles need; the job's pointers are valid (see [`RowJob`]).
unsafe fn walk(job: &RowJob, tiles: &[(usize, Tile)]) {
    let mut done = 0;
    while done < job.pixels {
        let left = job.pixels - done;
        let mut chosen = tiles[0];
        for tile in tiles {
            if tile.0 <= job.pixels && chosen.0 < left {
                chosen = *tile;
            }
        }
        let (size, tile) = chosen;
        let at = if size > left { job.pixels - size } else { done };
        // SAFETY: the caller's promise; tiles stay within the row.
        unsafe { tile(job, at) };
        done = at + size;
    }
}

/// Row kernels: a walk in tiles of these sizes.
macro_rules! rows {
    ($($(#[$meta:meta])* $row:ident: $tile:ident, $vectors:literal, [$($size:literal),*];)*) => {$(
        $(#[$meta])*
        /// # Safety
        /// The processor's features; the job's pointers are valid (see [`RowJob`]).
        pub(super) unsafe fn $row(job: &RowJob) {
            // SAFETY: the caller's promise.
            unsafe { walk(job, &[$(($size, $tile::<$size, $vectors>)),*]) }
        }
    )*};
}

rows! {
    row_vnni_16: tile_vnni_16, 1, [1, 2, 4, 6, 8, 12, 16];
    row_vnni_8: tile_vnni_8, 1, [1, 2, 4, 6, 8, 12, 16];
    row_avxvnni_16: tile_avxvnni, 2, [1, 2, 3, 4, 5, 6];
    row_avxvnni_8: tile_avxvnni, 1, [1, 2, 4, 6, 8, 10, 12];
    #[cfg(test)]
    row_avxvnni_16_twin: tile_avxvnni_twin, 2, [1, 2, 3, 4, 5, 6];
    #[cfg(test)]
    row_avxvnni_8_twin: tile_avxvnni_twin, 1, [1, 2, 4, 6, 8, 10, 12];
    row_avx2_16: tile_avx2_any, 2, [1, 2, 3, 4];
    row_avx2_8: tile_avx2_any, 1, [1, 2, 4, 6, 8];
}

/// One step for four neighbouring pixels. In assembly, since the compiler would load all pixels of a tile first, and runs
/// out of registers over it.
macro_rules! four_pixels {
    ($size:literal, $x:expr, $stride:expr, $thrice:expr, $w:expr, $sums:expr) => {
        std::arch::asm!(
            concat!("vpbroadcastd {v:", $size, "}, dword ptr [{x}]"),
            concat!("vpdpbusd {a:", $size, "}, {v:", $size, "}, {w:", $size, "}"),
            concat!("vpbroadcastd {v:", $size, "}, dword ptr [{x} + {s}]"),
            concat!("vpdpbusd {b:", $size, "}, {v:", $size, "}, {w:", $size, "}"),
            concat!("vpbroadcastd {v:", $size, "}, dword ptr [{x} + 2*{s}]"),
            concat!("vpdpbusd {c:", $size, "}, {v:", $size, "}, {w:", $size, "}"),
            concat!("vpbroadcastd {v:", $size, "}, dword ptr [{x} + {t}]"),
            concat!("vpdpbusd {d:", $size, "}, {v:", $size, "}, {w:", $size, "}"),
            x = in(reg) $x,
            s = in(reg) $stride,
            t = in(reg) $thrice,
            w = in(zmm_reg) $w,
            v = out(zmm_reg) _,
            a = inout(zmm_reg) $sums[0],
            b = inout(zmm_reg) $sums[1],
            c = inout(zmm_reg) $sums[2],
            d = inout(zmm_reg) $sums[3],
            options(nostack, readonly, preserves_flags)
        )
    };
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile_vnni_16<const T: usize, const V: usize>(job: &RowJob, first: usize) {
    // SAFETY: the job's pointers; reads are unaligned, writes masked to the job's channels.
    unsafe {
        let base = job.base.add(first * job.pixel);
        let (stride, thrice) = (job.pixel, 3 * job.pixel);
        let mut sums = [_mm512_loadu_si512(job.bias.cast()); T];
        let mut weights = job.weights;
        for step in 0..job.steps {
            let at = base.add(*job.offsets.add(step) as usize);
            let w = _mm512_loadu_si512(weights.cast());
            weights = weights.add(64);
            let (fours, rest) = sums.as_chunks_mut::<4>();
            let mut x = at;
            for four in fours {
                four_pixels!("z", x, stride, thrice, w, four);
                x = x.wrapping_add(4 * stride);
            }
            for sum in rest {
                *sum = _mm512_dpbusd_epi32(*sum, _mm512_set1_epi32(x.cast::<i32>().read_unaligned()), w);
                x = x.wrapping_add(stride);
            }
        }
        let scale = _mm512_loadu_ps(job.scale);
        let (low, high) = (_mm512_set1_ps(job.low), _mm512_set1_ps(job.high));
        let zero = _mm512_set1_epi32(job.zero);
        let mask = (0xffff_u32 >> (16 - job.lanes)) as u16;
        for (t, sum) in sums.iter().enumerate() {
            let real = _mm512_mul_ps(_mm512_cvtepi32_ps(*sum), scale);
            let real = _mm512_min_ps(_mm512_max_ps(real, low), high);
            let bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(real), zero));
            let out = job.out.add((first + t) * job.out_pixel);
            if mask == 0xffff {
                _mm_storeu_si128(out.cast(), bytes);
            } else {
                _mm_mask_storeu_epi8(out.cast(), mask, bytes);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile_vnni_8<const T: usize, const V: usize>(job: &RowJob, first: usize) {
    // SAFETY: as `tile_vnni_16`.
    unsafe {
        let base = job.base.add(first * job.pixel);
        let (stride, thrice) = (job.pixel, 3 * job.pixel);
        let mut sums = [_mm256_loadu_si256(job.bias.cast()); T];
        let mut weights = job.weights;
        for step in 0..job.steps {
            let at = base.add(*job.offsets.add(step) as usize);
            let w = _mm256_loadu_si256(weights.cast());
            weights = weights.add(32);
            let (fours, rest) = sums.as_chunks_mut::<4>();
            let mut x = at;
            for four in fours {
                four_pixels!("y", x, stride, thrice, w, four);
                x = x.wrapping_add(4 * stride);
            }
            for sum in rest {
                *sum = _mm256_dpbusd_epi32(*sum, _mm256_set1_epi32(x.cast::<i32>().read_unaligned()), w);
                x = x.wrapping_add(stride);
            }
        }
        let scale = _mm256_loadu_ps(job.scale);
        let (low, high) = (_mm256_set1_ps(job.low), _mm256_set1_ps(job.high));
        let zero = _mm256_set1_epi32(job.zero);
        let mask = (0xff_u32 >> (8 - job.lanes)) as u16;
        for (t, sum) in sums.iter().enumerate() {
            let real = _mm256_mul_ps(_mm256_cvtepi32_ps(*sum), scale);
            let real = _mm256_min_ps(_mm256_max_ps(real, low), high);
            let bytes = _mm256_cvtepi32_epi8(_mm256_add_epi32(_mm256_cvtps_epi32(real), zero));
            let out = job.out.add((first + t) * job.out_pixel);
            if mask == 0xff {
                _mm_storel_epi64(out.cast(), bytes);
            } else {
                _mm_mask_storeu_epi8(out.cast(), mask, bytes);
            }
        }
    }
}

/// The steps were arranged so that no 16-bit sum of a group saturates.
unsafe fn tile_avx2_any<const T: usize, const V: usize>(job: &RowJob, first: usize) {
    // SAFETY: as the caller's.
    unsafe {
        match job.group {
            4 => tile_avx2::<T, V, 4>(job, first),
            3 => tile_avx2::<T, V, 3>(job, first),
            2 => tile_avx2::<T, V, 2>(job, first),
            _ => tile_avx2::<T, V, 1>(job, first),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
unsafe fn tile_avx2<const T: usize, const V: usize, const G: usize>(job: &RowJob, first: usize) {
    // SAFETY: the job's pointers; reads are unaligned.
    unsafe {
        let base = job.base.add(first * job.pixel);
        let stride = job.pixel;
        let ones = _mm256_set1_epi16(1);
        let bias: [__m256i; V] = std::array::from_fn(|v| _mm256_loadu_si256(job.bias.add(8 * v).cast()));
        let mut sums = [bias; T];
        let mut weights = job.weights;
        for group in 0..job.steps / G {
            let at: [*const u8; G] = std::array::from_fn(|g| base.add(*job.offsets.add(group * G + g) as usize));
            for (t, sums) in sums.iter_mut().enumerate() {
                let mut products = [_mm256_setzero_si256(); V];
                for (g, at) in at.iter().enumerate() {
                    let x = at.add(t * stride).cast::<i32>().read_unaligned();
                    let x = _mm256_set1_epi32(x);
                    for (v, product) in products.iter_mut().enumerate() {
                        let w = _mm256_loadu_si256(weights.add((g * V + v) * 32).cast());
                        let pairs = _mm256_maddubs_epi16(x, w);
                        *product = if g == 0 { pairs } else { _mm256_add_epi16(*product, pairs) };
                    }
                }
                for (sum, product) in sums.iter_mut().zip(products) {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(product, ones));
                }
            }
            weights = weights.add(G * V * 32);
        }
        for (t, sums) in sums.iter().enumerate() {
            finish(job, first + t, sums);
        }
    }
}

/// Sums of one pixel to bytes, and the bytes to their places.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn finish<const V: usize>(job: &RowJob, pixel: usize, sums: &[__m256i; V]) {
    // SAFETY: the job has a scale for each lane and room for its channels; narrow writes go through a buffer.
    unsafe {
        let (low, high) = (_mm256_set1_ps(job.low), _mm256_set1_ps(job.high));
        let zero = _mm256_set1_epi32(job.zero);
        let out = job.out.add(pixel * job.out_pixel);
        for (v, sum) in sums.iter().enumerate() {
            let real = _mm256_mul_ps(_mm256_cvtepi32_ps(*sum), _mm256_loadu_ps(job.scale.add(8 * v)));
            let real = _mm256_min_ps(_mm256_max_ps(real, low), high);
            let whole = _mm256_add_epi32(_mm256_cvtps_epi32(real), zero);
            let halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256::<1>(whole));
            let bytes = _mm_packus_epi16(halves, halves);
            let lanes = job.lanes.saturating_sub(8 * v).min(8);
            if lanes == 8 {
                _mm_storel_epi64(out.add(8 * v).cast(), bytes);
            } else {
                let narrow = _mm_cvtsi128_si64(bytes).to_le_bytes();
                for (lane, byte) in narrow.iter().take(lanes).enumerate() {
                    out.add(8 * v + lane).write(*byte);
                }
            }
        }
    }
}

/// The tile of AVX-VNNI, and its twin in the encoding of AVX-512, so that processors with only that one test the same code.
macro_rules! tile_avxvnni {
    ($(#[$meta:meta])* $name:ident, $features:literal, $multiply_add:ident) => {
        $(#[$meta])*
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $name<const T: usize, const V: usize>(job: &RowJob, first: usize) {
            // SAFETY: the job's pointers; reads are unaligned.
            unsafe {
                let base = job.base.add(first * job.pixel);
                let bias: [__m256i; V] = std::array::from_fn(|v| _mm256_loadu_si256(job.bias.add(8 * v).cast()));
                let mut sums = [bias; T];
                let mut weights = job.weights;
                for step in 0..job.steps {
                    let at = base.add(*job.offsets.add(step) as usize);
                    let w: [__m256i; V] = std::array::from_fn(|v| _mm256_loadu_si256(weights.add(32 * v).cast()));
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let x = _mm256_set1_epi32(at.add(t * job.pixel).cast::<i32>().read_unaligned());
                        for (sum, w) in sums.iter_mut().zip(w) {
                            *sum = $multiply_add(*sum, x, w);
                        }
                    }
                    weights = weights.add(32 * V);
                }
                for (t, sums) in sums.iter().enumerate() {
                    finish(job, first + t, sums);
                }
            }
        }
    };
}

tile_avxvnni!(tile_avxvnni, "avx2,avxvnni", _mm256_dpbusd_avx_epi32);
tile_avxvnni!(#[cfg(test)] tile_avxvnni_twin, "avx2,avx512f,avx512vl,avx512vnni", _mm256_dpbusd_epi32);

pub(super) fn has_vbmi() -> bool {
    is_x86_feature_detected!("avx512vbmi") && is_x86_feature_detected!("avx512bw")
}

/// Passes bytes through a table, 64 at a time.
///
/// # Safety
/// AVX-512 VBMI; `count` readable and writable bytes that do not overlap (or are the same).
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(super) unsafe fn map_bytes(map: &[u8; 256], from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: the table has 256 bytes; the rest is the caller's promise, the tail is masked.
    unsafe {
        let table: [__m512i; 4] = std::array::from_fn(|n| _mm512_loadu_si512(map.as_ptr().add(64 * n).cast()));
        let mut done = 0;
        while done < count {
            let mask = if count - done >= 64 { u64::MAX } else { (1 << (count - done)) - 1 };
            let x = _mm512_maskz_loadu_epi8(mask, from.add(done).cast());
            let low = _mm512_permutex2var_epi8(table[0], x, table[1]);
            let high = _mm512_permutex2var_epi8(table[2], x, table[3]);
            let mapped = _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
            _mm512_mask_storeu_epi8(to.add(done).cast(), mask, mapped);
            done += 64;
        }
    }
}

/// Multiply-adds of one round of a loop that does nothing else, on ten independent sums.
///
/// # Safety
/// AVX-512 VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn peak_vnni(rounds: usize) -> usize {
    let mut sums = [_mm512_set1_epi32(1); 10];
    let (mut x, w) = (_mm512_set1_epi8(3), _mm512_set1_epi8(5));
    for _ in 0..rounds {
        x = std::hint::black_box(x);
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, x, w);
        }
    }
    std::hint::black_box(sums);
    10 * 64
}

/// As [`peak_vnni`], 32 bytes at a time.
///
/// # Safety
/// AVX-VNNI.
#[target_feature(enable = "avx2,avxvnni")]
pub(super) unsafe fn peak_avxvnni(rounds: usize) -> usize {
    let mut sums = [_mm256_set1_epi32(1); 10];
    let (mut x, w) = (_mm256_set1_epi8(3), _mm256_set1_epi8(5));
    for _ in 0..rounds {
        x = std::hint::black_box(x);
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, x, w);
        }
    }
    std::hint::black_box(sums);
    10 * 32
}

/// As [`peak_vnni`], with exact 16-bit multiply-adds: `vpmaddwd` and an addition.
///
/// # Safety
/// AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn peak_avx2(rounds: usize) -> usize {
    let mut sums = [_mm256_set1_epi32(1); 10];
    let (mut x, w) = (_mm256_set1_epi16(3), _mm256_set1_epi16(5));
    for _ in 0..rounds {
        x = std::hint::black_box(x);
        for (n, sum) in sums.iter_mut().enumerate() {
            // Another factor for each sum, or the compiler multiplies once for all.
            let w = _mm256_add_epi16(w, _mm256_set1_epi16(n as i16));
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(x, w));
        }
    }
    std::hint::black_box(sums);
    10 * 16
}
