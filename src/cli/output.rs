//! Files a command writes: whole or not at all.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use super::Failure;

/// Writes a file through `fill`, under another name until it is whole: a command that fails leaves no half file, and
/// one that is in the way stays until then.
///
/// # Errors
/// [`Failure::Impossible`] with the file's name.
pub fn write_through<T>(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<T>) -> Result<T, Failure> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if name.is_empty() {
        return Err(Failure::usage(format!("{}: not a file name", path.display())));
    }
    let part = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let written = File::create(&part).and_then(|mut file| fill(&mut file));
    let written = written.and_then(|value| std::fs::rename(&part, path).map(|()| value));
    written.map_err(|error| {
        let _ = std::fs::remove_file(&part);
        let (text, path) = (error.to_string(), path.display().to_string());
        Failure::Impossible(if error.kind() == io::ErrorKind::InvalidData { text } else { format!("cannot write {path}: {text}") })
    })
}

/// Writes bytes.
///
/// # Errors
/// As [`write_through`].
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    write_through(path, |file| file.write_all(bytes))
}

/// Cores of this machine.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
