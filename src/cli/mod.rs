//! One file per command: its arguments, its progress, what it prints; no algorithm.

use std::fmt::Display;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

pub mod analyze;
pub mod blobs;
pub mod components;
pub mod config;
pub mod convert;
pub mod crop;
pub mod demo;
pub mod eval;
pub mod info;
pub mod mesh;
pub mod model;
pub mod morphology;
pub mod open;
pub mod output;
pub mod phantom;
pub mod preview;
pub mod register;
pub mod resample;
pub mod segment;
pub mod send;
pub mod serve;
pub mod smooth;
pub mod stats;
pub mod status;
mod stream;
pub mod threshold;
pub mod timeseries;
pub mod update;
pub mod values;
pub mod volumes;
pub mod watch;

/// Exit codes beside 1 and 2: those of BSD's sysexits(3), which systemd shows by name.
pub mod exit {
    /// What was given is not sound: an update, a model package.
    pub const DATAERR: u8 = 65;
    /// Something that is needed is not there: a serial port, an address that is taken.
    pub const UNAVAILABLE: u8 = 69;
    /// A fault of ours: a thread has died.
    pub const SOFTWARE: u8 = 70;
    /// A disk or device cannot be read or written.
    pub const IOERR: u8 = 74;
    /// Not now; later it may do.
    pub const TEMPFAIL: u8 = 75;
    /// The configuration is wrong: starting again does not help.
    pub const CONFIG: u8 = 78;
}

/// How a command ends badly: exit code 1, findings (or the output asked for) are impossible; 2, it was asked wrongly.
#[derive(Debug)]
pub enum Failure {
    /// The data or the world would not do: exit code 1.
    Impossible(String),
    /// A wrong argument, a path that is not there: exit code 2.
    Usage(String),
    /// One of the exit codes of [`exit`].
    Because(u8, String),
}

impl Failure {
    /// Exit code 1 with the error and its causes in one sentence.
    pub fn impossible(error: impl Display) -> Self {
        Self::Impossible(error.to_string())
    }

    /// Exit code 2 with a sentence.
    pub fn usage(error: impl Display) -> Self {
        Self::Usage(error.to_string())
    }

    /// One of the exit codes of [`exit`] with a sentence.
    pub fn because(code: u8, error: impl Display) -> Self {
        Self::Because(code, error.to_string())
    }

    /// Prints the sentence to stderr and gives the exit code.
    pub fn report(self) -> ExitCode {
        eprintln!("scanside: {self}");
        ExitCode::from(match self {
            Self::Impossible(_) => 1,
            Self::Usage(_) => 2,
            Self::Because(code, _) => code,
        })
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Impossible(text) | Self::Usage(text) | Self::Because(_, text) => f.write_str(text),
        }
    }
}

/// Prints a result to stdout. A reader that has seen enough and closed the pipe is no failure.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::Impossible(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// Prints a value as one line of JSON.
pub fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string(value).map_err(Failure::impossible)?;
    text.push('\n');
    print(&text)
}

/// A progress bar over named steps; silent unless stderr is a terminal.
pub struct Steps(indicatif::ProgressBar);

impl Steps {
    /// A bar that has nothing to show yet.
    pub fn new() -> Self {
        let bar = indicatif::ProgressBar::no_length().with_style(
            indicatif::ProgressStyle::with_template("{prefix:>9} {bar:40} {pos}/{len} {elapsed}").expect("a fixed template"),
        );
        if !std::io::IsTerminal::is_terminal(&std::io::stderr()) {
            bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        Self(bar)
    }

    /// Shows where we are.
    pub fn show(&self, stage: &str, done: usize, total: usize) {
        if self.0.prefix() != stage {
            self.0.set_prefix(stage.to_owned());
        }
        self.0.set_length(total as u64);
        self.0.set_position(done as u64);
    }

    /// Takes the bar off the screen.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }
}

/// A folder of our own that goes when it is dropped.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// A new folder among the system's temporary ones.
    pub fn new() -> Result<Self, Failure> {
        let base = std::env::temp_dir();
        for n in 0..1000 {
            let folder = base.join(format!("scanside-{}-{n}", std::process::id()));
            match std::fs::create_dir(&folder) {
                Ok(()) => return Ok(Self(folder)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Failure::impossible(format!("cannot make {}: {error}", folder.display()))),
            }
        }
        Err(Failure::impossible(format!("no free name in {}", base.display())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
