//! Pure image algorithms on array views; they know voxels, spacing and affines, and no files.

mod font;
mod lines;

pub mod blobs;
pub mod components;
pub mod isosurface;
pub mod median;
pub mod morphology;
pub mod overlap;
pub mod picture;
pub mod plot;
pub mod registration;
pub mod render;
pub mod resample;
pub mod smooth;
pub mod stats;
pub mod terminal;
pub mod threshold;
pub mod timeseries;
pub mod view;
