//! How a virtual machine monitor joins: a complete implementation of both traits for a toy monitor,
//! and a migration by hand that shows in which order they are called.
//!
//! The toy's guest is one thread that counts up in every page of its RAM in turn. Its only device is
//! the register with the next page. `cargo run --example tiny_vmm`

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use farfault::guest::{DestinationGuest, GuestError, Shape, SourceGuest};
use farfault::memory::{
    DirtyTracker, GuestMapping, GuestMemory, MemoryLayout, RegionLayout, TrackerKind, Userfault,
};
use farfault::page::{PAGE_SIZE_BYTES, PageIndex, PageRange, PageSet};

const PAGES: u64 = 1024;

/// The monitor. The same type serves at both ends; they could as well be two.
struct TinyVmm {
    shape: Shape,
    /// farfault's view of the RAM.
    alias: Arc<GuestMemory>,
    /// The guest's view of the same RAM. Only this one is tracked and faults.
    ram: Arc<GuestMapping>,
    /// The device: the page that the guest counts in next.
    register: Arc<AtomicU64>,
    vcpu: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

impl TinyVmm {
    fn new() -> Result<Self, GuestError> {
        let region =
            RegionLayout { name: "ram".to_owned(), size_bytes: PAGES * PAGE_SIZE_BYTES as u64 };
        let memory = MemoryLayout::new(vec![region]);
        let alias = Arc::new(GuestMemory::create(&memory)?);
        let ram = Arc::new(GuestMapping::new(&alias)?);
        let properties = BTreeMap::from([("version".to_owned(), "1".to_owned())]);
        let shape = Shape { monitor: "tiny".to_owned(), memory, properties };
        Ok(TinyVmm { shape, alias, ram, register: Arc::default(), vcpu: None })
    }

    fn start(&mut self) {
        if self.vcpu.is_some() {
            return;
        }
        let (ram, register) = (self.ram.clone(), self.register.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let run = move || {
            while !stopped.load(Relaxed) {
                let page = register.load(Relaxed);
                ram.page(PageIndex(page))[0].fetch_add(1, Relaxed);
                register.store((page + 1) % PAGES, Relaxed);
                thread::sleep(Duration::from_micros(20));
            }
        };
        self.vcpu = Some((stop, thread::spawn(run)));
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        let Some((stop, thread)) = self.vcpu.take() else { return Ok(()) };
        stop.store(true, Relaxed);
        thread.join().map_err(|_| GuestError::new("the vCPU has panicked"))
    }

    /// What must hold after any number of moves: every page was counted equally often, up to the
    /// page in the register.
    fn is_right(&self) -> bool {
        let count = |page| self.ram.page(PageIndex(page))[0].load(Relaxed);
        let (first, next) = (count(0), self.register.load(Relaxed));
        (0..PAGES)
            .all(|page| count(page) == if page < next || next == 0 { first } else { first - 1 })
    }
}

impl SourceGuest for TinyVmm {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        self.alias.clone()
    }

    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        // A monitor in another process would call `farfault::memory::open_tracker`.
        Ok(self.ram.tracker(kind, &self.alias)?)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.stop()
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(self.register.load(Relaxed).to_le_bytes().to_vec())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.start();
        Ok(())
    }

    fn release(&mut self, _quit: bool) -> Result<(), GuestError> {
        self.stop()
    }
}

impl DestinationGuest for TinyVmm {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        self.alias.clone()
    }

    fn userfault(&mut self) -> Result<Userfault, GuestError> {
        let userfault = self.ram.userfault()?;
        self.alias.punch_hole(userfault.pages())?;
        Ok(userfault)
    }

    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let page = state.try_into().ok().map(u64::from_le_bytes).filter(|page| *page < PAGES);
        let page =
            page.ok_or_else(|| GuestError::new("this is no device state of a tiny guest"))?;
        self.register.store(page, Relaxed);
        Ok(())
    }

    fn run(&mut self) -> Result<(), GuestError> {
        self.start();
        Ok(())
    }

    fn release(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn discard(&mut self) -> Result<(), GuestError> {
        self.stop()
    }
}

/// Moves a guest within this process, as the engine does between two hosts: half of its pages before
/// the switchover, the rest when the guest touches them.
fn migrate(
    source: &mut dyn SourceGuest,
    destination: &mut dyn DestinationGuest,
) -> Result<u64, GuestError> {
    let differences = source.shape().differences(destination.shape());
    if !differences.is_empty() {
        return Err(GuestError::new(differences.join("\n")));
    }
    let (from, to) = (source.memory(), destination.memory());
    let all = PageRange::new(0, from.pages());
    let mut tracker = source.track(TrackerKind::WriteProtect)?;
    tracker.arm()?;
    // This guest gives no page back, so nobody need be told what is sent: see `ReadWitness`.
    let userfault = destination.userfault()?;

    // Pre-copy: the guest runs on meanwhile, so what it writes is missing again.
    let mut missing = PageSet::full(from.pages());
    for page in (0..from.pages() / 2).map(PageIndex) {
        send(&from, &to, page)?;
        missing.remove(page);
    }

    // Switchover.
    source.pause()?;
    tracker.collect(all, &mut missing)?;
    destination.load_device_state(&source.save_device_state()?)?;
    destination.run()?;

    // Post-copy: a page is mapped when the guest waits for it.
    let (mut faults, mut mapped) = (Vec::new(), PageSet::empty(from.pages()));
    let mut fetched = 0;
    while mapped.len() < from.pages() {
        userfault.wait(Duration::from_millis(100), &mut faults)?;
        for page in faults.iter().map(|fault| fault.page) {
            if missing.remove(page) {
                send(&from, &to, page)?;
                fetched += 1;
            }
            userfault.map(PageRange::new(page.0, page.0 + 1))?;
            mapped.insert(page);
        }
    }
    userfault.release()?;
    destination.release()?;
    source.release(true)?;
    Ok(fetched)
}

fn send(from: &GuestMemory, to: &GuestMemory, page: PageIndex) -> Result<(), GuestError> {
    let mut bytes = [0; PAGE_SIZE_BYTES];
    from.read_page(page, &mut bytes);
    Ok(to.write_page(page, &bytes)?)
}

fn main() -> Result<(), GuestError> {
    let (mut here, mut there) = (TinyVmm::new()?, TinyVmm::new()?);
    here.resume()?;
    thread::sleep(Duration::from_millis(100));
    let fetched = migrate(&mut here, &mut there)?;
    there.pause()?;
    println!("the guest has moved; {fetched} of {PAGES} pages were fetched when it touched them");
    if there.is_right() { Ok(()) } else { Err(GuestError::new("its memory is wrong")) }
}
