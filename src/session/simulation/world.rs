//! Both sides, the link between them and the guest, and one step of them at a time.

use std::time::Duration;

use super::destination::Destination;
use super::guest::Guest;
use super::mutation::Mutation;
use super::network::{Network, View};
use super::plan::Plan;
use super::source::Source;
use crate::engine::Failure;
use crate::engine::destination::{DestinationEvent, DestinationRecord};
use crate::engine::source::{SourceEvent, SourceRecord};
use crate::guest::Shape;
use crate::memory::MemoryLayout;
use crate::page::PageIndex;
use crate::wire::message::{DestinationStage, PROTOCOL, ToDestination, ToSource, Wanted};

/// A schedule that is longer than this does not end.
const MAX_STEPS: u32 = 5_000;

/// What can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    SourceEvent,
    DestinationEvent,
    SourceStep,
    DestinationStep,
    ToDestination,
    ToSource,
    Pages,
    Flight,
    Ask,
    Request,
    Round,
    Push,
    GuestAtSource,
    GuestAtDestination,
    MapInAdvance,
    Cut,
    SourceNotices,
    DestinationNotices,
    Reconnect,
    SourceLinks,
    DestinationLinks,
    SourceGivesUp,
    DestinationGivesUp,
    SourceCrashes,
    DestinationCrashes,
    SourceResumes,
    DestinationResumes,
    SourceCancels,
    DestinationCancels,
    Late,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) rng: fastrand::Rng,
    pub(super) plan: Plan,
    pub(super) planned: Plan,
    pub(super) mutation: Option<Mutation>,
    /// A side has stopped to look for the other.
    pub(super) gave_up: bool,
    pub(super) guest: Guest,
    pub(super) network: Network,
    pub(super) source: Source,
    pub(super) destination: Destination,
    now: Duration,
    ways: Vec<Way>,
    /// Each step and each event is printed.
    pub(super) traced: bool,
    steps: u32,
    pub(super) tally: Tally,
}

/// What has happened in a schedule, or in many.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) steps: u64,
    /// Another process has taken the source's place while the guest ran at the destination and lacked pages.
    pub(super) source_takeovers_in_postcopy: u64,
    /// The same at the destination;
    pub(super) destination_takeovers_in_postcopy: u64,
    /// and some pages were half written.
    pub(super) of_these_with_torn_pages: u64,
}

impl Tally {
    pub(super) fn add(&mut self, other: &Tally) {
        self.steps += other.steps;
        self.source_takeovers_in_postcopy += other.source_takeovers_in_postcopy;
        self.destination_takeovers_in_postcopy += other.destination_takeovers_in_postcopy;
        self.of_these_with_torn_pages += other.of_these_with_torn_pages;
    }
}

impl World {
    pub(super) fn new(seed: u64, mutation: Option<Mutation>) -> Self {
        let mut rng = fastrand::Rng::with_seed(spread(seed));
        let plan = Plan::draw(&mut rng);
        let guest = Guest::new(plan.pages, plan.operations, &mut rng);
        let mut world = World {
            source: Source::new(&plan, &guest),
            destination: Destination::new(plan.pages),
            planned: plan.clone(),
            plan,
            rng,
            mutation,
            gave_up: false,
            guest,
            network: Network::new(),
            now: Duration::ZERO,
            ways: Vec::new(),
            traced: false,
            steps: 0,
            tally: Tally::default(),
        };
        let shape = Shape {
            monitor: "simulated".to_owned(),
            memory: MemoryLayout::new(Vec::new()),
            properties: Default::default(),
        };
        let strategy = world.plan.strategy;
        let shape = Box::new(shape);
        let hello = ToDestination::Hello { protocol: PROTOCOL, shape, strategy, runs: true };
        world.tell_source(SourceEvent::Connected(Box::new(hello)));
        world
    }

    /// Goes on until nothing moves any more.
    pub(super) fn run(&mut self) -> Tally {
        while let Some(way) = self.next_way() {
            self.steps += 1;
            if self.traced {
                eprintln!("{:4} {way:?}", self.steps);
            }
            self.go(way);
            self.check();
            assert!(self.steps < MAX_STEPS, "no end after {MAX_STEPS} steps");
        }
        self.check_end();
        Tally { steps: self.steps.into(), ..self.tally }
    }

    fn next_way(&mut self) -> Option<Way> {
        let mut ways = std::mem::take(&mut self.ways);
        ways.clear();
        self.list_work(&mut ways);
        let is_bulk = |way: &Way| matches!(way, Way::Push | Way::Pages);
        let slow = self.plan.crashes_late && !self.destination.ran;
        if slow && !ways.iter().all(is_bulk) {
            ways.retain(|way| !is_bulk(way));
        }
        if ways.is_empty() {
            self.list_last_resorts(&mut ways);
        } else {
            self.list_accidents(&mut ways);
        }
        if ways.is_empty() {
            // Only the guest still works, if at all.
            self.list_guest(&mut ways);
            ways.retain(|_| self.guest.left > 0);
        } else {
            self.list_guest(&mut ways);
        }
        let way = (!ways.is_empty()).then(|| ways[self.rng.usize(0..ways.len())]);
        self.ways = ways;
        way
    }

    /// What both sides have to do and need not wait for.
    fn list_work(&self, ways: &mut Vec<Way>) {
        let (source, destination, network) = (&self.source, &self.destination, &self.network);
        let mut add = |way, can: bool| ways.extend(can.then_some(way));
        if !source.is_over() {
            let hears = network.at_source == View::Up;
            add(Way::SourceEvent, !source.events.is_empty());
            add(Way::SourceStep, !source.steps.is_empty());
            add(Way::ToSource, hears && !network.to_source.is_empty());
            add(Way::Request, hears && source.answers && !network.requests.is_empty());
            add(Way::Round, source.round.is_some());
            add(Way::Push, source.pushing);
            add(Way::SourceNotices, hears && !network.carries);
            add(Way::SourceLinks, network.at_source == View::Coming);
        }
        if !destination.is_over() {
            let hears = network.at_destination == View::Up;
            let flight = network.flight.is_some() && destination.awaits_flight.is_some();
            add(Way::DestinationEvent, !destination.events.is_empty());
            add(Way::DestinationStep, destination.steps_that_get_on().next().is_some());
            add(Way::ToDestination, hears && !network.to_destination.is_empty());
            add(Way::Pages, hears && !network.pages.is_empty());
            add(Way::Flight, hears && flight);
            add(Way::Ask, hears && !destination.asked.is_empty());
            add(Way::DestinationNotices, hears && !network.carries);
            add(Way::DestinationLinks, network.at_destination == View::Coming);
        }
        add(Way::Reconnect, self.can_reconnect());
        add(Way::SourceResumes, self.source_can_resume());
        add(Way::DestinationResumes, self.destination_can_resume());
    }

    fn can_reconnect(&self) -> bool {
        let source = self.source.machine.as_ref().filter(|_| !self.source.is_over());
        let destination = self.destination.machine.as_ref();
        let destination = destination.filter(|_| !self.destination.is_over());
        !self.network.carries
            && self.network.at_source == View::Down
            && matches!(self.network.at_destination, View::Up | View::Down)
            && source.is_some_and(|machine| machine.wants_link())
            && destination.is_some_and(|machine| machine.wants_link())
    }

    /// What happens when nothing else does: a wait ends.
    fn list_last_resorts(&self, ways: &mut Vec<Way>) {
        let mut add = |way, can: bool| ways.extend(can.then_some(way));
        let deadline = self.source.machine.as_ref().and_then(|machine| machine.deadline());
        add(Way::Late, deadline.is_some() && !self.source.is_over());
        add(Way::SourceGivesUp, !self.source.is_over() && self.network.at_source == View::Down);
        let down = self.network.at_destination == View::Down;
        add(Way::DestinationGivesUp, !self.destination.is_over() && down);
    }

    fn list_accidents(&self, ways: &mut Vec<Way>) {
        // Seldom, so that something happens between them.
        if !self.steps.is_multiple_of(4) {
            return;
        }
        let (source, destination) = (!self.source.is_over(), !self.destination.is_over());
        let mut add = |way, can: bool| ways.extend(can.then_some(way));
        add(Way::Cut, self.plan.cuts > 0 && self.network.carries);
        // Most of a schedule goes by before the decision, and most of what can be lost is behind it.
        let matters = self.source.journal.has(SourceRecord::Decided)
            || self.destination.journal.has(DestinationRecord::Loaded);
        let weight = if matters { 8 } else { 1 };
        let lacks = self.destination.ran && !self.destination.lacking().is_empty();
        let may_crash = self.plan.crashes > 0 && (lacks || !self.plan.crashes_late);
        for _ in 0..weight {
            add(Way::SourceCrashes, may_crash && source);
            add(Way::DestinationCrashes, may_crash && destination);
        }
        add(Way::SourceCancels, self.plan.cancels > 0 && source);
        add(Way::DestinationCancels, self.plan.cancels > 0 && destination);
        add(Way::Late, self.plan.late_answers > 0 && source);
        let ends = self.plan.patience_ends;
        add(Way::SourceGivesUp, ends && source && self.network.at_source == View::Down);
        let down = self.network.at_destination == View::Down;
        add(Way::DestinationGivesUp, ends && destination && down);
    }

    fn list_guest(&self, ways: &mut Vec<Way>) {
        let left = self.guest.left > 0;
        ways.extend((left && self.source.runs).then_some(Way::GuestAtSource));
        ways.extend((left && self.destination.runs).then_some(Way::GuestAtDestination));
        ways.extend(self.destination.runs.then_some(Way::MapInAdvance));
    }

    fn go(&mut self, way: Way) {
        let mutation = self.mutation;
        match way {
            Way::SourceEvent => {
                let event = self.source.events.pop_front().expect("listed");
                self.tell_source(event);
            }
            Way::DestinationEvent => {
                let event = self.destination.events.pop_front().expect("listed");
                self.tell_destination(event);
            }
            Way::SourceStep => {
                let at = self.rng.usize(0..self.source.steps.len());
                let failed = self.step_fails();
                if let Some(event) = self.source.finish_step(at, failed, &mut self.rng) {
                    self.tell_source(event);
                }
            }
            Way::DestinationStep => {
                let count = self.destination.steps_that_get_on().count();
                let nth = self.rng.usize(0..count);
                let at = self.destination.steps_that_get_on().nth(nth).expect("counted");
                let failed = self.step_fails();
                if let Some(event) = self.destination.finish_step(at, failed, &mut self.rng) {
                    self.tell_destination(event);
                }
            }
            Way::ToDestination => {
                let message = self.network.to_destination.pop_front().expect("listed");
                self.tell_destination(DestinationEvent::Message(message));
            }
            Way::ToSource => {
                let message = self.network.to_source.pop_front().expect("listed");
                self.source.heard_refusal |= gives_back(&message);
                self.tell_source(SourceEvent::Message(message));
            }
            Way::Pages => {
                let at = self.rng.usize(0..self.network.pages.len());
                let message = self.network.pages.swap_remove(at);
                let damaged = self.plan.damages > 0 && self.rng.u8(0..4) == 0;
                self.plan.damages -= u8::from(damaged);
                self.destination.apply(&message, damaged, mutation);
            }
            Way::Flight => {
                let flight = self.network.flight.take().expect("listed");
                self.destination.flight_arrives(&flight);
            }
            Way::Ask => {
                let asked = self.destination.asked.remove(0);
                if self.network.carries {
                    self.network.requests.push(asked);
                }
            }
            Way::Request => {
                let at = self.rng.usize(0..self.network.requests.len());
                let (page, whole) = self.network.requests.swap_remove(at);
                let threads = [Wanted::TOGETHER, Wanted::OVERDUE, 1];
                let thread = threads[self.rng.usize(0..threads.len())];
                self.source.answer(Wanted { page, thread }, whole, &mut self.network);
            }
            Way::Round => {
                if let Some(event) = self.source.go_on_with_round(&mut self.network, &mut self.rng)
                {
                    self.tell_source(event);
                }
            }
            Way::Push => {
                if let Some(event) = self.source.push(&mut self.network, &mut self.rng, mutation) {
                    self.tell_source(event);
                }
            }
            Way::GuestAtSource => {
                self.guest.left -= 1;
                self.source.work(&mut self.guest, &mut self.rng);
            }
            Way::GuestAtDestination => {
                self.guest.left -= 1;
                self.destination.work(&mut self.guest, &mut self.rng, mutation);
            }
            Way::MapInAdvance => {
                self.guest.left = self.guest.left.saturating_sub(1);
                let page = PageIndex(self.rng.u64(0..self.plan.pages as u64));
                self.destination.map_one(page);
            }
            other => self.go_wrong(other),
        }
    }

    pub(super) fn step_fails(&mut self) -> bool {
        let fails = self.plan.failed_steps > 0 && self.rng.u8(0..6) == 0;
        self.plan.failed_steps -= u8::from(fails);
        fails
    }

    fn go_wrong(&mut self, way: Way) {
        let failure = || Failure::plain("the link broke");
        let hears_on = self.mutation == Some(Mutation::HearTheOldLink);
        match way {
            Way::Cut => {
                self.plan.cuts -= 1;
                self.network.cut(&mut self.rng);
            }
            Way::SourceNotices => {
                self.network.at_source = View::Down;
                self.source.stop_sending();
                if !hears_on {
                    self.network.deafen_source();
                }
                self.tell_source(match self.mutation {
                    Some(Mutation::GiveUpAtOnce) => SourceEvent::LinkLost(failure()),
                    _ => SourceEvent::LinkDown(failure()),
                });
            }
            Way::DestinationNotices => self.destination_notices(),
            Way::Reconnect => {
                // The new link may come before the destination has noticed the end of the old one.
                if self.network.at_destination == View::Up {
                    self.destination_notices();
                }
                if self.destination.is_over() {
                    return;
                }
                self.network.carries = true;
                self.network.at_source = View::Coming;
                self.network.at_destination = View::Coming;
            }
            Way::SourceLinks => {
                self.network.at_source = View::Up;
                self.source.looks_for_link = false;
                self.tell_source(SourceEvent::LinkUp);
            }
            Way::DestinationLinks => {
                self.network.at_destination = View::Up;
                self.destination.looks_for_link = false;
                self.tell_destination(DestinationEvent::LinkUp);
            }
            Way::SourceGivesUp => {
                self.gave_up = true;
                if self.source_searched_in_vain() {
                    return;
                }
                self.network.at_source = View::Over;
                self.tell_source(SourceEvent::LinkLost(failure()));
            }
            Way::DestinationGivesUp => {
                self.gave_up = true;
                if self.destination_searched_in_vain() {
                    return;
                }
                self.network.at_destination = View::Over;
                self.tell_destination(DestinationEvent::LinkLost(failure()));
            }
            Way::SourceCrashes => {
                self.plan.crashes -= 1;
                self.source.crash(&mut self.rng);
            }
            Way::DestinationCrashes => {
                self.plan.crashes -= 1;
                self.destination.crash(&mut self.rng);
            }
            Way::SourceResumes => self.source_resumes(),
            Way::DestinationResumes => self.destination_resumes(),
            Way::SourceCancels => {
                self.plan.cancels -= 1;
                self.tell_source(SourceEvent::Cancelled);
            }
            Way::DestinationCancels => {
                self.plan.cancels -= 1;
                self.tell_destination(DestinationEvent::Cancelled);
            }
            Way::Late => {
                self.plan.late_answers = self.plan.late_answers.saturating_sub(1);
                let deadline = self.source.machine.as_ref().and_then(|machine| machine.deadline());
                self.now = self.now.max(deadline.unwrap_or_default());
                self.tell_source(SourceEvent::Tick);
            }
            other => unreachable!("{other:?} is no accident"),
        }
    }

    fn destination_notices(&mut self) {
        self.network.at_destination = View::Down;
        if self.mutation != Some(Mutation::HearTheOldLink) {
            self.network.deafen_destination();
        }
        self.destination.awaits_flight = None;
        self.destination.asked.clear();
        self.tell_destination(DestinationEvent::LinkDown);
    }

    fn tell_source(&mut self, event: SourceEvent) {
        if self.traced {
            eprintln!("     source: {event:?}");
        }
        self.source.tell(event, &mut self.network, self.now, self.mutation);
        if self.source.is_over() {
            self.leave();
        }
    }

    fn tell_destination(&mut self, event: DestinationEvent) {
        if self.traced {
            eprintln!("     destination: {event:?}");
        }
        self.destination.tell(event, &mut self.network, self.mutation);
        if self.destination.is_over() {
            self.leave();
        }
    }

    /// A side that is over closes the link; what it has said last may arrive.
    fn leave(&mut self) {
        self.network.carries = false;
    }
}

/// Seeds are counted up, and the first draws from neighbours are alike: mixed by splitmix64 (Steele, Lea, Flood,
/// OOPSLA 2014) they are not.
fn spread(seed: u64) -> u64 {
    let mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// The destination says that the guest will not run there, or that it has no device state to run it with.
fn gives_back(message: &ToSource) -> bool {
    use DestinationStage as At;
    matches!(
        message,
        ToSource::Refused { .. }
            | ToSource::Resync { at: At::Refused { .. } | At::Receiving { .. }, .. }
    )
}
