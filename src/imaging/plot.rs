//! A curve on a picture.

use super::picture::{Colour, LABEL_COLOURS, Picture, WHITE, text_height, text_width};

/// Draws values over their number, with axes, the values at its ends, and upright lines at `marks` (numbers), where a new
/// curve begins.
pub fn curve(title: &str, unit: &str, values: &[f64], marks: &[usize]) -> Picture {
    const PAPER: Colour = [24, 26, 32];
    const LINES: Colour = [90, 94, 104];
    let (width, height) = (800.0, 500.0);
    let (left, right, top, bottom) = (110.0, width - 24.0, 50.0, height - 50.0);
    let mut picture = Picture::new(width as usize, height as usize, PAPER);
    picture.text(12, 14, 2, WHITE, title);
    picture.outline([left, top], [right, bottom], LINES);
    let finite = values.iter().copied().filter(|v| v.is_finite());
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return picture;
    }
    let span = if high > low { high - low } else { 1.0 };
    let place = |n: usize, v: f64| {
        let x = left + (right - left) * n as f64 / (values.len().max(2) - 1) as f64;
        [x, bottom - (bottom - top) * (0.04 + 0.92 * (v - low) / span)]
    };
    for quarter in 0..=4 {
        let value = low + span * f64::from(quarter) / 4.0;
        let y = place(0, value)[1];
        picture.line([left, y], [right, y], [48, 51, 60]);
        let text = format!("{value:.4}");
        picture.text((left - 8.0) as i64 - text_width(&text, 1) as i64, y as i64 - 3, 1, WHITE, &text);
    }
    for mark in marks {
        let x = place(*mark, low)[0];
        picture.line([x, top], [x, bottom], LINES);
        picture.text(x as i64 - 6, (bottom + 8.0) as i64, 1, WHITE, &mark.to_string());
    }
    for (n, pair) in values.windows(2).enumerate().filter(|(n, p)| p.iter().all(|v| v.is_finite()) && !marks.contains(&(n + 1))) {
        let (from, to) = (place(n, pair[0]), place(n + 1, pair[1]));
        picture.line(from, to, LABEL_COLOURS[1]);
        picture.line([from[0], from[1] + 1.0], [to[0], to[1] + 1.0], LABEL_COLOURS[1]);
    }
    let last = (values.len() - 1).to_string();
    let y = (bottom + 8.0) as i64;
    picture.text(right as i64 - text_width(&last, 1) as i64, y, 1, WHITE, &last);
    let y = height as i64 - 8 - text_height(2) as i64;
    picture.text((left + right) as i64 / 2 - text_width(unit, 2) as i64 / 2, y, 2, WHITE, unit);
    picture
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_curve_falls_on_the_picture() {
        let values: Vec<f64> = (0..50).map(|n| 1.0 / f64::from(n + 1)).collect();
        let picture = curve("metric", "step", &values, &[10]);
        let height_at = |x: usize| (60..460).find(|y| picture.pixel(x, *y) == LABEL_COLOURS[1]);
        assert!(height_at(112).unwrap() < height_at(700).unwrap());
        curve("nothing", "", &[f64::NAN], &[]);
    }
}
