//! Named features of a segmented candidate, on which the random forest decides; training reads the same numbers.

use ndarray::Array3;

use super::candidates::{Candidate, NO_HEAT};
use super::distance;
use crate::exam::callipers::Axes;

/// Names of the features, in the order [`compute`] gives them. Names stay; new ones are added.
pub const NAMES: &[&str] = &[
    "heat",
    "heat_fine",
    "heat_coarse",
    "blob",
    "detector_diameter_mm",
    "diameter_mm",
    "long_axis_mm",
    "short_axis_mm",
    "axis_ratio",
    "inscribed_mm",
    "hu_core",
    "hu_mean",
    "hu_std",
    "hu_p10",
    "hu_p50",
    "hu_p90",
    "shell_mean",
    "shell_std",
    "shell_p10",
    "shell_p90",
    "shell_air_fraction",
    "shell_tissue_fraction",
    "contrast",
    "sphere2_mean",
    "sphere4_mean",
    "sphere8_mean",
    "sphere12_mean",
    "eigen_middle",
    "eigen_least",
    "compactness",
    "opened_fraction",
    "grown_diameter_mm",
    "depth_mm",
    "in_lung",
    "height",
    "back",
    "lateral",
    "slice_mm",
    "pixel_mm",
];

/// What is known about a candidate's surroundings.
pub(super) struct Region<'a> {
    pub hu: &'a Array3<f32>,
    pub spacing_mm: [f64; 3],
    /// The nodule.
    pub mask: &'a Array3<bool>,
    /// The nodule with the vessels it grew into.
    pub grown: &'a Array3<bool>,
    /// Voxel of the box, fractional.
    pub centroid: [f64; 3],
    pub voxel_mm3: f64,
}

/// Where a candidate is in the lungs.
pub(super) struct Place {
    /// To the edge of the closed lung.
    pub depth_mm: f64,
    /// The lung network calls it lung.
    pub in_lung: bool,
    /// From foot, front and right of the lungs (0) to head, back and left (1).
    pub relative: [f64; 3],
}

/// The shell that counts as the surroundings: between these distances outside the nodule.
const SHELL_MM: [f64; 2] = [1.0, 5.0];

/// Computes the features in the order of [`NAMES`]; every sum runs over the box in the order of its voxels.
pub(super) fn compute(candidate: &Candidate, region: &Region<'_>, place: &Place, axes: &Axes, core_hu: f64) -> Vec<f64> {
    // Distances are asked for in the nodule and in its shell only.
    let margin = region.spacing_mm.map(|mm| (SHELL_MM[1] / mm) as usize + 1);
    let (low, size) = distance::bounds(region.mask, margin);
    let whole = |at: [usize; 3]| -> [usize; 3] { std::array::from_fn(|a| at[a] + low[a]) };
    let outside = distance::squared_mm(size, region.spacing_mm, |at| region.mask[whole(at)]);
    let inside = distance::squared_mm(size, region.spacing_mm, |at| !region.mask[whole(at)]);
    let [near, far] = SHELL_MM.map(|v| v * v);
    let mut own = Vec::new();
    let mut shell = Vec::new();
    let mut spheres = [Mean::default(); 4];
    let mut covariance = [[0.0; 3]; 3];
    let mut farthest: f64 = 0.0;
    let mut inscribed: f64 = 0.0;
    let mut grown = 0usize;
    for ((k, j, i), hu) in region.hu.indexed_iter() {
        let at = [k, j, i];
        let hu = f64::from(*hu);
        let d: [f64; 3] = std::array::from_fn(|a| (at[a] as f64 - region.centroid[a]) * region.spacing_mm[a]);
        let squared = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
        for (mean, radius) in spheres.iter_mut().zip([2.0, 4.0, 8.0, 12.0]) {
            if squared <= radius * radius {
                mean.add(hu);
            }
        }
        grown += usize::from(region.grown[at]);
        let within: [usize; 3] = std::array::from_fn(|a| at[a].wrapping_sub(low[a]));
        if region.mask[at] {
            own.push(hu);
            farthest = farthest.max(squared);
            inscribed = inscribed.max(f64::from(inside[within]));
            for (a, row) in covariance.iter_mut().enumerate() {
                for (b, cell) in row.iter_mut().enumerate() {
                    *cell += d[a] * d[b];
                }
            }
        } else if let Some(distance) = outside.get(within) {
            let distance = f64::from(*distance);
            if distance >= near && distance <= far {
                shell.push(hu);
            }
        }
    }
    let count = own.len().max(1) as f64;
    let volume = count * region.voxel_mm3;
    // A single voxel has an extent too: that of a cube, a twelfth of its squared edge.
    for a in 0..3 {
        covariance[a].iter_mut().for_each(|c| *c /= count);
        covariance[a][a] += region.spacing_mm[a] * region.spacing_mm[a] / 12.0;
    }
    let eigen = eigenvalues(covariance);
    let (hu_mean, hu_std) = moments(&own);
    let (shell_mean, shell_std) = moments(&shell);
    let part = |fits: &dyn Fn(f64) -> bool| {
        shell.iter().filter(|v| fits(**v)).count() as f64 / shell.len().max(1) as f64
    };
    let (air, tissue) = (part(&|v| v < -600.0), part(&|v| v > -300.0));
    let [p10, p50, p90] = percentiles(&mut own, [0.1, 0.5, 0.9]);
    let [shell_p10, shell_p90] = percentiles(&mut shell, [0.1, 0.9]);
    let equivalent = |volume: f64| libm::cbrt(6.0 * volume / std::f64::consts::PI);
    let ball = 4.0 / 3.0 * std::f64::consts::PI * (farthest.sqrt() + 0.5 * region.spacing_mm[2]).powi(3);
    let heat = |levels: &[f64]| levels.iter().copied().fold(NO_HEAT, f64::max);
    let fine = candidate.heat.first().map_or(NO_HEAT, |v| *v);
    let values = vec![
        candidate.logit(),
        fine,
        heat(candidate.heat.get(1..).unwrap_or(&[])),
        candidate.blob,
        candidate.diameter_mm,
        equivalent(volume),
        axes.long_mm,
        axes.short_mm,
        axes.short_mm / axes.long_mm.max(0.1),
        if inscribed.is_finite() { inscribed.sqrt() } else { 0.0 },
        core_hu,
        hu_mean,
        hu_std,
        p10,
        p50,
        p90,
        shell_mean,
        shell_std,
        shell_p10,
        shell_p90,
        air,
        tissue,
        hu_mean - shell_mean,
        spheres[0].value(),
        spheres[1].value(),
        spheres[2].value(),
        spheres[3].value(),
        (eigen[1] / eigen[0]).sqrt(),
        (eigen[2] / eigen[0]).sqrt(),
        volume / ball,
        count / grown.max(1) as f64,
        equivalent(grown as f64 * region.voxel_mm3),
        place.depth_mm,
        f64::from(u8::from(place.in_lung)),
        place.relative[0],
        place.relative[1],
        (place.relative[2] - 0.5).abs() * 2.0,
        region.spacing_mm[0],
        region.spacing_mm[2],
    ];
    debug_assert_eq!(values.len(), NAMES.len());
    values.into_iter().map(|v| if v.is_finite() { v } else { 0.0 }).collect()
}

#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    count: u32,
    sum: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.count += 1;
        self.sum += value;
    }

    fn value(&self) -> f64 {
        if self.count == 0 { -850.0 } else { self.sum / f64::from(self.count) }
    }
}

/// Mean and standard deviation; those of lung for nothing.
fn moments(values: &[f64]) -> (f64, f64) {
    if values.is_empty() {
        return (-850.0, 0.0);
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

fn percentiles<const N: usize>(values: &mut [f64], at: [f64; N]) -> [f64; N] {
    values.sort_by(f64::total_cmp);
    at.map(|p| match values.len() {
        0 => -850.0,
        len => values[((len - 1) as f64 * p).round() as usize],
    })
}

/// Eigenvalues of a symmetric matrix, largest first (cyclic Jacobi rotations; only square roots, so the same everywhere).
pub fn eigenvalues(mut m: [[f64; 3]; 3]) -> [f64; 3] {
    for _ in 0..12 {
        for (p, q) in [(0, 1), (0, 2), (1, 2)] {
            if m[p][q].abs() < 1e-15 {
                continue;
            }
            let theta = (m[q][q] - m[p][p]) / (2.0 * m[p][q]);
            let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
            let c = 1.0 / (t * t + 1.0).sqrt();
            let s = t * c;
            for row in &mut m {
                (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
            }
            for n in 0..3 {
                (m[p][n], m[q][n]) = (c * m[p][n] - s * m[q][n], s * m[p][n] + c * m[q][n]);
            }
        }
    }
    let mut values = [m[0][0], m[1][1], m[2][2]];
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvalues_are_those_of_a_rotated_diagonal() {
        let (sin, cos) = 0.7f64.sin_cos();
        let r = [[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]];
        let d = [4.0, 9.0, 1.0];
        let m = std::array::from_fn(|a| std::array::from_fn(|b| (0..3).map(|n| r[a][n] * d[n] * r[b][n]).sum()));
        let got = eigenvalues(m);
        assert!(got.iter().zip([9.0, 4.0, 1.0]).all(|(a, b)| (a - b).abs() < 1e-9), "{got:?}");
    }

    #[test]
    fn a_ball_in_lung_has_a_ball_s_features() {
        let shape = (31, 31, 31);
        let r = |k: usize, j: usize, i: usize| [k, j, i].map(|v| (v as f64 - 15.0).powi(2)).iter().sum::<f64>().sqrt();
        let mask = Array3::from_shape_fn(shape, |(k, j, i)| r(k, j, i) <= 5.0);
        let hu = mask.mapv(|m| if m { 30.0 } else { -850.0 });
        let region = Region { hu: &hu, spacing_mm: [1.0; 3], mask: &mask, grown: &mask, centroid: [15.0; 3], voxel_mm3: 1.0 };
        let place = Place { depth_mm: 10.0, in_lung: true, relative: [0.5; 3] };
        let candidate = Candidate { centre_mm: [0.0; 3], diameter_mm: 10.0, heat: vec![2.0, 1.0], blob: 0.2 };
        let axes = Axes { long_mm: 10.0, short_mm: 10.0 };
        let values = compute(&candidate, &region, &place, &axes, 30.0);
        assert_eq!(values.len(), NAMES.len());
        let get = |name: &str| values[NAMES.iter().position(|n| *n == name).unwrap()];
        assert!((get("diameter_mm") - 10.0).abs() < 0.3);
        assert_eq!((get("hu_mean"), get("hu_std"), get("shell_mean")), (30.0, 0.0, -850.0));
        assert_eq!((get("heat_fine"), get("heat_coarse"), get("shell_air_fraction")), (2.0, 1.0, 1.0));
        assert!(get("eigen_least") > 0.95 && get("compactness") > 0.7);
        assert_eq!(get("opened_fraction"), 1.0);
    }
}
