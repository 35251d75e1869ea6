//! What the API and the worker mean by the same word, and the one way to the database.
//!
//! * Values that are right by construction: [`job`], [`event`], [`session`], [`key`], [`budget`], [`money`], [`id`],
//!   [`clock`].
//! * The database, SQLite or PostgreSQL: [`storage`]. Reads are methods of `Store`, and so are writes that are a
//!   transaction of their own; those that make up a caller's transaction are methods of `Tx`.
//! * What every process needs at its start and end: [`mod@env`], [`telemetry`], [`shutdown`]; and on its disk:
//!   [`data_dir`], [`disk`].

pub mod budget;
pub mod clock;
pub mod data_dir;
pub mod disk;
pub mod env;
pub mod event;
pub mod id;
pub mod job;
pub mod key;
pub mod money;
pub mod session;
pub mod shutdown;
pub mod storage;
pub mod telemetry;
