//! What goes in and out of the source's machine.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::engine::Failure;
use crate::engine::policy::{RoundSummary, SwitchoverPolicy};
use crate::page::{PageIndex, Version};
use crate::wire::message::{HandoverForm, Lacking, PackedSet, Strategy, ToDestination, ToSource};

/// Longest time for each wait for the other side; generous, since a busy host swaps.
#[derive(Clone, Copy, Debug)]
pub struct SourceTimeouts {
    /// From Hello to Prepared.
    pub prepare: Duration,
    /// From the end of a round to its acknowledgement, beyond what is still queued.
    pub round: Duration,
    /// From the offer to Ready, beyond what the flight takes. What of the guest's memory goes before that gets as
    /// long, and the downtime budget on top.
    pub load: Duration,
    /// From Commit to Running, beyond what the flight takes: longer than a destination gives its own monitor (two
    /// minutes for QEMU to load), whose failure it can tell. To give up earlier would leave the guest running nowhere.
    pub commit: Duration,
}

impl Default for SourceTimeouts {
    fn default() -> Self {
        SourceTimeouts {
            prepare: Duration::from_secs(60),
            round: Duration::from_secs(60),
            load: Duration::from_secs(60),
            commit: Duration::from_secs(300),
        }
    }
}

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// How the guest moves.
    pub strategy: Strategy,
    /// Who must have said what before it runs on the other side.
    pub handover: HandoverForm,
    /// When to stop pre-copy.
    pub policy: SwitchoverPolicy,
    /// Limits of waiting.
    pub timeouts: SourceTimeouts,
}

/// A line of the source's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceRecord {
    /// A migration has begun; the guest runs here.
    Started,
    /// The guest may run at the destination; it never runs here again, unless Void follows.
    Decided,
    /// The decision is void: the destination was never told of it, or has refused.
    Void,
    /// The guest runs at the destination.
    Running,
    /// Every page has arrived: the copy here is not needed any more.
    Complete,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum SourceEvent {
    /// The link is up and both ends are authenticated.
    Connected(Box<ToDestination>),
    /// A message of the destination.
    Message(ToSource),
    /// Answers [`SourceAction::SendRound`]: everything is handed to the transport.
    RoundSent(RoundSummary),
    /// Answers [`SourceAction::Freeze`].
    Frozen {
        /// What the link is expected to take for the flight.
        flight: Duration,
    },
    /// The same, when it failed. The guest may be stopped or not.
    FreezeFailed(Failure),
    /// Answers [`SourceAction::SendRemainder`] once all of it is handed to the transport.
    RemainderSent,
    /// Answers [`SourceAction::Journal`]: the record is on disk.
    Journaled(SourceRecord),
    /// The same, when it could not be written.
    JournalFailed(SourceRecord, Failure),
    /// Answers [`SourceAction::ResumeGuest`].
    Resumed,
    /// The same, when it failed.
    ResumeFailed(Failure),
    /// Answers [`SourceAction::ReleaseGuest`].
    Released,
    /// A step here has failed.
    Failed(Failure),
    /// The link is broken. Nothing that was said on it and not heard will be heard any more.
    LinkDown(Failure),
    /// There is another link, and nothing works on the old one any more: no round is being sent.
    LinkUp,
    /// The destination cannot be reached any more.
    LinkLost(Failure),
    /// The operator wants the migration to end.
    Cancelled,
    /// Time has passed; look at the deadline.
    Tick,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Send on the control lane.
    Send(ToDestination),
    /// Send a pre-copy round, page contents at this version.
    SendRound(Version),
    /// These pages of the round were rejected by the destination: send them whole next time.
    ForgetPages(Vec<PageIndex>),
    /// The round is over, and the destination holds these of its pages: all others must be sent again,
    /// whole.
    EndRound {
        /// As the destination says; only pages that were sent in the round are to be believed.
        held: PackedSet,
    },
    /// Stop the guest, take the final dirty set and the device state.
    Freeze(Version),
    /// Send the flight on the state lane.
    SendFlight,
    /// Push the missing pages, all that the flight names, and answer fault requests.
    SendRemainder,
    /// The same for what is still lacking, on a new link.
    SendLacking(Lacking),
    /// Write to the journal and to disk.
    Journal(SourceRecord),
    /// Let the guest run on here.
    ResumeGuest,
    /// The guest runs elsewhere for good: let go of it.
    ReleaseGuest,
    /// The migration is over.
    End(SourceOutcome),
}

/// How a migration ended, seen from the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceOutcome {
    /// The guest runs at the destination with all its pages.
    Migrated,
    /// The guest runs on here.
    Stayed(Failure),
    /// The source has decided and does not know whether the guest runs at the destination: it stays
    /// stopped here until a person or a reconnect tells.
    InDoubt(Failure),
    /// The guest runs at the destination, but not all its pages have arrived.
    LostPages(Failure),
}
