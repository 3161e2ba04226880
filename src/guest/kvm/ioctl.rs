//! The ioctls of KVM that kvm-ioctls does not offer, behind safe functions.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use kvm_bindings::{kvm_clear_dirty_log, kvm_sregs2};
use kvm_ioctls::{VcpuFd, VmFd};
use nix::errno::Errno;

mod raw {
    use super::{XsavePart, kvm_clear_dirty_log, kvm_sregs2};

    nix::ioctl_readwrite!(clear_dirty_log, 0xae, 0xc0, kvm_clear_dirty_log);
    nix::ioctl_read!(get_sregs2, 0xae, 0xcc, kvm_sregs2);
    nix::ioctl_write_ptr!(set_sregs2, 0xae, 0xcd, kvm_sregs2);
    // Declared with the size of the fixed part; how much is copied is the kernel's KVM_CAP_XSAVE2.
    nix::ioctl_read!(get_xsave, 0xae, 0xa4, XsavePart);
    nix::ioctl_read!(get_xsave2, 0xae, 0xcf, XsavePart);
    nix::ioctl_write_ptr!(set_xsave, 0xae, 0xa5, XsavePart);
}

/// The fixed part of `struct kvm_xsave`.
#[derive(Clone, Copy)]
#[repr(C)]
struct XsavePart {
    region: [u32; 1024],
}

/// Bytes of XSAVE state that every KVM knows.
pub(super) const XSAVE_MIN_BYTES: usize = size_of::<XsavePart>();

/// Clears those pages of a slot's dirty log whose bit is set, and write-protects them anew.
/// `first_page` is a multiple of 64; `bits` starts there, and covers whole words or ends with the slot.
pub(super) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    bits: &[u64],
) -> Result<(), Errno> {
    assert!(bits.len() as u64 == u64::from(pages).div_ceil(64), "bitmap of another size");
    let mut log = kvm_clear_dirty_log { slot, num_pages: pages, first_page, ..Default::default() };
    log.__bindgen_anon_1.dirty_bitmap = bits.as_ptr().cast_mut().cast();
    // SAFETY: the kernel reads `pages` bits of the bitmap, which `bits` holds (checked above).
    unsafe { raw::clear_dirty_log(vm.as_raw_fd(), &mut log) }.map(drop)
}

/// The page directory pointers of a guest in PAE mode, and whether they are valid (`flags`).
pub(super) fn sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, Errno> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes one `kvm_sregs2`.
    unsafe { raw::get_sregs2(vcpu.as_raw_fd(), &mut sregs) }?;
    Ok(sregs)
}

/// Sets what [`sregs2`] gets.
pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Errno> {
    // SAFETY: the kernel reads one `kvm_sregs2`.
    unsafe { raw::set_sregs2(vcpu.as_raw_fd(), sregs) }.map(drop)
}

/// A buffer for XSAVE state, aligned as the kernel's struct, of the VM's `KVM_CAP_XSAVE2` size.
fn xsave_buffer(size_bytes: usize) -> Vec<XsavePart> {
    vec![XsavePart { region: [0; 1024] }; size_bytes.div_ceil(XSAVE_MIN_BYTES)]
}

/// FPU, SSE, AVX and all other XSAVE state. `size_bytes`: the VM's `KVM_CAP_XSAVE2`, or
/// [`XSAVE_MIN_BYTES`] where there is no such capability.
pub(super) fn xsave(vcpu: &VcpuFd, size_bytes: usize) -> Result<Vec<u32>, Errno> {
    let mut buffer = xsave_buffer(size_bytes);
    if size_bytes > XSAVE_MIN_BYTES {
        // SAFETY: the kernel writes `KVM_CAP_XSAVE2` bytes, and the buffer is at least so large.
        unsafe { raw::get_xsave2(vcpu.as_raw_fd(), buffer.as_mut_ptr()) }?;
    } else {
        // SAFETY: the kernel writes 4 KiB.
        unsafe { raw::get_xsave(vcpu.as_raw_fd(), buffer.as_mut_ptr()) }?;
    }
    let mut words: Vec<u32> = buffer.iter().flat_map(|part| part.region).collect();
    words.truncate(size_bytes.div_ceil(4));
    Ok(words)
}

/// Sets what [`xsave`] gets; `words` has the length that this VM's `size_bytes` asks for.
pub(super) fn set_xsave(vcpu: &VcpuFd, size_bytes: usize, words: &[u32]) -> Result<(), Errno> {
    assert!(words.len() == size_bytes.div_ceil(4), "XSAVE state of another size");
    let mut buffer = xsave_buffer(size_bytes);
    for (part, words) in buffer.iter_mut().zip(words.chunks(XSAVE_MIN_BYTES / 4)) {
        part.region[..words.len()].copy_from_slice(words);
    }
    // SAFETY: the kernel reads `KVM_CAP_XSAVE2` bytes at most, and the buffer is at least so large.
    unsafe { raw::set_xsave(vcpu.as_raw_fd(), buffer.as_ptr()) }.map(drop)
}
