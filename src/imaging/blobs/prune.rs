//! Of blobs that overlap, the larger stays.

use std::collections::HashMap;

/// A blob as pruning sees it: a centre in units of sigma, and which sigma.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ball {
    pub centre: [f64; 3],
    /// Index into the ascending sigmas.
    pub scale: usize,
}

/// Whether each ball stays.
///
/// Two balls whose shared volume (area, for two dimensions) is more than `overlap` of the smaller one's cannot both
/// stay: the larger does, and of equal ones the later in the list, as in scikit-image. There the outcome of chains
/// (a large ball over a middle one over a small one) depends on the order of a hash set; here the larger always
/// decides first, so a ball that has gone removes no other.
pub(super) fn kept(balls: &[Ball], sigmas: &[f64], overlap: f64, dimensions: usize) -> Vec<bool> {
    let root = (dimensions as f64).sqrt();
    let mut order: Vec<usize> = (0..balls.len()).collect();
    order.sort_by_key(|n| std::cmp::Reverse((balls[*n].scale, *n)));

    // The kept balls of each scale, in cells as wide as two of them: a ball can only touch those of 27 cells.
    let mut cells: Vec<HashMap<[i64; 3], Vec<usize>>> = sigmas.iter().map(|_| HashMap::new()).collect();
    let cell = |centre: [f64; 3], scale: usize| centre.map(|c| (c / (2.0 * sigmas[scale] * root)).floor() as i64);
    let mut stays = vec![false; balls.len()];
    for n in order {
        let ball = balls[n];
        let hidden = (ball.scale..sigmas.len()).any(|scale| {
            let home = cell(ball.centre, scale);
            (0..27).any(|d| {
                let key = [home[0] + d / 9 - 1, home[1] + d / 3 % 3 - 1, home[2] + d % 3 - 1];
                let near = cells[scale].get(&key).map_or(&[][..], Vec::as_slice);
                near.iter().any(|m| {
                    shared(balls[*m].centre, sigmas[scale], ball.centre, sigmas[ball.scale], dimensions) > overlap
                })
            })
        });
        if !hidden {
            stays[n] = true;
            cells[ball.scale].entry(cell(ball.centre, ball.scale)).or_default().push(n);
        }
    }
    stays
}

/// The fraction of the smaller ball that lies inside the larger; each has the radius sigma times the root of the
/// dimensions.
fn shared(large: [f64; 3], large_sigma: f64, small: [f64; 3], small_sigma: f64, dimensions: usize) -> f64 {
    let root = (dimensions as f64).sqrt();
    let r = small_sigma / large_sigma;
    let d2: f64 = (0..3).map(|a| ((large[a] - small[a]) / (large_sigma * root)).powi(2)).sum();
    let d = d2.sqrt();
    if d > 1.0 + r {
        return 0.0;
    }
    if d <= 1.0 - r {
        return 1.0;
    }
    if dimensions == 2 {
        let angle = |a: f64, b: f64| ((d * d + a * a - b * b) / (2.0 * d * a)).clamp(-1.0, 1.0).acos();
        let heron = (-d + r + 1.0) * (d - r + 1.0) * (d + r - 1.0) * (d + r + 1.0);
        (angle(1.0, r) + r * r * angle(r, 1.0) - 0.5 * heron.abs().sqrt()) / (std::f64::consts::PI * r * r)
    } else {
        // A lens of two spherical caps: https://mathworld.wolfram.com/Sphere-SphereIntersection.html
        let lens = (1.0 + r - d).powi(2) * (d * d + 2.0 * d * (1.0 + r) - 3.0 * (1.0 + r * r) + 6.0 * r) / (12.0 * d);
        lens / (4.0 / 3.0 * r.powi(3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_volume_is_that_of_spheres_and_discs() {
        // Two unit spheres a radius apart share 5/16 of their volume; two such discs 2/3 - sqrt(3)/(2 pi) of their area.
        let at = |d: f64, n: f64| [0.0, 0.0, d * n.sqrt()];
        assert!((shared([0.0; 3], 1.0, at(1.0, 3.0), 1.0, 3) - 5.0 / 16.0).abs() < 1e-12);
        let disc = 2.0 / 3.0 - 3f64.sqrt() / (2.0 * std::f64::consts::PI);
        assert!((shared([0.0; 3], 1.0, at(1.0, 2.0), 1.0, 2) - disc).abs() < 1e-12);
        assert_eq!(shared([0.0; 3], 4.0, at(2.0, 3.0), 1.0, 3), 1.0);
        assert_eq!(shared([0.0; 3], 1.0, at(2.1, 3.0), 1.0, 3), 0.0);
    }

    #[test]
    fn the_larger_stays_and_one_that_has_gone_removes_no_other() {
        let ball = |x: f64, scale| Ball { centre: [0.0, 0.0, x], scale };
        let sigmas = [1.0, 2.0, 4.0];
        // The middle one goes under the large one; the small one overlaps only the middle one, so it stays.
        let balls = [ball(9.4, 0), ball(5.8, 1), ball(0.0, 2), ball(200.0, 0)];
        assert_eq!(kept(&balls, &sigmas, 0.2, 3), [true, false, true, true]);
        // Of equals, the later.
        assert_eq!(kept(&[ball(0.0, 1), ball(0.5, 1)], &sigmas, 0.5, 3), [false, true]);
    }
}
