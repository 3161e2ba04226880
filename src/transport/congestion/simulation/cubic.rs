//! The TCP flow beside ours: CUBIC (RFC 9438), with the delay-based end of slow start that Linux has
//! (HyStart), and without the finer points.

/// Growth constant and multiplicative decrease, section 5 of the RFC.
const C: f64 = 0.4;
const BETA: f64 = 0.7;

/// Windows in packets, times in seconds.
pub(super) struct Cubic {
    packet_bytes: f64,
    window: f64,
    slow_start: bool,
    most: f64,
    /// Of the last decrease.
    since: f64,
    least_rtt: f64,
}

impl Cubic {
    pub(super) fn new(packet_bytes: f64) -> Self {
        Cubic {
            packet_bytes,
            window: 10.0,
            slow_start: true,
            most: 0.0,
            since: 0.0,
            least_rtt: f64::INFINITY,
        }
    }

    pub(super) fn window_bytes(&self) -> f64 {
        self.window * self.packet_bytes
    }

    pub(super) fn acked(&mut self, now: f64, rtt: f64) {
        self.least_rtt = self.least_rtt.min(rtt);
        if self.slow_start {
            self.window += 1.0;
            if rtt > self.least_rtt + (self.least_rtt / 8.0).clamp(0.004, 0.016) {
                (self.slow_start, self.most, self.since) = (false, self.window, now);
            }
            return;
        }
        let back_at = (self.most * (1.0 - BETA) / C).cbrt();
        let cubic = C * (now - self.since + rtt - back_at).powi(3) + self.most;
        // Never slower than Reno would be, section 4.3.
        let reno_growth = 3.0 * (1.0 - BETA) / (1.0 + BETA);
        let reno = self.most * BETA + reno_growth * (now - self.since) / rtt;
        let aim = cubic.max(reno).clamp(self.window, 1.5 * self.window);
        self.window += (aim - self.window) / self.window;
    }

    /// Once a round trip: what left before the last decrease has been answered already.
    pub(super) fn lost(&mut self, now: f64, sent: f64) {
        if sent < self.since {
            return;
        }
        (self.slow_start, self.most, self.since) = (false, self.window, now);
        self.window = (self.window * BETA).max(2.0);
    }
}
