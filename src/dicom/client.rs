//! A service class user: C-ECHO, and C-STORE of files to another application entity (PS3.4 A, B).

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Unreleased;
use super::association::{Association, AssociationError, Event, Limits};
use super::dimse::{CommandSet, Status, field};
use super::file::{FileMeta, HEAD_BYTES_MAX, files_below};
use super::negotiation::{AbortReason, AeTitle, Context, VERIFICATION};
use crate::study::{Rejection, Uid};

/// Presentation contexts of one association: ids are odd and fit a byte (PS3.8 9.3.2.2).
const CONTEXTS_MAX: usize = 128;

/// Releases that may go wrong before the peer is left with what it has: some just hang up.
const RELEASES_MAX: usize = 3;

/// Longest pause between two attempts, in first pauses: a box that starts anew is found soon.
const PAUSES_MAX: u32 = 16;

/// Basic Directory (PS3.4 I): a DICOMDIR lies among the images of every medium and is none.
const MEDIA_DIRECTORY: &str = "1.2.840.10008.1.3.10";

/// Whom to call, and how patiently.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where it listens.
    pub address: SocketAddr,
    /// Who we say we are.
    pub calling: AeTitle,
    /// Whom we ask for.
    pub called: AeTitle,
    /// Associations that may fail one after the other without an instance sent between them.
    pub attempts: usize,
    /// Pause before the second attempt; it doubles with each further one.
    pub pause: Duration,
    /// Longest wait for an answer.
    pub patience: Duration,
}

impl Peer {
    /// A peer at `address`, called patiently: 5 attempts from half a second on.
    pub fn new(address: SocketAddr, calling: AeTitle, called: AeTitle) -> Self {
        let (attempts, pause, patience) = (5, Duration::from_millis(500), Duration::from_secs(60));
        Self { address, calling, called, attempts, pause, patience }
    }

    fn limits(&self) -> Limits {
        Limits { pdu_bytes_max: 131_072, idle: self.patience, message: self.patience, data_set_bytes_max: 1 << 20 }
    }
}

/// Why an instance was not stored at the peer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// The file is no DICOM file.
    #[error(transparent)]
    NotDicom(#[from] Rejection),
    /// The peer does not take this kind of instance.
    #[error("the peer takes no SOP class {sop_class} in transfer syntax {transfer_syntax}")]
    NotTaken {
        /// What it is.
        sop_class: Uid,
        /// How it is coded.
        transfer_syntax: Uid,
    },
    /// The peer answered with a failure (PS3.4 B.2.3).
    #[error("the peer answered {:#06x}{}{}", status.0, if comment.is_empty() { "" } else { ": " }, comment)]
    Status {
        /// Status (0000,0900).
        status: Status,
        /// Error Comment (0000,0902).
        comment: String,
    },
    /// No association, or it broke.
    #[error(transparent)]
    Association(#[from] AssociationError),
    /// Not tried any more, for what stopped the file before it.
    #[error("not sent: {0}")]
    GivenUp(String),
}

/// DICOM files with their meta information, and what is not to be sent.
pub type Found = (Vec<(PathBuf, FileMeta)>, Vec<NotSent>);

/// Asks the peer whether it is there: C-ECHO. Gives the time from request to answer.
///
/// # Errors
/// [`SendError`]
pub fn echo(peer: &Peer) -> Result<Duration, SendError> {
    let verification = Uid::parse(VERIFICATION).expect("the standard's own UIDs are UIDs");
    let implicit_little = Uid::parse("1.2.840.10008.1.2").expect("the standard's own UIDs are UIDs");
    let context = Context { id: 1, sop_class: verification.clone(), transfer_syntax: implicit_little.clone() };
    let mut association = Association::request(peer.address, &peer.calling, &peer.called, &[context], peer.limits())?;
    if association.contexts().is_empty() {
        let _ = association.release();
        return Err(SendError::NotTaken { sop_class: verification, transfer_syntax: implicit_little });
    }
    let begun = Instant::now();
    association.send_command(1, &CommandSet::echo_request(1, VERIFICATION))?;
    answered(&mut association, 1, field::ECHO)?;
    let took = begun.elapsed();
    association.release()?;
    Ok(took)
}

/// An association for C-STORE.
pub struct StoreAssociation {
    association: Association,
    messages: u16,
}

impl StoreAssociation {
    /// Associates for instances of these pairs of SOP class and transfer syntax, at most 128.
    ///
    /// # Errors
    /// [`AssociationError`]
    pub fn open(peer: &Peer, pairs: &[(Uid, Uid)]) -> Result<Self, AssociationError> {
        let contexts: Vec<Context> = pairs
            .iter()
            .take(CONTEXTS_MAX)
            .enumerate()
            .map(|(n, (sop_class, transfer_syntax))| Context {
                id: (2 * n + 1) as u8,
                sop_class: sop_class.clone(),
                transfer_syntax: transfer_syntax.clone(),
            })
            .collect();
        let association = Association::request(peer.address, &peer.calling, &peer.called, &contexts, peer.limits())?;
        Ok(Self { association, messages: 0 })
    }

    /// Sends one DICOM file (PS3.10), its data set as it is, and waits until the peer has answered for it.
    ///
    /// # Errors
    /// [`SendError`]; after [`SendError::Association`] this association is over.
    pub fn store(&mut self, file: &[u8]) -> Result<(), SendError> {
        let meta = FileMeta::parse(file)?;
        let context = self.association.contexts().iter().find(|context| fits(context, &meta)).map(|context| context.id);
        let Some(context) = context else {
            return Err(SendError::NotTaken { sop_class: meta.sop_class, transfer_syntax: meta.transfer_syntax });
        };
        self.messages = self.messages.wrapping_add(1);
        let command = CommandSet::store_request(self.messages, &meta.sop_class, &meta.sop_instance);
        self.association.send_command(context, &command)?;
        self.association.send_data_set(context, &file[meta.data_set_at..])?;
        answered(&mut self.association, self.messages, field::STORE)
    }

    /// Ends the association in good order: nothing more comes.
    ///
    /// # Errors
    /// [`AssociationError`]; what was stored stays stored.
    pub fn release(self) -> Result<(), AssociationError> {
        self.association.release()
    }

    /// Breaks the association off.
    pub fn abort(self) {
        drop(self.association.abort(AbortReason::Unspecified));
    }
}

fn fits(context: &Context, meta: &FileMeta) -> bool {
    context.sop_class == meta.sop_class && context.transfer_syntax == meta.transfer_syntax
}

/// Waits for the response to a request.
fn answered(association: &mut Association, message_id: u16, request: u16) -> Result<(), SendError> {
    let violation = |why: &str| AssociationError::Violation { reason: AbortReason::UnexpectedPdu, why: why.into() };
    let Event::Command(_, response) = association.next_event()? else {
        return Err(violation("the peer wants to end the association while it owes an answer").into());
    };
    let command_field = response.command_field().map_err(AssociationError::from)?;
    if command_field != request | field::RESPONSE || response.responded_to() != Ok(message_id) {
        return Err(violation("an answer to something else").into());
    }
    let status = response.status().map_err(AssociationError::from)?;
    if status.is_stored() {
        return Ok(());
    }
    Err(SendError::Status { status, comment: response.error_comment().unwrap_or_default().to_owned() })
}

/// What happened to one file.
#[derive(Debug)]
pub enum Sent<'a> {
    /// The peer has it; so many bytes.
    Stored(&'a Path, u64),
    /// It has not.
    Failed(&'a Path, &'a SendError),
    /// The association failed; it is tried again after the pause.
    Retry(&'a SendError, Duration),
}

/// A file that the peer does not have.
#[derive(Debug)]
pub struct NotSent {
    /// Which file.
    pub path: PathBuf,
    /// Why.
    pub why: SendError,
}

/// DICOM files below `top` (or `top` itself) in the order of their paths, and those that are none with the reason.
/// A DICOMDIR is left out.
///
/// # Errors
/// A folder that cannot be read.
pub fn find_files(top: &Path) -> Result<Found, std::io::Error> {
    let (mut files, mut others) = (Vec::new(), Vec::new());
    for path in files_below(top)? {
        match read_head(&path) {
            Ok(meta) if meta.sop_class.as_str() == MEDIA_DIRECTORY => {}
            Ok(meta) => files.push((path, meta)),
            Err(why) => others.push(NotSent { path, why }),
        }
    }
    Ok((files, others))
}

fn read_head(path: &Path) -> Result<FileMeta, SendError> {
    let mut start = Vec::new();
    File::open(path)?.take(HEAD_BYTES_MAX as u64).read_to_end(&mut start)?;
    Ok(FileMeta::parse(&start)?)
}

/// Sends files, with as many associations as it takes, and gives back those that the peer does not have.
///
/// An association that breaks is made anew and goes on with the file it broke at; an instance that was stored just
/// before it broke is sent again, which a peer takes as the duplicate it is. So is one file of each series that came by
/// broken associations only: until a release is answered the peer cannot know that nothing more comes.
pub fn send(peer: &Peer, files: &[(PathBuf, FileMeta)], tell: &mut dyn FnMut(Sent<'_>)) -> Vec<NotSent> {
    let mut failed = Vec::new();
    let mut rest = files;
    while !rest.is_empty() {
        let (batch, pairs) = batch(rest);
        send_batch(peer, &rest[..batch], &pairs, tell, &mut failed);
        rest = &rest[batch..];
    }
    failed
}

/// As many of the first files as one association's contexts serve, and those contexts.
fn batch(files: &[(PathBuf, FileMeta)]) -> (usize, Vec<(Uid, Uid)>) {
    let mut pairs: Vec<(Uid, Uid)> = Vec::new();
    for (n, (_, meta)) in files.iter().enumerate() {
        let pair = (meta.sop_class.clone(), meta.transfer_syntax.clone());
        if !pairs.contains(&pair) {
            if pairs.len() == CONTEXTS_MAX {
                return (n, pairs);
            }
            pairs.push(pair);
        }
    }
    (files.len(), pairs)
}

fn send_batch(
    peer: &Peer,
    files: &[(PathBuf, FileMeta)],
    pairs: &[(Uid, Uid)],
    tell: &mut dyn FnMut(Sent<'_>),
    failed: &mut Vec<NotSent>,
) {
    let mut association = None;
    let mut unreleased = Unreleased::default();
    let (mut at, mut attempt, mut releases) = (0, 0, 0);
    loop {
        let fresh = files.get(at).map(|(path, _)| path.as_path());
        let again = if fresh.is_none() { unreleased.again() } else { None };
        let outcome = match fresh.or(again) {
            Some(path) => store(peer, pairs, &mut association, path).map(|file| {
                unreleased.stored(&file, path);
                file.len() as u64
            }),
            None => {
                releases += 1;
                association.take().map_or(Ok(0), |open| Ok(open.release().map(|()| 0)?))
            }
        };
        match (outcome, fresh, again) {
            (Ok(bytes), Some(path), _) => {
                (at, attempt) = (at + 1, 0);
                tell(Sent::Stored(path, bytes));
            }
            (Ok(_), None, Some(_)) => {}
            (Err(why @ SendError::Association(_)), ..) => {
                if let Some(broken) = association.take() {
                    broken.abort();
                }
                unreleased.broken();
                attempt += 1;
                let hopeless = matches!(why, SendError::Association(AssociationError::Rejected { transient: false, .. }));
                if hopeless || attempt >= peer.attempts.max(1) || releases >= RELEASES_MAX {
                    // A release that goes wrong takes nothing back.
                    return give_up(&files[at..], why, tell, failed);
                }
                let pause = peer.pause * 2u32.saturating_pow(attempt as u32 - 1).min(PAUSES_MAX);
                tell(Sent::Retry(&why, pause));
                std::thread::sleep(pause);
            }
            (Err(why), Some(path), _) => {
                (at, attempt) = (at + 1, 0);
                tell(Sent::Failed(path, &why));
                failed.push(NotSent { path: path.into(), why });
            }
            (Err(_), None, Some(path)) => unreleased.unwanted(path),
            (_, None, None) => return,
        }
    }
}

/// Stores one file, through an association that is made where there is none, and gives what was in it.
fn store(
    peer: &Peer,
    pairs: &[(Uid, Uid)],
    association: &mut Option<StoreAssociation>,
    path: &Path,
) -> Result<Vec<u8>, SendError> {
    let open = match association.as_mut() {
        Some(open) => open,
        None => association.insert(StoreAssociation::open(peer, pairs)?),
    };
    let file = std::fs::read(path)?;
    open.store(&file)?;
    Ok(file)
}

/// None of these files can be sent, for one reason, told in full with the first.
fn give_up(
    files: &[(PathBuf, FileMeta)],
    why: SendError,
    tell: &mut dyn FnMut(Sent<'_>),
    failed: &mut Vec<NotSent>,
) {
    let text = why.to_string();
    let mut first = Some(why);
    for (path, _) in files {
        let why = first.take().unwrap_or_else(|| SendError::GivenUp(text.clone()));
        tell(Sent::Failed(path, &why));
        failed.push(NotSent { path: path.clone(), why });
    }
}
