//! Ultrasound: focal lesions in the frames of a cine or a live stream, measured in each frame and followed through all.
//!
//! ```text
//! frame -> field (without writing and marks) -> network -> outlines -> tracks -> findings
//! ```
//! A [`Reader`] takes one frame after the other and knows nothing of clocks: a cine from a file and the same frames from a
//! live stream give the same findings.

pub mod outline;
pub mod sector;
pub mod track;

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::{Array3, ArrayD, ArrayViewMut2, IxDyn};

use self::outline::Outline;
use self::sector::{Box2, LEARN_FRAMES, Sector};
use self::track::{DETECTIONS_MAX, Detection, Track, Tracker};
use super::attempt::{Attempt, AttemptError};
use super::registry::Work;
use super::{Clock, ExamError, ExamOutcome, LabelMap, Progress, sigmoid};
use crate::finding::{Finding, InPixels, Measurement, OverTime, Site};
use crate::imaging::components::{Connectivity, label};
use crate::imaging::morphology::{self, Element, Outside, Shape};
use crate::infer::engine::{EngineError, Network, Session};
use crate::infer::grid::{Filling, Line, Weights, resample_plane};
use crate::infer::package::{ModelId, Models, Package, PackageError};
use crate::pool::Pool;
use crate::series::{Assembled, Planar};
use crate::study::{Rejection, RejectionCode, Uid};
use crate::volume::Volume;

/// Findings of one report: a reader needs the first few, a label map has 255 values.
const FINDINGS_MAX: usize = 50;

/// Pixels along a side of a frame: what machines export, with room. Sizes every buffer of a reader.
pub const SIDE_MAX: usize = 4096;

/// The ultrasound exam with its model package.
pub struct Ultrasound {
    package: Package,
    network: Network,
}

/// What the frames of one clip have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipHeader {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Distance of rows and columns; None where nothing says it, and everything is measured in pixels then.
    pub spacing_mm: Option<[f64; 2]>,
    /// The part that is an image, `[top, left, bottom, right]`, the last ones excluded.
    pub region: Option<Box2>,
}

impl ClipHeader {
    /// The clip of a frame of a series.
    pub fn of(size: [usize; 2], planar: Planar) -> Self {
        let [rows, columns] = size;
        let region = planar.region.map(|[left, top, right, bottom]| {
            let past = |v: u32, most: usize| (v as usize).saturating_add(1).min(most);
            let empty = right <= left || bottom <= top;
            let first = |v: u32, most: usize| (v as usize).min(most);
            if empty { [0; 4] } else { [first(top, rows), first(left, columns), past(bottom, rows), past(right, columns)] }
        });
        let fits = |mm: &[f64; 2]| mm.iter().all(|v| v.is_finite() && (1e-3..=100.0).contains(v));
        Self { rows, columns, spacing_mm: planar.spacing_mm.filter(fits), region }
    }
}

/// One lesion in the frame just read.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Seen {
    /// Its identity in this stream.
    pub track: u32,
    /// 0 to 1.
    pub confidence: f64,
    /// Its centre in pixels of the frame: `[column, row]`.
    pub centre: [f64; 2],
    /// Longest diameter of the smoothed outline, in `unit`.
    pub long_axis: f64,
    /// Longest diameter perpendicular to it.
    pub short_axis: f64,
    /// Area within, in `unit` squared.
    pub area: f64,
    /// `mm`, or `px` where the frame is not calibrated.
    pub unit: &'static str,
}

impl Ultrasound {
    /// Name of the exam in reports and on the command line.
    pub const NAME: &'static str = "ultrasound";

    /// Loads the package `us-lesion`.
    ///
    /// # Errors
    /// [`PackageError`]; also for a network that is not one map of square frames.
    pub fn load(models: &Models) -> Result<Self, PackageError> {
        let (package, network) = models.network("us-lesion")?;
        let square = matches!(network.input_shapes(), [shape] if matches!(shape[..], [1, 1, h, w] if h == w));
        if !square || network.output_shapes() != network.input_shapes() {
            let why = "one map of logits of a square frame is wanted".to_owned();
            return Err(PackageError::Mismatch { package: package.id().name.clone(), why });
        }
        Ok(Self { package, network })
    }

    /// The package.
    pub fn model(&self) -> &ModelId {
        self.package.id()
    }

    /// Bytes of memory the network holds, for the plan of a board.
    pub fn network_bytes(&self) -> usize {
        self.network.arena_bytes()
    }

    /// Reads the frames of one stream or series.
    ///
    /// # Errors
    /// [`EngineError`] when there is no room for a session.
    pub fn reader(&self) -> Result<Reader<'_>, EngineError> {
        let shape = IxDyn(&self.network.input_shapes()[0]);
        Ok(Reader {
            exam: self,
            session: self.network.session()?,
            side: shape[3],
            input: ArrayD::zeros(shape.clone()),
            logits: vec![ArrayD::zeros(shape)],
            clean: Vec::new(),
            clip: None,
            read: Vec::new(),
            next_id: 1,
            frames: 0,
            with_field: 0,
            seen: Vec::new(),
        })
    }

    /// Reads a whole series: each instance is a clip of its own, since one series holds all views of a study.
    ///
    /// # Errors
    /// [`AttemptError`]; a rejection when no frame shows an ultrasound field.
    pub fn attempt(&self, work: &Work<'_>) -> Result<Attempt, AttemptError> {
        let Work { series, assembled, pool, progress, .. } = *work;
        let mut clock = Clock::start();
        let volume = &assembled.volume;
        let [frames, rows, columns] = volume.shape();
        if rows > SIDE_MAX || columns > SIDE_MAX {
            let text = format!("frames of {rows} x {columns} pixels; at most {SIDE_MAX} on a side are read");
            return Err(ExamError::from(Rejection::new(RejectionCode::TooLarge, text)).into());
        }
        let mut reader = self.reader().map_err(ExamError::from)?;
        let mut greys = Greys::default();
        let mut outlines: Vec<(usize, u32, Outline)> = Vec::new();
        let mut before = None;
        let header_of = |k: usize| ClipHeader::of([rows, columns], assembled.planar.get(k).copied().unwrap_or_default());
        for k in 0..frames {
            progress(Progress { stage: "segment", done: k, total: frames });
            let Some(source) = clip_of(assembled, k) else { continue };
            let header = header_of(k);
            let clip = (source, header);
            if before.as_ref() != Some(&clip) {
                reader.start(header);
                greys = Greys { window: assembled.window, ..Greys::default() };
                before = Some(clip);
            }
            reader.push(k, 0, greys.of(volume, k), pool)?;
            outlines.extend(reader.visible().map(|track| (k, track.id, track.outline.clone())));
            volume.release(k..k + 1);
        }
        let (read, fields) = (reader.frames, reader.with_field);
        if fields == 0 {
            let text = "no frame shows an ultrasound field";
            return Err(ExamError::from(Rejection::new(RejectionCode::WrongContent, text)).into());
        }
        let (findings, ids) = reader.finish(series);
        let spacing: Vec<[f64; 2]> = (0..frames).map(|k| header_of(k).spacing_mm.unwrap_or([1.0; 2])).collect();
        let map = LesionMap::new(outlines, &ids, &spacing, [rows, columns]);
        clock.lap("segment");
        let measurements = [("frames_analysed", read), ("frames_with_field", fields)];
        let outcome = ExamOutcome {
            exam: Self::NAME,
            findings,
            measurements: measurements.map(|(name, n)| (name.to_owned(), Measurement { value: n as f64, unit: "1".into() })).into(),
            labels: vec![Box::new(map)],
            models: vec![self.model().clone()],
            timing_ms: clock.laps,
        };
        Ok(Attempt { outcome, volume: volume.clone(), partial: None })
    }
}

/// What tells the clips of a series apart; None for a frame that is not there.
fn clip_of(assembled: &Assembled, k: usize) -> Option<Option<Uid>> {
    if assembled.verdict.missing_slices.contains(&k) {
        return None;
    }
    Some(assembled.sources.get(k)?.as_ref().map(|source| source.sop_instance.clone()))
}

/// Frames of a volume as grey bytes.
#[derive(Default)]
struct Greys {
    bytes: Vec<u8>,
    values: Vec<f32>,
    window: Option<[f64; 2]>,
    /// Darkest and brightest value, where they are not bytes already; of the clip's first frame.
    range: Option<[f32; 2]>,
}

impl Greys {
    fn of(&mut self, volume: &Volume, k: usize) -> &[u8] {
        self.bytes.clear();
        if let Some(stored) = volume.stored_slice::<u8>(k) {
            self.bytes.extend(stored.iter());
            return &self.bytes;
        }
        let [_, rows, columns] = volume.shape();
        self.values.resize(rows * columns, 0.0);
        volume.read_slice_f32(k, &mut self.values);
        let finite = || self.values.iter().copied().filter(|v| v.is_finite());
        let [low, high] = *self.range.get_or_insert_with(|| match self.window {
            Some([centre, width]) if width > 0.0 => [(centre - width / 2.0) as f32, (centre + width / 2.0) as f32],
            _ => [finite().fold(f32::INFINITY, f32::min).min(0.0), finite().fold(f32::NEG_INFINITY, f32::max)],
        });
        let scale = if high > low { 255.0 / (high - low) } else { 0.0 };
        self.bytes.extend(self.values.iter().map(|v| ((v - low) * scale).clamp(0.0, 255.0) as u8));
        &self.bytes
    }
}

/// Reads frames one by one.
pub struct Reader<'n> {
    exam: &'n Ultrasound,
    session: Session<'n>,
    /// Pixels along a side of what the network sees.
    side: usize,
    input: ArrayD<f32>,
    logits: Vec<ArrayD<f32>>,
    clean: Vec<f32>,
    clip: Option<Clip>,
    /// Lesions of clips that are over.
    read: Vec<(Track, ClipHeader, usize)>,
    next_id: u32,
    frames: usize,
    with_field: usize,
    seen: Vec<Seen>,
}

/// Frames that belong together.
struct Clip {
    header: ClipHeader,
    tracker: Tracker,
    frames: usize,
    field: Option<Field>,
}

/// The field of a clip, and how it is put before the network.
struct Field {
    sector: Sector,
    /// Units (millimetres or pixels) between rows and between columns of the frame.
    unit: [f64; 2],
    /// Place of the network's first pixel, `[x, y]` in units, and the step of its pixels.
    origin: [f64; 2],
    step: f64,
    diagonal: f64,
    across: Weights,
    down: Weights,
    /// Darkest and brightest value of each pixel over the first frames, and how many they are.
    low: Vec<u8>,
    high: Vec<u8>,
    learnt: usize,
}

/// Share of the network's side that the longer side of a field fills, as in training.
const FILLED: f64 = 0.94;

impl Field {
    fn new(sector: Sector, header: &ClipHeader, side: usize) -> Option<Self> {
        let [top, left, bottom, right] = sector.bounds()?;
        let unit = header.spacing_mm.unwrap_or([1.0; 2]);
        let (height, width) = ((bottom - top) as f64 * unit[0], (right - left) as f64 * unit[1]);
        let longer = (height / unit[0]).max(width / unit[1]);
        // A frame that fits as it is, is not interpolated.
        let as_it_is = (unit[0] / unit[1] - 1.0).abs() < 1e-3 && (0.7 * side as f64..=side as f64).contains(&longer);
        let step = if as_it_is { unit[1] } else { height.max(width) / (FILLED * side as f64) };
        let middle = |first: usize, last: usize, unit: f64| (first + last - 1) as f64 / 2.0 * unit;
        let half = (side - 1) as f64 / 2.0;
        let start = |first, last, unit: f64| {
            let start = middle(first, last, unit) - half * step;
            if as_it_is { (start / unit).floor() * unit } else { start }
        };
        let origin = [start(left, right, unit[1]), start(top, bottom, unit[0])];
        let weights = |unit: f64, len: usize, first: f64| {
            Weights::new(Line { first_mm: 0.0, step_mm: unit }, len, Line { first_mm: first, step_mm: step }, side)
        };
        let across = weights(unit[1], header.columns, origin[0]);
        let down = weights(unit[0], header.rows, origin[1]);
        let diagonal = libm::hypot(height, width);
        Some(Self { sector, unit, origin, step, diagonal, across, down, low: Vec::new(), high: Vec::new(), learnt: 0 })
    }

    /// Watches the first frames for what never changes.
    fn learn(&mut self, grey: &[u8]) {
        if self.learnt >= LEARN_FRAMES {
            return;
        }
        if self.learnt == 0 {
            (self.low, self.high) = (grey.to_vec(), grey.to_vec());
        } else {
            for ((low, high), v) in self.low.iter_mut().zip(&mut self.high).zip(grey) {
                (*low, *high) = ((*low).min(*v), (*high).max(*v));
            }
        }
        self.learnt += 1;
        if self.learnt == LEARN_FRAMES {
            self.sector.learn(&self.low, &self.high);
            (self.low, self.high) = (Vec::new(), Vec::new());
        }
    }
}

impl Reader<'_> {
    /// Frames of another clip follow: other size, scale, view. Identities go on counting.
    pub fn start(&mut self, header: ClipHeader) {
        self.close();
        self.clip = Some(Clip { header, tracker: Tracker::starting_at(self.next_id), frames: 0, field: None });
    }

    fn close(&mut self) {
        self.seen.clear();
        if let Some(clip) = self.clip.take() {
            self.next_id = clip.tracker.next_id();
            self.read.extend(clip.tracker.finish().into_iter().map(|track| (track, clip.header, clip.frames)));
        }
    }

    /// Frames read.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// Of these, the frames in which a field was found.
    pub fn frames_with_field(&self) -> usize {
        self.with_field
    }

    /// Reads the next frame of the clip, number `frame` of the whole; `skipped` frames before it were not read.
    ///
    /// # Errors
    /// [`ExamError::Engine`] and [`ExamError::Fault`].
    ///
    /// # Panics
    /// When no clip was started, or the frame is not of the clip's size.
    pub fn push(&mut self, frame: usize, skipped: usize, grey: &[u8], pool: &Pool) -> Result<&[Seen], ExamError> {
        let clip = self.clip.as_mut().expect("a clip is started first");
        assert_eq!(grey.len(), clip.header.rows * clip.header.columns, "a frame of the clip's size");
        self.seen.clear();
        self.frames += 1;
        clip.frames += 1;
        if clip.field.is_none() {
            let ClipHeader { rows, columns, region, .. } = clip.header;
            let sector = Sector::of_frame(grey, rows, columns, region, pool)?;
            clip.field = sector.and_then(|sector| Field::new(sector, &clip.header, self.side));
        }
        let Some(field) = &mut clip.field else {
            clip.tracker.step(frame, skipped, &[], 1.0);
            return Ok(&self.seen);
        };
        self.with_field += 1;
        field.learn(grey);
        field.sector.cleaned(grey, &mut self.clean);
        let side = self.side;
        {
            let plane = self.input.as_slice_mut().expect("made contiguous");
            let mut view = ArrayViewMut2::from_shape((side, side), plane).expect("a square frame");
            let fill = Filling { pad: 0.0, low: 0.0, high: 255.0 };
            resample_plane(&self.clean, clip.header.columns, false, &field.across, &field.down, fill, view.view_mut());
            plane_to_unit(self.input.as_slice_mut().expect("made contiguous"));
        }
        self.session.run_into(pool, &[self.input.view()], &mut self.logits)?;
        let logits = self.logits[0].as_slice().expect("made contiguous");
        let detections = detect(&self.exam.package, logits, side, pool)?;
        let detections: Vec<Detection> = detections
            .into_iter()
            .map(|d| Detection { outline: d.outline.placed(field.origin, field.step), ..d })
            .collect();
        clip.tracker.step(frame, skipped, &detections, field.diagonal);
        let unit = if clip.header.spacing_mm.is_some() { "mm" } else { "px" };
        let [row, column] = field.unit;
        for track in clip.tracker.active().iter().filter(|track| track.is_visible()) {
            let (axes, [x, y]) = (track.outline.axes(), track.outline.centre);
            self.seen.push(Seen {
                track: track.id,
                confidence: track.confidence(),
                centre: [x / column, y / row],
                long_axis: axes.long_mm,
                short_axis: axes.short_mm,
                area: track.outline.area(),
                unit,
            });
        }
        Ok(&self.seen)
    }

    /// Lesions seen in the newest frame, in units of the clip.
    fn visible(&self) -> impl Iterator<Item = &Track> {
        self.clip.iter().flat_map(|clip| clip.tracker.active()).filter(|track| track.is_visible())
    }

    /// What was seen in all frames, most certain first, and the identity behind each finding. `series` makes the tracking
    /// UIDs.
    pub fn finish(mut self, series: &Uid) -> (Vec<Finding>, Vec<u32>) {
        self.close();
        let manifest = &self.exam.package.manifest;
        let least = manifest.threshold("confidence_min", 0.5);
        let seen_min = manifest.threshold("frames_min", 3.0) as usize;
        let mut kept: Vec<(Track, ClipHeader, usize)> = std::mem::take(&mut self.read);
        // A lesion in a single frame of a cine is a flicker; in a single image it is all there is.
        kept.retain(|(track, _, frames)| track.seen >= seen_min.min(*frames) && track.confidence() >= least);
        kept.sort_by(|(a, ..), (b, ..)| b.confidence().total_cmp(&a.confidence()).then(a.id.cmp(&b.id)));
        kept.truncate(FINDINGS_MAX);
        let findings = kept.iter().enumerate().map(|(n, (track, header, _))| finding(n, track, header, series)).collect();
        (findings, kept.iter().map(|(track, ..)| track.id).collect())
    }
}

/// Grey values 0 to 255 as the network wants them, 0 to 1.
fn plane_to_unit(plane: &mut [f32]) {
    plane.iter_mut().for_each(|v| *v /= 255.0);
}

/// Pixels of the network's grid over which pieces are joined.
const GAP_PIXELS: f64 = 3.0;

/// Lesions of one frame, the most certain first, on the network's grid.
fn detect(package: &Package, logits: &[f32], side: usize, pool: &Pool) -> Result<Vec<Detection>, ExamError> {
    let pixels_min = package.manifest.threshold("pixels_min", 16.0) as u64;
    let least = package.manifest.threshold("candidate_min", 0.5);
    let mask = Array3::from_shape_fn((1, side, side), |(_, j, i)| u8::from(logits[j * side + i] > 0.0));
    // A lesion that speckle has broken to pieces is one lesion.
    let gap = Element::new(Shape::Ball, [0.0, GAP_PIXELS, GAP_PIXELS])?;
    let mask = morphology::close(mask.view(), &gap, Outside::Neutral, pool)?;
    let connectivity = Connectivity::from_neighbours(6).expect("a connectivity in three dimensions");
    let components = label(mask.view(), connectivity, pool)?;
    let components = components.retain(|c| c.voxels >= pixels_min);
    if components.list().is_empty() {
        return Ok(Vec::new());
    }
    let labels = components.paint(pool)?;
    let labels = labels.as_slice().expect("made contiguous");
    let mut found: Vec<Detection> = Vec::new();
    for component in components.list() {
        let [_, top, left] = component.first;
        let [_, bottom, right] = component.last;
        let (mut sum, mut pixels) = (0.0, 0);
        for j in top..=bottom {
            for n in (j * side + left..=j * side + right).filter(|n| labels[*n] == component.label && logits[*n] > 0.0) {
                sum += sigmoid(f64::from(logits[n]));
                pixels += 1;
            }
        }
        let confidence = sum / f64::from(pixels);
        if confidence < least {
            continue;
        }
        let [_, y, x] = component.centroid_voxel;
        // Another lesion nearby is no part of this one.
        let pixel = |j: isize, i: isize| -> f32 {
            if j < 0 || i < 0 || j >= side as isize || i >= side as isize {
                return -1.0;
            }
            let n = j as usize * side + i as usize;
            if labels[n] == 0 || labels[n] == component.label { logits[n] } else { -1.0 }
        };
        let level = |y: f64, x: f64| {
            let (j, i) = (y.floor(), x.floor());
            let (v, u) = ((y - j) as f32, (x - i) as f32);
            let (j, i) = (j as isize, i as isize);
            let above = pixel(j, i) * (1.0 - u) + pixel(j, i + 1) * u;
            let below = pixel(j + 1, i) * (1.0 - u) + pixel(j + 1, i + 1) * u;
            above * (1.0 - v) + below * v
        };
        let (height, width) = ((bottom - top + 3) as f64, (right - left + 3) as f64);
        let outline = Outline::trace([x, y], libm::hypot(height, width), level);
        if outline.area() > 0.0 {
            found.push(Detection { outline, confidence });
        }
    }
    found.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
    found.truncate(DETECTIONS_MAX);
    Ok(found)
}

fn finding(n: usize, track: &Track, header: &ClipHeader, series: &Uid) -> Finding {
    let best = &track.best;
    let (axes, area) = (best.outline.axes(), best.outline.area());
    let calibrated = header.spacing_mm.is_some();
    let [row, column] = header.spacing_mm.unwrap_or([1.0; 2]);
    let [x, y] = best.outline.centre;
    let mm = |v: f64| calibrated.then_some(v);
    Finding {
        id: n as u32 + 1,
        tracking_uid: Uid::derived(format!("{series} lesion {}", track.id).as_bytes()),
        kind: "lesion".into(),
        confidence: track.confidence() as f32,
        centroid_lps_mm: None,
        centroid_voxel: [best.frame as f64, y / row, x / column],
        long_axis_mm: mm(axes.long_mm),
        short_axis_mm: mm(axes.short_mm),
        mean_diameter_mm: mm(axes.mean_mm()),
        volume_mm3: None,
        area_mm2: mm(area),
        in_pixels: (!calibrated).then_some(InPixels { long_axis: axes.long_mm, short_axis: axes.short_mm, area }),
        mean_hu: None,
        site: Site { organ: "not stated".into(), laterality: None },
        cine: Some(OverTime {
            best_frame: best.frame,
            first_frame: track.first_frame,
            last_frame: track.last_frame,
            frames_seen: track.seen,
            outline: best.outline.points().map(|[x, y]| [(x / column) as f32, (y / row) as f32]).collect(),
        }),
    }
}

/// Each lesion with the id of its finding, frame by frame.
#[derive(Debug)]
struct LesionMap {
    /// By frame: the finding's id, and its smoothed outline in units.
    frames: BTreeMap<usize, Vec<(u8, Arc<Outline>)>>,
    spacing: Vec<[f64; 2]>,
    size: [usize; 2],
    findings: usize,
}

impl LesionMap {
    fn new(outlines: Vec<(usize, u32, Outline)>, ids: &[u32], spacing: &[[f64; 2]], size: [usize; 2]) -> Self {
        let mut frames: BTreeMap<usize, Vec<(u8, Arc<Outline>)>> = BTreeMap::new();
        for (k, track, outline) in outlines {
            if let Some(n) = ids.iter().position(|id| *id == track) {
                frames.entry(k).or_default().push((n as u8 + 1, Arc::new(outline)));
            }
        }
        Self { frames, spacing: spacing.to_vec(), size, findings: ids.len() }
    }
}

impl LabelMap for LesionMap {
    fn name(&self) -> &str {
        "lesions"
    }

    fn values(&self) -> Vec<(u8, String)> {
        (1..=self.findings).map(|n| (n as u8, format!("lesion {n}"))).collect()
    }

    fn draw(&self, _: &Volume, k: usize, out: &mut [u8]) {
        let [rows, columns] = self.size;
        assert!(k < self.spacing.len() && out.len() == rows * columns);
        out.fill(0);
        let [row, column] = self.spacing[k];
        for (value, outline) in self.frames.get(&k).into_iter().flatten().rev() {
            let reach = f64::from(outline.radii.iter().copied().fold(0.0, f32::max));
            let [x, y] = outline.centre;
            let range = |at: f64, unit: f64, most: usize| {
                let first = ((at - reach) / unit).floor().max(0.0) as usize;
                first..(((at + reach) / unit).ceil().max(0.0) as usize + 1).min(most)
            };
            for j in range(y, row, rows) {
                for i in range(x, column, columns).filter(|i| outline.holds(*i as f64 * column, j as f64 * row)) {
                    out[j * columns + i] = *value;
                }
            }
        }
    }
}

