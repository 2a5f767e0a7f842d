//! Pure image algorithms on array views; they know voxels, spacing and affines, and no files.

mod lines;

pub mod blobs;
pub mod isosurface;
pub mod overlap;
pub mod smooth;
