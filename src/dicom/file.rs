//! The head of a DICOM file (PS3.10 7.1), written in front of a data set from the wire and read in front of one that is
//! sent.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use dicom_dictionary_std::tags;

use super::elements::{Elements, Encoding};
use super::negotiation::{IMPLEMENTATION_CLASS, IMPLEMENTATION_VERSION};
use crate::study::{Rejection, RejectionCode, Uid};

/// Deflated Explicit VR Little Endian (PS3.5 A.5).
const DEFLATED: &str = "1.2.840.10008.1.2.1.99";

/// Files of a folder that are looked at. A whole patient's history is below it; a home folder given by mistake is not.
const FILES_MAX: usize = 200_000;

/// Folders inside folders; media have three levels.
const FOLDER_DEPTH_MAX: usize = 16;

/// The file, or all files of the folder and those below it, in the order of their paths. Links to folders are not
/// followed: one may lead back.
///
/// # Errors
/// A folder that cannot be read, or one with more than 200,000 files.
pub fn files_below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if !std::fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut folders = vec![(path.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                if depth < FOLDER_DEPTH_MAX {
                    folders.push((entry.path(), depth + 1));
                }
            } else if kind.is_file() || (kind.is_symlink() && entry.path().is_file()) {
                files.push(entry.path());
            }
            if files.len() > FILES_MAX {
                return Err(io::Error::other(format!("more than {FILES_MAX} files")));
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Preamble, prefix and file meta information; the data set follows as it came.
pub fn head(sop_class: &Uid, sop_instance: &Uid, transfer_syntax: &Uid) -> Vec<u8> {
    let mut group = Vec::with_capacity(256);
    group.extend_from_slice(&[2, 0, 1, 0, b'O', b'B', 0, 0, 2, 0, 0, 0, 0, 1]);
    let mut put = |element: u8, vr: &[u8; 2], text: &str, pad: u8| {
        let odd = text.len() % 2;
        group.extend_from_slice(&[2, 0, element, 0, vr[0], vr[1]]);
        group.extend_from_slice(&((text.len() + odd) as u16).to_le_bytes());
        group.extend_from_slice(text.as_bytes());
        group.extend_from_slice(&[pad][..odd]);
    };
    put(0x02, b"UI", sop_class.as_str(), 0);
    put(0x03, b"UI", sop_instance.as_str(), 0);
    put(0x10, b"UI", transfer_syntax.as_str(), 0);
    put(0x12, b"UI", IMPLEMENTATION_CLASS, 0);
    put(0x13, b"SH", IMPLEMENTATION_VERSION, b' ');
    let mut head = vec![0; 128];
    head.extend_from_slice(b"DICM");
    head.extend_from_slice(&[2, 0, 0, 0, b'U', b'L', 4, 0]);
    head.extend_from_slice(&(group.len() as u32).to_le_bytes());
    head.extend_from_slice(&group);
    head
}

/// What the head of a file says about the data set behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMeta {
    /// Media Storage SOP Class UID (0002,0002).
    pub sop_class: Uid,
    /// Media Storage SOP Instance UID (0002,0003).
    pub sop_instance: Uid,
    /// Transfer Syntax UID (0002,0010).
    pub transfer_syntax: Uid,
    /// Offset of the data set.
    pub data_set_at: usize,
}

/// Bytes of a file that hold its whole head, whatever private information a writer puts there.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;

impl FileMeta {
    /// Reads the head from the first [`HEAD_BYTES_MAX`] bytes of a file, or all of it. Its group length is not
    /// believed; the group ends where another begins.
    ///
    /// # Errors
    /// [`RejectionCode::Malformed`] when it is no DICOM file or lacks one of the UIDs.
    pub fn parse(start: &[u8]) -> Result<Self, Rejection> {
        let malformed = |text: &str| Rejection::new(RejectionCode::Malformed, text);
        if start.get(128..132) != Some(b"DICM") {
            return Err(malformed("this is no DICOM file: the DICM mark is missing"));
        }
        let bytes = &start[132..];
        let mut elements = Elements::new(bytes, Encoding::EXPLICIT);
        let (mut sop_class, mut sop_instance, mut transfer_syntax) = (None, None, None);
        while bytes[elements.position()..].starts_with(&[2, 0]) {
            let Some(element) = elements.next()? else { break };
            let uid = element.text().and_then(|text| Uid::parse(text).ok());
            match element.tag {
                tags::MEDIA_STORAGE_SOP_CLASS_UID => sop_class = uid,
                tags::MEDIA_STORAGE_SOP_INSTANCE_UID => sop_instance = uid,
                tags::TRANSFER_SYNTAX_UID => transfer_syntax = uid,
                _ => {}
            }
        }
        match (sop_class, sop_instance, transfer_syntax) {
            (Some(sop_class), Some(sop_instance), Some(transfer_syntax)) => {
                Ok(Self { sop_class, sop_instance, transfer_syntax, data_set_at: 132 + elements.position() })
            }
            _ => Err(malformed("the file meta information lacks a SOP class, a SOP instance or a transfer syntax")),
        }
    }
}

/// The data set of a file: what is behind its head, or all of a bare one.
pub fn data_set(file: &[u8]) -> &[u8] {
    match FileMeta::parse(file) {
        Ok(meta) => &file[meta.data_set_at..],
        Err(_) => file,
    }
}

/// Makes sure that a deflated data set inflates to no more than `bytes_max`, before anything inflates it into memory.
///
/// # Errors
/// [`RejectionCode::TooLarge`]; `Malformed` when it cannot be inflated.
pub fn check_inflated_size(file: &[u8], bytes_max: usize) -> Result<(), Rejection> {
    let Ok(meta) = FileMeta::parse(file) else { return Ok(()) };
    if meta.transfer_syntax.as_str() != DEFLATED {
        return Ok(());
    }
    let inflater = flate2::read::DeflateDecoder::new(&file[meta.data_set_at..]);
    let bytes = std::io::copy(&mut inflater.take(bytes_max as u64 + 1), &mut std::io::sink());
    match bytes {
        Ok(bytes) if bytes <= bytes_max as u64 => Ok(()),
        Ok(_) => {
            let text = format!("the data set inflates to more than {bytes_max} bytes");
            Err(Rejection::new(RejectionCode::TooLarge, text))
        }
        Err(_) => Err(Rejection::new(RejectionCode::Malformed, "the deflated data set is damaged")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn uid(text: &str) -> Uid {
        Uid::parse(text).unwrap()
    }

    #[test]
    fn a_head_tells_what_it_was_written_for() {
        let mut file = head(&uid("1.2.840.10008.5.1.4.1.1.2"), &uid("1.2.3"), &uid("1.2.840.10008.1.2"));
        let at = file.len();
        file.extend_from_slice(&[8, 0, 5, 0, 0, 0, 0, 0]);
        let meta = FileMeta::parse(&file).unwrap();
        assert_eq!((meta.sop_instance, meta.transfer_syntax), (uid("1.2.3"), uid("1.2.840.10008.1.2")));
        assert_eq!((meta.data_set_at, data_set(&file).len()), (at, 8));
        // A head that is cut is refused, or tells the same where the cut left all three UIDs whole: behind one of the
        // last three elements, or one byte later.
        let told: Vec<usize> = (0..at).filter(|&cut| FileMeta::parse(&file[..cut]).is_ok()).collect();
        assert_eq!(told.len(), 4, "{told:?}");
        assert!(told.iter().all(|&cut| cut - FileMeta::parse(&file[..cut]).unwrap().data_set_at < 2));
    }

    #[test]
    fn a_deflate_bomb_is_measured_not_inflated() {
        let mut deflater = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        deflater.write_all(&vec![0; 8 << 20]).unwrap();
        let mut file = head(&uid("1.2.840.10008.5.1.4.1.1.2"), &uid("1.2.3"), &uid(DEFLATED));
        file.extend_from_slice(&deflater.finish().unwrap());
        assert!(file.len() < 64 << 10);
        assert!(check_inflated_size(&file, 8 << 20).is_ok());
        assert_eq!(check_inflated_size(&file, 1 << 20).unwrap_err().code, RejectionCode::TooLarge);
    }
}
