//! Replays what a guest touches after a switchover against a policy of the pusher and a link, and tells how
//! long its threads wait: a migration's second half in milliseconds, and the same for every policy.
//!
//! [`Touches`] says which pages each thread touches for the first time and how long it works in between;
//! it comes from a trace of a real guest ([`from_trace`]) or from [`workload`]. [`Simulation`] is the rest: faults travel
//! to the source, replies precede bundles and these bulk, the link serialises, and what arrives wakes who
//! waits for it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::Duration;

use crate::engine::heat::Heat;
use crate::engine::pusher::{BundleBudget, Pusher, PusherKind, Wanted};
use crate::page::{PageIndex, PageSet};

mod traced;
pub mod workload;

pub use traced::{TraceError, from_trace};

/// The standing queue that the congestion controller keeps.
const QUEUE: Duration = Duration::from_millis(4);
/// What the sender queues of bulk beyond a round trip: a quarter of one and this.
const SENDER_QUEUE_BYTES: u64 = 64 << 10;
/// Pages of a push message, and of one of a bundle.
const PUSH_PAGES: usize = 64;
const BUNDLE_PAGES: usize = 16;

/// A page that a thread touches for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// How long the thread has worked since its touch before.
    pub after: Duration,
    /// The page.
    pub page: PageIndex,
}

/// What a guest does after the switchover.
#[derive(Clone, Debug)]
pub struct Touches {
    /// Pages of the guest.
    pub pages: u64,
    /// Pages that the destination lacks.
    pub need: PageSet,
    /// What it wrote to before the switchover.
    pub heat: Heat,
    /// Of each thread, in order.
    pub threads: Vec<Vec<Touch>>,
}

/// The link, and what pages take on it.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Bytes a second.
    pub rate_bytes_per_s: u64,
    /// Without queues.
    pub round_trip: Duration,
    /// Encoded size of a page.
    pub page_bytes: u32,
}

/// What came out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Touches of pages that were not there.
    pub waits: u64,
    /// Of these, as long as a round trip or longer.
    pub long_waits: u64,
    /// Added up over the threads.
    pub waited: Duration,
    /// The longest.
    pub longest: Duration,
    /// When the last page arrived.
    pub last_page: Duration,
    /// When the last thread had touched its last page.
    pub finished: Duration,
    /// From when on the guest's threads, taken together, work at nine tenths of their undisturbed pace until
    /// they end.
    pub recovered: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// What was sent has arrived.
    Arrives(usize),
    /// The link takes the next message.
    LinkFree,
    /// A request has come to the source.
    Asked { page: PageIndex, thread: u32 },
    /// A thread touches its next page.
    Touches(usize),
}

#[derive(Debug)]
struct Message {
    pages: Vec<PageIndex>,
}

/// One guest, one policy, one link.
pub struct Simulation<'a> {
    touches: &'a Touches,
    link: Link,
    pusher: Pusher,
    budget: BundleBudget,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    serial: u64,
    there: PageSet,
    waiting: HashMap<PageIndex, Vec<(usize, Duration)>>,
    next: Vec<usize>,
    replies: VecDeque<Message>,
    bundles: VecDeque<Message>,
    pushes: VecDeque<Message>,
    sent: Vec<Message>,
    link_busy: bool,
    /// Waits as they ended: when, and how long.
    stalls: Vec<(Duration, Duration)>,
    outcome: Outcome,
}

impl<'a> Simulation<'a> {
    /// All threads begin when the first page can be sent.
    pub fn new(touches: &'a Touches, link: Link, kind: PusherKind) -> Self {
        let mut there = PageSet::full(touches.pages);
        there.subtract(&touches.need);
        Simulation {
            pusher: Pusher::new(touches.need.clone(), touches.heat.clone(), kind),
            budget: BundleBudget::new(Duration::ZERO),
            events: BinaryHeap::new(),
            serial: 0,
            there,
            waiting: HashMap::new(),
            next: vec![0; touches.threads.len()],
            replies: VecDeque::new(),
            bundles: VecDeque::new(),
            pushes: VecDeque::new(),
            sent: Vec::new(),
            link_busy: false,
            stalls: Vec::new(),
            outcome: Outcome::default(),
            touches,
            link,
        }
    }

    /// Runs to the end.
    pub fn run(mut self) -> Outcome {
        for (thread, touches) in self.touches.threads.iter().enumerate() {
            if let Some(first) = touches.first() {
                self.at(first.after, Event::Touches(thread));
            }
        }
        self.send(Duration::ZERO);
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            match event {
                Event::Touches(thread) => self.touch(now, thread),
                Event::Asked { page, thread } => self.asked(now, page, thread),
                Event::LinkFree => {
                    self.link_busy = false;
                    self.send(now);
                }
                Event::Arrives(message) => self.arrive(now, message),
            }
        }
        self.outcome.recovered = self.recovered();
        self.outcome
    }

    fn at(&mut self, when: Duration, event: Event) {
        self.serial += 1;
        self.events.push(Reverse((when, self.serial, event)));
    }

    fn touch(&mut self, now: Duration, thread: usize) {
        let page = self.touches.threads[thread][self.next[thread]].page;
        if self.there.contains(page) {
            return self.go_on(now, thread);
        }
        let first = !self.waiting.contains_key(&page);
        self.waiting.entry(page).or_default().push((thread, now));
        if first {
            let wanted = Event::Asked { page, thread: thread as u32 + 1 };
            self.at(now + self.link.round_trip / 2, wanted);
        }
    }

    fn go_on(&mut self, now: Duration, thread: usize) {
        self.next[thread] += 1;
        match self.touches.threads[thread].get(self.next[thread]) {
            Some(touch) => self.at(now + touch.after, Event::Touches(thread)),
            None => self.outcome.finished = self.outcome.finished.max(now),
        }
    }

    fn asked(&mut self, now: Duration, page: PageIndex, thread: u32) {
        let Link { rate_bytes_per_s, round_trip, page_bytes } = self.link;
        let room = self.budget.room(now, rate_bytes_per_s, round_trip) / u64::from(page_bytes);
        let mut bundle = Vec::new();
        let wanted = Wanted { page, thread };
        if self.pusher.request(wanted, room as usize, &|_| page_bytes, &mut bundle) {
            self.budget.spend(bundle.len() as u64 * u64::from(page_bytes));
            self.replies.push_back(Message { pages: vec![page] });
            let messages = bundle.chunks(BUNDLE_PAGES);
            self.bundles.extend(messages.map(|pages| Message { pages: pages.to_vec() }));
        }
        self.send(now);
    }

    /// Puts the next message on the link when it is free.
    fn send(&mut self, now: Duration) {
        let Link { rate_bytes_per_s, round_trip, page_bytes } = self.link;
        let in_round_trip = (rate_bytes_per_s as f64 * round_trip.as_secs_f64()) as u64;
        let ahead = in_round_trip / 4 + SENDER_QUEUE_BYTES;
        // Decided as late as the transport asks for it.
        while self.pushes.len() as u64 * PUSH_PAGES as u64 * u64::from(page_bytes) < ahead {
            let mut pages = Vec::new();
            self.pusher.take(PUSH_PAGES, &|_| page_bytes, &mut pages);
            if pages.is_empty() {
                break;
            }
            self.pushes.push_back(Message { pages });
        }
        if self.link_busy {
            return;
        }
        let queues = [&mut self.replies, &mut self.bundles, &mut self.pushes];
        let Some(message) = queues.into_iter().find_map(VecDeque::pop_front) else { return };
        let bytes = message.pages.len() as f64 * f64::from(page_bytes);
        let done = now + Duration::from_secs_f64(bytes / rate_bytes_per_s as f64);
        self.link_busy = true;
        self.sent.push(message);
        self.at(done, Event::LinkFree);
        self.at(done + QUEUE + round_trip / 2, Event::Arrives(self.sent.len() - 1));
    }

    fn arrive(&mut self, now: Duration, message: usize) {
        let pages = std::mem::take(&mut self.sent[message].pages);
        self.outcome.last_page = now;
        for page in pages {
            self.there.insert(page);
            for (thread, since) in self.waiting.remove(&page).into_iter().flatten() {
                let waited = now - since;
                self.outcome.waits += 1;
                self.outcome.long_waits += u64::from(waited >= self.link.round_trip);
                self.outcome.waited += waited;
                self.outcome.longest = self.outcome.longest.max(waited);
                self.stalls.push((now, waited));
                self.go_on(now, thread);
            }
        }
    }

    /// The begin of the last stretch in which threads waited for less than a tenth of the time, seen in
    /// steps of half a second as the comparisons of whole migrations do.
    fn recovered(&self) -> Duration {
        const STEP_MS: u128 = 500;
        let steps = (self.outcome.finished.as_millis() / STEP_MS) as usize + 1;
        let mut waited = vec![Duration::ZERO; steps];
        for (end, long) in &self.stalls {
            // A wait over several steps counts in each by its part.
            let (mut until, mut left) = (*end, *long);
            while !left.is_zero() {
                let step = ((until.as_nanos().saturating_sub(1)) / (STEP_MS * 1_000_000)) as usize;
                let begin = Duration::from_millis(step as u64 * STEP_MS as u64);
                let part = left.min(until - begin);
                waited[step.min(steps - 1)] += part;
                (until, left) = (until - part, left - part);
            }
        }
        let all = Duration::from_millis(STEP_MS as u64) * self.touches.threads.len().max(1) as u32;
        let slow = waited.iter().rposition(|waited| *waited * 10 > all);
        Duration::from_millis(slow.map_or(0, |step| (step as u64 + 1) * STEP_MS as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link {
        rate_bytes_per_s: 12_500_000,
        round_trip: Duration::from_millis(40),
        page_bytes: 1800,
    };

    fn outcome(workload: &str, kind: PusherKind) -> Outcome {
        let touches = workload::named(workload, 65_536).expect("a workload of that name");
        Simulation::new(&touches, LINK, kind).run()
    }

    #[test]
    fn a_lone_fault_takes_the_round_trip_the_queue_and_its_own_bytes() {
        let mut need = PageSet::empty(1000);
        need.insert(PageIndex(5));
        let touch = Touch { after: Duration::from_millis(1), page: PageIndex(5) };
        let touches =
            Touches { pages: 1000, need, heat: Heat::new(1000), threads: vec![vec![touch]] };
        // Nothing to push: the pusher has sent it at the begin, when the thread had not asked yet.
        let outcome = Simulation::new(&touches, LINK, PusherKind::Linear).run();
        assert_eq!(outcome.waits, 1);
        let waited = outcome.longest.as_secs_f64() * 1e3;
        assert!((23.0..24.0).contains(&waited), "{waited} ms: it was on its way");
    }

    #[test]
    fn every_page_arrives_under_every_policy_and_no_wait_is_lost() {
        for kind in PusherKind::ALL {
            for name in workload::NAMES {
                let touches = workload::named(name, 4096).unwrap();
                let all: usize = touches.threads.iter().map(Vec::len).sum();
                let outcome = Simulation::new(&touches, LINK, kind).run();
                assert!(outcome.waits <= all as u64, "{name} {kind}: {outcome:?}");
                let least = Duration::from_secs_f64(4096.0 * 1800.0 / 12.5e6);
                assert!(outcome.last_page >= least, "{name} {kind}: {outcome:?}");
                assert!(outcome.longest >= LINK.round_trip / 2, "{name} {kind}: {outcome:?}");
            }
        }
    }

    #[test]
    fn a_sequential_reader_waits_a_round_trip_for_at_most_a_fiftieth_of_its_pages() {
        let outcome = outcome("sequential", PusherKind::Stall);
        assert!(outcome.long_waits * 50 <= 65_536, "{outcome:?}");
    }

    #[test]
    fn the_default_makes_a_guest_of_hot_and_cold_pages_wait_less_than_the_order_of_addresses() {
        let [stall, linear] =
            [PusherKind::Stall, PusherKind::Linear].map(|kind| outcome("hotcold", kind));
        assert!(stall.waited < linear.waited, "{stall:?} {linear:?}");
    }
}
