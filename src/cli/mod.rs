//! One file per command: its arguments, its progress, what it prints; no algorithm.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

pub mod config;
pub mod model;
pub mod send;

/// How a command ends badly: exit code 1, findings (or the output asked for) are impossible; 2, it was asked wrongly.
#[derive(Debug)]
pub enum Failure {
    /// The data or the world would not do: exit code 1.
    Impossible(String),
    /// A wrong argument, a path that is not there: exit code 2.
    Usage(String),
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

    /// Prints the sentence to stderr and gives the exit code.
    pub fn report(self) -> ExitCode {
        let (code, text) = match self {
            Self::Impossible(text) => (1, text),
            Self::Usage(text) => (2, text),
        };
        eprintln!("scanside: {text}");
        ExitCode::from(code)
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
#[allow(dead_code, reason = "the first command that prints JSON takes this away")]
pub fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string(value).map_err(Failure::impossible)?;
    text.push('\n');
    print(&text)
}
