//! The outline of a DICOM file: who it says it is, and that its structure is sound from first byte to last.
//!
//! This is the first thing done to bytes from outside, before any parser builds an object from them. It walks the
//! data set once, without recursion and without allocation, and checks that every length fits inside what holds it
//! and that sequences nest no deeper than images need: the parser behind it recurses per level and would otherwise
//! take the whole process with it when its stack ends.

use std::borrow::Cow;
use std::io::Read;

use dicom_core::dictionary::{DataDictionary, DataDictionaryEntry};
use dicom_core::{Tag, VR};
use dicom_dictionary_std::StandardDataDictionary;

use crate::study::{Rejection, RejectionCode, Uid};

/// Sequences inside sequences. Enhanced CT/MR need four; a structured report with measurements about ten.
const NESTING_MAX: usize = 32;

/// Deflated Explicit VR Little Endian (PS3.5 A.5).
const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
/// Implicit VR Little Endian (PS3.5 A.1).
pub const IMPLICIT_LITTLE: &str = "1.2.840.10008.1.2";
/// Explicit VR Little Endian (PS3.5 A.2).
pub const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";
/// Explicit VR Big Endian (retired, PS3.5 2016b A.3).
pub const EXPLICIT_BIG: &str = "1.2.840.10008.1.2.2";

/// Who an instance says it is, and where its data set begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    /// SOP Class UID (0008,0016).
    pub sop_class: Uid,
    /// SOP Instance UID (0008,0018).
    pub sop_instance: Uid,
    /// Study Instance UID (0020,000D).
    pub study: Uid,
    /// Series Instance UID (0020,000E).
    pub series: Uid,
    /// Transfer Syntax UID (0002,0010).
    pub transfer_syntax: Uid,
    /// Offset of the first byte behind the file meta information.
    pub data_set_at: usize,
}

/// Reads the outline of a DICOM file (PS3.10) and checks its structure. A deflated data set is inflated for the
/// check, to at most `inflated_bytes_max` bytes.
///
/// # Errors
/// [`RejectionCode::Malformed`] with what is wrong and at which byte; [`RejectionCode::TooLarge`] for a data set that
/// inflates past the limit.
pub fn outline(file: &[u8], inflated_bytes_max: usize) -> Result<Outline, Rejection> {
    let meta = file_meta(file)?;
    let body = &file[meta.data_set_at..];
    let body = match meta.transfer_syntax.as_str() {
        DEFLATED => Cow::Owned(inflate(body, inflated_bytes_max)?),
        _ => Cow::Borrowed(body),
    };
    let syntax = match meta.transfer_syntax.as_str() {
        IMPLICIT_LITTLE => Syntax::ImplicitLittle,
        EXPLICIT_BIG => Syntax::ExplicitBig,
        // Deflated, and all that encapsulate pixels (PS3.5 A.4), are explicit little endian.
        _ => Syntax::ExplicitLittle,
    };
    let found = Walk::new(&body, syntax).run()?;
    let need = |uid: Option<Uid>, name: &str| uid.ok_or_else(|| malformed(format!("the data set has no valid {name}")));
    Ok(Outline {
        sop_class: need(found.sop_class, "SOP Class UID")?,
        sop_instance: need(found.sop_instance, "SOP Instance UID")?,
        study: need(found.study, "Study Instance UID")?,
        series: need(found.series, "Series Instance UID")?,
        transfer_syntax: meta.transfer_syntax,
        data_set_at: meta.data_set_at,
    })
}

/// The transfer syntax of a DICOM file and where its data set begins.
struct FileMeta {
    transfer_syntax: Uid,
    data_set_at: usize,
}

fn malformed(text: impl Into<String>) -> Rejection {
    Rejection::new(RejectionCode::Malformed, text)
}

/// The file meta information (PS3.10 7.1): always explicit VR little endian. Its group length is not believed; the
/// group ends where another begins.
fn file_meta(file: &[u8]) -> Result<FileMeta, Rejection> {
    if file.get(128..132) != Some(b"DICM") {
        return Err(malformed("not a DICOM file: the letters DICM are missing at byte 128"));
    }
    let mut walk = Walk::new(file, Syntax::ExplicitLittle);
    walk.at = 132;
    let mut transfer_syntax = None;
    while walk.at + 2 <= file.len() && file[walk.at..walk.at + 2] == [2, 0] {
        let header = walk.header()?;
        let length = header.length.ok_or_else(|| malformed("undefined length in the file meta information"))?;
        let value = walk.take(length, file.len())?;
        if header.tag == Tag(0x0002, 0x0010) {
            transfer_syntax = uid(value);
        }
    }
    let transfer_syntax = transfer_syntax.ok_or_else(|| malformed("the file meta information has no transfer syntax"))?;
    Ok(FileMeta { transfer_syntax, data_set_at: walk.at })
}

fn inflate(body: &[u8], inflated_bytes_max: usize) -> Result<Vec<u8>, Rejection> {
    let mut out = Vec::new();
    let mut inflater = flate2::read::DeflateDecoder::new(body).take(inflated_bytes_max as u64 + 1);
    inflater.read_to_end(&mut out).map_err(|_| malformed("the deflated data set is damaged"))?;
    if out.len() > inflated_bytes_max {
        let text = format!("the data set inflates to more than {inflated_bytes_max} bytes");
        return Err(Rejection::new(RejectionCode::TooLarge, text));
    }
    Ok(out)
}

fn uid(value: &[u8]) -> Option<Uid> {
    std::str::from_utf8(value).ok().and_then(|text| Uid::parse(text).ok())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Syntax {
    ImplicitLittle,
    ExplicitLittle,
    ExplicitBig,
}

#[derive(Debug, Default)]
struct Found {
    sop_class: Option<Uid>,
    sop_instance: Option<Uid>,
    study: Option<Uid>,
    series: Option<Uid>,
}

/// What the walk is inside of; `end` is `None` where a delimiter ends it.
#[derive(Debug, Clone, Copy)]
struct Frame {
    inside: Inside,
    end: Option<usize>,
    /// How elements are coded here: inside a UN of undefined length it is implicit, whatever is outside (CP-246).
    syntax: Syntax,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inside {
    Elements,
    Sequence,
    Fragments,
}

struct Header {
    tag: Tag,
    /// `None` in implicit VR.
    vr: Option<[u8; 2]>,
    /// `None` for undefined.
    length: Option<usize>,
}

const ITEM: Tag = Tag(0xfffe, 0xe000);
const ITEM_END: Tag = Tag(0xfffe, 0xe00d);
const SEQUENCE_END: Tag = Tag(0xfffe, 0xe0dd);
const PIXEL_DATA: Tag = Tag(0x7fe0, 0x0010);

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    syntax: Syntax,
    found: Found,
}

impl<'a> Walk<'a> {
    fn new(bytes: &'a [u8], syntax: Syntax) -> Self {
        Self { bytes, at: 0, syntax, found: Found::default() }
    }

    fn run(mut self) -> Result<Found, Rejection> {
        let mut frames: Vec<Frame> = Vec::with_capacity(2 * NESTING_MAX + 2);
        frames.push(Frame { inside: Inside::Elements, end: Some(self.bytes.len()), syntax: self.syntax });
        while let Some(&frame) = frames.last() {
            // Whatever is read here must end before the nearest holder of known length does.
            let limit = frames.iter().rev().find_map(|f| f.end).unwrap_or(self.bytes.len());
            if frame.end == Some(self.at) {
                frames.pop();
                continue;
            }
            if self.at >= limit {
                return Err(malformed(format!("a sequence is not closed before byte {limit} of the data set")));
            }
            if frames.len() > 2 * NESTING_MAX {
                return Err(malformed(format!("sequences nest deeper than {NESTING_MAX} levels")));
            }
            self.syntax = frame.syntax;
            let start = self.at;
            let header = self.header()?;
            if self.at > limit {
                return Err(self.overrun(start, header.tag));
            }
            match frame.inside {
                Inside::Elements => {
                    if header.tag == ITEM_END && frame.end.is_none() {
                        frames.pop();
                    } else if header.tag.0 == 0xfffe {
                        return Err(malformed(format!("a stray delimiter at byte {start} of the data set")));
                    } else if let Some(inner) = self.element(&header, frame.syntax, limit, frames.len() == 1)? {
                        frames.push(inner);
                    }
                }
                Inside::Sequence => match (header.tag, header.length) {
                    (ITEM, length) => {
                        let end = length.map(|n| self.end_of(n, limit, start, ITEM)).transpose()?;
                        frames.push(Frame { inside: Inside::Elements, end, syntax: frame.syntax });
                    }
                    (SEQUENCE_END, _) if frame.end.is_none() => drop(frames.pop()),
                    _ => return Err(malformed(format!("no item where one belongs, at byte {start} of the data set"))),
                },
                Inside::Fragments => match (header.tag, header.length) {
                    (ITEM, Some(length)) => drop(self.take(length, limit)?),
                    (SEQUENCE_END, _) => drop(frames.pop()),
                    _ => return Err(malformed(format!("no pixel fragment where one belongs, at byte {start}"))),
                },
            }
        }
        Ok(self.found)
    }

    /// Steps over one element, or tells what to enter.
    fn element(&mut self, header: &Header, syntax: Syntax, limit: usize, top: bool) -> Result<Option<Frame>, Rejection> {
        let start = self.at;
        let enter = |inside, end, syntax| Ok(Some(Frame { inside, end, syntax }));
        let Some(length) = header.length else {
            return match header.vr.as_ref() {
                Some(b"OB" | b"OW") if header.tag == PIXEL_DATA => enter(Inside::Fragments, None, syntax),
                Some(b"SQ") | None if header.tag != PIXEL_DATA => enter(Inside::Sequence, None, syntax),
                Some(b"UN") => enter(Inside::Sequence, None, Syntax::ImplicitLittle),
                _ => Err(malformed(format!("element {} has no length", header.tag))),
            };
        };
        let is_sequence = match header.vr {
            Some(vr) => &vr == b"SQ",
            None => StandardDataDictionary.by_tag(header.tag).is_some_and(|entry| entry.vr().relaxed() == VR::SQ),
        };
        if is_sequence {
            return enter(Inside::Sequence, Some(self.end_of(length, limit, start, header.tag)?), syntax);
        }
        if length > limit - self.at {
            return Err(self.overrun(start, header.tag));
        }
        let value = self.take(length, limit)?;
        if top {
            match header.tag {
                Tag(0x0008, 0x0016) => self.found.sop_class = uid(value),
                Tag(0x0008, 0x0018) => self.found.sop_instance = uid(value),
                Tag(0x0020, 0x000d) => self.found.study = uid(value),
                Tag(0x0020, 0x000e) => self.found.series = uid(value),
                _ => {}
            }
        }
        Ok(None)
    }

    fn overrun(&self, start: usize, tag: Tag) -> Rejection {
        malformed(format!("element {tag} at byte {start} of the data set runs past the end of what holds it"))
    }

    fn end_of(&self, length: usize, limit: usize, start: usize, tag: Tag) -> Result<usize, Rejection> {
        if length > limit - self.at { Err(self.overrun(start, tag)) } else { Ok(self.at + length) }
    }

    fn take(&mut self, length: usize, limit: usize) -> Result<&'a [u8], Rejection> {
        let end = self.at.checked_add(length).filter(|&end| end <= limit);
        let end = end.ok_or_else(|| malformed(format!("the file ends early: {length} bytes wanted at {}", self.at)))?;
        let value = &self.bytes[self.at..end];
        self.at = end;
        Ok(value)
    }

    fn u16(&mut self) -> Result<u16, Rejection> {
        let pair: [u8; 2] = self.take(2, self.bytes.len())?.try_into().expect("two bytes were taken");
        Ok(if self.syntax == Syntax::ExplicitBig { u16::from_be_bytes(pair) } else { u16::from_le_bytes(pair) })
    }

    fn u32(&mut self) -> Result<u32, Rejection> {
        let four: [u8; 4] = self.take(4, self.bytes.len())?.try_into().expect("four bytes were taken");
        Ok(if self.syntax == Syntax::ExplicitBig { u32::from_be_bytes(four) } else { u32::from_le_bytes(four) })
    }

    /// An element or item header (PS3.5 7.1).
    fn header(&mut self) -> Result<Header, Rejection> {
        let start = self.at;
        let tag = Tag(self.u16()?, self.u16()?);
        if tag.0 == 0xfffe || self.syntax == Syntax::ImplicitLittle {
            let length = self.u32()?;
            return Ok(Header { tag, vr: None, length: (length != u32::MAX).then_some(length as usize) });
        }
        let vr: [u8; 2] = self.take(2, self.bytes.len())?.try_into().expect("two bytes were taken");
        let length = match &vr {
            b"OB" | b"OD" | b"OF" | b"OL" | b"OV" | b"OW" | b"SQ" | b"SV" | b"UC" | b"UN" | b"UR" | b"UT" | b"UV" => {
                self.take(2, self.bytes.len())?;
                self.u32()?
            }
            [b'A'..=b'Z', b'A'..=b'Z'] => u32::from(self.u16()?),
            _ => return Err(malformed(format!("element {tag} at byte {start} has no value representation"))),
        };
        Ok(Header { tag, vr: Some(vr), length: (length != u32::MAX).then_some(length as usize) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CT: &str = "1.2.840.10008.5.1.4.1.1.2";

    /// An explicit little endian file with the four UIDs and `tail` behind them.
    fn file(syntax: &str, tail: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 128];
        out.extend_from_slice(b"DICM");
        put(&mut out, (2, 0x10), b"UI", syntax.as_bytes());
        out.extend_from_slice(&data_set(tail));
        out
    }

    fn data_set(tail: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, (8, 0x16), b"UI", CT.as_bytes());
        put(&mut out, (8, 0x18), b"UI", b"1.2.3.1");
        put(&mut out, (0x20, 0xd), b"UI", b"1.2.3");
        put(&mut out, (0x20, 0xe), b"UI", b"1.2.3.4");
        out.extend_from_slice(tail);
        out
    }

    fn put(out: &mut Vec<u8>, tag: (u16, u16), vr: &[u8; 2], value: &[u8]) {
        let odd = value.len() % 2;
        out.extend_from_slice(&tag.0.to_le_bytes());
        out.extend_from_slice(&tag.1.to_le_bytes());
        out.extend_from_slice(vr);
        out.extend_from_slice(&((value.len() + odd) as u16).to_le_bytes());
        out.extend_from_slice(value);
        out.extend_from_slice(&[0][..odd]);
    }

    /// `depth` sequences of undefined length, one in the other, closed properly.
    fn nested(depth: usize) -> Vec<u8> {
        let open = [0x40, 0, 0x75, 2, b'S', b'Q', 0, 0, 255, 255, 255, 255, 0xfe, 0xff, 0, 0xe0, 255, 255, 255, 255];
        let close = [0xfe, 0xff, 0x0d, 0xe0, 0, 0, 0, 0, 0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0];
        [open.repeat(depth), close.repeat(depth)].concat()
    }

    #[test]
    fn a_sound_file_tells_who_it_is() {
        let found = outline(&file(EXPLICIT_LITTLE, &nested(8)), 0).unwrap();
        assert_eq!(found.sop_class.as_str(), CT);
        assert_eq!(found.series.as_str(), "1.2.3.4");
        assert_eq!(found.transfer_syntax.as_str(), EXPLICIT_LITTLE);
    }

    #[test]
    fn nesting_is_bounded_before_any_parser_recurses() {
        assert!(outline(&file(EXPLICIT_LITTLE, &nested(NESTING_MAX - 1)), 0).is_ok());
        for depth in [NESTING_MAX + 1, 100_000] {
            let refused = outline(&file(EXPLICIT_LITTLE, &nested(depth)), 0).unwrap_err();
            assert!(refused.text.contains("nest deeper"), "{refused}");
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_rejected_or_still_whole_elements() {
        let whole = file(EXPLICIT_LITTLE, &nested(2));
        let sound: Vec<usize> = (0..whole.len()).filter(|&n| outline(&whole[..n], 0).is_ok()).collect();
        // Only where the last of the four UIDs ends is the shorter file a sound file, too.
        assert_eq!(sound, [whole.len() - nested(2).len()]);
    }

    #[test]
    fn a_length_that_lies_is_rejected() {
        for tail in [
            &[0xe0, 0x7f, 0x10, 0, b'O', b'W', 0, 0, 0xfe, 255, 255, 255, 1, 2][..],
            &[0x40, 0, 0x75, 2, b'S', b'Q', 0, 0, 8, 0, 0, 0, 0xfe, 0xff, 0, 0xe0, 2, 0, 0, 0, 9, 9][..],
            &[0xe0, 0x7f, 0x10, 0, b'O', b'B', 0, 0, 255, 255, 255, 255, 0xfe, 0xff, 0, 0xe0, 255, 255, 255, 127][..],
        ] {
            let refused = outline(&file(EXPLICIT_LITTLE, tail), 0).unwrap_err();
            assert_eq!(refused.code, RejectionCode::Malformed);
        }
    }

    #[test]
    fn a_deflated_data_set_is_inflated_no_further_than_allowed() {
        use std::io::Write;
        let mut deflater = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        let body = data_set(&[]);
        deflater.write_all(&body).unwrap();
        let mut bytes = file(DEFLATED, &[]);
        bytes.truncate(bytes.len() - body.len());
        bytes.extend_from_slice(&deflater.finish().unwrap());
        assert_eq!(outline(&bytes, body.len()).unwrap().sop_instance.as_str(), "1.2.3.1");
        assert_eq!(outline(&bytes, body.len() - 1).unwrap_err().code, RejectionCode::TooLarge);
    }
}
