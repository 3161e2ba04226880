//! Pages into frames: each page by the codec that suits it, pages of one kind together.

use super::frame::{FrameParts, PAGE_CHECK_BYTES, page_check};
use super::limits::{MAX_PAGES_PER_FRAME, MAX_RUNS_PER_FRAME};
use super::page_list;
use crate::codec::block::Lz4Encoder;
use crate::codec::delta::{DeltaPacker, WORDS_PER_PAGE, WordMask};
use crate::codec::{CodecCounts, CodecId, is_zero};
use crate::page::{PageBytes, PageIndex, PageRange, Version};

/// With more changed words than this a page is sent whole: beside the likeness to its neighbours, the
/// compressor then also has the unchanged words to find matches in, and no mask to carry.
const MAX_DELTA_WORDS: usize = WORDS_PER_PAGE * 3 / 4;

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

/// How whole pages are coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageCodec {
    /// As they are.
    Raw,
    /// Together in one LZ4 block; as they are if that is no smaller.
    #[default]
    Lz4,
}

/// How pages with a base are coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeltaCodec {
    /// As whole pages.
    Off,
    /// The changed words as they are.
    Plain,
    /// The changed words of all pages together in one LZ4 block.
    #[default]
    Lz4,
}

/// Which codecs an encoder uses. Zero and unchanged pages are always told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodecChoice {
    /// For pages that go whole.
    pub page: PageCodec,
    /// For pages that go as a difference.
    pub delta: DeltaCodec,
}

/// Makes frames. Keeps its buffers: one for each thread that encodes.
#[derive(Default)]
pub struct FrameEncoder {
    choice: CodecChoice,
    zero: Vec<PageIndex>,
    unchanged: Vec<(PageIndex, Version)>,
    deltas: Deltas,
    whole: Vec<PageIndex>,
    /// The content of `whole`, page after page.
    block: Vec<u8>,
    runs: Vec<PageRange>,
    versions: Vec<Version>,
    coded: Vec<u8>,
    lz4: Lz4Encoder,
}

#[derive(Default)]
struct Deltas {
    pages: Vec<PageIndex>,
    bases: Vec<Version>,
    checks: Vec<[u8; PAGE_CHECK_BYTES]>,
    packer: DeltaPacker,
    packed: Vec<u8>,
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
    /// that of its base is told as unchanged, for a few bits. Gives pages and bytes by codec.
    ///
    /// # Panics
    /// When there are more than [`MAX_PAGES_PER_FRAME`] pages, when they do not ascend, or when a base is
    /// not older than `version`.
    pub fn encode(
        &mut self,
        version: Version,
        pages: &[PageToSend<'_>],
        out: &mut Vec<u8>,
    ) -> CodecCounts {
        assert!(pages.len() <= MAX_PAGES_PER_FRAME, "{} pages for one frame", pages.len());
        assert!(pages.is_sorted_by(|a, b| a.page < b.page), "pages must ascend");
        assert!(Version::NONE < version && version <= Version::MAX, "content of {version:?}");
        self.sort(version, pages);
        let mut counts = CodecCounts::default();
        self.write_zero(version, out, &mut counts);
        self.write_unchanged(version, out, &mut counts);
        self.write_deltas(version, out, &mut counts);
        self.write_whole(version, out, &mut counts);
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
            self.runs.clear();
            self.runs.extend(runs.by_ref().take(MAX_RUNS_PER_FRAME));
            put_zero_frame(version, &self.runs, out, &mut counts);
        }
        counts
    }

    /// Decides for each page how it goes.
    fn sort(&mut self, version: Version, pages: &[PageToSend<'_>]) {
        self.zero.clear();
        self.unchanged.clear();
        self.deltas.clear();
        self.whole.clear();
        self.block.clear();
        for &PageToSend { page, bytes, base } in pages {
            if is_zero(bytes) {
                self.zero.push(page);
                continue;
            }
            if let Some((base_version, base)) = base {
                assert!(base_version < version, "{page:?} has a base no older than itself");
                let mask = WordMask::between(base, bytes);
                let words = mask.count();
                if words == 0 {
                    self.unchanged.push((page, base_version));
                    continue;
                }
                if self.choice.delta != DeltaCodec::Off && words <= MAX_DELTA_WORDS {
                    self.deltas.push(page, base_version, &mask, bytes);
                    continue;
                }
            }
            self.whole.push(page);
            self.block.extend_from_slice(bytes);
        }
    }

    fn write_zero(&mut self, version: Version, out: &mut Vec<u8>, counts: &mut CodecCounts) {
        if !self.zero.is_empty() {
            page_list::collect(self.zero.iter().copied(), &mut self.runs);
            put_zero_frame(version, &self.runs, out, counts);
        }
    }

    fn write_unchanged(&mut self, version: Version, out: &mut Vec<u8>, counts: &mut CodecCounts) {
        if self.unchanged.is_empty() {
            return;
        }
        page_list::collect(self.unchanged.iter().map(|&(page, _)| page), &mut self.runs);
        self.versions.clear();
        self.versions.extend(self.unchanged.iter().map(|&(_, base)| base));
        let frame = FrameParts {
            bases: &self.versions,
            ..FrameParts::new(CodecId::Unchanged, version, &self.runs)
        };
        counts.add(frame.codec, self.unchanged.len() as u64, frame.write(out) as u64);
    }

    fn write_deltas(&mut self, version: Version, out: &mut Vec<u8>, counts: &mut CodecCounts) {
        let Deltas { pages, bases, checks, packer, packed } = &mut self.deltas;
        if pages.is_empty() {
            return;
        }
        packer.finish(packed);
        let shrunk =
            self.choice.delta == DeltaCodec::Lz4 && self.lz4.encode(packed, &mut self.coded);
        let (codec, body) =
            if shrunk { (CodecId::DeltaLz4, &self.coded) } else { (CodecId::Delta, &*packed) };
        page_list::collect(pages.iter().copied(), &mut self.runs);
        let frame = FrameParts {
            bases,
            words: packer.word_count(),
            checks,
            decoded: packed,
            body,
            ..FrameParts::new(codec, version, &self.runs)
        };
        counts.add(codec, pages.len() as u64, frame.write(out) as u64);
    }

    fn write_whole(&mut self, version: Version, out: &mut Vec<u8>, counts: &mut CodecCounts) {
        if self.whole.is_empty() {
            return;
        }
        let shrunk =
            self.choice.page == PageCodec::Lz4 && self.lz4.encode(&self.block, &mut self.coded);
        let (codec, body) =
            if shrunk { (CodecId::Lz4, &self.coded) } else { (CodecId::Raw, &self.block) };
        page_list::collect(self.whole.iter().copied(), &mut self.runs);
        let frame = FrameParts {
            decoded: &self.block,
            body,
            ..FrameParts::new(codec, version, &self.runs)
        };
        counts.add(codec, self.whole.len() as u64, frame.write(out) as u64);
    }
}

impl Deltas {
    fn clear(&mut self) {
        self.pages.clear();
        self.bases.clear();
        self.checks.clear();
        self.packer.clear();
    }

    fn push(&mut self, page: PageIndex, base: Version, mask: &WordMask, bytes: &PageBytes) {
        self.pages.push(page);
        self.bases.push(base);
        self.checks.push(page_check(page, bytes));
        self.packer.push(mask, bytes);
    }
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
