//! What can be chosen about the transport.

use std::num::NonZero;

use super::congestion::Congestion;
use super::qlog::Qlog;

/// How many connections a link's sender opens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Connections {
    /// One, and more for bulk when the network takes more than a core can send: up to half of the cores, and eight.
    #[default]
    Auto,
    /// So many from the beginning.
    Exactly(NonZero<u8>),
}

/// Settings of one end of a link. The two ends need not agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportOptions {
    /// Hard cap on what this end sends, IP and UDP headers included; `None` is no cap.
    pub bandwidth_limit_bytes_per_s: Option<u64>,
    /// A silent link is kept alive by a packet at this interval.
    pub keep_alive_ms: u64,
    /// A link without any sign of the peer for so long is dead.
    pub idle_timeout_ms: u64,
    /// Bound on [`connect`](super::connect()), over all addresses of the ticket.
    pub connect_timeout_ms: u64,
    /// Push data that this end holds for a consumer that has not taken it yet; the sender stops there.
    pub push_window_bytes: u64,
    /// Largest control message, both ways.
    pub control_message_limit_bytes: usize,
    /// Socket buffers asked for. A buffer that is too small loses packets at high rates.
    pub socket_buffer_bytes: usize,
    /// Largest UDP payload tried by MTU discovery; `None` follows the route's MTU.
    pub mtu_limit_bytes: Option<u16>,
    /// How many connections the sender opens.
    pub connections: Connections,
    /// The congestion controller.
    pub congestion: Congestion,
    /// Where packets and the congestion controller's figures are logged.
    pub qlog: Option<Qlog>,
}

impl Default for TransportOptions {
    fn default() -> Self {
        TransportOptions {
            bandwidth_limit_bytes_per_s: None,
            keep_alive_ms: 1_000,
            idle_timeout_ms: 5_000,
            connect_timeout_ms: 10_000,
            push_window_bytes: 64 << 20,
            control_message_limit_bytes: 64 << 20,
            socket_buffer_bytes: 4 << 20,
            mtu_limit_bytes: None,
            connections: Connections::default(),
            congestion: Congestion::default(),
            qlog: None,
        }
    }
}
