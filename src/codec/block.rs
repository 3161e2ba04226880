//! Whole pages, coded together: one block of up to 64 pages finds far more repetition than pages
//! one by one.

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use super::{CodecId, DecodeError};

/// LZ4 with its tables kept from block to block.
pub struct Lz4Encoder {
    // A table for blocks under 64 KiB costs half as much to clear, which counts for a single page.
    small: CompressTable,
    large: CompressTable,
}

impl Default for Lz4Encoder {
    fn default() -> Self {
        Lz4Encoder { small: CompressTable::small(), large: CompressTable::large() }
    }
}

impl Lz4Encoder {
    /// Codes `plain` into `coded`, which is overwritten. False when the result would not be smaller
    /// than `plain`; `coded` then holds nothing of use.
    pub fn encode(&mut self, plain: &[u8], coded: &mut Vec<u8>) -> bool {
        coded.resize(get_maximum_output_size(plain.len()), 0);
        let table =
            if plain.len() < usize::from(u16::MAX) { &mut self.small } else { &mut self.large };
        match compress_into_with_table(plain, coded, table) {
            Ok(length) if length < plain.len() => {
                coded.truncate(length);
                true
            }
            _ => false,
        }
    }
}

/// Decodes an LZ4 block that must fill `plain` exactly.
pub fn decode_lz4(coded: &[u8], plain: &mut [u8], codec: CodecId) -> Result<(), DecodeError> {
    match decompress_into(coded, plain) {
        Ok(length) if length == plain.len() => Ok(()),
        _ => Err(DecodeError::Block { codec, expected_bytes: plain.len() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::test_pages::noise_of;
    use proptest::prelude::*;

    #[test]
    fn noise_is_refused_rather_than_grown() {
        let mut lz4 = Lz4Encoder::default();
        let mut coded = Vec::new();
        assert!(!lz4.encode(&noise_of(1), &mut coded));
        assert!(lz4.encode(&[7; 4096], &mut coded));
        assert!(coded.len() < 64);
    }

    proptest! {
        #[test]
        fn lz4_round_trips_or_refuses(
            seed in prop::collection::vec(any::<u8>(), 1..2000),
            copies in 1usize..60,
        ) {
            let plain = seed.repeat(copies);
            let mut lz4 = Lz4Encoder::default();
            let mut coded = Vec::new();
            // Twice: the second block must not depend on what the tables kept from the first.
            for _ in 0..2 {
                if lz4.encode(&plain, &mut coded) {
                    prop_assert!(coded.len() < plain.len());
                    let mut back = vec![0; plain.len()];
                    prop_assert_eq!(decode_lz4(&coded, &mut back, CodecId::Lz4), Ok(()));
                    prop_assert_eq!(&back, &plain);
                    let mut longer = vec![0; plain.len() + 1];
                    prop_assert!(decode_lz4(&coded, &mut longer, CodecId::Lz4).is_err());
                    let mut shorter = vec![0; plain.len() - 1];
                    prop_assert!(decode_lz4(&coded, &mut shorter, CodecId::Lz4).is_err());
                }
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(coded in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut plain = [0; 4096];
            let _ = decode_lz4(&coded, &mut plain, CodecId::Lz4);
        }
    }
}
