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
//! * `device_state` runs QEMU's own migration over a pair of sockets, with `settings` that it puts
//!   back. No path in the file system is involved, so it works whatever user or sandbox QEMU runs in.

mod commands;
mod destination;
mod device_state;
mod discover;
#[doc(hidden)]
pub mod fuzz;
mod guards;
mod process;
mod qmp;
mod settings;
mod shape;
mod source;
mod spawn;
#[cfg(test)]
mod tests;
mod text;
mod uffd;

pub use destination::QemuDestination;
pub use qmp::QmpError;
pub use source::QemuSource;
pub use spawn::SpawnOptions;

use super::GuestError;

/// An error with advice.
fn refusal(message: impl Into<String>, hint: impl Into<String>) -> GuestError {
    GuestError { message: message.into(), hint: Some(hint.into()) }
}

/// An error that speaks for itself.
fn failure(message: impl Into<String>) -> GuestError {
    GuestError { message: message.into(), hint: None }
}

impl From<QmpError> for GuestError {
    fn from(error: QmpError) -> Self {
        GuestError { message: error.to_string(), hint: error.hint() }
    }
}
