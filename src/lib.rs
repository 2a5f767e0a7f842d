//! scanside: images in, quantized networks, findings out, on a small box beside the scanner.
//!
//! ```text
//! wire/file -> ingest -> series -> volume (mmap) -> exam -> finding -> report -> wire/file/DICOM
//! ```
//! A straight line; the modules below follow it, and each imports only from those before it.

pub mod study;

pub mod geometry;

pub mod pool;

pub mod link;

pub mod volume;

pub mod dicom;

pub mod nifti;

pub mod nrrd;

pub mod series;

pub mod imaging;

pub mod infer;

pub mod finding;

pub mod exam;

pub mod phantom;

pub mod report;

pub mod ingest;

pub mod config;

pub mod update;

pub mod service;
