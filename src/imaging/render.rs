//! Surfaces as pictures: shaded triangles behind a depth buffer, seen from chosen sides, without perspective so that
//! lengths can be compared.

use super::isosurface::area_vector;
use super::picture::{Picture, WHITE, direction_letters};
use crate::geometry::{dot, norm};

/// From where a surface is looked at, in degrees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    /// 0 in front of the patient, 90 on the patient's left, 180 behind, 270 on the patient's right.
    pub azimuth_degrees: f64,
    /// 0 level, 90 from above the head.
    pub elevation_degrees: f64,
}

impl View {
    /// A name (`anterior`, `posterior`, `left`, `right`, `superior`, `inferior`) or `AZIMUTH,ELEVATION` in degrees.
    pub fn parse(text: &str) -> Option<Self> {
        let (azimuth_degrees, elevation_degrees) = match text {
            "anterior" => (0.0, 0.0),
            "posterior" => (180.0, 0.0),
            "left" => (90.0, 0.0),
            "right" => (270.0, 0.0),
            "superior" => (0.0, 90.0),
            "inferior" => (0.0, -90.0),
            _ => {
                let (azimuth, elevation) = text.split_once(',')?;
                (azimuth.trim().parse().ok()?, elevation.trim().parse().ok()?)
            }
        };
        let view = Self { azimuth_degrees, elevation_degrees };
        (azimuth_degrees.is_finite() && elevation_degrees.is_finite()).then_some(view)
    }

    /// Unit vectors in LPS: to the right of the picture, to its top, to the viewer.
    pub fn axes(self) -> [[f64; 3]; 3] {
        let (sin_a, cos_a) = self.azimuth_degrees.to_radians().sin_cos();
        let (sin_e, cos_e) = self.elevation_degrees.to_radians().sin_cos();
        let right = [cos_a, sin_a, 0.0];
        let viewer = [sin_a * cos_e, -cos_a * cos_e, sin_e];
        [right, crate::geometry::cross(viewer, right), viewer]
    }
}

/// Dots per pixel and side; their mean is the pixel.
const DOTS: usize = 2;

/// Colour of a surface in full light: bone.
const SURFACE: [f64; 3] = [232.0, 214.0, 188.0];

/// A picture of a surface in the making; triangles may come in any number of pieces.
pub struct Renderer {
    axes: [[f64; 3]; 3],
    /// Dots per millimetre.
    scale: f64,
    /// Of the middle of the picture, along `axes`.
    middle: [f64; 3],
    side: usize,
    depth: Vec<f32>,
    light: Vec<u8>,
}

impl Renderer {
    /// A square picture, `side` pixels wide, that just holds everything between `least` and `greatest`.
    pub fn new(view: View, least_lps_mm: [f32; 3], greatest_lps_mm: [f32; 3], side: usize) -> Self {
        let axes = view.axes();
        let [least, greatest] = [least_lps_mm, greatest_lps_mm].map(|v| v.map(f64::from));
        let centre: [f64; 3] = std::array::from_fn(|c| (least[c] + greatest[c]) / 2.0);
        let extent = |axis: [f64; 3]| (0..3).map(|c| axis[c].abs() * (greatest[c] - least[c])).sum::<f64>();
        let side = side.clamp(16, 4096) * DOTS;
        let widest = extent(axes[0]).max(extent(axes[1])).max(1e-6);
        Self {
            axes,
            scale: side as f64 * 0.92 / widest,
            middle: axes.map(|axis| dot(axis, centre)),
            side,
            depth: vec![f32::NEG_INFINITY; side * side],
            light: vec![0; side * side],
        }
    }

    /// Draws triangles.
    pub fn draw(&mut self, vertices: &[[f32; 3]], triangles: &[[u32; 3]]) {
        let half = self.side as f64 / 2.0;
        let seen: Vec<[f32; 3]> = vertices
            .iter()
            .map(|v| {
                let v = v.map(f64::from);
                let [x, y, z] = std::array::from_fn(|a| (dot(self.axes[a], v) - self.middle[a]) * self.scale);
                [(half + x) as f32, (half - y) as f32, z as f32]
            })
            .collect();
        for triangle in triangles {
            let normal = area_vector(triangle.map(|v| vertices[v as usize]));
            // Light from the viewer, on both sides of the surface: an open one shows its inside.
            let facing = dot(normal, self.axes[2]).abs() / norm(normal).max(f64::MIN_POSITIVE);
            let light = (40.0 + 215.0 * facing) as u8;
            self.fill(triangle.map(|v| seen[v as usize]), light);
        }
    }

    fn fill(&mut self, [a, b, c]: [[f32; 3]; 3], light: u8) {
        let last = (self.side - 1) as f32;
        let span = |n: usize| {
            let (low, high) = (a[n].min(b[n]).min(c[n]), a[n].max(b[n]).max(c[n]));
            // Dots have their centres at whole numbers.
            (low.ceil().max(0.0), high.floor().min(last))
        };
        let ((left, right), (top, bottom)) = (span(0), span(1));
        let twice_area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]);
        if left > right || top > bottom || twice_area == 0.0 {
            return;
        }
        for y in top as usize..=bottom as usize {
            for x in left as usize..=right as usize {
                let (px, py) = (x as f32, y as f32);
                let wb = ((px - a[0]) * (c[1] - a[1]) - (py - a[1]) * (c[0] - a[0])) / twice_area;
                let wc = ((b[0] - a[0]) * (py - a[1]) - (b[1] - a[1]) * (px - a[0])) / twice_area;
                // A hair of overlap: no dot falls between two triangles.
                if wb < -1e-4 || wc < -1e-4 || wb + wc > 1.0 + 1e-4 {
                    continue;
                }
                let depth = a[2] + wb * (b[2] - a[2]) + wc * (c[2] - a[2]);
                let at = y * self.side + x;
                if depth > self.depth[at] {
                    self.depth[at] = depth;
                    self.light[at] = light;
                }
            }
        }
    }

    /// The picture, with the patient's sides at its edges.
    pub fn finish(self, title: &str) -> Picture {
        let side = self.side / DOTS;
        let ground = [18.0, 20.0, 26.0];
        let mut picture = Picture::new(side, side, [0; 3]);
        for y in 0..side {
            for x in 0..side {
                let mut sum = [0.0; 3];
                for n in 0..DOTS * DOTS {
                    let at = (y * DOTS + n / DOTS) * self.side + x * DOTS + n % DOTS;
                    for c in 0..3 {
                        let lit = SURFACE[c] * f64::from(self.light[at]) / 255.0;
                        sum[c] += if self.depth[at] > f32::NEG_INFINITY { lit } else { ground[c] };
                    }
                }
                picture.set(x as i64, y as i64, sum.map(|s| (s / (DOTS * DOTS) as f64).round() as u8));
            }
        }
        mark_sides(&mut picture, self.axes[0], self.axes[1].map(|v| -v));
        picture.text(6, 6, 2, WHITE, title);
        picture
    }
}

/// Writes the patient's sides at the edges of a picture whose columns run along `right` and rows along `down` (LPS).
pub fn mark_sides(picture: &mut Picture, right: [f64; 3], down: [f64; 3]) {
    use super::picture::{text_height, text_width};
    let scale = (picture.width().min(picture.height()) / 160).clamp(1, 4);
    let (width, height) = (picture.width() as i64, picture.height() as i64);
    let tall = text_height(scale) as i64;
    let edge = 4;
    let [to_right, to_bottom] = [right, down].map(direction_letters);
    let [to_left, to_top] = [right, down].map(|v| direction_letters(v.map(|c| -c)));
    let wide = |text: &str| text_width(text, scale) as i64;
    let middle = (height - tall) / 2;
    picture.text(edge, middle, scale, WHITE, &to_left);
    picture.text(width - edge - wide(&to_right), middle, scale, WHITE, &to_right);
    picture.text((width - wide(&to_top)) / 2, edge, scale, WHITE, &to_top);
    picture.text((width - wide(&to_bottom)) / 2, height - edge - tall, scale, WHITE, &to_bottom);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_the_front_the_patients_left_is_on_the_right_and_from_behind_on_the_left() {
        let right_of = |name: &str| View::parse(name).unwrap().axes()[0].map(f64::round);
        assert_eq!(right_of("anterior"), [1.0, 0.0, 0.0]);
        assert_eq!(right_of("posterior"), [-1.0, 0.0, 0.0]);
        assert_eq!(right_of("left"), [0.0, 1.0, 0.0]);
        assert_eq!(View::parse("left").unwrap().axes()[1].map(f64::round), [0.0, 0.0, 1.0]);
        assert_eq!(View::parse("12,x"), None);
    }

    #[test]
    fn what_is_nearer_hides_what_is_behind() {
        let square = |y: f32, r: f32| {
            let v = [[-r, y, -r], [r, y, -r], [r, y, r], [-r, y, r]];
            (v, [[0u32, 1, 2], [0, 2, 3]])
        };
        let view = View::parse("anterior").unwrap();
        let mut renderer = Renderer::new(view, [-10.0; 3], [10.0; 3], 64);
        let (near, triangles) = square(-5.0, 4.0);
        // A slope behind is darker than the square in front.
        let slope = [[-9.0, 9.0, -9.0], [9.0, 9.0, -9.0], [9.0, -1.0, 9.0], [-9.0, -1.0, 9.0]];
        renderer.draw(&near, &triangles);
        renderer.draw(&slope, &triangles);
        let picture = renderer.finish("");
        let [middle, side, corner] = [(32, 32), (32, 50), (1, 62)].map(|(x, y)| picture.pixel(x, y)[0]);
        assert!(middle > side && side > corner, "{middle} {side} {corner}");
    }
}
