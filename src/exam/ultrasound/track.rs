//! Lesions through time: which one in this frame is which one of the frames before.
//!
//! A track is predicted from its own speed and, while it is hidden, from how the others move, since a hand moves all tissue
//! alike. Detections are assigned to tracks so that the sum of costs is least (Kuhn 1955); equal costs go to the elder
//! track. Nothing depends on time or threads, so the same frames give the same identities.

use super::outline::Outline;

/// Detections of one frame that are looked at, the most certain first. Nobody reads more.
pub const DETECTIONS_MAX: usize = 16;

/// Tracks that may be found again at one moment. Beyond it those seen least go.
const TRACKS_MAX: usize = 32;

/// Finished tracks that are kept for the report; the weakest go, so that a stream of a day needs no more memory than one
/// of a minute.
const KEPT_MAX: usize = 200;

/// Frames a lesion may be out of sight and still be itself: three seconds at thirty frames a second. Rocking the
/// transducer takes it out of the plane for about one.
const HIDDEN_MAX: usize = 90;

/// Frames a lesion must have been seen in to be found again where it is not quite expected.
const KNOWN_MIN: usize = 3;

/// Share of a new outline in the smoothed one.
const SMOOTHING: f32 = 0.35;

/// Logarithm of the ratio of areas up to which two outlines can be one lesion's.
const CHANGE_MAX: f64 = 2.2;

/// What the network saw in one frame.
#[derive(Debug, Clone)]
pub struct Detection {
    /// Its outline.
    pub outline: Outline,
    /// 0 to 1.
    pub confidence: f64,
}

/// The frame in which a lesion shows best.
#[derive(Debug, Clone)]
pub struct Best {
    /// Its number.
    pub frame: usize,
    /// The smoothed outline there.
    pub outline: Outline,
    score: f64,
}

/// One lesion.
#[derive(Debug, Clone)]
pub struct Track {
    /// 1 for the first of the stream; never used twice.
    pub id: u32,
    /// First frame it was seen in.
    pub first_frame: usize,
    /// Last frame it was seen in.
    pub last_frame: usize,
    /// Frames it was seen in.
    pub seen: usize,
    /// The smoothed outline, at its place in the last frame it was seen in.
    pub outline: Outline,
    /// Where it is looked for next.
    expected: [f64; 2],
    speed: [f64; 2],
    /// Frames since it was seen.
    hidden: usize,
    confidence_sum: f64,
    /// Its best frame.
    pub best: Best,
}

impl Track {
    /// Mean over the frames it was seen in.
    pub fn confidence(&self) -> f64 {
        self.confidence_sum / self.seen as f64
    }

    /// Whether it was seen in the newest frame.
    pub fn is_visible(&self) -> bool {
        self.hidden == 0
    }

    fn new(id: u32, frame: usize, detection: &Detection) -> Self {
        let outline = detection.outline.clone();
        let best = Best { frame, outline: outline.clone(), score: score(detection.confidence, &outline) };
        Self {
            id,
            first_frame: frame,
            last_frame: frame,
            seen: 1,
            expected: outline.centre,
            outline,
            speed: [0.0; 2],
            hidden: 0,
            confidence_sum: detection.confidence,
            best,
        }
    }

    fn take(&mut self, frame: usize, detection: &Detection) {
        let steps = (self.hidden + 1) as f64;
        let before = self.outline.centre;
        for axis in 0..2 {
            let moved = (detection.outline.centre[axis] - before[axis]) / steps;
            self.speed[axis] += 0.4 * (moved - self.speed[axis]);
        }
        self.outline.follow(&detection.outline, SMOOTHING);
        self.last_frame = frame;
        self.seen += 1;
        self.hidden = 0;
        self.confidence_sum += detection.confidence;
        let score = score(detection.confidence, &self.outline);
        if score > self.best.score {
            self.best = Best { frame, outline: self.outline.clone(), score };
        }
        self.expected = [0, 1].map(|axis| self.outline.centre[axis] + self.speed[axis]);
    }

    /// Takes a detection after the hand moved in a way that nothing in view has shown.
    fn take_again(&mut self, frame: usize, detection: &Detection) {
        self.take(frame, detection);
        self.speed = [0.0; 2];
        self.expected = self.outline.centre;
    }

    fn miss(&mut self, common: [f64; 2]) {
        self.hidden += 1;
        for (axis, common) in common.into_iter().enumerate() {
            // Its own speed is trusted less the longer it is out of sight; the tissue's goes on.
            self.speed[axis] *= 0.85;
            self.expected[axis] += common;
        }
    }

    /// Whether a place lies within it, where it is now.
    fn covers(&self, place: [f64; 2]) -> bool {
        let moved = |axis: usize| if self.is_visible() { 0.0 } else { self.expected[axis] - self.outline.centre[axis] };
        self.outline.holds(place[0] - moved(0), place[1] - moved(1))
    }

    /// What it costs to take this detection for this lesion; None when it cannot be.
    fn cost(&self, detection: &Detection, field: f64) -> Option<f64> {
        let (own, other) = (self.outline.area().max(1e-9), detection.outline.area().max(1e-9));
        let change = libm::log(own / other).abs();
        // Rocking cuts a ball at another height: it looks smaller, not another.
        if change > CHANGE_MAX {
            return None;
        }
        let distance = self.distance(detection, own.max(other), field, [0.6, 0.03, 0.02]);
        // Where two may be meant, it is the one that has been there longer.
        let youth = 0.5 / (1.0 + self.seen as f64 / 10.0);
        (distance <= 1.0).then_some(distance + 0.25 * change + youth)
    }

    /// How far it is from where it is looked for, 1 at the gate: so many diameters of the larger one or parts of the field, more
    /// for each frame hidden.
    fn distance(&self, detection: &Detection, area: f64, field: f64, [diameters, parts, growth]: [f64; 3]) -> f64 {
        let [dx, dy] = [0, 1].map(|axis| detection.outline.centre[axis] - self.expected[axis]);
        let diameter = 2.0 * (area / std::f64::consts::PI).sqrt();
        let gate = (diameters * diameter).max(parts * field) * (1.0 + growth * self.hidden.min(50) as f64);
        libm::hypot(dx, dy) / gate.max(1e-9)
    }
}

/// Sure and large is best: the plane through the middle of a lesion.
fn score(confidence: f64, outline: &Outline) -> f64 {
    confidence * outline.area().sqrt()
}

/// All lesions of one stream.
#[derive(Debug, Default)]
pub struct Tracker {
    active: Vec<Track>,
    finished: Vec<Track>,
    next: u32,
}

impl Tracker {
    /// A tracker whose first lesion has this number.
    pub fn starting_at(id: u32) -> Self {
        Self { next: id, ..Self::default() }
    }

    /// The number of the next new lesion.
    pub fn next_id(&self) -> u32 {
        self.next
    }

    /// Takes the detections of a frame. `skipped` frames before it were not analysed; `field` is the diagonal of the
    /// field. Tracks seen in this frame are [`Track::is_visible`] afterwards.
    pub fn step(&mut self, frame: usize, skipped: usize, detections: &[Detection], field: f64) {
        for _ in 0..skipped.min(HIDDEN_MAX) {
            let common = self.common(|track| track.is_visible().then_some(track.speed));
            self.active.iter_mut().for_each(|track| track.miss(common));
        }
        let detections = &detections[..detections.len().min(DETECTIONS_MAX)];
        let costs: Vec<Vec<Option<f64>>> =
            self.active.iter().map(|track| detections.iter().map(|d| track.cost(d, field)).collect()).collect();
        let assigned = assign(&costs, detections.len());
        let moves: Vec<Option<[f64; 2]>> = self.active.iter().zip(&assigned).map(|(track, to)| {
            let centre = detections[(*to)?].outline.centre;
            track.is_visible().then(|| [0, 1].map(|axis| centre[axis] - track.outline.centre[axis]))
        }).collect();
        let mut moved = moves.iter().copied();
        let common = self.common(|_| moved.next().flatten());
        let mut taken = vec![false; detections.len()];
        for (track, to) in self.active.iter_mut().zip(assigned) {
            match to {
                Some(n) => {
                    taken[n] = true;
                    track.take(frame, &detections[n]);
                }
                None => track.miss(common),
            }
        }
        for (detection, _) in detections.iter().zip(taken).filter(|(_, taken)| !taken) {
            // What lies within a lesion that is followed already is a piece of it.
            if self.active.iter().any(|track| track.covers(detection.outline.centre)) {
                continue;
            }
            // While a lesion is out of sight the hand may move unseen: the nearest one that is missed has come back.
            let missed = self.active.iter_mut().filter(|track| !track.is_visible() && track.seen >= KNOWN_MIN);
            let nearest = missed
                .map(|track| {
                    let area = track.outline.area().max(detection.outline.area());
                    (track.distance(detection, area, field, [1.2, 0.06, 0.03]), track)
                })
                .filter(|(distance, _)| *distance <= 1.0)
                .min_by(|(a, _), (b, _)| a.total_cmp(b));
            if let Some((_, track)) = nearest {
                track.take_again(frame, detection);
                continue;
            }
            self.active.push(Track::new(self.next, frame, detection));
            self.next += 1;
        }
        self.retire();
    }

    /// The middle of what `of` gives for each track; nothing moves where there is none.
    fn common(&self, of: impl FnMut(&Track) -> Option<[f64; 2]>) -> [f64; 2] {
        let known: Vec<[f64; 2]> = self.active.iter().filter_map(of).collect();
        [0, 1].map(|axis| {
            let mut values: Vec<f64> = known.iter().map(|v| v[axis]).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(0.0)
        })
    }

    fn retire(&mut self) {
        // One flicker is forgotten soon: it would only catch what is not its own.
        let over = |track: &Track| track.hidden > HIDDEN_MAX.min(10 * track.seen);
        let (gone, active): (Vec<Track>, Vec<Track>) = std::mem::take(&mut self.active).into_iter().partition(over);
        self.active = active;
        self.finished.extend(gone);
        while self.active.len() > TRACKS_MAX {
            let weakest = self.active.iter().enumerate().min_by_key(|(n, track)| (track.seen, std::cmp::Reverse(*n)));
            let Some((n, _)) = weakest else { break };
            self.finished.push(self.active.remove(n));
        }
        if self.finished.len() > 2 * KEPT_MAX {
            // Stable: equal ones keep the order of their identities.
            self.finished.sort_by(|a, b| b.confidence_sum.total_cmp(&a.confidence_sum).then(a.id.cmp(&b.id)));
            self.finished.truncate(KEPT_MAX);
        }
    }

    /// Lesions that are or may come into sight.
    pub fn active(&self) -> &[Track] {
        &self.active
    }

    /// All lesions, in the order of their identities.
    pub fn finish(mut self) -> Vec<Track> {
        self.finished.append(&mut self.active);
        self.finished.sort_by_key(|track| track.id);
        self.finished
    }
}

/// For each row the column it gets, so that as many as can are assigned, at the least sum of costs.
fn assign(costs: &[Vec<Option<f64>>], columns: usize) -> Vec<Option<usize>> {
    /// Dearer than any pair that can be: leaving two apart must never be cheaper.
    const APART: f64 = 1e3;
    let rows = costs.len();
    let n = rows.max(columns);
    let cost = |r: usize, c: usize| match costs.get(r).and_then(|row| row.get(c)) {
        Some(Some(cost)) => *cost,
        _ => APART,
    };
    // Kuhn's method with potentials, rows one by one (Jonker and Volgenant 1987). Index 0 stands for "none yet".
    let (mut of_row, mut of_column) = (vec![0f64; n + 1], vec![0f64; n + 1]);
    let mut row_of = vec![0usize; n + 1];
    for row in 1..=n {
        row_of[0] = row;
        let (mut least, mut from) = (vec![f64::INFINITY; n + 1], vec![0usize; n + 1]);
        let mut visited = vec![false; n + 1];
        let mut at = 0;
        while row_of[at] != 0 {
            visited[at] = true;
            let (r, mut step, mut next) = (row_of[at], f64::INFINITY, 0);
            for c in 1..=n {
                if visited[c] {
                    continue;
                }
                let reduced = cost(r - 1, c - 1) - of_row[r] - of_column[c];
                if reduced < least[c] {
                    (least[c], from[c]) = (reduced, at);
                }
                if least[c] < step {
                    (step, next) = (least[c], c);
                }
            }
            for c in 0..=n {
                if visited[c] {
                    of_row[row_of[c]] += step;
                    of_column[c] -= step;
                } else {
                    least[c] -= step;
                }
            }
            at = next;
        }
        while at != 0 {
            row_of[at] = row_of[from[at]];
            at = from[at];
        }
    }
    let mut out = vec![None; rows];
    for c in 1..=columns {
        let r = row_of[c];
        if (1..=rows).contains(&r) && costs[r - 1][c - 1].is_some() {
            out[r - 1] = Some(c - 1);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::outline::RADII;
    use super::*;

    fn disc(x: f64, y: f64, r: f32) -> Detection {
        Detection { outline: Outline { centre: [x, y], radii: [r; RADII] }, confidence: 0.9 }
    }

    #[test]
    fn the_least_sum_wins_over_the_nearest_first() {
        // The first row's favourite is the second's only choice.
        assert_eq!(assign(&[vec![Some(0.1), Some(0.3)], vec![Some(0.2), None]], 2), [Some(1), Some(0)]);
        assert_eq!(assign(&[vec![None, None], vec![Some(0.2), None]], 2), [None, Some(0)]);
        assert_eq!(assign(&[], 2), Vec::<Option<usize>>::new());
        assert_eq!(assign(&[vec![], vec![]], 0), [None, None]);
    }

    #[test]
    fn a_piece_of_a_lesion_is_no_second_lesion() {
        let mut tracker = Tracker::starting_at(1);
        tracker.step(0, 0, &[disc(50.0, 50.0, 12.0)], 300.0);
        tracker.step(1, 0, &[disc(49.0, 50.0, 11.0), disc(57.0, 50.0, 2.0), disc(80.0, 50.0, 2.0)], 300.0);
        let places: Vec<_> = tracker.finish().iter().map(|t| (t.id, t.outline.centre[0])).collect();
        assert_eq!(places, [(1, 49.0), (2, 80.0)]);
    }

    #[test]
    fn two_lesions_that_drift_together_keep_their_names_through_a_dropout() {
        let mut tracker = Tracker::starting_at(1);
        for frame in 0..200usize {
            let x = 40.0 + 0.4 * frame as f64;
            // The first is out of the plane for a second; the second shows where the tissue goes.
            let mut seen = vec![disc(x + 30.0, 50.0, 6.0)];
            if !(80..110).contains(&frame) {
                seen.insert(0, disc(x, 40.0, 5.0));
            }
            tracker.step(frame, 0, &seen, 300.0);
        }
        let tracks = tracker.finish();
        assert_eq!(tracks.iter().map(|t| (t.id, t.seen)).collect::<Vec<_>>(), [(1, 170), (2, 200)]);
        assert_eq!((tracks[0].first_frame, tracks[0].last_frame), (0, 199));
    }

    #[test]
    fn a_lesion_alone_in_view_is_found_again_where_the_hand_has_taken_it_and_another_far_off_is_another() {
        let mut tracker = Tracker::starting_at(1);
        for frame in 0..20usize {
            tracker.step(frame, 0, &[disc(50.0, 50.0, 6.0)], 300.0);
        }
        for frame in 20..45usize {
            tracker.step(frame, 0, &[], 300.0);
        }
        tracker.step(45, 0, &[disc(66.0, 58.0, 6.0), disc(150.0, 50.0, 6.0)], 300.0);
        assert_eq!(tracker.finish().iter().map(|t| (t.id, t.seen)).collect::<Vec<_>>(), [(1, 21), (2, 1)]);
    }

    #[test]
    fn frames_that_were_dropped_do_not_break_a_track() {
        let mut tracker = Tracker::starting_at(1);
        for frame in (0..120usize).step_by(6) {
            tracker.step(frame, if frame == 0 { 0 } else { 5 }, &[disc(50.0 + frame as f64, 40.0, 5.0)], 300.0);
        }
        assert_eq!(tracker.finish().len(), 1);
    }

    #[test]
    fn the_best_frame_is_the_one_with_the_largest_cut() {
        let mut tracker = Tracker::starting_at(1);
        for frame in 0..41usize {
            let height = (frame as f32 - 20.0) / 25.0;
            tracker.step(frame, 0, &[disc(50.0, 40.0, 8.0 * (1.0 - height * height).sqrt())], 300.0);
        }
        let tracks = tracker.finish();
        assert!(tracks[0].best.frame.abs_diff(22) <= 3, "{}", tracks[0].best.frame);
    }

    #[test]
    fn a_day_of_flicker_needs_no_more_memory_than_a_minute() {
        let mut tracker = Tracker::starting_at(1);
        for frame in 0..20_000usize {
            let place = (frame * 7919 % 250) as f64;
            tracker.step(frame, 0, &[disc(place, 250.0 - place, 3.0)], 300.0);
        }
        assert!(tracker.active().len() <= TRACKS_MAX && tracker.finish().len() <= 2 * KEPT_MAX + TRACKS_MAX);
    }
}
