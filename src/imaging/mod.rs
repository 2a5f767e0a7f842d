//! Pure image algorithms on array views; they know voxels, spacing and affines, and no files.

pub mod isosurface;
