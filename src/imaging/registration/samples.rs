//! Where the images are compared.

use ndarray::ArrayView3;

use super::RegistrationError;
use super::pyramid::{Plain, shrink_factors};

/// Which voxels of the fixed image are compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// All.
    All,
    /// Every n-th in storage order, so that about this fraction is taken.
    Regular {
        /// Above 0, at most 1.
        fraction: f64,
    },
    /// Places drawn with equal chance over the image, between voxels too, as many as this fraction of the voxels.
    Random {
        /// Above 0, at most 1.
        fraction: f64,
        /// The same seed draws the same places.
        seed: u64,
    },
}

/// Places of the fixed image and its values there.
#[derive(Debug, Clone, Default)]
pub(super) struct Samples {
    /// Columns, rows, slices from the middle of the fixed lattice.
    pub(super) places: [Vec<f32>; 3],
    pub(super) values: Vec<f32>,
    /// `(i, j, k)` of the middle.
    pub(super) middle: [f64; 3],
}

impl Samples {
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    /// Samples of a level: `fixed` already smoothed, thinned by `factor`.
    pub(super) fn draw(
        fixed: &Plain,
        mask: Option<ArrayView3<'_, u8>>,
        sampling: Sampling,
        factor: usize,
    ) -> Result<Self, RegistrationError> {
        let [nz, ny, nx] = fixed.shape;
        let [fz, fy, fx] = shrink_factors(fixed.affine.spacing(), factor);
        let counts = [nz.div_ceil(fz), ny.div_ceil(fy), nx.div_ceil(fx)];
        let total: usize = counts.iter().product();
        let middle = [nx, ny, nz].map(|n| (n - 1) as f64 / 2.0);
        let mut out = Self { middle, ..Self::default() };
        let factors = [fx, fy, fz];
        let last = [nx, ny, nz].map(|n| (n - 1) as f64);
        let inside_mask = |ijk: [f64; 3]| {
            mask.is_none_or(|mask| {
                let [i, j, k] = ijk.map(|v| v.round() as usize);
                mask[[k, j, i]] != 0
            })
        };
        let push = |out: &mut Self, ijk: [f64; 3]| {
            let ijk = std::array::from_fn(|c| ijk[c].clamp(0.0, last[c]));
            if inside_mask(ijk) {
                (0..3).for_each(|c| out.places[c].push((ijk[c] - middle[c]) as f32));
                out.values.push(fixed.at(ijk));
            }
        };
        // The centre of the voxels that a coarse voxel stands for.
        let coarse = |n: usize, c: usize| (n as f64 + 0.5) * factors[c] as f64 - 0.5;
        match sampling {
            Sampling::All | Sampling::Regular { .. } => {
                let step = if let Sampling::Regular { fraction } = sampling { (1.0 / fraction).ceil() as usize } else { 1 };
                for n in (0..total).step_by(step) {
                    let (k, j, i) = (n / (counts[1] * counts[2]), n / counts[2] % counts[1], n % counts[2]);
                    push(&mut out, [coarse(i, 0), coarse(j, 1), coarse(k, 2)]);
                }
            }
            Sampling::Random { fraction, seed } => {
                let mut random = Random(seed);
                for _ in 0..((total as f64 * fraction).ceil() as usize).max(1) {
                    let ijk = std::array::from_fn(|c| random.next() * (last[c] + 1.0) - 0.5);
                    push(&mut out, ijk);
                }
            }
        }
        if out.values.is_empty() {
            return Err(RegistrationError::EmptyMask { which: "fixed" });
        }
        Ok(out)
    }
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): small, and the same on any machine.
struct Random(u64);

impl Random {
    /// Uniform in [0, 1).
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
