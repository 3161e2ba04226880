//! `farfault lab`: a matrix of guests, links and methods, run again and again, and what came of it.
//!
//! | file | subject |
//! |---|---|
//! | `scenario.rs`, `shipped.rs` | what is to be tried, and the scenarios that farfault brings along |
//! | `run.rs` | all runs, one after the other |
//! | `cell.rs`, `builtin.rs` | one run, on a guest in QEMU and on a built-in one |
//! | `record.rs`, `store.rs` | what is kept of a run, and where |
//! | `table.rs`, `report.rs` | medians, CSV and Markdown |
//! | `plots.rs`, `panels.rs`, `memory.rs`, `frames.rs`, `chart.rs`, `sharp.rs` | pictures of it |
//! | `orders.rs` | a picture of replays |

mod across;
mod builtin;
mod cell;
mod chart;
mod frames;
mod memory;
mod orders;
mod panels;
mod plots;
mod record;
mod report;
mod run;
mod scenario;
mod sharp;
mod shipped;
mod store;
mod table;
#[cfg(test)]
mod testing;

pub use orders::{Replayed, draw_orders};
pub use record::{Machine, Measured, Outcome, Record};
pub use report::write_report;
pub use run::{RunOptions, Tally, run};
pub use scenario::{Cell, CutPart, GuestKind, GuestPart, LinkPart, MethodPart, Scenario};
pub use shipped::{SHIPPED, Shipped};
pub use store::Store;
