//! Statistics of the values under each label.

use std::collections::BTreeMap;

use ndarray::ArrayView3;

use crate::geometry::Affine;
use crate::pool::{Fault, Pool};

/// More different labels than this are not labels.
pub const LABELS_MAX: usize = 100_000;

/// What is known of one label's voxels.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelStatistics {
    /// The label.
    pub label: u32,
    /// Its voxels, those without a value included.
    pub voxels: u64,
    /// Voxels whose value is NaN or infinite; they count in size and centroid and in nothing else.
    pub not_finite: u64,
    /// Mean of the finite values, or NaN when there is none; the same holds for the following.
    pub mean: f64,
    /// Standard deviation with divisor n (numpy's default).
    pub std: f64,
    /// The least value.
    pub min: f64,
    /// The greatest value.
    pub max: f64,
    /// The percentiles asked for, between the two nearest values where they fall between (numpy's `linear`).
    pub percentiles: Vec<f64>,
    /// Voxels times the volume of one.
    pub volume_mm3: f64,
    /// Mean of the voxels' indices, `[k, j, i]`.
    pub centroid_voxel: [f64; 3],
    /// That place in patient space.
    pub centroid_lps_mm: [f64; 3],
}

/// Statistics that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum StatisticsError {
    /// Labels and values are of different shapes.
    #[error("the labels have {labels:?} voxels and the image {values:?} (slices, rows, columns)")]
    Shape {
        /// The label map's.
        labels: [usize; 3],
        /// The image's.
        values: [usize; 3],
    },
    /// Too many different labels.
    #[error("there are more than {LABELS_MAX} different labels: is this a label map?")]
    TooManyLabels,
    /// A percentile outside 0 to 100.
    #[error("percentile {0} does not lie between 0 and 100")]
    Percentile(f64),
    /// A task panicked.
    #[error(transparent)]
    Fault(#[from] Fault),
}

#[derive(Default)]
struct Gathered {
    voxels: u64,
    sums: [u64; 3],
    values: Vec<f32>,
}

/// Statistics of `values` under every label that occurs, 0 left out, in ascending order.
///
/// # Errors
/// [`StatisticsError`].
pub fn per_label(
    values: ArrayView3<f32>,
    labels: ArrayView3<u32>,
    affine: &Affine,
    percentiles: &[f64],
    pool: &Pool,
) -> Result<Vec<LabelStatistics>, StatisticsError> {
    let shape = |(z, y, x): (usize, usize, usize)| [z, y, x];
    if values.dim() != labels.dim() {
        return Err(StatisticsError::Shape { labels: shape(labels.dim()), values: shape(values.dim()) });
    }
    if let Some(p) = percentiles.iter().find(|p| !(0.0..=100.0).contains(*p)) {
        return Err(StatisticsError::Percentile(*p));
    }
    let mut all: BTreeMap<u32, Gathered> = BTreeMap::new();
    for (k, (labels, values)) in labels.outer_iter().zip(values.outer_iter()).enumerate() {
        for (j, (labels, values)) in labels.outer_iter().zip(values.outer_iter()).enumerate() {
            let mut i = 0;
            // Neighbours mostly share their label: one search of the map for each run of them.
            while i < labels.len() {
                let label = labels[i];
                let end = (i + 1..labels.len()).find(|n| labels[*n] != label).unwrap_or(labels.len());
                if label != 0 {
                    let gathered = all.entry(label).or_default();
                    let count = (end - i) as u64;
                    gathered.voxels += count;
                    gathered.sums[0] += k as u64 * count;
                    gathered.sums[1] += j as u64 * count;
                    gathered.sums[2] += (i + end - 1) as u64 * count;
                    gathered.values.extend((i..end).map(|n| values[n]).filter(|v| v.is_finite()));
                }
                i = end;
            }
            if all.len() > LABELS_MAX {
                return Err(StatisticsError::TooManyLabels);
            }
        }
    }
    let list: Vec<(u32, std::sync::Mutex<Gathered>)> = all.into_iter().map(|(l, g)| (l, g.into())).collect();
    Ok(pool.map(list.len(), |n| {
        let (label, gathered) = &list[n];
        let gathered = std::mem::take(&mut *gathered.lock().expect("each is locked once"));
        measure(*label, gathered, affine, percentiles)
    })?)
}

fn measure(label: u32, gathered: Gathered, affine: &Affine, percentiles: &[f64]) -> LabelStatistics {
    let Gathered { voxels, sums, mut values } = gathered;
    let count = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / count;
    values.sort_unstable_by(f32::total_cmp);
    let at = |n: usize| values.get(n).map_or(f64::NAN, |v| f64::from(*v));
    let percentile = |p: &f64| {
        let place = p / 100.0 * (count - 1.0).max(0.0);
        let (low, high) = (at(place.floor() as usize), at(place.ceil() as usize));
        low + (high - low) * place.fract()
    };
    let n = voxels as f64;
    let centroid_voxel = [sums[0] as f64 / n, sums[1] as f64 / n, sums[2] as f64 / (2.0 * n)];
    LabelStatistics {
        label,
        voxels,
        not_finite: voxels - values.len() as u64,
        mean,
        std: variance.sqrt(),
        min: at(0),
        max: values.last().map_or(f64::NAN, |v| f64::from(*v)),
        percentiles: percentiles.iter().map(percentile).collect(),
        volume_mm3: n * affine.determinant().abs(),
        centroid_voxel,
        centroid_lps_mm: affine.kji_to_lps(centroid_voxel),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Spacing;
    use ndarray::Array3;

    fn affine() -> Affine {
        Affine::axial(Spacing::new([2.0, 0.5, 0.5]).unwrap(), [10.0, 20.0, 30.0])
    }

    #[test]
    fn numbers_are_those_of_numpy() {
        let values = Array3::from_shape_vec((1, 2, 4), vec![1.0, 2.0, 4.0, 8.0, 16.0, f32::NAN, 32.0, 64.0]).unwrap();
        let labels = Array3::from_shape_vec((1, 2, 4), vec![5, 5, 5, 0, 2, 2, 0, 5]).unwrap();
        let found =
            per_label(values.view(), labels.view(), &affine(), &[0.0, 25.0, 50.0, 90.0, 100.0], &Pool::new(2)).unwrap();
        assert_eq!(found.iter().map(|s| s.label).collect::<Vec<_>>(), [2, 5]);
        let five = &found[1];
        assert_eq!((five.voxels, five.not_finite, five.mean, five.min, five.max), (4, 0, 17.75, 1.0, 64.0));
        // numpy.std([1, 2, 4, 64]) and numpy.percentile(…, [0, 25, 50, 90, 100])
        assert!((five.std - 26.724_286_707_038_6).abs() < 1e-9);
        for (found, golden) in five.percentiles.iter().zip([1.0, 1.75, 3.0, 46.0, 64.0]) {
            assert!((found - golden).abs() < 1e-12);
        }
        assert_eq!(five.volume_mm3, 2.0);
        assert_eq!(five.centroid_voxel, [0.0, 0.25, 1.5]);
        assert_eq!(five.centroid_lps_mm, [10.75, 20.125, 30.0]);
        assert_eq!((found[0].voxels, found[0].not_finite, found[0].mean, found[0].std), (2, 1, 16.0, 0.0));
    }

    #[test]
    fn a_label_without_a_value_has_no_mean_and_bad_requests_are_refused() {
        let values = Array3::from_elem((1, 1, 2), f32::NAN);
        let labels = Array3::from_elem((1, 1, 2), 1u32);
        let pool = Pool::new(1);
        let found = per_label(values.view(), labels.view(), &affine(), &[50.0], &pool).unwrap();
        assert!(found[0].mean.is_nan() && found[0].percentiles[0].is_nan() && found[0].not_finite == 2);
        let other = Array3::from_elem((1, 2, 2), 1u32);
        let error = per_label(values.view(), other.view(), &affine(), &[], &pool).unwrap_err();
        assert!(matches!(error, StatisticsError::Shape { labels: [1, 2, 2], values: [1, 1, 2] }));
        assert!(matches!(
            per_label(values.view(), labels.view(), &affine(), &[101.0], &pool),
            Err(StatisticsError::Percentile(_))
        ));
    }
}
