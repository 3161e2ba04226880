//! A QEMU that a killed farfault was moving, taken over by another one.
//!
//! Nothing here asks QEMU's monitor before it must: the main thread, which answers it, may be waiting for a page
//! that only we can bring. What is needed before was written down by the predecessor.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::rescue::Standing;
use super::{discover, failure, refusal, rescue};
use crate::guest::{DestinationGuest, GuestError, Shape, SourceGuest, Whereabouts};
use crate::memory::adopt::{Adopted, ProcessIdentity};
use crate::memory::{
    Access, DirtyTracker, FAULT_FEATURES, GuestMemory, MemoryLayout, RegionBacking, RegionLayout,
    TrackerKind, Userfault,
};

/// How long a monitor may take until it answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

/// A QEMU, as its earlier farfault has left it.
pub struct LeftQemu {
    place: Whereabouts,
    /// `None` when it is settled.
    process: Option<Adopted>,
    memory: Arc<GuestMemory>,
    shape: Shape,
}

impl LeftQemu {
    /// Finds the QEMU of `place` again, and maps its memory.
    ///
    /// # Errors
    /// When it has ended, or its memory is not where it was, or another farfault works on it.
    pub fn find(place: &Whereabouts, access: Access) -> Result<Self, GuestError> {
        let Some(known) = place.process else {
            return Err(refusal(
                format!(
                    "a guest of {} lives in the farfault process that moves it, and has ended with it",
                    place.monitor
                ),
                "only QEMU guests can be taken over by another process",
            ));
        };
        let process = Adopted::attach(known.pid)?;
        if process.identity() != known {
            return Err(failure(format!("the guest's QEMU (process {}) has ended", known.pid)));
        }
        let mappings = process.shared_mappings()?;
        let mut backings = Vec::new();
        for (region, address) in &place.ram {
            let mapping =
                discover::mapping_at(&mappings, &region.name, *address, region.size_bytes)?;
            let file = process.open_backing(mapping, access)?;
            let file_offset_bytes = mapping.file_offset_bytes + (address - mapping.address);
            backings.push(RegionBacking { layout: region.clone(), file, file_offset_bytes });
        }
        let mut memory = GuestMemory::map(backings, access)?;
        // The predecessor's claim has ended with it.
        memory.claim()?;
        let memory = Arc::new(memory);
        Ok(LeftQemu { place: place.clone(), process: Some(process), memory, shape: shape(place) })
    }

    /// The QEMU of `place`, living or not, for who has only to tell the other side how it ended: its memory is not
    /// mapped.
    ///
    /// # Errors
    /// Those of [`GuestMemory::map`].
    pub fn settled(place: &Whereabouts) -> Result<Self, GuestError> {
        let memory = Arc::new(GuestMemory::map(Vec::new(), Access::ReadOnly)?);
        Ok(LeftQemu { place: place.clone(), process: None, memory, shape: shape(place) })
    }

    /// As [`Userfault::release`], for a guest that has all its pages, whether the predecessor came to that or not.
    /// Nothing is registered anew for it, which would have the guest wait at pages that nobody serves, should this
    /// process end in between. Asks nothing of the monitor. A QEMU that has ended, or has no userfaultfd of farfault,
    /// is fine.
    ///
    /// # Errors
    /// When QEMU cannot be looked into; the kernel's own.
    pub fn unregister(&self) -> Result<(), GuestError> {
        let Some(known) = self.place.process.filter(|process| process.lives()) else {
            return Ok(());
        };
        match unregister(known, &self.place.ram) {
            Err(_) if !known.lives() => Ok(()),
            other => other,
        }
    }
}

fn unregister(known: ProcessIdentity, ram: &[(RegionLayout, u64)]) -> Result<(), GuestError> {
    let process = Adopted::attach(known.pid)?;
    if process.identity() != known {
        return Ok(());
    }
    let Some(uffd) = process.kept_userfaultfd(FAULT_FEATURES)? else { return Ok(()) };
    let failed = |region: &RegionLayout, error| {
        failure(format!("guest RAM {} cannot be let go of: {error}", region.name))
    };
    for (region, address) in ram {
        match uffd.unregister(*address as *mut _, region.size_bytes as usize) {
            // Nothing is mapped there any more, or another farfault follows the guest's writes by now.
            Err(userfaultfd::Error::SystemError(errno))
                if [libc::ENOMEM, libc::EINVAL].contains(&(errno as i32)) => {}
            other => other.map_err(|error| failed(region, error))?,
        }
    }
    // Whoever came to wait while that went on: see `Userfault::release`.
    for (region, address) in ram {
        let woken = uffd.wake(*address as *mut _, region.size_bytes as usize);
        woken.map_err(|error| failed(region, error))?;
    }
    Ok(())
}

/// The two sides' shapes were compared when the migration began.
fn shape(place: &Whereabouts) -> Shape {
    let memory = MemoryLayout::new(place.ram.iter().map(|(region, _)| region.clone()).collect());
    Shape { monitor: place.monitor.clone(), memory, properties: Default::default() }
}

/// Lets the guest, which has come here, run, and tells its network. A monitor that does not answer yet is asked
/// again: it may be waiting for pages, which come when the other side is connected again.
///
/// # Errors
/// The last one, when QEMU has ended or has not answered for ten minutes.
pub fn let_run_when_it_answers(place: &Whereabouts) -> Result<(), GuestError> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    loop {
        match rescue::let_run_arrived(place) {
            Err(error)
                if place.process.is_some_and(|qemu| qemu.lives()) && Instant::now() < deadline =>
            {
                tracing::debug!(%error, "the guest's monitor is asked again");
                thread::sleep(Duration::from_millis(200));
            }
            other => return other,
        }
    }
}

impl DestinationGuest for LeftQemu {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    fn whereabouts(&self) -> Whereabouts {
        self.place.clone()
    }

    /// The one that QEMU has kept open: what waits at it goes on waiting until we serve it. Its memory
    /// stays registered and as it is.
    fn userfault(&mut self) -> Result<Userfault, GuestError> {
        let Some(process) = &self.process else {
            return Err(failure("the faults of a guest that is settled are not served"));
        };
        let kept = process.kept_userfaultfd(FAULT_FEATURES)?.ok_or_else(|| {
            failure(format!("QEMU (process {}) has no userfaultfd of farfault", process.pid()))
        })?;
        let addresses: Vec<u64> = self.place.ram.iter().map(|(_, address)| *address).collect();
        Ok(Userfault::register(kept, &self.memory.units(), &addresses)?)
    }

    fn load_device_state(&mut self, _state: &[u8]) -> Result<(), GuestError> {
        Err(failure("a device state is not loaded into a QEMU that was taken over"))
    }

    fn run(&mut self) -> Result<(), GuestError> {
        rescue::let_run_arrived(&self.place)
    }

    fn release(&mut self) -> Result<(), GuestError> {
        rescue::restore_settings(&self.place);
        rescue::remove_private_socket(&self.place);
        Ok(())
    }

    fn leave(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn discard(&mut self) -> Result<(), GuestError> {
        rescue::end(&self.place)
    }
}

impl SourceGuest for LeftQemu {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    fn whereabouts(&self) -> Whereabouts {
        self.place.clone()
    }

    fn runs(&self) -> bool {
        self.place.runs
    }

    fn track(&mut self, _kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Err(failure("the writes of a guest that was taken over are not followed"))
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        Err(failure("a guest that was taken over is stopped already"))
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        Err(failure("the device state of a guest that was taken over is gone"))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        rescue::let_run(&self.place)
    }

    fn keep_still(&mut self) -> Result<bool, GuestError> {
        rescue::still_stands(&self.place).map(|standing| standing != Standing::Disturbed)
    }

    fn release(&mut self, quit: bool) -> Result<(), GuestError> {
        if quit {
            return rescue::quit(&self.place);
        }
        rescue::restore_settings(&self.place);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_taken_over_is_told() {
        let told = |place: &Whereabouts| match LeftQemu::find(place, Access::ReadOnly) {
            Err(error) => error.message,
            Ok(_) => panic!("found"),
        };
        let inside = Whereabouts { monitor: "kvm".to_owned(), ..Whereabouts::default() };
        assert!(told(&inside).contains("guest of kvm"));
        let me = ProcessIdentity::own().unwrap();
        let other = ProcessIdentity { start_ticks: me.start_ticks + 1, ..me };
        let ended = Whereabouts { process: Some(other), ..Whereabouts::default() };
        assert!(told(&ended).contains("has ended"));
    }
}
