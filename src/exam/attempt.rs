//! From an assembled series to an exam's outcome, when the stack is not as an exam wants it: slices missing between others,
//! or at uneven distances. Nothing is made up silently: what was not analysed is said.

use std::ops::Range;
use std::path::Path;

use super::chest_ct::{ChestCt, LungSlice};
use super::registry::Work;
use super::{ExamError, ExamOutcome, LabelMap};
use crate::geometry::{Affine, Grid, median};
use crate::series::Assembled;
use crate::study::{Rejection, RejectionCode};
use crate::volume::{Rescale, Volume, VolumeError, VolumeWriter, VoxelType};

/// An outcome, and what it does not cover.
#[derive(Debug)]
pub struct Attempt {
    /// What was seen.
    pub outcome: ExamOutcome,
    /// The volume that [`ExamOutcome::labels`] are drawn on.
    pub volume: Volume,
    /// Why the series is covered only in part: a word and a sentence.
    pub partial: Option<(&'static str, String)>,
}

/// Why an attempt has no outcome.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The exam's own reasons.
    #[error(transparent)]
    Exam(#[from] ExamError),
    /// No room for the volume at even distances.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// Stretches of fewer slices between gaps are left out: no lesion could be told from a vessel in them.
const STRETCH_MIN: usize = 5;

/// In a stack at uneven distances a distance beyond so many usual ones is a gap: nothing is interpolated across it.
const GAP: f64 = 1.5;

/// The most slices a stack at uneven distances may come to at its smallest distance; beyond it, it is rejected.
const EVEN_SLICES_MAX: usize = 4096;

/// Runs the chest CT exam on an assembled series: each stretch of neighbouring slices by itself where some are missing,
/// interpolated to even distances from their true places where the distances differ.
///
/// # Errors
/// [`AttemptError`]; a rejection when no stretch can be analysed.
pub fn chest_ct(exam: &ChestCt, work: &Work<'_>) -> Result<Attempt, AttemptError> {
    let Work { assembled, scratch, presegmented, .. } = *work;
    let reject = |code, text: String| AttemptError::Exam(Rejection::new(code, text).into());
    let verdict = &assembled.verdict;
    if !assembled.placed {
        return Err(reject(RejectionCode::WrongContent, "the images have no place in patient space".into()));
    }
    let Some(uneven) = &verdict.uneven else {
        return stretch_by_stretch(exam, work, &assembled.volume, &verdict.missing_slices, presegmented);
    };
    if verdict.is_tilted() {
        let text = format!("slices tilted by {:.1} degrees at uneven distances", verdict.tilt_degrees);
        return Err(reject(RejectionCode::UnevenSpacing, text));
    }
    let (even, missing) = at_even_distances(assembled, uneven.smallest_mm, scratch)?;
    let mut attempt = stretch_by_stretch(exam, work, &even, &missing, &|_| None)?;
    let original = assembled.volume.affine();
    for finding in &mut attempt.outcome.findings {
        if let Some(lps_mm) = finding.centroid_lps_mm {
            finding.centroid_voxel = uneven_voxel(assembled, &original, lps_mm);
        }
    }
    if let Some((_, text)) = &mut attempt.partial {
        *text += &format!(", counted in slices put at even distances of {:.3} mm", uneven.smallest_mm);
    }
    Ok(attempt)
}

/// The volume as a whole, or what lies between its missing slices, each by itself.
fn stretch_by_stretch(
    exam: &ChestCt,
    work: &Work<'_>,
    volume: &Volume,
    missing: &[usize],
    presegmented: &dyn Fn(usize) -> Option<LungSlice>,
) -> Result<Attempt, AttemptError> {
    let Work { series, pool, progress, .. } = *work;
    let slices = volume.shape()[0];
    if missing.is_empty() {
        let outcome = exam.analyze(series, volume, pool, presegmented, progress)?;
        return Ok(Attempt { outcome, volume: volume.clone(), partial: None });
    }
    let stretches = stretches(slices, missing);
    let mut whole: Option<ExamOutcome> = None;
    let mut covered = Vec::new();
    let mut refusal = None;
    let mut parts = Vec::new();
    for stretch in stretches.iter().filter(|s| s.len() >= STRETCH_MIN) {
        let part = volume.part(stretch.clone());
        match exam.analyze(series, &part, pool, &|k| presegmented(k + stretch.start), progress) {
            Ok(mut outcome) => {
                for finding in &mut outcome.findings {
                    finding.centroid_voxel[0] += stretch.start as f64;
                }
                parts.push(Part { slices: stretch.clone(), volume: part, labels: std::mem::take(&mut outcome.labels) });
                covered.push(stretch.clone());
                whole = Some(match whole {
                    None => outcome,
                    Some(before) => joined(before, outcome),
                });
            }
            Err(ExamError::Rejected(rejection)) => refusal = Some(rejection),
            Err(other) => return Err(other.into()),
        }
    }
    let Some(mut outcome) = whole else {
        let text = format!("{} slices are missing between others and no stretch can be analysed", missing.len());
        let rejection = refusal.filter(|_| missing.len() < STRETCH_MIN);
        return Err(AttemptError::Exam(rejection.unwrap_or_else(|| Rejection::new(RejectionCode::Gap, text)).into()));
    };
    outcome.labels = by_name(parts);
    let named: Vec<String> = covered.iter().map(|s| format!("{} to {}", s.start, s.end - 1)).collect();
    let text = format!(
        "{} of {slices} slices are missing between others; analysed by themselves: {}",
        missing.len(),
        named.join(", ")
    );
    Ok(Attempt { outcome, volume: volume.clone(), partial: Some(("gap", text)) })
}

/// Neighbouring slices that are there.
fn stretches(slices: usize, missing: &[usize]) -> Vec<Range<usize>> {
    let mut out = Vec::new();
    let mut start = 0;
    for gap in missing.iter().copied().chain([slices]) {
        if gap > start {
            out.push(start..gap);
        }
        start = gap + 1;
    }
    out
}

/// Two stretches of one series: findings by confidence, volumes added, densities weighted by volume.
fn joined(mut a: ExamOutcome, b: ExamOutcome) -> ExamOutcome {
    let ml = |o: &ExamOutcome| o.measurements.get("lung_volume_ml").map_or(0.0, |m| m.value);
    let (weight_a, weight_b) = (ml(&a), ml(&b));
    for (name, other) in b.measurements {
        match a.measurements.get_mut(&name) {
            Some(own) if name.ends_with("_ml") => own.value += other.value,
            Some(own) if weight_a + weight_b > 0.0 => {
                own.value = (own.value * weight_a + other.value * weight_b) / (weight_a + weight_b);
            }
            Some(_) => {}
            None => {
                a.measurements.insert(name, other);
            }
        }
    }
    a.findings.extend(b.findings);
    // Stable: equal confidences keep the order foot to head.
    a.findings.sort_by(|x, y| y.confidence.total_cmp(&x.confidence));
    for (n, finding) in a.findings.iter_mut().enumerate() {
        finding.id = n as u32 + 1;
    }
    for (stage, ms) in b.timing_ms {
        *a.timing_ms.entry(stage).or_default() += ms;
    }
    a
}

/// One stretch with the maps drawn on it.
struct Part {
    slices: Range<usize>,
    volume: Volume,
    labels: Vec<Box<dyn LabelMap>>,
}

/// The maps of one name over all stretches, as one.
#[derive(Debug)]
struct Joined {
    name: String,
    values: Vec<(u8, String)>,
    parts: Vec<(Range<usize>, Volume, Box<dyn LabelMap>)>,
}

impl LabelMap for Joined {
    fn name(&self) -> &str {
        &self.name
    }

    fn values(&self) -> Vec<(u8, String)> {
        self.values.clone()
    }

    fn draw(&self, _: &Volume, k: usize, out: &mut [u8]) {
        match self.parts.iter().find(|(slices, ..)| slices.contains(&k)) {
            Some((slices, volume, map)) => map.draw(volume, k - slices.start, out),
            None => out.fill(0),
        }
    }
}

fn by_name(parts: Vec<Part>) -> Vec<Box<dyn LabelMap>> {
    let mut maps: Vec<Joined> = Vec::new();
    for part in parts {
        for map in part.labels {
            let entry = (part.slices.clone(), part.volume.clone());
            match maps.iter_mut().find(|joined| joined.name == map.name()) {
                Some(joined) => {
                    joined.values.extend(map.values().into_iter().filter(|v| !joined.values.contains(v)).collect::<Vec<_>>());
                    joined.parts.push((entry.0, entry.1, map));
                }
                None => maps.push(Joined {
                    name: map.name().to_owned(),
                    values: map.values(),
                    parts: vec![(entry.0, entry.1, map)],
                }),
            }
        }
    }
    maps.into_iter().map(|map| Box::new(map) as Box<dyn LabelMap>).collect()
}

/// The volume at its smallest distance, each slice interpolated linearly between the two nearest true ones; and the slices that
/// lie in a gap, which stay empty.
fn at_even_distances(assembled: &Assembled, step_mm: f64, spool: &Path) -> Result<(Volume, Vec<usize>), AttemptError> {
    let there: Vec<usize> = (0..assembled.slots.len()).filter(|k| assembled.slots[*k].is_some()).collect();
    let places: Vec<f64> = there.iter().map(|k| assembled.along_normal_mm[*k]).collect();
    let gap_mm = GAP * median(places.windows(2).map(|w| w[1] - w[0]).collect());
    let (first, last) = (places[0], places[places.len() - 1]);
    let slices = ((last - first) / step_mm).round() as usize + 1;
    if slices > EVEN_SLICES_MAX {
        let text = format!("slices at distances so uneven that they come to {slices} at the smallest one, {step_mm:.3} mm");
        return Err(ExamError::from(Rejection::new(RejectionCode::UnevenSpacing, text)).into());
    }
    let volume = &assembled.volume;
    let [_, rows, columns] = volume.shape();
    let affine = volume.affine();
    let step = affine.step(2);
    let length = crate::geometry::norm(step);
    let even_step = step.map(|c| c / length * step_mm);
    let affine = Affine::new(affine.step(0), affine.step(1), even_step, affine.origin())
        .map_err(|e| ExamError::from(Rejection::new(RejectionCode::UnevenSpacing, e.to_string())))?;
    let path = spool.join(format!("even-{}.vol", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let grid = Grid { shape: [slices, rows, columns], affine };
    let writer = VolumeWriter::create(&path, grid, VoxelType::F32, Rescale::IDENTITY)?;
    // Nameless from here on: whatever ends the process, nothing is left behind.
    let _ = std::fs::remove_file(&path);
    let (mut low, mut high) = (vec![0f32; rows * columns], vec![0f32; rows * columns]);
    let mut bytes = Vec::with_capacity(rows * columns * 4);
    let mut missing = Vec::new();
    for k in 0..slices {
        let (below, weight) = between(&places, first + k as f64 * step_mm);
        let above = (below + 1).min(places.len() - 1);
        if places[above] - places[below] > gap_mm && weight > 0.0 && weight < 1.0 {
            missing.push(k);
            continue;
        }
        volume.read_slice_f32(there[below], &mut low);
        volume.read_slice_f32(there[above], &mut high);
        bytes.clear();
        for (a, b) in low.iter().zip(&high) {
            bytes.extend_from_slice(&(a + (b - a) * weight as f32).to_le_bytes());
        }
        writer.write_slice(k, &bytes)?;
        volume.release(there[below]..there[below] + 1);
    }
    Ok((writer.reader(), missing))
}

/// The true slice below a place along the normal, and how far towards the next one it lies (0 to 1).
fn between(places: &[f64], at: f64) -> (usize, f64) {
    let below = places.partition_point(|p| *p <= at).saturating_sub(1).min(places.len().saturating_sub(2));
    let Some(next) = places.get(below + 1) else { return (below, 0.0) };
    (below, ((at - places[below]) / (next - places[below])).clamp(0.0, 1.0))
}

/// `[k, j, i]` among the true slices of a place in patient space.
fn uneven_voxel(assembled: &Assembled, affine: &Affine, lps_mm: [f64; 3]) -> [f64; 3] {
    let [i, j, k] = affine.to_voxel(lps_mm);
    let places = &assembled.along_normal_mm;
    // The affine's own slices are evenly spread between the same ends.
    let mean = (places[places.len() - 1] - places[0]) / (places.len() - 1).max(1) as f64;
    let (below, weight) = between(places, places[0] + k * mean);
    [below as f64 + weight, j, i]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_what_lies_between_gaps() {
        assert_eq!(stretches(10, &[3, 4, 9]), [0..3, 5..9]);
        assert_eq!(stretches(4, &[]), vec![0..4]);
        assert_eq!(stretches(3, &[0, 1, 2]), []);
    }

    #[test]
    fn nothing_is_interpolated_across_a_gap_between_slices_at_uneven_distances() {
        let folder = tempfile::tempdir().unwrap();
        // 5 mm and a bit, 12 mm once: two slices would lie in between.
        let mut places: Vec<f64> = (0..12).map(|k| 5.0 * k as f64 + if k % 2 == 0 { 0.2 } else { 0.0 }).collect();
        places[6..].iter_mut().for_each(|z| *z += 7.0);
        let axial = Affine::axial(crate::geometry::Spacing::new([5.6, 1.0, 1.0]).unwrap(), [0.0; 3]);
        let voxels = ndarray::Array3::from_shape_fn((12, 2, 2), |(k, ..)| places[k] as f32);
        let volume = Volume::from_array(&voxels, axial, Rescale::IDENTITY).unwrap();
        let uneven = crate::geometry::Uneven { smallest_mm: 4.8, largest_mm: 12.0, worst_offset_mm: 3.0 };
        let assembled = Assembled {
            verdict: crate::geometry::Verdict { missing_slices: vec![], set_aside: vec![], tilt_degrees: 0.0, uneven: Some(uneven) },
            set_aside: vec![],
            slots: (0..12).map(Some).collect(),
            sources: vec![None; 12],
            planar: vec![Default::default(); 12],
            along_normal_mm: places.clone(),
            placed: true,
            calibrated: true,
            frame_of_reference: None,
            window: None,
            padding: None,
            frame_time_ms: None,
            completed_by: crate::series::Completion::Told,
            volume,
        };
        let (even, missing) = at_even_distances(&assembled, 5.0, folder.path()).unwrap();
        let at = |k: usize| places[0] + 5.0 * k as f64;
        let inside: Vec<usize> = (0..even.shape()[0]).filter(|k| at(*k) > places[5] && at(*k) < places[6]).collect();
        assert_eq!(missing, inside);
        assert_eq!(missing, [5, 6, 7]);
        let there = (0..even.shape()[0]).filter(|k| !missing.contains(k));
        there.for_each(|k| assert!((even.to_f32(k..k + 1)[[0, 1, 1]] - at(k) as f32).abs() < 1e-3, "slice {k}"));
    }

    #[test]
    fn a_place_between_uneven_slices_is_weighted_by_its_true_distances() {
        let places = [0.0, 1.0, 4.0];
        assert_eq!(between(&places, 0.5), (0, 0.5));
        assert_eq!(between(&places, 3.25), (1, 0.75));
        assert_eq!(between(&places, 4.0), (1, 1.0));
        assert_eq!(between(&places, -1.0), (0, 0.0));
    }
}
