//! What is moved: a guest, behind two small traits, one for each end of the migration.
//!
//! A virtual machine monitor joins by telling its shape, giving its RAM as shared memory that
//! farfault can map too, and handing over its device state as opaque bytes. Everything else (dirty
//! tracking, sending, faults) is the engine's work. `examples/tiny_vmm.rs` is a complete small
//! implementation; [`threads`] and [`kvm`] are two larger ones.
//!
//! # What a monitor must be able to do
//!
//! * **Share its RAM**: every byte that the guest can reach lies in files of shared memory (memfd,
//!   tmpfs), mapped `MAP_SHARED`. The source tracks the monitor's own mapping of them; what another
//!   process writes to RAM behind the monitor's back (vhost-user, DPDK) is not seen.
//! * **Stand still**: after [`SourceGuest::pause`] nothing writes to RAM, neither vCPUs nor devices.
//! * **Save its devices without their RAM**, and load them while RAM is still empty: each touch of RAM
//!   during the load is a page fault, which is served from the source.
//! * **Load without running**: the guest may run on the destination only when
//!   [`DestinationGuest::run`] is called.
//!
//! # The order of calls
//!
//! | source | destination |
//! |---|---|
//! | `shape`, `memory` | `shape`, `memory`: compared before anything moves |
//! | `track` | `userfault`: from here on RAM is empty and faults are served |
//! | (pages are sent while the guest runs) | (pages are written through `memory`) |
//! | `pause`, `save_device_state` | |
//! | | `load_device_state` |
//! | (the decision: from here on it never runs here again) | `run` |
//! | (missing pages are sent) | (missing pages are faulted in) |
//! | `release` | `release` |
//!
//! `pause` and `save_device_state` may also come earlier, followed by `resume`: a rehearsal, after
//! which the final device state is sent as a difference. If the migration fails before the decision,
//! the source gets `resume` and the destination `discard`.
//!
//! All methods block; the session calls them from a thread where that does no harm. They are never
//! called from two threads at once.

#[cfg(target_arch = "x86_64")]
pub mod kvm;
pub mod qemu;
mod shared;
pub mod threads;
pub mod workload;

pub use shared::SharedGuest;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::memory::adopt::{HugePages, ProcessIdentity};
use crate::memory::{
    DirtyTracker, GuestMemory, MemoryError, MemoryLayout, RegionLayout, TrackerKind, Userfault,
};

/// The rate of this host's time-stamp counter in kHz, measured once; `None` where there is no such
/// counter.
pub(crate) fn host_tsc_khz() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    return Some(kvm::tsc_khz());
    #[cfg(not(target_arch = "x86_64"))]
    return None;
}

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
    let size = |bytes: u64| match bytes % (1 << 20) {
        0 => format!("{} MiB", bytes >> 20),
        _ => format!("{bytes} bytes"),
    };
    let list = layout.regions().iter().map(|r| format!("{} of {}", r.name, size(r.size_bytes)));
    list.collect::<Vec<_>>().join(", ")
}

/// Where a guest's monitor is, for who has to find it again without us.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whereabouts {
    /// The kind of monitor, as in [`Shape::monitor`].
    pub monitor: String,
    /// Its process, where that is not our own.
    pub process: Option<ProcessIdentity>,
    /// Where it takes orders.
    pub qmp: Option<PathBuf>,
    /// True when farfault has started it, and so may end it.
    pub started_here: bool,
    /// RAM files that go with it when farfault ends it.
    pub ram_files: Vec<PathBuf>,
    /// Each RAM region, and where it is in that process.
    pub ram: Vec<(RegionLayout, u64)>,
    /// False for a guest that its owner has paused.
    pub runs: bool,
    /// What farfault changes in the monitor while the guest stands still, as it was before; only the
    /// monitor's own module reads it.
    pub settings: serde_json::Value,
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

impl GuestError {
    /// An error that says what was wrong and where.
    pub fn new(message: impl Into<String>) -> Self {
        GuestError { message: message.into(), hint: None }
    }

    /// Adds what a person can do about it.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        GuestError { hint: Some(hint.into()), ..self }
    }
}

impl From<MemoryError> for GuestError {
    fn from(error: MemoryError) -> Self {
        GuestError { message: error.to_string(), hint: error.hint() }
    }
}

/// The guest on the host that it leaves.
pub trait SourceGuest: Send {
    /// What the other side must be like. Does not change during a migration.
    fn shape(&self) -> &Shape;

    /// The guest's RAM, mapped for reading: farfault's alias, not the mapping that the guest uses.
    fn memory(&self) -> Arc<GuestMemory>;

    /// Where its monitor is: for the record that a later process goes by.
    fn whereabouts(&self) -> Whereabouts {
        in_this_process(self.shape())
    }

    /// False when the guest's owner has paused it: it is then left paused on the destination too.
    fn runs(&self) -> bool {
        true
    }

    /// Whether it runs at this moment: its owner may pause it, or let it run, at any time.
    fn is_running(&mut self) -> Result<bool, GuestError> {
        Ok(self.runs())
    }

    /// The tracker that will follow the guest's writes, not armed yet. Called once per migration.
    ///
    /// A monitor without dirty tracking of its own hands the work to
    /// [`open_tracker`](crate::memory::open_tracker), which needs no help from the monitor.
    /// [`TrackerKind::Auto`] leaves the choice to the monitor.
    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError>;

    /// True when devices may write into RAM past the page tables while the guest runs: into pages that the kernel has
    /// pinned for a request. Such a write may come after the page was collected and read, and no later collection tells
    /// of it. So the guest then stands still for a moment, when no request is under way, behind the arming of what
    /// [`Self::track`] gives, and whenever that is asked.
    fn writes_past_page_tables(&mut self) -> Result<bool, GuestError> {
        Ok(false)
    }

    /// Stops all vCPUs and devices: after this returns no byte of RAM changes. Harmless when paused.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Device state of the paused guest, at most [`DEVICE_STATE_LIMIT_BYTES`]: all that the
    /// destination needs beside the RAM. Opaque to farfault; the monitor versions it. It may be asked
    /// for more than once, and should then differ in few bytes.
    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError>;

    /// True when [`Self::save_device_state`] gives some kilobytes only: it is then not worth a rehearsal.
    fn has_small_state(&self) -> bool {
        false
    }

    /// Lets the guest run on here: after a rehearsal, or because the migration failed before the
    /// decision. Must work after [`Self::save_device_state`]. Harmless when running.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Whether the guest still stands as it did when its device state was taken. One that somebody has let run
    /// meanwhile is stopped again, since it runs elsewhere. Asked now and then between the decision and
    /// [`Self::release`]; never after [`Self::resume`].
    fn keep_still(&mut self) -> Result<bool, GuestError> {
        Ok(true)
    }

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

    /// Where its monitor is: for the record that a later process goes by.
    fn whereabouts(&self) -> Whereabouts {
        in_this_process(self.shape())
    }

    /// Registers all RAM with a userfaultfd (MISSING | MINOR) and makes it all holes. Called once,
    /// before any content arrives and before any device state is loaded. The userfaultfd is made in
    /// the process that runs the guest, and serves kernel-mode faults too: KVM makes such.
    fn userfault(&mut self) -> Result<Userfault, GuestError>;

    /// Loads device state, and leaves the guest paused. Touches RAM, so that faults must be served by
    /// another thread meanwhile. State that arrived over the network is not trusted: whatever it
    /// holds, this returns an error or a guest that can only harm itself.
    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// Lets the guest run. Harmless when running.
    fn run(&mut self) -> Result<(), GuestError>;

    /// After [`Self::run`] has failed: true when it is certain that the guest has not run and will not.
    fn stands_still(&mut self) -> bool {
        false
    }

    /// Let go of the guest and leave it as it is: running when all is well, else loaded and paused, or
    /// waiting for pages until a person has decided.
    fn release(&mut self) -> Result<(), GuestError>;

    /// Gathers the pages of the guest, which has all of them, into huge pages, where its monitor's mapping
    /// allows that. `None` where nobody knows how.
    fn gather_huge_pages(&mut self) -> Result<Option<HugePages>, GuestError> {
        Ok(None)
    }

    /// Let go of the guest with pages missing: as [`Self::release`], and what another process needs to
    /// take over stays.
    fn leave(&mut self) -> Result<(), GuestError> {
        self.release()
    }

    /// The migration failed before the guest ran here: end the monitor if farfault started it, so
    /// that nothing is left behind. Must not need RAM that has not arrived.
    fn discard(&mut self) -> Result<(), GuestError>;
}

/// A monitor that lives in this process, and so ends with it.
fn in_this_process(shape: &Shape) -> Whereabouts {
    Whereabouts { monitor: shape.monitor.clone(), runs: true, ..Whereabouts::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RegionLayout;

    #[test]
    fn ram_that_differs_by_a_page_is_told() {
        let shape = |size_bytes| {
            let region = RegionLayout { name: "ram0".to_owned(), size_bytes };
            let memory = MemoryLayout::new(vec![region]);
            Shape { monitor: "qemu".to_owned(), memory, properties: BTreeMap::new() }
        };
        let (here, there) = (shape(1 << 20), shape((1 << 20) + 4096));
        assert!(here.differences(&here).is_empty());
        let told = "RAM: source has ram0 of 1 MiB, destination has ram0 of 1052672 bytes";
        assert_eq!(here.differences(&there), [told]);
    }
}
