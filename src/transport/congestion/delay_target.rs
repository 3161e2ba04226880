//! The default controller: full rate with a few milliseconds of queue.
//!
//! A delay-based law in the family of TCP Vegas, FAST TCP (Wei et al., 2006) and LEDBAT (RFC 6817),
//! with the start of HyStart++ (RFC 9406) and the base-RTT refresh of BBR:
//!
//! * A *round* is about one round trip. The smallest RTT of the last two rounds less the base RTT is
//!   the *standing queue*. Single late acknowledgements, jitter, and the bursts of a busy host, which
//!   look like a queue to a mean, do not count.
//! * Steady state moves the window a third of the way to `window * (base + target) / (base + queue)`,
//!   at which the standing queue is the target. It grows only while the window is really used.
//! * Start doubles per round trip until the window is what the path holds, as the spread of bursts tells
//!   ([`Trains`]): what one learns from a queue is a round trip late, and by then it is half a round trip long. Where
//!   bursts tell nothing, or too much, a sixteenth of a round trip of samples, all of them, that show a queue end
//!   it; then the window falls back to the one that was in force when those packets left.
//! * Loss alone means nothing below 6 % (random loss is common on long links); above 2 % it counts
//!   when a queue stands at the same time.
//! * The target is 4 ms; on a path of more than 128 ms a thirty-second of the RTT, on one of less than 40 ms a tenth while
//!   a guest may wait for pages behind the bulk. While nobody does, that would be too little: hosts that take
//!   milliseconds to get round to their packets look like a queue, and giving way to that would leave the link idle.
//! * A window that is far too small, however it came to be, grows by up to a quarter each round while no queue shows
//!   and the rate follows it ([`Calm`]).
//! * The base RTT is looked for every 10 s by draining the queue for one round. When a cut of the
//!   window does not shorten the delay, the queue is not ours (another route, or another sender that
//!   fills the buffer): the delay found becomes the base, and the old rate is taken up again. The same holds
//!   when the whole window, at the rate that there was, would be through sooner than the delay lasts, as where a
//!   busy host adds half a millisecond to a short path.
//! * Each cut that turns out to have been made for a delay that was not ours is taken back, and makes the next one wait longer
//!   ([`Patience`]): where both hosts have more to do than processors, nearly every delay is theirs.
//!
//! Beside a loss-based TCP flow it gives way, down to a few percent of the link at the worst, and takes the link
//! back when the other ends. Of two of its kind the first one keeps the most (`simulation/shared.rs`).

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::Gauges;
use super::calm::Calm;
use super::cut::Cut;
use super::patience::Patience;
use super::trains::Trains;

/// RTT samples in a row that must be late before the start ends or a round is cut short.
const LATE_SAMPLES: u32 = 8;
/// How long the row must be, as a share of the base RTT. A host that was not scheduled for a while
/// handles many late acknowledgements at once, and the last of them are in time again; what left at once is late
/// by its own burst. In the start, on a path that is shorter than a round, it is this share of the shortest round; in
/// steady state it is never less than [`HOSTS_ARE_LATE`].
const LATE_IN_START: f64 = 0.0625;
const LATE_IN_STEADY: f64 = 0.5;
/// Hosts are often late by some milliseconds, and on a short path, where few packets are under way, all of them are
/// late by the same then. So a delay that is this many times what the whole window makes at the rate that there is
/// calls for a cut only when it has lasted for so long. A window that was cut for a host is smaller yet, and on two busy
/// cores a link of 1 Gbit/s and 1 ms carried a seventh of what it can.
const NOT_OURS: f64 = 2.0;
const HOSTS_ARE_LATE: Duration = Duration::from_millis(10);
/// Rounds are no shorter than this: below it, timers and schedulers are what one measures.
const MIN_ROUND: Duration = Duration::from_millis(2);
/// How long a base RTT is believed without being seen again.
const BASE_RTT_LIFETIME: Duration = Duration::from_secs(10);
/// Share of the way to the aim in one round; the queue that is seen is two rounds old.
const GAIN: f64 = 0.35;
/// Growth per round, at most.
const MAX_GROWTH: f64 = 1.25;
/// The window grows when so much of it was in flight at some time. Less in the start (RFC 7661, 4.2): packets are paced
/// over a round trip, and a host that does not run for half of the time is not at fault with the path.
const USED: f64 = 0.75;
const USED_IN_START: f64 = 0.5;
/// A round is calm only when so much of the window was in flight at some time: else the host is what keeps the rate
/// down, and a larger window becomes a queue as soon as it does not.
const CALM_IN_FLIGHT: f64 = 0.95;
/// The window never falls by more than this factor in one step.
const MAX_CUT: f64 = 0.25;
/// Growth per round for a while after heavy loss, so that a policed link is not hit each round.
const GROWTH_AFTER_LOSS: f64 = 1.02;
const ROUNDS_AFTER_LOSS: u32 = 16;

/// Builds [`DelayTarget`] controllers.
#[derive(Clone, Debug)]
pub struct DelayTargetConfig {
    /// Standing queue aimed at. While a guest may wait for pages, a path whose base RTT is below ten times this aims at a
    /// tenth of it (but not below `queue_target_floor`): a queue must be short beside the RTT.
    pub queue_target: Duration,
    /// Smallest standing queue aimed at.
    pub queue_target_floor: Duration,
    /// On a path so long that this share of its base RTT is more than `queue_target`, it is the target: the few
    /// milliseconds by which a busy host is late would end the start and hold down the growth there, where each
    /// step takes long, and a queue of that length adds little.
    pub queue_target_share: f64,
    /// First window, in packets.
    pub initial_window_packets: u64,
    /// Largest window, in bytes.
    pub max_window_bytes: u64,
    pub(crate) gauges: Arc<Gauges>,
}

impl Default for DelayTargetConfig {
    fn default() -> Self {
        DelayTargetConfig {
            queue_target: Duration::from_millis(4),
            queue_target_floor: Duration::from_micros(220),
            queue_target_share: 1.0 / 32.0,
            initial_window_packets: 32,
            max_window_bytes: 256 << 20,
            gauges: Arc::default(),
        }
    }
}

impl ControllerFactory for DelayTargetConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(DelayTarget::new(self, now, current_mtu))
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Doubling until a queue shows.
    Start,
    /// Holding the target.
    Steady,
    /// Window held below the pipe, to see the base RTT; afterwards back to `resume_window`.
    Probe { resume_window: f64 },
}

/// A row of samples that all show a queue.
#[derive(Clone, Copy, Debug)]
struct Late {
    since: Instant,
    sent_since: Instant,
    samples: u32,
    min_rtt: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Round {
    started: Instant,
    min_rtt: Option<Duration>,
    /// Of all its samples.
    rtt_sum_s: f64,
    samples: u32,
    acked_bytes: u64,
    lost_bytes: u64,
    most_in_flight: u64,
}

impl Round {
    fn new(started: Instant) -> Self {
        Round {
            started,
            min_rtt: None,
            rtt_sum_s: 0.0,
            samples: 0,
            acked_bytes: 0,
            lost_bytes: 0,
            most_in_flight: 0,
        }
    }

    /// How long it has lasted. One that late samples cut short may have lasted for no time at all.
    fn seconds(&self, now: Instant) -> f64 {
        (now - self.started).max(MIN_ROUND).as_secs_f64()
    }
}

/// Regulates the queueing delay; see the module's text for the algorithm.
#[derive(Clone, Debug)]
pub struct DelayTarget {
    config: Arc<DelayTargetConfig>,
    mtu: u64,
    window: f64,
    phase: Phase,
    base: Option<Duration>,
    base_seen: Instant,
    round: Round,
    /// Rounds to let pass unjudged: their packets left before the last change of the window.
    settling: u32,
    cut: Option<Cut>,
    /// Since when each round has had a queue that calls for a cut.
    too_long_since: Option<Instant>,
    /// Window per RTT when the queue was last found to be longer than the target, for as long as it is.
    declining_from: Option<f64>,
    rounds_after_loss: u32,
    calm: Option<Calm>,
    /// Smallest RTT of the round before this one, when its packets left under the same window.
    previous_min_rtt: Option<Duration>,
    late: Option<Late>,
    /// Until the end of the start.
    trains: Trains,
    /// When the acknowledgement came that is being gone through.
    ack_came: Option<Instant>,
    in_flight: u64,
    rate_bytes_per_s: f64,
    patience: Patience,
}

impl DelayTarget {
    pub(super) fn new(config: Arc<DelayTargetConfig>, now: Instant, mtu: u16) -> Self {
        let window = (config.initial_window_packets * u64::from(mtu)) as f64;
        let controller = DelayTarget {
            config,
            mtu: u64::from(mtu),
            window,
            phase: Phase::Start,
            base: None,
            base_seen: now,
            round: Round::new(now),
            settling: 0,
            cut: None,
            too_long_since: None,
            declining_from: None,
            rounds_after_loss: 0,
            calm: None,
            previous_min_rtt: None,
            late: None,
            trains: Trains::default(),
            ack_came: None,
            in_flight: 0,
            rate_bytes_per_s: 0.0,
            patience: Patience::none(now),
        };
        controller.publish();
        controller
    }

    /// Standing queue aimed at, in seconds.
    fn target(&self, base: f64) -> f64 {
        let on_a_long_path =
            self.config.queue_target.as_secs_f64().max(base * self.config.queue_target_share);
        if self.config.gauges.nobody_waits() {
            return on_a_long_path;
        }
        (base / 10.0).clamp(self.config.queue_target_floor.as_secs_f64(), on_a_long_path)
    }

    fn set_window(&mut self, bytes: f64) {
        let floor = (4 * self.mtu) as f64;
        self.window = bytes.clamp(floor, (self.config.max_window_bytes as f64).max(floor));
    }

    pub(super) fn sent(&mut self, bytes: u64) {
        self.in_flight += bytes;
        self.round.most_in_flight = self.round.most_in_flight.max(self.in_flight);
    }

    /// When the acknowledgement came that is `stamped` so. quinn looks at the clock before it receives, and a process
    /// that is not run in between gives what comes meanwhile a time that is too early. Round trips shorter than the
    /// path's make all others look like a queue, and on a path of 1 ms the window fell to nothing. Too late by
    /// the same is no harm: of late samples none counts by itself.
    fn ack_came(&mut self, stamped: Instant) -> Instant {
        *self.ack_came.get_or_insert_with(|| stamped.max(Instant::now()))
    }

    pub(super) fn acked(&mut self, now: Instant, sent: Instant, bytes: u64) {
        let rtt = now.saturating_duration_since(sent);
        if self.base.is_none_or(|base| rtt < base) {
            self.base = Some(rtt);
            self.base_seen = now;
        } else if let Some(base) = self.base {
            let base_s = base.as_secs_f64();
            if (rtt - base).as_secs_f64() < self.target(base_s) / 8.0 {
                self.base_seen = now;
            }
        }
        self.round.min_rtt = Some(self.round.min_rtt.map_or(rtt, |min| min.min(rtt)));
        self.round.rtt_sum_s += rtt.as_secs_f64();
        self.round.samples += 1;
        self.round.acked_bytes += bytes;
        if self.phase == Phase::Start {
            self.trains.acked(now, sent, bytes);
            if self.was_in_flight(&self.round, USED_IN_START) {
                self.set_window(self.window + bytes as f64);
            }
            self.end_start_when_full(now);
        }
        self.judge_sample(now, sent, rtt);
        if sent >= self.round.started && now - self.round.started >= MIN_ROUND {
            self.end_round(now);
        }
    }

    /// Goes on by small steps from the window that fills the path, as far as bursts have told.
    fn end_start_when_full(&mut self, now: Instant) {
        let (Some(base), Some(rate)) = (self.base, self.trains.bytes_per_s()) else { return };
        let full = rate * base.as_secs_f64();
        if self.window >= full {
            self.set_window(full);
            self.phase = Phase::Steady;
            self.late = None;
            self.settle(now);
        }
    }

    /// Follows a row of late samples, and acts when it has become long.
    fn judge_sample(&mut self, now: Instant, sent: Instant, rtt: Duration) {
        let Some(base) = self.base.map(|base| base.as_secs_f64()) else { return };
        let target = self.target(base);
        let (limit, share) = match self.phase {
            Phase::Start => (target / 2.0, LATE_IN_START),
            Phase::Steady if self.settling == 0 => (3.0 * target, LATE_IN_STEADY),
            _ => {
                self.late = None;
                return;
            }
        };
        if rtt.as_secs_f64() - base <= limit {
            self.late = None;
            return;
        }
        let late = self.late.get_or_insert(Late {
            since: now,
            sent_since: sent,
            samples: 0,
            min_rtt: rtt,
        });
        late.samples += 1;
        late.min_rtt = late.min_rtt.min(rtt);
        let Late { since, sent_since, samples, min_rtt } = *late;
        let mut row_s = base.max(MIN_ROUND.as_secs_f64()) * share;
        if self.phase == Phase::Steady {
            row_s = row_s.max(HOSTS_ARE_LATE.max(self.patience.at(now)).as_secs_f64());
        }
        let lasted = (now - since).min(sent.saturating_duration_since(sent_since));
        if samples < LATE_SAMPLES || lasted.as_secs_f64() < row_s {
            return;
        }
        self.late = None;
        if self.phase == Phase::Start {
            let queue = min_rtt.as_secs_f64() - base;
            // These packets left when the window was half of what it is now.
            self.set_window(self.window / 2.0 * (base + target) / (base + queue));
            self.phase = Phase::Steady;
            self.settle(now);
        } else if sent >= self.round.started || self.cut.is_none() {
            // Packets of this round only: what earlier ones saw has been answered already.
            self.too_long_since.get_or_insert(since);
            self.previous_min_rtt = None;
            self.round.min_rtt = Some(min_rtt);
            self.end_round(now);
        }
    }

    /// Whether so much of the window was in flight at some time, with the next packet, which did not fit.
    fn was_in_flight(&self, round: &Round, share: f64) -> bool {
        (round.most_in_flight + self.mtu) as f64 >= share * self.window
    }

    /// Lets the packets pass that left under the old window.
    fn settle(&mut self, now: Instant) {
        self.settling = 1;
        self.calm = None;
        self.previous_min_rtt = None;
        self.round = Round::new(now);
    }

    /// The same when it was not for delay; the round goes on.
    fn settle_within_round(&mut self) {
        self.settling = 1;
        (self.calm, self.previous_min_rtt) = (None, None);
        (self.cut, self.too_long_since) = (None, None);
    }

    fn end_round(&mut self, now: Instant) {
        let round = std::mem::replace(&mut self.round, Round::new(now));
        self.round.most_in_flight = self.in_flight;
        let used = self.was_in_flight(&round, USED);
        let rate = self.measure_rate(&round, now, used);
        let (Some(base), Some(min_rtt)) = (self.base, round.min_rtt) else { return };
        if self.settling > 0 {
            self.settling -= 1;
            return;
        }
        let base_s = base.as_secs_f64();
        let calm = self.rounds_after_loss == 0
            && self.was_in_flight(&round, CALM_IN_FLIGHT)
            && (min_rtt - base).as_secs_f64() < self.target(base_s) / 4.0;
        let two_packets = 2.0 * self.mtu as f64 / round.seconds(now);
        self.calm = match self.calm {
            _ if !calm => None,
            None => Some(Calm::new(self.window, rate)),
            Some(before) => before.go_on(self.window, rate, two_packets),
        };
        let previous = self.previous_min_rtt.replace(min_rtt);
        let min_rtt = previous.map_or(min_rtt, |previous| previous.min(min_rtt));
        match self.phase {
            Phase::Start => {
                if self.loss_is_heavy(&round, false) {
                    self.cut_for_loss();
                }
            }
            Phase::Probe { resume_window } => self.end_probe(now, base, min_rtt, resume_window),
            Phase::Steady => {
                let queue = (min_rtt.saturating_sub(base)).as_secs_f64();
                if self.loss_is_heavy(&round, queue >= self.target(base.as_secs_f64()) / 2.0) {
                    self.cut_for_loss();
                } else if used && now - self.base_seen > BASE_RTT_LIFETIME {
                    self.begin_probe(now, base, queue);
                } else {
                    self.steer(now, &round, base, min_rtt, used, rate);
                }
            }
        }
    }

    /// Follows the rate, and gives that of the round.
    fn measure_rate(&mut self, round: &Round, now: Instant, used: bool) -> f64 {
        let sample = round.acked_bytes as f64 / round.seconds(now);
        self.config.gauges.set_full(used);
        // A round in which the application had little to say tells nothing about the link.
        self.rate_bytes_per_s = if used {
            self.rate_bytes_per_s * 0.75 + sample * 0.25
        } else {
            self.rate_bytes_per_s.max(sample)
        };
        sample
    }

    /// One step of the steady law. `delivered` is that of the round, in bytes per second.
    fn steer(
        &mut self,
        now: Instant,
        round: &Round,
        base: Duration,
        min_rtt: Duration,
        used: bool,
        delivered: f64,
    ) {
        let base_s = base.as_secs_f64();
        let queue = min_rtt.saturating_sub(base).as_secs_f64();
        let target = self.target(base_s);
        let rate = self.window / (base_s + queue);
        if queue <= 2.0 * target {
            let cut = self.cut.take();
            self.too_long_since = None;
            if let Some(cut) = cut
                && used
                && queue < target / 4.0
                && cut.was_for_nothing(self.window, delivered)
            {
                self.patience.grow(now);
                self.set_window(cut.window);
                return self.settle(now);
            }
            if queue <= target {
                self.declining_from = None;
            } else {
                let before = *self.declining_from.get_or_insert(rate);
                // On a path much shorter than the queue that may stand, the two are too near each other to tell.
                if target < base_s && queue * before > self.window {
                    return self.take_delay_for_the_path(now, min_rtt, before);
                }
            }
            let aim = self.window * (base_s + target) / (base_s + queue);
            let step = self.window + (aim - self.window) * GAIN;
            if step <= self.window {
                self.set_window(step);
            } else if used {
                self.set_window(self.grown(step));
            }
            return;
        }
        self.declining_from = None;
        let patience = self.patience.at(now);
        let lasts = now - *self.too_long_since.get_or_insert(round.started);
        let whole_window_s = self.window / self.rate_bytes_per_s.max(1.0);
        if (lasts < HOSTS_ARE_LATE || !used)
            && queue > NOT_OURS * (whole_window_s - base_s).max(0.0)
        {
            return;
        }
        if lasts < patience {
            return;
        }
        let mean_queue = round.rtt_sum_s / f64::from(round.samples.max(1)) - base_s;
        let next = Cut::new(rate, self.window, self.rate_bytes_per_s, queue, mean_queue);
        let cut = self.cut.map_or(next, |before| before.and_then(next));
        if cut.were_in_vain() {
            self.patience.grow(now);
            self.take_delay_for_the_path(now, min_rtt, cut.rate.max(rate));
        } else {
            let aim = self.window * (base_s + target) / (base_s + queue);
            self.set_window(aim.max(self.window * MAX_CUT));
            self.cut = Some(cut);
            self.settle(now);
        }
    }

    /// The delay is not of our making: it counts as none from here on, and the rate that there was before it was
    /// answered is taken up again.
    fn take_delay_for_the_path(&mut self, now: Instant, min_rtt: Duration, rate: f64) {
        self.adopt_base(now, min_rtt);
        let base_s = min_rtt.as_secs_f64();
        self.set_window(rate * (base_s + self.target(base_s)));
        (self.cut, self.declining_from, self.too_long_since) = (None, None, None);
        self.settle(now);
    }

    fn grown(&self, step: f64) -> f64 {
        if self.rounds_after_loss > 0 {
            step.min(self.window * GROWTH_AFTER_LOSS)
        } else if let Some(growth) = self.calm.and_then(Calm::growth) {
            (self.window * growth.min(MAX_GROWTH)).max(step.min(self.window * MAX_GROWTH))
        } else {
            step.min(self.window * MAX_GROWTH)
        }
    }

    fn begin_probe(&mut self, now: Instant, base: Duration, queue: f64) {
        self.phase = Phase::Probe { resume_window: self.window };
        let base_s = base.as_secs_f64();
        self.set_window(0.75 * self.window * base_s / (base_s + queue));
        self.settle(now);
    }

    fn end_probe(&mut self, now: Instant, base: Duration, min_rtt: Duration, resume: f64) {
        let before = base.as_secs_f64() + self.target(base.as_secs_f64());
        self.adopt_base(now, min_rtt);
        let after = min_rtt.as_secs_f64() + self.target(min_rtt.as_secs_f64());
        self.set_window(resume * (after / before).clamp(0.5, 2.0));
        self.phase = Phase::Steady;
        (self.cut, self.too_long_since) = (None, None);
        self.settle(now);
    }

    fn adopt_base(&mut self, now: Instant, rtt: Duration) {
        self.base = Some(rtt);
        self.base_seen = now;
    }

    /// More loss than chance gives at the tolerated share, by two standard deviations.
    fn loss_is_heavy(&mut self, round: &Round, queue_agrees: bool) -> bool {
        self.rounds_after_loss = self.rounds_after_loss.saturating_sub(1);
        let lost = round.lost_bytes as f64 / self.mtu as f64;
        let expected = (round.acked_bytes + round.lost_bytes) as f64 / self.mtu as f64
            * if queue_agrees { 0.02 } else { 0.06 };
        lost > expected + 2.0 * expected.sqrt() + 1.0
    }

    fn cut_for_loss(&mut self) {
        self.set_window(self.window * 0.8);
        self.phase = Phase::Steady;
        self.rounds_after_loss = ROUNDS_AFTER_LOSS;
        self.settle_within_round();
    }

    pub(super) fn lost(&mut self, now: Instant, persistent: bool, bytes: u64) {
        self.round.lost_bytes += bytes;
        self.in_flight = self.in_flight.saturating_sub(bytes);
        if persistent {
            // The path was gone; nothing that was known about it need be true now.
            let (config, mtu) = (self.config.clone(), self.mtu as u16);
            *self = DelayTarget::new(config, now, mtu);
        } else if bytes == 0 && self.settling == 0 {
            // An ECN mark: the network says "queue" before we could see it.
            self.set_window(self.window * 0.9);
            self.settle_within_round();
            if self.phase == Phase::Start {
                self.phase = Phase::Steady;
            }
        }
    }

    pub(super) fn acks_done(&mut self, in_flight: u64, app_limited: bool) {
        self.ack_came = None;
        self.in_flight = in_flight;
        self.publish();
        if app_limited {
            self.config.gauges.report_dry();
        }
    }

    fn publish(&self) {
        self.config.gauges.publish(
            self.window as u64,
            self.in_flight,
            self.rate_bytes_per_s as u64,
            self.base,
        );
    }
}

impl Controller for DelayTarget {
    fn on_sent(&mut self, _: Instant, bytes: u64, _: u64) {
        self.sent(bytes);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _: bool, _: &RttEstimator) {
        let came = self.ack_came(now);
        self.acked(came, sent, bytes);
    }

    fn on_end_acks(&mut self, _: Instant, in_flight: u64, app_limited: bool, _: Option<u64>) {
        self.acks_done(in_flight, app_limited);
    }

    fn on_congestion_event(&mut self, now: Instant, _: Instant, persistent: bool, lost: u64) {
        self.lost(now, persistent, lost);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = u64::from(new_mtu);
        // Else four of the old packets could be too few for one of the new.
        self.set_window(self.window);
    }

    fn window(&self) -> u64 {
        self.window as u64
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window as u64;
        metrics.pacing_rate = Some((self.rate_bytes_per_s * 8.0) as u64);
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.config.initial_window_packets * self.mtu
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_from_before_the_acknowledgement_came_does_not_shorten_the_path() {
        let round_trip = Duration::from_millis(2);
        let mut controller = DelayTarget::new(Arc::default(), Instant::now(), 1452);
        let sent = Instant::now();
        std::thread::sleep(round_trip);
        let came = controller.ack_came(sent + Duration::from_micros(300));
        assert!(came - sent >= round_trip, "{:?}", came - sent);
        assert_eq!(controller.ack_came(sent), came, "packets of one acknowledgement came together");
        controller.acks_done(0, false);
        assert!(controller.ack_came(sent) > came, "the next one has a time of its own");
    }
}
