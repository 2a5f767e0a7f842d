//! The threads' side of the serial protocol: a line that is opened again whenever it is lost, around the pure machines of
//! [`wire`](super::wire).

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::journal::{Journal, JournalError};
use super::wire::{Incoming, Memory, Pace, Receiver, Sender};
use crate::link::Link;

/// How long one wait on the line lasts at most: so late may a new report, or the word to stop, be noticed.
const WAIT: Duration = Duration::from_millis(40);

/// A line that cannot be opened is tried again this often.
const REOPEN: Duration = Duration::from_millis(500);

/// One line, opened and opened again, and what it has not taken yet.
struct Line<'a> {
    open: Box<dyn FnMut() -> io::Result<Box<dyn Link>> + Send + 'a>,
    link: Option<Box<dyn Link>>,
    pending: Vec<u8>,
    /// What was last said about the line, so that a cable that stays away is logged once.
    complaint: Option<String>,
    retry_at: Instant,
}

impl<'a> Line<'a> {
    fn new(open: impl FnMut() -> io::Result<Box<dyn Link>> + Send + 'a) -> Self {
        Self { open: Box::new(open), link: None, pending: Vec::new(), complaint: None, retry_at: Instant::now() }
    }

    /// Makes sure that the line is open; true when it has just been opened.
    fn opened(&mut self) -> bool {
        if self.link.is_some() {
            return false;
        }
        std::thread::sleep(self.retry_at.saturating_duration_since(Instant::now()).min(WAIT));
        if Instant::now() < self.retry_at {
            return false;
        }
        match (self.open)() {
            Ok(link) => {
                if let Some(complaint) = self.complaint.take() {
                    log::warn!("the line is back ({complaint})");
                }
                self.link = Some(link);
                self.pending.clear();
                true
            }
            Err(error) => {
                self.lost(&error);
                false
            }
        }
    }

    fn lost(&mut self, error: &io::Error) {
        self.link = None;
        self.retry_at = Instant::now() + REOPEN;
        let complaint = error.to_string();
        if self.complaint.is_none() {
            log::warn!("no line: {complaint}");
            self.complaint = Some(complaint);
        }
    }

    /// Writes what waits; true when the line has now taken all of it.
    fn write(&mut self) -> bool {
        let Some(link) = &mut self.link else { return false };
        if self.pending.is_empty() {
            return false;
        }
        match link.write(&self.pending, WAIT) {
            Ok(count) => {
                self.pending.drain(..count);
                self.pending.is_empty()
            }
            Err(error) => {
                self.lost(&error);
                false
            }
        }
    }

    fn read<'b>(&mut self, buffer: &'b mut [u8], patience: Duration) -> &'b [u8] {
        let Some(link) = &mut self.link else { return &[] };
        match link.read(buffer, patience.min(WAIT)) {
            Ok(count) => &buffer[..count],
            Err(error) => {
                self.lost(&error);
                &[]
            }
        }
    }
}

/// Sends the journal's reports as the receiver called `name` acknowledges them, until `stop`. The line may come and go.
///
/// # Errors
/// [`JournalError`]: the journal cannot be read or written any more.
pub fn send_reports(
    journal: &Journal,
    name: &str,
    pace: Pace,
    open: impl FnMut() -> io::Result<Box<dyn Link>> + Send,
    stop: &AtomicBool,
) -> Result<(), JournalError> {
    let begin = Instant::now();
    let mut sender = Sender::new(journal.id(), journal.register(name)?, pace);
    let mut line = Line::new(open);
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        if line.opened() {
            sender.line_opened(begin.elapsed());
        }
        sender.newest(journal.newest());
        if let Some(after) = sender.wants_after()
            && let Some(entry) = journal.next_after(after)?
        {
            sender.offer(entry.sequence, entry.json, begin.elapsed());
        }
        if line.link.is_some() && line.pending.is_empty() {
            line.pending = sender.transmit(begin.elapsed());
        }
        if line.write() {
            sender.line_drained(begin.elapsed());
        }
        let patience = if line.pending.is_empty() { sender.next_due().saturating_sub(begin.elapsed()) } else { Duration::ZERO };
        let came = line.read(&mut buffer, patience);
        if let Some(upto) = sender.receive(came, begin.elapsed()) {
            journal.acknowledge(name, upto)?;
        }
        if let Some(claim) = sender.take_disbelieved() {
            let newest = journal.newest();
            log::error!("receiver {name} claims to have report {claim}, but the newest is {newest}: its memory is of another journal");
        }
    }
    Ok(())
}

/// Takes reports from a serial line.
pub struct LineReceiver<'a> {
    receiver: Receiver,
    line: Line<'a>,
    /// Came whole and was not asked for yet.
    ready: Option<Incoming>,
    begin: Instant,
}

impl<'a> LineReceiver<'a> {
    /// Goes on where `memory` ends; see [`Receiver::new`]. `open` is called again whenever the line was lost.
    pub fn new(
        memory: Memory,
        replay_from: Option<u64>,
        open: impl FnMut() -> io::Result<Box<dyn Link>> + Send + 'a,
    ) -> Self {
        Self { receiver: Receiver::new(memory, replay_from), line: Line::new(open), ready: None, begin: Instant::now() }
    }

    /// The next report, or `None` at `deadline` or on `stop`. [`Accept`](Self::accept) it before asking for another: the
    /// box sends no further one until then.
    pub fn next(&mut self, deadline: Option<Instant>, stop: &AtomicBool) -> Option<Incoming> {
        let over = || stop.load(Ordering::Relaxed) || deadline.is_some_and(|d| Instant::now() >= d);
        while !over() {
            if self.ready.is_none() {
                self.turn();
            }
            if let Some(incoming) = self.ready.take() {
                return Some(incoming);
            }
        }
        None
    }

    /// The report is printed, stored, or whatever is to become of it: the box may forget it. Keep what
    /// [`LineReceiver::memory`] gives now.
    pub fn accept(&mut self, sequence: u64) {
        self.receiver.accept(sequence, self.begin.elapsed());
        self.ready = self.ready.take().filter(|incoming| incoming.sequence > sequence);
        self.turn();
    }

    /// Waits until the box has confirmed the last acknowledgement, at most for `patience`; whether it has.
    pub fn settle(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while !self.receiver.is_settled() && Instant::now() < deadline {
            self.turn();
        }
        self.receiver.is_settled()
    }

    /// What must not be forgotten.
    pub fn memory(&self) -> &Memory {
        self.receiver.memory()
    }

    fn turn(&mut self) {
        if self.line.opened() {
            self.receiver.line_opened(self.begin.elapsed());
        }
        if self.line.link.is_some() && self.line.pending.is_empty() {
            self.line.pending = self.receiver.transmit(self.begin.elapsed());
        }
        self.line.write();
        let mut buffer = [0; 4096];
        let patience = self.receiver.next_due().saturating_sub(self.begin.elapsed());
        let came = self.line.read(&mut buffer, patience);
        if let Some(incoming) = self.receiver.receive(came, self.begin.elapsed()) {
            self.ready = Some(incoming);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::os::unix::fs::symlink;
    use std::path::Path;
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::link::{Cable, Pty, SerialPort, Weather, memory_pair};
    use crate::report::Report;
    use crate::report::journal::Limits;
    use crate::report::tests::complete;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn journal(folder: &Path) -> Journal {
        Journal::open(folder, Limits::default()).unwrap().0
    }

    /// Runs the box's side in a thread while `body` runs.
    fn while_sending<T>(journal: &Journal, open: impl FnMut() -> io::Result<Box<dyn Link>> + Send, body: impl FnOnce() -> T) -> T {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| send_reports(journal, "serial", Pace::of_baud(115_200), open, &stop));
            let out = {
                let _stopper = Stopper(&stop);
                body()
            };
            sending.join().unwrap().unwrap();
            out
        })
    }

    /// Ends the other threads of a test even when the test fails.
    struct Stopper<'a>(&'a AtomicBool);

    impl Drop for Stopper<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    fn write(journal: &Journal, series: std::ops::RangeInclusive<u32>) {
        for n in series {
            journal.append_once(complete(n)).unwrap();
        }
    }

    fn take(receiver: &mut LineReceiver<'_>, count: usize) -> Vec<u64> {
        let mut out = Vec::new();
        while out.len() < count {
            let deadline = Some(Instant::now() + PATIENCE);
            let incoming = receiver.next(deadline, &AtomicBool::new(false)).expect("a report within a minute");
            assert_eq!(Report::from_json(&incoming.json).unwrap().sequence, incoming.sequence);
            out.push(incoming.sequence);
            receiver.accept(incoming.sequence);
        }
        out
    }

    fn opener(cable: &Cable, side: usize) -> impl FnMut() -> io::Result<Box<dyn Link>> + Send + use<> {
        let cable = cable.clone();
        move || Ok(Box::new(cable.end(side)?))
    }

    #[test]
    fn reports_written_before_and_after_the_cable_was_pulled_arrive_once_each() {
        let folder = tempfile::tempdir().unwrap();
        let journal = journal(folder.path());
        let (_, _, cable) = memory_pair(Weather { short: true, ..Weather::clear(5) });
        write(&journal, 1..=3);
        while_sending(&journal, opener(&cable, 0), || {
            let mut receiver = LineReceiver::new(Memory::default(), None, opener(&cable, 1));
            assert_eq!(take(&mut receiver, 3), [1, 2, 3]);
            cable.unplug();
            write(&journal, 4..=5);
            cable.plug();
            assert_eq!(take(&mut receiver, 2), [4, 5]);
            assert!(receiver.settle(PATIENCE));
        });
        assert_eq!((journal.cursor("serial"), journal.status().waiting), (5, 0));
    }

    #[test]
    fn a_box_that_restarts_goes_on_where_the_receiver_is() {
        let folder = tempfile::tempdir().unwrap();
        let (_, _, cable) = memory_pair(Weather::clear(6));
        let mut receiver = LineReceiver::new(Memory::default(), None, opener(&cable, 1));
        let mut taken = Vec::new();
        for round in 0..3 {
            let journal = journal(folder.path());
            write(&journal, 10 * round + 1..=10 * round + 2);
            // The last report of each round is taken, and the box is gone before it can know.
            taken.extend(while_sending(&journal, opener(&cable, 0), || take(&mut receiver, 2)));
        }
        assert_eq!(taken, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_receiver_that_restarts_from_its_memory_gets_nothing_twice() {
        let folder = tempfile::tempdir().unwrap();
        let journal = journal(folder.path());
        write(&journal, 1..=6);
        let (_, _, cable) = memory_pair(Weather::clear(7));
        let mut memory = Memory::default();
        let mut taken = Vec::new();
        while_sending(&journal, opener(&cable, 0), || {
            for _ in 0..3 {
                let mut receiver = LineReceiver::new(memory.clone(), None, opener(&cable, 1));
                taken.extend(take(&mut receiver, 2));
                memory = receiver.memory().clone();
            }
        });
        assert_eq!(taken, [1, 2, 3, 4, 5, 6]);
    }

    /// Two pseudo-terminals and the wire between them; dropping it pulls both plugs.
    fn plug_in(folder: &Path, stop: &AtomicBool, swaps: &AtomicU32) -> io::Result<()> {
        let mut ends = [Pty::open()?, Pty::open()?];
        for (end, name) in ends.iter().zip(["near", "far"]) {
            let fresh = folder.join("fresh");
            symlink(end.path(), &fresh)?;
            std::fs::rename(fresh, folder.join(name))?;
        }
        let round = swaps.load(Ordering::Relaxed);
        let mut waiting: [VecDeque<u8>; 2] = Default::default();
        while !stop.load(Ordering::Relaxed) && swaps.load(Ordering::Relaxed) == round {
            for from in 0..2 {
                let mut buffer = [0; 512];
                let count = ends[from].read(&mut buffer, Duration::from_millis(2))?;
                waiting[from].extend(&buffer[..count]);
                let count = ends[1 - from].write(waiting[from].make_contiguous(), Duration::ZERO)?;
                waiting[from].drain(..count);
            }
        }
        Ok(())
    }

    #[test]
    fn over_pseudo_terminals_that_vanish_and_come_back_every_report_arrives_once() {
        let folder = tempfile::tempdir().unwrap();
        let journal = journal(folder.path());
        let (stop, swaps) = (AtomicBool::new(false), AtomicU32::new(0));
        let (near, far) = (SerialPort::new(folder.path().join("near")), SerialPort::new(folder.path().join("far")));
        std::thread::scope(|scope| {
            let _stopper = Stopper(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    plug_in(folder.path(), &stop, &swaps).unwrap();
                }
            });
            while_sending(&journal, move || near.open(), || {
                let mut receiver = LineReceiver::new(Memory::default(), None, move || far.open());
                let mut taken = Vec::new();
                for round in 0..3 {
                    write(&journal, 10 * round + 1..=10 * round + 4);
                    taken.extend(take(&mut receiver, 2));
                    swaps.fetch_add(1, Ordering::Relaxed);
                    taken.extend(take(&mut receiver, 2));
                }
                assert_eq!(taken, (1..=12).collect::<Vec<u64>>());
            });
        });
    }
}
