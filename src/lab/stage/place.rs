//! The place of one migration: two namespaces, a link, and names for files that no one else uses.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::process::pause;
use super::qemu::Programs;
use super::wan::Wan;
use crate::lab::netns::Netns;
use crate::lab::spec::{LinkSpec, QueueLimit};
use crate::session::journal::{Side, pages_path, remove_state};
use crate::transport::Ticket;

/// The source's address on the link.
pub const ADDRESS_A: &str = "10.77.0.1";
/// The destination's address on the link.
pub const ADDRESS_B: &str = "10.77.0.2";

/// All names begin with this, then the pid of the process that made it, then a number.
pub const PREFIX: &str = "farfault-lab-";

/// Where namespaces have their names, and guests their memory.
const NAMESPACES: &str = "/run/netns";
const SHARED_MEMORY: &str = "/dev/shm";
/// In a laboratory's directory, for farfault's journals.
const STATE: &str = "state";

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
    page_tables: PageTables,
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
        let page_tables = PageTables::default();
        let place = Place { name, wan, a, b, directory, page_tables, tools, _turn: turn };
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
        self.path(STATE)
    }

    /// What its receivers have in shared memory beside the guests' memory.
    pub fn page_tables(&self) -> &PageTables {
        &self.page_tables
    }

    /// Where farfault makes temporary files.
    pub fn temporary_directory(&self) -> PathBuf {
        self.path("tmp")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A QEMU that a receiver has started does not end with it.
        for netns in [&self.a, &self.b] {
            if let Err(error) = netns.end_all() {
                eprintln!("{error:#}");
            }
        }
        self.page_tables.remove();
    }
}

/// Page tables of the receivers of a laboratory. They are in shared memory under the names of their migrations, which
/// do not tell whose they are, and stay when a receiver is killed.
#[derive(Clone, Debug, Default)]
pub struct PageTables(Arc<Mutex<BTreeSet<PathBuf>>>);

impl PageTables {
    /// Notes where the receiver that gives this ticket will have its own.
    pub(super) fn note(&self, ticket: &str) {
        let Ok(ticket) = ticket.parse::<Ticket>() else { return };
        let side = format!("{}.{}", ticket.migration, Side::Destination);
        self.lock().insert(pages_path(Path::new(&side)));
    }

    /// Those that are there.
    pub fn found(&self) -> Vec<PathBuf> {
        self.lock().iter().filter(|path| path.exists()).cloned().collect()
    }

    fn remove(&self) {
        for path in self.found() {
            let _ = std::fs::remove_file(path);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<PathBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

/// What a laboratory whose process was killed has left.
#[derive(Clone, Copy, Debug)]
enum Remains {
    Namespace,
    GuestMemory,
    Directory,
}

impl Remains {
    /// Whether names of this kind have such an end behind `farfault-lab-PID-N-`.
    fn end_so(self, end: &str) -> bool {
        match self {
            Remains::Namespace => end == "a" || end == "b",
            Remains::GuestMemory => {
                end.rsplit_once("-ram").is_some_and(|(_, node)| number(node).is_some())
            }
            // As the crate tempfile makes names.
            Remains::Directory => end.len() == 6 && end.bytes().all(|b| b.is_ascii_alphanumeric()),
        }
    }

    /// The process that has made what has this name, if a laboratory has: other things may be called `farfault-lab-`
    /// too, results of an experiment for instance.
    fn maker(self, name: &str) -> Option<u32> {
        let (pid, rest) = name.strip_prefix(PREFIX)?.split_once('-')?;
        let (count, end) = rest.split_once('-')?;
        number(count)?;
        number(pid).filter(|_| self.end_so(end))
    }

    fn remove(self, path: &Path, name: &str) {
        match self {
            Remains::Namespace => {
                // A QEMU that a receiver has started, and whoever held the laboratory did not live to end.
                if let Err(error) = Netns::existing(name).and_then(|netns| netns.end_all()) {
                    eprintln!("{error:#}");
                }
                let _ = Command::new("ip").args(["netns", "del", name]).status();
            }
            Remains::GuestMemory => drop(std::fs::remove_file(path)),
            // Others may write where this is: what a link leads to is not the laboratory's.
            Remains::Directory if is_own_directory(path) => {
                let state = path.join(STATE);
                if is_own_directory(&state) {
                    remove_state(&state);
                }
                let _ = std::fs::remove_dir_all(path);
            }
            Remains::Directory => {}
        }
    }

    fn remove_all_in(self, directory: &Path) {
        let Ok(entries) = std::fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(pid) = self.maker(&name) else { continue };
            if !Path::new("/proc").join(pid.to_string()).exists() {
                eprintln!("removing what a killed laboratory has left: {}", entry.path().display());
                self.remove(&entry.path(), &name);
            }
        }
    }
}

/// A directory of this user, and no link to one.
fn is_own_directory(path: &Path) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    std::fs::symlink_metadata(path).is_ok_and(|about| about.is_dir() && about.uid() == own)
}

fn remove_remains_of_dead_labs() {
    // Processes first, which may use the others.
    Remains::Namespace.remove_all_in(Path::new(NAMESPACES));
    Remains::GuestMemory.remove_all_in(Path::new(SHARED_MEMORY));
    Remains::Directory.remove_all_in(&std::env::temp_dir());
}

/// In digits alone.
fn number(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::super::process::wait_for;
    use super::*;
    use crate::transport::{Listener, TransportOptions};

    #[test]
    fn names_of_a_laboratory_are_told_from_those_that_others_give() {
        for (kind, name) in [
            (Remains::Namespace, "farfault-lab-17-0-a"),
            (Remains::GuestMemory, "farfault-lab-17-12-destination-ram1"),
            (Remains::Directory, "farfault-lab-17-3-x1Y2z3"),
        ] {
            assert_eq!(kind.maker(name), Some(17), "{name}");
        }
        for name in [
            "farfault-lab-results",
            "farfault-lab-wan-2",
            "farfault-lab-2026-11-27",
            "farfault-lab-17",
            "farfault-lab-17-0",
            "farfault-lab-17-0-",
            "farfault-lab-17-0-results",
            "farfault-lab-17-wan-x1Y2z3",
            "farfault-lab-+7-0-x1Y2z3",
            "farfault-lab--0-x1Y2z3",
            "farfault-lab-99999999999-0-x1Y2z3",
            "farfault-lab.lock",
            "other-17-0-x1Y2z3",
        ] {
            for kind in [Remains::Namespace, Remains::GuestMemory, Remains::Directory] {
                assert_eq!(kind.maker(name), None, "{kind:?} {name}");
            }
        }
    }

    #[test]
    fn what_a_dead_laboratory_has_left_is_removed_with_its_page_tables_and_nothing_else() {
        let mut process = Command::new("true").spawn().unwrap();
        process.wait().unwrap();
        let (dead, alive) = (process.id(), std::process::id());
        let parent = tempfile::tempdir().unwrap();
        let side =
            parent.path().join(format!("{PREFIX}{dead}-0-abcdef/{STATE}/{alive}.destination"));
        std::fs::create_dir_all(&side).unwrap();
        std::fs::write(pages_path(&side), b"table").unwrap();
        // A link to where others keep their journals leads to nothing that is removed.
        let others = tempfile::tempdir().unwrap();
        let theirs = others.path().join(format!("{alive}-others.destination"));
        std::fs::create_dir(&theirs).unwrap();
        std::fs::write(pages_path(&theirs), b"table").unwrap();
        let lure = parent.path().join(format!("{PREFIX}{dead}-1-abcdef"));
        std::fs::create_dir(&lure).unwrap();
        std::os::unix::fs::symlink(others.path(), lure.join(STATE)).unwrap();
        let kept = [format!("{PREFIX}{alive}-0-abcdef"), format!("{PREFIX}results")];
        for name in &kept {
            std::fs::create_dir(parent.path().join(name)).unwrap();
        }
        let ram = parent.path().join(format!("{PREFIX}{dead}-0-source-ram0"));
        std::fs::write(&ram, b"memory").unwrap();
        Remains::Directory.remove_all_in(parent.path());
        assert!(!pages_path(&side).exists() && ram.exists());
        assert!(theirs.exists() && pages_path(&theirs).exists() && !lure.exists());
        std::fs::remove_file(pages_path(&theirs)).unwrap();
        Remains::GuestMemory.remove_all_in(parent.path());
        let left = std::fs::read_dir(parent.path()).unwrap().flatten();
        let mut left: Vec<String> =
            left.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        left.sort();
        assert_eq!(left, kept);
    }

    #[test]
    fn the_namespace_of_a_dead_laboratory_goes_with_the_processes_in_it() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("*** SKIPPED: not root ***");
            return;
        }
        let name = format!("farfault-test-{}-dead", std::process::id());
        assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
        let mut command = Command::new("ip");
        let mut qemu = command.args(["netns", "exec", &name, "sleep", "60"]).spawn().unwrap();
        let netns = Netns::existing(&name).unwrap();
        wait_for("a process in it", Duration::from_secs(10), || {
            Ok(netns.pids()?.contains(&qemu.id()).then_some(()))
        })
        .unwrap();
        Remains::Namespace.remove(&netns.path(), &name);
        assert!(!netns.path().exists());
        assert!(!qemu.wait().unwrap().success());
    }

    #[test]
    fn page_tables_are_found_by_the_tickets_of_their_receivers() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ticket = runtime.block_on(async {
            let address = (Ipv4Addr::LOCALHOST, 0).into();
            Listener::bind(address, Vec::new(), &TransportOptions::default()).unwrap().1
        });
        let tables = PageTables::default();
        tables.note("no ticket");
        tables.note(&ticket.to_string());
        assert!(tables.found().is_empty());
        let path =
            PathBuf::from(format!("/dev/shm/farfault-{}.destination.pages", ticket.migration));
        std::fs::write(&path, b"table").unwrap();
        assert_eq!(tables.found(), [path]);
        tables.remove();
        assert!(tables.found().is_empty());
    }
}
