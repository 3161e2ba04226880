//! What would happen if this guest were moved: `farfault estimate` looks at a running guest ([`Sample`]) and
//! plays each strategy through ([`predict`]), without moving anything.

mod copies;
mod model;
mod sample;

pub use model::{Prediction, predict, recommend};
pub use sample::Sample;
