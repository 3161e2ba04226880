//! One page's entry in the table: 16 bits.

use crate::page::Version;

/// How far a page of the destination has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Nothing is known of its content.
    Absent,
    /// An older version is in place; the guest cannot reach it.
    Stale,
    /// Somebody is writing it: its content is unknown until that is finished.
    Applying,
    /// Its content is final, the guest has not mapped it yet.
    Current,
    /// The guest owns it.
    Mapped,
}

/// All that the table knows of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState {
    /// How far it has come.
    pub stage: Stage,
    /// Its content is known to be zero and its place in the file may be a hole.
    pub zero: bool,
    /// A thread of the guest waits for it.
    pub waiting: bool,
    /// The version in place; while [`Stage::Applying`], the version that was in place before.
    pub version: Version,
}

const STAGE_BITS: u16 = 0b111;
const ZERO: u16 = 1 << 3;
const WAITING: u16 = 1 << 4;
const VERSION_SHIFT: u32 = 5;

impl PageState {
    /// The state of every page in a fresh table, and the meaning of a word of zeros.
    pub const UNKNOWN: PageState =
        PageState { stage: Stage::Absent, zero: false, waiting: false, version: Version::NONE };

    pub(super) fn encode(self) -> u16 {
        debug_assert!(self.version <= Version::MAX);
        let stage = match self.stage {
            Stage::Absent => 0,
            Stage::Stale => 1,
            Stage::Applying => 2,
            Stage::Current => 3,
            Stage::Mapped => 4,
        };
        let flag = |set: bool, bit: u16| if set { bit } else { 0 };
        stage
            | flag(self.zero, ZERO)
            | flag(self.waiting, WAITING)
            | self.version.0 << VERSION_SHIFT
    }

    /// `None` for a word that [`Self::encode`] never gives.
    pub(super) fn decode(word: u16) -> Option<Self> {
        let stage = match word & STAGE_BITS {
            0 => Stage::Absent,
            1 => Stage::Stale,
            2 => Stage::Applying,
            3 => Stage::Current,
            4 => Stage::Mapped,
            _ => return None,
        };
        Some(PageState {
            stage,
            zero: word & ZERO != 0,
            waiting: word & WAITING != 0,
            version: Version(word >> VERSION_SHIFT),
        })
    }

    /// Final content: nothing more is to come for the page.
    pub fn is_complete(self) -> bool {
        matches!(self.stage, Stage::Current | Stage::Mapped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_refused_or_comes_back_as_it_was() {
        for word in 0..=u16::MAX {
            match PageState::decode(word) {
                Some(state) => assert_eq!(state.encode(), word),
                None => assert!(word & STAGE_BITS > 4),
            }
        }
    }
}
