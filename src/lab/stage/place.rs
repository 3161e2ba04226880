//! The place of one migration: two namespaces, a link, and names for files that no one else uses.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::process::pause;
use super::qemu::Programs;
use super::wan::Wan;
use crate::lab::netns::Netns;
use crate::lab::spec::{LinkSpec, QueueLimit};

/// The source's address on the link.
pub const ADDRESS_A: &str = "10.77.0.1";
/// The destination's address on the link.
pub const ADDRESS_B: &str = "10.77.0.2";

/// All names begin with this, then the pid of the process that made it, then a number.
pub const PREFIX: &str = "farfault-lab-";

/// While another laboratory is in use.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Kernel and initramfs of the test guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// `vmlinuz`
    pub kernel: PathBuf,
    /// `initrd`
    pub initrd: PathBuf,
}

impl Image {
    /// From a directory that `tools/build-guest` has filled.
    pub fn in_directory(directory: &Path) -> Result<Self> {
        let image = Image { kernel: directory.join("vmlinuz"), initrd: directory.join("initrd") };
        for file in [&image.kernel, &image.initrd] {
            ensure!(
                file.exists(),
                "there is no {}: run tools/build-guest in farfault's source tree, which makes \
                 target/guest, and name that directory",
                file.display()
            );
        }
        Ok(image)
    }

    /// The initramfs with these programs in it.
    ///
    /// # Errors
    /// When it was not made.
    pub fn initrd_with(&self, programs: Programs) -> Result<PathBuf> {
        let part = match programs {
            Programs::TestGuest => return Ok(self.initrd.clone()),
            Programs::Redis => "redis",
            Programs::Python => "python",
        };
        let initrd = self.initrd.with_file_name(format!("initrd-{part}"));
        ensure!(
            initrd.exists(),
            "there is no {}: for guests that run {part}, run tools/build-guest-with {part} in farfault's \
             source tree",
            initrd.display()
        );
        Ok(initrd)
    }
}

/// What a laboratory runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    /// The program `farfault`.
    pub farfault: PathBuf,
    /// The program `wan`.
    pub wan: PathBuf,
    /// What QEMU boots.
    pub image: Image,
}

/// Who else may use this machine meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nobody: what happens is timed.
    Alone,
    /// Others that do not mind either: only the outcome counts.
    Shared,
}

/// Two hosts, as far as the network goes, and the link between them.
#[derive(Debug)]
pub struct Place {
    name: String,
    /// The link; to change it, or read its totals.
    pub wan: Wan,
    a: Netns,
    b: Netns,
    directory: tempfile::TempDir,
    tools: Tools,
    _turn: Flock<File>,
}

impl Place {
    /// Sets up a laboratory; waits while the `turn` is not to be had. `seed` decides which packets are lost.
    /// Without a `link` to emulate, nothing shapes what crosses.
    ///
    /// # Errors
    /// Where it cannot work: without root, or where programs are missing.
    pub fn open(
        link: Option<LinkSpec>,
        queue: QueueLimit,
        seed: u64,
        tools: Tools,
        turn: Turn,
    ) -> Result<Self> {
        Self::requirements()?;
        let turn = take(turn)?;
        remove_remains_of_dead_labs();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let a = Netns::create(&format!("{name}-a"))?;
        let b = Netns::create(&format!("{name}-b"))?;
        let wan = match link {
            Some(link) => Wan::start(&tools.wan, [a.name(), b.name()], link, queue, seed)?,
            None => Wan::plain(&a, &b)?,
        };
        let directory = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir()?;
        let place = Place { name, wan, a, b, directory, tools, _turn: turn };
        for directory in [place.state_directory(), place.temporary_directory()] {
            std::fs::create_dir(directory)?;
        }
        Ok(place)
    }

    /// Whether a laboratory can be set up here; the error says what is missing.
    pub fn requirements() -> Result<()> {
        ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root");
        for program in ["qemu-system-x86_64", "ip", "setpriv"] {
            let paths = std::env::var_os("PATH").unwrap_or_default();
            let found = std::env::split_paths(&paths).any(|dir| dir.join(program).exists());
            ensure!(
                found,
                "{program} is not installed; Debian's packages are qemu-system-x86, iproute2 and \
                 util-linux"
            );
        }
        ensure!(Path::new("/dev/net/tun").exists(), "/dev/net/tun is missing: modprobe tun");
        Ok(())
    }

    /// What it runs.
    pub fn tools(&self) -> &Tools {
        &self.tools
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

fn take(turn: Turn) -> Result<Flock<File>> {
    let how = match turn {
        Turn::Alone => FlockArg::LockExclusiveNonblock,
        Turn::Shared => FlockArg::LockSharedNonblock,
    };
    let path = std::env::temp_dir().join("farfault-lab.lock");
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    loop {
        file = match Flock::lock(file, how) {
            Ok(turn) => return Ok(turn),
            Err((file, Errno::EWOULDBLOCK)) => file,
            Err((_, errno)) => bail!("lock {}: {errno}", path.display()),
        };
        pause(ASK_AGAIN)?;
    }
}

/// A laboratory whose process was killed has left its namespaces and files.
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
            eprintln!("removing what a killed laboratory has left: {}", entry.path().display());
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
