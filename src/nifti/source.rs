//! Bytes of an image file, plain or gzipped, read at any place; forwards without cost, backwards by starting again.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

/// Deflate cannot pack more than this many bytes into one (RFC 1951: 258 bytes in two bits of a run).
const DEFLATE_RATIO_MAX: u64 = 1032;

/// Bytes read from the file at once: as much as a cheap disk gives in one go.
const BUFFER_BYTES: usize = 128 << 10;

#[derive(Debug)]
enum Bytes {
    Plain(File),
    Gzip { stream: Box<MultiGzDecoder<BufReader<File>>>, at: u64 },
}

/// A file that may be gzipped.
#[derive(Debug)]
pub(crate) struct ByteSource {
    path: PathBuf,
    bytes: Bytes,
    /// Bytes of the file itself.
    length: u64,
    /// The first byte that counts: all places are from here.
    base: u64,
}

impl ByteSource {
    /// Opens a file; gzip is told by its first bytes, not by its name.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut magic = [0; 2];
        let gzip = file.read_at(&mut magic, 0)? == 2 && magic == [0x1F, 0x8B];
        let bytes = if gzip { gzip_from(file, 0)? } else { Bytes::Plain(file) };
        Ok(Self { path: path.to_owned(), bytes, length, base: 0 })
    }

    /// The part of a plain file from byte `base`, which is gzipped or not.
    pub fn open_part(path: &Path, base: u64, gzip: bool) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let bytes = if gzip { gzip_from(file, base)? } else { Bytes::Plain(file) };
        Ok(Self { path: path.to_owned(), bytes, length, base })
    }

    pub fn is_gzip(&self) -> bool {
        matches!(self.bytes, Bytes::Gzip { .. })
    }

    /// Whether the file can hold this many bytes. A header that claims more lies, or is a bomb's.
    pub fn can_hold(&self, bytes: u64) -> bool {
        let length = self.length.saturating_sub(self.base);
        match self.bytes {
            Bytes::Plain(_) => bytes <= length,
            Bytes::Gzip { .. } => bytes <= length.saturating_mul(DEFLATE_RATIO_MAX),
        }
    }

    /// Fills `out` from byte `at`.
    pub fn read_at(&mut self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let (stream, position) = match &mut self.bytes {
            Bytes::Plain(file) => return file.read_exact_at(out, self.base + at),
            Bytes::Gzip { stream, at } => (stream, at),
        };
        if at < *position {
            self.bytes = gzip_from(File::open(&self.path)?, self.base)?;
            return self.read_at(at, out);
        }
        let skipped = io::copy(&mut stream.by_ref().take(at - *position), &mut io::sink())?;
        *position += skipped;
        if *position < at {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        stream.read_exact(out)?;
        *position += out.len() as u64;
        Ok(())
    }

    /// As much of the first `n` bytes as there is.
    pub fn start(&mut self, n: usize) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        match &mut self.bytes {
            Bytes::Plain(file) => {
                let mut file = &*file;
                file.seek(SeekFrom::Start(self.base))?;
                file.take(n as u64).read_to_end(&mut out)?;
            }
            Bytes::Gzip { stream, at } => {
                stream.by_ref().take(n as u64).read_to_end(&mut out)?;
                *at += out.len() as u64;
            }
        }
        Ok(out)
    }
}

fn gzip_from(mut file: File, base: u64) -> io::Result<Bytes> {
    file.seek(SeekFrom::Start(base))?;
    let stream = MultiGzDecoder::new(BufReader::with_capacity(BUFFER_BYTES, file));
    Ok(Bytes::Gzip { stream: Box::new(stream), at: 0 })
}
