//! A long run of bytes against an older one of its kind: the device state of a guest against that of
//! a rehearsal a while before.
//!
//! Most of it is as it was, at the same place; what has changed is found again near its old place, since a
//! device writes a few bytes more or less now and then. So it is coded block by block: one that is
//! as before costs four bytes, any other is a zstd frame with the old bytes around its place as prefix.

use super::zstandard::{ZstdDecoder, ZstdEncoder};
use super::{CodecId, DecodeError};

/// Coded at a time.
const BLOCK_BYTES: usize = 64 << 10;

/// How far bytes may have moved and still be found: the prefix reaches so far to both sides of a block.
const REACH_BYTES: usize = 64 << 10;

/// The coded length of a block that is as before.
const AS_BEFORE: u32 = 0;

/// Codes `new`, given that the decoder has `old`; with an empty `old` it is coded by itself.
pub fn encode(new: &[u8], old: &[u8], level: i32) -> Vec<u8> {
    let (mut encoder, mut coded, mut block) = (ZstdEncoder::default(), Vec::new(), Vec::new());
    for (at, plain) in blocks(new) {
        if old.get(at..at + plain.len()) == Some(plain) {
            coded.extend_from_slice(&AS_BEFORE.to_le_bytes());
            continue;
        }
        let shrunk = encoder.encode(plain, prefix(old, at), level, &mut block);
        let body = if shrunk { &block[..] } else { plain };
        coded.extend_from_slice(&(body.len() as u32).to_le_bytes());
        coded.extend_from_slice(body);
    }
    coded
}

/// The `plain_bytes` bytes that were coded, given the same `old`. The caller has bounded them.
///
/// # Errors
/// When `coded` is not what [`encode`] makes of so many bytes. With another `old` the result may
/// also be wrong without an error: the caller checks it.
pub fn decode(coded: &[u8], old: &[u8], plain_bytes: usize) -> Result<Vec<u8>, DecodeError> {
    let mut decoder = ZstdDecoder::default();
    let (mut plain, mut rest) = (Vec::new(), coded);
    while plain.len() < plain_bytes {
        let at = plain.len();
        let length = BLOCK_BYTES.min(plain_bytes - at);
        let broken = DecodeError::Block { codec: CodecId::Zstd, expected_bytes: length };
        let (coded_length, behind) = rest.split_first_chunk().ok_or(broken)?;
        let coded_length = u32::from_le_bytes(*coded_length);
        let (body, behind) = behind.split_at_checked(coded_length as usize).ok_or(broken)?;
        if coded_length == AS_BEFORE {
            plain.extend_from_slice(old.get(at..at + length).ok_or(broken)?);
        } else if body.len() == length {
            plain.extend_from_slice(body);
        } else {
            plain.resize(at + length, 0);
            decoder.decode(body, prefix(old, at), &mut plain[at..], CodecId::Zstd)?;
        }
        rest = behind;
    }
    match rest {
        [] => Ok(plain),
        _ => Err(DecodeError::Block { codec: CodecId::Zstd, expected_bytes: plain_bytes }),
    }
}

fn blocks(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    bytes.chunks(BLOCK_BYTES).enumerate().map(|(number, block)| (number * BLOCK_BYTES, block))
}

fn prefix(old: &[u8], at: usize) -> &[u8] {
    let end = (at + BLOCK_BYTES + REACH_BYTES).min(old.len());
    &old[at.saturating_sub(REACH_BYTES).min(end)..end]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes as devices have them: much is zero or repeats.
    fn state(seed: u64, bytes: usize) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..bytes).map(|at| if at / 512 % 3 == 0 { next() } else { (at / 64) as u8 }).collect()
    }

    #[test]
    fn a_few_changes_in_much_cost_a_few_bytes_even_when_all_behind_them_has_moved() {
        let old = state(1, 700 << 10);
        let mut new = old.clone();
        for at in (0..new.len()).step_by(90_000) {
            new[at] ^= 0x55;
        }
        new.splice(1000..1000, [9; 24]);
        let coded = encode(&new, &old, 3);
        assert!(coded.len() < 4000, "{} bytes", coded.len());
        assert_eq!(decode(&coded, &old, new.len()), Ok(new));
    }

    #[test]
    fn the_same_again_costs_almost_nothing() {
        let old = state(2, 1 << 20);
        assert_eq!(encode(&old, &old, 3).len(), 16 * 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn comes_back_as_it_was(
            old_bytes in 0usize..300_000,
            new_bytes in 0usize..300_000,
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40),
            other in any::<bool>(),
        ) {
            let old = state(3, old_bytes);
            let mut new = state(if other { 4 } else { 3 }, new_bytes);
            for (at, value) in flips {
                if !new.is_empty() {
                    let at = at.index(new.len());
                    new[at] = value;
                }
            }
            for base in [&old[..], &[]] {
                let coded = encode(&new, base, 1);
                let back = decode(&coded, base, new.len());
                prop_assert_eq!(back.as_ref(), Ok(&new));
                prop_assert!(decode(&[&coded[..], &[0]].concat(), base, new.len()).is_err());
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(
            coded in prop::collection::vec(any::<u8>(), 0..300),
            lengths in prop::collection::vec(0u32..100, 0..4),
            plain_bytes in 0usize..200_000,
        ) {
            let old = state(5, 100_000);
            let framed: Vec<u8> =
                lengths.iter().flat_map(|n| n.to_le_bytes()).chain(coded.clone()).collect();
            for coded in [&coded, &framed] {
                if let Ok(plain) = decode(coded, &old, plain_bytes) {
                    prop_assert_eq!(plain.len(), plain_bytes);
                }
            }
        }
    }
}
