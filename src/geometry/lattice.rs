//! The lattice a stack of slices stands on: order, gap, duplicate, tilt, completeness. Measured from positions alone.

use serde::{Deserialize, Serialize};

use super::{Affine, Plane, dot, norm, sub};
use crate::study::{Rejection, RejectionCode};

/// Direction cosines that differ by less than this (about 0.1 degree) are one orientation; scanners write few digits.
const SAME_DIRECTION: f64 = 2e-3;

/// Slices nearer than this along the normal claim the same place. Below any slice spacing of a clinical scanner.
const SAME_PLACE_MM: f64 = 0.01;

/// A distance within this part of the usual one is even: written positions are rounded, tables are not exact to a micron.
const EVEN: f64 = 0.01;

/// A distance within this part of a multiple of the usual one is a gap; beyond it the spacing is uneven.
const NEAR_MULTIPLE: f64 = 0.1;

/// Shear below this is rounding, above it a tilted gantry.
const TILT_DEGREES: f64 = 0.1;

/// What the lattice needs to know of one frame.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placed {
    /// Where it is.
    pub plane: Plane,
    /// `[rows, columns]`.
    pub size: [usize; 2],
    /// It says itself that it is a scout.
    pub localizer: bool,
    /// A fingerprint of its real values: equal for equal images.
    pub content: u64,
    /// Slice Thickness, used for the third dimension of a single slice and for nothing else.
    pub thickness_mm: Option<f64>,
}

/// Why a frame is no part of the stack though it came with the series.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It is a scout.
    Localizer,
    /// Its plane is turned against the others.
    OtherOrientation,
    /// Its rows, columns or pixel spacing differ.
    OtherSize,
    /// It stands beside the line of the others.
    OffTheLine,
    /// The same image at the same place, once more.
    Duplicate,
    /// It has no place in patient space, the others have.
    NoPlace,
}

/// Distances between slices that follow no even lattice.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Uneven {
    /// Smallest distance between neighbours.
    pub smallest_mm: f64,
    /// Largest distance between neighbours.
    pub largest_mm: f64,
    /// How far the worst slice stands from where the affine puts it.
    pub worst_offset_mm: f64,
}

/// What was found about a stack, as data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Slices (k, from 0) for which no image came, between slices for which one did.
    pub missing_slices: Vec<usize>,
    /// Frames left out: index in the input, and why.
    pub set_aside: Vec<(usize, Reason)>,
    /// Angle between the stack's direction and the normal of its slices.
    pub tilt_degrees: f64,
    /// Set when the distances are not even.
    pub uneven: Option<Uneven>,
}

impl Verdict {
    /// Nothing is missing between the first and the last slice, and the distances are even.
    pub fn is_whole(&self) -> bool {
        self.missing_slices.is_empty() && self.uneven.is_none()
    }

    /// The stack is sheared by a tilted gantry. Its affine expresses the shear.
    pub fn is_tilted(&self) -> bool {
        self.tilt_degrees > TILT_DEGREES
    }

    /// Identical frames that came more than once.
    pub fn duplicates(&self) -> usize {
        self.set_aside.iter().filter(|(_, why)| *why == Reason::Duplicate).count()
    }
}

/// Slices in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct Lattice {
    /// For each slice k the index of its frame in the input; None where it is missing. Slices ascend along the normal
    /// (row direction x column direction), so that the affine is right-handed: foot to head for an axial stack.
    pub order: Vec<Option<usize>>,
    /// True place of each slice along the normal; what the affine says for missing ones.
    pub along_normal_mm: Vec<f64>,
    /// `(i, j, k)` to LPS. Its third step is the measured one, sheared where the gantry was tilted, and the mean one where
    /// the spacing is uneven.
    pub affine: Affine,
    /// What was found.
    pub verdict: Verdict,
}

fn same_direction(a: &Plane, b: &Plane) -> bool {
    let near = |u: [f64; 3], v: [f64; 3]| sub(u, v).iter().all(|d| d.abs() < SAME_DIRECTION);
    near(a.along_row, b.along_row) && near(a.along_column, b.along_column)
}

fn same_size(a: &Placed, b: &Placed) -> bool {
    let near = |u: f64, v: f64| (u - v).abs() <= 1e-4 * u;
    a.size == b.size
        && near(a.plane.row_spacing_mm, b.plane.row_spacing_mm)
        && near(a.plane.column_spacing_mm, b.plane.column_spacing_mm)
}

/// Keeps the largest class of equal frames. The others are strays when they are few against it, else there is no stack.
fn keep_majority(
    frames: &[Placed],
    kept: &mut Vec<usize>,
    set_aside: &mut Vec<(usize, Reason)>,
    same: impl Fn(&Placed, &Placed) -> bool,
    (reason, code, what): (Reason, RejectionCode, &str),
) -> Result<(), Rejection> {
    let mut classes: Vec<Vec<usize>> = Vec::new();
    for &n in kept.iter() {
        match classes.iter().position(|class| same(&frames[class[0]], &frames[n])) {
            Some(class) => classes[class].push(n),
            // More classes than this are no stack with strays; stopping here keeps the search linear.
            None if classes.len() >= 16 => {
                return Err(Rejection::new(code, format!("the series has slices of more than 16 {what}s")));
            }
            None => classes.push(vec![n]),
        }
    }
    // The first of equally large classes wins: the outcome follows the order of the input, which the caller fixes.
    let largest = (0..classes.len()).rev().max_by_key(|c| classes[*c].len()).unwrap_or(0);
    let strays: usize = kept.len() - classes.get(largest).map_or(0, Vec::len);
    if strays > 3 || strays * 3 > kept.len() {
        let counts: Vec<String> = classes.iter().map(|class| class.len().to_string()).collect();
        return Err(Rejection::new(
            code,
            format!("the series has slices of {} {what}s ({})", classes.len(), counts.join(" + ")),
        ));
    }
    for (c, class) in classes.iter().enumerate() {
        if c != largest {
            set_aside.extend(class.iter().map(|n| (*n, reason)));
        }
    }
    *kept = if classes.is_empty() { Vec::new() } else { classes.swap_remove(largest) };
    Ok(())
}

/// The middle one, the upper of two.
///
/// # Panics
/// Without values.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Places frames on their lattice.
///
/// # Errors
/// `NoImages` for no frame, `MixedOrientation`, `MixedGeometry`, `ConflictingDuplicate`. A gap, a tilt and an uneven
/// spacing are no errors here: they are in the verdict.
pub fn lattice(frames: &[Placed]) -> Result<Lattice, Rejection> {
    let mut set_aside: Vec<(usize, Reason)> = Vec::new();
    let mut kept: Vec<usize> = (0..frames.len()).filter(|n| !frames[*n].localizer).collect();
    if kept.is_empty() {
        kept = (0..frames.len()).collect();
    } else {
        set_aside.extend((0..frames.len()).filter(|n| frames[*n].localizer).map(|n| (n, Reason::Localizer)));
    }
    if kept.is_empty() {
        return Err(Rejection::new(RejectionCode::NoImages, "the series has no image with a place"));
    }
    let size = (Reason::OtherSize, RejectionCode::MixedGeometry, "size");
    keep_majority(frames, &mut kept, &mut set_aside, same_size, size)?;
    let turn = (Reason::OtherOrientation, RejectionCode::MixedOrientation, "orientation");
    keep_majority(frames, &mut kept, &mut set_aside, |a, b| same_direction(&a.plane, &b.plane), turn)?;

    let normal = frames[kept[0]].plane.normal();
    let along = |n: usize| dot(frames[n].plane.position_lps_mm, normal);
    // Equal places keep the order of arrival: the first of identical images stays.
    kept.sort_by(|a, b| along(*a).total_cmp(&along(*b)));
    keep_line(frames, &mut kept, &mut set_aside, along)?;
    drop_duplicates(frames, &mut kept, &mut set_aside, along)?;
    set_aside.sort_by_key(|(n, _)| *n);

    let places: Vec<f64> = kept.iter().map(|n| along(*n)).collect();
    let first = frames[kept[0]].plane;
    let Some(steps) = Steps::measure(&places) else {
        let thickness = frames[kept[0]].thickness_mm.filter(|t| *t > 0.0 && *t <= 1000.0).unwrap_or(1.0);
        let affine = first.affine(normal.map(|v| v * thickness)).map_err(bad_affine)?;
        let verdict = Verdict { missing_slices: Vec::new(), set_aside, tilt_degrees: 0.0, uneven: None };
        return Ok(Lattice { order: vec![Some(kept[0])], along_normal_mm: places, affine, verdict });
    };
    let slices = steps.slice_of.last().copied().unwrap_or(0) + 1;
    let last = frames[kept[kept.len() - 1]].plane;
    let step = sub(last.position_lps_mm, first.position_lps_mm).map(|v| v / (slices - 1) as f64);
    let affine = first.affine(step).map_err(bad_affine)?;
    let cosine = (dot(step, normal) / norm(step)).clamp(-1.0, 1.0);

    let mut order = vec![None; slices];
    let mut along_normal_mm: Vec<f64> = (0..slices).map(|k| places[0] + k as f64 * dot(step, normal)).collect();
    for (n, k) in kept.iter().zip(&steps.slice_of) {
        order[*k] = Some(*n);
        along_normal_mm[*k] = along(*n);
    }
    let missing_slices = (0..slices).filter(|k| order[*k].is_none()).collect();
    let uneven = steps.uneven(&places);
    let verdict = Verdict { missing_slices, set_aside, tilt_degrees: cosine.acos().to_degrees(), uneven };
    Ok(Lattice { order, along_normal_mm, affine, verdict })
}

fn bad_affine(bad: super::BadGeometry) -> Rejection {
    Rejection::new(RejectionCode::Malformed, bad.to_string())
}

/// Sets aside what stands beside the line through the other slices' first pixels.
fn keep_line(
    frames: &[Placed],
    kept: &mut Vec<usize>,
    set_aside: &mut Vec<(usize, Reason)>,
    along: impl Fn(usize) -> f64,
) -> Result<(), Rejection> {
    if kept.len() < 3 {
        return Ok(());
    }
    let plane = frames[kept[0]].plane;
    let across = |n: usize| {
        let p = frames[n].plane.position_lps_mm;
        [dot(p, plane.along_row), dot(p, plane.along_column)]
    };
    // Medians (Theil and Sen's line): a stray at either end does not bend it.
    let line: Vec<[f64; 2]> = (0..2)
        .map(|axis| {
            let half = kept.len() / 2;
            let slopes: Vec<f64> = kept
                .iter()
                .zip(&kept[half..])
                .filter(|(a, b)| along(**b) - along(**a) > SAME_PLACE_MM)
                .map(|(a, b)| (across(*b)[axis] - across(*a)[axis]) / (along(*b) - along(*a)))
                .collect();
            let slope = if slopes.is_empty() { 0.0 } else { median(slopes) };
            [slope, median(kept.iter().map(|n| across(*n)[axis] - slope * along(*n)).collect())]
        })
        .collect();
    let tolerance_mm = 0.5 * plane.column_spacing_mm.max(plane.row_spacing_mm);
    let off = |n: usize| {
        let at = across(n);
        (0..2).any(|axis| (at[axis] - line[axis][1] - line[axis][0] * along(n)).abs() > tolerance_mm)
    };
    let strays: Vec<usize> = kept.iter().copied().filter(|n| off(*n)).collect();
    if strays.len() > 3 || strays.len() * 3 > kept.len() {
        return Err(Rejection::new(
            RejectionCode::MixedGeometry,
            format!("{} of {} slices stand beside the line of the others", strays.len(), kept.len()),
        ));
    }
    kept.retain(|n| !strays.contains(n));
    set_aside.extend(strays.into_iter().map(|n| (n, Reason::OffTheLine)));
    Ok(())
}

fn drop_duplicates(
    frames: &[Placed],
    kept: &mut Vec<usize>,
    set_aside: &mut Vec<(usize, Reason)>,
    along: impl Fn(usize) -> f64,
) -> Result<(), Rejection> {
    let mut unique: Vec<usize> = Vec::with_capacity(kept.len());
    for &n in kept.iter() {
        match unique.last() {
            Some(&before) if along(n) - along(before) < SAME_PLACE_MM => {
                if frames[before].content != frames[n].content {
                    let place = frames[n].plane.position_lps_mm;
                    return Err(Rejection::new(
                        RejectionCode::ConflictingDuplicate,
                        format!("two different images claim the place {place:?} mm"),
                    ));
                }
                set_aside.push((n, Reason::Duplicate));
            }
            _ => unique.push(n),
        }
    }
    *kept = unique;
    Ok(())
}

/// Distances between ascending places, and the slice each place is.
struct Steps {
    slice_of: Vec<usize>,
    usual_mm: f64,
    on_multiples: bool,
}

impl Steps {
    fn measure(places: &[f64]) -> Option<Self> {
        let distances: Vec<f64> = places.windows(2).map(|w| w[1] - w[0]).collect();
        if distances.is_empty() {
            return None;
        }
        let usual_mm = median(distances.clone());
        let multiple = |d: f64| (d / usual_mm).round();
        let near = |d: f64| multiple(d) >= 1.0 && (d - multiple(d) * usual_mm).abs() <= NEAR_MULTIPLE * usual_mm;
        let missing: f64 = distances.iter().map(|d| (multiple(*d) - 1.0).max(0.0)).sum();
        // Where more is missing than present, the usual distance is not the lattice's: called uneven, nothing is invented.
        let on_multiples = distances.iter().all(|d| near(*d)) && missing <= places.len() as f64;
        let mut k = 0;
        let mut slice_of = vec![0];
        for d in &distances {
            k += if on_multiples { multiple(*d) as usize } else { 1 };
            slice_of.push(k);
        }
        Some(Self { slice_of, usual_mm, on_multiples })
    }

    fn uneven(&self, places: &[f64]) -> Option<Uneven> {
        let slices = *self.slice_of.last()? as f64;
        let mean = (places[places.len() - 1] - places[0]) / slices;
        let worst_offset_mm =
            places.iter().zip(&self.slice_of).map(|(p, k)| (p - places[0] - *k as f64 * mean).abs()).fold(0.0, f64::max);
        let per_step = places.windows(2).zip(self.slice_of.windows(2)).map(|(p, k)| (p[1] - p[0]) / (k[1] - k[0]) as f64);
        let (smallest_mm, largest_mm) =
            per_step.fold((f64::INFINITY, 0.0f64), |(low, high), d| (low.min(d), high.max(d)));
        // Rounding of written positions moves a slice by micrometres, never by a fiftieth of a millimetre.
        let tolerance_mm = (EVEN * self.usual_mm).max(0.02);
        let even = self.on_multiples && worst_offset_mm <= tolerance_mm && largest_mm - smallest_mm <= 2.0 * tolerance_mm;
        (!even).then_some(Uneven { smallest_mm, largest_mm, worst_offset_mm })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AXIAL: [f64; 6] = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];

    fn at(position: [f64; 3], orientation: [f64; 6]) -> Placed {
        let plane = Plane::new(position, orientation, [0.7, 0.7]).expect("a plane");
        Placed { plane, size: [4, 4], localizer: false, content: 0, thickness_mm: Some(2.5) }
    }

    fn axial(zs: &[f64]) -> Vec<Placed> {
        zs.iter().enumerate().map(|(n, z)| Placed { content: n as u64, ..at([0.0, 0.0, *z], AXIAL) }).collect()
    }

    #[test]
    fn slices_in_any_order_ascend_along_the_normal() {
        let lattice = lattice(&axial(&[5.0, 0.0, 2.5, 7.5])).expect("a stack");
        assert_eq!(lattice.order, [Some(1), Some(2), Some(0), Some(3)]);
        assert_eq!(lattice.affine.step(2), [0.0, 0.0, 2.5]);
        assert!(lattice.affine.determinant() > 0.0);
        assert!(lattice.verdict.is_whole() && !lattice.verdict.is_tilted());
    }

    #[test]
    fn a_gap_is_named_by_its_slices() {
        let lattice = lattice(&axial(&[0.0, 2.5, 5.0, 12.5, 15.0])).expect("a stack");
        assert_eq!(lattice.verdict.missing_slices, [3, 4]);
        assert_eq!(lattice.order.len(), 7);
        assert_eq!(lattice.along_normal_mm[3], 7.5);
        assert_eq!(lattice.affine.step(2), [0.0, 0.0, 2.5]);
    }

    #[test]
    fn positions_rounded_to_a_hundredth_are_even() {
        let zs: Vec<f64> = (0..200).map(|k| (f64::from(k) * 1.0 / 3.0 * 100.0).round() / 100.0).collect();
        assert!(lattice(&axial(&zs)).expect("a stack").verdict.is_whole());
    }

    #[test]
    fn uneven_spacing_keeps_the_true_places() {
        let zs = [0.0, 1.0, 2.0, 3.5, 5.0, 6.5];
        let lattice = lattice(&axial(&zs)).expect("a stack");
        assert_eq!(lattice.along_normal_mm, zs);
        let uneven = lattice.verdict.uneven.expect("uneven");
        assert_eq!((uneven.smallest_mm, uneven.largest_mm), (1.0, 1.5));
        assert!(lattice.verdict.missing_slices.is_empty());
    }

    #[test]
    fn the_same_image_twice_counts_once_and_another_one_at_its_place_is_refused() {
        let mut frames = axial(&[0.0, 1.0, 2.0, 1.0]);
        frames[3].content = 1;
        let lattice = lattice(&frames).expect("a stack");
        assert_eq!((lattice.order.len(), lattice.verdict.duplicates()), (3, 1));
        assert_eq!(lattice.order[1], Some(1));
        frames[3].content = 7;
        assert_eq!(super::lattice(&frames).expect_err("a conflict").code, RejectionCode::ConflictingDuplicate);
    }

    #[test]
    fn a_scout_and_a_turned_slice_are_set_aside_and_named() {
        let mut frames = axial(&[0.0, 1.0, 2.0, 3.0, 4.0]);
        frames.push(Placed { localizer: true, ..at([0.0, 0.0, 2.2], AXIAL) });
        frames.push(at([0.0, 0.0, 2.2], [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]));
        let lattice = lattice(&frames).expect("a stack");
        assert_eq!(lattice.verdict.set_aside, [(5, Reason::Localizer), (6, Reason::OtherOrientation)]);
        assert_eq!(lattice.order.len(), 5);
    }

    #[test]
    fn three_planes_are_mixed_orientation() {
        let mut frames = axial(&[0.0, 1.0, 2.0]);
        let coronal = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0];
        frames.extend((0..3).map(|y| at([0.0, f64::from(y), 0.0], coronal)));
        assert_eq!(lattice(&frames).expect_err("mixed").code, RejectionCode::MixedOrientation);
    }

    #[test]
    fn a_tilted_gantry_shears_the_affine() {
        let (s, c) = 20f64.to_radians().sin_cos();
        let tilted = [1.0, 0.0, 0.0, 0.0, c, -s];
        let frames: Vec<Placed> =
            (0..10).map(|k| Placed { content: k, ..at([1.0, 2.0, 5.0 * k as f64], tilted) }).collect();
        let lattice = lattice(&frames).expect("a stack");
        assert!((lattice.verdict.tilt_degrees - 20.0).abs() < 1e-9);
        assert!(lattice.verdict.is_tilted() && lattice.verdict.is_whole());
        assert_eq!(lattice.affine.to_lps([0.0, 0.0, 9.0]), [1.0, 2.0, 45.0]);
    }

    #[test]
    fn one_slice_takes_its_depth_from_its_thickness() {
        let lattice = lattice(&axial(&[3.0])).expect("a slice");
        assert_eq!(lattice.affine.step(2), [0.0, 0.0, 2.5]);
    }
}
