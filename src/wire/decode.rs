//! The pages of a frame.

use super::error::FrameError;
use super::frame::{Base, BaseFor, Frame};
use super::limits::MAX_PAGES_PER_FRAME;
use crate::codec::delta::{LineMask, PackedDeltas, WordMask};
use crate::codec::pack::Decompressor;
use crate::codec::{Content, DecodeError, Packing, xbzrle};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex};

/// Memory to decode into, kept from frame to frame: one for each thread that decodes.
pub struct DecodeScratch {
    pages: Box<[PageBytes]>,
    packed: Vec<u8>,
    old_words: Vec<u8>,
    kin: Vec<PageBytes>,
    outcomes: Vec<Outcome>,
    decompressor: Decompressor,
}

impl Default for DecodeScratch {
    fn default() -> Self {
        DecodeScratch {
            pages: vec![[0; PAGE_SIZE_BYTES]; MAX_PAGES_PER_FRAME].into_boxed_slice(),
            packed: Vec::new(),
            old_words: Vec::new(),
            kin: Vec::new(),
            outcomes: Vec::with_capacity(MAX_PAGES_PER_FRAME),
            decompressor: Decompressor::default(),
        }
    }
}

#[derive(Clone, Copy)]
enum Outcome {
    Decoded,
    NoBase,
    WrongBase,
}

/// What a frame says about one of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodedPage<'a> {
    /// The page has this content.
    Bytes(&'a PageBytes),
    /// The page is all zeros.
    Zero,
    /// The page is still as its base.
    Unchanged,
    /// The base was not given, so the page was left out.
    NoBase,
    /// The base was given, but the resulting content is wrong: the base is not what the sender took it
    /// for, or the fingerprints that the sender went by missed a change. The whole page must be asked for.
    WrongBase,
}

/// The pages of a frame, by their position in [`Frame::pages`].
#[derive(Clone, Copy)]
pub struct DecodedPages<'a>(Decoded<'a>);

#[derive(Clone, Copy)]
enum Decoded<'a> {
    Zero,
    Unchanged,
    Whole(&'a [PageBytes]),
    Built(&'a [PageBytes], &'a [Outcome]),
}

impl<'a> DecodedPages<'a> {
    /// What the frame says about the page at `position`.
    ///
    /// # Panics
    /// When a frame with page bytes has no such position.
    pub fn get(&self, position: usize) -> DecodedPage<'a> {
        match self.0 {
            Decoded::Zero => DecodedPage::Zero,
            Decoded::Unchanged => DecodedPage::Unchanged,
            Decoded::Whole(pages) => DecodedPage::Bytes(&pages[position]),
            Decoded::Built(pages, outcomes) => match outcomes[position] {
                Outcome::Decoded => DecodedPage::Bytes(&pages[position]),
                Outcome::NoBase => DecodedPage::NoBase,
                Outcome::WrongBase => DecodedPage::WrongBase,
            },
        }
    }

    /// The contents from `position` on, as far as they lie side by side: of pages that may be written in
    /// one go where they follow each other in the guest too.
    pub fn bytes_from(&self, position: usize) -> &'a [PageBytes] {
        match self.0 {
            Decoded::Zero | Decoded::Unchanged => &[],
            Decoded::Whole(pages) => &pages[position..],
            Decoded::Built(pages, outcomes) => {
                let is_there = |outcome: &&Outcome| matches!(outcome, Outcome::Decoded);
                let count = outcomes[position..].iter().take_while(is_there).count();
                &pages[position..][..count]
            }
        }
    }
}

impl<'a> Frame<'a> {
    /// Decodes the pages.
    ///
    /// `base_of` is called for each content that a page builds on, in turn, or that all of them build on
    /// together: it writes the base's content into the buffer it is given and says true, or says false when
    /// that content is no longer there or the page is not wanted. The others are decoded all the same,
    /// unless the codec needs all bases ([`crate::codec::CodecId::needs_all_bases`]): then keep what a page was before it
    /// is replaced for as long as such a frame may be on its way, or ask for its pages again.
    ///
    /// # Errors
    /// When the body does not decode, fails the checksum, or needs a base that is not there. No page
    /// may be used then.
    pub fn decode<'s>(
        &self,
        scratch: &'s mut DecodeScratch,
        mut base_of: impl FnMut(BaseFor, Base, &mut PageBytes) -> bool,
    ) -> Result<DecodedPages<'s>, FrameError>
    where
        'a: 's,
    {
        let DecodeScratch { pages, packed, old_words, kin, outcomes, decompressor } = scratch;
        let pages = &mut pages[..self.page_count().min(MAX_PAGES_PER_FRAME as u64) as usize];
        let codec = self.codec();
        outcomes.clear();
        Ok(DecodedPages(match codec.content() {
            Content::Zero => Decoded::Zero,
            Content::Unchanged => Decoded::Unchanged,
            Content::Copy => {
                for (position, (bytes, entry)) in pages.iter_mut().zip(self.pages()).enumerate() {
                    let base = entry.base.expect("parsing gave each copy its original");
                    let there = base_of(BaseFor::Page(position), base, bytes);
                    outcomes.push(self.outcome(position, entry.page, there, bytes));
                }
                Decoded::Built(pages, outcomes)
            }
            Content::Whole if codec.packing() == Packing::Plain => {
                self.check(self.body)?;
                Decoded::Whole(self.body.as_chunks::<PAGE_SIZE_BYTES>().0)
            }
            Content::Whole if codec.packing() == Packing::ZstdKin => {
                kin.clear();
                for base in self.kin() {
                    kin.push([0; PAGE_SIZE_BYTES]);
                    let bytes = kin.last_mut().expect("one was pushed");
                    if !base_of(BaseFor::Frame, base, bytes) {
                        return Err(FrameError::BaseMissing { page: base.page });
                    }
                }
                let plain = pages.as_flattened_mut();
                decompressor.unpack_with_kin(self.body, kin.as_flattened(), plain)?;
                self.check(pages.as_flattened())?;
                Decoded::Whole(pages)
            }
            Content::Whole => {
                decompressor.unpack(codec, self.body, pages.as_flattened_mut())?;
                self.check(pages.as_flattened())?;
                Decoded::Whole(pages)
            }
            Content::Words if codec.packing() == Packing::ZstdOld => {
                packed.resize(self.decoded_len(), 0);
                let (masks, words) = packed.split_at_mut(pages.len() * WordMask::BYTES);
                let coded_words = decompressor.unpack_masks(self.body, masks)?;
                self.gather_old(masks, pages, old_words, &mut base_of)?;
                if old_words.len() != words.len() {
                    let unit = WordMask::UNIT_BYTES;
                    let (found, expected) = (old_words.len() / unit, words.len() / unit);
                    return Err(DecodeError::Units { found, expected }.into());
                }
                decompressor.unpack_words(coded_words, old_words, words)?;
                // The bases are in place.
                self.apply::<{ WordMask::BYTES }, { WordMask::UNIT_BYTES }>(
                    packed,
                    pages,
                    outcomes,
                    |_, _, _| true,
                )?;
                Decoded::Built(pages, outcomes)
            }
            Content::Runs => {
                self.apply_runs(pages, outcomes, base_of)?;
                Decoded::Built(pages, outcomes)
            }
            content @ (Content::Words | Content::Lines) => {
                let packed = if codec.packing() == Packing::Plain {
                    self.body
                } else {
                    packed.resize(self.decoded_len(), 0);
                    decompressor.unpack(codec, self.body, packed)?;
                    packed
                };
                if content == Content::Words {
                    self.apply::<{ WordMask::BYTES }, { WordMask::UNIT_BYTES }>(
                        packed, pages, outcomes, base_of,
                    )?;
                } else {
                    self.apply::<{ LineMask::BYTES }, { LineMask::UNIT_BYTES }>(
                        packed, pages, outcomes, base_of,
                    )?;
                }
                Decoded::Built(pages, outcomes)
            }
        }))
    }

    /// Fetches all bases, and from them the words that the masks name.
    fn gather_old(
        &self,
        masks: &[u8],
        pages: &mut [PageBytes],
        old_words: &mut Vec<u8>,
        base_of: &mut impl FnMut(BaseFor, Base, &mut PageBytes) -> bool,
    ) -> Result<(), FrameError> {
        old_words.clear();
        let (masks, _) = masks.as_chunks::<{ WordMask::BYTES }>();
        for (position, (entry, mask)) in self.pages().zip(masks).enumerate() {
            let base = entry.base.expect("parsing gave each page of a delta its base");
            if !base_of(BaseFor::Page(position), base, &mut pages[position]) {
                return Err(FrameError::BaseMissing { page: entry.page });
            }
            WordMask::from_bytes(*mask).gather(&pages[position], old_words);
        }
        Ok(())
    }

    /// Checks the unpacked deltas and applies each to its base.
    fn apply<const MASK: usize, const UNIT: usize>(
        &self,
        packed: &[u8],
        pages: &mut [PageBytes],
        outcomes: &mut Vec<Outcome>,
        mut base_of: impl FnMut(BaseFor, Base, &mut PageBytes) -> bool,
    ) -> Result<(), FrameError> {
        self.check(packed)?;
        let deltas = PackedDeltas::<MASK, UNIT>::parse(packed, pages.len())?;
        for (position, (delta, entry)) in deltas.iter().zip(self.pages()).enumerate() {
            let bytes = &mut pages[position];
            let base = entry.base.expect("parsing gave each page of a delta its base");
            let there = base_of(BaseFor::Page(position), base, bytes);
            if there {
                delta.apply(bytes);
            }
            outcomes.push(self.outcome(position, entry.page, there, bytes));
        }
        Ok(())
    }

    /// Checks the codings of XBZRLE and applies each to its base.
    fn apply_runs(
        &self,
        pages: &mut [PageBytes],
        outcomes: &mut Vec<Outcome>,
        mut base_of: impl FnMut(BaseFor, Base, &mut PageBytes) -> bool,
    ) -> Result<(), FrameError> {
        self.check(self.body)?;
        let codings = xbzrle::unpack(self.body, pages.len())?;
        for (position, (coding, entry)) in codings.zip(self.pages()).enumerate() {
            let bytes = &mut pages[position];
            let base = entry.base.expect("parsing gave each page of a delta its base");
            let there = base_of(BaseFor::Page(position), base, bytes);
            if there {
                xbzrle::decode(coding, bytes).ok_or(DecodeError::Run)?;
            }
            outcomes.push(self.outcome(position, entry.page, there, bytes));
        }
        Ok(())
    }

    fn outcome(&self, position: usize, page: PageIndex, there: bool, bytes: &PageBytes) -> Outcome {
        match there {
            false => Outcome::NoBase,
            true if self.page_matches(position, page, bytes) => Outcome::Decoded,
            true => Outcome::WrongBase,
        }
    }
}
