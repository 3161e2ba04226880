//! farfault moves a running virtual machine to another host over QUIC.

pub mod guest;
pub mod memory;
pub mod page;
