//! What the kernel tells of this host's memory.

/// A figure of `/proc/meminfo` in bytes, by its whole name, such as `MemAvailable`; `None` when it is not told.
pub(crate) fn meminfo_bytes(name: &str) -> Option<u64> {
    bytes_of(&std::fs::read_to_string("/proc/meminfo").ok()?, name)
}

fn bytes_of(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_found_by_its_whole_name() {
        let text = "MemTotal:       16384000 kB\nMemFreeable:  1 kB\nMemFree:    8388608 kB\n";
        assert_eq!(bytes_of(text, "MemFree"), Some(8 << 30));
        assert_eq!(bytes_of(text, "Mem"), None);
        assert_eq!(bytes_of("nothing of the kind", "MemFree"), None);
        assert!(meminfo_bytes("MemTotal").is_some());
    }
}
