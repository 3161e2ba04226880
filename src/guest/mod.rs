//! What is moved: a guest, behind two small traits, one for each end of the migration.
//!
//! A virtual machine monitor joins by telling its shape, giving its RAM as shared memory that
//! farfault can map too, and handing over its device state as opaque bytes. Everything else (dirty
//! tracking, sending, faults) is the engine's work. All methods block; the session calls them from a
//! thread where that does no harm.

pub mod qemu;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::memory::{DirtyTracker, GuestMemory, MemoryError, MemoryLayout, TrackerKind, Userfault};

/// Largest device state that a guest may hand over.
pub const DEVICE_STATE_LIMIT_BYTES: usize = 256 << 20;

/// What both hosts must agree on before anything moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// The kind of monitor: "qemu", "kvm", "threads".
    pub monitor: String,
    /// The RAM regions.
    pub memory: MemoryLayout,
    /// Everything else that must be equal, as name and value: machine type, version of the monitor,
    /// CPU model, number of vCPUs, devices.
    pub properties: BTreeMap<String, String>,
}

impl Shape {
    /// What differs, one line each, worded for a person; empty when the guest can move.
    pub fn differences(&self, destination: &Shape) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, here: &str, there: &str| {
            if here != there {
                found.push(format!("{what}: source has {here}, destination has {there}"));
            }
        };
        compare("monitor", &self.monitor, &destination.monitor);
        compare("RAM", &ram(&self.memory), &ram(&destination.memory));
        let names: std::collections::BTreeSet<_> =
            self.properties.keys().chain(destination.properties.keys()).collect();
        for name in names {
            let value = |shape: &Shape| {
                shape.properties.get(name).cloned().unwrap_or_else(|| "nothing".to_owned())
            };
            compare(name, &value(self), &value(destination));
        }
        found
    }
}

fn ram(layout: &MemoryLayout) -> String {
    let list = layout.regions().iter().map(|r| format!("{} of {} MiB", r.name, r.size_bytes >> 20));
    list.collect::<Vec<_>>().join(", ")
}

/// What went wrong with a guest or its monitor.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct GuestError {
    /// What was wrong and where.
    pub message: String,
    /// What a person can do about it.
    pub hint: Option<String>,
}

impl From<MemoryError> for GuestError {
    fn from(error: MemoryError) -> Self {
        GuestError { hint: error.hint(), message: error.to_string() }
    }
}

/// The guest on the host that it leaves.
pub trait SourceGuest: Send {
    /// What the other side must be like.
    fn shape(&self) -> &Shape;

    /// The guest's RAM, mapped for reading.
    fn memory(&self) -> Arc<GuestMemory>;

    /// Starts to follow the guest's writes. Called once per migration.
    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError>;

    /// Stops all vCPUs and devices: after this returns no byte of RAM changes. Harmless when paused.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Device state of the paused guest, at most [`DEVICE_STATE_LIMIT_BYTES`].
    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError>;

    /// Lets the guest run on here: the migration failed before the decision. Harmless when running.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// The guest now runs elsewhere and every page has arrived: leave it stopped here, or end its
    /// monitor when `quit`.
    fn release(&mut self, quit: bool) -> Result<(), GuestError>;
}

/// The waiting guest on the host that it goes to.
pub trait DestinationGuest: Send {
    /// What this side is like.
    fn shape(&self) -> &Shape;

    /// The guest's RAM, mapped for writing.
    fn memory(&self) -> Arc<GuestMemory>;

    /// Registers all RAM with a userfaultfd (MISSING | MINOR) and makes it all holes. Called once,
    /// before any device state is loaded.
    fn userfault(&mut self) -> Result<Userfault, GuestError>;

    /// Loads device state. Touches RAM, so that faults must be served by another thread meanwhile.
    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// Lets the guest run.
    fn run(&mut self) -> Result<(), GuestError>;

    /// The guest runs here and all is done: let go of it, leave it running.
    fn release(&mut self) -> Result<(), GuestError>;

    /// The migration failed before the guest ran here: end the monitor if farfault started it, so
    /// that nothing is left behind. Must not need RAM that has not arrived.
    fn discard(&mut self) -> Result<(), GuestError>;
}
