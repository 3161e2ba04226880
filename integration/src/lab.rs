//! The place of one test: two namespaces, a link, and names for files that no one else uses.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use anyhow::{Context, Result, bail, ensure};
use farfault_wan::netns::Netns;
use farfault_wan::spec::{LinkSpec, QueueLimit};
use nix::fcntl::{Flock, FlockArg};

use crate::process::workspace;
use crate::wan::Wan;

/// The source's address on the link.
pub const ADDRESS_A: &str = "10.77.0.1";
/// The destination's address on the link.
pub const ADDRESS_B: &str = "10.77.0.2";

/// All names begin with this, then the pid of the test, then a number.
pub const PREFIX: &str = "farfault-lab-";

/// Two hosts, as far as the network goes, and the link between them.
#[derive(Debug)]
pub struct Lab {
    name: String,
    /// The link; to change it, or read its totals.
    pub wan: Wan,
    a: Netns,
    b: Netns,
    directory: tempfile::TempDir,
    /// Guests and links are timed: one laboratory at a time on a machine.
    _turn: Flock<File>,
}

impl Lab {
    /// Sets up a laboratory with a queue of one bandwidth-delay product; waits while another one
    /// is in use. `None`, with a loud word, where it cannot work: without root, or where programs
    /// are missing. With `FARFAULT_REQUIRE_LAB=1` that is an error.
    pub fn start(link: &str) -> Result<Option<Self>> {
        Self::with_queue(link, QueueLimit::Bdp(1))
    }

    /// With another queue.
    pub fn with_queue(link: &str, queue: QueueLimit) -> Result<Option<Self>> {
        if let Err(error) = requirements() {
            if std::env::var_os("FARFAULT_REQUIRE_LAB").is_some_and(|v| v == "1") {
                return Err(error);
            }
            eprintln!("\n*** SKIPPED, nothing was tested: {error:#} ***\n");
            return Ok(None);
        }
        let link: LinkSpec = link.parse()?;
        let turn = take_turn()?;
        remove_remains_of_dead_labs();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let a = Netns::create(&format!("{name}-a"))?;
        let b = Netns::create(&format!("{name}-b"))?;
        let wan = Wan::start(a.name(), b.name(), link, queue)?;
        let directory = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir()?;
        let lab = Lab { name, wan, a, b, directory, _turn: turn };
        for directory in [lab.state_directory(), lab.temporary_directory()] {
            std::fs::create_dir(directory)?;
        }
        Ok(Some(lab))
    }

    /// Names of files and processes of this laboratory contain it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The source's namespace.
    pub fn a(&self) -> &Netns {
        &self.a
    }

    /// The destination's namespace.
    pub fn b(&self) -> &Netns {
        &self.b
    }

    /// For sockets, logs and disks.
    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    /// Where farfault keeps its journals.
    pub fn state_directory(&self) -> PathBuf {
        self.path("state")
    }

    /// Where farfault makes temporary files.
    pub fn temporary_directory(&self) -> PathBuf {
        self.path("tmp")
    }
}

fn requirements() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root");
    let programs = ["qemu-system-x86_64", "ip", "setpriv", "cpio", "modprobe"];
    for program in programs {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&paths).any(|dir| dir.join(program).exists());
        ensure!(found, "{program} is not installed; ./tools/test installs what it needs");
    }
    ensure!(Path::new("/dev/net/tun").exists(), "/dev/net/tun is missing: modprobe tun");
    Ok(())
}

fn take_turn() -> Result<Flock<File>> {
    let path = std::env::temp_dir().join("farfault-lab.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| anyhow::anyhow!("lock {}: {errno}", path.display()))
}

/// A laboratory whose process was killed has left its namespaces and files. Others wait for their
/// turn meanwhile, so what is there is dead if its process is.
fn remove_remains_of_dead_labs() {
    let is_dead = |name: &str| {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    };
    for directory in [Path::new("/run/netns"), Path::new("/dev/shm"), &std::env::temp_dir()] {
        let Ok(entries) = std::fs::read_dir(directory) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !is_dead(&name) {
                continue;
            }
            eprintln!("removing what a killed test has left: {}", entry.path().display());
            if directory.ends_with("netns") {
                let _ = Command::new("ip").args(["netns", "del", &name]).status();
            } else if entry.path().is_dir() {
                let _ = std::fs::remove_dir_all(entry.path());
            } else {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// The guest's kernel and initramfs; built when they are not up to date.
pub fn guest_image() -> Result<(PathBuf, PathBuf)> {
    let script = workspace().join("tools/build-guest");
    let status = Command::new(&script).status().context("run tools/build-guest")?;
    if !status.success() {
        bail!("{} has failed", script.display());
    }
    let directory = workspace().join("target/guest");
    Ok((directory.join("vmlinuz"), directory.join("initrd")))
}
