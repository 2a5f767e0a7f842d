//! Instances made by hand: as small as a sound CT slice can be. Each test takes from here what it needs.

#![allow(dead_code)]

use std::path::{Path, PathBuf};

use scanside::dicom::file;
use scanside::study::Uid;

pub const CT: &str = "1.2.840.10008.5.1.4.1.1.2";
pub const IMPLICIT_LITTLE: &str = "1.2.840.10008.1.2";
pub const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";

pub fn uid(text: &str) -> Uid {
    Uid::parse(text).unwrap()
}

/// One slice of a CT series.
#[derive(Debug, Clone)]
pub struct Slice {
    pub sop_class: String,
    pub study: String,
    pub series: String,
    /// From 0; gives the SOP Instance UID and the position.
    pub number: usize,
    pub rows: u16,
    pub columns: u16,
    /// Every pixel.
    pub stored: i16,
}

impl Slice {
    pub fn new(series: &str, number: usize) -> Self {
        let (rows, columns) = (64, 64);
        Self { sop_class: CT.into(), study: "1.2.826.0.1.1".into(), series: series.into(), number, rows, columns, stored: -800 }
    }

    pub fn sop_instance(&self) -> Uid {
        uid(&format!("{}.{}", self.series, self.number + 1))
    }

    /// Explicit VR little endian.
    pub fn data_set(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut put = |group: u16, element: u16, vr: &[u8; 2], value: &[u8]| {
            let pad = if vr == b"UI" { 0 } else { b' ' };
            let odd = value.len() % 2;
            out.extend_from_slice(&group.to_le_bytes());
            out.extend_from_slice(&element.to_le_bytes());
            out.extend_from_slice(vr);
            if vr == b"OW" {
                out.extend_from_slice(&[0, 0]);
                out.extend_from_slice(&(value.len() as u32).to_le_bytes());
            } else {
                out.extend_from_slice(&((value.len() + odd) as u16).to_le_bytes());
            }
            out.extend_from_slice(value);
            out.extend_from_slice(&[pad][..odd]);
        };
        let position = format!("-32\\-32\\{}", self.number as f64 * 2.0);
        put(0x08, 0x08, b"CS", b"ORIGINAL\\PRIMARY\\AXIAL");
        put(0x08, 0x16, b"UI", self.sop_class.as_bytes());
        put(0x08, 0x18, b"UI", self.sop_instance().as_str().as_bytes());
        put(0x08, 0x60, b"CS", b"CT");
        put(0x10, 0x10, b"PN", b"PHANTOM^ONE");
        put(0x10, 0x20, b"LO", b"PHANTOM");
        put(0x20, 0x0d, b"UI", self.study.as_bytes());
        put(0x20, 0x0e, b"UI", self.series.as_bytes());
        put(0x20, 0x13, b"IS", (self.number + 1).to_string().as_bytes());
        put(0x20, 0x32, b"DS", position.as_bytes());
        put(0x20, 0x37, b"DS", b"1\\0\\0\\0\\1\\0");
        put(0x20, 0x52, b"UI", b"1.2.826.0.1.9");
        put(0x28, 0x02, b"US", &1u16.to_le_bytes());
        put(0x28, 0x04, b"CS", b"MONOCHROME2");
        put(0x28, 0x10, b"US", &self.rows.to_le_bytes());
        put(0x28, 0x11, b"US", &self.columns.to_le_bytes());
        put(0x28, 0x30, b"DS", b"1\\1");
        put(0x28, 0x100, b"US", &16u16.to_le_bytes());
        put(0x28, 0x101, b"US", &16u16.to_le_bytes());
        put(0x28, 0x102, b"US", &15u16.to_le_bytes());
        put(0x28, 0x103, b"US", &1u16.to_le_bytes());
        put(0x28, 0x1052, b"DS", b"0");
        put(0x28, 0x1053, b"DS", b"1");
        let pixels = usize::from(self.rows) * usize::from(self.columns);
        put(0x7fe0, 0x10, b"OW", &self.stored.to_le_bytes().repeat(pixels));
        out
    }

    /// As a DICOM file.
    pub fn file(&self) -> Vec<u8> {
        let mut file = file::head(&uid(&self.sop_class), &self.sop_instance(), &uid(EXPLICIT_LITTLE));
        file.extend_from_slice(&self.data_set());
        file
    }
}

/// Writes `count` slices of a series under names that say nothing.
pub fn write_series(folder: &Path, series: &str, count: usize) -> Vec<PathBuf> {
    std::fs::create_dir_all(folder).unwrap();
    let write = |n: usize| {
        let path = folder.join(format!("IM{:04}", (n * 7919) % 10_007));
        std::fs::write(&path, Slice::new(series, n).file()).unwrap();
        path
    };
    (0..count).map(write).collect()
}
