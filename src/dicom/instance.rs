//! One DICOM file or data set: opened, its header read, and the pixels of every frame found in its bytes.

use std::io::Read;
use std::ops::Range;

use dicom_core::Tag;
use dicom_dictionary_std::tags;

use super::elements::{Broken, Elements, Encoding, Head};
use super::header::{Header, Raw, read_header};
use super::transfer::{Codec, TransferSyntax};
use crate::study::{Rejection, RejectionCode, Uid};
use crate::volume::MappedFile;

/// Bytes of one instance, inflated. A cine of an hour is below it; a deflate bomb is not.
pub const INSTANCE_BYTES_MAX: usize = 2 << 30;

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
        let (header, pixels, raw) = read_header(&bytes[at..], syntax, encoding_of(&bytes[at..], syntax))?;
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
        let data_set = file_start.get(at..).unwrap_or_default();
        match read_header(data_set, syntax, encoding_of(data_set, syntax)) {
            Ok((header, _, _)) => Ok(Some(header)),
            Err(r) if matches!(r.code, RejectionCode::Malformed | RejectionCode::NoImages) => Ok(None),
            Err(r) => Err(r),
        }
    }
}

/// The encoding of the data set: what the syntax says, unless the first element shows that the writer erred.
fn encoding_of(data_set: &[u8], syntax: &TransferSyntax) -> Encoding {
    match guess_encoding(data_set) {
        Some(seen) if seen.big_endian == syntax.encoding.big_endian && seen.explicit != syntax.encoding.explicit => seen,
        _ => syntax.encoding,
    }
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
