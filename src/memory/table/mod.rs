//! The destination's table of page states, in shared memory so that it outlives this process.
//!
//! One 16-bit word per page (512 KiB per GiB), changed only by compare-and-exchange. Since stage,
//! waiting bit and version share one word, all changes to a page have one total order: either the
//! one who finishes a page sees that somebody waits for it, or the one who would wait sees that it
//! is finished. The orderings are Acquire on load and AcqRel on change: who sees a page as Current
//! also sees everything done before it was finished (within this process; the page's bytes
//! themselves are written by system calls).
//!
//! The switchover changes the meaning of all words that are neither needed nor missing at once, by a word
//! of its own ([`PageTable::freeze`], and `word.rs`). Whoever reads a page's word has read that one before:
//! so a page that is needed is never taken for a final one.

mod file;
mod word;

use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::MemoryError;
use crate::cores::cores;
use crate::page::{PageIndex, PageRange, PageSet, Version};

pub use file::PageTable;
pub use word::{PageState, Stage};

/// A thread is worth starting for the words of so many pages: 4 GiB, some milliseconds.
const PAGES_A_THREAD: usize = 1 << 20;
const MAX_THREADS: usize = 16;

/// What [`PageTable::claim`] gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The page is the caller's to write: end it with [`PageTable::finish`],
    /// [`PageTable::abandon`] or [`PageTable::spoil`].
    Claimed {
        /// What it was; a delta is good only against `previous.version` of a Stale page.
        previous: PageState,
    },
    /// This version, or a later one, is in place: drop what came.
    AlreadyThere,
    /// Somebody else is writing it.
    Busy,
}

/// What [`PageTable::want`] gives to the fault reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The content is here.
    Serve {
        /// It is known to be zero.
        zero: bool,
    },
    /// The content must come first; whoever finishes the page is told that it is waited for.
    Ask {
        /// Nobody waited for it before.
        first: bool,
    },
}

/// How many pages are at each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageCounts {
    /// [`Stage::Absent`].
    pub absent: u64,
    /// [`Stage::Stale`].
    pub stale: u64,
    /// [`Stage::Applying`].
    pub applying: u64,
    /// [`Stage::Current`].
    pub current: u64,
    /// [`Stage::Mapped`].
    pub mapped: u64,
}

impl PageTable {
    /// What is known of `page` at this moment.
    ///
    /// # Panics
    /// Here and in all methods: when the page is beyond the guest.
    pub fn state(&self, page: PageIndex) -> PageState {
        let switched_over = self.is_switched_over();
        decode(self.word(page).load(Ordering::Acquire), switched_over)
    }

    /// Takes `page` for writing `version` into it.
    pub fn claim(&self, page: PageIndex, version: Version) -> Claim {
        let claimed = self.change(page, |state| match state.stage {
            Stage::Absent => Some(PageState { stage: Stage::Applying, ..state }),
            Stage::Stale if state.version < version => {
                Some(PageState { stage: Stage::Applying, ..state })
            }
            _ => None,
        });
        match claimed {
            Ok(previous) => Claim::Claimed { previous },
            Err(PageState { stage: Stage::Applying, .. }) => Claim::Busy,
            Err(_) => Claim::AlreadyThere,
        }
    }

    /// The claimed page now holds `version`, as one of zeros when `zero`. `last`: nothing more is to
    /// come for it, it becomes Current. True when a thread of the guest waits for the page: map it
    /// at once if it is Current.
    ///
    /// # Panics
    /// When the page is not claimed; so for the next two.
    pub fn finish(&self, page: PageIndex, version: Version, zero: bool, last: bool) -> bool {
        let stage = if last { Stage::Current } else { Stage::Stale };
        self.end_claim(page, |state| PageState { stage, zero, version, ..state }).waiting
    }

    /// As claim and finish in one step, for a page of which the caller knows that it is a hole: it now
    /// holds `version`, zeros. Tells whether a thread waits for it; `None` where `claim` would have been
    /// refused.
    pub fn settle_hole(&self, page: PageIndex, version: Version, last: bool) -> Option<bool> {
        let stage = if last { Stage::Current } else { Stage::Stale };
        let settled = self.change(page, |state| {
            let older = match state.stage {
                Stage::Absent => true,
                Stage::Stale => state.version < version,
                _ => false,
            };
            older.then_some(PageState { stage, zero: true, version, ..state })
        });
        settled.ok().map(|before| before.waiting)
    }

    /// Gives up a claim before anything was written: the page is again what `claim` told.
    pub fn abandon(&self, page: PageIndex, previous: PageState) {
        self.end_claim(page, |state| PageState { waiting: state.waiting, ..previous });
    }

    /// Gives up a claim when the page was, or may have been, written wrongly: its content is unknown.
    pub fn spoil(&self, page: PageIndex) {
        self.end_claim(page, |state| PageState { waiting: state.waiting, ..PageState::UNKNOWN });
    }

    fn end_claim(&self, page: PageIndex, end: impl Fn(PageState) -> PageState) -> PageState {
        let before = self.change(page, |s| (s.stage == Stage::Applying).then(|| end(s)));
        before.unwrap_or_else(|state| panic!("{page:?} is not claimed: {state:?}"))
    }

    /// The switchover: every Stale page that is not in `need` is Current from now on; those in `need`
    /// stay as they are until their content comes. No page may be claimed meanwhile. Gives the
    /// pages that became Current while a thread of the guest waits: map them. May be repeated.
    ///
    /// # Errors
    /// [`MemoryError::UnknownContent`] for a page that is not in `need` and has no whole content: then the
    /// switchover has not come.
    pub fn freeze(&self, need: &PageSet) -> Result<Vec<PageIndex>, MemoryError> {
        assert_eq!(need.pages(), self.pages(), "a page set of another guest");
        let was_switched_over = self.is_switched_over();
        if !was_switched_over {
            for page in need.iter() {
                let superseded = |word| Some(word::supersede(word));
                let word = self.word(page);
                let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, superseded);
            }
        }
        self.switched_over().store(1, Ordering::Release);
        // Whoever marks a page from here on sees that; whoever marked one before is seen: see `want`.
        fence(Ordering::SeqCst);
        let mut waiting = Vec::new();
        for page in self.odd_pages_outside(need) {
            let is_awaited = word::is_held_and_awaited(self.word(page).load(Ordering::Acquire));
            let stage = self.state(page).stage;
            match stage {
                Stage::Absent | Stage::Applying => {
                    self.switched_over().store(u16::from(was_switched_over), Ordering::Release);
                    return Err(MemoryError::UnknownContent { page, stage });
                }
                // Taken to be needed by an earlier switchover.
                Stage::Stale => {
                    let current = |state| Some(PageState { stage: Stage::Current, ..state });
                    if self.change(page, current).is_ok_and(|before| before.waiting) {
                        waiting.push(page);
                    }
                }
                Stage::Current if is_awaited && !was_switched_over => waiting.push(page),
                Stage::Current | Stage::Mapped => {}
            }
        }
        Ok(waiting)
    }

    /// The pages outside `need` that are not simply held, in ascending order. Some nanoseconds for each page
    /// that is, and of a large guest several threads look: it stands still.
    fn odd_pages_outside(&self, need: &PageSet) -> Vec<PageIndex> {
        let threads = (self.words().len() / PAGES_A_THREAD).clamp(1, cores().min(MAX_THREADS));
        let share = self.words().len().div_ceil(threads).next_multiple_of(64).max(64);
        let parts = self.words().chunks(share).zip((0..).step_by(share));
        std::thread::scope(|scope| {
            let mut others: Vec<_> = parts
                .map(|(words, first)| move || odd_pages(first, words, need).collect())
                .collect();
            let own = others.pop();
            let others: Vec<_> = others.into_iter().map(|look| scope.spawn(look)).collect();
            let last: Vec<PageIndex> = own.map_or_else(Vec::new, |look| look());
            let mut found = Vec::new();
            for other in others {
                let part = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                found.extend::<Vec<PageIndex>>(part);
            }
            found.extend(last);
            found
        })
    }

    /// A thread of the guest touched `page`.
    pub fn want(&self, page: PageIndex) -> Want {
        let marked = self.change(page, |state| {
            (!state.is_complete() && !state.waiting).then_some(PageState { waiting: true, ..state })
        });
        match marked {
            Ok(_) => {
                // The switchover may have passed between the look at the page and the mark.
                fence(Ordering::SeqCst);
                let now = self.state(page);
                if now.is_complete() {
                    Want::Serve { zero: now.zero }
                } else {
                    Want::Ask { first: true }
                }
            }
            Err(state) if state.is_complete() => Want::Serve { zero: state.zero },
            Err(_) => Want::Ask { first: false },
        }
    }

    /// The guest has been given these pages: Current becomes Mapped, and nobody waits any more. Pages
    /// at other stages stay as they are.
    pub fn mark_mapped(&self, range: PageRange) {
        for page in range.pages() {
            let _ = self.change(page, |state| {
                state.is_complete().then_some(PageState {
                    stage: Stage::Mapped,
                    waiting: false,
                    ..state
                })
            });
        }
    }

    /// A Current page turned out to be a hole, since the guest's balloon gave it back: it is zero.
    pub fn note_hole(&self, page: PageIndex) {
        let _ = self
            .change(page, |state| state.is_complete().then_some(PageState { zero: true, ..state }));
    }

    /// The first maximal run in `within` of pages that `matches` accepts.
    pub fn next_run(
        &self,
        within: PageRange,
        matches: impl Fn(PageState) -> bool,
    ) -> Option<PageRange> {
        let mut pages = within.pages();
        let start = pages.find(|page| matches(self.state(*page)))?;
        let end = pages.find(|page| !matches(self.state(*page))).unwrap_or(within.end);
        Some(PageRange { start, end })
    }

    /// How many pages are at each stage, counted page by page: a moving picture while others change
    /// the table.
    pub fn counts(&self) -> StageCounts {
        let mut counts = StageCounts::default();
        let switched_over = self.is_switched_over();
        for word in self.words() {
            let count = match decode(word.load(Ordering::Relaxed), switched_over).stage {
                Stage::Absent => &mut counts.absent,
                Stage::Stale => &mut counts.stale,
                Stage::Applying => &mut counts.applying,
                Stage::Current => &mut counts.current,
                Stage::Mapped => &mut counts.mapped,
            };
            *count += 1;
        }
        counts
    }

    /// The pages whose content must still come: all that are not Current or Mapped.
    pub fn incomplete(&self) -> PageSet {
        self.collect(|state| !state.is_complete())
    }

    /// Those of `need` whose content at `version`, the last one, is not here yet: some may have overtaken
    /// the word that they are needed, and that word may come twice.
    pub fn missing_of(&self, need: &PageSet, version: Version) -> PageSet {
        let mut missing = need.clone();
        for page in need.iter() {
            let state = self.state(page);
            if state.is_complete() || (state.stage == Stage::Stale && state.version == version) {
                missing.remove(page);
            }
        }
        missing
    }

    /// The pages that hold `version` and may still be replaced by a later one.
    pub fn stale_at(&self, version: Version) -> PageSet {
        self.collect(|state| state.stage == Stage::Stale && state.version == version)
    }

    /// The pages of which nothing is known.
    pub fn absent(&self) -> PageSet {
        self.collect(|state| matches!(state.stage, Stage::Absent | Stage::Applying))
    }

    /// The pages that a thread of the guest waits for.
    pub fn waiting_pages(&self) -> PageSet {
        self.collect(|state| state.waiting)
    }

    /// After a restart: what was being written is Absent, and nobody is known to wait. Gives how
    /// many pages lost their content. The caller then wakes all of the guest's memory
    /// ([`super::Userfault::wake`]), so that every thread that waits faults, and is counted, again.
    pub fn recover(&self) -> u64 {
        let mut lost = 0;
        for page in self.all().pages() {
            let _ = self
                .change(page, |state| match state.stage {
                    Stage::Applying => Some(PageState::UNKNOWN),
                    _ => state.waiting.then_some(PageState { waiting: false, ..state }),
                })
                .map(|before| lost += u64::from(before.stage == Stage::Applying));
        }
        lost
    }

    fn collect(&self, matches: impl Fn(PageState) -> bool) -> PageSet {
        let mut set = PageSet::empty(self.pages());
        let mut from = PageIndex(0);
        while let Some(run) = self.next_run(PageRange { start: from, ..self.all() }, &matches) {
            set.insert_range(run);
            from = run.end;
        }
        set
    }

    fn all(&self) -> PageRange {
        PageRange::new(0, self.pages())
    }

    /// Replaces the state by what `change` makes of it, as one step. The state before, as `Err`
    /// when `change` would not have it.
    fn change(
        &self,
        page: PageIndex,
        change: impl Fn(PageState) -> Option<PageState>,
    ) -> Result<PageState, PageState> {
        let switched_over = self.is_switched_over();
        let changed = self.word(page).fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            change(decode(word, switched_over)).map(|state| state.encode(word, switched_over))
        });
        let before = |word| decode(word, switched_over);
        changed.map(before).map_err(before)
    }

    fn is_switched_over(&self) -> bool {
        self.switched_over().load(Ordering::Acquire) == 1
    }

    fn word(&self, page: PageIndex) -> &AtomicU16 {
        let word = self.words().get(page.0 as usize);
        word.unwrap_or_else(|| panic!("{page:?} beyond {} pages", self.pages()))
    }
}

/// Those of `words`, the first of which is that of page `first`, a multiple of 64, that are neither simply held nor in
/// `need`.
fn odd_pages<'a>(
    first: u64,
    words: &'a [AtomicU16],
    need: &'a PageSet,
) -> impl Iterator<Item = PageIndex> + 'a {
    (first..).step_by(64).zip(words.chunks(64)).flat_map(|(first, words)| {
        let odd = |word: &AtomicU16| word::oddity(word.load(Ordering::Acquire));
        let mut found = 0u64;
        if words.iter().fold(0, |all, word| all | odd(word)) != 0 {
            for (bit, word) in words.iter().enumerate() {
                found |= u64::from(odd(word) != 0) << bit;
            }
        }
        if found != 0 {
            found &= !need.word((first / 64) as usize);
        }
        std::iter::from_fn(move || {
            let bit = found.trailing_zeros();
            (found != 0).then(|| {
                found &= found - 1;
                PageIndex(first + u64::from(bit))
            })
        })
    })
}

/// Every word was checked when the table was opened, and only `encode` makes new ones.
fn decode(word: u16, switched_over: bool) -> PageState {
    PageState::decode(word, switched_over)
        .expect("a page table word that this program does not write")
}

#[cfg(test)]
mod tests;
