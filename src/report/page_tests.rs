//! `board/PROTOCOL.md` says what the code does: its worked example byte for byte, and its receiver by running it.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use super::Report;
use super::journal::{Journal, Limits};
use super::line::send_reports;
use super::tests::complete;
use super::wire::{Frame, Pace, Splitter};
use crate::link::{Link, Pty};

const PAGE: &str = include_str!("../../board/PROTOCOL.md");

/// The text of the first block of this language.
fn block(language: &str) -> &'static str {
    let begin = PAGE.split_once(&format!("```{language}\n")).expect("the page has the block").1;
    begin.split_once("```").expect("the block ends").0
}

#[test]
fn the_worked_example_of_the_page_is_what_the_code_sends_and_reads() {
    let journal = 0x1122_3344_5566_7788;
    let bytes = br#"{"sequence":17}"#.to_vec();
    let (length, report_crc) = (bytes.len() as u32, crc32c::crc32c(&bytes));
    let state = |last, partial, offset| Frame::State { journal, last, partial, offset, replay: false, gap: false };
    let frames = [
        Frame::Poll { journal, newest: 17, acknowledged: 16 },
        Frame::Data { journal, sequence: 17, previous: 16, length, report_crc, offset: 0, bytes },
        state(16, 17, 15),
        state(17, 0, 0),
    ];
    let lines: Vec<&str> = block("hex").lines().collect();
    assert_eq!(lines.len(), frames.len());
    for (line, frame) in lines.into_iter().zip(frames) {
        let hex = line.split_whitespace().skip(1).map(|byte| u8::from_str_radix(byte, 16).unwrap());
        let bytes: Vec<u8> = hex.collect();
        assert_eq!(frame.encode(), bytes, "{line}");
        assert_eq!(Splitter::default().push(&bytes), [frame]);
    }
    assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
}

#[test]
fn the_receiver_of_the_page_takes_every_report_once() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: python3 is not installed");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("receiver.py");
    std::fs::write(&script, block("python")).unwrap();
    let journal = Journal::open(folder.path(), Limits::default()).unwrap().0;
    for series in 1..=5 {
        journal.append_once(complete(series)).unwrap();
    }
    let pty = Pty::open().unwrap();
    let mut python = Command::new("python3")
        .arg(&script)
        .arg(pty.path())
        .arg("5")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stop = AtomicBool::new(false);
    let mut near = Some(Box::new(pty) as Box<dyn Link>);
    let open = move || near.take().ok_or_else(|| std::io::Error::other("the line is opened once in this test"));
    let lines: Vec<String> = std::thread::scope(|scope| {
        scope.spawn(|| send_reports(&journal, "serial", Pace::of_baud(115_200), open, &stop).unwrap());
        let lines = BufReader::new(python.stdout.take().unwrap()).lines().map_while(Result::ok).collect();
        stop.store(true, Ordering::Relaxed);
        lines
    });
    assert!(python.wait().unwrap().success());
    let numbers: Vec<u64> = lines.iter().map(|line| Report::from_json(line.as_bytes()).unwrap().sequence).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5]);
    assert_eq!(journal.cursor("serial"), 5);
}
