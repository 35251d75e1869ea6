//! What runs cost: the tokens of their requests, the prices of models, and the sum of an attempt.

mod meter;
pub mod model;
pub mod price;
mod usage;

pub use meter::Meter;
pub use usage::{MAX_COUNT, Usage, count};
