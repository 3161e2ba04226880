//! Device state out of one QEMU and into another, and what each is like afterwards.

use std::fs::{self, File};
use std::net::UdpSocket;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::super::commands::{QueryCapabilities, QueryParameters, QueryStatus};
use super::super::left::let_run_when_it_answers;
use super::*;
use crate::guest::{DestinationGuest, SourceGuest};
use crate::memory::{GuestMemory, TrackerKind};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, PageSet};
use crate::wire::state::{PackedState, RehearsedState};

fn status(qmp: &mut Qmp) -> String {
    qmp.execute(&QueryStatus {}).expect("QEMU answers").status
}

#[test]
fn a_rehearsal_leaves_the_guest_running_and_the_settings_as_they_were() {
    if skip() {
        return;
    }
    let qemu = TestQemu::machine("q35", "-vga std -device virtio-rng-pci");
    let settings = |qmp: &mut Qmp| {
        let capabilities = qmp.execute(&QueryCapabilities {}).expect("QEMU answers");
        (capabilities, qmp.execute(&QueryParameters {}).expect("QEMU answers"))
    };
    let mut qmp = qemu.qmp();
    qmp.human("migrate_set_capability auto-converge on").expect("QEMU takes it");
    let before = settings(&mut qmp);
    drop(qmp);
    let mut source = qemu.source().expect("a running guest can be moved");
    let mut sizes = Vec::new();
    for _ in 0..3 {
        source.pause().expect("it stops");
        source.pause().expect("stopping twice is harmless");
        sizes.push(source.save_device_state().expect("it hands over its state").len());
        source.resume().expect("it runs on");
        source.resume().expect("resuming twice is harmless");
    }
    // 16 MiB of video memory travel in it, and none of the 64 MiB of RAM; zero pages are short.
    assert!(sizes.iter().all(|size| (10 << 10..24 << 20).contains(size)), "{sizes:?}");
    drop(source);
    let mut qmp = qemu.qmp();
    assert_eq!(status(&mut qmp), "running");
    assert_eq!(settings(&mut qmp), before);
}

#[test]
fn of_a_rehearsed_device_state_little_has_changed_at_the_switchover() {
    if skip() {
        return;
    }
    let devices = "-netdev user,id=net -device virtio-net-pci,netdev=net -device virtio-rng-pci \
                   -device virtio-balloon-pci";
    let qemu = TestQemu::machine("q35", devices);
    let mut source = qemu.source().expect("a running guest can be moved");
    source.pause().expect("it stops");
    let rehearsed = source.save_device_state().expect("it hands over its state");
    source.resume().expect("it runs on");
    source.pause().expect("it stops again");
    let state = source.save_device_state().expect("it hands over its state");
    let difference = PackedState::pack(&state, Some(&RehearsedState::new(rehearsed)));
    assert!(state.len() > 256 << 10, "{} bytes", state.len());
    assert!(difference.coded_bytes() <= 32 << 10, "{difference:?}");
}

#[test]
fn a_guest_that_its_owner_paused_stays_paused() {
    if skip() {
        return;
    }
    let qemu = TestQemu::machine("q35", "-S");
    let mut source = qemu.source().expect("a paused guest can be moved");
    assert!(!source.runs());
    source.pause().expect("harmless");
    source.save_device_state().expect("it hands over its state");
    source.resume().expect("nothing to do");
    drop(source);
    assert_ne!(status(&mut qemu.qmp()), "running");
}

#[test]
fn what_its_owner_tells_a_guest_in_pre_copy_holds_after_a_moment_of_standing_still() {
    if skip() {
        return;
    }
    for (attached, told, then) in [("-S", "cont", true), ("", "stop", false)] {
        let more = format!("{attached} -qmp unix:second,server=on,wait=off");
        let qemu = TestQemu::machine("q35", &more);
        let second = qemu.directory.path().join("second");
        wait_until("the second monitor is there", || second.exists());
        let mut owner = Qmp::connect(&second).expect("a second monitor");
        let mut source = qemu.source().expect("it can be moved, running or paused");
        owner.human(told).expect("QEMU obeys");
        wait_until("it has done so", || (status(&mut owner) == "running") == then);
        source.pause().expect("it stops");
        assert_ne!(status(&mut owner), "running");
        source.resume().expect("it is as it was");
        assert_eq!(status(&mut owner) == "running", then, "{told}");
    }
}

/// Has `destination`, whose RAM is in the file `ram`, take the guest of `from`.
fn carry_over(
    from: &TestQemu,
    source: &mut QemuSource,
    ram: &Path,
    destination: &mut QemuDestination,
) {
    source.pause().expect("it stops");
    let state = source.save_device_state().expect("it hands over its state");
    fs::copy(&from.ram_files[0], ram).expect("RAM files can be copied");
    destination.load_device_state(&state).expect("it takes the state");
}

/// A destination that farfault has started itself.
fn spawned(kind: &str, ram: &Path, more: &[String]) -> QemuDestination {
    let mut command = vec![QEMU.to_owned()];
    command.extend(words(COMMON));
    command.extend(machine(kind, ram));
    command.extend_from_slice(more);
    let command = command.into_iter().map(Into::into).collect();
    QemuDestination::spawn(&SpawnOptions { command, log: None }).expect("it starts")
}

#[test]
fn a_command_that_stays_beside_its_qemu_is_refused_and_both_are_ended() {
    if skip() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let ram = directory.path().join("ram");
    let mut command = words("sh -c");
    command.extend(["\"$@\"; true".to_owned(), "sh".to_owned(), QEMU.to_owned()]);
    command.extend(words(COMMON));
    command.extend(machine("q35", &ram));
    let command = command.into_iter().map(Into::into).collect();
    let refused = QemuDestination::spawn(&SpawnOptions { command, log: None }).map(drop);
    let refused = refused.expect_err("the one that would be ended is not QEMU").to_string();
    assert!(refused.contains("give the command of QEMU itself"), "{refused}");
    assert!(!ram.exists(), "its RAM is left");
    let name = ram.to_string_lossy().into_owned();
    wait_until("QEMU has ended", || {
        let processes = fs::read_dir("/proc").expect("processes").flatten();
        let mut lines = processes.map(|process| fs::read(process.path().join("cmdline")));
        !lines.any(|line| line.is_ok_and(|line| String::from_utf8_lossy(&line).contains(&name)))
    });
}

#[test]
fn a_guest_moves_to_another_qemu() {
    if skip() {
        return;
    }
    for kind in ["pc", "q35", "microvm"] {
        let from = TestQemu::machine(kind, "");
        thread::sleep(Duration::from_millis(300));
        let to = TestQemu::machine(kind, "-incoming defer -S");
        let mut source = from.source().expect("a running guest can be moved");
        let mut destination = to.destination().expect("a waiting QEMU can take a guest");
        source.pause().expect("it stops");
        let state = source.save_device_state().expect("it hands over its state");
        fs::copy(&from.ram_files[0], &to.ram_files[0]).expect("RAM files can be copied");
        let too_early = destination.run().expect_err("nothing to run yet");
        assert!(too_early.message.contains("before its device state"));
        destination.load_device_state(&state).expect("it takes the state");
        assert!(!destination.stands_still(), "others may let it run at any time");
        destination.run().expect("it runs");
        destination.release().expect("it is let go");
        source.release(false).expect("it stays, stopped");
        drop((source, destination));
        assert_eq!(status(&mut from.qmp()), "postmigrate", "{kind}");
        assert_eq!(status(&mut to.qmp()), "running", "{kind}");
        let (message, _) = refused(from.source());
        assert!(message.contains("migrated before"), "{message}");
    }
}

/// Takes a lock as QEMU does (its `block/file-posix.c`) that keeps every QEMU from writing to `image`.
fn keep_from_writing(image: &Path) -> File {
    /// Nobody else may have the permission with this number added: 1 is to write.
    const SHARED_BASE: i64 = 200;
    let file = File::options().read(true).write(true).open(image).expect("the image is there");
    let lock = libc::flock {
        l_type: libc::F_RDLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: SHARED_BASE + 1,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).expect("nobody else has it");
    file
}

#[test]
fn a_guest_that_is_not_let_start_because_of_its_disk_runs_on_where_it_was() {
    if skip() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory for the images");
    let images = ["first", "second"].map(|name| directory.path().join(name));
    let mut disks = Vec::new();
    for image in &images {
        File::create(image).and_then(|file| file.set_len(1 << 20)).expect("an image");
        disks.extend(words(&format!("-drive file={},format=raw,if=virtio", image.display())));
    }
    let from = TestQemu::machine("q35", &disks.join(" "));
    let mut source = from.source().expect("a running guest can be moved");
    let ram = ram_name();
    let mut destination = spawned("q35", &ram, &disks);
    carry_over(&from, &mut source, &ram, &mut destination);
    // It has the first disk by then.
    let lock = keep_from_writing(&images[1]);
    let refused = destination.run().expect_err("QEMU cannot have its second disk");
    assert!(refused.message.contains("lock"), "{refused}");
    assert!(destination.stands_still());
    // The disks come free while the source is asking for them again.
    let ending = thread::spawn(move || {
        thread::sleep(Duration::from_millis(500));
        drop(lock);
        destination.discard()
    });
    source.resume().expect("it runs on");
    ending.join().expect("no panic").expect("it is gone");
    drop(source);
    assert_eq!(status(&mut from.qmp()), "running");
}

/// EtherType of RARP, in which QEMU announces a guest.
const RARP: [u8; 2] = [0x80, 0x35];

#[test]
fn the_network_is_told_where_a_guest_is_now() {
    if skip() {
        return;
    }
    let network = UdpSocket::bind("127.0.0.1:0").expect("a socket that stands for a switch");
    network.set_read_timeout(Some(Duration::from_secs(20))).expect("a limit");
    let port = network.local_addr().expect("it is bound").port();
    let card = format!(
        "-netdev socket,id=net,udp=127.0.0.1:{port},localaddr=127.0.0.1:0 \
         -device virtio-net-pci,netdev=net,mac=52:54:00:12:34:56"
    );
    let hear = |who: &str| {
        let mut frame = [0; 2048];
        let length = network.recv(&mut frame).unwrap_or_else(|error| panic!("{who}: {error}"));
        assert!(length >= 42 && frame[12..14] == RARP, "{who}: {:x?}", &frame[..length]);
        assert_eq!(frame[6..12], [0x52, 0x54, 0, 0x12, 0x34, 0x56], "{who}");
    };
    let from = TestQemu::machine("q35", &card);
    let to = TestQemu::machine("q35", &format!("{card} -incoming defer -S"));
    let mut source = from.source().expect("a running guest can be moved");
    let mut destination = to.destination().expect("a waiting QEMU can take a guest");
    carry_over(&from, &mut source, &to.ram_files[0], &mut destination);
    destination.run().expect("it runs");
    hear("the one that received it");
    destination.release().expect("it is let go");
    // What it says five times is said.
    thread::sleep(Duration::from_secs(2));
    network.set_nonblocking(true).expect("a socket");
    while network.recv(&mut [0; 2048]).is_ok() {}
    network.set_nonblocking(false).expect("a socket");
    let place = destination.whereabouts();
    drop((source, destination));
    let_run_when_it_answers(&place).expect("it runs");
    hear("the one that takes over");
}

#[test]
fn a_state_that_does_not_fit_is_told_and_the_source_runs_on() {
    if skip() {
        return;
    }
    let from = TestQemu::machine("q35", "-device virtio-rng-pci,id=rng");
    let mut source = from.source().expect("a running guest can be moved");
    source.pause().expect("it stops");
    let state = source.save_device_state().expect("it hands over its state");
    let ram = ram_name();
    let mut destination = spawned("q35", &ram, &[]);
    fs::copy(&from.ram_files[0], &ram).expect("RAM files can be copied");
    let error = destination.load_device_state(&state).expect_err("it lacks a device");
    assert!(error.message.contains("virtio-rng"), "{}", error.message);
    destination.discard().expect("it is gone");
    assert!(!ram.exists());
    source.resume().expect("it runs on");
    drop(source);
    assert_eq!(status(&mut from.qmp()), "running");
}

/// All RAM as it reads now, without filling its holes.
fn snapshot(memory: &GuestMemory) -> Vec<PageBytes> {
    let content = memory.populated(PageRange::new(0, memory.pages())).expect("holes told");
    let mut pages = vec![[0; PAGE_SIZE_BYTES]; memory.pages() as usize];
    content.iter().for_each(|page| memory.read_page(page, &mut pages[page.0 as usize]));
    pages
}

#[test]
fn the_writes_of_a_guest_are_followed() {
    if skip() {
        return;
    }
    for kind in [TrackerKind::Auto, TrackerKind::HashScan] {
        // Not yet running: its firmware has all RAM to write to yet.
        let qemu = TestQemu::machine("q35", "-S -qmp unix:second,server=on,wait=off");
        let second = qemu.directory.path().join("second");
        wait_until("the second monitor is there", || second.exists());
        let mut monitor = Qmp::connect(&second).expect("a second monitor");
        let mut source = qemu.source().expect("a paused guest can be moved");
        let memory = source.memory();
        let all = PageRange::new(0, memory.pages());
        let mut tracker = source.track(kind).expect("its writes can be followed");
        tracker.arm().expect("it begins");
        let before = snapshot(&memory);
        let holes_filled = || memory.populated(all).expect("holes told").len();
        let filled_before = holes_filled();
        let mut changed = PageSet::empty(memory.pages());
        monitor.human("cont").expect("the firmware starts");
        wait_until("the firmware writes", || {
            tracker.collect(all, &mut changed).expect("changes are told");
            holes_filled() > filled_before + 8
        });
        source.pause().expect("it stops");
        tracker.collect(all, &mut changed).expect("changes are told");
        let after = snapshot(&memory);
        let differs = |page: &PageIndex| before[page.0 as usize] != after[page.0 as usize];
        let missed: Vec<_> =
            all.pages().filter(differs).filter(|page| !changed.contains(*page)).collect();
        assert!(missed.is_empty(), "{}: {missed:?}", tracker.name());
        assert!(all.pages().any(|page| differs(&page)), "the firmware changes RAM at its start");
        tracker.disarm().expect("it ends");
        drop((tracker, source));
        monitor.human("cont").expect("it runs on");
        assert_eq!(status(&mut monitor), "running");
    }
}

#[test]
fn a_source_that_is_released_for_good_ends() {
    if skip() {
        return;
    }
    let mut qemu = TestQemu::machine("q35", "");
    let mut source = qemu.source().expect("a running guest can be moved");
    source.release(true).expect("it ends");
    wait_until("QEMU has ended", || qemu.child.try_wait().expect("a child").is_some());
}

#[test]
fn a_guest_whose_qemu_does_not_answer_runs_on_when_it_does() {
    if skip() {
        return;
    }
    let qemu = TestQemu::machine("q35", "");
    let mut source = qemu.source().expect("a running guest can be moved");
    source.set_patience(Duration::from_millis(100));
    let process = Pid::from_raw(qemu.child.id().cast_signed());
    kill(process, Signal::SIGSTOP).expect("it is ours");
    let error = source.pause().expect_err("nobody answers").message;
    assert!(error.contains("has not answered"), "{error}");
    let waker = thread::spawn(move || {
        thread::sleep(Duration::from_millis(400));
        kill(process, Signal::SIGCONT)
    });
    // Each command by itself may take longer than that on a busy host.
    source.set_patience(Duration::from_secs(2));
    source.resume().expect("it is asked until it answers");
    waker.join().expect("no panic").expect("it is ours");
    drop(source);
    assert_eq!(status(&mut qemu.qmp()), "running");
}
