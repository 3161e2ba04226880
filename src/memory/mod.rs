//! Guest memory as farfault sees it from outside: regions and their alias mappings, holes, dirty
//! tracking, the page table of the destination, fault handling, and the adoption of a running process.

mod layout;

pub use layout::{MemoryLayout, RegionLayout};
