//! The journal's file: checksummed records one after another, and finding them again after a cut or a flipped bit.
//!
//! ```text
//! magic 4 | kind 1 | zero 3 | sequence 8 | payload length 4 | payload CRC-32C 4 | header CRC-32C 4 | payload
//! ```
//! All numbers little-endian. The header has a checksum of its own so that a length is believed only when it is right:
//! a damaged payload then costs one record, and a damaged header costs the way to the next header and no more.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::super::REPORT_BYTES_MAX;

/// Bytes before the payload.
pub const HEADER_BYTES: usize = 28;

/// The longest payload. A start record lists up to 4,096 keys of at most 64 characters, a report record one report.
pub const PAYLOAD_BYTES_MAX: usize = REPORT_BYTES_MAX + 4096;

/// 0xF5 is no byte of UTF-8, so no payload holds the magic.
const MAGIC: [u8; 4] = [0xF5, b's', b'j', b'1'];

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The journal's identity, and what compaction must not forget.
    Start,
    /// One report; the header's sequence is the report's.
    Report,
    /// How far one receiver has acknowledged; the header's sequence is that place.
    Cursor,
}

/// The fixed part of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the payload is.
    pub kind: Kind,
    /// See [`Kind`].
    pub sequence: u64,
    /// Payload bytes.
    pub length: u32,
    /// CRC-32C of the payload.
    pub payload_crc: u32,
}

impl Header {
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = match self.kind {
            Kind::Start => 1,
            Kind::Report => 2,
            Kind::Cursor => 3,
        };
        out[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        out[16..20].copy_from_slice(&self.length.to_le_bytes());
        out[20..24].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32c::crc32c(&out[..24]);
        out[24..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..4] != MAGIC || word(24) != crc32c::crc32c(&bytes[..24]) {
            return None;
        }
        let kind = match bytes[4] {
            1 => Kind::Start,
            2 => Kind::Report,
            3 => Kind::Cursor,
            _ => return None,
        };
        let header = Self {
            kind,
            sequence: u64::from(word(8)) | u64::from(word(12)) << 32,
            length: word(16),
            payload_crc: word(20),
        };
        (header.length as usize <= PAYLOAD_BYTES_MAX).then_some(header)
    }

    /// Bytes of the whole record.
    pub fn record_bytes(self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.length)
    }
}

/// A whole record, ready to be written.
pub fn encode(kind: Kind, sequence: u64, payload: &[u8]) -> Vec<u8> {
    assert!(payload.len() <= PAYLOAD_BYTES_MAX, "a record of {} bytes was asked for", payload.len());
    let length = payload.len() as u32;
    let header = Header { kind, sequence, length, payload_crc: crc32c::crc32c(payload) };
    [header.to_bytes().as_slice(), payload].concat()
}

/// The payload of the record at `offset`, or `None` when it is not intact any more.
///
/// # Errors
/// The disk's.
pub fn read_payload(file: &File, offset: u64, header: Header) -> io::Result<Option<Vec<u8>>> {
    let mut payload = vec![0; header.length as usize];
    match file.read_exact_at(&mut payload, offset + HEADER_BYTES as u64) {
        Ok(()) => Ok((crc32c::crc32c(&payload) == header.payload_crc).then_some(payload)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Bytes that are no intact record, with intact records after them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Where in the file.
    pub bytes: Range<u64>,
    /// Sequence of the report that was there, where the header is still legible.
    pub sequence: Option<u64>,
}

/// What a scan found besides records.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Damaged places, in order.
    pub damage: Vec<Damage>,
    /// Where the last record ends; beyond it there is a torn tail, or nothing.
    pub end: u64,
}

/// Visits every intact record between `begin`, where a header is, and `length`, in order.
///
/// # Errors
/// The disk's; damage is not an error.
pub fn scan(file: &File, begin: u64, length: u64, mut visit: impl FnMut(u64, Header, &[u8])) -> io::Result<Scan> {
    let mut scan = Scan { end: begin, ..Scan::default() };
    while let Some(header) = header_at(file, scan.end, length)? {
        let next = scan.end + header.record_bytes();
        if next > length {
            // Its header is right, so its length is: the record was cut.
            break;
        }
        match read_payload(file, scan.end, header)? {
            Some(payload) => visit(scan.end, header, &payload),
            None => {
                let sequence = (header.kind == Kind::Report).then_some(header.sequence);
                scan.damage.push(Damage { bytes: scan.end..next, sequence });
            }
        }
        scan.end = next;
        if header_at(file, next, length)?.is_none() {
            let Some(found) = find_header(file, next, length)? else { break };
            scan.damage.push(Damage { bytes: next..found, sequence: None });
            scan.end = found;
        }
    }
    Ok(scan)
}

/// Where the first header at or after `from` is.
///
/// # Errors
/// The disk's.
pub fn find_header(file: &File, from: u64, length: u64) -> io::Result<Option<u64>> {
    let mut window = vec![0; 64 * 1024];
    let mut at = from;
    while at < length {
        let wanted = window.len().min((length - at) as usize);
        file.read_exact_at(&mut window[..wanted], at)?;
        for (place, &byte) in window[..wanted].iter().enumerate() {
            if byte == MAGIC[0] && header_at(file, at + place as u64, length)?.is_some() {
                return Ok(Some(at + place as u64));
            }
        }
        at += wanted as u64;
    }
    Ok(None)
}

fn header_at(file: &File, offset: u64, length: u64) -> io::Result<Option<Header>> {
    if offset + HEADER_BYTES as u64 > length {
        return Ok(None);
    }
    let mut bytes = [0; HEADER_BYTES];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(Header::parse(&bytes))
}
