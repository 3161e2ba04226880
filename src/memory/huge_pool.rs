//! For tests: pages of the kernel's pool of huge pages, taken for their time, and guest RAM of them.

use std::cell::Cell;
use std::fs::File;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::huge_file::HUGE_PAGE_BYTES;
use super::{Access, GuestMemory, MemoryError, MemoryLayout, RegionBacking, RegionLayout};
use crate::page::PAGE_SIZE_BYTES;

const SIZE: &str = "/proc/sys/vm/nr_hugepages";

/// Who is at work. A test that counts what the pool has is the only one, and no other test may have forked: a child
/// keeps what its parent had mapped.
static TURNS: Mutex<Turns> = Mutex::new(Turns { children: 0, pool: false });
static CHANGED: Condvar = Condvar::new();

struct Turns {
    children: u32,
    pool: bool,
}

thread_local! {
    static HAS_POOL: Cell<bool> = const { Cell::new(false) };
}

fn turns() -> MutexGuard<'static, Turns> {
    TURNS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn when(
    mut turns: MutexGuard<'static, Turns>,
    free: fn(&Turns) -> bool,
) -> MutexGuard<'static, Turns> {
    while !free(&turns) {
        turns = CHANGED.wait(turns).unwrap_or_else(PoisonError::into_inner);
    }
    turns
}

/// Held while there is a child.
pub(super) struct Forked;

impl Forked {
    /// Waits until no other test has the pool.
    pub(super) fn begin() -> Self {
        let turns = turns();
        let mut turns = if HAS_POOL.get() { turns } else { when(turns, |turns| !turns.pool) };
        turns.children += 1;
        Forked
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        turns().children -= 1;
        CHANGED.notify_all();
    }
}

/// Huge pages that the pool has more than before; given back when dropped.
pub(super) struct HugePool {
    /// What the pool had.
    before: u64,
    /// Against tests in other processes.
    _lock: Flock<File>,
}

impl HugePool {
    /// `None`, with a loud word, when the kernel has not so many to give.
    pub(super) fn of(pages: u64) -> Option<Self> {
        let Ok(file) = File::open(SIZE) else {
            eprintln!("*** SKIPPED: this kernel has no huge pages ***");
            return None;
        };
        when(turns(), |turns| turns.children == 0 && !turns.pool).pool = true;
        HAS_POOL.set(true);
        let lock = Flock::lock(file, FlockArg::LockExclusive);
        let _lock = lock.map_err(|(_, errno)| errno).unwrap();
        let before = size();
        let pool = HugePool { before, _lock };
        let _ = std::fs::write(SIZE, (before + pages).to_string());
        if size() == before + pages {
            return Some(pool);
        }
        eprintln!("*** SKIPPED: no {pages} huge pages to be had ***");
        None
    }

    /// Gives `pages` of them back, free ones.
    pub(super) fn shrink(&self, pages: u64) {
        std::fs::write(SIZE, (size() - pages).to_string()).unwrap();
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        let _ = std::fs::write(SIZE, self.before.to_string());
        HAS_POOL.set(false);
        turns().pool = false;
        CHANGED.notify_all();
    }
}

fn size() -> u64 {
    number(&std::fs::read_to_string(SIZE).unwrap_or_default())
}

/// Huge pages that are free and promised to nobody.
pub(super) fn unreserved() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let of = |name: &str| number(text.lines().find_map(|line| line.strip_prefix(name)).unwrap());
    of("HugePages_Free:") - of("HugePages_Rsvd:")
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// A region of so many pages in a file of huge pages, or of small ones.
pub(super) fn backing(name: &str, pages: u64, huge: bool) -> RegionBacking {
    let flags =
        if huge { MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB } else { MFdFlags::empty() };
    let file = File::from(memfd_create(name, flags | MFdFlags::MFD_CLOEXEC).unwrap());
    let layout = RegionLayout { name: name.to_owned(), size_bytes: pages * PAGE_SIZE_BYTES as u64 };
    file.set_len(layout.size_bytes.next_multiple_of(if huge { HUGE_PAGE_BYTES } else { 1 }))
        .unwrap();
    RegionBacking { layout, file, file_offset_bytes: 0 }
}

/// RAM of `small` pages in shared memory and, behind them, of `huge` ones in huge pages, all holes.
pub(super) fn memory(small: u64, huge: u64) -> Result<GuestMemory, MemoryError> {
    let regions = vec![backing("a", small, false), backing("b", huge, true)];
    let memory = GuestMemory::map(regions, Access::ReadWrite)?;
    memory.reserve_huge_pages()?;
    memory.punch_hole(MemoryLayout::range_of(memory.layout(), 1))?;
    Ok(memory)
}
