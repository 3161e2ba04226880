//! QEMU as a guest: an unmodified, running QEMU, reached through its QMP socket.
//!
//! QEMU does two things for us: it stops and starts its vCPUs, and it hands over or takes in its
//! device state, with a migration of its own (`x-ignore-shared`) that leaves out all RAM which is
//! shared memory. That RAM is ours to move: we map the same files, follow the writes to them on the
//! source, and serve the faults on them at the destination, all from outside.
//!
//! * [`QemuSource`] is the QEMU that the guest leaves, [`QemuDestination`] the one that waits for it.
//! * `qmp` and `commands` speak with the monitor, `text` reads what only its version for people tells.
//! * `process` finds the process behind the socket, `discover` its RAM, `guards` what forbids a move,
//!   `shape` what both sides must agree on.
//! * `announce` tells the network where a guest is now.
//! * `rescue` finds a QEMU again that an earlier farfault has left, and lets its guest run or ends it;
//!   [`LeftQemu`] goes on with moving it.
//! * `device_state` runs QEMU's own migration over a pair of sockets, with `settings` that it puts
//!   back. No path in the file system is involved, so it works whatever user or sandbox QEMU runs in.

mod announce;
mod commands;
mod destination;
mod device_state;
mod discover;
#[doc(hidden)]
pub mod fuzz;
mod guards;
mod left;
mod process;
mod qmp;
mod rescue;
mod settings;
mod shape;
mod source;
mod spawn;
#[cfg(test)]
mod tests;
mod text;
mod uffd;

pub use destination::QemuDestination;
pub use left::{LeftQemu, let_run_when_it_answers};
pub use qmp::QmpError;
pub use rescue::{Standing, end, is_running, let_run, still_stands};
pub use source::QemuSource;
pub use spawn::SpawnOptions;

use std::path::Path;

use self::qmp::Qmp;
use super::{GuestError, Whereabouts};
use crate::memory::GuestMemory;
use crate::memory::adopt::Adopted;

/// An error with advice.
fn refusal(message: impl Into<String>, hint: impl Into<String>) -> GuestError {
    GuestError { message: message.into(), hint: Some(hint.into()) }
}

/// An error that speaks for itself.
fn failure(message: impl Into<String>) -> GuestError {
    GuestError { message: message.into(), hint: None }
}

/// What a later process needs to find this QEMU again.
fn whereabouts(
    qmp: &mut Qmp,
    path: &Path,
    process: &Adopted,
    memory: &GuestMemory,
    addresses: &[u64],
) -> Whereabouts {
    let regions = memory.layout().regions().iter().cloned();
    let settings = settings::current(qmp).ok().and_then(|s| serde_json::to_value(s).ok());
    Whereabouts {
        monitor: "qemu".to_owned(),
        process: Some(process.identity()),
        // A later process may have another working directory.
        qmp: Some(std::path::absolute(path).unwrap_or_else(|_| path.to_owned())),
        ram: regions.zip(addresses.iter().copied()).collect(),
        runs: true,
        settings: settings.unwrap_or_default(),
        ..Whereabouts::default()
    }
}

impl From<QmpError> for GuestError {
    fn from(error: QmpError) -> Self {
        GuestError { message: error.to_string(), hint: error.hint() }
    }
}
