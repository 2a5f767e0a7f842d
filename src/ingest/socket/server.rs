//! The service's end of the local socket: one thread for each connection, one more for each subscriber.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, chmod};

use super::{
    FRAME_BYTES_MAX, FrameError, FrameSink, Hello, PROTOCOL, RawFrame, Reply, Request, lengths, read_bytes, write_frame,
};
use crate::ingest::{Intake, IntakeError, Received, SourceId, Stored};
use crate::report::journal::{Journal, JournalError};

/// How long a thread may sleep without looking whether it is to stop.
const LOOK: Duration = Duration::from_millis(200);

/// Above the time for [`SocketConfig::stall`], a frame must come this fast; a peer who drips bytes would hold the memory for ever.
const BYTES_PER_SECOND_MIN: u64 = 100_000;

/// Reports under way to a named subscriber without an acknowledgement.
const UNACKNOWLEDGED_MAX: usize = 16;

/// Where the socket is, and its limits.
#[derive(Debug, Clone)]
pub struct SocketConfig {
    /// The path; the file is made with mode 0660.
    pub path: PathBuf,
    /// Connections at once; one more is told so and closed.
    pub connections_max: usize,
    /// The largest instance.
    pub instance_bytes_max: usize,
    /// Bodies under way at one moment, over all connections; more wait for their turn. Live images have [`LIVE_RECEIVING_BYTES`] of
    /// their own.
    pub receiving_bytes_max: u64,
    /// A peer in the middle of a frame that sends nothing for so long is gone.
    pub stall: Duration,
    /// The whole of a live image must come within so long: a later one is of no use to anybody.
    pub live_patience: Duration,
    /// A peer whose socket is full for so long is cut off; the journal keeps its reports.
    pub write_patience: Duration,
}

/// Bytes of live images under way at one moment: two of the largest that streams may have, and one of the largest that is refused, so
/// that neither a slow sender of instances nor a sender of nonsense makes a stream wait.
pub const LIVE_RECEIVING_BYTES: u64 = 2 * FRAME_BYTES_MAX as u64;

impl SocketConfig {
    /// 16 connections, instances of 64 MiB, 64 MiB under way; 30 s of silence, 5 s for a live image, 20 s for a reader.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let bytes = 64 << 20;
        Self {
            path: path.into(),
            connections_max: 16,
            instance_bytes_max: bytes,
            receiving_bytes_max: bytes as u64,
            stall: Duration::from_secs(30),
            live_patience: Duration::from_secs(5),
            write_patience: Duration::from_secs(20),
        }
    }
}

/// What the socket is a door to.
#[derive(Clone)]
pub struct Services {
    /// Takes instances.
    pub intake: Arc<dyn Intake>,
    /// Takes raw frames, where an exam for them runs.
    pub frames: Option<Arc<dyn FrameSink>>,
    /// Gives reports.
    pub journal: Arc<Journal>,
    /// Gives the body of `status`.
    pub status: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// The box, for `hello`.
    pub device_name: String,
}

/// Why the socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A live service listens there.
    #[error("{}: another service listens on this socket", .0.display())]
    InUse(PathBuf),
    /// Something else lies there, and it is not ours to remove.
    #[error("{}: there is a file here that is no socket", .0.display())]
    NotASocket(PathBuf),
    /// The system.
    #[error("{}: cannot {doing}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// The open socket; dropping it closes it and ends every connection.
pub struct SocketServer {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    /// Device and inode of the file we made: another service may have put its own there since.
    file: (u64, u64),
}

struct Shared {
    config: SocketConfig,
    services: Services,
    stop: AtomicBool,
    connections: AtomicUsize,
    receiving: Budget,
    live: Budget,
}

/// Bytes of bodies under way, and at most how many.
struct Budget {
    taken: Mutex<u64>,
    room: Condvar,
    bytes_max: u64,
}

impl SocketServer {
    /// Opens the socket. A file left by a service that died is replaced.
    ///
    /// # Errors
    /// [`SocketError`]; in particular when another service is alive there.
    pub fn start(config: SocketConfig, services: Services) -> Result<Self, SocketError> {
        let listener = bind(&config.path)?;
        let found = |doing| {
            let path = config.path.clone();
            move |source| SocketError::Io { path, doing, source }
        };
        listener.set_nonblocking(true).map_err(found("prepare it"))?;
        let metadata = fs::symlink_metadata(&config.path).map_err(found("look at it"))?;
        let start_thread = found("start a thread for it");
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            receiving: Budget::new(config.receiving_bytes_max),
            live: Budget::new(LIVE_RECEIVING_BYTES),
            config,
            services,
        });
        let mine = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name("scanside-socket".into());
        let acceptor = builder.spawn(move || mine.accept(&listener)).map_err(start_thread)?;
        Ok(Self { shared, acceptor: Some(acceptor), file: (metadata.dev(), metadata.ino()) })
    }

    /// Whether the thread that lets connections in is there.
    pub fn is_alive(&self) -> bool {
        self.acceptor.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for SocketServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.receiving.room.notify_all();
        self.shared.live.room.notify_all();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let path = &self.shared.config.path;
        if fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == self.file) {
            let _ = fs::remove_file(path);
        }
        // The threads look at `stop` every now and then; what they hold is released before the service goes on closing.
        let deadline = Instant::now() + 10 * LOOK;
        while self.shared.connections.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            std::thread::sleep(LOOK / 20);
        }
    }
}

/// Binds under another name and renames, so that the socket never exists with other permissions, and a dead one is
/// replaced without a moment in which there is none.
fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |doing| move |source| SocketError::Io { path: path.into(), doing, source };
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketError::NotASocket(path.into())),
        Ok(_) if UnixStream::connect(path).is_ok() => return Err(SocketError::InUse(path.into())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("look at it")(error)),
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let fresh = path.with_file_name(name);
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(failed("make the socket"))?;
    let placed = chmod(&fresh, Mode::from_raw_mode(0o660)).map_err(io::Error::from).and_then(|()| fs::rename(&fresh, path));
    if let Err(error) = placed {
        let _ = fs::remove_file(&fresh);
        return Err(failed("put the socket in place")(error));
    }
    Ok(listener)
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        while !self.stopping() {
            match listener.accept() {
                Ok((stream, _)) => self.welcome(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait_for(listener),
                Err(error) => {
                    log::error!("local socket: cannot accept a connection: {error}");
                    std::thread::sleep(LOOK);
                }
            }
        }
    }

    fn welcome(self: &Arc<Self>, stream: UnixStream) {
        let who = rustix::net::sockopt::socket_peercred(&stream);
        let who = who.map_or("unknown".into(), |c| format!("process {}, user {}", c.pid.as_raw_nonzero(), c.uid.as_raw()));
        let prepared = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_read_timeout(Some(LOOK)))
            .and_then(|()| stream.set_write_timeout(Some(self.config.write_patience)));
        if let Err(error) = prepared {
            return log::warn!("local socket: {who}: {error}");
        }
        if self.connections.load(Ordering::SeqCst) >= self.config.connections_max {
            log::warn!("local socket: {who}: turned away, {} connections are open", self.config.connections_max);
            let text = format!("{} connections are open already", self.config.connections_max);
            let _ = write_frame(&mut &stream, &Reply::Error { code: "busy".into(), text }, &[]);
            return;
        }
        self.connections.fetch_add(1, Ordering::SeqCst);
        let mine = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("scanside-client".into()).spawn(move || {
            let _leaving = Leaving(Arc::clone(&mine));
            Connection::new(mine, stream, who).run();
        });
        if let Err(error) = spawned {
            self.connections.fetch_sub(1, Ordering::SeqCst);
            log::error!("local socket: cannot start a thread: {error}");
        }
    }
}

impl Budget {
    fn new(bytes_max: u64) -> Self {
        Self { taken: Mutex::new(0), room: Condvar::new(), bytes_max }
    }

    /// Waits until `bytes` fit into what may be under way.
    fn reserve(&self, bytes: u64, stopping: impl Fn() -> bool) -> io::Result<Reserved<'_>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // One body larger than everything allowed still passes, alone.
        while *taken > 0 && *taken + bytes > self.bytes_max {
            if stopping() {
                return Err(closing());
            }
            taken = self.room.wait_timeout(taken, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        *taken += bytes;
        Ok(Reserved { budget: self, bytes })
    }
}

/// Counts a connection out, also after a panic.
struct Leaving(Arc<Shared>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Reserved<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        *self.budget.taken.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.budget.room.notify_all();
    }
}

/// The body of a request, and its room.
struct Body<'a> {
    bytes: Vec<u8>,
    _room: Reserved<'a>,
}

/// Reads a stream with a short timeout until the bytes are there, the time is up, or the service stops.
struct Patient<'a> {
    stream: &'a UnixStream,
    shared: &'a Shared,
    /// None between frames, where a client may be silent as long as it likes.
    deadline: Option<Instant>,
    silent_since: Instant,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.shared.stopping() {
                return Err(closing());
            }
            match self.stream.read(buffer) {
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {
                    let now = Instant::now();
                    if self.deadline.is_some_and(|d| now > d || now - self.silent_since > self.shared.config.stall) {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "the frame did not come to its end in time"));
                    }
                }
                other => {
                    self.silent_since = Instant::now();
                    if self.deadline.is_some_and(|d| self.silent_since > d) {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "the frame comes too slowly"));
                    }
                    return other;
                }
            }
        }
    }
}

struct Connection {
    shared: Arc<Shared>,
    stream: Arc<UnixStream>,
    /// Replies and reports are written by two threads.
    writing: Arc<Mutex<()>>,
    who: String,
    source: SourceId,
    greeted: bool,
    /// Instances, or frames, came since the last `released`.
    open_work: bool,
    frames: bool,
    subscription: Option<(Arc<Subscription>, JoinHandle<()>)>,
    looking: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

/// What the two threads of a subscriber share.
struct Subscription {
    receiver: Option<String>,
    /// Numbers sent and not acknowledged yet.
    under_way: Mutex<VecDeque<u64>>,
    acknowledged: Condvar,
    over: AtomicBool,
}

/// How a connection's turn ended.
enum Turn {
    GoOn,
    Close,
}

impl Connection {
    fn new(shared: Arc<Shared>, stream: UnixStream, who: String) -> Self {
        let stream = Arc::new(stream);
        Self {
            shared,
            stream,
            writing: Arc::default(),
            who,
            source: SourceId::fresh(),
            greeted: false,
            open_work: false,
            frames: false,
            subscription: None,
            looking: None,
        }
    }

    fn run(mut self) {
        loop {
            match self.turn() {
                Ok(Turn::GoOn) => {}
                Ok(Turn::Close) => break,
                Err(FrameError::Io(error)) => {
                    if error.kind() != io::ErrorKind::UnexpectedEof {
                        log::warn!("local socket: {}: {error}", self.who);
                    }
                    if error.kind() == io::ErrorKind::TimedOut {
                        let _ = self.reply(&Reply::Error { code: "too_slow".into(), text: error.to_string() }, &[]);
                    }
                    break;
                }
                Err(error) => {
                    log::warn!("local socket: {}: {error}", self.who);
                    let code = if matches!(error, FrameError::TooLong { .. }) { "too_long" } else { "bad_header" };
                    let _ = self.reply(&Reply::Error { code: code.into(), text: error.to_string() }, &[]);
                    break;
                }
            }
        }
        if self.open_work {
            self.shared.services.intake.lost(self.source);
        }
        if let (true, Some(sink)) = (self.frames, &self.shared.services.frames) {
            sink.finished(self.source);
        }
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some((subscription, thread)) = self.subscription.take() {
            subscription.end();
            let _ = thread.join();
        }
        if let Some((over, thread)) = self.looking.take() {
            over.store(true, Ordering::Relaxed);
            let _ = thread.join();
        }
    }

    /// Reads one request and answers it.
    fn turn(&mut self) -> Result<Turn, FrameError> {
        let (stream, shared) = (Arc::clone(&self.stream), Arc::clone(&self.shared));
        let mut from = Patient { stream: &stream, shared: &shared, deadline: None, silent_since: Instant::now() };
        let mut prefix = [0; 8];
        from.read_exact(&mut prefix[..1])?;
        from.deadline = Some(Instant::now() + shared.config.stall);
        from.read_exact(&mut prefix[1..])?;
        let body_bytes_max = shared.config.instance_bytes_max.max(FRAME_BYTES_MAX);
        let (header, body) = lengths(prefix, body_bytes_max)?;
        let request: Request = serde_json::from_slice(&read_bytes(&mut from, header)?)?;
        let live = matches!(request, Request::Frame(_)) && body <= FRAME_BYTES_MAX;
        let budget = if live { &shared.live } else { &shared.receiving };
        let room = budget.reserve(body as u64, || shared.stopping())?;
        let patience = match live {
            true => shared.config.live_patience,
            false => shared.config.stall + Duration::from_secs(body as u64 / BYTES_PER_SECOND_MIN),
        };
        from.silent_since = Instant::now();
        from.deadline = Some(from.silent_since + patience);
        let body = Body { bytes: read_bytes(&mut from, body)?, _room: room };
        Ok(self.answer(request, body)?)
    }

    fn answer(&mut self, request: Request, body: Body<'_>) -> io::Result<Turn> {
        let reply = match request {
            Request::Hello { protocol, .. } if protocol != PROTOCOL => {
                let text = format!("this service speaks protocol {PROTOCOL}, not {protocol}");
                self.reply(&Reply::Error { code: "protocol".into(), text }, &[])?;
                return Ok(Turn::Close);
            }
            Request::Hello { client, .. } => {
                let client: String = client.chars().filter(|c| !c.is_control()).take(80).collect();
                log::info!("local socket: {} is {client:?}", self.who);
                self.greeted = true;
                Reply::Hello(self.hello())
            }
            _ if !self.greeted => {
                let text = "the first frame of a connection is a hello".into();
                self.reply(&Reply::Error { code: "hello_first".into(), text }, &[])?;
                return Ok(Turn::Close);
            }
            Request::Instance { sop_instance_uid } => {
                let received = Received { source: self.source, sop_instance: sop_instance_uid.as_ref(), file: &body.bytes };
                self.open_work = true;
                match self.shared.services.intake.store(received) {
                    Ok(stored) => Reply::Stored { new: stored == Stored::New },
                    Err(error) => refuse(&error),
                }
            }
            Request::Frame(header) => match &self.shared.services.frames {
                None => refused("no_frames", "this service takes no raw frames", false),
                Some(_) if header.body_bytes() != Some(body.bytes.len()) => {
                    refused("malformed", "size, spacing and number of bytes of the frame do not go together", false)
                }
                Some(sink) => {
                    self.frames = true;
                    match sink.frame(self.source, RawFrame { header, pixels: &body.bytes }) {
                        Ok(()) => Reply::Taken,
                        Err(error) => refuse(&error),
                    }
                }
            },
            Request::Released => {
                if let (true, Some(sink)) = (std::mem::take(&mut self.frames), &self.shared.services.frames) {
                    sink.finished(self.source);
                }
                if std::mem::take(&mut self.open_work) {
                    self.shared.services.intake.released(self.source);
                }
                // What comes later on this connection is another delivery.
                self.source = SourceId::fresh();
                Reply::Done
            }
            Request::Look => return self.look().map(|()| Turn::GoOn),
            Request::Subscribe { receiver, from } => return self.subscribe(receiver, from).map(|()| Turn::GoOn),
            Request::Ack { sequence } => self.acknowledge(sequence),
            Request::Forget { receiver } => match self.shared.services.journal.forget(&receiver) {
                Ok(()) => Reply::Done,
                Err(error) => refuse_journal(&error),
            },
            Request::Status => {
                let status = serde_json::to_vec(&(self.shared.services.status)())?;
                return self.reply(&Reply::Status, &status).map(|()| Turn::GoOn);
            }
        };
        // Whoever does not read his answer holds no room that others wait for.
        drop(body);
        self.reply(&reply, &[]).map(|()| Turn::GoOn)
    }

    fn hello(&self) -> Hello {
        let services = &self.shared.services;
        let mut capabilities = vec!["instances".to_owned(), "reports".to_owned(), "status".to_owned()];
        capabilities.extend(services.frames.is_some().then(|| "frames".to_owned()));
        Hello {
            protocol: PROTOCOL,
            device: services.device_name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            capabilities,
            instance_bytes_max: self.shared.config.instance_bytes_max,
            journal: services.journal.id(),
            newest: services.journal.newest(),
        }
    }

    fn subscribe(&mut self, receiver: Option<String>, from: Option<u64>) -> io::Result<()> {
        if self.subscription.is_some() {
            return self.reply(&refused("subscribed", "this connection has a subscription already", false), &[]);
        }
        let journal = Arc::clone(&self.shared.services.journal);
        let begin = match &receiver {
            None => Ok(0),
            Some(name) => journal.register(name),
        };
        let after = match begin {
            Ok(begin) => from.map_or(begin, |from| from.saturating_sub(1)),
            Err(error) => return self.reply(&refuse_journal(&error), &[]),
        };
        let subscription = Arc::new(Subscription {
            receiver,
            under_way: Mutex::default(),
            acknowledged: Condvar::new(),
            over: AtomicBool::new(false),
        });
        self.reply(&Reply::Subscribed { after }, &[])?;
        let feeding = Arc::clone(&subscription);
        let (stream, writing, shared) = (Arc::clone(&self.stream), Arc::clone(&self.writing), Arc::clone(&self.shared));
        let who = self.who.clone();
        let thread = std::thread::Builder::new().name("scanside-reports".into()).spawn(move || {
            let result = feeding.feed(&shared, after, |sequence, json| {
                let _writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
                write_frame(&mut &*stream, &Reply::Report { sequence }, json)
            });
            if let Err(error) = result {
                log::warn!("local socket: {who}: {error}");
                // The connection's own thread notices, and closes it in good order.
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        })?;
        self.subscription = Some((subscription, thread));
        Ok(())
    }

    /// Sends looks at live streams on a thread of their own, until the connection ends.
    fn look(&mut self) -> io::Result<()> {
        let Some(sink) = self.shared.services.frames.clone().filter(|_| self.looking.is_none()) else {
            return self.reply(&refused("no_frames", "there are no looks at live streams here, or they are being sent already", false), &[]);
        };
        self.reply(&Reply::Done, &[])?;
        let over = Arc::new(AtomicBool::new(false));
        let (ended, shared) = (Arc::clone(&over), Arc::clone(&self.shared));
        let (stream, writing, who) = (Arc::clone(&self.stream), Arc::clone(&self.writing), self.who.clone());
        let thread = std::thread::Builder::new().name("scanside-looks".into()).spawn(move || {
            let mut after = 0;
            while !ended.load(Ordering::Relaxed) && !shared.stopping() {
                let Some((number, json)) = sink.look(after, LOOK) else { continue };
                after = number;
                let written = {
                    let _writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
                    write_frame(&mut &*stream, &Reply::Look { number }, &json)
                };
                if let Err(error) = written {
                    log::warn!("local socket: {who}: {error}");
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    return;
                }
            }
        })?;
        self.looking = Some((over, thread));
        Ok(())
    }

    fn acknowledge(&self, sequence: u64) -> Reply {
        let Some((subscription, _)) = &self.subscription else {
            return refused("not_subscribed", "subscribe before acknowledging", false);
        };
        let Some(receiver) = &subscription.receiver else {
            return refused("no_name", "a subscription without a receiver's name acknowledges nothing", false);
        };
        match self.shared.services.journal.acknowledge(receiver, sequence) {
            Ok(()) => {
                let mut under_way = subscription.under_way.lock().unwrap_or_else(PoisonError::into_inner);
                under_way.retain(|sent| *sent > sequence);
                subscription.acknowledged.notify_all();
                Reply::Acknowledged { sequence }
            }
            Err(error) => refuse_journal(&error),
        }
    }

    fn reply(&self, reply: &Reply, body: &[u8]) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        write_frame(&mut &*self.stream, reply, body)
    }
}

impl Subscription {
    /// Sends reports as they come. The queue is the journal on disk, so a slow subscriber costs nobody anything.
    fn feed(
        &self,
        shared: &Shared,
        mut after: u64,
        mut send: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let journal = &shared.services.journal;
        let over = || self.over.load(Ordering::Relaxed) || shared.stopping();
        while !over() {
            if self.receiver.is_some() {
                let under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
                if under_way.len() >= UNACKNOWLEDGED_MAX {
                    drop(self.acknowledged.wait_timeout(under_way, LOOK));
                    continue;
                }
            }
            if !journal.wait_after(after, LOOK) {
                continue;
            }
            if let Some(entry) = journal.next_after(after)? {
                after = entry.sequence;
                if self.receiver.is_some() {
                    self.under_way.lock().unwrap_or_else(PoisonError::into_inner).push_back(after);
                }
                send(entry.sequence, &entry.json)?;
            }
        }
        Ok(())
    }

    fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
        self.acknowledged.notify_all();
    }
}

fn refused(code: &str, text: &str, retry: bool) -> Reply {
    Reply::Refused { code: code.into(), text: text.into(), retry }
}

fn refuse(error: &IntakeError) -> Reply {
    match error {
        IntakeError::Rejected(rejection) => {
            let reason = crate::report::Reason::from(rejection);
            refused(&reason.code, &reason.text, false)
        }
        IntakeError::OutOfResources(_) => refused("out_of_resources", &error.to_string(), true),
        IntakeError::Io(_) => refused("disk", &error.to_string(), true),
    }
}

fn refuse_journal(error: &JournalError) -> Reply {
    let (code, retry) = match error {
        JournalError::BadReceiver(_) => ("bad_receiver", false),
        JournalError::TooManyReceivers(_) => ("too_many_receivers", false),
        JournalError::NotYetWritten { .. } => ("not_yet_written", false),
        _ => ("journal", true),
    };
    refused(code, &error.to_string(), retry)
}

fn wait_for(listener: &UnixListener) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = Timespec { tv_sec: 0, tv_nsec: LOOK.as_nanos() as i64 };
    if poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout)).is_err() {
        std::thread::sleep(LOOK / 20);
    }
}

fn closing() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the service stops")
}
