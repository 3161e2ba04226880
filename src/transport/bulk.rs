//! More connections of a link, for bulk alone.
//!
//! QUIC's work for one connection is done by one task: a core's worth of encryption and system calls, some gigabits a
//! second. Bulk comes in messages that may arrive in any order, so it can go by several connections, each with a socket
//! and a congestion controller of its own; everything else stays on the main one. The sender opens them, and proves
//! to be the link's other end by a key that only the two ends of the main connection have. A link ends with any
//! of its connections: what was on its way there may be lost.

use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, RecvStream, SendStream};

use super::congestion::Gauges;
use super::connect::{Dialled, Dialler, prove};
use super::error::ConnectError;
use super::link::{Link, WeakLink};
use super::options::Connections;
use super::proof::Claim;

/// Connections of a link, at most.
pub(crate) const MAX_CONNECTIONS: u8 = 16;
/// A peer's unread bytes on each of them. Together with the push window this bounds what a link holds.
pub(super) const BULK_WINDOW_BYTES: u32 = 16 << 20;
/// On its own a link gets no more than half of the cores, and no more connections than this: the guest and the
/// encoders need cores too.
const MOST_BY_ITSELF: usize = 8;
/// A connection that carries so much may soon be all that a core can do (0.6 GB/s at an MTU of 1,500 here).
const BUSY_BYTES_PER_S: u64 = 250_000_000;
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The receiver may not be ready at the first try.
const ATTEMPTS: u32 = 3;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(200);

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
        Connections::Exactly(count) => (usize::from(count.get()), 0),
        Connections::Auto => (most_by_itself(), BUSY_BYTES_PER_S),
    };
    if most > 1 {
        tokio::spawn(widen(link.downgrade(), dialler, most, wanted_at));
    }
}

fn most_by_itself() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    (cores / 2).clamp(1, MOST_BY_ITSELF)
}

/// Adds connections until there are `most`, each when those before carry `wanted_at` bytes a second on average.
pub(super) async fn widen(link: WeakLink, dialler: Dialler, most: usize, wanted_at: u64) {
    loop {
        let Some(link) = link.upgrade().filter(Link::is_up) else { return };
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
        if let Err(error) = add_one(&link, &dialler).await {
            if link.is_up() {
                tracing::warn!("the link stays at {count} of {most} connections: {error}");
            }
            return;
        }
    }
}

async fn add_one(link: &Link, dialler: &Dialler) -> Result<(), ConnectError> {
    let limit = Duration::from_millis(dialler.options.connect_timeout_ms);
    let mut attempt = 1;
    loop {
        let late = || Err(ConnectError::Unreachable("no answer in time".to_owned()));
        match tokio::time::timeout(limit, open(link, dialler)).await.unwrap_or_else(|_| late()) {
            Ok(bulk) => {
                // A link that has ended meanwhile has closed it.
                let _ = link.add(bulk);
                return Ok(());
            }
            Err(error) if attempt == ATTEMPTS || !link.is_up() => return Err(error),
            Err(_) => tokio::time::sleep(BETWEEN_ATTEMPTS).await,
        }
        attempt += 1;
    }
}

pub(super) async fn open(link: &Link, dialler: &Dialler) -> Result<BulkConnection, ConnectError> {
    let Dialled { connection, endpoint, gauges } = dialler.dial().await?;
    let (migration, options) = (dialler.migration, &dialler.options);
    let key = link.bulk_key();
    let (control, _) = prove(&connection, migration, Claim::Bulk, &key, options).await?;
    Ok(BulkConnection { connection, endpoint, gauges, _control: control })
}
