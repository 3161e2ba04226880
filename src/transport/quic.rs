//! How QUIC is set for a link.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::TransportOptions;
use super::addresses::route_payload_bytes;
use super::congestion::Gauges;
use super::lanes::{MAX_PUSH_WINDOW_BYTES, MAX_STREAMS};
use super::qlog::Qlog;

/// Room for the lanes beside push, in each direction, before they must be consumed.
const OTHER_LANES_WINDOW_BYTES: u64 = 64 << 20;
/// One stream's share: a device state or a control message goes this fast per round trip.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// What a peer may send before it has proved anything.
pub(super) const STRANGER_WINDOW_BYTES: u32 = 16 << 10;
/// Of jumbo frames of 9,000 bytes, over IPv4.
pub(super) const MAX_PAYLOAD_BYTES: u16 = 8_972;
/// Ethernet without tunnels, where the route tells nothing.
const USUAL_PAYLOAD_BYTES: u16 = 1_452;
/// QUIC's smallest (RFC 9000, 14).
const MIN_PAYLOAD_BYTES: u16 = 1_200;
/// Until measured; quinn's 333 ms makes a lost first packet cost a second.
const FIRST_RTT: Duration = Duration::from_millis(100);

/// The push window that is asked of the peer.
pub(super) fn push_window_bytes(options: &TransportOptions) -> u64 {
    options.push_window_bytes.min(MAX_PUSH_WINDOW_BYTES)
}

/// Unread bytes that a peer may send, once it is known.
pub(super) fn receive_window(options: &TransportOptions) -> VarInt {
    let bytes = push_window_bytes(options) + OTHER_LANES_WINDOW_BYTES;
    VarInt::from_u64(bytes).expect("two windows of less than 4 GiB")
}

/// What may come from the peer when QUIC's handshake is complete.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// All lanes, from the receiver, whose certificate was checked.
    Known,
    /// A proof, from a sender that is not known yet, or the answer to one on a connection for bulk.
    Stranger,
}

/// The configuration of one connection.
pub(super) fn transport_config(
    options: &TransportOptions,
    peer: Peer,
    address: SocketAddr,
    gauges: Arc<Gauges>,
) -> TransportConfig {
    let mut config = TransportConfig::default();
    let idle = VarInt::from_u64(options.idle_timeout_ms.max(1)).unwrap_or(VarInt::MAX);
    config.max_idle_timeout(Some(IdleTimeout::from(idle)));
    config.keep_alive_interval(Some(Duration::from_millis(options.keep_alive_ms.max(1))));
    config.initial_rtt(FIRST_RTT);
    config.datagram_receive_buffer_size(None);
    config.stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES));
    config.send_window(MAX_PUSH_WINDOW_BYTES + OTHER_LANES_WINDOW_BYTES);
    config.max_concurrent_bidi_streams(VarInt::from_u32(1));
    if peer == Peer::Known {
        config.max_concurrent_uni_streams(VarInt::from_u32(MAX_STREAMS));
        config.receive_window(receive_window(options));
    } else {
        config.max_concurrent_uni_streams(VarInt::from_u32(0));
        config.receive_window(VarInt::from_u32(STRANGER_WINDOW_BYTES));
    }
    let payload = options.mtu_limit_bytes.or_else(|| route_payload_bytes(address));
    let payload = payload.unwrap_or(USUAL_PAYLOAD_BYTES);
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(payload.clamp(MIN_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES));
    config.mtu_discovery_config(Some(mtu));
    config.congestion_controller_factory(options.congestion.factory(gauges));
    config.qlog_stream(options.qlog.as_ref().map(Qlog::stream));
    config
}
