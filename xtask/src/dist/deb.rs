//! The Debian package (deb(5)): installs, starts, upgrades with the configuration kept, removes, and purges.

use super::archive::{Tree, ar, gzip};
use super::root::CONFIGURATION;
use crate::board::Board;

/// Debian's name of a target.
pub fn architecture(target: &str) -> Result<&'static str, String> {
    match target.split('-').next() {
        Some("x86_64") => Ok("amd64"),
        Some("aarch64") => Ok("arm64"),
        Some("armv7") => Ok("armhf"),
        _ => Err(format!("{target}: Debian has no name for it here")),
    }
}

// The helpers are those of debhelper's own scripts: they keep what the administrator has enabled, disabled or masked, and
// do nothing where no systemd runs. DPKG_ROOT: the tree may be another than the one that runs. Folders that cannot be made
// now, as where /proc is not mounted, systemd makes at boot.
const POSTINST: &str = r#"#!/bin/sh
set -e
if [ "$1" = configure ]; then
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers --root="$DPKG_ROOT/" "$DPKG_ROOT/usr/lib/sysusers.d/scanside.conf"
        systemd-tmpfiles --root="$DPKG_ROOT/" --create "$DPKG_ROOT/usr/lib/tmpfiles.d/scanside.conf" || true
    fi
    if command -v deb-systemd-helper >/dev/null; then
        deb-systemd-helper unmask scanside.service >/dev/null || true
        if deb-systemd-helper --quiet was-enabled scanside.service; then
            deb-systemd-helper enable scanside.service >/dev/null || true
        else
            deb-systemd-helper update-state scanside.service >/dev/null || true
        fi
    fi
    if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
        udevadm control --reload || true
        systemctl daemon-reload
        if [ -n "$2" ]; then action=restart; else action=start; fi
        # A service that does not start says why in the journal; the package is installed all the same.
        deb-systemd-invoke $action scanside.service || true
    fi
fi
"#;

const PRERM: &str = r#"#!/bin/sh
set -e
# An upgrade leaves it running until the new one is in place.
if [ "$1" = remove ] && [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
    deb-systemd-invoke stop scanside.service
fi
"#;

const POSTRM: &str = r#"#!/bin/sh
set -e
if [ "$1" = remove ] || [ "$1" = purge ]; then
    if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload || true
        udevadm control --reload || true
    fi
fi
if [ "$1" = remove ] && command -v deb-systemd-helper >/dev/null; then
    deb-systemd-helper mask scanside.service >/dev/null || true
fi
if [ "$1" = purge ]; then
    if command -v deb-systemd-helper >/dev/null; then
        deb-systemd-helper purge scanside.service >/dev/null || true
        deb-systemd-helper unmask scanside.service >/dev/null || true
    fi
    # Images of patients and reports that nobody fetched do not outlive the package. The user stays, as Debian wants it.
    rm -rf "$DPKG_ROOT/var/lib/scanside" "$DPKG_ROOT/etc/scanside"
fi
"#;

/// The package of a tree.
pub fn package(tree: &Tree, board: &Board, version: &str, mtime: u64) -> Result<Vec<u8>, String> {
    let architecture = architecture(&board.board.target)?;
    let installed_kib = tree.bytes().div_ceil(1024);
    let control = format!(
        "Package: scanside\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: scanside <scanside@localhost>\n\
         Installed-Size: {installed_kib}\nDepends: systemd, udev, init-system-helpers\nSection: science\nPriority: optional\n\
         Description: imaging appliance beside the scanner\n Images in, quantized networks, findings out; and its toolbox. No medical device.\n .\n \
         Made for the board {}: {}.\n",
        board.board.name, board.board.description
    );
    let mut scripts = Tree::default();
    scripts.text("control", control);
    scripts.text("conffiles", format!("/{CONFIGURATION}\n"));
    for (name, text) in [("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)] {
        scripts.program(name, text.into());
    }
    let packed = |tree: &Tree| tree.tar(mtime).and_then(|tar| gzip(&tar)).map_err(|e| format!("tar: {e}"));
    let (control, data) = (packed(&scripts)?, packed(tree)?);
    Ok(ar(&[("debian-binary", b"2.0\n"), ("control.tar.gz", &control), ("data.tar.gz", &data)], mtime))
}
