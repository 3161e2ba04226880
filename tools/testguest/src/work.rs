//! The main loop: the work at its rate, verification, and heartbeats; and the work on pages.

use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::console::{self, say};
use crate::device_io::Activity;
use crate::memory::{BODY, COUNTER, Change, Fill, Filler, WORDS, WorkingSet};
use crate::params::Params;
use crate::random::Random;

/// What the guest does to its pages; each operation is on one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Nothing is written or read, but for verification.
    Idle,
    /// Four words at random places in a page at random.
    Sparse,
    /// The counter word, page after page in order.
    Counter,
    /// The first or the second half, with new text, of a page at random.
    Half,
    /// All of a page at random, with random bytes.
    Random,
    /// As `Sparse`, but nine of ten operations go to the first tenth of the pages.
    HotCold,
    /// Nothing is written; page after page is verified in order.
    ReadSeq,
    /// Nothing is written; pages at random are verified.
    ReadRand,
    /// As `Half`, while frames made of the pages are streamed; see [`crate::stream`].
    Stream,
    /// Not on pages: a redis server with a mixed load; see [`crate::redis`].
    Redis,
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Ok(match name {
            "idle" => Pattern::Idle,
            "sparse" => Pattern::Sparse,
            "counter" => Pattern::Counter,
            "half" => Pattern::Half,
            "random" => Pattern::Random,
            "hotcold" => Pattern::HotCold,
            "readseq" => Pattern::ReadSeq,
            "readrand" => Pattern::ReadRand,
            "stream" => Pattern::Stream,
            "redis" => Pattern::Redis,
            _ => return Err(format!("ff.pattern={name} is not a pattern")),
        })
    }
}

/// Work that could not be done in time is forgotten beyond this: a guest that was stopped goes on at
/// its rate, it does not catch up.
const MAX_DEBT: Duration = Duration::from_millis(20);
/// Pages handled between two looks at the clock: a heartbeat must not wait for long.
const BATCH_PAGES: u64 = 16;
/// CORRUPT lines at most; the count goes on in the heartbeats.
const MAX_CORRUPT_LINES: u64 = 100;
const IO_REPORT_EVERY: Duration = Duration::from_millis(100);
/// Waking up is dear under emulation: what is due sooner waits, and is done together.
const SHORTEST_SLEEP: Duration = Duration::from_millis(1);
/// An operation that takes so long has waited for its page: the work itself takes microseconds.
const SLOW_TOUCH: Duration = Duration::from_micros(500);

/// Page operations that are due by now.
struct Pace {
    per_second: u64,
    since: Instant,
    /// Nanoseconds not yet turned into pages, times the rate.
    credit: u128,
}

impl Pace {
    fn new(per_second: u64) -> Self {
        Pace { per_second, since: Instant::now(), credit: 0 }
    }

    fn due(&mut self, now: Instant) -> u64 {
        if self.per_second == 0 {
            return BATCH_PAGES;
        }
        let second = 1_000_000_000;
        self.credit += (now - self.since).as_nanos() * u128::from(self.per_second);
        self.since = now;
        let debt = (MAX_DEBT.as_nanos() * u128::from(self.per_second)).max(second);
        self.credit = self.credit.min(debt);
        let pages = (self.credit / second).min(u128::from(BATCH_PAGES));
        self.credit -= pages * second;
        pages as u64
    }

    /// How long until something is due, after [`Self::due`] found nothing.
    fn pause(&self) -> Duration {
        if self.per_second == 0 {
            return Duration::ZERO;
        }
        let missing = 1_000_000_000_u128.saturating_sub(self.credit);
        Duration::from_nanos(
            u64::try_from(missing / u128::from(self.per_second)).unwrap_or(u64::MAX),
        )
    }
}

/// What the guest works on: things that it writes to in some pattern, and can verify one by one.
pub(crate) trait Work {
    /// Does `count` operations of the pattern.
    ///
    /// # Errors
    /// When the guest cannot go on. A wrong content is counted, not returned.
    fn operate(&mut self, count: u64) -> Result<(), String>;
    /// Verifies the next `count` things, from the first again after the last.
    ///
    /// # Errors
    /// As of [`Self::operate`].
    fn verify_next(&mut self, count: u64) -> Result<(), String>;
    /// Makes the first thing the next to be verified.
    fn verify_anew(&mut self);
    /// What is due at a moment whatever the rate of the operations is; called again after the time that it
    /// returns, or sooner.
    fn keep_up(&mut self, _now: Instant) -> Duration {
        Duration::MAX
    }
    /// What was done so far.
    fn progress(&self) -> &Progress;
}

/// Counts of operations, of verifications, and of errors, which it also says.
pub(crate) struct Progress {
    what: &'static str,
    things: usize,
    pub(crate) operations: u64,
    verified: usize,
    sweeps: u64,
    pub(crate) errors: u64,
    errors_before_sweep: u64,
}

impl Progress {
    /// Of work on so many `what`, named in plain English as one of them: page, key.
    pub(crate) fn new(what: &'static str, things: usize) -> Self {
        Progress {
            what,
            things,
            operations: 0,
            verified: 0,
            sweeps: 0,
            errors: 0,
            errors_before_sweep: 0,
        }
    }

    /// Which is to be verified next.
    pub(crate) fn next_to_verify(&self) -> usize {
        self.verified
    }

    /// Makes the first the next.
    pub(crate) fn verify_anew(&mut self) {
        self.verified = 0;
        self.errors_before_sweep = self.errors;
    }

    /// That one was verified.
    pub(crate) fn verified(&mut self) {
        self.verified += 1;
        if self.verified == self.things {
            self.verified = 0;
            self.sweeps += 1;
            let Progress { what, things, sweeps, .. } = self;
            let new = self.errors - self.errors_before_sweep;
            self.errors_before_sweep = self.errors;
            if new == 0 {
                say!("sweep {sweeps} {what}s {things} ok");
            } else {
                say!("sweep {sweeps} {what}s {things} errors {new}");
            }
        }
    }

    /// Takes note of what was found of the thing `index`.
    pub(crate) fn found(&mut self, index: usize, result: Result<(), String>) {
        if let Err(wrong) = result {
            self.errors += 1;
            if self.errors <= MAX_CORRUPT_LINES {
                say!("CORRUPT {} {index}: {wrong}", self.what);
            }
        }
    }
}

pub(crate) fn run(
    params: &Params,
    mut work: impl Work,
    activity: Option<&Activity>,
) -> Result<(), String> {
    let start = Instant::now();
    let idle = params.pattern == Pattern::Idle;
    let (mut pace, mut verify_pace) = (Pace::new(params.rate), Pace::new(params.verify_rate));
    let (mut next_heartbeat, mut next_io) = (start, start);
    loop {
        let now = Instant::now();
        if now >= next_heartbeat {
            let ms = (now - start).as_millis();
            let Progress { operations, sweeps, errors, .. } = work.progress();
            say!("hb {ms} {operations} {sweeps} {errors}");
            next_heartbeat = now.max(next_heartbeat + params.heartbeat);
            match console::heard() {
                Some(b'v') => {
                    verify_pace = Pace::new(0);
                    work.verify_anew();
                    say!("verifying");
                }
                Some(b'n') => verify_pace = Pace::new(params.verify_rate),
                _ => {}
            }
        }
        if let Some(activity) = activity.filter(|_| now >= next_io) {
            say!("io {activity}");
            next_io = now + IO_REPORT_EVERY;
        }
        let mut pause = work.keep_up(now);
        let due = if idle { 0 } else { pace.due(now) };
        let verify_due = verify_pace.due(now);
        if due > 0 {
            work.operate(due)?;
        }
        if verify_due > 0 {
            work.verify_next(verify_due)?;
        }
        if due + verify_due == 0 {
            pause = pause.min(verify_pace.pause());
            if !idle {
                pause = pause.min(pace.pause());
            }
            if !pause.is_zero() {
                let until = next_heartbeat.saturating_duration_since(now);
                std::thread::sleep(pause.max(SHORTEST_SLEEP).min(until));
            }
        }
    }
}

/// The patterns on pages of the working set.
pub(crate) struct PageWork {
    pattern: Pattern,
    set: WorkingSet,
    random: Random,
    text: Filler,
    /// Where the patterns that go in order are.
    position: usize,
    progress: Progress,
}

impl Work for PageWork {
    fn operate(&mut self, count: u64) -> Result<(), String> {
        timed(count, || self.operate_once());
        Ok(())
    }

    fn verify_next(&mut self, count: u64) -> Result<(), String> {
        timed(count, || {
            self.verify(self.progress.next_to_verify());
            self.progress.verified();
        });
        Ok(())
    }

    fn verify_anew(&mut self) {
        self.progress.verify_anew();
    }

    fn progress(&self) -> &Progress {
        &self.progress
    }
}

/// Touches pages so many times, and tells those touches that took long.
pub(crate) fn timed(count: u64, mut touch: impl FnMut()) {
    let mut begin = Instant::now();
    for _ in 0..count {
        touch();
        let end = Instant::now();
        if end - begin >= SLOW_TOUCH {
            say!("slow {}", (end - begin).as_micros());
        }
        begin = end;
    }
}

impl PageWork {
    pub(crate) fn new(params: &Params, set: WorkingSet) -> Self {
        PageWork {
            pattern: params.pattern,
            progress: Progress::new("page", set.len()),
            set,
            random: Random::new(params.seed ^ 0xffff_0000),
            text: Filler::new(Fill::Text, params.seed ^ 0xffff),
            position: 0,
        }
    }

    pub(crate) fn set(&self) -> &WorkingSet {
        &self.set
    }

    fn operate_once(&mut self) {
        self.progress.operations += 1;
        let pages = self.set.len();
        let in_order = self.position;
        self.position = (self.position + 1) % pages;
        let at_random = self.random.below(pages as u64) as usize;
        let random = &mut self.random;
        match self.pattern {
            // redis is another work.
            Pattern::Idle | Pattern::Redis => {}
            Pattern::Sparse => self.set.write(at_random, |page| sparse(page, random)),
            Pattern::HotCold => {
                let tenth = (pages / 10).max(1) as u64;
                let hot = random.below(10) < 9;
                let index = if hot { random.below(tenth) as usize } else { at_random };
                self.set.write(index, |page| sparse(page, random));
            }
            Pattern::Counter => {
                self.set.write(in_order, |page| page.set(COUNTER, page.get(COUNTER) + 1));
            }
            Pattern::Half | Pattern::Stream => {
                let middle = WORDS / 2;
                let range = if random.below(2) == 0 { BODY..middle } else { middle..WORDS };
                let mut words = [0; WORDS / 2];
                let words = &mut words[..range.len()];
                self.text.fill(words);
                let change = |page: &mut Change<'_>| {
                    range.zip(words.iter()).for_each(|(at, word)| page.set(at, *word));
                };
                self.set.write(at_random, change);
            }
            Pattern::Random => self.set.write(at_random, |page| {
                (BODY..WORDS).for_each(|at| page.set(at, random.next()));
            }),
            Pattern::ReadSeq => self.verify(in_order),
            Pattern::ReadRand => self.verify(at_random),
        }
    }

    fn verify(&mut self, index: usize) {
        self.progress.found(index, self.set.verify(index));
    }
}

fn sparse(page: &mut Change<'_>, random: &mut Random) {
    for _ in 0..4 {
        let at = BODY + random.below((WORDS - BODY) as u64) as usize;
        page.set(at, random.next());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_leaves_pages_that_verify() {
        for name in [
            "idle", "sparse", "counter", "half", "random", "hotcold", "readseq", "readrand",
            "stream",
        ] {
            let params =
                Params::parse(&format!("ff.ws=64K ff.pattern={name} ff.fill=text")).unwrap();
            let set = WorkingSet::filled(params.pages(), params.fill, params.seed).unwrap();
            let mut work = PageWork::new(&params, set);
            work.operate(200).unwrap();
            for index in 0..work.set.len() {
                assert_eq!(work.set.verify(index), Ok(()), "{name}");
            }
            assert_eq!(work.progress.errors, 0, "{name}");
        }
    }

    #[test]
    fn a_pace_gives_its_rate_and_forgets_long_pauses() {
        let mut pace = Pace::new(2000);
        let start = pace.since;
        let pages: u64 = (1..=1000).map(|ms| pace.due(start + Duration::from_millis(ms))).sum();
        assert_eq!(pages, 2000);
        let after_pause = start + Duration::from_secs(100);
        let caught_up: u64 = (0..100).map(|_| pace.due(after_pause)).sum();
        assert_eq!(caught_up, 40);
    }

    #[test]
    fn a_pace_knows_when_the_next_page_is_due() {
        let mut pace = Pace::new(2000);
        let start = pace.since;
        assert_eq!(pace.due(start + Duration::from_micros(200)), 0);
        assert_eq!(pace.pause(), Duration::from_micros(300));
        assert_eq!(pace.due(start + Duration::from_micros(500)), 1);
        assert_eq!(Pace::new(0).pause(), Duration::ZERO);
    }
}
