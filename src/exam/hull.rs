//! Convex hulls of cells in a slice.

/// First and last column inside the convex hull of the marked cells, for each row.
pub fn hull_rows(rows: usize, columns: usize, marked: impl Fn(usize) -> bool) -> Vec<Option<(usize, usize)>> {
    let mut points: Vec<(i64, i64)> = Vec::new();
    for y in 0..rows {
        let row = y * columns;
        // The outermost cells of a row span all between them.
        let first = (0..columns).find(|x| marked(row + x));
        let last = (0..columns).rev().find(|x| marked(row + x));
        if let (Some(first), Some(last)) = (first, last) {
            points.push((y as i64, first as i64));
            if last != first {
                points.push((y as i64, last as i64));
            }
        }
    }
    let mut spans = vec![None; rows];
    for (n, (y, x)) in points.iter().enumerate() {
        let hull = &mut spans[*y as usize];
        let x = *x as usize;
        *hull = Some(hull.map_or((x, x), |(a, b): (usize, usize)| (a.min(x), b.max(x))));
        debug_assert!(n == 0 || points[n - 1] <= points[n]);
    }
    let outline = convex_hull(&points);
    for (n, a) in outline.iter().enumerate() {
        let b = outline[(n + 1) % outline.len()];
        let (low, high) = (a.min(&b), *a.max(&b));
        for y in low.0..=high.0 {
            if high.0 == low.0 {
                continue;
            }
            // Cells whose centre is inside: round towards the inside on either edge.
            let at = (low.1 * (high.0 - y) + high.1 * (y - low.0)) as f64 / (high.0 - low.0) as f64;
            let span = spans[y as usize].get_or_insert((at.ceil() as usize, at.floor() as usize));
            span.0 = span.0.min(at.ceil() as usize);
            span.1 = span.1.max(at.floor() as usize);
        }
    }
    spans
}

/// Corners of the convex hull of points in ascending order, counter-clockwise (Andrew's monotone chain, 1979).
pub fn convex_hull<T>(sorted: &[(T, T)]) -> Vec<(T, T)>
where
    T: Copy + std::ops::Sub<Output = T> + std::ops::Mul<Output = T> + PartialOrd + Default,
{
    if sorted.len() < 3 {
        return sorted.to_vec();
    }
    let turn = |o: (T, T), a: (T, T), b: (T, T)| (a.0 - o.0) * (b.1 - o.1) - (a.1 - o.1) * (b.0 - o.0);
    let half = |points: &mut dyn Iterator<Item = (T, T)>| {
        let mut chain: Vec<(T, T)> = Vec::new();
        for p in points {
            while chain.len() >= 2 && turn(chain[chain.len() - 2], chain[chain.len() - 1], p) <= T::default() {
                chain.pop();
            }
            chain.push(p);
        }
        chain.pop();
        chain
    };
    let mut hull = half(&mut sorted.iter().copied());
    hull.extend(half(&mut sorted.iter().rev().copied()));
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notch_is_filled_and_a_corner_is_not_cut() {
        let picture = ["..#...", ".#..#.", "#.....", ".#..##"];
        let marked: Vec<bool> = picture.iter().flat_map(|row| row.chars().map(|c| c == '#')).collect();
        let spans = hull_rows(4, 6, |n| marked[n]);
        assert_eq!(spans, [Some((2, 2)), Some((1, 4)), Some((0, 4)), Some((1, 5))]);
    }

    #[test]
    fn nothing_has_no_hull() {
        assert_eq!(hull_rows(2, 3, |_| false), [None, None]);
    }
}
