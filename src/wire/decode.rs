//! The pages of a frame.

use super::frame::{Base, Frame, FrameError};
use super::limits::MAX_PAGES_PER_FRAME;
use crate::codec::delta::PackedDeltas;
use crate::codec::{CodecId, block};
use crate::page::{PAGE_SIZE_BYTES, PageBytes};

/// Memory to decode into, kept from frame to frame: one for each thread that decodes.
pub struct DecodeScratch {
    pages: Box<[PageBytes]>,
    packed: Vec<u8>,
    outcomes: Vec<Outcome>,
}

impl Default for DecodeScratch {
    fn default() -> Self {
        DecodeScratch {
            pages: vec![[0; PAGE_SIZE_BYTES]; MAX_PAGES_PER_FRAME].into_boxed_slice(),
            packed: Vec::new(),
            outcomes: Vec::with_capacity(MAX_PAGES_PER_FRAME),
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
    /// The base was given, but is not what the sender took it for: the resulting content is wrong, and
    /// the whole page must be asked for.
    WrongBase,
}

/// The pages of a frame, by their position in [`Frame::pages`].
#[derive(Clone, Copy)]
pub struct DecodedPages<'a>(Content<'a>);

#[derive(Clone, Copy)]
enum Content<'a> {
    Zero,
    Unchanged,
    Whole(&'a [PageBytes]),
    Deltas(&'a [PageBytes], &'a [Outcome]),
}

impl<'a> DecodedPages<'a> {
    /// What the frame says about the page at `position`.
    ///
    /// # Panics
    /// When a frame with page bytes has no such position.
    pub fn get(&self, position: usize) -> DecodedPage<'a> {
        match self.0 {
            Content::Zero => DecodedPage::Zero,
            Content::Unchanged => DecodedPage::Unchanged,
            Content::Whole(pages) => DecodedPage::Bytes(&pages[position]),
            Content::Deltas(pages, outcomes) => match outcomes[position] {
                Outcome::Decoded => DecodedPage::Bytes(&pages[position]),
                Outcome::NoBase => DecodedPage::NoBase,
                Outcome::WrongBase => DecodedPage::WrongBase,
            },
        }
    }
}

impl<'a> Frame<'a> {
    /// Decodes the pages.
    ///
    /// `base_of` is called for each page of a delta in turn, with the page's position and its base:
    /// it writes the base's content into the buffer it is given and says true, or says
    /// false when that content is no longer there or the page is not wanted. The others are decoded all the same.
    ///
    /// # Errors
    /// When the body does not decode or fails the checksum. No page may be used then.
    pub fn decode<'s>(
        &self,
        scratch: &'s mut DecodeScratch,
        mut base_of: impl FnMut(usize, Base, &mut PageBytes) -> bool,
    ) -> Result<DecodedPages<'s>, FrameError>
    where
        'a: 's,
    {
        let DecodeScratch { pages, packed, outcomes } = scratch;
        let content = match self.codec {
            CodecId::Zero => Content::Zero,
            CodecId::Unchanged => Content::Unchanged,
            CodecId::Raw => {
                self.check(self.body)?;
                Content::Whole(self.body.as_chunks::<PAGE_SIZE_BYTES>().0)
            }
            CodecId::Lz4 => {
                let pages = &mut pages[..self.page_count() as usize];
                block::decode_lz4(self.body, pages.as_flattened_mut(), self.codec)?;
                self.check(pages.as_flattened())?;
                Content::Whole(pages)
            }
            CodecId::Delta | CodecId::DeltaLz4 => {
                let packed = match self.codec {
                    CodecId::Delta => self.body,
                    _ => {
                        packed.resize(self.decoded_len(), 0);
                        block::decode_lz4(self.body, packed, self.codec)?;
                        packed
                    }
                };
                self.check(packed)?;
                let deltas = PackedDeltas::parse(packed, self.page_count() as usize)?;
                outcomes.clear();
                for (position, (delta, entry)) in deltas.iter().zip(self.pages()).enumerate() {
                    let bytes = &mut pages[position];
                    let base = entry.base.expect("parsing gave each page of a delta its base");
                    outcomes.push(if !base_of(position, base, bytes) {
                        Outcome::NoBase
                    } else {
                        delta.apply(bytes);
                        match self.page_matches(position, entry.page, bytes) {
                            true => Outcome::Decoded,
                            false => Outcome::WrongBase,
                        }
                    });
                }
                Content::Deltas(pages, outcomes)
            }
        };
        Ok(DecodedPages(content))
    }
}
