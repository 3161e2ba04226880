//! The names of the codecs, and counts by codec for reports.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// How the pages of a frame are coded: what it carries ([`Content`]) and how that is compressed
/// ([`Packing`]). The number is the one on the wire and never changes its meaning.
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
    /// Whole pages, together in one zstd frame.
    Zstd = 6,
    /// Changed words of many pages together in one zstd frame.
    DeltaZstd = 7,
    /// The same, with the words that were there before as the compressor's prefix.
    DeltaZstdOld = 8,
    /// Changed 64-byte lines, as they are.
    Lines = 9,
    /// Changed lines of many pages together in one LZ4 block.
    LinesLz4 = 10,
    /// Changed lines of many pages together in one zstd frame.
    LinesZstd = 11,
    /// Pages with the content of another page that the other side holds.
    Copy = 12,
    /// Runs of changed bytes, as QEMU codes them: for comparison in experiments.
    Xbzrle = 13,
    /// Whole pages, together in one zstd frame, with pages like them that the other side holds as its prefix.
    ZstdKin = 14,
}

/// What the frames of a codec carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: the pages are zero.
    Zero,
    /// Nothing: the pages are as their bases.
    Unchanged,
    /// Whole pages.
    Whole,
    /// Changed words and where they go.
    Words,
    /// Changed lines and where they go.
    Lines,
    /// Runs of changed bytes and of bytes that stay.
    Runs,
    /// Nothing: the pages are as other pages.
    Copy,
}

/// How the content is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// As one LZ4 block.
    Lz4,
    /// As one zstd frame.
    Zstd,
    /// As zstd frames, of which the one with the new words has the old words as prefix.
    ZstdOld,
    /// As one zstd frame, with other pages as prefix.
    ZstdKin,
}

impl CodecId {
    /// Every codec, in the order of the numbers on the wire.
    pub const ALL: [CodecId; 15] = [
        CodecId::Zero,
        CodecId::Unchanged,
        CodecId::Raw,
        CodecId::Lz4,
        CodecId::Delta,
        CodecId::DeltaLz4,
        CodecId::Zstd,
        CodecId::DeltaZstd,
        CodecId::DeltaZstdOld,
        CodecId::Lines,
        CodecId::LinesLz4,
        CodecId::LinesZstd,
        CodecId::Copy,
        CodecId::Xbzrle,
        CodecId::ZstdKin,
    ];

    /// The codec with this number on the wire.
    pub fn from_wire(number: u8) -> Option<CodecId> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The number on the wire.
    pub fn to_wire(self) -> u8 {
        self as u8
    }

    /// The codec that carries `content` in this packing, if there is one.
    pub fn of(content: Content, packing: Packing) -> Option<CodecId> {
        Self::ALL.into_iter().find(|id| id.content() == content && id.packing() == packing)
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
            CodecId::Zstd => "zstd",
            CodecId::DeltaZstd => "delta-zstd",
            CodecId::DeltaZstdOld => "delta-zstd-old",
            CodecId::Lines => "lines",
            CodecId::LinesLz4 => "lines-lz4",
            CodecId::LinesZstd => "lines-zstd",
            CodecId::Copy => "copy",
            CodecId::Xbzrle => "xbzrle",
            CodecId::ZstdKin => "zstd-kin",
        }
    }

    /// What its frames carry.
    pub fn content(self) -> Content {
        match self {
            CodecId::Zero => Content::Zero,
            CodecId::Unchanged => Content::Unchanged,
            CodecId::Raw | CodecId::Lz4 | CodecId::Zstd | CodecId::ZstdKin => Content::Whole,
            CodecId::Delta | CodecId::DeltaLz4 => Content::Words,
            CodecId::DeltaZstd | CodecId::DeltaZstdOld => Content::Words,
            CodecId::Lines | CodecId::LinesLz4 | CodecId::LinesZstd => Content::Lines,
            CodecId::Copy => Content::Copy,
            CodecId::Xbzrle => Content::Runs,
        }
    }

    /// How that is compressed.
    pub fn packing(self) -> Packing {
        match self {
            CodecId::Lz4 | CodecId::DeltaLz4 | CodecId::LinesLz4 => Packing::Lz4,
            CodecId::Zstd | CodecId::DeltaZstd | CodecId::LinesZstd => Packing::Zstd,
            CodecId::DeltaZstdOld => Packing::ZstdOld,
            CodecId::ZstdKin => Packing::ZstdKin,
            _ => Packing::Plain,
        }
    }

    /// True when no page of a frame can be decoded without the bases of all its pages.
    pub fn needs_all_bases(self) -> bool {
        self.packing() == Packing::ZstdOld
    }
}

impl Content {
    /// True when the frame has a body; otherwise it says everything in its header.
    pub fn has_body(self) -> bool {
        matches!(self, Content::Whole | Content::Words | Content::Lines | Content::Runs)
    }

    /// True when each page builds on another content: of itself, or, for a copy, of another page.
    pub fn has_bases(self) -> bool {
        !matches!(self, Content::Zero | Content::Whole)
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

    /// Pages by the name of their codec, as a report has them.
    pub fn pages_by_name(&self) -> BTreeMap<Cow<'static, str>, u64> {
        self.used().map(|(codec, pages, _)| (codec.name().into(), pages)).collect()
    }

    /// Bytes by the name of their codec, as a report has them.
    pub fn bytes_by_name(&self) -> BTreeMap<Cow<'static, str>, u64> {
        self.used().map(|(codec, _, bytes)| (codec.name().into(), bytes)).collect()
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
            assert_eq!(CodecId::of(codec.content(), codec.packing()), Some(codec));
        }
        assert_eq!(CodecId::from_wire(CodecId::ALL.len() as u8), None);
        assert_eq!(CodecId::of(Content::Whole, Packing::ZstdOld), None);
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
