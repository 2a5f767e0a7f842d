//! What a sender still owes when the way to the receiver broke: the receiver takes a series for complete only when a
//! sender of it has gone in good order, so each series of the broken way has to be named once more on the next.

use std::collections::BTreeMap;
use std::path::Path;

use super::Instance;
use crate::study::Uid;

/// The series of a delivery, each with the file that was stored last.
#[derive(Debug, Default)]
pub struct Unreleased<'a> {
    open: BTreeMap<Uid, &'a Path>,
    broken: BTreeMap<Uid, &'a Path>,
}

impl<'a> Unreleased<'a> {
    /// The file was stored. One without images belongs to no series that is waited for.
    pub fn stored(&mut self, file: &[u8], path: &'a Path) {
        if let Ok(instance) = Instance::parse(file) {
            self.open.insert(instance.header.series, path);
        }
    }

    /// The way broke before it was released.
    pub fn broken(&mut self) {
        self.broken.append(&mut self.open);
    }

    /// A file that the receiver has and should get once more before the release: of a series which came by a broken way only.
    pub fn again(&self) -> Option<&'a Path> {
        self.broken.iter().find(|(series, _)| !self.open.contains_key(*series)).map(|(_, path)| *path)
    }

    /// The receiver does not want this file again.
    pub fn unwanted(&mut self, path: &Path) {
        self.broken.retain(|_, last| *last != path);
    }
}
