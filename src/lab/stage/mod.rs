//! The stage of an experiment on real guests: two network namespaces with an emulated link between
//! them, QEMU guests that check their own memory, and the processes that move them.
//!
//! An experiment opens a [`place::Place`], prepares [`qemu::Guest`]s in it, moves one with [`farfault`] or
//! with QEMU's own methods ([`native`]), and reads from the guest's heartbeats ([`guest_log`],
//! [`timeline`]) what that did to it; [`watch`] sees what it cost, [`film`] where the pages were, [`stream`] what a viewer missed; a [`ballast`] is memory for the destination. Everything that is made here is removed on drop.

pub mod ballast;
pub mod farfault;
pub mod film;
pub mod guest_log;
pub mod native;
pub mod place;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod stream;
pub mod timeline;
pub mod wan;
pub mod watch;
