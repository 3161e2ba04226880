//! What farfault itself takes of the host's memory.

use std::fs;

/// Memory of this process that is its own, in bytes: heap, stacks and program, as resident now. Without
/// shared memory, which is the guest's RAM here, mapped a second time. `None` where the kernel does not tell.
pub(super) fn own_memory_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kib = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches("kB").trim().parse().ok()
    };
    Some((kib("RssAnon:")? + kib("RssFile:")?) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_taken_counts_and_shared_memory_does_not() {
        let before = own_memory_bytes().unwrap();
        assert!(before > 1 << 20);
        let taken = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = own_memory_bytes().unwrap();
        assert!(after > before + (32 << 20), "{before} then {after}");
        drop(taken);
    }
}
