//! How many processors this process may use.

use std::sync::OnceLock;

/// So many threads run at a time, as of the first call: asking the system each time reads a dozen files, far too long
/// where pages are looked at.
pub(crate) fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}
