//! Tests of whole migrations. The laboratory in which they happen is farfault's own
//! ([`farfault::lab::stage`](::farfault::lab::stage)); here is what only tests need: [`lab`] sets it up with the programs of this workspace,
//! [`ram`] compares the memory of both sides, [`huge_pool`] has huge pages for a guest, [`leftovers`] finds what was not cleaned up,
//! [`moving`] moves a guest and does things to it, [`recovery`] starts again what was killed, [`skip`] tells of what a test lacks.

pub mod huge_pool;
pub mod lab;
pub mod leftovers;
pub mod moving;
pub mod ram;
pub mod recovery;
pub mod skip;

pub use ::farfault::lab::stage::{farfault, guest_log, native, process, qemu, qmp, timeline, wan};
