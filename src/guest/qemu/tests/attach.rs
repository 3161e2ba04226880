//! What is adopted, what is refused, and what two sides agree on.

use std::os::unix::net::UnixListener;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::super::guards;
use super::*;
use crate::guest::{DestinationGuest, SourceGuest};

#[test]
fn a_socket_that_is_not_qmp_is_refused_in_bounded_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("socket");
    let connect = || Qmp::connect(&path).map(drop);

    assert!(matches!(connect(), Err(QmpError::Connect { .. })));

    let listener = UnixListener::bind(&path).expect("a socket");
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut client, _) = listener.accept().expect("a client");
            client.write_all(b"220 mail.example ESMTP\r\n").expect("it reads");
        });
        assert!(matches!(connect(), Err(QmpError::NotQmp { said, .. }) if said.contains("ESMTP")));
    });

    let begun = Instant::now();
    assert!(matches!(connect(), Err(QmpError::Silent { .. })));
    assert!(begun.elapsed() < Duration::from_secs(8));

    drop(listener);
    let (message, hint) = refused(QemuSource::attach(&path));
    assert!(message.contains("refused") && hint.contains("ended"), "{message}; {hint}");
}

#[test]
fn what_happens_before_the_greeting_does_not_hide_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut client, _) = listener.accept().expect("a client");
            let said = concat!(
                r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}"#,
                "\r\n",
                r#"{"QMP": {"version": {"qemu": {"micro": 1, "minor": 2, "major": 7}}, "capabilities": []}}"#,
                "\r\n",
                r#"{"return": {}, "id": 1}"#,
                "\r\n"
            );
            client.write_all(said.as_bytes()).expect("it reads");
            let _ = std::io::Read::read(&mut client, &mut [0; 256]);
        });
        Qmp::connect(&path).expect("it greets");
    });
}

#[test]
fn the_monitor_for_people_and_a_busy_socket_are_told_apart() {
    if skip() {
        return;
    }
    let qemu = TestQemu::machine("q35", "-S -monitor unix:hmp,server=on,wait=off");
    let hmp = qemu.directory.path().join("hmp");
    wait_until("the other monitor is there", || hmp.exists());
    assert!(matches!(
        Qmp::connect(&hmp),
        Err(QmpError::NotQmp { said, .. }) if said.contains("monitor")
    ));
    let _first = qemu.qmp();
    let (message, hint) = refused(qemu.source());
    assert!(message.contains("nothing greets us") && hint.contains("one client"), "{hint}");
}

#[test]
fn ram_that_is_private_is_refused_with_the_option_to_use() {
    if skip() {
        return;
    }
    let cases = [
        (
            "-machine q35 -m 32",
            "-object memory-backend-file,id=ram0,size=32M,mem-path=/dev/shm/NAME,share=on \
             -machine memory-backend=ram0",
        ),
        (
            "-machine q35,memory-backend=a -m 32 -object memory-backend-ram,id=a,size=32M",
            "-object memory-backend-file,id=a,size=32M,mem-path=/dev/shm/NAME,share=on",
        ),
        (
            "-machine q35,memory-backend=a -m 32 -object memory-backend-memfd,id=a,size=32M,share=off",
            "add share=on to -object memory-backend-memfd,id=a",
        ),
        (
            "-machine q35,memory-backend=a -m 32 \
             -object memory-backend-file,id=a,size=32M,mem-path=.,share=on",
            "mem-path=/dev/shm/NAME",
        ),
    ];
    for (line, advice) in cases {
        let qemu = TestQemu::start(&words(&format!("{line} -S")));
        let (message, hint) = refused(qemu.source());
        assert!(hint.contains(advice), "{line}: {message}; {hint}");
    }
}

#[test]
fn several_backends_and_a_dimm_are_separate_regions_wherever_they_lie() {
    if skip() {
        return;
    }
    let line = "-machine pc -m 64,slots=2,maxmem=512M \
        -object memory-backend-memfd,id=n1,size=32M,share=on \
        -object memory-backend-memfd,id=n0,size=32M,share=on \
        -numa node,memdev=n0 -numa node,memdev=n1 \
        -object memory-backend-file,id=dimm,size=128M,mem-path=/dev/shm,share=on \
        -device pc-dimm,id=d0,memdev=dimm \
        -object memory-backend-memfd,id=unused,size=32M,share=on";
    let running = TestQemu::start(&words(line));
    let source = running.source().expect("shared RAM can be moved");
    let regions = source.shape().memory.regions();
    let told: Vec<_> = regions.iter().map(|r| (r.name.as_str(), r.size_bytes >> 20)).collect();
    assert_eq!(told, [("dimm", 128), ("n0", 32), ("n1", 32)]);
    // The firmware leaves its interrupt vectors at the bottom of the first node.
    let memory = source.memory();
    let populated = || memory.populated(memory.layout().range_of(1)).expect("holes can be told");
    let bottom = memory.layout().range_of(1).start;
    wait_until("the firmware has set up its vectors", || populated().contains(bottom));
    let second = memory.populated(memory.layout().range_of(2)).expect("holes can be told");
    assert!(!second.contains(memory.layout().range_of(2).start));
}

#[test]
fn equal_command_lines_have_equal_shapes_running_and_waiting() {
    if skip() {
        return;
    }
    let pci = "-device virtio-rng-pci,id=rng -netdev user,id=n -device virtio-net-pci,netdev=n -vga std -smp 2";
    for (kind, more) in [("pc", pci), ("q35", pci), ("microvm", "-device virtio-rng-device -smp 2")]
    {
        let running = TestQemu::machine(kind, more);
        let waiting = TestQemu::machine(kind, &format!("{more} -incoming defer -S"));
        // Firmware that has run has moved things about: PCI resources, memory types, ACPI tables.
        thread::sleep(Duration::from_millis(700));
        let source = running.source().expect("a running guest can be moved");
        let destination = waiting.destination().expect("a waiting QEMU can take a guest");
        let differences = source.shape().differences(destination.shape());
        assert_eq!(differences, [""; 0], "{kind}");
        assert!(source.shape().properties.len() > 20, "{:?}", source.shape().properties);
    }
}

#[test]
fn differences_are_told_by_name() {
    if skip() {
        return;
    }
    let source = TestQemu::machine("q35", "-device virtio-rng-pci,id=rng -smp 1,maxcpus=2");
    let cases = [
        (
            "pc",
            "-device virtio-rng-pci,id=rng -smp 1,maxcpus=2",
            "machine type: source has pc-q35-",
        ),
        ("q35", "-smp 1,maxcpus=2", "device rng: source has virtio-rng-pci"),
        (
            "q35",
            "-device virtio-rng-pci,id=rng -smp 2,maxcpus=2",
            "vCPUs: source has 1, destination has 2",
        ),
        (
            "q35",
            "-device virtio-rng-pci,id=rng,addr=8 -smp 1,maxcpus=2",
            "destination has virtio-rng-pci parent_bus=/machine/q35/pcie.0 addr=08.0",
        ),
        (
            "q35",
            "-device virtio-rng-pci,id=rng -smp 1,maxcpus=2 -cpu Nehalem",
            "CPU model: source has Westmere, destination has Nehalem",
        ),
        (
            "q35",
            "-device virtio-rng-pci,id=rng -smp 1,maxcpus=2 -vga std",
            "vga.vram: source has nothing, destination has 16384 KiB",
        ),
    ];
    let source = source.source().expect("a running guest can be moved");
    for (kind, line, expected) in cases {
        let waiting = TestQemu::machine(kind, &format!("{line} -incoming defer -S"));
        let destination = waiting.destination().expect("a waiting QEMU can take a guest");
        let differences = source.shape().differences(destination.shape());
        assert!(differences.iter().any(|d| d.contains(expected)), "{expected}: {differences:#?}");
    }
}

#[test]
fn a_qemu_in_the_wrong_state_is_refused() {
    if skip() {
        return;
    }
    let running = TestQemu::machine("q35", "");
    let (message, hint) = refused(running.destination());
    assert!(message.contains("running") && hint.contains("-incoming defer -S"), "{message}");

    let waiting = TestQemu::machine("q35", "-incoming defer -S");
    let (message, _) = refused(waiting.source());
    assert!(message.contains("waits for a guest"), "{message}");

    let eager = TestQemu::machine("q35", "-incoming defer");
    let (message, hint) = refused(eager.destination());
    assert!(message.contains("without -S") && hint.contains("-S"), "{message}");

    let listening = TestQemu::machine("q35", "-incoming unix:incoming -S");
    let (message, _) = refused(listening.destination());
    assert!(message.contains("unix:incoming"), "{message}");
}

#[test]
fn a_device_whose_writes_nobody_sees_is_refused() {
    if skip() {
        return;
    }
    let shared = "-object memory-backend-memfd,id=iv,size=1M,share=on -device ivshmem-plain,id=window,memdev=iv,master=on";
    let qemu = TestQemu::machine("q35", shared);
    let (message, hint) = refused(qemu.source());
    assert!(message.contains("window (ivshmem-plain)"), "{message}");
    assert!(hint.contains("device_del"));
}

#[test]
fn a_back_end_whose_writes_nobody_sees_is_refused_on_both_sides() {
    if skip() {
        return;
    }
    let crypto = "-chardev socket,id=ch,path=crypto,server=on,wait=off \
                  -object cryptodev-vhost-user,id=crypto,chardev=ch";
    let running = TestQemu::machine("q35", crypto);
    let waiting = TestQemu::machine("q35", &format!("{crypto} -incoming defer -S"));
    for outcome in [running.source().map(drop), waiting.destination().map(drop)] {
        let (message, hint) = refused(outcome);
        assert!(message.contains("object crypto (cryptodev-vhost-user)"), "{message}");
        assert!(message.contains("another process") && hint.contains("object-del"), "{hint}");
    }
}

#[test]
fn a_disk_that_is_read_past_the_page_cache_is_told_from_others() {
    if skip() {
        return;
    }
    // Beside this program and not in a directory for temporary files, which may be in memory.
    let program = std::env::current_exe().expect("it runs");
    let directory = program.parent().expect("it is in a directory");
    let file = tempfile::NamedTempFile::new_in(directory).expect("a disk image");
    file.as_file().set_len(1 << 20).expect("room");
    for (cache, direct) in [("off", false), ("on", true)] {
        let disk = format!(
            "-blockdev driver=file,filename={},node-name=file,cache.direct={cache} \
             -blockdev driver=raw,file=file,node-name=disk -device virtio-blk-pci,drive=disk",
            file.path().display()
        );
        let qemu = TestQemu::machine("q35", &disk);
        assert_eq!(
            guards::reads_disks_directly(&mut qemu.qmp(), qemu.child.id()).ok(),
            Some(direct),
            "{cache}"
        );
        qemu.source().expect("either can be moved");
    }
    let diskless = TestQemu::machine("q35", "");
    assert_eq!(
        guards::reads_disks_directly(&mut diskless.qmp(), diskless.child.id()).ok(),
        Some(false)
    );
}

#[test]
fn a_guest_that_another_farfault_has_is_refused_until_that_is_done() {
    if skip() {
        return;
    }
    let qemu = TestQemu::machine("q35", "-qmp unix:second,server=on,wait=off");
    let second = qemu.directory.path().join("second");
    wait_until("the second monitor is there", || second.exists());
    let first = qemu.source().expect("a running guest can be moved");
    let refusal = || {
        let (message, hint) = refused(QemuSource::attach(&second));
        assert_eq!(message, "another farfault moves or measures this guest");
        assert!(hint.contains("farfault status"), "{hint}");
    };
    refusal();
    // Who holds the memory may still read it.
    let memory = first.memory();
    drop(first);
    refusal();
    drop(memory);
    let again = QemuSource::attach(&second).expect("nobody else has it any more");
    let (message, _) = refused(qemu.source());
    assert!(message.contains("another farfault"), "{message}");
    drop(again);
}

#[test]
fn two_regions_in_one_file_do_not_exclude_each_other() {
    if skip() {
        return;
    }
    let ram = ram_name();
    let backend = |id| {
        format!("-object memory-backend-file,id={id},size=32M,mem-path={},share=on", ram.display())
    };
    let line = format!(
        "-S -machine q35 -m 64 {} {} -numa node,memdev=n0 -numa node,memdev=n1",
        backend("n0"),
        backend("n1")
    );
    let mut qemu = TestQemu::start(&words(&line));
    qemu.ram_files.push(ram);
    let source = qemu.source().expect("it has no rival but itself");
    assert_eq!(source.shape().memory.regions().len(), 2);
}

#[test]
fn a_file_system_without_room_for_the_ram_is_refused() {
    if skip() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mounted =
        mount(Some("none"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some("size=16M"));
    if let Err(error) = mounted {
        eprintln!("SKIPPED: cannot mount a small tmpfs: {error}");
        return;
    }
    let mut arguments = machine("q35", &directory.path().join("ram"));
    arguments.extend(words("-incoming defer -S"));
    let qemu = TestQemu::start(&arguments);
    let outcome = qemu.destination();
    drop(qemu);
    umount2(directory.path(), MntFlags::MNT_DETACH).expect("our own mount");
    let (message, hint) = refused(outcome);
    assert!(message.contains("64 MiB, and 16 MiB are free"), "{message}");
    assert!(hint.contains("mount -o remount"), "{hint}");
}
