//! The receiving end of a link's streams: each message is put together by a task of its own, within the
//! limits of its lane, and handed to the queue of its lane.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ConnectionError, Endpoint, ReadError, ReadExactError, RecvStream};
use tokio::sync::{Semaphore, mpsc};

use super::buffers::Buffers;
use super::bulk::BulkConnection;
use super::error::{LinkError, close_code, code};
use super::lanes::{CREDIT_TAG, Lane};
use super::push::{PushBudget, PushCredit};

/// Control messages that wait for their consumer.
const CONTROL_QUEUE: usize = 4;
/// A message's memory grows with what has come, not with what was announced.
const FIRST_ALLOCATION_BYTES: usize = 64 << 10;
/// Pieces of a message, each of a packet, that are taken from QUIC at a time.
const CHUNKS: usize = 32;

/// When a connection for bulk has ended, and the main one may be about to say why.
const MAIN_MAY_TELL: Duration = Duration::from_millis(300);

/// What the tasks of a link share. They end when the connection does.
#[derive(Debug)]
pub(super) struct Core {
    /// The main connection: all lanes.
    pub(super) connection: Connection,
    pub(super) endpoint: Endpoint,
    pub(super) idle_timeout_ms: u64,
    /// More connections, for the push lane alone. The link ends with any of them.
    bulk: Mutex<Vec<BulkConnection>>,
    /// Why the link ended, when that is not what the main connection says.
    cause: OnceLock<LinkError>,
}

impl Core {
    pub(super) fn new(
        connection: Connection,
        endpoint: Endpoint,
        idle_timeout_ms: u64,
    ) -> Arc<Self> {
        let (bulk, cause) = (Mutex::default(), OnceLock::new());
        Arc::new(Core { connection, endpoint, idle_timeout_ms, bulk, cause })
    }

    /// The connections beside the main one.
    pub(super) fn bulk(&self) -> MutexGuard<'_, Vec<BulkConnection>> {
        self.bulk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection of this number: 0 is the main one, the others follow in the order in which they came.
    pub(super) fn way(&self, number: usize) -> Connection {
        match number.checked_sub(1) {
            None => self.connection.clone(),
            Some(place) => self.bulk()[place].connection.clone(),
        }
    }

    /// Closes all connections.
    pub(super) fn close(&self, number: u32, reason: &[u8]) {
        let close = |connection: &Connection| {
            // quinn would forget why it was closed before.
            if connection.close_reason().is_none() {
                connection.close(code(number), reason);
            }
        };
        // Held until all are closed: see `Link::add`.
        let bulk = self.bulk();
        close(&self.connection);
        bulk.iter().for_each(|bulk| close(&bulk.connection));
    }

    /// Ends the link because of what the peer did.
    pub(super) fn violated(&self, what: String) {
        // Before anyone can see that it has ended.
        let _ = self.cause.set(LinkError::Violation(what.clone()));
        self.close(close_code::VIOLATION, what.as_bytes());
    }

    /// Ends the link because one of its connections has: what was pushed there may be lost. What the peer says of
    /// the migration holds, by whichever it comes first, so the main one is given a moment to bring that; anything
    /// else is of this connection alone, and another link may follow.
    pub(super) async fn lost(&self, reason: ConnectionError) {
        let error = LinkError::from_quic(reason, self.idle_timeout_ms);
        let tells = matches!(
            error,
            LinkError::PeerClosed { .. } | LinkError::Refused { code: close_code::VIOLATION, .. }
        );
        if !tells {
            let _ = tokio::time::timeout(MAIN_MAY_TELL, self.connection.closed()).await;
        }
        if self.connection.close_reason().is_none() {
            let _ = self.cause.set(if tells || error.is_mendable() {
                error
            } else {
                LinkError::Transport(format!("a connection for bulk has ended: {error}"))
            });
        }
        self.close(close_code::LET_GO, b"one of the link's connections was lost");
    }

    /// Why the link has ended; `None` while it lives.
    pub(super) fn ended(&self) -> Option<LinkError> {
        if let Some(cause) = self.cause.get() {
            return Some(cause.clone());
        }
        let reason = self.connection.close_reason()?;
        Some(LinkError::from_quic(reason, self.idle_timeout_ms))
    }

    /// Waits for the end.
    pub(super) async fn end(&self) -> LinkError {
        let reason = self.connection.closed().await;
        self.cause
            .get()
            .cloned()
            .unwrap_or_else(|| LinkError::from_quic(reason, self.idle_timeout_ms))
    }
}

/// The queues of one link's lanes, by [`Lane::index`].
pub(super) type LaneQueues<T> = [T; Lane::ALL.len()];

/// Starts to receive one-shot messages. More connections can be added to what is given beside the queues, as long
/// as the link lives.
pub(super) fn start_lanes(
    core: &Arc<Core>,
    budget: Arc<PushBudget>,
    credit: Arc<PushCredit>,
) -> (LaneQueues<mpsc::Receiver<Bytes>>, Weak<Assembly>) {
    let queues = Lane::ALL.map(|lane| mpsc::channel(lane.queue_length()));
    let lanes = Arc::new(Assembly {
        core: core.clone(),
        queues: queues.each_ref().map(|(sender, _)| sender.clone()),
        permits: Lane::ALL.map(|lane| Semaphore::new(lane.max_in_assembly())),
        budget,
        credit,
        buffers: Buffers::default(),
    });
    let more = Arc::downgrade(&lanes);
    lanes.serve(core.connection.clone(), Carries::AllLanes);
    (queues.map(|(_, receiver)| receiver), more)
}

/// What may come on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carries {
    /// The main one.
    AllLanes,
    /// Any other.
    Push,
}

/// Puts messages together, of all connections of a link.
pub(super) struct Assembly {
    core: Arc<Core>,
    queues: LaneQueues<mpsc::Sender<Bytes>>,
    permits: LaneQueues<Semaphore>,
    budget: Arc<PushBudget>,
    credit: Arc<PushCredit>,
    buffers: Buffers,
}

impl Assembly {
    /// Receives from a connection until that ends.
    pub(super) fn serve(self: Arc<Self>, connection: Connection, carries: Carries) {
        tokio::spawn(async move {
            while let Ok(stream) = connection.accept_uni().await {
                let lanes = self.clone();
                tokio::spawn(async move { lanes.receive(stream, carries).await });
            }
        });
    }

    async fn receive(&self, mut stream: RecvStream, carries: Carries) {
        let mut tag = [0];
        match stream.read_exact(&mut tag).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(_)) => {
                return self.core.violated("an empty stream".to_owned());
            }
            Err(ReadExactError::ReadError(_)) => return,
        }
        match (tag[0], Lane::from_tag(tag[0])) {
            (_, Some(Lane::Push)) => self.assemble(Lane::Push, stream).await,
            (_, lane) if carries == Carries::Push => {
                let lane = lane.map_or("unknown", Lane::name);
                let what = format!("a stream of the {lane} lane on a connection for bulk");
                self.core.violated(what);
            }
            (_, Some(lane)) => self.assemble(lane, stream).await,
            (CREDIT_TAG, None) => self.follow_credit(stream).await,
            (tag, None) => self.core.violated(format!("a stream of the unknown lane {tag}")),
        }
    }

    async fn assemble(&self, lane: Lane, mut stream: RecvStream) {
        let Ok(_permit) = self.permits[lane.index()].acquire().await else { return };
        let mut message = if lane == Lane::Push { self.buffers.take() } else { Vec::new() };
        // Each look at the stream locks the connection.
        let mut chunks = [const { Bytes::new() }; CHUNKS];
        loop {
            match stream.read_chunks(&mut chunks).await {
                Ok(Some(count)) => {
                    for chunk in &mut chunks[..count] {
                        if message.len() + chunk.len() > lane.limit_bytes() {
                            return self.core.violated(format!(
                                "a message on the {} lane is larger than {} bytes",
                                lane.name(),
                                lane.limit_bytes()
                            ));
                        }
                        message.extend_from_slice(&std::mem::take(chunk));
                    }
                }
                Ok(None) => break,
                // Given up by its sender, or the connection is gone.
                Err(_) => return,
            }
        }
        let message = match lane {
            Lane::Push => self.buffers.message(message),
            _ => Bytes::from(message),
        };
        if lane == Lane::Push && self.credit.received(message.len()).is_err() {
            return self.core.violated("more on the push lane than was allowed".to_owned());
        }
        // An error means that the link was dropped here.
        let _ = self.queues[lane.index()].send(message).await;
    }

    /// The peer's consumer of what we push tells how far it is.
    async fn follow_credit(&self, mut stream: RecvStream) {
        let mut total = [0; 8];
        while stream.read_exact(&mut total).await.is_ok() {
            if self.budget.consumed(u64::from_be_bytes(total)).is_err() {
                return self.core.violated("credit for bytes that were never pushed".to_owned());
            }
        }
    }
}

/// Starts to tell the peer how much of its push was consumed here.
pub(super) fn start_credit(core: &Arc<Core>, credit: Arc<PushCredit>) {
    let connection = core.connection.clone();
    tokio::spawn(async move {
        // Errors mean that the connection has ended, which everyone else notices too.
        tokio::select! {
            () = credit.due.notified() => {}
            _ = connection.closed() => return,
        }
        let Ok(mut stream) = connection.open_uni().await else { return };
        let _ = stream.set_priority(Lane::FaultRequest.priority());
        if stream.write_all(&[CREDIT_TAG]).await.is_err() {
            return;
        }
        while stream.write_all(&credit.announce().to_be_bytes()).await.is_ok() {
            tokio::select! {
                () = credit.due.notified() => {}
                _ = connection.closed() => return,
            }
        }
    });
}

/// Starts to receive control messages.
pub(super) fn start_control(
    core: &Arc<Core>,
    mut stream: RecvStream,
    limit_bytes: usize,
) -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(CONTROL_QUEUE);
    let core = core.clone();
    tokio::spawn(async move {
        loop {
            match read_control(&mut stream, limit_bytes).await {
                Ok(Some(message)) => {
                    if sender.send(message).await.is_err() {
                        return;
                    }
                }
                Ok(None) | Err(None) => return,
                Err(Some(what)) => return core.violated(what),
            }
        }
    });
    receiver
}

/// The next message; `Ok(None)` at the end; `Err(None)` when the connection is gone.
async fn read_control(
    stream: &mut RecvStream,
    limit_bytes: usize,
) -> Result<Option<Bytes>, Option<String>> {
    let mut header = [0; 4];
    match stream.read_exact(&mut header).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(ReadExactError::FinishedEarly(_)) => return Err(Some(cut_short())),
        Err(ReadExactError::ReadError(error)) => return Err(broken(&error)),
    }
    let length = u32::from_be_bytes(header) as usize;
    if length > limit_bytes {
        return Err(Some(format!(
            "a message of {length} bytes on the control lane is larger than {limit_bytes} bytes"
        )));
    }
    let mut message = BytesMut::with_capacity(length.min(FIRST_ALLOCATION_BYTES));
    while message.len() < length {
        match stream.read_chunk(length - message.len(), true).await {
            Ok(Some(chunk)) => message.extend_from_slice(&chunk.bytes),
            Ok(None) => return Err(Some(cut_short())),
            Err(error) => return Err(broken(&error)),
        }
    }
    Ok(Some(message.freeze()))
}

fn cut_short() -> String {
    "a message on the control lane was cut short".to_owned()
}

fn broken(error: &ReadError) -> Option<String> {
    match error {
        ReadError::ConnectionLost(_) => None,
        other => Some(format!("the control lane was abandoned ({other})")),
    }
}
