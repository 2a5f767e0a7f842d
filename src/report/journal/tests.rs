use proptest::prelude::*;

use super::super::tests::complete;
use super::*;

/// A folder in memory where there is one: these tests sync thousands of times.
fn folder() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    let made = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
    made.unwrap()
}

fn open(folder: &Path) -> (Journal, Recovery) {
    Journal::open(folder, Limits::default()).unwrap()
}

fn numbers(journal: &Journal) -> Vec<u64> {
    let mut out = Vec::new();
    while let Some(entry) = journal.next_after(out.last().copied().unwrap_or(0)).unwrap() {
        let report = Report::from_json(&entry.json).unwrap();
        assert_eq!(report.sequence, entry.sequence);
        out.push(entry.sequence);
    }
    out
}

/// A journal of three reports and some acknowledgements: its bytes, and where each report's record ends.
fn three_reports(folder: &Path) -> (Vec<u8>, [u64; 3]) {
    let (journal, _) = open(folder);
    let mut ends = [0; 3];
    for series in 0..3 {
        assert_eq!(journal.append_once(complete(series)).unwrap(), Appended::New(u64::from(series) + 1));
        ends[series as usize] = journal.status().bytes;
        if series < 2 {
            journal.acknowledge("serial", u64::from(series) + 1).unwrap();
        }
    }
    drop(journal);
    (fs::read(folder.join("journal")).unwrap(), ends)
}

#[test]
fn reports_and_acknowledgements_are_there_after_a_restart() {
    let folder = folder();
    let id = {
        let (journal, recovery) = open(folder.path());
        assert_eq!(recovery, Recovery::default());
        for series in 1..=5 {
            journal.append_once(complete(series)).unwrap();
        }
        journal.acknowledge("serial", 3).unwrap();
        assert_eq!(journal.register("watch").unwrap(), 0);
        journal.id()
    };
    let (journal, recovery) = open(folder.path());
    assert_eq!(recovery, Recovery { reports: 5, ..Recovery::default() });
    assert_eq!(numbers(&journal), [1, 2, 3, 4, 5]);
    assert_eq!((journal.cursor("serial"), journal.cursor("watch"), journal.id()), (3, 0, id));
    assert_eq!(journal.append_once(complete(6)).unwrap(), Appended::New(6));
}

#[test]
fn a_series_is_reported_once_even_when_its_work_is_repeated_after_a_restart() {
    let folder = folder();
    let (journal, _) = open(folder.path());
    assert_eq!(journal.append_once(complete(1)).unwrap(), Appended::New(1));
    assert_eq!(journal.append_once(complete(1)).unwrap(), Appended::Already(1));
    drop(journal);
    let (journal, _) = open(folder.path());
    assert_eq!(journal.append_once(complete(1)).unwrap(), Appended::Already(1));
    assert_eq!(journal.sequence_of(&complete(1).report_uid), Some(1));
    assert_eq!(numbers(&journal), [1]);
}

#[test]
fn two_processes_cannot_share_a_journal() {
    let folder = folder();
    let (_journal, _) = open(folder.path());
    assert!(matches!(Journal::open(folder.path(), Limits::default()), Err(JournalError::InUse(_))));
}

#[test]
fn a_cut_at_any_byte_loses_nothing_that_was_whole_before_it() {
    let origin = folder();
    let (bytes, ends) = three_reports(origin.path());
    let folder = folder();
    for cut in 0..=bytes.len() {
        fs::write(folder.path().join("journal"), &bytes[..cut]).unwrap();
        let (journal, recovery) = open(folder.path());
        let whole: Vec<u64> = (1..=3).filter(|n| ends[*n as usize - 1] <= cut as u64).collect();
        assert_eq!(numbers(&journal), whole, "cut at {cut}");
        assert_eq!(recovery.damage, []);
        // The reports that were lost are made again; none takes a number that may have been seen, none is doubled.
        for series in 0..3 {
            journal.append_once(complete(series)).unwrap();
        }
        drop(journal);
        let (journal, recovery) = open(folder.path());
        assert_eq!((recovery.reports, recovery.cut_bytes, recovery.damage), (3, 0, vec![]), "cut at {cut}");
        let after = numbers(&journal);
        assert_eq!(after[..whole.len()], whole, "cut at {cut}");
        assert!(after.is_sorted_by(|a, b| a < b));
    }
}

#[test]
fn a_flipped_bit_costs_one_record_and_is_told() {
    let origin = folder();
    let (bytes, ends) = three_reports(origin.path());
    let folder = folder();
    for place in 0..bytes.len() {
        let mut spoilt = bytes.clone();
        spoilt[place] ^= 1 << (place % 8);
        fs::write(folder.path().join("journal"), &spoilt).unwrap();
        let (journal, recovery) = open(folder.path());
        let found = numbers(&journal);
        let told = recovery.damage.len() + usize::from(recovery.cut_bytes > 0) + usize::from(recovery.set_aside.is_some());
        assert_eq!(told, 1, "flip at {place}: {recovery:?}");
        assert!(found.len() >= 2, "flip at {place}: {found:?}");
        assert!(ends.len() == 3 && journal.cursor("serial") <= 2);
        // The number of a report that was there before is never given to another.
        let fresh = journal.append_once(complete(9)).unwrap().sequence();
        assert!(fresh > 3, "flip at {place}: {fresh}");
    }
}

#[test]
fn a_crash_while_compacting_leaves_the_old_journal_or_the_new_one() {
    let origin = folder();
    let (bytes, _) = three_reports(origin.path());
    let folder = folder();
    for cut in [0, 1, 30, bytes.len() / 2] {
        fs::write(folder.path().join("journal"), &bytes).unwrap();
        fs::write(folder.path().join("journal.new"), &bytes[..cut]).unwrap();
        let (journal, _) = open(folder.path());
        assert_eq!(numbers(&journal), [1, 2, 3]);
        assert!(!folder.path().join("journal.new").exists());
    }
}

#[test]
fn acknowledged_reports_make_room_and_are_still_known() {
    let folder = folder();
    let limits = Limits { bytes_max: 40_000, history_bytes: 4_000 };
    let (journal, _) = Journal::open(folder.path(), limits).unwrap();
    journal.register("serial").unwrap();
    journal.register("watch").unwrap();
    for series in 1..=200 {
        let sequence = journal.append_once(complete(series)).unwrap().sequence();
        journal.acknowledge("serial", sequence).unwrap();
        journal.acknowledge("watch", sequence).unwrap();
    }
    let status = journal.status();
    assert!(status.bytes < 40_000 && status.newest == 200 && status.waiting == 0, "{status:?}");
    let id = journal.id();
    drop(journal);
    let (journal, recovery) = Journal::open(folder.path(), limits).unwrap();
    assert_eq!((recovery.cut_bytes, journal.id(), journal.newest()), (0, id, 200));
    assert_eq!(journal.append_once(complete(7)).unwrap(), Appended::Already(7));
    assert_eq!((journal.cursor("serial"), journal.cursor("watch")), (200, 200));
    assert_eq!(journal.append_once(complete(201)).unwrap(), Appended::New(201));
}

#[test]
fn a_full_journal_says_so_and_keeps_every_report_that_waits() {
    let folder = folder();
    let limits = Limits { bytes_max: 10_000, history_bytes: 1_000 };
    let (journal, _) = Journal::open(folder.path(), limits).unwrap();
    journal.register("serial").unwrap();
    let mut written = 0;
    let error = loop {
        match journal.append_once(complete(written + 1)) {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(written >= 4 && matches!(error, JournalError::Full { .. }), "{written} {error}");
    assert!(error.to_string().contains("by \"serial\""), "{error}");
    assert!(!journal.has_room());
    assert_eq!(numbers(&journal).len(), written as usize);
    // Acknowledging works in a full journal, and makes the room.
    journal.acknowledge("serial", u64::from(written)).unwrap();
    journal.append_once(complete(written + 1)).unwrap();
    drop(journal);
    let (journal, _) = Journal::open(folder.path(), limits).unwrap();
    assert_eq!(journal.newest(), u64::from(written) + 1);
}

#[test]
fn a_report_waits_for_its_slowest_receiver_and_not_for_a_forgotten_one() {
    let folder = folder();
    let (journal, _) = open(folder.path());
    journal.append_once(complete(1)).unwrap();
    assert_eq!(journal.status().waiting, 1, "nobody has asked yet");
    journal.register("old").unwrap();
    journal.acknowledge("serial", 1).unwrap();
    assert_eq!(journal.status().waiting, 1);
    journal.forget("old").unwrap();
    assert_eq!(journal.status().waiting, 0);
    drop(journal);
    assert_eq!(open(folder.path()).0.status().receivers, BTreeMap::from([("serial".into(), 1)]));
}

#[test]
fn receivers_are_bounded_named_and_believed_only_about_what_was_written() {
    let folder = folder();
    let (journal, _) = open(folder.path());
    journal.append_once(complete(1)).unwrap();
    assert!(matches!(journal.acknowledge("serial", 2), Err(JournalError::NotYetWritten { newest: 1, .. })));
    assert!(matches!(journal.register("../x"), Err(JournalError::BadReceiver(_))));
    assert!(matches!(journal.register(""), Err(JournalError::BadReceiver(_))));
    for n in 1..RECEIVERS_MAX {
        journal.register(&format!("r{n}")).unwrap();
    }
    assert!(matches!(journal.register("one-more"), Err(JournalError::TooManyReceivers(_))));
}

#[test]
fn a_file_that_is_no_journal_is_set_aside_and_not_destroyed() {
    let folder = folder();
    fs::write(folder.path().join("journal"), b"shopping list: eggs").unwrap();
    let (journal, recovery) = open(folder.path());
    assert_eq!(fs::read(recovery.set_aside.unwrap()).unwrap(), b"shopping list: eggs");
    assert_eq!(journal.append_once(complete(1)).unwrap(), Appended::New(1));
}

#[test]
fn a_report_that_goes_bad_on_disk_is_passed_over_and_counted() {
    let folder = folder();
    let (_, ends) = three_reports(folder.path());
    let (journal, _) = open(folder.path());
    let file = OpenOptions::new().write(true).open(folder.path().join("journal")).unwrap();
    file.write_all_at(b"?", ends[1] - 10).unwrap();
    assert_eq!(numbers(&journal), [1, 3]);
    assert_eq!(journal.status().damaged, 1);
}

#[test]
fn a_waiting_thread_hears_of_a_new_report() {
    let folder = folder();
    let (journal, _) = open(folder.path());
    assert!(!journal.wait_after(0, Duration::ZERO));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| journal.wait_after(0, Duration::from_secs(20)));
        journal.append_once(complete(1)).unwrap();
        assert!(waiter.join().unwrap());
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any history of appends, acknowledgements and restarts: a receiver's place never goes back, no report that waits is
    /// lost, and numbers only rise.
    #[test]
    fn any_history_keeps_what_it_promised(steps in prop::collection::vec((0u8..4, 0u32..12), 1..60)) {
        let folder = folder();
        let limits = Limits { bytes_max: 12_000, history_bytes: 2_000 };
        let mut journal = Journal::open(folder.path(), limits).unwrap().0;
        let mut written: BTreeMap<u64, u32> = BTreeMap::new();
        let mut acknowledged = [0u64; 2];
        let names = ["serial", "watch"];
        for name in names {
            journal.register(name).unwrap();
        }
        for (step, n) in steps {
            match step {
                0 | 1 => match journal.append_once(complete(n)) {
                    Ok(Appended::New(sequence)) => {
                        prop_assert!(written.keys().all(|w| *w < sequence));
                        prop_assert!(written.values().all(|w| *w != n));
                        written.insert(sequence, n);
                    }
                    Ok(Appended::Already(sequence)) => prop_assert_eq!(written[&sequence], n),
                    Err(error) => prop_assert!(matches!(error, JournalError::Full { .. }), "{}", error),
                },
                2 => {
                    let who = (n % 2) as usize;
                    let upto = journal.newest().min(acknowledged[who] + u64::from(n / 4));
                    journal.acknowledge(names[who], upto).unwrap();
                    acknowledged[who] = acknowledged[who].max(upto);
                }
                _ => {
                    drop(journal);
                    let (again, recovery) = Journal::open(folder.path(), limits).unwrap();
                    prop_assert_eq!((recovery.cut_bytes, recovery.damage, recovery.set_aside), (0, vec![], None));
                    journal = again;
                }
            }
            let there = numbers(&journal);
            for (who, name) in names.iter().enumerate() {
                prop_assert_eq!(journal.cursor(name), acknowledged[who]);
                prop_assert!(written.keys().filter(|w| **w > acknowledged[who]).all(|w| there.contains(w)));
            }
        }
    }
}
