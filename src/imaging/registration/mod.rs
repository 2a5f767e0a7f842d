//! Registration: the transform that lays a moving image over a fixed one, by walking down a metric over a pyramid.
//!
//! The parts are those of ITK's registration framework (Avants et al., Frontiers in Neuroinformatics 8:44, 2014): the
//! metric's gradient is that of the value itself, by the chain rule through linear interpolation, and not that of a
//! smoothed image.

mod linear;
mod metric;
mod optimise;
mod pyramid;
mod samples;
mod transform;

pub use metric::{BINS_MAX, Metric};
pub use optimise::{Optimiser, Progress, Stop};
pub use samples::Sampling;
pub use transform::{BadTransform, Kind, Transform};

use ndarray::ArrayView3;

use self::metric::Comparison;
use self::optimise::Walk;
use self::pyramid::{Plain, shrink_factors};
use self::samples::Samples;
use crate::geometry::{Affine, sub};
use crate::pool::{Fault, Pool};

/// Why two images cannot be laid over each other.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistrationError {
    /// Registration in space needs volumes.
    #[error("the {which} image is {shape:?} (slices, rows, columns): 3-D registration needs 2 or more along each axis")]
    NotAVolume {
        /// `fixed` or `moving`.
        which: &'static str,
        /// Its shape.
        shape: [usize; 3],
    },
    /// NaN or infinite voxels.
    #[error("the {which} image has {voxels} voxels that are NaN or infinite, the first at {first:?} (slice, row, column)")]
    NotFinite {
        /// `fixed` or `moving`.
        which: &'static str,
        /// How many.
        voxels: usize,
        /// The first, `[k, j, i]`.
        first: [usize; 3],
    },
    /// All voxels that count are the same.
    #[error("the {which} image is the same everywhere: there is nothing to compare")]
    Flat {
        /// `fixed` or `moving`.
        which: &'static str,
    },
    /// A mask of another shape than its image.
    #[error("the mask of the {which} image has another shape than the image")]
    MaskShape {
        /// `fixed` or `moving`.
        which: &'static str,
    },
    /// No sample is inside the mask.
    #[error("the mask of the {which} image leaves no sample")]
    EmptyMask {
        /// `fixed` or `moving`.
        which: &'static str,
    },
    /// The images do not meet.
    #[error("the images do not overlap: {percent:.2} % of the samples fall into the moving image, 1 % is the least")]
    NoOverlap {
        /// Samples inside, in percent.
        percent: f64,
    },
    /// A setting outside its range.
    #[error("{0}")]
    Setting(&'static str),
    /// Ours to mend.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// An image to register.
#[derive(Debug, Clone, Copy)]
pub struct Image<'a> {
    /// Real values.
    pub voxels: ArrayView3<'a, f32>,
    /// Where they are.
    pub affine: Affine,
    /// What counts: voxels that are not 0.
    pub mask: Option<ArrayView3<'a, u8>>,
}

/// Where the walk begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Start {
    /// The best of the three that follow, by the metric on the coarsest level.
    Best,
    /// As patient space says: both were scanned in one session.
    PatientSpace,
    /// Middles of the images laid together.
    Geometry,
    /// Centres of mass laid together.
    Moments,
    /// A transform, whose kind is the one sought.
    Given(Transform),
}

impl Start {
    /// A word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Best => "best",
            Self::PatientSpace => "patient-space",
            Self::Geometry => "geometry",
            Self::Moments => "moments",
            Self::Given(_) => "given",
        }
    }
}

/// One level of the pyramid.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Level {
    /// The finest axes of the fixed image are thinned by this, coarser ones by less; 1 for the full image.
    pub shrink: usize,
    /// Gaussian smoothing of both images.
    pub sigma_mm: f64,
}

/// How to register.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What may change.
    pub kind: Kind,
    /// What is compared.
    pub metric: Metric,
    /// Where.
    pub sampling: Sampling,
    /// How steps are chosen.
    pub optimiser: Optimiser,
    /// Steps on each level, at most.
    pub steps: usize,
    /// Coarse to fine.
    pub levels: Vec<Level>,
    /// Where to begin.
    pub start: Start,
}

impl Default for Settings {
    /// Rigid, Mattes with 50 bins over all voxels, up to 100 quasi-Newton steps on each of three levels.
    fn default() -> Self {
        Self {
            kind: Kind::Rigid,
            metric: Metric::Mattes { bins: 50 },
            sampling: Sampling::All,
            optimiser: Optimiser::QuasiNewton { least_step_mm: 0.005 },
            steps: 100,
            levels: [(4, 2.0), (2, 1.0), (1, 0.0)].map(|(shrink, sigma_mm)| Level { shrink, sigma_mm }).to_vec(),
            start: Start::Best,
        }
    }
}

impl Settings {
    fn check(&self) -> Result<(), RegistrationError> {
        let bad = |text| Err(RegistrationError::Setting(text));
        if let Metric::Mattes { bins } = self.metric
            && !(5..=BINS_MAX).contains(&bins)
        {
            return bad("bins: 5 to 256");
        }
        if let Sampling::Regular { fraction } | Sampling::Random { fraction, .. } = self.sampling
            && !(fraction > 0.0 && fraction <= 1.0)
        {
            return bad("the fraction of voxels to sample must be above 0 and at most 1");
        }
        if self.levels.is_empty() || self.levels.iter().any(|l| !(1..=64).contains(&l.shrink)) {
            return bad("the pyramid needs a level, and each thins by 1 to 64");
        }
        if self.levels.iter().any(|l| !(0.0..=100.0).contains(&l.sigma_mm)) {
            return bad("smoothing is 0 to 100 mm");
        }
        match self.optimiser {
            Optimiser::RegularStep { first_step_mm, least_step_mm }
                if !(first_step_mm >= 0.0 && first_step_mm.is_finite() && least_step_mm > 0.0) =>
            {
                bad("the first step is 0 mm or more, the least above 0 mm")
            }
            Optimiser::QuasiNewton { least_step_mm } if least_step_mm.is_nan() || least_step_mm <= 0.0 => bad("the least step is above 0 mm"),
            Optimiser::Descent { rate } if !(rate > 0.0 && rate.is_finite()) => bad("the rate must be above 0"),
            _ => Ok(()),
        }
    }
}

/// What registration found.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Fixed to moving patient space: the best place met on the last level.
    pub transform: Transform,
    /// The cost there, over the samples of the last level.
    pub metric: f64,
    /// Share of those samples inside the moving image.
    pub overlap: f64,
    /// Steps made, over all levels.
    pub iterations: usize,
    /// Why the last level ended.
    pub stop: Stop,
    /// What the walk began with, when it was chosen.
    pub start: &'static str,
    /// Every evaluation.
    pub history: Vec<Progress>,
}

/// Finds the transform that lays `moving` over `fixed`.
///
/// # Errors
/// [`RegistrationError`]
pub fn register(
    fixed: &Image<'_>,
    moving: &Image<'_>,
    settings: &Settings,
    pool: &Pool,
    mut told: impl FnMut(&Progress),
) -> Result<Outcome, RegistrationError> {
    settings.check()?;
    check(fixed, "fixed")?;
    check(moving, "moving")?;
    let whole = [Plain::new(fixed.voxels, fixed.affine), Plain::new(moving.voxels, moving.affine)];
    let mut here: Option<Transform> = None;
    let mut outcome = None;
    let mut history: Vec<Progress> = Vec::new();
    let mut iterations = 0;
    let mut start = settings.start.code();
    for (n, level) in settings.levels.iter().enumerate() {
        let smooth_fixed = whole[0].smoothed(level.sigma_mm, pool)?;
        let smooth_moving = whole[1].smoothed(level.sigma_mm, pool)?;
        let samples = Samples::draw(&smooth_fixed, fixed.mask, settings.sampling, level.shrink)?;
        drop(smooth_fixed);
        let metric = match settings.metric {
            // A histogram with few samples to a cell is alike by chance; the last level has what was asked for.
            Metric::Mattes { bins } if n + 1 < settings.levels.len() => {
                Metric::Mattes { bins: ((samples.len() as f64 / 8.0).sqrt() as usize).clamp(12, bins.max(12)).min(bins) }
            }
            metric => metric,
        };
        let mut comparison = Comparison::new(metric, fixed.affine, samples, &smooth_moving, moving.mask)?;
        let begin = match here.take() {
            Some(transform) => transform,
            None => {
                let (chosen, transform) = begin(fixed, moving, settings, &mut comparison, pool)?;
                start = chosen;
                transform
            }
        };
        let factors = shrink_factors(fixed.affine.spacing(), level.shrink);
        let sides: [f64; 3] = std::array::from_fn(|c| fixed.affine.spacing().zyx_mm()[c] * factors[c] as f64);
        let sides_mm = [sides.iter().copied().fold(f64::INFINITY, f64::min), sides.iter().copied().fold(0.0, f64::max)];
        let Settings { mut optimiser, steps, .. } = *settings;
        if let Optimiser::QuasiNewton { least_step_mm } = &mut optimiser
            && n + 1 < settings.levels.len()
        {
            // A coarse level only has to come near enough for the next.
            *least_step_mm = least_step_mm.max(0.02 * sides_mm[0]);
        }
        let mut note = |progress: &Progress| {
            history.push(*progress);
            told(progress);
        };
        let (transform, evaluation, made, stop) =
            Walk { comparison: &mut comparison, optimiser, steps, level: n, sides_mm, pool, told: &mut note }.from(begin)?;
        iterations += made;
        here = Some(transform.clone());
        outcome = Some((transform, evaluation, stop));
    }
    let (transform, evaluation, stop) = outcome.expect("settings have a level");
    let (metric, overlap) = (evaluation.value, evaluation.overlap);
    Ok(Outcome { transform, metric, overlap, iterations, stop, start, history })
}

/// The metric at a transform, over all voxels of the fixed image, without smoothing.
///
/// # Errors
/// [`RegistrationError`]
pub fn compare(
    fixed: &Image<'_>,
    moving: &Image<'_>,
    metric: Metric,
    transform: &Transform,
    pool: &Pool,
) -> Result<f64, RegistrationError> {
    Settings { metric, ..Settings::default() }.check()?;
    check(fixed, "fixed")?;
    check(moving, "moving")?;
    let samples = Samples::draw(&Plain::new(fixed.voxels, fixed.affine), fixed.mask, Sampling::All, 1)?;
    let plain = Plain::new(moving.voxels, moving.affine);
    let mut comparison = Comparison::new(metric, fixed.affine, samples, &plain, moving.mask)?;
    Ok(comparison.evaluate(transform, false, pool)?.value)
}

fn check(image: &Image<'_>, which: &'static str) -> Result<(), RegistrationError> {
    let (z, y, x) = image.voxels.dim();
    if [z, y, x].iter().any(|n| *n < 2) {
        return Err(RegistrationError::NotAVolume { which, shape: [z, y, x] });
    }
    let mut wild = image.voxels.indexed_iter().filter(|(_, v)| !v.is_finite());
    if let Some(((k, j, i), _)) = wild.next() {
        return Err(RegistrationError::NotFinite { which, voxels: wild.count() + 1, first: [k, j, i] });
    }
    match image.mask {
        Some(mask) if mask.dim() != image.voxels.dim() => Err(RegistrationError::MaskShape { which }),
        Some(mask) if mask.iter().all(|m| *m == 0) => Err(RegistrationError::EmptyMask { which }),
        _ => Ok(()),
    }
}

fn middle(image: &Image<'_>) -> [f64; 3] {
    let (z, y, x) = image.voxels.dim();
    image.affine.to_lps([x, y, z].map(|n| (n - 1) as f64 / 2.0))
}

/// Centre of mass, the least value weighing nothing.
fn centre_of_mass(image: &Image<'_>) -> [f64; 3] {
    let least = image.voxels.iter().copied().fold(f32::INFINITY, f32::min);
    let (mut mass, mut sums) = (0.0f64, [0.0f64; 3]);
    for ((k, j, i), v) in image.voxels.indexed_iter() {
        if image.mask.is_none_or(|mask| mask[[k, j, i]] != 0) {
            let weight = f64::from(v - least);
            mass += weight;
            sums.iter_mut().zip([i, j, k]).for_each(|(s, n)| *s += weight * n as f64);
        }
    }
    if mass > 0.0 { image.affine.to_lps(sums.map(|s| s / mass)) } else { middle(image) }
}

/// The first transform, and which it is.
fn begin(
    fixed: &Image<'_>,
    moving: &Image<'_>,
    settings: &Settings,
    comparison: &mut Comparison<'_>,
    pool: &Pool,
) -> Result<(&'static str, Transform), RegistrationError> {
    let kind = settings.kind;
    let laid = |centre: [f64; 3], onto: [f64; 3]| {
        let mut transform = Transform::identity(kind, centre);
        transform.set_shift(sub(onto, centre));
        transform
    };
    let patient_space = || Transform::identity(kind, middle(fixed));
    let geometry = || laid(middle(fixed), middle(moving));
    let moments = || laid(centre_of_mass(fixed), centre_of_mass(moving));
    Ok((
        settings.start.code(),
        match &settings.start {
            Start::PatientSpace => patient_space(),
            Start::Geometry => geometry(),
            Start::Moments => moments(),
            Start::Given(transform) => {
                if transform.kind() != kind {
                    return Err(RegistrationError::Setting("the transform to start from is of another kind"));
                }
                transform.clone()
            }
            Start::Best => {
                let all = [(Start::PatientSpace, patient_space()), (Start::Geometry, geometry()), (Start::Moments, moments())];
                let mut seen = Vec::new();
                let mut refused = None;
                for (start, transform) in all {
                    match comparison.evaluate(&transform, false, pool) {
                        Ok(evaluation) => seen.push((start.code(), transform, evaluation)),
                        Err(error @ RegistrationError::NoOverlap { .. }) => refused = Some(error),
                        Err(error) => return Err(error),
                    }
                }
                // A sliver of overlap can look alike by chance.
                let widest = seen.iter().map(|s| s.2.overlap).fold(0.0, f64::max);
                seen.retain(|s| s.2.overlap >= widest / 2.0);
                let best = seen.into_iter().min_by(|a, b| a.2.value.total_cmp(&b.2.value));
                let (code, transform, _) = best.ok_or_else(|| {
                    refused.unwrap_or(RegistrationError::NoOverlap { percent: 0.0 })
                })?;
                return Ok((code, transform));
            }
        },
    ))
}

#[cfg(test)]
mod tests;
