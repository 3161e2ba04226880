//! Page bytes to coded bytes and back: pure functions, without input or output, clock or threads.
//!
//! | file | what it codes |
//! |---|---|
//! | [`zero`] | pages of nothing but zeros, which need no bytes at all |
//! | [`block`] | whole pages, up to 64 together, in one compressed block |
//! | [`delta`] | pages that the other side holds in an older version: the words that changed |
//! | [`bases`] | the bounded store of those older versions |
//!
//! How coded pages are framed, checked and bounded on the wire is the business of [`crate::wire`].

pub mod bases;
pub mod block;
pub mod delta;
mod id;
#[cfg(test)]
pub(crate) mod test_pages;
pub mod zero;

pub use bases::BaseCache;
pub use id::{CodecCounts, CodecId};
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
    /// The masks of a delta name another number of words than there are.
    #[error("delta masks name {found} changed words, {expected} were announced")]
    Words {
        /// Set bits in all masks.
        found: usize,
        /// Words in the delta.
        expected: usize,
    },
}
