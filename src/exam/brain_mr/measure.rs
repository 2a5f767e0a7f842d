//! From labels to findings: volumes, diameters in the axial plane, side and place.

use ndarray::{Array3, ArrayView3};

use super::Labelled;
use crate::exam::ExamError;
use crate::exam::callipers::{Axes, axes};
use crate::finding::{Finding, Laterality, Site};
use crate::imaging::components::{self, Connectivity};
use crate::pool::Pool;
use crate::study::Uid;
use crate::volume::Volume;

/// Lesions of one report; more are metastases beyond counting, or noise.
const LESIONS_MAX: usize = 10;

/// What belongs to each finding of a lesion: its kind and its labels.
const PARTS: [(&str, &[u8]); 3] = [("tumour", &[1, 2, 3]), ("tumour core", &[1, 3]), ("enhancing tumour", &[3])];

/// The plane between the hemispheres: left of it is where x is larger than `a + b y + c z`.
struct Midline([f64; 3]);

impl Midline {
    /// The plane through the middles of the brain's rows, least squares; rows that are cut short count little.
    #[allow(clippy::needless_range_loop)]
    fn of(labelled: &Labelled, brain: ArrayView3<'_, u8>) -> Self {
        let (mut matrix, mut right) = ([[0.0; 3]; 3], [0.0; 3]);
        let affine = &labelled.grid.affine;
        for (k, slice) in brain.outer_iter().enumerate() {
            for (j, row) in slice.outer_iter().enumerate() {
                let (Some(first), Some(last)) = (row.iter().position(|v| *v != 0), row.iter().rposition(|v| *v != 0)) else { continue };
                let [x, y, z] = affine.kji_to_lps([k as f64, j as f64, (first + last) as f64 / 2.0]);
                let weight = ((last - first) as f64).powi(2);
                let terms = [1.0, y, z];
                for a in 0..3 {
                    right[a] += weight * terms[a] * x;
                    for b in 0..3 {
                        matrix[a][b] += weight * terms[a] * terms[b];
                    }
                }
            }
        }
        Self(solve(matrix, right).unwrap_or_default())
    }

    fn is_left(&self, lps: [f64; 3]) -> bool {
        let [a, b, c] = self.0;
        lps[0] > a + b * lps[1] + c * lps[2]
    }
}

/// Cramer's rule.
fn solve(m: [[f64; 3]; 3], v: [f64; 3]) -> Option<[f64; 3]> {
    use crate::geometry::{cross, dot};
    let columns: [[f64; 3]; 3] = std::array::from_fn(|c| std::array::from_fn(|r| m[r][c]));
    let determinant = dot(columns[0], cross(columns[1], columns[2]));
    (determinant.abs() > 1e-12).then(|| {
        std::array::from_fn(|n| {
            let mut other = columns;
            other[n] = v;
            dot(other[0], cross(other[1], other[2])) / determinant
        })
    })
}

/// The lesions of a label map, the largest first, each as a whole, its core and its enhancing part.
pub(super) fn findings(
    labelled: &Labelled,
    probability: ArrayView3<'_, f32>,
    brain: ArrayView3<'_, u8>,
    reference: &Volume,
    series: &Uid,
    pool: &Pool,
) -> Result<Vec<Finding>, ExamError> {
    let mask = labelled.labels.mapv(|v| u8::from(v != 0));
    let pieces = components::label(mask.view(), Connectivity::Corners, pool)?.by_size();
    let numbers = pieces.paint(pool)?;
    let midline = Midline::of(labelled, brain);
    let mut found = Vec::new();
    for piece in pieces.list().iter().take(LESIONS_MAX) {
        let low = piece.first;
        let shape: [usize; 3] = std::array::from_fn(|a| piece.last[a] + 1 - low[a]);
        for (kind, members) in PARTS {
            let is_part = |k: usize, j: usize, i: usize| {
                let at = [low[0] + k, low[1] + j, low[2] + i];
                numbers[at] == piece.label && members.contains(&labelled.labels[at])
            };
            let part = Array3::from_shape_fn(shape, |(k, j, i)| u8::from(is_part(k, j, i)));
            if let Some(finding) = finding(kind, &part, low, labelled, probability, &midline, reference, series) {
                found.push(Finding { id: found.len() as u32 + 1, ..finding });
            }
        }
    }
    Ok(found)
}

#[allow(clippy::too_many_arguments)]
fn finding(
    kind: &str,
    part: &Array3<u8>,
    low: [usize; 3],
    labelled: &Labelled,
    probability: ArrayView3<'_, f32>,
    midline: &Midline,
    reference: &Volume,
    series: &Uid,
) -> Option<Finding> {
    let affine = &labelled.grid.affine;
    let [_, row_mm, column_mm] = labelled.grid.spacing().zyx_mm();
    let (mut count, mut left, mut sure) = (0usize, 0usize, 0.0f64);
    let mut sum = [0.0f64; 3];
    let mut longest = Axes::default();
    for (k, slice) in part.outer_iter().enumerate() {
        let mut pixels = Vec::new();
        for ((j, i), _) in slice.indexed_iter().filter(|(_, v)| **v != 0) {
            let at = [low[0] + k, low[1] + j, low[2] + i];
            let place = affine.kji_to_lps(at.map(|n| n as f64));
            (0..3).for_each(|a| sum[a] += place[a]);
            left += usize::from(midline.is_left(place));
            sure += f64::from(probability[at]);
            pixels.push((j, i));
        }
        count += pixels.len();
        let (rows, columns) = slice.dim();
        let marked = |j: isize, i: isize| {
            (0..rows as isize).contains(&j) && (0..columns as isize).contains(&i) && slice[[j as usize, i as usize]] != 0
        };
        let found = axes(&pixels, marked, [row_mm, column_mm]);
        if found.long_mm > longest.long_mm {
            longest = found;
        }
    }
    if count == 0 {
        return None;
    }
    let centroid_lps_mm = sum.map(|v| v / count as f64);
    let [i, j, k] = reference.affine().to_voxel(centroid_lps_mm);
    let part_left = left as f64 / count as f64;
    // A lesion that reaches well into both hemispheres has no side.
    let laterality = match part_left {
        p if p > 0.75 => Some(Laterality::Left),
        p if p < 0.25 => Some(Laterality::Right),
        _ => None,
    };
    let place = centroid_lps_mm.map(|v| (v * 1000.0).round() as i64);
    Some(Finding {
        id: 0,
        tracking_uid: Uid::derived(format!("{series} {kind} {place:?}").as_bytes()),
        kind: kind.into(),
        confidence: (sure / count as f64) as f32,
        centroid_lps_mm: Some(centroid_lps_mm),
        centroid_voxel: [k, j, i],
        long_axis_mm: Some(longest.long_mm),
        short_axis_mm: Some(longest.short_mm),
        mean_diameter_mm: Some(longest.mean_mm()),
        volume_mm3: Some(count as f64 * labelled.grid.spacing().voxel_mm3()),
        area_mm2: None,
        in_pixels: None,
        mean_hu: None,
        site: Site { organ: "brain".into(), laterality },
        cine: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exam::brain_mr::prepare::grid_at;
    use crate::volume::Rescale;

    /// An ellipsoid of brain turned by ten degrees about the long axis of the body, and a tumour on the patient's left.
    fn scene() -> (Labelled, Array3<u8>) {
        let grid = grid_at(1.0, [60, 90, 80], [-40.0, -45.0, 0.0]);
        let turned = |k: usize, j: usize, i: usize| {
            let [x, y, z] = grid.affine.kji_to_lps([k as f64, j as f64, i as f64]);
            let (s, c) = 10f64.to_radians().sin_cos();
            [c * x + s * y, c * y - s * x, z - 30.0]
        };
        let brain = Array3::from_shape_fn(grid.shape, |(k, j, i)| {
            let [x, y, z] = turned(k, j, i);
            u8::from((x / 32.0).powi(2) + (y / 40.0).powi(2) + (z / 28.0).powi(2) < 1.0)
        });
        let labels = Array3::from_shape_fn(grid.shape, |(k, j, i)| {
            let [x, y, z] = turned(k, j, i);
            // 24 x 16 mm in the axial plane; its middle lies 5 mm left of the midline, though at negative x in space.
            let r = |a: f64, b: f64| (((x - 9.0) / a).powi(2) + ((y - 26.0) / b).powi(2) + (z / 6.0).powi(2)) < 1.0;
            if r(4.0, 3.0) { 1 } else if r(6.0, 5.0) { 3 } else if r(8.0, 12.0) { 2 } else { 0 }
        });
        (Labelled { labels, grid }, brain)
    }

    #[test]
    fn a_tumour_is_measured_as_a_whole_its_core_and_its_enhancing_part() {
        let (labelled, brain) = scene();
        let pool = Pool::new(1);
        let reference = Volume::from_array(&Array3::<u8>::zeros(labelled.grid.shape), labelled.grid.affine, Rescale::IDENTITY).unwrap();
        let sure = labelled.labels.mapv(|v| if v == 0 { 0.0 } else { 0.9 });
        let series = Uid::parse("1.2.3").unwrap();
        let found = findings(&labelled, sure.view(), brain.view(), &reference, &series, &pool).unwrap();
        let kinds: Vec<&str> = found.iter().map(|f| f.kind.as_str()).collect();
        assert_eq!(kinds, ["tumour", "tumour core", "enhancing tumour"]);
        let whole = &found[0];
        let mm = |axis: Option<f64>| axis.unwrap();
        assert!((mm(whole.long_axis_mm) - 24.0).abs() < 1.5 && (mm(whole.short_axis_mm) - 16.0).abs() < 1.5, "{whole:?}");
        let volume = 4.0 / 3.0 * std::f64::consts::PI * 8.0 * 12.0 * 6.0;
        assert!((whole.volume_mm3.unwrap() / volume - 1.0).abs() < 0.05, "{whole:?}");
        assert!(found[2].volume_mm3 < found[1].volume_mm3 && found[1].volume_mm3 < whole.volume_mm3);
        // Left of the turned midline, whatever x alone would say.
        assert_eq!(whole.site.laterality, Some(Laterality::Left));
        assert!((whole.confidence - 0.9).abs() < 1e-4);
        assert!(found.iter().enumerate().all(|(n, f)| f.id as usize == n + 1));
    }

    #[test]
    fn mirrored_images_have_the_tumour_on_the_other_side() {
        let (mut labelled, mut brain) = scene();
        labelled.labels.invert_axis(ndarray::Axis(2));
        brain.invert_axis(ndarray::Axis(2));
        let labelled = Labelled { labels: labelled.labels.as_standard_layout().into_owned(), grid: labelled.grid };
        let pool = Pool::new(1);
        let reference = Volume::from_array(&Array3::<u8>::zeros(labelled.grid.shape), labelled.grid.affine, Rescale::IDENTITY).unwrap();
        let sure = labelled.labels.mapv(f32::from);
        let series = Uid::parse("1.2.3").unwrap();
        let found = findings(&labelled, sure.view(), brain.as_standard_layout().view(), &reference, &series, &pool).unwrap();
        assert_eq!(found[0].site.laterality, Some(Laterality::Right));
    }
}
