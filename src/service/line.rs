//! The thread between the doors and the exams: instances on disk become volumes, finished series become jobs.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError};
use serde::Serialize;

use super::analysis::{EarlySlice, Unread, wants_early};
use super::locked;
use super::supervisor::Hearts;
use crate::ingest::SourceId;
use crate::ingest::spool::{Arrival, SpooledInstance};
use crate::series::{AddError, Added, Assembler, SeriesOutcome};
use crate::study::{Modality, Rejection, Uid};

/// What an exam looks at in one go: a finished series, or all of a study.
#[derive(Debug)]
pub struct Job(pub Vec<Part>);

/// A finished series on its way to its exam.
#[derive(Debug)]
pub struct Part {
    /// The series.
    pub series: SeriesOutcome,
    /// Every instance of it that was acknowledged; they leave the spool once the report is in the journal.
    pub instances: Vec<Uid>,
    /// Those that could not be read.
    pub unread: Vec<Unread>,
    /// Who sent it.
    source: Option<SourceId>,
}

/// Finished series of one study that wait for the others.
struct Gathering {
    study: Uid,
    parts: Vec<Part>,
    last: Instant,
    /// There is nothing more that its exam could use.
    whole: bool,
}

/// Series of one study that are gathered; a sender that goes on beyond them has its study analysed in pieces.
const GATHERED_MAX: usize = 32;
/// Studies that are gathered at once. Their voxels lie on the disk.
const GATHERINGS_MAX: usize = 8;
/// Senders that have gone in good order and are remembered, until their series have been gathered.
const RELEASED_MAX: usize = 64;

/// How often the line looks at its clock when nothing arrives.
const TICK: Duration = Duration::from_millis(100);

/// Judges the series of a study.
pub type OfSeries = dyn Fn(&[&SeriesOutcome]) -> bool + Send;

/// What the line has to know of exams that look at all series of a study together.
pub struct Studies {
    /// Whether the series of a modality wait for the others of their study.
    pub gathers: Box<dyn Fn(Modality) -> bool + Send>,
    /// Whether there is nothing more that the exam could use.
    pub whole: Box<OfSeries>,
    /// Longest that a study which lacks a series waits for the next.
    pub patience: Duration,
}

/// What is here and not yet at its exam.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Underway {
    /// Series that grow: UID and images so far.
    pub growing: Vec<(Uid, usize)>,
    /// Studies that wait for more of their series: UID, series so far, seconds until they are taken as they are.
    pub gathering: Vec<(Uid, usize, u64)>,
}

/// The line's own state. One thread owns it.
pub struct Line {
    assembler: Assembler,
    jobs: Sender<Job>,
    early: Sender<EarlySlice>,
    studies: Studies,
    gatherings: Vec<Gathering>,
    released: VecDeque<SourceId>,
    /// Per series that grows: what was acknowledged of it.
    members: HashMap<Uid, Members>,
    /// What cannot be taken on yet, because as many series grow as may or the disk is full. It is on disk; it waits.
    waiting: VecDeque<Arrival>,
    retry_at: Option<Instant>,
    /// Since when the disk has had no room for volumes.
    full_since: Option<Instant>,
    /// Longest that something waits for room before its series fails.
    patience: Duration,
    underway: Arc<Mutex<Underway>>,
    told: Option<Instant>,
    /// How long the exams have kept this line from its work: no timer runs while what it waits for cannot be taken.
    blocked: Duration,
    /// Told of each series that is finished.
    finished: Box<dyn Fn(&Uid) + Send>,
}

struct Members {
    study: Uid,
    modality: Modality,
    instances: Vec<Uid>,
    unread: Vec<Unread>,
    places_mm: Vec<f64>,
    source: SourceId,
    opened: Instant,
    last: Instant,
}

impl Line {
    /// A line with an assembler of its own. `finished` is told of each series to which nothing can be added any more.
    pub fn new(
        assembler: Assembler,
        jobs: Sender<Job>,
        early: Sender<EarlySlice>,
        studies: Studies,
        patience: Duration,
        underway: Arc<Mutex<Underway>>,
        finished: Box<dyn Fn(&Uid) + Send>,
    ) -> Self {
        Self {
            assembler,
            jobs,
            early,
            studies,
            gatherings: Vec::new(),
            released: VecDeque::new(),
            members: HashMap::new(),
            waiting: VecDeque::new(),
            retry_at: None,
            full_since: None,
            patience,
            underway,
            told: None,
            blocked: Duration::ZERO,
            finished,
        }
    }

    /// Works until `stop` is set or the doors are gone.
    pub fn run(mut self, arrivals: &Receiver<Arrival>, stop: &AtomicBool, hearts: &Arc<Hearts>) {
        while !stop.load(Ordering::Relaxed) {
            hearts.beat("series", Instant::now());
            // A full waiting room closes the door: the channel fills, and the senders wait.
            let closed = self.waiting.len() >= WAITING_MAX;
            let arrival = if closed {
                std::thread::sleep(TICK);
                Err(RecvTimeoutError::Timeout)
            } else {
                arrivals.recv_timeout(TICK)
            };
            match arrival {
                Ok(arrival) => self.take(arrival, self.clock()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.tick(self.clock(), closed || arrivals.is_empty(), hearts);
        }
        hearts.rest("series");
    }

    fn clock(&self) -> Instant {
        Instant::now().checked_sub(self.blocked).unwrap_or_else(Instant::now)
    }

    fn take(&mut self, arrival: Arrival, now: Instant) {
        // What follows something that waits has to wait behind it: a release must not overtake its instances.
        let behind = source_of(&arrival).is_some_and(|source| self.waiting.iter().any(|w| source_of(w) == Some(source)));
        if behind {
            self.waiting.push_back(arrival);
        } else if let Some(again) = self.handle(arrival, now) {
            self.retry_at.get_or_insert(now + RETRY_AFTER);
            self.waiting.push_back(again);
        }
    }

    /// Handles one arrival; gives it back when there is no room for it now.
    fn handle(&mut self, arrival: Arrival, now: Instant) -> Option<Arrival> {
        match arrival {
            Arrival::Instance(instance) => self.add(instance, now).map(Arrival::Instance),
            Arrival::Conflict { series, rejection, .. } => {
                log::warn!("series {series}: {rejection}");
                self.assembler.spoil(&series, rejection);
                None
            }
            Arrival::Released(source) => {
                self.assembler.released(now, source.0);
                self.released.push_back(source);
                if self.released.len() > RELEASED_MAX {
                    self.released.pop_front();
                }
                self.close_unread(now, |members| members.source == source);
                None
            }
            Arrival::Lost(source) => {
                self.assembler.lost(source.0);
                None
            }
        }
    }

    fn add(&mut self, instance: SpooledInstance, now: Instant) -> Option<SpooledInstance> {
        let added = match std::fs::read(&instance.path) {
            Ok(file) => self.assembler.add(now, instance.source.0, &file),
            // Its series was reported while it was on its way: it was part of it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                let text = format!("the instance cannot be read back from the spool: {error}");
                Err(AddError::Rejected(Rejection::new(crate::study::RejectionCode::Malformed, text)))
            }
        };
        let rejection = match added {
            Err(AddError::Busy(_)) => return Some(instance),
            Err(AddError::Volume(error)) if now.saturating_duration_since(*self.full_since.get_or_insert(now)) < self.patience => {
                log::warn!("series {}: {error}; it waits", instance.series);
                return Some(instance);
            }
            Err(AddError::Volume(error)) => Some(Rejection::new(crate::study::RejectionCode::TooLarge, error.to_string())),
            Err(AddError::Rejected(rejection)) => Some(rejection),
            Ok(added) => {
                self.full_since = None;
                self.added(&instance, added, now);
                None
            }
        };
        if let Some(rejection) = rejection {
            log::warn!("series {}, instance {}: {rejection}", instance.series, instance.sop_instance);
            let sop_instance = instance.sop_instance.clone();
            let members = self.members_of(&instance, now);
            members.instances.push(sop_instance.clone());
            members.unread.push(Unread { sop_instance, rejection });
        }
        None
    }

    fn added(&mut self, instance: &SpooledInstance, added: Added, now: Instant) {
        use crate::series::Arrival;
        if added.arrival == Arrival::Late {
            return log::error!("series {}: instance {} came when the series was complete", added.series, instance.sop_instance);
        }
        // Of a finished series: it must not look as if that grew again.
        if added.arrival == Arrival::Duplicate && !self.members.contains_key(&added.series) {
            return;
        }
        let early = self.early.clone();
        let members = self.members_of(instance, now);
        members.last = now;
        if !members.instances.contains(&instance.sop_instance) {
            members.instances.push(instance.sop_instance.clone());
        }
        let Some(reader) = added.reader.filter(|_| added.modality == Modality::Ct) else { return };
        for (n, frame) in added.frames.iter().enumerate() {
            let Some(place_mm) = frame.along_normal_mm else { continue };
            let wanted = wants_early(&reader.affine(), place_mm, &members.places_mm);
            members.places_mm.push(place_mm);
            let slice = EarlySlice {
                series: added.series.clone(),
                image: (instance.sop_instance.clone(), n + 1),
                reader: reader.clone(),
                slot: frame.slot,
            };
            // A slice too many for the moment is segmented later, with its exam.
            if wanted && let Err(TrySendError::Disconnected(_)) = early.try_send(slice) {
                return;
            }
        }
    }

    fn members_of(&mut self, instance: &SpooledInstance, now: Instant) -> &mut Members {
        self.members.entry(instance.series.clone()).or_insert_with(|| Members {
            study: instance.study.clone(),
            modality: instance.modality,
            instances: Vec::new(),
            unread: Vec::new(),
            places_mm: Vec::new(),
            source: instance.source,
            opened: now,
            last: now,
        })
    }

    /// Lets time pass; timers are looked at only when nothing that has come waits to be taken.
    fn tick(&mut self, now: Instant, timers: bool, hearts: &Hearts) {
        if self.retry_at.is_some_and(|at| now >= at) {
            self.retry_at = None;
            for arrival in std::mem::take(&mut self.waiting) {
                self.take(arrival, now);
            }
        }
        if timers {
            self.assembler.tick(now);
        }
        for series in self.assembler.take_finished() {
            (self.finished)(&series.series);
            let part = match self.members.remove(&series.series) {
                Some(m) => Part { series, instances: m.instances, unread: m.unread, source: Some(m.source) },
                None => Part { series, instances: Vec::new(), unread: Vec::new(), source: None },
            };
            self.finished(part, now, hearts);
        }
        let patience = self.patience;
        self.close_unread(now, |members| timers && now.saturating_duration_since(members.last) >= patience);
        let over = |line: &Self, g: &Gathering| line.is_gathered(g, now);
        while let Some(n) = self.gatherings.iter().position(|g| over(self, g)) {
            let gathering = self.gatherings.remove(n);
            self.send(Job(gathering.parts), hearts);
        }
        self.tell(now);
    }

    /// Says what is underway, not more often than anybody would look.
    fn tell(&mut self, now: Instant) {
        if self.told.is_some_and(|told| now.saturating_duration_since(told) < TICK) {
            return;
        }
        self.told = Some(now);
        let gathering = self.gatherings.iter().map(|g| (g.study.clone(), g.parts.len(), self.time_left(g, now).as_secs()));
        let underway = Underway {
            growing: self.assembler.growing().map(|(series, images)| (series.clone(), images)).collect(),
            gathering: gathering.collect(),
        };
        *locked(&self.underway) = underway;
    }

    /// A finished series goes to its exam, or waits for the others of its study.
    fn finished(&mut self, part: Part, now: Instant, hearts: &Hearts) {
        if !(self.studies.gathers)(part.series.modality) {
            return self.send(Job(vec![part]), hearts);
        }
        let study = part.series.study.clone();
        match self.gatherings.iter_mut().find(|g| g.study == study && g.parts.len() < GATHERED_MAX) {
            Some(gathering) => {
                gathering.parts.push(part);
                gathering.last = now;
                gathering.whole = (self.studies.whole)(&gathering.parts.iter().map(|part| &part.series).collect::<Vec<_>>());
            }
            None => {
                self.gatherings.push(Gathering { study, parts: vec![part], last: now, whole: false });
                if self.gatherings.len() > GATHERINGS_MAX {
                    let oldest = self.gatherings.remove(0);
                    self.send(Job(oldest.parts), hearts);
                }
            }
        }
    }

    /// A study is together when none of its series grows, and nothing more is to be waited for.
    fn is_gathered(&self, gathering: &Gathering, now: Instant) -> bool {
        !self.members.values().any(|members| members.study == gathering.study) && self.time_left(gathering, now).is_zero()
    }

    /// How long a study still waits for more of its series. With all that its exam can use: until the one sender of all has gone in
    /// good order, or as long as a series is waited for, since a sender may use one association for each series. Else until nothing
    /// came for as long as the longest sequence takes.
    fn time_left(&self, gathering: &Gathering, now: Instant) -> Duration {
        let quiet = now.saturating_duration_since(gathering.last);
        let first = gathering.parts[0].source;
        let gone = |part: &Part| part.source == first && part.source.is_some_and(|source| self.released.contains(&source));
        let wait = if !gathering.whole {
            self.studies.patience
        } else if gathering.parts.iter().all(gone) {
            Duration::ZERO
        } else {
            self.patience
        };
        wait.saturating_sub(quiet)
    }

    /// A series of which nothing could be read grows nowhere; it ends here.
    fn close_unread(&mut self, now: Instant, over: impl Fn(&Members) -> bool) {
        let growing: Vec<Uid> = self.assembler.growing().map(|(series, _)| series.clone()).collect();
        // One that has just finished is not growing either: it is not ours to end, and its members are still needed.
        let closed = |series: &Uid, members: &Members| {
            !growing.contains(series) && members.unread.len() == members.instances.len() && over(members)
        };
        let ending: Vec<Uid> = self.members.iter().filter(|(s, m)| closed(s, m)).map(|(s, _)| s.clone()).collect();
        for uid in ending {
            let Some(members) = self.members.remove(&uid) else { continue };
            let Some(first) = members.unread.first() else { continue };
            let series = SeriesOutcome {
                series: uid,
                study: members.study,
                modality: members.modality,
                instances: members.instances.len(),
                opened: members.opened,
                last: now,
                mr: None,
                result: Err(first.rejection.clone()),
            };
            let source = Some(members.source);
            let part = Part { series, instances: members.instances, unread: members.unread, source };
            self.finished(part, now, &Hearts::default());
        }
    }

    /// Blocks while the exams are busy: the channel behind us fills, and the senders wait.
    fn send(&mut self, job: Job, hearts: &Hearts) {
        hearts.rest("series");
        let begun = Instant::now();
        if self.jobs.send(job).is_err() {
            log::error!("no thread takes finished series any more");
        }
        self.blocked += begun.elapsed();
    }
}

/// Arrivals that may wait for room. They are on disk and cost a few hundred bytes each here.
const WAITING_MAX: usize = 10_000;

/// How long after a refusal for want of room it is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

fn source_of(arrival: &Arrival) -> Option<SourceId> {
    match arrival {
        Arrival::Instance(instance) => Some(instance.source),
        Arrival::Released(source) | Arrival::Lost(source) | Arrival::Conflict { source, .. } => Some(*source),
    }
}
