//! One lesion in one frame: its outline as radii about its centre, its area and its two diameters.

use crate::exam::callipers::Axes;

/// Radii of an outline. At 64 the longest diameter of an ellipse is off by less than two parts in a thousand.
pub const RADII: usize = 64;

/// An outline about its centre, in units of the frame: millimetres where a pixel has a size, else pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Outline {
    /// `[x, y]`
    pub centre: [f64; 2],
    /// Distance of the outline at angles `2 pi n / RADII`, from x towards y.
    pub radii: [f32; RADII],
}

/// Cosine and sine of the direction of radius `n`.
fn direction(n: usize) -> (f64, f64) {
    let angle = std::f64::consts::TAU * n as f64 / RADII as f64;
    (libm::cos(angle), libm::sin(angle))
}

impl Outline {
    /// The outline where `level` (by row and column, above 0 inside) falls to 0 for the last time along each ray from the
    /// centre `[x, y]`, found to a fraction of a pixel; beyond `reach` pixels it is not sought.
    pub fn trace(centre: [f64; 2], reach: f64, level: impl Fn(f64, f64) -> f32) -> Self {
        /// Fine enough not to step over an edge, and the crossing is interpolated.
        const STEP: f64 = 0.5;
        let mut radii = [0f32; RADII];
        for (n, radius) in radii.iter_mut().enumerate() {
            let (dx, dy) = direction(n);
            let at = |r: f64| level(centre[1] + r * dy, centre[0] + r * dx);
            let mut before = at(0.0);
            let steps = (reach / STEP).ceil() as usize;
            for step in 1..=steps {
                let r = step as f64 * STEP;
                let here = at(r);
                if before > 0.0 && here <= 0.0 {
                    *radius = (r - STEP * f64::from(here / (here - before))) as f32;
                }
                before = here;
            }
        }
        Self { centre, radii }
    }

    /// The corners, `[x, y]`.
    pub fn points(&self) -> impl Iterator<Item = [f64; 2]> + '_ {
        self.radii.iter().enumerate().map(|(n, r)| {
            let (dx, dy) = direction(n);
            [self.centre[0] + f64::from(*r) * dx, self.centre[1] + f64::from(*r) * dy]
        })
    }

    /// The same about its own centre of mass, scaled by `step` and moved by `origin` (`[x, y]`): from the working grid to units.
    pub fn placed(&self, origin: [f64; 2], step: f64) -> Self {
        let place = |p: [f64; 2]| [origin[0] + p[0] * step, origin[1] + p[1] * step];
        Self { centre: place(self.centre), radii: self.radii.map(|r| (f64::from(r) * step) as f32) }
    }

    /// Area within (the polygon of its corners).
    pub fn area(&self) -> f64 {
        let sin = direction(1).1;
        let around = self.radii.iter().zip(self.radii.iter().cycle().skip(1));
        around.map(|(a, b)| 0.5 * f64::from(*a) * f64::from(*b) * sin).sum()
    }

    /// Longest diameter, and the longest perpendicular to it.
    pub fn axes(&self) -> Axes {
        Axes::of(self.points().map(|[x, y]| (y, x)).collect())
    }

    /// Takes a part of another outline into this one: radii by `share`, the centre wholly.
    pub fn follow(&mut self, other: &Self, share: f32) {
        self.centre = other.centre;
        self.radii.iter_mut().zip(&other.radii).for_each(|(own, new)| *own += share * (new - *own));
    }

    /// Whether a point is inside.
    pub fn holds(&self, x: f64, y: f64) -> bool {
        let (dx, dy) = (x - self.centre[0], y - self.centre[1]);
        let turns = libm::atan2(dy, dx) / std::f64::consts::TAU;
        let at = (turns - turns.floor()) * RADII as f64;
        let (n, part) = (at as usize % RADII, at - at.floor());
        let (a, b) = (f64::from(self.radii[n]), f64::from(self.radii[(n + 1) % RADII]));
        libm::hypot(dx, dy) < a + part * (b - a)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ellipse_measures_its_area_and_both_diameters() {
        let inside = |y: f64, x: f64| (1.0 - ((x - 50.3) / 20.0).powi(2) - ((y - 40.8) / 12.0).powi(2)) as f32;
        let outline = Outline::trace([50.0, 41.0], 60.0, inside);
        assert!((outline.area() / (std::f64::consts::PI * 240.0) - 1.0).abs() < 0.005, "{}", outline.area());
        let axes = outline.axes();
        assert!((axes.long_mm - 40.0).abs() < 0.2 && (axes.short_mm - 24.0).abs() < 0.2, "{axes:?}");
        assert!(outline.holds(68.0, 41.0) && !outline.holds(50.0, 54.5));
        let placed = outline.placed([100.0, 0.0], 0.5);
        assert!((placed.area() * 4.0 / outline.area() - 1.0).abs() < 1e-5);
        assert_eq!(placed.centre, [125.0, 20.5]);
    }

    #[test]
    fn following_smooths_the_shape_and_keeps_the_place() {
        let disc = |r: f32, x: f64| Outline { centre: [x, 0.0], radii: [r; RADII] };
        let mut smooth = disc(10.0, 0.0);
        smooth.follow(&disc(14.0, 3.0), 0.25);
        assert_eq!(smooth, disc(11.0, 3.0));
    }
}
