//! Separable passes: a symmetric kernel along one axis, thirty-two neighbouring lines at a time.
//!
//! A pass copies a strip of lines into a scratch that stays in the first-level cache, so that every axis runs over
//! contiguous lanes. The order of additions is fixed, so any number of threads gives the same bits.

#![allow(clippy::needless_range_loop, reason = "lanes of several arrays move together; the index is what they share")]

use std::sync::Mutex;

use ndarray::Array3;

use crate::pool::{Fault, Pool, widened};

/// Lines filtered side by side: enough independent sums to hide the latency of an addition.
pub(super) const LANES: usize = 32;

/// One sample of each line of a strip.
pub(super) type Lanes = [f32; LANES];

/// What lies beyond the last voxel of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// The image mirrored at its border, the border voxel repeated: `d c b a | a b c d | d c b a` (SciPy's `reflect`).
    Reflect,
    /// The border voxel for ever: `a a a | a b c d | d d d` (SciPy's `nearest`).
    Nearest,
}

impl Edge {
    /// The index inside `0..n` whose value stands at `i`.
    pub(super) fn source(self, i: isize, n: usize) -> usize {
        let n = n as isize;
        let inside = match self {
            Self::Nearest => i.clamp(0, n - 1),
            Self::Reflect => {
                let m = i.rem_euclid(2 * n);
                if m < n { m } else { 2 * n - 1 - m }
            }
        };
        inside as usize
    }
}

/// A symmetric kernel, ready for lines of one length.
pub(super) struct LineFilter {
    length: usize,
    edge: Edge,
    way: Way,
}

enum Way {
    /// The kernel is one tap of weight 1.
    Copy,
    /// Tap by tap: the weights from the farthest to the nearest pair, then the centre.
    Taps { pairs: Vec<f32>, centre: f32 },
    /// A kernel wider than half the line is a dense matrix that commutes with reversing the line. Split into the even
    /// and the odd part of a line it costs `length / 2` multiplications a voxel, however wide the kernel is.
    Dense { even: Matrix, odd: Matrix },
}

impl LineFilter {
    /// A kernel of weights `half[0]` (centre), `half[1]` (both neighbours), … for lines of `length` samples.
    pub(super) fn new(half: &[f64], length: usize, edge: Edge) -> Self {
        let radius = half.len() - 1;
        let way = if radius == 0 && half[0] == 1.0 {
            Way::Copy
        } else if radius > 8 && radius > length / 4 {
            Self::dense(half, length, edge)
        } else {
            Way::Taps { pairs: half[1..].iter().rev().map(|w| *w as f32).collect(), centre: half[0] as f32 }
        };
        Self { length, edge, way }
    }

    fn dense(half: &[f64], n: usize, edge: Edge) -> Way {
        let mut rows = vec![vec![0.0; n]; n.div_ceil(2)];
        for (at, row) in rows.iter_mut().enumerate() {
            row[at] += half[0];
            for (j, w) in half.iter().enumerate().skip(1) {
                row[edge.source(at as isize - j as isize, n)] += w;
                row[edge.source((at + j) as isize, n)] += w;
            }
        }
        let even = Matrix::new(n.div_ceil(2), |r, c| {
            if c == n - 1 - c { rows[r][c] } else { 0.5 * (rows[r][c] + rows[r][n - 1 - c]) }
        });
        let odd = Matrix::new(n / 2, |r, c| 0.5 * (rows[r][c] - rows[r][n - 1 - c]));
        Way::Dense { even, odd }
    }

    /// Filters `volume` in place along `axis` (0 = slices, 1 = rows, 2 = columns).
    pub(super) fn run(&self, volume: &mut Array3<f32>, axis: usize, pool: &Pool) -> Result<(), Fault> {
        assert_eq!(volume.shape()[axis], self.length, "the filter was made for lines of another length");
        if matches!(self.way, Way::Copy) || volume.is_empty() {
            return Ok(());
        }
        let planes = planes(volume, if axis == 0 { 1 } else { 0 });
        pool.for_each(planes.len(), |n| {
            let mut rows = planes[n].lock().expect("each plane is locked once");
            match axis {
                2 => self.within_rows(&mut rows),
                _ => self.across_rows(&mut rows),
            }
        })
    }

    /// Lines run from row to row; the lanes are neighbouring columns.
    fn across_rows(&self, rows: &mut [&mut [f32]]) {
        let mut work = Work::new(self);
        let columns = rows[0].len();
        for x in (0..columns).step_by(LANES) {
            let lanes = LANES.min(columns - x);
            work.load(self, |n, to| to[..lanes].copy_from_slice(&rows[n][x..x + lanes]));
            work.filter(self, |n, from| rows[n][x..x + lanes].copy_from_slice(&from[..lanes]));
        }
    }

    /// Lines run along the rows. Taps slide over a padded row; a dense matrix wants lanes, so rows are transposed.
    fn within_rows(&self, rows: &mut [&mut [f32]]) {
        if let Way::Taps { pairs, centre } = &self.way {
            let mut padded = vec![0.0; self.length + 2 * pairs.len() + LANES];
            for row in rows {
                slide(row, pairs, *centre, self.edge, &mut padded);
            }
            return;
        }
        let mut work = Work::new(self);
        for strip in rows.chunks_mut(LANES) {
            work.load(self, |n, to| strip.iter().zip(to).for_each(|(row, t)| *t = row[n]));
            work.filter(self, |n, from| strip.iter_mut().zip(from).for_each(|(row, f)| row[n] = *f));
        }
    }
}

/// Rows of the volume, gathered into planes of constant `[slice, row][axis]`: what one task may write.
pub(super) fn planes<T>(volume: &mut Array3<T>, axis: usize) -> Vec<Mutex<Vec<&mut [T]>>> {
    let (_, rows, columns) = volume.dim();
    let count = volume.shape()[axis];
    let mut planes: Vec<Vec<&mut [T]>> = (0..count).map(|_| Vec::new()).collect();
    let voxels = volume.as_slice_mut().expect("volumes made here are contiguous");
    for (n, row) in voxels.chunks_mut(columns.max(1)).enumerate() {
        planes[if axis == 0 { n / rows } else { n % rows }].push(row);
    }
    planes.into_iter().map(Mutex::new).collect()
}

widened! {
    fn slide(row: &mut [f32], pairs: &[f32], centre: f32, edge: Edge, padded: &mut [f32]) {
        let (n, radius) = (row.len(), pairs.len());
        padded[radius..radius + n].copy_from_slice(row);
        for d in 0..radius {
            padded[d] = row[edge.source(d as isize - radius as isize, n)];
            padded[radius + n + d] = row[edge.source((n + d) as isize, n)];
        }
        for (block, out) in row.chunks_mut(LANES).enumerate() {
            let start = block * LANES;
            let window = &padded[start..start + 2 * radius + LANES];
            let mut sum = [0.0; LANES];
            for (d, w) in pairs.iter().enumerate() {
                let below: &Lanes = window[d..d + LANES].try_into().expect("a range of that length");
                let above: &Lanes = window[2 * radius - d..2 * radius - d + LANES].try_into().expect("likewise");
                for l in 0..LANES {
                    sum[l] += w * (below[l] + above[l]);
                }
            }
            for l in 0..LANES {
                sum[l] += centre * window[radius + l];
            }
            out.copy_from_slice(&sum[..out.len()]);
        }
    }
}

/// A strip in the cache: the padded lines for taps, or their even and odd parts for a matrix.
struct Work {
    lines: Vec<Lanes>,
    even: Vec<Lanes>,
    odd: Vec<Lanes>,
    out: [Vec<Lanes>; 2],
}

impl Work {
    fn new(filter: &LineFilter) -> Self {
        let zeros = |n: usize| vec![[0.0; LANES]; n];
        let n = filter.length;
        match &filter.way {
            Way::Copy => Self { lines: zeros(n), even: zeros(0), odd: zeros(0), out: [zeros(0), zeros(0)] },
            Way::Taps { pairs, .. } => {
                Self { lines: zeros(n + 2 * pairs.len()), even: zeros(0), odd: zeros(0), out: [zeros(0), zeros(0)] }
            }
            Way::Dense { even, odd } => Self {
                lines: zeros(n),
                even: zeros(even.size),
                odd: zeros(odd.size),
                out: [zeros(even.padded()), zeros(odd.padded())],
            },
        }
    }

    fn load(&mut self, filter: &LineFilter, mut sample: impl FnMut(usize, &mut Lanes)) {
        let n = filter.length;
        let radius = match &filter.way {
            Way::Taps { pairs, .. } => pairs.len(),
            _ => 0,
        };
        for at in 0..n {
            sample(at, &mut self.lines[radius + at]);
        }
        for d in 0..radius {
            self.lines[d] = self.lines[radius + filter.edge.source(d as isize - radius as isize, n)];
            self.lines[radius + n + d] = self.lines[radius + filter.edge.source((n + d) as isize, n)];
        }
    }

    fn filter(&mut self, filter: &LineFilter, mut store: impl FnMut(usize, &Lanes)) {
        let n = filter.length;
        match &filter.way {
            Way::Copy => {}
            Way::Taps { pairs, centre } => {
                let radius = pairs.len();
                for at in 0..n {
                    store(at, &tap(&self.lines[at..=at + 2 * radius], pairs, *centre));
                }
            }
            Way::Dense { even, odd } => {
                for at in 0..odd.size {
                    let (first, last) = (&self.lines[at], &self.lines[n - 1 - at]);
                    for l in 0..LANES {
                        self.even[at][l] = first[l] + last[l];
                        self.odd[at][l] = first[l] - last[l];
                    }
                }
                if even.size > odd.size {
                    self.even[odd.size] = self.lines[odd.size];
                }
                let [even_out, odd_out] = &mut self.out;
                multiply(even, &self.even, even_out);
                multiply(odd, &self.odd, odd_out);
                let mut both = [0.0; LANES];
                for at in 0..odd.size {
                    for l in 0..LANES {
                        both[l] = even_out[at][l] + odd_out[at][l];
                    }
                    store(at, &both);
                    for l in 0..LANES {
                        both[l] = even_out[at][l] - odd_out[at][l];
                    }
                    store(n - 1 - at, &both);
                }
                if even.size > odd.size {
                    store(odd.size, &even_out[odd.size]);
                }
            }
        }
    }
}

widened! {
    /// One sample of each line, from a window of `2 * pairs + 1` samples.
    fn tap(window: &[Lanes], pairs: &[f32], centre: f32) -> Lanes {
        let (below, rest) = window.split_at(pairs.len());
        let (middle, above) = rest.split_first().expect("the window has a middle");
        let mut sum = [0.0; LANES];
        for ((w, b), a) in pairs.iter().zip(below).zip(above.iter().rev()) {
            for l in 0..LANES {
                sum[l] += w * (b[l] + a[l]);
            }
        }
        for l in 0..LANES {
            sum[l] += centre * middle[l];
        }
        sum
    }
}

/// Rows of a square matrix computed together, so that a loaded sample serves several of them.
const BLOCK: usize = 4;

/// A square matrix, stored as blocks of [`BLOCK`] rows, column by column.
struct Matrix {
    size: usize,
    blocks: Vec<[f32; BLOCK]>,
}

impl Matrix {
    fn new(size: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let entry = |row: usize, column| {
            if row < size { value(row, column) as f32 } else { 0.0 }
        };
        let blocks = (0..size.div_ceil(BLOCK))
            .flat_map(|b| (0..size).map(move |c| (b, c)))
            .map(|(b, c)| std::array::from_fn(|r| entry(b * BLOCK + r, c)))
            .collect();
        Self { size, blocks }
    }

    fn padded(&self) -> usize {
        self.size.next_multiple_of(BLOCK)
    }
}

widened! {
    /// `out = matrix * input`, lane by lane.
    fn multiply(matrix: &Matrix, input: &[Lanes], out: &mut [Lanes]) {
        const HALF: usize = LANES / 2;
        for (block, out) in matrix.blocks.chunks_exact(matrix.size.max(1)).zip(out.chunks_exact_mut(BLOCK)) {
            for half in 0..2 {
                let mut sum = [[0.0; HALF]; BLOCK];
                for (weights, sample) in block.iter().zip(input) {
                    let sample: &[f32; HALF] = sample[half * HALF..half * HALF + HALF].try_into().expect("a half");
                    for r in 0..BLOCK {
                        for l in 0..HALF {
                            sum[r][l] += weights[r] * sample[l];
                        }
                    }
                }
                for r in 0..BLOCK {
                    out[r][half * HALF..half * HALF + HALF].copy_from_slice(&sum[r]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + 11) % 101) as f32 / 10.0 - 3.0).collect()
    }

    /// The definition, in double precision.
    fn expected(line: &[f32], half: &[f64], edge: Edge) -> Vec<f64> {
        let at = |i: isize| f64::from(line[edge.source(i, line.len())]);
        (0..line.len() as isize)
            .map(|i| {
                half[0] * at(i)
                    + (1..half.len()).map(|j| half[j] * (at(i - j as isize) + at(i + j as isize))).sum::<f64>()
            })
            .collect()
    }

    #[test]
    fn taps_and_matrix_give_the_definition_on_every_axis_and_edge() {
        let pool = Pool::new(2);
        for n in [1, 2, 7, 16, 33, 40] {
            for radius in [0, 1, 3, 9, 50] {
                for edge in [Edge::Reflect, Edge::Nearest] {
                    let half: Vec<f64> = (0..=radius).map(|j| 0.7 / (1.0 + j as f64).powi(2)).collect();
                    for axis in 0..3 {
                        let mut shape = [5, 18, 21];
                        shape[axis] = n;
                        let mut volume = Array3::from_shape_fn(shape, |(k, j, i)| line(n)[[k, j, i][axis]]);
                        LineFilter::new(&half, n, edge).run(&mut volume, axis, &pool).unwrap();
                        let expected = expected(&line(n), &half, edge);
                        for ((k, j, i), v) in volume.indexed_iter() {
                            let e = expected[[k, j, i][axis]];
                            assert!(
                                (f64::from(*v) - e).abs() < 2e-5,
                                "n {n} radius {radius} {edge:?} axis {axis}: {v} {e}"
                            );
                        }
                    }
                }
            }
        }
    }
}
