//! The sender's end: finds the receiver of a ticket and proves that it holds it.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use quinn::{ClientConfig, Connection, Endpoint, ReadExactError, RecvStream, SendStream};
use tokio::task::JoinSet;

use super::bulk;
use super::congestion::Gauges;
use super::error::{ConnectError, LinkError, close_code};
use super::link::{Established, Link};
use super::proof::{self, Claim, Hello, SessionKey, WELCOME_BYTES, Welcome};
use super::quic::{self, Peer};
use super::socket::{self, Cap};
use super::ticket::{MigrationId, Secret, Ticket};
use super::unkept::CloseUnlessKept;
use super::{TransportOptions, identity};

/// Addresses are tried in the ticket's order, each a little after the one before, as RFC 8305 does.
const STAGGER: Duration = Duration::from_millis(100);

/// Connects to the receiver that made `ticket`, trying all its addresses. A ticket works once.
///
/// # Errors
/// See [`ConnectError`]; bounded by twice the
/// [`connect_timeout_ms`](TransportOptions::connect_timeout_ms).
pub async fn connect(ticket: &Ticket, options: &TransportOptions) -> Result<Link, ConnectError> {
    establish(ticket, Claim::Ticket, &ticket.secret, options).await
}

/// Connects again to the receiver of a migration that began with [`connect()`], with the key of that
/// session ([`Link::session_key`]). The receiver must be in
/// [`accept_resumed`](super::Listener::accept_resumed), or get there soon.
///
/// # Errors
/// As [`connect()`].
pub async fn reconnect(
    ticket: &Ticket,
    session: &SessionKey,
    options: &TransportOptions,
) -> Result<Link, ConnectError> {
    establish(ticket, Claim::Session, &session.0, options).await
}

async fn establish(
    ticket: &Ticket,
    claim: Claim,
    secret: &Secret,
    options: &TransportOptions,
) -> Result<Link, ConnectError> {
    let limit = Duration::from_millis(options.connect_timeout_ms);
    let deadline = tokio::time::Instant::now() + limit;
    let (dialler, dialled) = dial(ticket, options, deadline).await?;
    let late = || ConnectError::Unreachable(format!("{} did not answer in time", dialler.address));
    // As long again: the packet by which a mended network shows may be the last of those that dial.
    let link = tokio::time::timeout(limit, introduce(dialled, ticket, claim, secret, options))
        .await
        .map_err(|_| late())??;
    bulk::keep_wide(&link, dialler);
    Ok(link)
}

/// How to reach a receiver at an address of its.
pub(super) struct Dialler {
    address: SocketAddr,
    certificate_sha256: [u8; 32],
    pub(super) migration: MigrationId,
    pub(super) options: TransportOptions,
    /// The same for all connections.
    cap: Option<Cap>,
}

/// A connection to the right receiver, which does not know us yet.
pub(super) struct Dialled {
    pub(super) connection: Connection,
    pub(super) endpoint: Endpoint,
    pub(super) gauges: Arc<Gauges>,
}

/// The first address at which the receiver with the ticket's certificate answers.
pub(super) async fn dial(
    ticket: &Ticket,
    options: &TransportOptions,
    deadline: tokio::time::Instant,
) -> Result<(Dialler, Dialled), ConnectError> {
    let mut attempts = JoinSet::new();
    let cap = Cap::of(options);
    for (position, &address) in ticket.addresses.iter().enumerate() {
        let dialler = Dialler::new(address, ticket, options, cap.clone());
        attempts.spawn(async move {
            tokio::time::sleep(STAGGER * position as u32).await;
            let attempt = tokio::time::timeout_at(deadline, dialler.dial(Peer::Known));
            let result = attempt
                .await
                .unwrap_or_else(|_| Err(ConnectError::Unreachable("no answer in time".to_owned())));
            (dialler, result)
        });
    }
    let mut failures = Vec::new();
    while let Some(joined) = attempts.join_next().await {
        match joined {
            Ok((dialler, Ok(dialled))) => return Ok((dialler, dialled)),
            Ok((dialler, Err(error))) => failures.push((dialler.address, error)),
            Err(_) => {}
        }
    }
    Err(explain(failures))
}

/// One error for all addresses: the one that says most.
fn explain(mut failures: Vec<(SocketAddr, ConnectError)>) -> ConnectError {
    let telling = failures.iter().position(|(_, error)| {
        matches!(
            error,
            ConnectError::AnotherReceiver { .. } | ConnectError::Link(LinkError::VersionMismatch)
        )
    });
    if let Some(position) = telling {
        return failures.swap_remove(position).1;
    }
    let each = failures.iter().map(|(address, error)| match error {
        ConnectError::Unreachable(why) => format!("{address}: {why}"),
        ConnectError::Link(why) => format!("{address}: {why}"),
        other => format!("{address}: {other}"),
    });
    ConnectError::Unreachable(each.collect::<Vec<_>>().join("; "))
}

impl Dialler {
    pub(super) fn new(
        address: SocketAddr,
        ticket: &Ticket,
        options: &TransportOptions,
        cap: Option<Cap>,
    ) -> Self {
        let (certificate_sha256, migration) = (ticket.certificate_sha256, ticket.migration);
        Dialler { address, certificate_sha256, migration, options: options.clone(), cap }
    }

    /// Connects, from a socket of its own.
    pub(super) async fn dial(&self, peer: Peer) -> Result<Dialled, ConnectError> {
        let Dialler { address, options, .. } = self;
        let local: SocketAddr = if address.is_ipv4() {
            (Ipv4Addr::UNSPECIFIED, 0).into()
        } else {
            (Ipv6Addr::UNSPECIFIED, 0).into()
        };
        let endpoint = socket::endpoint(local, None, options, self.cap.clone())
            .map_err(|source| ConnectError::Socket { address: local, source })?;
        let gauges = Arc::<Gauges>::default();
        let (crypto, mismatch) = identity::sender(self.certificate_sha256);
        let mut config = ClientConfig::new(Arc::new(crypto));
        let transport = quic::transport_config(options, peer, *address, gauges.clone());
        config.transport_config(Arc::new(transport));
        let connecting = endpoint
            .connect_with(config, *address, identity::SERVER_NAME)
            .map_err(|error| ConnectError::Unreachable(error.to_string()))?;
        match connecting.await {
            Ok(connection) => Ok(Dialled { connection, endpoint, gauges }),
            Err(_) if mismatch.load(Relaxed) => {
                Err(ConnectError::AnotherReceiver { address: *address })
            }
            Err(error) => Err(LinkError::from_quic(error, options.idle_timeout_ms).into()),
        }
    }
}

/// Proves on a new connection to hold `secret`. Gives the stream on which that was done, and the answer. Dropped before, it
/// closes the connection: the receiver may have taken it into use.
pub(super) async fn prove(
    connection: &Connection,
    migration: MigrationId,
    claim: Claim,
    secret: &Secret,
    options: &TransportOptions,
) -> Result<((SendStream, RecvStream), Welcome), ConnectError> {
    let lost = |error| ConnectError::refused(LinkError::from_quic(error, options.idle_timeout_ms));
    let (mut send, mut recv) = connection.open_bi().await.map_err(lost)?;
    let window = quic::push_window_bytes(options);
    let hello = Hello::new(claim, migration, window, secret, connection);
    let late = CloseUnlessKept::new(connection.clone(), without_answer(claim));
    let mut answer = [0; WELCOME_BYTES];
    // A refusal shows as an error of either call; the connection knows why.
    let answered = match send.write_all(&hello.encode()).await {
        Ok(()) => recv.read_exact(&mut answer).await,
        Err(_) => Err(ReadExactError::FinishedEarly(0)),
    };
    if answered.is_err() {
        return Err(lost(connection.closed().await));
    }
    late.keep();
    Ok(((send, recv), Welcome::decode(answer)))
}

/// How a connection is closed on which the answer to a proof has not come in time.
fn without_answer(claim: Claim) -> (u32, &'static str) {
    const WHY: &str = "the answer to the proof did not come in time";
    match claim {
        // Nobody comes again by that ticket.
        Claim::Ticket => (close_code::TOO_SLOW, WHY),
        Claim::Session => (close_code::LET_GO, WHY),
        Claim::Bulk => (close_code::NEVER_USED, WHY),
    }
}

/// Proves to the receiver who we are.
pub(super) async fn introduce(
    dialled: Dialled,
    ticket: &Ticket,
    claim: Claim,
    secret: &Secret,
    options: &TransportOptions,
) -> Result<Link, ConnectError> {
    let Dialled { connection, endpoint, gauges } = dialled;
    let (control, welcome) = prove(&connection, ticket.migration, claim, secret, options).await?;
    let session = if claim == Claim::Ticket {
        proof::session_key(secret, &connection)
    } else {
        SessionKey(secret.clone())
    };
    let established = Established {
        connection,
        endpoint,
        control,
        gauges,
        session,
        peer_push_window_bytes: welcome.push_window_bytes,
    };
    Ok(Link::new(established, options))
}
