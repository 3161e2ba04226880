//! Dirty tracking by the kernel: userfaultfd's asynchronous write protection, collected with
//! `PAGEMAP_SCAN` (Documentation/admin-guide/mm/pagemap.rst).
//!
//! The first write to a protected page, in user or kernel mode, only removes its protection; the guest
//! does not wait for anybody. A scan finds the unprotected pages and protects them again in one
//! step. Only where something was ever touched ([`Touched`]): so arming and scanning take a time, and page tables a
//! memory, that grow with what the guest has touched, not with its size. All of 2 MiB in which a first page has come to be
//! since is protected, and reported once, whatever the page table says: it may have had the page by way of a huge page, and
//! have lost it again with what it knew of writes. Where pages were protected there are no huge ones.
//!
//! What it cannot see is a page that became a hole (a balloon gave it back), and stays protected,
//! even when the guest reads it and so fills it with zeros. [`ReadWatch`] finds those among the pages
//! that were read; a page that was sent as a hole is zero until it is written.

use std::ops::Range;
use std::sync::Arc;

use libc::c_void;
use nix::errno::Errno;
use userfaultfd::{FeatureFlags, RegisterMode, Uffd};

use super::pagemap::Pagemap;
use super::reads::ReadWatch;
use super::touched::Touched;
use super::{DirtyTracker, ReadWitness};
use crate::memory::sys::{self, PagemapQuery};
use crate::memory::userfault::{errno, register};
use crate::memory::{GuestMemory, MemoryError};
use crate::page::{PageRange, PageSet};

/// What `UFFDIO_API` must agree on for the userfaultfd of this tracker.
pub const TRACK_FEATURES: FeatureFlags = FeatureFlags::from_bits_retain(
    FeatureFlags::PAGEFAULT_FLAG_WP.bits()
        | sys::WP_HUGETLBFS_SHMEM.bits()
        | sys::WP_UNPOPULATED.bits()
        | sys::WP_ASYNC.bits(),
);

/// See the module's text.
pub struct WriteProtect {
    uffd: Uffd,
    memory: Arc<GuestMemory>,
    guest: Pagemap,
    touched: Touched,
    reads: ReadWatch,
    armed: bool,
}

impl WriteProtect {
    /// A tracker of all of `memory`, which process `pid` has mapped at `addresses`. `uffd` was made in
    /// that process, with [`TRACK_FEATURES`].
    ///
    /// # Errors
    /// [`MemoryError::RegisterBusy`] when there is one of this `memory` already.
    pub fn new(
        memory: Arc<GuestMemory>,
        pid: u32,
        addresses: &[u64],
        uffd: Uffd,
    ) -> Result<Self, MemoryError> {
        let guest = Pagemap::open(&pid.to_string(), memory.layout(), addresses)?;
        let touched = Touched::nothing_of(&memory, addresses);
        let reads = ReadWatch::new(Arc::clone(&memory))?;
        Ok(WriteProtect { uffd, memory, guest, touched, reads, armed: false })
    }
}

impl WriteProtect {
    /// Protects what was not touched before, and gives it.
    fn protect_new(&mut self, range: PageRange) -> Result<Vec<PageRange>, MemoryError> {
        let new = self.touched.take_in(&self.memory, range)?;
        new.iter().try_for_each(|run| protect(&self.uffd, &self.guest, *run))?;
        Ok(new)
    }
}

impl DirtyTracker for WriteProtect {
    fn name(&self) -> &'static str {
        "write-protect"
    }

    fn arm(&mut self) -> Result<(), MemoryError> {
        self.armed = true;
        watch(&self.uffd, &self.guest)?;
        self.protect_new(PageRange::new(0, self.memory.pages()))?;
        Ok(())
    }

    fn collect(&mut self, range: PageRange, into: &mut PageSet) -> Result<(), MemoryError> {
        self.protect_new(range)?.into_iter().for_each(|run| into.insert_range(run));
        let touched = self.touched.within(&self.memory, range);
        let written = PagemapQuery::WrittenToProtect;
        self.guest.scan(written, &touched, |run| into.insert_range(run))?;
        self.reads.collect(range, into)
    }

    fn witness(&self) -> Option<Arc<dyn ReadWitness>> {
        Some(self.reads.witness())
    }

    fn disarm(&mut self) -> Result<(), MemoryError> {
        if !std::mem::take(&mut self.armed) {
            return Ok(());
        }
        unprotect(&self.uffd, &self.guest)
    }
}

/// Registers all of the guest's RAM. Nothing of it is protected yet.
pub(super) fn watch(uffd: &Uffd, guest: &Pagemap) -> Result<(), MemoryError> {
    for (name, address, size_bytes) in guest.regions() {
        register(uffd, name, "track", address, size_bytes, RegisterMode::WRITE_PROTECT)?;
    }
    Ok(())
}

/// From here on the guest's first write to each page of `range` is seen.
pub(super) fn protect(uffd: &Uffd, guest: &Pagemap, range: PageRange) -> Result<(), MemoryError> {
    for Range { start, end } in guest.addresses_of(range) {
        let protected = uffd.write_protect(start as *mut c_void, (end - start) as usize);
        protected.map_err(|error| match errno(&error) {
            Errno::ESRCH => MemoryError::ProcessGone,
            source => MemoryError::Userfault { action: "write-protect guest RAM", source },
        })?;
    }
    Ok(())
}

/// Leaves the guest's process as it was.
pub(super) fn unprotect(uffd: &Uffd, guest: &Pagemap) -> Result<(), MemoryError> {
    for (_, address, size_bytes) in guest.regions() {
        let done = uffd.unregister(address as *mut c_void, size_bytes as usize);
        match done.map_err(|error| errno(&error)) {
            // The process has ended.
            Ok(()) | Err(Errno::ESRCH | Errno::ENOMEM) => {}
            Err(source) => {
                return Err(MemoryError::Userfault { action: "stop tracking", source });
            }
        }
    }
    Ok(())
}

impl Drop for WriteProtect {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::warn!(%error, "the guest's process stays write-protected, which only slows it");
        }
    }
}
