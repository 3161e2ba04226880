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
//! | pages | number of runs, then the runs: see `page_list` |
//! | base | where pages build on older ones: the base version of all, or 0 and then that of each page |
//! | words, checks | deltas only: number of changed words; then 4 bytes for each page, the low half of its xxh3-64, seeded with its index |
//! | body length | where there is a body |
//! | checksum | 8 bytes: xxh3-64 of the decoded body, seeded with the xxh3-64 of all fields before |
//! | body | |
//!
//! **What the checksums are worth.** The 8-byte checksum covers header and decoded body, so no damage on the
//! way and no fault of a compressor gets through it. For whole pages that is the content itself. A
//! delta's body is masks and words, and the content depends on the base as well; and some of
//! its pages may have to be left out, because they have come by another way and the guest has written to
//! them. So each page of a delta has its own check of the resulting content. It
//! only has to find a base other than the one that was named, which takes a fault of farfault or of the host's memory, never of the network;
//! 4 bytes suffice for that, while 8 would be 3 % of a typical delta of 240 bytes. Pages of zeros and
//! unchanged pages move no bytes; their checksum covers the list.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::limits::{MAX_BODY_BYTES, MAX_PAGES_PER_FRAME};
use super::page_list::PageList;
use super::varint;
use crate::codec::delta::{WORDS_PER_PAGE, packed_len};
use crate::codec::{CodecId, DecodeError};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, Version};

/// First byte of every frame.
pub(super) const MAGIC: u8 = 0xfa;
/// The layout described here.
pub const FORMAT: u8 = 1;

/// Bytes of the check of one page of a delta.
pub(super) const PAGE_CHECK_BYTES: usize = 4;

/// Why a frame was refused. None of its pages may be used; whoever asked for them asks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Ends inside the frame.
    #[error("page frame is cut short in its {field}")]
    Truncated {
        /// Where.
        field: &'static str,
    },
    /// Not a page frame.
    #[error("page frame begins with {found:#04x}, not {MAGIC:#04x}")]
    Magic {
        /// The first byte.
        found: u8,
    },
    /// Of a newer or older farfault.
    #[error(
        "page frame has format {found}, this farfault reads {FORMAT}: use the same version on both hosts"
    )]
    Format {
        /// The format's number.
        found: u8,
    },
    /// No such codec here.
    #[error("page frame has codec {found}, unknown here: use the same version on both hosts")]
    Codec {
        /// The codec's number.
        found: u8,
    },
    /// A number that is cut short, too large or misspelt.
    #[error("page frame has no valid {field}")]
    Number {
        /// Which.
        field: &'static str,
    },
    /// A version that no page can have, or a base that is not older.
    #[error("page frame has version {found} as {field}")]
    Version {
        /// Which version.
        field: &'static str,
        /// Its number.
        found: u64,
    },
    /// No runs, or more than allowed.
    #[error("page frame lists {runs} runs of pages")]
    Runs {
        /// How many.
        runs: u64,
    },
    /// More pages than allowed.
    #[error("page frame has {pages} pages, {max_pages} are allowed")]
    Pages {
        /// How many.
        pages: u64,
        /// The limit for this codec.
        max_pages: u64,
    },
    /// Names pages that the guest does not have.
    #[error("page frame names pages beyond the {guest_pages} of the guest")]
    BeyondGuest {
        /// Size of the guest.
        guest_pages: u64,
    },
    /// More changed words than the pages have.
    #[error("page frame announces {words} changed words for {pages} pages")]
    Words {
        /// How many.
        words: u64,
        /// In so many pages.
        pages: u64,
    },
    /// A body of a length that this codec cannot have.
    #[error("page frame has a {codec} body of {found_bytes} bytes for {decoded_bytes} decoded")]
    BodyLength {
        /// The codec.
        codec: CodecId,
        /// Announced length.
        found_bytes: u64,
        /// Length of what it decodes to.
        decoded_bytes: usize,
    },
    /// The body cannot be decoded.
    #[error("page frame cannot be decoded: {0}")]
    Body(#[from] DecodeError),
    /// Header or decoded body is not what was sent.
    #[error("page frame fails its checksum")]
    Checksum,
}

/// An older page that a page of a frame builds on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Which page: for deltas the page itself.
    pub page: PageIndex,
    /// Which content of it.
    pub version: Version,
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
    pub(super) codec: CodecId,
    version: Version,
    pages: PageList<'a>,
    bases: Bases<'a>,
    words: usize,
    checks: &'a [[u8; PAGE_CHECK_BYTES]],
    header_hash: u64,
    checksum: u64,
    pub(super) body: &'a [u8],
    len_bytes: usize,
}

#[derive(Clone, Copy, Debug)]
enum Bases<'a> {
    None,
    /// One version for all pages.
    Uniform(Version),
    /// A version for each, as it stands in the header.
    Each(&'a [u8]),
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
        let version = take_version(&mut rest, "content version")?;
        let max_pages = if codec == CodecId::Zero { u64::MAX } else { MAX_PAGES_PER_FRAME as u64 };
        let pages = PageList::take(&mut rest, guest_pages, max_pages)?;
        let bases = match codec.has_bases() {
            true => Bases::take(&mut rest, pages.pages(), version)?,
            false => Bases::None,
        };
        let (words, checks) = match codec.is_delta() {
            true => take_words_and_checks(&mut rest, pages.pages())?,
            false => (0, &[][..]),
        };
        let mut frame = Frame {
            codec,
            version,
            pages,
            bases,
            words,
            checks,
            header_hash: 0,
            checksum: 0,
            body: &[],
            len_bytes: 0,
        };
        let body_bytes = match codec.has_body() {
            true => frame.checked_body_len(take_number(&mut rest, "body length")?)?,
            false => 0,
        };
        frame.header_hash = xxh3_64(&input[..input.len() - rest.len()]);
        frame.checksum = u64::from_le_bytes(*take_array(&mut rest, "checksum")?);
        frame.body = take_slice(&mut rest, body_bytes, "body")?;
        frame.len_bytes = input.len() - rest.len();
        if !codec.has_body() {
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
        self.runs().flat_map(|run| run.pages()).map(move |page| {
            let version = bases.next();
            FramePage { page, base: version.map(|version| Base { page, version }) }
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
        if !self.codec.has_body() {
            0
        } else if self.codec.is_delta() {
            packed_len(pages, self.words)
        } else {
            pages * PAGE_SIZE_BYTES
        }
    }

    /// Compares the decoded body with the checksum.
    pub(super) fn check(&self, decoded: &[u8]) -> Result<(), FrameError> {
        match checksum(self.header_hash, decoded) == self.checksum {
            true => Ok(()),
            false => Err(FrameError::Checksum),
        }
    }

    /// Compares the resulting content of a page of a delta with its check.
    pub(super) fn page_matches(&self, position: usize, page: PageIndex, bytes: &PageBytes) -> bool {
        self.checks[position] == page_check(page, bytes)
    }

    fn checked_body_len(&self, found: u64) -> Result<usize, FrameError> {
        let decoded_bytes = self.decoded_len();
        let refused =
            FrameError::BodyLength { codec: self.codec, found_bytes: found, decoded_bytes };
        let length = usize::try_from(found).map_err(|_| refused)?;
        let fits = match self.codec {
            CodecId::Zero | CodecId::Unchanged => length == 0,
            CodecId::Raw | CodecId::Delta => length == decoded_bytes,
            // The encoder falls back to the plain codec when nothing is gained.
            CodecId::Lz4 | CodecId::DeltaLz4 => (1..decoded_bytes).contains(&length),
        };
        if fits && length <= MAX_BODY_BYTES { Ok(length) } else { Err(refused) }
    }
}

impl<'a> Bases<'a> {
    fn take(rest: &mut &'a [u8], pages: u64, version: Version) -> Result<Self, FrameError> {
        let uniform = take_number(rest, "base version")?;
        if uniform != 0 {
            return Ok(Bases::Uniform(older(uniform, version)?));
        }
        let coded = *rest;
        for _ in 0..pages {
            older(take_number(rest, "base version")?, version)?;
        }
        Ok(Bases::Each(&coded[..coded.len() - rest.len()]))
    }

    fn next(&mut self) -> Option<Version> {
        match self {
            Bases::None => None,
            Bases::Uniform(version) => Some(*version),
            Bases::Each(coded) => varint::take(coded).map(|version| Version(version as u16)),
        }
    }
}

/// Checks that a base is older than the content built on it.
fn older(base: u64, version: Version) -> Result<Version, FrameError> {
    if base == 0 || base >= u64::from(version.0) {
        return Err(FrameError::Version { field: "base version", found: base });
    }
    Ok(Version(base as u16))
}

fn take_version(rest: &mut &[u8], field: &'static str) -> Result<Version, FrameError> {
    let found = take_number(rest, field)?;
    if found == 0 || found > u64::from(Version::MAX.0) {
        return Err(FrameError::Version { field, found });
    }
    Ok(Version(found as u16))
}

type Checks<'a> = &'a [[u8; PAGE_CHECK_BYTES]];

fn take_words_and_checks<'a>(
    rest: &mut &'a [u8],
    pages: u64,
) -> Result<(usize, Checks<'a>), FrameError> {
    let words = take_number(rest, "number of changed words")?;
    if words > pages * WORDS_PER_PAGE as u64 {
        return Err(FrameError::Words { words, pages });
    }
    let checks = take_slice(rest, pages as usize * PAGE_CHECK_BYTES, "page checks")?;
    Ok((words as usize, checks.as_chunks::<PAGE_CHECK_BYTES>().0))
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

/// The check of one page of a delta: the low half of the xxh3-64 of its content, seeded with its
/// index, so that a page in another's place is found too.
pub(super) fn page_check(page: PageIndex, bytes: &PageBytes) -> [u8; PAGE_CHECK_BYTES] {
    (xxh3_64_with_seed(bytes, page.0) as u32).to_le_bytes()
}

/// What a frame is written from.
pub(super) struct FrameParts<'a> {
    pub(super) codec: CodecId,
    pub(super) version: Version,
    pub(super) runs: &'a [PageRange],
    /// The base version of each page; empty for a codec without.
    pub(super) bases: &'a [Version],
    /// Changed words in all, for a delta.
    pub(super) words: usize,
    /// The check of each page, for a delta.
    pub(super) checks: &'a [[u8; PAGE_CHECK_BYTES]],
    pub(super) decoded: &'a [u8],
    pub(super) body: &'a [u8],
}

impl<'a> FrameParts<'a> {
    /// A frame without bases, checks and body.
    pub(super) fn new(codec: CodecId, version: Version, runs: &'a [PageRange]) -> Self {
        FrameParts {
            codec,
            version,
            runs,
            bases: &[],
            words: 0,
            checks: &[],
            decoded: &[],
            body: &[],
        }
    }

    /// Appends the frame to `out`; gives its length in bytes.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> usize {
        let start = out.len();
        out.extend_from_slice(&[MAGIC, FORMAT, self.codec.to_wire()]);
        varint::put(out, u64::from(self.version.0));
        super::page_list::put(out, self.runs);
        if let Some((first, others)) = self.bases.split_first() {
            if others.iter().all(|other| other == first) {
                varint::put(out, u64::from(first.0));
            } else {
                varint::put(out, 0);
                self.bases.iter().for_each(|base| varint::put(out, u64::from(base.0)));
            }
        }
        if self.codec.is_delta() {
            varint::put(out, self.words as u64);
            out.extend_from_slice(self.checks.as_flattened());
        }
        if self.codec.has_body() {
            varint::put(out, self.body.len() as u64);
        }
        let checksum = checksum(xxh3_64(&out[start..]), self.decoded);
        out.extend_from_slice(&checksum.to_le_bytes());
        out.extend_from_slice(self.body);
        out.len() - start
    }
}
