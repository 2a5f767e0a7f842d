//! What an instance says about itself: identifiers, the geometry of every frame, the pixel format. Read element by element,
//! checked once.

use std::ops::Range;

use dicom_dictionary_std::tags;
use sha2::{Digest, Sha256};

use super::elements::{Element, Elements, Encoding, Head};
use super::instance::{malformed, unsupported};
use super::transfer::TransferSyntax;
use crate::geometry::Plane;
use crate::study::{Modality, MrAcquisition, Rejection, RejectionCode, Uid};
use crate::volume::{Rescale, VoxelType};

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
    /// Region Spatial Format: 1 two-dimensional, 2 M-mode, 3 spectral, 4 wave form, 5 graphics.
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
    /// How a magnetic resonance image was made.
    pub mr: Option<Box<MrAcquisition>>,
}

impl Header {
    /// Bytes of one decoded frame: one value per pixel.
    pub fn frame_bytes(&self) -> usize {
        self.rows * self.columns * self.pixel.voxel_type().bytes()
    }
}

/// Elements that are kept raw until all of them are known.
#[derive(Default)]
pub(super) struct Raw<'a> {
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
    scanning_sequence: Option<&'a str>,
    sequence_variant: Option<&'a str>,
    contrast_agent: Option<&'a str>,
    contrast_sequence: Option<Element<'a>>,
    contrast_volume: Option<f64>,
    angio_flag: Option<&'a str>,
    acquisition_contrast: Option<&'a str>,
    description: Option<&'a str>,
    plain: Place,
    shared: Option<Element<'a>>,
    per_frame: Option<Element<'a>>,
    regions: Option<Element<'a>>,
    pub extended_offsets: Option<Vec<u64>>,
    frame_offsets: Vec<f64>,
    pub palette: Option<[Range<usize>; 6]>,
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
    repetition_ms: Option<f64>,
    echo_ms: Option<f64>,
    inversion_ms: Option<f64>,
    stack: [u32; 2],
    localizer: bool,
    real_value_map: bool,
}

/// Reads everything before the pixels, and the header of the element that holds them.
pub(super) fn read_header<'b>(
    data_set: &'b [u8],
    syntax: &'static TransferSyntax,
    encoding: Encoding,
) -> Result<(Header, Head, Raw<'b>), Rejection> {
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
            tags::SCANNING_SEQUENCE => self.scanning_sequence = e.text(),
            tags::SEQUENCE_VARIANT => self.sequence_variant = e.text(),
            tags::CONTRAST_BOLUS_AGENT => self.contrast_agent = e.text(),
            tags::CONTRAST_BOLUS_AGENT_SEQUENCE => self.contrast_sequence = Some(*e),
            tags::CONTRAST_BOLUS_VOLUME => self.contrast_volume = e.decimal(),
            tags::ANGIO_FLAG => self.angio_flag = e.text(),
            tags::ACQUISITION_CONTRAST => self.acquisition_contrast = e.text(),
            tags::SERIES_DESCRIPTION => self.description = e.text(),
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
            mr: (modality == Modality::Mr).then(|| Box::new(self.mr_acquisition())),
        })
    }

    fn mr_acquisition(&self) -> MrAcquisition {
        // Words of a protocol; longer ones are something else, and a series keeps them while it grows.
        let words = |text: Option<&str>| text.unwrap_or_default().chars().take(128).collect::<String>();
        let shared = self.shared.iter().flat_map(|e| e.items()).next().map_or(self.plain, |item| self.plain.with_groups(item));
        let first = self.per_frame.iter().flat_map(|e| e.items()).next().map_or(shared, |item| shared.with_groups(item));
        MrAcquisition {
            image_type: words(self.image_type),
            scanning_sequence: words(self.scanning_sequence),
            sequence_variant: words(self.sequence_variant),
            contrast_agent: self.agent_given(),
            angiography: self.angio_flag.is_some_and(|flag| flag.trim() == "Y"),
            diffusion: first.b_value.is_some_and(|b| b > 0),
            repetition_ms: first.repetition_ms.filter(|ms| *ms > 0.0),
            echo_ms: first.echo_ms.filter(|ms| *ms > 0.0),
            inversion_ms: first.inversion_ms.filter(|ms| *ms > 0.0),
            acquisition_contrast: words(self.acquisition_contrast),
            description: words(self.description),
        }
    }

    /// Whether contrast agent was given; None where nothing says it either way.
    fn agent_given(&self) -> Option<bool> {
        const DENIED: [&str; 14] = [
            "NO", "NONE", "N", "NIL", "NULL", "N/A", "NA", "NO CONTRAST", "NON CONTRAST", "NOT GIVEN", "WITHOUT", "W/O", "-", "0",
        ];
        let agent = self.contrast_agent.unwrap_or_default().trim().to_uppercase();
        let listed = self.contrast_sequence.is_some_and(|e| e.items().next().is_some());
        let injected = listed || self.contrast_volume.is_some_and(|ml| ml > 0.0);
        match agent.as_str() {
            "" => injected.then_some(true),
            agent => Some(!DENIED.contains(&agent)),
        }
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
            // One that is there and no number is not the same as none: NaN is refused in `frame`.
            tags::RESCALE_SLOPE if e.text() != Some("") => self.slope = Some(e.decimal().unwrap_or(f64::NAN)),
            tags::RESCALE_INTERCEPT if e.text() != Some("") => self.intercept = Some(e.decimal().unwrap_or(f64::NAN)),
            tags::WINDOW_CENTER => self.window = Some([e.decimal().unwrap_or(0.0), self.window.map_or(0.0, |w| w[1])]),
            tags::WINDOW_WIDTH => self.window = Some([self.window.map_or(0.0, |w| w[0]), e.decimal().unwrap_or(0.0)]),
            tags::DIFFUSION_B_VALUE => self.b_value = e.f64(0).map(|v| v.round() as i64),
            tags::MODALITY_LUT_SEQUENCE => self.real_value_map = true,
            tags::REPETITION_TIME => self.repetition_ms = e.decimal(),
            tags::ECHO_TIME => self.echo_ms = e.decimal(),
            tags::INVERSION_TIME => self.inversion_ms = e.decimal(),
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
                        | tags::MR_DIFFUSION_SEQUENCE
                        | tags::MR_TIMING_AND_RELATED_PARAMETERS_SEQUENCE,
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
                        self.echo_ms = e.f64(0);
                        self.echo = self.echo_ms.map(|ms| (ms * 1000.0).round() as i64);
                    }
                    (tags::MR_MODIFIER_SEQUENCE, tags::INVERSION_TIMES) => self.inversion_ms = e.f64(0),
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
        let intercept = self.intercept.unwrap_or(0.0);
        if !slope.is_finite() || !intercept.is_finite() {
            return Err(malformed("Rescale Slope (0028,1053) or Intercept (0028,1052) is no number"));
        }
        Ok(FrameHeader {
            plane,
            rescale: Rescale { slope, intercept },
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
