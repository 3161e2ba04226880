//! Whole migrations without threads, clocks, sockets or bytes: both machines, a model of their sessions, of
//! the link and of a guest that works, all under one seed. See `docs/testing.md`.
//!
//! Everything that can happen next is listed, and the seed draws from it. `FARFAULT_SIMULATE=N` runs N
//! schedules instead of the usual number, `FARFAULT_SEED=S` begins with another seed; `just simulate` does
//! both, with optimisation. To see one schedule step by step: `FARFAULT_SIMULATE=1 FARFAULT_SEED=S`.

mod check;
mod destination;
mod exhaustive;
mod fences;
mod guest;
mod mutation;
mod network;
mod plan;
mod source;
mod takeover;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use mutation::Mutation;
use world::{Tally, World};

/// Schedules in an ordinary test run.
const SCHEDULES: u64 = 100_000;

/// Schedules within which each fault that is built in must be found.
const SCHEDULES_PER_MUTATION: u64 = 20_000;

/// So many broken invariants are enough.
const MAX_TOLD: usize = 10;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// Runs a schedule; the failed invariant, if one did.
fn simulate(seed: u64, mutation: Option<Mutation>, trace: bool) -> Result<Tally, String> {
    let run = AssertUnwindSafe(|| {
        let mut world = World::new(seed, mutation);
        world.traced = trace;
        world.run()
    });
    catch_unwind(run).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
    })
}

#[test]
fn no_schedule_breaks_an_invariant() {
    let (schedules, first) = (number("FARFAULT_SIMULATE"), number("FARFAULT_SEED").unwrap_or(0));
    let trace = schedules == Some(1);
    let last = first + schedules.unwrap_or(SCHEDULES);
    let (next, tally) = (AtomicU64::new(first), Mutex::new(Tally::default()));
    let broken = Mutex::new(BTreeMap::new());
    let begun = Instant::now();
    let hook = std::panic::take_hook();
    // They are told in the end, with their seeds.
    std::panic::set_hook(Box::new(|_| {}));
    let work = || {
        while broken.lock().unwrap().len() < MAX_TOLD {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= last {
                return;
            }
            match simulate(seed, None, trace) {
                Ok(one) => tally.lock().unwrap().add(&one),
                Err(invariant) => drop(broken.lock().unwrap().entry(invariant).or_insert(seed)),
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    std::panic::set_hook(hook);
    let (broken, tally) = (broken.into_inner().unwrap(), tally.into_inner().unwrap());
    assert!(broken.is_empty(), "broken invariants, each with a seed: {broken:#?}");
    let (seconds, schedules) = (begun.elapsed().as_secs_f64(), last - first);
    eprintln!(
        "{schedules} schedules, {} steps, {seconds:.1} s, {:.0} schedules a second",
        tally.steps,
        schedules as f64 / seconds
    );
    eprintln!(
        "taken over in post-copy with pages missing: the source {} times, the destination {}, of these \
         with half-written pages {}",
        tally.source_takeovers_in_postcopy,
        tally.destination_takeovers_in_postcopy,
        tally.of_these_with_torn_pages
    );
    // What matters most is not left to chance.
    if schedules >= SCHEDULES {
        let rarest = tally.source_takeovers_in_postcopy.min(tally.of_these_with_torn_pages);
        assert!(rarest >= schedules / 200, "takeovers in post-copy are too rare: {tally:?}");
    }
}

#[test]
fn every_fault_that_is_built_in_is_found() {
    let hook = std::panic::take_hook();
    // Thousands of expected panics need not be shown.
    std::panic::set_hook(Box::new(|_| {}));
    let found = Mutation::ALL.map(|mutation| {
        let broken = (0..SCHEDULES_PER_MUTATION)
            .find_map(|seed| Some((seed, simulate(seed, Some(mutation), false).err()?)));
        (mutation, broken)
    });
    std::panic::set_hook(hook);
    for (mutation, broken) in found {
        let (seed, broken) = broken.unwrap_or_else(|| panic!("{mutation:?} goes unnoticed"));
        eprintln!("{mutation:?}: seed {seed}: {broken}");
    }
}
