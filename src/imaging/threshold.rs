//! Masks from values: a fixed range, or Otsu's threshold.

use ndarray::{Array3, ArrayView3};

use crate::pool::widened;

/// Bins of the histogram of an image with fractions, as scikit-image's.
pub const BINS: usize = 256;

/// Integer images whose values span more than this get [`BINS`] bins too: one bin a value would cost too much memory.
const INTEGER_SPAN_MAX: f64 = 1_048_576.0;

/// An image that has no threshold.
#[derive(Debug, thiserror::Error)]
pub enum ThresholdError {
    /// All voxels have one value.
    #[error("every voxel is {0}: there are no two classes to separate")]
    OneValue(f32),
    /// No voxel has a value.
    #[error("the image has no voxel that is a number")]
    Empty,
    /// Infinite voxels have no place in a histogram.
    #[error("{0} voxels are infinite: replace them first")]
    Infinite(usize),
}

/// Which values are inside a mask; NaN never is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Inside {
    /// From the first to the second, both included.
    Between(f32, f32),
    /// Greater than this.
    Above(f64),
}

impl Inside {
    /// Whether a value is inside.
    pub fn holds(self, value: f32) -> bool {
        match self {
            Self::Between(lower, upper) => value >= lower && value <= upper,
            Self::Above(threshold) => f64::from(value) > threshold,
        }
    }

    /// 1 where the value is inside, 0 elsewhere.
    pub fn mask(self, values: ArrayView3<f32>) -> Array3<u8> {
        values.mapv(|v| u8::from(self.holds(v)))
    }
}

/// The least and greatest value of a part of an image, NaN left out; how many have a fraction (or are beyond 2^31: no
/// histogram has a bin for each value there), and how many are infinite.
struct Extremes {
    low: f32,
    high: f32,
    broken: u32,
    infinite: u32,
}

impl Extremes {
    fn of(values: &[f32]) -> Self {
        let mut extremes = Self { low: f32::INFINITY, high: f32::NEG_INFINITY, broken: 0, infinite: 0 };
        values.chunks(1 << 20).for_each(|part| look(part, &mut extremes));
        extremes
    }
}

widened! {
    /// Eight lanes side by side.
    fn look(values: &[f32], extremes: &mut Extremes) {
        let mut lanes = [[f32::INFINITY; 8], [f32::NEG_INFINITY; 8]];
        let mut counts = [[0u32; 8]; 2];
        let mut see = |n: usize, v: f32| {
            // A comparison with NaN is false, and NaN is not itself.
            lanes[0][n] = if v < lanes[0][n] { v } else { lanes[0][n] };
            lanes[1][n] = if v > lanes[1][n] { v } else { lanes[1][n] };
            let whole = (v as i32) as f32 == v;
            counts[0][n] += u32::from(!whole & !v.is_nan());
            counts[1][n] += u32::from(v.abs() == f32::INFINITY);
        };
        let eights = values.chunks_exact(8);
        eights.remainder().iter().for_each(|v| see(0, *v));
        for eight in eights {
            for n in 0..8 {
                see(n, eight[n]);
            }
        }
        for n in 0..8 {
            extremes.low = extremes.low.min(lanes[0][n]);
            extremes.high = extremes.high.max(lanes[1][n]);
            extremes.broken += counts[0][n];
            extremes.infinite += counts[1][n];
        }
    }
}

/// The threshold that best separates two classes (Otsu 1979): values above it are the brighter class.
///
/// The value is that of `skimage.filters.threshold_otsu`: for whole numbers one bin a value, else [`BINS`] bins between
/// the extremes, of which the centre is given. NaN voxels do not count.
///
/// # Errors
/// [`ThresholdError`] for an image of one value, of none, or with infinities.
pub fn otsu(values: ArrayView3<f32>) -> Result<f64, ThresholdError> {
    let values = values.as_standard_layout();
    otsu_in_parts(|see| see(values.as_slice().expect("standard layout")))
}

/// As [`otsu`], of an image that is never in memory as a whole: `pass` shows all its values, in parts, and is called
/// twice.
///
/// # Errors
/// As [`otsu`].
pub fn otsu_in_parts(mut pass: impl FnMut(&mut dyn FnMut(&[f32]))) -> Result<f64, ThresholdError> {
    let (mut low, mut high, mut whole, mut infinite) = (f32::INFINITY, f32::NEG_INFINITY, true, 0);
    pass(&mut |values| {
        let part = Extremes::of(values);
        (low, high) = (low.min(part.low), high.max(part.high));
        whole &= part.broken == 0;
        infinite += part.infinite as usize;
    });
    if infinite > 0 {
        return Err(ThresholdError::Infinite(infinite));
    }
    if low > high {
        return Err(ThresholdError::Empty);
    }
    if low == high {
        return Err(ThresholdError::OneValue(low));
    }
    let (low, high) = (f64::from(low), f64::from(high));
    let whole = whole && high - low < INTEGER_SPAN_MAX;
    let bins = if whole { (high - low) as usize + 1 } else { BINS };
    let per_value = if whole { 1.0 } else { BINS as f64 / (high - low) };
    let mut counts = vec![0u64; bins];
    let (mut two, least) = (vec![0u64; bins], low as i32);
    pass(&mut |values| {
        if whole {
            // Two counts by turns: neighbours of one value do not wait for each other.
            for pair in values.chunks(2) {
                for (v, counts) in pair.iter().zip([&mut counts, &mut two]).filter(|(v, _)| !v.is_nan()) {
                    counts[((*v as i32).wrapping_sub(least) as usize).min(bins - 1)] += 1;
                }
            }
            return;
        }
        for v in values.iter().filter(|v| !v.is_nan()) {
            counts[(((f64::from(*v) - low) * per_value) as usize).min(bins - 1)] += 1;
        }
    });
    counts.iter_mut().zip(two).for_each(|(count, more)| *count += more);
    let centre = |n: usize| if whole { low + n as f64 } else { low + (n as f64 + 0.5) / per_value };

    let total: u64 = counts.iter().sum();
    let sum: f64 = counts.iter().enumerate().map(|(n, c)| *c as f64 * centre(n)).sum();
    let (mut best, mut threshold) = (-1.0, low);
    let (mut below, mut below_sum) = (0u64, 0.0);
    for (n, count) in counts[..bins - 1].iter().enumerate() {
        below += count;
        below_sum += *count as f64 * centre(n);
        let (a, b) = (below as f64, (total - below) as f64);
        let between = a * b * (below_sum / a - (sum - below_sum) / b).powi(2);
        if between > best {
            (best, threshold) = (between, centre(n));
        }
    }
    Ok(threshold)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn otsu_gives_scikit_images_value() {
        let at = |k: usize, j: usize, i: usize| (k * 37 + j * 101 + i * 53) % 97;
        // Whole numbers: numpy, v = (n % 97); v + 300 * (n > 60)
        let whole = Array3::from_shape_fn((4, 20, 30), |(k, j, i)| {
            let n = at(k, j, i);
            (n + if n > 60 { 300 } else { 0 }) as f32 - 50.0
        });
        assert_eq!(otsu(whole.view()).unwrap(), 10.0);
        let fractions = whole.mapv(|v| v * 0.37 + (v * v) * 1e-4);
        let golden = 3.693_659_8;
        assert!((otsu(fractions.view()).unwrap() - golden).abs() < 1e-4, "{}", otsu(fractions.view()).unwrap());
    }

    #[test]
    fn ranges_are_inclusive_and_nan_is_outside() {
        let values = Array3::from_shape_vec((1, 1, 5), vec![0.9, 1.0, 2.0, 2.1, f32::NAN]).unwrap();
        assert_eq!(Inside::Between(1.0, 2.0).mask(values.view()).into_raw_vec_and_offset().0, [0, 1, 1, 0, 0]);
        assert_eq!(Inside::Above(1.0).mask(values.view()).into_raw_vec_and_offset().0, [0, 0, 1, 1, 0]);
    }

    #[test]
    fn images_without_two_classes_are_refused() {
        let of = |v: f32| Array3::from_elem((1, 2, 2), v);
        assert!(matches!(otsu(of(3.0).view()), Err(ThresholdError::OneValue(3.0))));
        assert!(matches!(otsu(of(f32::NAN).view()), Err(ThresholdError::Empty)));
        assert!(matches!(otsu(of(f32::INFINITY).view()), Err(ThresholdError::Infinite(4))));
    }
}
