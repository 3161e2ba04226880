//! The QEMU that the guest leaves.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use qapi::qmp::{migrate_cancel, quit, stop};

use super::commands::{QueryMigrate, QueryStatus};
use super::qmp::{Qmp, QmpError};
use super::settings::{self, SavedSettings};
use super::{device_state, discover, failure, guards, process, rescue, shape, uffd, whereabouts};
use crate::guest::{GuestError, Shape, SourceGuest, Whereabouts};
use crate::memory::adopt::Adopted;
use crate::memory::{Access, DirtyTracker, GuestMemory, TrackerKind, open_tracker};

/// How long a migration that is being cancelled may take to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a guest that is to run on is waited for. Until its QEMU answers nobody knows whether it has taken
/// the order to stop, and nobody else will let it run.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

/// How long QEMU may take to end after `quit`: it flushes disk images.
const QUIT_TIMEOUT: Duration = Duration::from_secs(30);

/// A running QEMU whose guest is to be moved away.
///
/// All changes that it makes to QEMU are undone when it is done: migration settings stay changed only
/// while the guest is paused (or else a later migration by others would leave its RAM out), and the
/// tracker takes its write protection away.
pub struct QemuSource {
    qmp: Qmp,
    process: Adopted,
    vcpu_threads: Vec<u32>,
    addresses: Vec<u64>,
    memory: Arc<GuestMemory>,
    shape: Shape,
    /// False for a guest that its owner had paused: it is left so at the destination.
    was_running: bool,
    /// From the order to stop a running guest until it runs again.
    is_stopped_by_us: bool,
    whereabouts: Whereabouts,
    /// While the guest is paused for us.
    changed_settings: Option<SavedSettings>,
}

impl QemuSource {
    /// Adopts the QEMU behind the QMP socket at `path`. Changes nothing in it.
    ///
    /// # Errors
    /// When the socket is not that of a QEMU, when its guest cannot be moved (private RAM, a device that
    /// writes to RAM unseen, a state with nothing to move), or without the privilege to look into the
    /// process; and while another farfault moves or measures the guest. Each says what to do.
    pub fn attach(path: &Path) -> Result<Self, GuestError> {
        let mut qmp = Qmp::connect(path)?;
        let was_running = guards::check_source_state(&mut qmp)?;
        settings::check(&mut qmp)?;
        let devices = guards::devices(&mut qmp)?;
        guards::check_devices(&mut qmp, &devices)?;
        let found = process::find(&mut qmp)?;
        let process = Adopted::attach(found.pid)?;
        let ram = discover::ram(&mut qmp, &process, Access::ReadOnly)?;
        let shape = shape::of(&mut qmp, ram.layout, &ram.private_blocks, &devices)?;
        let mut memory = GuestMemory::map(ram.backings, Access::ReadOnly)?;
        memory.claim()?;
        let memory = Arc::new(memory);
        let addresses = ram.addresses;
        let vcpu_threads = found.vcpu_threads;
        let place = whereabouts(&mut qmp, path, &process, &memory, &addresses);
        let whereabouts = Whereabouts { runs: was_running, ..place };
        Ok(QemuSource {
            qmp,
            process,
            vcpu_threads,
            addresses,
            memory,
            shape,
            was_running,
            is_stopped_by_us: false,
            whereabouts,
            changed_settings: None,
        })
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn status(&mut self) -> Result<String, QmpError> {
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

    /// Asks a QEMU that does not answer again, until it does.
    fn await_answer(&mut self) -> Result<(), GuestError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            match self.status() {
                Err(error @ QmpError::Timeout { .. }) if Instant::now() < deadline => {
                    tracing::warn!("the guest is to run on, and waits for its QEMU: {error}");
                }
                answer => return Ok(answer.map(drop)?),
            }
        }
    }

    /// See [`Qmp::set_patience`].
    #[cfg(test)]
    pub(super) fn set_patience(&mut self, patience: Duration) {
        self.qmp.set_patience(patience);
    }

    fn cancel_migration(&mut self) -> Result<(), GuestError> {
        let deadline = Instant::now() + CANCEL_TIMEOUT;
        while self.qmp.execute(&QueryMigrate {})?.is_active() {
            if Instant::now() >= deadline {
                return Err(failure("QEMU's own migration cannot be cancelled"));
            }
            self.qmp.execute(&migrate_cancel {})?;
            thread::sleep(Duration::from_millis(5));
        }
        device_state::settle(&mut self.qmp).map(drop)
    }
}

impl SourceGuest for QemuSource {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn whereabouts(&self) -> Whereabouts {
        self.whereabouts.clone()
    }

    fn runs(&self) -> bool {
        self.was_running
    }

    fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        let Self { qmp, process, vcpu_threads, addresses, memory, .. } = self;
        let tracker =
            open_tracker(kind, Arc::clone(memory), process.pid(), addresses, |features| {
                uffd::create(qmp, process, vcpu_threads, features)
            })?;
        Ok(tracker)
    }

    fn writes_past_page_tables(&mut self) -> Result<bool, GuestError> {
        let pid = self.pid();
        Ok(guards::reads_disks_directly(&mut self.qmp, pid)?)
    }

    fn is_running(&mut self) -> Result<bool, GuestError> {
        Ok(self.status()? == "running")
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        // Before the stop and not between it and the save, where each millisecond is downtime.
        self.change_settings()?;
        // Its owner may have stopped it, or let it run, since it was attached to, or it has gone to sleep: QEMU would
        // forget that it sleeps.
        self.is_stopped_by_us |= guards::check_run_state(&self.status()?)?;
        // QEMU replies when all vCPUs stand still and all disk requests have ended.
        self.qmp.execute(&stop {})?;
        Ok(())
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        self.change_settings()?;
        device_state::save(&mut self.qmp)
    }

    /// A guest that its owner has paused stays paused.
    fn resume(&mut self) -> Result<(), GuestError> {
        self.await_answer()?;
        self.cancel_migration()?;
        if self.is_stopped_by_us && self.status()? != "running" {
            device_state::cont_again(&mut self.qmp)?;
        }
        self.is_stopped_by_us = false;
        self.restore_settings();
        Ok(())
    }

    fn keep_still(&mut self) -> Result<bool, GuestError> {
        rescue::keep_still(&mut self.qmp)
    }

    fn release(&mut self, end: bool) -> Result<(), GuestError> {
        if !end {
            self.restore_settings();
            return Ok(());
        }
        self.changed_settings = None;
        match self.qmp.execute(&quit {}) {
            Ok(_) => {}
            Err(QmpError::Closed { .. }) => return Ok(()),
            Err(other) => return Err(other.into()),
        }
        if self.qmp.wait_closed(QUIT_TIMEOUT)? {
            return Ok(());
        }
        Err(failure(format!(
            "QEMU (process {}) has not ended within {} s of `quit`",
            self.pid(),
            QUIT_TIMEOUT.as_secs()
        )))
    }
}

impl Drop for QemuSource {
    fn drop(&mut self) {
        self.restore_settings();
    }
}
