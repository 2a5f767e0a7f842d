//! The part of a frame that shows tissue: what the transducer drew, without the writing, scales and marks round it.
//!
//! From one frame: the largest connected bright field that remains when everything thin is taken away. From the first frames of
//! a cine together: pixels that are lit and never change, while the picture does, are burnt in, also within the field.

use ndarray::{Array3, ArrayView3};

use crate::imaging::components::{Connectivity, label};
use crate::imaging::morphology::{Element, Outside, Shape, dilate, open};
use crate::pool::{Fault, Pool};

/// Cells along the longer side of a frame, at which the field is sought.
const CELLS: usize = 192;

/// Mean grey of a cell above which something is drawn there. Black borders are black to a few units of JPEG noise.
const LIT: u32 = 6;

/// Frames that are watched for what never changes. A third of a second: nobody holds a transducer that still.
pub const LEARN_FRAMES: usize = 10;

/// Grey of a pixel that may be a burnt-in mark.
const MARK: u8 = 40;

/// The field, and the marks in it.
#[derive(Debug, Clone)]
pub struct Sector {
    rows: usize,
    columns: usize,
    /// First and last column of the field in each row.
    spans: Vec<Option<(usize, usize)>>,
    /// Pixels burnt in; empty until enough frames have been seen, or where there are none.
    marks: Vec<bool>,
}

/// `[top, left, bottom, right]`, the last ones excluded.
pub type Box2 = [usize; 4];

impl Sector {
    /// The field of one frame of grey values; None where nothing is drawn. `region` limits it (`[top, left, bottom, right]`).
    ///
    /// # Errors
    /// A task's panic.
    pub fn of_frame(grey: &[u8], rows: usize, columns: usize, region: Option<Box2>, pool: &Pool) -> Result<Option<Self>, Fault> {
        let [top, left, bottom, right] = region.unwrap_or([0, 0, rows, columns]);
        let size = rows.max(columns).div_ceil(CELLS).max(1);
        let (height, width) = (rows.div_ceil(size), columns.div_ceil(size));
        let mut lit = Array3::<u8>::zeros((1, height, width));
        let mut sums = vec![0u32; width];
        for cell_row in 0..height {
            sums.fill(0);
            let lines = (cell_row * size).max(top)..((cell_row + 1) * size).min(bottom);
            for j in lines {
                for (i, v) in grey[j * columns..(j + 1) * columns].iter().enumerate().take(right).skip(left) {
                    sums[i / size] += u32::from(*v);
                }
            }
            for (i, sum) in sums.iter().enumerate() {
                lit[[0, cell_row, i]] = u8::from(*sum > LIT * (size * size) as u32);
            }
        }
        let Some(field) = largest_field(lit.view(), pool)? else { return Ok(None) };
        let spans = (0..rows).map(|j| field[j / size]);
        let clip = |span: (usize, usize)| {
            let (first, last) = ((span.0 * size).max(left), ((span.1 + 1) * size - 1).min(right.max(1) - 1));
            (first <= last).then_some((first, last))
        };
        let spans = spans.enumerate().map(|(j, span)| span.filter(|_| (top..bottom).contains(&j)).and_then(clip)).collect();
        let sector = Self { rows, columns, spans, marks: Vec::new() };
        Ok(sector.bounds().is_some().then_some(sector))
    }

    /// The smallest box that holds the field.
    pub fn bounds(&self) -> Option<Box2> {
        let top = self.spans.iter().position(Option::is_some)?;
        let bottom = self.spans.iter().rposition(Option::is_some)? + 1;
        let inside = || self.spans.iter().flatten();
        let (left, right) = (inside().map(|s| s.0).min()?, inside().map(|s| s.1).max()? + 1);
        Some([top, left, bottom, right])
    }

    /// Whether a pixel is inside.
    pub fn holds(&self, row: usize, column: usize) -> bool {
        self.spans.get(row).copied().flatten().is_some_and(|(first, last)| (first..=last).contains(&column))
    }

    /// Marks what was lit and never changed over the frames between `low` and `high` (darkest and brightest value of each
    /// pixel). A picture that hardly changes at all is frozen, and nothing in it is marked.
    pub fn learn(&mut self, low: &[u8], high: &[u8]) {
        let inside = |n: &usize| self.holds(n / self.columns, n % self.columns);
        let (mut lit, mut changed) = (0usize, 0usize);
        for n in (0..low.len()).filter(inside) {
            lit += usize::from(high[n] >= MARK);
            changed += usize::from(high[n] >= MARK && high[n] - low[n] > 2);
        }
        if 2 * changed < lit {
            return;
        }
        let marks: Vec<bool> = (0..low.len()).map(|n| inside(&n) && low[n] >= MARK && high[n] - low[n] <= 2).collect();
        self.marks = if marks.contains(&true) { marks } else { Vec::new() };
    }

    /// The frame without what is not tissue: 0 outside the field; marks are bridged along their row.
    pub fn cleaned(&self, grey: &[u8], out: &mut Vec<f32>) {
        out.clear();
        out.resize(self.rows * self.columns, 0.0);
        for (j, span) in self.spans.iter().enumerate() {
            let Some((first, last)) = *span else { continue };
            let row = j * self.columns;
            for n in row + first..=row + last {
                out[n] = f32::from(grey[n]);
            }
            if self.marks.is_empty() {
                continue;
            }
            let mut i = first;
            while i <= last {
                if !self.marks[row + i] {
                    i += 1;
                    continue;
                }
                let end = (i..=last).find(|c| !self.marks[row + c]).unwrap_or(last + 1);
                let before = if i > first { out[row + i - 1] } else { 0.0 };
                let after = if end <= last { out[row + end] } else { before };
                for (n, c) in (i..end).enumerate() {
                    out[row + c] = before + (after - before) * (n + 1) as f32 / (end - i + 1) as f32;
                }
                i = end;
            }
        }
    }
}

/// First and last cell of a row; None where it has none.
type RowEnds = Option<(usize, usize)>;

/// First and last cell in each row of the largest field, bays between its own ends filled.
fn largest_field(lit: ArrayView3<u8>, pool: &Pool) -> Result<Option<Vec<RowEnds>>, Fault> {
    let square = |r: f64| Element::new(Shape::Box, [0.0, r, r]).expect("a small radius");
    // Speckle leaves dark cells between lit ones; writing is thinner than five cells, a field is not.
    let near = dilate(lit, &square(1.0), pool)?;
    let thick = open(near.view(), &square(3.0), Outside::Background, pool)?;
    let connectivity = Connectivity::from_neighbours(6).expect("a connectivity in three dimensions");
    let components = match label(thick.view(), connectivity, pool) {
        Ok(components) => components.by_size(),
        Err(_) => return Ok(None),
    };
    let Some(largest) = components.list().first().copied() else { return Ok(None) };
    let labels = components.paint(pool)?;
    let (_, height, width) = labels.dim();
    // A field of less than a fiftieth of the picture is an icon.
    if largest.voxels * 50 < (height * width) as u64 {
        return Ok(None);
    }
    let mine = |j: usize, i: usize| labels[[0, j, i]] == largest.label;
    let spans = (0..height).map(|j| {
        let first = (0..width).find(|i| mine(j, *i))?;
        let last = (0..width).rev().find(|i| mine(j, *i))?;
        // The dilation above has grown it by a cell.
        let (first, last) = (first + usize::from(first > 0), last - usize::from(last + 1 < width && last > first));
        (first <= last).then_some((first, last))
    });
    let mut spans: Vec<Option<(usize, usize)>> = spans.collect();
    if let Some(top) = spans.iter().position(Option::is_some).filter(|top| *top > 0) {
        spans[top] = None;
    }
    if let Some(bottom) = spans.iter().rposition(Option::is_some).filter(|bottom| bottom + 1 < height) {
        spans[bottom] = None;
    }
    Ok(Some(spans))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: usize = 300;
    const COLUMNS: usize = 400;

    /// A field of noise between rows 60 and 260, columns 50 and 330, a black vessel in it, and writing outside.
    fn frame(seed: u32, mark: bool) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2_654_435_761).max(1);
        let mut out = vec![0u8; ROWS * COLUMNS];
        for j in 60..260 {
            for i in 50..330 {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                let vessel = (120..150).contains(&j) && (90..290).contains(&i);
                out[j * COLUMNS + i] = if vessel { 0 } else { 30 + (state % 120) as u8 };
            }
        }
        for j in 20..32 {
            for i in (60..200).filter(|i| i % 8 < 3) {
                out[j * COLUMNS + i] = 255;
            }
        }
        for j in 60..260 {
            out[j * COLUMNS + 370..j * COLUMNS + 380].fill(200);
        }
        if mark {
            for j in 200..206 {
                out[j * COLUMNS + 100..j * COLUMNS + 140].fill(250);
            }
        }
        out
    }

    #[test]
    fn the_field_is_what_the_transducer_drew_and_not_the_writing_beside_it() {
        let pool = Pool::new(1);
        let sector = Sector::of_frame(&frame(1, false), ROWS, COLUMNS, None, &pool).unwrap().unwrap();
        let [top, left, bottom, right] = sector.bounds().unwrap();
        for (found, truth) in [(top, 60), (left, 50), (bottom, 260), (right, 330)] {
            assert!(found.abs_diff(truth) <= 6, "{:?}", sector.bounds());
        }
        assert!(!sector.holds(25, 100) && !sector.holds(100, 375) && sector.holds(135, 200));
        let limited = Sector::of_frame(&frame(1, false), ROWS, COLUMNS, Some([80, 0, 200, 400]), &pool).unwrap().unwrap();
        assert!(limited.bounds().unwrap()[0] >= 80 && limited.bounds().unwrap()[2] <= 200);
    }

    #[test]
    fn a_mark_that_never_changes_in_a_moving_picture_is_taken_out() {
        let pool = Pool::new(1);
        let frames: Vec<_> = (1..=LEARN_FRAMES as u32).map(|seed| frame(seed, true)).collect();
        let mut sector = Sector::of_frame(&frames[0], ROWS, COLUMNS, None, &pool).unwrap().unwrap();
        let fold = |f: fn(u8, u8) -> u8| {
            frames.iter().skip(1).fold(frames[0].clone(), |mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a = f(*a, *b));
                a
            })
        };
        let (low, high) = (fold(u8::min), fold(u8::max));
        let mut still = sector.clone();
        still.learn(&frames[0], &frames[0]);
        assert!(still.marks.is_empty(), "a frozen picture has no marks");
        sector.learn(&low, &high);
        let mut clean = Vec::new();
        sector.cleaned(&frames[0], &mut clean);
        let brightest = (100..140).map(|i| clean[203 * COLUMNS + i]).fold(0.0, f32::max);
        assert!(brightest <= 150.0, "{brightest}");
        assert_eq!(clean[25 * COLUMNS + 64], 0.0);
    }

    #[test]
    fn a_black_frame_has_no_field() {
        let pool = Pool::new(1);
        assert!(Sector::of_frame(&vec![0; ROWS * COLUMNS], ROWS, COLUMNS, None, &pool).unwrap().is_none());
    }
}
