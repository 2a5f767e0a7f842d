//! Bytes to instances, associations, and our own objects: the only user of the dicom crates.

pub mod build;
mod elements;
mod header;
mod instance;
mod jpeg12;
mod pixels;
mod transfer;
mod unreleased;

#[cfg(test)]
mod tests;

pub mod association;
pub mod client;
pub mod dimse;
pub mod file;
pub mod negotiation;

pub use dicom_core::Tag;
pub use dicom_dictionary_std::tags;
pub use header::{FrameHeader, Header, PixelFormat, UltrasoundRegion};
pub use pixels::luminance;
pub use instance::{INSTANCE_BYTES_MAX, Instance};
pub use transfer::{Codec, TransferSyntax, decodable_transfer_syntaxes};
pub use unreleased::Unreleased;
