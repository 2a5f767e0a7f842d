//! Walking down the metric.

use super::RegistrationError;
use super::metric::{Comparison, Evaluation};
use super::transform::Transform;
use crate::geometry::{norm, sub};
use crate::pool::Pool;

/// How steps are chosen. Parameters of different units are weighed by how far they move the corners of the fixed image
/// (ITK's scales from physical shift), and all lengths are that movement in millimetres.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Optimiser {
    /// Quasi-Newton steps (BFGS) with a line search that goes down only; learns the shape of the valley that plain
    /// gradients zigzag along, so it arrives in a fraction of the steps. Ends when the next step would be shorter than
    /// `least_step_mm`. Every evaluation counts as a step.
    QuasiNewton {
        /// Shorter steps do not matter.
        least_step_mm: f64,
    },
    /// Steps of a length that is halved whenever the gradient turns round; ends below `least_step_mm`.
    RegularStep {
        /// Length of the first step on the first level; halved for each level after it. 0 takes the coarsest voxel side
        /// of the level.
        first_step_mm: f64,
        /// Ends when steps are shorter.
        least_step_mm: f64,
    },
    /// Steps proportional to the gradient; the rate is chosen once, at the start of a level, so that the first step
    /// moves the corners by the finest voxel side, as SimpleITK does; ends when the last ten values have levelled out.
    Descent {
        /// Multiplies the estimated rate; SimpleITK's learning rate.
        rate: f64,
    },
}

/// Why the walk over one level ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// All steps were made.
    Steps,
    /// Steps became too short to matter.
    ShortStep,
    /// The gradient vanished.
    NoGradient,
    /// The metric no longer changed.
    Converged,
}

impl Stop {
    /// A sentence.
    pub fn text(self) -> &'static str {
        match self {
            Self::Steps => "all steps made",
            Self::ShortStep => "step shorter than the least step",
            Self::NoGradient => "gradient vanished",
            Self::Converged => "metric levelled out",
        }
    }

    /// A word for programs.
    pub fn code(self) -> &'static str {
        match self {
            Self::Steps => "steps",
            Self::ShortStep => "short_step",
            Self::NoGradient => "no_gradient",
            Self::Converged => "converged",
        }
    }
}

/// One evaluation on the way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Level of the pyramid, from 0, the coarsest.
    pub level: usize,
    /// Steps made on this level.
    pub step: usize,
    /// The cost here.
    pub metric: f64,
    /// Length of the step that follows, in millimetres.
    pub step_mm: f64,
    /// Share of the samples inside the moving image.
    pub overlap: f64,
}

/// Values looked at to see whether the metric has levelled out, and the change, as a share of its range, below which
/// it has (SimpleITK's defaults).
const WINDOW: usize = 10;
const LEVELLED: f64 = 1e-6;

/// Where a walk over one level leads.
pub(super) struct Walk<'w, 'c> {
    pub(super) comparison: &'w mut Comparison<'c>,
    pub(super) optimiser: Optimiser,
    /// At most so many.
    pub(super) steps: usize,
    pub(super) level: usize,
    /// Finest and coarsest voxel side of the level.
    pub(super) sides_mm: [f64; 2],
    pub(super) pool: &'w Pool,
    pub(super) told: &'w mut dyn FnMut(&Progress),
}

/// The best place met on a walk, its cost, the steps made and why it ended.
type End = (Transform, Evaluation, usize, Stop);

impl Walk<'_, '_> {
    pub(super) fn from(self, start: Transform) -> Result<End, RegistrationError> {
        match self.optimiser {
            Optimiser::QuasiNewton { least_step_mm } => quasi_newton(self, start, least_step_mm),
            _ => descend(self, start),
        }
    }
}

/// BFGS (Nocedal and Wright, Numerical Optimization, chapter 6) over parameters measured in millimetres of movement.
fn quasi_newton(walk: Walk<'_, '_>, start: Transform, least_step_mm: f64) -> Result<End, RegistrationError> {
    let Walk { comparison, steps, level, sides_mm, pool, told, .. } = walk;
    let corners = comparison.corners();
    let roots: Vec<f64> = scales(&start, &corners).iter().map(|s| s.sqrt()).collect();
    // No step goes further than two voxels: the linear picture of the images ends there.
    let longest = 2.0 * sides_mm[1];
    let n = roots.len();
    let mut first_mm = sides_mm[1];
    let in_mm = |gradient: &[f64]| -> Vec<f64> { gradient.iter().zip(&roots).map(|(g, r)| g / r).collect() };
    let mut here = start;
    let mut now = comparison.evaluate(&here, true, pool)?;
    let mut gradient = in_mm(&now.gradient);
    let mut inverse: Option<Vec<Vec<f64>>> = None;
    let mut made = 0;
    let stop = 'walk: loop {
        let steepest: Vec<f64> = gradient.iter().map(|g| -g).collect();
        let steepness = product(&gradient, &gradient).sqrt();
        if steepness <= 1e-15 || !steepness.is_finite() {
            break Stop::NoGradient;
        }
        let mut direction = match &inverse {
            Some(h) => h.iter().map(|row| -product(row, &gradient)).collect(),
            None => steepest.iter().map(|d| d * first_mm / steepness).collect::<Vec<f64>>(),
        };
        if product(&direction, &gradient) >= 0.0 {
            inverse = None;
            continue;
        }
        let reach = product(&direction, &direction).sqrt();
        if reach > longest {
            direction.iter_mut().for_each(|d| *d *= longest / reach);
        }
        let reach = reach.min(longest);
        told(&Progress { level, step: made, metric: now.value, step_mm: reach, overlap: now.overlap });
        if reach < least_step_mm {
            break Stop::ShortStep;
        }
        let slope = product(&direction, &gradient);
        let mut share = 1.0;
        let (there, then) = loop {
            if made == steps {
                break 'walk Stop::Steps;
            }
            made += 1;
            let parameters =
                here.parameters().iter().zip(&direction).zip(&roots).map(|((p, d), r)| p + share * d / r).collect();
            let there = here.with_parameters(parameters);
            // A step out of the overlap is a step too far.
            let then = match comparison.evaluate(&there, true, pool) {
                Err(RegistrationError::NoOverlap { .. }) => None,
                other => Some(other?),
            };
            match then {
                Some(then) if then.value <= now.value + 1e-4 * share * slope => break (there, then),
                Some(then) => {
                    // The least of the parabola through both values and the slope.
                    let bend = then.value - now.value - share * slope;
                    let least = if bend > 0.0 { -slope * share * share / (2.0 * bend) } else { share / 2.0 };
                    share = least.clamp(0.1 * share, 0.5 * share);
                }
                None => share /= 4.0,
            }
            if share * reach < least_step_mm / 2.0 {
                if inverse.is_none() {
                    break 'walk Stop::ShortStep;
                }
                inverse = None;
                first_mm = (16.0 * least_step_mm).min(sides_mm[1]);
                continue 'walk;
            }
        };
        let step: Vec<f64> = direction.iter().map(|d| share * d).collect();
        let new_gradient = in_mm(&then.gradient);
        let change: Vec<f64> = new_gradient.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        let curvature = product(&step, &change);
        if curvature > 1e-12 * product(&step, &step).sqrt() * product(&change, &change).sqrt() {
            let first = curvature / product(&change, &change);
            let mut h = inverse.take().unwrap_or_else(|| {
                (0..n).map(|r| (0..n).map(|c| if r == c { first } else { 0.0 }).collect()).collect()
            });
            let hy: Vec<f64> = h.iter().map(|row| product(row, &change)).collect();
            let yhy = product(&change, &hy);
            for r in 0..n {
                for c in 0..n {
                    h[r][c] += (1.0 + yhy / curvature) * step[r] * step[c] / curvature
                        - (hy[r] * step[c] + step[r] * hy[c]) / curvature;
                }
            }
            inverse = Some(h);
        }
        (here, now, gradient) = (there, then, new_gradient);
    };
    Ok((here, now, made, stop))
}

fn product(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn descend(walk: Walk<'_, '_>, start: Transform) -> Result<End, RegistrationError> {
    let Walk { comparison, optimiser, steps, level, sides_mm, pool, told } = walk;
    let corners = comparison.corners();
    let scales = scales(&start, &corners);
    let [finest_mm, coarsest_mm] = sides_mm;
    let mut here = start;
    let mut best: Option<(Transform, Evaluation)> = None;
    let mut step_mm = match optimiser {
        Optimiser::RegularStep { first_step_mm, .. } if first_step_mm > 0.0 => first_step_mm / (1u32 << level.min(20)) as f64,
        _ => coarsest_mm,
    };
    let mut rate = None;
    let mut before: Option<Vec<f64>> = None;
    let mut values = Vec::new();
    let mut made = 0;
    let stop = loop {
        let evaluation = comparison.evaluate(&here, true, pool)?;
        let gradient = evaluation.gradient.clone();
        let (value, overlap) = (evaluation.value, evaluation.overlap);
        values.push(value);
        if best.as_ref().is_none_or(|(_, b)| value < b.value) {
            best = Some((here.clone(), evaluation));
        }
        let direction: Vec<f64> = gradient.iter().zip(&scales).map(|(g, s)| g / s).collect();
        let reach = moved(&here, &direction, &corners);
        let mut stop = None;
        let factor = match optimiser {
            _ if reach <= 1e-15 || !reach.is_finite() => {
                stop = Some(Stop::NoGradient);
                0.0
            }
            Optimiser::RegularStep { least_step_mm, .. } => {
                // Both gradients weighed, as the steps are: their product in the space where a unit is a millimetre.
                let turned = before.as_ref().is_some_and(|b| {
                    b.iter().zip(&gradient).zip(&scales).map(|((b, g), s)| b * g / s).sum::<f64>() < 0.0
                });
                if turned {
                    step_mm /= 2.0;
                }
                if step_mm < least_step_mm {
                    stop = Some(Stop::ShortStep);
                }
                step_mm / reach
            }
            Optimiser::QuasiNewton { .. } | Optimiser::Descent { .. } => {
                let multiple = if let Optimiser::Descent { rate } = optimiser { rate } else { 1.0 };
                let rate = *rate.get_or_insert(multiple * finest_mm / reach);
                step_mm = rate * reach;
                if levelled(&values) {
                    stop = Some(Stop::Converged);
                }
                rate
            }
        };
        told(&Progress { level, step: made, metric: value, step_mm, overlap });
        if made == steps {
            stop = stop.or(Some(Stop::Steps));
        }
        if let Some(stop) = stop {
            break stop;
        }
        let next = here.parameters().iter().zip(&direction).map(|(p, d)| p - factor * d).collect();
        here = here.with_parameters(next);
        before = Some(gradient);
        made += 1;
    };
    let (transform, evaluation) = best.expect("the start was evaluated");
    Ok((transform, evaluation, made, stop))
}

/// Square of the greatest movement of a corner for a unit of each parameter.
fn scales(transform: &Transform, corners: &[[f64; 3]]) -> Vec<f64> {
    let delta = 1e-4;
    (0..transform.parameters().len())
        .map(|n| {
            let mut unit = vec![0.0; transform.parameters().len()];
            unit[n] = -delta;
            (moved(transform, &unit, corners) / delta).powi(2).max(1e-12)
        })
        .collect()
}

/// Greatest movement of a corner when `direction` is taken from the parameters.
fn moved(transform: &Transform, direction: &[f64], corners: &[[f64; 3]]) -> f64 {
    // Small, because turns are linear in their angles only for a short way.
    let largest = direction.iter().fold(0.0f64, |m, d| m.max(d.abs()));
    if largest == 0.0 {
        return 0.0;
    }
    let share = 1e-4 / largest;
    let there = transform.with_parameters(transform.parameters().iter().zip(direction).map(|(p, d)| p - share * d).collect());
    corners.iter().map(|c| norm(sub(there.apply(*c), transform.apply(*c)))).fold(0.0, f64::max) / share
}

/// Whether the last values lie on a line that has stopped falling.
fn levelled(values: &[f64]) -> bool {
    if values.len() < WINDOW {
        return false;
    }
    let range = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    let range = range.1 - range.0;
    if range <= 0.0 {
        return true;
    }
    let last = &values[values.len() - WINDOW..];
    let middle = (WINDOW - 1) as f64 / 2.0;
    let mean = last.iter().sum::<f64>() / WINDOW as f64;
    let (mut up, mut square) = (0.0, 0.0);
    for (n, v) in last.iter().enumerate() {
        up += (n as f64 - middle) * (v - mean);
        square += (n as f64 - middle).powi(2);
    }
    -(up / square) / range < LEVELLED
}
