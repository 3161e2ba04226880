//! What can go wrong with a link, each in words for a person.

use std::io;
use std::net::SocketAddr;

use quinn::{ConnectionError, VarInt};

use super::lanes::Lane;

/// Codes with which this layer closes a connection. Those of [`Link::close`](super::Link::close) follow
/// from `FIRST_SESSION` on.
pub(super) mod close_code {
    pub(crate) const WRONG_TICKET: u32 = 1;
    pub(crate) const TICKET_USED: u32 = 2;
    pub(crate) const VIOLATION: u32 = 3;
    pub(crate) const BUSY: u32 = 4;
    pub(crate) const TOO_SLOW: u32 = 5;
    pub(crate) const LET_GO: u32 = 6;
    pub(crate) const NEVER_USED: u32 = 7;
    pub(crate) const FIRST_SESSION: u32 = 16;
}

/// `no_application_protocol` (RFC 7301) as a QUIC error: the peer speaks another version.
const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;

/// Longest reason text of a peer that is repeated to the user.
pub(super) const MAX_REASON_CHARS: usize = 1_000;

/// Why a link can no longer be used, or refused one message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The peer closed the link, saying why.
    #[error("the other side closed the connection: {reason} (code {code})")]
    PeerClosed {
        /// As given to [`Link::close`](super::Link::close).
        code: u32,
        /// As given there; not trusted, but bounded and without control characters.
        reason: String,
    },
    /// The peer's transport closed the link: a wrong or used ticket, or a broken rule.
    #[error("the other side refused the connection: {reason}")]
    Refused {
        /// See `close_code`.
        code: u32,
        /// As for [`LinkError::PeerClosed`].
        reason: String,
    },
    /// Silence for longer than the idle timeout.
    #[error(
        "no answer from the other side for {idle_ms} ms; is the network between the hosts, or the other host, down?"
    )]
    TimedOut {
        /// The idle timeout.
        idle_ms: u64,
    },
    /// The peer does not know this connection (any more): its process ended.
    #[error(
        "the other side no longer knows this connection; its farfault process has ended or was restarted"
    )]
    Reset,
    /// The peer speaks another protocol.
    #[error(
        "the other side speaks another version of the farfault protocol; run the same version on both hosts"
    )]
    VersionMismatch,
    /// Closed at this end.
    #[error("the connection was closed here")]
    Closed,
    /// The peer ended its control lane: it has nothing more to say.
    #[error("the other side has ended the conversation")]
    Finished,
    /// A message of this end that no peer would accept.
    #[error(
        "a message of {size_bytes} bytes is too large for the {lane} lane (limit {limit_bytes})"
    )]
    TooLarge {
        /// Where it was to go.
        lane: &'static str,
        /// Its size.
        size_bytes: usize,
        /// The largest allowed there.
        limit_bytes: usize,
    },
    /// The peer broke the protocol; the link was closed for it.
    #[error("the other side broke the protocol: {0}")]
    Violation(String),
    /// QUIC itself failed.
    #[error("the QUIC connection failed: {0}")]
    Transport(String),
}

impl LinkError {
    /// True when another link would help: the network, or the other process, has failed. False when the
    /// other side has ended the conversation, or breaks its rules.
    pub fn is_mendable(&self) -> bool {
        match self {
            LinkError::TimedOut { .. }
            | LinkError::Reset
            | LinkError::Closed
            | LinkError::Transport(_) => true,
            LinkError::Refused { code, .. } => *code == close_code::LET_GO,
            LinkError::PeerClosed { .. }
            | LinkError::VersionMismatch
            | LinkError::Finished
            | LinkError::TooLarge { .. }
            | LinkError::Violation(_) => false,
        }
    }

    pub(super) fn too_large(lane: Lane, size_bytes: usize) -> Self {
        LinkError::TooLarge { lane: lane.name(), size_bytes, limit_bytes: lane.limit_bytes() }
    }

    pub(super) fn from_quic(error: ConnectionError, idle_ms: u64) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => {
                let code = u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX);
                let reason = printable(&close.reason);
                match code.checked_sub(close_code::FIRST_SESSION) {
                    Some(code) => LinkError::PeerClosed { code, reason },
                    None => LinkError::Refused { code, reason },
                }
            }
            ConnectionError::TimedOut => LinkError::TimedOut { idle_ms },
            ConnectionError::Reset => LinkError::Reset,
            ConnectionError::VersionMismatch => LinkError::VersionMismatch,
            ConnectionError::LocallyClosed => LinkError::Closed,
            ConnectionError::ConnectionClosed(ref close)
                if u64::from(close.error_code) == NO_APPLICATION_PROTOCOL =>
            {
                LinkError::VersionMismatch
            }
            ConnectionError::TransportError(ref error)
                if u64::from(error.code) == NO_APPLICATION_PROTOCOL =>
            {
                LinkError::VersionMismatch
            }
            other => LinkError::Transport(other.to_string()),
        }
    }
}

/// What a peer says, for a terminal: short, and without control characters.
pub(super) fn printable(reason: &[u8]) -> String {
    let text = String::from_utf8_lossy(reason);
    text.chars().filter(|c| !c.is_control()).take(MAX_REASON_CHARS).collect()
}

pub(super) fn code(code: u32) -> VarInt {
    VarInt::from_u32(code)
}

/// True when the peer has closed the connection with this code.
pub(super) fn closes_with(reason: &ConnectionError, number: u32) -> bool {
    matches!(reason, ConnectionError::ApplicationClosed(close) if close.error_code == code(number))
}

/// Why no link came about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No address of the ticket led to the receiver.
    #[error(
        "the receiver cannot be reached: {0}; is `farfault receive` still waiting, and is UDP let through to its port?"
    )]
    Unreachable(String),
    /// Somebody answers, but not the receiver that made the ticket.
    #[error(
        "another receiver answers at {address}: its certificate is not the one of this ticket; use the ticket that the waiting `farfault receive` printed"
    )]
    AnotherReceiver {
        /// Who answered.
        address: SocketAddr,
    },
    /// The receiver does not accept the secret.
    #[error(
        "wrong ticket: the receiver does not accept its secret; use the ticket that the waiting `farfault receive` printed"
    )]
    WrongTicket,
    /// Another sender used the ticket before.
    #[error(
        "this ticket was already used; a ticket is good for one migration: start `farfault receive` anew"
    )]
    TicketUsed,
    /// The link failed while it was being made.
    #[error("the connection failed while it was being made: {0}")]
    Link(#[from] LinkError),
    /// No socket.
    #[error("no UDP socket for {address}: {source}")]
    Socket {
        /// The local address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
}

impl ConnectError {
    pub(super) fn refused(error: LinkError) -> Self {
        match error {
            LinkError::Refused { code: close_code::WRONG_TICKET, .. } => ConnectError::WrongTicket,
            LinkError::Refused { code: close_code::TICKET_USED, .. } => ConnectError::TicketUsed,
            other => ConnectError::Link(other),
        }
    }
}

/// Why a receiver cannot listen, or nobody came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// No socket at this address.
    #[error(
        "cannot listen on {address}: {source}; is the port taken, or the address not of this host?"
    )]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// Nothing to print in a ticket.
    #[error("this host has no address that a sender could use; give one with --advertise")]
    NoAddress,
    /// More than a ticket can carry.
    #[error("{count} addresses to advertise; a ticket carries at most {limit}")]
    TooManyAddresses {
        /// How many were given.
        count: usize,
        /// How many fit.
        limit: usize,
    },
    /// No certificate.
    #[error("cannot make a certificate: {0}")]
    Certificate(String),
    /// Nobody came in time.
    #[error("no sender came within {0} ms")]
    TimedOut(u64),
    /// The listener was closed.
    #[error("the listener was closed")]
    Closed,
}
