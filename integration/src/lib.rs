//! A laboratory for migrations: two network namespaces with an emulated link between them, QEMU
//! guests that check their own memory, and the processes that move them.
//!
//! A test makes a [`lab::Lab`], boots a [`qemu::Guest`] in it, moves it with [`farfault`] or with
//! QEMU's own methods ([`native`]), and reads from the guest's heartbeats ([`guest_log`],
//! [`timeline`]) what that did to it. [`ram`] compares the memory of both sides, [`leftovers`] finds
//! what was not cleaned up. Everything that is made here is removed on drop.

pub mod farfault;
pub mod guest_log;
pub mod lab;
pub mod leftovers;
pub mod native;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod ram;
pub mod timeline;
pub mod tsc;
pub mod wan;
