//! farfault moves a running virtual machine to another host over QUIC.

pub mod cli;
pub mod codec;
pub mod engine;
pub mod guest;
pub mod lab;
pub mod memory;
pub mod page;
pub mod report;
pub mod session;
pub mod transport;
pub mod units;
pub mod wire;
