//! A page frame: its layout, and the reading of its header.
//!
//! Numbers are LEB128 unless a width is given; fixed widths are little-endian.
//!
//! | field | |
//! |---|---|
//! | magic | `0xfa` |
//! | format | 1 byte, [`FORMAT`] |
//! | codec | 1 byte, [`CodecId`] |
//! | version | of the content of all pages here, 1 to [`Version::MAX`] |
//! | pages | number of runs; for each its distance to the one before, times two, plus one if it is longer than a page; then if so, its length less two |
//! | base | where pages build on other contents: the version of all bases, or 0 and then that of each; for copies then the page that each is a copy of |
//! | kin | where whole pages build on others together: those pages, as runs; then the version of all, or 0 and then that of each |
//! | units | deltas only: number of changed words or lines; of runs, the bytes of all codings |
//! | checks | deltas and copies: for each page the low 4 bytes of the xxh3-64 of its content, seeded with its index; all 8 for deltas of lines and copies |
//! | body length | where there is a body |
//! | checksum | 8 bytes: xxh3-64 of the decoded body, seeded with the xxh3-64 of all fields before |
//! | body | |
//!
//! **What the checksums are worth.** The 8-byte checksum covers header and decoded body, so no damage
//! on the way and no fault of a compressor gets through it. For whole pages that is the content itself. A
//! delta's body is masks and units, and the content depends on the base as well; and some of its pages
//! may have to be left out, because they have come by another way and the guest has written to
//! them. So each page of a delta has its own check of the resulting content. For words it only has
//! to find a base other than the one that was named, which takes a fault of farfault or of the
//! host's memory, never of the network; 4 bytes suffice for that, while 8 would be 3 % of a
//! typical delta of 240 bytes. Deltas of lines go by truncated hashes, which *are* wrong once
//! in 65,536 times, so there 8 bytes stand between a collision and the guest. So they do for copies: after the
//! switchover the guest may have written to the original. Pages of
//! zeros and unchanged pages move no bytes; their checksum covers the list.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::error::FrameError;
use super::limits::{MAX_BODY_BYTES, MAX_PAGES_PER_FRAME};
use super::page_list::PageList;
use super::varint;
use crate::codec::delta::{LineMask, WordMask};
use crate::codec::kin::MAX_KIN_PAGES;
use crate::codec::{CodecId, Content, Packing, xbzrle};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, Version};

/// First byte of every frame.
pub(super) const MAGIC: u8 = 0xfa;
/// The layout described here.
pub const FORMAT: u8 = 1;

/// A content that a page of a frame builds on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Of which page: for deltas of the page itself.
    pub page: PageIndex,
    /// Which content of it.
    pub version: Version,
}

/// For what a base is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseFor {
    /// For the page at this position of the frame.
    Page(usize),
    /// For all of its pages together.
    Frame,
}

/// A page of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FramePage {
    /// Which page.
    pub page: PageIndex,
    /// What must be there for it to be decoded; for an unchanged page, what it still is.
    pub base: Option<Base>,
}

/// A frame whose header was checked: every number in it is within bounds, and the body is there.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    codec: CodecId,
    version: Version,
    pages: PageList<'a>,
    bases: Bases<'a>,
    kin: Option<(PageList<'a>, Bases<'a>)>,
    units: usize,
    checks: &'a [u8],
    header_hash: u64,
    checksum: u64,
    pub(super) body: &'a [u8],
    len_bytes: usize,
}

impl<'a> Frame<'a> {
    /// Reads and checks the header of the frame at the front of `input`; also gives what follows the
    /// frame. Nothing is allocated.
    ///
    /// # Errors
    /// When anything about it is wrong, also when `input` ends before the frame does.
    pub fn parse(input: &'a [u8], guest_pages: u64) -> Result<(Frame<'a>, &'a [u8]), FrameError> {
        let mut rest = input;
        let [magic, format, codec] = *take_array(&mut rest, "first bytes")?;
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        if format != FORMAT {
            return Err(FrameError::Format { found: format });
        }
        let codec = CodecId::from_wire(codec).ok_or(FrameError::Codec { found: codec })?;
        let content = codec.content();
        let version = take_version(&mut rest)?;
        let max_pages = match content {
            Content::Zero => u64::MAX,
            _ => MAX_PAGES_PER_FRAME as u64,
        };
        let pages = PageList::take(&mut rest, guest_pages, max_pages)?;
        let bases = match content.has_bases() {
            true => Bases::take(&mut rest, content, &pages, version, guest_pages)?,
            false => Bases::NONE,
        };
        let kin = match codec.packing() {
            Packing::ZstdKin => {
                let kin = PageList::take(&mut rest, guest_pages, MAX_KIN_PAGES as u64)?;
                let versions = Versions::take(&mut rest, kin.pages(), version.0)?;
                Some((kin, Bases { versions, originals: None }))
            }
            _ => None,
        };
        let units = take_units(&mut rest, content, pages.pages())?;
        let checks_len = match content {
            Content::Zero => 0,
            _ => pages.pages() as usize * check_bytes(content),
        };
        let checks = take_slice(&mut rest, checks_len, "page checks")?;
        let mut frame = Frame {
            codec,
            version,
            pages,
            bases,
            kin,
            units,
            checks,
            header_hash: 0,
            checksum: 0,
            body: &[],
            len_bytes: 0,
        };
        let body_bytes = match content.has_body() {
            true => frame.checked_body_len(take_number(&mut rest, "body length")?)?,
            false => 0,
        };
        frame.header_hash = xxh3_64(&input[..input.len() - rest.len()]);
        frame.checksum = u64::from_le_bytes(*take_array(&mut rest, "checksum")?);
        frame.body = take_slice(&mut rest, body_bytes, "body")?;
        frame.len_bytes = input.len() - rest.len();
        if !content.has_body() {
            frame.check(&[])?;
        }
        Ok((frame, rest))
    }

    /// How the pages are coded.
    pub fn codec(&self) -> CodecId {
        self.codec
    }

    /// The version of the content of all its pages.
    pub fn version(&self) -> Version {
        self.version
    }

    /// How many pages the frame has: at most [`MAX_PAGES_PER_FRAME`], except for zero pages.
    pub fn page_count(&self) -> u64 {
        self.pages.pages()
    }

    /// The pages, ascending. Of a frame of zero pages these may be millions: see [`Self::runs`].
    pub fn pages(&self) -> impl Iterator<Item = FramePage> + use<'a> {
        let mut bases = self.bases;
        self.runs()
            .flat_map(|run| run.pages())
            .map(move |page| FramePage { page, base: bases.next(page) })
    }

    /// The contents that all pages of the frame build on together, ascending; not of its own pages.
    pub fn kin(&self) -> impl Iterator<Item = Base> + use<'a> {
        self.kin.into_iter().flat_map(|(pages, mut bases)| {
            let pages = pages.runs().flat_map(|run| run.pages());
            pages.filter_map(move |page| bases.next(page))
        })
    }

    /// The pages as ascending runs.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + use<'a> {
        self.pages.runs()
    }

    /// The runs of a frame of zero pages, for which nothing need be decoded; `None` for another codec.
    pub fn zero_runs(&self) -> Option<impl Iterator<Item = PageRange> + use<'a>> {
        (self.codec == CodecId::Zero).then(|| self.runs())
    }

    /// Bytes of the whole frame.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Bytes that the body decodes to.
    pub(super) fn decoded_len(&self) -> usize {
        let pages = self.pages.pages() as usize;
        match self.codec.content() {
            Content::Zero | Content::Unchanged | Content::Copy => 0,
            Content::Whole => pages * PAGE_SIZE_BYTES,
            Content::Words => pages * WordMask::BYTES + self.units * WordMask::UNIT_BYTES,
            Content::Lines => pages * LineMask::BYTES + self.units * LineMask::UNIT_BYTES,
            Content::Runs => pages * xbzrle::LENGTH_BYTES + self.units,
        }
    }

    /// Compares the decoded body with the checksum.
    pub(super) fn check(&self, decoded: &[u8]) -> Result<(), FrameError> {
        match checksum(self.header_hash, decoded) == self.checksum {
            true => Ok(()),
            false => Err(FrameError::Checksum),
        }
    }

    /// Compares the resulting content of a page with its check.
    pub(super) fn page_matches(&self, position: usize, page: PageIndex, bytes: &PageBytes) -> bool {
        let width = check_bytes(self.codec.content());
        let check = page_check(page, bytes).to_le_bytes();
        self.checks[position * width..][..width] == check[..width]
    }

    fn checked_body_len(&self, found: u64) -> Result<usize, FrameError> {
        let decoded_bytes = self.decoded_len();
        let refused =
            FrameError::BodyLength { codec: self.codec, found_bytes: found, decoded_bytes };
        let length = usize::try_from(found).map_err(|_| refused)?;
        let fits = match self.codec.packing() {
            Packing::Plain => length == decoded_bytes,
            // The encoder falls back to no packing when nothing is gained.
            _ => (1..decoded_bytes).contains(&length),
        };
        if fits && length <= MAX_BODY_BYTES { Ok(length) } else { Err(refused) }
    }
}

/// What the pages of a frame build on, as it stands in the header.
#[derive(Clone, Copy, Debug)]
struct Bases<'a> {
    versions: Versions<'a>,
    /// For copies the originals; otherwise each page is its own base.
    originals: Option<&'a [u8]>,
}

#[derive(Clone, Copy, Debug)]
enum Versions<'a> {
    None,
    Uniform(Version),
    Each(&'a [u8]),
}

impl<'a> Versions<'a> {
    /// Takes the versions of so many contents, each at most `max`.
    fn take(rest: &mut &'a [u8], contents: u64, max: u16) -> Result<Self, FrameError> {
        let checked = |found: u64| match found {
            0 => Err(FrameError::Version { field: "base version", found }),
            found if found > u64::from(max) => {
                Err(FrameError::Version { field: "base version", found })
            }
            found => Ok(Version(found as u16)),
        };
        Ok(match take_number(rest, "base version")? {
            0 => {
                let coded = *rest;
                for _ in 0..contents {
                    checked(take_number(rest, "base version")?)?;
                }
                Versions::Each(&coded[..coded.len() - rest.len()])
            }
            uniform => Versions::Uniform(checked(uniform)?),
        })
    }
}

impl<'a> Bases<'a> {
    const NONE: Bases<'static> = Bases { versions: Versions::None, originals: None };

    fn take(
        rest: &mut &'a [u8],
        content: Content,
        pages: &PageList<'_>,
        version: Version,
        guest_pages: u64,
    ) -> Result<Self, FrameError> {
        // A delta builds on an older content; a copy may be of a page that was sent just now.
        let max = if content == Content::Copy { version.0 } else { version.0 - 1 };
        let versions = Versions::take(rest, pages.pages(), max)?;
        let mut bases = Bases { versions, originals: None };
        if content == Content::Copy {
            let coded = *rest;
            for page in pages.runs().flat_map(|run| run.pages()) {
                let from = take_number(rest, "copied page")?;
                if from >= guest_pages || from == page.0 {
                    return Err(FrameError::CopyFrom { page, from });
                }
            }
            bases.originals = Some(&coded[..coded.len() - rest.len()]);
        }
        Ok(bases)
    }

    /// The base of the next page, which is `page`.
    fn next(&mut self, page: PageIndex) -> Option<Base> {
        let version = match &mut self.versions {
            Versions::None => return None,
            Versions::Uniform(version) => *version,
            Versions::Each(coded) => Version(varint::take(coded)? as u16),
        };
        let page = match &mut self.originals {
            None => page,
            Some(coded) => PageIndex(varint::take(coded)?),
        };
        Some(Base { page, version })
    }
}

fn take_version(rest: &mut &[u8]) -> Result<Version, FrameError> {
    let field = "content version";
    let found = take_number(rest, field)?;
    if found == 0 || found > u64::from(Version::MAX.0) {
        return Err(FrameError::Version { field, found });
    }
    Ok(Version(found as u16))
}

fn take_units(rest: &mut &[u8], content: Content, pages: u64) -> Result<usize, FrameError> {
    let units_per_page = match content {
        Content::Words => WordMask::UNITS_PER_PAGE,
        Content::Lines => LineMask::UNITS_PER_PAGE,
        Content::Runs => PAGE_SIZE_BYTES,
        _ => return Ok(0),
    };
    let units = take_number(rest, "number of changed units")?;
    if units > pages * units_per_page as u64 {
        return Err(FrameError::Units { units, pages });
    }
    Ok(units as usize)
}

fn take_number(rest: &mut &[u8], field: &'static str) -> Result<u64, FrameError> {
    varint::take(rest).ok_or(FrameError::Number { field })
}

fn take_slice<'a>(
    rest: &mut &'a [u8],
    length: usize,
    field: &'static str,
) -> Result<&'a [u8], FrameError> {
    rest.split_off(..length).ok_or(FrameError::Truncated { field })
}

fn take_array<'a, const N: usize>(
    rest: &mut &'a [u8],
    field: &'static str,
) -> Result<&'a [u8; N], FrameError> {
    let (array, left) = rest.split_first_chunk::<N>().ok_or(FrameError::Truncated { field })?;
    *rest = left;
    Ok(array)
}

/// The checksum of a frame with this header and this decoded body.
pub(super) fn checksum(header_hash: u64, decoded: &[u8]) -> u64 {
    xxh3_64_with_seed(decoded, header_hash)
}

/// The hash of which a page's check is the low bytes. The index is in it, so that a page in another's
/// place is found too.
pub(super) fn page_check(page: PageIndex, bytes: &PageBytes) -> u64 {
    xxh3_64_with_seed(bytes, page.0)
}

/// Bytes of the check of each page.
pub(super) fn check_bytes(content: Content) -> usize {
    match content {
        Content::Zero | Content::Unchanged | Content::Whole => 0,
        Content::Words | Content::Runs => 4,
        Content::Lines | Content::Copy => 8,
    }
}
