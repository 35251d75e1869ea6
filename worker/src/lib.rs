//! The runner: takes queued jobs, runs the Claude Code CLI for each, records what happened and what it cost.
//!
//! Start reading at [`queues`] (what wakes a slot), then [`run_job`] (the life of one run, top to bottom).

pub mod claude;
pub mod gateway;
pub mod guard;
pub mod run_job;
pub mod workspace;
