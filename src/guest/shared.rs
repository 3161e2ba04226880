//! A built-in guest that a session moves while somebody else looks at it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::workload::{GuestStatus, WorkingGuest};
use super::{DestinationGuest, GuestError, Shape, SourceGuest, Whereabouts};
use crate::memory::adopt::HugePages;
use crate::memory::{DirtyTracker, GuestMemory, TrackerKind, Userfault};

/// A handle to a guest; clones are handles to the same. The guest ends with the last.
#[derive(Clone)]
pub struct SharedGuest {
    guest: Arc<Mutex<Box<dyn WorkingGuest>>>,
    shape: Shape,
}

impl SharedGuest {
    /// Shares `guest`.
    pub fn new(guest: Box<dyn WorkingGuest>) -> Self {
        let shape = SourceGuest::shape(&*guest).clone();
        SharedGuest { guest: Arc::new(Mutex::new(guest)), shape }
    }

    /// The guest itself. Waits while a session does something with it.
    pub fn lock(&self) -> MutexGuard<'_, Box<dyn WorkingGuest>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest has reported; `None` while a session is busy with it.
    pub fn try_status(&self) -> Option<GuestStatus> {
        Some(self.guest.try_lock().ok()?.status())
    }
}

impl SourceGuest for SharedGuest {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        SourceGuest::memory(&**self.lock())
    }

    fn whereabouts(&self) -> Whereabouts {
        SourceGuest::whereabouts(&**self.lock())
    }

    fn runs(&self) -> bool {
        self.lock().runs()
    }

    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.lock().track(kind)
    }

    fn is_running(&mut self) -> Result<bool, GuestError> {
        self.lock().is_running()
    }

    fn writes_past_page_tables(&mut self) -> Result<bool, GuestError> {
        self.lock().writes_past_page_tables()
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.lock().pause()
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        self.lock().save_device_state()
    }

    fn has_small_state(&self) -> bool {
        self.lock().has_small_state()
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.lock().resume()
    }

    fn keep_still(&mut self) -> Result<bool, GuestError> {
        self.lock().keep_still()
    }

    fn release(&mut self, quit: bool) -> Result<(), GuestError> {
        SourceGuest::release(&mut **self.lock(), quit)
    }
}

impl DestinationGuest for SharedGuest {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        DestinationGuest::memory(&**self.lock())
    }

    fn whereabouts(&self) -> Whereabouts {
        DestinationGuest::whereabouts(&**self.lock())
    }

    fn userfault(&mut self) -> Result<Userfault, GuestError> {
        self.lock().userfault()
    }

    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.lock().load_device_state(state)
    }

    fn run(&mut self) -> Result<(), GuestError> {
        self.lock().run()
    }

    fn stands_still(&mut self) -> bool {
        self.lock().stands_still()
    }

    fn release(&mut self) -> Result<(), GuestError> {
        DestinationGuest::release(&mut **self.lock())
    }

    fn gather_huge_pages(&mut self) -> Result<Option<HugePages>, GuestError> {
        self.lock().gather_huge_pages()
    }

    fn leave(&mut self) -> Result<(), GuestError> {
        self.lock().leave()
    }

    fn discard(&mut self) -> Result<(), GuestError> {
        self.lock().discard()
    }
}
