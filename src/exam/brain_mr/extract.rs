//! The brain in a head: a network looks at each contrast, and together they decide.

use ndarray::Array3;

use super::prepare::{Thinned, grid_at, head_middle};
use crate::exam::ExamError;
use crate::geometry::Grid;
use crate::imaging::components::{self, Connectivity};
use crate::imaging::morphology::{self, Element, Outside, Shape};
use crate::imaging::resample::{self, Interpolation};
use crate::infer::engine::Network;
use crate::infer::manifest::Manifest;
use crate::infer::tiles;
use crate::pool::Pool;
use crate::study::{Rejection, RejectionCode};

/// Millilitres of brain below which there is none in the images: a newborn's has 300.
const BRAIN_ML_MIN: f64 = 250.0;

/// Radius of what is cut off.
const BRIDGE_MM: f64 = 5.0;

/// The brain on a grid of its own, in the reference's space.
pub(super) struct Brain {
    /// 1 inside.
    pub mask: Array3<u8>,
    pub grid: Grid,
}

impl Brain {
    pub fn volume_ml(&self) -> f64 {
        self.mask.iter().filter(|v| **v != 0).count() as f64 * self.grid.affine.determinant().abs() * 1e-3
    }
}

/// Of images stripped before they came: what is not 0 in all of them that cover it.
pub(super) fn given(series: &[Thinned], spacing_mm: f64, pool: &Pool) -> Result<Brain, ExamError> {
    let reference = &series[0];
    let (low, high) = super::prepare::bounds(&reference.grid());
    let shape: [usize; 3] = std::array::from_fn(|a| ((high[2 - a] - low[2 - a]) / spacing_mm) as usize + 1);
    let grid = grid_at(spacing_mm, shape, low);
    let image = reference.on(grid, 0.0, pool)?;
    let mask = image.mapv(|v| u8::from(v != 0.0));
    whole(mask, grid, pool)
}

/// Of heads: the network's mean score over the contrasts, above zero, in one piece and without holes.
pub(super) fn extracted(
    manifest: &Manifest,
    network: &Network,
    series: &[Thinned],
    spacing_mm: f64,
    pool: &Pool,
) -> Result<Brain, ExamError> {
    let reference = &series[0];
    let step = manifest.input.spacing_mm[0];
    let shape = manifest.patch();
    let middle = head_middle(reference, shape[0] as f64 * step, pool)?;
    let first = std::array::from_fn(|a| middle[a] - (shape[2 - a] - 1) as f64 * step / 2.0);
    let coarse = grid_at(step, shape, first);
    let mut session = network.session()?;
    let mut sum = Array3::<f32>::zeros(shape);
    for one in series {
        let mut image = one.on(coarse, 0.0, pool)?;
        tiles::brightest(image.as_slice_mut().expect("made contiguous"), manifest.input.range);
        let scores = tiles::scores(manifest, network, &mut session, &[image], pool).map_err(super::of_tiles)?;
        ndarray::Zip::from(&mut sum).and(&scores[0]).and(&scores[1]).for_each(|s, none, brain| *s += brain - none);
    }
    let by = (step / spacing_mm).max(1.0);
    let shape = shape.map(|n| ((n as f64 - 1.0) * by) as usize + 1);
    let grid = grid_at(spacing_mm, shape, first);
    let fine = resample::resample(sum.view(), &coarse.affine, &grid, Interpolation::Linear, -1.0, pool).map_err(super::of_resample)?;
    // Orbits and nerves hang on the brain by bridges that are thinner than any part of it.
    let bridge = Element::in_mm(Shape::Ball, BRIDGE_MM, grid.spacing())?;
    let mask = fine.mapv(|v| u8::from(v > 0.0));
    whole(morphology::open(mask.view(), &bridge, Outside::Neutral, pool)?, grid, pool)
}

/// The largest piece, its holes filled.
fn whole(mask: Array3<u8>, grid: Grid, pool: &Pool) -> Result<Brain, ExamError> {
    let pieces = components::label(mask.view(), Connectivity::Faces, pool)?;
    let largest = pieces.by_size().retain(|piece| piece.label == 1).paint(pool)?;
    let mask = components::fill_holes(largest.mapv(|v| v as u8).view(), false, pool)?;
    let brain = Brain { mask, grid };
    if brain.volume_ml() < BRAIN_ML_MIN {
        return Err(Rejection::new(RejectionCode::WrongContent, "no brain is in these images").into());
    }
    Ok(brain)
}
