//! zstd with contexts kept from frame to frame, and with a prefix that both sides hold.

use zstd::zstd_safe::{CCtx, DCtx, compress_bound};

use super::{CodecId, DecodeError};

/// Bytes with which zstd takes a prefix for a trained dictionary (`ZSTD_MAGIC_DICTIONARY`).
const DICTIONARY_MAGIC: [u8; 4] = 0xec30_a437_u32.to_le_bytes();

/// Codes with zstd.
#[derive(Default)]
pub(super) struct ZstdEncoder {
    context: CCtx<'static>,
}

impl ZstdEncoder {
    /// Codes `plain` into `coded`, which is overwritten; matches are also looked for in `prefix`, which the
    /// decoder must have too. False when the result would not be smaller than `plain`; `coded` then
    /// holds nothing of use.
    pub(super) fn encode(
        &mut self,
        plain: &[u8],
        prefix: &[u8],
        level: i32,
        coded: &mut Vec<u8>,
    ) -> bool {
        coded.clear();
        coded.reserve(compress_bound(plain.len()));
        // Not `ref_prefix`: it binds the context to the prefix's lifetime, so that a new one, of more
        // than a megabyte, would be needed for each frame. Size is the same within 2 % and speed better.
        let coding = self.context.compress_using_dict(coded, plain, as_content(prefix), level);
        matches!(coding, Ok(length) if length < plain.len())
    }
}

/// Decodes zstd.
#[derive(Default)]
pub(super) struct ZstdDecoder {
    context: DCtx<'static>,
}

impl ZstdDecoder {
    /// Decodes what must fill `plain` exactly. Memory does not depend on what `coded` announces.
    pub(super) fn decode(
        &mut self,
        coded: &[u8],
        prefix: &[u8],
        plain: &mut [u8],
        codec: CodecId,
    ) -> Result<(), DecodeError> {
        match self.context.decompress_using_dict(plain, coded, as_content(prefix)) {
            Ok(length) if length == plain.len() => Ok(()),
            _ => Err(DecodeError::Block { codec, expected_bytes: plain.len() }),
        }
    }
}

/// The part of a prefix that zstd cannot mistake for a trained dictionary, whatever a guest writes to
/// its memory. Both sides leave out the same.
fn as_content(mut prefix: &[u8]) -> &[u8] {
    while prefix.starts_with(&DICTIONARY_MAGIC) {
        prefix = &prefix[DICTIONARY_MAGIC.len()..];
    }
    prefix
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::test_pages::{noise_of, page_of};
    use proptest::prelude::*;

    fn round_trip(plain: &[u8], prefix: &[u8], level: i32) -> Option<usize> {
        let (mut encoder, mut decoder) = (ZstdEncoder::default(), ZstdDecoder::default());
        let (mut coded, mut back) = (Vec::new(), vec![0; plain.len()]);
        let mut length = None;
        // Twice: nothing may remain of the first frame in the contexts.
        for _ in 0..2 {
            if !encoder.encode(plain, prefix, level, &mut coded) {
                return None;
            }
            assert!(coded.len() < plain.len());
            assert_eq!(decoder.decode(&coded, prefix, &mut back, CodecId::Zstd), Ok(()));
            assert_eq!(back, plain);
            length = Some(coded.len());
        }
        length
    }

    #[test]
    fn noise_is_refused_rather_than_grown() {
        assert_eq!(round_trip(&noise_of(1), &[], 1), None);
    }

    #[test]
    fn a_prefix_makes_likeness_cheap() {
        let mut newer = noise_of(1);
        newer[100] ^= 1;
        assert!(round_trip(&newer, &noise_of(1), 1).is_some_and(|length| length < 200));
    }

    #[test]
    fn a_guest_cannot_pass_its_memory_off_as_a_dictionary() {
        let magic_only = DICTIONARY_MAGIC.repeat(100);
        let mut with_tail = magic_only.clone();
        with_tail.extend_from_slice(&page_of(2));
        for prefix in [&magic_only, &with_tail] {
            assert!(round_trip(&page_of(1), prefix, 3).is_some());
        }
    }

    #[test]
    fn another_length_than_announced_is_refused() {
        let (mut encoder, mut decoder) = (ZstdEncoder::default(), ZstdDecoder::default());
        let mut coded = Vec::new();
        assert!(encoder.encode(&page_of(1), &[], 1, &mut coded));
        for length in [4095, 4097] {
            let mut plain = vec![0; length];
            assert!(decoder.decode(&coded, &[], &mut plain, CodecId::Zstd).is_err());
        }
        // And a refusal leaves the context fit for the next frame.
        assert_eq!(decoder.decode(&coded, &[], &mut [0; 4096], CodecId::Zstd), Ok(()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn zstd_round_trips_or_refuses(
            seed in prop::collection::vec(any::<u8>(), 1..2000),
            copies in 1usize..60,
            prefix in prop::collection::vec(any::<u8>(), 0..3000),
            level in prop::sample::select(&[-1, 1, 3, 6][..]),
        ) {
            round_trip(&seed.repeat(copies), &prefix, level);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(
            coded in prop::collection::vec(any::<u8>(), 0..300),
            prefix in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let framed = [&[0x28, 0xb5, 0x2f, 0xfd][..], &coded].concat();
            for coded in [&coded, &framed] {
                let mut decoder = ZstdDecoder::default();
                let _ = decoder.decode(coded, &prefix, &mut [0; 4096], CodecId::Zstd);
            }
        }
    }
}
