//! Guest memory as farfault sees it from outside: regions and their alias mappings, holes, dirty
//! tracking, the page table of the destination, fault handling, and the adoption of a running process.

pub mod adopt;
mod error;
mod fault;
#[doc(hidden)]
pub mod fuzz;
mod guest_mapping;
mod guest_memory;
mod heap;
mod huge_file;
#[cfg(test)]
mod huge_pool;
mod layout;
mod probe;
mod sys;
mod table;
#[cfg(test)]
mod testing;
mod tracker;
mod units;
mod userfault;

pub use error::MemoryError;
pub use fault::{AskedFor, FaultOptions, FaultServer, FaultStats, Mapper, Touched};
pub use guest_mapping::GuestMapping;
pub use guest_memory::{Access, GuestMemory, RegionBacking};
pub use heap::keep_freed_memory;
pub use layout::{MemoryLayout, RegionLayout};
pub use probe::{Capability, HostCapabilities, Status};
pub use table::{Claim, PageState, PageTable, Stage, StageCounts, Want};
pub use tracker::{
    DirtyTracker, HashScan, ReadWitness, TRACK_FEATURES, TrackerKind, UnknownTracker, WriteProtect,
    open_tracker,
};
pub use units::Units;
pub use userfault::{FAULT_FEATURES, Fault, FaultKind, Userfault};
