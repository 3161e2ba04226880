//! The network between the two hosts: a QUIC connection, both ends authenticated.
//!
//! * [`Listener::bind`] makes a one-time identity and prints it as a [`Ticket`]; [`connect()`] proves the
//!   ticket's secret. Afterwards both ends hold a [`Link`].
//! * A link has *lanes* ([`Lane`]), each with its own priority, limits and receive queue, so that a
//!   page fault never stands behind bulk data at either end: control messages in order on one
//!   stream; everything else one message a stream, which may arrive in any order.
//! * Where one connection's work fills a core, bulk takes more of them ([`Connections`]).
//! * In the network the same is the congestion controller's work: see [`congestion`].
//!
//! Everything that a peer sends is bounded before it is kept. An unauthenticated peer gets one small
//! message and five seconds, and cannot disturb a migration that waits or runs.

pub mod congestion;

mod addresses;
mod base32;
mod batches;
mod buffers;
mod bulk;
mod connect;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod identity;
mod incoming;
mod lanes;
mod link;
mod listener;
mod options;
mod proof;
mod push;
mod qlog;
mod quic;
mod saved;
mod socket;
#[cfg(test)]
mod tests;
mod ticket;
mod unkept;

pub(crate) use buffers::Buffers;
pub(crate) use bulk::MAX_CONNECTIONS;
pub use connect::{connect, reconnect};
pub use error::{ConnectError, LinkError, ListenError};
pub use lanes::Lane;
pub use link::{Link, LinkStats};
pub use listener::Listener;
pub use options::{Connections, TransportOptions};
pub use proof::SessionKey;
pub use qlog::Qlog;
pub use saved::{SavedError, SavedReceiver, SavedSender};
pub use ticket::{MigrationId, Secret, Ticket, TicketError};
