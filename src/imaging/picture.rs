//! Pictures: 8-bit colour, lines, boxes and letters, as PNG.

use std::io::{self, Write};

use super::font;

/// Red, green, blue.
pub type Colour = [u8; 3];

/// White, for letters.
pub const WHITE: Colour = [255, 255, 255];

/// Colours that differ well from each other and from grey, for labels: label n takes number (n - 1) modulo 10.
pub const LABEL_COLOURS: [Colour; 10] = [
    [255, 64, 64],
    [64, 200, 255],
    [255, 208, 0],
    [96, 224, 96],
    [255, 112, 224],
    [255, 144, 32],
    [96, 128, 255],
    [0, 224, 192],
    [176, 96, 255],
    [200, 224, 64],
];

/// Pixels on a side that a picture may have: above it a viewer would not open it, and a header that lies would cost
/// gigabytes.
pub const SIDE_MAX: usize = 16_384;

/// An 8-bit colour picture; rows from the top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl Picture {
    /// A picture of one colour; sides above [`SIDE_MAX`] are cut to it.
    pub fn new(width: usize, height: usize, colour: Colour) -> Self {
        let (width, height) = (width.clamp(1, SIDE_MAX), height.clamp(1, SIDE_MAX));
        Self { width, height, rgb: colour.repeat(width * height) }
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// All pixels, row by row, red first.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// The colour at a column and a row; black outside.
    pub fn pixel(&self, x: usize, y: usize) -> Colour {
        if x >= self.width || y >= self.height {
            return [0; 3];
        }
        let at = 3 * (y * self.width + x);
        [self.rgb[at], self.rgb[at + 1], self.rgb[at + 2]]
    }

    /// Sets a pixel; nothing happens outside.
    pub fn set(&mut self, x: i64, y: i64, colour: Colour) {
        if (0..self.width as i64).contains(&x) && (0..self.height as i64).contains(&y) {
            let at = 3 * (y as usize * self.width + x as usize);
            self.rgb[at..at + 3].copy_from_slice(&colour);
        }
    }

    /// A line between two pixels.
    pub fn line(&mut self, from: [f64; 2], to: [f64; 2], colour: Colour) {
        let steps = (to[0] - from[0]).abs().max((to[1] - from[1]).abs()).ceil().clamp(1.0, 4.0 * SIDE_MAX as f64);
        for n in 0..=steps as usize {
            let t = n as f64 / steps;
            let [x, y] = [0, 1].map(|c| (from[c] + (to[c] - from[c]) * t).round() as i64);
            self.set(x, y, colour);
        }
    }

    /// The outline of a box, two opposite corners included.
    pub fn outline(&mut self, a: [f64; 2], b: [f64; 2], colour: Colour) {
        let corners = [a, [b[0], a[1]], b, [a[0], b[1]]];
        for n in 0..4 {
            self.line(corners[n], corners[(n + 1) % 4], colour);
        }
    }

    /// Writes letters, `scale` pixels to a dot, their upper left corner at (x, y), on a dark edge so that they can be
    /// read on any ground.
    pub fn text(&mut self, x: i64, y: i64, scale: usize, colour: Colour, text: &str) {
        let scale = scale.max(1) as i64;
        let dots = |mut paint: Box<dyn FnMut(i64, i64) + '_>| {
            for (n, character) in text.chars().enumerate() {
                for (row, bits) in font::letter(character).iter().enumerate() {
                    for column in (0..font::COLUMNS).filter(|c| bits >> (font::COLUMNS - 1 - c) & 1 == 1) {
                        let left = x + (n * (font::COLUMNS + 1) + column) as i64 * scale;
                        paint(left, y + row as i64 * scale);
                    }
                }
            }
        };
        for (grow, colour) in [(1, [0; 3]), (0, colour)] {
            dots(Box::new(|left, top| {
                for dy in -grow..scale + grow {
                    for dx in -grow..scale + grow {
                        self.set(left + dx, top + dy, colour);
                    }
                }
            }));
        }
    }

    /// Copies another picture in, its upper left corner at (x, y).
    pub fn paste(&mut self, x: usize, y: usize, other: &Picture) {
        for row in 0..other.height.min(self.height.saturating_sub(y)) {
            let columns = other.width.min(self.width.saturating_sub(x));
            let (to, from) = (3 * ((y + row) * self.width + x), 3 * row * other.width);
            self.rgb[to..to + 3 * columns].copy_from_slice(&other.rgb[from..from + 3 * columns]);
        }
    }

    /// The same picture with other sides: means of the pixels below when smaller, the nearest when larger.
    pub fn resized(&self, width: usize, height: usize) -> Self {
        let mut out = Self::new(width, height, [0; 3]);
        let span = |n: usize, of: usize, from: usize| {
            let start = n * from / of;
            start..((n + 1) * from / of).max(start + 1).min(from)
        };
        for y in 0..out.height {
            for x in 0..out.width {
                let (rows, columns) = (span(y, out.height, self.height), span(x, out.width, self.width));
                let count = (rows.len() * columns.len()) as u32;
                let mut sums = [0u32; 3];
                for (row, column) in rows.flat_map(|r| columns.clone().map(move |c| (r, c))) {
                    let colour = self.pixel(column, row);
                    sums.iter_mut().zip(colour).for_each(|(s, c)| *s += u32::from(c));
                }
                out.set(x as i64, y as i64, sums.map(|s| ((s + count / 2) / count) as u8));
            }
        }
        out
    }

    /// Writes the picture as PNG.
    ///
    /// # Errors
    /// What the disk answers.
    pub fn write_png(&self, out: impl Write) -> io::Result<()> {
        let mut encoder = png::Encoder::new(out, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Fast);
        let mut writer = encoder.write_header().map_err(io::Error::other)?;
        writer.write_image_data(&self.rgb).map_err(io::Error::other)?;
        writer.finish().map_err(io::Error::other)
    }
}

/// Columns that a text takes at this scale.
pub fn text_width(text: &str, scale: usize) -> usize {
    (text.chars().count() * (font::COLUMNS + 1)).saturating_sub(1) * scale
}

/// Rows that a text takes at this scale.
pub fn text_height(scale: usize) -> usize {
    font::ROWS * scale
}

/// The patient's sides a direction points to, in the letters of Patient Orientation (PS3.3 C.7.6.1.1.1), the
/// strongest first: `R`, `LA`, `HPL`.
pub fn direction_letters(lps: [f64; 3]) -> String {
    let length = crate::geometry::norm(lps).max(f64::MIN_POSITIVE);
    let mut parts: Vec<(f64, char)> = [['L', 'R'], ['P', 'A'], ['H', 'F']]
        .iter()
        .zip(lps)
        .map(|(pair, v)| (v.abs() / length, pair[usize::from(v < 0.0)]))
        // A letter for each side less than 67.5 degrees away: a plane tilted by up to 22.5 degrees keeps one letter.
        .filter(|(share, _)| *share > 0.3827)
        .collect();
    parts.sort_by(|a, b| b.0.total_cmp(&a.0));
    parts.into_iter().map(|(_, letter)| letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_survives_png() {
        let mut picture = Picture::new(40, 20, [1, 2, 3]);
        picture.text(2, 3, 1, WHITE, "R 5.5 mm");
        picture.outline([0.0, 0.0], [39.0, 19.0], LABEL_COLOURS[0]);
        let mut bytes = Vec::new();
        picture.write_png(&mut bytes).unwrap();
        let mut reader = png::Decoder::new(io::Cursor::new(bytes)).read_info().unwrap();
        let mut back = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut back).unwrap();
        assert_eq!(back, picture.rgb());
        assert_eq!(picture.pixel(39, 10), LABEL_COLOURS[0]);
    }

    #[test]
    fn letters_name_the_patients_own_sides() {
        assert_eq!(direction_letters([-1.0, 0.0, 0.0]), "R");
        assert_eq!(direction_letters([2.0, 0.1, -0.1]), "L");
        assert_eq!(direction_letters([0.0, -1.0, 0.9]), "AH");
        assert_eq!(direction_letters([0.0, 0.2, -1.0]), "F");
    }

    #[test]
    fn a_smaller_picture_shows_the_mean() {
        let mut picture = Picture::new(4, 2, [0; 3]);
        picture.set(0, 0, [200, 100, 40]);
        assert_eq!(picture.resized(2, 1).pixel(0, 0), [50, 25, 10]);
        assert_eq!(picture.resized(8, 4).pixel(1, 1), [200, 100, 40]);
    }
}
