//! The names of the codecs, and counts by codec for reports.

use std::fmt;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// How the pages of a frame are coded. The number is the one on the wire and never changes meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum CodecId {
    /// Pages of zeros, as runs.
    Zero = 0,
    /// Pages that were written to, but whose content is what the other side already holds.
    Unchanged = 1,
    /// Whole pages as they are.
    Raw = 2,
    /// Whole pages, together in one LZ4 block.
    Lz4 = 3,
    /// Changed words against an older version, as they are.
    Delta = 4,
    /// Changed words of many pages together in one LZ4 block.
    DeltaLz4 = 5,
}

impl CodecId {
    /// Every codec, in the order of the numbers on the wire.
    pub const ALL: [CodecId; 6] = [
        CodecId::Zero,
        CodecId::Unchanged,
        CodecId::Raw,
        CodecId::Lz4,
        CodecId::Delta,
        CodecId::DeltaLz4,
    ];

    /// The codec with this number on the wire.
    pub fn from_wire(number: u8) -> Option<CodecId> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The number on the wire.
    pub fn to_wire(self) -> u8 {
        self as u8
    }

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            CodecId::Zero => "zero",
            CodecId::Unchanged => "unchanged",
            CodecId::Raw => "raw",
            CodecId::Lz4 => "lz4",
            CodecId::Delta => "delta",
            CodecId::DeltaLz4 => "delta-lz4",
        }
    }

    /// True when the frame carries page bytes; otherwise it says everything in its page list.
    pub fn has_body(self) -> bool {
        !matches!(self, CodecId::Zero | CodecId::Unchanged)
    }

    /// True when each page builds on an older version of itself.
    pub fn has_bases(self) -> bool {
        matches!(self, CodecId::Unchanged) || self.is_delta()
    }

    /// True when the body is changed words.
    pub fn is_delta(self) -> bool {
        matches!(self, CodecId::Delta | CodecId::DeltaLz4)
    }
}

impl fmt::Display for CodecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Pages and bytes by codec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodecCounts {
    pages: [u64; CodecId::ALL.len()],
    bytes: [u64; CodecId::ALL.len()],
}

impl CodecCounts {
    /// Counts one frame of `pages` pages that takes `bytes` bytes, its header included.
    pub fn add(&mut self, codec: CodecId, pages: u64, bytes: u64) {
        self.pages[codec as usize] += pages;
        self.bytes[codec as usize] += bytes;
    }

    /// Pages that went by this codec.
    pub fn pages(&self, codec: CodecId) -> u64 {
        self.pages[codec as usize]
    }

    /// Bytes of the frames of this codec.
    pub fn bytes(&self, codec: CodecId) -> u64 {
        self.bytes[codec as usize]
    }

    /// Pages over all codecs.
    pub fn total_pages(&self) -> u64 {
        self.pages.iter().sum()
    }

    /// Bytes over all codecs.
    pub fn total_bytes(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// `(codec, pages, bytes)` of each codec that was used.
    pub fn used(&self) -> impl Iterator<Item = (CodecId, u64, u64)> + '_ {
        CodecId::ALL
            .into_iter()
            .map(|codec| (codec, self.pages(codec), self.bytes(codec)))
            .filter(|&(_, pages, _)| pages > 0)
    }
}

impl AddAssign for CodecCounts {
    fn add_assign(&mut self, other: CodecCounts) {
        for (codec, pages, bytes) in other.used() {
            self.add(codec, pages, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_the_wire_go_both_ways() {
        for (number, codec) in CodecId::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(codec.to_wire()), number);
            assert_eq!(CodecId::from_wire(number as u8), Some(codec));
        }
        assert_eq!(CodecId::from_wire(CodecId::ALL.len() as u8), None);
    }

    #[test]
    fn counts_add_up_by_codec() {
        let mut counts = CodecCounts::default();
        counts.add(CodecId::Lz4, 64, 100_000);
        let mut more = CodecCounts::default();
        more.add(CodecId::Lz4, 1, 2_000);
        more.add(CodecId::Zero, 7, 20);
        counts += more;
        assert_eq!(
            counts.used().collect::<Vec<_>>(),
            [(CodecId::Zero, 7, 20), (CodecId::Lz4, 65, 102_000)]
        );
        assert_eq!((counts.total_pages(), counts.total_bytes()), (72, 102_020));
    }
}
