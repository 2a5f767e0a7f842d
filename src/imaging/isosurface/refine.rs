//! Surfaces made smoother or smaller, staying closed where they were closed.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::Surface;
use crate::geometry::{cross, dot, norm, sub};

/// Smooths by Taubin's two-step filter ("A signal processing approach to fair surface design", SIGGRAPH 1995), which
/// takes the steps of the voxels away and, unlike plain averaging, does not shrink: `steps` pairs of a step of 0.5
/// towards the mean of the neighbours and one of 0.53 away from it. Vertices on the border of an open surface stay.
pub fn smooth(surface: &mut Surface, steps: usize) {
    let n = surface.vertices.len();
    // Every side of a triangle once, from its lower to its higher vertex, with how many triangles have it.
    let mut sides: Vec<(u32, u32)> = Vec::with_capacity(surface.triangles.len() * 3);
    for [a, b, c] in &surface.triangles {
        sides.extend([(*a, *b), (*b, *c), (*c, *a)].map(|(a, b)| (a.min(b), a.max(b))));
    }
    sides.sort_unstable();
    let mut fixed = vec![false; n];
    for same in sides.chunk_by(|a, b| a == b) {
        if same.len() == 1 {
            fixed[same[0].0 as usize] = true;
            fixed[same[0].1 as usize] = true;
        }
    }
    sides.dedup();
    let mut count = vec![0u32; n];
    for (a, b) in &sides {
        count[*a as usize] += 1;
        count[*b as usize] += 1;
    }
    let mut sums = vec![[0.0f32; 3]; n];
    for step in 0..2 * steps {
        let share = if step % 2 == 0 { 0.5 } else { -0.53 };
        sums.fill([0.0; 3]);
        for (a, b) in &sides {
            let (a, b) = (*a as usize, *b as usize);
            let (p, q) = (surface.vertices[a], surface.vertices[b]);
            let way: [f32; 3] = std::array::from_fn(|c| q[c] - p[c]);
            sums[a].iter_mut().zip(way).for_each(|(sum, way)| *sum += way);
            sums[b].iter_mut().zip(way).for_each(|(sum, way)| *sum -= way);
        }
        for v in (0..n).filter(|v| !fixed[*v] && count[*v] > 0) {
            let weight = share / count[v] as f32;
            surface.vertices[v].iter_mut().zip(sums[v]).for_each(|(place, sum)| *place += weight * sum);
        }
    }
}

/// Sum of squared distances to planes, weighted by area (Garland and Heckbert, "Surface simplification using quadric
/// error metrics", SIGGRAPH 1997).
#[derive(Debug, Clone, Copy, Default)]
struct Quadric {
    /// xx xy xz yy yz zz
    a: [f64; 6],
    b: [f64; 3],
    c: f64,
    weight: f64,
}

impl Quadric {
    /// The plane through `point` with unit `normal`.
    fn plane(normal: [f64; 3], point: [f64; 3], weight: f64) -> Self {
        let [x, y, z] = normal;
        let d = -dot(normal, point);
        Self {
            a: [x * x, x * y, x * z, y * y, y * z, z * z].map(|v| v * weight),
            b: normal.map(|v| v * d * weight),
            c: d * d * weight,
            weight,
        }
    }

    fn plus(mut self, other: &Self) -> Self {
        self.a.iter_mut().zip(other.a).for_each(|(a, b)| *a += b);
        self.b.iter_mut().zip(other.b).for_each(|(a, b)| *a += b);
        self.c += other.c;
        self.weight += other.weight;
        self
    }

    fn at(&self, [x, y, z]: [f64; 3]) -> f64 {
        let [xx, xy, xz, yy, yz, zz] = self.a;
        let square = xx * x * x + yy * y * y + zz * z * z + 2.0 * (xy * x * y + xz * x * z + yz * y * z);
        (square + 2.0 * (self.b[0] * x + self.b[1] * y + self.b[2] * z) + self.c).max(0.0)
    }

    /// Where the sum is least, when that is one point.
    fn least(&self) -> Option<[f64; 3]> {
        let [xx, xy, xz, yy, yz, zz] = self.a;
        let (r0, r1, r2) = ([xx, xy, xz], [xy, yy, yz], [xz, yz, zz]);
        let determinant = dot(r0, cross(r1, r2));
        let scale = (xx + yy + zz) / 3.0;
        if determinant.abs() < 1e-4 * scale * scale * scale {
            return None;
        }
        let (c0, c1, c2) = (cross(r1, r2), cross(r2, r0), cross(r0, r1));
        Some(std::array::from_fn(|n| -(c0[n] * self.b[0] + c1[n] * self.b[1] + c2[n] * self.b[2]) / determinant))
    }
}

/// A side that may be drawn together, cheapest first. Where to is computed again when its turn comes: millions of them
/// wait, and most in vain.
struct Candidate {
    cost: f64,
    ends: [u32; 2],
    versions: [u32; 2],
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        other.cost.total_cmp(&self.cost).then_with(|| other.ends.cmp(&self.ends))
    }
}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Candidate {}

struct Mesh {
    vertices: Vec<[f64; 3]>,
    triangles: Vec<[u32; 3]>,
    alive: Vec<bool>,
    /// Triangles round each vertex; dead ones are taken out when the vertex moves.
    around: Vec<Vec<u32>>,
    quadrics: Vec<Quadric>,
    versions: Vec<u32>,
}

/// Draws sides together, the least harmful first (quadric error), until `triangles` are left or the next step would
/// move the surface by more than `error_mm` (root mean square distance to the planes it stands for).
///
/// A closed surface stays closed: a side whose ends have other neighbours in common than the tips of its own two
/// triangles is left alone, and so is a step that would turn a triangle over.
pub fn decimate(surface: &Surface, triangles: usize, error_mm: f64) -> Surface {
    let mut mesh = Mesh::new(surface);
    let mut heap = BinaryHeap::new();
    let affordable = |candidate: Candidate| (candidate.cost <= error_mm).then_some(candidate);
    for t in &mesh.triangles {
        for (a, b) in [(t[0], t[1]), (t[1], t[2]), (t[2], t[0])] {
            // A side inside the surface is met twice, once in each direction; a border once, in either.
            if a < b || !mesh.around[a as usize].iter().any(|n| has_side(mesh.triangles[*n as usize], b, a)) {
                heap.extend(affordable(mesh.candidate(a, b).0));
            }
        }
    }
    let mut left = mesh.triangles.len();
    while left > triangles {
        let Some(candidate) = heap.pop() else { break };
        let [a, b] = candidate.ends;
        if candidate.versions != [mesh.versions[a as usize], mesh.versions[b as usize]] {
            continue;
        }
        let Some(gone) = mesh.collapse(a, b, mesh.candidate(a, b).1) else { continue };
        left -= gone;
        for n in mesh.neighbours(a) {
            heap.extend(affordable(mesh.candidate(a.min(n), a.max(n)).0));
        }
    }
    mesh.into_surface()
}

fn has_side(t: [u32; 3], a: u32, b: u32) -> bool {
    (0..3).any(|n| t[n] == a && t[(n + 1) % 3] == b)
}

impl Mesh {
    fn new(surface: &Surface) -> Self {
        let vertices: Vec<[f64; 3]> = surface.vertices.iter().map(|v| v.map(f64::from)).collect();
        let triangles = surface.triangles.clone();
        let mut around = vec![Vec::new(); vertices.len()];
        let mut quadrics = vec![Quadric::default(); vertices.len()];
        for (n, t) in triangles.iter().enumerate() {
            let [a, b, c] = t.map(|v| vertices[v as usize]);
            let normal = cross(sub(b, a), sub(c, a));
            let length = norm(normal);
            for v in t {
                around[*v as usize].push(n as u32);
                if length > 0.0 {
                    let plane = Quadric::plane(normal.map(|c| c / length), a, length / 6.0);
                    quadrics[*v as usize] = quadrics[*v as usize].plus(&plane);
                }
            }
        }
        let mut mesh = Self {
            alive: vec![true; triangles.len()],
            versions: vec![0; vertices.len()],
            vertices,
            triangles,
            around,
            quadrics,
        };
        mesh.hold_borders();
        mesh
    }

    /// A plane upright on each border side keeps the border where it is.
    fn hold_borders(&mut self) {
        for n in 0..self.triangles.len() {
            let t = self.triangles[n];
            for m in 0..3 {
                let (a, b) = (t[m], t[(m + 1) % 3]);
                if self.around[a as usize].iter().any(|o| has_side(self.triangles[*o as usize], b, a)) {
                    continue;
                }
                let [p, q, r] = [a, b, t[(m + 2) % 3]].map(|v| self.vertices[v as usize]);
                let along = sub(q, p);
                let upright = cross(along, cross(along, sub(r, p)));
                let length = norm(upright);
                if length > 0.0 {
                    let plane = Quadric::plane(upright.map(|c| c / length), p, dot(along, along) * 10.0);
                    for v in [a, b] {
                        self.quadrics[v as usize] = self.quadrics[v as usize].plus(&plane);
                    }
                }
            }
        }
    }

    /// What drawing two ends together costs, and the place for it.
    fn candidate(&self, a: u32, b: u32) -> (Candidate, [f64; 3]) {
        let quadric = self.quadrics[a as usize].plus(&self.quadrics[b as usize]);
        let [p, q] = [a, b].map(|v| self.vertices[v as usize]);
        let middle: [f64; 3] = std::array::from_fn(|c| (p[c] + q[c]) / 2.0);
        let side = norm(sub(p, q));
        let (cost, target) = quadric
            .least()
            .filter(|best| norm(sub(*best, middle)) <= side)
            .map(|best| (quadric.at(best), best))
            .unwrap_or_else(|| {
                [middle, p, q].into_iter().map(|v| (quadric.at(v), v)).min_by(|x, y| x.0.total_cmp(&y.0)).expect("three")
            });
        let cost = if quadric.weight > 0.0 { (cost / quadric.weight).sqrt() } else { 0.0 };
        (Candidate { cost, ends: [a, b], versions: [self.versions[a as usize], self.versions[b as usize]] }, target)
    }

    /// Sorted, each once.
    fn neighbours(&self, v: u32) -> Vec<u32> {
        let mut all: Vec<u32> =
            self.around[v as usize].iter().flat_map(|n| self.triangles[*n as usize]).filter(|n| *n != v).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Draws `b` into `a` at `target`; the number of triangles that vanish, or None when it would do harm.
    fn collapse(&mut self, a: u32, b: u32, target: [f64; 3]) -> Option<usize> {
        let shared: Vec<u32> =
            self.around[a as usize].iter().copied().filter(|n| self.triangles[*n as usize].contains(&b)).collect();
        let of_b = self.neighbours(b);
        let common = self.neighbours(a).iter().filter(|n| of_b.binary_search(n).is_ok()).count();
        if shared.is_empty() || shared.len() > 2 || common != shared.len() {
            return None;
        }
        // Two triangles back to back are left when a closed piece has become a tetrahedron.
        if self.around[a as usize].len() + of_b.len() <= 6 && shared.len() == 2 {
            return None;
        }
        // A side across from border to border would join two holes.
        if shared.len() == 2 && self.on_border(a) && self.on_border(b) {
            return None;
        }
        for v in [a, b] {
            for n in self.around[v as usize].iter().filter(|n| !shared.contains(n)) {
                let t = self.triangles[*n as usize];
                let corners = |moved: bool| {
                    let [p, q, r] = t.map(|c| if moved && c == v { target } else { self.vertices[c as usize] });
                    cross(sub(q, p), sub(r, p))
                };
                let (before, after) = (corners(false), corners(true));
                if dot(before, after) <= 0.2 * norm(before) * norm(after) {
                    return None;
                }
            }
        }
        for n in &shared {
            self.alive[*n as usize] = false;
            for v in self.triangles[*n as usize] {
                self.around[v as usize].retain(|m| m != n);
            }
        }
        let moved = std::mem::take(&mut self.around[b as usize]);
        for n in &moved {
            self.triangles[*n as usize].iter_mut().filter(|v| **v == b).for_each(|v| *v = a);
        }
        self.around[a as usize].extend(moved);
        self.vertices[a as usize] = target;
        self.quadrics[a as usize] = self.quadrics[a as usize].plus(&self.quadrics[b as usize]);
        self.versions[a as usize] += 1;
        self.versions[b as usize] += 1;
        Some(shared.len())
    }

    fn on_border(&self, v: u32) -> bool {
        self.neighbours(v).into_iter().any(|n| {
            self.around[v as usize].iter().filter(|t| self.triangles[**t as usize].contains(&n)).count() == 1
        })
    }

    fn into_surface(self) -> Surface {
        let mut number = vec![u32::MAX; self.vertices.len()];
        let mut surface = Surface::default();
        for t in self.triangles.iter().zip(&self.alive).filter(|(_, alive)| **alive).map(|(t, _)| t) {
            surface.triangles.push(t.map(|v| {
                if number[v as usize] == u32::MAX {
                    number[v as usize] = surface.vertices.len() as u32;
                    surface.vertices.push(self.vertices[v as usize].map(|c| c as f32));
                }
                number[v as usize]
            }));
        }
        surface
    }
}
