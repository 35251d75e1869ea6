//! The life of one run, top to bottom: claim, prepare, run, finish.

pub mod outcome;
