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
    /// Centre of mass of the segmented voxels, LPS.
    pub centroid_lps_mm: [f64; 3],
    /// The same place as array index `[k, j, i]` of the series, fractional.
    pub centroid_voxel: [f64; 3],
    /// Longest in-plane diameter over all slices.
    pub long_axis_mm: f64,
    /// Longest diameter perpendicular to it in the same slice.
    pub short_axis_mm: f64,
    /// Mean of the two (Fleischner Society 2017).
    pub mean_diameter_mm: f64,
    /// Segmented voxels times voxel volume.
    pub volume_mm3: f64,
    /// Mean over the segmented voxels; CT only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mean_hu: Option<f64>,
    /// Where in the body.
    pub site: Site,
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
