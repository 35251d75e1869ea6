//! What API and worker have in common, and the only way to the database.
//!
//! * Values that are valid by construction: [`job`], [`event`], [`session`], [`key`], [`budget`], [`model`], [`money`],
//!   [`id`], [`clock`].
//! * The database, SQLite or PostgreSQL: [`storage`]. Reads are methods of `Store`, and so are writes that are a
//!   whole transaction; parts of a caller's transaction are methods of `Tx`.
//! * What every process needs when it starts and stops: [`mod@env`], [`telemetry`], [`shutdown`]; and on its disk:
//!   [`data_dir`], [`disk`], [`permissions`].
//! * What may be printed of text from outside: [`text`].
//! * Webhooks, as far as no I/O is needed: [`webhook`], with [`sealed`], [`network`] and [`mod@retry_after`].

pub mod approved;
pub mod budget;
pub mod clock;
pub mod data_dir;
pub mod delivery;
pub mod disk;
pub mod env;
pub mod event;
pub mod files;
pub mod id;
pub mod job;
pub mod key;
pub mod model;
pub mod money;
pub mod network;
pub mod permissions;
pub mod retry_after;
pub mod rule;
pub mod sealed;
pub mod session;
pub mod shutdown;
pub mod spelling;
pub mod storage;
pub mod telemetry;
pub mod text;
pub mod view;
pub mod webhook;
