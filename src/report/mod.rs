//! The one outcome of one series: what was found, or why nothing could be said (schema `scanside.report/1`).
//!
//! A report has a part that depends on the images and the models alone ([`Report::deterministic_json`]) and a part that
//! belongs to the run (identity, sequence, time). Two runs over the same bytes agree on the first to the byte.

pub mod froc;
pub mod journal;
pub mod line;
pub mod wire;

#[cfg(test)]
mod page_tests;

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::finding::{Finding, Measurement};
use crate::geometry::{Affine, Grid, Spacing};
use crate::study::{Modality, Rejection, Uid};

/// The schema this code writes and reads.
pub const SCHEMA: &str = "scanside.report/1";

/// The longest report, as compact JSON. A finding takes about 500 bytes, so this is some two thousand of them; without
/// a limit a receiver on the serial line could not size its buffer.
pub const REPORT_BYTES_MAX: usize = 1 << 20;

/// Characters of [`Reason::text`] that are kept; the rest is cut off, since a sentence may quote what came from outside.
pub const REASON_CHARS_MAX: usize = 1000;

/// The one outcome of one accepted series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: Schema,
    /// The identity of the report; the same work on the same box has the same one, so a receiver can tell it is no news.
    pub report_uid: Uid,
    /// Place in the journal of this box, from 1; 0 for a report that was never in a journal.
    pub sequence: u64,
    /// When the report was made: RFC 3339, UTC, to the millisecond.
    #[serde(with = "rfc3339")]
    pub created: Timestamp,
    /// What kind of outcome this is.
    pub status: Status,
    /// Why it is not `complete`; absent exactly for complete reports.
    pub reason: Option<Reason>,
    /// What was done or should have been: `chest-ct`, `brain-mr`, `ultrasound`.
    pub exam: String,
    /// (0020,000D)
    pub study_uid: Uid,
    /// (0020,000E)
    pub series_uid: Uid,
    /// (0008,0060)
    pub modality: Modality,
    /// The box that made the report.
    pub device: Device,
    /// The model packages that took part, in the order of their use.
    pub models: Vec<ModelUsed>,
    /// The volume that was analysed; absent where none could be built.
    pub volume: Option<VolumeUsed>,
    /// What was seen; empty in a complete report means that nothing was seen.
    pub findings: Vec<Finding>,
    /// Measurements of the whole: `lung_volume_ml`, `mean_lung_density_hu`.
    pub measurements: BTreeMap<String, Measurement>,
    /// The series of the study that an exam of several series looked at, and those it set aside; empty for the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub series_used: Vec<SeriesUsed>,
    /// Milliseconds of wall time: `ingest`, `segment`, `detect`, `classify`, `total`.
    #[serde(default)]
    pub timing_ms: BTreeMap<String, u64>,
}

/// The schema's name, which cannot be another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Schema;

impl TryFrom<String> for Schema {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        if text == SCHEMA { Ok(Self) } else { Err(format!("the schema is {text:?}, not {SCHEMA:?}")) }
    }
}

impl From<Schema> for String {
    fn from(_: Schema) -> String {
        SCHEMA.into()
    }
}

/// The kinds of outcome. "Nothing seen" is [`Status::Complete`] without findings, and never any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The whole series was analysed.
    Complete,
    /// A part was analysed; `reason` says what was not.
    Partial,
    /// The data would not do; nothing of ours failed.
    Rejected,
    /// Our fault, or the disk's: the series was fit to be analysed and was not.
    Failed,
    /// Nobody tried: no exam for it, no room, switched off.
    NotAttempted,
}

impl Status {
    /// The word in the schema.
    pub fn word(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Partial => "partial",
            Self::Rejected => "rejected",
            Self::Failed => "failed",
            Self::NotAttempted => "not_attempted",
        }
    }
}

/// Why a report is not complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// A word for programs: lower case letters, digits and underscores.
    pub code: String,
    /// One sentence for people; never a patient's name.
    pub text: String,
}

impl Reason {
    /// A reason; the sentence is cut at [`REASON_CHARS_MAX`] characters and control characters become spaces.
    pub fn new(code: impl Into<String>, text: impl AsRef<str>) -> Self {
        let clean = |c: char| if c.is_control() { ' ' } else { c };
        Self { code: code.into(), text: text.as_ref().chars().take(REASON_CHARS_MAX).map(clean).collect() }
    }
}

impl From<&Rejection> for Reason {
    fn from(rejection: &Rejection) -> Self {
        let code = match serde_json::to_value(rejection.code) {
            Ok(serde_json::Value::String(word)) => word,
            _ => unreachable!("a rejection code is written as a word"),
        };
        Self::new(code, &rejection.text)
    }
}

/// The box, as the report names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// What the operator calls it.
    pub name: String,
    /// Version of the firmware.
    pub version: String,
    /// The box's own UID, (0018,1002).
    pub uid: Uid,
}

/// A model package that took part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelUsed {
    /// Name in the manifest.
    pub name: String,
    /// Version in the manifest.
    pub version: String,
    /// Digest of the package, 64 hexadecimal digits.
    pub sha256: String,
}

/// The volume that was analysed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeUsed {
    /// `[k, j, i]`: slices, rows, columns of the whole lattice, the missing ones included.
    pub shape: [usize; 3],
    /// `[z, y, x]`
    pub spacing_mm: Spacing,
    /// `(i, j, k)` to LPS, row by row.
    pub affine_lps: Affine,
    /// Places `k` of the lattice where no slice was.
    pub missing_slices: Vec<u32>,
    /// Images of the series that are no part of the volume: scouts, strays, repeats.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set_aside: Vec<SetAside>,
    /// Shear of the stack by a tilted gantry; the affine expresses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tilt_degrees: Option<f64>,
    /// For frames without a place in patient space; distances between slices, and the affine, are by decree then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cine: Option<CineUsed>,
    /// Smallest and largest distance between slices, where they differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uneven_mm: Option<[f64; 2]>,
}

/// Frames in time, of a projection or a moving cut.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CineUsed {
    /// Time between frames, where the images tell.
    pub frame_time_ms: Option<f64>,
    /// The size of a pixel is known in all frames; where it is not, measures are in pixels.
    pub calibrated: bool,
}

/// An image that came with the series and is no part of its volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAside {
    /// (0008,0018)
    pub sop_instance_uid: Uid,
    /// Frame, from 0.
    pub frame: usize,
    /// Why.
    pub reason: crate::geometry::Reason,
}

impl VolumeUsed {
    /// A whole volume on this grid.
    pub fn whole(grid: &Grid) -> Self {
        Self { shape: grid.shape, spacing_mm: grid.spacing(), affine_lps: grid.affine, missing_slices: Vec::new(),
            set_aside: Vec::new(), tilt_degrees: None, cine: None, uneven_mm: None }
    }
}

/// What one series of a study was to its exam.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeriesUsed {
    /// (0020,000E)
    pub series_uid: Uid,
    /// `T1`, `T1c`, `T2`, `FLAIR`; absent where it was set aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Why it was set aside, or what is unusual about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// What a report is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// `chest-ct`, `brain-mr`, `ultrasound`.
    pub exam: String,
    /// (0020,000D)
    pub study_uid: Uid,
    /// (0020,000E)
    pub series_uid: Uid,
    /// (0008,0060)
    pub modality: Modality,
    /// The box.
    pub device: Device,
    /// The name of this piece of work on this box, the same after a restart (see [`journal::Journal::append_once`]).
    pub key: String,
}

impl Subject {
    /// The UID of its report, known before there is one.
    pub fn report_uid(&self) -> Uid {
        Uid::derived(format!("{SCHEMA}\n{}\n{}", self.device.uid, self.key).as_bytes())
    }
}

/// What an exam gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Results {
    /// See [`Report::models`].
    pub models: Vec<ModelUsed>,
    /// See [`Report::volume`].
    pub volume: Option<VolumeUsed>,
    /// See [`Report::findings`].
    pub findings: Vec<Finding>,
    /// See [`Report::measurements`].
    pub measurements: BTreeMap<String, Measurement>,
}

/// A report that contradicts itself or the schema.
#[derive(Debug, thiserror::Error)]
pub enum BadReport {
    /// Not JSON of the schema.
    #[error("not a report of schema {SCHEMA}: {0}")]
    Json(#[from] serde_json::Error),
    /// Longer than [`REPORT_BYTES_MAX`].
    #[error("the report takes {0} bytes, more than {REPORT_BYTES_MAX}")]
    TooLong(usize),
    /// The fields do not agree with each other.
    #[error("the report contradicts itself: {0}")]
    Contradiction(String),
}

impl Report {
    /// The whole series was analysed.
    pub fn complete(subject: Subject, results: Results, created: Timestamp) -> Self {
        Self::assemble(Status::Complete, None, subject, results, created)
    }

    /// A part of the series was analysed.
    pub fn partial(subject: Subject, results: Results, reason: Reason, created: Timestamp) -> Self {
        Self::assemble(Status::Partial, Some(reason), subject, results, created)
    }

    /// The data would not do.
    pub fn rejected(subject: Subject, rejection: &Rejection, created: Timestamp) -> Self {
        Self::assemble(Status::Rejected, Some(rejection.into()), subject, Results::default(), created)
    }

    /// Our fault or the world's.
    pub fn failed(subject: Subject, reason: Reason, created: Timestamp) -> Self {
        Self::assemble(Status::Failed, Some(reason), subject, Results::default(), created)
    }

    /// Nobody tried.
    pub fn not_attempted(subject: Subject, reason: Reason, created: Timestamp) -> Self {
        Self::assemble(Status::NotAttempted, Some(reason), subject, Results::default(), created)
    }

    fn assemble(status: Status, reason: Option<Reason>, subject: Subject, results: Results, created: Timestamp) -> Self {
        Self {
            schema: Schema,
            report_uid: subject.report_uid(),
            sequence: 0,
            created: rfc3339::to_millisecond(created),
            status,
            reason,
            exam: subject.exam,
            study_uid: subject.study_uid,
            series_uid: subject.series_uid,
            modality: subject.modality,
            device: subject.device,
            models: results.models,
            volume: results.volume,
            findings: results.findings,
            measurements: results.measurements,
            series_used: Vec::new(),
            timing_ms: BTreeMap::new(),
        }
    }

    /// What is said of a series whose report cannot be written: that it failed and why, and none of its figures.
    pub fn unfit(&self, bad: &BadReport) -> Self {
        Self {
            status: Status::Failed,
            reason: Some(Reason::new("fault", bad.to_string())),
            models: Vec::new(),
            volume: None,
            findings: Vec::new(),
            measurements: BTreeMap::new(),
            series_used: Vec::new(),
            timing_ms: BTreeMap::new(),
            ..self.clone()
        }
    }

    /// The same report with the volume a rejection is about (its missing slices, for one).
    pub fn with_volume(mut self, volume: VolumeUsed) -> Self {
        self.volume = Some(volume);
        self
    }

    /// The same report with the series of its study.
    pub fn with_series(mut self, series_used: Vec<SeriesUsed>) -> Self {
        self.series_used = series_used;
        self
    }

    /// The same report with one more time: `timing("detect", elapsed)`.
    pub fn with_timing(mut self, stage: &str, took: std::time::Duration) -> Self {
        self.timing_ms.insert(stage.into(), u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// Checks what the types cannot: status against reason and findings, numbers finite, findings numbered from 1.
    ///
    /// # Errors
    /// [`BadReport::Contradiction`] naming the field. NaN has no place in JSON, and a reader must never guess at it.
    pub fn check(&self) -> Result<(), BadReport> {
        let wrong = |what: String| Err(BadReport::Contradiction(what));
        match (&self.reason, self.status) {
            (Some(_), Status::Complete) => return wrong("a complete report has a reason".into()),
            (None, status) if status != Status::Complete => {
                return wrong(format!("a {} report has no reason", status.word()));
            }
            _ => {}
        }
        if !matches!(self.status, Status::Complete | Status::Partial) && !self.findings.is_empty() {
            return wrong(format!("a {} report has findings", self.status.word()));
        }
        for (place, finding) in self.findings.iter().enumerate() {
            if finding.id as usize != place + 1 {
                return wrong(format!("finding {} has the id {}", place + 1, finding.id));
            }
            let axes = [finding.long_axis_mm, finding.short_axis_mm, finding.mean_diameter_mm];
            let measures = axes.into_iter().chain([finding.volume_mm3, finding.area_mm2, finding.mean_hu]).flatten();
            let places = finding.centroid_lps_mm.iter().flatten().chain(&finding.centroid_voxel);
            let pixels = finding.in_pixels.iter().flat_map(|p| [p.long_axis, p.short_axis, p.area]);
            if !places.copied().chain(measures).chain(pixels).all(f64::is_finite) {
                return wrong(format!("finding {} has a number that is not finite", finding.id));
            }
            if finding.in_pixels.is_some() && axes.iter().any(Option::is_some) {
                return wrong(format!("finding {} has measures in pixels and in millimetres", finding.id));
            }
            if !(0.0..=1.0).contains(&finding.confidence) {
                return wrong(format!("finding {} has the confidence {}", finding.id, finding.confidence));
            }
        }
        match self.measurements.iter().find(|(_, m)| !m.value.is_finite()) {
            Some((name, _)) => wrong(format!("the measurement {name} is not finite")),
            None => Ok(()),
        }
    }

    /// One line of JSON, as it travels.
    ///
    /// # Errors
    /// As [`Report::check`], and [`BadReport::TooLong`].
    pub fn to_json(&self) -> Result<Vec<u8>, BadReport> {
        self.check()?;
        let json = serde_json::to_vec(self)?;
        if json.len() > REPORT_BYTES_MAX { Err(BadReport::TooLong(json.len())) } else { Ok(json) }
    }

    /// Indented JSON that ends with a line break, as in `findings.json`.
    ///
    /// # Errors
    /// As [`Report::check`].
    pub fn to_json_pretty(&self) -> Result<String, BadReport> {
        self.check()?;
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Reads a report; fields it does not know are passed over, since the schema may grow.
    ///
    /// # Errors
    /// [`BadReport`] for anything that is not a report of this schema or contradicts itself.
    pub fn from_json(json: &[u8]) -> Result<Self, BadReport> {
        if json.len() > 2 * REPORT_BYTES_MAX {
            return Err(BadReport::TooLong(json.len()));
        }
        let report: Self = serde_json::from_slice(json)?;
        report.check()?;
        Ok(report)
    }

    /// What depends on the images and the models alone, as JSON: no identity, sequence, time or device. The same series
    /// gives the same bytes on any board, with any number of threads, streamed or read from a folder.
    pub fn deterministic_json(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Deterministic<'a> {
            status: Status,
            reason: &'a Option<Reason>,
            exam: &'a str,
            study_uid: &'a Uid,
            series_uid: &'a Uid,
            modality: Modality,
            models: &'a [ModelUsed],
            volume: &'a Option<VolumeUsed>,
            findings: &'a [Finding],
            measurements: &'a BTreeMap<String, Measurement>,
        }
        let part = Deterministic {
            status: self.status,
            reason: &self.reason,
            exam: &self.exam,
            study_uid: &self.study_uid,
            series_uid: &self.series_uid,
            modality: self.modality,
            models: &self.models,
            volume: &self.volume,
            findings: &self.findings,
            measurements: &self.measurements,
        };
        serde_json::to_vec(&part).expect("maps with text keys always have a JSON form")
    }

    /// SHA-256 of [`Report::deterministic_json`], in hexadecimal: equal exactly when two runs found the same.
    pub fn findings_digest(&self) -> String {
        use sha2::{Digest, Sha256};
        Sha256::digest(self.deterministic_json()).iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// Timestamps as RFC 3339 in UTC with milliseconds.
mod rfc3339 {
    use jiff::Timestamp;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// What the text can hold, so that a report read back equals the one written.
    pub fn to_millisecond(time: Timestamp) -> Timestamp {
        Timestamp::from_millisecond(time.as_millisecond()).expect("the millisecond of a timestamp is a timestamp")
    }

    pub fn serialize<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{time:.3}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::finding::{Laterality, Site};
    use crate::study::RejectionCode;

    pub(crate) fn subject(series: u32) -> Subject {
        let uid = |tail: &str| Uid::parse(&format!("1.2.3.{series}.{tail}")).unwrap();
        Subject {
            exam: "chest-ct".into(),
            study_uid: uid("1"),
            series_uid: uid("2"),
            modality: Modality::Ct,
            device: Device { name: "box".into(), version: "0.1.0".into(), uid: Uid::parse("2.25.1").unwrap() },
            key: format!("series {series}"),
        }
    }

    pub(crate) fn noon() -> Timestamp {
        "2026-01-02T12:00:00.123456Z".parse().unwrap()
    }

    pub(crate) fn nodule() -> Finding {
        Finding {
            id: 1,
            tracking_uid: Uid::derived(b"nodule"),
            kind: "nodule".into(),
            confidence: 0.93,
            centroid_lps_mm: Some([-61.25, 12.5, -140.0]),
            centroid_voxel: [40.0, 255.5, 100.25],
            long_axis_mm: Some(9.5),
            short_axis_mm: Some(7.5),
            mean_diameter_mm: Some(8.5),
            volume_mm3: Some(320.0),
            area_mm2: None,
            in_pixels: None,
            mean_hu: Some(-12.5),
            site: Site { organ: "lung".into(), laterality: Some(Laterality::Right) },
            cine: None,
        }
    }

    pub(crate) fn complete(series: u32) -> Report {
        let grid = Grid { shape: [99, 512, 512], affine: Affine::axial(Spacing::new([2.5, 0.7, 0.7]).unwrap(), [0.0; 3]) };
        let mut results = Results { volume: Some(VolumeUsed::whole(&grid)), findings: vec![nodule()], ..Results::default() };
        results.measurements.insert("lung_volume_ml".into(), Measurement { value: 4321.0, unit: "mL".into() });
        results.models.push(ModelUsed { name: "lung-seg".into(), version: "0.1.0".into(), sha256: "0".repeat(64) });
        Report::complete(subject(series), results, noon()).with_timing("total", std::time::Duration::from_millis(2750))
    }

    #[test]
    fn a_report_reads_back_as_it_was_written_compact_and_pretty() {
        let report = complete(1);
        assert_eq!(Report::from_json(&report.to_json().unwrap()).unwrap(), report);
        assert_eq!(Report::from_json(report.to_json_pretty().unwrap().as_bytes()).unwrap(), report);
    }

    #[test]
    fn the_json_has_the_fields_and_words_of_the_schema() {
        let json: serde_json::Value = serde_json::from_slice(&complete(1).to_json().unwrap()).unwrap();
        assert_eq!(json["schema"], "scanside.report/1");
        assert_eq!(json["status"], "complete");
        assert!(json["reason"].is_null());
        assert_eq!(json["created"], "2026-01-02T12:00:00.123Z");
        assert_eq!(json["modality"], "CT");
        assert_eq!(json["volume"]["shape"], serde_json::json!([99, 512, 512]));
        assert_eq!(json["volume"]["spacing_mm"], serde_json::json!([2.5, 0.7, 0.7]));
        assert_eq!(json["volume"]["affine_lps"].as_array().unwrap().len(), 16);
        assert_eq!(json["findings"][0]["site"]["laterality"], "right");
        assert_eq!(json["measurements"]["lung_volume_ml"]["unit"], "mL");
        assert_eq!(json["timing_ms"]["total"], 2750);
        let rejected = Report::rejected(subject(1), &Rejection::new(RejectionCode::TooFewSlices, "one slice"), noon());
        let json: serde_json::Value = serde_json::from_slice(&rejected.to_json().unwrap()).unwrap();
        assert_eq!(json["status"], "rejected");
        assert_eq!(json["reason"], serde_json::json!({"code": "too_few_slices", "text": "one slice"}));
        let skipped = Report::not_attempted(subject(1), Reason::new("no_exam", "no exam\nfor XA"), noon());
        let json: serde_json::Value = serde_json::from_slice(&skipped.to_json().unwrap()).unwrap();
        assert_eq!((&json["status"], &json["reason"]["text"]), (&"not_attempted".into(), &"no exam for XA".into()));
    }

    #[test]
    fn added_fields_are_passed_over_and_another_schema_is_refused() {
        let json = String::from_utf8(complete(1).to_json().unwrap()).unwrap();
        let grown = json.replacen('{', "{\"new_in_a_later_version\":[1,2],", 1);
        assert_eq!(Report::from_json(grown.as_bytes()).unwrap(), complete(1));
        assert!(Report::from_json(json.replace("report/1", "report/2").as_bytes()).is_err());
    }

    #[test]
    fn two_runs_agree_on_the_findings_and_differ_in_identity_only() {
        let first = complete(1);
        let mut second = complete(1).with_timing("total", std::time::Duration::from_secs(9));
        second.created = "2027-01-01T00:00:00Z".parse().unwrap();
        second.sequence = 12;
        assert_eq!(first.deterministic_json(), second.deterministic_json());
        assert_eq!(first.findings_digest(), second.findings_digest());
        second.findings[0].confidence = 0.92;
        assert_ne!(first.findings_digest(), second.findings_digest());
        assert_eq!(first.report_uid, complete(1).report_uid);
        assert_ne!(first.report_uid, complete(2).report_uid);
    }

    #[test]
    fn contradictions_are_refused() {
        let spoil = |change: &dyn Fn(&mut Report)| {
            let mut report = complete(1);
            change(&mut report);
            assert!(matches!(report.to_json(), Err(BadReport::Contradiction(_))), "{report:?}");
        };
        spoil(&|r| r.findings[0].volume_mm3 = Some(f64::NAN));
        spoil(&|r| r.findings[0].confidence = 1.5);
        spoil(&|r| r.findings[0].id = 0);
        spoil(&|r| r.status = Status::Rejected);
        spoil(&|r| r.reason = Some(Reason::new("x", "y")));
        spoil(&|r| r.measurements.get_mut("lung_volume_ml").unwrap().value = f64::INFINITY);
    }
}
