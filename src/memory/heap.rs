//! What the allocator does with freed memory.
#![allow(unsafe_code)]

/// So much that is free at the end of a heap stays there; there are a few heaps, shared by the threads.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 16 << 20;
/// What is larger is a mapping of its own, and goes back to the kernel at once. Messages are not.
#[cfg(target_env = "gnu")]
const MAPPED_FROM_BYTES: libc::c_int = 4 << 20;

/// Has the allocator keep some of what is freed, from now on. By itself glibc gives back all that is free at the end of
/// a heap beyond 128 KiB, and gets it again, cleared page by page. With datagrams by the thousand, which come and
/// go, that was 7 % of the processors' time in a profile of a migration over a fast link with jumbo frames; without it bulk
/// alone takes 1 to 5 % less of it (`cargo bench --bench bulk`). Other allocators are left as they are.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (option, bytes) in
        [(libc::M_TRIM_THRESHOLD, KEPT_BYTES), (libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)]
    {
        // SAFETY: mallopt only sets a number, under the allocator's lock.
        let is_set = unsafe { libc::mallopt(option, bytes) };
        // Where it is not, all that is lost is time.
        if is_set != 1 {
            tracing::debug!(option, bytes, "the allocator does not take an option");
        }
    }
}
