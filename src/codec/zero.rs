//! Finding pages of zeros.

use crate::page::PageBytes;

/// Bytes looked at between two decisions: long enough to be vectorised, short enough that a page
/// with anything in it costs little.
const STRIDE_BYTES: usize = 256;

/// True when every byte of the page is zero.
pub fn is_zero(page: &PageBytes) -> bool {
    let (strides, rest) = page.as_chunks::<STRIDE_BYTES>();
    debug_assert!(rest.is_empty());
    // No early exit inside a stride, so that the compiler can use vector registers.
    strides.iter().all(|stride| stride.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_SIZE_BYTES;

    #[test]
    fn a_single_set_bit_anywhere_is_seen() {
        let mut page = [0u8; PAGE_SIZE_BYTES];
        assert!(is_zero(&page));
        for at in 0..PAGE_SIZE_BYTES {
            page[at] = 1 << (at % 8);
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }
}
