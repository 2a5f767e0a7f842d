//! Archives that are the same to the byte whenever and wherever they are made: one order, one time, one owner.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// One thing in an installed tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A file.
    File {
        /// What is in it.
        bytes: Vec<u8>,
        /// 0755 instead of 0644.
        executable: bool,
    },
    /// A symbolic link.
    Link(String),
}

/// An installed tree: paths without a leading slash. Folders are those of its files.
#[derive(Debug, Clone, Default)]
pub struct Tree(pub BTreeMap<String, Entry>);

impl Tree {
    /// Adds a file that is read.
    pub fn text(&mut self, path: impl Into<String>, text: impl Into<Vec<u8>>) {
        self.0.insert(path.into(), Entry::File { bytes: text.into(), executable: false });
    }

    /// Adds a file that is run.
    pub fn program(&mut self, path: impl Into<String>, bytes: Vec<u8>) {
        self.0.insert(path.into(), Entry::File { bytes, executable: true });
    }

    /// Adds a link.
    pub fn link(&mut self, path: impl Into<String>, target: impl Into<String>) {
        self.0.insert(path.into(), Entry::Link(target.into()));
    }

    /// Adds every file below `folder`, under the same path below `prefix`.
    pub fn add_folder(&mut self, folder: &Path, prefix: &str) -> io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
            match entry.file_type()?.is_dir() {
                true => self.add_folder(&entry.path(), &format!("{path}/"))?,
                false => self.text(path, std::fs::read(entry.path())?),
            }
        }
        Ok(())
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> usize {
        self.0.values().map(|entry| if let Entry::File { bytes, .. } = entry { bytes.len() } else { 0 }).sum()
    }

    /// As a tar archive (GNU format): folders before what is in them, everything of root and of the second `mtime`.
    pub fn tar(&self, mtime: u64) -> io::Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        let header = |kind: tar::EntryType, mode: u32, size: usize| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_size(size as u64);
            header.set_mtime(mtime);
            header.set_uid(0);
            header.set_gid(0);
            header
        };
        let mut root = header(tar::EntryType::Directory, 0o755, 0);
        archive.append_data(&mut root, "./", io::empty())?;
        let mut known = std::collections::BTreeSet::new();
        for (path, entry) in &self.0 {
            for (at, _) in path.match_indices('/') {
                if known.insert(&path[..at]) {
                    let mut folder = header(tar::EntryType::Directory, 0o755, 0);
                    archive.append_data(&mut folder, format!("./{}/", &path[..at]), io::empty())?;
                }
            }
            let name = format!("./{path}");
            match entry {
                Entry::File { bytes, executable } => {
                    let mode = if *executable { 0o755 } else { 0o644 };
                    archive.append_data(&mut header(tar::EntryType::Regular, mode, bytes.len()), name, bytes.as_slice())?;
                }
                Entry::Link(target) => archive.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), name, target)?,
            }
        }
        archive.into_inner()
    }
}

/// Compresses without a name or a time in the header.
pub fn gzip(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = flate2::GzBuilder::new().mtime(0).write(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// Compresses with Debian's `zstd`, on one thread: more would cut the input differently.
pub fn zstd(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut command = Command::new("zstd");
    command.args(["-12", "--single-thread", "--quiet", "--stdout"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|e| format!("zstd: {e} (`cargo xtask setup` installs it)"))?;
    let mut input = child.stdin.take().expect("it is piped");
    let output = std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(bytes));
        child.wait_with_output()
    });
    let output = output.map_err(|e| format!("zstd: {e}"))?;
    if output.status.success() { Ok(output.stdout) } else { Err(format!("zstd: {}", output.status)) }
}

/// An `ar` archive, the outside of a `.deb` (deb(5)).
pub fn ar(members: &[(&str, &[u8])], mtime: u64) -> Vec<u8> {
    let mut archive = b"!<arch>\n".to_vec();
    for (name, bytes) in members {
        let header = format!("{name:<16}{mtime:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, "100644", bytes.len());
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(bytes);
        archive.resize(archive.len().next_multiple_of(2), b'\n');
    }
    archive
}
