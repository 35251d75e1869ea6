//! Webhooks: how a delivery is signed, when it is tried again, and where it may go. Nothing here does I/O.

pub mod address;
pub mod schedule;
pub mod secrets;
pub mod signature;
