//! The virtual machine: what the host's KVM must offer, memory slots, CPUID, interrupt controllers.
#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use xxhash_rust::xxh3::Xxh3;

use super::ioctl;
use crate::guest::GuestError;
use crate::memory::GuestMapping;
use crate::page::{PAGE_SIZE_BYTES, PageRange};

/// Guest-physical addresses from here to 4 GiB are for devices, as on a PC; RAM goes on above.
const RAM_BELOW_BYTES: u64 = 3 << 30;
const RAM_ABOVE_ADDRESS: u64 = 4 << 30;
// Three pages for KVM itself on Intel hosts without unrestricted guests, where every monitor puts them.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Without these the guest cannot be stopped exactly, or its state not be carried over whole.
const REQUIRED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];
const CAP_MANUAL_DIRTY_LOG: u64 = kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 as u64;
const CAP_SREGS2: u64 = kvm_bindings::KVM_CAP_SREGS2 as u64;

/// What KVM here has beyond the required: decides which state exists.
#[derive(Clone, Debug)]
pub(super) struct Abilities {
    pub(super) xsave_bytes: usize,
    pub(super) sregs2: bool,
    pub(super) irqchip: bool,
    pub(super) manual_dirty_log: bool,
    pub(super) tsc_scaling: bool,
    /// MSRs of which KVM says that they are guest state.
    pub(super) msrs: Vec<u32>,
}

/// A run of RAM pages at one guest-physical address: a memory slot of KVM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) id: u32,
    pub(super) pages: PageRange,
    guest_address: u64,
    host_address: u64,
}

pub(super) struct Vm {
    // Before `ram`: the VM must be gone before the memory that its slots name.
    pub(super) fd: VmFd,
    pub(super) slots: Vec<Slot>,
    pub(super) abilities: Abilities,
    cpuid: CpuId,
    pub(super) ram: Arc<GuestMapping>,
}

/// An operation of KVM that failed.
pub(super) fn failed(what: &str, error: impl std::fmt::Display) -> GuestError {
    GuestError::new(format!("KVM: {what}: {error}"))
}

/// Opens KVM and checks that it can do all that a migration needs.
pub(super) fn open() -> Result<Kvm, GuestError> {
    let kvm = Kvm::new().map_err(|error| {
        GuestError::new(format!("/dev/kvm cannot be opened: {error}")).hint(
            "load the module kvm_intel or kvm_amd, or join the group that owns /dev/kvm; the guest of \
             native threads needs neither",
        )
    })?;
    if kvm.get_api_version() != kvm_bindings::KVM_API_VERSION as i32 {
        return Err(failed("unknown API version", kvm.get_api_version()));
    }
    for (cap, name) in REQUIRED {
        if !kvm.check_extension(cap) {
            return Err(GuestError::new(format!("KVM here lacks {name}"))
                .hint("use a newer kernel, or the guest of native threads"));
        }
    }
    Ok(kvm)
}

/// The guest-physical address of a byte of RAM.
pub(super) fn guest_address(ram_offset_bytes: u64) -> u64 {
    match ram_offset_bytes.checked_sub(RAM_BELOW_BYTES) {
        None => ram_offset_bytes,
        Some(above) => RAM_ABOVE_ADDRESS + above,
    }
}

impl Vm {
    /// A VM without vCPUs over the one region of `ram`.
    pub(super) fn create(ram: Arc<GuestMapping>) -> Result<Vm, GuestError> {
        let kvm = open()?;
        let fd = kvm.create_vm().map_err(|error| failed("create a VM", error))?;
        let irqchip = kvm.check_extension(Cap::Irqchip);
        if irqchip {
            fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
                .and_then(|()| fd.set_tss_address(TSS_ADDRESS))
                .and_then(|()| fd.create_irq_chip())
                .map_err(|error| failed("create the interrupt controllers", error))?;
        }
        let msrs = kvm.get_msr_index_list().map_err(|error| failed("list the MSRs", error))?;
        let abilities = Abilities {
            xsave_bytes: usize::try_from(fd.check_extension_int(Cap::Xsave2))
                .unwrap_or(0)
                .max(ioctl::XSAVE_MIN_BYTES),
            sregs2: fd.check_extension_raw(CAP_SREGS2) > 0,
            irqchip,
            manual_dirty_log: kvm.check_extension_raw(CAP_MANUAL_DIRTY_LOG) as u32
                & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
                != 0,
            tsc_scaling: fd.check_extension(Cap::TscControl),
            msrs: msrs.as_slice().to_vec(),
        };
        if abilities.manual_dirty_log {
            let mut cap = kvm_enable_cap { cap: CAP_MANUAL_DIRTY_LOG as u32, ..Default::default() };
            cap.args[0] = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
            fd.enable_cap(&cap).map_err(|error| failed("enable the manual dirty log", error))?;
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| failed("get the supported CPUID", error))?;
        let slots = slots(&ram);
        let vm = Vm { fd, slots, abilities, cpuid, ram };
        vm.log_dirty_pages(false)?;
        Ok(vm)
    }

    /// Registers the memory slots, or changes whether KVM logs their dirty pages.
    pub(super) fn log_dirty_pages(&self, on: bool) -> Result<(), GuestError> {
        for slot in &self.slots {
            let region = kvm_userspace_memory_region {
                slot: slot.id,
                flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: slot.guest_address,
                memory_size: slot.pages.len() * PAGE_SIZE_BYTES as u64,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the range is inside the mapping `ram`, which this VM keeps alive, and which
            // Rust sees only as atomics, so that the guest may write to it.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(|error| failed("set a memory slot", error))?;
        }
        Ok(())
    }

    /// A vCPU with its CPUID.
    pub(super) fn create_vcpu(&self, id: u32) -> Result<VcpuFd, GuestError> {
        let vcpu = self
            .fd
            .create_vcpu(u64::from(id))
            .map_err(|error| failed(&format!("create vCPU {id}"), error))?;
        vcpu.set_cpuid2(&cpuid_of(&self.cpuid, id))
            .map_err(|error| failed(&format!("set the CPUID of vCPU {id}"), error))?;
        Ok(vcpu)
    }

    /// A fingerprint of the CPU that the guest sees, for the comparison of two hosts.
    pub(super) fn cpuid_fingerprint(&self) -> String {
        let mut hash = Xxh3::new();
        for entry in cpuid_of(&self.cpuid, 0).as_slice() {
            let words = [entry.function, entry.index, entry.flags];
            let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            for word in words.into_iter().chain(registers) {
                hash.update(&word.to_le_bytes());
            }
        }
        format!("{:016x}", hash.digest())
    }
}

fn slots(ram: &GuestMapping) -> Vec<Slot> {
    let page = PAGE_SIZE_BYTES as u64;
    let (pages, below) = (ram.pages(), RAM_BELOW_BYTES / page);
    let parts = [PageRange::new(0, pages.min(below)), PageRange::new(below, pages)];
    let parts = parts.into_iter().filter(|part| !part.is_empty());
    let slot = |(id, pages): (usize, PageRange)| Slot {
        id: id as u32,
        pages,
        guest_address: guest_address(pages.start.0 * page),
        host_address: ram.address_of(pages.start),
    };
    parts.enumerate().map(slot).collect()
}

/// KVM reports the APIC ids of whatever CPU it was asked on; here is what vCPU `id` has.
fn cpuid_of(supported: &CpuId, id: u32) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => entry.edx = id,
            0x8000_001e => entry.eax = id,
            _ => {}
        }
    }
    cpuid
}
