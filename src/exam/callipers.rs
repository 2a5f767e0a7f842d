//! Callipers: the long and the short axis of a thing in the axial plane, taken on its outline.

use super::hull::convex_hull;

/// Diameters in one slice.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Axes {
    /// Longest diameter over all slices.
    pub long_mm: f64,
    /// Longest extent perpendicular to it in the same slice.
    pub short_mm: f64,
}

impl Axes {
    /// Axes of the points of an outline, `(y, x)` in millimetres.
    pub fn of(mut points: Vec<(f64, f64)>) -> Self {
        points.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        points.dedup();
        let hull = convex_hull(&points);
        let mut long = (0.0, (1.0, 0.0));
        for (n, a) in hull.iter().enumerate() {
            for b in &hull[n + 1..] {
                let (dy, dx) = (b.0 - a.0, b.1 - a.1);
                let length = (dy * dy + dx * dx).sqrt();
                if length > long.0 {
                    long = (length, (dy / length, dx / length));
                }
            }
        }
        let (dy, dx) = long.1;
        let across = hull.iter().map(|(y, x)| y * dx - x * dy);
        let (low, high) = across.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        Self { long_mm: long.0, short_mm: if high > low { high - low } else { 0.0 } }
    }

    /// Mean of both (Fleischner Society 2017).
    pub fn mean_mm(&self) -> f64 {
        (self.long_mm + self.short_mm) / 2.0
    }
}

/// Axes of the marked pixels of one slice; `pixel_mm` is the distance of rows and of columns.
///
/// The outline runs through the middles of the outer pixel edges: their centres would measure half a pixel too little on
/// either side, their corners too much.
pub fn axes(pixels: &[(usize, usize)], marked: impl Fn(isize, isize) -> bool, pixel_mm: [f64; 2]) -> Axes {
    let mut points = Vec::new();
    for (y, x) in pixels {
        let (y, x) = (*y as isize, *x as isize);
        for (dy, dx) in [(-1, 0), (0, -1), (0, 1), (1, 0)] {
            if !marked(y + dy, x + dx) {
                points.push(((y as f64 + 0.5 * dy as f64) * pixel_mm[0], (x as f64 + 0.5 * dx as f64) * pixel_mm[1]));
            }
        }
    }
    Axes::of(points)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(inside: impl Fn(f64, f64) -> bool, pixel: [f64; 2]) -> Axes {
        let marked = |y: isize, x: isize| inside((y as f64 - 40.0) * pixel[0], (x as f64 - 40.0) * pixel[1]);
        let pixels: Vec<_> = (0..80).flat_map(|y| (0..80).map(move |x| (y, x))).filter(|(y, x)| marked(*y as isize, *x as isize)).collect();
        axes(&pixels, marked, pixel)
    }

    #[test]
    fn a_disc_measures_its_diameter() {
        for diameter in [5.0, 8.0, 14.0, 21.0] {
            let a = measure(|y, x| y.hypot(x) <= diameter / 2.0, [0.7, 0.7]);
            assert!((a.long_mm - diameter).abs() < 0.71 && (a.short_mm - diameter).abs() < 0.71, "{diameter}: {a:?}");
        }
    }

    #[test]
    fn a_slanting_ellipse_measures_both_its_axes_whatever_the_pixel() {
        let (sin, cos) = 0.6f64.sin_cos();
        let ellipse = |y: f64, x: f64| ((x * cos + y * sin) / 10.0).powi(2) + ((y * cos - x * sin) / 5.0).powi(2) <= 1.0;
        for pixel in [[0.5, 0.5], [0.5, 0.9]] {
            let a = measure(ellipse, pixel);
            assert!((a.long_mm - 20.0).abs() < 0.8 && (a.short_mm - 10.0).abs() < 0.8, "{a:?}");
        }
    }

    #[test]
    fn nothing_measures_nothing() {
        assert_eq!(axes(&[], |_, _| false, [1.0, 1.0]), Axes::default());
    }
}
