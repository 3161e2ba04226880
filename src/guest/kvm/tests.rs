use std::collections::BTreeSet;
use std::io::Write;

use kvm_bindings::{Msrs, kvm_mp_state, kvm_msr_entry};

use super::state::VcpuState;
use super::*;
use crate::guest::workload::page::Stream;
use crate::guest::workload::trial::{expect_right, move_by_faults, move_live, plan, wait_for};
use crate::guest::workload::{FIRST_WORKER_PAGE, PROGRAM_PAGE, Worker, fill};
use crate::page::{PAGE_SIZE_BYTES, PageIndex, PageRange, PageSet};

/// False, and said so past the test harness's capture, where there is no KVM.
fn kvm_is_here(test: &str) -> bool {
    match available() {
        Ok(()) => true,
        Err(error) => {
            let line = format!("\n*** SKIPPED: {test}: {error} ***\n");
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            false
        }
    }
}

macro_rules! need_kvm {
    ($test:literal) => {
        if !kvm_is_here($test) {
            return;
        }
    };
}

fn running(workload: &str, vcpus: u32) -> KvmGuest {
    let mut guest = KvmGuest::boot(&plan(workload, vcpus)).unwrap();
    guest.resume().unwrap();
    guest
}

fn waiting(vcpus: u32) -> KvmGuest {
    KvmGuest::await_arrival(&plan("idle", vcpus)).unwrap()
}

/// Pauses the guest where its only vCPU has done all that it was given.
fn pause_between_tasks(guest: &mut KvmGuest) {
    for _ in 0..500 {
        guest.pause().unwrap();
        let regs = guest.vcpus[0].inspect(|vcpu| vcpu.get_regs().unwrap());
        if regs.r14 == 0 && regs.r15 == guest.status().ops {
            return;
        }
        guest.resume().unwrap();
        std::thread::sleep(Duration::from_millis(7));
    }
    panic!("the guest is never between two tasks");
}

#[test]
fn the_guest_greets_once_whatever_the_number_of_vcpus() {
    need_kvm!("the guest greets");
    let guest = running("idle", 2);
    expect_right(&guest);
    assert_eq!(guest.console(), "farfault guest: up in 64-bit mode\n");
}

#[test]
fn the_speed_of_a_guest_can_be_told() {
    need_kvm!("speed");
    let pages_per_s = measure_speed().unwrap();
    assert!((1..1_000_000_000).contains(&pages_per_s), "{pages_per_s}");
}

#[test]
fn the_assembled_program_does_what_the_worker_does() {
    need_kvm!("program and worker compared");
    for pattern in Pattern::ALL {
        // So slow that an emulated KVM is idle most of the time, whatever the pattern.
        let plan = plan(&format!("{}:30/s", pattern.name()), 1);
        let mut guest = KvmGuest::boot(&plan).unwrap();
        guest.resume().unwrap();
        if pattern != Pattern::Idle {
            wait_for(&guest, |status| status.ops > 20);
        }
        pause_between_tasks(&mut guest);

        let model = GuestMemory::create(&plan.memory_layout()).unwrap();
        let model = GuestMapping::new(&model).unwrap();
        let mut worker = plan.new_workers().remove(0);
        boot::load(&plan, std::slice::from_ref(&worker), &model);
        for _ in 0..guest.status().ops {
            worker.operate(|page| model.page(PageIndex(page)));
        }
        assert_eq!(guest.status(), worker.status(), "{pattern:?}");
        for page in plan.first_used_page()..model.pages() {
            let words = |ram: &GuestMapping| {
                ram.page(PageIndex(page)).each_ref().map(|word| word.load(Relaxed))
            };
            assert_eq!(words(&guest.vm.ram), words(&model), "{pattern:?}, page {page}");
        }
        for (offset_bytes, value) in program::worker_fields(0, &worker) {
            let words = guest.vm.ram.page(PageIndex(FIRST_WORKER_PAGE));
            assert_eq!(words[offset_bytes / 8].load(Relaxed), value, "{pattern:?} {offset_bytes}");
        }
    }
}

#[test]
fn every_workload_survives_a_move_under_kvms_dirty_log() {
    need_kvm!("moves under KVM's dirty log");
    every_workload_survives_a_move(TrackerKind::Auto, "kvm-dirty-log");
}

#[test]
fn every_workload_survives_a_move_under_write_protection() {
    need_kvm!("moves under write protection");
    every_workload_survives_a_move(TrackerKind::WriteProtect, "write-protect");
}

fn every_workload_survives_a_move(kind: TrackerKind, tracker: &str) {
    for (pattern, vcpus) in Pattern::ALL.into_iter().zip([1, 2].into_iter().cycle()) {
        let mut source = running(pattern.name(), vcpus);
        assert_eq!(source.track(kind).unwrap().name(), tracker);
        if pattern != Pattern::Idle {
            wait_for(&source, |status| status.ops > 50);
        }
        let mut destination = waiting(vcpus);
        move_live(&mut source, &mut destination, kind);
        let ops = destination.status().ops;
        if pattern != Pattern::Idle {
            wait_for(&destination, |status| status.ops > ops + 50);
        }
        expect_right(&destination);
    }
}

#[test]
fn a_guest_that_has_arrived_can_leave_again() {
    need_kvm!("a guest leaves again");
    let mut first = running("hotcold", 2);
    wait_for(&first, |status| status.ops > 50);
    let mut second = waiting(2);
    move_live(&mut first, &mut second, TrackerKind::Auto);
    let mut third = waiting(2);
    move_live(&mut second, &mut third, TrackerKind::Auto);
    expect_right(&third);
}

#[test]
fn a_failed_move_leaves_the_guest_running() {
    need_kvm!("a failed move");
    let mut source = running("sparse", 2);
    source.pause().unwrap();
    let state = source.save_device_state().unwrap();
    assert!(waiting(1).load_device_state(&state).is_err(), "another number of vCPUs");
    source.resume().unwrap();
    expect_right(&source);
}

#[test]
fn faults_inside_kvm_run_are_served() {
    need_kvm!("faults inside KVM_RUN");
    let mut source = running("sparse", 2);
    wait_for(&source, |status| status.ops > 50);
    let mut destination = waiting(2);
    assert!(move_by_faults(&mut source, &mut destination) > 500);
    expect_right(&destination);
}

#[test]
fn both_ways_of_tracking_find_the_same_pages() {
    need_kvm!("both ways of tracking");
    for workload in ["sparse", "whole", "hotcold", "read"] {
        let mut guest = running(workload, 2);
        guest.pause().unwrap();
        let all = PageRange::new(0, guest.memory.pages());
        let mut trackers = [TrackerKind::Auto, TrackerKind::WriteProtect, TrackerKind::HashScan]
            .map(|kind| guest.track(kind).unwrap());
        trackers.iter_mut().for_each(|tracker| tracker.arm().unwrap());
        for _ in 0..3 {
            let ops = guest.status().ops;
            guest.resume().unwrap();
            wait_for(&guest, |status| status.ops > ops + 20);
            guest.pause().unwrap();
            let [log, protection, hashes] = trackers.each_mut().map(|tracker| {
                let mut dirty = PageSet::empty(all.len());
                tracker.collect(all, &mut dirty).unwrap();
                dirty.iter().collect::<BTreeSet<_>>()
            });
            assert!(!hashes.is_empty());
            for marked in [log, protection] {
                assert!(hashes.is_subset(&marked), "{workload}: {hashes:?} and {marked:?}");
                // A vCPU may have been stopped between a fault and the write that it was for.
                assert!(marked.len() <= hashes.len() + 2, "{workload}: {hashes:?} and {marked:?}");
            }
        }
    }
}

#[test]
fn a_range_is_collected_alone() {
    need_kvm!("collecting a range");
    let mut guest = running("whole", 1);
    let mut tracker = guest.track(TrackerKind::Auto).unwrap();
    tracker.arm().unwrap();
    wait_for(&guest, |status| status.ops > 700);
    guest.pause().unwrap();
    let (pages, first) = (guest.memory.pages(), plan("whole", 1).first_used_page());
    let mut dirty = PageSet::empty(pages);
    tracker.collect(PageRange::new(first + 5, first + 105), &mut dirty).unwrap();
    let expected: Vec<_> = PageRange::new(first + 5, first + 105).pages().collect();
    assert_eq!(dirty.iter().collect::<Vec<_>>(), expected);
    let mut rest = PageSet::empty(pages);
    tracker.collect(PageRange::new(0, pages), &mut rest).unwrap();
    assert_eq!(rest.intersection_len(&dirty), 0, "collected once, not written since");
    assert!(rest.contains(PageIndex(first + 4)) && rest.contains(PageIndex(first + 105)));
}

/// Lets the guest's only worker work on the pages around the hole that devices have below 4 GiB.
fn put_to_work_around_the_device_hole(guest: &KvmGuest, mut worker: Worker) {
    let first = (3 << 30) / PAGE_SIZE_BYTES as u64 - 100;
    worker.streams = [Stream::new(first, 200), Stream::default()];
    fill(&worker, |page| guest.vm.ram.page(PageIndex(page)));
    let page = guest.vm.ram.page(PageIndex(FIRST_WORKER_PAGE));
    for (offset_bytes, value) in program::worker_fields(0, &worker) {
        page[offset_bytes / 8].store(value, Relaxed);
    }
    guest.gauges[0].replace(200, GuestStatus::default());
}

#[test]
fn memory_beyond_the_device_hole_is_tracked_moved_and_faulted_in() {
    need_kvm!("more memory than 3 GiB");
    let plan = GuestPlan { memory_bytes: 4 << 30, used_percent: 1, ..plan("sequential", 1) };
    let mut guest = KvmGuest::assemble(&plan).unwrap();
    let worker = plan.new_workers().remove(0);
    let idle = Worker { streams: Default::default(), ..worker.clone() };
    boot::load(&plan, &[idle], &guest.vm.ram);
    put_to_work_around_the_device_hole(&guest, worker);
    assert_eq!(guest.vm.slots.len(), 2);
    guest.resume().unwrap();
    wait_for(&guest, |status| status.ops > 300);

    let mut second = KvmGuest::await_arrival(&plan).unwrap();
    move_live(&mut guest, &mut second, TrackerKind::Auto);
    wait_for(&second, |status| status.ops > 600);
    expect_right(&second);
    let mut third = KvmGuest::await_arrival(&plan).unwrap();
    assert!(move_by_faults(&mut second, &mut third) >= 200);
}

#[test]
fn guests_of_different_shapes_are_told_apart() {
    need_kvm!("shapes");
    let larger = GuestPlan { memory_bytes: 6 << 20, ..plan("idle", 2) };
    let larger = KvmGuest::await_arrival(&larger).unwrap();
    let differences = waiting(1).shape.differences(&larger.shape);
    assert_eq!(
        differences,
        [
            "RAM: source has ram of 4 MiB, destination has ram of 6 MiB",
            "vCPUs: source has 1, destination has 2",
        ]
    );
}

#[test]
fn a_damaged_device_state_is_refused() {
    need_kvm!("damaged device states");
    let state = waiting(1).save_device_state().unwrap();
    assert!(VmState::decode(&state, 1).is_ok());
    for end in 0..state.len() {
        assert!(VmState::decode(&state[..end], 1).is_err(), "cut at {end}");
    }
    assert!(VmState::decode(&[&state[..], &[0]].concat(), 1).is_err(), "a byte too many");
    assert!(VmState::decode(&state, 2).is_err(), "another number of vCPUs");
    let mut newer = state.clone();
    newer[0] += 1;
    let error = VmState::decode(&newer, 1).unwrap_err();
    assert!(error.message.contains("version 2"), "{error}");
}

#[test]
fn an_exit_that_is_being_handled_is_complete_before_state_is_saved() {
    need_kvm!("complete exits");
    let mut guest = running("idle", 1);
    expect_right(&guest);
    // Now it waits for the answer to its `in`, and gets one because it is to stop.
    std::thread::sleep(Duration::from_millis(20));
    guest.pause().unwrap();
    let regs = guest.vcpus[0].inspect(|vcpu| vcpu.get_regs().unwrap());
    let behind = (regs.rip - PROGRAM_PAGE * PAGE_SIZE_BYTES as u64) as usize;
    assert_eq!(program::image()[behind - 2..behind], [0xe5, program::TASK_PORT as u8]);
    assert_eq!(regs.rax, 0, "no task");
}

#[test]
fn pausing_is_quick_and_loses_nothing() {
    need_kvm!("pausing");
    let mut guest = running("sparse", 2);
    let mut longest = Duration::ZERO;
    for _ in 0..200 {
        let asked = Instant::now();
        guest.pause().unwrap();
        longest = longest.max(asked.elapsed());
        // Every exit is complete: the state can be set again and the guest goes on from it.
        let state = guest.save_device_state().unwrap();
        guest.load_device_state(&state).unwrap();
        guest.resume().unwrap();
    }
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    let ops = guest.status().ops;
    wait_for(&guest, |status| status.ops > ops);
    expect_right(&guest);
}

#[test]
fn a_changed_page_and_an_older_page_do_not_pass() {
    need_kvm!("wrong pages are found");
    let first = plan("sequential", 1).first_used_page();
    let mut guest = running("sequential", 1);
    let mut older = [0; PAGE_SIZE_BYTES];
    guest.pause().unwrap();
    guest.memory.read_page(PageIndex(first + 9), &mut older);
    guest.resume().unwrap();
    wait_for(&guest, |status| status.ops > 700);
    expect_right(&guest);
    guest.pause().unwrap();
    guest.memory.write_page(PageIndex(first + 9), &older).unwrap();
    guest.resume().unwrap();
    guest.verify_all();
    wait_for(&guest, |status| status.wrong_pages > 0);
    assert_eq!(guest.status().first_wrong_page, first + 9);
}

#[test]
fn every_register_class_makes_the_round_trip() {
    need_kvm!("register classes");
    let (source, mut destination) = (waiting(1), waiting(1));
    source.vcpus[0].inspect(set_unusual_state);
    let abilities = source.vm.abilities.clone();
    let saved = source.vcpus[0].save().unwrap();
    let report = vec![(0, GuestStatus::default())];
    let state = VmState::save(&source.vm, source.workload, report, vec![saved.clone()]).unwrap();
    destination.load_device_state(&state.encode().unwrap()).unwrap();
    let loaded = destination.vcpus[0].save().unwrap();
    assert_same(&saved, &loaded);
    assert_eq!(abilities.msrs, destination.vm.abilities.msrs);
    let [here, there] = [&source, &destination].map(|guest| guest.vm.fd.get_clock().unwrap().clock);
    assert!(here.abs_diff(there) < 10_000_000_000, "clocks: {here} and {there} ns");
}

fn assert_same(saved: &VcpuState, loaded: &VcpuState) {
    assert_eq!(saved.regs, loaded.regs);
    assert_eq!((saved.regs.r8, saved.regs.r15), (0x8888_8888_8888_8888, u64::MAX));
    assert_eq!(saved.sregs, loaded.sregs);
    assert_eq!((saved.sregs.cr2, saved.sregs.cr8, saved.sregs.gdt.base), (0xdead_b000, 5, 0x5000));
    assert_eq!(saved.pdptrs, loaded.pdptrs);
    assert_eq!(saved.xcrs, loaded.xcrs);
    assert_eq!(saved.xcrs.xcrs[0].value, 7);
    assert_eq!(saved.xsave, loaded.xsave);
    assert_eq!(saved.xsave[40], 0xabcd_0000);
    assert_eq!(saved.debugregs, loaded.debugregs);
    assert_eq!(saved.debugregs.db, [0x1000, 0x2000, 0x3000, 0x4000]);
    assert_eq!(saved.events, loaded.events);
    assert_eq!((saved.events.nmi.pending, saved.events.nmi.masked), (1, 1));
    assert_eq!(saved.mp_state, loaded.mp_state);
    assert_eq!(saved.lapic, loaded.lapic);
    if let Some(lapic) = &saved.lapic {
        assert_eq!((lapic.regs[0x80], lapic.regs[0x320]), (0x50, 0x33));
        assert_eq!(saved.mp_state.mp_state, kvm_bindings::KVM_MP_STATE_HALTED);
    }
    let msr = |state: &VcpuState, index| {
        state.msrs.iter().find(|msr| msr.0 == index).map(|msr| msr.1).unwrap()
    };
    assert_eq!(
        (msr(saved, STAR), msr(saved, KERNEL_GS_BASE)),
        (0x23_0010_0000_0000, 0x7fff_1234_5000)
    );
    // The TSC goes on by itself, and an emulated KVM may show the host's whatever is set.
    let (before, after) = (msr(saved, TSC), msr(loaded, TSC));
    assert!(after >= before && after - before < 1 << 40, "{before} {after}");
    let others = |state: &VcpuState| {
        state.msrs.iter().copied().filter(|(index, _)| *index != TSC).collect::<Vec<_>>()
    };
    assert_eq!(others(saved), others(loaded));
}

const TSC: u32 = 0x10;
const STAR: u32 = 0xc000_0081;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Puts something into each class that is not there after a reset.
fn set_unusual_state(vcpu: &kvm_ioctls::VcpuFd) {
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rax, regs.r8, regs.r15, regs.rsp) = (0x1111, 0x8888_8888_8888_8888, u64::MAX, 0x7000);
    vcpu.set_regs(&regs).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cr2, sregs.cr8, sregs.gdt.base, sregs.gdt.limit) = (0xdead_b000, 5, 0x5000, 0x7f);
    sregs.fs.base = 0x1234_5000;
    // For SSE state and XCR0.
    sregs.cr4 |= 1 << 9 | 1 << 18;
    vcpu.set_sregs(&sregs).unwrap();
    let mut xcrs = vcpu.get_xcrs().unwrap();
    xcrs.xcrs[0].value = 7;
    vcpu.set_xcrs(&xcrs).unwrap();
    let mut xsave = ioctl::xsave(vcpu, ioctl::XSAVE_MIN_BYTES).unwrap();
    for (register, word) in (0..).zip(&mut xsave[40..104]) {
        *word = 0xabcd_0000 + register; // XMM0 to XMM15
    }
    xsave[128] |= 3; // XSTATE_BV: x87 and SSE are in use
    ioctl::set_xsave(vcpu, ioctl::XSAVE_MIN_BYTES, &xsave).unwrap();
    let mut debug = vcpu.get_debug_regs().unwrap();
    debug.db = [0x1000, 0x2000, 0x3000, 0x4000];
    vcpu.set_debug_regs(&debug).unwrap();
    let msrs = [(STAR, 0x23_0010_0000_0000), (KERNEL_GS_BASE, 0x7fff_1234_5000), (TSC, 1 << 50)];
    let msrs = msrs.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&msrs).unwrap();
    assert_eq!(vcpu.set_msrs(&msrs).unwrap(), 3);
    if let Ok(mut lapic) = vcpu.get_lapic() {
        lapic.regs[0x80] = 0x50; // task priority
        lapic.regs[0xf1] = 1; // spurious interrupt vector: enabled
        lapic.regs[0x320] = 0x33; // timer: vector 0x33
        vcpu.set_lapic(&lapic).unwrap();
        vcpu.set_mp_state(kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_HALTED }).unwrap();
    }
    let mut events = vcpu.get_vcpu_events().unwrap();
    events.nmi.pending = 1;
    events.nmi.masked = 1;
    events.flags |= kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING;
    vcpu.set_vcpu_events(&events).unwrap();
}
