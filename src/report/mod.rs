//! What a migration tells: counters while it goes on, events, and the report at its end.

mod counters;
mod output;
mod summary;

pub use counters::Counters;
pub use output::{Event, Output, Progress};
pub use summary::{FaultLatency, MigrationResult, Report, Role};
