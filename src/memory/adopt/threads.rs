//! Which thread of a process may be borrowed for a system call.

use std::path::PathBuf;

use crate::memory::MemoryError;

/// Threads of the process that only run in the kernel (io_uring and vhost workers): they cannot be
/// traced. `PF_IO_WORKER`, `PF_USER_WORKER`, `PF_KTHREAD`.
const KERNEL_THREAD_FLAGS: u64 = 0x10 | 0x4000 | 0x20_0000;

/// Fields of `/proc/PID/task/TID/stat`, or of `/proc/PID/stat`, that we need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) state: char,
    pub(super) flags: u64,
    pub(super) cpu_ticks: u64,
    /// Clock ticks after boot.
    pub(super) start_time: u64,
}

pub(super) fn parse_stat(text: &str) -> Option<Stat> {
    // The name in parentheses may hold anything, also parentheses.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        flags: number(6)?,
        cpu_ticks: number(11)?.checked_add(number(12)?)?,
        start_time: number(19)?,
    })
}

pub(super) fn read_stat(path: PathBuf) -> Result<Stat, MemoryError> {
    match std::fs::read_to_string(&path) {
        Ok(text) => parse_stat(&text).ok_or(MemoryError::ProcFormat { path, line: text }),
        Err(source) => Err(MemoryError::Proc { path, source }),
    }
}

/// Threads to try, best first: helpers that sleep and have used the least processor time, so that
/// the guest does not notice; the main thread last. None of `avoid` (the vCPUs) is among them, unless
/// it is the main thread.
pub(super) fn candidates(pid: u32, avoid: &[u32]) -> Result<Vec<u32>, MemoryError> {
    let path = PathBuf::from(format!("/proc/{pid}/task"));
    let entries = std::fs::read_dir(&path);
    let entries = entries.map_err(|source| MemoryError::Proc { path: path.clone(), source })?;
    let threads = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let mut helpers: Vec<(bool, u64, u32)> = threads
        .filter(|thread| *thread != pid && !avoid.contains(thread))
        // A thread that ends meanwhile is no candidate.
        .filter_map(|thread| {
            let stat = read_stat(path.join(thread.to_string()).join("stat")).ok()?;
            let usable = stat.flags & KERNEL_THREAD_FLAGS == 0 && !"DZXT".contains(stat.state);
            usable.then_some((stat.state != 'S', stat.cpu_ticks, thread))
        })
        .collect();
    helpers.sort_unstable();
    Ok(helpers.into_iter().map(|(_, _, thread)| thread).chain([pid]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::testing::TestGuest;
    use crate::memory::{GuestMemory, MemoryLayout, RegionLayout};

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let text =
            "812 (CPU 0/KVM) x) S 1 2 3 4 5 4194368 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        let stat = Stat { state: 'S', flags: 0x40_0040, cpu_ticks: 23, start_time: 4711 };
        assert_eq!(parse_stat(text), Some(stat));
        assert_eq!(parse_stat("812 (x"), None);
    }

    #[test]
    fn the_main_thread_comes_last_and_vcpus_not_at_all() {
        let region = RegionLayout { name: "ram".to_owned(), size_bytes: 4096 };
        let memory = GuestMemory::create(&MemoryLayout::new(vec![region])).unwrap();
        let mut guest = TestGuest::start(&memory);
        assert_eq!(candidates(guest.pid(), &[]).unwrap(), [guest.pid()]);
        // Three kinds that stay, none of the kind that starts threads of its own.
        guest.start_threads(3);
        let threads = candidates(guest.pid(), &[]).unwrap();
        assert_eq!(threads.len(), 4);
        assert_eq!(threads.last(), Some(&guest.pid()));
        assert_eq!(candidates(guest.pid(), &threads[..2]).unwrap(), threads[2..]);
        assert_eq!(candidates(guest.pid(), &threads).unwrap(), [guest.pid()]);
    }
}
