//! Axes in another order: what an orientation such as LPS or RAS asks for.

use ndarray::{Array3, ArrayView3};

use super::ResampleError;
use crate::geometry::{Affine, Grid, norm};

/// Axes permuted and reversed, without touching a value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reorientation {
    /// For each new array axis, which old one.
    axes: [usize; 3],
    /// Whether that axis is reversed.
    reversed: [bool; 3],
    /// The new grid.
    pub grid: Grid,
}

impl Reorientation {
    /// Towards an orientation such as `LPS` (DICOM's) or `RAS` (NIfTI's): columns (i) run towards the first letter, rows
    /// (j) towards the second, slices (k) towards the third. Oblique grids stay oblique: each axis takes the letter that
    /// is nearest.
    ///
    /// # Errors
    /// [`ResampleError::Orientation`].
    pub fn new(grid: &Grid, code: &str) -> Result<Self, ResampleError> {
        let wanted = parse_code(code).ok_or_else(|| ResampleError::Orientation(code.into()))?;
        let directions = [0, 1, 2].map(|axis| {
            let step = grid.affine.step(axis);
            step.map(|v| v / norm(step))
        });
        // Of the six ways to give axes to letters, the one whose axes lie nearest to their letters' directions.
        let fit = |order: &[usize; 3]| (0..3).map(|n| directions[order[n]][wanted[n].0].abs()).sum::<f64>();
        const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let mut order = ORDERS[0];
        for other in &ORDERS[1..] {
            if fit(other) > fit(&order) + 1e-9 {
                order = *other;
            }
        }
        let flips: [bool; 3] = std::array::from_fn(|n| directions[order[n]][wanted[n].0] * wanted[n].1 < 0.0);
        let count = |axis: usize| grid.shape[2 - axis];
        let mut corner = [0.0; 3];
        for n in 0..3 {
            if flips[n] {
                corner[order[n]] = count(order[n]).saturating_sub(1) as f64;
            }
        }
        let step = |n: usize| grid.affine.step(order[n]).map(|v| if flips[n] { -v } else { v });
        let affine = Affine::new(step(0), step(1), step(2), grid.affine.to_lps(corner))?;
        // Array axes count the other way than i, j, k.
        let axes = [2 - order[2], 2 - order[1], 2 - order[0]];
        let grid = Grid { shape: axes.map(|a| grid.shape[a]), affine };
        Ok(Self { axes, reversed: [flips[2], flips[1], flips[0]], grid })
    }

    /// The values in their new order.
    pub fn apply<T: Copy>(&self, values: ArrayView3<T>) -> Array3<T> {
        let mut view = values.permuted_axes(self.axes);
        for (axis, reversed) in self.reversed.into_iter().enumerate() {
            if reversed {
                view.invert_axis(ndarray::Axis(axis));
            }
        }
        view.as_standard_layout().into_owned()
    }
}

/// For i, j, k: which LPS component, and its sign.
fn parse_code(code: &str) -> Option<[(usize, f64); 3]> {
    let letter = |c: char| {
        Some(match c.to_ascii_uppercase() {
            'L' => (0, 1.0),
            'R' => (0, -1.0),
            'P' => (1, 1.0),
            'A' => (1, -1.0),
            'S' => (2, 1.0),
            'I' => (2, -1.0),
            _ => return None,
        })
    };
    let letters: Vec<(usize, f64)> = code.chars().map(letter).collect::<Option<_>>()?;
    let letters: [(usize, f64); 3] = letters.try_into().ok()?;
    let different = letters[0].0 != letters[1].0 && letters[1].0 != letters[2].0 && letters[0].0 != letters[2].0;
    different.then_some(letters)
}

/// The orientation code of a grid: towards what columns, rows and slices run, to the nearest axis.
pub fn orientation(affine: &Affine) -> String {
    (0..3)
        .map(|axis| {
            let step = affine.step(axis);
            let largest = (0..3).max_by(|a, b| step[*a].abs().total_cmp(&step[*b].abs())).unwrap_or(0);
            [["L", "R"], ["P", "A"], ["S", "I"]][largest][usize::from(step[largest] < 0.0)]
        })
        .collect()
}
