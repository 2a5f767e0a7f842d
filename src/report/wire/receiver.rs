//! The receiver's side of the serial protocol, as `scanside watch` and a device at the other end run it.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Frame, Splitter};
use crate::report::REPORT_BYTES_MAX;

/// A receiver that hears nothing states what it has this often; it is what wakes a sender when the cable returns.
const GREETING: Duration = Duration::from_secs(2);

/// Boxes a receiver remembers. It meets a new one when the box or its disk is replaced.
const JOURNALS_MAX: usize = 64;

/// What a receiver must not forget: the last report taken of each journal it has met, the latest journal last.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Memory {
    journals: VecDeque<(u64, u64)>,
}

impl Memory {
    /// The last report taken of this journal; 0 for none.
    pub fn last(&self, journal: u64) -> u64 {
        self.journals.iter().find(|(id, _)| *id == journal).map_or(0, |(_, last)| *last)
    }

    /// The report has been taken.
    pub fn take(&mut self, journal: u64, sequence: u64) {
        let last = self.last(journal).max(sequence);
        self.journals.retain(|(id, _)| *id != journal);
        self.journals.push_back((journal, last));
        if self.journals.len() > JOURNALS_MAX {
            self.journals.pop_front();
        }
    }
}

/// A report that has come whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Which journal it is from.
    pub journal: u64,
    /// Its number there.
    pub sequence: u64,
    /// One line of JSON.
    pub json: Vec<u8>,
    /// Numbers between the last report taken here and this one that the box says went elsewhere before, if any.
    pub skipped: Option<std::ops::RangeInclusive<u64>>,
}

/// Takes the reports of one box, in order, each once.
#[derive(Debug)]
pub struct Receiver {
    memory: Memory,
    /// 0 before the box has said who it is.
    journal: u64,
    last: u64,
    /// Wanted from here on, though acknowledged before.
    replay_from: Option<u64>,
    partial: Option<Partial>,
    splitter: Splitter,
    state_at: Duration,
    /// A chunk was lost since the last statement.
    gap: bool,
    /// The box has said that it knows of everything up to here.
    confirmed: u64,
}

#[derive(Debug)]
struct Partial {
    sequence: u64,
    length: u32,
    crc: u32,
    bytes: Vec<u8>,
}

impl Receiver {
    /// Goes on where `memory` ends; `replay_from` asks for reports again that were acknowledged before.
    pub fn new(memory: Memory, replay_from: Option<u64>) -> Self {
        Self {
            memory,
            journal: 0,
            last: 0,
            replay_from,
            partial: None,
            splitter: Splitter::default(),
            state_at: Duration::ZERO,
            gap: false,
            confirmed: 0,
        }
    }

    /// The line was opened (again): an unfinished frame is lost, and the box is greeted at once.
    pub fn line_opened(&mut self, now: Duration) {
        self.splitter.clear();
        self.state_at = now;
    }

    /// Reads what came; a report that is whole now is given out, to be [`accepted`](Receiver::accept) when it is safe.
    pub fn receive(&mut self, bytes: &[u8], now: Duration) -> Option<Incoming> {
        let mut whole = None;
        for frame in self.splitter.push(bytes) {
            match frame {
                Frame::Poll { journal, acknowledged, .. } => {
                    self.meet(journal);
                    self.confirmed = self.confirmed.max(acknowledged);
                    self.state_at = now;
                }
                Frame::Data { journal, sequence, previous, length, report_crc, offset, bytes } => {
                    self.meet(journal);
                    self.state_at = now;
                    // During a replay the box may not have heard of it yet, and this would be a report too far on.
                    let too_far = self.replay_from.is_some() && previous > self.last;
                    if sequence > self.last && !too_far && length as usize <= REPORT_BYTES_MAX {
                        self.chunk(sequence, length, report_crc, offset, &bytes);
                        whole = self.whole(previous).or(whole);
                    }
                }
                Frame::State { .. } => {}
            }
        }
        whole
    }

    /// The report is safe with us: it will be acknowledged, and never given out again.
    pub fn accept(&mut self, sequence: u64, now: Duration) {
        self.memory.take(self.journal, sequence);
        self.last = self.last.max(sequence);
        self.partial = None;
        self.state_at = now;
    }

    /// What must not be forgotten; write it down when a report is accepted.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The frames to send now.
    pub fn transmit(&mut self, now: Duration) -> Vec<u8> {
        if now < self.state_at {
            return Vec::new();
        }
        self.state_at = now + GREETING;
        let (partial, offset) = self.partial.as_ref().map_or((0, 0), |p| (p.sequence, p.bytes.len() as u32));
        let replay = self.replay_from.is_some();
        let gap = std::mem::take(&mut self.gap);
        let state = Frame::State { journal: self.journal, last: self.last, partial, offset, replay, gap };
        // The zero ends whatever noise the line has gathered.
        [vec![0], state.encode()].concat()
    }

    /// When [`Receiver::transmit`] will have something even if nothing comes in.
    pub fn next_due(&self) -> Duration {
        self.state_at
    }

    /// Whether the box is known to know everything that was accepted: then nothing of it comes again.
    pub fn is_settled(&self) -> bool {
        self.confirmed >= self.last
    }

    fn meet(&mut self, journal: u64) {
        if journal != self.journal && journal != 0 {
            self.journal = journal;
            self.last = self.memory.last(journal);
            if let Some(from) = self.replay_from {
                self.last = from.saturating_sub(1);
            }
            self.confirmed = 0;
            self.partial = None;
        }
    }

    fn chunk(&mut self, sequence: u64, length: u32, crc: u32, offset: u32, bytes: &[u8]) {
        let same = |p: &Partial| (p.sequence, p.length, p.crc) == (sequence, length, crc);
        let fresh = || Partial { sequence, length, crc, bytes: Vec::new() };
        let known = self.partial.take().filter(same);
        let partial = self.partial.insert(known.unwrap_or_else(fresh));
        // Before the place we are at: it was sent again. Beyond it: one was lost, and our statement will ask for it.
        if offset as usize == partial.bytes.len() && bytes.len() <= length as usize - partial.bytes.len() {
            partial.bytes.extend_from_slice(bytes);
            self.gap = false;
        }
        self.gap |= offset as usize > partial.bytes.len();
    }

    fn whole(&mut self, previous: u64) -> Option<Incoming> {
        let partial = self.partial.as_ref().filter(|p| p.bytes.len() == p.length as usize)?;
        if crc32c::crc32c(&partial.bytes) != partial.crc {
            // Parts of two reports: begin again.
            self.partial = None;
            return None;
        }
        let skipped = (previous > self.last && self.last > 0).then(|| self.last + 1..=previous);
        Some(Incoming { journal: self.journal, sequence: partial.sequence, json: partial.bytes.clone(), skipped })
    }
}
