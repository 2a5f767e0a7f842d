//! A pair of links in memory, worse than any cable: short reads and writes, lost and spoilt bytes, a plug that comes out.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Link, lost};

/// Bytes under way in one direction; a pseudo-terminal holds as many.
const CAPACITY_BYTES: usize = 4096;

/// How bad the cable is. The same seed and the same calls give the same weather.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weather {
    /// Of the random numbers.
    pub seed: u64,
    /// Bytes of a million that vanish.
    pub lost_per_million: u32,
    /// Bytes of a million that arrive as another byte.
    pub spoilt_per_million: u32,
    /// Calls give and take fewer bytes than they could.
    pub short: bool,
}

impl Weather {
    /// A perfect line.
    pub fn clear(seed: u64) -> Self {
        Self { seed, lost_per_million: 0, spoilt_per_million: 0, short: false }
    }

    /// One byte in five hundred lost, one in five hundred spoilt: half of all long frames arrive broken.
    pub fn storm(seed: u64) -> Self {
        Self { seed, lost_per_million: 2000, spoilt_per_million: 2000, short: true }
    }
}

/// One end of the pair.
#[derive(Debug)]
pub struct MemoryLink {
    shared: Arc<Shared>,
    /// Which of the two directions this end writes to.
    side: usize,
    /// The plugging this end belongs to: after the plug was pulled it is of no use, as with a real device.
    plugging: u64,
}

/// The hand on the plug.
#[derive(Debug, Clone)]
pub struct Cable(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    wire: Mutex<Wire>,
    change: Condvar,
}

#[derive(Debug)]
struct Wire {
    weather: Weather,
    state: u64,
    plugged: bool,
    plugging: u64,
    under_way: [VecDeque<u8>; 2],
}

/// Two links that are the ends of one cable, and the cable.
pub fn memory_pair(weather: Weather) -> (MemoryLink, MemoryLink, Cable) {
    let under_way = [VecDeque::new(), VecDeque::new()];
    let wire = Wire { weather, state: weather.seed, plugged: true, plugging: 0, under_way };
    let cable = Cable(Arc::new(Shared { wire: Mutex::new(wire), change: Condvar::new() }));
    (cable.end(0).expect("the cable is plugged in"), cable.end(1).expect("the cable is plugged in"), cable)
}

impl Cable {
    /// Pulls the plug: what is under way is lost, and both ends are of no more use.
    pub fn unplug(&self) {
        let mut wire = self.0.lock();
        wire.plugged = false;
        wire.under_way.iter_mut().for_each(VecDeque::clear);
        drop(wire);
        self.0.change.notify_all();
    }

    /// Plugs it in again; then [`Cable::end`] gives new ends.
    pub fn plug(&self) {
        let mut wire = self.0.lock();
        wire.plugged = true;
        wire.plugging += 1;
    }

    /// Opens end 0 or 1, as one opens a device again.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] while the plug is out.
    pub fn end(&self, side: usize) -> io::Result<MemoryLink> {
        let wire = self.0.lock();
        if wire.plugged {
            Ok(MemoryLink { shared: self.0.clone(), side: side % 2, plugging: wire.plugging })
        } else {
            Err(io::Error::new(io::ErrorKind::NotFound, "the cable is not plugged in"))
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wire {
    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn happens(&mut self, per_million: u32) -> bool {
        per_million > 0 && self.random() % 1_000_000 < per_million.into()
    }

    /// How many of `possible` bytes this call moves.
    fn share(&mut self, possible: usize) -> usize {
        if self.weather.short && possible > 1 { 1 + (self.random() % possible as u64) as usize } else { possible }
    }
}

impl MemoryLink {
    /// Runs `step` until it moves something, the plug is out, or patience is over.
    fn wait(&self, patience: Duration, mut step: impl FnMut(&mut Wire) -> usize) -> io::Result<usize> {
        let deadline = Instant::now() + patience;
        let mut wire = self.shared.lock();
        loop {
            if !wire.plugged || wire.plugging != self.plugging {
                return Err(lost());
            }
            let moved = step(&mut wire);
            let left = deadline.saturating_duration_since(Instant::now());
            if moved > 0 || left.is_zero() {
                drop(wire);
                self.shared.change.notify_all();
                return Ok(moved);
            }
            wire = self.shared.change.wait_timeout(wire, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Link for MemoryLink {
    fn read(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<usize> {
        self.wait(patience, |wire| {
            let there = wire.under_way[1 - self.side].len().min(buffer.len());
            let count = wire.share(there);
            for (place, byte) in buffer.iter_mut().zip(wire.under_way[1 - self.side].drain(..count)) {
                *place = byte;
            }
            count
        })
    }

    fn write(&mut self, bytes: &[u8], patience: Duration) -> io::Result<usize> {
        self.wait(patience, |wire| {
            let room = CAPACITY_BYTES - wire.under_way[self.side].len();
            let count = wire.share(bytes.len().min(room));
            for &byte in &bytes[..count] {
                if wire.happens(wire.weather.lost_per_million) {
                    continue;
                }
                let spoilt = if wire.happens(wire.weather.spoilt_per_million) { wire.random() as u8 } else { byte };
                wire.under_way[self.side].push_back(spoilt);
            }
            count
        })
    }
}
