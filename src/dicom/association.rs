//! An established association over TCP (PS3.8): PDUs read with a deadline and a cap, messages put together from
//! presentation data values, release and abort.
//!
//! Every read has an end: a PDU must be whole within the idle time, a message within its own, so that a peer who sends
//! one byte a minute holds a thread no longer than one who sends none.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::dimse::{BadCommand, COMMAND_BYTES_MAX, CommandSet};
use super::negotiation::{
    AbortReason, AeTitle, Context, REQUEST_BYTES_MAX, Reply, abort_pdu, read_reply, release_reply_pdu,
    release_request_pdu, request_pdu,
};

/// Bytes in front of every PDU: type, reserved, length.
pub const PDU_HEADER_BYTES: usize = 6;
/// Bytes in front of every fragment: length, context id, control header (PS3.8 9.3.5.1, E.2).
const PDV_HEADER_BYTES: usize = 6;
/// Largest PDU we send, whatever the peer would take: more gains nothing and costs memory.
const SENT_PDU_BYTES_MAX: usize = 128 * 1024;

/// How an association ends other than by release.
#[derive(Debug, thiserror::Error)]
pub enum AssociationError {
    /// The connection closed without release.
    #[error("the peer closed the connection without release")]
    Closed,
    /// A-ABORT came.
    #[error("the peer aborted the association")]
    Aborted,
    /// The peer was silent, or too slow, for too long.
    #[error("{0} took longer than allowed")]
    TimedOut(&'static str),
    /// The peer broke the protocol.
    #[error("protocol violation: {why}")]
    Violation {
        /// What our A-ABORT says.
        reason: AbortReason,
        /// In words.
        why: String,
    },
    /// The peer would not associate.
    #[error("the association was rejected{}: {why}", if *transient { " for now" } else { "" })]
    Rejected {
        /// Trying again later may help.
        transient: bool,
        /// In words.
        why: String,
    },
    /// The network.
    #[error("network: {0}")]
    Io(#[from] std::io::Error),
}

impl AssociationError {
    fn violation(reason: AbortReason, why: impl Into<String>) -> Self {
        Self::Violation { reason, why: why.into() }
    }
}

impl From<BadCommand> for AssociationError {
    fn from(bad: BadCommand) -> Self {
        Self::violation(AbortReason::InvalidParameter, bad.to_string())
    }
}

/// Times and sizes that bound an association.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest PDU that is read.
    pub pdu_bytes_max: u32,
    /// Longest silence between messages, and longest time for one PDU.
    pub idle: Duration,
    /// Longest time from the first fragment of a message to its last.
    pub message: Duration,
    /// Most bytes of one data set; past it the peer is aborted, kept or not.
    pub data_set_bytes_max: u64,
}

/// What comes next from the peer.
#[derive(Debug)]
pub enum Event {
    /// A whole command set, and the context it came in. A data set may follow: [`Association::receive_data_set`].
    Command(Context, CommandSet),
    /// A-RELEASE-RQ: answer with [`Association::confirm_release`].
    Release,
}

/// Type and total length of the PDU that begins with these bytes, once enough of them are there.
pub fn pdu_header(bytes: &[u8]) -> Option<(u8, u64)> {
    let header: &[u8; PDU_HEADER_BYTES] = bytes.first_chunk()?;
    let length = u32::from_be_bytes([header[2], header[3], header[4], header[5]]);
    Some((header[0], PDU_HEADER_BYTES as u64 + u64::from(length)))
}

/// An association in Sta6 (PS3.8 9.2), either side of it.
pub struct Association {
    stream: TcpStream,
    contexts: Vec<Context>,
    limits: Limits,
    peer_pdu_bytes_max: u32,
    /// Body of the P-DATA-TF that is being taken apart.
    pdu: Vec<u8>,
    /// Where its next fragment begins.
    at: usize,
}

/// One fragment: where it lies in the PDU, and its control header.
struct Fragment {
    context: u8,
    command: bool,
    last: bool,
    start: usize,
    end: usize,
}

impl Association {
    /// The acceptor's side, once the A-ASSOCIATE-AC has been sent on `stream`.
    ///
    /// # Errors
    /// Socket options that cannot be set.
    pub fn accepted(
        stream: TcpStream,
        contexts: Vec<Context>,
        peer_pdu_bytes_max: u32,
        limits: Limits,
    ) -> Result<Self, AssociationError> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(limits.idle))?;
        Ok(Self { stream, contexts, limits, peer_pdu_bytes_max, pdu: Vec::new(), at: 0 })
    }

    /// Connects and requests an association; the contexts that the peer did not accept are gone from it.
    ///
    /// # Errors
    /// [`AssociationError`], `Rejected` among them.
    pub fn request(
        address: SocketAddr,
        calling: &AeTitle,
        called: &AeTitle,
        contexts: &[Context],
        limits: Limits,
    ) -> Result<Self, AssociationError> {
        let stream = TcpStream::connect_timeout(&address, limits.idle)?;
        let mut association = Self::accepted(stream, Vec::new(), 0, limits)?;
        association.write(&request_pdu(calling, called, contexts, limits.pdu_bytes_max))?;
        let deadline = Instant::now() + limits.idle;
        let mut pdu = vec![0; PDU_HEADER_BYTES];
        association.fill(&mut pdu, deadline, "the answer to the association request")?;
        let (_, length) = pdu_header(&pdu).expect("a header was read");
        if length > REQUEST_BYTES_MAX as u64 {
            return Err(AssociationError::violation(AbortReason::InvalidParameter, "the association answer is too long"));
        }
        pdu.resize(length as usize, 0);
        association.fill(&mut pdu[PDU_HEADER_BYTES..], deadline, "the answer to the association request")?;
        match read_reply(&pdu) {
            Reply::Accepted { contexts: accepted, peer_pdu_bytes_max } => {
                association.contexts = contexts.iter().filter(|c| accepted.contains(&c.id)).cloned().collect();
                association.peer_pdu_bytes_max = peer_pdu_bytes_max;
                Ok(association)
            }
            Reply::Rejected { transient, why } => Err(AssociationError::Rejected { transient, why }),
            Reply::Aborted => Err(AssociationError::Aborted),
            Reply::Unexpected => {
                Err(AssociationError::violation(AbortReason::UnexpectedPdu, "no association answer where one belongs"))
            }
        }
    }

    /// The agreed contexts.
    pub fn contexts(&self) -> &[Context] {
        &self.contexts
    }

    /// Waits for the next command or the release request.
    ///
    /// # Errors
    /// [`AssociationError`]; the association is over then.
    pub fn next_event(&mut self) -> Result<Event, AssociationError> {
        let mut command = Vec::new();
        let mut context = None;
        let mut deadline = None;
        loop {
            let Some(fragment) = self.fragment(deadline)? else {
                if context.is_none() {
                    return Ok(Event::Release);
                }
                return Err(AssociationError::violation(AbortReason::UnexpectedPdu, "release inside a command"));
            };
            deadline.get_or_insert_with(|| Instant::now() + self.limits.message);
            if !fragment.command || *context.get_or_insert(fragment.context) != fragment.context {
                let why = "a fragment of another message inside a command";
                return Err(AssociationError::violation(AbortReason::UnexpectedPdu, why));
            }
            if command.len() + (fragment.end - fragment.start) > COMMAND_BYTES_MAX {
                let why = format!("a command set of more than {COMMAND_BYTES_MAX} bytes");
                return Err(AssociationError::violation(AbortReason::InvalidParameter, why));
            }
            command.extend_from_slice(&self.pdu[fragment.start..fragment.end]);
            if fragment.last {
                let context = self.context(fragment.context)?.clone();
                return Ok(Event::Command(context, CommandSet::parse(&command)?));
            }
        }
    }

    /// Receives the data set behind a command, fragment by fragment as they come; `take` may drop what it does not
    /// want. Gives the number of bytes.
    ///
    /// # Errors
    /// [`AssociationError`]; the association is over then.
    pub fn receive_data_set(&mut self, context: u8, take: &mut dyn FnMut(&[u8])) -> Result<u64, AssociationError> {
        let deadline = Instant::now() + self.limits.message;
        let mut total = 0;
        loop {
            let Some(fragment) = self.fragment(Some(deadline))? else {
                return Err(AssociationError::violation(AbortReason::UnexpectedPdu, "release inside a data set"));
            };
            if fragment.command || fragment.context != context {
                let why = "a fragment of another message inside a data set";
                return Err(AssociationError::violation(AbortReason::UnexpectedPdu, why));
            }
            total += (fragment.end - fragment.start) as u64;
            if total > self.limits.data_set_bytes_max {
                let why = format!("a data set of more than {} bytes", self.limits.data_set_bytes_max);
                return Err(AssociationError::violation(AbortReason::InvalidParameter, why));
            }
            take(&self.pdu[fragment.start..fragment.end]);
            if fragment.last {
                return Ok(total);
            }
        }
    }

    /// Sends a command set.
    ///
    /// # Errors
    /// [`AssociationError`]
    pub fn send_command(&mut self, context: u8, command: &CommandSet) -> Result<(), AssociationError> {
        self.send(context, 1, &command.encode())
    }

    /// Sends a data set, coded in the context's transfer syntax.
    ///
    /// # Errors
    /// [`AssociationError`]
    pub fn send_data_set(&mut self, context: u8, data_set: &[u8]) -> Result<(), AssociationError> {
        self.send(context, 0, data_set)
    }

    /// Answers a release request; the connection is the peer's to close.
    pub fn confirm_release(mut self) -> TcpStream {
        let _ = self.write(&release_reply_pdu());
        self.stream
    }

    /// Aborts; the connection is the peer's to close.
    pub fn abort(mut self, reason: AbortReason) -> TcpStream {
        let _ = self.write(&abort_pdu(reason));
        self.stream
    }

    /// The connection, without another word.
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// Requests the release and waits for the reply.
    ///
    /// # Errors
    /// [`AssociationError`]; everything that was answered before still holds.
    pub fn release(mut self) -> Result<(), AssociationError> {
        self.write(&release_request_pdu())?;
        match self.read_pdu(None)? {
            // Release collision (PS3.8 9.2.3, AR-8): ours was first, theirs is answered.
            5 => self.write(&release_reply_pdu()),
            6 => Ok(()),
            _ => Err(AssociationError::violation(AbortReason::UnexpectedPdu, "no release reply where one belongs")),
        }
    }

    fn context(&self, id: u8) -> Result<&Context, AssociationError> {
        self.contexts.iter().find(|context| context.id == id).ok_or_else(|| {
            let why = format!("presentation context {id} was not agreed");
            AssociationError::violation(AbortReason::InvalidParameter, why)
        })
    }

    /// The next fragment; `None` for A-RELEASE-RQ.
    fn fragment(&mut self, deadline: Option<Instant>) -> Result<Option<Fragment>, AssociationError> {
        // A P-DATA-TF without fragments says nothing, but may be sent; so this loops.
        while self.at == self.pdu.len() {
            match self.read_pdu(deadline)? {
                4 => {}
                5 => return Ok(None),
                6 => {
                    let why = "a release reply that nobody asked for";
                    return Err(AssociationError::violation(AbortReason::UnexpectedPdu, why));
                }
                kind => {
                    let why = format!("a PDU of type {kind} inside an association");
                    return Err(AssociationError::violation(AbortReason::UnexpectedPdu, why));
                }
            }
        }
        let bad = |why: &str| AssociationError::violation(AbortReason::InvalidParameter, why);
        let rest = &self.pdu[self.at..];
        let header: &[u8; PDV_HEADER_BYTES] = rest.first_chunk().ok_or_else(|| bad("a fragment without header"))?;
        let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
        if length < 2 || length > rest.len() - 4 {
            return Err(bad("a fragment whose length cannot be"));
        }
        let start = self.at + PDV_HEADER_BYTES;
        let end = self.at + 4 + length;
        self.at = end;
        Ok(Some(Fragment { context: header[4], command: header[5] & 1 != 0, last: header[5] & 2 != 0, start, end }))
    }

    /// Reads one PDU; its body is in `self.pdu` when it is P-DATA. A-ABORT is an error.
    fn read_pdu(&mut self, deadline: Option<Instant>) -> Result<u8, AssociationError> {
        let until = |idle: Duration| deadline.map_or(Instant::now() + idle, |d| d.min(Instant::now() + idle));
        let mut header = [0; PDU_HEADER_BYTES];
        self.fill(&mut header[..1], until(self.limits.idle), "waiting for the next message")?;
        let whole_by = until(self.limits.idle);
        self.fill(&mut header[1..], whole_by, "a PDU")?;
        let (kind, length) = pdu_header(&header).expect("a header was read");
        let body = length - PDU_HEADER_BYTES as u64;
        let fits = match kind {
            4 => body <= u64::from(self.limits.pdu_bytes_max),
            5..=7 => body == 4,
            // No association PDU, known or not, has business here; its body is not even read.
            _ => {
                let reason =
                    if kind <= 3 && kind > 0 { AbortReason::UnexpectedPdu } else { AbortReason::UnrecognizedPdu };
                return Err(AssociationError::violation(reason, format!("a PDU of type {kind} inside an association")));
            }
        };
        if !fits {
            let why = format!("a PDU of type {kind} and {body} bytes");
            return Err(AssociationError::violation(AbortReason::InvalidParameter, why));
        }
        let mut pdu = std::mem::take(&mut self.pdu);
        pdu.resize(body as usize, 0);
        let read = self.fill(&mut pdu, whole_by, "a PDU");
        self.pdu = pdu;
        self.at = 0;
        read?;
        if kind != 4 {
            self.pdu.clear();
        }
        if kind == 7 { Err(AssociationError::Aborted) } else { Ok(kind) }
    }

    fn fill(&mut self, mut buffer: &mut [u8], deadline: Instant, what: &'static str) -> Result<(), AssociationError> {
        while !buffer.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(AssociationError::TimedOut(what));
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(AssociationError::Closed),
                Ok(n) => buffer = &mut buffer[n..],
                Err(e) => match e.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => return Err(AssociationError::TimedOut(what)),
                    ErrorKind::Interrupted => {}
                    ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => return Err(AssociationError::Closed),
                    _ => return Err(e.into()),
                },
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), AssociationError> {
        self.stream.write_all(bytes).map_err(|e| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => AssociationError::TimedOut("sending"),
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => AssociationError::Closed,
            _ => e.into(),
        })
    }

    /// Cuts a message into fragments the peer takes, one per P-DATA-TF.
    fn send(&mut self, context: u8, command: u8, message: &[u8]) -> Result<(), AssociationError> {
        let peer = match self.peer_pdu_bytes_max {
            0 => SENT_PDU_BYTES_MAX,
            n => (n as usize).min(SENT_PDU_BYTES_MAX),
        };
        // Fragments are of even length (PS3.8 E.2); a peer that allows less than two bytes of them gets two.
        let most = peer.saturating_sub(PDV_HEADER_BYTES).max(2) & !1;
        let mut pdu = Vec::with_capacity(PDU_HEADER_BYTES + PDV_HEADER_BYTES + most.min(message.len()));
        let mut rest = message;
        loop {
            let (now, later) = rest.split_at(most.min(rest.len()));
            let last = if later.is_empty() { 2 } else { 0 };
            pdu.clear();
            pdu.extend_from_slice(&[4, 0]);
            pdu.extend_from_slice(&((now.len() + PDV_HEADER_BYTES) as u32).to_be_bytes());
            pdu.extend_from_slice(&((now.len() + 2) as u32).to_be_bytes());
            pdu.extend_from_slice(&[context, command | last]);
            pdu.extend_from_slice(now);
            self.write(&pdu)?;
            if later.is_empty() {
                return Ok(());
            }
            rest = later;
        }
    }
}
