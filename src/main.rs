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
    #[command(about = "Analyses a study that lies in a folder or a file")]
    Analyze(cli::analyze::Arguments),
    #[command(about = "Finds bright blobs of any size")]
    Blobs(cli::blobs::Arguments),
    #[command(about = "Numbers and measures the connected parts of a mask")]
    Components(cli::components::Arguments),
    #[command(about = "Shows what a configuration file comes to")]
    Config(cli::config::Arguments),
    #[command(about = "Converts DICOM series, NIfTI and NRRD to NIfTI or DICOM")]
    Convert(cli::convert::Arguments),
    #[command(about = "Cuts a box out of an image")]
    Crop(cli::crop::Arguments),
    #[command(about = "Shows the appliance at work on a phantom, against the truth")]
    Demo(cli::demo::Arguments),
    #[command(about = "Measures how good findings and label maps are against a truth")]
    Eval(cli::eval::Arguments),
    #[command(about = "Shows what an image says about itself")]
    Info(cli::info::Arguments),
    #[command(about = "Makes the surface of a level or of labels: STL, PLY, OBJ, glTF")]
    Mesh(cli::mesh::Arguments),
    #[command(about = "Model packages: lists, checks, installs, explains and times them")]
    Model(cli::model::Arguments),
    #[command(about = "Grows, shrinks, opens, closes and fills masks")]
    Morphology(cli::morphology::Arguments),
    #[command(about = "Draws images of nobody: a chest CT, a brain MR or a cine, with lesions at known places")]
    Phantom(cli::phantom::Arguments),
    #[command(about = "Draws an image as PNG or in the terminal: slice, montage, three planes")]
    Preview(cli::preview::Arguments),
    #[command(about = "Lays a moving image over a fixed one")]
    Register(cli::register::Arguments),
    #[command(about = "Puts an image on another grid, spacing or orientation")]
    Resample(cli::resample::Arguments),
    #[command(about = "Labels an image with a segmentation package")]
    Segment(cli::segment::Arguments),
    #[command(about = "Checks the box with the built-in phantom through the whole path")]
    Selftest(cli::demo::SelftestArguments),
    #[command(about = "Sends images to a scanside, or to any other DICOM application")]
    Send(cli::send::Arguments),
    #[command(about = "Runs the box: studies in, reports out")]
    Serve(cli::serve::Arguments),
    #[command(about = "Smooths: Gaussian, median, curvature flow")]
    Smooth(cli::smooth::Arguments),
    #[command(about = "Measures the values under each label")]
    Stats(cli::stats::Arguments),
    #[command(about = "Asks a running service how it is")]
    Status(cli::status::Arguments),
    #[command(about = "Makes a mask of a range of values, or by Otsu's threshold")]
    Threshold(cli::threshold::Arguments),
    #[command(about = "Z-scores, percent change and maps of 4-D series")]
    Timeseries(cli::timeseries::Arguments),
    #[command(about = "Takes a signed update of firmware and models, and goes back when it does no good")]
    Update(cli::update::Arguments),
    #[command(about = "Prints reports as they come, from the serial line or the local socket")]
    Watch(cli::watch::Arguments),
}

fn main() -> std::process::ExitCode {
    let log = env_logger::Env::default().default_filter_or("warn");
    env_logger::Builder::from_env(log).format_target(false).init();
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Analyze(arguments) => cli::analyze::run(arguments),
        Command::Blobs(arguments) => cli::blobs::run(arguments),
        Command::Components(arguments) => cli::components::run(arguments),
        Command::Config(arguments) => cli::config::run(arguments),
        Command::Convert(arguments) => cli::convert::run(arguments),
        Command::Crop(arguments) => cli::crop::run(arguments),
        Command::Demo(arguments) => cli::demo::run(arguments),
        Command::Eval(arguments) => cli::eval::run(arguments),
        Command::Info(arguments) => cli::info::run(arguments),
        Command::Mesh(arguments) => cli::mesh::run(arguments),
        Command::Model(arguments) => cli::model::run(arguments),
        Command::Morphology(arguments) => cli::morphology::run(arguments),
        Command::Phantom(arguments) => cli::phantom::run(arguments),
        Command::Preview(arguments) => cli::preview::run(arguments),
        Command::Register(arguments) => cli::register::run(arguments),
        Command::Resample(arguments) => cli::resample::run(arguments),
        Command::Segment(arguments) => cli::segment::run(arguments),
        Command::Selftest(arguments) => cli::demo::selftest(arguments),
        Command::Send(arguments) => cli::send::run(arguments),
        Command::Serve(arguments) => cli::serve::run(arguments),
        Command::Smooth(arguments) => cli::smooth::run(arguments),
        Command::Stats(arguments) => cli::stats::run(arguments),
        Command::Status(arguments) => cli::status::run(arguments),
        Command::Threshold(arguments) => cli::threshold::run(arguments),
        Command::Timeseries(arguments) => cli::timeseries::run(arguments),
        Command::Update(arguments) => cli::update::run(arguments),
        Command::Watch(arguments) => cli::watch::run(arguments),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
