//! The cases of marching cubes, derived rather than copied: the contour of each face is drawn first, then the loops
//! it closes are filled.
//!
//! A face whose corners alternate can be cut in two ways. Which one is right follows from the bilinear function on it
//! (the asymptotic decider: Nielson and Hamann, "The asymptotic decider", IEEE Visualization 1991), and both cells that
//! share the face ask the same question, so no crack opens. These are the face tests of Chernyaev's 33 cases ("Marching
//! Cubes 33", CERN CN/95-17) as implemented by Lewiner et al. (J. Graphics Tools 8, 2003). His interior test, which may
//! join two sheets inside one cell by a tunnel, is not made: sheets that do not meet on a face stay apart.

use std::sync::LazyLock;

// Corner `c` of a cell sits at `(c & 1, c >> 1 & 1, c >> 2)` = (i, j, k).

/// Edge `4 * axis + o` runs along `axis` from the corner whose other two coordinates, in axis order, are the bits of
/// `o`. Number 12 stands for the point inside the cell.
pub(super) const INSIDE_POINT: u8 = 12;

/// What to draw in a cell, once the ambiguous faces are decided.
#[derive(Debug, Default)]
pub(super) struct Filling {
    /// Edges (or [`INSIDE_POINT`]) of each triangle, turning left when seen from the lower side.
    pub(super) triangles: Vec<[u8; 3]>,
    /// The loop whose mean is the inside point; empty when there is none.
    pub(super) inside_loop: Vec<u8>,
}

/// One of the 256 sign patterns.
#[derive(Debug)]
pub(super) struct Case {
    /// Ambiguous faces: the two inside corners, then the two outside.
    pub(super) ambiguous: Vec<[u8; 4]>,
    /// One filling for each answer: bit n is set when the inside corners of ambiguous face n are joined.
    pub(super) fillings: Vec<Filling>,
}

/// All cases, by the bits of the inside corners.
pub(super) static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| (0..256).map(case).collect());

fn corner_bits(corner: usize) -> [usize; 3] {
    [corner & 1, corner >> 1 & 1, corner >> 2 & 1]
}

fn edge_between(a: usize, b: usize) -> u8 {
    let axis = (a ^ b).trailing_zeros() as usize;
    let low = corner_bits(a & b);
    let others: Vec<usize> = (0..3).filter(|x| *x != axis).map(|x| low[x]).collect();
    (4 * axis + others[0] + 2 * others[1]) as u8
}

/// The two corners an edge joins, lower first.
pub(super) fn edge_ends(edge: usize) -> [usize; 2] {
    let axis = edge / 4;
    let others: Vec<usize> = (0..3).filter(|x| *x != axis).collect();
    let low = (edge & 1) << others[0] | (edge >> 1 & 1) << others[1];
    [low, low | 1 << axis]
}

/// Corners of a face, turning left when seen from outside the cell.
fn face_corners(face: usize) -> [usize; 4] {
    let (axis, side) = (face / 2, face % 2);
    let (b, c) = ((axis + 1) % 3, (axis + 2) % 3);
    let at = |u: usize, v: usize| side << axis | u << b | v << c;
    let around = [at(0, 0), at(1, 0), at(1, 1), at(0, 1)];
    if side == 1 { around } else { [around[0], around[3], around[2], around[1]] }
}

fn share_a_face(a: u8, b: u8) -> bool {
    let corners: Vec<[usize; 3]> =
        [a, b].iter().flat_map(|e| edge_ends(*e as usize)).map(corner_bits).collect();
    (0..3).any(|axis| corners.iter().all(|c| c[axis] == corners[0][axis]))
}

fn middle(edge: u8) -> [f64; 3] {
    let [a, b] = edge_ends(edge as usize).map(corner_bits);
    std::array::from_fn(|x| (a[x] + b[x]) as f64 / 2.0)
}

fn case(pattern: usize) -> Case {
    let inside = |corner: usize| pattern >> corner & 1 == 1;
    let mut ambiguous = Vec::new();
    for face in 0..6 {
        let c = face_corners(face);
        if inside(c[0]) == inside(c[2]) && inside(c[1]) == inside(c[3]) && inside(c[0]) != inside(c[1]) {
            let turn = usize::from(!inside(c[0]));
            ambiguous.push([c[turn], c[turn + 2], c[1 - turn], c[3 - turn]].map(|c| c as u8));
        }
    }
    let fillings = (0..1usize << ambiguous.len()).map(|joined| filling(&inside, joined)).collect();
    Case { ambiguous, fillings }
}

fn filling(inside: &impl Fn(usize) -> bool, joined: usize) -> Filling {
    // next[edge] = the edge the contour leaves to. On each face a contour enters where the boundary, walked with the
    // face on its left, goes from outside to inside, and leaves where it goes back; the neighbour cell walks it the
    // other way, so the loops of all cells turn alike.
    let mut next = [u8::MAX; 12];
    let mut question = 0;
    for face in 0..6 {
        let c = face_corners(face);
        let crossings: Vec<(u8, bool)> = (0..4)
            .map(|n| (c[n], c[(n + 1) % 4]))
            .filter(|(a, b)| inside(*a) != inside(*b))
            .map(|(a, b)| (edge_between(a, b), inside(a)))
            .collect();
        let count = crossings.len();
        let around_outside = count < 4 || {
            question += 1;
            joined >> (question - 1) & 1 == 1
        };
        for (n, (edge, leaves_inside)) in crossings.iter().enumerate() {
            if *leaves_inside {
                let partner = if around_outside { (n + 1) % count } else { (n + count - 1) % count };
                next[crossings[partner].0 as usize] = *edge;
            }
        }
    }
    let mut filling = Filling::default();
    let mut seen = [false; 12];
    for start in 0..12u8 {
        let mut ring = Vec::new();
        let mut edge = start;
        while next[edge as usize] != u8::MAX && !seen[edge as usize] {
            seen[edge as usize] = true;
            ring.push(edge);
            edge = next[edge as usize];
        }
        match ring.len() {
            0 => {}
            3 => filling.triangles.push([ring[0], ring[1], ring[2]]),
            _ => fill(&ring, &mut filling),
        }
    }
    filling
}

/// Triangles of least area (edges cut at their middles) without a diagonal that lies in a face of the cell: the cell
/// beyond could draw the same one, and four triangles would meet there. Where no such triangles exist, a fan round a
/// point inside.
fn fill(ring: &[u8], filling: &mut Filling) {
    let n = ring.len();
    let usable = |a: usize, b: usize| b - a == 1 || b - a == n - 1 || !share_a_face(ring[a], ring[b]);
    let mut best = vec![vec![(0.0f64, 0usize); n]; n];
    for length in 2..n {
        for a in 0..n - length {
            let b = a + length;
            best[a][b] = (a + 1..b)
                .filter(|m| usable(a, *m) && usable(*m, b))
                .map(|m| (best[a][m].0 + best[m][b].0 + area(ring[a], ring[m], ring[b]), m))
                .min_by(|x, y| x.0.total_cmp(&y.0))
                .unwrap_or((f64::INFINITY, 0));
        }
    }
    if best[0][n - 1].0.is_finite() {
        let mut spans = vec![(0, n - 1)];
        while let Some((a, b)) = spans.pop() {
            if b - a > 1 {
                let m = best[a][b].1;
                filling.triangles.push([ring[a], ring[m], ring[b]]);
                spans.extend([(a, m), (m, b)]);
            }
        }
    } else {
        assert!(filling.inside_loop.is_empty(), "a cell has one loop at most that needs a point inside");
        filling.inside_loop = ring.to_vec();
        filling.triangles.extend((0..n).map(|m| [ring[m], ring[(m + 1) % n], INSIDE_POINT]));
    }
}

fn area(a: u8, b: u8, c: u8) -> f64 {
    use crate::geometry::{cross, norm, sub};
    let [a, b, c] = [a, b, c].map(middle);
    norm(cross(sub(b, a), sub(c, a))) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Boundary of the triangles of a cell: directed sides that are not walked back by a neighbour in the cell.
    fn boundary(filling: &Filling) -> Vec<(u8, u8)> {
        let sides: Vec<(u8, u8)> =
            filling.triangles.iter().flat_map(|t| [(t[0], t[1]), (t[1], t[2]), (t[2], t[0])]).collect();
        sides.iter().filter(|(a, b)| !sides.contains(&(*b, *a))).copied().collect()
    }

    #[test]
    fn every_filling_of_every_case_ends_on_the_faces_alone() {
        for (pattern, case) in CASES.iter().enumerate() {
            for filling in &case.fillings {
                let border = boundary(filling);
                let crossed = (0..12).filter(|e| edge_ends(*e).map(|c| pattern >> c & 1) != [0, 0]
                    && edge_ends(*e).map(|c| pattern >> c & 1) != [1, 1]).count();
                assert_eq!(border.len(), crossed, "one contour leaves each crossed edge ({pattern:08b})");
                assert!(border.iter().all(|(a, b)| *a < 12 && *b < 12 && share_a_face(*a, *b)));
            }
        }
    }

    #[test]
    fn there_are_as_many_answers_as_ambiguous_faces_allow() {
        assert_eq!(CASES[0b0000_0001].fillings.len(), 1);
        assert_eq!(CASES[0b0000_1001].fillings.len(), 2);
        assert_eq!(CASES[0b0110_1001].fillings.len(), 64);
        let with_point = CASES.iter().flat_map(|c| &c.fillings).filter(|f| !f.inside_loop.is_empty()).count();
        assert!(with_point < 200, "points inside are rare: {with_point}");
    }
}
