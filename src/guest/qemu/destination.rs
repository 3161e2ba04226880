//! The QEMU that waits for the guest.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;
use qapi::qmp::quit;

use super::announce::announcement;
use super::commands::QueryStatus;
use super::qmp::Qmp;
use super::settings::{self, SavedSettings};
use super::spawn::{SpawnOptions, Spawned, spawn};
use super::{device_state, discover, failure, guards, process, refusal, shape, uffd, whereabouts};
use crate::guest::{DestinationGuest, GuestError, Shape, Whereabouts};
use crate::memory::adopt::{Adopted, HugePages};
use crate::memory::{Access, FAULT_FEATURES, GuestMemory, RegionBacking, Userfault};
use crate::page::PageRange;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// In `-incoming defer`.
    Waiting,
    /// Loading, or it failed: its main thread may wait for a page.
    Loading,
    /// The guest is there, stopped.
    Loaded,
    /// The guest runs.
    Running,
}

/// A QEMU that waits with `-incoming defer -S`, started by us or by somebody else.
pub struct QemuDestination {
    qmp: Qmp,
    process: Adopted,
    vcpu_threads: Vec<u32>,
    addresses: Vec<u64>,
    memory: Arc<GuestMemory>,
    shape: Shape,
    whereabouts: Whereabouts,
    /// Only when we started it.
    child: Option<Spawned>,
    stage: Stage,
    /// From the registration of the RAM until the guest runs, or is let go of.
    changed_settings: Option<SavedSettings>,
}

impl QemuDestination {
    /// Adopts the QEMU that waits behind the QMP socket at `path`.
    ///
    /// # Errors
    /// When the socket is not that of a QEMU, when QEMU does not wait with `-incoming defer -S`, when its
    /// RAM is not such as a guest can be moved into, or without the privilege to look into the process;
    /// each says what to do.
    pub fn attach(path: &Path) -> Result<Self, GuestError> {
        Self::adopt(Qmp::connect(path)?, path, None)
    }

    /// Starts a QEMU to move a guest into. Until [`DestinationGuest::release`] it is ended together
    /// with this value.
    ///
    /// # Errors
    /// When the command cannot be that of a destination, when QEMU ends (with what it said), and as for
    /// [`Self::attach`].
    pub fn spawn(options: &SpawnOptions) -> Result<Self, GuestError> {
        let (child, qmp) = spawn(options)?;
        let path = child.qmp_path().unwrap_or_default();
        Self::adopt(qmp, &path, Some(child))
    }

    fn adopt(mut qmp: Qmp, path: &Path, child: Option<Spawned>) -> Result<Self, GuestError> {
        let found = process::find(&mut qmp)?;
        if let Some(child) = child.as_ref().filter(|child| child.pid() != found.pid) {
            // It would outlive the one that is ended when the guest does not come.
            let _ = qmp.execute(&quit {});
            return Err(failure(format!(
                "the command that was started is process {}, QEMU is process {}: give the command of QEMU itself, or \
                 one that becomes it by exec",
                child.pid(),
                found.pid
            )));
        }
        guards::check_destination_state(&mut qmp, &process::command_line(found.pid))?;
        settings::check(&mut qmp)?;
        let devices = guards::devices(&mut qmp)?;
        guards::check_devices(&mut qmp, &devices)?;
        let process = Adopted::attach(found.pid)?;
        let ram = discover::ram(&mut qmp, &process, Access::ReadWrite)?;
        check_room(&ram.backings)?;
        let shape = shape::of(&mut qmp, ram.layout, &ram.private_blocks, &devices)?;
        let mut memory = GuestMemory::map(ram.backings, Access::ReadWrite)?;
        memory.claim()?;
        let memory = Arc::new(memory);
        memory.reserve_huge_pages()?;
        let addresses = ram.addresses;
        let vcpu_threads = found.vcpu_threads;
        let place = whereabouts(&mut qmp, path, &process, &memory, &addresses);
        let whereabouts = Whereabouts {
            started_here: child.is_some(),
            ram_files: child.as_ref().map_or_else(Vec::new, |child| child.new_ram_files().to_vec()),
            ..place
        };
        Ok(QemuDestination {
            qmp,
            process,
            vcpu_threads,
            addresses,
            memory,
            shape,
            whereabouts,
            child,
            stage: Stage::Waiting,
            changed_settings: None,
        })
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The QMP socket of a QEMU that we started, until it is released.
    pub fn qmp_path(&self) -> Option<PathBuf> {
        self.child.as_ref()?.qmp_path()
    }
}

impl DestinationGuest for QemuDestination {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    fn whereabouts(&self) -> Whereabouts {
        self.whereabouts.clone()
    }

    fn userfault(&mut self) -> Result<Userfault, GuestError> {
        let uffd = uffd::create(&mut self.qmp, &self.process, &self.vcpu_threads, FAULT_FEATURES)?;
        let userfault = Userfault::register(uffd, &self.memory.units(), &self.addresses)?;
        // Only now: what QEMU touches from here on faults, so that nothing appears again unseen.
        let all = PageRange::new(0, self.memory.pages());
        self.memory.punch_hole(all)?;
        let left = self.memory.populated(all)?.len() + self.memory.pages_in_huge_files()?;
        if left > 0 {
            return Err(refusal(
                format!("{left} pages of guest RAM do not go away: something else holds them"),
                "no other process may use the RAM files of the destination QEMU",
            ));
        }
        // Here and not before the load, where each millisecond is downtime.
        self.change_settings()?;
        Ok(userfault)
    }

    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.change_settings()?;
        self.stage = Stage::Loading;
        device_state::load(&mut self.qmp, state).map_err(|error| self.with_obituary(error))?;
        match self.status()?.as_str() {
            "paused" | "prelaunch" => {
                self.stage = Stage::Loaded;
                Ok(())
            }
            other => {
                Err(failure(format!("after the load QEMU is in the state {other}, not paused")))
            }
        }
    }

    /// Returns as soon as the guest runs. What QEMU is told besides, to announce the guest to its network
    /// and to put its migration settings back, it does when its main thread comes to it.
    fn run(&mut self) -> Result<(), GuestError> {
        // To a QEMU that still waits, `cont` means: run as soon as something is loaded.
        if self.stage != Stage::Loaded {
            return Err(failure("the guest cannot run before its device state is loaded"));
        }
        // Before, since nobody knows at once what has come of a `cont` that fails.
        if let Some(child) = &mut self.child {
            child.runs();
        }
        device_state::cont(&mut self.qmp)?;
        self.stage = Stage::Running;
        let announced = self.qmp.tell(&announcement());
        let restored = match self.changed_settings.take() {
            Some(saved) => saved.restore_unwatched(&mut self.qmp),
            None => Ok(()),
        };
        if let Err(error) = announced.and(restored) {
            tracing::warn!("the guest runs, but QEMU does not listen any more: {error}");
        }
        Ok(())
    }

    /// QEMU carries out one command after the other: when it answers, the `cont` before has come to its end. One that
    /// others have started is not ended by us: it could be told to run at any time, and may hold disk images.
    fn stands_still(&mut self) -> bool {
        let stands = |status: String| ["paused", "prelaunch"].contains(&status.as_str());
        self.child.is_some() && self.status().is_ok_and(stands)
    }

    fn release(&mut self) -> Result<(), GuestError> {
        if let Some(child) = &mut self.child {
            child.let_go();
        }
        // Waits for what it was told at the start of the guest, before we hang up.
        self.status()?;
        self.restore_settings();
        Ok(())
    }

    fn gather_huge_pages(&mut self) -> Result<Option<HugePages>, GuestError> {
        let sizes = self.memory.layout().regions().iter().map(|region| region.size_bytes);
        let regions: Vec<(u64, u64)> = self.addresses.iter().copied().zip(sizes).collect();
        Ok(Some(self.process.gather_huge_pages(&regions)?))
    }

    /// A QEMU that we started keeps its private QMP socket.
    fn leave(&mut self) -> Result<(), GuestError> {
        if let Some(child) = &mut self.child {
            child.leave();
        }
        Ok(())
    }

    /// A QEMU that somebody else started goes on waiting. Its RAM stays registered until the
    /// [`Userfault`] is released.
    fn discard(&mut self) -> Result<(), GuestError> {
        if let Some(child) = &mut self.child {
            return child.end();
        }
        if self.stage == Stage::Waiting {
            self.restore_settings();
        }
        Ok(())
    }
}

impl QemuDestination {
    fn status(&mut self) -> Result<String, GuestError> {
        Ok(self.qmp.execute(&QueryStatus {})?.status)
    }

    fn change_settings(&mut self) -> Result<(), GuestError> {
        if self.changed_settings.is_none() {
            self.changed_settings = Some(settings::apply(&mut self.qmp)?);
        }
        Ok(())
    }

    fn restore_settings(&mut self) {
        if let Some(saved) = self.changed_settings.take() {
            saved.restore(&mut self.qmp);
        }
    }

    /// Adds what a QEMU of ours said at its end.
    fn with_obituary(&mut self, mut error: GuestError) -> GuestError {
        if let Some(words) = self.child.as_mut().and_then(Spawned::obituary) {
            error.message = format!("{} ({words})", error.message);
        }
        error
    }
}

/// RAM that does not fit would end the guest later, when it touches a page for which there is no room.
fn check_room(backings: &[RegionBacking]) -> Result<(), GuestError> {
    // Per file system: its free space, and what the regions on it may still take.
    let mut file_systems: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for backing in backings {
        let unknown = |e: std::io::Error| {
            failure(format!("cannot tell the room for guest RAM {}: {e}", backing.layout.name))
        };
        // The pool of huge pages is asked later: it reserves them, or it does not.
        let system = fstatfs(&backing.file).map_err(|e| unknown(e.into()))?;
        if system.filesystem_type() == HUGETLBFS_MAGIC {
            continue;
        }
        let room = fstatvfs(&backing.file).map_err(|e| unknown(e.into()))?;
        // A file system without a limit of its own, such as that of memfds.
        if room.blocks() == 0 {
            continue;
        }
        let file = backing.file.metadata().map_err(unknown)?;
        let free = room.blocks_available() * room.fragment_size();
        let (_, missing) = file_systems.entry(file.dev()).or_insert((free, 0));
        *missing += backing.layout.size_bytes.saturating_sub(file.blocks() * 512);
    }
    match file_systems.values().find(|(free, missing)| missing > free) {
        None => Ok(()),
        Some((free, missing)) => Err(refusal(
            format!(
                "the guest's RAM does not fit the file system of its files: it may take {} MiB, and \
                 {} MiB are free",
                missing >> 20,
                free >> 20
            ),
            "free space there, or enlarge it: mount -o remount,size=SIZE /dev/shm",
        )),
    }
}
