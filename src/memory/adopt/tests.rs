use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::*;
use crate::memory::testing::{TestGuest, Worker};
use crate::memory::{FAULT_FEATURES, GuestMemory, MemoryLayout, RegionLayout};
use crate::page::{PageIndex, PageRange};

fn small_memory() -> GuestMemory {
    let region = RegionLayout { name: "ram".to_owned(), size_bytes: 16 * 4096 };
    GuestMemory::create(&MemoryLayout::new(vec![region])).unwrap()
}

#[test]
fn the_memory_of_another_process_can_be_mapped_too() {
    let memory = small_memory();
    let mut guest = TestGuest::start(&memory);
    let adopted = Adopted::attach(guest.pid()).unwrap();
    let shared = adopted.shared_mappings().unwrap();
    let ram: Vec<_> = shared.iter().filter(|m| m.address == guest.addresses()[0]).collect();
    assert_eq!(ram.len(), 1);
    assert!(ram[0].deleted && ram[0].path.contains("farfault-ram"), "{ram:?}");
    let backing = crate::memory::RegionBacking {
        layout: memory.layout().regions()[0].clone(),
        file: adopted.open_backing(ram[0], Access::ReadOnly).unwrap(),
        file_offset_bytes: ram[0].file_offset_bytes,
    };
    guest.write(PageIndex(3), 0x0101_0101_0101_0101);
    let alias = GuestMemory::map(vec![backing], Access::ReadOnly).unwrap();
    let mut page = [0; 4096];
    alias.read_page(PageIndex(3), &mut page);
    assert_eq!(page, [1; 4096]);
    assert_eq!(alias.populated(PageRange::new(0, 16)).unwrap().len(), 1);
}

#[test]
fn borrowed_threads_do_not_notice() {
    let memory = small_memory();
    let mut guest = TestGuest::start(&memory);
    guest.start_threads(8);
    let adopted = Adopted::attach(guest.pid()).unwrap();
    let instruction = adopted.find_syscall_instruction().unwrap();
    let call = Call { name: "getpid", number: libc::SYS_getpid, arguments: [0; 3] };
    let mut calls = 0;
    for _ in 0..25 {
        for thread in threads::candidates(guest.pid(), &[]).unwrap() {
            match inject::call_in_thread(guest.pid(), thread, call, false, instruction) {
                Ok(result) => assert_eq!(result, i64::from(guest.pid())),
                // Those that write into the pipe come and go.
                Err(MemoryError::ProcessGone) => continue,
                Err(other) => panic!("{other}"),
            }
            calls += 1;
        }
    }
    assert!(calls >= 8 * 25, "{calls} calls");
    assert_eq!(guest.disturbances(), 0);
}

/// Else a farfault that is killed at that moment would take the guest with it.
#[test]
fn who_borrows_threads_may_be_killed_at_any_moment() {
    let memory = small_memory();
    let mut guest = TestGuest::start(&memory);
    guest.start_threads(3);
    let adopted = Adopted::attach(guest.pid()).unwrap();
    let instruction = adopted.find_syscall_instruction().unwrap();
    let call = Call { name: "getpid", number: libc::SYS_getpid, arguments: [0; 3] };
    let (mut receiver, mut sender) = UnixStream::pair().unwrap();
    receiver.set_nonblocking(true).unwrap();
    let (mut round, mut calls) = (0, 0);
    // On a busy machine few calls come to their end before the kill.
    while round < 200 || calls < 20 {
        let borrower = Worker::start(|| {
            for thread in threads::candidates(guest.pid(), &[]).unwrap() {
                let called = inject::call_in_thread(guest.pid(), thread, call, false, instruction);
                if called.is_ok() {
                    sender.write_all(b"!").unwrap();
                }
            }
        });
        std::thread::sleep(std::time::Duration::from_micros(500 + 37 * round % 1000));
        drop(borrower);
        assert_eq!(guest.disturbances(), 0, "round {round}");
        calls += receiver.read(&mut [0; 1000]).unwrap_or(0);
        round += 1;
        assert!(round < 20_000, "only {calls} calls came to their end");
    }
}

#[test]
fn a_userfaultfd_is_made_by_either_way_and_found_again() {
    let memory = small_memory();
    let guest = TestGuest::start(&memory);
    let adopted = Adopted::attach(guest.pid()).unwrap();
    let first = adopted.userfaultfd(None, &[], FAULT_FEATURES).unwrap();
    let again = adopted.userfaultfd(None, &[], FAULT_FEATURES).unwrap();
    assert_ne!(first.as_raw_fd(), again.as_raw_fd());
    let count = || {
        let links = adopted.descriptors().unwrap().into_iter();
        let links = links.filter_map(|(_, path)| std::fs::read_link(path).ok());
        links.filter(|to| to.to_string_lossy().contains("userfaultfd]")).count()
    };
    assert_eq!(count(), 1, "the second is the first");
    let other = FeatureFlags::THREAD_ID;
    adopted.userfaultfd(None, &[], other).unwrap();
    assert_eq!(count(), 2, "other features need another");
    let mut refuse = |_: BorrowedFd<'_>| Err(io::ErrorKind::Unsupported.into());
    adopted.userfaultfd(Some(&mut refuse), &[], FeatureFlags::empty()).unwrap();
    assert_eq!(count(), 3, "made by the system call when the device cannot be passed");
}

#[test]
fn a_device_that_was_passed_gives_a_userfaultfd() {
    let memory = small_memory();
    // Opened before the fork, so that the process has it too, as if it had been passed.
    let device = OpenOptions::new().read(true).write(true).open(sys::USERFAULTFD_DEVICE).unwrap();
    let guest = TestGuest::start(&memory);
    let adopted = Adopted::attach(guest.pid()).unwrap();
    let mut passed = 0;
    let mut pass = |_: BorrowedFd<'_>| {
        passed += 1;
        Ok(())
    };
    let descriptor = adopted.userfaultfd_from_device(&mut pass, &[]).unwrap();
    assert_eq!(passed, 1);
    let copy = adopted.take_descriptor(descriptor).unwrap();
    assert!(sys::uffd_api(copy.as_fd(), FAULT_FEATURES).is_ok());
    drop(device);
}

#[test]
fn a_process_that_has_ended_is_told_apart() {
    let memory = small_memory();
    let guest = TestGuest::start(&memory);
    let adopted = Adopted::attach(guest.pid()).unwrap();
    assert!(adopted.is_alive());
    drop(guest);
    assert!(!adopted.is_alive());
    assert!(adopted.userfaultfd(None, &[], FAULT_FEATURES).is_err());
    let nobody = Adopted::attach(0x3f_ffff);
    assert!(matches!(nobody, Err(MemoryError::NoProcess { .. })), "{nobody:?}");
}
