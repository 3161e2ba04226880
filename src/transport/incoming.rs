//! The receiving end of a link's streams: each message is put together by a task of its own, within the
//! limits of its lane, and handed to the queue of its lane.

use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use quinn::{Connection, Endpoint, ReadError, ReadExactError, RecvStream};
use tokio::sync::{Semaphore, mpsc};

use super::buffers::Buffers;
use super::error::{LinkError, close_code, code};
use super::lanes::{CREDIT_TAG, Lane};
use super::push::{PushBudget, PushCredit};

/// Control messages that wait for their consumer.
const CONTROL_QUEUE: usize = 4;
/// A message's memory grows with what has come, not with what was announced.
const FIRST_ALLOCATION_BYTES: usize = 64 << 10;
/// Pieces of a message, each of a packet, that are taken from QUIC at a time.
const CHUNKS: usize = 32;

/// What the tasks of a link share. They end when the connection does.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) connection: Connection,
    pub(super) endpoint: Endpoint,
    pub(super) idle_timeout_ms: u64,
    /// What the peer did wrong, when that is why the connection ended.
    violation: OnceLock<LinkError>,
}

impl Core {
    pub(super) fn new(
        connection: Connection,
        endpoint: Endpoint,
        idle_timeout_ms: u64,
    ) -> Arc<Self> {
        Arc::new(Core { connection, endpoint, idle_timeout_ms, violation: OnceLock::new() })
    }

    /// Ends the link because of what the peer did.
    pub(super) fn violated(&self, what: String) {
        self.connection.close(code(close_code::VIOLATION), what.as_bytes());
        let _ = self.violation.set(LinkError::Violation(what));
    }

    /// Why the link has ended; `None` while it lives.
    pub(super) fn ended(&self) -> Option<LinkError> {
        if let Some(violation) = self.violation.get() {
            return Some(violation.clone());
        }
        let reason = self.connection.close_reason()?;
        Some(LinkError::from_quic(reason, self.idle_timeout_ms))
    }

    /// Waits for the end.
    pub(super) async fn end(&self) -> LinkError {
        let reason = self.connection.closed().await;
        self.violation
            .get()
            .cloned()
            .unwrap_or_else(|| LinkError::from_quic(reason, self.idle_timeout_ms))
    }
}

/// The queues of one link's lanes, by [`Lane::index`].
pub(super) type LaneQueues<T> = [T; Lane::ALL.len()];

/// Starts to receive one-shot messages.
pub(super) fn start_lanes(
    core: &Arc<Core>,
    budget: Arc<PushBudget>,
    credit: Arc<PushCredit>,
) -> LaneQueues<mpsc::Receiver<Bytes>> {
    let queues = Lane::ALL.map(|lane| mpsc::channel(lane.queue_length()));
    let lanes = Arc::new(Assembly {
        core: core.clone(),
        queues: queues.each_ref().map(|(sender, _)| sender.clone()),
        permits: Lane::ALL.map(|lane| Semaphore::new(lane.max_in_assembly())),
        budget,
        credit,
        buffers: Buffers::default(),
    });
    tokio::spawn(async move {
        while let Ok(stream) = lanes.core.connection.accept_uni().await {
            let lanes = lanes.clone();
            tokio::spawn(async move { lanes.receive(stream).await });
        }
    });
    queues.map(|(_, receiver)| receiver)
}

struct Assembly {
    core: Arc<Core>,
    queues: LaneQueues<mpsc::Sender<Bytes>>,
    permits: LaneQueues<Semaphore>,
    budget: Arc<PushBudget>,
    credit: Arc<PushCredit>,
    buffers: Buffers,
}

impl Assembly {
    async fn receive(&self, mut stream: RecvStream) {
        let mut tag = [0];
        match stream.read_exact(&mut tag).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(_)) => {
                return self.core.violated("an empty stream".to_owned());
            }
            Err(ReadExactError::ReadError(_)) => return,
        }
        match (tag[0], Lane::from_tag(tag[0])) {
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
