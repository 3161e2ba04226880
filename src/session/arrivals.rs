//! The destination's pages: what arrives is claimed in the page table, decoded, checked, written
//! through the alias, and only then given to the guest.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use std::time::{Duration, Instant};

use crate::codec::CodecCounts;
use crate::engine::Failure;
use crate::memory::{Claim, FaultServer, GuestMemory, MemoryError, PageState, PageTable, Stage};
use crate::page::{PageBytes, PageIndex, PageRange, PageSet, Version};
use crate::report::Counters;
use crate::wire::{Base, BaseFor, DecodeScratch, DecodedPage, Frame, FrameError};

/// What one message has brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Applied {
    /// The version of its pages; the same for all its frames.
    pub(super) version: Version,
    /// Pages that must be sent whole: a checksum did not match, or the base is not here.
    pub(super) rejected: Vec<PageIndex>,
    /// Where in the message a frame begins that builds on pages which have not come yet; it and what follows
    /// were left alone.
    pub(super) waits_from: Option<usize>,
}

/// A message that cannot be applied, which ends the migration.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApplyError {
    /// Not a sequence of frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The memory here failed: full, most likely.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Frames of several versions in one message, or none.
    #[error("a message of the source mixes versions, or is empty")]
    Mixed,
    /// A page cannot be both.
    #[error("the source says of {0} pages both that they are zero and that they will come")]
    NeedAndZero(u64),
    /// A page goes at most once in a version.
    #[error("a message of the source has more pages than the guest")]
    TooManyPages,
    /// A version that is not being sent.
    #[error("the source sent pages of version {0:?}, which is over or was never begun")]
    Version(Version),
}

impl From<ApplyError> for Failure {
    fn from(error: ApplyError) -> Self {
        match error {
            ApplyError::Memory(error) => error.into(),
            other => Failure::plain(other.to_string()),
        }
    }
}

/// Pages whose content is taken away by one call: so many are claimed at a time.
const CLEARED_TOGETHER_PAGES: u64 = 512;

/// How long it is tried to map pages, and how often.
const MAP_AGAIN_FOR: Duration = Duration::from_secs(30);
const MAP_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Applies messages of pages; shared by the threads that do so.
pub(super) struct Arrivals {
    memory: Arc<GuestMemory>,
    table: Arc<PageTable>,
    faults: OnceLock<Arc<FaultServer>>,
    /// The final version, once the table knows which pages are still needed. Read-locked while a
    /// message is applied: the switchover must not fall between a page's claim and its end.
    switchover: RwLock<Option<Version>>,
    /// Pages that must still come, after the switchover.
    remaining: AtomicU64,
    counters: Arc<Counters>,
}

impl Arrivals {
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        table: Arc<PageTable>,
        counters: Arc<Counters>,
    ) -> Self {
        Arrivals {
            memory,
            table,
            faults: OnceLock::new(),
            switchover: RwLock::new(None),
            remaining: AtomicU64::new(0),
            counters,
        }
    }

    /// As an earlier process has left them after the switchover to `version`: `table` says which pages
    /// must still come.
    pub(super) fn resumed(
        memory: Arc<GuestMemory>,
        table: Arc<PageTable>,
        counters: Arc<Counters>,
        version: Version,
    ) -> Self {
        let missing = table.incomplete().len();
        counters.remaining_pages.store(missing, Ordering::Relaxed);
        let arrivals = Arrivals::new(memory, table, counters);
        arrivals.remaining.store(missing, Ordering::Release);
        *arrivals.switchover.write().expect("no holder panics") = Some(version);
        arrivals
    }

    /// Who maps pages for the guest. Set once, before the first message.
    pub(super) fn serve_with(&self, faults: Arc<FaultServer>) {
        assert!(self.faults.set(faults).is_ok(), "set once");
    }

    /// What is known of each page.
    pub(super) fn table(&self) -> &PageTable {
        &self.table
    }

    /// True when the switchover has come and no page is missing any more.
    pub(super) fn is_complete(&self) -> bool {
        let switchover = self.switchover.read().expect("no holder panics");
        switchover.is_some() && self.remaining.load(Ordering::Acquire) == 0
    }

    /// Applies a push message or a fault reply. Before the switchover it may wait for pages that others bring:
    /// see [`Applied::waits_from`].
    pub(super) fn apply(
        &self,
        message: &[u8],
        may_wait: bool,
        scratch: &mut DecodeScratch,
    ) -> Result<Applied, ApplyError> {
        let switchover = self.switchover.read().expect("no holder panics");
        let mut applied = Applied::default();
        let (mut rest, mut pages) = (message, 0);
        while !rest.is_empty() {
            let (frame, behind) = Frame::parse(rest, self.memory.pages())?;
            if applied.version != Version::NONE && frame.version() != applied.version {
                return Err(ApplyError::Mixed);
            }
            applied.version = frame.version();
            if switchover.is_some_and(|version| frame.version() != version) {
                return Err(ApplyError::Version(frame.version()));
            }
            if may_wait && switchover.is_none() && !self.has_kin_of(&frame) {
                applied.waits_from = Some(message.len() - rest.len());
                break;
            }
            // Runs of zero pages take a few bytes each, and a walk over all their pages.
            pages = frame.page_count().saturating_add(pages);
            if pages > self.memory.pages() {
                return Err(ApplyError::TooManyPages);
            }
            let mut counts = CodecCounts::default();
            counts.add(frame.codec(), frame.page_count(), frame.len_bytes() as u64);
            self.counters.add_frames(&counts);
            let last = switchover.is_some();
            match frame.zero_runs() {
                Some(runs) => {
                    for run in runs {
                        self.apply_zero_run(run, frame.version(), last)?;
                    }
                }
                None => self.apply_frame(&frame, last, scratch, &mut applied.rejected)?,
            }
            rest = behind;
        }
        if applied.version == Version::NONE {
            return Err(ApplyError::Mixed);
        }
        Ok(applied)
    }

    /// True when the pages are here on which the first frame of a message builds.
    pub(super) fn is_ready(&self, message: &[u8]) -> bool {
        let parsed = Frame::parse(message, self.memory.pages());
        // What cannot be read is refused when it is applied.
        parsed.map_or(true, |(frame, _)| self.has_kin_of(&frame))
    }

    fn has_kin_of(&self, frame: &Frame<'_>) -> bool {
        frame.kin().all(|kin| self.is_kin_there(kin))
    }

    fn apply_frame(
        &self,
        frame: &Frame<'_>,
        last: bool,
        scratch: &mut DecodeScratch,
        rejected: &mut Vec<PageIndex>,
    ) -> Result<(), ApplyError> {
        let version = frame.version();
        let mut claims: Vec<Option<(PageIndex, PageState)>> = Vec::new();
        for entry in frame.pages() {
            let claimed = match self.table.claim(entry.page, version) {
                Claim::Claimed { previous } => {
                    let fits =
                        entry.base.is_none_or(|base| self.is_there(base, entry.page, previous));
                    if !fits {
                        self.table.abandon(entry.page, previous);
                        rejected.push(entry.page);
                    }
                    fits.then_some((entry.page, previous))
                }
                // Busy: another copy of the same content is being applied by another thread.
                Claim::AlreadyThere | Claim::Busy => {
                    self.counters.duplicate_pages.fetch_add(1, Ordering::Relaxed);
                    None
                }
            };
            claims.push(claimed);
        }
        if claims.iter().all(Option::is_none) {
            return Ok(());
        }
        let base_of = |used_by: BaseFor, base: Base, into: &mut PageBytes| {
            let is_wanted = match used_by {
                BaseFor::Page(position) => claims[position].is_some(),
                BaseFor::Frame => self.is_kin_there(base),
            };
            if !is_wanted {
                return false;
            }
            let read = self.memory.try_read_page(base.page, into);
            if let Err(error) = &read {
                tracing::warn!(%error, "pages are asked for again: page {} is gone", base.page);
            }
            read.is_ok()
        };
        let pages = match frame.decode(scratch, base_of) {
            Ok(pages) => pages,
            Err(error) => {
                for (page, previous) in claims.into_iter().flatten() {
                    self.table.abandon(page, previous);
                    rejected.push(page);
                }
                // Flipped bits, and a base that was overtaken, are mended by sending again; anything
                // else is not a frame.
                return match error {
                    FrameError::Checksum | FrameError::Body(_) | FrameError::BaseMissing { .. } => {
                        Ok(())
                    }
                    other => Err(other.into()),
                };
            }
        };
        let mut arrived = Vec::with_capacity(claims.len());
        let mut position = 0;
        while position < claims.len() {
            let Some((page, previous)) = claims[position] else {
                position += 1;
                continue;
            };
            let (count, zero) = match pages.get(position) {
                DecodedPage::Bytes(_) => {
                    let contents = pages.bytes_from(position);
                    let count = neighbours(&claims[position..]).min(contents.len());
                    if let Err(error) = self.memory.write_pages(page, &contents[..count]) {
                        let (spoilt, untouched) = claims[position..].split_at(count);
                        for (page, _) in spoilt.iter().flatten() {
                            self.table.spoil(*page);
                        }
                        for (page, previous) in untouched.iter().flatten() {
                            self.table.abandon(*page, *previous);
                        }
                        self.count_arrivals(arrived.len() as u64, last);
                        return Err(error.into());
                    }
                    (count, false)
                }
                DecodedPage::Unchanged => (1, previous.zero),
                DecodedPage::NoBase | DecodedPage::WrongBase => {
                    self.table.abandon(page, previous);
                    rejected.push(page);
                    position += 1;
                    continue;
                }
                DecodedPage::Zero => unreachable!("frames of zero pages are applied by runs"),
            };
            for (page, _) in claims[position..][..count].iter().flatten() {
                self.table.finish(*page, version, zero, last);
                arrived.push(*page);
            }
            position += count;
        }
        self.count_arrivals(arrived.len() as u64, last);
        if last {
            self.map(&arrived)?;
        }
        Ok(())
    }

    /// True when this content is here, to be built on for `page`, which is claimed and was `previous`.
    ///
    /// Of a delta that settles it, since the page is the claimer's. The original of a copy is not: until the
    /// switchover nothing replaces it while the copy may be on its way (the source makes none of a page that it
    /// sends at the same version), and afterwards the guest may write to it at any moment. So it
    /// is the check of the whole resulting page, of 64 bits, that tells whether what was read was still it.
    fn is_there(&self, base: Base, page: PageIndex, previous: PageState) -> bool {
        let state = if base.page == page { previous } else { self.table.state(base.page) };
        let whole = match base.page == page {
            true => state.stage == Stage::Stale,
            false => state.stage == Stage::Stale || state.is_complete(),
        };
        // A page of zeros may be a hole, which reading would fill.
        whole && !(state.zero && base.page != page) && state.version == base.version
    }

    /// The same of what all pages of a frame build on. Until the switchover nothing replaces it while the frame may be
    /// on its way; whatever comes of it is held against the frame's checksum, which covers every byte of the pages.
    fn is_kin_there(&self, kin: Base) -> bool {
        let state = self.table.state(kin.page);
        let whole = state.stage == Stage::Stale || state.is_complete();
        whole && !state.zero && state.version == kin.version
    }

    /// Makes `run` zero. Whether a page has content is asked of its file, not of the table: a page that an
    /// earlier process was writing when it was killed counts as absent, and yet there is something.
    fn apply_zero_run(
        &self,
        run: PageRange,
        version: Version,
        last: bool,
    ) -> Result<(), MemoryError> {
        let mut at = run.start;
        while at < run.end {
            let rest = PageRange { start: at, end: run.end };
            let content = self.memory.first_populated(rest)?.unwrap_or(run.end);
            self.settle_holes(PageRange { start: at, end: content }, version, last)?;
            at = PageIndex((content.0 + CLEARED_TOGETHER_PAGES).min(run.end.0));
            self.clear(PageRange { start: content, end: at }, version, last)?;
        }
        Ok(())
    }

    /// The pages of `holes` are holes already: they only have to be known as zero.
    fn settle_holes(
        &self,
        holes: PageRange,
        version: Version,
        last: bool,
    ) -> Result<(), MemoryError> {
        let (mut settled, mut waited_for) = (0, Vec::new());
        for page in holes.pages() {
            if let Some(waiting) = self.table.settle_hole(page, version, last) {
                settled += 1;
                if waiting {
                    waited_for.push(page);
                }
            }
        }
        let duplicates = holes.len() - settled;
        self.counters.duplicate_pages.fetch_add(duplicates, Ordering::Relaxed);
        self.count_arrivals(settled, last);
        if last { self.map(&waited_for) } else { Ok(()) }
    }

    /// Takes the content of the pages of `piece` away, of as many as can be claimed.
    fn clear(&self, piece: PageRange, version: Version, last: bool) -> Result<(), MemoryError> {
        let mut at = piece.start;
        while at < piece.end {
            let claim = |page: &PageIndex| {
                matches!(self.table.claim(*page, version), Claim::Claimed { .. })
            };
            let rest = PageRange { start: at, end: piece.end };
            let count = rest.pages().take_while(claim).count() as u64;
            let claimed = PageRange::new(at.0, at.0 + count);
            at = claimed.end;
            if claimed.is_empty() {
                self.counters.duplicate_pages.fetch_add(1, Ordering::Relaxed);
                at.0 += 1;
                continue;
            }
            if let Err(error) = self.memory.clear(claimed) {
                claimed.pages().for_each(|page| self.table.spoil(page));
                return Err(error);
            }
            let finish = |page: &PageIndex| self.table.finish(*page, version, true, last);
            let waited_for: Vec<PageIndex> = claimed.pages().filter(finish).collect();
            self.count_arrivals(claimed.len(), last);
            if last {
                self.map(&waited_for)?;
            }
        }
        Ok(())
    }

    /// Maps pages that are here. A host that is short of memory for page tables may have some again: giving up
    /// loses a guest all of whose pages may come.
    fn map(&self, pages: &[PageIndex]) -> Result<(), MemoryError> {
        let Some(faults) = self.faults.get() else { return Ok(()) };
        let begin = Instant::now();
        loop {
            match faults.map_arrived(pages) {
                Err(error)
                    if !matches!(error, MemoryError::ProcessGone)
                        && begin.elapsed() < MAP_AGAIN_FOR =>
                {
                    tracing::warn!(%error, "pages that have come are mapped again");
                    std::thread::sleep(MAP_AGAIN_AFTER);
                }
                done => return done,
            }
        }
    }

    fn count_arrivals(&self, pages: u64, last: bool) {
        if last && pages > 0 {
            let left = self.remaining.fetch_sub(pages, Ordering::AcqRel) - pages;
            self.counters.remaining_pages.store(left, Ordering::Relaxed);
        }
    }

    /// The switchover: from here on exactly the pages of `need` must still come, at `version`, those
    /// of `zero` are zero, and all others are as the guest left them. Gives how many must come.
    pub(super) fn switch_over(
        &self,
        version: Version,
        need: &PageSet,
        zero: &PageSet,
    ) -> Result<u64, ApplyError> {
        let mut both = need.clone();
        both.intersect_with(zero);
        if !both.is_empty() {
            return Err(ApplyError::NeedAndZero(both.len()));
        }
        let mut switchover = self.switchover.write().expect("no holder panics");
        let missing = self.table.missing_of(need, version);
        for run in zero.runs() {
            self.apply_zero_run(run, version, false)?;
        }
        let waited_for = self.table.freeze(&missing)?;
        self.remaining.store(missing.len(), Ordering::Release);
        self.counters.remaining_pages.store(missing.len(), Ordering::Relaxed);
        *switchover = Some(version);
        self.map(&waited_for)?;
        Ok(missing.len())
    }
}

/// How many of the first claims are of pages that follow each other.
fn neighbours(claims: &[Option<(PageIndex, PageState)>]) -> usize {
    let Some(Some((first, _))) = claims.first() else { return 0 };
    let follows = |(distance, claim): (u64, &Option<(PageIndex, PageState)>)| {
        claim.is_some_and(|(page, _)| page.0 == first.0 + distance)
    };
    (0..).zip(claims).take_while(|numbered| follows(*numbered)).count()
}

#[cfg(test)]
mod tests;
