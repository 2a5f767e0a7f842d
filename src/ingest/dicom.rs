//! The first door: a DIMSE service class provider for C-ECHO and C-STORE (PS3.4 A, B; PS3.7 9.1).
//!
//! One thread of a fixed, named set serves an association from its request to its end; the lobby keeps the connections
//! that are none. A C-STORE is answered only when [`Intake::store`] has returned, so success means safe on disk.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::lobby::{Greeting, Lobby};
use super::{Intake, IntakeError, Received, SourceId};
use crate::dicom::association::{Association, AssociationError, Event, Limits};
use crate::dicom::dimse::{CommandSet, Status, field};
use crate::dicom::negotiation::{AbortReason, AeTitle, Context, Policy, STORAGE_CLASSES, busy_pdu, negotiate};
use crate::dicom::{Header, Instance, file};
use crate::pool::Fault;
use crate::study::Rejection;

/// What the door obeys.
#[derive(Debug, Clone)]
pub struct DicomConfig {
    /// Address and port; port 0 takes a free one, told by [`DicomServer::address`].
    pub listen: SocketAddr,
    /// The title we must be called by; none: any.
    pub called: Option<AeTitle>,
    /// The titles that may call; empty: any.
    pub callers: Vec<AeTitle>,
    /// Associations at once; one more is rejected for now (PS3.8 9.3.4, local limit exceeded).
    pub associations_max: usize,
    /// Largest PDU that is read, as negotiated.
    pub pdu_bytes_max: u32,
    /// Largest instance; a larger one is refused without being kept.
    pub instance_bytes_max: usize,
    /// Bytes of all instances that are coming in at one moment. Without it, every association could fill memory with an
    /// instance of the largest size at once.
    pub receiving_bytes_max: u64,
    /// Time for the association request, and for the peer to close (PS3.8 9.1.5).
    pub artim: Duration,
    /// Longest silence inside an association.
    pub idle: Duration,
    /// Longest time for one message, first fragment to last.
    pub message: Duration,
}

impl DicomConfig {
    /// The defaults, on `listen`.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            called: None,
            callers: Vec::new(),
            associations_max: 8,
            pdu_bytes_max: 131_072,
            instance_bytes_max: 64 << 20,
            receiving_bytes_max: 96 << 20,
            artim: Duration::from_secs(30),
            idle: Duration::from_secs(60),
            message: Duration::from_secs(300),
        }
    }
}

/// Why the door does not open.
#[derive(Debug, thiserror::Error)]
pub enum DicomServerError {
    /// The address cannot be listened on.
    #[error("cannot listen for DICOM on {address}: {source}")]
    Bind {
        /// Which address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The system has no thread or descriptor for us.
    #[error("cannot start the DICOM server: {0}")]
    Start(io::Error),
}

/// The open door; it closes with [`DicomServer::shutdown`] or when dropped.
pub struct DicomServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    config: DicomConfig,
    policy: Policy,
    intake: Arc<dyn Intake>,
    stopping: AtomicBool,
    /// Associations that are served or handed over.
    serving: AtomicUsize,
    /// Bytes claimed of `receiving_bytes_max`.
    receiving: AtomicU64,
    /// The connections of running associations, to cut them when the service goes down.
    live: Mutex<HashMap<SourceId, TcpStream>>,
    wake: UnixStream,
    departures: Sender<TcpStream>,
}

/// A connection with its whole association request.
type Request = (TcpStream, Vec<u8>);

impl DicomServer {
    /// Listens, and stores into `intake` from then on.
    ///
    /// # Errors
    /// [`DicomServerError`]
    pub fn start(config: DicomConfig, intake: Arc<dyn Intake>) -> Result<Self, DicomServerError> {
        let bind = |source| DicomServerError::Bind { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).map_err(bind)?;
        listener.set_nonblocking(true).map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        let (wake, woken) = UnixStream::pair().map_err(DicomServerError::Start)?;
        for end in [&wake, &woken] {
            end.set_nonblocking(true).map_err(DicomServerError::Start)?;
        }
        let associations = config.associations_max.max(1);
        let (departures, departed) = bounded(2 * associations);
        let (requests, queue) = bounded::<Request>(associations);
        let policy = Policy {
            called: config.called.clone(),
            callers: config.callers.clone(),
            pdu_bytes_max: config.pdu_bytes_max,
        };
        let lobby = Lobby { listener, wake: woken, departures: departed, artim: config.artim };
        let shared = Arc::new(Shared {
            config,
            policy,
            intake,
            stopping: AtomicBool::new(false),
            serving: AtomicUsize::new(0),
            receiving: AtomicU64::new(0),
            live: Mutex::default(),
            wake,
            departures,
        });
        let mut server = Self { address, shared, threads: Vec::with_capacity(associations + 1) };
        for n in 1..=associations {
            let (shared, queue) = (Arc::clone(&server.shared), queue.clone());
            server.spawn(format!("scanside-dicom-{n}"), move || shared.work(&queue))?;
        }
        let shared = Arc::clone(&server.shared);
        server.spawn("scanside-lobby".into(), move || {
            lobby.run(|| shared.is_stopping(), |stream, request| shared.greet(stream, request, &requests));
        })?;
        Ok(server)
    }

    /// Where the door is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether every thread of the door is there.
    pub fn is_alive(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Cuts running associations with an A-ABORT and waits for the threads. An instance that is being stored is stored
    /// and answered first.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn spawn(&mut self, name: String, work: impl FnOnce() + Send + 'static) -> Result<(), DicomServerError> {
        let thread = std::thread::Builder::new().name(name).spawn(work).map_err(DicomServerError::Start)?;
        self.threads.push(thread);
        Ok(())
    }

    fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.wake_lobby();
        for stream in self.shared.live.lock().unwrap_or_else(|e| e.into_inner()).values() {
            let _ = stream.shutdown(Shutdown::Read);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for DicomServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One of the places for associations; free again when dropped.
struct Place<'a>(&'a Shared);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.serving.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn wake_lobby(&self) {
        // A full pipe has woken it already.
        let _ = (&self.wake).write(&[1]);
    }

    /// Leaves the closing of a connection to the peer, and to the lobby's timer.
    fn see_out(&self, stream: TcpStream) {
        let _ = self.departures.try_send(stream);
        self.wake_lobby();
    }

    fn greet(&self, stream: TcpStream, request: Vec<u8>, requests: &Sender<Request>) -> Greeting {
        if self.serving.load(Ordering::SeqCst) >= self.config.associations_max.max(1) {
            log::warn!("all {} associations are in use: one more was rejected for now", self.config.associations_max);
            return Greeting::Refused(stream, busy_pdu());
        }
        self.serving.fetch_add(1, Ordering::SeqCst);
        // Never full: it has a place for every association that `serving` allows.
        let _ = requests.send((stream, request));
        Greeting::TakenOver
    }

    fn work(&self, queue: &Receiver<Request>) {
        for (stream, request) in queue {
            let place = Place(self);
            let source = SourceId::fresh();
            if let Ok(clone) = stream.try_clone() {
                self.live.lock().unwrap_or_else(|e| e.into_inner()).insert(source, clone);
            }
            if self.is_stopping() {
                let _ = stream.shutdown(Shutdown::Read);
            }
            let mut visit = Visit { shared: self, source, place: Some(place), stored: false, refused: false };
            let outcome = catch_unwind(AssertUnwindSafe(|| visit.serve(stream, &request)));
            if let Err(panic) = outcome {
                log::error!("source {}: {}", source.0, Fault::from_panic(panic));
                visit.lost();
            }
            self.live.lock().unwrap_or_else(|e| e.into_inner()).remove(&source);
        }
    }
}

/// One association from its request to its end.
struct Visit<'a> {
    shared: &'a Shared,
    source: SourceId,
    place: Option<Place<'a>>,
    /// Whether any C-STORE came: only then the intake knows of this source.
    stored: bool,
    /// Whether an image of it was refused for want of room or because it cannot be read: what came is not all there is.
    refused: bool,
}

impl Visit<'_> {
    fn serve(&mut self, mut stream: TcpStream, request: &[u8]) {
        let config = &self.shared.config;
        let agreed = match negotiate(request, &self.shared.policy) {
            Ok(agreed) => agreed,
            Err(refusal) => {
                log::warn!("association refused: {}", refusal.why);
                self.place = None;
                let _ = stream.set_nonblocking(false).and_then(|()| stream.set_write_timeout(Some(config.idle)));
                let _ = stream.write_all(&refusal.answer);
                return self.shared.see_out(stream);
            }
        };
        log::info!("source {}: {} associates, {} contexts", self.source.0, agreed.calling, agreed.contexts.len());
        let limits = Limits {
            pdu_bytes_max: config.pdu_bytes_max,
            idle: config.idle,
            message: config.message,
            // A data set above the limit is read to its end, so that it can be answered, but not without end.
            data_set_bytes_max: 4 * config.instance_bytes_max as u64,
        };
        let begun = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_write_timeout(Some(config.idle)))
            .and_then(|()| stream.write_all(&agreed.answer))
            .map_err(AssociationError::from)
            .and_then(|()| Association::accepted(stream, agreed.contexts, agreed.peer_pdu_bytes_max, limits));
        let mut association = match begun {
            Ok(association) => association,
            Err(error) => return log::warn!("source {}: {error}", self.source.0),
        };
        let ending = loop {
            match association.next_event() {
                Ok(Event::Command(context, command)) => {
                    if let Err(error) = self.answer(&mut association, &context, &command) {
                        break Err(error);
                    }
                }
                Ok(Event::Release) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        match ending {
            Ok(()) => {
                if self.refused {
                    self.lost();
                } else if std::mem::take(&mut self.stored) {
                    self.shared.intake.released(self.source);
                }
                // The place is free before the peer hears that it is: the next association may follow at once.
                self.place = None;
                self.shared.see_out(association.confirm_release());
            }
            Err(error) => {
                self.lost();
                self.place = None;
                let stopping = self.shared.is_stopping();
                match error {
                    AssociationError::Violation { reason, .. } => self.shared.see_out(association.abort(reason)),
                    AssociationError::TimedOut(_) => self.shared.see_out(association.abort(AbortReason::Unspecified)),
                    AssociationError::Closed if stopping => drop(association.abort(AbortReason::Unspecified)),
                    _ => {}
                }
                log::warn!("source {}: {error}", self.source.0);
            }
        }
    }

    fn lost(&mut self) {
        if std::mem::take(&mut self.stored) {
            self.shared.intake.lost(self.source);
        }
    }

    /// Serves one command: reads its data set, if any, and answers.
    fn answer(
        &mut self,
        association: &mut Association,
        context: &Context,
        command: &CommandSet,
    ) -> Result<(), AssociationError> {
        let has_data_set = command.has_data_set()?;
        let kind = command.command_field()?;
        if kind & field::RESPONSE != 0 {
            let why = format!("a response ({kind:#06x}) to a request that was never made");
            return Err(AssociationError::Violation { reason: AbortReason::UnexpectedPdu, why });
        }
        if kind != field::CANCEL {
            command.message_id()?;
        }
        let (status, comment) = match kind {
            field::STORE if has_data_set => {
                self.stored = true;
                self.store(association, context, command)?
            }
            _ => {
                if has_data_set {
                    association.receive_data_set(context.id, &mut |_| {})?;
                }
                match kind {
                    field::ECHO => (Status::SUCCESS, None),
                    field::STORE => (Status::CANNOT_UNDERSTAND, Some("a C-STORE without data set".into())),
                    field::CANCEL => return Ok(()),
                    _ => (Status::UNRECOGNIZED_OPERATION, Some(format!("command {kind:#06x} is not offered"))),
                }
            }
        };
        if status != Status::SUCCESS {
            let comment = comment.as_deref().unwrap_or("");
            log::warn!("source {}: answered {:#06x}: {comment}", self.source.0, status.0);
        }
        association.send_command(context.id, &command.response(status, comment.as_deref()))
    }

    /// Receives an instance and puts it into the intake.
    fn store(
        &mut self,
        association: &mut Association,
        context: &Context,
        command: &CommandSet,
    ) -> Result<(Status, Option<String>), AssociationError> {
        let announced = match (command.sop_class(), command.sop_instance()) {
            (Ok(class), Ok(instance)) => {
                let offered = STORAGE_CLASSES.iter().any(|(uid, _)| *uid == class.as_str());
                if offered && class == context.sop_class {
                    Ok((class, instance))
                } else {
                    Err((Status::SOP_CLASS_NOT_SUPPORTED, format!("the context is for {}", context.sop_class)))
                }
            }
            (Err(bad), _) | (_, Err(bad)) => Err((Status::INVALID_INSTANCE, bad.to_string())),
        };
        let (class, instance) = match announced {
            Ok(announced) => announced,
            Err((status, comment)) => {
                association.receive_data_set(context.id, &mut |_| {})?;
                return Ok((status, Some(comment)));
            }
        };
        let mut collector = Collector::new(self.shared, file::head(&class, &instance, &context.transfer_syntax));
        association.receive_data_set(context.id, &mut |bytes| collector.take(bytes))?;
        let file = match &collector.refused {
            None => &collector.file,
            Some((status, comment)) => {
                self.refused = true;
                return Ok((*status, Some(comment.clone())));
            }
        };
        match header(file, self.shared.config.instance_bytes_max) {
            Ok(found) if found.sop_class != class => {
                return Ok((Status::DOES_NOT_MATCH, Some(format!("the data set is of class {}", found.sop_class))));
            }
            Ok(found) if found.sop_instance != instance => {
                return Ok((Status::DOES_NOT_MATCH, Some(format!("the data set is {}", found.sop_instance))));
            }
            Ok(_) => {}
            Err(rejection) => {
                self.refused = true;
                return Ok((Status::CANNOT_UNDERSTAND, Some(rejection.text)));
            }
        }
        let received = Received { source: self.source, sop_instance: Some(&instance), file };
        Ok(match self.shared.intake.store(received) {
            Ok(_) => (Status::SUCCESS, None),
            Err(IntakeError::Rejected(rejection)) => (Status::CANNOT_UNDERSTAND, Some(rejection.text)),
            Err(error @ (IntakeError::OutOfResources(_) | IntakeError::Io(_))) => {
                self.refused = true;
                (Status::OUT_OF_RESOURCES, Some(error.to_string()))
            }
        })
    }
}

/// What the instance itself says.
fn header(file: &[u8], instance_bytes_max: usize) -> Result<Header, Rejection> {
    file::check_inflated_size(file, instance_bytes_max)?;
    Ok(Instance::parse(file)?.header)
}

/// An instance as it comes in, no larger than allowed, and its share of the memory that all associations have for this.
struct Collector<'a> {
    shared: &'a Shared,
    file: Vec<u8>,
    claimed: u64,
    refused: Option<(Status, String)>,
}

impl<'a> Collector<'a> {
    fn new(shared: &'a Shared, head: Vec<u8>) -> Self {
        Self { shared, file: head, claimed: 0, refused: None }
    }

    fn take(&mut self, bytes: &[u8]) {
        if self.refused.is_some() {
            return;
        }
        let needed = self.file.len() + bytes.len();
        if needed > self.shared.config.instance_bytes_max {
            let text = format!("instances of more than {} bytes are not taken", self.shared.config.instance_bytes_max);
            return self.refuse(Status::CANNOT_UNDERSTAND, text);
        }
        if needed > self.file.capacity() {
            // Grown here, not by the vector, so that what is claimed is what is allocated.
            let most = self.shared.config.instance_bytes_max;
            let capacity = (2 * self.file.capacity()).max(1 << 20).min(most).max(needed);
            let more = (capacity as u64).saturating_sub(self.claimed);
            let before = self.shared.receiving.fetch_add(more, Ordering::SeqCst);
            self.claimed += more;
            if before + more > self.shared.config.receiving_bytes_max {
                return self.refuse(Status::OUT_OF_RESOURCES, "too much is coming in at once, try again".into());
            }
            self.file.reserve_exact(capacity - self.file.len());
        }
        self.file.extend_from_slice(bytes);
    }

    fn refuse(&mut self, status: Status, text: String) {
        self.refused = Some((status, text));
        self.file = Vec::new();
        self.give_back();
    }

    fn give_back(&mut self) {
        self.shared.receiving.fetch_sub(std::mem::take(&mut self.claimed), Ordering::SeqCst);
    }
}

impl Drop for Collector<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}
