//! Binary morphology: dilation, erosion, opening, closing, with boxes, crosses and balls.
//!
//! A row of 64 voxels is one word. A structuring element is a set of rows of known half widths; dilating by it is a few
//! ORs and shifts of whole words, whatever the radius (the rows of the widest half width are joined first, and widened
//! on the way to the narrower ones).

use ndarray::{Array3, ArrayView3};

use crate::geometry::Spacing;
use crate::pool::{Fault, Pool};

/// Wider elements than this are a mistake of unit.
pub const RADIUS_VOXELS_MAX: f64 = 1000.0;

/// The shape of a structuring element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Voxels whose centre is within the radius (an ellipsoid in voxels when the radii differ).
    Ball,
    /// All voxels within the radius along each axis.
    Box,
    /// Voxels within the radius along one axis.
    Cross,
}

/// What the world beyond the image is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outside {
    /// Neither grows into the image nor eats it: background for a dilation, foreground for an erosion (as SimpleITK and
    /// scikit-image have it).
    Neutral,
    /// Background, for an erosion too (as SciPy has it by default).
    Background,
}

/// A structuring element, symmetric about its centre.
#[derive(Debug, Clone, PartialEq)]
pub struct Element {
    /// `(slices away, rows away)` and how many columns to each side; the widest first.
    rows: Vec<(isize, isize, usize)>,
}

/// A structuring element that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum MorphologyError {
    /// A radius that is negative, NaN or absurd.
    #[error("a radius of {0} voxels cannot be used: it must lie between 0 and {RADIUS_VOXELS_MAX}")]
    Radius(f64),
    /// A task panicked.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl Element {
    /// An element of `radius_voxel` (`[z, y, x]`; 0 keeps an axis alone, fractions count for balls).
    ///
    /// # Errors
    /// [`MorphologyError::Radius`].
    pub fn new(shape: Shape, radius_voxel: [f64; 3]) -> Result<Self, MorphologyError> {
        for r in radius_voxel {
            if !(0.0..=RADIUS_VOXELS_MAX).contains(&r) {
                return Err(MorphologyError::Radius(r));
            }
        }
        // A hair, so that a radius of 3 mm over voxels of 0.3 mm is ten voxels and not nine.
        let [rz, ry, rx] = radius_voxel.map(|r| r + 1e-9);
        let (nz, ny) = (rz as isize, ry as isize);
        let part = |d: isize, r: f64| if d == 0 { 0.0 } else { (d as f64 / r).powi(2) };
        let width = |dz: isize, dy: isize| match shape {
            Shape::Box => Some(rx),
            Shape::Cross => match (dz, dy) {
                (0, 0) => Some(rx),
                (_, 0) | (0, _) => Some(0.0),
                _ => None,
            },
            Shape::Ball => {
                let rest = 1.0 - part(dz, rz) - part(dy, ry);
                (rest >= 0.0).then(|| rx * rest.sqrt() + 1e-9)
            }
        };
        let mut rows: Vec<_> = (-nz..=nz)
            .flat_map(|dz| (-ny..=ny).map(move |dy| (dz, dy)))
            .filter_map(|(dz, dy)| width(dz, dy).map(|w| (dz, dy, w as usize)))
            .collect();
        rows.sort_by_key(|(dz, dy, w)| (std::cmp::Reverse(*w), *dz, *dy));
        Ok(Self { rows })
    }

    /// An element of a radius in millimetres.
    ///
    /// # Errors
    /// [`MorphologyError::Radius`].
    pub fn in_mm(shape: Shape, radius_mm: f64, spacing: Spacing) -> Result<Self, MorphologyError> {
        Self::new(shape, spacing.zyx_mm().map(|s| radius_mm / s))
    }

    /// How many voxels it has.
    pub fn voxels(&self) -> usize {
        self.rows.iter().map(|(_, _, w)| 2 * w + 1).sum()
    }
}

/// Every voxel that the element, centred on a voxel of the mask, covers. Masks are 0 or not 0; results are 0 and 1.
///
/// # Errors
/// A task's panic.
pub fn dilate(mask: ArrayView3<u8>, element: &Element, pool: &Pool) -> Result<Array3<u8>, Fault> {
    Bits::pack(mask, pool)?.dilated(element, false, pool)?.unpack(pool)
}

/// Every voxel on which the element lies wholly within the mask.
///
/// # Errors
/// A task's panic.
pub fn erode(mask: ArrayView3<u8>, element: &Element, outside: Outside, pool: &Pool) -> Result<Array3<u8>, Fault> {
    Bits::pack(mask, pool)?.eroded(element, outside, pool)?.unpack(pool)
}

/// Erosion, then dilation: what is thinner than the element goes.
///
/// # Errors
/// A task's panic.
pub fn open(mask: ArrayView3<u8>, element: &Element, outside: Outside, pool: &Pool) -> Result<Array3<u8>, Fault> {
    Bits::pack(mask, pool)?.eroded(element, outside, pool)?.dilated(element, false, pool)?.unpack(pool)
}

/// Dilation, then erosion: gaps that are narrower than the element go.
///
/// # Errors
/// A task's panic.
pub fn close(mask: ArrayView3<u8>, element: &Element, outside: Outside, pool: &Pool) -> Result<Array3<u8>, Fault> {
    Bits::pack(mask, pool)?.dilated(element, false, pool)?.eroded(element, outside, pool)?.unpack(pool)
}

/// A mask, one bit a voxel; rows start at whole words. Bits beyond the last column are 0.
struct Bits {
    shape: [usize; 3],
    words_per_row: usize,
    words: Vec<u64>,
}

impl Bits {
    fn pack(mask: ArrayView3<u8>, pool: &Pool) -> Result<Self, Fault> {
        let (z, y, x) = mask.dim();
        let mask = mask.as_standard_layout();
        let voxels = mask.as_slice().expect("standard layout");
        let words_per_row = x.div_ceil(64);
        let mut words = vec![0u64; z * y * words_per_row];
        pool.for_each_chunk(&mut words, y * words_per_row, |k, slice| {
            for (j, row) in slice.chunks_exact_mut(words_per_row.max(1)).enumerate() {
                let from = &voxels[(k * y + j) * x..][..x];
                for (word, voxels) in row.iter_mut().zip(from.chunks(64)) {
                    *word =
                        voxels.chunks(8).enumerate().fold(0, |w, (n, eight)| w | u64::from(pack_8(eight)) << (8 * n));
                }
            }
        })?;
        Ok(Self { shape: [z, y, x], words_per_row, words })
    }

    fn unpack(&self, pool: &Pool) -> Result<Array3<u8>, Fault> {
        let [_, y, x] = self.shape;
        let mut mask = Array3::zeros(self.shape);
        pool.for_each_chunk(mask.as_slice_mut().expect("made here"), y * x, |k, slice| {
            for (j, row) in slice.chunks_exact_mut(x.max(1)).enumerate() {
                let words = &self.words[(k * y + j) * self.words_per_row..];
                for (word, voxels) in words.iter().zip(row.chunks_mut(64)) {
                    for (n, eight) in voxels.chunks_mut(8).enumerate() {
                        eight.copy_from_slice(&BITS_OF[(word >> (8 * n)) as usize & 255][..eight.len()]);
                    }
                }
            }
        })?;
        Ok(mask)
    }

    fn eroded(mut self, element: &Element, outside: Outside, pool: &Pool) -> Result<Self, Fault> {
        self.invert();
        let mut grown = self.dilated(element, outside == Outside::Background, pool)?;
        grown.invert();
        Ok(grown)
    }

    /// Bits of the last word of a row that are voxels.
    fn last_word(&self) -> u64 {
        match self.shape[2] % 64 {
            0 => u64::MAX,
            n => (1 << n) - 1,
        }
    }

    fn invert(&mut self) {
        let last = self.last_word();
        for row in self.words.chunks_exact_mut(self.words_per_row.max(1)) {
            row.iter_mut().for_each(|w| *w = !*w);
            if let Some(w) = row.last_mut() {
                *w &= last;
            }
        }
    }

    /// Dilated by the element; the world outside counts as `outside`.
    fn dilated(&self, element: &Element, outside: bool, pool: &Pool) -> Result<Self, Fault> {
        let [slices, height, _] = self.shape;
        let per_row = self.words_per_row;
        let last = self.last_word();
        let mut words = vec![0u64; self.words.len()];
        let row_of = |k: usize, dz: isize, j: usize, dy: isize| {
            let k = k.checked_add_signed(dz).filter(|k| *k < slices)?;
            let j = j.checked_add_signed(dy).filter(|j| *j < height)?;
            Some(&self.words[(k * height + j) * per_row..][..per_row])
        };
        pool.for_each_chunk(&mut words, height * per_row, |k, slice| {
            for (j, row) in slice.chunks_exact_mut(per_row.max(1)).enumerate() {
                let mut width = element.rows.first().map_or(0, |r| r.2);
                for (dz, dy, w) in &element.rows {
                    for _ in *w..width {
                        widen(row, outside, last);
                    }
                    width = *w;
                    match row_of(k, *dz, j, *dy) {
                        Some(from) => row.iter_mut().zip(from).for_each(|(to, from)| *to |= from),
                        None if outside => row.fill(u64::MAX),
                        None => {}
                    }
                }
                for _ in 0..width {
                    widen(row, outside, last);
                }
                if let Some(w) = row.last_mut() {
                    *w &= last;
                }
            }
        })?;
        Ok(Self { shape: self.shape, words_per_row: per_row, words })
    }
}

/// Every set bit also sets the bit before and after it.
fn widen(row: &mut [u64], outside: bool, last: u64) {
    let beyond = u64::from(outside);
    if let Some(w) = row.last_mut() {
        *w = if outside { *w | !last } else { *w & last };
    }
    let mut before = beyond;
    for n in 0..row.len() {
        let word = row[n];
        let after = row.get(n + 1).map_or(beyond, |w| w & 1);
        row[n] = word | word << 1 | before | word >> 1 | after << 63;
        before = word >> 63;
    }
}

/// Up to eight voxels to bits.
fn pack_8(voxels: &[u8]) -> u8 {
    let mut eight = [0; 8];
    eight[..voxels.len()].copy_from_slice(voxels);
    const LOW: u64 = 0x0101_0101_0101_0101;
    let word = u64::from_le_bytes(eight);
    // The high bit of each byte that is not 0; then a multiplication that moves all eight into the highest byte.
    let set = (((word & (LOW * 0x7f)) + LOW * 0x7f) | word) >> 7 & LOW;
    (set.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

const BITS_OF: [[u8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut n = 0;
    while n < 256 * 8 {
        table[n / 8][n % 8] = ((n / 8) >> (n % 8)) as u8 & 1;
        n += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    fn scattered(shape: [usize; 3], modulus: usize) -> Array3<u8> {
        Array3::from_shape_fn(shape, |(k, j, i)| {
            3 * u8::from((k * k * 31 + j * j * 17 + i * i * 7 + i * j + k * i) % 11 < modulus)
        })
    }

    /// The definition, voxel by voxel.
    fn expected(mask: &Array3<u8>, shape: Shape, radius: [f64; 3], grow: bool, outside: bool) -> Array3<u8> {
        let r = radius.map(|r| r as isize);
        let inside = |d: [isize; 3]| {
            let share: f64 = (0..3).map(|a| if d[a] == 0 { 0.0 } else { (d[a] as f64 / radius[a]).powi(2) }).sum();
            match shape {
                Shape::Box => true,
                Shape::Cross => d.iter().filter(|v| **v != 0).count() <= 1,
                Shape::Ball => share <= 1.0 + 1e-12,
            }
        };
        Array3::from_shape_fn(mask.dim(), |(k, j, i)| {
            let mut hit = false;
            for dz in -r[0]..=r[0] {
                for dy in -r[1]..=r[1] {
                    for dx in -r[2]..=r[2] {
                        let at = (k.wrapping_add_signed(dz), j.wrapping_add_signed(dy), i.wrapping_add_signed(dx));
                        let set = mask.get(at).map_or(outside, |v| *v != 0);
                        hit |= inside([dz, dy, dx]) && set == grow;
                    }
                }
            }
            u8::from(hit == grow)
        })
    }

    #[test]
    fn dilation_and_erosion_are_their_definitions_for_every_shape_and_border() {
        let pool = Pool::new(2);
        for size in [[6, 9, 70], [1, 12, 64], [5, 3, 130]] {
            for modulus in [1, 9] {
                let mask = scattered(size, modulus);
                for shape in [Shape::Ball, Shape::Box, Shape::Cross] {
                    for radius in [[1.0, 1.0, 1.0], [0.0, 2.0, 3.0], [2.5, 2.5, 2.5], [1.0, 3.0, 6.0]] {
                        let element = Element::new(shape, radius).unwrap();
                        let context = format!("{shape:?} {radius:?} {size:?}");
                        let grown = dilate(mask.view(), &element, &pool).unwrap();
                        assert_eq!(grown, expected(&mask, shape, radius, true, false), "{context}");
                        for (outside, world) in [(Outside::Neutral, true), (Outside::Background, false)] {
                            let shrunk = erode(mask.view(), &element, outside, &pool).unwrap();
                            assert_eq!(shrunk, expected(&mask, shape, radius, false, world), "{context} {outside:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn elements_have_the_voxels_of_scikit_images() {
        // skimage.morphology.ball(r).sum(), cube and octahedron-free cross.
        for (radius, voxels) in [(1.0, 7), (2.0, 33), (3.0, 123), (5.0, 515), (10.0, 4169)] {
            assert_eq!(Element::new(Shape::Ball, [radius; 3]).unwrap().voxels(), voxels);
        }
        assert_eq!(Element::new(Shape::Box, [0.0, 2.0, 2.0]).unwrap().voxels(), 25);
        assert_eq!(Element::new(Shape::Cross, [2.0; 3]).unwrap().voxels(), 13);
        // 3 mm are ten voxels of 0.3 mm, in the plane of a stack with thick slices.
        let thick = Spacing::new([5.0, 0.3, 0.3]).unwrap();
        assert_eq!(Element::in_mm(Shape::Ball, 3.0, thick).unwrap().voxels(), 317);
        assert!(matches!(Element::new(Shape::Ball, [f64::NAN; 3]), Err(MorphologyError::Radius(_))));
        assert!(matches!(Element::new(Shape::Ball, [-1.0; 3]), Err(MorphologyError::Radius(_))));
    }

    #[test]
    fn closing_keeps_the_mask_and_opening_adds_nothing() {
        let pool = Pool::new(2);
        let mask = scattered([6, 20, 70], 6);
        let element = Element::new(Shape::Ball, [2.0; 3]).unwrap();
        let closed = close(mask.view(), &element, Outside::Neutral, &pool).unwrap();
        let opened = open(mask.view(), &element, Outside::Neutral, &pool).unwrap();
        for ((m, c), o) in mask.iter().zip(&closed).zip(&opened) {
            let m = u8::from(*m != 0);
            assert!(*o <= m && m <= *c);
        }
        assert_ne!(closed, opened);
    }
}
