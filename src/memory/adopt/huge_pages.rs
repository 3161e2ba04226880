//! Gathers the small pages of a process's guest RAM into huge ones.
//!
//! While pages are missing, guest RAM on the destination is mapped page by page: so a fault moves 4 KiB and
//! not 2 MiB. When all of it is there, the kernel copies what lies in 512 pages into one huge page
//! (`MADV_COLLAPSE`, 6.1), whatever the settings in `/sys/kernel/mm/transparent_hugepage` say except
//! `deny` for shared memory. It does so only where the process has mapped the file at an address that is
//! a multiple of 2 MiB away from the place in the file; QEMU does that when it is told to (`align=2M`).

use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::Adopted;
use crate::memory::{MemoryError, sys};

/// 2 MiB, as everywhere on x86-64.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// How much of a guest's RAM is mapped by huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    /// When the last page had come.
    pub before_bytes: u64,
    /// After they were gathered.
    pub after_bytes: u64,
}

impl Adopted {
    /// Gathers the pages of these regions (address and length in the process) into huge pages, where that
    /// can be. Parts that are holes, or lie badly, stay as they are, and so does RAM on hugetlbfs. The process runs meanwhile; a thread
    /// that touches what is being moved waits for it, some milliseconds.
    pub fn gather_huge_pages(&self, regions: &[(u64, u64)]) -> Result<HugePages, MemoryError> {
        let before_bytes = self.mapped_by_huge_pages(regions)?;
        for (address, size_bytes) in regions {
            let mut at = address.next_multiple_of(HUGE_PAGE_BYTES);
            while at + HUGE_PAGE_BYTES <= address + size_bytes {
                match sys::collapse(self.pidfd.as_fd(), at, HUGE_PAGE_BYTES) {
                    // Nothing there, no huge page to be had, or somebody holds a page at the moment.
                    Ok(()) | Err(Errno::EFAULT | Errno::ENOMEM | Errno::EAGAIN | Errno::EBUSY) => {}
                    // It lies badly, and so does all behind it.
                    Err(Errno::EINVAL) => break,
                    Err(Errno::ESRCH) => return Err(MemoryError::ProcessGone),
                    Err(source) => {
                        let action = "gather its pages into huge pages";
                        return Err(MemoryError::Process { pid: self.pid, action, source });
                    }
                }
                at += HUGE_PAGE_BYTES;
            }
        }
        Ok(HugePages { before_bytes, after_bytes: self.mapped_by_huge_pages(regions)? })
    }

    fn mapped_by_huge_pages(&self, regions: &[(u64, u64)]) -> Result<u64, MemoryError> {
        let path = PathBuf::from(format!("/proc/{}/smaps", self.pid));
        match std::fs::read(&path) {
            Ok(text) => Ok(huge_bytes(&String::from_utf8_lossy(&text), regions)),
            Err(source) => Err(MemoryError::Proc { path, source }),
        }
    }
}

/// Of shared memory, of other files, and of RAM on hugetlbfs, whether somebody else has mapped it too or not.
const MAPPED_BY_HUGE_PAGES: [&str; 4] =
    ["ShmemPmdMapped:", "FilePmdMapped:", "Shared_Hugetlb:", "Private_Hugetlb:"];

/// What the text of `/proc/PID/smaps` says of mappings that begin within `regions`.
fn huge_bytes(smaps: &str, regions: &[(u64, u64)]) -> u64 {
    let mut within = false;
    let mut bytes = 0;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((start, _)) = first.split_once('-')
            && let Ok(start) = u64::from_str_radix(start, 16)
        {
            let holds = |(address, size): &(u64, u64)| (*address..address + size).contains(&start);
            within = regions.iter().any(holds);
        } else if within && MAPPED_BY_HUGE_PAGES.contains(&first) {
            let kib: u64 = words.next().and_then(|number| number.parse().ok()).unwrap_or(0);
            bytes += kib << 10;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use memmap2::{MmapOptions, MmapRaw};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::page::PAGE_SIZE_BYTES;

    const MAP_BYTES: usize = 8 << 20;

    /// A mapping that lies as `QEMU` makes it with `align=2M`: by mapping the place in the file that fits
    /// the address that the kernel has chosen before.
    fn well_placed_mapping(file: &File) -> MmapRaw {
        let mut offset = 0;
        for _ in 0..100 {
            let map = MmapOptions::new().offset(offset).len(MAP_BYTES).map_raw(file).unwrap();
            let address = map.as_ptr() as u64;
            if address % HUGE_PAGE_BYTES == offset {
                return map;
            }
            offset = address % HUGE_PAGE_BYTES;
        }
        panic!("the kernel maps at another address each time");
    }

    #[test]
    fn small_pages_are_gathered_and_keep_what_is_in_them() {
        let setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
        let setting = std::fs::read_to_string(setting).unwrap_or_default();
        if setting.is_empty() || setting.contains("[deny]") {
            eprintln!("*** SKIPPED: no huge pages of shared memory: {setting:?} ***");
            return;
        }
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(16 << 20).unwrap();
        let content: Vec<u8> = (0..16usize << 20).map(|at| (at / PAGE_SIZE_BYTES) as u8).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
        let map = well_placed_mapping(&file);
        let regions = [(map.as_ptr() as u64, MAP_BYTES as u64)];
        let this = Adopted::attach(std::process::id()).unwrap();
        let gathered = this.gather_huge_pages(&regions).unwrap();
        assert_eq!(gathered.before_bytes, 0);
        if gathered.after_bytes == 0 {
            eprintln!("*** SKIPPED: this host has no huge page to give ***");
            return;
        }
        let mut after = vec![0; content.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut after, 0).unwrap();
        assert!(after == content);
    }
    #[test]
    fn only_the_mappings_of_the_regions_count() {
        let smaps = "7f0000000000-7f0000400000 rw-s 00000000 00:01 9   /dev/shm/ram\n\
                     Rss:                4096 kB\n\
                     ShmemPmdMapped:     4096 kB\n\
                     7f0000400000-7f0000800000 rw-s 00400000 00:01 9   /dev/shm/ram\n\
                     ShmemPmdMapped:     2048 kB\n\
                     Shared_Hugetlb:        0 kB\n\
                     Private_Hugetlb:    4096 kB\n\
                     7f1000000000-7f1000200000 rw-s 00000000 00:01 8   /dev/shm/other\n\
                     ShmemPmdMapped:     2048 kB\n";
        assert_eq!(huge_bytes(smaps, &[(0x7f00_0000_0000, 0x80_0000)]), 10 << 20);
        assert_eq!(huge_bytes(smaps, &[]), 0);
    }
}
