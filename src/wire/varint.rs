//! Numbers as LEB128: seven bits a byte, least significant first, the top bit set on all but the last.

/// Bytes of the longest number.
pub(super) const MAX_BYTES: usize = 10;

/// Appends `value`.
pub(super) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes a number off the front of `input`. `None` when it is cut short, does not fit 64 bits, or
/// is written longer than it need be: each number has one spelling.
pub(super) fn take(input: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for (at, &byte) in input.iter().enumerate().take(MAX_BYTES) {
        let bits = u64::from(byte & 0x7f);
        if at == MAX_BYTES - 1 && bits > 1 {
            return None;
        }
        value |= bits << (7 * at);
        if byte & 0x80 == 0 {
            if byte == 0 && at > 0 {
                return None;
            }
            *input = &input[at + 1..];
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_round_trip_and_leave_the_rest(shift in 0u32..64, value: u64) {
            let value = value >> shift;
            let mut bytes = Vec::new();
            put(&mut bytes, value);
            prop_assert!(bytes.len() <= MAX_BYTES);
            bytes.push(0xaa);
            let mut input = &bytes[..];
            prop_assert_eq!(take(&mut input), Some(value));
            prop_assert_eq!(input, &[0xaa][..]);
        }

        #[test]
        fn what_is_read_has_one_spelling(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            let mut input = &bytes[..];
            if let Some(value) = take(&mut input) {
                let mut again = Vec::new();
                put(&mut again, value);
                prop_assert_eq!(&again[..], &bytes[..bytes.len() - input.len()]);
            }
        }
    }

    #[test]
    fn short_long_and_too_large_numbers_are_refused() {
        for bytes in [&[][..], &[0x80], &[0x80, 0x00], &[0xff; 10], &[0x80; 11]] {
            let mut input = bytes;
            assert_eq!(take(&mut input), None, "{bytes:x?}");
            assert_eq!(input, bytes, "a refused number must not be taken");
        }
    }
}
