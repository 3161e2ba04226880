//! What a controller knows, readable without the connection's lock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Notify;

/// Written by the controller at each batch of acknowledgements; read by the push lane, which sizes
/// its queue by it, and by statistics. Each figure stands alone, so relaxed ordering is enough.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    window_bytes: AtomicU64,
    in_flight_bytes: AtomicU64,
    delivery_rate_bytes_per_s: AtomicU64,
    min_rtt_us: AtomicU64,
    is_full: AtomicBool,
    ran_dry: AtomicBool,
    nobody_waits: AtomicBool,
    pub(crate) dry: Notify,
}

impl Gauges {
    pub(crate) fn publish(
        &self,
        window_bytes: u64,
        in_flight_bytes: u64,
        delivery_rate_bytes_per_s: u64,
        min_rtt: Option<Duration>,
    ) {
        self.window_bytes.store(window_bytes, Relaxed);
        self.in_flight_bytes.store(in_flight_bytes, Relaxed);
        self.delivery_rate_bytes_per_s.store(delivery_rate_bytes_per_s, Relaxed);
        self.min_rtt_us.store(min_rtt.map_or(0, |rtt| rtt.as_micros() as u64), Relaxed);
    }

    /// Whether the rate is what the network takes: the window was used in the last round. Otherwise it is the most
    /// that was seen in any.
    pub(crate) fn set_full(&self, is_full: bool) {
        self.is_full.store(is_full, Relaxed);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.is_full.load(Relaxed)
    }

    /// Nobody waits for a page behind the bulk: its rate is all that counts.
    pub(crate) fn set_nobody_waits(&self, nobody_waits: bool) {
        self.nobody_waits.store(nobody_waits, Relaxed);
    }

    pub(crate) fn nobody_waits(&self) -> bool {
        self.nobody_waits.load(Relaxed)
    }

    /// The connection had nothing more to send although its window was open.
    pub(crate) fn report_dry(&self) {
        if !self.ran_dry.swap(true, Relaxed) {
            self.dry.notify_waiters();
        }
    }

    /// True once for each time the connection ran dry.
    pub(crate) fn take_dry(&self) -> bool {
        self.ran_dry.load(Relaxed) && self.ran_dry.swap(false, Relaxed)
    }

    pub(crate) fn window_bytes(&self) -> u64 {
        self.window_bytes.load(Relaxed)
    }

    pub(crate) fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes.load(Relaxed)
    }

    pub(crate) fn delivery_rate_bytes_per_s(&self) -> u64 {
        self.delivery_rate_bytes_per_s.load(Relaxed)
    }

    pub(crate) fn min_rtt_us(&self) -> u64 {
        self.min_rtt_us.load(Relaxed)
    }
}
