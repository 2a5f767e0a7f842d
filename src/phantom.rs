//! A chest CT that nobody has: body, ribs, spine, heart, airways, lungs with vessels, and nodules at known places.
//!
//! It stands in for a patient in the demo, the self-test and the tests, so it is drawn to be recognised by networks that
//! learnt from patients: densities, blur, noise and the sites of nodules are those of a CT. Every slice is a pure function
//! of the options and its number, so a phantom of 2,000 slices needs the memory of one. Shapes are built from signed
//! distances in patient millimetres; an edge is as wide as a scanner blurs it.

pub mod brain;
mod series;
pub mod ultrasound;

use libm::sin;
use serde::{Deserialize, Serialize};

use crate::finding::Laterality;
use crate::geometry::{Affine, Grid, Spacing, dot, norm, sub};
use crate::pool::{Fault, Pool};
use crate::volume::{Rescale, Volume, VolumeError};

/// What kind of nodule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoduleKind {
    /// Soft tissue, surrounded by lung.
    Solid,
    /// Denser than lung, lighter than tissue.
    GroundGlass,
    /// Soft tissue on the wall of the chest.
    Juxtapleural,
    /// Soft tissue on the dome of the diaphragm.
    Diaphragm,
}

/// A nodule to be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NoduleWish {
    /// What kind.
    pub kind: NoduleKind,
    /// Of the sphere.
    pub diameter_mm: f64,
}

/// A nodule that was drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NoduleTruth {
    /// Centre of the sphere.
    pub centre_lps_mm: [f64; 3],
    /// Of the sphere.
    pub diameter_mm: f64,
    /// What kind.
    pub kind: NoduleKind,
    /// Which lung.
    pub side: Laterality,
}

/// What phantom to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct PhantomOptions {
    /// `[slices, rows, columns]`.
    pub shape: [usize; 3],
    /// Distance of voxels.
    pub spacing: Spacing,
    /// Another seed is another patient.
    pub seed: u64,
    /// Nodules, the largest placed first.
    pub nodules: Vec<NoduleWish>,
    /// Standard deviation of the noise in soft tissue.
    pub noise_hu: f64,
}

impl Default for PhantomOptions {
    fn default() -> Self {
        use NoduleKind::{Diaphragm, GroundGlass, Juxtapleural, Solid};
        let wishes = [(Solid, 6.0), (Solid, 9.0), (Solid, 14.0), (GroundGlass, 16.0), (Juxtapleural, 11.0), (Diaphragm, 18.0)];
        Self {
            shape: [120, 512, 512],
            spacing: Spacing::new([2.5, 0.7, 0.7]).expect("a usable spacing"),
            seed: 1,
            nodules: wishes.map(|(kind, diameter_mm)| NoduleWish { kind, diameter_mm }).to_vec(),
            noise_hu: 22.0,
        }
    }
}

/// Options that cannot be drawn.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BadPhantom {
    /// Too small to hold a chest, or larger than a study may be.
    #[error("a phantom of {0:?} slices, rows and columns cannot be drawn: at least 8 x 64 x 64, at most 4096 of each")]
    Shape([usize; 3]),
    /// A nodule smaller than a voxel or larger than a lung.
    #[error("a nodule of {0} mm cannot be drawn: 2 to 60 mm are")]
    Diameter(f64),
    /// More nodules than find a place.
    #[error("no room for a {kind:?} nodule of {diameter_mm} mm beside the others")]
    NoRoom {
        /// Which.
        kind: NoduleKind,
        /// Its diameter.
        diameter_mm: f64,
    },
}

const NODULES_MAX: usize = 64;
/// Half-lengths of the chest this anatomy is written for: 360 mm wide, 360 mm of bed.
const FIELD_MM: f64 = 358.0;

// Hounsfield units.
const AIR: f64 = -1000.0;
const FAT: f64 = -95.0;
const MUSCLE: f64 = 50.0;
const BLOOD: f64 = 40.0;
const LIVER: f64 = 58.0;
const LUNG: f64 = -865.0;
const MARROW: f64 = 170.0;
const CORTEX: f64 = 520.0;
const NODULE: f64 = 35.0;
const GROUND_GLASS: f64 = -620.0;

/// A phantom, ready to be drawn slice by slice.
#[derive(Debug, Clone)]
pub struct Phantom {
    grid: Grid,
    seed: u64,
    noise_hu: f64,
    anatomy: Anatomy,
    vessels: Vec<Vessel>,
    truth: Vec<NoduleTruth>,
}

impl Phantom {
    /// Grows the vessels and finds places for the nodules.
    ///
    /// # Errors
    /// [`BadPhantom`].
    pub fn new(options: &PhantomOptions) -> Result<Self, BadPhantom> {
        let [slices, rows, columns] = options.shape;
        if slices < 8 || rows < 64 || columns < 64 || options.shape.iter().any(|n| *n > 4096) {
            return Err(BadPhantom::Shape(options.shape));
        }
        let [sz, sy, sx] = options.spacing.zyx_mm();
        let span = [sx * (columns - 1) as f64, sy * (rows - 1) as f64, sz * (slices - 1) as f64];
        let origin = [-span[0] / 2.0, -span[1] / 2.0, -span[2] / 2.0 - 300.0];
        let grid = Grid { shape: options.shape, affine: Affine::axial(options.spacing, origin) };
        let anatomy = Anatomy {
            scale: span[0].min(span[1]) / FIELD_MM,
            low: origin[2] + 0.02 * span[2],
            height: 0.96 * span[2],
            edge_mm: 0.9f64.max(1.1 * sx.max(sy)),
        };
        let mut random = Random::new(options.seed);
        let truth = place(&anatomy, &options.nodules, &mut random)?;
        let mut vessels = Vec::new();
        for side in [Laterality::Right, Laterality::Left] {
            anatomy.grow(side, &mut random, &mut vessels);
        }
        // A nodule that a vessel runs through has its centre somewhere else than the truth says.
        vessels.retain(|v| {
            let clear = |n: &NoduleTruth| v.distance_mm(n.centre_lps_mm) > n.diameter_mm / 2.0 + v.radius_mm + 1.5;
            truth.iter().all(clear)
        });
        Ok(Self { grid, seed: options.seed, noise_hu: options.noise_hu, anatomy, vessels, truth })
    }

    /// Shape and place.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// The nodules that are in it, in the order they were asked for.
    pub fn truth(&self) -> &[NoduleTruth] {
        &self.truth
    }

    /// Draws slice `k`, row by row, in Hounsfield units.
    ///
    /// # Panics
    /// When `out` is not one slice long or `k` is outside.
    pub fn draw(&self, k: usize, out: &mut [i16]) {
        let [slices, rows, columns] = self.grid.shape;
        assert!(k < slices && out.len() == rows * columns);
        let [sz, _, _] = self.grid.spacing().zyx_mm();
        // A thick slice is the mean of what is in it.
        let parts = (sz / 1.3).ceil().clamp(1.0, 5.0) as usize;
        let mut image = vec![0f32; out.len()];
        for part in 0..parts {
            let offset = (part as f64 + 0.5) / parts as f64 - 0.5;
            self.add_plane(k as f64 + offset, 1.0 / parts as f64, &mut image);
        }
        self.add_noise(k, &mut image);
        for (o, v) in out.iter_mut().zip(&image) {
            *o = v.round().clamp(-1024.0, 3071.0) as i16;
        }
    }

    /// The whole phantom in memory; for tests, not for boards.
    ///
    /// # Errors
    /// [`Fault`] from the pool.
    pub fn volume(&self, pool: &Pool) -> Result<Volume, Fault> {
        let [_, rows, columns] = self.grid.shape;
        let mut voxels = ndarray::Array3::<i16>::zeros(self.grid.shape);
        let data = voxels.as_slice_mut().expect("a fresh array is contiguous");
        pool.for_each_chunk(data, rows * columns, |k, slice| self.draw(k, slice))?;
        Volume::from_array(&voxels, self.grid.affine, Rescale::IDENTITY)
            .map_err(|error: VolumeError| Fault(error.to_string()))
    }

    /// Adds a plane of no thickness, `weight` times.
    fn add_plane(&self, k: f64, weight: f64, image: &mut [f32]) {
        let [_, rows, columns] = self.grid.shape;
        let affine = &self.grid.affine;
        let z = affine.kji_to_lps([k, 0.0, 0.0])[2];
        let anatomy = &self.anatomy;
        let level = anatomy.level(z);
        let vessels = self.vessel_cover(k, z);
        let nodules: Vec<&NoduleTruth> =
            self.truth.iter().filter(|n| (n.centre_lps_mm[2] - z).abs() < n.diameter_mm / 2.0 + 4.0).collect();
        for j in 0..rows {
            for i in 0..columns {
                let p = affine.kji_to_lps([k, j as f64, i as f64]);
                let n = j * columns + i;
                let (mut hu, lung) = anatomy.density(p, &level);
                if lung > 0.0 {
                    let vessel = f64::from(vessels[n]) * lung;
                    hu += (BLOOD - hu) * vessel;
                }
                for nodule in &nodules {
                    hu = self.with_nodule(p, hu, lung, nodule);
                }
                image[n] += (hu * weight) as f32;
            }
        }
    }

    fn with_nodule(&self, p: [f64; 3], hu: f64, lung: f64, nodule: &NoduleTruth) -> f64 {
        let inside = nodule.diameter_mm / 2.0 - norm(sub(p, nodule.centre_lps_mm));
        match nodule.kind {
            // Ground glass has no sharp edge, and what is in it shines through.
            NoduleKind::GroundGlass => {
                let cover = smooth(inside, 2.5 * self.anatomy.edge_mm) * lung;
                hu.max(hu + (GROUND_GLASS - hu) * cover)
            }
            _ => hu.max(hu + (NODULE - hu) * smooth(inside, self.anatomy.edge_mm)),
        }
    }

    /// How much of each voxel is vessel.
    fn vessel_cover(&self, k: f64, z: f64) -> Vec<f32> {
        let [_, rows, columns] = self.grid.shape;
        let affine = &self.grid.affine;
        let edge = self.anatomy.edge_mm;
        let mut cover = vec![0f32; rows * columns];
        for vessel in &self.vessels {
            let reach = vessel.radius_mm + edge;
            let (low, high) = (vessel.from[2].min(vessel.to[2]) - reach, vessel.from[2].max(vessel.to[2]) + reach);
            if z < low || z > high {
                continue;
            }
            let corner = |sign: f64| {
                let pick = |a: usize| {
                    let (p, q) = (vessel.from[a], vessel.to[a]);
                    (if sign < 0.0 { p.min(q) } else { p.max(q) }) + sign * reach
                };
                affine.to_voxel([pick(0), pick(1), z])
            };
            let (from, to) = (corner(-1.0), corner(1.0));
            let range = |a: usize, len: usize| {
                from[a].floor().clamp(0.0, len as f64) as usize..(to[a].ceil() + 1.0).clamp(0.0, len as f64) as usize
            };
            for j in range(1, rows) {
                for i in range(0, columns) {
                    let p = affine.kji_to_lps([k, j as f64, i as f64]);
                    // A vessel thinner than the blur is not narrower in the image, only fainter.
                    let faint = (vessel.radius_mm / (0.6 * edge)).min(1.0);
                    let c = smooth(vessel.radius_mm.max(0.5 * edge) - vessel.distance_mm(p), edge) * faint;
                    let cell = &mut cover[j * columns + i];
                    *cell = cell.max(c as f32);
                }
            }
        }
        cover
    }

    /// Noise with the grain of a soft-tissue kernel: white noise, blurred a little in plane.
    fn add_noise(&self, k: usize, image: &mut [f32]) {
        let [_, rows, columns] = self.grid.shape;
        let white: Vec<f32> = (0..image.len()).map(|n| gauss(self.seed ^ 0x9e37, (k * rows * columns + n) as u64) as f32).collect();
        // A 1-2-1 kernel in both directions keeps 3/8 of the deviation each way.
        let gain = (self.noise_hu / 0.375) as f32;
        for j in 0..rows {
            let row = |d: isize| (j as isize + d).clamp(0, rows as isize - 1) as usize * columns;
            let (above, here, below) = (row(-1), row(0), row(1));
            let column = |i: usize| white[above + i] + 2.0 * white[here + i] + white[below + i];
            for i in 0..columns {
                let sum = column(i.saturating_sub(1)) + 2.0 * column(i) + column((i + 1).min(columns - 1));
                let hu = &mut image[here + i];
                // Fewer photons are lost in lung and air, but the detector adds its own.
                let part = if *hu < -500.0 { 0.8 } else { 1.0 };
                *hu += sum / 16.0 * gain * part;
            }
        }
    }
}

/// 0 outside, 1 inside, over an edge of this width; `inside` is a signed distance.
fn smooth(inside: f64, edge_mm: f64) -> f64 {
    let t = (inside / edge_mm + 0.5).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// A piece of a vessel or an airway.
#[derive(Debug, Clone, Copy)]
struct Vessel {
    from: [f64; 3],
    to: [f64; 3],
    radius_mm: f64,
}

impl Vessel {
    fn distance_mm(&self, p: [f64; 3]) -> f64 {
        let (d, q) = (sub(self.to, self.from), sub(p, self.from));
        let t = (dot(q, d) / dot(d, d)).clamp(0.0, 1.0);
        norm([q[0] - t * d[0], q[1] - t * d[1], q[2] - t * d[2]])
    }
}

/// The chest in patient space: x to the left, y to the back, z to the head, millimetres.
#[derive(Debug, Clone)]
struct Anatomy {
    /// In-plane size against the chest these numbers were written for.
    scale: f64,
    /// Lower end of the lungs, and their height.
    low: f64,
    height: f64,
    edge_mm: f64,
}

/// What depends on the height alone.
struct Level {
    /// 0 at the lower end of the lungs, 1 at their apex.
    t: f64,
    /// Width of the lungs against their widest.
    lung: f64,
    /// Width of the body against the chest.
    body: f64,
}

impl Anatomy {
    fn level(&self, z: f64) -> Level {
        let t = (z - self.low) / self.height;
        let lung = if t > 0.42 { (1.0 - ((t - 0.42) / 0.59).powi(2)).max(0.0).sqrt() } else { 1.0 - 0.16 * (0.42 - t).powi(2) };
        let body = 1.0 - 0.10 * ((t - 0.45).abs() / 0.55).powi(2);
        Level { t, lung, body }
    }

    fn side_x(side: Laterality) -> f64 {
        if side == Laterality::Left { 1.0 } else { -1.0 }
    }

    /// Height of the diaphragm's surface.
    fn dome_z(&self, side: Laterality, x: f64, y: f64) -> f64 {
        let s = self.scale;
        let (rx, ry) = (62.0 * s, 88.0 * s);
        let (dx, dy) = ((x - 70.0 * s * Self::side_x(side)) / rx, (y - 4.0 * s) / ry);
        let peak = if side == Laterality::Right { 0.30 } else { 0.26 };
        self.low + self.height * (peak - 0.30 * (dx * dx + dy * dy))
    }

    /// Signed distance into a lung, roughly in mm; above zero is inside.
    fn lung_depth(&self, side: Laterality, p: [f64; 3], level: &Level) -> f64 {
        let s = self.scale;
        let sign = Self::side_x(side);
        if level.lung <= 0.05 {
            return -10.0;
        }
        let (rx, ry) = (62.0 * s * level.lung, 88.0 * s * level.lung);
        let (dx, dy) = ((p[0] - 70.0 * s * sign) / rx, (p[1] - 4.0 * s) / ry);
        let wall = (1.0 - (dx * dx + dy * dy).sqrt()) * rx;
        let dome = (p[2] - self.dome_z(side, p[0], p[1])) * 0.8;
        let midline = p[0] * sign - (15.0 + 6.0 * (0.6 - level.t).max(0.0)) * s;
        wall.min(dome).min(midline).min(-self.heart_depth(p))
    }

    /// Which lung is nearer, and how deep inside it a place is.
    fn lung_at(&self, p: [f64; 3], level: &Level) -> f64 {
        let side = if p[0] < 0.0 { Laterality::Right } else { Laterality::Left };
        self.lung_depth(side, p, level)
    }

    /// The heart, on the patient's left.
    fn heart_depth(&self, p: [f64; 3]) -> f64 {
        let s = self.scale;
        let centre = [24.0 * s, -22.0 * s, self.low + 0.38 * self.height];
        let radii = [54.0 * s, 46.0 * s, 0.19 * self.height.clamp(120.0, 320.0)];
        let r = (0..3).map(|a| ((p[a] - centre[a]) / radii[a]).powi(2)).sum::<f64>().sqrt();
        (1.0 - r) * 44.0 * s
    }

    /// Signed distance into the trachea and the main bronchi.
    fn airway_depth(&self, p: [f64; 3], level: &Level) -> f64 {
        let s = self.scale;
        let (x, y) = (p[0], p[1] - 14.0 * s);
        if level.t > 0.62 {
            return 9.0 * s - (x * x + y * y).sqrt();
        }
        // Below the carina the bronchi part, and end at the hilum.
        let apart = (0.62 - level.t) * self.height;
        if apart > 34.0 {
            return -5.0;
        }
        let x = x.abs() - (4.0 + apart) * s;
        (6.5 - 0.03 * apart) * s - (x * x + y * y).sqrt()
    }

    /// Hounsfield units without vessels and nodules, and how much of it is lung.
    fn density(&self, p: [f64; 3], level: &Level) -> (f64, f64) {
        let s = self.scale;
        let e = self.edge_mm;
        let [x, y, _] = p;
        let (rx, ry) = (172.0 * s * level.body, 122.0 * s * level.body);
        let body = (1.0 - ((x / rx).powi(2) + (y / ry).powi(2)).sqrt()) * ry;
        let table = 4.0 - (y - (124.0 * s + 6.0) + (x / (170.0 * s)).powi(2) * 12.0).abs();
        if body < -e {
            let hu = if x.abs() < 170.0 * s { AIR + 700.0 * smooth(table, e) } else { AIR };
            return (hu, 0.0);
        }
        let skin = if body < 2.5 { 20.0 } else { FAT };
        let mut hu = skin + (MUSCLE - skin) * smooth(body - 15.0 * s, e);
        let lung_depth = self.lung_at(p, level);
        hu = self.with_bone(p, level, lung_depth, hu);
        // The mediastinum's fat, the heart and the great vessels in it.
        let centre = (1.0 - ((x / (32.0 * s)).powi(2) + ((y - 10.0 * s) / (60.0 * s)).powi(2)).sqrt()) * 30.0 * s;
        hu += (-60.0 - hu) * smooth(centre, 3.0 * e) * smooth(-lung_depth, e) * if hu < 120.0 { 0.6 } else { 0.0 };
        let aorta = 12.5 * s - ((x - 22.0 * s).powi(2) + (y - 52.0 * s).powi(2)).sqrt();
        hu += (BLOOD - hu) * smooth(self.heart_depth(p).max(aorta), e);
        // Under the diaphragm: liver on the right, spleen and a stomach with air on the left.
        let side = if x < 0.0 { Laterality::Right } else { Laterality::Left };
        let below = self.dome_z(side, x, y) - p[2];
        if below > -e && lung_depth < e && body > 22.0 * s {
            let stomach = 20.0 * s - ((x - 60.0 * s).powi(2) + (y + 35.0 * s).powi(2)).sqrt();
            let organ = if side == Laterality::Right { LIVER } else { 48.0 };
            let organ = organ + (-900.0 - organ) * smooth(stomach.min(below - 14.0), e);
            hu += (organ - hu) * smooth(below, e) * if hu < 120.0 { 1.0 } else { 0.0 };
        }
        // Lung: heavier towards the back, where the patient lies on it; a little uneven everywhere.
        let uneven = 14.0 * (sin(x * 0.11) * sin(y * 0.13 + p[2] * 0.09) + sin(p[2] * 0.17 - y * 0.05));
        let lung_hu = LUNG + 0.35 * y / s + uneven;
        let lung = smooth(lung_depth, e) * (1.0 - smooth(aorta, e));
        hu += (lung_hu - hu) * lung;
        let airway = self.airway_depth(p, level);
        if airway > -3.0 {
            hu += (30.0 - hu) * smooth(airway + 1.6, e);
            hu += (-985.0 - hu) * smooth(airway, e);
        }
        (hu, lung * (1.0 - smooth(airway + 1.6, e)))
    }

    /// Spine, sternum, ribs.
    fn with_bone(&self, p: [f64; 3], level: &Level, lung_depth: f64, hu: f64) -> f64 {
        let s = self.scale;
        let e = self.edge_mm;
        let [x, y, z] = p;
        // Vertebrae of 22 mm with discs between them; the canal behind.
        let body = 17.0 * s - ((x / 1.15).powi(2) + (y - 78.0 * s).powi(2)).sqrt();
        let disc = ((z / 26.0).fract().abs() - 0.5).abs() < 0.08;
        let canal = 8.0 * s - (x * x + (y - 103.0 * s).powi(2)).sqrt();
        let arch = 15.0 * s - (x * x + (y - 101.0 * s).powi(2)).sqrt();
        let sternum = 7.0 * s - (((x / 2.2).powi(2) + (y + 101.0 * s * level.body).powi(2)).sqrt());
        let bone = body.max(arch).max(sternum);
        let mut out = hu;
        if bone > -e {
            let inner = if disc && body > 0.0 { 90.0 } else { MARROW };
            let hard = inner + (CORTEX - inner) * (1.0 - smooth(bone - 2.0, e)) * if disc { 0.0 } else { 1.0 };
            out += (hard - out) * smooth(bone, e);
            out += (25.0 - out) * smooth(canal, e);
        }
        // Ribs: bars that slope to the front in the wall just outside the lungs.
        if lung_depth < -3.0 * s && lung_depth > -17.0 * s && x.abs() > 20.0 * s && level.t < 0.97 {
            let slope = z + 0.35 * (y - 80.0 * s);
            let across = (slope / 27.0 - (slope / 27.0).floor() - 0.5).abs() * 27.0;
            let rib = (5.2 - ((across * 0.8).powi(2) + ((lung_depth + 9.5 * s) / s).powi(2)).sqrt()) * s;
            if rib > -e {
                let hard = MARROW + (CORTEX - MARROW) * (1.0 - smooth(rib - 1.8, e));
                out += (hard - out) * smooth(rib, e);
            }
        }
        out
    }

    /// Grows a tree of vessels from the hilum of one lung.
    fn grow(&self, side: Laterality, random: &mut Random, into: &mut Vec<Vessel>) {
        let s = self.scale;
        let sign = Self::side_x(side);
        let hilum = [30.0 * s * sign, 12.0 * s, self.low + 0.52 * self.height];
        for branch in 0..9 {
            let up = (branch as f64 / 8.0 - 0.5) * 1.9;
            let aim = unit([sign * (0.55 + 0.5 * random.unit()), random.signed() * 0.9, up + 0.25 * random.signed()]);
            self.branch(side, hilum, aim, (4.2 + 1.2 * random.unit()) * s, 0, random, into);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one recursive step of a tree")]
    fn branch(
        &self,
        side: Laterality,
        from: [f64; 3],
        aim: [f64; 3],
        radius_mm: f64,
        depth: usize,
        random: &mut Random,
        into: &mut Vec<Vessel>,
    ) {
        if radius_mm < 0.45 || depth > 9 {
            return;
        }
        let length = (6.0 + 3.4 * radius_mm) * (0.8 + 0.5 * random.unit());
        let to = std::array::from_fn(|a| from[a] + aim[a] * length);
        if self.lung_depth(side, to, &self.level(to[2])) < 2.0 && depth > 1 {
            return;
        }
        into.push(Vessel { from, to, radius_mm });
        let spread = |random: &mut Random, much: f64| {
            unit(std::array::from_fn(|a| aim[a] + much * random.signed() * [1.0, 1.0, 1.0][a]))
        };
        let straight = spread(random, 0.35);
        self.branch(side, to, straight, radius_mm * 0.84, depth + 1, random, into);
        if random.unit() < 0.8 {
            let aside = spread(random, 0.9);
            self.branch(side, to, aside, radius_mm * 0.64, depth + 1, random, into);
        }
    }
}

fn unit(v: [f64; 3]) -> [f64; 3] {
    let n = norm(v).max(1e-9);
    v.map(|c| c / n)
}

/// Finds places for the nodules, the largest first; the answer has the order of the wishes.
fn place(anatomy: &Anatomy, wishes: &[NoduleWish], random: &mut Random) -> Result<Vec<NoduleTruth>, BadPhantom> {
    if let Some(wish) = wishes.iter().find(|w| !(2.0..=60.0).contains(&w.diameter_mm)) {
        return Err(BadPhantom::Diameter(wish.diameter_mm));
    }
    let mut order: Vec<usize> = (0..wishes.len()).collect();
    order.sort_by(|a, b| wishes[*b].diameter_mm.total_cmp(&wishes[*a].diameter_mm));
    let mut placed: Vec<(usize, NoduleTruth)> = Vec::new();
    for n in order {
        let wish = wishes[n];
        let no_room = BadPhantom::NoRoom { kind: wish.kind, diameter_mm: wish.diameter_mm };
        if placed.len() >= NODULES_MAX {
            return Err(no_room);
        }
        let found = (0..4000).find_map(|_| {
            let truth = propose(anatomy, wish, random)?;
            let clear = placed.iter().all(|(_, other)| {
                let apart = norm(sub(other.centre_lps_mm, truth.centre_lps_mm));
                apart > (other.diameter_mm + truth.diameter_mm) / 2.0 + 12.0
            });
            clear.then_some(truth)
        });
        placed.push((n, found.ok_or(no_room)?));
    }
    placed.sort_by_key(|(n, _)| *n);
    Ok(placed.into_iter().map(|(_, truth)| truth).collect())
}

/// One try; None where such a nodule cannot be.
fn propose(anatomy: &Anatomy, wish: NoduleWish, random: &mut Random) -> Option<NoduleTruth> {
    let s = anatomy.scale;
    let side = if random.unit() < 0.5 { Laterality::Right } else { Laterality::Left };
    let sign = Anatomy::side_x(side);
    let r = wish.diameter_mm / 2.0;
    let depth = |p: [f64; 3]| anatomy.lung_depth(side, p, &anatomy.level(p[2]));
    let middle = |random: &mut Random| {
        let x = 70.0 * s * sign + 50.0 * s * random.signed();
        [x, 4.0 * s + 75.0 * s * random.signed(), anatomy.low + anatomy.height * (0.2 + 0.65 * random.unit())]
    };
    let centre = match wish.kind {
        NoduleKind::Solid | NoduleKind::GroundGlass => Some(middle(random)).filter(|p| depth(*p) > r + 3.0),
        NoduleKind::Juxtapleural => {
            // Outwards from the middle of the lung to the wall of the ribs.
            let z = anatomy.low + anatomy.height * (0.45 + 0.3 * random.unit());
            let angle = 1.2 * random.signed();
            let aim = [sign * libm::cos(angle), sin(angle), 0.0];
            let at = |d: f64| [70.0 * s * sign + aim[0] * d, 4.0 * s + aim[1] * d, z];
            let wall = (10..200).map(f64::from).find(|d| depth(at(*d)) < 0.0)?;
            Some(at(wall - 0.55 * r))
        }
        NoduleKind::Diaphragm => {
            let x = 70.0 * s * sign + 24.0 * s * random.signed();
            let y = 4.0 * s + 34.0 * s * random.signed();
            Some([x, y, anatomy.dome_z(side, x, y) + 0.6 * r]).filter(|p| depth([p[0], p[1], p[2] + r]) > 0.8 * r)
        }
    }?;
    (anatomy.heart_depth(centre) < -r - 4.0).then_some(NoduleTruth {
        centre_lps_mm: centre,
        diameter_mm: wish.diameter_mm,
        kind: wish.kind,
        side,
    })
}

/// SplitMix64 (Steele et al. 2014): small, and the same on every board.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5ca1_ab1e)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// 0 to 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// -1 to 1.
    fn signed(&mut self) -> f64 {
        2.0 * self.unit() - 1.0
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number that depends on its place alone, of nearly normal distribution (the sum of eight uniform ones).
fn gauss(seed: u64, n: u64) -> f64 {
    let bits = mix(mix(seed).wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let sum: u64 = bits.to_le_bytes().iter().map(|b| u64::from(*b)).sum();
    // Eight uniform bytes: mean 1020, standard deviation 209.
    (sum as f64 - 1020.0) / 209.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> PhantomOptions {
        PhantomOptions { shape: [60, 128, 128], spacing: Spacing::new([5.0, 2.8, 2.8]).unwrap(), ..PhantomOptions::default() }
    }

    #[test]
    fn a_slice_depends_on_the_options_and_its_number_alone() {
        let (a, b) = (Phantom::new(&small()).unwrap(), Phantom::new(&small()).unwrap());
        let mut first = vec![0i16; 128 * 128];
        let mut again = first.clone();
        a.draw(30, &mut first);
        b.draw(3, &mut again);
        b.draw(30, &mut again);
        assert_eq!(first, again);
        let other = Phantom::new(&PhantomOptions { seed: 2, ..small() }).unwrap();
        other.draw(30, &mut again);
        assert_ne!(first, again);
        assert_ne!(a.truth(), other.truth());
    }

    #[test]
    fn nodules_are_where_the_truth_says_and_as_dense() {
        for seed in 1..6 {
            let phantom = Phantom::new(&PhantomOptions { seed, noise_hu: 0.0, ..PhantomOptions::default() }).unwrap();
            let mut slice = vec![0i16; 512 * 512];
            for nodule in phantom.truth() {
                let [i, j, k] = phantom.grid().affine.to_voxel(nodule.centre_lps_mm).map(|v| v.round() as usize);
                phantom.draw(k, &mut slice);
                let hu = f64::from(slice[j * 512 + i]);
                let want = if nodule.kind == NoduleKind::GroundGlass { GROUND_GLASS } else { NODULE };
                assert!(hu > want - 80.0 && hu < want + 700.0, "{nodule:?}: {hu}");
                assert_eq!(nodule.side == Laterality::Left, nodule.centre_lps_mm[0] > 0.0, "{nodule:?}");
            }
        }
    }

    #[test]
    fn the_chest_has_air_in_both_lungs_and_the_heart_on_the_left() {
        let phantom = Phantom::new(&small()).unwrap();
        let volume = phantom.volume(&Pool::new(2)).unwrap();
        let at = |lps: [f64; 3]| {
            let [i, j, k] = phantom.grid().affine.to_voxel(lps).map(|v| v.round() as usize);
            volume.stored::<i16>().unwrap()[[k, j, i]]
        };
        let (low, height) = (phantom.anatomy.low, phantom.anatomy.height);
        for x in [-75.0, 80.0] {
            assert!(at([x, 30.0, low + 0.6 * height]) < -600, "lung at {x}");
        }
        assert!(at([45.0, -25.0, low + 0.38 * height]) > -50, "the heart");
        assert!(at([-62.0, -20.0, low + 0.38 * height]) < -600, "lung across from the heart");
        assert!(at([0.0, 14.0, low + 0.8 * height]) < -850, "the trachea");
    }

    #[test]
    fn what_cannot_be_drawn_is_refused() {
        let wish = |diameter_mm| vec![NoduleWish { kind: NoduleKind::Solid, diameter_mm }];
        let with = |shape, nodules| Phantom::new(&PhantomOptions { shape, nodules, ..PhantomOptions::default() }).map(|_| ());
        assert_eq!(with([4, 512, 512], vec![]), Err(BadPhantom::Shape([4, 512, 512])));
        assert_eq!(with([120, 512, 512], wish(80.0)), Err(BadPhantom::Diameter(80.0)));
        let crowd: Vec<NoduleWish> = (0..60).flat_map(|_| wish(40.0)).collect();
        assert!(matches!(with([120, 512, 512], crowd), Err(BadPhantom::NoRoom { .. })));
    }
}
