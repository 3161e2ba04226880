//! How much of this host a migration takes when the operator does not say.

use crate::codec::SentLimits;
use crate::cores::cores;
use crate::meminfo::meminfo_bytes;

/// Of the memory that is available when the migration begins, the base cache takes an eighth
const BASE_CACHE_SHARE: u64 = 8;
/// and line fingerprints a thirty-second,
const LINES_SHARE: u64 = 32;
/// but none of a host that has less than this left.
const LINES_NEED_BYTES: u64 = 1 << 30;
/// More threads than this fill no link.
const MAX_ENCODERS: usize = 8;

/// What a source keeps of what it sends.
pub fn default_limits() -> SentLimits {
    limits_of(meminfo_bytes("MemAvailable").unwrap_or(0))
}

/// As many threads as this process may use at a time, up to eight.
pub fn default_encoders() -> usize {
    cores().min(MAX_ENCODERS)
}

fn limits_of(available_bytes: u64) -> SentLimits {
    let has_room = available_bytes >= LINES_NEED_BYTES;
    SentLimits {
        base_cache_bytes: (available_bytes / BASE_CACHE_SHARE) as usize,
        lines_bytes: if has_room { (available_bytes / LINES_SHARE) as usize } else { 0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_what_is_available_and_no_lines_where_that_is_little() {
        let limits = limits_of(8 << 30);
        assert_eq!((limits.base_cache_bytes, limits.lines_bytes), (1 << 30, 256 << 20));
        let little = limits_of(512 << 20);
        assert_eq!((little.base_cache_bytes, little.lines_bytes), (64 << 20, 0));
    }
}
