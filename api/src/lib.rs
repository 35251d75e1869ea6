//! The gate: HTTP in, rows out. It knows who asks, reads what they want, and stores it; it never runs a job and never
//! holds an Anthropic credential.
//!
//! Read [`routes`] first: every path and who answers it. Then the way of a request: [`mod@serve`] takes it off the wire,
//! [`caller`] and [`keyring`] say who asks, [`limits`] whether not too often, [`request`] reads it, the resources do it
//! ([`jobs`], [`sessions`], [`keys`], [`budgets`], [`usage`], [`audit`], [`health`]), [`reply`] and [`problem`] answer.

pub mod address;
pub mod audit;
pub mod budgets;
pub mod caller;
pub mod config;
pub mod context;
pub mod cors;
pub mod health;
pub mod housekeeping;
pub mod jobs;
pub mod keyring;
pub mod keys;
pub mod limits;
pub mod problem;
pub mod repeat;
pub mod reply;
pub mod request;
pub mod routes;
pub mod serve;
pub mod sessions;
pub mod settings;
pub mod streams;
pub mod usage;

pub use config::Config;
pub use context::{Context, StartError};
pub use serve::serve;
