//! Bright blobs over scales: difference of Gaussians and Laplacian of Gaussian, their peaks in space and scale, and
//! the pruning of those that overlap.
//!
//! On isotropic voxels the blobs are those of scikit-image's `blob_dog` and `blob_log` (Lowe 2004, Lindeberg 1998);
//! where the spacing differs between axes the Gaussians are round in millimetres, not in voxels. Three neighbouring
//! scales are in memory at a time, so the number of scales costs time but no memory.

mod prune;

use std::sync::Mutex;

use ndarray::{Array3, ArrayView3, Zip};

use super::lines::{Edge, LineFilter};
use super::smooth::{SmoothError, gaussian_in_place, gaussian_kernel, gaussian_second_derivative};
use crate::geometry::Spacing;
use crate::pool::{Fault, Pool};

/// Peaks beyond this many mean that the threshold does not fit the image's values; pruning them would take for ever.
pub const PEAKS_MAX: usize = 500_000;

/// More scales than this are a mistake of range.
pub const SCALES_MAX: usize = 100;

/// How scale space is made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// Differences of Gaussians whose sigmas grow by `ratio` (above 1); faster.
    Difference {
        /// From one sigma to the next; 1.6 approximates the Laplacian best (Marr & Hildreth 1980).
        ratio: f64,
    },
    /// The Laplacian of Gaussians at `scales` sigmas; more exact about the radius.
    Laplacian {
        /// How many sigmas from the smallest to the largest.
        scales: usize,
        /// Whether they are spaced evenly in their logarithm.
        logarithmic: bool,
    },
}

/// What one unit of sigma is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// The finest of the three spacings: on isotropic voxels, a voxel. Blobs are round in millimetres.
    Voxel,
    /// A millimetre. Blobs are round in millimetres.
    Millimetre,
    /// One index along every axis, whatever the spacing: blobs are round in the array, as scikit-image's always are.
    Index,
}

/// What to look for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Search {
    /// How scale space is made.
    pub method: Method,
    /// The smallest sigma.
    pub sigma_min: f64,
    /// The largest sigma.
    pub sigma_max: f64,
    /// What sigma is measured in.
    pub unit: Unit,
    /// Peaks of scale space must be above this, in the image's own values.
    pub threshold: f64,
    /// Of two blobs that share more than this fraction of the smaller one's volume, the larger stays.
    pub overlap: f64,
    /// Peaks nearer to the border than this many voxels are dropped; 0 keeps all, as scikit-image does by default.
    pub border_voxels: usize,
}

impl Default for Search {
    /// scikit-image's defaults for a difference of Gaussians.
    fn default() -> Self {
        Self {
            method: Method::Difference { ratio: 1.6 },
            sigma_min: 1.0,
            sigma_max: 50.0,
            unit: Unit::Voxel,
            threshold: 0.5,
            overlap: 0.5,
            border_voxels: 0,
        }
    }
}

/// One blob: a bright spot of a certain size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Blob {
    /// The voxel `[k, j, i]` that is the peak.
    pub peak_voxel: [usize; 3],
    /// The peak of parabolas through that voxel and its neighbours, `[k, j, i]`; at most half a voxel away.
    pub centre_voxel: [f64; 3],
    /// The Gaussian's sigma, in the search's unit.
    pub sigma: f64,
    /// That sigma along `[z, y, x]` in millimetres.
    pub sigma_mm: [f64; 3],
    /// sigma times the root of the number of dimensions (3, or 2 for one slice), of a sphere as large as the blob.
    pub radius_mm: f64,
    /// Scale space at the peak, in the image's values.
    pub response: f32,
}

/// A search that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// A search whose numbers contradict each other.
    #[error("{what} is {value}: it must be {must}")]
    Search {
        /// Which number.
        what: &'static str,
        /// What it is.
        value: f64,
        /// What it may be.
        must: &'static str,
    },
    /// NaN or infinite voxels would spoil everything within four sigma of them.
    #[error("{0} voxels are NaN or infinite: replace them first")]
    NotFinite(usize),
    /// The threshold does not fit the image.
    #[error("more than {PEAKS_MAX} peaks are above the threshold: raise it, it is in the image's own values")]
    TooManyPeaks,
    /// The smoothing refused.
    #[error(transparent)]
    Smooth(#[from] SmoothError),
    /// A task panicked.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl Search {
    /// The sigmas at which blobs are found, in the search's unit, ascending.
    ///
    /// # Errors
    /// [`BlobError::Search`].
    pub fn sigmas(&self) -> Result<Vec<f64>, BlobError> {
        let Self { sigma_min, sigma_max, .. } = *self;
        let check = |good: bool, what, value, must| good.then_some(()).ok_or(BlobError::Search { what, value, must });
        check(sigma_min > 0.0 && sigma_min.is_finite(), "the smallest sigma", sigma_min, "above 0")?;
        check(
            sigma_max >= sigma_min && sigma_max.is_finite(),
            "the largest sigma",
            sigma_max,
            "finite and at least the smallest",
        )?;
        check((0.0..=1.0).contains(&self.overlap), "the overlap", self.overlap, "between 0 and 1")?;
        check(self.threshold.is_finite(), "the threshold", self.threshold, "a finite number")?;
        match self.method {
            Method::Difference { ratio } => {
                check(ratio > 1.0 && ratio.is_finite(), "the ratio of sigmas", ratio, "above 1")?;
                let scales = ((sigma_max / sigma_min).ln() / ratio.ln() + 1.0) as usize;
                check(scales <= SCALES_MAX, "the number of scales", scales as f64, "at most 100: raise the ratio")?;
                Ok((0..scales).map(|i| sigma_min * ratio.powi(i as i32)).collect())
            }
            Method::Laplacian { scales, logarithmic } => {
                check((1..=SCALES_MAX).contains(&scales), "the number of scales", scales as f64, "1 to 100")?;
                let step = |i: usize| {
                    if scales > 1 { i as f64 / (scales - 1) as f64 } else { 0.0 }
                };
                Ok((0..scales)
                    .map(|i| match logarithmic {
                        true => sigma_min * (sigma_max / sigma_min).powf(step(i)),
                        false => sigma_min + (sigma_max - sigma_min) * step(i),
                    })
                    .collect())
            }
        }
    }

    /// How many voxels of each axis `[z, y, x]` one unit of sigma is.
    fn voxels_per_unit(&self, spacing: Spacing) -> [f64; 3] {
        let zyx = spacing.zyx_mm();
        let finest = zyx.into_iter().fold(f64::INFINITY, f64::min);
        // Spacings written with few digits differ by less than this though they mean the same.
        let isotropic = zyx.iter().all(|s| (s / finest - 1.0).abs() < 1e-3);
        match self.unit {
            Unit::Index => [1.0; 3],
            Unit::Voxel if isotropic => [1.0; 3],
            Unit::Voxel => zyx.map(|s| finest / s),
            Unit::Millimetre => zyx.map(|s| 1.0 / s),
        }
    }
}

/// Finds the bright blobs of `image`, the strongest first.
///
/// # Errors
/// [`BlobError`] for numbers that make no sense, for NaN, and for a threshold far below the image's noise.
pub fn find(image: ArrayView3<f32>, spacing: Spacing, search: &Search, pool: &Pool) -> Result<Vec<Blob>, BlobError> {
    let sigmas = search.sigmas()?;
    let bad = image.iter().filter(|v| !v.is_finite()).count();
    if bad > 0 {
        return Err(BlobError::NotFinite(bad));
    }
    if image.is_empty() {
        return Ok(Vec::new());
    }
    let per_unit = search.voxels_per_unit(spacing);
    let mut peaks = Peaks::new(search, image.dim());
    match search.method {
        Method::Difference { ratio } => {
            let scale = (1.0 / (ratio - 1.0)) as f32;
            let blurred = |sigma: f64, mut buffer: Array3<f32>| -> Result<Array3<f32>, BlobError> {
                buffer.assign(&image);
                gaussian_in_place(&mut buffer, per_unit.map(|u| u * sigma), Edge::Reflect, pool)?;
                Ok(buffer)
            };
            let mut narrow = blurred(sigmas[0], Array3::zeros(image.dim()))?;
            for sigma in &sigmas {
                let wide = blurred(sigma * ratio, peaks.spare(image.dim()))?;
                subtract(&mut narrow, &wide, scale, pool)?;
                peaks.push(std::mem::replace(&mut narrow, wide), pool)?;
            }
        }
        Method::Laplacian { .. } => {
            for sigma in &sigmas {
                let layer = laplacian(image, *sigma, per_unit, peaks.spare(image.dim()), pool)?;
                peaks.push(layer, pool)?;
            }
        }
    }
    let found = peaks.finish(pool)?;

    let dimensions = image.shape().iter().filter(|n| **n > 1).count().clamp(2, 3);
    let balls: Vec<prune::Ball> = found
        .iter()
        .map(|p| prune::Ball { centre: std::array::from_fn(|a| p.voxel[a] as f64 / per_unit[a]), scale: p.scale })
        .collect();
    let kept = prune::kept(&balls, &sigmas, search.overlap, dimensions);
    let zyx_mm = spacing.zyx_mm();
    let blob = |p: &Peak| {
        let sigma = sigmas[p.scale];
        let sigma_mm = std::array::from_fn(|a| sigma * per_unit[a] * zyx_mm[a]);
        let in_plane = &sigma_mm[3 - dimensions..];
        let mean = in_plane.iter().product::<f64>().powf(1.0 / dimensions as f64);
        Blob {
            peak_voxel: p.voxel,
            centre_voxel: std::array::from_fn(|a| p.voxel[a] as f64 + p.offset[a]),
            sigma,
            sigma_mm,
            radius_mm: mean * (dimensions as f64).sqrt(),
            response: p.response,
        }
    };
    Ok(found.iter().zip(kept).filter(|(_, kept)| *kept).map(|(p, _)| blob(p)).collect())
}

/// `narrow = (narrow - wide) * scale`
fn subtract(narrow: &mut Array3<f32>, wide: &Array3<f32>, scale: f32, pool: &Pool) -> Result<(), Fault> {
    let wide = wide.as_slice().expect("made here");
    let chunk = 1 << 16;
    pool.for_each_chunk(narrow.as_slice_mut().expect("made here"), chunk, |n, narrow| {
        for (a, b) in narrow.iter_mut().zip(&wide[n * chunk..]) {
            *a = (*a - *b) * scale;
        }
    })
}

/// Minus the Laplacian of the Gaussian, times sigma squared: the same value for the same blob at every size.
///
/// Second derivatives are taken per unit of sigma, so that on anisotropic voxels each axis weighs the same.
fn laplacian(
    image: ArrayView3<f32>,
    sigma: f64,
    per_unit: [f64; 3],
    mut sum: Array3<f32>,
    pool: &Pool,
) -> Result<Array3<f32>, BlobError> {
    let filters = |axis: usize| -> Result<[LineFilter; 2], BlobError> {
        let (n, sigma_voxel) = (image.shape()[axis], sigma * per_unit[axis]);
        let second: Vec<f64> =
            gaussian_second_derivative(sigma_voxel)?.into_iter().map(|w| -w * sigma_voxel * sigma_voxel).collect();
        Ok([
            LineFilter::new(&gaussian_kernel(sigma_voxel)?, n, Edge::Reflect),
            LineFilter::new(&second, n, Edge::Reflect),
        ])
    };
    let axes = [filters(0)?, filters(1)?, filters(2)?];
    // (g_z g_y d_x + g_z d_y g_x) shares its last pass; an axis of one voxel has no curvature.
    sum.fill(0.0);
    let flat = image.shape()[0] == 1;
    for second in [2, 1] {
        let mut term = image.as_standard_layout().into_owned();
        for axis in [2, 1] {
            axes[axis][usize::from(axis == second)].run(&mut term, axis, pool)?;
        }
        sum += &term;
    }
    if !flat {
        axes[0][0].run(&mut sum, 0, pool)?;
        let mut term = image.as_standard_layout().into_owned();
        for axis in [2, 1, 0] {
            axes[axis][usize::from(axis == 0)].run(&mut term, axis, pool)?;
        }
        Zip::from(&mut sum).and(&term).for_each(|s, t| *s += t);
    }
    Ok(sum)
}

/// A voxel that no neighbour in space and scale exceeds.
#[derive(Debug, Clone, Copy)]
struct Peak {
    voxel: [usize; 3],
    scale: usize,
    response: f32,
    offset: [f64; 3],
}

/// Collects the peaks of scale space while its layers arrive, holding three of them.
struct Peaks {
    threshold: f32,
    border: usize,
    shape: [usize; 3],
    layers: Vec<Array3<f32>>,
    spare: Option<Array3<f32>>,
    pushed: usize,
    found: Vec<Peak>,
}

impl Peaks {
    fn new(search: &Search, (z, y, x): (usize, usize, usize)) -> Self {
        Self {
            // A value above the threshold in double precision is above its nearest float from below.
            threshold: search.threshold as f32,
            border: search.border_voxels,
            shape: [z, y, x],
            layers: Vec::new(),
            spare: None,
            pushed: 0,
            found: Vec::new(),
        }
    }

    /// A layer that is no longer needed, to be written again.
    fn spare(&mut self, shape: (usize, usize, usize)) -> Array3<f32> {
        self.spare.take().unwrap_or_else(|| Array3::zeros(shape))
    }

    fn push(&mut self, layer: Array3<f32>, pool: &Pool) -> Result<(), BlobError> {
        self.layers.push(layer);
        self.pushed += 1;
        match self.layers.len() {
            1 => Ok(()),
            2 => self.collect(0, 0..2, pool),
            _ => {
                self.collect(1, 0..3, pool)?;
                self.spare = Some(self.layers.remove(0));
                Ok(())
            }
        }
    }

    /// Peaks of layer `middle` among the layers `around`; the layer's scale follows from how many came.
    fn collect(&mut self, middle: usize, around: std::ops::Range<usize>, pool: &Pool) -> Result<(), BlobError> {
        let scale = self.pushed - self.layers.len() + middle;
        let layers = &self.layers;
        let neighbours: Vec<&[f32]> =
            around.filter(|n| *n != middle).map(|n| layers[n].as_slice().expect("made here")).collect();
        let layer = layers[middle].as_slice().expect("made here");
        let [slices, rows, columns] = self.shape;
        let (threshold, border) = (self.threshold, self.border);
        let within = |at: usize, n: usize| n == 1 || (at >= border && at + border < n);
        let total = Mutex::new(self.found.len());
        let found = pool.map(slices, |k| {
            let mut peaks = Vec::new();
            if !within(k, slices) {
                return peaks;
            }
            for j in (0..rows).filter(|j| within(*j, rows)) {
                let start = (k * rows + j) * columns;
                for (i, v) in layer[start..start + columns].iter().enumerate() {
                    if *v > threshold && within(i, columns) && is_peak(layer, &neighbours, self.shape, [k, j, i]) {
                        let offset = offset(layer, self.shape, [k, j, i]);
                        peaks.push(Peak { voxel: [k, j, i], scale, response: *v, offset });
                    }
                }
            }
            let mut total = total.lock().expect("nothing panics under it");
            *total += peaks.len();
            if *total > PEAKS_MAX {
                peaks.clear();
            }
            peaks
        })?;
        if total.into_inner().expect("nothing panics under it") > PEAKS_MAX {
            return Err(BlobError::TooManyPeaks);
        }
        self.found.extend(found.into_iter().flatten());
        Ok(())
    }

    /// All peaks, the strongest first; equal ones in the order of the array.
    fn finish(mut self, pool: &Pool) -> Result<Vec<Peak>, BlobError> {
        let count = self.layers.len();
        self.collect(count - 1, 0..count, pool)?;
        self.found
            .sort_by(|a, b| b.response.total_cmp(&a.response).then(a.voxel.cmp(&b.voxel)).then(a.scale.cmp(&b.scale)));
        Ok(self.found)
    }
}

fn is_peak(layer: &[f32], neighbours: &[&[f32]], [slices, rows, columns]: [usize; 3], [k, j, i]: [usize; 3]) -> bool {
    let centre = layer[(k * rows + j) * columns + i];
    let (first, last) = (i.saturating_sub(1), (i + 1).min(columns - 1));
    let near = |at: usize, n: usize| at.saturating_sub(1)..=(at + 1).min(n - 1);
    let below = |values: &[f32]| {
        near(k, slices).all(|k| {
            near(j, rows).all(|j| {
                let start = (k * rows + j) * columns;
                values[start + first..=start + last].iter().all(|v| *v <= centre)
            })
        })
    };
    // The row itself turns most voxels away.
    let row = &layer[(k * rows + j) * columns..][..columns];
    row[first] <= centre && row[last] <= centre && below(layer) && neighbours.iter().all(|n| below(n))
}

/// Where the parabola through a peak and its two neighbours on each axis has its top.
fn offset(layer: &[f32], shape: [usize; 3], voxel: [usize; 3]) -> [f64; 3] {
    let at = |v: [usize; 3]| f64::from(layer[(v[0] * shape[1] + v[1]) * shape[2] + v[2]]);
    std::array::from_fn(|axis| {
        if voxel[axis] == 0 || voxel[axis] + 1 == shape[axis] {
            return 0.0;
        }
        let (mut before, mut after) = (voxel, voxel);
        before[axis] -= 1;
        after[axis] += 1;
        let (b, c, a) = (at(before), at(voxel), at(after));
        let curvature = b - 2.0 * c + a;
        if curvature < 0.0 { (0.5 * (b - a) / curvature).clamp(-0.5, 0.5) } else { 0.0 }
    })
}

#[cfg(test)]
mod tests;
