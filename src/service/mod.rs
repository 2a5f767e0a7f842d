//! The only wiring: doors, assembler, exams, journal and links on their threads.

pub mod analysis;
pub mod supervisor;
