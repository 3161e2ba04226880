//! The built-in guest without a virtual machine: native threads that do the same work on the same
//! kind of memory. It stands in where there is no KVM, or only an emulated one.
//!
//! A thread pauses between two operations, so its registers hold nothing that matters, and the
//! Workers are the whole device state.

mod crew;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};

use self::crew::Crew;
use super::workload::{GuestPlan, GuestStatus, Worker, WorkingGuest, Workload, fill, total_status};
use super::{DestinationGuest, GuestError, Shape, SourceGuest};
use crate::memory::{DirtyTracker, GuestMapping, GuestMemory, TrackerKind, Userfault};
use crate::page::PageIndex;

/// Changes whenever the encoding of the device state does.
const STATE_VERSION: u16 = 1;

/// The device state.
#[derive(Debug, Serialize, Deserialize)]
struct CrewState {
    version: u16,
    workload: Workload,
    workers: Vec<Worker>,
}

/// The built-in guest of native threads.
pub struct ThreadsGuest {
    crew: Crew,
    ram: Arc<GuestMapping>,
    memory: Arc<GuestMemory>,
    shape: Shape,
}

impl ThreadsGuest {
    /// A guest that is ready to run, and paused: [`SourceGuest::resume`] starts it.
    pub fn boot(plan: &GuestPlan) -> Result<ThreadsGuest, GuestError> {
        let guest = Self::await_arrival(plan)?;
        for worker in plan.new_workers() {
            fill(&worker, |page| guest.ram.page(PageIndex(page)));
        }
        Ok(guest)
    }

    /// An empty guest of the same shape, for one to arrive in.
    pub fn await_arrival(plan: &GuestPlan) -> Result<ThreadsGuest, GuestError> {
        plan.check().map_err(|error| GuestError::new(error.to_string()))?;
        let memory = Arc::new(GuestMemory::create(&plan.memory_layout())?);
        let ram = Arc::new(GuestMapping::new(&memory)?);
        let properties = [
            ("threads", plan.workers.to_string()),
            ("device state version", STATE_VERSION.to_string()),
        ];
        let properties = properties.map(|(name, value)| (name.to_owned(), value));
        let shape = Shape {
            monitor: "threads".to_owned(),
            memory: plan.memory_layout(),
            properties: BTreeMap::from(properties),
        };
        let crew = Crew::new(ram.clone(), plan.workload, plan.new_workers());
        Ok(ThreadsGuest { crew, ram, memory, shape })
    }

    /// The mapping through which its threads write.
    #[cfg(test)]
    pub(crate) fn ram(&self) -> Arc<GuestMapping> {
        self.ram.clone()
    }

    fn check_arrived(&self, worker: &Worker) -> Result<(), GuestError> {
        if worker.is_sound(self.ram.pages()) {
            return Ok(());
        }
        Err(GuestError::new("the device state that arrived has workers outside the guest's memory"))
    }
}

impl SourceGuest for ThreadsGuest {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        self.memory.clone()
    }

    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Ok(self.ram.tracker(kind, &self.memory)?)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.crew.stop()
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        let (workload, workers) = self.crew.at_rest()?;
        let state = CrewState { version: STATE_VERSION, workload, workers: workers.to_vec() };
        postcard::to_stdvec(&state)
            .map_err(|error| GuestError::new(format!("encode the device state: {error}")))
    }

    fn has_small_state(&self) -> bool {
        true
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.crew.start()
    }

    fn release(&mut self, _quit: bool) -> Result<(), GuestError> {
        self.crew.stop()
    }
}

impl DestinationGuest for ThreadsGuest {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        self.memory.clone()
    }

    fn userfault(&mut self) -> Result<Userfault, GuestError> {
        let userfault = self.ram.userfault()?;
        self.memory.punch_hole(userfault.pages())?;
        Ok(userfault)
    }

    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let bad = |what: String| GuestError::new(format!("the device state that arrived {what}"));
        let (state, rest) = postcard::take_from_bytes::<CrewState>(state)
            .map_err(|error| bad(format!("cannot be read: {error}")))?;
        if state.version != STATE_VERSION || !rest.is_empty() {
            return Err(bad(format!("has version {}, not {STATE_VERSION}", state.version))
                .hint("run the same version of farfault on both hosts"));
        }
        let threads = self.crew.at_rest()?.1.len();
        if state.workers.len() != threads {
            return Err(bad(format!("is of {} threads, not of {threads}", state.workers.len())));
        }
        state.workers.iter().try_for_each(|worker| self.check_arrived(worker))?;
        self.crew = Crew::new(self.ram.clone(), state.workload, state.workers);
        Ok(())
    }

    fn run(&mut self) -> Result<(), GuestError> {
        self.crew.start()
    }

    fn release(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn discard(&mut self) -> Result<(), GuestError> {
        self.crew.stop()
    }
}

impl WorkingGuest for ThreadsGuest {
    fn status(&self) -> GuestStatus {
        total_status(self.crew.gauges())
    }

    fn verify_all(&self) {
        self.crew.gauges().iter().for_each(|gauge| gauge.ask_to_verify());
    }

    fn still_to_verify(&self) -> u64 {
        self.crew.gauges().iter().map(|gauge| gauge.verify_left.load(Relaxed)).sum()
    }

    fn failure(&self) -> Option<String> {
        None
    }
}
