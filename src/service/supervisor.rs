//! Word to systemd, and the proof of life it is given: `READY=1`, `WATCHDOG=1`, `STOPPING=1` (sd_notify(3)); and food for
//! the board's own watchdog where there is no systemd to give it.

use std::fs::File;
use std::io::{self, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The service's threads beat here; the watchdog is fed only while every heart beats.
///
/// A thread that works on something long beats between its steps. One that has nothing to do rests: waiting for work
/// is no hang.
#[derive(Debug, Default)]
pub struct Hearts {
    beats: Mutex<Vec<(&'static str, Option<Instant>)>>,
}

impl Hearts {
    /// The thread `name` is alive at `now`.
    pub fn beat(&self, name: &'static str, now: Instant) {
        self.set(name, Some(now));
    }

    /// The thread `name` waits for work, and may do so for ever.
    pub fn rest(&self, name: &'static str) {
        self.set(name, None);
    }

    fn set(&self, name: &'static str, beat: Option<Instant>) {
        let mut beats = self.beats.lock().expect("no code panics under this lock");
        match beats.iter_mut().find(|(other, _)| *other == name) {
            Some(entry) => entry.1 = beat,
            None => beats.push((name, beat)),
        }
    }

    /// The first thread that works and has not beaten for `limit`.
    pub fn stalled(&self, now: Instant, limit: Duration) -> Option<&'static str> {
        let beats = self.beats.lock().expect("no code panics under this lock");
        let late = |beat: Instant| now.saturating_duration_since(beat) > limit;
        beats.iter().find(|(_, beat)| beat.is_some_and(late)).map(|(name, _)| *name)
    }
}

/// The line to systemd, when the service was started by it.
#[derive(Debug)]
pub struct Systemd {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// How often systemd wants a sign of life, already halved as it advises.
    pub watchdog_every: Option<Duration>,
}

impl Systemd {
    /// Reads `NOTIFY_SOCKET` and `WATCHDOG_USEC`; without them every word goes nowhere.
    pub fn from_environment() -> Self {
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|name| {
            let name = name.as_bytes();
            let address = match name.strip_prefix(b"@") {
                Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name),
                None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name)),
            };
            Some((UnixDatagram::unbound().ok()?, address.ok()?))
        });
        let micros: Option<u64> = std::env::var("WATCHDOG_USEC").ok().and_then(|v| v.parse().ok());
        Self { socket, watchdog_every: micros.filter(|m| *m > 0).map(|m| Duration::from_micros(m / 2)) }
    }

    /// Says one word; a systemd that does not listen is no reason to stop.
    pub fn say(&self, word: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(word.as_bytes(), address)
        {
            log::debug!("sd_notify {word}: {error}");
        }
    }
}

/// The board's hardware watchdog (the kernel's `watchdog-api`): it resets the board when nobody has fed it for a while.
///
/// Only its driver can set how long that is (a module parameter, such as `i6300esb.heartbeat=30`): the call that could
/// do it from here would be `unsafe`. A driver that is set shorter than the settings say is fed oftener.
#[derive(Debug)]
pub struct Watchdog {
    device: File,
    /// How often it is to be fed.
    pub every: Duration,
}

impl Watchdog {
    /// Opens the device; from then on it has to be fed, by this or by nobody.
    ///
    /// # Errors
    /// The system's; in particular when another process feeds it already.
    pub fn open(path: &Path, timeout_s: u32) -> io::Result<Self> {
        let device = File::options().write(true).open(path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = if name == "watchdog" { "watchdog0" } else { &name };
        let set = std::fs::read_to_string(format!("/sys/class/watchdog/{name}/timeout"));
        let set_s: u32 = set.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(timeout_s);
        if set_s != timeout_s {
            log::warn!("{}: its driver is set to {set_s} s, watchdog.timeout_s says {timeout_s}", path.display());
        }
        let mut watchdog = Self { device, every: Duration::from_secs(set_s.clamp(1, timeout_s).into()) / 4 };
        watchdog.feed()?;
        Ok(watchdog)
    }

    /// Puts the reset off.
    ///
    /// # Errors
    /// The system's.
    pub fn feed(&mut self) -> io::Result<()> {
        self.device.write_all(b"\0")
    }

    /// Tells it that nobody will feed it any more, and that this is as it should be. A process that ends without this
    /// word has died, and the board is reset.
    ///
    /// # Errors
    /// The system's.
    pub fn disarm(mut self) -> io::Result<()> {
        self.device.write_all(b"V")
    }
}

/// Peak and present memory of this process in KiB (`VmHWM`, `VmRSS` of proc(5)).
pub fn memory_kib() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    (field("VmHWM:").unwrap_or(0), field("VmRSS:").unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_without_a_beat_is_named_and_one_that_rests_is_not() {
        let (hearts, start, limit) = (Hearts::default(), Instant::now(), Duration::from_secs(10));
        hearts.beat("exam", start);
        hearts.beat("series", start);
        let later = start + Duration::from_secs(11);
        hearts.beat("exam", later);
        assert_eq!(hearts.stalled(later, limit), Some("series"));
        hearts.rest("series");
        assert_eq!(hearts.stalled(later, limit), None);
    }

    #[test]
    fn a_watchdog_is_fed_from_the_first_moment_and_told_before_it_is_left() {
        let device = tempfile::NamedTempFile::new().unwrap();
        let mut watchdog = Watchdog::open(device.path(), 20).unwrap();
        assert_eq!(watchdog.every, Duration::from_secs(5));
        watchdog.feed().unwrap();
        watchdog.disarm().unwrap();
        assert_eq!(std::fs::read(device.path()).unwrap(), b"\0\0V");
    }

    #[test]
    fn peak_memory_is_at_least_the_present_one() {
        let (peak, now) = memory_kib();
        assert!(peak >= now && now > 0);
    }
}
