//! `model.toml`: what a network sees and says, in words a program can check (schema `scanside.model/1`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The schema this code reads.
pub const SCHEMA: &str = "scanside.model/1";
/// Voxels of one run: 512^3. More is a mistake in a manifest, or an attack on the memory.
const INPUT_VALUES_MAX: usize = 1 << 27;
/// Files of a package; more is not a package.
const FILES_MAX: usize = 256;

/// A manifest that makes no sense: which field, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct BadManifest {
    /// Name of the field.
    pub field: String,
    /// What is wrong.
    pub why: String,
}

impl BadManifest {
    /// A field and what is wrong with it.
    pub fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self { field: field.into(), why: why.into() }
    }
}

/// What a package does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A label for each voxel.
    Segmentation,
    /// A heat map of places, and a box for each.
    Detection,
    /// One answer for a patch.
    Classification,
    /// Trees on named features (`forest.json`).
    Forest,
}

/// `model.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `scanside.model/1`.
    pub schema: String,
    /// Lower-case letters, digits and hyphens; the name of the folder too.
    pub name: String,
    /// Of the package, `1.2.3`.
    pub version: String,
    /// What it does.
    pub kind: Kind,
    /// One sentence for people.
    #[serde(default)]
    pub summary: String,
    /// SPDX expression.
    pub licence: String,
    /// What the network sees.
    #[serde(default)]
    pub input: Input,
    /// What it says.
    #[serde(default)]
    pub output: Output,
    /// Named numbers an exam reads.
    #[serde(default)]
    pub thresholds: BTreeMap<String, f64>,
    /// What it must say to what, on any machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub golden: Option<Golden>,
    /// SHA-256 of every file beside `model.toml`, in lower-case hexadecimal digits.
    pub files: BTreeMap<String, String>,
    /// Where it comes from: data, licences, command; free text.
    #[serde(default)]
    pub provenance: toml::Table,
}

/// What the network sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Input {
    /// `CT`, `MR`, `US`.
    pub modality: String,
    /// What each channel is, in their order.
    pub channels: Vec<String>,
    /// 2: one slice at a time; 3: patches.
    pub dimensions: usize,
    /// z, y, x of the working grid in mm; 0 means the series' own.
    pub spacing_mm: [f64; 3],
    /// Factors on `spacing_mm` at which the network looks again for larger things; `[1.0]` for one look.
    pub pyramid: Vec<f64>,
    /// Where columns, rows and slices of the working grid run: letters of L R, P A, S I.
    pub orientation: String,
    /// Of one run: N C H W, or N C D H W.
    pub shape: Vec<usize>,
    /// How stored values become what the network sees.
    pub scaling: Scaling,
    /// Values are clipped to it first (Hounsfield units for CT).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<[f64; 2]>,
    /// What the ends of the window become.
    pub range: [f64; 2],
    /// What lies outside the image, before windowing.
    pub pad_value: f64,
    /// Voxels of overlap at each side of a patch, z, y, x.
    pub halo: [usize; 3],
}

impl Default for Input {
    fn default() -> Self {
        Self {
            modality: "CT".into(),
            channels: vec!["CT".into()],
            dimensions: 3,
            spacing_mm: [0.0; 3],
            pyramid: vec![1.0],
            orientation: "LPS".into(),
            shape: Vec::new(),
            scaling: Scaling::Window,
            window: None,
            range: [0.0, 1.0],
            pad_value: 0.0,
            halo: [0; 3],
        }
    }
}

/// How values become what a network sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scaling {
    /// The window becomes the range, linearly.
    #[default]
    Window,
    /// Mean 0 and standard deviation 1 of each slice's values above zero.
    ZScoreSlice,
    /// Mean 0 and standard deviation 1 of all values of each slice, its background too.
    ZScoreSliceAll,
    /// Mean 0 and standard deviation 1 of the volume's values above zero.
    ZScore,
    /// Median 0 and mean absolute deviation 1 of the volume's values above zero, clipped to the range.
    RobustZScore,
    /// The 99th percentile of what is brighter than a tenth of the volume's mean becomes 1, clipped to the range.
    Brightest,
    /// Lowest and highest value of the volume become the range.
    MinMax,
}

/// What the network says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Output {
    /// `logits`, `softmax`: one map for each label. `sigmoid`, `sigmoid-logits`: one for each label but the background, with
    /// or without the function applied. `heatmap`.
    pub kind: String,
    /// What the channels mean, in their order; of a segmentation, the first is the background.
    pub labels: Vec<String>,
    /// Input voxels per output voxel, z, y, x.
    pub stride: [usize; 3],
}

impl Default for Output {
    fn default() -> Self {
        Self { kind: "logits".into(), labels: Vec::new(), stride: [1; 3] }
    }
}

impl Output {
    /// What a map must exceed to beat the background, for networks that have no map for it.
    pub fn background(&self) -> Option<f32> {
        match self.kind.as_str() {
            "sigmoid" => Some(0.5),
            "sigmoid-logits" => Some(0.0),
            _ => None,
        }
    }
}

/// An input, and what the network says to it: little-endian 32-bit floats, row by row.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Golden {
    /// File of the input.
    pub input: String,
    /// Its shape.
    pub input_shape: Vec<usize>,
    /// Files of the outputs.
    pub outputs: Vec<String>,
    /// Their shapes.
    pub output_shapes: Vec<Vec<usize>>,
    /// Largest difference allowed; 0 for networks that compute in integers, which every machine does alike.
    pub tolerance: f64,
}

impl Manifest {
    /// Reads and checks `model.toml`.
    ///
    /// # Errors
    /// [`BadManifest`]: the first field that makes no sense.
    pub fn parse(text: &str) -> Result<Self, BadManifest> {
        let manifest: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            BadManifest::new(format!("model.toml line {line}"), e.message().to_owned())
        })?;
        manifest.check()?;
        Ok(manifest)
    }

    /// A named number, or `default` where the manifest has none.
    pub fn threshold(&self, name: &str, default: f64) -> f64 {
        self.thresholds.get(name).copied().unwrap_or(default)
    }

    pub(super) fn check(&self) -> Result<(), BadManifest> {
        let say = |field: &str, why: &str| Err(BadManifest::new(field, why));
        if self.schema != SCHEMA {
            return Err(BadManifest::new("schema", format!("{:?} is not {SCHEMA:?}, the one read here", self.schema)));
        }
        let name_fits = |n: &str| {
            (1..=64).contains(&n.len())
                && n.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !n.starts_with('-')
        };
        if !name_fits(&self.name) {
            return say("name", "1 to 64 lower-case letters, digits and hyphens are wanted");
        }
        if !(1..=32).contains(&self.version.len()) || !self.version.bytes().all(|b| b.is_ascii_graphic()) {
            return say("version", "1 to 32 printable characters are wanted");
        }
        if self.thresholds.values().any(|v| !v.is_finite()) {
            return say("thresholds", "a number is not finite");
        }
        self.check_files()?;
        self.check_golden()?;
        if self.kind == Kind::Forest { Ok(()) } else { self.check_network() }
    }

    fn check_files(&self) -> Result<(), BadManifest> {
        if self.files.is_empty() || self.files.len() > FILES_MAX {
            return Err(BadManifest::new("files", format!("1 to {FILES_MAX} files are wanted")));
        }
        for (name, digest) in &self.files {
            let parts_fit = name.split('/').all(|part| {
                !part.is_empty()
                    && !part.starts_with('.')
                    && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
            });
            if !parts_fit || name.len() > 128 {
                let why = format!("{name:?} is not the name of a file inside the package");
                return Err(BadManifest::new("files", why));
            }
            if digest.len() != 64 || !digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                return Err(BadManifest::new("files", format!("the digest of {name} is not 64 hexadecimal digits")));
            }
        }
        Ok(())
    }

    fn check_golden(&self) -> Result<(), BadManifest> {
        let Some(golden) = &self.golden else { return Ok(()) };
        let say = |why: &str| Err(BadManifest::new("golden", why));
        let listed = |name: &String| self.files.contains_key(name);
        if !listed(&golden.input) || !golden.outputs.iter().all(listed) {
            return say("names a file that [files] does not list");
        }
        if golden.outputs.is_empty() || golden.outputs.len() != golden.output_shapes.len() {
            return say("has not one shape for each output");
        }
        if !(golden.tolerance.is_finite() && golden.tolerance >= 0.0) {
            return say("has a tolerance that is no tolerance");
        }
        Ok(())
    }

    fn check_network(&self) -> Result<(), BadManifest> {
        let say = |field: &str, why: String| Err(BadManifest::new(field, why));
        let input = &self.input;
        if !(2..=3).contains(&input.dimensions) {
            return say("input.dimensions", format!("{} is neither 2 nor 3", input.dimensions));
        }
        let rank = input.dimensions + 2;
        if input.shape.len() != rank {
            let got = input.shape.len();
            return say("input.shape", format!("a network of {} dimensions has {rank} numbers here, not {got}", rank - 2));
        }
        let values = input.shape.iter().try_fold(1usize, |n, s| n.checked_mul(*s)).unwrap_or(usize::MAX);
        if values == 0 || values > INPUT_VALUES_MAX {
            return say("input.shape", format!("{:?} is empty or larger than {INPUT_VALUES_MAX} values", input.shape));
        }
        if input.channels.len() != input.shape[1] {
            return say("input.channels", format!("{} named, the shape has {}", input.channels.len(), input.shape[1]));
        }
        if input.spacing_mm.iter().any(|s| !(0.0..=100.0).contains(s)) {
            return say("input.spacing_mm", format!("{:?}: each must be 0 to 100", input.spacing_mm));
        }
        if input.pyramid.is_empty() || input.pyramid.len() > 8 || input.pyramid.iter().any(|f| !(0.1..=16.0).contains(f)) {
            return say("input.pyramid", "1 to 8 factors from 0.1 to 16 are wanted".into());
        }
        let axis = |letters: &str| input.orientation.chars().filter(|c| letters.contains(*c)).count() == 1;
        if input.orientation.len() != 3 || !(axis("LR") && axis("PA") && axis("SI")) {
            return say("input.orientation", format!("{:?} does not name three axes such as LPS", input.orientation));
        }
        if let Some([low, high]) = input.window
            && !(low.is_finite() && high.is_finite() && low < high)
        {
            return say("input.window", format!("{:?} is not a range", [low, high]));
        }
        if input.scaling == Scaling::Window && input.window.is_none() {
            return say("input.window", "is missing, and the scaling is by window".into());
        }
        if !(input.range[0].is_finite() && input.range[1].is_finite() && input.range[0] < input.range[1]) {
            return say("input.range", format!("{:?} is not a range", input.range));
        }
        if !input.pad_value.is_finite() {
            return say("input.pad_value", "is not finite".into());
        }
        let patch = self.patch();
        if (0..3).any(|a| input.halo[a].saturating_mul(2) >= patch[a]) {
            return say("input.halo", format!("{:?} leaves nothing of a patch of {patch:?}", input.halo));
        }
        let stride = self.output.stride;
        if (0..3).any(|a| stride[a] == 0 || stride[a] > patch[a] || patch[a] % stride[a] != 0) {
            return say("output.stride", format!("{stride:?} does not divide a patch of {patch:?}"));
        }
        if (0..3).any(|a| input.halo[a] % stride[a] != 0) {
            return say("input.halo", format!("{:?} is not a multiple of the stride {stride:?}", input.halo));
        }
        if self.kind == Kind::Segmentation && !(2..=256).contains(&self.output.labels.len()) {
            return say("output.labels", "a segmentation has 2 to 256 labels, the background first".into());
        }
        Ok(())
    }

    /// Voxels of one run as z, y, x; one slice for a network of two dimensions.
    pub fn patch(&self) -> [usize; 3] {
        let shape = &self.input.shape;
        match shape.len() {
            4 => [1, shape[2], shape[3]],
            5 => [shape[2], shape[3], shape[4]],
            _ => [0; 3],
        }
    }
}
