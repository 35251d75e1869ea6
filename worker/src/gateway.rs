//! .

pub mod failure;
