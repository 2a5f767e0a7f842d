//! Pictures as text for terminals: kitty's graphics protocol, sixel (DEC STD 070), or coloured half blocks, which any
//! terminal with 24-bit colour shows.

use std::fmt::Write as _;
use std::io;

use super::isosurface::base64;
use super::picture::Picture;

/// Bytes of base 64 in one kitty escape sequence, as its protocol sets.
const KITTY_CHUNK: usize = 4096;

/// As kitty's graphics protocol has it: a PNG in base 64.
///
/// # Errors
/// Of the PNG encoder.
pub fn kitty(picture: &Picture) -> io::Result<String> {
    let mut png = Vec::new();
    picture.write_png(&mut png)?;
    let digits = base64(&png);
    let mut text = String::with_capacity(digits.len() + digits.len() / 64);
    let chunks: Vec<&[u8]> = digits.as_bytes().chunks(KITTY_CHUNK).collect();
    for (n, chunk) in chunks.iter().enumerate() {
        let first = if n == 0 { "f=100,a=T," } else { "" };
        let more = u8::from(n + 1 < chunks.len());
        let _ = write!(text, "\x1b_G{first}m={more};{}\x1b\\", String::from_utf8_lossy(chunk));
    }
    text.push('\n');
    Ok(text)
}

/// As sixel, in 6 x 6 x 6 colours and 24 greys.
pub fn sixel(picture: &Picture) -> String {
    let (width, height) = (picture.width(), picture.height());
    let register = |[r, g, b]: [u8; 3]| {
        let (high, low) = (r.max(g).max(b), r.min(g).min(b));
        if high - low < 12 {
            216 + (u32::from(r) + u32::from(g) + u32::from(b)) as usize * 23 / 765
        } else {
            let level = |v: u8| (usize::from(v) * 5 + 127) / 255;
            36 * level(r) + 6 * level(g) + level(b)
        }
    };
    let mut text = format!("\x1bPq\"1;1;{width};{height}");
    for n in 0..240usize {
        let percent = if n < 216 { [n / 36 * 20, n / 6 % 6 * 20, n % 6 * 20] } else { [(n - 216) * 100 / 23; 3] };
        let _ = write!(text, "#{n};2;{};{};{}", percent[0], percent[1], percent[2]);
    }
    for top in (0..height).step_by(6) {
        let band: Vec<Vec<usize>> = (top..(top + 6).min(height))
            .map(|y| (0..width).map(|x| register(picture.pixel(x, y))).collect())
            .collect();
        let mut used: Vec<usize> = band.iter().flatten().copied().collect();
        used.sort_unstable();
        used.dedup();
        for colour in used {
            let _ = write!(text, "#{colour}");
            let column = |x: usize| band.iter().enumerate().fold(0u8, |bits, (n, row)| bits | u8::from(row[x] == colour) << n);
            let mut x = 0;
            while x < width {
                let bits = column(x);
                let run = (x..width).take_while(|x| column(*x) == bits).count();
                let letter = (b'?' + bits) as char;
                if run > 3 {
                    let _ = write!(text, "!{run}{letter}");
                } else {
                    (0..run).for_each(|_| text.push(letter));
                }
                x += run;
            }
            text.push('$');
        }
        text.push('-');
    }
    text + "\x1b\\\n"
}

/// As upper half blocks: two pixels to a letter, at most `columns` letters wide.
pub fn half_blocks(picture: &Picture, columns: usize) -> String {
    let width = columns.clamp(1, picture.width().max(1));
    let height = (picture.height() * width / picture.width()).max(2).next_multiple_of(2);
    let small = picture.resized(width, height);
    let mut text = String::new();
    for y in (0..small.height()).step_by(2) {
        for x in 0..small.width() {
            let ([r, g, b], [s, h, c]) = (small.pixel(x, y), small.pixel(x, y + 1));
            let _ = write!(text, "\x1b[38;2;{r};{g};{b};48;2;{s};{h};{c}m\u{2580}");
        }
        text.push_str("\x1b[0m\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp() -> Picture {
        let mut picture = Picture::new(40, 20, [0; 3]);
        (0..40).for_each(|x| (0..20).for_each(|y| picture.set(x, y, [(x * 6) as u8; 3])));
        picture.set(3, 3, [255, 0, 0]);
        picture
    }

    #[test]
    fn each_way_of_drawing_is_well_formed() {
        let kitty = kitty(&ramp()).unwrap();
        assert!(kitty.starts_with("\x1b_Gf=100,a=T,m=0;iVBORw0KGgo") && kitty.ends_with("\x1b\\\n"));
        let sixel = sixel(&ramp());
        assert!(sixel.starts_with("\x1bPq\"1;1;40;20#0;2;0;0;0") && sixel.ends_with("-\x1b\\\n"));
        assert_eq!(sixel.matches('-').count(), 4, "bands of six rows");
        let blocks = half_blocks(&ramp(), 20);
        assert_eq!(blocks.lines().count(), 5);
        assert!(blocks.lines().all(|line| line.matches('\u{2580}').count() == 20));
    }
}
