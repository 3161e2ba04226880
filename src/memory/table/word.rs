//! One page's entry in the table: 16 bits.
//!
//! What was sent before the switchover is final unless it is needed again. So that the switchover need not
//! touch each page, a page that is in place is *held*, which means Stale before the switchover, and Current
//! from then on; what is needed again is *superseded*, which means Stale always.

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

const ABSENT: u16 = 0;
const HELD: u16 = 1;
const APPLYING: u16 = 2;
const CURRENT: u16 = 3;
const MAPPED: u16 = 4;
const SUPERSEDED: u16 = 5;

/// The word of a page that was held and is needed again; of any other the same word.
pub(super) fn supersede(word: u16) -> u16 {
    if word & STAGE_BITS == HELD { word & !STAGE_BITS | SUPERSEDED } else { word }
}

/// 0 for the word of a page that is held and that nobody waits for.
pub(super) fn oddity(word: u16) -> u16 {
    (word ^ HELD) & (STAGE_BITS | WAITING)
}

/// True for the word of a page that is held and that somebody waits for.
pub(super) fn is_held_and_awaited(word: u16) -> bool {
    oddity(word) == WAITING
}

impl PageState {
    /// The state of every page in a fresh table, and the meaning of a word of zeros.
    pub const UNKNOWN: PageState =
        PageState { stage: Stage::Absent, zero: false, waiting: false, version: Version::NONE };

    /// The word that takes the place of `before`, after the switchover or before it.
    pub(super) fn encode(self, before: u16, switched_over: bool) -> u16 {
        debug_assert!(self.version <= Version::MAX);
        let stage = match self.stage {
            Stage::Absent => ABSENT,
            Stage::Stale if switched_over || before & STAGE_BITS == SUPERSEDED => SUPERSEDED,
            Stage::Stale => HELD,
            Stage::Applying => APPLYING,
            Stage::Current => CURRENT,
            Stage::Mapped => MAPPED,
        };
        let flag = |set: bool, bit: u16| if set { bit } else { 0 };
        stage
            | flag(self.zero, ZERO)
            | flag(self.waiting, WAITING)
            | self.version.0 << VERSION_SHIFT
    }

    /// `None` for a word that [`Self::encode`] never gives.
    pub(super) fn decode(word: u16, switched_over: bool) -> Option<Self> {
        let stage = match word & STAGE_BITS {
            ABSENT => Stage::Absent,
            HELD if switched_over => Stage::Current,
            HELD | SUPERSEDED => Stage::Stale,
            APPLYING => Stage::Applying,
            CURRENT => Stage::Current,
            MAPPED => Stage::Mapped,
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
    fn every_word_is_refused_or_comes_back_with_the_same_meaning() {
        for word in 0..=u16::MAX {
            for switched_over in [false, true] {
                match PageState::decode(word, switched_over) {
                    Some(state) => {
                        let again = state.encode(word, switched_over);
                        assert_eq!(PageState::decode(again, switched_over), Some(state));
                        assert!(switched_over || again == word);
                    }
                    None => assert!(word & STAGE_BITS > SUPERSEDED),
                }
            }
        }
    }

    #[test]
    fn the_quick_looks_at_a_word_see_what_decoding_it_tells() {
        for word in 0..=u16::MAX {
            let Some(state) = PageState::decode(word, false) else { continue };
            let plain = state.stage == Stage::Stale && !state.waiting && supersede(word) != word;
            assert_eq!(oddity(word) == 0, plain);
            let superseded = supersede(word);
            assert_eq!(PageState::decode(superseded, false), Some(state));
            let later = PageState::decode(superseded, true).unwrap();
            assert_eq!(later.stage == Stage::Stale, state.stage == Stage::Stale);
        }
    }
}
