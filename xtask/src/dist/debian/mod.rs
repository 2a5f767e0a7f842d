//! `cargo xtask dist-test`: the package in a Debian of its own, with systemd as its first process: installed, started, asked
//! for a report, upgraded, switched off, removed and purged.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{deb, root};
use crate::cross::{host_binary, sudo};
use crate::image::run;
use crate::{Outcome, board};

/// Runs it, and says so where it cannot be run.
pub fn test(root: &Path) -> Outcome {
    let namespaces = ["--mount", "--pid", "--fork", "--uts", "--ipc", "--net", "--cgroup", "--propagation", "private"];
    let quiet = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success());
    if !quiet(sudo("unshare").args(namespaces).args(["mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"])) {
        println!("skipped: this machine lets nobody start a second systemd");
        return Ok(());
    }
    let host = host_binary(root)?;
    let folder = root.join("target/debian");
    fs::create_dir_all(&folder)?;
    let archive = folder.join("debian.tar");
    if !archive.is_file() {
        let fresh = folder.join("fresh.tar");
        let release = fs::read_to_string("/etc/os-release")?;
        let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("stable");
        let include = "--include=systemd,udev,init-system-helpers";
        let made = sudo("mmdebstrap").args(["--variant=minbase", "--quiet", include, suite]).arg(&fresh).status();
        let made = made.map_err(|e| format!("mmdebstrap: {e}; `cargo xtask setup` installs it"))?;
        if !made.success() {
            println!("skipped: a Debian for the package's test can't be had at the moment");
            return Ok(());
        }
        fs::rename(&fresh, &archive)?;
    }
    let tree = folder.join("root");
    run(sudo("rm").arg("-rf").arg(&tree))?;
    fs::create_dir(&tree)?;
    run(sudo("tar").arg("-xf").arg(&archive).arg("-C").arg(&tree))?;

    let inside = folder.join("inside");
    let _ = fs::remove_dir_all(&inside);
    fs::create_dir(&inside)?;
    let sim = board::parse(&board::expand(root, "sim")?)?;
    let installed = root::tree(root, &sim, &fs::read(&host)?, None)?;
    for (name, version) in [("first.deb", "0.1.0"), ("second.deb", "0.2.0")] {
        fs::write(inside.join(name), deb::package(&installed, &sim, version, 1_700_000_000)?)?;
    }
    let mut phantom = Command::new(&host);
    phantom.args(["phantom", "--format", "dicom", "--slice-mm", "5", "--slices", "24", "--rows", "96", "--out"]);
    run(phantom.arg(inside.join("study")).stdout(Stdio::null()))?;
    fs::write(inside.join("life.sh"), include_str!("life.sh"))?;
    fs::write(folder.join("boot.sh"), include_str!("boot.sh"))?;
    run(sudo("cp").arg("-rT").arg(&inside).arg(tree.join("root")))?;
    let unit = inside.join("life.service");
    fs::write(&unit, UNIT)?;
    run(sudo("cp").arg(&unit).arg(tree.join("etc/systemd/system")))?;
    run(sudo("ln").arg("-s").arg("../life.service").arg(tree.join("etc/systemd/system/multi-user.target.wants/life.service")))?;

    let mut boot = sudo("timeout");
    boot.args(["--signal=KILL", "600", "unshare"]).args(namespaces).arg("--kill-child").arg("sh");
    // What systemd says as it ends is of no interest, what the package's life came to is.
    let _ = boot.arg(folder.join("boot.sh")).arg(&tree).stdin(Stdio::null()).status()?;
    let told = sudo("cat").arg(tree.join("root/life.log")).output()?;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    print!("{told}");
    if told.ends_with("all of it holds\n") { Ok(()) } else { Err("the package does not live as it should".into()) }
}

const UNIT: &str = "[Unit]\nAfter=basic.target\n[Service]\nType=oneshot\nTimeoutStartSec=infinity\nExecStart=sh /root/life.sh\n\
    StandardOutput=file:/root/life.log\nStandardError=file:/root/life.log\n[Install]\nWantedBy=multi-user.target\n";
