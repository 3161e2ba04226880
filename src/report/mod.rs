//! What a migration tells: counters and a picture while it goes on, events, and the report at its end.

mod account;
mod counters;
mod live;
mod memory;
mod metrics;
mod output;
mod phases;
mod postcopy;
mod summary;
mod trace;

pub use account::AccountFigures;
pub use counters::Counters;
pub use live::{History, Live, MapShape, MemoryMap, Screen, Step, draw, stages_by_cell};
pub use metrics::serve_metrics;
pub use output::{Event, LinkState, Output, Progress};
pub use phases::PhaseTimes;
pub use postcopy::{FaultFigures, PushFigures};
pub use summary::{FaultLatency, MigrationResult, Report, Role};
pub use trace::{TRACE_LIMIT, TraceFile, TraceRecord, read_trace};
