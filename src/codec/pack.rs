//! Compression of pages or deltas that are coded together: one block of up to 64 pages finds far more
//! repetition than pages one by one, and longer ones find hardly more.

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use super::zstandard::{ZstdDecoder, ZstdEncoder};
use super::{CodecId, DecodeError, Packing};

/// How to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// LZ4.
    Lz4,
    /// zstd at this level.
    Zstd {
        /// zstd's own number, also negative ones.
        level: i32,
    },
}

/// Compresses, with tables and contexts kept from block to block.
pub struct Compressor {
    // A table for blocks under 64 KiB costs half as much to clear, which counts for a single page.
    lz4_small: CompressTable,
    lz4_large: CompressTable,
    zstd: ZstdEncoder,
    part: Vec<u8>,
}

impl Default for Compressor {
    fn default() -> Self {
        Compressor {
            lz4_small: CompressTable::small(),
            lz4_large: CompressTable::large(),
            zstd: ZstdEncoder::default(),
            part: Vec::new(),
        }
    }
}

impl Compressor {
    /// Codes `plain` into `coded`, which is overwritten. [`Packing::Plain`] when the result would not be
    /// smaller than `plain`; `coded` then holds nothing of use.
    pub fn pack(&mut self, plain: &[u8], how: Compression, coded: &mut Vec<u8>) -> Packing {
        let packed = match how {
            Compression::None => None,
            Compression::Lz4 => self.lz4(plain, coded).then_some(Packing::Lz4),
            Compression::Zstd { level } => {
                self.zstd.encode(plain, &[], level, coded).then_some(Packing::Zstd)
            }
        };
        packed.unwrap_or(Packing::Plain)
    }

    /// Codes masks and changed words with zstd, the words with `old_words` as prefix: what stood in
    /// their places before. True when that is smaller; otherwise `coded` holds nothing of use.
    ///
    /// The masks are a zstd frame of their own, since the decoder needs them to gather the old
    /// words: their coded length in two bytes, then both frames. A part that does not shrink is
    /// there as it is.
    pub fn pack_with_old(
        &mut self,
        masks: &[u8],
        words: &[u8],
        old_words: &[u8],
        level: i32,
        coded: &mut Vec<u8>,
    ) -> bool {
        coded.clear();
        let masks_part = self.part(masks, &[], level);
        let masks_len = u16::try_from(masks_part.len()).expect("masks of 64 pages are 4 KiB");
        coded.extend_from_slice(&masks_len.to_le_bytes());
        coded.extend_from_slice(masks_part);
        coded.extend_from_slice(self.part(words, old_words, level));
        coded.len() < masks.len() + words.len()
    }

    /// Codes whole pages into `coded`, with zstd and with kin as prefix, pages that the other side holds: these are
    /// the first `kin_bytes` of `block`. [`Packing::Plain`] as for [`Self::pack`].
    pub fn pack_with_kin(
        &mut self,
        block: &[u8],
        kin_bytes: usize,
        level: i32,
        coded: &mut Vec<u8>,
    ) -> Packing {
        // Side by side in memory, so that zstd takes both for one stretch, which it searches a third faster than
        // a dictionary at another place.
        let (kin, plain) = block.split_at(kin_bytes);
        match (self.zstd.encode(plain, kin, level, coded), kin) {
            (true, []) => Packing::Zstd,
            (true, _) => Packing::ZstdKin,
            (false, _) => Packing::Plain,
        }
    }

    fn part<'a>(&'a mut self, plain: &'a [u8], prefix: &[u8], level: i32) -> &'a [u8] {
        let shrunk = self.zstd.encode(plain, prefix, level, &mut self.part);
        if shrunk { &self.part } else { plain }
    }

    fn lz4(&mut self, plain: &[u8], coded: &mut Vec<u8>) -> bool {
        coded.resize(get_maximum_output_size(plain.len()), 0);
        let small = plain.len() < usize::from(u16::MAX);
        let table = if small { &mut self.lz4_small } else { &mut self.lz4_large };
        match compress_into_with_table(plain, coded, table) {
            Ok(length) if length < plain.len() => {
                coded.truncate(length);
                true
            }
            _ => false,
        }
    }
}

/// Decompresses, with contexts kept from block to block.
#[derive(Default)]
pub struct Decompressor {
    zstd: ZstdDecoder,
}

impl Decompressor {
    /// Decodes a block in the packing of `codec`, LZ4 or zstd, which must fill `plain` exactly.
    ///
    /// # Errors
    /// When it does not, or is no such block.
    ///
    /// # Panics
    /// When `codec` has another packing.
    pub fn unpack(
        &mut self,
        codec: CodecId,
        coded: &[u8],
        plain: &mut [u8],
    ) -> Result<(), DecodeError> {
        match codec.packing() {
            Packing::Lz4 => match decompress_into(coded, plain) {
                Ok(length) if length == plain.len() => Ok(()),
                _ => Err(DecodeError::Block { codec, expected_bytes: plain.len() }),
            },
            Packing::Zstd => self.zstd.decode(coded, &[], plain, codec),
            Packing::Plain | Packing::ZstdOld | Packing::ZstdKin => {
                panic!("{codec} is not one compressed block by itself")
            }
        }
    }

    /// Decodes what [`Compressor::pack_with_kin`] made with this `kin`, which must fill `plain` exactly.
    ///
    /// # Errors
    /// When it does not, or is no such block.
    pub fn unpack_with_kin(
        &mut self,
        coded: &[u8],
        kin: &[u8],
        plain: &mut [u8],
    ) -> Result<(), DecodeError> {
        self.zstd.decode(coded, kin, plain, CodecId::ZstdKin)
    }

    /// Decodes the masks of what [`Compressor::pack_with_old`] made. Gives the coded words, for
    /// [`Self::unpack_words`].
    pub fn unpack_masks<'a>(
        &mut self,
        coded: &'a [u8],
        masks: &mut [u8],
    ) -> Result<&'a [u8], DecodeError> {
        let broken =
            DecodeError::Block { codec: CodecId::DeltaZstdOld, expected_bytes: masks.len() };
        let (masks_len, rest) = coded.split_first_chunk().ok_or(broken)?;
        let masks_len = usize::from(u16::from_le_bytes(*masks_len));
        let (coded_masks, coded_words) = rest.split_at_checked(masks_len).ok_or(broken)?;
        self.unpack_part(coded_masks, &[], masks)?;
        Ok(coded_words)
    }

    /// Decodes the words, given the old ones.
    pub fn unpack_words(
        &mut self,
        coded: &[u8],
        old_words: &[u8],
        words: &mut [u8],
    ) -> Result<(), DecodeError> {
        self.unpack_part(coded, old_words, words)
    }

    fn unpack_part(
        &mut self,
        coded: &[u8],
        prefix: &[u8],
        plain: &mut [u8],
    ) -> Result<(), DecodeError> {
        if coded.len() == plain.len() {
            plain.copy_from_slice(coded);
            return Ok(());
        }
        self.zstd.decode(coded, prefix, plain, CodecId::DeltaZstdOld)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::test_pages::noise_of;
    use proptest::prelude::*;

    const ALL: [(Compression, CodecId); 3] = [
        (Compression::Lz4, CodecId::Lz4),
        (Compression::Zstd { level: 1 }, CodecId::Zstd),
        (Compression::Zstd { level: 6 }, CodecId::Zstd),
    ];

    #[test]
    fn noise_is_refused_rather_than_grown() {
        let (mut compressor, mut coded) = (Compressor::default(), Vec::new());
        for (how, codec) in ALL {
            assert_eq!(compressor.pack(&noise_of(1), how, &mut coded), Packing::Plain);
            assert_eq!(compressor.pack(&[7; 4096], how, &mut coded), codec.packing());
            assert!(coded.len() < 64);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn blocks_round_trip_or_stay_plain(
            seed in prop::collection::vec(any::<u8>(), 1..2000),
            copies in 1usize..60,
            (how, codec) in prop::sample::select(&ALL[..]),
        ) {
            let plain = seed.repeat(copies);
            let (mut compressor, mut coded) = (Compressor::default(), Vec::new());
            let mut decompressor = Decompressor::default();
            // Twice: the second block must not depend on what was kept from the first.
            for _ in 0..2 {
                if compressor.pack(&plain, how, &mut coded) == Packing::Plain {
                    continue;
                }
                prop_assert!(coded.len() < plain.len());
                let mut back = vec![0; plain.len()];
                prop_assert_eq!(decompressor.unpack(codec, &coded, &mut back), Ok(()));
                prop_assert_eq!(&back, &plain);
                for wrong_length in [plain.len() - 1, plain.len() + 1] {
                    let mut other = vec![0; wrong_length];
                    prop_assert!(decompressor.unpack(codec, &coded, &mut other).is_err());
                }
            }
        }

        #[test]
        fn words_with_old_ones_round_trip(
            masks in prop::collection::vec(any::<u8>(), 1..300),
            old_words in prop::collection::vec(any::<u8>(), 1..3000),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..30),
        ) {
            let mut words = old_words.clone();
            flips.into_iter().for_each(|(at, value)| words[at.index(old_words.len())] = value);
            let (mut compressor, mut coded) = (Compressor::default(), Vec::new());
            let smaller = compressor.pack_with_old(&masks, &words, &old_words, 1, &mut coded);
            prop_assert_eq!(smaller, coded.len() < masks.len() + words.len());
            let mut decompressor = Decompressor::default();
            let (mut got_masks, mut got_words) = (vec![0; masks.len()], vec![0; words.len()]);
            let rest = decompressor.unpack_masks(&coded, &mut got_masks).unwrap();
            decompressor.unpack_words(rest, &old_words, &mut got_words).unwrap();
            prop_assert!(got_masks == masks && got_words == words);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(coded in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut decompressor = Decompressor::default();
            let mut plain = [0; 4096];
            for (_, codec) in ALL {
                let _ = decompressor.unpack(codec, &coded, &mut plain);
            }
            if let Ok(rest) = decompressor.unpack_masks(&coded, &mut [0; 64]) {
                let _ = decompressor.unpack_words(rest, &[1; 100], &mut plain);
            }
        }
    }
}
