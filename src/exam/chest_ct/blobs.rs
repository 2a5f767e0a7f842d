//! Bright blobs in a slab at several scales: differences of Gaussians (Lowe 2004), for what the network passes over.

use ndarray::{Array3, ArrayView3};

/// Voxels around the searched part that the widest Gaussian needs.
pub const MARGIN: usize = 8;

/// Standard deviations in voxels; each difference of neighbours answers to spheres of about 3.5 times their mean.
const SIGMAS: [f64; 5] = [0.9, 1.27, 1.8, 2.55, 3.6];
/// Lowest response: a third of that of ground glass of 8 mm.
const RESPONSE_MIN: f32 = 0.035;
/// Hounsfield units between which brightness counts: from air to soft tissue, so that bone is no brighter than a nodule.
const WINDOW_HU: [f32; 2] = [-1000.0, 150.0];

/// A bright blob.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Blob {
    /// Voxel of the slab, z, y, x; fractional.
    pub centre: [f64; 3],
    /// In voxels.
    pub diameter: f64,
    /// Difference of Gaussians, of a window scaled to 0..1.
    pub response: f64,
}

/// Blobs whose centre is at least [`MARGIN`] voxels inside.
pub fn find(slab: ArrayView3<'_, f32>) -> Vec<Blob> {
    let [low, high] = WINDOW_HU;
    let mut current = slab.to_owned().mapv_into(|v| (v.clamp(low, high) - low) / (high - low));
    let mut scratch = Array3::zeros(slab.dim());
    let mut before: f64 = 0.0;
    let mut differences: Vec<Array3<f32>> = Vec::with_capacity(SIGMAS.len() - 1);
    let mut found = Vec::new();
    for (n, sigma) in SIGMAS.iter().enumerate() {
        let step = (sigma * sigma - before * before).sqrt();
        before = *sigma;
        let kernel = gaussian(step);
        let last = (n > 0).then(|| current.clone());
        smooth(&mut current, &mut scratch, &kernel);
        if let Some(mut difference) = last {
            difference -= &current;
            differences.push(difference);
        }
        if differences.len() >= 2 {
            let m = differences.len();
            let below = (m >= 3).then(|| &differences[m - 3]);
            collect(&differences[m - 2], below, Some(&differences[m - 1]), m - 2, &mut found);
            if m >= 3 {
                differences[m - 3] = Array3::zeros((0, 0, 0));
            }
        }
    }
    let m = differences.len();
    collect(&differences[m - 1], Some(&differences[m - 2]), None, m - 1, &mut found);
    found
}

fn gaussian(sigma: f64) -> Vec<f32> {
    let radius = ((3.0 * sigma).ceil() as usize).clamp(1, MARGIN);
    let weight = |d: usize| libm::exp(-((d * d) as f64) / (2.0 * sigma * sigma));
    let sum: f64 = weight(0) + 2.0 * (1..=radius).map(weight).sum::<f64>();
    (0..=radius).map(|d| (weight(d) / sum) as f32).collect()
}

/// Separable smoothing, edges repeated; `kernel` from its centre outwards.
fn smooth(image: &mut Array3<f32>, scratch: &mut Array3<f32>, kernel: &[f32]) {
    let (depth, rows, columns) = image.dim();
    let plane = rows * columns;
    // Within each slice: along rows, then along columns.
    let mut padded = vec![0f32; columns + 2 * MARGIN];
    for slice in image.as_slice_mut().expect("contiguous").chunks_mut(plane) {
        for row in slice.chunks_mut(columns) {
            padded[..MARGIN].fill(row[0]);
            padded[MARGIN..MARGIN + columns].copy_from_slice(row);
            padded[MARGIN + columns..].fill(row[columns - 1]);
            row.iter_mut().for_each(|v| *v *= kernel[0]);
            for (d, w) in kernel.iter().enumerate().skip(1) {
                let (left, right) = (&padded[MARGIN - d..], &padded[MARGIN + d..]);
                row.iter_mut().zip(left.iter().zip(right)).for_each(|(v, (a, b))| *v += w * (a + b));
            }
        }
        let source = slice.to_vec();
        for (y, row) in slice.chunks_mut(columns).enumerate() {
            blend(row, &source, y, rows, columns, kernel);
        }
    }
    let source = image.as_slice().expect("contiguous");
    for (z, slice) in scratch.as_slice_mut().expect("contiguous").chunks_mut(plane).enumerate() {
        blend(slice, source, z, depth, plane, kernel);
    }
    std::mem::swap(image, scratch);
}

/// Line `at` of `lines`, each `len` long, blended with its neighbours.
fn blend(out: &mut [f32], source: &[f32], at: usize, lines: usize, len: usize, kernel: &[f32]) {
    let line = |n: usize| &source[n * len..(n + 1) * len];
    out.iter_mut().zip(line(at)).for_each(|(o, v)| *o = v * kernel[0]);
    for (d, w) in kernel.iter().enumerate().skip(1) {
        let (a, b) = (line(at.saturating_sub(d)), line((at + d).min(lines - 1)));
        out.iter_mut().zip(a.iter().zip(b)).for_each(|(o, (a, b))| *o += w * (a + b));
    }
}

/// Maxima of one difference among their neighbours in space and at the same place in the neighbouring scales.
fn collect(
    response: &Array3<f32>,
    finer: Option<&Array3<f32>>,
    coarser: Option<&Array3<f32>>,
    scale: usize,
    found: &mut Vec<Blob>,
) {
    let (depth, rows, columns) = response.dim();
    let diameter = 2.0 * 3f64.sqrt() * (SIGMAS[scale] * SIGMAS[scale + 1]).sqrt();
    for z in MARGIN..depth.saturating_sub(MARGIN) {
        for y in MARGIN..rows.saturating_sub(MARGIN) {
            for x in MARGIN..columns.saturating_sub(MARGIN) {
                let value = response[[z, y, x]];
                if value < RESPONSE_MIN {
                    continue;
                }
                let higher = |other: Option<&Array3<f32>>| other.is_some_and(|o| o[[z, y, x]] > value);
                if higher(finer) || higher(coarser) || !is_maximum(response.view(), z, y, x) {
                    continue;
                }
                found.push(Blob { centre: [z as f64, y as f64, x as f64], diameter, response: f64::from(value) });
            }
        }
    }
}

fn is_maximum(image: ArrayView3<'_, f32>, z: usize, y: usize, x: usize) -> bool {
    let own = image[[z, y, x]];
    (z - 1..=z + 1).all(|p| {
        (y - 1..=y + 1).all(|q| {
            (x - 1..=x + 1).all(|r| {
                let other = image[[p, q, r]];
                other < own || (other == own && (p, q, r) >= (z, y, x))
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spheres_are_found_at_their_place_and_size() {
        for (diameter, centre) in [(5.0, [24.0, 20.0, 22.0]), (8.0, [22.0, 26.0, 24.0]), (11.0, [24.0, 24.0, 25.0])] {
            let slab = Array3::from_shape_fn((48, 48, 48), |(z, y, x)| {
                let d = [z as f64 - centre[0], y as f64 - centre[1], x as f64 - centre[2]];
                let r = (d[0] * d[0] + d[1] * d[1] + d[2] * d[2]).sqrt();
                let inside = (diameter / 2.0 - r + 0.5).clamp(0.0, 1.0);
                (-850.0 + 900.0 * inside) as f32
            });
            let found = find(slab.view());
            let best = found.iter().max_by(|a, b| a.response.total_cmp(&b.response)).unwrap();
            assert_eq!(best.centre, centre);
            assert!((best.diameter / diameter - 1.0).abs() < 0.3, "{} for {diameter}", best.diameter);
        }
    }

    #[test]
    fn an_even_field_has_no_blob() {
        let slab = Array3::from_elem((24, 24, 24), -850.0);
        assert!(find(slab.view()).is_empty());
    }
}
