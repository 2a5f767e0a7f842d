//! Exact Euclidean distance in a box of voxels (Felzenszwalb and Huttenlocher 2012), spacing taken into account.

use ndarray::{Array3, ArrayViewMut1, Axis};

/// First voxel and size of the box that holds all that is marked and, where there are as many, `margin` voxels round it.
pub fn bounds(marked: &Array3<bool>, margin: [usize; 3]) -> ([usize; 3], [usize; 3]) {
    let (z, y, x) = marked.dim();
    let shape = [z, y, x];
    let (mut low, mut end) = (shape, [0; 3]);
    for ((k, j, i), _) in marked.indexed_iter().filter(|(_, marked)| **marked) {
        for (a, v) in [k, j, i].into_iter().enumerate() {
            low[a] = low[a].min(v.saturating_sub(margin[a]));
            end[a] = end[a].max((v + 1 + margin[a]).min(shape[a]));
        }
    }
    (low, std::array::from_fn(|a| end[a].saturating_sub(low[a])))
}

/// Squared distance in mm from each voxel to the nearest one where `target` holds, centre to centre; infinite without any.
pub fn squared_mm(shape: [usize; 3], spacing_mm: [f64; 3], target: impl Fn([usize; 3]) -> bool) -> Array3<f32> {
    let mut out = Array3::from_shape_fn(shape, |(z, y, x)| if target([z, y, x]) { 0.0 } else { f32::INFINITY });
    let longest = shape.iter().copied().max().unwrap_or(0);
    let mut work = Envelope::new(longest);
    for axis in (0..3).rev() {
        for line in out.lanes_mut(Axis(axis)) {
            work.transform(line, spacing_mm[axis]);
        }
    }
    out
}

/// The lower envelope of parabolas along one line.
struct Envelope {
    line: Vec<f64>,
    places: Vec<usize>,
    bounds: Vec<f64>,
}

impl Envelope {
    fn new(len: usize) -> Self {
        Self { line: vec![0.0; len], places: vec![0; len], bounds: vec![0.0; len + 1] }
    }

    fn transform(&mut self, mut out: ArrayViewMut1<'_, f32>, step: f64) {
        let len = out.len();
        let line = &mut self.line[..len];
        line.iter_mut().zip(out.iter()).for_each(|(l, v)| *l = f64::from(*v));
        let mut count = 0;
        let height = |line: &[f64], q: usize| line[q] + (q as f64 * step).powi(2);
        for q in 0..len {
            if !line[q].is_finite() {
                continue;
            }
            let mut from = f64::NEG_INFINITY;
            while count > 0 {
                let p = self.places[count - 1];
                from = (height(line, q) - height(line, p)) / (2.0 * step * (q - p) as f64);
                if from > self.bounds[count - 1] {
                    break;
                }
                count -= 1;
                from = f64::NEG_INFINITY;
            }
            self.places[count] = q;
            self.bounds[count] = from;
            count += 1;
        }
        if count == 0 {
            return;
        }
        self.bounds[count] = f64::INFINITY;
        let mut n = 0;
        for (q, value) in out.iter_mut().enumerate() {
            let at = q as f64 * step;
            while self.bounds[n + 1] < at {
                n += 1;
            }
            let p = self.places[n];
            *value = (line[p] + (at - p as f64 * step).powi(2)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_trying_every_pair() {
        let (shape, spacing) = ([5, 9, 7], [2.5, 0.7, 0.8]);
        let target = |[z, y, x]: [usize; 3]| (z * 31 + y * 17 + x * 7) % 29 == 3;
        let got = squared_mm(shape, spacing, target);
        for ((z, y, x), value) in got.indexed_iter() {
            let mut best = f64::INFINITY;
            for (p, q, r) in ndarray::indices(shape) {
                if target([p, q, r]) {
                    let d = [(z, p, 0), (y, q, 1), (x, r, 2)].map(|(a, b, n)| (a as f64 - b as f64) * spacing[n]);
                    best = best.min(d.iter().map(|v| v * v).sum());
                }
            }
            assert!((f64::from(*value) - best).abs() < 1e-4, "{z} {y} {x}: {value} for {best}");
        }
    }

    #[test]
    fn without_a_target_everything_is_infinitely_far() {
        assert!(squared_mm([2, 3, 4], [1.0; 3], |_| false).iter().all(|v| v.is_infinite()));
    }
}
