//! The Claude Code CLI as a stream of messages: how it is started, spoken to and understood.

pub mod command;
pub mod line;
pub mod message;
pub mod process;
pub mod program;
pub mod sandbox;
