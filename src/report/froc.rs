//! How good a nodule finder is: FROC by the rules of the LUNA16 challenge (Setio et al. 2017), the numbers of its script.
//!
//! A mark within a nodule's radius of its centre is a hit; of several the highest counts and the others are neither hit
//! nor false. Marks on findings that the readers excluded are neither. All else is false. The score is the mean
//! sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false marks a scan, read off the curve by linear interpolation.

use std::collections::BTreeMap;

use serde::Serialize;

/// False marks a scan at which sensitivity is read.
pub const POINTS: [f64; 7] = [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0];
/// Marks of one scan that count, the highest first, as in the script.
const MARKS_MAX: usize = 100;

/// A nodule of the truth.
#[derive(Debug, Clone, PartialEq)]
pub struct Nodule {
    /// LPS.
    pub centre_mm: [f64; 3],
    /// Below zero: unknown, and it counts as 10 mm, as in the script.
    pub diameter_mm: f64,
    /// Not asked for: a mark on it is neither hit nor false.
    pub excluded: bool,
}

/// A mark of the finder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mark {
    /// LPS.
    pub centre_mm: [f64; 3],
    /// Higher is surer.
    pub score: f64,
}

/// One scan: what is in it and what was marked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scan {
    /// The truth.
    pub nodules: Vec<Nodule>,
    /// The marks.
    pub marks: Vec<Mark>,
}

/// The outcome.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Froc {
    /// Scans that were marked.
    pub scans: usize,
    /// Nodules that were asked for.
    pub nodules: usize,
    /// Those that any mark hit.
    pub hit: usize,
    /// Marks that hit nothing.
    pub false_marks: usize,
    /// Marks on a nodule that a higher mark had hit already.
    pub doubles: usize,
    /// Marks on excluded findings.
    pub ignored: usize,
    /// Sensitivity at each of [`POINTS`].
    pub sensitivity: Vec<f64>,
    /// Their mean: the challenge's score.
    pub cpm: f64,
    /// The curve: false marks a scan, sensitivity, score from which both hold.
    pub curve: Vec<[f64; 3]>,
}

/// Evaluates scans.
pub fn evaluate(scans: &[Scan]) -> Froc {
    let mut scored: Vec<(f64, bool)> = Vec::new();
    let (mut nodules, mut hit, mut doubles, mut ignored) = (0, 0, 0, 0);
    for scan in scans {
        let mut marks = scan.marks.clone();
        marks.sort_by(|a, b| b.score.total_cmp(&a.score));
        marks.truncate(MARKS_MAX);
        let mut spent = vec![false; marks.len()];
        for nodule in &scan.nodules {
            let radius = if nodule.diameter_mm < 0.0 { 5.0 } else { nodule.diameter_mm / 2.0 };
            let near = |mark: &Mark| {
                let squared: f64 = (0..3).map(|a| (mark.centre_mm[a] - nodule.centre_mm[a]).powi(2)).sum();
                squared < radius * radius
            };
            let matches: Vec<usize> = (0..marks.len()).filter(|n| near(&marks[*n])).collect();
            matches.iter().for_each(|n| spent[*n] = true);
            if nodule.excluded {
                ignored += matches.len();
                continue;
            }
            nodules += 1;
            if let Some(best) = matches.first() {
                hit += 1;
                doubles += matches.len() - 1;
                scored.push((marks[*best].score, true));
            }
        }
        scored.extend(marks.iter().zip(&spent).filter(|(_, spent)| !**spent).map(|(mark, _)| (mark.score, false)));
    }
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    let false_marks = scored.iter().filter(|(_, hit)| !hit).count();
    let curve = curve(&scored, scans.len(), nodules);
    let sensitivity: Vec<f64> = POINTS.iter().map(|at| read(&curve, *at)).collect();
    let cpm = sensitivity.iter().sum::<f64>() / POINTS.len() as f64;
    Froc { scans: scans.len(), nodules, hit, false_marks, doubles, ignored, sensitivity, cpm, curve }
}

/// One point for each distinct score, from nothing marked to everything.
fn curve(scored: &[(f64, bool)], scans: usize, nodules: usize) -> Vec<[f64; 3]> {
    let mut points = vec![[0.0, 0.0, f64::INFINITY]];
    let (mut false_marks, mut hits) = (0usize, 0usize);
    for (n, (score, hit)) in scored.iter().enumerate() {
        hits += usize::from(*hit);
        false_marks += usize::from(!hit);
        if scored.get(n + 1).is_none_or(|next| next.0 < *score) {
            points.push([false_marks as f64 / scans.max(1) as f64, hits as f64 / nodules.max(1) as f64, *score]);
        }
    }
    points
}

/// Sensitivity at a number of false marks a scan; beyond the last mark that of the last.
fn read(curve: &[[f64; 3]], at: f64) -> f64 {
    let after = curve.partition_point(|p| p[0] <= at);
    match (curve.get(after.wrapping_sub(1)), curve.get(after)) {
        (Some(a), Some(b)) => a[1] + (b[1] - a[1]) * (at - a[0]) / (b[0] - a[0]),
        (Some(a), None) => a[1],
        (None, _) => 0.0,
    }
}

/// A line of a table that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct BadTable {
    /// From 1.
    pub line: usize,
    /// What is wrong with it.
    pub why: String,
}

/// Centre in LPS millimetres and diameter.
pub type Annotation = ([f64; 3], f64);

/// Reads `seriesuid,coordX,coordY,coordZ,NUMBER` with a header line, as LUNA16 writes annotations (the number is the
/// diameter) and marks (the probability): rows by series.
///
/// # Errors
/// [`BadTable`].
pub fn read_table(text: &str) -> Result<BTreeMap<String, Vec<Annotation>>, BadTable> {
    let mut rows: BTreeMap<String, Vec<([f64; 3], f64)>> = BTreeMap::new();
    for (n, line) in text.lines().enumerate() {
        let cells: Vec<&str> = line.split(',').map(str::trim).collect();
        let numbers: Option<Vec<f64>> = cells.iter().skip(1).take(4).map(|c| c.parse().ok().filter(|v: &f64| v.is_finite())).collect();
        match numbers.as_deref() {
            _ if line.trim().is_empty() => {}
            Some([x, y, z, number]) => rows.entry(cells[0].into()).or_default().push(([*x, *y, *z], *number)),
            _ if n == 0 => {}
            _ => {
                let why = format!("seriesuid, three coordinates and a number are wanted, not {:?}", line.chars().take(80).collect::<String>());
                return Err(BadTable { line: n + 1, why });
            }
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodule(x: f64, diameter_mm: f64) -> Nodule {
        Nodule { centre_mm: [x, 0.0, 0.0], diameter_mm, excluded: false }
    }

    fn mark(x: f64, score: f64) -> Mark {
        Mark { centre_mm: [x, 0.0, 0.0], score }
    }

    #[test]
    fn a_mark_counts_once_and_only_inside_the_radius() {
        let scan = Scan {
            nodules: vec![nodule(0.0, 10.0), nodule(100.0, 6.0), Nodule { excluded: true, ..nodule(50.0, -1.0) }],
            marks: vec![mark(4.9, 0.9), mark(-1.0, 0.5), mark(103.0, 0.8), mark(54.9, 0.7), mark(55.0, 0.7), mark(30.0, 0.6)],
        };
        let froc = evaluate(&[scan]);
        // On the edge is outside, and an unknown diameter counts as 10 mm.
        assert_eq!((froc.nodules, froc.hit, froc.doubles, froc.ignored, froc.false_marks), (2, 1, 1, 1, 3));
    }

    /// Made with the challenge's script: scikit-learn's roc_curve and numpy's interp on the same marks.
    #[test]
    fn the_curve_is_the_script_s() {
        let scan = |x: &[f64], marks: &[(f64, f64)]| Scan {
            nodules: x.iter().map(|x| nodule(*x, 8.0)).collect(),
            marks: marks.iter().map(|(x, s)| mark(*x, *s)).collect(),
        };
        let scans = [
            scan(&[0.0, 50.0], &[(1.0, 0.95), (30.0, 0.9), (51.0, 0.4), (80.0, 0.3), (90.0, 0.2)]),
            scan(&[10.0], &[(60.0, 0.7), (10.0, 0.6), (70.0, 0.4)]),
            scan(&[20.0], &[(70.0, 0.1)]),
            scan(&[], &[(5.0, 0.65), (6.0, 0.05)]),
        ];
        let froc = evaluate(&scans);
        let want = [0.25, 0.25, 0.25, 0.75, 0.75, 0.75, 0.75];
        assert!(froc.sensitivity.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12), "{:?}", froc.sensitivity);
        assert_eq!((froc.nodules, froc.hit, froc.false_marks), (4, 3, 8));
    }

    #[test]
    fn without_false_marks_everything_that_is_hit_counts_everywhere() {
        let froc = evaluate(&[Scan { nodules: vec![nodule(0.0, 8.0), nodule(90.0, 8.0)], marks: vec![mark(0.0, 0.3)] }]);
        assert_eq!(froc.cpm, 0.5);
        assert_eq!(evaluate(&[]).cpm, 0.0);
    }

    #[test]
    fn tables_are_read_with_their_header_and_bad_lines_are_named() {
        let rows = read_table("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2,1,-2.5,3,8\n1.2,0,0,0,4\n").unwrap();
        assert_eq!(rows["1.2"], [([1.0, -2.5, 3.0], 8.0), ([0.0; 3], 4.0)]);
        assert_eq!(read_table("h,x,y,z,d\n1.2,1,a,3,8\n").unwrap_err().line, 2);
    }
}
