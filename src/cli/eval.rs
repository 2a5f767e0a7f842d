//! `scanside eval`: how good this box is, on a clinic's own truth.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use scanside::dicom::file::files_below;
use scanside::finding::Finding;
use scanside::geometry::norm;
use scanside::imaging::overlap::Overlaps;
use scanside::nifti;
use scanside::report::froc::{self, Froc, Mark, Nodule, Scan};
use scanside::report::{Report, Status};
use serde_json::json;

use super::{Failure, print, print_json};

/// Arguments of `scanside eval`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Nodules found against false marks a scan, by the rules of the LUNA16 challenge.
    Froc(FrocArguments),
    /// Overlap of two label maps, label by label.
    Dice(DiceArguments),
}

/// A finding within a nodule's radius of its centre is a hit; of several on one nodule the surest counts, and the others are
/// neither hit nor false. The score (CPM) is the mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false marks a scan. The
/// numbers are those of the challenge's own script.
///
///   scanside eval froc --truth annotations.csv --excluded annotations_excluded.csv reports/
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
struct FrocArguments {
    /// The nodules: seriesuid,coordX,coordY,coordZ,diameter_mm (LPS mm), with a header line
    #[arg(long, value_name = "CSV")]
    truth: PathBuf,
    /// Findings that are neither asked for nor false, in the same form
    #[arg(long, value_name = "CSV")]
    excluded: Option<PathBuf>,
    /// findings.json files, folders of them, or a CSV of marks: seriesuid,coordX,coordY,coordZ,probability
    #[arg(required = true)]
    reports: Vec<PathBuf>,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// Both maps are NIfTI files on the same grid; 0 is background.
#[derive(clap::Args)]
struct DiceArguments {
    /// One label map
    a: PathBuf,
    /// The other
    b: PathBuf,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::Froc(arguments) => froc(&arguments),
        Command::Dice(arguments) => dice(&arguments),
    }
}

type Rows = BTreeMap<String, Vec<([f64; 3], f64)>>;

fn table(path: &Path) -> Result<Rows, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| Failure::usage(format!("cannot read {}: {e}", path.display())))?;
    froc::read_table(&text).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

fn froc(arguments: &FrocArguments) -> Result<(), Failure> {
    let truth = table(&arguments.truth)?;
    let excluded = arguments.excluded.as_deref().map(table).transpose()?.unwrap_or_default();
    let mut marks: BTreeMap<String, Vec<Mark>> = BTreeMap::new();
    let mut notes = Vec::new();
    for path in &arguments.reports {
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) {
            for (series, rows) in table(path)? {
                let of_series = rows.into_iter().map(|(centre_mm, score)| Mark { centre_mm, score });
                marks.entry(series).or_default().extend(of_series);
            }
            continue;
        }
        let files = files_below(path).map_err(|e| Failure::usage(format!("cannot read {}: {e}", path.display())))?;
        for file in files.iter().filter(|f| *f == path || f.extension().is_some_and(|e| e == "json")) {
            let json = std::fs::read(file).map_err(|e| Failure::usage(format!("cannot read {}: {e}", file.display())))?;
            let report = match Report::from_json(&json) {
                Ok(report) => report,
                Err(error) => {
                    notes.push(format!("{}: not a report: {error}", file.display()));
                    continue;
                }
            };
            if !matches!(report.status, Status::Complete | Status::Partial) {
                notes.push(format!("{}: {}: counted as a scan in which nothing was marked", file.display(), report.status.word()));
            }
            let mark = |f: &Finding| Some(Mark { centre_mm: f.centroid_lps_mm?, score: f64::from(f.confidence) });
            let found = report.findings.iter().filter_map(mark);
            if marks.insert(report.series_uid.to_string(), found.collect()).is_some() {
                return Err(Failure::usage(format!("{}: a second report on series {}", file.display(), report.series_uid)));
            }
        }
    }
    if marks.is_empty() {
        return Err(Failure::usage("no report was read"));
    }
    for series in truth.keys().filter(|series| !marks.contains_key(*series)) {
        notes.push(format!("series {series} is in the truth and has no report: left out"));
    }
    let scans: Vec<Scan> = marks
        .into_iter()
        .map(|(series, marks)| {
            let nodule = |excluded| move |(centre_mm, diameter_mm): &([f64; 3], f64)| Nodule {
                centre_mm: *centre_mm,
                diameter_mm: *diameter_mm,
                excluded,
            };
            let asked = truth.get(&series).into_iter().flatten().map(nodule(false));
            let left_out = excluded.get(&series).into_iter().flatten().map(nodule(true));
            Scan { nodules: asked.chain(left_out).collect(), marks }
        })
        .collect();
    let result = froc::evaluate(&scans);
    if arguments.json {
        let points: Vec<_> = froc::POINTS.iter().zip(&result.sensitivity).map(|(at, s)| json!({"false_marks_per_scan": at, "sensitivity": s})).collect();
        return print_json(&json!({"scans": result.scans, "nodules": result.nodules, "hit": result.hit,
            "false_marks": result.false_marks, "doubles": result.doubles, "ignored": result.ignored, "cpm": result.cpm,
            "points": points, "notes": notes}));
    }
    notes.iter().for_each(|note| eprintln!("scanside: {note}"));
    print(&text_of(&result))
}

fn text_of(result: &Froc) -> String {
    let Froc { scans, nodules, hit, false_marks, doubles, ignored, .. } = result;
    let mut text = format!(
        "{scans} scans, {nodules} nodules, {hit} hit; {false_marks} false marks, {doubles} doubles, {ignored} on excluded findings\n\n\
         false marks a scan  sensitivity\n"
    );
    for (at, sensitivity) in froc::POINTS.iter().zip(&result.sensitivity) {
        text += &format!("{at:>18}  {sensitivity:>11.4}\n");
    }
    text + &format!("{:>18}  {:>11.4}\n", "CPM", result.cpm)
}

fn dice(arguments: &DiceArguments) -> Result<(), Failure> {
    let open = |path: &Path| nifti::read(path).map_err(Failure::usage);
    let (a, b) = (open(&arguments.a)?, open(&arguments.b)?);
    if a.shape() != b.shape() {
        return Err(Failure::usage(format!("the maps have the shapes {:?} and {:?} (slices, rows, columns)", a.shape(), b.shape())));
    }
    // The corners tell whether both lie on the same place: rows that run the other way would compare a lung with nothing.
    let [slices, rows, columns] = a.shape();
    let apart = (0..8)
        .map(|corner| {
            let pick = |bit: usize, n: usize| if corner >> bit & 1 == 0 { 0.0 } else { n.saturating_sub(1) as f64 };
            let at = [pick(0, slices), pick(1, rows), pick(2, columns)];
            let (p, q) = (a.affine().kji_to_lps(at), b.affine().kji_to_lps(at));
            norm([p[0] - q[0], p[1] - q[1], p[2] - q[2]])
        })
        .fold(0.0, f64::max);
    if apart > 0.5 {
        return Err(Failure::usage(format!("the maps do not lie on the same grid: a corner is {apart:.1} mm away from the other's")));
    }
    let mut overlaps = Overlaps::default();
    let (mut of_a, mut of_b) = (vec![0f32; rows * columns], vec![0f32; rows * columns]);
    for k in 0..slices {
        a.read_slice_f32(k, &mut of_a);
        b.read_slice_f32(k, &mut of_b);
        overlaps.add(&of_a, &of_b).map_err(Failure::usage)?;
    }
    if arguments.json {
        let labels: BTreeMap<String, _> = overlaps
            .labels()
            .map(|(label, o)| (label.to_string(), json!({"dice": o.dice(), "a": o.a, "b": o.b, "both": o.both})))
            .collect();
        return print_json(&json!({"labels": labels, "any": overlaps.any().dice()}));
    }
    let mut text = format!("{:>7}  {:>7}  {:>12}  {:>12}\n", "label", "Dice", "voxels A", "voxels B");
    for (label, o) in overlaps.labels() {
        text += &format!("{label:>7}  {:>7.4}  {:>12}  {:>12}\n", o.dice(), o.a, o.b);
    }
    let any = overlaps.any();
    print(&format!("{text}{:>7}  {:>7.4}  {:>12}  {:>12}\n", "any", any.dice(), any.a, any.b))
}
