//! The service from the outside: `scanside serve` as a process, with its DICOM door on any port.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts a service whose spool and socket lie in `folder` and waits until it is ready; the process, and the address of its DICOM door.
pub fn serve(folder: &Path, more: &[&str]) -> (Child, SocketAddr) {
    let (spool, socket) = (folder.join("spool"), folder.join("socket"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_scanside"))
        .args(["serve", "--dicom", "127.0.0.1:0", "--spool", spool.to_str().unwrap()])
        .args(["--socket", socket.to_str().unwrap()])
        .args(more)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = loop {
        let line = lines.next().expect("the service says when it is ready").unwrap();
        if let Some(address) = line.strip_prefix("scanside: ready, DICOM on ") {
            break address.parse().unwrap();
        }
    };
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| eprintln!("serve: {line}")));
    (child, address)
}
