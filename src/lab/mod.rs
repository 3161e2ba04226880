//! Experiments on one machine: an emulated link.
//!
//! * [`link`] is the model of one direction of a link, without a socket or a clock; [`spec`] reads link
//!   descriptions as people write them (`100Mbit,40ms,0.1%`).
//! * [`relay`] puts two such links between two UDP sockets, in this process and without privileges.
//!   `tools/wan` puts the same model between two network namespaces.
//! * [`replay`] is the second half of a migration without guest, link or clock: for comparing the orders in
//!   which pages can go.

pub mod link;
pub mod relay;
pub mod replay;
pub mod spec;
