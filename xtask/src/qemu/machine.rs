//! One emulated board: QEMU, its console read line by line, its monitor, and the far end of its serial line.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::image::Image;
use crate::{Made, Outcome};

/// A busy host starts QEMU slowly.
const ORDER_PATIENCE: Duration = Duration::from_secs(120);

/// What stays the same when a machine is switched off and on again: its disk, its address, its end of the cable.
pub struct Bench {
    /// Everything lies below it.
    pub folder: PathBuf,
    /// The machine's disk.
    pub disk: PathBuf,
    /// Port of this host that leads to the DICOM door.
    pub port: u16,
    /// A name for the far end of the serial line; there only while the machine runs.
    pub line: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// How a machine is switched on.
pub struct Power<'a> {
    /// QEMU's name of the processor.
    pub cpu: &'a str,
    /// How many.
    pub cores: u32,
    /// Fitted memory.
    pub memory_mib: u32,
    /// One guest instruction is one guest nanosecond: slower, and exact.
    pub counted: bool,
    /// Added to the kernel's command line.
    pub words: &'a str,
}

impl Default for Power<'_> {
    fn default() -> Self {
        Self { cpu: "cortex-a76", cores: 2, memory_mib: 1024, counted: false, words: "" }
    }
}

impl Bench {
    /// A new machine with a fresh copy of the image's disk.
    pub fn new(folder: &Path, image: &Image) -> Made<Self> {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder)?;
        let disk = folder.join("disk.img");
        crate::image::run(Command::new("cp").arg("--sparse=always").arg(&image.disk).arg(&disk))?;
        // Below those that the system hands out: nobody gets it while the machine is off.
        let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
        let port = (20_000 + (std::process::id() % 8_000) as u16..32_000).find(free).ok_or("no port is free")?;
        Ok(Self {
            folder: folder.to_owned(),
            disk,
            port,
            line: folder.join("line"),
            kernel: image.kernel.clone(),
            initramfs: image.initramfs.clone(),
        })
    }

    /// `127.0.0.1:PORT`, the machine's DICOM door.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Switches it on.
    pub fn start(&self, power: &Power) -> Made<Machine> {
        let monitor = self.folder.join("monitor");
        let _ = fs::remove_file(&monitor);
        let mut qemu = super::ends_with_us("qemu-system-aarch64");
        qemu.args(["-M", "virt", "-cpu", power.cpu, "-m", &format!("{}M", power.memory_mib)]);
        qemu.args(["-smp", &power.cores.to_string(), "-nodefaults", "-display", "none"]);
        if power.counted {
            qemu.args(["-icount", "shift=0"]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi"]);
        }
        qemu.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initramfs);
        // Louder, the kernel would write into the lines that are waited for.
        qemu.args(["-append", &format!("console=ttyAMA0 quiet loglevel=3 panic=1 {}", power.words)]);
        qemu.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
        qemu.args(["-chardev", "pty,id=line", "-device", "pci-serial,chardev=line"]);
        qemu.arg("-monitor").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        qemu.arg("-drive").arg(format!("file={},if=none,id=disk,format=raw", self.disk.display()));
        qemu.args(["-device", "virtio-blk-pci,drive=disk"]);
        qemu.args(["-netdev", &format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{}-:11112", self.port)]);
        qemu.args(["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "qemu-xhci,id=usb"]);
        qemu.args(["-device", "i6300esb", "-action", "watchdog=reset"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = qemu.spawn().map_err(|e| format!("qemu-system-aarch64: {e}; `cargo xtask setup` installs it"))?;
        let console = Arc::new(Console::default());
        let log = Arc::new(Mutex::new(File::options().create(true).append(true).open(self.folder.join("console.log"))?));
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().expect("it is piped")), Box::new(child.stderr.take().expect("it is piped"))];
        for output in outputs {
            let (console, log) = (Arc::clone(&console), Arc::clone(&log));
            std::thread::spawn(move || console.follow(output, &log));
        }
        let mut machine = Machine { child, console, read: 0, monitor, line: self.line.clone() };
        machine.name_the_line()?;
        Ok(machine)
    }
}

/// A machine that runs; dropping it cuts its power.
pub struct Machine {
    child: Child,
    console: Arc<Console>,
    /// Lines of the console that were waited for.
    read: usize,
    monitor: PathBuf,
    line: PathBuf,
}

impl Machine {
    /// Cuts the power: whatever the guest had not written to its disk is gone.
    pub fn cut(mut self) {
        self.switch_off();
    }

    fn switch_off(&mut self) {
        // First the name: a pseudo-terminal's number may be somebody else's a moment after QEMU has gone.
        let _ = fs::remove_file(&self.line);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for a line of the console that holds `what`, behind the one waited for last.
    ///
    /// # Errors
    /// None comes within the time, or the machine ends; the last lines are told.
    pub fn wait(&mut self, what: &str, patience: Duration) -> Made<String> {
        let until = Instant::now() + patience;
        let mut lines = self.console.lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(at) = lines.text[self.read..].iter().position(|line| line.contains(what)) {
                self.read += at + 1;
                return Ok(lines.text[self.read - 1].clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || lines.ended == 2 {
                let last = lines.text[lines.text.len().saturating_sub(12)..].join("\n    ");
                let why = if left.is_zero() { "did not come in time" } else { "did not come before the machine ended" };
                return Err(format!("{what:?} {why}; the console's end:\n    {last}").into());
            }
            lines = self.console.more.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What is waited for next must come after now.
    pub fn wait_from_now(&mut self) {
        self.read = self.lines().len();
    }

    /// All lines of the console so far.
    pub fn lines(&self) -> Vec<String> {
        self.console.lines.lock().unwrap_or_else(PoisonError::into_inner).text.clone()
    }

    /// Gives QEMU an order; its answer.
    pub fn order(&self, order: &str) -> Made<String> {
        let until = Instant::now() + ORDER_PATIENCE;
        let mut monitor = loop {
            match UnixStream::connect(&self.monitor) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until => return Err(format!("QEMU's monitor: {error}").into()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        monitor.set_read_timeout(Some(ORDER_PATIENCE))?;
        monitor.write_all(format!("{order}\n").as_bytes())?;
        // The prompt stands once before the order, which is echoed, and once after the answer.
        let (mut answer, mut bytes) = (Vec::new(), [0; 1024]);
        while String::from_utf8_lossy(&answer).matches("(qemu) ").count() < 2 {
            let got = monitor.read(&mut bytes)?;
            if got == 0 {
                break;
            }
            answer.extend_from_slice(&bytes[..got]);
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Puts in a stick.
    pub fn plug(&self, stick: &Path, name: &str) -> Outcome {
        self.order(&format!("drive_add 0 if=none,id={name},format=raw,readonly=on,file={}", stick.display()))?;
        self.order(&format!("device_add usb-storage,bus=usb.0,id={name}-usb,drive={name}"))?;
        Ok(())
    }

    /// Pulls it out.
    pub fn unplug(&self, name: &str) -> Outcome {
        self.order(&format!("device_del {name}-usb"))?;
        Ok(())
    }

    fn name_the_line(&mut self) -> Outcome {
        let answer = self.order("info chardev").map_err(|e| format!("{e}\n{}", self.lines().join("\n")))?;
        let device = answer.lines().find_map(|line| line.trim().strip_prefix("line: filename=pty:"));
        let device = device.ok_or_else(|| format!("QEMU names no pseudo-terminal: {answer}"))?;
        let _ = fs::remove_file(&self.line);
        Ok(std::os::unix::fs::symlink(device.trim(), &self.line)?)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.switch_off();
    }
}

#[derive(Default)]
struct Console {
    lines: Mutex<Lines>,
    more: Condvar,
}

#[derive(Default)]
struct Lines {
    text: Vec<String>,
    /// Of the two outputs that are followed.
    ended: u32,
}

impl Console {
    fn follow(&self, output: impl Read, log: &Mutex<File>) {
        let mut reader = BufReader::new(output);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|got| got > 0) {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            bytes.clear();
            let _ = writeln!(log.lock().unwrap_or_else(PoisonError::into_inner), "{line}");
            self.lines.lock().unwrap_or_else(PoisonError::into_inner).text.push(line);
            self.more.notify_all();
        }
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).ended += 1;
        self.more.notify_all();
    }
}
