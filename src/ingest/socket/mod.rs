//! The local socket: instances and raw frames in, reports and status out, for programs on the same machine.
//!
//! A frame is `header length u32 | body length u32 | header | body`, lengths little-endian, the header JSON. The client
//! says hello first; every request has one reply, in order; reports come in between once they are asked for. The whole
//! protocol is in `board/PROTOCOL.md`.

mod client;
mod server;

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::{IntakeError, SourceId};
use crate::study::Uid;

pub use client::{Client, ClientError, Hello, Pushed, push_files};
pub use server::{LIVE_RECEIVING_BYTES, Services, SocketConfig, SocketError, SocketServer};

/// The version both sides must speak.
pub const PROTOCOL: u32 = 1;

/// The longest header. They are a few hundred bytes; without a limit a lying length would size a buffer.
pub const HEADER_BYTES_MAX: usize = 64 * 1024;

/// The largest raw frame: 4096 x 4096 grey, or 2048 x 2048 in colour with room to spare.
pub const FRAME_BYTES_MAX: usize = 16 << 20;

/// Bytes that are read from a peer at a time, so that memory grows with what came and not with what was announced.
const PIECE_BYTES: usize = 64 * 1024;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Request {
    /// The first frame of every connection.
    Hello {
        /// [`PROTOCOL`]
        protocol: u32,
        /// The program, for the log.
        client: String,
    },
    /// The body is a DICOM file (PS3.10). Answered by `stored` when it is safe on disk.
    Instance {
        /// SOP Instance UID, where the client knows it; it must then agree with the file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sop_instance_uid: Option<Uid>,
    },
    /// The body is one raw frame of a live stream. Answered by `taken`.
    Frame(FrameHeader),
    /// Nothing more comes of what was sent so far: as releasing a DICOM association.
    Released,
    /// Send reports from now on.
    Subscribe {
        /// The name under which acknowledgements are kept; without one nothing is kept, and no report waits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        receiver: Option<String>,
        /// The first report wanted; without it, what follows the last acknowledged one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<u64>,
    },
    /// Every report up to this one is safe with the receiver.
    Ack {
        /// The number.
        sequence: u64,
    },
    /// This receiver is gone for good: no report waits for it any more. Answered by `done`.
    Forget {
        /// Its name.
        receiver: String,
    },
    /// Send a look at what live streams show, frame by frame. Answered by `done`; `look` frames follow.
    Look,
    /// How the service is.
    Status,
}

/// What the service answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Reply {
    /// To `hello`.
    Hello(Hello),
    /// To `instance`: safe on disk.
    Stored {
        /// `false` when the same instance, to the byte, was there before.
        new: bool,
    },
    /// To `frame`.
    Taken,
    /// To `instance`, `frame`, `subscribe` and `ack`: not done, and nothing is kept of it. The connection goes on.
    Refused {
        /// A word for programs.
        code: String,
        /// One sentence for people.
        text: String,
        /// Trying again later may help.
        retry: bool,
    },
    /// To `released` and `forget`.
    Done,
    /// To `subscribe`: reports after this number follow.
    Subscribed {
        /// The last report not sent.
        after: u64,
    },
    /// No reply: the body is a report, one line of JSON.
    Report {
        /// Its number.
        sequence: u64,
    },
    /// No reply: the body is what a live stream showed in one frame, one line of JSON.
    Look {
        /// Its number; those in between came too fast for this connection.
        number: u64,
    },
    /// To `ack`: on disk.
    Acknowledged {
        /// The number.
        sequence: u64,
    },
    /// To `status`: the body is JSON.
    Status,
    /// The client broke the protocol; the connection is closed.
    Error {
        /// A word for programs.
        code: String,
        /// One sentence for people.
        text: String,
    },
}

/// One raw frame of a live stream, as its header tells it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FrameHeader {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
    /// What a pixel is.
    pub pixel: Pixel,
    /// Microseconds since any moment that stays the same for the connection; must not go back.
    pub time_us: u64,
    /// Millimetres between rows, and between columns; absent where nobody knows, and measures are in pixels then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spacing_mm: Option<[f64; 2]>,
    /// The part of the frame that is an image: `[left, top, right, bottom]`, the last included; absent where it is to be found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<[u32; 4]>,
}

impl FrameHeader {
    /// Bytes the body must have, if the header makes sense.
    pub fn body_bytes(&self) -> Option<usize> {
        let sample_bytes = match self.pixel {
            Pixel::Gray8 => 1,
            Pixel::Rgb8 => 3,
        };
        let bytes = usize::from(self.rows) * usize::from(self.columns) * sample_bytes;
        let spaced = self.spacing_mm.iter().flatten().all(|s| *s > 0.0 && *s <= 100.0);
        (spaced && bytes > 0 && bytes <= FRAME_BYTES_MAX).then_some(bytes)
    }
}

/// What a pixel of a raw frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pixel {
    /// One byte, brighter is more.
    Gray8,
    /// Red, green, blue.
    Rgb8,
}

/// One raw frame.
#[derive(Debug, Clone, Copy)]
pub struct RawFrame<'a> {
    /// Size, time and scale.
    pub header: FrameHeader,
    /// Rows from the top, each from the left; exactly as many bytes as the header says.
    pub pixels: &'a [u8],
}

/// Where live frames go. Called from the connection's thread, and never blocks it: the newest frame wins.
pub trait FrameSink: Send + Sync {
    /// Takes a frame; the first of a source opens its stream.
    ///
    /// # Errors
    /// [`IntakeError`]: the frame makes no sense in this stream, or there is no room for one more stream.
    fn frame(&self, source: SourceId, frame: RawFrame<'_>) -> Result<(), IntakeError>;

    /// No more frames come from this source.
    fn finished(&self, source: SourceId);

    /// The newest look at any stream after number `after`, one line of JSON, or None when there is none within `wait`. Looks
    /// in between are passed over: whoever watches sees the newest.
    fn look(&self, after: u64, wait: std::time::Duration) -> Option<(u64, Vec<u8>)>;
}

/// Why a frame could not be read.
#[derive(Debug, thiserror::Error)]
enum FrameError {
    /// The connection, or the patience with it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A length above its limit.
    #[error("the {part} has {bytes} bytes, more than {bytes_max}")]
    TooLong {
        /// `header` or `body`.
        part: &'static str,
        /// What was announced.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The header is not a known message.
    #[error("the header is no known message: {0}")]
    Header(#[from] serde_json::Error),
}

/// The lengths before a frame.
fn lengths(prefix: [u8; 8], body_bytes_max: usize) -> Result<(usize, usize), FrameError> {
    let [a, b, c, d, e, f, g, h] = prefix;
    let header = u32::from_le_bytes([a, b, c, d]) as usize;
    let body = u32::from_le_bytes([e, f, g, h]) as usize;
    for (part, bytes, bytes_max) in [("header", header, HEADER_BYTES_MAX), ("body", body, body_bytes_max)] {
        if bytes > bytes_max {
            return Err(FrameError::TooLong { part, bytes, bytes_max });
        }
    }
    Ok((header, body))
}

/// Reads `length` bytes; the buffer grows as they come.
fn read_bytes(from: &mut impl Read, length: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(length.min(PIECE_BYTES));
    while out.len() < length {
        let begin = out.len();
        out.resize(length.min(begin + PIECE_BYTES), 0);
        from.read_exact(&mut out[begin..])?;
    }
    Ok(out)
}

fn write_frame(to: &mut impl Write, header: &impl Serialize, body: &[u8]) -> io::Result<()> {
    let header = serde_json::to_vec(header)?;
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "the frame is too long for its length field");
    let mut start = Vec::with_capacity(8 + header.len());
    for length in [header.len(), body.len()] {
        start.extend(u32::try_from(length).map_err(|_| too_long())?.to_le_bytes());
    }
    start.extend(header);
    to.write_all(&start)?;
    to.write_all(body)
}

#[cfg(test)]
mod tests;
