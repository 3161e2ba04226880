//! How much a worker may do now. The host paces, so the guest needs no clock that would have to
//! survive the move.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::worker::Gauge;
use super::{Pattern, Rate, Workload};

/// Largest number of steps that a worker is given at once.
pub(crate) const TASK_LIMIT: u32 = 1 << 16;

const TASK_SHORT: Duration = Duration::from_millis(2);
const TASK_LONG: Duration = Duration::from_millis(8);
/// Unused operations are saved up for so long at most; beyond, they are lost.
const SAVED_UP: Duration = Duration::from_millis(50);
const SLEEP: Duration = Duration::from_millis(100);

/// What a worker is to do before it asks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// So many operations of the workload.
    Work(u32),
    /// Check so many pages.
    Verify(u32),
}

/// Hands out the tasks of one worker. Used by the thread that runs that worker.
pub(crate) struct Pacer {
    pattern: Pattern,
    ops_per_second: Option<f64>,
    gauge: Arc<Gauge>,
    saved_up_ops: f64,
    counted_at: Instant,
    batches: [u32; 2],
    given: Option<(Task, Instant)>,
}

impl Pacer {
    pub(crate) fn new(workload: Workload, workers: NonZeroU32, gauge: Arc<Gauge>) -> Self {
        let ops_per_second = match workload.rate {
            Rate::FlatOut => None,
            Rate::PerSecond(rate) => Some(f64::from(rate.get()) / f64::from(workers.get())),
        };
        Pacer {
            pattern: workload.pattern,
            ops_per_second,
            gauge,
            saved_up_ops: 0.0,
            counted_at: Instant::now(),
            batches: [16; 2],
            given: None,
        }
    }

    /// The worker has done its task and asks for the next. Blocks while there is none; `None` as soon
    /// as `stop` is set (the one who sets it unparks this thread).
    pub(crate) fn next(&mut self, stop: &AtomicBool) -> Option<Task> {
        // A task may have been broken off then, and what was not verified stays to be verified.
        if !stop.load(Acquire) {
            self.finish();
        }
        loop {
            if stop.load(Acquire) {
                return None;
            }
            let task = self.verify_task().or_else(|| self.work_task());
            if let Some(task) = task {
                self.given = Some((task, Instant::now()));
                return Some(task);
            }
            thread::park_timeout(self.until_next_op());
        }
    }

    /// Sizes the next batch so that a task takes some milliseconds: long enough that asking costs
    /// nothing, short enough that rates and reports stay fresh. A machine may be a thousand times
    /// slower than another.
    fn finish(&mut self) {
        let Some((task, since)) = self.given.take() else { return };
        let (batch, done) = match task {
            Task::Work(done) => (&mut self.batches[0], done),
            Task::Verify(done) => {
                self.gauge.verify_left.fetch_sub(u64::from(done), Relaxed);
                (&mut self.batches[1], done)
            }
        };
        let took = since.elapsed();
        if took > TASK_LONG {
            *batch = (*batch / 2).max(1);
        } else if took < TASK_SHORT && done == *batch {
            *batch = (*batch * 2).min(TASK_LIMIT);
        }
    }

    fn verify_task(&self) -> Option<Task> {
        let left = self.gauge.verify_left.load(Relaxed);
        (left > 0).then(|| Task::Verify(left.min(u64::from(self.batches[1])) as u32))
    }

    fn work_task(&mut self) -> Option<Task> {
        if self.pattern == Pattern::Idle {
            return None;
        }
        let Some(rate) = self.ops_per_second else { return Some(Task::Work(self.batches[0])) };
        let now = Instant::now();
        let earned = rate * (now - self.counted_at).as_secs_f64();
        self.counted_at = now;
        let most = (rate * SAVED_UP.as_secs_f64()).max(1.0);
        self.saved_up_ops = (self.saved_up_ops + earned).min(most);
        let ops = (self.saved_up_ops as u32).min(self.batches[0]);
        self.saved_up_ops -= f64::from(ops);
        (ops > 0).then_some(Task::Work(ops))
    }

    fn until_next_op(&self) -> Duration {
        match self.ops_per_second {
            Some(rate) if self.pattern != Pattern::Idle => {
                // Waking for every single operation of a fast rate would cost more than the work.
                let missing = Duration::from_secs_f64((1.0 - self.saved_up_ops).max(0.0) / rate);
                missing.clamp(Duration::from_millis(1), SLEEP)
            }
            _ => SLEEP,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pacer(workload: &str) -> (Pacer, Arc<Gauge>) {
        let gauge = Arc::new(Gauge::default());
        (Pacer::new(workload.parse().unwrap(), NonZeroU32::MIN, gauge.clone()), gauge)
    }

    #[test]
    fn a_rate_is_kept() {
        let (mut pacer, _) = pacer("sparse:5000/s");
        let (mut ops, started) = (0, Instant::now());
        while started.elapsed() < Duration::from_millis(300) {
            match pacer.next(&AtomicBool::new(false)) {
                Some(Task::Work(n)) => ops += n,
                other => panic!("{other:?}"),
            }
        }
        let expected = 5000.0 * started.elapsed().as_secs_f64();
        assert!(f64::from(ops) <= expected + 1.0, "{ops} of {expected}");
        assert!(f64::from(ops) >= expected * 0.5, "{ops} of {expected}");
    }

    #[test]
    fn an_idle_guest_works_only_to_verify() {
        let (mut pacer, gauge) = pacer("idle");
        gauge.verify_left.store(20, Relaxed);
        let running = AtomicBool::new(false);
        assert_eq!(pacer.next(&running), Some(Task::Verify(16)));
        assert_eq!(pacer.next(&running), Some(Task::Verify(4)));
        // What it was given last it may not have done.
        let stopped = AtomicBool::new(true);
        assert_eq!(pacer.next(&stopped), None);
        assert_eq!(gauge.verify_left.load(Relaxed), 4);
    }

    #[test]
    fn a_sleeping_worker_is_stopped_at_once() {
        let (mut pacer, _) = pacer("idle");
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let sleeper = thread::spawn(move || pacer.next(&seen));
        stop.store(true, Relaxed);
        sleeper.thread().unpark();
        assert_eq!(sleeper.join().unwrap(), None);
    }
}
