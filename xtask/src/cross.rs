//! The cross build: one static, stripped binary for a board, with rustup's standard library where it is installed and
//! Debian's where it is not.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Made, Outcome, Unavailable, board};

/// The static binary may not grow beyond this: half of the smallest board's spare flash slot. For armv7 it is a limit of GNU
/// ld (2.40) too: with more than 16 MiB of code glibc's Thumb calls reach `memcpy` by a stub, the linker then forgets that the
/// function which chooses a `memcpy` is Thumb, and the program dies before `main`.
const BINARY_BYTES_MAX: u64 = 16 << 20;

/// Debian's names for what a target needs.
struct Debian {
    architecture: &'static str,
    linker_package: &'static str,
    libc_package: &'static str,
    linker: &'static str,
}

fn debian(target: &str) -> Option<Debian> {
    match target {
        "aarch64-unknown-linux-gnu" => Some(Debian {
            architecture: "arm64",
            linker_package: "gcc-aarch64-linux-gnu",
            libc_package: "libc6-dev-arm64-cross",
            linker: "aarch64-linux-gnu-gcc",
        }),
        "armv7-unknown-linux-gnueabihf" => Some(Debian {
            architecture: "armhf",
            linker_package: "gcc-arm-linux-gnueabihf",
            libc_package: "libc6-dev-armhf-cross",
            linker: "arm-linux-gnueabihf-gcc",
        }),
        _ => None,
    }
}

const TARGETS: [&str; 2] = ["aarch64-unknown-linux-gnu", "armv7-unknown-linux-gnueabihf"];

/// Installs what the cross build, the image and the QEMU tests need on Debian.
///
/// # Errors
/// [`Unavailable`] when Debian or rustup do not give it.
pub fn setup(root: &Path) -> Outcome {
    let mut packages = vec!["qemu-user-static", "qemu-system-arm", "e2fsprogs", "dosfstools", "mtools", "zstd", "mmdebstrap"];
    for target in TARGETS {
        let names = debian(target).expect("both targets are in the table");
        packages.extend([names.linker_package, names.libc_package]);
    }
    // The kernel of the emulated board is Debian's for arm64.
    add_architecture("arm64")?;
    apt(&[&["install", "-y", "-qq", "--no-install-recommends"], packages.as_slice()].concat())?;
    let failures: Vec<&str> = TARGETS.into_iter().filter(|target| !standard_library(target)).collect();
    crate::image::fetch(root)?;
    match failures.as_slice() {
        [] => Ok(()),
        [only] => {
            println!("{only}: its standard library can't be had from rustup or Debian at the moment; other targets are ready");
            Ok(())
        }
        _ => Err(Unavailable("no target's standard library can be had from rustup or Debian at the moment".into()).into()),
    }
}

/// rustup's where there is one, Debian's otherwise; whether there is one now.
fn standard_library(target: &str) -> bool {
    if has_std("rustc", target) {
        println!("{target}: standard library of the installed toolchain");
        return true;
    }
    if has_std(DEBIAN_RUSTC, target) {
        println!("{target}: standard library from Debian");
        return true;
    }
    if Command::new("rustup").args(["target", "add", target]).status().is_ok_and(|s| s.success()) && has_std("rustc", target) {
        println!("{target}: standard library from rustup");
        return true;
    }
    let architecture = debian(target).expect("both targets are in the table").architecture;
    let library = format!("libstd-rust-web-dev:{architecture}");
    // Without `=VERSION` apt may choose a library older than the compiler; has_std notices.
    let installed = add_architecture(architecture).is_ok()
        && apt(&["install", "-y", "-qq", "--no-install-recommends", "rustc-web", &library]).is_ok()
        && has_std(DEBIAN_RUSTC, target);
    if installed {
        println!("{target}: standard library from Debian");
    } else if architecture != "arm64" {
        // An index that is out of sync would spoil every later update.
        let _ = sudo("dpkg").args(["--remove-architecture", architecture]).status();
    }
    installed
}

fn add_architecture(architecture: &str) -> Outcome {
    if !sudo("dpkg").args(["--add-architecture", architecture]).status()?.success() {
        return Err(format!("dpkg cannot add the architecture {architecture}").into());
    }
    // A mirror that is being filled answers with sizes that do not fit, for a minute or so.
    for _ in 0..2 {
        if apt(&["update", "-qq"]).is_ok() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_secs(30));
    }
    apt(&["update", "-qq"])
}

const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// A command as root.
pub fn sudo(program: &str) -> Command {
    if rootless() {
        let mut command = Command::new("sudo");
        command.arg(program);
        command
    } else {
        Command::new(program)
    }
}

fn rootless() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.trim_ascii() != b"0")
}

fn apt(arguments: &[&str]) -> Outcome {
    let mut apt = sudo("apt-get");
    // Its errors are printed; each package it unpacks is not.
    let status = apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=3"]).args(arguments).stdout(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { Err(Unavailable(format!("apt-get {} failed", arguments.join(" "))).into()) }
}

/// Whether this compiler has a standard library for the target.
fn has_std(rustc: &str, target: &str) -> bool {
    let output = Command::new(rustc).args(["--print", "target-libdir", "--target", target]).output();
    let Ok(output) = output else { return false };
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    output.status.success()
        && std::fs::read_dir(folder).is_ok_and(|mut files| {
            files.any(|file| file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with("libstd-")))
        })
}

/// Builds for one board, or for every target whose standard library can be had, and holds the size against its budget.
pub fn cross(root: &Path, name: Option<&str>) -> Outcome {
    let targets = match name {
        Some(name) => vec![board::parse(&board::expand(root, name)?)?.board.target],
        None => ready(&TARGETS)?.into_iter().map(str::to_owned).collect(),
    };
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    for (_, binary) in programs(root, &targets)? {
        let bytes = std::fs::metadata(&binary)?.len();
        println!("{}: {:.1} MiB (at most {})", binary.display(), bytes as f64 / f64::from(1 << 20), BINARY_BYTES_MAX >> 20);
        if bytes > BINARY_BYTES_MAX {
            return Err(format!("the binary has {bytes} bytes, the budget is {BINARY_BYTES_MAX}").into());
        }
    }
    Ok(())
}

/// Builds the static, stripped binary for a target, its packages beside it in the installed tree, and tells where it is.
pub fn build(root: &Path, target: &str) -> Made<PathBuf> {
    Ok(programs(root, &[target])?.remove(0).1)
}

/// As `build`, for several targets side by side: much of a build for one of them keeps one core busy and no more.
pub fn programs<'a>(root: &Path, targets: &[&'a str]) -> Made<Vec<(&'a str, PathBuf)>> {
    for (mut cargo, targets) in cargos(root, "build", targets)? {
        if !cargo.status()?.success() {
            return Err(format!("the build for {} failed", targets.join(" and ")).into());
        }
    }
    let program = |target: &&'a str| (*target, root.join("target").join(target).join("dist").join("scanside"));
    Ok(targets.iter().map(program).collect())
}

/// Builds the library's tests the way the binary itself is built, so that the same code of the same crates is tested.
pub fn test_programs<'a>(root: &Path, targets: &[&'a str]) -> Made<Vec<(&'a str, PathBuf)>> {
    let mut programs = Vec::new();
    for (mut cargo, targets) in cargos(root, "test", targets)? {
        cargo.args(["--no-run", "--lib", "--message-format", "json"]);
        let output = cargo.stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            return Err(format!("the tests for {} do not build", targets.join(" and ")).into());
        }
        let messages = String::from_utf8_lossy(&output.stdout);
        let built = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let built: Vec<PathBuf> = built.filter_map(|message| Some(message["executable"].as_str()?.into())).collect();
        for target in targets {
            let folder = root.join("target").join(target);
            let path = built.iter().find(|path| path.starts_with(&folder)).ok_or_else(|| format!("cargo names no tests for {target}"))?;
            programs.push((target, path.clone()));
        }
    }
    Ok(programs)
}

/// Cargos that build the firmware for the targets, as few as there are compilers, which are told.
fn cargos<'a>(root: &Path, order: &str, targets: &[&'a str]) -> Made<Vec<(Command, Vec<&'a str>)>> {
    let (own, others): (Vec<&str>, Vec<&str>) = targets.iter().partition(|target| has_std("rustc", target));
    if let Some(target) = others.iter().find(|target| lacks_std(target)) {
        return Err(format!("{target}: no standard library; `cargo xtask setup` installs one where it can be had").into());
    }
    let mut cargos = Vec::new();
    for (targets, rustc, whose) in [(own, None, "of the installed toolchain"), (others, Some(DEBIAN_RUSTC), "from Debian")] {
        if targets.is_empty() {
            continue;
        }
        println!("{}: standard library {whose}", targets.join(" and "));
        let mut cargo = Command::new("cargo");
        cargo.current_dir(root).args([order, "--profile", "dist", "--package", "scanside", "--no-default-features"]);
        if let Some(rustc) = rustc {
            cargo.env("RUSTC", rustc);
        }
        for target in &targets {
            configure(&mut cargo, root, target)?;
        }
        cargos.push((cargo, targets));
    }
    Ok(cargos)
}

/// Tells cargo how a target is compiled and linked.
fn configure(cargo: &mut Command, root: &Path, target: &str) -> Outcome {
    let variable = target.to_uppercase().replace('-', "_");
    // Without the builder's paths the same source is the same binary in any checkout.
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.cargo")))?;
    let flags = format!(
        "-Ctarget-feature=+crt-static --remap-path-prefix={}=/scanside --remap-path-prefix={home}=/cargo",
        root.display()
    );
    cargo.env(format!("CARGO_TARGET_{variable}_RUSTFLAGS"), flags);
    if let Some(names) = debian(target) {
        cargo.env(format!("CARGO_TARGET_{variable}_LINKER"), names.linker);
    }
    cargo.args(["--target", target]);
    Ok(())
}

/// Whether no compiler here has a standard library for the target.
pub fn lacks_std(target: &str) -> bool {
    !has_std("rustc", target) && !has_std(DEBIAN_RUSTC, target)
}

/// Those of the targets that can be built here; the others are named.
///
/// # Errors
/// When none of them can.
pub fn ready<'a>(targets: &[&'a str]) -> Made<Vec<&'a str>> {
    let (lacking, ready): (Vec<&str>, Vec<&str>) = targets.iter().partition(|target| lacks_std(target));
    for target in lacking {
        println!("skipped: {target}: its standard library can't be had at the moment");
    }
    if ready.is_empty() { Err("no target can be built; `cargo xtask setup`".into()) } else { Ok(ready) }
}

/// The ordinary release binary of this machine.
pub fn host_binary(root: &Path) -> Made<PathBuf> {
    let status = Command::new("cargo").current_dir(root).args(["build", "--release", "--package", "scanside"]).status()?;
    if status.success() { Ok(root.join("target/release/scanside")) } else { Err("the build for this machine failed".into()) }
}
