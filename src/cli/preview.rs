//! `scanside preview`: an image as a picture, in a file or in the terminal.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;
use serde_json::json;

use scanside::finding::Finding;
use scanside::imaging::picture::{Picture, WHITE, text_height, text_width};
use scanside::imaging::render::mark_sides;
use scanside::imaging::terminal;
use scanside::imaging::view::{Cut, Labels, Plane, label_colour, robust_window};
use scanside::study::Modality;
use scanside::volume::Volume;

use super::open::{open_told, open_volume};
use super::output::write_file;
use super::{Failure, print, print_json};

/// Draws an image: three planes through it, one slice, or a montage, true to scale.
///
/// Radiological convention: the patient's right is on the left of axial and coronal cuts; the letters at the edges
/// (R L A P H F) are computed from the image's own geometry.
#[derive(clap::Args)]
pub struct Arguments {
    /// The image: .nii, .nii.gz, .nrrd, a DICOM file or folder.
    input: PathBuf,
    /// Where the picture goes (.png).
    #[arg(long, required_unless_present = "terminal")]
    out: Option<PathBuf>,
    /// Draw one plane only.
    #[arg(long, value_enum)]
    plane: Option<PlaneName>,
    /// The number of the slice, from 0, along --plane [default: axial] [default: the middle].
    #[arg(long)]
    slice: Option<usize>,
    /// Draw so many slices, evenly spread along --plane [default: axial].
    #[arg(long, value_name = "SLICES", conflicts_with_all = ["slice", "at"])]
    montage: Option<usize>,
    /// Put the planes through this place: left, back, head in millimetres (LPS).
    #[arg(long, value_delimiter = ',', num_args = 1.., allow_hyphen_values = true, value_name = "L,P,H")]
    at: Vec<f64>,
    /// Black and white: `LOW,HIGH`, or `lung`, `mediastinum`, `bone`, `brain` for CT. Without it the image is normalised
    /// so that 1 % of the values shown are black and 1 % white.
    #[arg(long, allow_hyphen_values = true)]
    window: Option<String>,
    /// A label map, drawn as coloured outlines where it is in space; without --at, --slice and --montage the planes go
    /// where there is most of it.
    #[arg(long)]
    labels: Option<PathBuf>,
    /// A report (findings.json), its findings drawn as boxes; the planes go through the first of them.
    #[arg(long)]
    findings: Option<PathBuf>,
    /// Written above the picture [default: the modality and the name of the image].
    #[arg(long)]
    title: Option<String>,
    /// Pixels along the longest side of a slice.
    #[arg(long, default_value_t = 512)]
    size: usize,
    /// Draw in the terminal: as it can, or as said.
    #[arg(long, value_enum, num_args = 0..=1, default_missing_value = "auto")]
    terminal: Option<TerminalName>,
    /// Print one JSON object: the cuts, the window, the scale.
    #[arg(long, conflicts_with = "terminal")]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum PlaneName {
    Axial,
    Coronal,
    Sagittal,
}

impl From<PlaneName> for Plane {
    fn from(name: PlaneName) -> Self {
        match name {
            PlaneName::Axial => Self::Axial,
            PlaneName::Coronal => Self::Coronal,
            PlaneName::Sagittal => Self::Sagittal,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum TerminalName {
    /// What the terminal is known to show.
    Auto,
    /// Kitty's graphics protocol.
    Kitty,
    /// Sixel graphics.
    Sixel,
    /// Coloured half blocks.
    Blocks,
}

/// Slices in a montage: more are too small to see anything in.
const MONTAGE_MAX: usize = 400;

/// A report is text of a few kilobytes for each finding; a larger file is something else.
const REPORT_BYTES_MAX: u64 = 64 << 20;

const CAPTION: [u8; 3] = [190, 194, 204];

/// What goes over the cuts.
struct Overlay {
    labels: Option<Labels>,
    findings: Vec<Finding>,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    if !(16..=4096).contains(&arguments.size) {
        return Err(Failure::usage("--size: 16 to 4096 pixels"));
    }
    let at: Option<[f64; 3]> = match arguments.at[..] {
        [] => None,
        [x, y, z] if [x, y, z].iter().all(|v| v.is_finite()) => Some([x, y, z]),
        _ => return Err(Failure::usage("--at: three numbers, L,P,H in millimetres")),
    };
    let told = open_told(&arguments.input)?;
    let (volume, modality, placed) = (&told.volume, told.modality(), told.placed);
    let overlay = Overlay {
        labels: arguments.labels.as_deref().map(read_labels).transpose()?,
        findings: arguments.findings.as_deref().map(read_findings).transpose()?.unwrap_or_default(),
    };
    let no_place = overlay.findings.iter().filter(|finding| finding.centroid_lps_mm.is_none() || !placed).count();
    if no_place > 0 {
        eprintln!("scanside: {no_place} findings have no place in patient space and are not drawn");
    }
    let cuts = cuts(&arguments, volume, placed, at, &overlay)?;
    let values: Vec<_> = cuts.iter().map(|cut| cut.read(volume)).collect();
    let window = match &arguments.window {
        Some(text) => parse_window(text)?,
        None => robust_window(values.iter().flatten(), 0.01),
    };
    let longest = |cut: &Cut| {
        let (size, spacing) = (cut.size(), cut.spacing_mm());
        (size[0] as f64 * spacing[0]).max(size[1] as f64 * spacing[1])
    };
    // One scale for all, so that lengths compare between them.
    let side = if arguments.montage.is_some() { (4096 / columns_of(cuts.len())).min(arguments.size) } else { arguments.size };
    let pixel_mm = cuts.iter().map(longest).fold(0.0, f64::max) / side as f64;
    let mut drawn = BTreeSet::new();
    let panels: Vec<Picture> = cuts
        .iter()
        .zip(&values)
        .map(|(cut, values)| {
            let mut picture = cut.grey(values, window, pixel_mm);
            if let Some(labels) = &overlay.labels {
                cut.outline_labels(&mut picture, labels, pixel_mm, &mut drawn);
            }
            panel(cut, picture, &overlay, placed, pixel_mm, arguments.montage.is_some())
        })
        .collect();
    let picture = sheet(&title(&arguments, modality), &panels, placed, window, &drawn);
    if let Some(path) = &arguments.out {
        let mut png = Vec::new();
        picture.write_png(&mut png).map_err(Failure::impossible)?;
        write_file(path, &png)?;
    }
    if arguments.json {
        let cuts: Vec<_> = cuts.iter().map(|cut| json!({"plane": if placed { plane_of(cut) } else { "frame" }, "slice": cut.index(), "of": cut.cuts()})).collect();
        return print_json(&json!({
            "input": arguments.input,
            "out": arguments.out,
            "cuts": cuts,
            "window": window,
            "pixel_mm": pixel_mm,
            "labels": drawn,
            "pixels": [picture.height(), picture.width()],
        }));
    }
    match arguments.terminal {
        Some(way) => print(&draw(way, &picture)?),
        None => Ok(()),
    }
}

fn cuts(
    arguments: &Arguments,
    volume: &Volume,
    placed: bool,
    at: Option<[f64; 3]>,
    overlay: &Overlay,
) -> Result<Vec<Cut>, Failure> {
    let grid = volume.grid();
    if grid.voxels() == 0 {
        return Err(Failure::impossible(format!("{}: the image has no voxels", arguments.input.display())));
    }
    let plane = arguments.plane.map(Plane::from);
    if !placed && (plane.is_some() || at.is_some()) {
        let text = "frames without a place in patient space have no planes and no --at; --slice and --montage choose frames";
        return Err(Failure::impossible(format!("{}: {text}", arguments.input.display())));
    }
    let one = Cut::new(grid, plane.unwrap_or(Plane::Axial));
    if let Some(count) = arguments.montage {
        if !(1..=MONTAGE_MAX).contains(&count) {
            return Err(Failure::usage(format!("--montage: 1 to {MONTAGE_MAX} slices")));
        }
        let count = count.min(one.cuts());
        return Ok((0..count).map(|n| one.at((2 * n + 1) * one.cuts() / (2 * count))).collect());
    }
    if let Some(index) = arguments.slice {
        if index >= one.cuts() {
            return Err(Failure::usage(format!("--slice {index}: the image has {} slices, numbered from 0", one.cuts())));
        }
        return Ok(vec![one.at(index)]);
    }
    if !placed {
        return Ok(vec![one.at(one.cuts() / 2)]);
    }
    let found = || overlay.findings.iter().find_map(|f| f.centroid_lps_mm);
    let place = at.or_else(found).or_else(|| overlay.labels.as_ref().and_then(Labels::fullest_lps_mm));
    let through = |cut: Cut| place.map_or(cut, |place| cut.through(place));
    // An image of one slice has one plane worth seeing: the one it was taken in.
    let flat = grid.shape.contains(&1);
    Ok(match plane {
        Some(_) => vec![through(one)],
        None => {
            let all = [Plane::Axial, Plane::Coronal, Plane::Sagittal].map(|plane| through(Cut::new(grid, plane)));
            let seen: Vec<Cut> = all.iter().copied().filter(|cut| !flat || cut.size().iter().all(|n| *n > 1)).collect();
            if seen.is_empty() { vec![one] } else { seen }
        }
    })
}

fn plane_of(cut: &Cut) -> &'static str {
    let grid = cut.grid();
    let same = |plane: &Plane| Cut::new(grid, *plane).at(cut.index()) == *cut;
    [Plane::Axial, Plane::Coronal, Plane::Sagittal].iter().find(|p| same(p)).map_or("slice", |p| p.name())
}

/// A cut with everything over it.
fn panel(cut: &Cut, mut picture: Picture, overlay: &Overlay, placed: bool, pixel_mm: f64, small: bool) -> Picture {
    for finding in overlay.findings.iter().filter(|_| placed) {
        let Some((centre_mm, long_mm)) = finding.centroid_lps_mm.zip(finding.long_axis_mm) else { continue };
        let radius_mm = long_mm.max(1.0) / 2.0;
        let (place, far_mm) = cut.from_lps(centre_mm);
        if far_mm <= radius_mm {
            let [x, y] = cut.to_pixel(place, pixel_mm);
            // A little air between the lesion and its box.
            let half = radius_mm / pixel_mm + 3.0;
            let colour = label_colour(3);
            picture.outline([x - half, y - half], [x + half, y + half], colour);
            let text = format!("{} {}", finding.id, finding.kind);
            picture.text((x - half) as i64, (y - half) as i64 - text_height(1) as i64 - 3, 1, colour, &text);
        }
    }
    if placed {
        let [right, down] = cut.directions();
        mark_sides(&mut picture, right, down);
    }
    let caption = match (small, placed) {
        (true, _) => cut.index().to_string(),
        (false, true) => format!("{} {} of {}", plane_of(cut), cut.index(), cut.cuts()),
        (false, false) => format!("frame {} of {}", cut.index(), cut.cuts()),
    };
    picture.text(4, 4, 1, CAPTION, &caption);
    picture
}

fn columns_of(panels: usize) -> usize {
    if panels <= 3 { panels.max(1) } else { (panels as f64).sqrt().ceil() as usize }
}

/// What is written above: what is asked, else what it is and what it is called.
fn title(arguments: &Arguments, modality: Option<Modality>) -> String {
    let name = arguments.input.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let told = modality.map_or_else(|| name.clone(), |modality| format!("{}  {name}", modality.term()));
    arguments.title.clone().unwrap_or(told)
}

/// All panels on one sheet, with title and convention.
fn sheet(title: &str, panels: &[Picture], placed: bool, [low, high]: [f32; 2], drawn: &BTreeSet<i32>) -> Picture {
    const PAPER: [u8; 3] = [16, 17, 21];
    const GAP: usize = 6;
    let columns = columns_of(panels.len());
    let cell = [panels.iter().map(Picture::width).max(), panels.iter().map(Picture::height).max()].map(|n| n.unwrap_or(1));
    let scale = if cell[0] * columns >= 480 { 2 } else { 1 };
    let head = text_height(scale) + 14;
    let convention = match placed {
        true => "radiological convention: the patient's R on the left, sagittal cuts seen from the left",
        false => "no place in patient space: the sides are not known",
    };
    let foot = format!("{convention}   grey {low} to {high}");
    let foot_height = text_height(1) + 10;
    let width = (columns * (cell[0] + GAP) + GAP).max(text_width(&foot, 1) + 16);
    let rows = panels.len().div_ceil(columns);
    let mut sheet = Picture::new(width, head + rows * (cell[1] + GAP) + foot_height, PAPER);
    let room = (width.saturating_sub(16) / text_width("mm", scale).max(1)) * 2;
    let title: String = title.chars().take(room).collect();
    sheet.text(8, 7, scale, WHITE, &title);
    for (n, panel) in panels.iter().enumerate() {
        let left = GAP + (n % columns) * (cell[0] + GAP) + (cell[0] - panel.width()) / 2;
        let top = head + (n / columns) * (cell[1] + GAP) + (cell[1] - panel.height()) / 2;
        sheet.paste(left, top, panel);
    }
    let y = (sheet.height() - foot_height + 3) as i64;
    sheet.text(8, y, 1, CAPTION, &foot);
    let mut x = 8 + text_width(&foot, 1) as i64;
    for label in drawn {
        // As many as there is room for; the others have their outlines all the same.
        let text = format!("   label {label}");
        if x + text_width(&text, 1) as i64 + 8 > sheet.width() as i64 {
            break;
        }
        sheet.text(x, y, 1, label_colour(*label), &text);
        x += text_width(&text, 1) as i64;
    }
    sheet
}

fn parse_window(text: &str) -> Result<[f32; 2], Failure> {
    let bad = || Failure::usage(format!("--window {text}: LOW,HIGH, or lung, mediastinum, bone or brain"));
    Ok(match text {
        "lung" => [-1350.0, 150.0],
        "mediastinum" => [-160.0, 240.0],
        "bone" => [-500.0, 1300.0],
        "brain" => [0.0, 80.0],
        _ => {
            let (low, high) = text.split_once(',').ok_or_else(bad)?;
            let number = |t: &str| t.trim().parse::<f32>().ok().filter(|v| v.is_finite()).ok_or_else(bad);
            let (low, high) = (number(low)?, number(high)?);
            if low >= high {
                return Err(Failure::usage(format!("--window {text}: LOW must be below HIGH")));
            }
            [low, high]
        }
    })
}

fn read_labels(path: &Path) -> Result<Labels, Failure> {
    let volume = open_volume(path)?;
    Labels::new(&volume).ok_or_else(|| Failure::impossible(format!("{}: not a label map: its values are not whole", path.display())))
}

/// The part of a report that is drawn.
#[derive(Deserialize)]
struct Drawn {
    findings: Vec<Finding>,
}

fn read_findings(path: &Path) -> Result<Vec<Finding>, Failure> {
    let named = |error: &dyn std::fmt::Display| Failure::impossible(format!("{}: {error}", path.display()));
    let bytes = std::fs::metadata(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?.len();
    if bytes > REPORT_BYTES_MAX {
        return Err(named(&"too large for a report"));
    }
    let text = std::fs::read(path).map_err(|e| named(&e))?;
    let drawn: Drawn = serde_json::from_slice(&text).map_err(|e| named(&e))?;
    Ok(drawn.findings)
}

fn draw(way: TerminalName, picture: &Picture) -> Result<String, Failure> {
    let way = match way {
        TerminalName::Auto => known_terminal(),
        other => other,
    };
    let columns = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(80, |size| usize::from(size.ws_col).max(20));
    Ok(match way {
        TerminalName::Kitty => terminal::kitty(picture).map_err(Failure::impossible)?,
        TerminalName::Sixel => terminal::sixel(picture),
        TerminalName::Blocks | TerminalName::Auto => terminal::half_blocks(picture, columns),
    })
}

/// What the terminal shows, by the names terminals give themselves. Half blocks when in doubt: they show anywhere, and
/// asking the terminal itself would swallow what is typed meanwhile.
fn known_terminal() -> TerminalName {
    let variable = |name: &str| std::env::var(name).unwrap_or_default().to_lowercase();
    let (term, program) = (variable("TERM"), variable("TERM_PROGRAM"));
    if !std::io::stdout().is_terminal() || !variable("TMUX").is_empty() {
        TerminalName::Blocks
    } else if term.contains("kitty") || !variable("KITTY_WINDOW_ID").is_empty() || ["ghostty", "wezterm"].contains(&program.as_str()) {
        TerminalName::Kitty
    } else if ["sixel", "mlterm", "foot", "yaft"].iter().any(|name| term.contains(name)) || program.contains("iterm") {
        TerminalName::Sixel
    } else {
        TerminalName::Blocks
    }
}
