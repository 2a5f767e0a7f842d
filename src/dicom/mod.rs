//! Bytes to instances, associations, and our own objects: the only user of the dicom crates.
