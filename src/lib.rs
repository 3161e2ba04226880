//! farfault moves a running virtual machine to another host over QUIC.

pub mod page;
pub mod transport;
