//! Elements of a data set, read in place and never beyond its bytes (PS3.5 chapter 7).
//!
//! Nothing is copied and nothing is allocated here: an instance of 500 KB costs the few hundred bytes of its header.

use dicom_core::Tag;

/// Sequences nest no deeper than this in any object of PS3.3; without a limit hostile bytes would nest by the million.
const DEPTH_MAX: usize = 24;

const ITEM: Tag = Tag(0xFFFE, 0xE000);
const ITEM_END: Tag = Tag(0xFFFE, 0xE00D);
const SEQUENCE_END: Tag = Tag(0xFFFE, 0xE0DD);
const UNDEFINED: u32 = u32::MAX;

/// How elements are written: whether each names its value representation, and the order of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Encoding {
    pub explicit: bool,
    pub big_endian: bool,
}

impl Encoding {
    pub const IMPLICIT: Self = Self { explicit: false, big_endian: false };
    pub const EXPLICIT: Self = Self { explicit: true, big_endian: false };
    pub const EXPLICIT_BIG: Self = Self { explicit: true, big_endian: true };

    pub fn u16(self, b: [u8; 2]) -> u16 {
        if self.big_endian { u16::from_be_bytes(b) } else { u16::from_le_bytes(b) }
    }

    pub fn u32(self, b: [u8; 4]) -> u32 {
        if self.big_endian { u32::from_be_bytes(b) } else { u32::from_le_bytes(b) }
    }
}

/// The bytes end where an element should go on, or nest too deep: the place, in bytes from the start of the data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken {
    pub at: usize,
    pub what: &'static str,
}

/// Tag, representation and extent of one element.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub tag: Tag,
    /// Two letters, or zeros where the encoding has none.
    pub vr: [u8; 2],
    /// None for the undefined length.
    pub length: Option<usize>,
    /// Where the value starts.
    pub value_at: usize,
}

/// One element with its value. For a sequence of undefined length the value is what stands before its delimiter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Element<'a> {
    pub tag: Tag,
    pub value: &'a [u8],
    encoding: Encoding,
}

/// The elements of one data set or item, in their order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Elements<'a> {
    bytes: &'a [u8],
    at: usize,
    encoding: Encoding,
}

impl<'a> Elements<'a> {
    pub fn new(bytes: &'a [u8], encoding: Encoding) -> Self {
        Self { bytes, at: 0, encoding }
    }

    /// Where the next element starts.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Header of the next element; the value is not touched. None at the end or at an item's delimiter.
    pub fn head(&mut self) -> Result<Option<Head>, Broken> {
        if self.at >= self.bytes.len() {
            return Ok(None);
        }
        let head = read_head(self.bytes, self.at, self.encoding)?;
        // A data set of defined length may still be followed by zeros that pad the file.
        if head.tag == ITEM_END || head.tag == SEQUENCE_END || (head.tag == Tag(0, 0) && head.length == Some(0)) {
            self.at = self.bytes.len();
            return Ok(None);
        }
        self.at = head.value_at;
        Ok(Some(head))
    }

    /// The value that belongs to the header just read; moves behind it.
    pub fn value(&mut self, head: &Head) -> Result<Element<'a>, Broken> {
        // PS3.5 6.2.2: an element of unknown representation and undefined length holds implicit little endian items.
        let encoding = if &head.vr == b"UN" && head.length.is_none() { Encoding::IMPLICIT } else { self.encoding };
        let (end, next) = match head.length {
            Some(length) => {
                let end = head.value_at.checked_add(length).filter(|end| *end <= self.bytes.len());
                let end = end.ok_or(Broken { at: head.value_at, what: "an element is longer than what follows" })?;
                (end, end)
            }
            None => items_end(self.bytes, head.value_at, encoding, 0)?,
        };
        self.at = next;
        Ok(Element { tag: head.tag, value: &self.bytes[head.value_at..end], encoding })
    }

    /// The next element.
    pub fn next(&mut self) -> Result<Option<Element<'a>>, Broken> {
        match self.head()? {
            Some(head) => self.value(&head).map(Some),
            None => Ok(None),
        }
    }

    /// The first element with this tag from here on. Elements that are broken end the search.
    pub fn find(mut self, tag: Tag) -> Option<Element<'a>> {
        while let Ok(Some(element)) = self.next() {
            if element.tag == tag {
                return Some(element);
            }
        }
        None
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Broken> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or(Broken { at, what: "the data end inside an element" })
}

fn read_head(bytes: &[u8], at: usize, encoding: Encoding) -> Result<Head, Broken> {
    let group = encoding.u16(array(bytes, at)?);
    let tag = Tag(group, encoding.u16(array(bytes, at + 2)?));
    let defined = |length: u32| (length != UNDEFINED).then_some(length as usize);
    let vr: [u8; 2] = array(bytes, at + 4)?;
    // Items have no representation; letters that are none (a writer's mistake met in practice) mean an implicit element.
    if group == 0xFFFE || !encoding.explicit || !vr.iter().all(u8::is_ascii_uppercase) {
        let length = encoding.u32(array(bytes, at + 4)?);
        return Ok(Head { tag, vr: [0, 0], length: defined(length), value_at: at + 8 });
    }
    if matches!(&vr, b"OB" | b"OD" | b"OF" | b"OL" | b"OV" | b"OW" | b"SQ" | b"SV" | b"UC" | b"UN" | b"UR" | b"UT" | b"UV")
    {
        let length = encoding.u32(array(bytes, at + 8)?);
        return Ok(Head { tag, vr, length: defined(length), value_at: at + 12 });
    }
    let length = encoding.u16(array(bytes, at + 6)?);
    Ok(Head { tag, vr, length: Some(length.into()), value_at: at + 8 })
}

/// End of the items that start at `at`, and the place behind their delimiter.
fn items_end(bytes: &[u8], mut at: usize, encoding: Encoding, depth: usize) -> Result<(usize, usize), Broken> {
    if depth > DEPTH_MAX {
        return Err(Broken { at, what: "sequences nest too deep" });
    }
    loop {
        let head = read_head(bytes, at, encoding)?;
        match (head.tag, head.length) {
            (SEQUENCE_END, _) => return Ok((at, head.value_at)),
            (ITEM, Some(length)) => {
                at = head.value_at.checked_add(length).filter(|end| *end <= bytes.len()).ok_or(Broken {
                    at: head.value_at,
                    what: "an item is longer than what follows",
                })?;
            }
            (ITEM, None) => at = item_end(bytes, head.value_at, encoding, depth)?.1,
            _ => return Err(Broken { at, what: "a sequence holds something that is no item" }),
        }
    }
}

/// End of the elements of an item of undefined length, and the place behind its delimiter.
fn item_end(bytes: &[u8], mut at: usize, encoding: Encoding, depth: usize) -> Result<(usize, usize), Broken> {
    loop {
        let head = read_head(bytes, at, encoding)?;
        at = match (head.tag, head.length) {
            (ITEM_END, _) => return Ok((at, head.value_at)),
            (_, Some(length)) => head.value_at.checked_add(length).filter(|end| *end <= bytes.len()).ok_or(Broken {
                at: head.value_at,
                what: "an element is longer than what follows",
            })?,
            (_, None) => {
                let inner = if &head.vr == b"UN" { Encoding::IMPLICIT } else { encoding };
                items_end(bytes, head.value_at, inner, depth + 1)?.1
            }
        };
    }
}

impl<'a> Element<'a> {
    /// The items of a sequence. Stops at the first that is broken.
    pub fn items(&self) -> impl Iterator<Item = Elements<'a>> + use<'a> {
        let (bytes, encoding) = (self.value, self.encoding);
        let mut at = 0;
        std::iter::from_fn(move || {
            let head = read_head(bytes, at, encoding).ok().filter(|head| head.tag == ITEM)?;
            let (end, next) = match head.length {
                Some(length) => {
                    let end = head.value_at.checked_add(length).filter(|end| *end <= bytes.len())?;
                    (end, end)
                }
                None => item_end(bytes, head.value_at, encoding, 0).ok()?,
            };
            at = next;
            Some(Elements::new(&bytes[head.value_at..end], encoding))
        })
    }

    /// The value as text, without the padding; None unless it is ASCII or UTF-8.
    pub fn text(&self) -> Option<&'a str> {
        Some(std::str::from_utf8(self.value).ok()?.trim_matches(['\0', ' ']))
    }

    /// The values of DS or IS, all of them finite, or None.
    pub fn decimals<const N: usize>(&self) -> Option<[f64; N]> {
        let mut out = [0.0; N];
        let mut parts = self.text()?.split('\\');
        for o in &mut out {
            *o = parts.next()?.trim_matches(['\0', ' ']).parse().ok().filter(|v: &f64| v.is_finite())?;
        }
        Some(out)
    }

    /// The first value of DS or IS.
    pub fn decimal(&self) -> Option<f64> {
        self.decimals::<1>().map(|[v]| v)
    }

    /// The first value of IS.
    pub fn integer(&self) -> Option<i64> {
        self.decimal().map(|v| v as i64)
    }

    /// The `n`-th value of US.
    pub fn u16(&self, n: usize) -> Option<u16> {
        array(self.value, n * 2).ok().map(|b| self.encoding.u16(b))
    }

    /// The first value of UL.
    pub fn u32(&self) -> Option<u32> {
        array(self.value, 0).ok().map(|b| self.encoding.u32(b))
    }

    /// The `n`-th value of FD.
    pub fn f64(&self, n: usize) -> Option<f64> {
        let b: [u8; 8] = array(self.value, n * 8).ok()?;
        let v = if self.encoding.big_endian { f64::from_be_bytes(b) } else { f64::from_le_bytes(b) };
        v.is_finite().then_some(v)
    }
}

/// Fragments of encapsulated pixel data (PS3.5 A.4): where each value lies, the offset table first.
pub(super) fn fragments(bytes: &[u8], mut at: usize) -> Result<Vec<std::ops::Range<usize>>, Broken> {
    let mut out = Vec::new();
    loop {
        let head = match read_head(bytes, at, Encoding::EXPLICIT) {
            Ok(head) => head,
            // Writers forget the delimiter at the end of the file; every fragment is whole then.
            Err(_) if at >= bytes.len() && out.len() > 1 => return Ok(out),
            Err(broken) => return Err(broken),
        };
        match (head.tag, head.length) {
            (SEQUENCE_END, _) => return Ok(out),
            (ITEM, Some(length)) => {
                let end = head.value_at.checked_add(length).filter(|end| *end <= bytes.len());
                let end = end.ok_or(Broken { at, what: "a fragment is longer than what follows" })?;
                out.push(head.value_at..end);
                at = end;
            }
            _ => return Err(Broken { at, what: "encapsulated pixel data hold something that is no fragment" }),
        }
    }
}
