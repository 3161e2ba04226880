//! Kernel interfaces that no crate at hand carries: `UFFDIO_API` on a descriptor that came from
//! elsewhere, newer userfaultfd features, `PAGEMAP_SCAN`, pidfds.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use userfaultfd::FeatureFlags;

/// `/dev/userfaultfd` gives userfaultfds that serve kernel-mode faults to whom may open it (6.1).
pub(crate) const USERFAULTFD_DEVICE: &str = "/dev/userfaultfd";
/// `_IO(0xAA, 0)` on [`USERFAULTFD_DEVICE`]: a new userfaultfd; the argument is its flags.
pub(crate) const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
/// `UFFD_FEATURE_MINOR_HUGETLBFS` (5.13).
pub(crate) const MINOR_HUGETLBFS: FeatureFlags = FeatureFlags::from_bits_retain(1 << 9);
/// `UFFD_FEATURE_MINOR_SHMEM` (5.14).
pub(crate) const MINOR_SHMEM: FeatureFlags = FeatureFlags::from_bits_retain(1 << 10);
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM` (5.19).
pub(crate) const WP_HUGETLBFS_SHMEM: FeatureFlags = FeatureFlags::from_bits_retain(1 << 12);
/// `UFFD_FEATURE_WP_UNPOPULATED` (6.4).
pub(crate) const WP_UNPOPULATED: FeatureFlags = FeatureFlags::from_bits_retain(1 << 13);
/// `UFFD_FEATURE_WP_ASYNC` (6.7).
pub(crate) const WP_ASYNC: FeatureFlags = FeatureFlags::from_bits_retain(1 << 15);

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct page_region` of `PAGEMAP_SCAN`: a run of addresses of one category.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ScannedRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct PagemapScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// What [`pagemap_scan`] looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PagemapQuery {
    /// Pages that are not write-protected, in an area that a userfaultfd watches.
    Written,
    /// The same, and write-protects them in the same step.
    WrittenToProtect,
    /// Pages in memory that have an entry of their own in the page table: not by way of a huge page.
    MappedSingly,
    /// Pages in memory, by whatever entry of the page table.
    Mapped,
}

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_HUGE: u64 = 1 << 6;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

nix::ioctl_readwrite!(ioctl_uffdio_api, 0xaa, 0x3f, UffdioApi);
nix::ioctl_readwrite!(ioctl_pagemap_scan, b'f', 16, PagemapScanArguments);

/// Agrees on `features` with a fresh userfaultfd (accepted once per descriptor) and gives all that
/// the kernel offers. Asking for none only asks what there is.
pub(crate) fn uffd_api(fd: BorrowedFd<'_>, features: FeatureFlags) -> Result<FeatureFlags, Errno> {
    let mut api = UffdioApi { api: 0xaa, features: features.bits(), ioctls: 0 };
    // SAFETY: the argument is a live structure of the layout that the kernel documents.
    unsafe { ioctl_uffdio_api(fd.as_raw_fd(), &raw mut api) }?;
    Ok(FeatureFlags::from_bits_retain(api.features))
}

/// A userfaultfd of this process, not yet past [`uffd_api`], that also serves kernel-mode faults.
pub(crate) fn own_userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the calls take plain numbers, and a non-negative result is a new descriptor that
    // nobody else owns.
    unsafe {
        let fd = match OpenOptions::new().read(true).write(true).open(USERFAULTFD_DEVICE) {
            Ok(device) => libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags),
            Err(_) => libc::syscall(libc::SYS_userfaultfd, flags) as RawFd,
        };
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Fills `found` with the runs of addresses in `start..end` that `query` looks for, and gives how many
/// runs, and the address at which the scan stopped because `found` was full.
pub(crate) fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    query: PagemapQuery,
    found: &mut [ScannedRegion],
) -> Result<(usize, u64), Errno> {
    let (flags, category_mask, category_inverted) = match query {
        PagemapQuery::Written => (0, PAGE_IS_WRITTEN, 0),
        PagemapQuery::WrittenToProtect => {
            (PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, PAGE_IS_WRITTEN, 0)
        }
        PagemapQuery::Mapped => (0, PAGE_IS_PRESENT, 0),
        PagemapQuery::MappedSingly => (0, PAGE_IS_PRESENT | PAGE_IS_HUGE, PAGE_IS_HUGE),
    };
    let mut arguments = PagemapScanArguments {
        size: size_of::<PagemapScanArguments>() as u64,
        flags,
        start,
        end,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        category_inverted,
        category_mask,
        // Runs of different categories are told apart: of those that matched.
        return_mask: category_mask & !category_inverted,
        ..Default::default()
    };
    // SAFETY: the structure has the documented layout; `vec` and `vec_len` name a live slice that
    // is borrowed mutably during the call.
    let count = unsafe { ioctl_pagemap_scan(pagemap.as_raw_fd(), &raw mut arguments) }?;
    Ok((count as usize, arguments.walk_end))
}

/// The number of `cachestat(2)`, which the C library does not name yet.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range`.
#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

/// `struct cachestat`.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// How many pages of `length` bytes of a file of shared memory, from `offset` on, are not holes: in the
/// page cache, or swapped out (6.5).
pub(crate) fn cached_pages(file: BorrowedFd<'_>, offset: u64, length: u64) -> Result<u64, Errno> {
    let (range, mut found) = (CachestatRange { offset, length }, Cachestat::default());
    // SAFETY: both structures have the layout that the kernel documents, and live during the call.
    let done = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut found, 0)
    };
    Errno::result(done).map(|_| found.cached + found.evicted)
}

/// Copies what the process behind `pidfd` has mapped there into huge pages (`MADV_COLLAPSE`, 6.1).
pub(crate) fn collapse(pidfd: BorrowedFd<'_>, address: u64, length: u64) -> Result<(), Errno> {
    let part = libc::iovec { iov_base: address as *mut _, iov_len: length as usize };
    // SAFETY: the structure lives during the call; what it names is in the other process, whose content
    // the kernel does not change.
    let done = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            pidfd.as_raw_fd(),
            &raw const part,
            1,
            libc::MADV_COLLAPSE,
            0,
        )
    };
    Errno::result(done).map(drop)
}

/// A handle of process `pid`, which does not pass to another process of that number.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers in, a new descriptor of our own out.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) as RawFd;
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// A copy of descriptor `fd` of the process behind `pidfd`.
pub(crate) fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers in, a new descriptor of our own out.
    unsafe {
        let copy = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) as RawFd;
        if copy < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(copy)) }
    }
}
