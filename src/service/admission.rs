//! What stands between the doors and the spool: no image is taken whose report would find no room.

use std::sync::Arc;

use crate::ingest::{Intake, IntakeError, Received, SourceId, Stored};
use crate::report::journal::Journal;

/// The intake of all doors. A report is never dropped, so while receivers stay away and the journal fills up, it is the
/// senders who must wait: they keep their images and try again.
pub struct Admission {
    spool: Arc<dyn Intake>,
    journal: Arc<Journal>,
}

impl Admission {
    /// Hands to `spool` what `journal` will have room for.
    pub fn new(spool: Arc<dyn Intake>, journal: Arc<Journal>) -> Self {
        Self { spool, journal }
    }
}

impl Intake for Admission {
    fn store(&self, received: Received<'_>) -> Result<Stored, IntakeError> {
        if !self.journal.has_room() {
            let status = self.journal.status();
            let text = format!(
                "the journal of reports is full: {} reports ({} of {} bytes) wait to be acknowledged, or a write to it failed",
                status.waiting, status.bytes, status.bytes_max
            );
            return Err(IntakeError::OutOfResources(text));
        }
        self.spool.store(received)
    }

    fn released(&self, source: SourceId) {
        self.spool.released(source);
    }

    fn lost(&self, source: SourceId) {
        self.spool.lost(source);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use jiff::Timestamp;

    use super::*;
    use crate::report::journal::Limits;
    use crate::report::{Device, REPORT_BYTES_MAX, Report, Results, Subject};
    use crate::study::{Modality, Uid};

    #[derive(Default)]
    struct Diary(Mutex<Vec<String>>);

    impl Diary {
        fn note(&self, text: impl Into<String>) {
            self.0.lock().unwrap().push(text.into());
        }
    }

    impl Intake for Diary {
        fn store(&self, received: Received<'_>) -> Result<Stored, IntakeError> {
            self.note(String::from_utf8_lossy(received.file));
            Ok(Stored::New)
        }

        fn released(&self, _: SourceId) {
            self.note("released");
        }

        fn lost(&self, _: SourceId) {
            self.note("lost");
        }
    }

    fn report() -> Report {
        let uid = |text: &str| Uid::parse(text).unwrap();
        let subject = Subject {
            exam: "chest-ct".into(),
            study_uid: uid("1.2.3"),
            series_uid: uid("1.2.3.4"),
            modality: Modality::Ct,
            device: Device { name: "box".into(), version: "0".into(), uid: uid("2.25.1") },
            key: "series".into(),
        };
        Report::complete(subject, Results::default(), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn a_full_journal_turns_images_away_and_an_acknowledgement_lets_them_in_again() {
        let folder = tempfile::tempdir().unwrap();
        // Room for two of the longest records and 200 bytes: one report that waits is too much.
        let limits = Limits { bytes_max: 2 * (REPORT_BYTES_MAX as u64 + 4096) + 200, history_bytes: 0 };
        let journal = Arc::new(Journal::open(folder.path(), limits).unwrap().0);
        journal.register("serial").unwrap();
        let diary = Arc::new(Diary::default());
        let admission = Admission::new(diary.clone(), journal.clone());
        let source = SourceId(7);
        let store = |file: &[u8]| admission.store(Received { source, sop_instance: None, file });

        assert_eq!(store(b"first").unwrap(), Stored::New);
        let number = journal.append_once(report()).unwrap().sequence();
        let error = store(b"second").unwrap_err();
        assert!(matches!(error, IntakeError::OutOfResources(_)), "{error}");
        assert!(error.to_string().contains("the journal of reports is full: 1 reports"), "{error}");
        admission.released(source);
        admission.lost(source);
        journal.acknowledge("serial", number).unwrap();
        store(b"third").unwrap();
        assert_eq!(*diary.0.lock().unwrap(), ["first", "released", "lost", "third"]);
    }
}
