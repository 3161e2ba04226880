//! What goes in and out of the destination's machine.

use serde::{Deserialize, Serialize};

use crate::engine::Failure;
use crate::guest::Shape;
use crate::page::{PageIndex, Version};
use crate::wire::message::{Lacking, PackedSet, Strategy, ToDestination, ToSource};
use crate::wire::state::PackedState;

/// A line of the destination's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DestinationRecord {
    /// A guest is being received; it runs at the source.
    Started,
    /// Its device state is loaded, and the decision has not come: it could run here.
    Loaded,
    /// The source's decision has arrived: the guest runs here from now on.
    Committed,
    /// The guest has not run here and never will.
    Refused,
    /// Every page has arrived.
    Complete,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum DestinationEvent {
    /// A message of the source.
    Message(ToDestination),
    /// Answers [`DestinationAction::Prepare`].
    Prepared,
    /// Answers [`DestinationAction::AwaitRound`]: every message of the round was applied, except for
    /// these pages.
    RoundApplied {
        /// The round.
        round: Version,
        /// Pages to be sent whole.
        rejected: Vec<PageIndex>,
    },
    /// Answers [`DestinationAction::AwaitFlight`]: it is here and the page table knows what is missing.
    FlightArrived,
    /// Every page has come: after the flight, once.
    PagesComplete,
    /// Answers [`DestinationAction::LoadDeviceState`].
    Loaded,
    /// Answers [`DestinationAction::Journal`]: the record is on disk.
    Journaled(DestinationRecord),
    /// The same, when it could not be written.
    JournalFailed(DestinationRecord, Failure),
    /// The same, when it may be on disk all the same.
    JournalUnknown(DestinationRecord, Failure),
    /// Answers [`DestinationAction::RunGuest`].
    Running,
    /// The same, when it is certain that the guest has not run, and will not.
    NotStarted(Failure),
    /// Answers [`DestinationAction::ReleaseGuest`] and [`DestinationAction::DiscardGuest`].
    Released,
    /// Answers [`DestinationAction::CollectPages`].
    PagesCollected {
        /// As asked.
        outage: u32,
        /// As asked for.
        pages: PagesHere,
    },
    /// The same, when it failed.
    LetGoFailed,
    /// A step here has failed.
    Failed(Failure),
    /// The link is broken. Nothing that was said on it and not heard will be heard any more.
    LinkDown,
    /// There is another link, and nothing works on the old one any more: no page is being applied.
    LinkUp,
    /// The source cannot be reached any more.
    LinkLost(Failure),
    /// The operator wants the migration to end.
    Cancelled,
}

/// Which pages are to be collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagesOf {
    /// Those held at the version of this round, which ends: no message of it comes any more.
    Round(Version),
    /// Those that lack their final content.
    Remainder,
}

/// Pages as they were collected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PagesHere {
    /// For [`PagesOf::Round`].
    Held(PackedSet),
    /// For [`PagesOf::Remainder`].
    Lacking(Lacking),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Send on the control lane.
    Send(ToSource),
    /// Compare shapes, register memory, serve faults.
    Prepare {
        /// The guest that wants to move.
        shape: Box<Shape>,
        /// How.
        strategy: Strategy,
        /// False: leave it paused when all is done.
        runs: bool,
    },
    /// Tell when this many messages of the round have been applied.
    AwaitRound {
        /// The round.
        round: Version,
        /// Its messages.
        messages: u64,
    },
    /// Look up what the source must know of pages after an outage.
    CollectPages {
        /// To tell the answer from a late one for an earlier outage.
        outage: u32,
        /// Which.
        of: PagesOf,
    },
    /// Keep the device state of a rehearsal, and say so.
    KeepRehearsal(PackedState),
    /// Tell when the flight has come.
    AwaitFlight(Version),
    /// Give the guest its device state.
    LoadDeviceState,
    /// Write to the journal and to disk.
    Journal(DestinationRecord),
    /// Let the guest run here.
    RunGuest,
    /// All is done: let go of the guest, which stays as it is.
    ReleaseGuest,
    /// The guest never ran here: end its monitor if it is ours.
    DiscardGuest,
    /// The migration is over.
    End(DestinationOutcome),
}

/// How a migration ended, seen from the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationOutcome {
    /// The guest runs here with all its pages.
    Migrated,
    /// The guest has not run here and never will.
    Refused(Failure),
    /// The guest was ready to run here and the source's word did not come: it stays loaded and stopped.
    InDoubt(Failure),
    /// The guest runs here, and some of its pages have not arrived: threads that touch them wait.
    LostPages(Failure),
}
