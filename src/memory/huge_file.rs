//! A region's part of a file on hugetlbfs, as the destination writes it.
//!
//! Such a file differs from shared memory in four ways. It is mapped, and its holes are made, by huge pages only. It
//! does not tell its holes, so what may hold something is noted here. It has no `write(2)`, and a store through a
//! mapping that finds the pool of huge pages empty is a SIGBUS: so the kernel is asked to copy into the mapping
//! (`process_vm_writev(2)` on this process), which says `EFAULT` then. And what was once reserved of the pool is
//! not reserved any more behind a hole that was made: so it is reserved again, lest the guest die of its next touch.

use std::fs::File;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;

/// The huge pages that a guest can be received into: 2 MiB.
pub(super) const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The part of the file, from `start_bytes` on.
#[derive(Debug)]
pub(super) struct HugeFile {
    alias: MmapRaw,
    start_bytes: u64,
    /// Huge pages that may not be holes, in order. After a takeover that is not known: all of them.
    held: Vec<AtomicBool>,
}

impl HugeFile {
    /// Maps it, and reserves nothing by that: after a takeover the pool may have no room for what the guest's balloon has
    /// given back to it, and all the guest holds is mapped all the same.
    pub(super) fn map(file: &File, start_bytes: u64, size_bytes: u64) -> io::Result<Self> {
        let alias = options(start_bytes, size_bytes).no_reserve_swap().map_raw(file)?;
        // A crash of farfault must not write the guest's memory to disk.
        alias.advise(Advice::DontDump)?;
        let held = (0..size_bytes / HUGE_PAGE_BYTES).map(|_| AtomicBool::new(true)).collect();
        Ok(HugeFile { alias, start_bytes, held })
    }

    /// Where in the file, from position `at` up to `end`, there may be content.
    pub(super) fn next_held(&self, at: u64, end: u64) -> Option<u64> {
        self.next(at, end, true)
    }

    /// Where from position `at` up to `end` there is none.
    pub(super) fn next_hole(&self, at: u64, end: u64) -> Option<u64> {
        self.next(at, end, false)
    }

    fn next(&self, at: u64, end: u64, held: bool) -> Option<u64> {
        let (from, to) = (at - self.start_bytes, end - self.start_bytes);
        let mut pages = from / HUGE_PAGE_BYTES..to.div_ceil(HUGE_PAGE_BYTES);
        let found = pages.find(|n| self.held[*n as usize].load(Ordering::Acquire) == held)?;
        Some(self.start_bytes + (found * HUGE_PAGE_BYTES).max(from))
    }

    /// Writes at position `at`; gives how many bytes were written, which is more than none.
    ///
    /// # Errors
    /// [`Errno::ENOSPC`] when the pool of huge pages is empty.
    pub(super) fn write_at(&self, bytes: &[u8], at: u64) -> Result<usize, Errno> {
        let offset = (at - self.start_bytes) as usize;
        assert!(offset + bytes.len() <= self.alias.len(), "beyond the region");
        let written = offset as u64 / HUGE_PAGE_BYTES
            ..((offset + bytes.len()) as u64).div_ceil(HUGE_PAGE_BYTES);
        // Before the content is there: who is told of a hole finds one.
        written.for_each(|n| self.held[n as usize].store(true, Ordering::Release));
        let base = self.alias.as_mut_ptr() as usize + offset;
        let there = [RemoteIoVec { base, len: bytes.len() }];
        match process_vm_writev(Pid::this(), &[IoSlice::new(bytes)], &there) {
            Ok(0) | Err(Errno::EFAULT) => Err(Errno::ENOSPC),
            other => other,
        }
    }

    /// Reserves room in the pool for all of it that is not there yet.
    pub(super) fn reserve(&self, file: &File) -> io::Result<()> {
        reserve(file, self.start_bytes, self.alias.len() as u64)
    }

    /// The part of `file` from position `at` on was made a hole: notes that, and reserves its room again.
    pub(super) fn punched(&self, file: &File, at: u64, length_bytes: u64) -> io::Result<()> {
        let first = (at - self.start_bytes) / HUGE_PAGE_BYTES;
        for n in first..first + length_bytes / HUGE_PAGE_BYTES {
            self.held[n as usize].store(false, Ordering::Release);
        }
        reserve(file, at, length_bytes)
    }
}

/// To map a file on hugetlbfs reserves of the pool what is not there yet, unless it is told not to. That stays with
/// the file.
fn reserve(file: &File, start_bytes: u64, size_bytes: u64) -> io::Result<()> {
    options(start_bytes, size_bytes).map_raw(file).map(drop)
}

fn options(start_bytes: u64, size_bytes: u64) -> MmapOptions {
    let mut options = MmapOptions::new();
    options.offset(start_bytes).len(size_bytes as usize);
    options
}

#[cfg(test)]
mod tests;
