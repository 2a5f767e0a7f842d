//! Cubic B-splines through samples: coefficients by two recursions a line (Unser, Aldroubi & Eden 1993), samples
//! mirrored about the outermost ones.

#![allow(clippy::needless_range_loop, reason = "lanes of several arrays move together; the index is what they share")]

use ndarray::{Array3, ArrayView3};

use crate::imaging::lines::planes;
use crate::pool::{Fault, Pool};

/// Lines filtered side by side.
const LANES: usize = 16;

/// The pole of the cubic spline's inverse filter: the square root of 3, minus 2.
const POLE: f64 = -0.267_949_192_431_122_7;

/// The index that stands for `i` when samples are mirrored about the first and the last.
pub(super) fn mirror(i: isize, n: usize) -> usize {
    if n == 1 {
        return 0;
    }
    let period = 2 * (n as isize - 1);
    let m = i.rem_euclid(period);
    (if m < n as isize { m } else { period - m }) as usize
}

/// Parts of the coefficients at -1, 0, 1 and 2 in the value at `t`, 0 to 1.
pub(super) fn weights(t: f64) -> [f64; 4] {
    let u = 1.0 - t;
    [
        u * u * u / 6.0,
        2.0 / 3.0 - 0.5 * t * t * (2.0 - t),
        2.0 / 3.0 - 0.5 * u * u * (2.0 - u),
        t * t * t / 6.0,
    ]
}

/// The coefficients of the spline that goes through every voxel.
pub(super) fn coefficients(values: ArrayView3<f32>, pool: &Pool) -> Result<Array3<f32>, Fault> {
    let mut out = values.as_standard_layout().into_owned();
    for axis in 0..3 {
        let length = out.shape()[axis];
        if length < 2 {
            continue;
        }
        let planes = planes(&mut out, if axis == 0 { 1 } else { 0 });
        pool.for_each(planes.len(), |n| {
            let mut rows = planes[n].lock().expect("each plane is locked once");
            let mut line = vec![[0.0f64; LANES]; length];
            if axis == 2 {
                for strip in rows.chunks_mut(LANES) {
                    for (i, lanes) in line.iter_mut().enumerate() {
                        strip.iter().zip(lanes).for_each(|(row, l)| *l = f64::from(row[i]));
                    }
                    recurse(&mut line);
                    for (i, lanes) in line.iter().enumerate() {
                        strip.iter_mut().zip(lanes).for_each(|(row, l)| row[i] = *l as f32);
                    }
                }
            } else {
                let columns = rows[0].len();
                for x in (0..columns).step_by(LANES) {
                    let end = (x + LANES).min(columns);
                    for (row, lanes) in rows.iter().zip(&mut line) {
                        row[x..end].iter().zip(lanes).for_each(|(v, l)| *l = f64::from(*v));
                    }
                    recurse(&mut line);
                    for (row, lanes) in rows.iter_mut().zip(&line) {
                        row[x..end].iter_mut().zip(lanes).for_each(|(v, l)| *v = *l as f32);
                    }
                }
            }
        })?;
    }
    Ok(out)
}

/// One causal and one anti-causal pass, in double precision.
fn recurse(line: &mut [[f64; LANES]]) {
    let n = line.len();
    let each = |f: &dyn Fn(usize) -> f64| -> [f64; LANES] { std::array::from_fn(f) };
    // The first value of the causal pass is a sum over the mirrored line; 40 powers of the pole are below rounding.
    let last = 2 * (n as i32 - 1);
    let mut first = each(&|l| line[0][l] + POLE.powi(n as i32 - 1) * line[n - 1][l]);
    for (k, sample) in line.iter().enumerate().take(n - 1).skip(1).take(40) {
        let weight = POLE.powi(k as i32) + POLE.powi(last - k as i32);
        first = each(&|l| first[l] + weight * sample[l]);
    }
    let scale = 6.0;
    let whole = 1.0 - POLE.powi(last);
    line[0] = first.map(|v| scale * v / whole);
    for k in 1..n {
        let (before, here) = line.split_at_mut(k);
        for l in 0..LANES {
            here[0][l] = scale * here[0][l] + POLE * before[k - 1][l];
        }
    }
    let end = POLE / (POLE * POLE - 1.0);
    line[n - 1] = each(&|l| end * (line[n - 1][l] + POLE * line[n - 2][l]));
    for k in (0..n - 1).rev() {
        let (here, after) = line.split_at_mut(k + 1);
        for l in 0..LANES {
            here[k][l] = POLE * (after[0][l] - here[k][l]);
        }
    }
}
