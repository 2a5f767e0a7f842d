//! Images as DICOM files: what a phantom is sent as, and what `convert` writes (PS3.3 A.3, A.4, A.38).
//!
//! The objects are complete enough for other people's readers: identifiers, geometry, pixel format, and empty values where
//! the standard wants an attribute that nobody knows.

use std::io::Write;

use dicom_core::value::{PixelFragmentSequence, PrimitiveValue};
use dicom_core::{DataElement, Tag, VR};
use dicom_dictionary_std::tags;
use dicom_object::InMemDicomObject;
use dicom_object::mem::InMemElement;
use dicom_transfer_syntax_registry::entries;

use super::file;
use super::header::UltrasoundRegion;
use super::transfer::{Codec, TransferSyntax};
use crate::geometry::Plane;
use crate::study::{Modality, Uid};
use crate::volume::{Rescale, VoxelType};

/// What the images of one series have in common.
#[derive(Debug, Clone)]
pub struct SeriesTemplate {
    /// Modality; it decides the SOP class (Secondary Capture for [`Modality::Other`]).
    pub modality: Modality,
    /// Study Instance UID.
    pub study: Uid,
    /// Series Instance UID.
    pub series: Uid,
    /// Frame of Reference UID.
    pub frame_of_reference: Uid,
    /// Patient's Name, in DICOM's form `Family^Given`.
    pub patient_name: String,
    /// Patient ID.
    pub patient_id: String,
    /// Series Description.
    pub description: String,
    /// Study Date and Study Time, `YYYYMMDD` and `HHMMSS`, or empty.
    pub date_time: [String; 2],
    /// Series Number.
    pub series_number: i32,
    /// `[rows, columns]` of every image.
    pub size: [usize; 2],
    /// What one stored pixel is: 8 or 16 bits.
    pub voxel: VoxelType,
    /// Bits Stored; at most the bits of `voxel`.
    pub bits_stored: u16,
    /// Slice Thickness.
    pub thickness_mm: f64,
    /// A window to show the images in: centre, width.
    pub window: Option<[f64; 2]>,
    /// Calibrated regions of ultrasound images.
    pub regions: Vec<UltrasoundRegion>,
    /// More top-level elements, replacing those made here: tag, value representation, text.
    pub more: Vec<(Tag, [u8; 2], String)>,
}

/// One image or frame.
#[derive(Debug, Clone, Copy)]
pub struct SliceTemplate<'a> {
    /// Instance Number.
    pub number: usize,
    /// Where it is; None for ultrasound.
    pub plane: Option<Plane>,
    /// From stored to real values.
    pub rescale: Rescale,
    /// Image Type, such as `ORIGINAL\PRIMARY\AXIAL`.
    pub image_type: &'a str,
    /// Stored values, rows of columns, little endian.
    pub pixels: &'a [u8],
}

/// What cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Pixels of the wrong length, or a type that images of this kind do not have.
    #[error("cannot build an image: {0}")]
    Template(&'static str),
    /// A transfer syntax that is not written here.
    #[error("transfer syntax {0} is not written")]
    Syntax(&'static str),
    /// The encoder would not.
    #[error("cannot encode the data set: {0}")]
    Encode(String),
}

/// SOP Instance UID of image `number` of a series: the same series gives the same.
pub fn sop_instance(series: &Uid, number: usize) -> Uid {
    Uid::derived(format!("{series} instance {number}").as_bytes())
}

/// A decimal string of at most 16 characters (PS3.5 6.2), with as many digits as fit.
pub fn decimal_string(value: f64) -> String {
    let short = format!("{value}");
    if short.len() <= 16 {
        return short;
    }
    let fixed = (0..=14).rev().map(|digits| format!("{value:.digits$}")).find(|text| text.len() <= 16);
    let scientific = (0..=10).rev().map(|digits| format!("{value:.digits$e}")).find(|text| text.len() <= 16);
    let error = |text: &Option<String>| {
        text.as_ref().and_then(|t| t.parse::<f64>().ok()).map_or(f64::INFINITY, |v| (v - value).abs())
    };
    let best = if error(&fixed) <= error(&scientific) { fixed.or(scientific) } else { scientific };
    best.unwrap_or_else(|| "0".into())
}

fn decimals(values: &[f64]) -> String {
    values.iter().map(|v| decimal_string(*v)).collect::<Vec<_>>().join("\\")
}

fn text(tag: Tag, vr: VR, value: impl Into<String>) -> InMemElement {
    DataElement::new(tag, vr, PrimitiveValue::from(value.into()))
}

fn us(tag: Tag, value: usize) -> InMemElement {
    DataElement::new(tag, VR::US, PrimitiveValue::from(value as u16))
}

fn sequence(tag: Tag, items: Vec<InMemDicomObject>) -> InMemElement {
    use dicom_core::value::{DataSetSequence, Value};
    DataElement::new(tag, VR::SQ, Value::from(DataSetSequence::from(items)))
}

fn object(elements: Vec<InMemElement>) -> InMemDicomObject {
    InMemDicomObject::from_element_iter(elements)
}

fn sop_class(modality: Modality, enhanced: bool) -> &'static str {
    match (modality, enhanced) {
        (Modality::Ct, false) => "1.2.840.10008.5.1.4.1.1.2",
        (Modality::Ct, true) => "1.2.840.10008.5.1.4.1.1.2.1",
        (Modality::Mr, false) => "1.2.840.10008.5.1.4.1.1.4",
        (Modality::Mr, true) => "1.2.840.10008.5.1.4.1.1.4.1",
        (Modality::Us, false) => "1.2.840.10008.5.1.4.1.1.6.1",
        (Modality::Us, true) => "1.2.840.10008.5.1.4.1.1.3.1",
        (Modality::Other, false) => "1.2.840.10008.5.1.4.1.1.7",
        (Modality::Other, true) => "1.2.840.10008.5.1.4.1.1.7.3",
    }
}

/// Elements of a plane and its rescale, as they stand in a single-frame image.
fn plane_elements(plane: &Plane) -> [InMemElement; 3] {
    let cosines = [plane.along_row, plane.along_column].concat();
    [
        text(tags::IMAGE_POSITION_PATIENT, VR::DS, decimals(&plane.position_lps_mm)),
        text(tags::IMAGE_ORIENTATION_PATIENT, VR::DS, decimals(&cosines)),
        text(tags::PIXEL_SPACING, VR::DS, decimals(&[plane.row_spacing_mm, plane.column_spacing_mm])),
    ]
}

fn rescale_elements(rescale: Rescale) -> [InMemElement; 2] {
    [
        text(tags::RESCALE_INTERCEPT, VR::DS, decimal_string(rescale.intercept)),
        text(tags::RESCALE_SLOPE, VR::DS, decimal_string(rescale.slope)),
    ]
}

impl SeriesTemplate {
    /// One slice as a single-frame image file (PS3.10) in a transfer syntax: the uncompressed ones, deflated, or RLE.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn image(&self, slice: &SliceTemplate<'_>, syntax: &TransferSyntax) -> Result<Vec<u8>, BuildError> {
        let mut elements = self.common(slice.number, slice.image_type, false);
        elements.extend(rescale_elements(slice.rescale));
        elements.extend(slice.plane.iter().flat_map(plane_elements));
        elements.push(text(tags::SLICE_THICKNESS, VR::DS, decimal_string(self.thickness_mm)));
        self.encode(object(elements), slice.number, false, &[slice.pixels], syntax)
    }

    /// All slices as the frames of one enhanced (or, for ultrasound, multi-frame) image file.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn multi_frame(&self, slices: &[SliceTemplate<'_>], syntax: &TransferSyntax) -> Result<Vec<u8>, BuildError> {
        let Some(first) = slices.first() else { return Err(BuildError::Template("no frame")) };
        let mut elements = self.common(first.number, first.image_type, true);
        elements.push(text(tags::NUMBER_OF_FRAMES, VR::IS, slices.len().to_string()));
        if let Some(plane) = first.plane {
            let [_, orientation, spacing] = plane_elements(&plane);
            let thickness = text(tags::SLICE_THICKNESS, VR::DS, decimal_string(self.thickness_mm));
            let shared = object(vec![
                sequence(tags::PLANE_ORIENTATION_SEQUENCE, vec![object(vec![orientation])]),
                sequence(tags::PIXEL_MEASURES_SEQUENCE, vec![object(vec![spacing, thickness])]),
            ]);
            elements.push(sequence(tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE, vec![shared]));
            let frame = |slice: &SliceTemplate<'_>| {
                let kind = text(tags::RESCALE_TYPE, VR::LO, if self.modality == Modality::Ct { "HU" } else { "US" });
                let values = rescale_elements(slice.rescale).into_iter().chain([kind]).collect();
                let mut groups = vec![sequence(tags::PIXEL_VALUE_TRANSFORMATION_SEQUENCE, vec![object(values)])];
                if let Some(plane) = slice.plane {
                    let [position, _, _] = plane_elements(&plane);
                    groups.push(sequence(tags::PLANE_POSITION_SEQUENCE, vec![object(vec![position])]));
                }
                object(groups)
            };
            let frames = slices.iter().map(frame).collect();
            elements.push(sequence(tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE, frames));
        }
        let pixels: Vec<&[u8]> = slices.iter().map(|s| s.pixels).collect();
        self.encode(object(elements), first.number, true, &pixels, syntax)
    }

    fn common(&self, number: usize, image_type: &str, enhanced: bool) -> Vec<InMemElement> {
        let [date, time] = &self.date_time;
        let [rows, columns] = self.size;
        let bits = self.voxel.bytes() * 8;
        let uid = |tag, uid: &Uid| text(tag, VR::UI, uid.as_str());
        let mut out = vec![
            text(tags::SPECIFIC_CHARACTER_SET, VR::CS, "ISO_IR 192"),
            text(tags::IMAGE_TYPE, VR::CS, image_type),
            text(tags::SOP_CLASS_UID, VR::UI, sop_class(self.modality, enhanced)),
            uid(tags::SOP_INSTANCE_UID, &sop_instance(&self.series, number)),
            text(tags::STUDY_DATE, VR::DA, date),
            text(tags::STUDY_TIME, VR::TM, time),
            text(tags::ACCESSION_NUMBER, VR::SH, ""),
            text(tags::MODALITY, VR::CS, self.modality.term()),
            text(tags::MANUFACTURER, VR::LO, "scanside"),
            text(tags::REFERRING_PHYSICIAN_NAME, VR::PN, ""),
            text(tags::SERIES_DESCRIPTION, VR::LO, &self.description),
            text(tags::PATIENT_NAME, VR::PN, &self.patient_name),
            text(tags::PATIENT_ID, VR::LO, &self.patient_id),
            text(tags::PATIENT_BIRTH_DATE, VR::DA, ""),
            text(tags::PATIENT_SEX, VR::CS, ""),
            uid(tags::STUDY_INSTANCE_UID, &self.study),
            uid(tags::SERIES_INSTANCE_UID, &self.series),
            text(tags::STUDY_ID, VR::SH, ""),
            text(tags::SERIES_NUMBER, VR::IS, self.series_number.to_string()),
            text(tags::INSTANCE_NUMBER, VR::IS, number.to_string()),
            uid(tags::FRAME_OF_REFERENCE_UID, &self.frame_of_reference),
            text(tags::POSITION_REFERENCE_INDICATOR, VR::LO, ""),
            us(tags::SAMPLES_PER_PIXEL, 1),
            text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, "MONOCHROME2"),
            us(tags::ROWS, rows),
            us(tags::COLUMNS, columns),
            us(tags::BITS_ALLOCATED, bits),
            us(tags::BITS_STORED, self.bits_stored.into()),
            us(tags::HIGH_BIT, usize::from(self.bits_stored) - 1),
            us(tags::PIXEL_REPRESENTATION, usize::from(matches!(self.voxel, VoxelType::I8 | VoxelType::I16))),
        ];
        match self.modality {
            Modality::Ct => {
                out.push(text(tags::KVP, VR::DS, ""));
                out.push(text(tags::ACQUISITION_NUMBER, VR::IS, ""));
            }
            Modality::Mr => {
                out.push(text(tags::SCANNING_SEQUENCE, VR::CS, "RM"));
                out.push(text(tags::SEQUENCE_VARIANT, VR::CS, "NONE"));
                out.push(text(tags::SCAN_OPTIONS, VR::CS, ""));
                out.push(text(tags::ECHO_TIME, VR::DS, ""));
                out.push(text(tags::ECHO_TRAIN_LENGTH, VR::IS, ""));
            }
            Modality::Us => {}
            Modality::Other => out.push(text(tags::CONVERSION_TYPE, VR::CS, "WSD")),
        }
        if let Some([centre, width]) = self.window {
            out.push(text(tags::WINDOW_CENTER, VR::DS, decimal_string(centre)));
            out.push(text(tags::WINDOW_WIDTH, VR::DS, decimal_string(width)));
        }
        if !self.regions.is_empty() {
            out.push(sequence(tags::SEQUENCE_OF_ULTRASOUND_REGIONS, self.regions.iter().map(region).collect()));
        }
        for (tag, vr, value) in &self.more {
            let vr = VR::from_binary(*vr).unwrap_or(VR::LO);
            out.push(text(*tag, vr, value));
        }
        out
    }

    fn encode(
        &self,
        mut object: InMemDicomObject,
        number: usize,
        enhanced: bool,
        frames: &[&[u8]],
        syntax: &TransferSyntax,
    ) -> Result<Vec<u8>, BuildError> {
        let width = self.voxel.bytes();
        if width > 2 || self.voxel == VoxelType::F32 || self.bits_stored == 0 || usize::from(self.bits_stored) > width * 8 {
            return Err(BuildError::Template("pixels are integers of 8 or 16 bits"));
        }
        if self.size.iter().any(|n| *n == 0 || *n > usize::from(u16::MAX)) {
            return Err(BuildError::Template("rows and columns are 1 to 65535"));
        }
        if frames.iter().any(|pixels| pixels.len() != self.size[0] * self.size[1] * width) {
            return Err(BuildError::Template("the pixels are not as many as rows times columns"));
        }
        object.put(match syntax.codec {
            Codec::Native if width == 1 => {
                let mut bytes = frames.concat();
                bytes.resize(bytes.len().next_multiple_of(2), 0);
                DataElement::new(tags::PIXEL_DATA, VR::OB, PrimitiveValue::U8(bytes.into()))
            }
            Codec::Native => {
                let words = frames.iter().flat_map(|pixels| pixels.chunks_exact(2));
                let words: Vec<u16> = words.map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
                DataElement::new(tags::PIXEL_DATA, VR::OW, PrimitiveValue::U16(words.into()))
            }
            Codec::Rle => {
                let fragments: Vec<Vec<u8>> = frames.iter().map(|pixels| run_lengths(pixels, width, self.size[1])).collect();
                let sequence = PixelFragmentSequence::new_fragments(fragments);
                DataElement::new(tags::PIXEL_DATA, VR::OB, sequence)
            }
            _ => return Err(BuildError::Syntax(syntax.name)),
        });
        let written_as = match syntax.encoding {
            super::elements::Encoding::IMPLICIT => entries::IMPLICIT_VR_LITTLE_ENDIAN.erased(),
            super::elements::Encoding::EXPLICIT_BIG => entries::EXPLICIT_VR_BIG_ENDIAN.erased(),
            _ => entries::EXPLICIT_VR_LITTLE_ENDIAN.erased(),
        };
        let mut data_set = Vec::new();
        object.write_dataset_with_ts(&mut data_set, &written_as).map_err(|e| BuildError::Encode(e.to_string()))?;
        let sop_class = Uid::parse(sop_class(self.modality, enhanced)).expect("a constant UID");
        let uid = Uid::parse(syntax.uid).expect("a constant UID");
        let mut out = file::head(&sop_class, &sop_instance(&self.series, number), &uid);
        if syntax.deflated {
            let mut deflate = flate2::write::DeflateEncoder::new(out, flate2::Compression::fast());
            let done = deflate.write_all(&data_set).and_then(|()| deflate.finish());
            out = done.map_err(|e| BuildError::Encode(e.to_string()))?;
            // PS3.5 A.5: padded to even length.
            out.resize(out.len().next_multiple_of(2), 0);
        } else {
            out.extend_from_slice(&data_set);
        }
        Ok(out)
    }
}

/// PS3.3 C.8.5.5: a two-dimensional region of tissue, lengths in centimetres.
fn region(region: &UltrasoundRegion) -> InMemDicomObject {
    let words = |tag, v: u16| DataElement::new(tag, VR::US, PrimitiveValue::from(v));
    let longs = |tag, v: u32| DataElement::new(tag, VR::UL, PrimitiveValue::from(v));
    let [left, top, right, bottom] = region.box_pixels;
    let mut out = vec![
        words(tags::REGION_SPATIAL_FORMAT, region.spatial_format),
        words(tags::REGION_DATA_TYPE, 1),
        longs(tags::REGION_FLAGS, 0),
        longs(tags::REGION_LOCATION_MIN_X0, left),
        longs(tags::REGION_LOCATION_MIN_Y0, top),
        longs(tags::REGION_LOCATION_MAX_X1, right),
        longs(tags::REGION_LOCATION_MAX_Y1, bottom),
    ];
    if let Some([y, x]) = region.spacing_mm {
        let real = |tag, mm: f64| DataElement::new(tag, VR::FD, PrimitiveValue::from(mm / 10.0));
        out.extend([words(tags::PHYSICAL_UNITS_X_DIRECTION, 3), words(tags::PHYSICAL_UNITS_Y_DIRECTION, 3)]);
        out.extend([real(tags::PHYSICAL_DELTA_X, x), real(tags::PHYSICAL_DELTA_Y, y)]);
    }
    object(out)
}

/// One frame as RLE (PS3.5 annex G): the high bytes of all pixels, then the low ones, each row packed by itself.
fn run_lengths(pixels: &[u8], width: usize, columns: usize) -> Vec<u8> {
    let mut out = vec![0; 64];
    out[..4].copy_from_slice(&(width as u32).to_le_bytes());
    for segment in 0..width {
        let at = out.len() as u32;
        out[4 + segment * 4..8 + segment * 4].copy_from_slice(&at.to_le_bytes());
        for row in pixels.chunks_exact(columns * width) {
            let bytes: Vec<u8> = row.chunks_exact(width).map(|p| p[width - 1 - segment]).collect();
            pack_bits(&bytes, &mut out);
        }
        out.resize(out.len().next_multiple_of(2), 0);
    }
    out
}

fn pack_bits(row: &[u8], out: &mut Vec<u8>) {
    let run_at = |at: usize| row[at..].iter().take(128).take_while(|v| **v == row[at]).count();
    let mut at = 0;
    while at < row.len() {
        let run = run_at(at);
        if run > 1 {
            out.extend([(1 - run as i32) as u8, row[at]]);
            at += run;
        } else {
            let mut end = at + 1;
            while end < row.len() && end - at < 128 && run_at(end) < 3 {
                end += 1;
            }
            out.push((end - at - 1) as u8);
            out.extend_from_slice(&row[at..end]);
            at = end;
        }
    }
}
