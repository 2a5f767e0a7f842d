//! `scanside update`: firmware and models in two slots, from a signed folder, and back again when they do no good.

use std::ffi::OsStr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use clap::Subcommand;
use scanside::config::Settings;
use scanside::infer::signature::PrivateKey;
use scanside::ingest::socket::Client;
use scanside::update::release::{self, Release, Version};
use scanside::update::{Confirmation, Slots, State, UpdateError};
use serde_json::json;

use super::{Failure, exit, print, print_json};

/// Takes an update of firmware and models from a folder (a USB stick's), signed by the maker of the box.
///
/// It is copied into the slot that does not run, checked before and after, and started once at the next boot. `update
/// confirm` makes it the active one; without that the boot after goes back to what runs now. A power cut at any moment
/// leaves what runs now. Exit codes: 0 done, 2 asked wrongly, 65 refused (the sentence names the file), 74 the disk,
/// 75 not now, 78 the configuration takes no updates.
///
///   scanside update /media/stick/scanside-update --config /etc/scanside/scanside.toml
///   scanside update status --config /etc/scanside/scanside.toml
#[derive(clap::Args)]
#[command(verbatim_doc_comment, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Folder with manifest.toml, manifest.sig and what they sign
    #[arg(value_name = "FOLDER", value_parser = super::values::folder)]
    folder: Option<PathBuf>,
    /// Takes a version that is older than the active one or the same, or that was tried and taken back
    #[arg(long)]
    allow_downgrade: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(Subcommand)]
enum Command {
    /// Says from which folder to run, once at each boot: one line. A slot on trial is named once.
    Choose(Choose),
    /// Checks the health of a slot on trial, and makes it the active one: the service answers, the self-test passes.
    Confirm(Confirm),
    /// Shows which slot is what.
    Status(StatusArguments),
    /// Makes a signed update of a folder with `scanside` and `models`: on the maker's machine.
    Pack(Pack),
    /// Draws a key pair: the private half into a file, the public one printed.
    Keygen(Keygen),
}

/// Where the slots are, and whom to believe.
#[derive(clap::Args)]
struct Place {
    /// Configuration file with [update] slots, board, signed_by
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of the slots, instead of the configuration's
    #[arg(long, value_name = "DIR")]
    slots: Option<PathBuf>,
    /// Name of this board, instead of the configuration's
    #[arg(long, value_name = "NAME")]
    board: Option<String>,
    /// ed25519 public key, 64 hexadecimal digits, instead of the configuration's
    #[arg(long, value_name = "HEX")]
    signed_by: Option<String>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

impl Place {
    fn settings(&self) -> Result<Settings, Failure> {
        let mut settings = match &self.config {
            Some(file) => Settings::load(file).map_err(|e| Failure::because(exit::CONFIG, e))?,
            None => Settings::default(),
        };
        let update = &mut settings.update;
        update.slots = self.slots.clone().or(update.slots.take());
        update.board = self.board.clone().or(update.board.take());
        update.signed_by = self.signed_by.clone().or(update.signed_by.take());
        Ok(settings)
    }

    fn slots(&self) -> Result<Slots, Failure> {
        Slots::of(&self.settings()?.update).map_err(refused)
    }
}

fn refused(error: UpdateError) -> Failure {
    let code = match error {
        UpdateError::Refused { .. } => exit::DATAERR,
        UpdateError::Disk { .. } => exit::IOERR,
        UpdateError::Busy(_) => exit::TEMPFAIL,
        UpdateError::Setting(_) => exit::CONFIG,
    };
    Failure::because(code, error)
}

#[derive(clap::Args)]
struct Choose {
    /// Folder of the firmware that is always there; without it, that of the program that runs
    #[arg(long, value_name = "DIR")]
    factory: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
struct Confirm {
    /// Local socket of the service, instead of the configuration's
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Seconds the service has until it answers
    #[arg(long, value_name = "N", default_value_t = 120)]
    wait_s: u64,
    /// Believes a service that answers, without the self-test of its firmware
    #[arg(long)]
    no_selftest: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
struct StatusArguments {
    #[command(flatten)]
    place: Place,
}

#[derive(clap::Args)]
struct Pack {
    /// Folder with `scanside` and, if there are any, `models`; manifest.toml and manifest.sig are written into it
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// A board it is meant for; may be given several times
    #[arg(long, value_name = "NAME", required = true)]
    board: Vec<String>,
    /// File with the private key, as `keygen` writes it
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Its version
    #[arg(long, value_name = "X.Y.Z", default_value = env!("CARGO_PKG_VERSION"))]
    release: String,
    /// What its firmware is built for
    #[arg(long, value_name = "TRIPLE", default_value = release::TARGET)]
    target: String,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Keygen {
    /// New file for the private key, which only its owner may read
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    match &arguments.command {
        Some(Command::Choose(arguments)) => choose(arguments),
        Some(Command::Confirm(arguments)) => confirm(arguments),
        Some(Command::Status(arguments)) => status(arguments),
        Some(Command::Pack(arguments)) => pack(arguments),
        Some(Command::Keygen(arguments)) => keygen(arguments),
        None => install(&arguments),
    }
}

fn install(arguments: &Arguments) -> Result<(), Failure> {
    let Some(folder) = &arguments.folder else {
        return Err(Failure::usage("the folder of an update is missing: scanside update FOLDER"));
    };
    let running = Version::parse(env!("CARGO_PKG_VERSION")).expect("our own version");
    let trial = arguments.place.slots()?.install(folder, running, arguments.allow_downgrade).map_err(refused)?;
    if arguments.place.json {
        return print_json(&trial);
    }
    print(&format!("{} is in slot {} and starts at the next boot, on trial\n", trial.version, trial.slot.name()))
}

/// Never fails: a box that cannot read its own settings still has to boot something.
fn choose(arguments: &Choose) -> Result<(), Failure> {
    let own = || std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned));
    let factory = arguments.factory.clone().or_else(own).unwrap_or_else(|| "/usr/lib/scanside".into());
    let choice = arguments.place.slots().map(|slots| slots.choose(&factory));
    let folder = match &choice {
        Ok(choice) => {
            choice.passed_over.iter().for_each(|what| eprintln!("scanside: passed over: {what}"));
            choice.folder.clone()
        }
        Err(failure) => {
            eprintln!("scanside: passed over: {failure}");
            factory
        }
    };
    match choice {
        Ok(choice) if arguments.place.json => print_json(&choice),
        _ if arguments.place.json => print_json(&json!({"folder": folder, "slot": null, "version": null, "trial": false})),
        _ => print(&format!("{}\n", folder.display())),
    }
}

fn confirm(arguments: &Confirm) -> Result<(), Failure> {
    let slots = arguments.place.slots()?;
    let on_trial = slots.state().trial.is_some_and(|trial| trial.tries > 0);
    if on_trial {
        let settings = arguments.place.settings()?;
        let socket = arguments.socket.clone().or(settings.socket.path);
        let socket = socket.ok_or_else(|| Failure::usage("no socket to ask the service on: --socket, or socket.path in --config"))?;
        wait_for_service(&socket, Duration::from_secs(arguments.wait_s))?;
        if !arguments.no_selftest {
            selftest(settings.models.path)?;
        }
    }
    let confirmation = slots.confirm().map_err(refused)?;
    if arguments.place.json {
        return print_json(&confirmation);
    }
    print(&match confirmation {
        Confirmation::Nothing => "no slot is on trial\n".to_owned(),
        Confirmation::NotStarted(version) => format!("{version} starts at the next boot; there is nothing to confirm yet\n"),
        Confirmation::Active(version) => format!("{version} is the active firmware from now on\n"),
    })
}

/// Until it answers and none of its threads hangs.
fn wait_for_service(socket: &Path, patience: Duration) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        let status = Client::connect(socket, "scanside update").and_then(|mut client| client.status());
        let why = match status {
            Ok(status) if status["stalled"].is_null() => return Ok(()),
            Ok(status) => format!("its thread {} hangs", status["stalled"]),
            Err(error) => error.to_string(),
        };
        if begun.elapsed() > patience {
            return Err(Failure::impossible(format!("the service is not healthy after {} s: {why}", patience.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// In a process of its own, with the firmware that is to be confirmed; with its own models, or else the box's.
fn selftest(models: Option<PathBuf>) -> Result<(), Failure> {
    let own = std::env::current_exe().map_err(|e| Failure::impossible(format!("cannot find this program: {e}")))?;
    let models = Some(own.with_file_name(release::MODELS)).filter(|folder| folder.is_dir()).or(models);
    let mut selftest = Process::new(&own);
    selftest.arg("selftest").stdin(Stdio::null()).stdout(Stdio::null());
    selftest.args(models.iter().flat_map(|folder| [OsStr::new("--models"), folder.as_os_str()]));
    let status = selftest.status().map_err(|e| Failure::impossible(format!("cannot run {}: {e}", own.display())))?;
    if status.success() { Ok(()) } else { Err(Failure::impossible(format!("the self-test failed ({status})"))) }
}

fn status(arguments: &StatusArguments) -> Result<(), Failure> {
    let slots = arguments.place.slots()?;
    let state = slots.state();
    let State { active, previous, trial, failed } = &state;
    let in_slot = |slot| slots.version(slot).map(|version| version.to_string()).map_err(|error| error.to_string());
    if arguments.place.json {
        let named = |slot| match in_slot(slot) {
            Ok(version) => json!({"slot": slot, "version": version}),
            Err(error) => json!({"slot": slot, "error": error}),
        };
        return print_json(&json!({"active": active.map(named), "previous": previous.map(named), "trial": trial, "failed": failed}));
    }
    let line = |slot: Option<_>, none: &str| match slot {
        None => none.to_owned(),
        Some(slot) => format!("slot {}, {}", scanside::update::Slot::name(slot), in_slot(slot).unwrap_or_else(|error| error)),
    };
    let mut text = format!("active    {}\nprevious  {}\n", line(*active, "the factory's firmware"), line(*previous, "none"));
    if let Some(trial) = trial {
        let when = if trial.tries == 0 { "starts at the next boot" } else { "was started and waits to be confirmed" };
        text += &format!("trial     slot {}, {}: {when}\n", trial.slot.name(), trial.version);
    }
    if let Some(failed) = failed {
        text += &format!("failed    {}: {}\n", failed.version, failed.why);
    }
    print(&text)
}

fn pack(arguments: &Pack) -> Result<(), Failure> {
    let text = std::fs::read_to_string(&arguments.key)
        .map_err(|e| Failure::usage(format!("cannot read the key {}: {e}", arguments.key.display())))?;
    let key = PrivateKey::parse(&text)
        .ok_or_else(|| Failure::usage(format!("{}: not a private key of 64 hexadecimal digits", arguments.key.display())))?;
    let release = Release::pack(&arguments.folder, &arguments.release, &arguments.target, &arguments.board, &key)
        .map_err(Failure::usage)?;
    if arguments.json {
        return print_json(&json!({"manifest": release, "signed_by": key.public_hex()}));
    }
    let (files, boards) = (release.files.len(), release.boards.join(", "));
    print(&format!("{} for {boards} ({}): {files} files, signed by {}\n", release.version(), release.target, key.public_hex()))
}

fn keygen(arguments: &Keygen) -> Result<(), Failure> {
    let mut seed = [0; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut random| std::io::Read::read_exact(&mut random, &mut seed))
        .map_err(|e| Failure::impossible(format!("cannot draw a key: {e}")))?;
    let key = PrivateKey::from_seed(seed);
    let say = |e| Failure::usage(format!("cannot write {}: {e}", arguments.file.display()));
    // A key that is there already is never overwritten: boxes in the field may trust it.
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(&arguments.file);
    file.and_then(|mut file| std::io::Write::write_all(&mut file, format!("{}\n", key.to_hex()).as_bytes())).map_err(say)?;
    if arguments.json { print_json(&json!({"signed_by": key.public_hex()})) } else { print(&format!("{}\n", key.public_hex())) }
}
