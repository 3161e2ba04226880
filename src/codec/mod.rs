//! Page bytes to coded bytes and back: pure functions, without input or output, clock or threads.
//!
//! | file | what it codes |
//! |---|---|
//! | [`zero`] | pages of nothing but zeros, which need no bytes at all |
//! | [`delta`] | pages that the other side holds in an older version: what changed |
//! | [`bases`] | the bounded store of those older versions |
//! | [`lines`] | fingerprints of sent pages, for which there is no room in that store |
//! | [`copies`] | contents by their hash |
//! | [`kin`] | pages that share stretches of bytes with others |
//! | [`sent`] | the account of what was sent, made of the last three |
//! | [`pack`] | compression of whole pages or deltas, up to 64 pages together |
//! | [`ladder`] | which codec for which link |
//! | [`blob`] | device state against that of a rehearsal |
//! | [`xbzrle`] | QEMU's delta, for comparison in experiments |
//!
//! How coded pages are framed, checked and bounded on the wire is the business of [`crate::wire`].

pub mod bases;
pub mod blob;
pub mod copies;
pub mod delta;
mod id;
pub mod kin;
pub mod ladder;
pub mod lines;
pub mod pack;
pub mod sent;
#[cfg(test)]
pub(crate) mod test_pages;
pub mod xbzrle;
pub mod zero;
mod zstandard;

pub use bases::BaseCache;
pub use copies::CopyIndex;
pub use id::{CodecCounts, CodecId, Content, Packing};
pub use kin::{Kin, KinFinder};
pub use ladder::{CodecChoice, DeltaCodec, PageCodec};
pub use lines::{LineFingerprint, LineStore};
pub use sent::{ContentHash, Known, SentLimits, SentMemory, SentPages};
pub use zero::is_zero;

/// Why coded bytes could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The compressed block is not one, or does not fit what was announced.
    #[error("{codec} block is broken or not {expected_bytes} bytes long when decoded")]
    Block {
        /// The codec of the block.
        codec: CodecId,
        /// What the frame announced.
        expected_bytes: usize,
    },
    /// The masks of a delta name another number of words or lines than there are.
    #[error("delta masks name {found} changed words or lines, {expected} were announced")]
    Units {
        /// Set bits in all masks.
        found: usize,
        /// Words or lines in the delta.
        expected: usize,
    },
    /// The codings of XBZRLE are of other lengths than is said.
    #[error("xbzrle codings of {found} bytes are announced, {expected} are there")]
    Runs {
        /// The sum of the lengths.
        found: usize,
        /// Bytes of the codings.
        expected: usize,
    },
    /// The coding of a page is not one.
    #[error("an xbzrle coding is broken or leaves the page")]
    Run,
}
