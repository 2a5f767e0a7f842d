//! A brain in its head, with a tumour at a known place, in the four contrasts of the brain exam.
//!
//! Drawn from formulas alone: folded cortex, white matter, ventricles, fluid, skull, scalp. Each contrast gives every tissue its own
//! brightness (fluid dark on T1 and FLAIR, bright on T2; oedema bright on T2 and FLAIR; the rim enhances on T1c only), and each series
//! has a grid of its own, turned and shifted against the others as a patient moves between them.

use super::gauss;
use crate::dicom::TransferSyntax;
use crate::dicom::build::{BuildError, SeriesTemplate, SliceTemplate};
use crate::exam::brain_mr::contrast::Contrast;
use crate::finding::Laterality;
use crate::geometry::{Affine, Grid, Plane, Spacing, norm};
use crate::study::{Modality, Uid};
use crate::volume::{Rescale, Volume, VoxelType};
use ndarray::Array3;

/// A head to be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BrainPhantom {
    /// On which side the tumour is.
    pub side: Laterality,
    /// Radius of its oedema.
    pub radius_mm: f64,
    /// Another number is other noise and another study.
    pub seed: u64,
}

impl Default for BrainPhantom {
    fn default() -> Self {
        Self { side: Laterality::Left, radius_mm: 22.0, seed: 1 }
    }
}

/// Tissues in the order of [`brightness`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tissue {
    Air,
    White,
    Grey,
    Fluid,
    Bone,
    Fat,
    Muscle,
    Necrosis,
    Oedema,
    Rim,
}

fn brightness(contrast: Contrast, tissue: Tissue) -> f64 {
    let row = match contrast {
        Contrast::T1 => [0.0, 600.0, 460.0, 180.0, 40.0, 1000.0, 420.0, 240.0, 430.0, 420.0],
        Contrast::T1c => [0.0, 600.0, 465.0, 185.0, 40.0, 1000.0, 500.0, 250.0, 430.0, 1000.0],
        Contrast::T2 => [0.0, 320.0, 450.0, 1000.0, 40.0, 600.0, 220.0, 850.0, 700.0, 560.0],
        Contrast::Flair => [0.0, 380.0, 470.0, 120.0, 40.0, 500.0, 260.0, 500.0, 850.0, 700.0],
    };
    row[tissue as usize]
}

impl BrainPhantom {
    /// The middle of the tumour, LPS mm in the space of the T1c.
    pub fn centre_lps_mm(&self) -> [f64; 3] {
        let x = if self.side == Laterality::Left { 30.0 } else { -30.0 };
        [x, -18.0, 22.0]
    }

    /// Spacing and size of a series, thick axial slices, and how the patient lay: turn about z in radians, and shift.
    fn placed(contrast: Contrast) -> (Grid, f64, [f64; 3]) {
        let (slices, step, size, pixel, turn, shift) = match contrast {
            Contrast::T1 => (30, 5.0, 112, 1.9, 0.03, [1.5, -2.0, 1.0]),
            Contrast::T1c => (40, 4.0, 112, 1.9, 0.0, [0.0; 3]),
            Contrast::T2 => (30, 5.0, 128, 1.7, -0.04, [-2.0, 3.0, -1.5]),
            Contrast::Flair => (28, 5.5, 104, 2.1, 0.05, [3.0, 1.0, 2.0]),
        };
        let spacing = Spacing::new([step, pixel, pixel]).expect("a usable spacing");
        let half = |n: usize, mm: f64| (n - 1) as f64 * mm / 2.0;
        let origin = [-half(size, pixel), -half(size, pixel), -half(slices, step) + 14.0];
        (Grid { shape: [slices, size, size], affine: Affine::axial(spacing, origin) }, turn, shift)
    }

    /// The grid of a series.
    pub fn grid(contrast: Contrast) -> Grid {
        Self::placed(contrast).0
    }

    /// From the T1c's space to that of a series.
    fn head_of(contrast: Contrast, p: [f64; 3]) -> [f64; 3] {
        let (_, turn, shift) = Self::placed(contrast);
        let (s, c) = turn.sin_cos();
        let q = [p[0] - shift[0], p[1] - shift[1], p[2] - shift[2]];
        [c * q[0] + s * q[1], c * q[1] - s * q[0], q[2]]
    }

    fn tissue(&self, p: [f64; 3]) -> Tissue {
        let [x, y, z] = p;
        let r = |a: f64, b: f64, c: f64, dy: f64, dz: f64| norm([x / a, (y - dy) / b, (z - dz) / c]);
        let brain = r(66.0, 84.0, 64.0, 0.0, 10.0);
        let head = r(82.0, 100.0, 86.0, 0.0, 2.0);
        if head > 1.0 {
            return Tissue::Air;
        }
        // Sulci: fluid cut into the surface, deeper between the folds; a cleft between the hemispheres.
        let fold = (x / 7.0 + 1.3 * (y / 9.0).sin()).sin() * (y / 8.0 + 1.1 * (z / 10.0).sin()).sin() * (z / 8.5 + (x / 12.0).cos()).sin();
        let depth = (1.0 - brain) * 66.0;
        let cleft = x.abs() < 1.5 && (z > 25.0 || !(-45.0..=45.0).contains(&y)) && depth < 32.0;
        let tumour = self.centre_lps_mm();
        let d = norm([p[0] - tumour[0], p[1] - tumour[1], p[2] - tumour[2]]) + 2.0 * fold;
        if brain > 1.0 {
            let below = z < -42.0;
            return match head {
                h if h > 0.96 => Tissue::Fat,
                _ if below => Tissue::Muscle,
                h if h > 0.86 => Tissue::Bone,
                _ => Tissue::Fluid,
            };
        }
        if d < self.radius_mm && depth > 1.0 {
            return match d / self.radius_mm {
                f if f < 0.32 => Tissue::Necrosis,
                f if f < 0.55 => Tissue::Rim,
                _ => Tissue::Oedema,
            };
        }
        let ventricle = norm([(x.abs() - 9.0) / 6.0, (y - 2.0) / 30.0, (z - 20.0) / 9.0]) < 1.0;
        if ventricle || cleft || depth < 1.0 {
            return Tissue::Fluid;
        }
        let ribbon = 5.0 + 7.0 * fold.max(0.0);
        if depth < ribbon - 4.0 {
            Tissue::Fluid
        } else if depth < ribbon + 4.0 || norm([(x.abs() - 22.0) / 9.0, y / 20.0, (z - 8.0) / 12.0]) < 1.0 {
            Tissue::Grey
        } else {
            Tissue::White
        }
    }

    /// One series, in the order of its slices.
    pub fn voxels(&self, contrast: Contrast) -> Array3<i16> {
        let grid = Self::grid(contrast);
        let [_, rows, columns] = grid.shape;
        let [step, _, _] = grid.spacing().zyx_mm();
        Array3::from_shape_fn(grid.shape, |(k, j, i)| {
            // A thick slice is the mean of what is in it.
            let parts = 4;
            let sum: f64 = (0..parts)
                .map(|part| {
                    let mut p = grid.affine.kji_to_lps([k as f64, j as f64, i as f64]);
                    p[2] += step * ((part as f64 + 0.5) / parts as f64 - 0.5);
                    brightness(contrast, self.tissue(Self::head_of(contrast, p)))
                })
                .sum();
            let n = ((k * rows + j) * columns + i) as u64;
            let noise = 14.0 * gauss(self.seed ^ (contrast as u64) << 32, n);
            (sum / parts as f64 + noise).round().clamp(0.0, 4000.0) as i16
        })
    }

    /// One series as a volume.
    pub fn volume(&self, contrast: Contrast) -> Volume {
        Volume::from_array(&self.voxels(contrast), Self::grid(contrast).affine, Rescale::IDENTITY).expect("memory for a phantom")
    }

    /// What the images of a series have in common. All have one study; their descriptions say nothing of their contrast.
    pub fn series(&self, contrast: Contrast, name: &str) -> SeriesTemplate {
        let [_, rows, columns] = Self::grid(contrast).shape;
        let uid = |what: &str| Uid::derived(format!("brain phantom {name} {self:?} {what}").as_bytes());
        let (sequence, tr, te, ti, agent) = match contrast {
            Contrast::T1 => ("SE", "560", "14", None, None),
            Contrast::T1c => ("SE", "560", "14", None, Some("GADOLINIUM")),
            Contrast::T2 => ("SE", "4200", "102", None, None),
            Contrast::Flair => ("SE\\IR", "9000", "125", Some("2500"), None),
        };
        let mut more = vec![
            ((0x0018, 0x0020).into(), *b"CS", sequence.to_owned()),
            ((0x0018, 0x0080).into(), *b"DS", tr.to_owned()),
            ((0x0018, 0x0081).into(), *b"DS", te.to_owned()),
        ];
        more.extend(ti.map(|ti| ((0x0018, 0x0082).into(), *b"DS", ti.to_owned())));
        more.extend(agent.map(|agent| ((0x0018, 0x0010).into(), *b"LO", agent.to_owned())));
        SeriesTemplate {
            modality: Modality::Mr,
            study: uid("study"),
            series: uid(contrast.name()),
            frame_of_reference: uid("frame of reference"),
            patient_name: "Phantom^Brain".into(),
            patient_id: format!("BRAIN-PHANTOM-{}", self.seed),
            description: "Brain phantom, no patient".into(),
            date_time: ["20260101".into(), "120000".into()],
            series_number: contrast as i32 + 1,
            size: [rows, columns],
            voxel: VoxelType::I16,
            bits_stored: 16,
            thickness_mm: Self::grid(contrast).spacing().zyx_mm()[0],
            window: None,
            regions: Vec::new(),
            more,
        }
    }

    /// A whole series as DICOM files (PS3.10), explicit little endian, foot to head.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn images(&self, contrast: Contrast, template: &SeriesTemplate) -> Result<Vec<Vec<u8>>, BuildError> {
        let (voxels, grid) = (self.voxels(contrast), Self::grid(contrast));
        let [_, row_mm, column_mm] = grid.spacing().zyx_mm();
        let syntax = TransferSyntax::find("1.2.840.10008.1.2.1").expect("every box reads explicit little endian");
        let image = |(k, slice): (usize, ndarray::ArrayView2<'_, i16>)| {
            let pixels: Vec<u8> = slice.iter().flat_map(|v| v.to_le_bytes()).collect();
            let position = grid.affine.kji_to_lps([k as f64, 0.0, 0.0]);
            let plane = Plane::new(position, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [row_mm, column_mm]).ok();
            let image_type = "DERIVED\\SECONDARY";
            let slice = SliceTemplate { number: k + 1, plane, rescale: Rescale::IDENTITY, image_type, pixels: &pixels };
            template.image(&slice, syntax)
        };
        voxels.outer_iter().enumerate().map(image).collect()
    }
}
