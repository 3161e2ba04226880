//! The pages of a small guest on their way: what the session does with them, without bytes.
//!
//! A page's content is a number that counts its writes. The sets are those of the real session: a
//! [`PrecopyPlan`] while the guest runs, a [`Pusher`] afterwards.

use crate::engine::heat::Heat;
use crate::engine::precopy::{PrecopyPlan, Remainder};
use crate::engine::pusher::{Pusher, PusherKind};
use crate::page::{PageIndex, PageRange, PageSet, Version};
use crate::wire::message::{Lacking, PackedSet};

pub(super) const PAGES: u64 = 12;
/// Pages in a message.
const BATCH: u64 = 4;

/// A push message: pages with their contents, and what each is a delta against.
#[derive(Clone, Debug)]
pub(super) struct PageMessage {
    version: Version,
    pages: Vec<(PageIndex, u32, Option<Version>)>,
}

/// The source's side.
pub(super) struct SourcePages {
    pub(super) now: Vec<u32>,
    plan: PrecopyPlan,
    /// Written since last collected.
    tracked: PageSet,
    bases: Vec<Option<Version>>,
    /// The round being sent, its next page, and its messages so far.
    round: Option<(Version, u64, u64)>,
    frozen: Option<(Version, PageSet, Pusher)>,
    without_base: PageSet,
}

impl SourcePages {
    pub(super) fn new() -> Self {
        SourcePages {
            now: vec![0; PAGES as usize],
            plan: PrecopyPlan::new(PAGES),
            tracked: PageSet::empty(PAGES),
            bases: vec![None; PAGES as usize],
            round: None,
            frozen: None,
            without_base: PageSet::empty(PAGES),
        }
    }

    pub(super) fn write(&mut self, page: u64) {
        assert!(self.frozen.is_none(), "the guest writes after it was frozen");
        self.now[(page % PAGES) as usize] += 1;
        self.tracked.insert(PageIndex(page % PAGES));
    }

    pub(super) fn begin_round(&mut self, version: Version) {
        assert!(self.round.is_none(), "two rounds at a time");
        self.plan.begin_round();
        self.round = Some((version, 0, 0));
    }

    pub(super) fn is_sending_round(&self) -> bool {
        self.round.is_some()
    }

    /// The round's sender has noticed that the link is broken.
    pub(super) fn break_round(&mut self) {
        self.round = None;
    }

    /// The next message of the round; the number of all of them when there is no other.
    pub(super) fn next_of_round(&mut self) -> Result<PageMessage, u64> {
        let (version, from, messages) = self.round.expect("a round");
        if from == PAGES {
            self.collect(PageRange::new(0, PAGES));
            self.round = None;
            return Err(messages);
        }
        let chunk = PageRange::new(from, from + BATCH);
        self.collect(chunk);
        let mut taken = Vec::new();
        self.plan.take(chunk, &mut taken);
        self.round = Some((version, from + BATCH, messages + 1));
        Ok(self.message(version, taken, true))
    }

    fn collect(&mut self, range: PageRange) {
        for page in range.pages() {
            if self.tracked.remove(page) {
                self.plan.found_mut().insert(page);
            }
        }
    }

    fn message(&mut self, version: Version, pages: Vec<PageIndex>, keep: bool) -> PageMessage {
        let mut message = PageMessage { version, pages: Vec::new() };
        for page in pages {
            let base = &mut self.bases[page.0 as usize];
            let usable = base.filter(|_| !self.without_base.contains(page));
            message.pages.push((page, self.now[page.0 as usize], usable));
            if keep {
                // The cache is full now and then.
                *base = (page.0 % 5 != 4).then_some(version);
            }
        }
        message
    }

    pub(super) fn forget(&mut self, pages: &[PageIndex]) {
        self.plan.mark_dirty(pages);
        pages.iter().for_each(|page| self.bases[page.0 as usize] = None);
    }

    pub(super) fn end_round(&mut self, held: &PackedSet) {
        assert!(self.round.is_none(), "the round is still being sent");
        let lost = self.plan.end_round_early(&held.unpack(PAGES).unwrap());
        lost.iter().for_each(|page| self.bases[page.0 as usize] = None);
    }

    pub(super) fn freeze(&mut self, version: Version) {
        assert!(self.round.is_none(), "the round is still being sent");
        self.collect(PageRange::new(0, PAGES));
        let need = Remainder::of(self.plan.unsent(), PageSet::full(PAGES)).need;
        let pusher = Pusher::new(need.clone(), Heat::new(PAGES), PusherKind::default());
        self.frozen = Some((version, need, pusher));
    }

    /// The guest runs on here: only its content matters any more.
    pub(super) fn thaw(&mut self) {
        self.frozen = None;
    }

    pub(super) fn flight(&self) -> (Version, PageSet) {
        let (version, need, _) = self.frozen.as_ref().expect("frozen");
        (*version, need.clone())
    }

    pub(super) fn send_all(&mut self) {
        let (_, need, pusher) = self.frozen.as_mut().expect("frozen");
        pusher.begin_again(need);
    }

    pub(super) fn send_lacking(&mut self, lacking: &Lacking) {
        let (_, _, pusher) = self.frozen.as_mut().expect("frozen");
        pusher.begin_again(&lacking.missing.unpack(PAGES).unwrap());
        self.without_base = lacking.without_base.unpack(PAGES).unwrap();
    }

    /// The next message after the freeze.
    pub(super) fn next_push(&mut self) -> Option<PageMessage> {
        let (version, _, pusher) = self.frozen.as_mut()?;
        let (version, mut pages) = (*version, Vec::new());
        pusher.take(BATCH as usize - 1, &|_| 1, &mut pages);
        (!pages.is_empty()).then(|| self.message(version, pages, false))
    }
}

/// The destination's side.
pub(super) struct DestinationPages {
    pub(super) held: Vec<Option<(Version, u32)>>,
    acknowledged: Version,
    applied: u64,
    awaited: Option<u64>,
    rejected: Vec<PageIndex>,
    /// Known with the flight.
    lacking: Option<PageSet>,
}

impl DestinationPages {
    pub(super) fn new() -> Self {
        DestinationPages {
            held: vec![None; PAGES as usize],
            acknowledged: Version::NONE,
            applied: 0,
            awaited: None,
            rejected: Vec::new(),
            lacking: None,
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.lacking.as_ref().is_some_and(PageSet::is_empty)
    }

    /// `damaged`: its first page does not pass its check.
    pub(super) fn apply(&mut self, message: &PageMessage, damaged: bool) {
        for (position, (page, content, base)) in message.pages.iter().enumerate() {
            let place = &mut self.held[page.0 as usize];
            if place.is_some_and(|(version, _)| version >= message.version) {
                continue;
            }
            if let Some(base) = base {
                let held = place.map(|(version, _)| version);
                assert_eq!(held, Some(*base), "{page:?}: a delta against what is not there");
            }
            if damaged && position == 0 && self.lacking.is_none() {
                self.rejected.push(*page);
                continue;
            }
            *place = Some((message.version, *content));
            if let Some(lacking) = &mut self.lacking {
                lacking.remove(*page);
            }
        }
        self.applied += 1;
    }

    pub(super) fn expect(&mut self, round: Version, messages: u64) {
        assert_eq!(round.0, self.acknowledged.0 + 1, "a round out of turn");
        self.awaited = Some(messages);
    }

    /// The round that is done now, and its rejected pages.
    pub(super) fn round_done(&mut self) -> Option<(Version, Vec<PageIndex>)> {
        (self.lacking.is_none() && self.awaited == Some(self.applied)).then(|| {
            self.end_round(Version(self.acknowledged.0 + 1));
            (self.acknowledged, std::mem::take(&mut self.rejected))
        })
    }

    fn end_round(&mut self, round: Version) {
        (self.acknowledged, self.applied, self.awaited) = (round, 0, None);
    }

    /// Ends the round and tells what is here of it.
    pub(super) fn held_of(&mut self, round: Version) -> PackedSet {
        assert!(
            round == self.acknowledged || round.0 == self.acknowledged.0 + 1,
            "a round out of turn"
        );
        self.end_round(round);
        self.rejected.clear();
        let mut held = PageSet::empty(PAGES);
        for (page, place) in self.held.iter().enumerate() {
            if place.is_some_and(|(version, _)| version == round) {
                held.insert(PageIndex(page as u64));
            }
        }
        PackedSet::pack(&held)
    }

    pub(super) fn switch_over(&mut self, version: Version, need: PageSet) {
        let mut lacking = need;
        for page in (0..PAGES).map(PageIndex) {
            match self.held[page.0 as usize] {
                Some((held, _)) if held == version => {
                    lacking.remove(page);
                }
                None => {
                    assert!(lacking.contains(page), "{page:?} has no content and is not needed")
                }
                Some(_) => {}
            }
        }
        // Rejected while they overtook the flight: asked for again, which a resync does too.
        self.rejected.clear();
        self.lacking = Some(lacking);
    }

    pub(super) fn lacking(&self) -> Lacking {
        let missing = self.lacking.clone().expect("after the flight");
        let mut without_base = missing.clone();
        for page in missing.iter() {
            if self.held[page.0 as usize].is_some() {
                without_base.remove(page);
            }
        }
        Lacking { missing: PackedSet::pack(&missing), without_base: PackedSet::pack(&without_base) }
    }
}
