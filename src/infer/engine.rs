//! A network from ONNX bytes to outputs: the only user of tract.

use ndarray::{ArrayD, ArrayViewD};

use crate::pool::Pool;

/// A network that cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The bytes are not a network this engine can plan; names the node where there is one.
    #[error("the network cannot be loaded: {0}")]
    Load(String),
    /// An input of another shape than the network's.
    #[error("input {index} has the shape {got:?}, the network takes {want:?}")]
    InputShape {
        /// Which input.
        index: usize,
        /// Its shape.
        got: Vec<usize>,
        /// The network's.
        want: Vec<usize>,
    },
    /// It failed while running.
    #[error("the network failed: {0}")]
    Run(String),
}

/// A planned network, shared by the sessions that run it.
pub struct Network {
    input_shapes: Vec<Vec<usize>>,
    output_shapes: Vec<Vec<usize>>,
}

impl Network {
    /// Parses, shapes, lowers and plans an ONNX network.
    ///
    /// # Errors
    /// [`EngineError::Load`].
    pub fn load(_onnx: &[u8]) -> Result<Self, EngineError> {
        Err(EngineError::Load("not written yet".into()))
    }

    /// Shapes of the inputs, as in the file (N first).
    pub fn input_shapes(&self) -> &[Vec<usize>] {
        &self.input_shapes
    }

    /// Shapes of the outputs, as in the file.
    pub fn output_shapes(&self) -> &[Vec<usize>] {
        &self.output_shapes
    }

    /// Bytes that one [`Session`] holds at its peak, weights excluded; known before the first run.
    pub fn arena_bytes(&self) -> usize {
        0
    }

    /// A session: the arena and state of one run at a time. Make one per concurrent user, and keep it.
    pub fn session(&self) -> Result<Session<'_>, EngineError> {
        Ok(Session { network: self })
    }
}

/// One runner of a network; reuses its memory from run to run.
pub struct Session<'n> {
    network: &'n Network,
}

impl Session<'_> {
    /// Runs the network once, split over the pool; the result does not depend on the number of threads.
    ///
    /// # Errors
    /// [`EngineError::InputShape`] and [`EngineError::Run`].
    pub fn run(&mut self, _pool: &Pool, _inputs: &[ArrayViewD<'_, f32>]) -> Result<Vec<ArrayD<f32>>, EngineError> {
        let _ = self.network;
        Err(EngineError::Run("not written yet".into()))
    }
}
