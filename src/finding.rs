//! One thing seen, with its measurements. Every number says its unit, and every place is in patient space.

use serde::{Deserialize, Serialize};

use crate::study::Uid;

/// One finding of a report (schema `scanside.report/1`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// 1 for the first finding of the report.
    pub id: u32,
    /// The same lesion has the same tracking UID in report, SR and SEG (PS3.16 TID 1411).
    pub tracking_uid: Uid,
    /// `nodule`, `tumour`, `lesion`.
    pub kind: String,
    /// 0 to 1, as the model package defines it.
    pub confidence: f32,
    /// Centre of mass of the segmented voxels, LPS; absent where the images have no place in patient space (ultrasound).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub centroid_lps_mm: Option<[f64; 3]>,
    /// The same place as array index `[k, j, i]` of the series, fractional.
    pub centroid_voxel: [f64; 3],
    /// Longest in-plane diameter over all slices (of a cine: in its best frame). This and the other measures in millimetres
    /// are absent where the distance of pixels is not known; [`Finding::in_pixels`] has them then.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub long_axis_mm: Option<f64>,
    /// Longest diameter perpendicular to it in the same slice.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub short_axis_mm: Option<f64>,
    /// Mean of the two (Fleischner Society 2017).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mean_diameter_mm: Option<f64>,
    /// Segmented voxels times voxel volume; absent for what was seen in one plane only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub volume_mm3: Option<f64>,
    /// Area within the outline, for what was seen in one plane.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub area_mm2: Option<f64>,
    /// Measures in pixels, exactly where no calibration says what a pixel is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub in_pixels: Option<InPixels>,
    /// Mean over the segmented voxels; CT only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mean_hu: Option<f64>,
    /// Where in the body.
    pub site: Site,
    /// Over the frames of a cine or a live stream.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cine: Option<OverTime>,
}

impl Finding {
    /// Its diameters for a person, with their unit: `8.5 mm (9.5 x 7.5)`.
    pub fn size_text(&self) -> String {
        match (self.long_axis_mm, self.short_axis_mm, self.in_pixels) {
            (Some(long), Some(short), _) => format!("{:.1} mm ({long:.1} x {short:.1})", (long + short) / 2.0),
            (.., Some(p)) => format!("{:.0} pixels ({:.0} x {:.0})", (p.long_axis + p.short_axis) / 2.0, p.long_axis, p.short_axis),
            _ => "of unknown size".into(),
        }
    }

    /// Where it is, for a person: in patient space, or in the best frame of a cine.
    pub fn place_text(&self) -> String {
        match (self.centroid_lps_mm, &self.cine) {
            (Some([x, y, z]), _) => format!("L {x:.1} P {y:.1} S {z:.1} mm"),
            (None, cine) => {
                let [k, j, i] = self.centroid_voxel;
                let seen = cine.as_ref().map_or(String::new(), |c| format!(" (seen in {} frames)", c.frames_seen));
                format!("frame {k:.0}, column {i:.0}, row {j:.0}{seen}")
            }
        }
    }
}

/// Measures of an image whose pixels have no known size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct InPixels {
    /// Longest diameter.
    pub long_axis: f64,
    /// Longest diameter perpendicular to it.
    pub short_axis: f64,
    /// Pixels within the outline.
    pub area: f64,
}

/// One lesion through the frames of a cine. Frames count from 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OverTime {
    /// The frame the measures are of: where the lesion shows best.
    pub best_frame: usize,
    /// The first frame it was seen in.
    pub first_frame: usize,
    /// The last one.
    pub last_frame: usize,
    /// Frames it was seen in.
    pub frames_seen: usize,
    /// Its smoothed outline in the best frame, closed: `[column, row]` in pixels of the frame, pixel centres at whole numbers.
    pub outline: Vec<[f32; 2]>,
}

/// Organ and side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// `lung`, `brain`, `thyroid`.
    pub organ: String,
    /// The patient's own left or right.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub laterality: Option<Laterality>,
}

/// The patient's own side, never the viewer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Laterality {
    /// The patient's left.
    Left,
    /// The patient's right.
    Right,
}

/// A number with its unit (UCUM).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The number.
    pub value: f64,
    /// UCUM code: `mL`, `mm`, `[hnsf'U]`.
    pub unit: String,
}

impl Measurement {
    /// For a person: UCUM's Hounsfield units by their usual name, its unity as the bare count it is.
    pub fn text(&self) -> String {
        match self.unit.as_str() {
            "1" => self.value.to_string(),
            "[hnsf'U]" => format!("{:.1} HU", self.value),
            unit => format!("{:.1} {unit}", self.value),
        }
    }
}
