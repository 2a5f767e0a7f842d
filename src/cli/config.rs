//! `scanside config print`: what a configuration file comes to, with everything it inherits and every default.

use std::path::PathBuf;

use scanside::config::Settings;

use super::Failure;

/// What to do with a configuration.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Prints every setting in force, as TOML that can be used as a file again.
    Print {
        /// A configuration file; without one, the defaults.
        file: Option<PathBuf>,
    },
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let Action::Print { file } = arguments.action;
    let settings = match file {
        Some(file) => Settings::load(&file).map_err(Failure::usage)?,
        None => Settings::default(),
    };
    super::print(&settings.to_toml())
}
