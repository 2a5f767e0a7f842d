//! The three doors (DICOM association, local socket, folder), and the one thing behind them: an [`Intake`].

use std::sync::atomic::{AtomicU64, Ordering};

use crate::study::{Rejection, Uid};

pub mod dicom;
pub mod inbox;
mod lobby;
pub mod socket;
pub mod spool;

/// One instance as a door received it.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// Which door and which sender: instances of one association (or one folder, one socket client) share it.
    pub source: SourceId,
    /// SOP Instance UID as announced by the sender; the parsed one must agree.
    pub sop_instance: Option<&'a Uid>,
    /// The instance as a DICOM file (PS3.10: preamble, file meta information, data set).
    pub file: &'a [u8],
}

/// A sender, for as long as it stays connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub u64);

impl SourceId {
    /// Stands for whoever sent what was found on disk at start.
    pub const RECOVERED: Self = Self(0);

    /// A source that no other door of this process has.
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What became of an instance that was handed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Safe on disk; it will be part of exactly one report.
    New,
    /// The same instance was stored before, to the byte: acknowledged again, kept once.
    Duplicate,
}

/// Why an instance was not taken; the sender is told.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// The data is wrong; sending it again will not help.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// No room now (disk, budget): DICOM status A700, out of resources.
    #[error("out of resources: {0}")]
    OutOfResources(String),
    /// The disk failed.
    #[error("cannot store the instance: {0}")]
    Io(#[from] std::io::Error),
}

/// Where doors put instances. Called from the doors' threads; blocks when the box is busy, which is the back-pressure.
pub trait Intake: Send + Sync {
    /// Returns only when the instance is safe on disk (or refused).
    ///
    /// # Errors
    /// [`IntakeError`]; nothing of the instance is kept then.
    fn store(&self, received: Received<'_>) -> Result<Stored, IntakeError>;

    /// The sender has gone in good order (association released, folder read to its end): nothing more comes from it.
    fn released(&self, source: SourceId);

    /// The sender has gone without a word (abort, cable).
    fn lost(&self, source: SourceId);
}
