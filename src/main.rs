//! scanside: what the box can do, as a list.

mod cli;

use clap::{Parser, Subcommand};

/// Findings from medical images, beside the scanner: service and toolbox. No medical device.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Analyses a study that lies in a folder or a file.
    Analyze(cli::analyze::Arguments),
    /// Shows what a configuration file comes to.
    Config(cli::config::Arguments),
    /// Converts between DICOM series, NIfTI and NRRD.
    Convert(cli::convert::Arguments),
    /// Shows what an image says about itself.
    Info(cli::info::Arguments),
    /// Explains and times networks.
    Model(cli::model::Arguments),
    /// Sends images to a scanside, or to any other DICOM application.
    Send(cli::send::Arguments),
    /// Runs the box: studies in, reports out.
    Serve(cli::serve::Arguments),
}

fn main() -> std::process::ExitCode {
    let log = env_logger::Env::default().default_filter_or("warn");
    env_logger::Builder::from_env(log).format_target(false).init();
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Analyze(arguments) => cli::analyze::run(arguments),
        Command::Config(arguments) => cli::config::run(arguments),
        Command::Convert(arguments) => cli::convert::run(arguments),
        Command::Info(arguments) => cli::info::run(arguments),
        Command::Model(arguments) => cli::model::run(arguments),
        Command::Send(arguments) => cli::send::run(arguments),
        Command::Serve(arguments) => cli::serve::run(arguments),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
