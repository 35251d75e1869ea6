//! The wire: connections, requests, answers. It knows no database, no settings of the service and nobody's rights.

pub mod address;
pub mod cors;
pub mod page;
pub mod problem;
pub mod reply;
pub mod request;
pub mod selection;
pub mod serve;
pub mod unreadable;
