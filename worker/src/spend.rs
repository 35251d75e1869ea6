//! What runs cost: the tokens of their requests, the prices of models, and the sum of an attempt.

pub mod answer;
pub mod meter;
pub mod price;
mod reported;
mod usage;

pub use meter::Meter;
pub use reported::Reported;
pub use usage::{MAX_COUNT, Usage, count};
