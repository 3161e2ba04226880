//! A QEMU whose RAM is served page by page, as after a switchover.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::super::commands::QueryStatus;
use super::*;
use crate::guest::{DestinationGuest, SourceGuest};
use crate::memory::{GuestMemory, TrackerKind, Userfault};
use crate::page::{PAGE_SIZE_BYTES, PageRange};

/// Serves faults of the destination out of the source's RAM, in its own thread, while it lives.
struct FaultService {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl FaultService {
    fn start(userfault: Arc<Userfault>, from: Arc<GuestMemory>, to: Arc<GuestMemory>) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&served));
        let thread = thread::spawn(move || {
            let content = from.populated(PageRange::new(0, from.pages())).expect("holes told");
            let mut faults = Vec::new();
            let mut bytes = [0; PAGE_SIZE_BYTES];
            while !stopped.load(Ordering::Relaxed) {
                userfault.wait(Duration::from_millis(5), &mut faults).expect("faults are read");
                for fault in &faults {
                    if content.contains(fault.page) {
                        from.read_page(fault.page, &mut bytes);
                        to.write_page(fault.page, &bytes).expect("there is room");
                        let one = PageRange::new(fault.page.0, fault.page.0 + 1);
                        userfault.map(one).expect("the page is mapped");
                    } else {
                        userfault.map_zero(fault.page).expect("a zero page is mapped");
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        FaultService { stop, served, thread: Some(thread) }
    }

    fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }
}

impl Drop for FaultService {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().expect("joined once").join();
        if !thread::panicking() {
            ended.expect("the fault service does not panic");
        }
    }
}

/// With a second QMP socket of the user's.
fn spawn_destination(ram: &Path, qmp: &Path, more: &str) -> QemuDestination {
    let mut command = vec![QEMU.to_owned()];
    command.extend(words(COMMON));
    command.extend(machine("q35", ram));
    command.extend(words(more));
    command.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", qmp.display())]);
    let command = command.into_iter().map(Into::into).collect();
    QemuDestination::spawn(&SpawnOptions { command, log: None }).expect("QEMU starts")
}

/// A destination that has been given the state of `source`, and its fault service.
fn loaded(
    source: &mut QemuSource,
    destination: &mut QemuDestination,
) -> (Arc<Userfault>, FaultService) {
    let userfault = Arc::new(destination.userfault().expect("its faults come to us"));
    let all = PageRange::new(0, destination.memory().pages());
    assert!(destination.memory().populated(all).expect("holes told").is_empty());
    source.pause().expect("it stops");
    let state = source.save_device_state().expect("it hands over its state");
    let service =
        FaultService::start(Arc::clone(&userfault), source.memory(), destination.memory());
    destination.load_device_state(&state).expect("it takes the state");
    (userfault, service)
}

#[test]
fn a_guest_runs_on_pages_that_come_by_fault_and_its_qemu_outlives_us() {
    if skip() {
        return;
    }
    let from = TestQemu::machine("q35", "");
    thread::sleep(Duration::from_millis(300));
    let mut source = from.source().expect("a running guest can be moved");
    let ram = ram_name();
    let directory = tempfile::tempdir().expect("a directory");
    let second = directory.path().join("qmp");
    let mut destination = spawn_destination(&ram, &second, "");
    let socket = destination.qmp_path().expect("it has a socket of ours");
    let (userfault, service) = loaded(&mut source, &mut destination);
    let while_loading = service.served();
    destination.run().expect("it runs");
    wait_until("the guest touches its RAM", || service.served() > while_loading);

    let all = PageRange::new(0, source.memory().pages());
    let mut bytes = [0; PAGE_SIZE_BYTES];
    let here = destination.memory().populated(all).expect("holes told");
    let mut missing = source.memory().populated(all).expect("holes told");
    missing.subtract(&here);
    for page in missing.iter() {
        source.memory().read_page(page, &mut bytes);
        destination.memory().write_page(page, &bytes).expect("there is room");
    }
    drop(service);
    userfault.release().expect("it runs by itself");
    destination.release().expect("it is let go");
    source.release(true).expect("it ends");
    let pid = Pid::from_raw(destination.pid() as i32);
    drop(destination);
    assert!(!socket.exists(), "no socket is left behind");
    let mut qmp = Qmp::connect(&second).expect("QEMU lives on");
    assert_eq!(qmp.execute(&QueryStatus {}).expect("it answers").status, "running");
    kill(pid, Signal::SIGKILL).expect("our own QEMU");
    std::fs::remove_file(&ram).expect("the RAM file stays with QEMU");
}

#[test]
fn a_discarded_qemu_ends_although_it_waits_for_a_page() {
    if skip() {
        return;
    }
    let from = TestQemu::machine("q35", "-S");
    let mut source = from.source().expect("a paused guest can be moved");
    let ram = ram_name();
    let directory = tempfile::tempdir().expect("a directory");
    let second = directory.path().join("qmp");
    let mut destination = spawn_destination(&ram, &second, "");
    let (_userfault, service) = loaded(&mut source, &mut destination);
    drop(service);
    let mut other = Qmp::connect(&second).expect("a second monitor");
    let waiting = thread::spawn(move || other.human("xp /1x 0x2000000"));
    thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished(), "QEMU waits for the page");
    destination.discard().expect("it is gone");
    let answer = waiting.join().expect("no panic");
    assert!(matches!(answer, Err(QmpError::Closed { .. })), "{answer:?}");
    assert!(!ram.exists(), "no RAM file is left behind");
    source.resume().expect("it was paused, and stays so");
}

#[test]
fn a_qemu_in_a_sandbox_and_of_another_user_moves_like_any_other() {
    if skip() {
        return;
    }
    let confined = "-runas nobody \
        -sandbox on,obsolete=deny,spawn=deny,resourcecontrol=deny";
    let from = TestQemu::machine("q35", confined);
    let mut source = from.source().expect("a running guest can be moved");
    let mut tracker = source.track(TrackerKind::WriteProtect).expect("its writes are followed");
    tracker.arm().expect("it begins");
    let ram = ram_name();
    let directory = tempfile::tempdir().expect("a directory");
    let mut destination = spawn_destination(&ram, &directory.path().join("qmp"), confined);
    let (_userfault, _service) = loaded(&mut source, &mut destination);
    destination.run().expect("it runs");
    tracker.disarm().expect("it ends");
    destination.discard().expect("it is gone");
}
