//! The box's side of the serial protocol.

use std::time::Duration;

use super::{CHUNK_BYTES_MAX, Frame, Splitter};

/// Chunks under way without an answer: enough to keep a line busy while the answer travels, little enough to throw away.
const WINDOW_CHUNKS: usize = 8;

/// The longest wait between two attempts while nothing answers: what a returning cable costs at worst, besides the
/// receiver's own greeting.
const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// An idle line is polled this often, so that both sides notice a change of the other.
const IDLE_POLL: Duration = Duration::from_secs(5);

/// What the line can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Bytes per second in one direction; a tenth of the baud rate.
    pub bytes_per_second: u32,
    /// How long the receiver may take to answer.
    pub answer: Duration,
}

impl Pace {
    /// For a serial line of this speed.
    pub fn of_baud(baud: u32) -> Self {
        Self { bytes_per_second: (baud / 10).max(1), answer: Duration::from_millis(300) }
    }

    /// How long to wait for an answer to `bytes` just handed to the line.
    fn patience(self, bytes: usize) -> Duration {
        self.answer + Duration::from_secs_f64(1.5 * bytes as f64 / f64::from(self.bytes_per_second.max(1)))
    }
}

/// Sends the reports of one journal to one receiver, in order. Times are since any fixed moment.
#[derive(Debug)]
pub struct Sender {
    journal: u64,
    newest: u64,
    /// The last report that this receiver is known to have.
    acknowledged: u64,
    /// The report after which to go on: `acknowledged`, or less while the receiver asks for a replay.
    position: u64,
    flight: Option<Flight>,
    pace: Pace,
    splitter: Splitter,
    poll_at: Duration,
    /// Attempts since the receiver was last heard.
    unanswered: u32,
    heard: Option<Duration>,
    disbelieved: Option<u64>,
}

/// The report under way.
#[derive(Debug)]
struct Flight {
    sequence: u64,
    json: Vec<u8>,
    crc: u32,
    /// The receiver has this much.
    there: usize,
    /// Sent up to here.
    sent: usize,
    /// After a loss was noticed: until the receiver has this much, further complaints are about the same loss.
    recovering: usize,
    /// When to try again.
    retry_at: Duration,
}

impl Sender {
    /// Goes on after `acknowledged`, the durable place of this receiver in the journal.
    pub fn new(journal: u64, acknowledged: u64, pace: Pace) -> Self {
        Self {
            journal,
            newest: acknowledged,
            acknowledged,
            position: acknowledged,
            flight: None,
            pace,
            splitter: Splitter::default(),
            poll_at: Duration::ZERO,
            unanswered: 0,
            heard: None,
            disbelieved: None,
        }
    }

    /// The line was opened (again): nothing is under way any more, and the receiver is asked at once.
    pub fn line_opened(&mut self, now: Duration) {
        self.splitter.clear();
        self.poll_at = now;
        self.unanswered = 0;
        if let Some(flight) = &mut self.flight {
            flight.sent = flight.there;
            flight.recovering = 0;
            flight.retry_at = now + self.pace.answer;
        }
    }

    /// The newest report there is.
    pub fn newest(&mut self, sequence: u64) {
        self.newest = self.newest.max(sequence);
    }

    /// With nothing under way: the number after which the next report is wanted.
    pub fn wants_after(&self) -> Option<u64> {
        self.flight.is_none().then_some(self.position)
    }

    /// Takes the report to send next, as [`Sender::wants_after`] asked for it.
    pub fn offer(&mut self, sequence: u64, json: Vec<u8>, now: Duration) {
        debug_assert!(self.flight.is_none() && sequence > self.position && !json.is_empty());
        self.newest(sequence);
        let crc = crc32c::crc32c(&json);
        let retry_at = if self.is_silent() { now } else { now + self.pace.answer };
        self.flight = Some(Flight { sequence, json, crc, there: 0, sent: 0, recovering: 0, retry_at });
    }

    /// Reads what came. Gives the number up to which the receiver now has everything, when that has risen: write it down.
    pub fn receive(&mut self, bytes: &[u8], now: Duration) -> Option<u64> {
        let before = self.acknowledged;
        for frame in self.splitter.push(bytes) {
            // Anything but a statement is our own echo, or another box.
            let Frame::State { journal, last, partial, offset, replay, gap } = frame else { continue };
            if journal != self.journal {
                // It does not know us yet.
                self.poll_at = self.poll_at.min(now + Duration::from_millis(100));
            } else if last > self.newest && !replay {
                self.disbelieved = Some(last);
            } else {
                self.heard(now);
                self.stated(last, replay);
                self.progressed(partial, offset, gap, now);
            }
        }
        (self.acknowledged > before).then_some(self.acknowledged)
    }

    fn heard(&mut self, now: Duration) {
        if self.is_silent()
            && let Some(flight) = &mut self.flight
        {
            // It is back: no reason to wait out the pause.
            flight.retry_at = now;
        }
        self.heard = Some(now);
        self.unanswered = 0;
    }

    fn stated(&mut self, last: u64, replay: bool) {
        let known = last.min(self.newest);
        if known > self.acknowledged {
            self.acknowledged = known;
            // Tells the receiver that its acknowledgement has arrived.
            self.poll_at = Duration::ZERO;
        }
        let position = if replay { last } else { self.position.max(last) };
        if self.flight.as_ref().is_some_and(|flight| position < self.position || position >= flight.sequence) {
            self.flight = None;
        }
        self.position = position;
    }

    fn progressed(&mut self, partial: u64, offset: u32, gap: bool, now: Duration) {
        let Some(flight) = &mut self.flight else { return };
        let there = if partial == flight.sequence { flight.json.len().min(offset as usize) } else { 0 };
        if there > flight.there {
            flight.there = there;
            flight.sent = flight.sent.max(there);
            flight.retry_at = now + self.pace.patience(flight.sent - there);
        } else if there < flight.there {
            // It was restarted and has lost its part.
            (flight.there, flight.sent, flight.recovering) = (there, there, 0);
        }
        if gap && there >= flight.recovering {
            // The chunks after the lost one, still under way, will tell of the same gap again; once is enough.
            flight.recovering = flight.sent;
            flight.sent = there;
        }
    }

    /// More than one attempt went unanswered: one chunk at a time until the receiver is heard.
    fn is_silent(&self) -> bool {
        self.unanswered > 1
    }

    /// The frames to send now. Call it when the line has taken all of the last ones.
    pub fn transmit(&mut self, now: Duration) -> Vec<u8> {
        let mut out = Vec::new();
        let mut poll = now >= self.poll_at;
        let silent = self.is_silent();
        if let Some(flight) = &mut self.flight {
            let late = now >= flight.retry_at;
            if late {
                // Nothing said so, but what is under way counts as lost.
                flight.sent = flight.there;
                flight.recovering = 0;
            }
            let window = if silent { CHUNK_BYTES_MAX } else { WINDOW_CHUNKS * CHUNK_BYTES_MAX };
            let end = flight.json.len().min(flight.there + window);
            while (late || !silent) && flight.sent < end {
                let chunk = &flight.json[flight.sent..end.min(flight.sent + CHUNK_BYTES_MAX)];
                let frame = Frame::Data {
                    journal: self.journal,
                    sequence: flight.sequence,
                    previous: self.position,
                    length: flight.json.len() as u32,
                    report_crc: flight.crc,
                    offset: flight.sent as u32,
                    bytes: chunk.to_vec(),
                };
                out.extend(frame.encode());
                flight.sent += chunk.len();
            }
            // All is there and it is not acknowledged yet: ask, ever more seldom.
            poll |= late && out.is_empty();
            if late || !out.is_empty() {
                let patience = self.pace.patience(flight.sent - flight.there + out.len());
                flight.retry_at = now + patience.max((patience * (1 << self.unanswered.min(8))).min(BACK_OFF_MAX));
                self.unanswered = self.unanswered.saturating_add(u32::from(late));
            }
        }
        if poll {
            // The zero ends whatever noise the line has gathered.
            out.insert(0, 0);
            let poll = Frame::Poll { journal: self.journal, newest: self.newest, acknowledged: self.acknowledged };
            out.extend(poll.encode());
            self.poll_at = now + IDLE_POLL;
        }
        out
    }

    /// The line has only now taken what [`Sender::transmit`] gave: answers are due from here on.
    pub fn line_drained(&mut self, now: Duration) {
        if let Some(flight) = &mut self.flight {
            flight.retry_at = flight.retry_at.max(now + self.pace.answer);
        }
    }

    /// When [`Sender::transmit`] may have something new even if nothing comes in.
    pub fn next_due(&self) -> Duration {
        self.flight.as_ref().map_or(self.poll_at, |flight| flight.retry_at.min(self.poll_at))
    }

    /// When the receiver was last heard.
    pub fn last_heard(&self) -> Option<Duration> {
        self.heard
    }

    /// A number the receiver claims to have that was never given out here: its memory, or this journal, is from elsewhere.
    pub fn take_disbelieved(&mut self) -> Option<u64> {
        self.disbelieved.take()
    }
}
