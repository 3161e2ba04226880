//! Which page goes next after the switchover.
//!
//! The guest's RAM at the source is frozen, so a page is sent once, either because a guest thread
//! waits for it, or in the same flight because it is likely to be wanted next (the *bundle*), or in the
//! pusher's order. All pages must go in the end; a [`Policy`] decides only in which order.
//!
//! * [`PusherKind::Linear`]: by address.
//! * [`PusherKind::Heat`]: what the guest wrote to most lately, first.
//! * [`PusherKind::Bubbling`]: outwards from the last faults.
//! * [`PusherKind::Trend`]: along the streams that the faults of each thread show.
//! * [`PusherKind::Stall`]: streams too, else by how much waiting a byte sent is expected to avoid.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

use super::heat::{CHUNK_PAGES, Heat};
use crate::page::{PageIndex, PageRange, PageSet};
pub use crate::wire::message::Wanted;

mod bubbling;
mod budget;
mod heat;
mod linear;
mod stall;
mod streams;
mod trend;
mod unsent;

pub use budget::BundleBudget;
pub use unsent::Unsent;

/// Pages that go first at most. To find them takes a look at the heat of each page, and a search in what was sent for each
/// that is asked about.
pub const MAX_FIRST: usize = 1 << 16;
/// It is asked of so many of the hottest pages for each that is to go first, whether they may.
const ASKED_PER_PAGE: usize = 4;
/// Of a page, with that of one that is cold.
const HEATS: usize = 1 << u8::BITS;

/// What a policy sees of the pages that are left.
pub struct Left<'a> {
    /// Not sent yet.
    pub unsent: &'a Unsent,
    /// What the guest wrote to before it was frozen.
    pub heat: &'a Heat,
    /// What a page is expected to cost on the link.
    pub encoded_bytes: &'a dyn Fn(PageIndex) -> u32,
}

/// An order of pages. It sees faults and what is left, and may not touch the account of what is sent:
/// whatever it says, each page goes once.
pub trait Policy: Send + fmt::Debug {
    /// A thread waits for a page, which is on its way now. Appends the pages that are likely to be wanted
    /// next, the likeliest first, at most `room`; those that were sent already are dropped.
    fn fault(&mut self, wanted: Wanted, left: &Left<'_>, room: usize, bundle: &mut Vec<PageIndex>);

    /// The run whose unsent pages go next, as many as there is room for. It must hold one at least;
    /// otherwise, or when there is nothing to say, the pusher goes on by address.
    fn next(&mut self, left: &Left<'_>) -> Option<PageRange>;

    /// How the bundles have done so far.
    fn bundles(&self) -> BundleStats {
        BundleStats::default()
    }
}

/// Whether the pages that went along with replies were wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BundleStats {
    /// Bundles after which the same thread went on into the bundle or just behind it.
    pub useful: u64,
    /// Bundles after which it did not.
    pub useless: u64,
}

/// The policies by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PusherKind {
    /// By address.
    Linear,
    /// By writes seen in pre-copy.
    Heat,
    /// Around the last faults.
    Bubbling,
    /// Along streams of faults.
    Trend,
    /// By expected stall avoided per byte.
    #[default]
    Stall,
}

impl PusherKind {
    /// All of them.
    pub const ALL: [PusherKind; 5] = [
        PusherKind::Linear,
        PusherKind::Heat,
        PusherKind::Bubbling,
        PusherKind::Trend,
        PusherKind::Stall,
    ];

    /// The name in options and tables.
    pub fn name(self) -> &'static str {
        match self {
            PusherKind::Linear => "linear",
            PusherKind::Heat => "heat",
            PusherKind::Bubbling => "bubbling",
            PusherKind::Trend => "trend",
            PusherKind::Stall => "stall",
        }
    }

    fn policy(self) -> Box<dyn Policy> {
        match self {
            PusherKind::Linear => Box::new(linear::Linear),
            PusherKind::Heat => Box::<heat::Hottest>::default(),
            PusherKind::Bubbling => Box::<bubbling::Bubbling>::default(),
            PusherKind::Trend => Box::<trend::Trend>::default(),
            PusherKind::Stall => Box::<stall::Stall>::default(),
        }
    }
}

impl fmt::Display for PusherKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PusherKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = Self::ALL.into_iter().find(|kind| kind.name() == text);
        kind.ok_or_else(|| format!("one of {}", Self::ALL.map(PusherKind::name).join(", ")))
    }
}

/// The pages that the destination still needs, and the order in which they go.
#[derive(Debug)]
pub struct Pusher {
    need: PageSet,
    unsent: Unsent,
    /// These go before the policy is asked.
    first: VecDeque<PageIndex>,
    heat: Heat,
    policy: Box<dyn Policy>,
}

impl Pusher {
    /// Everything in `need` is still to be sent.
    pub fn new(need: PageSet, heat: Heat, kind: PusherKind) -> Self {
        let (unsent, first) = (Unsent::new(&need), VecDeque::new());
        Pusher { unsent, first, need, heat, policy: kind.policy() }
    }

    /// What was sent may be lost, and the destination lacks exactly `missing`: of what was needed, these
    /// are unsent now.
    pub fn begin_again(&mut self, missing: &PageSet) {
        let mut unsent = missing.clone();
        unsent.intersect_with(&self.need);
        self.unsent = Unsent::new(&unsent);
    }

    /// Pages not sent yet.
    pub fn left(&self) -> u64 {
        self.unsent.len()
    }

    /// How the bundles have done so far.
    pub fn bundles(&self) -> BundleStats {
        self.policy.bundles()
    }

    /// A guest thread waits for a page: true when its content is to be sent now, even if it was sent
    /// before (it may be lost on the way); false for a page that the destination was never told to
    /// need. Appends to `bundle` the at most `room` pages that go behind it in the same flight.
    pub fn request(
        &mut self,
        wanted: Wanted,
        room: usize,
        encoded_bytes: &dyn Fn(PageIndex) -> u32,
        bundle: &mut Vec<PageIndex>,
    ) -> bool {
        if !self.need.contains(wanted.page) {
            return false;
        }
        self.unsent.remove(wanted.page);
        let left = Left { unsent: &self.unsent, heat: &self.heat, encoded_bytes };
        let mut likely = Vec::new();
        self.policy.fault(wanted, &left, room, &mut likely);
        bundle.extend(likely.into_iter().take(room).filter(|page| self.unsent.remove(*page)));
        true
    }

    /// A page is wanted, but by no thread that the policy could learn from: true when it is to be sent now.
    /// One that was sent is on its way, and not sent again unless it is overdue.
    pub fn give(&mut self, wanted: Wanted) -> bool {
        let is_overdue = wanted.thread == Wanted::OVERDUE && self.need.contains(wanted.page);
        self.unsent.remove(wanted.page) || is_overdue
    }

    /// Whatever the policy says, the hottest of the pages that `may` go first, at most `count` and [`MAX_FIRST`]; fewer where
    /// most of the hottest may not. Meant for the freeze, while nothing is sent yet and the guest stands still.
    pub fn hottest_first(&mut self, count: usize, may: &dyn Fn(PageIndex) -> bool) {
        self.first.clear();
        if count == 0 {
            return;
        }
        let count = count.min(MAX_FIRST);
        let most_asked = count * ASKED_PER_PAGE;
        let mut pages_of_heat = [0usize; HEATS];
        for page in self.hot_pages() {
            pages_of_heat[usize::from(self.heat.of(page))] += 1;
        }
        // A counting sort of those that may be asked about: each heat's place in their order, the hottest heat first.
        let mut heats: Vec<u8> = (1..=u8::MAX).collect();
        heats.sort_unstable_by_key(|heat| Reverse((heat.count_ones(), *heat)));
        let (mut next, mut end, mut asked) = ([0; HEATS], [0; HEATS], 0);
        for heat in heats.into_iter().map(usize::from) {
            next[heat] = asked;
            asked += pages_of_heat[heat].min(most_asked - asked);
            end[heat] = asked;
        }
        let mut hottest = vec![PageIndex(0); asked];
        for page in self.hot_pages() {
            let heat = usize::from(self.heat.of(page));
            if next[heat] < end[heat] {
                hottest[next[heat]] = page;
                next[heat] += 1;
            }
        }
        self.first = hottest.into_iter().filter(|page| may(*page)).take(count).collect();
    }

    /// Needed pages that have been written to lately, by address.
    fn hot_pages(&self) -> impl Iterator<Item = PageIndex> {
        let chunks = (0..self.need.pages()).step_by(CHUNK_PAGES as usize).map(PageIndex);
        let warm = chunks.filter(|start| !self.heat.is_cold(*start));
        warm.flat_map(|start| self.need.iter_in(PageRange::new(start.0, start.0 + CHUNK_PAGES)))
            .filter(|page| self.heat.of(*page) > 0)
    }

    /// The next at most `count` pages in the pusher's order, into `into` (cleared first).
    pub fn take(
        &mut self,
        count: usize,
        encoded_bytes: &dyn Fn(PageIndex) -> u32,
        into: &mut Vec<PageIndex>,
    ) {
        into.clear();
        while into.len() < count
            && let Some(page) = self.first.pop_front()
        {
            if self.unsent.remove(page) {
                into.push(page);
            }
        }
        while into.len() < count && !self.unsent.is_empty() {
            let left = Left { unsent: &self.unsent, heat: &self.heat, encoded_bytes };
            let run = self.policy.next(&left).unwrap_or(PageRange::new(0, 0));
            if !self.take_run(run, count, into) {
                self.take_run(PageRange::new(0, self.unsent.pages()), count, into);
            }
        }
    }

    fn take_run(&mut self, run: PageRange, count: usize, into: &mut Vec<PageIndex>) -> bool {
        let before = into.len();
        let mut at = run.start;
        while into.len() < count {
            let Some(page) = self.unsent.first_from(at).filter(|page| *page < run.end) else {
                break;
            };
            self.unsent.remove(page);
            into.push(page);
            at = PageIndex(page.0 + 1);
        }
        into.len() > before
    }
}

#[cfg(test)]
mod tests;
