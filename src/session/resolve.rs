//! A person decides where the guest runs, when farfault could not: what the evidence of one side allows,
//! and doing it.
//!
//! Each host knows its own side only. What its journal proves is a fence: the choice that contradicts it
//! is refused. Where it proves nothing the person must ask the other host; so the same choice is made on
//! both, on the one that gives the guest up first.

use serde::Serialize;

use super::journal::{Entry, Found, Journal, Records, Side};
use crate::engine::Failure;
use crate::guest::qemu;

/// Where the guest shall run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// On the host that it was leaving.
    RunSource,
    /// On the host that it was going to.
    RunDestination,
}

impl Choice {
    /// As an option.
    pub fn option(self) -> &'static str {
        match self {
            Choice::RunSource => "--run-source",
            Choice::RunDestination => "--run-destination",
        }
    }
}

/// What a choice comes to on one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permit {
    /// What is written down first; nothing where it is written already.
    pub record: Option<Entry>,
    /// What is done to the guest here.
    pub act: Act,
}

/// What is done to the guest on this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// It stays stopped.
    LeaveStopped,
    /// It runs.
    LetRun,
    /// It is to be taken over by `farfault receive --resume`, which lets it run: its page faults must be served.
    TakeOver,
    /// Its copy is ended, if farfault has started its monitor.
    End,
}

/// What the evidence of one side allows: its journal, and whether the guest's monitor lives.
///
/// # Errors
/// What contradicts the choice.
pub fn judge(found: &Found, choice: Choice) -> Result<Permit, Failure> {
    judge_by(found.about.side, &found.records, monitor_lives(found), choice)
}

/// A monitor without a process of its own has ended with the farfault that it was in.
fn monitor_lives(found: &Found) -> bool {
    found.about.guest.process.is_some_and(|qemu| qemu.lives())
}

/// As [`judge`], by its parts.
pub(super) fn judge_by(
    side: Side,
    records: &Records,
    monitor_lives: bool,
    choice: Choice,
) -> Result<Permit, Failure> {
    match side {
        Side::Source => judge_source(records, monitor_lives, choice),
        Side::Destination => judge_destination(records, monitor_lives, choice),
    }
}

/// True when the guest is the source's by its own journal, whatever becomes of it there.
fn belongs_to_the_source(records: &Records) -> bool {
    let has = |entry| records.has(entry);
    let may_be_elsewhere = [Entry::Running, Entry::Complete, Entry::RunDestination].map(has);
    let was_decided = has(Entry::Decided) && !has(Entry::Void);
    may_be_elsewhere == [false; 3] && (!was_decided || has(Entry::RunSource))
}

/// The guest's monitor here has ended, so it cannot run here whatever a person decides.
fn gone(hint: &str) -> Failure {
    Failure::new("the guest's QEMU here has ended, and the guest in it", hint)
}

fn judge_source(records: &Records, monitor_lives: bool, choice: Choice) -> Result<Permit, Failure> {
    let has = |entry| records.has(entry);
    let unless = |entry| Some(entry).filter(|entry| !records.has(*entry));
    match choice {
        Choice::RunSource if has(Entry::RunDestination) => Err(Failure::new(
            "it was resolved here that the guest runs at the destination",
            "end this copy, or undo by hand what you are sure of",
        )),
        Choice::RunSource if has(Entry::Running) || has(Entry::Complete) => Err(Failure::new(
            "the destination has said that the guest runs there",
            "what it has done there cannot be undone: see `Lost pages` in docs/failures.md",
        )),
        Choice::RunSource if monitor_lives => {
            Ok(Permit { record: unless(Entry::RunSource), act: Act::LetRun })
        }
        Choice::RunSource if belongs_to_the_source(records) => {
            Err(gone("it belonged here: nothing is left to decide"))
        }
        Choice::RunSource => Err(gone(
            "if there is a copy, it is at the destination: choose --run-destination, there first",
        )),
        Choice::RunDestination if has(Entry::RunSource) => Err(Failure::new(
            "it was resolved here that the guest runs at the source",
            "let it run here; on the destination too choose --run-source",
        )),
        Choice::RunDestination if has(Entry::Void) || !has(Entry::Decided) => Err(Failure::new(
            "the destination was never told to run the guest, or has refused it: it belongs here",
            "choose --run-source",
        )),
        Choice::RunDestination => {
            Ok(Permit { record: unless(Entry::RunDestination), act: Act::LeaveStopped })
        }
    }
}

fn judge_destination(
    records: &Records,
    monitor_lives: bool,
    choice: Choice,
) -> Result<Permit, Failure> {
    let has = |entry| records.has(entry);
    let committed = has(Entry::Committed) || has(Entry::Complete);
    match choice {
        Choice::RunDestination if has(Entry::Refused) => Err(Failure::new(
            "the guest was refused here: the source may run it",
            "choose --run-source on both hosts",
        )),
        Choice::RunDestination if committed && !monitor_lives => Err(gone(
            "it has run here, or was about to: what is left to do is in docs/failures.md, `Lost pages`",
        )),
        Choice::RunDestination if committed => Ok(Permit { record: None, act: Act::TakeOver }),
        Choice::RunDestination if !has(Entry::Loaded) => Err(Failure::new(
            "the guest's device state was never loaded here: there is nothing to run",
            "choose --run-source on both hosts, here first",
        )),
        // To write down that it runs here would forbid the source to run its copy, the last one.
        Choice::RunDestination if !monitor_lives => {
            Err(gone("choose --run-source on both hosts, here first"))
        }
        Choice::RunDestination => Ok(Permit { record: Some(Entry::Committed), act: Act::TakeOver }),
        // A refusal that follows the decision was made before the guest ran.
        Choice::RunSource if committed && !has(Entry::Refused) => Err(Failure::new(
            "the decision has arrived here: the guest runs here, or has run",
            "choose --run-destination; what to do about lost pages is in docs/failures.md",
        )),
        Choice::RunSource => {
            let record = Some(Entry::Refused).filter(|_| !has(Entry::Refused));
            Ok(Permit { record, act: Act::End })
        }
    }
}

/// What to do where nothing brings the pages together any more.
const LOST_PAGES: &str = "see `Lost pages` in docs/failures.md";

/// What is known of a side that nobody works on, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// How it stands.
    pub situation: &'static str,
    /// What to type here or to look at.
    pub next: String,
}

/// Reads the evidence for a person.
pub fn advise(found: &Found) -> Advice {
    let has = |entry| found.records.has(entry);
    let id = found.name();
    let resolve = |choice: Choice| format!("farfault resolve {id} {}", choice.option());
    let resume = |side: &str| format!("farfault {side} --resume {}", found.about.migration);
    let both = format!("farfault resolve {id} --show; ask the other host before you choose");
    let tidy = format!("nothing; then remove {}", found.directory.display());
    let (situation, next) = match found.about.side {
        Side::Source if has(Entry::RunSource) => (
            "resolved: the guest is to run here",
            format!("where it stands still: {} again; else {tidy}", resolve(Choice::RunSource)),
        ),
        Side::Source if has(Entry::Complete) => {
            ("complete: the guest runs at the destination with all its pages", tidy)
        }
        Side::Source
            if (has(Entry::RunDestination) || has(Entry::Running)) && !monitor_lives(found) =>
        {
            (
                "lost pages: the guest runs at the destination, or is to, and what of its memory was only here has ended \
             with its QEMU",
                LOST_PAGES.to_owned(),
            )
        }
        Side::Source if has(Entry::RunDestination) => (
            "resolved: the guest is to run at the destination, and some of its memory may be only here",
            resume("send"),
        ),
        Side::Source if has(Entry::Running) => (
            "interrupted: the guest runs at the destination, and some of its memory is only here",
            resume("send"),
        ),
        Side::Source if has(Entry::Void) || !has(Entry::Decided) => {
            ("not decided: the guest belongs here", resolve(Choice::RunSource))
        }
        Side::Source if !monitor_lives(found) => (
            "in doubt: decided, no word came from the destination, and the guest's QEMU here has ended",
            format!("look at the destination: farfault resolve {} --show", found.about.migration),
        ),
        Side::Source => (
            "in doubt: decided, and no word came from the destination",
            format!("{}, which asks the destination; or {both}", resume("send")),
        ),
        Side::Destination if has(Entry::Refused) => {
            ("refused: the guest never ran here and never will", resolve(Choice::RunSource))
        }
        Side::Destination if has(Entry::Complete) => (
            "complete: the guest runs here with all its pages, and the source may not know",
            format!("{}, which tells it; or {tidy}", resume("receive")),
        ),
        Side::Destination if has(Entry::Committed) && !monitor_lives(found) => (
            "lost: the guest has run here, or was about to, and its QEMU has ended",
            LOST_PAGES.to_owned(),
        ),
        Side::Destination if has(Entry::Committed) => {
            ("interrupted: the guest runs here and may lack pages", resume("receive"))
        }
        Side::Destination if has(Entry::Loaded) && !monitor_lives(found) => {
            ("not here: the guest never ran, and its QEMU has ended", resolve(Choice::RunSource))
        }
        Side::Destination if has(Entry::Loaded) => {
            ("in doubt: the guest could run here, and the decision did not come", both)
        }
        Side::Destination => ("not loaded: the guest never ran here", resolve(Choice::RunSource)),
    };
    Advice { situation, next }
}

/// Carries out a choice on this side: writes it down, then does it. Gives what to tell.
///
/// # Errors
/// When the evidence is against it, when a farfault works on this migration, or when the guest's
/// monitor does not do as told; then the choice stands in the journal and may be repeated.
pub fn resolve(found: &Found, choice: Choice) -> Result<&'static str, Failure> {
    // The lock first: nobody may begin to work on it between the judgement and the deed.
    let mut journal = Journal::take_over(found)?;
    let (place, at_source) = (&found.about.guest, found.about.side == Side::Source);
    let monitor_lives = monitor_lives(found);
    let permit = match judge_by(found.about.side, &found.records, monitor_lives, choice) {
        Ok(permit) => permit,
        Err(failure) => {
            if at_source && !monitor_lives && belongs_to_the_source(&found.records) {
                journal.remove();
            }
            return Err(failure);
        }
    };
    if let Some(record) = permit.record {
        journal.record(&record)?;
    }
    match permit.act {
        Act::LeaveStopped => {
            Ok("the guest stays stopped here, for `farfault send --resume`; it is to run at \
                                 the destination")
        }
        Act::LetRun => {
            qemu::let_run(place)?;
            let was_decided = found.records.has(Entry::Decided) && !found.records.has(Entry::Void);
            if at_source && !was_decided {
                journal.remove();
            }
            Ok("the guest runs here, unless its owner had paused it")
        }
        Act::TakeOver => {
            Ok("the guest is to run here: let `farfault receive --resume` take it over now, \
                             and `farfault send --resume` on the source")
        }
        Act::End if place.started_here || !place.process.is_some_and(|qemu| qemu.lives()) => {
            qemu::end(place)?;
            journal.remove();
            Ok("the guest is given up here, and its copy is gone; it is to run at the source")
        }
        Act::End => {
            Ok("the guest is given up here; its copy in the QEMU that you had started stays \
                        stopped: end that")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use Choice::{RunDestination, RunSource};
    use Entry::*;

    /// Every evidence that a crash can leave, and what each choice comes to; `None`: refused.
    #[test]
    fn the_evidence_fences_every_choice() {
        type Row = (Side, &'static [Entry], Option<Permit>, Option<Permit>);
        let permit = |record, act| Some(Permit { record, act });
        let (s, d) = (Side::Source, Side::Destination);
        let (run, over) = (Act::LetRun, Act::TakeOver);
        let (end, leave) = (Act::End, Act::LeaveStopped);
        let table: &[Row] = &[
            (s, &[], permit(Some(Entry::RunSource), run), None),
            (s, &[Started], permit(Some(Entry::RunSource), run), None),
            (
                s,
                &[Started, Decided],
                permit(Some(Entry::RunSource), run),
                permit(Some(Entry::RunDestination), leave),
            ),
            (s, &[Started, Decided, Void], permit(Some(Entry::RunSource), run), None),
            (s, &[Started, Decided, Running], None, permit(Some(Entry::RunDestination), leave)),
            (
                s,
                &[Started, Decided, Running, Complete],
                None,
                permit(Some(Entry::RunDestination), leave),
            ),
            (s, &[Started, Decided, Entry::RunSource], permit(None, run), None),
            (s, &[Started, Decided, Entry::RunDestination], None, permit(None, leave)),
            (s, &[Started, Decided, Running, Entry::RunDestination], None, permit(None, leave)),
            (d, &[], permit(Some(Refused), end), None),
            (d, &[Started], permit(Some(Refused), end), None),
            (d, &[Started, Loaded], permit(Some(Refused), end), permit(Some(Committed), over)),
            (d, &[Started, Loaded, Committed], None, permit(None, over)),
            (d, &[Started, Committed], None, permit(None, over)),
            (d, &[Started, Committed, Complete], None, permit(None, over)),
            (d, &[Started, Refused], permit(None, end), None),
            (d, &[Started, Loaded, Refused], permit(None, end), None),
            (d, &[Started, Committed, Refused], permit(None, end), None),
        ];
        for (side, entries, source, destination) in table {
            for (choice, expected) in [(RunSource, source), (RunDestination, destination)] {
                let records = Records::of(entries);
                let judged = judge_by(*side, &records, true, choice);
                assert_eq!(judged.clone().ok(), *expected, "{side} {entries:?} {choice:?}");
                // Whoever is refused is told what to do instead.
                assert!(judged.is_ok() || judged.unwrap_err().hint.is_some());
                // Where there is no guest any more it cannot be let run, but it can be given up.
                let without = judge_by(*side, &records, false, choice);
                let runs = expected.is_some_and(|permit| [run, over].contains(&permit.act));
                assert_eq!(
                    without.ok(),
                    expected.filter(|_| !runs),
                    "{side} {entries:?} {choice:?}"
                );
                // A choice may be repeated, and forbids the other one.
                let Some(Permit { record: Some(record), .. }) = expected else { continue };
                let after = Records::of(&[*entries, &[*record]].concat());
                let again = judge_by(*side, &after, true, choice).unwrap();
                assert_eq!((again.record, again.act), (None, expected.unwrap().act));
                let other = if choice == RunSource { RunDestination } else { RunSource };
                let other = judge_by(*side, &after, true, other);
                assert!(other.is_err(), "{side} {entries:?} then {other:?}");
            }
        }
    }

    #[test]
    fn what_only_the_source_has_is_not_advised_to_be_removed() {
        use crate::guest::Whereabouts;
        use crate::memory::adopt::ProcessIdentity;
        use crate::session::journal::{About, find};
        let advice = |entries: &[Entry], lives: bool| {
            let dir = tempfile::tempdir().unwrap();
            let process = lives.then(|| ProcessIdentity::own().unwrap());
            let place = Whereabouts { process, ..Whereabouts::default() };
            let about = About::begin("aa01", Side::Source, place).unwrap();
            let mut journal = Journal::create(dir.path(), &about).unwrap();
            entries.iter().for_each(|entry| journal.record(entry).unwrap());
            advise(&find(dir.path(), "aa01", None).unwrap())
        };
        for entries in [
            &[Started, Decided, Running][..],
            &[Started, Decided, Entry::RunDestination],
            &[Started, Decided, Running, Entry::RunDestination],
        ] {
            let Advice { next, situation } = advice(entries, true);
            assert_eq!(next, "farfault send --resume aa01", "{entries:?}: {situation}");
            // What has ended cannot be taken over.
            let Advice { next, situation } = advice(entries, false);
            assert_eq!(next, LOST_PAGES, "{entries:?}: {situation}");
        }
        let complete = advice(&[Started, Decided, Running, Entry::RunDestination, Complete], true);
        assert!(complete.next.starts_with("nothing; then remove"), "{complete:?}");
        // The guest may not have been let run: that can be repeated.
        let here = advice(&[Started, Decided, Entry::RunSource], true);
        assert!(here.next.contains("farfault resolve aa01.source --run-source again"), "{here:?}");
    }

    #[test]
    fn a_guest_whose_monitor_has_ended_is_not_said_to_run_here() {
        use crate::guest::Whereabouts;
        use crate::memory::adopt::ProcessIdentity;
        use crate::session::journal::{About, find};
        let me = ProcessIdentity::own().unwrap();
        let ended = ProcessIdentity { start_ticks: me.start_ticks + 1, ..me };
        for (entries, stays) in [
            (&[Started][..], false),
            (&[Started, Decided], true),
            // It has run here, and ended, since that was chosen.
            (&[Started, Decided, Entry::RunSource], false),
            // Resolved, and taken back later: it is not ours to forget.
            (&[Started, Decided, Entry::RunDestination, Void], true),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let place = Whereabouts { process: Some(ended), ..Whereabouts::default() };
            let about = About::begin("aa01", Side::Source, place).unwrap();
            let mut journal =
                Journal::create(dir.path(), &About { owner: ended, ..about }).unwrap();
            entries.iter().for_each(|entry| journal.record(entry).unwrap());
            drop(journal);
            let found = find(dir.path(), "aa01", None).unwrap();
            let failure = resolve(&found, RunSource).unwrap_err();
            let was_resolved = entries.contains(&Entry::RunDestination);
            assert_eq!(failure.reason.contains("QEMU here has ended"), !was_resolved, "{failure}");
            let left = find(dir.path(), "aa01", None);
            assert_eq!(left.is_ok(), stays, "{entries:?}");
            if let Ok(left) = left
                && !was_resolved
            {
                // The other way is still open.
                judge(&left, RunDestination).unwrap();
            }
        }
    }

    /// The copy there is the last one then: the source must be allowed to run it.
    #[test]
    fn a_destination_without_its_monitor_is_not_written_down_to_run_the_guest() {
        use crate::guest::Whereabouts;
        use crate::memory::adopt::ProcessIdentity;
        use crate::session::journal::{About, find};
        let me = ProcessIdentity::own().unwrap();
        let ended = ProcessIdentity { start_ticks: me.start_ticks + 1, ..me };
        let dir = tempfile::tempdir().unwrap();
        let place = Whereabouts { process: Some(ended), ..Whereabouts::default() };
        let about = About::begin("aa01", Side::Destination, place).unwrap();
        let mut journal = Journal::create(dir.path(), &About { owner: ended, ..about }).unwrap();
        [Started, Loaded].iter().for_each(|entry| journal.record(entry).unwrap());
        drop(journal);
        let found = find(dir.path(), "aa01", None).unwrap();
        let advice = advise(&found);
        assert_eq!(advice.next, "farfault resolve aa01.destination --run-source", "{advice:?}");
        let shown = judge(&found, RunDestination).unwrap_err();
        assert!(shown.reason.contains("QEMU here has ended"), "{shown}");
        let failure = resolve(&found, RunDestination).unwrap_err();
        assert!(failure.reason.contains("QEMU here has ended"), "{failure}");
        assert!(failure.hint.unwrap().contains("--run-source on both hosts"));
        let found = find(dir.path(), "aa01", None).unwrap();
        assert!(!found.records.has(Committed));
        resolve(&found, RunSource).unwrap();
        find(dir.path(), "aa01", None).unwrap_err();
    }

    /// The two hosts' journals as they can be at the same time: no way of resolving both lets both run.
    #[test]
    fn clear_evidence_on_either_host_keeps_the_guest_from_two_places() {
        let both: &[(&[Entry], &[Entry])] = &[
            (&[Started], &[Started]),
            (&[Started, Decided], &[Started]),
            (&[Started, Decided], &[Started, Refused]),
            (&[Started, Decided, Void], &[Started, Refused]),
            (&[Started, Decided, Running], &[Started, Committed]),
            (&[Started, Decided, Running], &[Started, Committed, Complete]),
        ];
        for (source, destination) in both {
            let runs = |side, entries, choice| {
                judge_by(side, &Records::of(entries), true, choice)
                    .is_ok_and(|permit| [Act::LetRun, Act::TakeOver].contains(&permit.act))
            };
            let source_runs = runs(Side::Source, source, RunSource);
            let destination_runs = runs(Side::Destination, destination, RunDestination);
            assert!(!(source_runs && destination_runs), "{source:?} {destination:?}");
        }
    }

    #[test]
    fn a_choice_is_on_disk_before_the_guest_is_touched_and_not_while_somebody_works() {
        use crate::guest::Whereabouts;
        use crate::memory::adopt::ProcessIdentity;
        use crate::session::journal::{About, find};
        let dir = tempfile::tempdir().unwrap();
        let process = Some(ProcessIdentity::own().unwrap());
        let place = Whereabouts { process, ..Whereabouts::default() };
        let mut about = About::begin("aa01", Side::Source, place).unwrap();
        // As if its owner had been killed.
        about.owner = ProcessIdentity { start_ticks: 0, ..about.owner };
        let mut journal = Journal::create(dir.path(), &about).unwrap();
        journal.record(&Started).unwrap();
        journal.record(&Decided).unwrap();
        let found = find(dir.path(), "aa01", None).unwrap();
        assert!(resolve(&found, RunSource).unwrap_err().reason.contains("works on"));
        drop(journal);
        // There is no monitor: the guest cannot be let run, and the choice stands all the same.
        resolve(&found, RunSource).unwrap_err();
        let found = find(dir.path(), "aa01", None).unwrap();
        assert!(found.records.has(Entry::RunSource));
        assert!(resolve(&found, RunDestination).unwrap_err().reason.contains("at the source"));
    }
}
