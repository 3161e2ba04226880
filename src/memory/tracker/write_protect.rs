//! Dirty tracking by the kernel: userfaultfd's asynchronous write protection, collected with
//! `PAGEMAP_SCAN` (Documentation/admin-guide/mm/pagemap.rst).
//!
//! The first write to a protected page, in user or kernel mode, only removes its protection; the guest
//! does not wait for anybody. A scan finds the unprotected pages and protects them again in one
//! step. What it cannot see is a page that became a hole (a balloon gave it back), and stays protected,
//! even when the guest reads it and so fills it with zeros. [`ReadWatch`] finds those among the pages
//! that were read; a page that was sent as a hole is zero until it is written.

use std::sync::Arc;

use libc::c_void;
use nix::errno::Errno;
use userfaultfd::{FeatureFlags, RegisterMode, Uffd};

use super::pagemap::Pagemap;
use super::reads::ReadWatch;
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
    guest: Pagemap,
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
        Ok(WriteProtect { uffd, guest, reads: ReadWatch::new(memory)?, armed: false })
    }
}

impl DirtyTracker for WriteProtect {
    fn name(&self) -> &'static str {
        "write-protect"
    }

    fn arm(&mut self) -> Result<(), MemoryError> {
        self.armed = true;
        protect(&self.uffd, &self.guest)
    }

    fn collect(&mut self, range: PageRange, into: &mut PageSet) -> Result<(), MemoryError> {
        let written = PagemapQuery::WrittenToProtect;
        self.guest.scan(written, range, |run| into.insert_range(run))?;
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

/// From here on the guest's first write to each page is seen.
pub(super) fn protect(uffd: &Uffd, guest: &Pagemap) -> Result<(), MemoryError> {
    for (name, address, size_bytes) in guest.regions() {
        register(uffd, name, "track", address, size_bytes, RegisterMode::WRITE_PROTECT)?;
        let protected = uffd.write_protect(address as *mut c_void, size_bytes as usize);
        protected.map_err(|error| MemoryError::Userfault {
            action: "write-protect guest RAM",
            source: errno(&error),
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
