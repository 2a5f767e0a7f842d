//! Reports over a serial line: never lost, never twice, whatever the cable does. `board/PROTOCOL.md` is the page for the
//! engineer at the other end; this is the same protocol in code.
//!
//! Frames are COBS-coded (Cheshire and Baker 1999), end with a zero byte and carry a CRC-32C. The box sends a report in
//! chunks and one report at a time; the receiver states what it has, and everything follows from that statement, so a
//! restart of either side or a new cable needs no other message. [`Sender`] and [`Receiver`] are pure: bytes and the time
//! in, bytes and events out.

mod receiver;
mod sender;

pub use receiver::{Incoming, Memory, Receiver};
pub use sender::{Pace, Sender};

/// The version in every frame; frames of another version are passed over.
pub const VERSION: u8 = 1;

/// Bytes of a report in one frame. At 115,200 baud a frame takes 51 ms; longer ones lose more to one spoilt byte.
pub const CHUNK_BYTES_MAX: usize = 512;

/// Bytes of the longest frame before coding: a full [`Frame::Data`].
pub const FRAME_BYTES_MAX: usize = 38 + CHUNK_BYTES_MAX + 4;

/// Bytes of the longest frame on the line, without the closing zero. What is longer is noise.
const CODED_BYTES_MAX: usize = FRAME_BYTES_MAX + FRAME_BYTES_MAX / 254 + 1;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Box to receiver: who I am; state what you have.
    Poll {
        /// Identity of the journal; sequence numbers mean something only within it.
        journal: u64,
        /// The newest report's number; 0 for none.
        newest: u64,
        /// The last report that the box knows to be acknowledged.
        acknowledged: u64,
    },
    /// Box to receiver: a part of a report.
    Data {
        /// As in [`Frame::Poll`].
        journal: u64,
        /// The report's number.
        sequence: u64,
        /// The number of the report sent before it; 0 for none. Numbers rise, but not always by one.
        previous: u64,
        /// Bytes of the whole report.
        length: u32,
        /// CRC-32C of the whole report.
        report_crc: u32,
        /// Where this part begins.
        offset: u32,
        /// 1 to [`CHUNK_BYTES_MAX`] bytes.
        bytes: Vec<u8>,
    },
    /// Receiver to box: what I have. It acknowledges every report up to `last`.
    State {
        /// The journal this is about; 0 before the receiver has heard of one.
        journal: u64,
        /// The last report that is safe with the receiver; 0 for none.
        last: u64,
        /// The report of which a part is here; 0 for none.
        partial: u64,
        /// How many bytes of it, from its beginning.
        offset: u32,
        /// Send what follows `last` even if it was acknowledged before.
        replay: bool,
        /// A chunk beyond `offset` has come, so one was lost: go on from `offset` at once.
        gap: bool,
    },
}

impl Frame {
    /// The frame as it goes onto the line, its closing zero included.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(FRAME_BYTES_MAX);
        body.push(VERSION);
        match self {
            Self::Poll { journal, newest, acknowledged } => {
                body.push(1);
                for number in [journal, newest, acknowledged] {
                    body.extend(number.to_le_bytes());
                }
            }
            Self::Data { journal, sequence, previous, length, report_crc, offset, bytes } => {
                assert!((1..=CHUNK_BYTES_MAX).contains(&bytes.len()), "a chunk of {} bytes", bytes.len());
                body.push(2);
                for number in [journal, sequence, previous] {
                    body.extend(number.to_le_bytes());
                }
                for number in [length, report_crc, offset] {
                    body.extend(number.to_le_bytes());
                }
                body.extend(bytes);
            }
            Self::State { journal, last, partial, offset, replay, gap } => {
                body.push(3);
                for number in [journal, last, partial] {
                    body.extend(number.to_le_bytes());
                }
                body.extend(offset.to_le_bytes());
                body.push(u8::from(*replay) | u8::from(*gap) << 1);
            }
        }
        let crc = crc32c::crc32c(&body);
        body.extend(crc.to_le_bytes());
        let mut line = cobs_encode(&body);
        line.push(0);
        line
    }

    /// Reads what stood between two zeros; `None` for anything but a whole frame of this version.
    pub fn decode(coded: &[u8]) -> Option<Self> {
        let decoded = cobs_decode(coded)?;
        let (body, crc) = decoded.split_last_chunk::<4>()?;
        if u32::from_le_bytes(*crc) != crc32c::crc32c(body) {
            return None;
        }
        let mut fields = Fields(body);
        if fields.byte()? != VERSION {
            return None;
        }
        let frame = match fields.byte()? {
            1 => Self::Poll { journal: fields.long()?, newest: fields.long()?, acknowledged: fields.long()? },
            2 => Self::Data {
                journal: fields.long()?,
                sequence: fields.long()?,
                previous: fields.long()?,
                length: fields.word()?,
                report_crc: fields.word()?,
                offset: fields.word()?,
                bytes: std::mem::take(&mut fields.0).to_vec(),
            },
            3 => {
                let (journal, last, partial) = (fields.long()?, fields.long()?, fields.long()?);
                let (offset, flags) = (fields.word()?, fields.byte()?);
                Self::State { journal, last, partial, offset, replay: flags & 1 != 0, gap: flags & 2 != 0 }
            }
            _ => return None,
        };
        let chunk_fits = !matches!(&frame, Self::Data { bytes, .. } if !(1..=CHUNK_BYTES_MAX).contains(&bytes.len()));
        (fields.0.is_empty() && chunk_fits).then_some(frame)
    }
}

/// The rest of a frame's body.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|b| b[0])
    }

    fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn long(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// Cuts the bytes of a line into frames. Noise costs the frames it touches and no others.
#[derive(Debug, Default)]
pub struct Splitter {
    coded: Vec<u8>,
    /// Too much came without a zero; wait for the next one.
    noise: bool,
    /// Frames that were no frames, so far.
    pub refused: u64,
}

impl Splitter {
    /// The frames that end within `bytes`.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Frame> {
        let mut frames = Vec::new();
        for &byte in bytes {
            if byte != 0 {
                self.noise |= self.coded.len() >= CODED_BYTES_MAX;
                if !self.noise {
                    self.coded.push(byte);
                }
                continue;
            }
            match Frame::decode(&self.coded) {
                Some(frame) if !self.noise => frames.push(frame),
                _ => self.refused += u64::from(!self.coded.is_empty()),
            }
            self.coded.clear();
            self.noise = false;
        }
        frames
    }

    /// Forgets an unfinished frame: the line was lost.
    pub fn clear(&mut self) {
        self.coded.clear();
        self.noise = false;
    }
}

/// Consistent overhead byte stuffing: the same bytes without zeros, at most one in 254 longer.
fn cobs_encode(plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(plain.len() + plain.len() / 254 + 2);
    let mut code_at = 0;
    out.push(1);
    for &byte in plain {
        // Opened late, so that a run of 254 at the very end needs no empty block after it.
        if out[code_at] == 255 {
            code_at = out.len();
            out.push(1);
        }
        if byte == 0 {
            code_at = out.len();
            out.push(1);
        } else {
            out.push(byte);
            out[code_at] += 1;
        }
    }
    out
}

fn cobs_decode(coded: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(coded.len());
    let mut rest = coded;
    while let Some((&code, after)) = rest.split_first() {
        let (run, next) = after.split_at_checked(usize::from(code).checked_sub(1)?)?;
        if run.contains(&0) {
            return None;
        }
        out.extend_from_slice(run);
        if code != 255 && !next.is_empty() {
            out.push(0);
        }
        rest = next;
    }
    Some(out)
}

#[cfg(test)]
mod tests;
