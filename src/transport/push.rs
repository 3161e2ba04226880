//! How much bulk may be on its way.
//!
//! Two bounds hold for the push lane of the sending end:
//! * *in flight*: what quinn holds of it, unsent or unacknowledged, stays near the congestion window of each of
//!   the link's connections, so that what goes next is decided late, by the pusher, and not queued early;
//! * *credit*: what the peer's consumer has not taken yet stays within the window that the peer
//!   announced, so that a slow consumer of bulk cannot use up the connection's flow control, which the
//!   fault lanes need too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::bulk::BULK_WINDOW_BYTES;
use super::congestion::Gauges;
use super::lanes::push_cost_bytes;

/// Queue at the sender beyond the window, besides a quarter of it.
const SENDER_QUEUE_BYTES: u64 = 64 << 10;

#[derive(Debug, Default)]
struct Ledger {
    /// One for each connection, the main one first.
    ways: Vec<Way>,
    pushed_cost: u64,
    consumed_cost: u64,
    messages: u32,
    stopped: bool,
}

#[derive(Debug)]
struct Way {
    gauges: Arc<Gauges>,
    in_flight_bytes: u64,
    /// Beyond which the peer's flow control would hold up a message that another connection has room for.
    most_bytes: u64,
}

impl Way {
    /// How much of it is free with a message of `bytes` more, if that fits.
    fn room_with(&self, bytes: u64) -> Option<u64> {
        let window = self.gauges.window_bytes();
        let limit = (window + window / 4 + SENDER_QUEUE_BYTES).min(self.most_bytes);
        match self.in_flight_bytes {
            0 => Some(limit.saturating_sub(bytes)),
            under_way => limit.checked_sub(under_way + bytes),
        }
    }
}

/// The sending end's account.
#[derive(Debug)]
pub(super) struct PushBudget {
    peer_window_bytes: u64,
    ledger: Mutex<Ledger>,
    changed: Notify,
    /// Several pushers are served in the order in which they came.
    turn: tokio::sync::Mutex<()>,
}

impl PushBudget {
    pub(super) fn new(gauges: Arc<Gauges>, peer_window_bytes: u64) -> Arc<Self> {
        let ways = vec![Way { gauges, in_flight_bytes: 0, most_bytes: u64::MAX }];
        Arc::new(PushBudget {
            peer_window_bytes,
            ledger: Mutex::new(Ledger { ways, ..Ledger::default() }),
            changed: Notify::new(),
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// One connection more.
    pub(super) fn add_way(&self, gauges: Arc<Gauges>) {
        let most_bytes = u64::from(BULK_WINDOW_BYTES);
        self.ledger().ways.push(Way { gauges, in_flight_bytes: 0, most_bytes });
        self.changed.notify_waiters();
    }

    /// Wakes the pusher whenever the connection with these gauges runs dry.
    pub(super) async fn follow(&self, gauges: &Gauges) {
        let mut dry = std::pin::pin!(gauges.dry.notified());
        dry.as_mut().enable();
        loop {
            dry.as_mut().await;
            dry.set(gauges.dry.notified());
            dry.as_mut().enable();
            self.changed.notify_waiters();
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits nothing more.
    pub(super) fn stop(&self) {
        self.ledger().stopped = true;
    }

    /// Waits until a message of `bytes` may go.
    pub(super) async fn admit(self: &Arc<Self>, bytes: usize) -> Admitted {
        let _turn = self.turn.lock().await;
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(admitted) = self.try_admit(bytes) {
                return admitted;
            }
            changed.await;
        }
    }

    fn try_admit(self: &Arc<Self>, bytes: usize) -> Option<Admitted> {
        let mut ledger = self.ledger();
        let cost = push_cost_bytes(bytes);
        let unconsumed = ledger.pushed_cost - ledger.consumed_cost;
        if ledger.stopped || unconsumed > 0 && unconsumed + cost > self.peer_window_bytes {
            return None;
        }
        let ways = ledger.ways.iter().enumerate();
        let fitting = ways.filter_map(|(way, it)| Some((it.room_with(bytes as u64)?, way)));
        // Of equals the first one.
        let roomiest = fitting.max_by_key(|(room, way)| (*room, std::cmp::Reverse(*way)));
        // A message counts until its last byte is acknowledged, so under loss the account shows more
        // than is on its way. That the connection ran out of data is the better witness then.
        let way = match roomiest {
            Some((_, way)) => way,
            None => ledger.ways.iter().position(|way| way.gauges.take_dry())?,
        };
        ledger.ways[way].in_flight_bytes += bytes as u64;
        ledger.pushed_cost += cost;
        ledger.messages = ledger.messages.saturating_add(1);
        // Earlier messages precede later ones: pages arrive in the pusher's order, and few streams
        // are incomplete at a time.
        let priority = i32::try_from(ledger.messages).map_or(i32::MIN, |count| -count);
        Some(Admitted { budget: self.clone(), bytes: bytes as u64, way, priority })
    }

    /// The peer's consumer has taken messages of this cost, in all. `Err` when that cannot be.
    pub(super) fn consumed(&self, total_cost: u64) -> Result<(), ()> {
        let mut ledger = self.ledger();
        if !(ledger.consumed_cost..=ledger.pushed_cost).contains(&total_cost) {
            return Err(());
        }
        ledger.consumed_cost = total_cost;
        drop(ledger);
        self.changed.notify_waiters();
        Ok(())
    }

    /// Bytes pushed and not acknowledged by the peer's transport.
    pub(super) fn in_flight_bytes(&self) -> u64 {
        self.ledger().ways.iter().map(|way| way.in_flight_bytes).sum()
    }

    /// Waits until all that was pushed is acknowledged by the peer's transport.
    pub(super) async fn drained(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.in_flight_bytes() == 0 {
                return;
            }
            changed.await;
        }
    }
}

/// A message on its way; in flight until dropped.
#[derive(Debug)]
pub(super) struct Admitted {
    budget: Arc<PushBudget>,
    bytes: u64,
    /// By which of the link's connections.
    pub(super) way: usize,
    /// For the message's stream.
    pub(super) priority: i32,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.budget.ledger().ways[self.way].in_flight_bytes -= self.bytes;
        self.budget.changed.notify_waiters();
    }
}

/// The receiving end's account: what came, what was taken, what the sender was told.
#[derive(Debug)]
pub(super) struct PushCredit {
    window_bytes: u64,
    state: Mutex<CreditState>,
    pub(super) due: Notify,
}

#[derive(Debug, Default)]
struct CreditState {
    received_cost: u64,
    consumed_cost: u64,
    announced_cost: u64,
}

impl PushCredit {
    pub(super) fn new(window_bytes: u64) -> Arc<Self> {
        Arc::new(PushCredit { window_bytes, state: Mutex::default(), due: Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, CreditState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A message came. `Err` when the sender goes beyond its window.
    pub(super) fn received(&self, bytes: usize) -> Result<(), ()> {
        let mut state = self.state();
        let unconsumed = state.received_cost - state.consumed_cost;
        let cost = push_cost_bytes(bytes);
        if unconsumed > 0 && unconsumed + cost > self.window_bytes {
            return Err(());
        }
        state.received_cost += cost;
        Ok(())
    }

    /// The consumer took a message.
    pub(super) fn consumed(&self, bytes: usize) {
        let mut state = self.state();
        state.consumed_cost += push_cost_bytes(bytes);
        if state.consumed_cost - state.announced_cost >= self.window_bytes / 8 {
            drop(state);
            self.due.notify_one();
        }
    }

    /// What to tell the sender now.
    pub(super) fn announce(&self) -> u64 {
        let mut state = self.state();
        state.announced_cost = state.consumed_cost;
        state.consumed_cost
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn budget(window_bytes: u64, peer_window_bytes: u64) -> (Arc<Gauges>, Arc<PushBudget>) {
        let gauges = Arc::new(Gauges::default());
        gauges.publish(window_bytes, 0, 0, None);
        (gauges.clone(), PushBudget::new(gauges, peer_window_bytes))
    }

    #[test]
    fn the_bytes_in_flight_stay_near_the_congestion_window() {
        let (gauges, budget) = budget(400_000, u64::MAX / 2);
        let held: Vec<_> = std::iter::from_fn(|| budget.try_admit(50_000)).collect();
        assert_eq!(held.len(), 11, "at most 1.25 windows and 64 KiB");
        gauges.report_dry();
        assert!(budget.try_admit(50_000).is_some(), "a dry connection is fed whatever the account");
        drop(held);
        assert_eq!(budget.in_flight_bytes(), 0);
    }

    #[test]
    fn connections_are_filled_alike_each_up_to_its_own_window() {
        let (_gauges, budget) = budget(400_000, u64::MAX / 2);
        let narrow = Arc::new(Gauges::default());
        narrow.publish(100_000, 0, 0, None);
        budget.add_way(narrow.clone());
        let held: Vec<_> = std::iter::from_fn(|| budget.try_admit(50_000)).collect();
        let by = |way: usize| held.iter().filter(|admitted| admitted.way == way).count();
        assert_eq!((by(0), by(1)), (11, 3), "at most 1.25 windows and 64 KiB of each");
        narrow.report_dry();
        assert_eq!(budget.try_admit(50_000).unwrap().way, 1, "the dry one is fed");
        drop(held);
        assert_eq!(budget.in_flight_bytes(), 0);
    }

    #[test]
    fn a_message_larger_than_the_window_goes_alone() {
        let (_, budget) = budget(10_000, 100_000);
        let first = budget.try_admit(256_000).unwrap();
        assert!(budget.try_admit(1).is_none());
        drop(first);
        assert!(budget.try_admit(1).is_none(), "it is not consumed yet");
        budget.consumed(256_000).unwrap();
        assert!(budget.try_admit(1).is_some());
    }

    #[test]
    fn later_messages_yield_to_earlier_ones() {
        let (_, budget) = budget(1_000_000, 1 << 30);
        let (first, second) = (budget.try_admit(1).unwrap(), budget.try_admit(1).unwrap());
        assert!(first.priority > second.priority);
    }

    #[test]
    fn credit_that_cannot_be_is_refused() {
        let (_, budget) = budget(1_000_000, 1 << 30);
        let _message = budget.try_admit(100_000).unwrap();
        assert!(budget.consumed(100_001).is_err());
        assert!(budget.consumed(100_000).is_ok());
        assert!(budget.consumed(99_999).is_err());
    }

    #[test]
    fn a_sender_beyond_its_credit_is_noticed() {
        let credit = PushCredit::new(100_000);
        credit.received(60_000).unwrap();
        assert!(credit.received(60_000).is_err());
        credit.consumed(60_000);
        assert!(credit.received(60_000).is_ok());
        assert_eq!(credit.announce(), 60_000);
    }

    #[tokio::test]
    async fn a_waiting_pusher_goes_on_when_a_connection_runs_dry() {
        let (gauges, budget) = budget(10_000, 1 << 30);
        let followed = tokio::spawn({
            let (gauges, budget) = (gauges.clone(), budget.clone());
            async move { budget.follow(&gauges).await }
        });
        let held = budget.try_admit(80_000).unwrap();
        for _ in 0..3 {
            let waiting = tokio::spawn({
                let budget = budget.clone();
                async move { drop(budget.admit(80_000).await) }
            });
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(!waiting.is_finished());
            gauges.report_dry();
            waiting.await.unwrap();
        }
        drop(held);
        followed.abort();
    }

    #[tokio::test]
    async fn a_waiting_pusher_goes_on_when_an_earlier_message_is_acknowledged() {
        let (_, budget) = budget(10_000, 1 << 30);
        let first = budget.try_admit(80_000).unwrap();
        let waiting = tokio::spawn({
            let budget = budget.clone();
            async move { budget.admit(80_000).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        drop(first);
        drop(waiting.await.unwrap());
        budget.drained().await;
    }
}
