//! Why a page frame was refused.

use super::frame::{FORMAT, MAGIC};
use crate::codec::{CodecId, DecodeError};
use crate::page::PageIndex;

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
    /// More changed words, lines or bytes than the pages have.
    #[error("page frame announces {units} changed units for {pages} pages")]
    Units {
        /// How many.
        units: u64,
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
    /// A page is said to be the copy of itself or of a page beyond the guest.
    #[error("page frame has a copy of {from}, which {page} cannot be")]
    CopyFrom {
        /// The page.
        page: PageIndex,
        /// What it is said to be a copy of.
        from: u64,
    },
    /// The frame needs the bases of all its pages, and one is no longer there.
    #[error(
        "page frame cannot be decoded without the base of page {page}: its pages must be asked for"
    )]
    BaseMissing {
        /// Which.
        page: PageIndex,
    },
    /// Header or decoded body is not what was sent.
    #[error("page frame fails its checksum")]
    Checksum,
}
