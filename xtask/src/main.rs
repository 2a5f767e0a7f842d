//! Everything a developer runs that is not the product: `cargo xtask --help`.

mod board;
mod cross;
mod dist;
mod image;
mod instructions;
mod kernels;
mod live;
mod process;
mod qemu;
mod service;
mod tidy;
mod toolbox;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "What a developer of scanside runs", max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measures.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Shows what a board file comes to.
    Board {
        #[command(subcommand)]
        action: BoardAction,
    },
    /// Builds the static binary for a board, or for all ARM boards.
    Cross {
        /// A file of board/, without .toml; without it, one binary for every target
        #[arg(long)]
        board: Option<String>,
    },
    /// Makes the kernel, initramfs and disk of an emulated board.
    Image {
        /// qemu-virt
        #[arg(long, default_value = "qemu-virt")]
        board: String,
    },
    /// Runs on emulated boards what goes onto real ones.
    Qemu {
        #[command(subcommand)]
        action: QemuAction,
    },
    /// Makes what is handed out for a board: tar.zst, .deb, and with a key the signed update.
    Dist {
        /// A file of board/, without .toml
        #[arg(long)]
        board: String,
        /// The firmware, when it is built already
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
        /// Private key of updates, as `scanside update keygen` makes it
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// Instead of target/package/BOARD
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Installs, upgrades, removes and purges the package in a Debian of its own that runs (as root or with sudo).
    DistTest,
    /// Installs what the cross build, the image and the QEMU tests need (Debian).
    Setup,
    /// Checks the structure: import order, confinement of tract, memmap2, the dicom crates and unsafe, dead files.
    Tidy,
}

#[derive(Subcommand)]
enum Bench {
    /// Quantized networks, against ONNX Runtime and stock tract (Python with onnx and onnxruntime: $SCANSIDE_PYTHON, or one
    /// that is made below target/).
    Kernels {
        /// Runs of each network in each engine, in turn.
        #[arg(long, default_value_t = 7)]
        rounds: u32,
        /// Networks of xtask/python/networks.py; all of the table if none is named.
        names: Vec<String>,
    },
    /// Instructions per multiply-add of the aarch64 kernels and of tract's, counted by QEMU.
    Instructions {
        /// A static aarch64 binary; without it, one is built as `cross` does.
        #[arg(long)]
        binary: Option<PathBuf>,
    },
    /// Latency and memory of a live ultrasound stream, alone on one core and beside two exams on two (taskset; a quiet machine).
    Live {
        /// How long it streams alone.
        #[arg(long, default_value_t = 10)]
        minutes: u32,
    },
    /// The commands of the toolbox, against SimpleITK, scikit-image and the others (Python as for `kernels`).
    Toolbox {
        /// The folder of real images.
        #[arg(long, default_value = "../shared/data")]
        data: PathBuf,
        /// Runs of each job, in turn; the least time counts.
        #[arg(long, default_value_t = 3)]
        repeat: u32,
        /// Rigid offsets of an MR from which registration must come back (a minute for ten).
        #[arg(long, default_value_t = 0)]
        offsets: u32,
    },
    /// Memory, time and latency of the service, as the README promises them.
    Service {
        /// Folder of real images.
        #[arg(long, default_value = "../shared/data")]
        data: PathBuf,
    },
}

#[derive(Subcommand)]
enum BoardAction {
    /// Prints a board with everything it inherits.
    Print {
        /// A file of board/, without .toml
        name: String,
    },
    /// Prints the service's configuration file for a board.
    Config {
        /// A file of board/, without .toml
        name: String,
        /// For a Debian with systemd instead of the image
        #[arg(long)]
        systemd: bool,
        /// Public key that updates are signed with, 64 hexadecimal digits
        #[arg(long, value_name = "HEX")]
        signed_by: Option<String>,
    },
    /// Names all boards.
    List,
}

#[derive(Subcommand)]
enum QemuAction {
    /// Unit tests by processor, the whole machine with a study, and what goes wrong beside a scanner; prints a table.
    Test(qemu::Arguments),
}

/// What is made or measured, or a sentence for the person who ran it.
type Made<T> = Result<T, Box<dyn std::error::Error>>;

type Outcome = Made<()>;

/// What others have and do not give at the moment: exit code 75, EX_TEMPFAIL of BSD's sysexits(3).
#[derive(Debug)]
struct Unavailable(String);

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().task {
        Task::Bench { what: Bench::Instructions { binary } } => instructions::bench(&root(), binary),
        Task::Bench { what: Bench::Kernels { rounds, names } } => kernels::bench(&root(), rounds, &names),
        Task::Bench { what: Bench::Live { minutes } } => live::bench(&root(), minutes),
        Task::Bench { what: Bench::Toolbox { data, repeat, offsets } } => toolbox::bench(&root(), &data, repeat, offsets),
        Task::Bench { what: Bench::Service { data } } => service::bench(&root(), &data),
        Task::Board { action } => board_task(action),
        Task::Cross { board } => cross::cross(&root(), board.as_deref()),
        Task::Image { board } => image::image(&root(), &board),
        Task::Qemu { action: QemuAction::Test(arguments) } => qemu::test(&root(), &arguments),
        Task::Dist { board, binary, key, out } => dist::run(&root(), &dist::Order { board: &board, binary, key, out }),
        Task::DistTest => dist::debian::test(&root()),
        Task::Setup => cross::setup(&root()),
        Task::Tidy => tidy::run(&root()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            if error.is::<Unavailable>() { ExitCode::from(75) } else { ExitCode::FAILURE }
        }
    }
}

/// The top folder of the checkout.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the checkout").to_owned()
}

fn board_task(action: BoardAction) -> Outcome {
    match action {
        BoardAction::Print { name } => print!("{}", toml::to_string(&board::expand(&root(), &name)?)?),
        BoardAction::Config { name, systemd, signed_by } => {
            let host = if systemd { board::Host::Systemd } else { board::Host::Image };
            let board = board::parse(&board::expand(&root(), &name)?)?;
            print!("{}", board::configuration(&board, host, signed_by.as_deref())?);
        }
        BoardAction::List => {
            for name in board::names(&root())? {
                println!("{}", board::summary(&root(), &name)?);
            }
        }
    }
    Ok(())
}
