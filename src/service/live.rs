//! Live streams: frames from the local socket to the ultrasound exam as they come, the newest first and no queue.
//!
//! Each stream has one thread, one frame in flight and one that waits; a frame that comes while one waits takes its place, and
//! the one that waited is counted as dropped. So what is shown is never older than two frames' work, however slow the
//! box, and memory does not grow. The series' one report is made when the stream ends.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;

use super::analysis::model_used;
use super::{Shared, locked};
use crate::exam::ultrasound::{ClipHeader, Reader, Seen};
use crate::finding::Measurement;
use crate::geometry::{Affine, Grid, Spacing};
use crate::ingest::socket::{FrameHeader, FrameSink, Pixel, RawFrame};
use crate::ingest::{IntakeError, SourceId};
use crate::pool::{Fault, Pool};
use crate::report::{CineUsed, Reason, Report, Results, VolumeUsed};
use crate::series::Planar;
use crate::study::{Modality, Rejection, RejectionCode, Uid};

/// Streams at once. Two transducers on one cart are rare, and each stream wants a core at thirty frames a second.
const STREAMS_MAX: usize = 2;

/// Pixels of a live frame: a cart's whole screen. With [`STREAMS_MAX`] it bounds the memory.
const PIXELS_MAX: usize = 1920 * 1080;

/// Bytes that live streams hold at most, beside their networks and what the socket is receiving: of each a frame in flight, one that
/// waits, one to use again, two of learning, and one as floats.
pub const LIVE_BYTES: u64 = (STREAMS_MAX * PIXELS_MAX * 9) as u64;

/// Latencies that p50 and p99 are of: two minutes at thirty frames a second.
const LATENCIES_MAX: usize = 4096;

/// All live streams of a service.
pub struct Live {
    shared: Arc<Shared>,
    streams: Mutex<HashMap<SourceId, Arc<Stream>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What is counted over all streams since the start, and the newest look.
#[derive(Default)]
pub struct LiveStats {
    streams: AtomicUsize,
    frames_in: AtomicU64,
    analysed: AtomicU64,
    dropped: AtomicU64,
    refused: AtomicU64,
    latencies_us: Mutex<VecDeque<u32>>,
    look: Mutex<(u64, Arc<Vec<u8>>)>,
    looked: Condvar,
}

/// Live streams at a glance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LiveStatus {
    /// Streams that are open.
    pub streams: usize,
    /// Frames taken in since the start.
    pub frames_in: u64,
    /// Frames analysed.
    pub frames_analysed: u64,
    /// Frames dropped because a newer one came first.
    pub frames_dropped: u64,
    /// Frames that made no sense in their stream; their sender was told.
    pub frames_refused: u64,
    /// Half of the newest frames took at most so long, from their last byte to their findings.
    pub latency_p50_ms: f64,
    /// 99 of 100 did.
    pub latency_p99_ms: f64,
}

impl LiveStats {
    /// The counts and the latencies now.
    pub fn status(&self) -> LiveStatus {
        let mut sorted: Vec<u32> = locked(&self.latencies_us).iter().copied().collect();
        sorted.sort_unstable();
        let at = |share: f64| sorted.get((sorted.len() as f64 * share) as usize).or(sorted.last()).map_or(0.0, |us| f64::from(*us) / 1000.0);
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        LiveStatus {
            streams: self.streams.load(Ordering::Relaxed),
            frames_in: count(&self.frames_in),
            frames_analysed: count(&self.analysed),
            frames_dropped: count(&self.dropped),
            frames_refused: count(&self.refused),
            latency_p50_ms: at(0.5),
            latency_p99_ms: at(0.99),
        }
    }

    fn took(&self, latency: Duration) {
        self.analysed.fetch_add(1, Ordering::Relaxed);
        let mut latencies = locked(&self.latencies_us);
        if latencies.len() >= LATENCIES_MAX {
            latencies.pop_front();
        }
        latencies.push_back(u32::try_from(latency.as_micros()).unwrap_or(u32::MAX));
    }

    fn show(&self, look: &Look<'_>) {
        let Ok(json) = serde_json::to_vec(look) else { return };
        let mut newest = locked(&self.look);
        *newest = (newest.0 + 1, Arc::new(json));
        self.looked.notify_all();
    }

    fn look(&self, after: u64, wait: Duration) -> Option<(u64, Vec<u8>)> {
        let newest = locked(&self.look);
        let (newest, _) = self.looked.wait_timeout_while(newest, wait, |(number, _)| *number <= after).unwrap_or_else(PoisonError::into_inner);
        (newest.0 > after).then(|| (newest.0, newest.1.to_vec()))
    }
}

/// What a stream shows in one frame, for whoever watches.
#[derive(Serialize)]
struct Look<'a> {
    series_uid: &'a Uid,
    frame: usize,
    time_us: u64,
    latency_ms: f64,
    dropped: u64,
    lesions: &'a [Seen],
}

/// One stream.
struct Stream {
    series: Uid,
    study: Uid,
    opened: Instant,
    first: FrameHeader,
    slot: Mutex<Slot>,
    wake: Condvar,
}

#[derive(Default)]
struct Slot {
    waiting: Option<Frame>,
    /// A buffer to use again.
    spare: Option<Vec<u8>>,
    received: usize,
    dropped: u64,
    refused: u64,
    time_us: u64,
    over: bool,
}

struct Frame {
    number: usize,
    header: FrameHeader,
    grey: Vec<u8>,
    arrived: Instant,
}

/// What became of a stream.
struct Ended {
    shape: [usize; 3],
    spacing_mm: Option<[f64; 2]>,
    calibrated: bool,
    frame_time_ms: Option<f64>,
    analysed: usize,
    dropped: u64,
    refused: u64,
    findings: Vec<crate::finding::Finding>,
    shows: bool,
}

impl Live {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, streams: Mutex::default(), threads: Mutex::default() }
    }

    /// Ends all streams and waits for their reports.
    pub fn stop(&self) {
        for (_, stream) in locked(&self.streams).drain() {
            stream.end();
        }
        for thread in locked(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }

    fn open(&self, source: SourceId, header: FrameHeader) -> Result<Arc<Stream>, IntakeError> {
        let full = |text: String| Err(IntakeError::OutOfResources(text));
        if !self.shared.journal.has_room() {
            return full("the journal of reports is full".into());
        }
        if self.shared.live.streams.load(Ordering::Relaxed) >= STREAMS_MAX {
            return full(format!("{STREAMS_MAX} live streams are open already"));
        }
        let rejected = |code, text: String| Err(Rejection::new(code, text).into());
        let [rows, columns] = [header.rows, header.columns].map(usize::from);
        if rows * columns > PIXELS_MAX {
            return rejected(RejectionCode::TooLarge, format!("frames of {rows} x {columns} pixels; at most {PIXELS_MAX} in all are taken"));
        }
        if self.shared.analyst.exams().ultrasound().is_none() {
            return rejected(RejectionCode::WrongContent, "the ultrasound exam does not run here".into());
        }
        // The same box, source and moment never come again.
        let seed = format!("{} live {} {}", self.shared.analyst.device().uid, Timestamp::now(), source.0);
        let stream = Arc::new(Stream {
            series: Uid::derived(seed.as_bytes()),
            study: Uid::derived(format!("{seed} study").as_bytes()),
            opened: Instant::now(),
            first: header,
            slot: Mutex::new(Slot::default()),
            wake: Condvar::new(),
        });
        let (mine, shared) = (Arc::clone(&stream), Arc::clone(&self.shared));
        let builder = std::thread::Builder::new().name("scanside-live".into());
        self.shared.live.streams.fetch_add(1, Ordering::Relaxed);
        let thread = builder.spawn(move || {
            shared.follow(&mine);
            shared.live.streams.fetch_sub(1, Ordering::Relaxed);
        });
        let thread = thread.inspect_err(|_| {
            self.shared.live.streams.fetch_sub(1, Ordering::Relaxed);
        })?;
        let mut threads = locked(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        log::info!("series {}: a live stream of {rows} x {columns} has begun", stream.series);
        Ok(stream)
    }
}

impl FrameSink for Live {
    fn frame(&self, source: SourceId, frame: RawFrame<'_>) -> Result<(), IntakeError> {
        let known = locked(&self.streams).get(&source).cloned();
        let stream = match known {
            Some(stream) => stream,
            None => {
                let stream = self.open(source, frame.header)?;
                locked(&self.streams).insert(source, Arc::clone(&stream));
                stream
            }
        };
        let stats = &self.shared.live;
        match stream.take(frame) {
            Ok(dropped) => {
                stats.frames_in.fetch_add(1, Ordering::Relaxed);
                stats.dropped.fetch_add(u64::from(dropped), Ordering::Relaxed);
                Ok(())
            }
            Err(rejection) => {
                stats.refused.fetch_add(1, Ordering::Relaxed);
                Err(rejection.into())
            }
        }
    }

    fn finished(&self, source: SourceId) {
        if let Some(stream) = locked(&self.streams).remove(&source) {
            stream.end();
        }
    }

    fn look(&self, after: u64, wait: Duration) -> Option<(u64, Vec<u8>)> {
        self.shared.live.look(after, wait)
    }
}

impl Stream {
    /// Takes a frame; whether another had to make room for it.
    fn take(&self, frame: RawFrame<'_>) -> Result<bool, Rejection> {
        let arrived = Instant::now();
        let FrameHeader { rows, columns, pixel, time_us, .. } = frame.header;
        let mut slot = locked(&self.slot);
        let wrong = if (rows, columns, pixel) != (self.first.rows, self.first.columns, self.first.pixel) {
            let (was, is) = ([self.first.rows, self.first.columns], [rows, columns]);
            Some(Rejection::new(
                RejectionCode::MixedGeometry,
                format!("the stream began with frames of {was:?} pixels ({:?}), and this one is {is:?} ({pixel:?})", self.first.pixel),
            ))
        } else if slot.received > 0 && time_us < slot.time_us {
            Some(Rejection::new(RejectionCode::Malformed, "the time of the frame goes back"))
        } else {
            None
        };
        if let Some(rejection) = wrong {
            slot.refused += 1;
            return Err(rejection);
        }
        let older = slot.waiting.take();
        let dropped = older.is_some();
        slot.dropped += u64::from(dropped);
        let mut grey = older.map(|frame| frame.grey).or_else(|| slot.spare.take()).unwrap_or_default();
        grey_of(pixel, frame.pixels, &mut grey);
        let number = slot.received;
        slot.received += 1;
        slot.time_us = time_us;
        slot.waiting = Some(Frame { number, header: frame.header, grey, arrived });
        self.wake.notify_one();
        Ok(dropped)
    }

    fn end(&self) {
        locked(&self.slot).over = true;
        self.wake.notify_one();
    }

    /// The newest frame, or None when the stream is over.
    fn next(&self) -> Option<Frame> {
        let mut slot = locked(&self.slot);
        loop {
            if let Some(frame) = slot.waiting.take() {
                return Some(frame);
            }
            if slot.over {
                return None;
            }
            slot = self.wake.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Grey by ITU-R BT.601, as colour in DICOM files becomes grey here.
fn grey_of(pixel: Pixel, pixels: &[u8], out: &mut Vec<u8>) {
    out.clear();
    match pixel {
        Pixel::Gray8 => out.extend_from_slice(pixels),
        Pixel::Rgb8 => out.extend(pixels.chunks_exact(3).map(|c| crate::dicom::luminance([c[0], c[1], c[2]].map(u32::from)) as u8)),
    }
}

impl Shared {
    /// One stream, from its first frame to its report.
    fn follow(&self, stream: &Stream) {
        let ended = catch_unwind(AssertUnwindSafe(|| self.read_stream(stream)));
        let now = Timestamp::now();
        let subject = self.analyst.subject(&stream.series, &stream.study, Modality::Us);
        let report = match ended.map_err(Fault::from_panic) {
            Ok(Ok(ended)) => self.stream_report(subject, ended, now),
            Ok(Err(error)) => Report::failed(subject, Reason::new("fault", error.to_string()), now),
            Err(fault) => Report::failed(subject, Reason::new("fault", fault.to_string()), now),
        };
        let report = report.with_timing("total", stream.opened.elapsed());
        log::info!("series {}: the live stream has ended: {}", stream.series, report.status.word());
        self.keep(&stream.series, report, || {});
    }

    fn read_stream(&self, stream: &Stream) -> Result<Ended, crate::exam::ExamError> {
        let exam = self.analyst.exams().ultrasound().expect("a stream is opened only when the exam runs");
        let mut reader: Reader<'_> = exam.reader()?;
        // Its own core, not shared: helpers would only have to be woken for work of milliseconds.
        let alone = Pool::new(1);
        let [rows, columns] = [stream.first.rows, stream.first.columns].map(usize::from);
        let (mut scale, mut next, mut shows, mut calibrated) = (None, 0, false, true);
        let mut times: Option<(u64, u64, usize)> = None;
        while let Some(frame) = stream.next() {
            let _urgent = self.analyst.pool().urgent();
            let planar = Planar { spacing_mm: frame.header.spacing_mm, region: frame.header.region };
            if scale != Some(planar) {
                // The depth was changed: the same view at another scale is another clip.
                reader.start(ClipHeader::of([rows, columns], planar));
                scale = Some(planar);
                calibrated &= frame.header.spacing_mm.is_some();
            }
            let skipped = frame.number - next;
            next = frame.number + 1;
            let seen = reader.push(frame.number, skipped, &frame.grey, &alone)?;
            let latency = frame.arrived.elapsed();
            shows |= !seen.is_empty();
            let time_us = frame.header.time_us;
            let (first, _, _) = *times.get_or_insert((time_us, time_us, frame.number));
            times = Some((first, time_us, frame.number));
            let dropped = locked(&stream.slot).dropped;
            let latency_ms = latency.as_secs_f64() * 1e3;
            self.live.show(&Look { series_uid: &stream.series, frame: frame.number, time_us, latency_ms, dropped, lesions: seen });
            self.live.took(latency);
            locked(&stream.slot).spare = Some(frame.grey);
        }
        let analysed = reader.frames();
        let shows = shows || reader.frames_with_field() > 0;
        let (findings, _) = reader.finish(&stream.series);
        let slot = locked(&stream.slot);
        let frame_time_ms = times.and_then(|(first, last, frames)| (frames > 0 && last > first).then(|| (last - first) as f64 / frames as f64 / 1e3));
        Ok(Ended {
            shape: [slot.received, rows, columns],
            spacing_mm: stream.first.spacing_mm,
            calibrated,
            frame_time_ms,
            analysed,
            dropped: slot.dropped,
            refused: slot.refused,
            findings,
            shows,
        })
    }

    fn stream_report(&self, subject: crate::report::Subject, ended: Ended, now: Timestamp) -> Report {
        let [y, x] = ended.spacing_mm.unwrap_or([1.0; 2]);
        let unit = Spacing::new([1.0; 3]).expect("a millimetre is a spacing");
        let grid = Grid { shape: ended.shape, affine: Affine::axial(Spacing::new([1.0, y, x]).unwrap_or(unit), [0.0; 3]) };
        let mut volume = VolumeUsed::whole(&grid);
        volume.cine = Some(CineUsed { frame_time_ms: ended.frame_time_ms, calibrated: ended.calibrated });
        if !ended.shows {
            let rejection = Rejection::new(RejectionCode::WrongContent, "no frame of the stream shows an ultrasound field");
            return Report::rejected(subject, &rejection, now).with_volume(volume);
        }
        let counts = [
            ("frames_analysed", ended.analysed as u64),
            ("frames_dropped", ended.dropped),
            ("frames_refused", ended.refused),
        ];
        let exam = self.analyst.exams().ultrasound();
        let results = Results {
            models: exam.iter().map(|exam| model_used(exam.model())).collect(),
            volume: Some(volume),
            findings: ended.findings,
            measurements: counts.map(|(name, n)| (name.to_owned(), Measurement { value: n as f64, unit: "1".into() })).into(),
        };
        if ended.dropped == 0 {
            return Report::complete(subject, results, now);
        }
        let text = format!("{} of {} frames were dropped because newer ones came first", ended.dropped, ended.shape[0]);
        Report::partial(subject, results, Reason::new("frames_dropped", text), now)
    }
}
