//! The vocabulary of a study: identifiers, modalities, and why a series may be turned down.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A DICOM unique identifier (PS3.5 chapter 9): at most 64 characters of digits and dots.
///
/// Anything else cannot be built, so a `Uid` is safe as a log word and as part of a file name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Uid(Box<str>);

/// The text is not a UID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a UID (1 to 64 digits and dots): {0:?}")]
pub struct BadUid(pub String);

impl Uid {
    /// Reads a UID, forgiving the trailing NUL or space that pads it to even length on the wire.
    ///
    /// # Errors
    /// [`BadUid`] for anything but 1 to 64 digits and dots; leading zeros are accepted, since scanners send them.
    pub fn parse(text: &str) -> Result<Self, BadUid> {
        let text = text.trim_end_matches(['\0', ' ']).trim_start();
        let fits = (1..=64).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_digit() || b == b'.')
            && !text.starts_with('.')
            && !text.ends_with('.')
            && !text.contains("..");
        if fits { Ok(Self(text.into())) } else { Err(BadUid(text.chars().take(80).collect())) }
    }

    /// A UID under `2.25.` (PS3.5 B.2) that depends on `seed` alone: the same seed gives the same UID on any board.
    pub fn derived(seed: &[u8]) -> Self {
        use sha2::{Digest, Sha256};
        let digest = Sha256::digest(seed);
        let mut bytes: [u8; 16] = digest[..16].try_into().expect("a SHA-256 digest has 32 bytes");
        // Version 8 (RFC 9562): a name-based UUID by a hash of the application's choice.
        bytes[6] = (bytes[6] & 0x0f) | 0x80;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        Self(format!("2.25.{}", u128::from_be_bytes(bytes)).into())
    }

    /// The text of the UID.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Uid {
    type Error = BadUid;
    fn try_from(text: String) -> Result<Self, BadUid> {
        Self::parse(&text)
    }
}

impl From<Uid> for String {
    fn from(uid: Uid) -> String {
        uid.0.into()
    }
}

/// What kind of machine made the images (0008,0060).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Modality {
    /// Computed tomography.
    Ct,
    /// Magnetic resonance.
    Mr,
    /// Ultrasound.
    Us,
    /// Any other; the service takes none of these.
    Other,
}

impl Modality {
    /// Reads the value of (0008,0060).
    pub fn parse(text: &str) -> Self {
        match text.trim_matches(['\0', ' ']) {
            "CT" => Self::Ct,
            "MR" => Self::Mr,
            "US" => Self::Us,
            _ => Self::Other,
        }
    }

    /// The defined term of PS3.3 C.7.3.1.1.1, `OT` for the others.
    pub fn term(self) -> &'static str {
        match self {
            Self::Ct => "CT",
            Self::Mr => "MR",
            Self::Us => "US",
            Self::Other => "OT",
        }
    }
}

/// What a series of magnetic resonance says of how it was made: enough to tell its contrast (PS3.3 C.8.3.1, C.8.13.4).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MrAcquisition {
    /// Scanning Sequence (0018,0020): of SE, IR, GR, EP, RM.
    pub scanning_sequence: String,
    /// Sequence Variant (0018,0021).
    pub sequence_variant: String,
    /// Image Type (0008,0008): what was computed rather than measured says so here.
    pub image_type: String,
    /// Whether contrast agent was given, as far as tags tell: Contrast/Bolus Agent (0018,0010) names one or denies it, or its sequence
    /// (0018,0012) or volume (0018,1041) is there. Many consoles leave all of them empty.
    pub contrast_agent: Option<bool>,
    /// Angio Flag (0018,0025) is set.
    pub angiography: bool,
    /// Diffusion b-value (0018,9087) above zero.
    pub diffusion: bool,
    /// Repetition Time (0018,0080).
    pub repetition_ms: Option<f64>,
    /// Echo Time (0018,0081), or Effective Echo Time of an enhanced object.
    pub echo_ms: Option<f64>,
    /// Inversion Time (0018,0082).
    pub inversion_ms: Option<f64>,
    /// Acquisition Contrast (0008,9209) of an enhanced object: T1, T2, FLUID_ATTENUATED, …
    pub acquisition_contrast: String,
    /// Series Description (0008,103E), or the name of a file. People wrote it, so it never goes into a log or a report.
    pub description: String,
}

/// Why a series is not analysed though nothing of ours failed: the data's fault, and an ordinary outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct Rejection {
    /// A word for programs.
    pub code: RejectionCode,
    /// One sentence for people: what and where.
    pub text: String,
}

impl Rejection {
    /// A rejection with its sentence.
    pub fn new(code: RejectionCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

/// The words of [`Rejection::code`]; words may be added, none changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RejectionCode {
    /// No image was found where images were expected.
    NoImages,
    /// The bytes are not what they say they are, or end too early.
    Malformed,
    /// A compression or pixel format that cannot be decoded here.
    Unsupported,
    /// Fewer slices than a volume needs.
    TooFewSlices,
    /// Slices are missing inside the lattice.
    Gap,
    /// Two different images claim the same place.
    ConflictingDuplicate,
    /// Slices of more than one orientation.
    MixedOrientation,
    /// Slices that differ in rows, columns, pixel spacing or pixel format.
    MixedGeometry,
    /// The slices are sheared against their normal (gantry tilt) and the exam needs a straight stack.
    GantryTilt,
    /// The slice positions follow no even lattice and the exam needs one.
    UnevenSpacing,
    /// More than one patient or frame of reference where one is needed.
    MixedStudy,
    /// Larger than the limits of this board.
    TooLarge,
    /// The images show something the exam is not for (no lungs in a chest CT, a wrong modality).
    WrongContent,
    /// A contrast the exam cannot do without is missing.
    MissingContrast,
}
