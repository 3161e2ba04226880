//! farfault moves a running virtual machine to another host over QUIC.

pub mod codec;
pub mod page;
pub mod wire;
