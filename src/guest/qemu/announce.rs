//! Where a guest is now, told to the switches of its network.

use qapi::qmp::{AnnounceParameters, announce_self};

/// The guest's network cards tell it five times within 1.2 s, which is what QEMU does by itself when it is
/// not told to wait.
const FIRST_MS: i64 = 50;
const STEP_MS: i64 = 100;
const LAST_MS: i64 = 550;
const ROUNDS: i64 = 5;

/// The command for a guest that runs here from now on.
pub(super) fn announcement() -> announce_self {
    announce_self(AnnounceParameters {
        id: None,
        interfaces: None,
        initial: FIRST_MS,
        max: LAST_MS,
        rounds: ROUNDS,
        step: STEP_MS,
    })
}
