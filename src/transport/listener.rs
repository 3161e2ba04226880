//! The receiver's end: waits for the one sender that holds the ticket.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream, ServerConfig, VarInt};
use tokio::sync::mpsc;

use super::bulk::{BULK_STREAMS, BULK_WINDOW_BYTES, BulkConnection, Side};
use super::congestion::Gauges;
use super::error::{ListenError, close_code};
use super::identity::Identity;
use super::lanes::MAX_STREAMS;
use super::link::{Established, Link, WeakLink};
use super::proof::{self, Claim, HELLO_BYTES, Hello, SessionKey, Welcome};
use super::quic::{self, Peer};
use super::saved::{SavedError, SavedReceiver};
use super::socket::{self, Cap};
use super::ticket::{MAX_ADDRESSES, MigrationId, Secret, Ticket};
use super::unkept::CloseUnlessKept;
use super::{TransportOptions, addresses};

/// A stranger must have proved its ticket within this time.
const STRANGER_PATIENCE: Duration = Duration::from_secs(5);
/// Strangers at a time, in all and from one address.
const MAX_STRANGERS: usize = 32;
const MAX_STRANGERS_PER_ADDRESS: usize = 4;
/// From so many on, and from the second one of an address on, a stranger must show that its address is its own: others
/// could take all places of an address by writing that into their packets.
const STRANGERS_BEFORE_RETRY: usize = 8;
/// Authenticated links that wait for [`Listener::accept`] or [`Listener::accept_resumed`].
const LINK_QUEUE: usize = 4;
/// Handshake bytes that are kept for strangers before they are looked at.
const STRANGER_BUFFER_BYTES: u64 = 64 << 10;

/// A receiver that waits for its sender. Dropping it closes the socket when no link uses it.
///
/// It goes on answering after a link was made: to tell a second sender that the ticket was used, and to
/// let the first one come back with the session's key.
pub struct Listener {
    desk: Arc<Desk>,
    strangers: tokio::task::JoinHandle<()>,
    fresh: tokio::sync::Mutex<mpsc::Receiver<Link>>,
    resumed: tokio::sync::Mutex<mpsc::Receiver<Link>>,
}

impl Listener {
    /// Listens on `address` and makes the ticket for one sender. `advertised` are the addresses that go
    /// in the ticket (port 0 means the port that was bound); when empty, the addresses of this host that
    /// lead to the socket. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// No socket, no certificate, or nothing to advertise.
    pub fn bind(
        address: SocketAddr,
        advertised: Vec<SocketAddr>,
        options: &TransportOptions,
    ) -> Result<(Listener, Ticket), ListenError> {
        let identity = Identity::fresh().map_err(ListenError::Certificate)?;
        let certificate_sha256 = identity.fingerprint();
        let (secret, migration) = (Secret::random(), MigrationId::random());
        let trust = Trust::default();
        let listener = Self::open(address, identity, secret.clone(), migration, trust, options)?;
        let addresses = ticket_addresses(listener.desk.bound, advertised)?;
        Ok((listener, Ticket { addresses, certificate_sha256, secret, migration }))
    }

    /// Listens again, as the receiver that `saved` was: for [`Self::accept_resumed`].
    ///
    /// # Errors
    /// As [`Self::bind`].
    pub fn reopen(
        saved: &SavedReceiver,
        options: &TransportOptions,
    ) -> Result<Listener, ListenError> {
        let damaged = |error: SavedError| ListenError::Certificate(error.to_string());
        let (identity, migration) = saved.identity().map_err(damaged)?;
        let session = Some(saved.session().map_err(damaged)?);
        let trust = Trust { ticket_used: true, session, newest: None };
        // The ticket was used: no secret opens it any more.
        Self::open(saved.listen, identity, Secret::random(), migration, trust, options)
    }

    fn open(
        address: SocketAddr,
        identity: Identity,
        secret: Secret,
        migration: MigrationId,
        trust: Trust,
        options: &TransportOptions,
    ) -> Result<Listener, ListenError> {
        let crypto = Arc::new(identity.config().map_err(ListenError::Certificate)?);
        let bind_error = |source| ListenError::Bind { address, source };
        let config = server_config(&crypto, options, address, Arc::default());
        let endpoint = socket::endpoint(address, Some(config), options, Cap::of(options))
            .map_err(bind_error)?;
        let bound = endpoint.local_addr().map_err(bind_error)?;
        let (fresh_sender, fresh) = mpsc::channel(LINK_QUEUE);
        let (resumed_sender, resumed) = mpsc::channel(LINK_QUEUE);
        let desk = Arc::new(Desk {
            endpoint,
            crypto,
            identity,
            bound,
            options: options.clone(),
            secret,
            migration,
            trust: Mutex::new(trust),
            strangers: Mutex::default(),
            fresh: fresh_sender,
            resumed: resumed_sender,
        });
        let strangers = tokio::spawn(receive_strangers(desk.clone()));
        let (fresh, resumed) = (tokio::sync::Mutex::new(fresh), tokio::sync::Mutex::new(resumed));
        Ok(Listener { desk, strangers, fresh, resumed })
    }

    /// What must be kept to listen again.
    pub(super) fn identity(&self) -> (&Identity, SocketAddr, MigrationId) {
        (&self.desk.identity, self.desk.bound, self.desk.migration)
    }

    /// Waits for the sender, without end when `timeout` is `None`.
    ///
    /// # Errors
    /// Nobody in time.
    pub async fn accept(&self, timeout: Option<Duration>) -> Result<Link, ListenError> {
        wait(&self.fresh, timeout).await
    }

    /// Waits for the sender to come back with the key of `session`. The older link of that session, if
    /// it still seems alive, is the caller's to drop.
    ///
    /// # Errors
    /// Nobody in time.
    pub async fn accept_resumed(
        &self,
        session: &SessionKey,
        timeout: Option<Duration>,
    ) -> Result<Link, ListenError> {
        self.desk.trust().session = Some(session.clone());
        wait(&self.resumed, timeout).await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Links that were accepted go on; nobody new is let in.
        self.desk.endpoint.set_server_config(None);
        self.strangers.abort();
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("migration", &self.desk.migration).finish_non_exhaustive()
    }
}

async fn wait(
    queue: &tokio::sync::Mutex<mpsc::Receiver<Link>>,
    timeout: Option<Duration>,
) -> Result<Link, ListenError> {
    let mut queue = queue.lock().await;
    let link = match timeout {
        Some(limit) => tokio::time::timeout(limit, queue.recv())
            .await
            .map_err(|_| ListenError::TimedOut(limit.as_millis() as u64))?,
        None => queue.recv().await,
    };
    link.ok_or(ListenError::Closed)
}

fn ticket_addresses(
    bound: SocketAddr,
    advertised: Vec<SocketAddr>,
) -> Result<Vec<SocketAddr>, ListenError> {
    let mut list = advertised;
    if list.is_empty() {
        list = addresses::advertised(bound);
        if list.len() > MAX_ADDRESSES {
            let left_out = &list[MAX_ADDRESSES..];
            tracing::warn!(
                ?left_out,
                "the ticket has no room for all addresses of this host: --advertise chooses"
            );
            list.truncate(MAX_ADDRESSES);
        }
    }
    if list.len() > MAX_ADDRESSES {
        return Err(ListenError::TooManyAddresses { count: list.len(), limit: MAX_ADDRESSES });
    }
    for address in &mut list {
        if address.port() == 0 {
            address.set_port(bound.port());
        }
    }
    if list.is_empty() { Err(ListenError::NoAddress) } else { Ok(list) }
}

fn server_config(
    crypto: &Arc<QuicServerConfig>,
    options: &TransportOptions,
    peer: SocketAddr,
    gauges: Arc<Gauges>,
) -> ServerConfig {
    let mut config = ServerConfig::with_crypto(crypto.clone());
    config
        .max_incoming(MAX_STRANGERS)
        .incoming_buffer_size(STRANGER_BUFFER_BYTES)
        .incoming_buffer_size_total(STRANGER_BUFFER_BYTES * MAX_STRANGERS as u64)
        .transport_config(Arc::new(quic::transport_config(options, Peer::Stranger, peer, gauges)));
    config
}

/// Where strangers are looked at.
struct Desk {
    endpoint: Endpoint,
    crypto: Arc<QuicServerConfig>,
    identity: Identity,
    bound: SocketAddr,
    options: TransportOptions,
    secret: Secret,
    migration: MigrationId,
    trust: Mutex<Trust>,
    strangers: Mutex<HashMap<IpAddr, usize>>,
    fresh: mpsc::Sender<Link>,
    resumed: mpsc::Sender<Link>,
}

/// What a stranger can still prove.
#[derive(Debug, Default)]
struct Trust {
    ticket_used: bool,
    session: Option<SessionKey>,
    /// The link to which connections can be added, and the key to that.
    newest: Option<(WeakLink, Secret)>,
}

/// As whom a stranger was recognized.
enum Known {
    /// The holder of the ticket; the session begins.
    Sender(SessionKey),
    /// The sender of this session, once more.
    SenderAgain(SessionKey),
    /// The other end of this link.
    Bulk(Link),
}

async fn receive_strangers(desk: Arc<Desk>) {
    while let Some(incoming) = desk.endpoint.accept().await {
        let address = incoming.remote_address().ip();
        let may_be_forged = !incoming.remote_address_validated() && incoming.may_retry();
        let place = match Place::take(&desk, address, may_be_forged) {
            Ok(place) => place,
            Err(NoPlace::AddressUnproved) => {
                let _ = incoming.retry();
                continue;
            }
            // Without an answer it asks again, when there may be a place.
            Err(NoPlace::Full) => {
                incoming.ignore();
                continue;
            }
        };
        let desk = desk.clone();
        tokio::spawn(async move {
            let _place = place;
            if tokio::time::timeout(STRANGER_PATIENCE, desk.meet(incoming)).await.is_err() {
                tracing::debug!(%address, "a stranger did not prove a ticket in time");
            }
        });
    }
}

impl Desk {
    fn trust(&self) -> MutexGuard<'_, Trust> {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn meet(&self, incoming: Incoming) {
        let gauges = Arc::<Gauges>::default();
        let peer = incoming.remote_address();
        let config = server_config(&self.crypto, &self.options, peer, gauges.clone());
        let Ok(connecting) = incoming.accept_with(Arc::new(config)) else { return };
        let Ok(connection) = connecting.await else { return };
        // A stranger that runs out of time is shown the door, not only forgotten.
        let too_slow = (close_code::TOO_SLOW, "no proof of a ticket in time");
        let impatient = CloseUnlessKept::new(connection.clone(), too_slow);
        let Ok(control) = connection.accept_bi().await else { return };
        match self.admit(connection, control, gauges).await {
            Ok(()) => impatient.keep(),
            Err(None) => {}
            Err(Some((number, reason))) => {
                tracing::info!(%peer, reason, "a sender was turned away");
                impatient.close((number, reason));
            }
        }
    }

    async fn admit(
        &self,
        connection: Connection,
        (mut send, mut recv): (SendStream, RecvStream),
        gauges: Arc<Gauges>,
    ) -> Result<(), Option<(u32, &'static str)>> {
        let mut bytes = [0; HELLO_BYTES];
        recv.read_exact(&mut bytes).await.map_err(|_| None)?;
        let hello = Hello::decode(&bytes)
            .ok_or(Some((close_code::VIOLATION, "the first message is not understood")))?;
        let known = self.verify(&hello, &connection).map_err(Some)?;
        let (window, streams) = match known {
            Known::Sender(_) | Known::SenderAgain(_) => {
                (quic::receive_window(&self.options), MAX_STREAMS)
            }
            Known::Bulk(_) => (VarInt::from_u32(BULK_WINDOW_BYTES), BULK_STREAMS),
        };
        connection.set_receive_window(window);
        connection.set_max_concurrent_uni_streams(VarInt::from_u32(streams));
        let welcome = Welcome { push_window_bytes: quic::push_window_bytes(&self.options) };
        send.write_all(&welcome.encode()).await.map_err(|_| None)?;
        let (session, queue) = match known {
            Known::Sender(session) => (session, &self.fresh),
            Known::SenderAgain(session) => (session, &self.resumed),
            Known::Bulk(link) => {
                let endpoint = self.endpoint.clone();
                let bulk = BulkConnection { connection, endpoint, gauges, _control: (send, recv) };
                return link.add(bulk, Side::Receiver).map_err(|why| Some((close_code::BUSY, why)));
            }
        };
        let established = Established {
            connection,
            endpoint: self.endpoint.clone(),
            control: (send, recv),
            gauges,
            session,
            peer_push_window_bytes: hello.push_window_bytes,
        };
        let link = Link::new(established, &self.options);
        self.trust().newest = Some((link.downgrade(), link.bulk_key()));
        queue
            .try_send(link)
            .map_err(|_| Some((close_code::BUSY, "the receiver is not ready for this connection")))
    }

    /// Decides, at one moment, whether this stranger is the sender. A used ticket is told only to who
    /// holds it.
    fn verify(&self, hello: &Hello, connection: &Connection) -> Result<Known, (u32, &'static str)> {
        const WRONG: (u32, &str) = (close_code::WRONG_TICKET, "wrong ticket");
        if hello.migration != self.migration {
            return Err(WRONG);
        }
        let mut trust = self.trust();
        match hello.claim {
            Claim::Ticket if !hello.proves(&self.secret, connection) => Err(WRONG),
            Claim::Ticket if trust.ticket_used => {
                Err((close_code::TICKET_USED, "this ticket was already used"))
            }
            Claim::Ticket => {
                let session = proof::session_key(&self.secret, connection);
                trust.ticket_used = true;
                trust.session = Some(session.clone());
                Ok(Known::Sender(session))
            }
            Claim::Session => match &trust.session {
                Some(session) if hello.proves(&session.0, connection) => {
                    Ok(Known::SenderAgain(session.clone()))
                }
                _ => Err(WRONG),
            },
            Claim::Bulk => match &trust.newest {
                Some((link, key)) if hello.proves(key, connection) => {
                    link.upgrade().filter(Link::is_up).map(Known::Bulk).ok_or(WRONG)
                }
                _ => Err(WRONG),
            },
        }
    }
}

/// One of the few places for strangers, given back when dropped.
struct Place {
    desk: Arc<Desk>,
    address: IpAddr,
}

/// Why there is no place for a stranger.
enum NoPlace {
    AddressUnproved,
    Full,
}

impl Place {
    fn take(desk: &Arc<Desk>, address: IpAddr, may_be_forged: bool) -> Result<Self, NoPlace> {
        let address = counted_as(address);
        let mut strangers = desk.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = strangers.values().sum();
        let from_here = strangers.get(&address).copied().unwrap_or(0);
        if all >= MAX_STRANGERS {
            return Err(NoPlace::Full);
        }
        if may_be_forged && (from_here > 0 || all >= STRANGERS_BEFORE_RETRY) {
            return Err(NoPlace::AddressUnproved);
        }
        if from_here >= MAX_STRANGERS_PER_ADDRESS {
            return Err(NoPlace::Full);
        }
        strangers.insert(address, from_here + 1);
        Ok(Place { desk: desk.clone(), address })
    }
}

/// Who has one address of IPv6 has the other 2^64 - 1 of its network too.
fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut strangers = self.desk.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = strangers.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                strangers.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_network_count_together_and_those_of_version_4_alone() {
        let counted = |text: &str| counted_as(text.parse().unwrap()).to_string();
        assert_eq!(counted("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(counted("192.0.2.7"), "192.0.2.7");
        assert_eq!(counted("::ffff:192.0.2.7"), "192.0.2.7");
    }
}
