//! One DICOM file or data set, understood: identifiers, geometry of every frame, pixel format, and where the pixels are.

use std::io::Read;
use std::ops::Range;

use dicom_core::Tag;
use dicom_dictionary_std::tags;
use sha2::{Digest, Sha256};

use super::elements::{Broken, Element, Elements, Encoding, Head};
use super::transfer::{Codec, TransferSyntax};
use crate::geometry::Plane;
use crate::study::{Modality, Rejection, RejectionCode, Uid};
use crate::volume::{MappedFile, Rescale, VoxelType};

/// Bytes of one instance, inflated. A cine of an hour is below it; a deflate bomb is not.
pub const INSTANCE_BYTES_MAX: usize = 2 << 30;

/// Frames of one instance. Enhanced objects have thousands; each costs memory before its pixels are looked at.
const FRAMES_MAX: usize = 65_536;

/// Pixels of one frame: 16,384 squared. Larger ones are whole-slide images or lies.
const FRAME_PIXELS_MAX: usize = 1 << 28;

/// What one pixel is before and after decoding (PS3.3 C.7.6.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PixelFormat {
    /// Samples per Pixel: 1, or 3 for colour.
    pub samples: usize,
    /// Bits Allocated: 1, 8, 16, 32 or 64.
    pub bits_allocated: u16,
    /// Bits Stored.
    pub bits_stored: u16,
    /// High Bit.
    pub high_bit: u16,
    /// Pixel Representation: two's complement.
    pub signed: bool,
    /// Photometric Interpretation.
    pub photometric: String,
    /// Planar Configuration 1: all of one colour, then the next.
    pub planar: bool,
    /// Float Pixel Data or Double Float Pixel Data.
    pub float: bool,
}

impl PixelFormat {
    /// What one decoded pixel is.
    pub fn voxel_type(&self) -> VoxelType {
        match (self.bits_allocated, self.signed, self.float) {
            (32, _, true) => VoxelType::F32,
            (64, _, _) => VoxelType::F64,
            (1, _, _) | (8, false, _) => VoxelType::U8,
            (8, true, _) => VoxelType::I8,
            (16, false, _) => VoxelType::U16,
            (16, true, _) => VoxelType::I16,
            (_, false, _) => VoxelType::U32,
            (_, true, _) => VoxelType::I32,
        }
    }
}

/// What is particular to one frame.
#[derive(Debug, Clone, PartialEq)]
pub struct FrameHeader {
    /// Where it is in patient space; None for projections and ultrasound.
    pub plane: Option<Plane>,
    /// From stored to real values.
    pub rescale: Rescale,
    /// Window Centre and Window Width the scanner suggests.
    pub window: Option<[f64; 2]>,
    /// Slice Thickness as written. Never used for geometry.
    pub slice_thickness_mm: Option<f64>,
    /// What tells apart frames at the same place: temporal position, echo, b-value, acquisition. Equal numbers, same pass.
    pub pass: [i64; 4],
    /// Stack ID and place in the stack, or zeros.
    pub stack: [u32; 2],
    /// A localizer (scout), by Image Type or Frame Type.
    pub localizer: bool,
}

/// A calibrated region of an ultrasound frame (PS3.3 C.8.5.5).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UltrasoundRegion {
    /// Region Spatial Format: 1 tissue, 2 colour flow, 3 spectral, 4 wave form.
    pub spatial_format: u16,
    /// `[left, top, right, bottom]` in pixels, the last included.
    pub box_pixels: [u32; 4],
    /// Physical Delta Y and X in millimetres per pixel; None where the unit is no length.
    pub spacing_mm: Option<[f64; 2]>,
}

/// Everything this box wants to know of an instance, and no patient's name.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// How it was written.
    pub transfer_syntax: &'static TransferSyntax,
    /// SOP Class UID.
    pub sop_class: Uid,
    /// SOP Instance UID.
    pub sop_instance: Uid,
    /// Series Instance UID.
    pub series: Uid,
    /// Study Instance UID.
    pub study: Uid,
    /// Frame of Reference UID.
    pub frame_of_reference: Option<Uid>,
    /// Modality.
    pub modality: Modality,
    /// A one-way fingerprint of Patient ID, or of the name where there is no ID: equal for one patient, and no identity.
    pub patient: u64,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// One per frame; at least one.
    pub frames: Vec<FrameHeader>,
    /// What the pixels are.
    pub pixel: PixelFormat,
    /// Instance Number.
    pub instance_number: Option<i64>,
    /// Images in Acquisition, as announced by the scanner.
    pub images_in_acquisition: Option<usize>,
    /// Gantry/Detector Tilt in degrees as written. The tilt that counts is measured from positions.
    pub gantry_tilt_degrees: Option<f64>,
    /// Pixel Padding Value: stored value outside the scanned circle.
    pub padding: Option<i64>,
    /// Distance between rows and columns where no patient space is known: `[rows, columns]`.
    pub pixel_spacing_mm: Option<[f64; 2]>,
    /// Time between the frames of a cine.
    pub frame_time_ms: Option<f64>,
    /// Calibrated regions of an ultrasound image.
    pub ultrasound_regions: Vec<UltrasoundRegion>,
}

/// Where the pixels of each frame are.
#[derive(Debug, Clone)]
pub(super) enum PixelSource {
    /// One piece, frame after frame; `words` tells 16-bit words (OW) from bytes (OB).
    Native { at: Range<usize>, words: bool },
    /// The fragments of each frame.
    Fragments(Vec<Vec<Range<usize>>>),
}

/// The bytes an instance lies in.
#[derive(Debug)]
pub(super) enum Held<'a> {
    Borrowed(&'a [u8]),
    Owned(Vec<u8>),
    Mapped(MappedFile),
}

impl std::ops::Deref for Held<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Owned(bytes) => bytes,
            Self::Mapped(file) => file,
        }
    }
}

/// A parsed instance over the bytes it came in (or over their inflated copy).
#[derive(Debug)]
pub struct Instance<'a> {
    /// What it says about itself.
    pub header: Header,
    pub(super) bytes: Held<'a>,
    /// Where the data set starts in `bytes`.
    data_set_at: usize,
    pub(super) source: PixelSource,
    pub(super) palette: Option<[Range<usize>; 6]>,
}

pub(super) fn malformed(text: impl Into<String>) -> Rejection {
    Rejection::new(RejectionCode::Malformed, text)
}

pub(super) fn unsupported(text: impl Into<String>) -> Rejection {
    Rejection::new(RejectionCode::Unsupported, text)
}

impl From<Broken> for Rejection {
    fn from(broken: Broken) -> Self {
        malformed(format!("the DICOM data set is broken at byte {}: {}", broken.at, broken.what))
    }
}

/// Start of the data set and its transfer syntax.
fn open_file(bytes: &[u8]) -> Result<(usize, &'static TransferSyntax), Rejection> {
    let not_dicom = || malformed("this is no DICOM file: neither the DICM mark nor a data set at its start");
    let meta_at = match bytes.get(128..132) {
        Some(b"DICM") => 132,
        _ if bytes.starts_with(&[2, 0]) => 0,
        // A bare data set, as written by old software: groups start with 0008 (or 0000 to 0004 are never images).
        _ if bytes.starts_with(&[8, 0]) || bytes.starts_with(&[0, 8]) => {
            return guess_encoding(bytes).map(|e| (0, TransferSyntax::of_encoding(e))).ok_or_else(not_dicom);
        }
        _ => return Err(not_dicom()),
    };
    let mut meta = Elements::new(&bytes[meta_at..], Encoding::EXPLICIT);
    let mut uid = None;
    while bytes.get(meta_at + meta.position()..).is_some_and(|rest| rest.starts_with(&[2, 0])) {
        let Some(element) = meta.next()? else { break };
        if element.tag == tags::TRANSFER_SYNTAX_UID {
            uid = element.text();
        }
    }
    let at = meta_at + meta.position();
    let guess = || bytes.get(at..).and_then(guess_encoding).map(TransferSyntax::of_encoding);
    match uid.filter(|uid| !uid.is_empty()) {
        Some(uid) => Ok((at, TransferSyntax::find(uid).ok_or_else(|| unknown_syntax(uid))?)),
        None => Ok((at, guess().ok_or_else(|| malformed("the file names no transfer syntax"))?)),
    }
}

fn unknown_syntax(uid: &str) -> Rejection {
    unsupported(match Uid::parse(uid) {
        Ok(uid) => format!("transfer syntax {uid} cannot be decoded here"),
        Err(_) => "the transfer syntax is not a UID".to_owned(),
    })
}

/// What the first element of a data set looks like.
fn guess_encoding(data_set: &[u8]) -> Option<Encoding> {
    let head = data_set.first_chunk::<8>()?;
    let letters = head[4].is_ascii_uppercase() && head[5].is_ascii_uppercase();
    let little = u16::from_le_bytes([head[0], head[1]]);
    let big = u16::from_be_bytes([head[0], head[1]]);
    match (little <= 0x0020, big <= 0x0020, letters) {
        (true, _, true) => Some(Encoding::EXPLICIT),
        (true, _, false) => Some(Encoding::IMPLICIT),
        (false, true, true) => Some(Encoding::EXPLICIT_BIG),
        _ => None,
    }
}

fn inflate(deflated: &[u8]) -> Result<Vec<u8>, Rejection> {
    let mut out = Vec::new();
    let limit = INSTANCE_BYTES_MAX as u64;
    flate2::read::DeflateDecoder::new(deflated)
        .take(limit + 1)
        .read_to_end(&mut out)
        .map_err(|error| malformed(format!("the deflated data set cannot be inflated: {error}")))?;
    if out.len() as u64 > limit {
        return Err(Rejection::new(RejectionCode::TooLarge, "the deflated data set is above 2 GiB when inflated"));
    }
    Ok(out)
}

impl<'a> Instance<'a> {
    /// Reads a DICOM file (PS3.10), or a bare data set as old software wrote it.
    ///
    /// Only lengths that fit the bytes are believed, and nothing is decoded yet.
    ///
    /// # Errors
    /// A [`Rejection`]: `Malformed` for what is no DICOM or ends early, `Unsupported` for a transfer syntax or pixel
    /// format that cannot be decoded, `NoImages` for an object without pixels, `TooLarge` above the limits.
    pub fn parse(file: &'a [u8]) -> Result<Self, Rejection> {
        let (at, syntax) = open_file(file)?;
        Self::from_parts(Held::Borrowed(file), at, syntax)
    }

    /// Reads a DICOM file that is too large to copy into memory.
    ///
    /// # Errors
    /// As [`Instance::parse`].
    pub fn parse_mapped(file: MappedFile) -> Result<Instance<'static>, Rejection> {
        let (at, syntax) = open_file(&file)?;
        Instance::from_parts(Held::Mapped(file), at, syntax)
    }

    /// Reads a data set as it comes over an association.
    ///
    /// # Errors
    /// As [`Instance::parse`].
    pub fn parse_data_set(data_set: &'a [u8], transfer_syntax: &str) -> Result<Self, Rejection> {
        let syntax = TransferSyntax::find(transfer_syntax).ok_or_else(|| unknown_syntax(transfer_syntax))?;
        Self::from_parts(Held::Borrowed(data_set), 0, syntax)
    }

    fn from_parts(file: Held<'a>, at: usize, syntax: &'static TransferSyntax) -> Result<Self, Rejection> {
        let rest = file.get(at..).ok_or_else(|| malformed("the file ends before its data set"))?;
        let (bytes, at) = if syntax.deflated { (Held::Owned(inflate(rest)?), 0) } else { (file, at) };
        let (header, pixels, raw) = read_header(&bytes[at..], syntax)?;
        let shift = |range: Range<usize>| range.start + at..range.end + at;
        let source = locate(&bytes, at, &header, &pixels, &raw)?;
        let palette = raw.palette.map(|p| p.map(shift));
        Ok(Self { header, bytes, data_set_at: at, source, palette })
    }

    /// The text of a top-level element, decoded by the instance's character set. For a person's own eyes only: this is
    /// where names come from.
    pub fn text(&self, tag: Tag) -> Option<String> {
        use dicom_encoding::text::{SpecificCharacterSet, TextCodec};
        let elements = self.elements();
        let value = elements.find(tag)?.value;
        let charset = elements
            .find(tags::SPECIFIC_CHARACTER_SET)
            .and_then(|e| e.text())
            .and_then(|t| t.split('\\').map(str::trim).find(|t| !t.is_empty()).map(str::to_owned))
            .and_then(|code| SpecificCharacterSet::from_code(&code))
            .unwrap_or(SpecificCharacterSet::ISO_IR_100);
        let text = charset.decode(value).unwrap_or_else(|_| String::from_utf8_lossy(value).into_owned());
        Some(text.trim_matches(['\0', ' ']).chars().filter(|c| !c.is_control()).collect())
    }

    fn elements(&self) -> Elements<'_> {
        Elements::new(&self.bytes[self.data_set_at..], encoding_of(&self.bytes[self.data_set_at..], self.header.transfer_syntax))
    }
}

impl Header {
    /// Reads the header from the first bytes of a file. None when the pixels start beyond them (or the data set is
    /// deflated): then more must be read.
    ///
    /// # Errors
    /// As [`Instance::parse`], but for what concerns the pixels themselves.
    pub fn parse_start(file_start: &[u8]) -> Result<Option<Self>, Rejection> {
        let (at, syntax) = match open_file(file_start) {
            Ok(opened) => opened,
            Err(r) if r.code == RejectionCode::Malformed && file_start.get(128..132) == Some(b"DICM") => return Ok(None),
            Err(r) => return Err(r),
        };
        if syntax.deflated {
            return Ok(None);
        }
        match read_header(file_start.get(at..).unwrap_or_default(), syntax) {
            Ok((header, _, _)) => Ok(Some(header)),
            Err(r) if matches!(r.code, RejectionCode::Malformed | RejectionCode::NoImages) => Ok(None),
            Err(r) => Err(r),
        }
    }

    /// Bytes of one decoded frame: one value per pixel.
    pub fn frame_bytes(&self) -> usize {
        self.rows * self.columns * self.pixel.voxel_type().bytes()
    }
}

/// The encoding of the data set: what the syntax says, unless the first element shows that the writer erred.
fn encoding_of(data_set: &[u8], syntax: &TransferSyntax) -> Encoding {
    match guess_encoding(data_set) {
        Some(seen) if seen.big_endian == syntax.encoding.big_endian && seen.explicit != syntax.encoding.explicit => seen,
        _ => syntax.encoding,
    }
}

/// Elements that are kept raw until all of them are known.
#[derive(Default)]
struct Raw<'a> {
    sop_class: Option<&'a str>,
    sop_instance: Option<&'a str>,
    series: Option<&'a str>,
    study: Option<&'a str>,
    frame_of_reference: Option<&'a str>,
    modality: Option<&'a str>,
    image_type: Option<&'a str>,
    patient_id: &'a [u8],
    patient_name: &'a [u8],
    rows: Option<u16>,
    columns: Option<u16>,
    samples: Option<u16>,
    bits_allocated: Option<u16>,
    bits_stored: Option<u16>,
    high_bit: Option<u16>,
    representation: Option<u16>,
    photometric: Option<&'a str>,
    planar: Option<u16>,
    frames: Option<i64>,
    instance_number: Option<i64>,
    images_in_acquisition: Option<i64>,
    acquisition: Option<i64>,
    temporal: Option<i64>,
    echo: Option<i64>,
    gantry_tilt: Option<f64>,
    padding: Option<u16>,
    imager_spacing: Option<[f64; 2]>,
    frame_time: Option<f64>,
    plain: Place,
    shared: Option<Element<'a>>,
    per_frame: Option<Element<'a>>,
    regions: Option<Element<'a>>,
    extended_offsets: Option<Vec<u64>>,
    frame_offsets: Vec<f64>,
    palette: Option<[Range<usize>; 6]>,
}

/// Geometry and value transformation, from the top level or from a functional group.
#[derive(Debug, Default, Clone, Copy)]
struct Place {
    position: Option<[f64; 3]>,
    orientation: Option<[f64; 6]>,
    pixel_spacing: Option<[f64; 2]>,
    thickness: Option<f64>,
    slope: Option<f64>,
    intercept: Option<f64>,
    window: Option<[f64; 2]>,
    temporal: Option<i64>,
    echo: Option<i64>,
    b_value: Option<i64>,
    stack: [u32; 2],
    localizer: bool,
    real_value_map: bool,
}

fn read_header<'b>(data_set: &'b [u8], syntax: &'static TransferSyntax) -> Result<(Header, Head, Raw<'b>), Rejection> {
    let encoding = encoding_of(data_set, syntax);
    let mut elements = Elements::new(data_set, encoding);
    let mut raw = Raw::default();
    let mut palette: [Range<usize>; 6] = Default::default();
    let pixels = loop {
        let Some(head) = elements.head()? else {
            let what = raw.modality.filter(|m| m.len() <= 16 && m.is_ascii()).unwrap_or("unknown");
            return Err(Rejection::new(RejectionCode::NoImages, format!("the object (modality {what}) has no pixels")));
        };
        if matches!(head.tag, tags::PIXEL_DATA | tags::FLOAT_PIXEL_DATA | tags::DOUBLE_FLOAT_PIXEL_DATA) {
            break head;
        }
        let element = elements.value(&head)?;
        let palette_slot = match head.tag {
            tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR => Some(0),
            tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR => Some(1),
            tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR => Some(2),
            tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DATA => Some(3),
            tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DATA => Some(4),
            tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DATA => Some(5),
            _ => None,
        };
        match palette_slot {
            Some(slot) => palette[slot] = head.value_at..head.value_at + element.value.len(),
            None => raw.take(&element),
        }
    };
    if palette.iter().all(|range| !range.is_empty()) {
        raw.palette = Some(palette);
    }
    let header = raw.header(syntax, &pixels)?;
    Ok((header, pixels, raw))
}

impl<'a> Raw<'a> {
    fn take(&mut self, e: &Element<'a>) {
        match e.tag {
            tags::IMAGE_TYPE => self.image_type = e.text(),
            tags::SOP_CLASS_UID => self.sop_class = e.text(),
            tags::SOP_INSTANCE_UID => self.sop_instance = e.text(),
            tags::MODALITY => self.modality = e.text(),
            tags::PATIENT_NAME => self.patient_name = e.value,
            tags::PATIENT_ID => self.patient_id = e.value,
            tags::STUDY_INSTANCE_UID => self.study = e.text(),
            tags::SERIES_INSTANCE_UID => self.series = e.text(),
            tags::FRAME_OF_REFERENCE_UID => self.frame_of_reference = e.text(),
            tags::ACQUISITION_NUMBER => self.acquisition = e.integer(),
            tags::INSTANCE_NUMBER => self.instance_number = e.integer(),
            tags::IMAGES_IN_ACQUISITION => self.images_in_acquisition = e.integer(),
            tags::TEMPORAL_POSITION_IDENTIFIER => self.temporal = e.integer(),
            tags::ECHO_NUMBERS => self.echo = e.integer(),
            tags::GANTRY_DETECTOR_TILT => self.gantry_tilt = e.decimal(),
            tags::FRAME_TIME => self.frame_time = e.decimal(),
            tags::IMAGER_PIXEL_SPACING => self.imager_spacing = e.decimals(),
            tags::SEQUENCE_OF_ULTRASOUND_REGIONS => self.regions = Some(*e),
            tags::SAMPLES_PER_PIXEL => self.samples = e.u16(0),
            tags::PHOTOMETRIC_INTERPRETATION => self.photometric = e.text(),
            tags::PLANAR_CONFIGURATION => self.planar = e.u16(0),
            tags::NUMBER_OF_FRAMES => self.frames = e.integer(),
            tags::ROWS => self.rows = e.u16(0),
            tags::COLUMNS => self.columns = e.u16(0),
            tags::BITS_ALLOCATED => self.bits_allocated = e.u16(0),
            tags::BITS_STORED => self.bits_stored = e.u16(0),
            tags::HIGH_BIT => self.high_bit = e.u16(0),
            tags::PIXEL_REPRESENTATION => self.representation = e.u16(0),
            tags::PIXEL_PADDING_VALUE => self.padding = e.u16(0),
            tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE => self.shared = Some(*e),
            tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE => self.per_frame = Some(*e),
            tags::GRID_FRAME_OFFSET_VECTOR => {
                let numbers = e.text().unwrap_or_default().split('\\').take(FRAMES_MAX);
                self.frame_offsets = numbers.filter_map(|n| n.trim().parse().ok()).collect();
            }
            tags::EXTENDED_OFFSET_TABLE => {
                let offsets = e.value.chunks_exact(8).take(FRAMES_MAX);
                self.extended_offsets =
                    Some(offsets.map(|b| u64::from_le_bytes(b.try_into().expect("chunks of 8"))).collect());
            }
            _ => self.plain.take(e),
        }
    }

    fn header(&self, syntax: &'static TransferSyntax, pixels: &Head) -> Result<Header, Rejection> {
        let uid = |value: Option<&str>, name: &str| {
            let text = value.filter(|t| !t.is_empty()).ok_or_else(|| malformed(format!("{name} is missing")))?;
            Uid::parse(text).map_err(|_| malformed(format!("{name} is not a UID")))
        };
        let size = |value: Option<u16>, name: &str| {
            value.filter(|v| *v > 0).map(usize::from).ok_or_else(|| malformed(format!("{name} is missing or zero")))
        };
        let (rows, columns) = (size(self.rows, "Rows (0028,0010)")?, size(self.columns, "Columns (0028,0011)")?);
        if rows * columns > FRAME_PIXELS_MAX {
            return Err(Rejection::new(RejectionCode::TooLarge, format!("a frame of {rows} x {columns} pixels")));
        }
        let frames = self.frames.unwrap_or(1).max(1);
        if frames > FRAMES_MAX as i64 {
            return Err(Rejection::new(RejectionCode::TooLarge, format!("{frames} frames in one instance")));
        }
        let pixel = self.pixel_format(pixels)?;
        let signed = pixel.signed;
        let modality = Modality::parse(self.modality.unwrap_or_default());
        let frames = self.frame_headers(frames as usize)?;
        let spacing = frames[0].plane.map(|p| [p.row_spacing_mm, p.column_spacing_mm]);
        let spacing = spacing.or(self.plain.pixel_spacing).or(self.imager_spacing);
        Ok(Header {
            transfer_syntax: syntax,
            sop_class: uid(self.sop_class, "SOP Class UID (0008,0016)")?,
            sop_instance: uid(self.sop_instance, "SOP Instance UID (0008,0018)")?,
            series: uid(self.series, "Series Instance UID (0020,000E)")?,
            study: uid(self.study, "Study Instance UID (0020,000D)")?,
            frame_of_reference: self.frame_of_reference.and_then(|t| Uid::parse(t).ok()),
            modality,
            patient: self.patient(),
            rows,
            columns,
            frames,
            pixel,
            instance_number: self.instance_number,
            images_in_acquisition: self.images_in_acquisition.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0),
            gantry_tilt_degrees: self.gantry_tilt,
            padding: self.padding.map(|v| if signed { i64::from(v as i16) } else { i64::from(v) }),
            pixel_spacing_mm: spacing.filter(|s| s.iter().all(|v| *v > 0.0 && *v <= 1000.0)),
            frame_time_ms: self.frame_time.filter(|t| *t > 0.0),
            ultrasound_regions: self.regions.as_ref().map(ultrasound_regions).unwrap_or_default(),
        })
    }

    /// The fingerprint is of this process's making only: it never leaves, so it needs no secret.
    fn patient(&self) -> u64 {
        let trim = |v: &'a [u8]| v.trim_ascii_end();
        let id = trim(self.patient_id);
        let who = if id.is_empty() { trim(self.patient_name) } else { id };
        let digest = Sha256::digest(who);
        u64::from_le_bytes(*digest.first_chunk().expect("a SHA-256 digest has 32 bytes"))
    }

    fn pixel_format(&self, pixels: &Head) -> Result<PixelFormat, Rejection> {
        let float = pixels.tag != tags::PIXEL_DATA;
        let samples = self.samples.unwrap_or(1);
        let bits_allocated = match pixels.tag {
            tags::FLOAT_PIXEL_DATA => 32,
            tags::DOUBLE_FLOAT_PIXEL_DATA => 64,
            _ => self.bits_allocated.ok_or_else(|| malformed("Bits Allocated (0028,0100) is missing"))?,
        };
        let bits_stored = if float { bits_allocated } else { self.bits_stored.unwrap_or(bits_allocated) };
        let high_bit = if float { bits_allocated - 1 } else { self.high_bit.unwrap_or(bits_stored.saturating_sub(1)) };
        let allocated = matches!(bits_allocated, 1 | 8 | 16 | 32) || (float && bits_allocated == 64);
        if !allocated || !matches!(samples, 1 | 3) || (samples == 3 && (float || bits_allocated == 1)) {
            return Err(unsupported(format!("{samples} samples of {bits_allocated} bits per pixel")));
        }
        if bits_stored == 0 || bits_stored > bits_allocated || high_bit >= bits_allocated || high_bit + 1 < bits_stored {
            return Err(malformed(format!(
                "Bits Stored {bits_stored} and High Bit {high_bit} do not fit Bits Allocated {bits_allocated}"
            )));
        }
        let default = if samples == 3 { "RGB" } else { "MONOCHROME2" };
        let photometric = self.photometric.filter(|p| !p.is_empty()).unwrap_or(default);
        let known = match samples {
            1 => matches!(photometric, "MONOCHROME1" | "MONOCHROME2" | "PALETTE COLOR"),
            _ => matches!(photometric, "RGB" | "YBR_FULL" | "YBR_FULL_422" | "YBR_ICT" | "YBR_RCT" | "YBR_PARTIAL_420" | "YBR_PARTIAL_422"),
        };
        if !known {
            return Err(unsupported(format!("{samples} samples per pixel with an unknown photometric interpretation")));
        }
        Ok(PixelFormat {
            samples: samples.into(),
            bits_allocated,
            bits_stored,
            high_bit,
            signed: self.representation == Some(1) && !float,
            photometric: photometric.to_owned(),
            planar: self.planar == Some(1) && samples > 1,
            float,
        })
    }

    fn frame_headers(&self, frames: usize) -> Result<Vec<FrameHeader>, Rejection> {
        let mut plain = self.plain;
        plain.localizer |= self.image_type.is_some_and(is_localizer);
        plain.temporal = plain.temporal.or(self.temporal);
        plain.echo = plain.echo.or(self.echo);
        let acquisition = self.acquisition.unwrap_or(0);
        let shared = self.shared.iter().flat_map(|e| e.items()).next().map_or(plain, |item| plain.with_groups(item));
        if frames > 1 && self.per_frame.is_none() {
            return self.offset_frames(frames, shared.frame(acquisition)?);
        }
        let mut per_frame = self.per_frame.iter().flat_map(|e| e.items());
        (0..frames)
            .map(|_| per_frame.next().map_or(shared, |item| shared.with_groups(item)).frame(acquisition))
            .collect()
    }
}

impl Raw<'_> {
    /// Frames of an object that gives one place for all: a grid of offsets along the normal (PS3.3 C.8.8.3.2) tells where each
    /// is. Without it nothing does, and they have no place.
    fn offset_frames(&self, frames: usize, first: FrameHeader) -> Result<Vec<FrameHeader>, Rejection> {
        let offsets = &self.frame_offsets;
        let frame = |n: usize| {
            let plane = first.plane.filter(|_| offsets.len() == frames).map(|plane| {
                let along = offsets[n] - offsets[0];
                let normal = plane.normal();
                let position = std::array::from_fn(|axis| plane.position_lps_mm[axis] + along * normal[axis]);
                Plane { position_lps_mm: position, ..plane }
            });
            FrameHeader { plane, ..first.clone() }
        };
        Ok((0..frames).map(frame).collect())
    }
}

fn is_localizer(image_type: &str) -> bool {
    image_type.split('\\').any(|word| word.trim() == "LOCALIZER")
}

impl Place {
    /// Takes an element of the top level or of a functional group's inner item: the tags are the same.
    fn take(&mut self, e: &Element<'_>) {
        match e.tag {
            tags::IMAGE_POSITION_PATIENT => self.position = e.decimals(),
            tags::IMAGE_ORIENTATION_PATIENT => self.orientation = e.decimals(),
            tags::PIXEL_SPACING => self.pixel_spacing = e.decimals(),
            tags::SLICE_THICKNESS => self.thickness = e.decimal(),
            tags::RESCALE_SLOPE => self.slope = e.decimal(),
            tags::RESCALE_INTERCEPT => self.intercept = e.decimal(),
            tags::WINDOW_CENTER => self.window = Some([e.decimal().unwrap_or(0.0), self.window.map_or(0.0, |w| w[1])]),
            tags::WINDOW_WIDTH => self.window = Some([self.window.map_or(0.0, |w| w[0]), e.decimal().unwrap_or(0.0)]),
            tags::DIFFUSION_B_VALUE => self.b_value = e.f64(0).map(|v| v.round() as i64),
            tags::MODALITY_LUT_SEQUENCE => self.real_value_map = true,
            _ => {}
        }
    }

    /// This, overridden by the functional groups of `item` (PS3.3 C.7.6.16).
    fn with_groups(mut self, mut item: Elements<'_>) -> Self {
        while let Ok(Some(group)) = item.next() {
            let Some(mut inner) = group.items().next() else { continue };
            while let Ok(Some(e)) = inner.next() {
                match (group.tag, e.tag) {
                    (
                        tags::PLANE_POSITION_SEQUENCE
                        | tags::PLANE_ORIENTATION_SEQUENCE
                        | tags::PIXEL_MEASURES_SEQUENCE
                        | tags::PIXEL_VALUE_TRANSFORMATION_SEQUENCE
                        | tags::FRAME_VOILUT_SEQUENCE
                        | tags::MR_DIFFUSION_SEQUENCE,
                        _,
                    ) => self.take(&e),
                    (tags::FRAME_CONTENT_SEQUENCE, tags::TEMPORAL_POSITION_INDEX) => {
                        self.temporal = e.u32().map(i64::from);
                    }
                    (tags::FRAME_CONTENT_SEQUENCE, tags::STACK_ID) => {
                        self.stack[0] = e.text().map_or(0, |t| t.bytes().fold(1, |h: u32, b| h.wrapping_mul(31) + u32::from(b)));
                    }
                    (tags::FRAME_CONTENT_SEQUENCE, tags::IN_STACK_POSITION_NUMBER) => {
                        self.stack[1] = e.u32().unwrap_or(0);
                    }
                    (tags::MR_ECHO_SEQUENCE, tags::EFFECTIVE_ECHO_TIME) => {
                        self.echo = e.f64(0).map(|ms| (ms * 1000.0).round() as i64);
                    }
                    (_, tags::FRAME_TYPE) => self.localizer |= e.text().is_some_and(is_localizer),
                    _ => {}
                }
            }
        }
        self
    }

    fn frame(self, acquisition: i64) -> Result<FrameHeader, Rejection> {
        if self.real_value_map {
            return Err(unsupported("a Modality LUT Sequence (0028,3000) instead of rescale slope and intercept"));
        }
        let plane = match (self.position, self.orientation, self.pixel_spacing) {
            (Some(position), Some(orientation), Some(spacing)) => {
                Some(Plane::new(position, orientation, spacing).map_err(|bad| malformed(bad.to_string()))?)
            }
            _ => None,
        };
        let slope = self.slope.unwrap_or(1.0);
        if slope == 0.0 {
            return Err(malformed("Rescale Slope (0028,1053) is zero"));
        }
        Ok(FrameHeader {
            plane,
            rescale: Rescale { slope, intercept: self.intercept.unwrap_or(0.0) },
            window: self.window.filter(|w| w[1] > 0.0),
            slice_thickness_mm: self.thickness.filter(|t| *t > 0.0),
            pass: [self.temporal.unwrap_or(0), self.echo.unwrap_or(0), self.b_value.unwrap_or(0), acquisition],
            stack: self.stack,
            localizer: self.localizer,
        })
    }
}

fn ultrasound_regions(sequence: &Element<'_>) -> Vec<UltrasoundRegion> {
    /// Centimetres, of PS3.3 C.8.5.5.1.15.
    const CM: u16 = 3;
    // A frame has a handful of regions; 64 is beyond any machine.
    let read = |item: Elements<'_>| {
        let u16_of = |tag| item.find(tag).and_then(|e| e.u16(0));
        let u32_of = |tag| item.find(tag).and_then(|e| e.u32());
        let f64_of = |tag| item.find(tag).and_then(|e| e.f64(0));
        let length = u16_of(tags::PHYSICAL_UNITS_X_DIRECTION) == Some(CM)
            && u16_of(tags::PHYSICAL_UNITS_Y_DIRECTION) == Some(CM);
        let delta = |tag| f64_of(tag).map(|cm| cm.abs() * 10.0).filter(|mm| *mm > 0.0 && *mm < 100.0);
        let spacing = delta(tags::PHYSICAL_DELTA_Y).zip(delta(tags::PHYSICAL_DELTA_X));
        Some(UltrasoundRegion {
            spatial_format: u16_of(tags::REGION_SPATIAL_FORMAT).unwrap_or(0),
            box_pixels: [
                u32_of(tags::REGION_LOCATION_MIN_X0)?,
                u32_of(tags::REGION_LOCATION_MIN_Y0)?,
                u32_of(tags::REGION_LOCATION_MAX_X1)?,
                u32_of(tags::REGION_LOCATION_MAX_Y1)?,
            ],
            spacing_mm: spacing.filter(|_| length).map(|(y, x)| [y, x]),
        })
    };
    sequence.items().take(64).filter_map(read).collect()
}

/// Finds the pixels of each frame and checks that all of them are there.
fn locate(bytes: &[u8], base: usize, header: &Header, pixels: &Head, raw: &Raw<'_>) -> Result<PixelSource, Rejection> {
    let at = base + pixels.value_at;
    let frames = header.frames.len();
    let Some(length) = pixels.length else {
        if header.transfer_syntax.codec == Codec::Native && header.transfer_syntax.uid != "1.2.840.10008.1.2.1.98" {
            return Err(malformed("the pixels are in fragments though the transfer syntax has none"));
        }
        let fragments = super::elements::fragments(bytes, at)?;
        return frame_fragments(bytes, &fragments, frames, raw.extended_offsets.as_deref()).map(PixelSource::Fragments);
    };
    if header.transfer_syntax.codec != Codec::Native {
        return Err(malformed("the pixels are not in fragments though the transfer syntax compresses them"));
    }
    let end = at.checked_add(length).filter(|end| *end <= bytes.len());
    let have = end.unwrap_or(bytes.len()) - at.min(bytes.len());
    let want = native_bytes(header).and_then(|n| n.checked_mul(frames)).map(|bits| bits.div_ceil(8));
    match want {
        Some(want) if want <= have => {
            let words = &pixels.vr != b"OB";
            Ok(PixelSource::Native { at: at..at + want, words })
        }
        _ => Err(malformed(format!(
            "{frames} frames of {} x {} pixels need {} bytes, the file has {have}",
            header.rows,
            header.columns,
            want.map_or_else(|| "too many".into(), |w| w.to_string()),
        ))),
    }
}

/// Bits of one uncompressed frame.
pub(super) fn native_bytes(header: &Header) -> Option<usize> {
    let p = &header.pixel;
    // YBR_FULL_422 keeps every second chrominance sample of a row (PS3.3 C.7.6.3.1.2): two samples per pixel.
    let samples = if p.photometric == "YBR_FULL_422" { 2 } else { p.samples };
    header.rows.checked_mul(header.columns)?.checked_mul(samples)?.checked_mul(p.bits_allocated.into())
}

fn frame_fragments(
    bytes: &[u8],
    fragments: &[Range<usize>],
    frames: usize,
    extended: Option<&[u64]>,
) -> Result<Vec<Vec<Range<usize>>>, Rejection> {
    let Some((table, pieces)) = fragments.split_first().filter(|(_, pieces)| !pieces.is_empty()) else {
        return Err(malformed("the encapsulated pixel data hold no fragment"));
    };
    if frames == 1 {
        return Ok(vec![pieces.to_vec()]);
    }
    if pieces.len() == frames {
        return Ok(pieces.iter().map(|p| vec![p.clone()]).collect());
    }
    let basic: Vec<u64> = bytes[table.clone()]
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes(b.try_into().expect("chunks of 4")).into())
        .collect();
    let first = pieces[0].start;
    let starts_image = |p: &Range<usize>| matches!(bytes.get(p.start..p.start + 2), Some([0xFF, 0xD8] | [0xFF, 0x4F]));
    // Offsets count from the first fragment's item header to a frame's item header.
    let offsets: Vec<u64> = match extended.filter(|t| t.len() == frames) {
        Some(table) => table.to_vec(),
        None if basic.len() == frames => basic,
        None => pieces.iter().filter(|p| starts_image(p)).map(|p| (p.start - first) as u64).collect(),
    };
    if offsets.len() != frames {
        return Err(malformed(format!("{} fragments for {frames} frames and no table to tell which", pieces.len())));
    }
    let mut out: Vec<Vec<Range<usize>>> = vec![Vec::new(); frames];
    let mut frame = 0;
    for piece in pieces {
        let here = (piece.start - first) as u64;
        while frame + 1 < frames && offsets[frame + 1] <= here {
            frame += 1;
        }
        out[frame].push(piece.clone());
    }
    match out.iter().position(Vec::is_empty) {
        Some(n) => Err(malformed(format!("frame {n} has no fragment"))),
        None => Ok(out),
    }
}
