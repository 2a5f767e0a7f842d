//! The median of a box of voxels.
//!
//! Thirty-two neighbouring windows at once, on keys that order as the values do: small windows by forgetting the least
//! and the greatest of half the values until one is left, large ones by fixing the median's bits from the highest down.

#![allow(clippy::needless_range_loop, reason = "lanes of several arrays move together; the index is what they share")]

use ndarray::{Array3, ArrayView3};

use super::lines::Edge;
use crate::pool::{Fault, Pool, widened};
use crate::volume::Voxel;

/// Voxels in the largest window: what a 16-bit counter holds.
pub const WINDOW_MAX: usize = 65_535;

/// Windows up to this many voxels are sorted by forgetting, whose cost grows with their square.
const FORGET_MAX: usize = 63;

const LANES: usize = 32;

/// A window that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MedianError {
    /// More voxels than can be counted.
    #[error("a window of radius {0:?} voxels (z, y, x) is too large: it may hold {WINDOW_MAX} voxels")]
    Window([usize; 3]),
    /// A task panicked.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// An unsigned number whose order is that of the values it stands for.
pub trait Key: Copy + Ord + Default + Send + Sync + 'static {
    /// A number that is this one with bit `n` set, counted from the lowest.
    fn with_bit(self, n: u32) -> Self;
    /// `self + 1` when `count`.
    fn plus(self, count: bool) -> Self;
    /// A count as a key.
    fn of(count: usize) -> Self;
}

macro_rules! keys {
    ($($k:ty),*) => {$(
        impl Key for $k {
            fn with_bit(self, n: u32) -> Self { self | 1 << n }
            fn plus(self, count: bool) -> Self { self + <$k>::from(count) }
            fn of(count: usize) -> Self { count as $k }
        }
    )*};
}
keys!(u16, u32, u64);

/// A voxel that can be ordered through a key; NaN comes after every number.
pub trait Sample: Voxel {
    /// The key's type.
    type Key: Key;
    /// Bits of the key that may be set.
    const BITS: u32;
    /// Value to key.
    fn key(self) -> Self::Key;
    /// Key to value.
    fn value(key: Self::Key) -> Self;
}

macro_rules! samples {
    ($($t:ty, $k:ty, $bits:expr, $key:expr, $value:expr;)*) => {$(
        impl Sample for $t {
            type Key = $k;
            const BITS: u32 = $bits;
            fn key(self) -> $k { let key: fn($t) -> $k = $key; key(self) }
            fn value(key: $k) -> $t { let value: fn($k) -> $t = $value; value(key) }
        }
    )*};
}
samples! {
    u8, u16, 8, |v| v.into(), |k| k as u8;
    i8, u16, 8, |v| (v as u8 ^ 0x80).into(), |k| (k as u8 ^ 0x80) as i8;
    u16, u16, 16, |v| v, |k| k;
    i16, u16, 16, |v| v as u16 ^ 0x8000, |k| (k ^ 0x8000) as i16;
    u32, u32, 32, |v| v, |k| k;
    i32, u32, 32, |v| v as u32 ^ 0x8000_0000, |k| (k ^ 0x8000_0000) as i32;
    // Negative floats order the other way round: flip all their bits, and only the sign of the others.
    f32, u32, 32,
        |v| { let b = if v.is_nan() { 0x7fff_ffff } else { v.to_bits() }; b ^ (((b as i32 >> 31) as u32) | 0x8000_0000) },
        |k| f32::from_bits(if k >> 31 == 1 { k ^ 0x8000_0000 } else { !k });
    f64, u64, 64,
        |v| { let b = if v.is_nan() { u64::MAX >> 1 } else { v.to_bits() }; b ^ (((b as i64 >> 63) as u64) | 1 << 63) },
        |k| f64::from_bits(if k >> 63 == 1 { k ^ (1 << 63) } else { !k });
}

/// The median of all voxels within `radius` (`[z, y, x]`, in voxels) along each axis.
///
/// The values are those of `scipy.ndimage.median_filter(size=2 * radius + 1)`. NaN counts as greater than every number.
///
/// # Errors
/// [`MedianError::Window`].
pub fn median<T: Sample>(
    volume: ArrayView3<T>,
    radius: [usize; 3],
    edge: Edge,
    pool: &Pool,
) -> Result<Array3<T>, MedianError> {
    let window = radius.iter().try_fold(1usize, |n, r| n.checked_mul(r.checked_mul(2)?.checked_add(1)?));
    let window = window.filter(|n| *n <= WINDOW_MAX).ok_or(MedianError::Window(radius))?;
    let (slices, rows, columns) = volume.dim();
    if volume.is_empty() || window == 1 {
        return Ok(volume.to_owned());
    }
    let keys: Vec<T::Key> = volume.iter().map(|v| v.key()).collect();
    let [rz, ry, rx] = radius;
    let padded = columns + 2 * rx + LANES;
    let source: Vec<usize> = (0..columns + 2 * rx).map(|i| edge.source(i as isize - rx as isize, columns)).collect();

    let mut out = Array3::from_elem(volume.dim(), T::default());
    pool.for_each_chunk(out.as_slice_mut().expect("made here"), rows * columns, |k, slice| {
        // Rows of all slices of the window, as they enter at the bottom; each is padded once and used for 2 ry + 1 rows.
        let planes = 2 * rz + 1;
        let mut ring = vec![T::Key::default(); (2 * ry + 1) * planes * padded];
        let enter = |ring: &mut [T::Key], row: isize| {
            let slot = row.rem_euclid(2 * ry as isize + 1) as usize;
            let from_row = edge.source(row, rows);
            for plane in 0..planes {
                let from_slice = edge.source(k as isize + plane as isize - rz as isize, slices);
                let from = &keys[(from_slice * rows + from_row) * columns..][..columns];
                let to = &mut ring[(slot * planes + plane) * padded..][..source.len()];
                to.iter_mut().zip(&source).for_each(|(to, i)| *to = from[*i]);
            }
        };
        for row in -(ry as isize)..ry as isize {
            enter(&mut ring, row);
        }
        let mut work = vec![[T::Key::default(); LANES]; window];
        for (j, out) in slice.chunks_exact_mut(columns).enumerate() {
            enter(&mut ring, (j + ry) as isize);
            for (n, out) in out.chunks_mut(LANES).enumerate() {
                let middle = select(&ring, padded, n * LANES, &mut work, T::BITS);
                out.iter_mut().zip(middle).for_each(|(o, k)| *o = T::value(k));
            }
        }
    })?;
    Ok(out)
}

widened! {
    /// Medians of the windows that start at column `at` of the padded rows.
    fn select<K: Key>(rows: &[K], padded: usize, at: usize, work: &mut [[K; LANES]], bits: u32) -> [K; LANES] {
        let width = work.len() / (rows.len() / padded);
        let samples = rows.chunks_exact(padded).flat_map(|row| row[at..at + width + LANES - 1].windows(LANES));
        if work.len() > FORGET_MAX {
            for (to, from) in work.iter_mut().zip(samples) {
                to.copy_from_slice(from);
            }
            return by_bits(work, bits);
        }
        // Of n values the median is none of the extremes of any n / 2 + 2 of them.
        let mut left = work.len() / 2 + 2;
        let mut samples = samples;
        for (to, from) in work[..left].iter_mut().zip(&mut samples) {
            to.copy_from_slice(from);
        }
        loop {
            extremes_out(&mut work[..left]);
            match samples.next() {
                Some(from) => work[0].copy_from_slice(from),
                None => return work[1],
            }
            left -= 1;
        }
    }
}

/// Brings the least of each lane to the front and the greatest to the back.
#[inline(always)]
fn extremes_out<K: Key>(values: &mut [[K; LANES]]) {
    let n = values.len();
    for a in 0..n / 2 {
        exchange(values, a, n - 1 - a);
    }
    for a in 1..n.div_ceil(2) {
        exchange(values, 0, a);
    }
    for b in n / 2..n - 1 {
        exchange(values, b, n - 1);
    }
}

#[inline(always)]
fn exchange<K: Key>(values: &mut [[K; LANES]], a: usize, b: usize) {
    let (x, y) = (values[a], values[b]);
    for l in 0..LANES {
        values[a][l] = x[l].min(y[l]);
        values[b][l] = x[l].max(y[l]);
    }
}

#[inline(always)]
fn by_bits<K: Key>(values: &[[K; LANES]], bits: u32) -> [K; LANES] {
    let half = K::of(values.len() / 2);
    let mut middle = [K::default(); LANES];
    for bit in (0..bits).rev() {
        let guess = middle.map(|m| m.with_bit(bit));
        let mut below = [K::default(); LANES];
        for value in values {
            for l in 0..LANES {
                below[l] = below[l].plus(value[l] < guess[l]);
            }
        }
        for l in 0..LANES {
            if below[l] <= half {
                middle[l] = guess[l];
            }
        }
    }
    middle
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scattered<T: Voxel>(shape: [usize; 3]) -> Array3<T> {
        Array3::from_shape_fn(shape, |(k, j, i)| {
            T::from_f64(
                ((k * 7919 + j * 10473 + i * 12997 + k * j * i * 31) % 251) as f64
                    - if T::from_f64(-1.0).to_f64() < 0.0 { 125.0 } else { 0.0 },
            )
        })
    }

    fn check<T: Sample>(shape: [usize; 3], radius: [usize; 3], edge: Edge) {
        let image = scattered::<T>(shape);
        let found = median(image.view(), radius, edge, &Pool::new(2)).unwrap();
        let r = radius.map(|r| r as isize);
        for ((k, j, i), v) in found.indexed_iter() {
            let mut window = Vec::new();
            for dz in -r[0]..=r[0] {
                for dy in -r[1]..=r[1] {
                    for dx in -r[2]..=r[2] {
                        let at = [(k, dz), (j, dy), (i, dx)];
                        let [a, b, c] = std::array::from_fn(|n| edge.source(at[n].0 as isize + at[n].1, shape[n]));
                        window.push(image[[a, b, c]].to_f64());
                    }
                }
            }
            window.sort_by(f64::total_cmp);
            assert_eq!(v.to_f64(), window[window.len() / 2], "{:?} {radius:?} {edge:?} {:?}", T::TYPE, (k, j, i));
        }
    }

    #[test]
    fn the_median_is_the_middle_of_the_sorted_window_for_every_type_and_size() {
        for edge in [Edge::Reflect, Edge::Nearest] {
            for radius in [[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 3], [2, 2, 2]] {
                check::<u8>([4, 5, 37], radius, edge);
                check::<i16>([3, 6, 33], radius, edge);
                check::<f32>([1, 7, 40], radius, edge);
            }
            check::<i8>([3, 4, 35], [1, 1, 1], edge);
            check::<u16>([3, 4, 35], [2, 2, 2], edge);
            check::<u32>([3, 4, 5], [1, 1, 1], edge);
            check::<i32>([3, 4, 5], [2, 2, 2], edge);
            check::<f64>([3, 4, 5], [1, 1, 1], edge);
            check::<f64>([3, 4, 5], [2, 2, 2], edge);
        }
    }

    #[test]
    fn nan_counts_as_greatest_and_infinities_stay() {
        let image = Array3::from_shape_vec((1, 1, 5), vec![f32::NEG_INFINITY, 1.0, f32::NAN, -f32::NAN, -2.0]).unwrap();
        let found = median(image.view(), [0, 0, 1], Edge::Nearest, &Pool::new(1)).unwrap();
        let found = found.into_raw_vec_and_offset().0;
        assert_eq!(found[..2], [f32::NEG_INFINITY, 1.0]);
        assert!(found[2].is_nan() && found[3].is_nan());
        assert_eq!(found[4], -2.0);
    }

    #[test]
    fn a_window_beyond_counting_is_refused() {
        let image = Array3::<u8>::zeros((2, 2, 2));
        for radius in [[21, 21, 21], [usize::MAX, 1, 1]] {
            assert!(matches!(median(image.view(), radius, Edge::Reflect, &Pool::new(1)), Err(MedianError::Window(_))));
        }
    }
}
