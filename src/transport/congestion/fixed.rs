//! A constant window.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

use super::Gauges;

/// Smallest window that still lets a connection make progress.
const MIN_WINDOW_BYTES: u64 = 8 * 1500;

/// Builds [`Fixed`] controllers.
#[derive(Clone, Debug)]
pub struct FixedConfig {
    /// Bytes that may be in flight.
    pub window_bytes: u64,
    pub(crate) gauges: Arc<Gauges>,
}

impl ControllerFactory for FixedConfig {
    fn build(self: Arc<Self>, now: Instant, _current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Fixed {
            window_bytes: self.window_bytes.max(MIN_WINDOW_BYTES),
            delivered_bytes: 0,
            since: now,
            min_rtt: None,
            rate_bytes_per_s: 0,
            gauges: self.gauges.clone(),
        })
    }
}

/// Keeps a constant number of bytes in flight and reacts to nothing. It is not fit for a shared
/// network; it answers "what would a perfect window have done" in an experiment.
#[derive(Clone, Debug)]
pub struct Fixed {
    window_bytes: u64,
    delivered_bytes: u64,
    since: Instant,
    min_rtt: Option<std::time::Duration>,
    rate_bytes_per_s: u64,
    gauges: Arc<Gauges>,
}

impl Controller for Fixed {
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _: bool, _: &RttEstimator) {
        let rtt = now.saturating_duration_since(sent);
        self.min_rtt = Some(self.min_rtt.map_or(rtt, |min| min.min(rtt)));
        self.delivered_bytes += bytes;
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= rtt.max(std::time::Duration::from_millis(10)) {
            self.rate_bytes_per_s = (self.delivered_bytes as f64 / elapsed.as_secs_f64()) as u64;
            self.delivered_bytes = 0;
            self.since = now;
            self.gauges.set_full(true);
        }
    }

    fn on_end_acks(&mut self, _: Instant, in_flight: u64, app_limited: bool, _: Option<u64>) {
        self.gauges.publish(self.window_bytes, in_flight, self.rate_bytes_per_s, self.min_rtt);
        if app_limited {
            self.gauges.report_dry();
        }
    }

    fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}

    fn on_mtu_update(&mut self, _: u16) {}

    fn window(&self) -> u64 {
        self.window_bytes
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.window_bytes
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
