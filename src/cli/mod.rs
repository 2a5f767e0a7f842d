//! One file per command: its arguments, its progress, what it prints; no algorithm.

use std::fmt::Display;
use std::process::ExitCode;

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
