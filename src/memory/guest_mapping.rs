//! The guest's own mapping, for guests that run inside this process.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use userfaultfd::{FeatureFlags, Uffd};

use super::{
    DirtyTracker, FAULT_FEATURES, GuestMemory, MemoryError, TrackerKind, Units, Userfault,
    open_tracker, sys,
};
use crate::page::{PAGE_SIZE_BYTES, PageIndex};

/// Words of 8 bytes in a page.
const WORDS: usize = PAGE_SIZE_BYTES / 8;

/// A second mapping of a guest's RAM files, beside the alias in [`GuestMemory`].
///
/// It plays the part that the monitor's mapping plays for a guest in another process: the guest
/// reaches its RAM through it alone, userfaultfd is registered over it, and write protection is
/// applied to it. Touching a page that has not arrived blocks the thread that does.
#[derive(Debug)]
pub struct GuestMapping {
    units: Units,
    maps: Vec<MmapRaw>,
}

impl GuestMapping {
    /// Maps the same files again.
    pub fn new(memory: &GuestMemory) -> Result<Self, MemoryError> {
        let mut maps = Vec::new();
        for region in memory.region_files()? {
            let mut options = MmapOptions::new();
            options.offset(region.file_offset_bytes).len(region.layout.size_bytes as usize);
            let map = options.map_raw(&region.file).map_err(|source| MemoryError::Backing {
                region: region.layout.name,
                action: "map its file for the guest",
                source,
            })?;
            maps.push(map);
        }
        Ok(GuestMapping { units: memory.units(), maps })
    }

    /// Pages of the whole guest.
    pub fn pages(&self) -> u64 {
        self.units.layout().pages()
    }

    /// The words of a page. The guest's other threads and vCPUs, and whoever writes through the
    /// alias, may change them at any time.
    ///
    /// # Panics
    /// When the page is beyond the guest.
    pub fn page(&self, page: PageIndex) -> &[AtomicU64; WORDS] {
        let words = self.pointer_to(page).cast::<[AtomicU64; WORDS]>();
        // SAFETY: a whole page inside the mapping, which lives as long as `self`; aligned as pages
        // are; all access in this process is atomic too or made by the kernel or a guest's CPU.
        unsafe { &*words }
    }

    /// Where a page is mapped in this process.
    ///
    /// # Panics
    /// When the page is beyond the guest.
    pub fn address_of(&self, page: PageIndex) -> u64 {
        self.pointer_to(page) as u64
    }

    /// Where each region is mapped in this process, in layout order.
    pub fn addresses(&self) -> Vec<u64> {
        self.maps.iter().map(|map| map.as_mut_ptr() as u64).collect()
    }

    /// A userfaultfd of this process over all of the mapping, MISSING | MINOR.
    ///
    /// # Errors
    /// As of [`Userfault::register`], and when this process may not make a userfaultfd that serves
    /// kernel-mode faults, as KVM needs.
    pub fn userfault(&self) -> Result<Userfault, MemoryError> {
        Userfault::register(own_uffd(FAULT_FEATURES)?, &self.units, &self.addresses())
    }

    /// Follows the writes made through this mapping of `memory`.
    ///
    /// # Errors
    /// As of [`open_tracker`].
    pub fn tracker(
        &self,
        kind: TrackerKind,
        memory: &Arc<GuestMemory>,
    ) -> Result<Box<dyn DirtyTracker>, MemoryError> {
        open_tracker(kind, memory.clone(), std::process::id(), &self.addresses(), own_uffd)
    }

    fn pointer_to(&self, page: PageIndex) -> *mut u8 {
        let (index, offset_bytes) = self
            .units
            .layout()
            .locate(page)
            .unwrap_or_else(|| panic!("{page:?} beyond {} pages", self.pages()));
        // SAFETY: `locate` gives an offset inside the region, which the mapping covers.
        unsafe { self.maps[index].as_mut_ptr().add(offset_bytes as usize) }
    }
}

/// A userfaultfd of this process, past `UFFDIO_API`.
pub(super) fn own_uffd(features: FeatureFlags) -> Result<Uffd, MemoryError> {
    let fd = sys::own_userfaultfd().map_err(|source| MemoryError::Userfault {
        action: "make one for this process",
        source: Errno::from_raw(source.raw_os_error().unwrap_or(0)),
    })?;
    sys::uffd_api(fd.as_fd(), features)
        .map_err(|source| MemoryError::Userfault { action: "agree on its features", source })?;
    // SAFETY: the descriptor is a userfaultfd, and ownership passes on.
    Ok(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
}
