//! An authenticated connection and its lanes.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use quinn::{
    Connection, ConnectionStats, Endpoint, RecvStream, SendStream, StoppedError, VarInt, WriteError,
};
use tokio::sync::{Mutex, mpsc, oneshot};

use super::TransportOptions;
use super::bulk::{BulkConnection, MAX_CONNECTIONS, Side};
use super::congestion::Gauges;
use super::error::{LinkError, close_code, closes_with, code};
use super::incoming::{self, Assembly, Carries, Core, LaneQueues};
use super::lanes::{CONTROL_PRIORITY, Lane};
use super::proof::{self, SessionKey};
use super::push::{PushBudget, PushCredit};
use super::quic;
use super::ticket::Secret;

/// Control messages that wait to be written.
const CONTROL_QUEUE: usize = 16;
/// What is under way when a link is closed gets so long to arrive.
const DRAIN_GRACE: Duration = Duration::from_millis(300);
/// The notice of a closed link gets so long to leave.
const CLOSE_GRACE: Duration = Duration::from_millis(500);

const LET_GO_REASON: &[u8] = b"the other side let go of the link";
const NO_MORE: &str = "the link takes no connection more";

/// What both ends know of each other when a link begins.
pub(super) struct Established {
    pub(super) connection: Connection,
    pub(super) endpoint: Endpoint,
    pub(super) control: (SendStream, RecvStream),
    pub(super) gauges: Arc<Gauges>,
    pub(super) session: SessionKey,
    pub(super) peer_push_window_bytes: u64,
}

/// One end of an authenticated connection, or of several that act as one; clones are handles to the same. Dropping
/// the last closes it.
///
/// All receiving and sending methods may be called from several tasks, and a call that is given up
/// (its future dropped) takes nothing and sends nothing half.
#[derive(Clone, Debug)]
pub struct Link(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    core: Arc<Core>,
    gauges: Arc<Gauges>,
    session: SessionKey,
    control_limit_bytes: usize,
    bandwidth_limit_bytes_per_s: Option<u64>,
    control_out: mpsc::Sender<ControlOut>,
    control_in: Mutex<mpsc::Receiver<Bytes>>,
    lanes_in: LaneQueues<Mutex<mpsc::Receiver<Bytes>>>,
    assembly: Weak<Assembly>,
    budget: Arc<PushBudget>,
    credit: Arc<PushCredit>,
}

#[derive(Debug)]
enum ControlOut {
    Message(Bytes),
    Finish(oneshot::Sender<()>),
}

/// A link that does not keep it.
#[derive(Clone, Debug)]
pub(super) struct WeakLink(Weak<Inner>);

impl WeakLink {
    pub(super) fn upgrade(&self) -> Option<Link> {
        self.0.upgrade().map(Link)
    }
}

/// What a link measures of itself: all its connections together, but for the times and the largest payload, which
/// are of the main one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Smoothed round-trip time.
    pub rtt_us: u64,
    /// Round-trip time without queues, as far as seen.
    pub min_rtt_us: u64,
    /// Rate at which the network delivered when this end used it fully; 0 until measured. The sum of those connections
    /// that are used fully, or the highest of any.
    pub delivery_rate_bytes_per_s: u64,
    /// Congestion window.
    pub window_bytes: u64,
    /// Sent and neither acknowledged nor lost.
    pub in_flight_bytes: u64,
    /// Of the push lane, not yet acknowledged.
    pub push_in_flight_bytes: u64,
    /// UDP payload sent.
    pub sent_bytes: u64,
    /// UDP payload received.
    pub received_bytes: u64,
    /// QUIC packets sent.
    pub sent_packets: u64,
    /// QUIC packets declared lost.
    pub lost_packets: u64,
    /// Largest UDP payload that the path takes.
    pub mtu_bytes: u64,
    /// How many connections there are.
    pub connections: u32,
}

impl Link {
    pub(super) fn new(established: Established, options: &TransportOptions) -> Self {
        let Established { connection, endpoint, control, gauges, session, .. } = established;
        let core = Core::new(connection, endpoint, options.idle_timeout_ms);
        let budget = PushBudget::new(gauges.clone(), established.peer_push_window_bytes);
        let credit = PushCredit::new(quic::push_window_bytes(options));
        let (control_send, control_recv) = control;
        let control_in =
            incoming::start_control(&core, control_recv, options.control_message_limit_bytes);
        let (lanes_in, assembly) = incoming::start_lanes(&core, budget.clone(), credit.clone());
        incoming::start_credit(&core, credit.clone());
        follow(&budget, &core.connection, &gauges);
        Link(Arc::new(Inner {
            core,
            gauges,
            session,
            control_limit_bytes: options.control_message_limit_bytes,
            bandwidth_limit_bytes_per_s: options.bandwidth_limit_bytes_per_s,
            control_out: start_control_writer(control_send),
            control_in: Mutex::new(control_in),
            lanes_in: lanes_in.map(Mutex::new),
            assembly,
            budget,
            credit,
        }))
    }

    /// The key with which this migration can be continued on another connection.
    pub fn session_key(&self) -> SessionKey {
        self.0.session.clone()
    }

    /// The peer's address, as the network shows it now.
    pub fn remote_address(&self) -> std::net::SocketAddr {
        self.0.core.connection.remote_address()
    }

    pub(super) fn downgrade(&self) -> WeakLink {
        WeakLink(Arc::downgrade(&self.0))
    }

    /// True while nothing has ended it.
    pub(super) fn is_up(&self) -> bool {
        self.0.core.ended().is_none()
    }

    /// What proves to be the other end of this link.
    pub(super) fn bulk_key(&self) -> Secret {
        proof::bulk_key(&self.0.core.connection)
    }

    /// Adds a connection, whose other end has proved to be this link's. It carries bulk from the link's sender to
    /// its receiver.
    ///
    /// # Errors
    /// There are as many as may be, or the link has ended. The connection is closed then.
    pub(super) fn add(&self, bulk: BulkConnection, side: Side) -> Result<(), &'static str> {
        let Inner { core, gauges, budget, assembly, .. } = &*self.0;
        let (connection, its_gauges) = (bulk.connection.clone(), bulk.gauges.clone());
        let mut others = core.bulk();
        let Some(assembly) = assembly.upgrade().filter(|_| core.ended().is_none()) else {
            connection.close(code(close_code::LET_GO), LET_GO_REASON);
            return Err("the link has ended");
        };
        if others.len() + 1 >= usize::from(MAX_CONNECTIONS) {
            connection.close(code(close_code::BUSY), NO_MORE.as_bytes());
            return Err(NO_MORE);
        }
        others.push(bulk);
        match side {
            Side::Receiver => assembly.serve(connection.clone(), Carries::Push),
            Side::Sender => {
                its_gauges.set_nobody_waits(gauges.nobody_waits());
                follow(budget, &connection, &its_gauges);
                // Of the same number in both, so that nothing is pushed to one that is not there.
                budget.add_way(its_gauges);
            }
        }
        drop(others);
        let (core, main) = (core.clone(), core.connection.clone());
        tokio::spawn(async move {
            tokio::select! {
                reason = connection.closed() => {
                    // The sender has pushed nothing by it, so nothing is lost.
                    if side == Side::Sender || !closes_with(&reason, close_code::NEVER_USED) {
                        core.lost(reason).await;
                    }
                }
                // Whoever closes the link at this end closes this one too, and says the same by all.
                _ = main.closed() => core.close(close_code::LET_GO, LET_GO_REASON),
            }
        });
        Ok(())
    }

    /// Puts a message on the control lane, where messages arrive in order. Returns when it is queued.
    ///
    /// # Errors
    /// A message over the limit, or the end of the link. A peer that takes no control message for as long as the
    /// idle timeout is as good as silent.
    pub async fn control_send(&self, message: Bytes) -> Result<(), LinkError> {
        let limit_bytes = self.0.control_limit_bytes;
        if message.len() > limit_bytes {
            let size_bytes = message.len();
            return Err(LinkError::TooLarge { lane: "control", size_bytes, limit_bytes });
        }
        let idle_ms = self.0.core.idle_timeout_ms;
        let queued = self.0.control_out.send(ControlOut::Message(message));
        match tokio::time::timeout(Duration::from_millis(idle_ms), queued).await {
            Ok(queued) => queued.map_err(|_| self.ended_or(LinkError::Closed)),
            Err(_) => Err(LinkError::TimedOut { idle_ms }),
        }
    }

    /// The next control message.
    ///
    /// # Errors
    /// [`LinkError::Finished`] after the peer's [`finish`](Self::finish); else the end of the link.
    pub async fn control_recv(&self) -> Result<Bytes, LinkError> {
        let message = self.0.control_in.lock().await.recv().await;
        message.ok_or_else(|| self.ended_or(LinkError::Finished))
    }

    /// Ends this side of the control lane and waits until the peer's transport has all of it and all
    /// that was pushed. Call it before [`close`](Self::close), which discards what is on its way.
    pub async fn finish(&self) -> Result<(), LinkError> {
        let (done, finished) = oneshot::channel();
        if self.0.control_out.send(ControlOut::Finish(done)).await.is_ok() && finished.await.is_ok()
        {
            return self.push_drained().await;
        }
        Err(self.ended_or(LinkError::Closed))
    }

    /// Sends a one-shot message. Returns when QUIC has taken all of it; for [`Lane::Push`] that is when
    /// there is room for it on the link, see [`push`](Self::push).
    ///
    /// # Errors
    /// A message over [`Lane::limit_bytes`], or the end of the link.
    pub async fn send(&self, lane: Lane, message: Bytes) -> Result<(), LinkError> {
        if lane == Lane::Push {
            return self.push(message).await;
        }
        check_size(lane, &message)?;
        let main = &self.0.core.connection;
        self.write(main, lane, lane.priority(), message).await.map(drop)
    }

    /// Sends bulk. Waits while about 1.25 congestion windows of bulk are under way, or while the peer's
    /// consumer is a push window behind, so that the caller decides late what goes next.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub async fn push(&self, message: Bytes) -> Result<(), LinkError> {
        check_size(Lane::Push, &message)?;
        let admitted = tokio::select! {
            admitted = self.0.budget.admit(message.len()) => admitted,
            error = self.0.core.end() => return Err(error),
        };
        let connection = self.0.core.way(admitted.way);
        let stream = self.write(&connection, Lane::Push, admitted.priority, message).await?;
        let core = self.0.core.clone();
        tokio::spawn(async move {
            if let Err(StoppedError::ConnectionLost(reason)) = stream.stopped().await {
                // Before the account says that all has arrived.
                core.lost(reason).await;
            }
            drop(admitted);
        });
        Ok(())
    }

    /// Whether somebody waits for what travels behind the bulk. While nobody does, as before the switchover, a
    /// queue of a few milliseconds is let stand on short paths too, which keeps busy hosts at work.
    pub fn expect_faults(&self, expected: bool) {
        self.0.gauges.set_nobody_waits(!expected);
        for bulk in self.0.core.bulk().iter() {
            bulk.gauges.set_nobody_waits(!expected);
        }
    }

    /// Waits until all that was pushed is acknowledged by the peer's transport.
    pub async fn push_drained(&self) -> Result<(), LinkError> {
        tokio::select! {
            () = self.0.budget.drained() => match self.0.core.ended() {
                // Everything counts as gone when the connection is.
                Some(error) => Err(error),
                None => Ok(()),
            },
            error = self.0.core.end() => Err(error),
        }
    }

    /// The next message of a lane. Messages may arrive in another order than they were sent in.
    ///
    /// # Errors
    /// The end of the link, after all complete messages were taken.
    pub async fn recv(&self, lane: Lane) -> Result<Bytes, LinkError> {
        let message = self.0.lanes_in[lane.index()].lock().await.recv().await;
        let message = message.ok_or_else(|| self.ended_or(LinkError::Closed))?;
        if lane == Lane::Push {
            self.0.credit.consumed(message.len());
        }
        Ok(message)
    }

    /// What the link measures of itself.
    pub fn stats(&self) -> LinkStats {
        let main = self.0.core.connection.stats();
        let mut stats = LinkStats {
            rtt_us: main.path.rtt.as_micros() as u64,
            min_rtt_us: self.0.gauges.min_rtt_us(),
            push_in_flight_bytes: self.0.budget.in_flight_bytes(),
            mtu_bytes: u64::from(main.path.current_mtu),
            ..LinkStats::default()
        };
        stats.count(&main, &self.0.gauges);
        let others: Vec<_> = {
            let bulk = self.0.core.bulk();
            bulk.iter().map(|bulk| (bulk.connection.clone(), bulk.gauges.clone())).collect()
        };
        for (connection, gauges) in &others {
            stats.count(&connection.stats(), gauges);
        }
        // A connection that was not used fully tells the most that it ever carried, and all of them have the same
        // network: their sum may be many times what that takes.
        let all = || others.iter().map(|(_, gauges)| gauges).chain([&self.0.gauges]);
        let rate = |gauges: &Arc<Gauges>| gauges.delivery_rate_bytes_per_s();
        let together: u64 = all().filter(|gauges| gauges.is_full()).map(rate).sum();
        stats.delivery_rate_bytes_per_s = together.max(all().map(rate).max().unwrap_or(0));
        if let Some(limit) = self.0.bandwidth_limit_bytes_per_s {
            stats.delivery_rate_bytes_per_s = stats.delivery_rate_bytes_per_s.min(limit);
        }
        stats
    }

    /// The rate, in bytes a second, and the shortest round trip of the main connection, by which all goes that a
    /// thread of the guest waits for. Takes no lock.
    pub fn main_path(&self) -> (u64, Duration) {
        let gauges = &self.0.gauges;
        let rate = gauges.delivery_rate_bytes_per_s();
        let limit = self.0.bandwidth_limit_bytes_per_s.unwrap_or(u64::MAX);
        (rate.min(limit), Duration::from_micros(gauges.min_rtt_us()))
    }

    /// Waits for the end of the link and tells why.
    pub async fn ended(&self) -> LinkError {
        self.0.core.end().await
    }

    /// Closes the link; the peer's calls fail with this code and reason ([`LinkError::PeerClosed`]). Nothing is pushed
    /// any more, and what is under way gets a moment to arrive. Gives the notice up to half a second to leave.
    pub async fn close(&self, code_for_peer: u32, reason: &str) {
        // quinn sends no notice while the congestion window is full of data, and takes no acknowledgement that would
        // empty it once the connection is closed. The peer would hear nothing, at last a reset.
        self.0.budget.stop();
        let _ = tokio::time::timeout(DRAIN_GRACE, self.push_drained()).await;
        let number = code_for_peer.saturating_add(close_code::FIRST_SESSION);
        self.0.core.close(number, reason.as_bytes());
        let others: Vec<_> = self.0.core.bulk().iter().map(|bulk| bulk.endpoint.clone()).collect();
        let told = async {
            self.0.core.endpoint.wait_idle().await;
            for endpoint in others {
                endpoint.wait_idle().await;
            }
        };
        let _ = tokio::time::timeout(CLOSE_GRACE, told).await;
    }

    /// Closes the link at once, since another one is to take its place. Unlike [`close`](Self::close) this
    /// does not say that the conversation is over.
    pub fn abandon(&self) {
        self.0.core.close(close_code::LET_GO, LET_GO_REASON);
    }

    fn ended_or(&self, otherwise: LinkError) -> LinkError {
        self.0.core.ended().unwrap_or(otherwise)
    }

    async fn write(
        &self,
        connection: &Connection,
        lane: Lane,
        priority: i32,
        message: Bytes,
    ) -> Result<SendStream, LinkError> {
        let stream = connection.open_uni().await;
        let stream = match stream {
            Ok(stream) => stream,
            Err(reason) => {
                self.0.core.lost(reason).await;
                return Err(self.ended_or(LinkError::Closed));
            }
        };
        let mut stream = UnfinishedStream(Some(stream));
        let open = stream.0.as_mut().expect("taken only at the end");
        let _ = open.set_priority(priority);
        let mut chunks = [Bytes::from_static(lane.tag()), message];
        if let Err(error) = open.write_all_chunks(&mut chunks).await {
            return Err(self.write_error(lane, error).await);
        }
        let mut finished = stream.0.take().expect("taken only here");
        let _ = finished.finish();
        Ok(finished)
    }

    async fn write_error(&self, lane: Lane, error: WriteError) -> LinkError {
        if let WriteError::ConnectionLost(reason) = &error {
            self.0.core.lost(reason.clone()).await;
        }
        self.ended_or(match error {
            WriteError::Stopped(_) => LinkError::Violation(format!(
                "the other side gave up a message on the {} lane",
                lane.name()
            )),
            other => LinkError::Transport(other.to_string()),
        })
    }

    /// For tests of an address that changes under a link.
    #[cfg(test)]
    pub(super) fn move_to(&self, socket: std::net::UdpSocket) {
        self.0.core.endpoint.rebind(socket).expect("a socket on loopback");
    }

    /// For tests of what becomes of the connections beside the main one.
    #[cfg(test)]
    pub(super) fn bulk(&self) -> Vec<Connection> {
        self.0.core.bulk().iter().map(|bulk| bulk.connection.clone()).collect()
    }

    /// For tests of what a hostile peer could do.
    #[cfg(test)]
    pub(super) fn quic(&self) -> &Connection {
        &self.0.core.connection
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.core.close(close_code::LET_GO, LET_GO_REASON);
    }
}

impl LinkStats {
    /// One more connection.
    fn count(&mut self, quic: &ConnectionStats, gauges: &Gauges) {
        self.window_bytes += quic.path.cwnd;
        self.in_flight_bytes += gauges.in_flight_bytes();
        self.sent_bytes += quic.udp_tx.bytes;
        self.received_bytes += quic.udp_rx.bytes;
        self.sent_packets += quic.path.sent_packets;
        self.lost_packets += quic.path.lost_packets;
        self.connections += 1;
    }
}

/// Lets the pusher know when a connection runs dry.
fn follow(budget: &Arc<PushBudget>, connection: &Connection, gauges: &Arc<Gauges>) {
    let (budget, connection, gauges) = (budget.clone(), connection.clone(), gauges.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = budget.follow(&gauges) => {}
            _ = connection.closed() => {}
        }
    });
}

fn check_size(lane: Lane, message: &Bytes) -> Result<(), LinkError> {
    if message.len() > lane.limit_bytes() {
        return Err(LinkError::too_large(lane, message.len()));
    }
    Ok(())
}

/// quinn finishes a stream that is dropped, which would make half a message look whole.
struct UnfinishedStream(Option<SendStream>);

impl Drop for UnfinishedStream {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.0 {
            let _ = stream.reset(VarInt::from_u32(0));
        }
    }
}

/// A task of its own, so that a caller who gives up leaves no half-written message on the lane.
fn start_control_writer(mut stream: SendStream) -> mpsc::Sender<ControlOut> {
    let (sender, mut receiver) = mpsc::channel(CONTROL_QUEUE);
    let _ = stream.set_priority(CONTROL_PRIORITY);
    tokio::spawn(async move {
        while let Some(out) = receiver.recv().await {
            match out {
                ControlOut::Message(message) => {
                    let length = (message.len() as u32).to_be_bytes();
                    let mut chunks = [Bytes::copy_from_slice(&length), message];
                    if stream.write_all_chunks(&mut chunks).await.is_err() {
                        return;
                    }
                }
                ControlOut::Finish(done) => {
                    let _ = stream.finish();
                    if matches!(stream.stopped().await, Ok(None)) {
                        let _ = done.send(());
                    }
                    return;
                }
            }
        }
    });
    sender
}
