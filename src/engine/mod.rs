//! Decisions without IO: pure state machines that have no clock, no socket and no thread.
//!
//! Time and events come in, actions go out. The session carries the actions out against real
//! guests, links and disks and feeds back what happened; tests do the same against simulated ones,
//! so every order of losses and failures can be run deterministically.
//!
//! * [`source`] and [`destination`]: the handover, one machine for each end. Their rule: the guest
//!   never runs at two places, and before the journalled decision every failure lets it run on at
//!   the source.
//! * [`heat`]: which pages the guest writes to again and again.
//! * [`precopy`]: which pages a pre-copy round still has to send.
//! * [`pusher`]: which page goes next after the switchover.
//! * [`policy`]: when to stop pre-copy.

use serde::{Deserialize, Serialize};

pub mod destination;
#[doc(hidden)]
pub mod fuzz;
pub mod heat;
pub mod policy;
pub mod precopy;
pub mod pusher;
pub mod source;

/// Where a migration stands, in the words of the documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MigrationPhase {
    /// Not yet talking to the other side.
    Connect,
    /// Comparing shapes; the destination registers its memory.
    Prepare,
    /// Pages are sent while the guest runs at the source.
    Precopy,
    /// The guest is being stopped; its last changes and its device state are collected.
    Freeze,
    /// Device state is on its way to the destination, or loading there.
    Offer,
    /// The source has decided; not yet heard that the guest runs at the destination.
    Commit,
    /// The guest runs at the destination; its last pages follow.
    Postcopy,
    /// All is over, well or not.
    Done,
}

impl MigrationPhase {
    /// The name used in reports and on the screen.
    pub fn name(self) -> &'static str {
        match self {
            MigrationPhase::Connect => "connect",
            MigrationPhase::Prepare => "prepare",
            MigrationPhase::Precopy => "precopy",
            MigrationPhase::Freeze => "freeze",
            MigrationPhase::Offer => "offer",
            MigrationPhase::Commit => "commit",
            MigrationPhase::Postcopy => "postcopy",
            MigrationPhase::Done => "done",
        }
    }
}

/// Why a migration did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// What was wrong and where.
    pub reason: String,
    /// What a person can do.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure with a hint.
    pub fn new(reason: impl Into<String>, hint: impl Into<String>) -> Self {
        Failure { reason: reason.into(), hint: Some(hint.into()) }
    }

    /// A failure that tells all there is to tell.
    pub fn plain(reason: impl Into<String>) -> Self {
        Failure { reason: reason.into(), hint: None }
    }
}

/// The link as a machine sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// What is said is heard, unless the link breaks before.
    Up,
    /// Broken; another may come.
    Down,
    /// Another has come, and the two sides have yet to tell each other where they stand.
    Resyncing,
    /// Broken, and no other will come.
    Lost,
}

#[cfg(test)]
mod handover_tests;
#[cfg(test)]
mod patience_tests;
#[cfg(test)]
mod takeover_tests;
