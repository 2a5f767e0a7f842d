//! Measurements of lungs: volume and mean density, counted slice by slice at full resolution.

use std::collections::BTreeMap;

use super::lungs::Lungs;
use crate::exam::{ExamError, Progress};
use crate::finding::Measurement;
use crate::pool::Pool;
use crate::volume::Volume;

/// Slices counted before their pages are given back.
const GROUP: usize = 32;

/// Voxels and sum of Hounsfield units of one side.
type Tally = (u64, f64);

/// Volume of each lung and of both, and their mean density, vessels and nodules included.
pub(super) fn lungs(
    volume: &Volume,
    lungs: &Lungs,
    pool: &Pool,
    progress: &dyn Fn(Progress),
) -> Result<BTreeMap<String, Measurement>, ExamError> {
    let [slices, rows, columns] = volume.shape();
    let mut sides: [Tally; 2] = [(0, 0.0); 2];
    for start in (0..slices).step_by(GROUP) {
        progress(Progress { stage: "measure", done: start, total: slices });
        let end = (start + GROUP).min(slices);
        let counted = pool.map(end - start, |n| {
            let k = start + n;
            let mut tally: [Tally; 2] = [(0, 0.0); 2];
            if !lungs.reach_slice(k) {
                return tally;
            }
            let mut hu = vec![0f32; rows * columns];
            let mut labels = vec![0u8; rows * columns];
            volume.read_slice_f32(k, &mut hu);
            lungs.draw(k, &hu, &mut labels);
            for (label, hu) in labels.iter().zip(&hu).filter(|(label, _)| **label > 0) {
                let (count, sum) = &mut tally[usize::from(*label) - 1];
                *count += 1;
                *sum += f64::from(*hu);
            }
            tally
        })?;
        // In the order of slices, whichever thread was first.
        for tally in counted {
            for (side, (count, sum)) in sides.iter_mut().zip(tally) {
                side.0 += count;
                side.1 += sum;
            }
        }
        volume.release(start..end);
    }
    progress(Progress { stage: "measure", done: slices, total: slices });
    let voxel_ml = volume.affine().determinant().abs() / 1000.0;
    let ml = sides.map(|(count, _)| count as f64 * voxel_ml);
    let count = (sides[0].0 + sides[1].0).max(1);
    let density = (sides[0].1 + sides[1].1) / count as f64;
    Ok(BTreeMap::from([
        ("lung_volume_ml".into(), Measurement::of(ml[0] + ml[1], "mL")),
        ("right_lung_volume_ml".into(), Measurement::of(ml[0], "mL")),
        ("left_lung_volume_ml".into(), Measurement::of(ml[1], "mL")),
        ("mean_lung_density_hu".into(), Measurement::of(density, "[hnsf'U]")),
    ]))
}
