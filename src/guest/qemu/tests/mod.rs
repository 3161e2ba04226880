//! Tests against a real QEMU. Its firmware alone is guest enough for them: no disk, no kernel.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::qmp::{Qmp, QmpError};
use super::{QemuDestination, QemuSource, SpawnOptions};
use crate::guest::GuestError;

mod attach;
mod faults;
mod handover;

const QEMU: &str = "qemu-system-x86_64";

/// A QEMU that ends with the test, and its RAM files with it.
struct TestQemu {
    child: Child,
    directory: TempDir,
    ram_files: Vec<PathBuf>,
}

/// True, loudly, where there is no QEMU to test with.
fn skip() -> bool {
    let missing = Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_err();
    if missing {
        eprintln!("SKIPPED: there is no {QEMU} on this host");
    }
    missing
}

fn ram_name() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    PathBuf::from(format!("/dev/shm/farfault-test-qemu-{}-{number}", std::process::id()))
}

/// The arguments for a machine whose RAM of 64 MiB is shared memory.
fn machine(machine: &str, ram: &Path) -> Vec<String> {
    let mut arguments = vec!["-machine".to_owned(), format!("{machine},memory-backend=ram0")];
    arguments.extend(words("-m 64 -object"));
    arguments
        .push(format!("memory-backend-file,id=ram0,size=64M,mem-path={},share=on", ram.display()));
    arguments
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

const COMMON: &str = "-accel tcg -cpu Westmere -nodefaults -display none";

impl TestQemu {
    /// Starts QEMU with a QMP socket and waits until that is there.
    fn start(arguments: &[String]) -> Self {
        let directory = tempfile::tempdir().expect("a directory for the test's sockets");
        let qmp = directory.path().join("qmp");
        let child = Command::new(QEMU)
            .args(words(COMMON))
            .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(arguments)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        let mut qemu = TestQemu { child, directory, ram_files: Vec::new() };
        wait_until("QEMU opens its socket", || {
            assert!(qemu.child.try_wait().expect("a child").is_none(), "QEMU ended at its start");
            qmp.exists()
        });
        qemu
    }

    /// A machine with one RAM file.
    fn machine(kind: &str, more: &str) -> Self {
        let ram = ram_name();
        let mut arguments = machine(kind, &ram);
        arguments.extend(words(more));
        let mut qemu = Self::start(&arguments);
        qemu.ram_files.push(ram);
        qemu
    }

    fn qmp_path(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.qmp_path()).expect("QEMU greets us")
    }

    fn source(&self) -> Result<QemuSource, GuestError> {
        QemuSource::attach(&self.qmp_path())
    }

    fn destination(&self) -> Result<QemuDestination, GuestError> {
        QemuDestination::attach(&self.qmp_path())
    }
}

impl Drop for TestQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for file in &self.ram_files {
            let _ = std::fs::remove_file(file);
        }
    }
}

fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !happened() {
        assert!(Instant::now() < deadline, "waited 20 s until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The error of something that must fail, which all have a message and advice.
fn refused<T>(result: Result<T, GuestError>) -> (String, String) {
    match result {
        Ok(_) => panic!("accepted what must be refused"),
        Err(error) => {
            let hint = error.hint.unwrap_or_else(|| panic!("no advice with: {}", error.message));
            (error.message, hint)
        }
    }
}
