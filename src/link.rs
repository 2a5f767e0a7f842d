//! Every byte in or out: serial port, pseudo-terminal, Unix socket, and a pair in memory that behaves worse than any cable.
//!
//! A [`Link`] never blocks longer than it is told to. Losing the line is an error and the link is then of no more use:
//! whoever drives it opens another, since a USB adapter that comes back is a new device.

mod memory;

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, OFlags, fcntl_getfl, fcntl_setfl, flock};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{ControlModes, OptionalActions, tcgetattr, tcsetattr};
use serialport::{DataBits, FlowControl, Parity, StopBits};

pub use memory::{Cable, MemoryLink, Weather, memory_pair};

/// A way for bytes, in both directions.
pub trait Link: Send {
    /// Takes what has come, waiting for it at most `patience`; 0 says that nothing came.
    ///
    /// # Errors
    /// The line is lost.
    fn read(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<usize>;

    /// Gives what fits, waiting for room at most `patience`; 0 says that nothing fitted.
    ///
    /// # Errors
    /// The line is lost.
    fn write(&mut self, bytes: &[u8], patience: Duration) -> io::Result<usize>;
}

impl Link for Box<dyn Link> {
    fn read(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<usize> {
        (**self).read(buffer, patience)
    }

    fn write(&mut self, bytes: &[u8], patience: Duration) -> io::Result<usize> {
        (**self).write(bytes, patience)
    }
}

/// A link over a file descriptor of the system.
#[derive(Debug)]
pub struct Descriptor(OwnedFd);

impl Descriptor {
    /// Opens a serial device (or a pseudo-terminal) for raw bytes: 8 data bits, no parity, one stop bit, no flow control.
    ///
    /// # Errors
    /// The system's; [`io::ErrorKind::ResourceBusy`] when another process of ours has it, since two senders on one line
    /// would spoil each other's frames; [`io::ErrorKind::InvalidInput`] when the path is no terminal or knows no such speed.
    pub fn serial(path: &Path, baud: u32) -> io::Result<Self> {
        let refuse = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let name = path.to_str().ok_or_else(|| refuse("the path is not UTF-8"))?;
        // Bytes go through a handle of our own: on the crate's one a write to a full line blocks for as long as it is full.
        // Without NONBLOCK the open itself waits for carrier on some adapters; NOCTTY keeps a line break from being a signal.
        let flags = OFlags::NOCTTY | OFlags::NONBLOCK;
        let file = File::options().read(true).write(true).custom_flags(flags.bits() as i32).open(path)?;
        let lock = |kind| flock(&file, kind).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => io::Error::new(io::ErrorKind::ResourceBusy, "in use by another process"),
            other => other.into(),
        });
        lock(FlockOperation::NonBlockingLockExclusive)?;
        tcgetattr(&file).map_err(|_| refuse("not a serial device"))?;
        // The crate takes a lock too, on a handle of its own, so ours is shared for that moment. Nobody else gets in:
        // whoever tries begins with the exclusive one. TIOCEXCL, which the crate would set otherwise, outlives a killed
        // process for as long as anyone else holds the device; locks do not.
        lock(FlockOperation::NonBlockingLockShared)?;
        let port = serialport::new(name, baud)
            .data_bits(DataBits::Eight)
            .parity(Parity::None)
            .stop_bits(StopBits::One)
            .flow_control(FlowControl::None)
            .exclusive(false)
            .open_native()?;
        drop(port);
        lock(FlockOperation::NonBlockingLockExclusive)?;
        // What the crate leaves alone: the modem lines stay up when we close, as some adapters reset what hangs on them.
        let mut settings = tcgetattr(&file)?;
        settings.control_modes &= !ControlModes::HUPCL;
        tcsetattr(&file, OptionalActions::Now, &settings)?;
        if settings.output_speed().abs_diff(baud) > baud / 20 {
            return Err(refuse("the device does not know this speed"));
        }
        Ok(Self(file.into()))
    }

    /// A connected Unix socket.
    ///
    /// # Errors
    /// The system's.
    pub fn socket(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self(stream.into()))
    }

    /// Waits until the descriptor is ready for `wanted`; whether it is.
    fn ready(&self, wanted: PollFlags, patience: Duration) -> io::Result<bool> {
        let timeout = Timespec { tv_sec: patience.as_secs().min(86_400) as i64, tv_nsec: patience.subsec_nanos().into() };
        let mut descriptors = [PollFd::new(&self.0, wanted)];
        match poll(&mut descriptors, Some(&timeout)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let found = descriptors[0].revents();
        if found.intersects(wanted) {
            Ok(true)
        } else if found.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            Err(lost())
        } else {
            Ok(false)
        }
    }
}

impl Link for Descriptor {
    fn read(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<usize> {
        if buffer.is_empty() || !self.ready(PollFlags::IN, patience)? {
            return Ok(0);
        }
        match rustix::io::read(&self.0, buffer) {
            Ok(0) => Err(lost()),
            Ok(count) => Ok(count),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn write(&mut self, bytes: &[u8], patience: Duration) -> io::Result<usize> {
        if bytes.is_empty() || !self.ready(PollFlags::OUT, patience)? {
            return Ok(0);
        }
        match rustix::io::write(&self.0, bytes) {
            Ok(count) => Ok(count),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}

/// A serial line without hardware: one end is a [`Link`], the other a device path that any program may open.
#[derive(Debug)]
pub struct Pty {
    near: Descriptor,
    path: PathBuf,
    /// Without an open far end the near one reports a lost line whenever the other program is away.
    _far: Descriptor,
}

impl Pty {
    /// A new pair, in raw mode. Dropping it is pulling the plug.
    ///
    /// # Errors
    /// The system's: no `/dev/ptmx`, or no pseudo-terminals left.
    pub fn open() -> io::Result<Self> {
        let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&near)?;
        unlockpt(&near)?;
        let name = ptsname(&near, Vec::new())?.into_string().map_err(io::Error::other)?;
        let path = PathBuf::from(name);
        fcntl_setfl(&near, fcntl_getfl(&near)? | OFlags::NONBLOCK)?;
        let far = Descriptor::serial(&path, BAUD_DEFAULT)?;
        flock(&far.0, FlockOperation::Unlock)?;
        Ok(Self { near: Descriptor(near), path, _far: far })
    }

    /// The device path of the far end.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Link for Pty {
    fn read(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<usize> {
        self.near.read(buffer, patience)
    }

    fn write(&mut self, bytes: &[u8], patience: Duration) -> io::Result<usize> {
        self.near.write(bytes, patience)
    }
}

/// The speed of a serial line unless the configuration says another.
pub const BAUD_DEFAULT: u32 = 115_200;

/// Where a serial line is, so that it can be opened again after it was lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialPort {
    /// The device: `/dev/ttyUSB0`, `/dev/serial/by-id/…`, `/dev/pts/3`, or a link to one.
    pub path: PathBuf,
    /// Bits per second.
    pub baud: u32,
}

impl SerialPort {
    /// The device at the default speed.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), baud: BAUD_DEFAULT }
    }

    /// Opens it.
    ///
    /// # Errors
    /// As [`Descriptor::serial`], and the message names the device.
    pub fn open(&self) -> io::Result<Box<dyn Link>> {
        match Descriptor::serial(&self.path, self.baud) {
            Ok(link) => Ok(Box::new(link)),
            Err(error) => Err(io::Error::new(error.kind(), format!("serial line {}: {error}", self.path.display()))),
        }
    }

    /// Whether something is there that might be opened; no promise that it is a serial device.
    pub fn is_there(&self) -> bool {
        fs::metadata(&self.path).is_ok()
    }
}

fn lost() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the line was lost")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn read_all(link: &mut dyn Link, wanted: usize) -> Vec<u8> {
        let mut out = Vec::new();
        while out.len() < wanted {
            let mut buffer = [0; 700];
            let count = link.read(&mut buffer, SOON).unwrap();
            assert_ne!(count, 0, "nothing came");
            out.extend(&buffer[..count]);
        }
        out
    }

    fn carries_every_byte(from: &mut dyn Link, to: &mut dyn Link) {
        let bytes: Vec<u8> = (0..=255).chain(0..=255).collect();
        let mut sent = 0;
        while sent < bytes.len() {
            sent += from.write(&bytes[sent..], SOON).unwrap();
        }
        assert_eq!(read_all(to, bytes.len()), bytes);
        assert_eq!(to.read(&mut [0; 8], Duration::ZERO).unwrap(), 0);
    }

    fn carries_both_ways(near: &mut dyn Link, far: &mut dyn Link) {
        carries_every_byte(near, far);
        carries_every_byte(far, near);
    }

    #[test]
    fn every_link_carries_every_byte_value_unchanged() {
        let mut pty = Pty::open().unwrap();
        let mut far = SerialPort::new(pty.path()).open().unwrap();
        carries_both_ways(&mut pty, &mut far);
        let (a, b) = UnixStream::pair().unwrap();
        carries_both_ways(&mut Descriptor::socket(a).unwrap(), &mut Descriptor::socket(b).unwrap());
        let (mut a, mut b, _cable) = memory_pair(Weather { short: true, ..Weather::clear(1) });
        carries_both_ways(&mut a, &mut b);
    }

    #[test]
    fn a_full_line_takes_no_more_and_does_not_block() {
        let mut pty = Pty::open().unwrap();
        let (mut near, _far, _cable) = memory_pair(Weather::clear(1));
        let links: [&mut dyn Link; 2] = [&mut pty, &mut near];
        for link in links {
            let mut total = 0;
            while total < 1 << 20 {
                match link.write(&[7; 4096], Duration::ZERO).unwrap() {
                    0 => break,
                    count => total += count,
                }
            }
            assert!(total < 1 << 20, "a line without a reader swallowed a mebibyte");
        }
    }

    #[test]
    fn a_pulled_plug_is_an_error_on_the_far_side_and_a_serial_port_has_one_owner() {
        let pty = Pty::open().unwrap();
        let port = SerialPort::new(pty.path());
        let mut far = port.open().unwrap();
        assert_eq!(port.open().err().map(|e| e.kind()), Some(io::ErrorKind::ResourceBusy));
        drop(pty);
        assert!(far.read(&mut [0; 8], SOON).is_err());
        assert!(far.write(&[1], SOON).is_err());
    }

    #[test]
    fn of_many_who_open_a_line_at_once_never_two_have_it() {
        let pty = Pty::open().unwrap();
        let port = SerialPort::new(pty.path());
        let (owners, opened) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        match port.open() {
                            Ok(link) => {
                                assert_eq!(owners.fetch_add(1, Ordering::SeqCst), 0);
                                std::thread::yield_now();
                                opened.fetch_add(1, Ordering::SeqCst);
                                owners.fetch_sub(1, Ordering::SeqCst);
                                drop(link);
                            }
                            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{error}"),
                        }
                    }
                });
            }
        });
        assert_ne!(opened.into_inner(), 0);
        port.open().unwrap();
    }

    #[test]
    fn a_speed_of_no_standard_is_set_as_asked() {
        let pty = Pty::open().unwrap();
        let far = Descriptor::serial(pty.path(), 250_001).unwrap();
        assert_eq!(tcgetattr(&far.0).unwrap().output_speed(), 250_001);
    }

    #[test]
    fn what_is_no_serial_device_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = SerialPort::new(file.path()).open().err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
        assert!(!SerialPort::new("/dev/there-is-no-such-line").is_there());
    }
}
