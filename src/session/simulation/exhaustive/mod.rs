//! The handover checked exhaustively: both machines, the control lanes and the journals, without pages, in
//! every order that a few accidents allow. [stateright](https://docs.rs/stateright) visits every state.

mod handover;

use std::time::Duration;

use handover::{Accidents, Handover, Step};
use stateright::{Checker, Model, Property};

use crate::engine::destination::DestinationOutcome;
use crate::engine::policy::SwitchoverPolicy;
use crate::engine::source::{SourceConfig, SourceEvent, SourceOutcome, SourceTimeouts};
use crate::guest::Shape;
use crate::memory::MemoryLayout;
use crate::wire::message::{HandoverForm, PROTOCOL, Strategy, ToDestination};

struct Scope {
    strategy: Strategy,
    handover: HandoverForm,
    accidents: Accidents,
}

impl Scope {
    fn config(&self) -> SourceConfig {
        let policy =
            SwitchoverPolicy { downtime_budget: Duration::from_millis(300), max_rounds: Some(1) };
        let (strategy, handover) = (self.strategy, self.handover);
        let timeouts = SourceTimeouts::default();
        SourceConfig { strategy, handover, policy, timeouts }
    }
}

impl Model for Scope {
    type State = Handover;
    type Action = Step;

    fn init_states(&self) -> Vec<Handover> {
        let strategy = self.strategy;
        let mut state = Handover::new(self.config(), self.accidents);
        let shape = Shape {
            monitor: "model".to_owned(),
            memory: MemoryLayout::new(Vec::new()),
            properties: Default::default(),
        };
        let shape = Box::new(shape);
        let hello = ToDestination::Hello { protocol: PROTOCOL, shape, strategy, runs: true };
        state.tell_source(SourceEvent::Connected(Box::new(hello)));
        vec![state]
    }

    fn actions(&self, state: &Handover, actions: &mut Vec<Step>) {
        actions.extend(state.steps());
    }

    fn next_state(&self, last: &Handover, step: Step) -> Option<Handover> {
        let mut state = last.clone();
        state.take(step, &self.config());
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("the guest runs at one place at most", |_, state: &Handover| {
                !(state.runs_at_source && state.runs_at_destination)
            }),
            Property::always("nothing is done against the rules", |_, state: &Handover| {
                state.wrong.is_none()
            }),
            Property::always("whoever has not crashed comes to an end", |_, state: &Handover| {
                let over = !state.source_lives() && !state.destination_lives();
                over || !state.steps().is_empty()
            }),
            Property::always("what a side says in the end is so", |_, state: &Handover| {
                let source = match &state.source_end {
                    Some(SourceOutcome::Stayed(_)) => !state.runs_at_destination,
                    Some(SourceOutcome::Migrated) => state.runs_at_destination,
                    _ => true,
                };
                let destination = match &state.destination_end {
                    Some(DestinationOutcome::Refused(_)) => !state.runs_at_destination,
                    Some(DestinationOutcome::Migrated) => {
                        state.runs_at_destination && state.pages_here
                    }
                    _ => true,
                };
                source && destination
            }),
            Property::sometimes("the guest moves", |_, state: &Handover| {
                state.source_end == Some(SourceOutcome::Migrated)
                    && state.destination_end == Some(DestinationOutcome::Migrated)
            }),
        ]
    }
}

fn explore(accidents: Accidents) -> usize {
    let mut states = 0;
    for strategy in [Strategy::Hybrid, Strategy::Postcopy] {
        for handover in [HandoverForm::OneFlight, HandoverForm::Strict] {
            let checker = Scope { strategy, handover, accidents }
                .checker()
                .threads(std::thread::available_parallelism().map_or(1, usize::from))
                .spawn_bfs()
                .join();
            checker.assert_properties();
            states += checker.unique_state_count();
        }
    }
    states
}

const NONE: Accidents =
    Accidents { cuts: 0, failures: 0, crashes: 0, resumes: 0, cancels: 0, impatience: 0 };

#[test]
fn the_handover_holds_whatever_one_accident_does() {
    let each = [
        Accidents { cuts: 1, ..NONE },
        Accidents { failures: 1, ..NONE },
        Accidents { crashes: 1, resumes: 1, ..NONE },
        Accidents { cancels: 1, impatience: 1, ..NONE },
    ];
    eprintln!("{:?} states", each.map(explore));
}

#[test]
#[ignore = "millions of states: minutes, with optimisation; see `just explore`"]
fn the_handover_holds_whatever_two_cuts_do() {
    eprintln!("{} states", explore(Accidents { cuts: 2, ..NONE }));
}

#[test]
#[ignore = "millions of states: minutes, with optimisation; see `just explore`"]
fn the_handover_holds_whatever_a_cut_and_another_accident_do() {
    let each = [
        Accidents { cuts: 1, failures: 1, ..NONE },
        Accidents { cuts: 1, crashes: 1, resumes: 1, ..NONE },
        Accidents { crashes: 2, resumes: 2, ..NONE },
        Accidents { cuts: 1, cancels: 1, impatience: 1, ..NONE },
    ];
    eprintln!("{:?} states", each.map(explore));
}
