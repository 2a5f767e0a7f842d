//! Where connections wait that are no association yet, or no longer: for their A-ASSOCIATE-RQ (PS3.8 Sta2), or for the
//! peer to close (Sta13). One thread watches them all, so a peer who says nothing holds a place here until the ARTIM
//! timer (PS3.8 9.1.5) ends it, and never a thread.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::dicom::association::{PDU_HEADER_BYTES, pdu_header};
use crate::dicom::negotiation::{AbortReason, REQUEST_BYTES_MAX, abort_pdu};

/// Connections that wait at once. When one more comes, the one that has waited longest goes: honest peers send their
/// request with the first packet.
const WAITING_MAX: usize = 64;

/// What becomes of a whole association request.
pub(super) enum Greeting {
    /// A thread serves it.
    TakenOver,
    /// It is turned away with this answer.
    Refused(TcpStream, Vec<u8>),
}

struct Waiting {
    stream: TcpStream,
    /// What came of the request; nothing is kept of those who leave.
    request: Vec<u8>,
    leaving: bool,
    deadline: Instant,
}

enum Next {
    Wait,
    Greet,
    /// The peer broke the protocol.
    Abort(AbortReason),
    Close,
}

pub(super) struct Lobby {
    pub(super) listener: TcpListener,
    /// Readable when something was sent to `departures`, or the lobby is to close.
    pub(super) wake: UnixStream,
    /// Connections whose association is over.
    pub(super) departures: Receiver<TcpStream>,
    pub(super) artim: Duration,
}

impl Lobby {
    /// Runs until `stopping` says so; `greet` gets every whole request.
    pub(super) fn run(mut self, stopping: impl Fn() -> bool, mut greet: impl FnMut(TcpStream, Vec<u8>) -> Greeting) {
        let mut waiting: Vec<Waiting> = Vec::new();
        while !stopping() {
            let ready = self.wait_for_any(&waiting);
            let now = Instant::now();
            let mut stay = Vec::with_capacity(waiting.len());
            for (mut one, ready) in waiting.drain(..).zip(ready.peers) {
                let next = if ready { one.advance() } else { Next::Wait };
                match next {
                    Next::Wait if now < one.deadline => stay.push(one),
                    Next::Wait if one.leaving || one.request.is_empty() => {}
                    Next::Wait => {
                        log::warn!("a connection sent no whole association request in time");
                        let _ = one.stream.write(&abort_pdu(AbortReason::Unspecified));
                    }
                    Next::Greet => match greet(one.stream, one.request) {
                        Greeting::TakenOver => {}
                        Greeting::Refused(stream, answer) => stay.extend(self.see_out(stream, &answer)),
                    },
                    Next::Abort(reason) => stay.extend(self.see_out(one.stream, &abort_pdu(reason))),
                    Next::Close => {}
                }
            }
            waiting = stay;
            if ready.wake {
                let _ = self.wake.read(&mut [0; 64]);
            }
            let departures = self.departures.clone();
            waiting.extend(departures.try_iter().filter_map(|stream| self.see_out(stream, &[])));
            if ready.listener {
                waiting.extend(self.accept());
            }
            while waiting.len() > WAITING_MAX {
                let oldest = (0..waiting.len()).min_by_key(|&i| waiting[i].deadline).expect("some are waiting");
                waiting.swap_remove(oldest);
            }
        }
    }

    fn wait_for_any(&self, waiting: &[Waiting]) -> Ready {
        let mut polled = vec![PollFd::new(&self.wake, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        polled.extend(waiting.iter().map(|one| PollFd::new(&one.stream, PollFlags::IN)));
        let timeout = waiting.iter().map(|one| one.deadline).min().map(|deadline| {
            // One millisecond more, so that the deadline is past when poll returns.
            let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        if let Err(e) = poll(&mut polled, timeout.as_ref()) {
            if e != rustix::io::Errno::INTR {
                log::error!("cannot wait for connections: {e}");
                std::thread::sleep(Duration::from_millis(100));
            }
            return Ready { wake: false, listener: false, peers: vec![false; waiting.len()] };
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ready { wake: ready(&polled[0]), listener: ready(&polled[1]), peers: polled[2..].iter().map(ready).collect() }
    }

    fn accept(&self) -> Option<Waiting> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true).ok()?;
                let deadline = Instant::now() + self.artim;
                Some(Waiting { stream, request: Vec::new(), leaving: false, deadline })
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => None,
            Err(e) => {
                // Out of descriptors: the listener stays readable, and without a pause this would spin.
                log::error!("cannot accept a connection: {e}");
                std::thread::sleep(Duration::from_millis(50));
                None
            }
        }
    }

    /// Says the last word, if any, and leaves the closing to the peer: closing first could destroy the answer on its
    /// way, since unread bytes turn a close into a reset.
    fn see_out(&self, mut stream: TcpStream, answer: &[u8]) -> Option<Waiting> {
        stream.set_nonblocking(true).ok()?;
        // A few bytes always fit into a send buffer; a peer whose buffer is full is not waiting for an answer.
        if !answer.is_empty() && stream.write(answer).ok()? != answer.len() {
            return None;
        }
        Some(Waiting { stream, request: Vec::new(), leaving: true, deadline: Instant::now() + self.artim })
    }
}

struct Ready {
    wake: bool,
    listener: bool,
    peers: Vec<bool>,
}

impl Waiting {
    /// Reads what is there, and no byte more than the request.
    fn advance(&mut self) -> Next {
        let mut buffer = [0; 8192];
        loop {
            let wanted = match pdu_header(&self.request) {
                _ if self.leaving => buffer.len(),
                None => PDU_HEADER_BYTES - self.request.len(),
                Some((1, total)) if total <= REQUEST_BYTES_MAX as u64 => total as usize - self.request.len(),
                Some((1, _)) => return Next::Abort(AbortReason::InvalidParameter),
                Some((2..=7, _)) => return Next::Abort(AbortReason::UnexpectedPdu),
                Some(_) => return Next::Abort(AbortReason::UnrecognizedPdu),
            };
            if wanted == 0 {
                return Next::Greet;
            }
            let room = wanted.min(buffer.len());
            match self.stream.read(&mut buffer[..room]) {
                Ok(0) => return Next::Close,
                // One read a turn for those who leave: somebody who keeps sending must not keep the others waiting.
                Ok(_) if self.leaving => return Next::Wait,
                Ok(n) => self.request.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Next::Wait,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Next::Close,
            }
        }
    }
}
