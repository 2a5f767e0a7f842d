//! Networks: packages that explain themselves, the engine that runs them, tiles over volumes, and the forest. Knows no medicine.

pub mod engine;
mod onnx;
