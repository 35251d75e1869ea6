//! The gate: HTTP in, rows out. It knows who asks, reads what they want, and stores it; it never runs a job and never
//! holds an Anthropic credential.
//!
//! Read [`routes`] first: every path and who answers it. Three wings, and imports go down only: the resources
//! ([`jobs`], [`sessions`], [`keys`], [`budgets`], [`usage`], [`audit`], [`health`]) on top, [`gate`] (who may),
//! [`mod@http`] (the wire). [`context`] is what the handlers of resources share.

pub mod audit;
pub mod budgets;
pub mod chat;
pub mod config;
pub mod context;
pub mod docs;
pub mod files;
pub mod gate;
pub mod health;
pub mod housekeeping;
pub mod http;
pub mod jobs;
pub mod keys;
pub mod queue;
pub mod routes;
pub mod service;
pub mod sessions;
pub mod settings;
pub mod templates;
pub mod tokens;
pub mod usage;
pub mod webhooks;

pub use config::Config;
pub use context::{Context, StartError};
pub use service::serve;
