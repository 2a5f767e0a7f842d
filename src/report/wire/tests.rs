use proptest::prelude::*;

use super::*;
use crate::link::{Link, Weather, memory_pair};
use std::time::Duration;

const MS: Duration = Duration::from_millis(1);

fn report(n: u64) -> Vec<u8> {
    // From less than one chunk to more than a window.
    let length = 40 + (n * 1777) % 9000;
    (0..length).map(|i| (i * n % 251) as u8).collect()
}

/// Box and receiver on a line, with what each has on its disk; time is ours.
struct Bench {
    reports: Vec<(u64, Vec<u8>)>,
    /// The box's disk: how far the receiver has acknowledged.
    cursor: u64,
    /// The receiver's disk: what it has taken, in order.
    taken: Vec<(u64, Vec<u8>)>,
    memory: Memory,
    sender: Sender,
    receiver: Receiver,
    ends: Option<(crate::link::MemoryLink, crate::link::MemoryLink)>,
    cable: crate::link::Cable,
    pending: [Vec<u8>; 2],
    /// Bytes the box has put on the line.
    sent: usize,
    now: Duration,
}

const JOURNAL: u64 = 0x1122_3344_5566_7788;

impl Bench {
    fn new(weather: Weather, reports: Vec<(u64, Vec<u8>)>) -> Self {
        let (near, far, cable) = memory_pair(weather);
        let pace = Pace::of_baud(115_200);
        Self {
            reports,
            cursor: 0,
            taken: Vec::new(),
            memory: Memory::default(),
            sender: Sender::new(JOURNAL, 0, pace),
            receiver: Receiver::new(Memory::default(), None),
            ends: Some((near, far)),
            cable,
            pending: [Vec::new(), Vec::new()],
            sent: 0,
            now: Duration::ZERO,
        }
    }

    fn restart_sender(&mut self) {
        self.sender = Sender::new(JOURNAL, self.cursor, Pace::of_baud(115_200));
        self.sender.line_opened(self.now);
        self.pending[0].clear();
    }

    fn restart_receiver(&mut self) {
        self.receiver = Receiver::new(self.memory.clone(), None);
        self.receiver.line_opened(self.now);
        self.pending[1].clear();
    }

    fn unplug(&mut self) {
        self.cable.unplug();
        self.ends = None;
        self.pending = [Vec::new(), Vec::new()];
    }

    fn plug(&mut self) {
        self.cable.plug();
        self.ends = Some((self.cable.end(0).unwrap(), self.cable.end(1).unwrap()));
        self.sender.line_opened(self.now);
        self.receiver.line_opened(self.now);
    }

    /// Both sides run for one step of time.
    fn step(&mut self) {
        self.now += 5 * MS;
        let Some((near, far)) = &mut self.ends else { return };
        let mut buffer = [0; 300];

        let count = near.read(&mut buffer, Duration::ZERO).unwrap();
        if let Some(upto) = self.sender.receive(&buffer[..count], self.now) {
            self.cursor = upto;
        }
        if let Some(after) = self.sender.wants_after()
            && let Some((sequence, json)) = self.reports.iter().find(|(sequence, _)| *sequence > after)
        {
            self.sender.offer(*sequence, json.clone(), self.now);
        }
        if self.pending[0].is_empty() {
            self.pending[0] = self.sender.transmit(self.now);
        }
        let count = near.write(&self.pending[0], Duration::ZERO).unwrap();
        self.pending[0].drain(..count);
        self.sent += count;
        if count > 0 && self.pending[0].is_empty() {
            self.sender.line_drained(self.now);
        }

        let count = far.read(&mut buffer, Duration::ZERO).unwrap();
        if let Some(incoming) = self.receiver.receive(&buffer[..count], self.now) {
            self.taken.push((incoming.sequence, incoming.json));
            self.receiver.accept(incoming.sequence, self.now);
            self.memory = self.receiver.memory().clone();
        }
        if self.pending[1].is_empty() {
            self.pending[1] = self.receiver.transmit(self.now);
        }
        let count = far.write(&self.pending[1], Duration::ZERO).unwrap();
        self.pending[1].drain(..count);
    }

    /// Steps until everything is taken and acknowledged; how long that took.
    fn run(&mut self, at_most: Duration) -> Duration {
        let begin = self.now;
        let newest = self.reports.last().unwrap().0;
        while self.cursor < newest || !self.receiver.is_settled() {
            assert!(self.now - begin < at_most, "{:?} after {at_most:?}: {} taken", self.sender, self.taken.len());
            self.step();
        }
        self.now - begin
    }
}

fn reports(count: u64) -> Vec<(u64, Vec<u8>)> {
    // The numbers have a gap, as after a crash.
    (1..=count).map(|n| (n + 3 * u64::from(n > 4), report(n))).collect()
}

#[test]
fn on_a_good_line_every_report_arrives_once_in_order_and_without_resending() {
    let mut bench = Bench::new(Weather::clear(1), reports(12));
    let took = bench.run(Duration::from_secs(20));
    assert_eq!(bench.taken, reports(12));
    assert!(took < Duration::from_secs(3), "{took:?}");
    let payload: usize = reports(12).iter().map(|(_, json)| json.len()).sum();
    assert!(bench.sent < payload * 5 / 4, "{} bytes for {payload} of reports", bench.sent);
}

#[test]
fn through_loss_noise_and_short_reads_every_report_arrives_once_in_order() {
    for seed in 0..8 {
        let mut bench = Bench::new(Weather::storm(seed), reports(6));
        bench.run(Duration::from_secs(2000));
        assert_eq!(bench.taken, reports(6), "seed {seed}");
    }
}

#[test]
fn through_restarts_and_unplugging_at_random_moments_every_report_arrives_once_in_order() {
    for seed in 0..60u64 {
        let weather = if seed % 2 == 0 { Weather::clear(seed) } else { Weather { lost_per_million: 300, ..Weather::storm(seed) } };
        let mut bench = Bench::new(weather, reports(8));
        let mut state = seed;
        for _ in 0..12 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            for _ in 0..(state >> 33) % 60 {
                bench.step();
            }
            match (state >> 20) % 4 {
                0 => bench.restart_sender(),
                1 => bench.restart_receiver(),
                2 => {
                    bench.unplug();
                    (0..(state >> 40) % 400).for_each(|_| bench.step());
                    bench.plug();
                }
                _ => {
                    bench.restart_sender();
                    bench.restart_receiver();
                }
            }
        }
        bench.run(Duration::from_secs(600));
        assert_eq!(bench.taken, reports(8), "seed {seed}");
    }
}

#[test]
fn after_an_hour_without_a_cable_reports_flow_again_within_three_seconds() {
    let mut bench = Bench::new(Weather::clear(3), reports(3));
    bench.unplug();
    bench.now += Duration::from_secs(3600);
    bench.plug();
    assert!(bench.run(Duration::from_secs(10)) < Duration::from_secs(3));
    assert_eq!(bench.taken, reports(3));
}

#[test]
fn a_receiver_that_comes_late_is_noticed_by_its_greeting() {
    let mut bench = Bench::new(Weather::clear(3), reports(2));
    // The receiver is switched off: what the box sends goes nowhere.
    let mut sent = 0;
    while bench.now < Duration::from_secs(600) {
        bench.now += 20 * MS;
        if bench.sender.wants_after().is_some() {
            bench.sender.offer(1, report(1), bench.now);
        }
        sent += bench.sender.transmit(bench.now).len();
    }
    assert!(sent < 600 * 250, "{sent} bytes into the void in ten minutes");
    bench.receiver.line_opened(bench.now);
    assert!(bench.run(Duration::from_secs(10)) < Duration::from_secs(2));
}

#[test]
fn a_receiver_may_ask_for_acknowledged_reports_again() {
    let mut bench = Bench::new(Weather::clear(1), reports(5));
    bench.run(Duration::from_secs(20));
    bench.receiver = Receiver::new(Memory::default(), Some(2));
    bench.taken.clear();
    while bench.taken.len() < 4 {
        bench.step();
        assert!(bench.now < Duration::from_secs(60));
    }
    assert_eq!(bench.taken, reports(5)[1..]);
    assert_eq!(bench.cursor, reports(5)[4].0, "the durable place never goes back");
}

#[test]
fn a_receiver_is_told_which_reports_went_elsewhere() {
    let mut bench = Bench::new(Weather::clear(1), reports(4));
    bench.run(Duration::from_secs(20));
    // Another receiver took 3 and 4; ours has only 1 and 2 on its disk.
    let mut memory = Memory::default();
    memory.take(JOURNAL, 2);
    let mut receiver = Receiver::new(memory, None);
    let frame = Frame::Data {
        journal: JOURNAL,
        sequence: 8,
        previous: 4,
        length: 2,
        report_crc: crc32c::crc32c(b"{}"),
        offset: 0,
        bytes: b"{}".to_vec(),
    };
    assert_eq!(receiver.receive(&frame.encode(), Duration::ZERO).unwrap().skipped, Some(3..=4));
}

#[test]
fn another_box_on_the_line_starts_its_own_count() {
    let mut memory = Memory::default();
    memory.take(1, 40);
    let mut receiver = Receiver::new(memory, None);
    let data = |journal, sequence| {
        let bytes = b"{}".to_vec();
        Frame::Data { journal, sequence, previous: 0, length: 2, report_crc: crc32c::crc32c(&bytes), offset: 0, bytes }.encode()
    };
    assert!(receiver.receive(&data(1, 40), Duration::ZERO).is_none(), "taken before");
    assert_eq!(receiver.receive(&data(2, 3), Duration::ZERO).unwrap().sequence, 3);
    receiver.accept(3, Duration::ZERO);
    assert_eq!((receiver.memory().last(1), receiver.memory().last(2)), (40, 3));
}

#[test]
fn a_claim_to_have_what_was_never_sent_is_not_believed() {
    let mut sender = Sender::new(JOURNAL, 5, Pace::of_baud(9600));
    let state = Frame::State { journal: JOURNAL, last: 9, partial: 0, offset: 0, replay: false, gap: false };
    assert_eq!(sender.receive(&state.encode(), Duration::ZERO), None);
    assert_eq!(sender.take_disbelieved(), Some(9));
    assert_eq!(sender.wants_after(), Some(5));
}

#[test]
fn a_report_longer_than_the_limit_is_not_gathered() {
    let mut receiver = Receiver::new(Memory::default(), None);
    let bytes = vec![1; 512];
    let frame = Frame::Data { journal: 1, sequence: 1, previous: 0, length: u32::MAX, report_crc: 0, offset: 0, bytes };
    assert!(receiver.receive(&frame.encode(), Duration::ZERO).is_none());
    let answer = Splitter::default().push(&receiver.transmit(Duration::ZERO));
    assert!(matches!(answer[..], [Frame::State { partial: 0, offset: 0, .. }]), "{answer:?}");
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let poll = any::<[u64; 3]>().prop_map(|[journal, newest, acknowledged]| Frame::Poll { journal, newest, acknowledged });
    let data = (any::<[u64; 3]>(), any::<[u32; 3]>(), prop::collection::vec(any::<u8>(), 1..=CHUNK_BYTES_MAX));
    let data = data.prop_map(|([journal, sequence, previous], [length, report_crc, offset], bytes)| Frame::Data {
        journal,
        sequence,
        previous,
        length,
        report_crc,
        offset,
        bytes,
    });
    let state = (any::<[u64; 3]>(), any::<u32>(), any::<[bool; 2]>());
    let state = state.prop_map(|([journal, last, partial], offset, [replay, gap])| Frame::State {
        journal,
        last,
        partial,
        offset,
        replay,
        gap,
    });
    prop_oneof![poll, data, state]
}

proptest! {
    #[test]
    fn every_frame_reads_back_wherever_the_line_cuts_it(frames in prop::collection::vec(any_frame(), 1..6), cut in 1usize..80) {
        let line: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        let mut splitter = Splitter::default();
        let read: Vec<Frame> = line.chunks(cut).flat_map(|part| splitter.push(part)).collect();
        prop_assert_eq!(read, frames);
    }

    #[test]
    fn byte_stuffing_leaves_no_zero_and_reads_back(plain in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>(), Just(7u8)], 0..1100)) {
        let coded = cobs_encode(&plain);
        prop_assert!(!coded.contains(&0) && coded.len() <= plain.len() + plain.len() / 254 + 1);
        prop_assert_eq!(cobs_decode(&coded), Some(plain));
    }

    #[test]
    fn noise_between_frames_costs_at_most_the_frame_it_touches(noise in prop::collection::vec(any::<u8>(), 0..3000), frame in any_frame()) {
        let mut splitter = Splitter::default();
        splitter.push(&noise);
        splitter.push(&[0]);
        prop_assert_eq!(splitter.push(&frame.encode()), vec![frame]);
    }

    #[test]
    fn a_flipped_bit_is_noticed(frame in any_frame(), place in any::<prop::sample::Index>(), bit in 0u32..8) {
        let mut line = frame.encode();
        let at = place.index(line.len());
        line[at] ^= 1 << bit;
        prop_assert!(!Splitter::default().push(&line).contains(&frame) || line == frame.encode());
    }

    #[test]
    fn whatever_comes_in_nothing_breaks(bytes in prop::collection::vec(any::<u8>(), 0..600), frames in prop::collection::vec(any_frame(), 0..6)) {
        let mut sender = Sender::new(JOURNAL, 0, Pace::of_baud(115_200));
        let mut receiver = Receiver::new(Memory::default(), None);
        sender.offer(1, report(1), Duration::ZERO);
        let mut line = bytes;
        for frame in frames {
            line.extend(frame.encode());
        }
        sender.receive(&line, Duration::ZERO);
        sender.transmit(MS);
        receiver.receive(&line, Duration::ZERO);
        receiver.transmit(MS);
    }
}
