//! The other end of the local socket: what `scanside send`, `watch` and `status` use, and any Rust program may.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{FrameError, FrameHeader, PROTOCOL, Reply, Request, lengths, read_bytes, write_frame};
use crate::dicom::Unreleased;
use crate::ingest::Stored;
use crate::report::journal::Entry;
use crate::study::Uid;

/// The longest body a service sends: a report, or its status.
const BODY_BYTES_MAX: usize = 4 << 20;

/// How long a reply may take. A busy box lets a sender wait; that is its back-pressure.
const REPLY_PATIENCE: Duration = Duration::from_secs(600);

/// What a service says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The version that is spoken.
    pub protocol: u32,
    /// Name of the box.
    pub device: String,
    /// Version of the firmware.
    pub version: String,
    /// `instances`, `frames`, `reports`, `status`.
    pub capabilities: Vec<String>,
    /// The largest instance.
    pub instance_bytes_max: usize,
    /// Identity of the journal: report numbers mean something only within it.
    pub journal: u64,
    /// The newest report's number; 0 for none.
    pub newest: u64,
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens, or the connection broke: connect again.
    #[error("{}: {source}", path.display())]
    Lost {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The service says no; the connection goes on.
    #[error("{text}")]
    Refused {
        /// A word for programs.
        code: String,
        /// One sentence.
        text: String,
        /// Trying again later may help.
        retry: bool,
    },
    /// The two do not understand each other.
    #[error("{}: {what}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What happened.
        what: String,
    },
}

/// What happened while files were handed in.
#[derive(Debug)]
pub enum Pushed<'a> {
    /// The service has it on disk; so many bytes.
    Stored(&'a Path, u64),
    /// It has not, and will not.
    Failed(&'a Path, String),
    /// The service is away, or has no room now; it is tried again after the pause.
    Retry(&'a ClientError, Duration),
}

/// Hands in DICOM files one after another. A service that goes away, or has no room for the moment, is tried up to
/// `attempts` times for each file, ever more slowly. A service that went away before it heard that nothing more comes gets a
/// file of each series once more, and hears it then.
///
/// # Errors
/// The service is not there, or does not understand us: the files told about so far are all there is.
pub fn push_files(socket: &Path, files: &[PathBuf], attempts: u32, tell: &mut dyn FnMut(Pushed<'_>)) -> Result<(), ClientError> {
    let mut client = None;
    let mut unreleased = Unreleased::default();
    let (mut at, mut attempt) = (0, 1);
    loop {
        let fresh = files.get(at).map(PathBuf::as_path);
        let again = if fresh.is_none() { unreleased.again() } else { None };
        let outcome = match fresh.or(again) {
            Some(path) => push_file(socket, &mut client, path).map(|read| {
                read.map(|file| {
                    unreleased.stored(&file, path);
                    file.len() as u64
                })
            }),
            None => client.as_mut().map_or(Ok(()), Client::released).map(|()| Ok(0)),
        };
        let failure = match (outcome, fresh, again) {
            (Ok(Ok(bytes)), Some(path), _) => {
                tell(Pushed::Stored(path, bytes));
                (at, attempt) = (at + 1, 1);
                continue;
            }
            (Ok(Ok(_)), None, Some(_)) => continue,
            (Ok(_), None, None) => return Ok(()),
            (Ok(Err(unreadable)), ..) => unreadable.to_string(),
            (Err(ClientError::Refused { retry: false, text, .. }), ..) => text,
            (Err(error @ (ClientError::Refused { .. } | ClientError::Lost { .. })), ..) if attempt < attempts => {
                if matches!(error, ClientError::Lost { .. }) {
                    client = None;
                    unreleased.broken();
                }
                let pause = Duration::from_millis(200 << attempt.min(5));
                tell(Pushed::Retry(&error, pause));
                std::thread::sleep(pause);
                attempt += 1;
                continue;
            }
            (Err(error), ..) => return Err(error),
        };
        match (fresh, again) {
            (Some(path), _) => {
                tell(Pushed::Failed(path, failure));
                (at, attempt) = (at + 1, 1);
            }
            (None, Some(path)) => unreleased.unwanted(path),
            (None, None) => return Ok(()),
        }
    }
}

/// The file that was handed in, or why it cannot be read.
fn push_file(socket: &Path, client: &mut Option<Client>, path: &Path) -> Result<io::Result<Vec<u8>>, ClientError> {
    let client = match client {
        Some(client) => client,
        None => client.insert(Client::connect(socket, "scanside send")?),
    };
    let bytes_max = client.hello().instance_bytes_max as u64;
    let file = std::fs::metadata(path).and_then(|metadata| match metadata.len() {
        bytes if bytes > bytes_max => Err(io::Error::other(format!("{bytes} bytes, more than the service takes ({bytes_max})"))),
        _ => std::fs::read(path),
    });
    match file {
        Ok(file) => client.push(&file, None).map(|_| Ok(file)),
        Err(error) => Ok(Err(error)),
    }
}

/// A connection to a service.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: UnixStream,
    hello: Option<Hello>,
    /// Reports that came while a reply was waited for; the service sends at most 16 without an acknowledgement.
    reports: VecDeque<Entry>,
}

impl Client {
    /// Connects and says hello; `program` is for the service's log.
    ///
    /// # Errors
    /// [`ClientError::Lost`] when nobody listens, [`ClientError::Protocol`] when somebody else does.
    pub fn connect(path: &Path, program: &str) -> Result<Self, ClientError> {
        let lost = |source| ClientError::Lost { path: path.into(), source };
        let stream = UnixStream::connect(path).map_err(lost)?;
        stream.set_write_timeout(Some(REPLY_PATIENCE)).map_err(lost)?;
        let mut client = Self { path: path.into(), stream, hello: None, reports: VecDeque::new() };
        match client.ask(&Request::Hello { protocol: PROTOCOL, client: program.into() }, &[])? {
            (Reply::Hello(hello), _) => client.hello = Some(hello),
            (other, _) => return Err(client.unexpected(&other)),
        }
        Ok(client)
    }

    /// What the service said of itself.
    pub fn hello(&self) -> &Hello {
        self.hello.as_ref().expect("connect has heard the hello")
    }

    /// Hands in a DICOM file (PS3.10); returns when it is safe on the service's disk.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the service's reason, and the others.
    pub fn push(&mut self, file: &[u8], sop_instance_uid: Option<Uid>) -> Result<Stored, ClientError> {
        match self.ask(&Request::Instance { sop_instance_uid }, file)? {
            (Reply::Stored { new: true }, _) => Ok(Stored::New),
            (Reply::Stored { new: false }, _) => Ok(Stored::Duplicate),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// Hands in one raw frame.
    ///
    /// # Errors
    /// As [`Client::push`].
    pub fn push_frame(&mut self, header: FrameHeader, pixels: &[u8]) -> Result<(), ClientError> {
        match self.ask(&Request::Frame(header), pixels)? {
            (Reply::Taken, _) => Ok(()),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// Asks for looks at live streams; they come by [`Client::next_look`].
    ///
    /// # Errors
    /// As [`Client::push`].
    pub fn look(&mut self) -> Result<(), ClientError> {
        match self.ask(&Request::Look, &[])? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// The next look at a live stream: its number and one line of JSON; `None` when none came by `deadline`.
    ///
    /// # Errors
    /// [`ClientError::Lost`] and [`ClientError::Protocol`].
    pub fn next_look(&mut self, deadline: Instant) -> Result<Option<(u64, Vec<u8>)>, ClientError> {
        match self.read_reply(deadline)? {
            None => Ok(None),
            Some((Reply::Look { number }, json)) => Ok(Some((number, json))),
            Some((other, _)) => Err(self.unexpected(&other)),
        }
    }

    /// Says that nothing more comes of what was handed in.
    ///
    /// # Errors
    /// As [`Client::push`].
    pub fn released(&mut self) -> Result<(), ClientError> {
        match self.ask(&Request::Released, &[])? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// How the service is, as JSON.
    ///
    /// # Errors
    /// As [`Client::push`].
    pub fn status(&mut self) -> Result<serde_json::Value, ClientError> {
        match self.ask(&Request::Status, &[])? {
            (Reply::Status, body) => serde_json::from_slice(&body).map_err(|e| self.broken(e.to_string())),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// Asks for reports; returns the number after which they come. With a receiver's name the service keeps what is
    /// acknowledged, and keeps every report until it is.
    ///
    /// # Errors
    /// As [`Client::push`].
    pub fn subscribe(&mut self, receiver: Option<&str>, from: Option<u64>) -> Result<u64, ClientError> {
        match self.ask(&Request::Subscribe { receiver: receiver.map(Into::into), from }, &[])? {
            (Reply::Subscribed { after }, _) => Ok(after),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// The next report, or `None` when none came by `deadline`.
    ///
    /// # Errors
    /// [`ClientError::Lost`] and [`ClientError::Protocol`].
    pub fn next_report(&mut self, deadline: Instant) -> Result<Option<Entry>, ClientError> {
        if let Some(entry) = self.reports.pop_front() {
            return Ok(Some(entry));
        }
        match self.read_reply(deadline)? {
            None => Ok(None),
            Some((Reply::Report { sequence }, json)) => Ok(Some(Entry { sequence, json })),
            Some((other, _)) => Err(self.unexpected(&other)),
        }
    }

    /// Acknowledges every report up to `sequence`; on the service's disk when this returns.
    ///
    /// # Errors
    /// As [`Client::push`].
    pub fn acknowledge(&mut self, sequence: u64) -> Result<(), ClientError> {
        match self.ask(&Request::Ack { sequence }, &[])? {
            (Reply::Acknowledged { .. }, _) => Ok(()),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// No report waits for this receiver any more.
    ///
    /// # Errors
    /// As [`Client::push`].
    pub fn forget(&mut self, receiver: &str) -> Result<(), ClientError> {
        match self.ask(&Request::Forget { receiver: receiver.into() }, &[])? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    fn ask(&mut self, request: &Request, body: &[u8]) -> Result<(Reply, Vec<u8>), ClientError> {
        // A service that turns us away may have closed already; what it said is then still to be read.
        let written = write_frame(&mut self.stream, request, body);
        let deadline = Instant::now() + if written.is_ok() { REPLY_PATIENCE } else { Duration::ZERO };
        loop {
            let reply = match (self.read_reply(deadline), &written) {
                (Ok(None) | Err(ClientError::Lost { .. }), Err(error)) => return Err(self.lost(error.kind().into())),
                (Ok(None), Ok(())) if Instant::now() < deadline => continue,
                (Ok(None), Ok(())) => return Err(self.lost(io::ErrorKind::TimedOut.into())),
                (Ok(Some(reply)), _) => reply,
                (Err(error), _) => return Err(error),
            };
            match reply {
                (Reply::Report { sequence }, json) => self.reports.push_back(Entry { sequence, json }),
                (Reply::Refused { code, text, retry }, _) => return Err(ClientError::Refused { code, text, retry }),
                other => return Ok(other),
            }
        }
    }

    /// Waits for the next frame; one that has begun is read to its end.
    fn read_reply(&mut self, deadline: Instant) -> Result<Option<(Reply, Vec<u8>)>, ClientError> {
        let patience = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(patience)).map_err(|e| self.lost(e))?;
        let mut first = [0];
        match self.stream.read(&mut first) {
            Ok(0) => return Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(e) => return Err(self.lost(e)),
        }
        self.stream.set_read_timeout(Some(REPLY_PATIENCE)).map_err(|e| self.lost(e))?;
        self.read_rest(first[0]).map(Some).map_err(|error| match error {
            FrameError::Io(source) => self.lost(source),
            other => self.broken(other.to_string()),
        })
    }

    fn read_rest(&mut self, first: u8) -> Result<(Reply, Vec<u8>), FrameError> {
        let mut prefix = [first; 8];
        self.stream.read_exact(&mut prefix[1..])?;
        let (header, body) = lengths(prefix, BODY_BYTES_MAX)?;
        let reply = serde_json::from_slice(&read_bytes(&mut self.stream, header)?)?;
        Ok((reply, read_bytes(&mut self.stream, body)?))
    }

    fn lost(&self, source: io::Error) -> ClientError {
        ClientError::Lost { path: self.path.clone(), source }
    }

    fn broken(&self, what: String) -> ClientError {
        ClientError::Protocol { path: self.path.clone(), what }
    }

    fn unexpected(&self, reply: &Reply) -> ClientError {
        match reply {
            Reply::Error { text, .. } => self.broken(text.clone()),
            other => self.broken(format!("an unexpected answer: {other:?}")),
        }
    }
}
