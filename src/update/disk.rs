//! The few things an update does to a disk, each of which a power cut may interrupt.

use std::any::Any;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// A file system. What is written is safe after [`NewFile::sync`]; a new, renamed or removed name after
/// [`Disk::sync_folder`] of the folder it stands in; before that a cut may keep it or lose it.
pub trait Disk {
    /// Opens a file to read it from its beginning.
    ///
    /// # Errors
    /// The system's.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + '_>>;

    /// Makes a file, empty, in place of whatever has its name.
    ///
    /// # Errors
    /// The system's.
    fn create(&self, path: &Path, executable: bool) -> io::Result<Box<dyn NewFile + '_>>;

    /// Gives a file another name, in place of whatever has that name.
    ///
    /// # Errors
    /// The system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes a folder; one that is there already is fine.
    ///
    /// # Errors
    /// The system's.
    fn make_folder(&self, path: &Path) -> io::Result<()>;

    /// Removes a folder with all that is in it; one that is not there is fine.
    ///
    /// # Errors
    /// The system's.
    fn remove_tree(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a folder safe.
    ///
    /// # Errors
    /// The system's.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;

    /// Keeps others out until what comes back is dropped; `None` when somebody else has it.
    ///
    /// # Errors
    /// The system's.
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Any>>>;
}

/// A file that is being written.
pub trait NewFile: Write {
    /// Makes its bytes safe.
    ///
    /// # Errors
    /// The system's.
    fn sync(&mut self) -> io::Result<()>;
}

/// The machine's own.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(File::open(path)?))
    }

    fn create(&self, path: &Path, executable: bool) -> io::Result<Box<dyn NewFile + '_>> {
        let mode = if executable { 0o755 } else { 0o644 };
        Ok(Box::new(OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        match DirBuilder::new().mode(0o755).create(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            other => other,
        }
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Any>>> {
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl NewFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()?;
        // What is read back to be checked shall come from the device and not from our own memory; a file system that
        // has no such thing loses nothing by it.
        let _ = rustix::fs::fadvise(&*self, 0, None, rustix::fs::Advice::DontNeed);
        Ok(())
    }
}
