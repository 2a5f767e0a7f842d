//! Networks: packages that explain themselves, the engine that runs them, tiles over volumes, and the forest. Knows no medicine.

mod attributes;
mod checks;
pub mod engine;
mod floats;
mod fold;
pub mod forest;
pub mod grid;
pub mod kernels;
mod layers;
mod lower;
pub mod manifest;
pub mod monai;
mod onnx;
mod operators;
pub mod package;
pub mod signature;
mod weights;

pub mod tiles;
