//! One patch of a surface: a few layers of cells, with the vertices they share.
//!
//! A row of voxels is a row of bits, inside or not, so that cells without surface cost a fraction of an instruction
//! each. Vertices are numbered plane by plane: those in slice k, those between k and k + 1, those in slice k + 1. The
//! last plane of a patch is the first of the next, numbered alike, so patches join by adding an offset.

use std::ops::Range;

use crate::geometry::{Grid, dot, norm};

use super::cases::{CASES, Filling, INSIDE_POINT, edge_ends};
use super::{Level, area_vector};

/// A cut nearer to a voxel than this fraction of the way is moved away from it. Voxels exactly at the level would
/// otherwise put several vertices in one place, and a file without indices (STL) would no longer be watertight.
const MARGIN: f32 = 1.0 / 1024.0;

/// Stands for NaN, for infinities and for what is beyond the border: finite, so that cuts stay numbers.
const FAR: f32 = f32::MAX / 4.0;

/// A piece of surface, a few slices thick.
#[derive(Debug, Clone, Default)]
pub struct Patch {
    /// Number, in the whole surface, of `vertices[0]`. The vertices of the last plane come again in the next patch.
    pub first_vertex: u64,
    /// LPS millimetres.
    pub vertices: Vec<[f32; 3]>,
    /// Indices into `vertices`.
    pub triangles: Vec<[u32; 3]>,
    /// Where the vertices of the last slice begin.
    pub(super) last_plane: usize,
    pub(super) area_mm2: f64,
    pub(super) volume_mm3: f64,
    pub(super) nan_voxels: u64,
}

/// What all patches of a surface have in common.
pub(super) struct Marcher<'a, R> {
    level: Level,
    read: &'a R,
    /// Voxels of the volume, `[k, j, i]`.
    inner: [usize; 3],
    /// The same with caps.
    shape: [usize; 3],
    words: usize,
    steps: [[f64; 3]; 3],
    origin: [f64; 3],
    mirrored: bool,
    voxel_mm3: f64,
    slice_area: [f64; 3],
}

/// One slice of voxels, less the level, and as bits.
struct Slice {
    values: Vec<f32>,
    bits: Vec<u64>,
}

/// Which vertex cuts each edge of the lattice: x and y edges of the lower and upper slice, z edges between them.
struct EdgeMaps {
    numbers: Vec<u32>,
    plane: usize,
    /// Whether the lower slice has the second pair of maps.
    swapped: bool,
}

impl EdgeMaps {
    fn start(&self, axis: usize, upper: bool) -> usize {
        if axis == 2 { 4 * self.plane } else { (2 * usize::from(upper != self.swapped) + axis) * self.plane }
    }
}

impl<'a, R: Fn(usize, &mut [f32]) + Sync> Marcher<'a, R> {
    pub(super) fn new(grid: Grid, level: Level, read: &'a R) -> Self {
        let pad = usize::from(level.cap);
        let shape = grid.shape.map(|n| n + 2 * pad);
        let affine = grid.affine.shifted([-(pad as f64); 3]);
        let steps = [0, 1, 2].map(|axis| affine.step(axis));
        Self {
            level,
            read,
            inner: grid.shape,
            shape,
            words: shape[2].div_ceil(64),
            steps,
            origin: affine.origin(),
            mirrored: affine.determinant() < 0.0,
            voxel_mm3: affine.determinant().abs(),
            slice_area: crate::geometry::cross(steps[0], steps[1]).map(|v| v / affine.determinant()),
        }
    }

    pub(super) fn layers(&self) -> usize {
        self.shape[0] - 1
    }

    /// The surface between slices `layers.start` and `layers.end` (included).
    pub(super) fn patch(&self, layers: Range<usize>) -> Patch {
        let [_, rows, columns] = self.shape;
        let plane = rows * columns;
        let slice = || Slice { values: vec![0.0; plane], bits: vec![0; rows * self.words] };
        let (mut lower, mut upper) = (slice(), slice());
        let mut maps = EdgeMaps { numbers: vec![0; 5 * plane], plane, swapped: false };
        let mut patch = Patch::default();
        let mut cells = Vec::new();
        let nan = self.load(layers.start, &mut lower);
        if layers.start == 0 {
            patch.nan_voxels += nan;
        }
        self.plane_vertices(layers.start, &lower, &mut maps, false, &mut patch);
        for k in layers.clone() {
            patch.nan_voxels += self.load(k + 1, &mut upper);
            self.cells(&lower, &upper, &mut cells);
            self.upright_vertices(k, &lower, &upper, &mut maps, &mut patch);
            let points = self.inside_points(k, &lower, &upper, &cells, &mut patch);
            patch.last_plane = patch.vertices.len();
            self.plane_vertices(k + 1, &upper, &mut maps, true, &mut patch);
            self.triangles(&cells, &maps, points, &mut patch);
            std::mem::swap(&mut lower, &mut upper);
            maps.swapped = !maps.swapped;
        }
        self.measure(&mut patch);
        if layers.end == self.layers() {
            // The flux through the last slice (see `measure`); with a cap that slice is outside altogether.
            patch.volume_mm3 += self.inside_area(&lower) * layers.end as f64 * self.voxel_mm3;
        }
        patch
    }

    /// Reads slice `k` and counts its NaN voxels.
    fn load(&self, k: usize, slice: &mut Slice) -> u64 {
        let [_, _, columns] = self.shape;
        let mut nan = 0;
        if self.level.cap {
            let [slices, rows, inner_columns] = self.inner;
            slice.values.fill(-FAR);
            if (1..=slices).contains(&k) {
                let mut values = vec![0.0; rows * inner_columns];
                (self.read)(k - 1, &mut values);
                for (to, from) in slice.values.chunks_exact_mut(columns).skip(1).zip(values.chunks_exact(inner_columns)) {
                    to[1..=inner_columns].copy_from_slice(from);
                }
            }
        } else {
            (self.read)(k, &mut slice.values);
        }
        for (values, bits) in slice.values.chunks_exact_mut(columns).zip(slice.bits.chunks_exact_mut(self.words)) {
            for (values, bits) in values.chunks_mut(64).zip(bits) {
                let tame = values.iter_mut().fold(true, |tame, value| {
                    *value -= self.level.value;
                    tame & (value.abs() <= FAR)
                });
                if !tame {
                    nan += values.iter().filter(|v| v.is_nan()).count() as u64;
                    values.iter_mut().for_each(|v| *v = if v.is_nan() { -FAR } else { v.clamp(-FAR, FAR) });
                }
                *bits = inside_bits(values);
            }
        }
        nan
    }

    /// Bits of the columns that have a right neighbour.
    fn with_neighbour(&self, word: usize) -> u64 {
        let cells = self.shape[2] - 1 - (word * 64).min(self.shape[2] - 1);
        if cells >= 64 { u64::MAX } else { (1u64 << cells) - 1 }
    }

    fn row<'s>(&self, slice: &'s Slice, j: usize) -> &'s [u64] {
        &slice.bits[j * self.words..(j + 1) * self.words]
    }

    /// LPS of voxel `(0, j, k)`.
    fn row_start(&self, j: usize, k: usize) -> [f64; 3] {
        std::array::from_fn(|c| self.origin[c] + self.steps[1][c] * j as f64 + self.steps[2][c] * k as f64)
    }

    /// Vertices on the x and y edges of slice `k`.
    fn plane_vertices(&self, k: usize, slice: &Slice, maps: &mut EdgeMaps, upper: bool, patch: &mut Patch) {
        let [_, rows, columns] = self.shape;
        let [x_map, y_map] = [0, 1].map(|axis| maps.start(axis, upper));
        for j in 0..rows {
            let start = self.row_start(j, k);
            let bits = self.row(slice, j);
            for word in 0..self.words {
                let crossed = (bits[word] ^ shifted(bits, word)) & self.with_neighbour(word);
                for_each_bit(crossed, |bit| {
                    let i = word * 64 + bit;
                    let at = j * columns + i;
                    let t = cut(slice.values[at], slice.values[at + 1]);
                    maps.numbers[x_map + at] = patch.vertices.len() as u32;
                    patch.vertices.push(place(start, self.steps[0], i as f64 + f64::from(t)));
                });
            }
            if j + 1 < rows {
                let below = self.row(slice, j + 1);
                for word in 0..self.words {
                    for_each_bit(bits[word] ^ below[word], |bit| {
                        let i = word * 64 + bit;
                        let at = j * columns + i;
                        let t = f64::from(cut(slice.values[at], slice.values[at + columns]));
                        let foot = std::array::from_fn(|c| start[c] + self.steps[1][c] * t);
                        maps.numbers[y_map + at] = patch.vertices.len() as u32;
                        patch.vertices.push(place(foot, self.steps[0], i as f64));
                    });
                }
            }
        }
    }

    /// Vertices on the z edges between slices `k` and `k + 1`.
    fn upright_vertices(&self, k: usize, lower: &Slice, upper: &Slice, maps: &mut EdgeMaps, patch: &mut Patch) {
        let [_, rows, columns] = self.shape;
        let map = maps.start(2, false);
        for j in 0..rows {
            let start = self.row_start(j, k);
            let (a, b) = (self.row(lower, j), self.row(upper, j));
            for word in 0..self.words {
                for_each_bit(a[word] ^ b[word], |bit| {
                    let i = word * 64 + bit;
                    let at = j * columns + i;
                    let t = f64::from(cut(lower.values[at], upper.values[at]));
                    let foot = std::array::from_fn(|c| start[c] + self.steps[2][c] * t);
                    maps.numbers[map + at] = patch.vertices.len() as u32;
                    patch.vertices.push(place(foot, self.steps[0], i as f64));
                });
            }
        }
    }

    /// The cells with surface, as their lowest corner and what to draw.
    fn cells(&self, lower: &Slice, upper: &Slice, cells: &mut Vec<(u32, &'static Filling)>) {
        cells.clear();
        let cases = &*CASES;
        let [_, rows, columns] = self.shape;
        for j in 0..rows - 1 {
            let four = [self.row(lower, j), self.row(lower, j + 1), self.row(upper, j), self.row(upper, j + 1)];
            for word in 0..self.words {
                let own = four.map(|bits| bits[word]);
                let next = four.map(|bits| shifted(bits, word));
                let any = own.iter().chain(&next).fold(0, |all, bits| all | bits);
                let every = own.iter().chain(&next).fold(u64::MAX, |all, bits| all & bits);
                for_each_bit(any & !every & self.with_neighbour(word), |bit| {
                    let pattern = (0..4).fold(0, |pattern, n| {
                        pattern | (own[n] >> bit & 1) << (2 * n) | (next[n] >> bit & 1) << (2 * n + 1)
                    });
                    let at = j * columns + word * 64 + bit;
                    let case = &cases[pattern as usize];
                    let mut answer = 0;
                    if !case.ambiguous.is_empty() {
                        let value = |corner: u8| {
                            let slice = if corner & 4 == 0 { lower } else { upper };
                            f64::from(slice.values[at + usize::from(corner & 1) + columns * usize::from(corner >> 1 & 1)])
                        };
                        for (n, [a, c, b, d]) in case.ambiguous.iter().enumerate() {
                            // The bilinear function at its saddle has the sign of ac - bd: the denominator is positive.
                            answer |= usize::from(value(*a) * value(*c) >= value(*b) * value(*d)) << n;
                        }
                    }
                    cells.push((at as u32, &case.fillings[answer]));
                });
            }
        }
    }

    /// Makes the vertices inside cells, in the order of the cells, and tells where they begin.
    fn inside_points(
        &self,
        k: usize,
        lower: &Slice,
        upper: &Slice,
        cells: &[(u32, &'static Filling)],
        patch: &mut Patch,
    ) -> u32 {
        let [_, _, columns] = self.shape;
        let first = patch.vertices.len() as u32;
        for (at, filling) in cells.iter().filter(|(_, filling)| !filling.inside_loop.is_empty()) {
            let at = *at as usize;
            let mut mean = [0.0; 3];
            for edge in &filling.inside_loop {
                let ends = edge_ends(usize::from(*edge));
                let [a, b] = ends.map(|corner| {
                    let slice = if corner & 4 == 0 { lower } else { upper };
                    slice.values[at + (corner & 1) + columns * (corner >> 1 & 1)]
                });
                for (axis, m) in mean.iter_mut().enumerate() {
                    let along = if usize::from(edge / 4) == axis { f64::from(cut(a, b)) } else { 0.0 };
                    *m += ((ends[0] >> axis & 1) as f64 + along) / filling.inside_loop.len() as f64;
                }
            }
            let start = self.row_start(at / columns, k);
            let foot = std::array::from_fn(|c| start[c] + self.steps[1][c] * mean[1] + self.steps[2][c] * mean[2]);
            patch.vertices.push(place(foot, self.steps[0], (at % columns) as f64 + mean[0]));
        }
        first
    }

    fn triangles(&self, cells: &[(u32, &'static Filling)], maps: &EdgeMaps, points: u32, patch: &mut Patch) {
        let columns = self.shape[2];
        let offsets: [usize; 12] = std::array::from_fn(|edge| {
            let low = edge_ends(edge)[0];
            maps.start(edge / 4, low & 4 != 0) + (low & 1) + columns * (low >> 1 & 1)
        });
        let mut point = points;
        for (at, filling) in cells {
            let number = |edge: u8| {
                if edge == INSIDE_POINT { point } else { maps.numbers[offsets[usize::from(edge)] + *at as usize] }
            };
            for [a, b, c] in &filling.triangles {
                let (b, c) = if self.mirrored { (c, b) } else { (b, c) };
                patch.triangles.push([number(*a), number(*b), number(*c)]);
            }
            point += u32::from(!filling.inside_loop.is_empty());
        }
    }

    /// Area, and the flux of `w s` through the surface, where `s` is the step from slice to slice and `w` the slice
    /// number as a function of place. Its divergence is 1, it runs along the sides of the volume and vanishes in slice
    /// 0, so it measures the volume inside once the flux through the last slice is added.
    fn measure(&self, patch: &mut Patch) {
        let step = self.steps[2];
        for triangle in &patch.triangles {
            let corners = triangle.map(|v| patch.vertices[v as usize]);
            let normal = area_vector(corners);
            let centre: [f64; 3] =
                std::array::from_fn(|c| corners.iter().map(|v| f64::from(v[c])).sum::<f64>() / 3.0 - self.origin[c]);
            patch.area_mm2 += norm(normal);
            patch.volume_mm3 += dot(centre, self.slice_area) * dot(step, normal);
        }
    }

    /// Area inside the contours of a slice, in voxels, cut as the faces of the cells are.
    fn inside_area(&self, slice: &Slice) -> f64 {
        let [_, rows, columns] = self.shape;
        let mut area = 0.0;
        for j in 0..rows - 1 {
            for i in 0..columns - 1 {
                let at = j * columns + i;
                let corners = [at, at + 1, at + columns + 1, at + columns].map(|n| slice.values[n]);
                area += inside_area_of_face(corners);
            }
        }
        area
    }
}

/// Area inside of a unit square with these values at its corners, in turn.
fn inside_area_of_face(v: [f32; 4]) -> f64 {
    let inside = v.map(|v| v >= 0.0);
    let corner = |n: usize| {
        // The triangle cut off at corner n.
        let t = |a: usize, b: usize| f64::from(cut(v[a], v[b]));
        t(n, (n + 1) % 4) * t(n, (n + 3) % 4) / 2.0
    };
    let of = |wanted: bool| (0..4).filter(move |n| inside[*n] == wanted);
    match of(true).count() {
        0 => 0.0,
        4 => 1.0,
        1 => of(true).map(corner).sum(),
        3 => 1.0 - of(false).map(corner).sum::<f64>(),
        _ if inside[0] == inside[2] => {
            let p = |a: usize, b: usize| f64::from(v[a]) * f64::from(v[b]);
            let (own, other) = if inside[0] { (p(0, 2), p(1, 3)) } else { (p(1, 3), p(0, 2)) };
            if own >= other { 1.0 - of(false).map(corner).sum::<f64>() } else { of(true).map(corner).sum() }
        }
        _ => {
            let n = (0..4).find(|n| inside[*n] && inside[(n + 1) % 4]).expect("two neighbours are inside");
            let t = |a: usize, b: usize| f64::from(cut(v[a % 4], v[b % 4]));
            (t(n, n + 3) + t(n + 1, n + 2)) / 2.0
        }
    }
}

/// Where the surface cuts the way from a to b, as a fraction of it.
fn cut(a: f32, b: f32) -> f32 {
    (a / (a - b)).clamp(MARGIN, 1.0 - MARGIN)
}

fn place(start: [f64; 3], step: [f64; 3], count: f64) -> [f32; 3] {
    std::array::from_fn(|c| (start[c] + step[c] * count) as f32)
}

/// One bit for each of up to 64 values, set when it is inside.
fn inside_bits(values: &[f32]) -> u64 {
    // Eight truths as bytes are gathered by one multiplication: byte n lands on bit 56 + n.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let mut inside = [0u8; 64];
    inside.iter_mut().zip(values).for_each(|(byte, value)| *byte = u8::from(*value >= 0.0));
    let eights = inside.chunks_exact(8).map(|eight| u64::from_le_bytes(eight.try_into().expect("eight bytes")));
    eights.enumerate().fold(0, |word, (n, eight)| word | (eight.wrapping_mul(GATHER) >> 56) << (8 * n))
}

/// Bit n holds the bit of column n + 1.
fn shifted(bits: &[u64], word: usize) -> u64 {
    bits[word] >> 1 | bits.get(word + 1).map_or(0, |next| next << 63)
}

fn for_each_bit(mut bits: u64, mut visit: impl FnMut(usize)) {
    while bits != 0 {
        visit(bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}
