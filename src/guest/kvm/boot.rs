//! A guest's first state: program, workers and page tables in RAM, vCPUs in 64-bit mode.
//!
//! The guest's virtual addresses are offsets in its RAM, so that the hole which devices have below
//! 4 GiB does not concern it. 2 MiB pages; all *accessed* and *dirty* bits are set beforehand, so
//! that the processor writes nothing but what the program writes.

use std::sync::atomic::Ordering::Relaxed;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::program;
use super::vm::{failed, guest_address};
use crate::guest::GuestError;
use crate::guest::workload::{self, GuestPlan, Worker};
use crate::memory::GuestMapping;
use crate::page::{PAGE_SIZE_BYTES, PageIndex};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;

const PAGE: u64 = PAGE_SIZE_BYTES as u64;
const ENTRIES: u64 = PAGE / 8;

/// Puts everything into RAM that the guest needs to run, including the content of its pages.
pub(super) fn load(plan: &GuestPlan, workers: &[Worker], ram: &GuestMapping) {
    let set = |page: u64, word: usize, value: u64| {
        ram.page(PageIndex(page))[word].store(value, Relaxed);
    };
    let image = program::image();
    assert!(image.len() <= PAGE_SIZE_BYTES, "the guest program has outgrown its page");
    for (i, bytes) in image.chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        set(workload::PROGRAM_PAGE, i, u64::from_le_bytes(word));
    }
    for (id, worker) in (0..).zip(workers) {
        for (offset_bytes, value) in program::worker_fields(id, worker) {
            set(workload::FIRST_WORKER_PAGE + id, offset_bytes / 8, value);
        }
        workload::fill(worker, |page| ram.page(PageIndex(page)));
    }

    let (root, directories) = (workload::PAGE_TABLES_PAGE, workload::PAGE_TABLES_PAGE + 2);
    let table = PRESENT | WRITABLE | ACCESSED;
    set(root, 0, ((root + 1) * PAGE) | table);
    let units = plan.memory_bytes / workload::MEMORY_UNIT_BYTES;
    for unit in 0..units {
        let (directory, entry) = (unit / ENTRIES, (unit % ENTRIES) as usize);
        if entry == 0 {
            set(root + 1, directory as usize, ((directories + directory) * PAGE) | table);
        }
        let address = guest_address(unit * workload::MEMORY_UNIT_BYTES);
        set(directories + directory, entry, address | table | DIRTY | LARGE);
    }
}

/// Puts a vCPU at the program's first instruction.
pub(super) fn start(vcpu: &VcpuFd, id: u32, worker: &Worker) -> Result<(), GuestError> {
    // With interrupt controllers, all but the first vCPU would wait for a SIPI, as on a PC.
    let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    vcpu.set_mp_state(runnable).map_err(|error| failed("set the MP state", error))?;
    let segment = |selector: u16, type_: u8, long: u8| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    let sregs = vcpu.get_sregs().map_err(|error| failed("get the segment registers", error))?;
    let data = segment(0x10, 3, 0);
    let sregs = kvm_sregs {
        cs: segment(0x8, 11, 1),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        cr0: CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
        cr3: workload::PAGE_TABLES_PAGE * PAGE,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..sregs
    };
    vcpu.set_sregs(&sregs).map_err(|error| failed("set the segment registers", error))?;
    let worker_address = (workload::FIRST_WORKER_PAGE + u64::from(id)) * PAGE;
    let regs = kvm_regs {
        rip: workload::PROGRAM_PAGE * PAGE,
        rflags: RFLAGS_FIXED,
        rbp: worker_address,
        rsp: worker_address + PAGE,
        r15: worker.ops,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(|error| failed("set the registers", error))
}
