//! An ultrasound cine that nobody has: speckled tissue under a hand that drifts and rocks, with lesions of known outline.
//!
//! Scatterers are a fixed field of noise that belongs to the tissue, so speckle moves with it; rocking mixes in another
//! field and cuts each lesion, a ball flattened, at another height. Frame `k` is a pure function of the options and `k`.

use libm::{cos, exp, hypot, log10, pow, sin};
use serde::Serialize;

use crate::dicom::build::{BuildError, SeriesTemplate, SliceTemplate};
use crate::dicom::{TransferSyntax, UltrasoundRegion, tags};
use crate::study::{Modality, Uid};
use crate::volume::{Rescale, VoxelType};

/// Rows and columns of a frame.
pub const SIZE: [usize; 2] = [256, 256];

/// The field within the frame: `[top, left, bottom, right]`, the last ones excluded. Writing and a grey scale stand outside.
pub const FIELD: [usize; 4] = [20, 16, 248, 232];

/// Distance of rows and of columns.
pub const PIXEL_MM: f64 = 0.2;

/// What cine to draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CineOptions {
    /// Another number is another patient.
    pub seed: u64,
    /// Frames.
    pub frames: usize,
    /// Lesions, at most 3.
    pub lesions: usize,
    /// Time between frames.
    pub frame_time_ms: f64,
    /// Whether the hand moves; still frames differ in nothing but noise.
    pub moving: bool,
}

impl Default for CineOptions {
    fn default() -> Self {
        Self { seed: 1, frames: 90, lesions: 2, frame_time_ms: 33.0, moving: true }
    }
}

/// A lesion as it was drawn in one frame.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LesionTruth {
    /// Number of the lesion, from 1.
    pub lesion: usize,
    /// Centre in pixels: `[column, row]`.
    pub centre: [f64; 2],
    /// Longest diameter, along the rows' direction.
    pub long_axis_mm: f64,
    /// Diameter down the columns.
    pub short_axis_mm: f64,
    /// Of the ellipse.
    pub area_mm2: f64,
}

/// The drawn cine.
#[derive(Debug, Clone)]
pub struct Cine {
    options: CineOptions,
    lesions: Vec<Ball>,
    layers: Vec<Layer>,
    vessel: Vessel,
    shadow: f64,
    phases: [f64; 6],
}

/// A lesion: place in tissue, half axes, contrast in dB.
#[derive(Debug, Clone, Copy)]
struct Ball {
    x: f64,
    y: f64,
    a: f64,
    b: f64,
    db: f64,
}

#[derive(Debug, Clone, Copy)]
struct Layer {
    row: f64,
    db: f64,
    bend: f64,
}

#[derive(Debug, Clone, Copy)]
struct Vessel {
    row: f64,
    half: f64,
    slope: f64,
}

/// A number between 0 and 1 that belongs to a seed and a place.
fn hashed(seed: u64, a: i64, b: i64) -> f64 {
    let mut h = seed ^ (a as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (b as u64).wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
    h = (h ^ (h >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((h ^ (h >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Nearly normal: the sum of four, which speckle cannot tell from a true one after the pulse has summed dozens.
fn normal(seed: u64, a: i64, b: i64) -> f32 {
    let sum: f64 = (0..4).map(|n| hashed(seed.wrapping_add(n * 7919), a, b)).sum();
    ((sum - 2.0) * 1.732) as f32
}

/// A mark that is drawn beside the field in every frame.
const MARKS: [[usize; 4]; 3] = [[4, 20, 10, 120], [30, 240, 200, 248], [250, 60, 254, 180]];

impl Cine {
    /// A cine.
    pub fn new(options: CineOptions) -> Self {
        let draw = |n: i64, low: f64, high: f64| low + (high - low) * hashed(options.seed, n, -1);
        let (height, width) = ((FIELD[2] - FIELD[0]) as f64, (FIELD[3] - FIELD[1]) as f64);
        let lesions = options.lesions.min(3);
        let balls = (0..lesions).map(|n| {
            let k = 10 * n as i64 + 100;
            // Side by side, so that none covers another whatever the hand does.
            let slot = width / lesions as f64;
            let a = draw(k, 0.16, 0.26).min(0.4) * slot.min(90.0) + 4.0;
            Ball {
                x: FIELD[1] as f64 + slot * (n as f64 + 0.5) + draw(k + 1, -0.08, 0.08) * slot,
                y: FIELD[0] as f64 + height * draw(k + 2, 0.32, 0.68),
                a,
                b: a * draw(k + 3, 0.65, 0.95),
                db: -draw(k + 4, 10.0, 16.0),
            }
        });
        let layers = (0..4).map(|n| Layer { row: height * (0.12 + 0.25 * n as f64 + draw(200 + n, -0.05, 0.05)), db: draw(210 + n, -4.0, 3.0), bend: draw(220 + n, -8.0, 8.0) });
        Self {
            options,
            lesions: balls.collect(),
            layers: layers.collect(),
            vessel: Vessel { row: height * draw(300, 0.84, 0.92), half: draw(301, 3.0, 6.0), slope: draw(302, -0.06, 0.06) },
            shadow: draw(303, 0.0, 1.0),
            phases: [0, 1, 2, 3, 4, 5].map(|n| draw(310 + n, 0.0, std::f64::consts::TAU)),
        }
    }

    /// What was asked for.
    pub fn options(&self) -> &CineOptions {
        &self.options
    }

    /// Where the tissue has moved to in frame `k`, `[x, y]` in pixels, and how far the plane is from the lesions' middles, as a
    /// share of their half height.
    fn pose(&self, k: usize) -> ([f64; 2], f64) {
        if !self.options.moving {
            return ([0.0; 2], 0.0);
        }
        let t = k as f64 / 30.0;
        let [a, b, c, d, ..] = self.phases;
        let x = 9.0 * (sin(0.9 * t + a) - sin(a)) + 2.0 * (sin(4.1 * t + b) - sin(b));
        let y = 5.0 * (sin(0.7 * t + c) - sin(c));
        // Slow rocking, that at its ends takes the plane almost off the lesion.
        (([x, y]), 0.9 * sin(0.8 * t + d))
    }

    /// How much the contact dims a frame, dB: now and then the transducer lifts for a moment.
    fn dropout_db(&self, k: usize) -> f64 {
        if !self.options.moving {
            return 0.0;
        }
        let period = 97;
        let at = (k + (self.phases[4] * 100.0) as usize) % period;
        if (60..66).contains(&at) { -45.0 } else { 0.0 }
    }

    /// The lesions of frame `k`; one that the plane has left, or that contact hides, is not in it.
    pub fn truth(&self, k: usize) -> Vec<LesionTruth> {
        let ([x, y], lift) = self.pose(k);
        if self.dropout_db(k) < 0.0 {
            return Vec::new();
        }
        let cut = (1.0 - lift * lift).max(0.0).sqrt();
        let lesions = self.lesions.iter().enumerate().map(|(n, ball)| {
            let [long, short] = [ball.a, ball.b].map(|half| 2.0 * half * cut * PIXEL_MM);
            LesionTruth {
                lesion: n + 1,
                centre: [ball.x + x, ball.y + y],
                long_axis_mm: long,
                short_axis_mm: short,
                area_mm2: std::f64::consts::PI / 4.0 * long * short,
            }
        });
        lesions.collect()
    }

    /// Draws frame `k`, grey, row by row.
    ///
    /// # Panics
    /// When `out` is not one frame long.
    pub fn draw(&self, k: usize, out: &mut [u8]) {
        let [rows, columns] = SIZE;
        assert_eq!(out.len(), rows * columns, "one frame");
        let [top, left, bottom, right] = FIELD;
        let (height, width) = (bottom - top, right - left);
        let (shift, lift) = self.pose(k);
        let whole = shift.map(|v| v.round() as i64);
        let [real, imaginary] = [1u64, 2].map(|part| self.scatterers(part, whole, lift));
        let amplitude = self.amplitude(shift, lift);
        let seen = |field: Vec<f32>| {
            let weighted: Vec<f32> = field.iter().zip(&amplitude).map(|(v, a)| v * a).collect();
            pulse(&weighted, height, width)
        };
        let (real, imaginary) = (seen(real), seen(imaginary));
        out.fill(0);
        let dim = self.dropout_db(k);
        for j in 0..height {
            let gain = dim - 6.0 * j as f64 / height as f64;
            for i in 0..width {
                let n = j * width + i;
                let power = f64::from(real[n] * real[n] + imaginary[n] * imaginary[n]) * pow(10.0, (gain + self.shadow_db(j, i)) / 10.0);
                let floor = 3e-5 * (0.5 + hashed(self.options.seed ^ 77, (k * height + j) as i64, i as i64));
                let db = 10.0 * log10(power + floor);
                out[(top + j) * columns + left + i] = ((db / 52.0 + 0.62).clamp(0.0, 1.0) * 255.0) as u8;
            }
        }
        for [t, l, b, r] in MARKS {
            for j in t..b {
                // Strokes, as writing has; the upright one is a grey scale.
                for i in (l..r).filter(|i| r - l < 20 || i % 7 < 4) {
                    out[j * columns + i] = if r - l < 20 { 255 - ((j - t) * 220 / (b - t)) as u8 } else { 220 };
                }
            }
        }
    }

    /// The noise that belongs to the tissue, seen at the nearest whole pixel; the plane's height mixes two fields.
    fn scatterers(&self, part: u64, shift: [i64; 2], lift: f64) -> Vec<f32> {
        let [top, left, bottom, right] = FIELD.map(|v| v as i64);
        let layer = (lift * 6.0).floor();
        let turn = (lift * 6.0 - layer) * std::f64::consts::FRAC_PI_2;
        let (near, far) = (sin(turn) as f32, cos(turn) as f32);
        let seed = |layer: i64| self.options.seed.wrapping_mul(1000) ^ (part << 40) ^ ((layer + 50) as u64) << 20;
        let (low, high) = (seed(layer as i64), seed(layer as i64 + 1));
        let mut out = Vec::with_capacity(((bottom - top) * (right - left)) as usize);
        for j in top..bottom {
            for i in left..right {
                let (x, y) = (i - shift[0], j - shift[1]);
                out.push(far * normal(low, x, y) + near * normal(high, x, y));
            }
        }
        out
    }

    fn amplitude(&self, shift: [f64; 2], lift: f64) -> Vec<f32> {
        let [top, left, bottom, right] = FIELD;
        let cut = (1.0 - lift * lift).max(0.0).sqrt();
        let mut out = Vec::with_capacity((bottom - top) * (right - left));
        for j in top..bottom {
            for i in left..right {
                let (x, y) = (i as f64 - shift[0], j as f64 - shift[1]);
                let row = y - top as f64;
                let mut db = 0.0;
                for layer in &self.layers {
                    let edge = row - layer.row - layer.bend * sin(x / 45.0 + self.phases[5]);
                    db += layer.db / (1.0 + exp(-edge / 1.5)) + 11.0 * exp(-0.5 * (edge / 1.6) * (edge / 1.6));
                }
                let tube = (row - self.vessel.row - self.vessel.slope * x).abs() - self.vessel.half;
                db -= 32.0 / (1.0 + exp(tube / 0.6));
                for ball in &self.lesions {
                    let (a, b) = (ball.a * cut, ball.b * cut);
                    let level = hypot((x - ball.x) / a.max(0.1), (y - ball.y) / b.max(0.1));
                    db += ball.db / (1.0 + exp((level - 1.0) * b / 0.7));
                }
                out.push(pow(10.0, db / 20.0) as f32);
            }
        }
        out
    }

    /// A soft shadow from the skin, which stays with the transducer.
    fn shadow_db(&self, j: usize, i: usize) -> f64 {
        let width = (FIELD[3] - FIELD[1]) as f64;
        let at = if self.shadow < 0.5 { 0.015 } else { 0.985 } * width;
        let far = (i as f64 - at).abs() / 9.0;
        -18.0 * exp(-0.5 * far * far) * (j as f64 / 40.0).min(1.0)
    }

    /// The cine as one multi-frame DICOM file with its Region Calibration (PS3.3 C.8.5.5); `syntax` is explicit little endian or RLE.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn file(&self, syntax: &TransferSyntax, calibrated: bool) -> Result<Vec<u8>, BuildError> {
        let [rows, columns] = SIZE;
        let mut pixels = vec![vec![0u8; rows * columns]; self.options.frames];
        pixels.iter_mut().enumerate().for_each(|(k, frame)| self.draw(k, frame));
        let slices: Vec<SliceTemplate<'_>> = pixels
            .iter()
            .map(|pixels| SliceTemplate { number: 1, plane: None, rescale: Rescale::IDENTITY, image_type: "DERIVED\\SECONDARY", pixels })
            .collect();
        let uid = |what: &str| Uid::derived(format!("ultrasound phantom {:?} {calibrated} {what}", self.options).as_bytes());
        let region = UltrasoundRegion {
            spatial_format: 1,
            box_pixels: [FIELD[1] as u32, FIELD[0] as u32, FIELD[3] as u32 - 1, FIELD[2] as u32 - 1],
            spacing_mm: Some([PIXEL_MM; 2]),
        };
        let template = SeriesTemplate {
            modality: Modality::Us,
            study: uid("study"),
            series: uid("series"),
            frame_of_reference: uid("frame of reference"),
            patient_name: "Phantom^Ultrasound".into(),
            patient_id: format!("PHANTOM-US-{}", self.options.seed),
            description: "Ultrasound phantom, no patient".into(),
            date_time: ["20260101".into(), "120000".into()],
            series_number: 1,
            size: SIZE,
            voxel: VoxelType::U8,
            bits_stored: 8,
            thickness_mm: 1.0,
            window: None,
            regions: if calibrated { vec![region] } else { Vec::new() },
            more: vec![(tags::FRAME_TIME, *b"DS", format!("{:.3}", self.options.frame_time_ms))],
        };
        template.multi_frame(&slices, syntax)
    }
}

/// Taps of a Gaussian.
fn taps(sigma: f32) -> Vec<f32> {
    let reach = (3.0 * sigma).ceil() as i32;
    let weights: Vec<f32> = (-reach..=reach).map(|n| libm::expf(-0.5 * (n as f32 / sigma) * (n as f32 / sigma))).collect();
    // Equal power whatever the width: speckle keeps its brightness with depth.
    let power = weights.iter().map(|w| w * w).sum::<f32>().sqrt();
    weights.into_iter().map(|w| w / power).collect()
}

/// The pulse: short along the beam, and across it as wide as the beam is at that depth.
fn pulse(field: &[f32], height: usize, width: usize) -> Vec<f32> {
    let along = taps(1.0);
    let reach = along.len() / 2;
    let mut deep = vec![0f32; field.len()];
    for (j, row) in deep.chunks_exact_mut(width).enumerate() {
        for (t, weight) in along.iter().enumerate() {
            let Some(from) = (j + t).checked_sub(reach).filter(|from| *from < height) else { continue };
            row.iter_mut().zip(&field[from * width..]).for_each(|(o, v)| *o += weight * v);
        }
    }
    let mut out = vec![0f32; field.len()];
    let mut padded = Vec::new();
    for (j, row) in out.chunks_exact_mut(width).enumerate() {
        let off = (j as f32 - 0.5 * height as f32) / (0.5 * height as f32);
        let across = taps(1.3 + 0.9 * off * off);
        let reach = across.len() / 2;
        padded.clear();
        padded.resize(width + 2 * reach, 0f32);
        padded[reach..reach + width].copy_from_slice(&deep[j * width..(j + 1) * width]);
        for (t, weight) in across.iter().enumerate() {
            row.iter_mut().zip(&padded[t..]).for_each(|(o, v)| *o += weight * v);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_the_same_every_time_and_the_next_one_another() {
        let cine = Cine::new(CineOptions::default());
        let mut frames = vec![vec![0u8; SIZE[0] * SIZE[1]]; 3];
        cine.draw(5, &mut frames[0]);
        cine.draw(5, &mut frames[1]);
        cine.draw(6, &mut frames[2]);
        assert!(frames[0] == frames[1] && frames[0] != frames[2]);
    }

    #[test]
    fn a_lesion_is_darker_than_what_is_round_it() {
        let cine = Cine::new(CineOptions { lesions: 1, moving: false, ..CineOptions::default() });
        let mut frame = vec![0u8; SIZE[0] * SIZE[1]];
        cine.draw(0, &mut frame);
        let truth = cine.truth(0)[0];
        let half = truth.short_axis_mm / PIXEL_MM / 2.0;
        let mean = |low: f64, high: f64| {
            let (mut sum, mut count) = (0.0, 0.0);
            for j in FIELD[0]..FIELD[2] {
                for i in FIELD[1]..FIELD[3] {
                    let far = hypot(i as f64 - truth.centre[0], j as f64 - truth.centre[1]) / half;
                    if (low..high).contains(&far) {
                        sum += f64::from(frame[j * SIZE[1] + i]);
                        count += 1.0;
                    }
                }
            }
            sum / count
        };
        assert!(mean(0.0, 0.7) + 25.0 < mean(1.6, 2.0), "{} {}", mean(0.0, 0.7), mean(1.6, 2.0));
    }
}
