//! Pages into frames: each page by the codec that suits it, pages of one kind together.

use super::frame::{Base, page_check};
use super::limits::{MAX_PAGES_PER_FRAME, MAX_RUNS_PER_FRAME};
use super::page_list;
use super::write::FrameParts;
use crate::codec::delta::{DeltaPacker, LineMask, UnitMask, WordMask};
use crate::codec::kin::Kin;
use crate::codec::ladder::PageCodec;
use crate::codec::pack::{Compression, Compressor};
use crate::codec::xbzrle::RunPacker;
use crate::codec::{CodecChoice, CodecCounts, CodecId, Content, DeltaCodec, Packing, is_zero};
use crate::page::{PageBytes, PageIndex, PageRange, Version};

/// With more changed words than this a page is sent whole: beside the likeness to its neighbours, the
/// compressor then also has the unchanged words to find matches in, and no mask to carry.
const MAX_DELTA_WORDS: usize = WordMask::UNITS_PER_PAGE * 3 / 4;

/// A page to be sent.
#[derive(Clone, Copy)]
pub struct PageToSend<'a> {
    /// Which page.
    pub page: PageIndex,
    /// Its content: a copy that does not change any more.
    pub bytes: &'a PageBytes,
    /// An older version that the other side is known to hold, and its content.
    pub base: Option<(Version, &'a PageBytes)>,
}

/// A page to be sent, of which only a fingerprint of what the other side holds is known.
#[derive(Clone, Copy)]
pub struct LinesToSend<'a> {
    /// Which page.
    pub page: PageIndex,
    /// Its content.
    pub bytes: &'a PageBytes,
    /// The older version that the other side is known to hold.
    pub base: Version,
    /// The lines whose hash is not that of the older version: see
    /// [`crate::codec::LineFingerprint::changed`].
    pub changed: LineMask,
}

/// A page that has the content of another one at the other side.
#[derive(Clone, Copy)]
pub struct CopyToSend<'a> {
    /// Which page.
    pub page: PageIndex,
    /// Its content.
    pub bytes: &'a PageBytes,
    /// The other page, and which version of it has this content, byte by byte.
    pub original: Base,
}

/// Makes frames. Keeps its buffers: one for each thread that encodes.
#[derive(Default)]
pub struct FrameEncoder {
    choice: CodecChoice,
    zero: Vec<PageIndex>,
    unchanged: Listed,
    words: Deltas<{ WordMask::BYTES }, { WordMask::UNIT_BYTES }>,
    lines: Deltas<{ LineMask::BYTES }, { LineMask::UNIT_BYTES }>,
    old_words: Vec<u8>,
    runs: Runs,
    whole: Vec<PageIndex>,
    /// What `whole` builds on, and its content, page after page, unless it goes as it is.
    block: Vec<u8>,
    kin_bytes: usize,
    kin: Vec<Base>,
    kin_runs: Vec<PageRange>,
    copies: Listed,
    coder: Coder,
}

/// Pages with what a frame's header says about each.
#[derive(Default)]
struct Listed {
    pages: Vec<PageIndex>,
    bases: Vec<Base>,
    checks: Vec<u64>,
}

#[derive(Default)]
struct Deltas<const MASK: usize, const UNIT: usize> {
    list: Listed,
    packer: DeltaPacker<MASK, UNIT>,
    packed: Vec<u8>,
}

#[derive(Default)]
struct Runs {
    list: Listed,
    packer: RunPacker,
    packed: Vec<u8>,
}

/// What turns content into a frame.
#[derive(Default)]
struct Coder {
    compressor: Compressor,
    coded: Vec<u8>,
    runs: Vec<PageRange>,
}

impl FrameEncoder {
    /// An encoder that codes as `choice` says.
    pub fn new(choice: CodecChoice) -> Self {
        FrameEncoder { choice, ..FrameEncoder::default() }
    }

    /// Codes as `choice` says from the next frame on.
    pub fn set_choice(&mut self, choice: CodecChoice) {
        self.choice = choice;
    }

    /// Appends to `out` the frames, at most one of each kind, that give `pages` their content, which
    /// is that of `version`. Each page is in exactly one of them; a page whose content is
    /// that of its base is told as unchanged, for a few bits. Whole pages build on `kin` where the choice is
    /// [`PageCodec::ZstdKin`]: the caller knows that these do not change at the other side between their arrival
    /// and that of this frame. Gives pages and bytes by codec.
    ///
    /// # Panics
    /// When there are more than [`MAX_PAGES_PER_FRAME`] pages, when they do not ascend, or when a base is
    /// not older than `version`, or kin newer.
    pub fn encode(
        &mut self,
        version: Version,
        pages: &[PageToSend<'_>],
        kin: &Kin,
        out: &mut Vec<u8>,
    ) -> CodecCounts {
        check_batch(version, pages.iter().map(|page| page.page));
        self.sort(version, pages, kin);
        let mut counts = CodecCounts::default();
        if !self.zero.is_empty() {
            page_list::collect(self.zero.iter().copied(), &mut self.coder.runs);
            put_zero_frame(version, &self.coder.runs, out, &mut counts);
        }
        self.coder.put_list(CodecId::Unchanged, version, &self.unchanged, out, &mut counts);
        self.put_words(version, out, &mut counts);
        self.put_runs(version, out, &mut counts);
        self.put_whole(version, pages, kin, out, &mut counts);
        counts
    }

    /// Appends frames that say that all pages of `runs` are zero in `version`: a few bytes for each
    /// run, however long. The runs ascend; empty ones are left out.
    ///
    /// # Panics
    /// When the runs overlap or do not ascend.
    pub fn encode_zero_runs(
        &mut self,
        version: Version,
        runs: &[PageRange],
        out: &mut Vec<u8>,
    ) -> CodecCounts {
        assert!(runs.is_sorted_by(|a, b| a.end <= b.start), "runs must ascend");
        let mut counts = CodecCounts::default();
        let mut runs = runs.iter().copied().filter(|run| !run.is_empty()).peekable();
        while runs.peek().is_some() {
            self.coder.runs.clear();
            self.coder.runs.extend(runs.by_ref().take(MAX_RUNS_PER_FRAME));
            put_zero_frame(version, &self.coder.runs, out, &mut counts);
        }
        counts
    }

    /// Appends a frame with the changed lines of `pages`. Pages with most lines changed are better sent
    /// whole.
    ///
    /// # Panics
    /// As [`Self::encode`].
    pub fn encode_lines(
        &mut self,
        version: Version,
        pages: &[LinesToSend<'_>],
        out: &mut Vec<u8>,
    ) -> CodecCounts {
        check_batch(version, pages.iter().map(|page| page.page));
        self.lines.clear();
        for &LinesToSend { page, bytes, base, changed } in pages {
            assert!(base < version, "{page:?} has a base no older than itself");
            self.lines.push(Base { page, version: base }, &changed, bytes);
        }
        let mut counts = CodecCounts::default();
        let how = self.choice.delta.compression();
        self.coder.put_deltas(Content::Lines, how, version, &mut self.lines, out, &mut counts);
        counts
    }

    /// Appends a frame that says of which other pages `pages` are copies. The caller has compared
    /// them byte by byte, and knows that the originals do not change at the other side before this arrives.
    ///
    /// # Panics
    /// When there are more than [`MAX_PAGES_PER_FRAME`] pages, when they do not ascend, or when an original is
    /// newer than `version` or the page itself.
    pub fn encode_copies(
        &mut self,
        version: Version,
        pages: &[CopyToSend<'_>],
        out: &mut Vec<u8>,
    ) -> CodecCounts {
        check_batch(version, pages.iter().map(|page| page.page));
        self.copies.clear();
        for &CopyToSend { page, bytes, original } in pages {
            assert!(original.version <= version && original.page != page, "copy of {original:?}");
            self.copies.pages.push(page);
            self.copies.bases.push(original);
            self.copies.checks.push(page_check(page, bytes));
        }
        let mut counts = CodecCounts::default();
        self.coder.put_list(CodecId::Copy, version, &self.copies, out, &mut counts);
        counts
    }

    /// Decides for each page how it goes.
    fn sort(&mut self, version: Version, pages: &[PageToSend<'_>], kin: &Kin) {
        self.zero.clear();
        self.unchanged.clear();
        self.words.clear();
        self.old_words.clear();
        self.runs.list.clear();
        self.runs.packer.clear();
        self.whole.clear();
        self.block.clear();
        if matches!(self.choice.page, PageCodec::ZstdKin { .. }) {
            self.block.extend_from_slice(&kin.bytes);
        }
        self.kin_bytes = self.block.len();
        for &PageToSend { page, bytes, base } in pages {
            if is_zero(bytes) {
                self.zero.push(page);
                continue;
            }
            if let Some((base_version, base_bytes)) = base {
                assert!(base_version < version, "{page:?} has a base no older than itself");
                let base = Base { page, version: base_version };
                let mask = WordMask::between(base_bytes, bytes);
                let words = mask.count();
                if words == 0 {
                    self.unchanged.pages.push(page);
                    self.unchanged.bases.push(base);
                    continue;
                }
                if self.choice.delta == DeltaCodec::Xbzrle {
                    if self.runs.packer.push(base_bytes, bytes) {
                        self.runs.list.push(base, bytes);
                        continue;
                    }
                } else if self.choice.delta != DeltaCodec::Off && words <= MAX_DELTA_WORDS {
                    self.words.push(base, &mask, bytes);
                    if matches!(self.choice.delta, DeltaCodec::ZstdOld { .. }) {
                        mask.gather(base_bytes, &mut self.old_words);
                    }
                    continue;
                }
            }
            self.whole.push(page);
            if self.choice.page != PageCodec::Raw {
                self.block.extend_from_slice(bytes);
            }
        }
    }

    fn put_words(&mut self, version: Version, out: &mut Vec<u8>, counts: &mut CodecCounts) {
        let DeltaCodec::ZstdOld { level } = self.choice.delta else {
            let how = self.choice.delta.compression();
            self.coder.put_deltas(Content::Words, how, version, &mut self.words, out, counts);
            return;
        };
        let Deltas { list, packer, packed } = &mut self.words;
        if list.pages.is_empty() {
            return;
        }
        packer.finish(packed);
        let (masks, words) = packed.split_at(list.pages.len() * WordMask::BYTES);
        let coded = &mut self.coder.coded;
        let shrunk =
            self.coder.compressor.pack_with_old(masks, words, &self.old_words, level, coded);
        let packing = if shrunk { Packing::ZstdOld } else { Packing::Plain };
        self.coder.put_packed(Content::Words, packing, version, &self.words, out, counts);
    }

    fn put_runs(&mut self, version: Version, out: &mut Vec<u8>, counts: &mut CodecCounts) {
        let Runs { list, packer, packed } = &mut self.runs;
        if list.pages.is_empty() {
            return;
        }
        packer.finish(packed);
        page_list::collect(list.pages.iter().copied(), &mut self.coder.runs);
        let frame = FrameParts {
            bases: &list.bases,
            units: packer.coded_bytes(),
            checks: &list.checks,
            decoded: packed,
            body: packed,
            ..FrameParts::new(CodecId::Xbzrle, version, &self.coder.runs)
        };
        counts.add(CodecId::Xbzrle, list.pages.len() as u64, frame.write(out) as u64);
    }

    fn put_whole(
        &mut self,
        version: Version,
        pages: &[PageToSend<'_>],
        kin: &Kin,
        out: &mut Vec<u8>,
        counts: &mut CodecCounts,
    ) {
        if self.whole.is_empty() {
            return;
        }
        let Coder { compressor, coded, runs } = &mut self.coder;
        page_list::collect(self.whole.iter().copied(), runs);
        let count = self.whole.len() as u64;
        if self.choice.page == PageCodec::Raw {
            let mut whole = self.whole.iter().peekable();
            let pages = pages.iter().filter(|page| whole.next_if_eq(&&page.page).is_some());
            let frame = FrameParts::new(CodecId::Raw, version, runs);
            let length = frame.write_pages(pages.map(|page| page.bytes), out);
            return counts.add(CodecId::Raw, count, length as u64);
        }
        let packing = match self.choice.page {
            PageCodec::ZstdKin { level } => {
                compressor.pack_with_kin(&self.block, self.kin_bytes, level, coded)
            }
            other => compressor.pack(&self.block, other.compression(), coded),
        };
        self.kin.clear();
        self.kin_runs.clear();
        if packing == Packing::ZstdKin {
            let bases = kin.pages.iter().map(|&(page, version)| Base { page, version });
            self.kin.extend(bases);
            page_list::collect(self.kin.iter().map(|base| base.page), &mut self.kin_runs);
        }
        assert!(self.kin.iter().all(|kin| kin.version <= version), "kin of a later version");
        let codec = codec_of(Content::Whole, packing);
        let plain = &self.block[self.kin_bytes..];
        let frame = FrameParts {
            kin: (&self.kin, &self.kin_runs),
            decoded: plain,
            body: if packing == Packing::Plain { plain } else { coded },
            ..FrameParts::new(codec, version, runs)
        };
        counts.add(codec, count, frame.write(out) as u64);
    }
}

impl Coder {
    /// Appends a frame without a body, unless the list is empty.
    fn put_list(
        &mut self,
        codec: CodecId,
        version: Version,
        list: &Listed,
        out: &mut Vec<u8>,
        counts: &mut CodecCounts,
    ) {
        if list.pages.is_empty() {
            return;
        }
        page_list::collect(list.pages.iter().copied(), &mut self.runs);
        let frame = FrameParts {
            bases: &list.bases,
            checks: &list.checks,
            ..FrameParts::new(codec, version, &self.runs)
        };
        counts.add(codec, list.pages.len() as u64, frame.write(out) as u64);
    }

    /// Packs deltas and appends their frame, unless there are none.
    fn put_deltas<const MASK: usize, const UNIT: usize>(
        &mut self,
        content: Content,
        how: Compression,
        version: Version,
        deltas: &mut Deltas<MASK, UNIT>,
        out: &mut Vec<u8>,
        counts: &mut CodecCounts,
    ) {
        if deltas.list.pages.is_empty() {
            return;
        }
        deltas.packer.finish(&mut deltas.packed);
        let packing = self.compressor.pack(&deltas.packed, how, &mut self.coded);
        self.put_packed(content, packing, version, deltas, out, counts);
    }

    /// Appends the frame of deltas that were packed.
    fn put_packed<const MASK: usize, const UNIT: usize>(
        &mut self,
        content: Content,
        packing: Packing,
        version: Version,
        deltas: &Deltas<MASK, UNIT>,
        out: &mut Vec<u8>,
        counts: &mut CodecCounts,
    ) {
        let Deltas { list, packer, packed } = deltas;
        page_list::collect(list.pages.iter().copied(), &mut self.runs);
        let codec = codec_of(content, packing);
        let frame = FrameParts {
            bases: &list.bases,
            units: packer.unit_count(),
            checks: &list.checks,
            decoded: packed,
            body: if packing == Packing::Plain { packed } else { &self.coded },
            ..FrameParts::new(codec, version, &self.runs)
        };
        counts.add(codec, list.pages.len() as u64, frame.write(out) as u64);
    }
}

impl Listed {
    fn clear(&mut self) {
        self.pages.clear();
        self.bases.clear();
        self.checks.clear();
    }

    /// Adds a page that builds on an older content of itself.
    fn push(&mut self, base: Base, bytes: &PageBytes) {
        self.pages.push(base.page);
        self.bases.push(base);
        self.checks.push(page_check(base.page, bytes));
    }
}

impl<const MASK: usize, const UNIT: usize> Deltas<MASK, UNIT> {
    fn clear(&mut self) {
        self.list.clear();
        self.packer.clear();
    }

    fn push(&mut self, base: Base, mask: &UnitMask<MASK, UNIT>, bytes: &PageBytes) {
        self.list.push(base, bytes);
        self.packer.push(mask, bytes);
    }
}

fn check_batch(version: Version, pages: impl ExactSizeIterator<Item = PageIndex>) {
    assert!(Version::NONE < version && version <= Version::MAX, "content of {version:?}");
    assert!(pages.len() <= MAX_PAGES_PER_FRAME, "{} pages for one frame", pages.len());
    assert!(pages.is_sorted_by(|a, b| a < b), "pages must ascend");
}

fn codec_of(content: Content, packing: Packing) -> CodecId {
    CodecId::of(content, packing).expect("each packing that is asked for exists for its content")
}

fn put_zero_frame(
    version: Version,
    runs: &[PageRange],
    out: &mut Vec<u8>,
    counts: &mut CodecCounts,
) {
    let pages = runs.iter().map(PageRange::len).sum();
    let bytes = FrameParts::new(CodecId::Zero, version, runs).write(out);
    counts.add(CodecId::Zero, pages, bytes as u64);
}
