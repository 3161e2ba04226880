//! More connections of a link, for bulk alone.
//!
//! QUIC's work for one connection is done by one task: a core's worth of encryption and system calls, some gigabits a
//! second. Bulk comes in messages that may arrive in any order, so it can go by several connections, each with a socket
//! and a congestion controller of its own; everything else stays on the main one. The sender opens them, and proves
//! to be the link's other end by a key that only the two ends of the main connection have. A link ends with any
//! of its connections: what was on its way there may be lost.

use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, RecvStream, SendStream};

use super::congestion::Gauges;
use super::connect::{Dialled, Dialler, prove};
use super::error::ConnectError;
use super::lanes::MIN_PUSH_COST_BYTES;
use super::link::{Link, WeakLink};
use super::options::Connections;
use super::proof::Claim;
use super::quic::Peer;
use super::ticket::Secret;
use crate::cores::cores;

/// Connections of a link, at most.
pub(crate) const MAX_CONNECTIONS: u8 = 16;
/// The sender's unread bytes on each of them, at the receiver.
pub(super) const BULK_WINDOW_BYTES: u32 = 16 << 20;
/// Streams that the sender may have open on each: as many messages as the window has room for, by their cost.
pub(super) const BULK_STREAMS: u32 = BULK_WINDOW_BYTES / MIN_PUSH_COST_BYTES as u32;
/// On its own a link gets no more than half of the cores, and no more connections than this: the guest and the
/// encoders need cores too.
const MOST_BY_ITSELF: usize = 8;
/// A connection that carries so much may soon be all that a core can do (0.7 GB/s at an MTU of 1,500 here).
const BUSY_BYTES_PER_S: u64 = 250_000_000;
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The receiver may not be ready at the first try.
const ATTEMPTS: u32 = 3;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(200);

/// Which end of a link this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Sender,
    Receiver,
}

/// One of them.
#[derive(Debug)]
pub(super) struct BulkConnection {
    pub(super) connection: Connection,
    /// Where it lives: the sender's have a socket each.
    pub(super) endpoint: Endpoint,
    pub(super) gauges: Arc<Gauges>,
    /// As it was opened. It carries nothing more, and ends with the connection.
    pub(super) _control: (SendStream, RecvStream),
}

/// Opens the connections that `link` is to have, in the background, as long as it lives.
pub(super) fn keep_wide(link: &Link, dialler: Dialler) {
    let (most, wanted_at) = match dialler.options.connections {
        Connections::Exactly(count) => (usize::from(count.get().min(MAX_CONNECTIONS)), 0),
        Connections::Auto => (most_by_itself(), BUSY_BYTES_PER_S),
    };
    if most > 1 {
        tokio::spawn(widen(link.downgrade(), dialler, most, wanted_at));
    }
}

fn most_by_itself() -> usize {
    (cores() / 2).clamp(1, MOST_BY_ITSELF)
}

/// Adds connections until there are `most`, each when those before carry `wanted_at` bytes a second on average.
pub(super) async fn widen(weak: WeakLink, dialler: Dialler, most: usize, wanted_at: u64) {
    loop {
        let Some(link) = weak.upgrade().filter(Link::is_up) else { return };
        let stats = link.stats();
        let count = stats.connections;
        if count as usize >= most {
            return;
        }
        if stats.delivery_rate_bytes_per_s < wanted_at * u64::from(count) {
            drop(link);
            tokio::time::sleep(LOOK_EVERY).await;
            continue;
        }
        let key = link.bulk_key();
        // It may take a while, in which nobody else may want the link any more.
        drop(link);
        if let Err(error) = add_one(&weak, &key, &dialler).await {
            if weak.upgrade().is_some_and(|link| link.is_up()) {
                tracing::warn!("the link stays at {count} of {most} connections: {error}");
            }
            return;
        }
    }
}

async fn add_one(link: &WeakLink, key: &Secret, dialler: &Dialler) -> Result<(), ConnectError> {
    let limit = Duration::from_millis(dialler.options.connect_timeout_ms);
    let mut attempt = 1;
    loop {
        let late = || Err(ConnectError::Unreachable("no answer in time".to_owned()));
        match tokio::time::timeout(limit, open(key, dialler)).await.unwrap_or_else(|_| late()) {
            Ok(bulk) => {
                // Where the link has ended meanwhile, it is closed.
                let _ = link.upgrade().map(|link| link.add(bulk, Side::Sender));
                return Ok(());
            }
            Err(error) if attempt == ATTEMPTS => return Err(error),
            Err(_) => tokio::time::sleep(BETWEEN_ATTEMPTS).await,
        }
        attempt += 1;
    }
}

pub(super) async fn open(key: &Secret, dialler: &Dialler) -> Result<BulkConnection, ConnectError> {
    // Nothing is ever to come by it.
    let Dialled { connection, endpoint, gauges } = dialler.dial(Peer::Stranger).await?;
    let (migration, options) = (dialler.migration, &dialler.options);
    let (control, _) = prove(&connection, migration, Claim::Bulk, key, options).await?;
    Ok(BulkConnection { connection, endpoint, gauges, _control: control })
}
