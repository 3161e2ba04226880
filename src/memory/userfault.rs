//! The userfaultfd that serves a guest's page faults on the destination.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use libc::c_void;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use userfaultfd::{Event, EventBuffer, FeatureFlags, ReadWrite, RegisterMode, Uffd};

use super::{MemoryError, Units, sys};
use crate::page::{PAGE_SIZE_BYTES, PageIndex, PageRange};

/// What `UFFDIO_API` must agree on for a userfaultfd that [`Userfault::register`] takes.
pub const FAULT_FEATURES: FeatureFlags = FeatureFlags::from_bits_retain(
    FeatureFlags::MISSING_SHMEM.bits()
        | FeatureFlags::MISSING_HUGETLBFS.bits()
        | FeatureFlags::THREAD_ID.bits()
        | sys::MINOR_SHMEM.bits()
        | sys::MINOR_HUGETLBFS.bits(),
);

/// Faults read at once, and the most that [`Userfault::wait`] gives.
const FAULTS_AT_ONCE: usize = 64;
/// How long the kernel may ask to try again. It does so while the process changes its memory map, which
/// takes microseconds; a fork of a huge process takes longer.
const STALL_LIMIT: Duration = Duration::from_secs(5);

/// A thread of the guest stands at a page that is not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The page; on hugetlbfs the first of its huge page.
    pub page: PageIndex,
    /// Whether its file had content there.
    pub kind: FaultKind,
    /// The thread wants to write.
    pub write: bool,
    /// The thread, as its process numbers it.
    pub thread: Option<u32>,
}

/// What the kernel found in the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A hole.
    Missing,
    /// Some content. It proves nothing about the page: see [`super::PageTable`].
    Minor,
}

/// A userfaultfd over all RAM regions of one guest process, registered MISSING | MINOR: every first
/// touch of a page by the guest, in user or kernel mode, is a fault that waits until
/// [`Userfault::map`] or [`Userfault::map_zero`].
///
/// Dropping it does *not* let go of the guest, and closing the last copy of the descriptor would
/// resolve waiting faults to whatever lies in the page cache. A copy stays open in the guest's process,
/// so that a crash of farfault leaves the guest waiting, and a new process can take over.
pub struct Userfault {
    uffd: Uffd,
    regions: Vec<Region>,
    units: Units,
    events: Mutex<EventBuffer>,
}

struct Region {
    pages: PageRange,
    address: u64,
}

impl Userfault {
    /// Registers all regions. `uffd` is past `UFFDIO_API` with [`FAULT_FEATURES`]; `units` are those of the
    /// guest's memory; `addresses` are the guest-side addresses of the regions, in layout order. Pages that the process has mapped
    /// already stay mapped: punch all RAM into holes after this, before any content arrives.
    ///
    /// # Errors
    /// [`MemoryError::NotServable`] when a region is not shared memory;
    /// [`MemoryError::RegisterBusy`] when another userfaultfd watches it.
    pub fn register(uffd: Uffd, units: &Units, addresses: &[u64]) -> Result<Self, MemoryError> {
        let layout = units.layout();
        assert_eq!(layout.regions().len(), addresses.len(), "an address for each region");
        set_nonblocking(&uffd)?;
        let mut regions = Vec::new();
        for (index, (region, address)) in layout.regions().iter().zip(addresses).enumerate() {
            let mode = RegisterMode::MISSING | RegisterMode::MINOR;
            register(&uffd, &region.name, "serve", *address, region.size_bytes, mode)?;
            regions.push(Region { pages: layout.range_of(index), address: *address });
        }
        let events = Mutex::new(EventBuffer::new(FAULTS_AT_ONCE));
        Ok(Userfault { uffd, regions, units: units.clone(), events })
    }

    /// Waits up to `timeout` for faults and puts them into `into` (cleared first), at most 64.
    pub fn wait(&self, timeout: Duration, into: &mut Vec<Fault>) -> Result<(), MemoryError> {
        into.clear();
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(Errno::EINTR) => return Ok(()),
            Ok(_) => {}
            Err(source) => {
                return Err(MemoryError::Userfault { action: "wait for faults", source });
            }
        }
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let failed =
            |error| MemoryError::Userfault { action: "read faults", source: errno(&error) };
        let read = match self.uffd.read_events(&mut events) {
            // Another reader was faster.
            Err(error) if errno(&error) == Errno::EAGAIN => return Ok(()),
            other => other.map_err(failed)?,
        };
        for event in read {
            let Event::Pagefault { kind, rw, addr, thread_id } = event.map_err(failed)? else {
                continue; // No other kind was asked for.
            };
            let Some(page) = self.page_at(addr as u64) else { continue };
            let kind = match kind {
                userfaultfd::FaultKind::Minor => FaultKind::Minor,
                _ => FaultKind::Missing,
            };
            let thread = u32::try_from(thread_id.as_raw()).ok().filter(|id| *id != 0);
            into.push(Fault { page, kind, write: rw == ReadWrite::Write, thread });
        }
        Ok(())
    }

    /// Which pages can only be mapped together.
    pub fn units(&self) -> &Units {
        &self.units
    }

    /// Maps the pages of `range`, whole units, for the guest as they lie in the file, and wakes who waits for
    /// them; gives how many were not mapped before.
    ///
    /// # Errors
    /// [`MemoryError::Hole`] with the first unit of `range` that is a hole: the pages before it have
    /// been mapped, nothing behind it. [`MemoryError::ProcessGone`], [`MemoryError::MapStalled`].
    pub fn map(&self, range: PageRange) -> Result<u64, MemoryError> {
        let mut mapped = 0;
        for (index, piece) in self.units.layout().split(range) {
            let region = &self.regions[index];
            let mut patience = Patience::new();
            let mut at = piece.start;
            while at < piece.end {
                let (start, bytes) = region.span(PageRange { start: at, end: piece.end });
                match self.uffd.r#continue(start, bytes, true) {
                    // Less than all: the kernel met an obstacle behind these, and tells it next time.
                    Ok(done_bytes) => {
                        let done = done_bytes / PAGE_SIZE_BYTES as u64;
                        mapped += done;
                        at = PageIndex(at.0 + done);
                    }
                    Err(error) => match errno(&error) {
                        Errno::EAGAIN => patience.again(at)?,
                        Errno::EEXIST => {
                            let unit = self.units.of(at);
                            self.wake(unit)?;
                            at = unit.end;
                        }
                        Errno::EFAULT => return Err(MemoryError::Hole(at)),
                        other => return Err(failed("map pages", other, at)),
                    },
                }
            }
        }
        Ok(mapped)
    }

    /// Maps the unit of `page` as zeros where its file has a hole; where the file has content by now, maps that.
    ///
    /// # Errors
    /// [`MemoryError::NoSpace`] when there is no memory for it: the guest's thread goes on waiting.
    pub fn map_zero(&self, page: PageIndex) -> Result<(), MemoryError> {
        let unit = self.units.of(page);
        let mut patience = Patience::new();
        let (start, bytes) = self.span(unit);
        loop {
            match zero_unit(&self.uffd, start, bytes) {
                Ok(()) => return Ok(()),
                Err(Errno::EAGAIN) => patience.again(page)?,
                // Content in the page cache, or mapped already. It may become a hole again before we
                // map it, if the guest's balloon takes it away.
                Err(Errno::EEXIST) => match self.map(unit) {
                    Err(MemoryError::Hole(_)) => patience.again(page)?,
                    other => return other.map(|_| ()),
                },
                Err(other) => return Err(failed("map a zero page", other, page)),
            }
        }
    }

    /// Lets whoever waits for a page of `range` try again, mapped or not.
    pub fn wake(&self, range: PageRange) -> Result<(), MemoryError> {
        for (index, piece) in self.units.layout().split(range) {
            let (start, bytes) = self.regions[index].span(piece);
            self.uffd
                .wake(start, bytes)
                .map_err(|e| failed("wake threads", errno(&e), piece.start))?;
        }
        Ok(())
    }

    /// Every page has come: from now on the guest faults as any process does. A process that has
    /// ended is no error.
    pub fn release(&self) -> Result<(), MemoryError> {
        for region in &self.regions {
            let (start, bytes) = region.span(region.pages);
            match self.uffd.unregister(start, bytes).map_err(|error| errno(&error)) {
                Ok(()) | Err(Errno::ESRCH | Errno::ENOMEM) => {}
                Err(other) => return Err(failed("let go of guest RAM", other, region.pages.start)),
            }
        }
        // Unregistering wakes who waits, but before it takes the area away from under those who fault
        // on it with only that area's lock (seen on Linux 6.18): one who comes in between goes to
        // sleep with nobody left to wake it. When unregistering has returned, it sleeps for certain.
        match self.wake(self.pages()) {
            Err(MemoryError::ProcessGone) => Ok(()),
            other => other,
        }
    }

    /// All pages that it serves.
    pub fn pages(&self) -> PageRange {
        PageRange::new(0, self.units.layout().pages())
    }

    fn page_at(&self, address: u64) -> Option<PageIndex> {
        self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.address)? / PAGE_SIZE_BYTES as u64;
            (offset < region.pages.len()).then(|| PageIndex(region.pages.start.0 + offset))
        })
    }

    fn span(&self, unit: PageRange) -> (*mut c_void, usize) {
        let region = self.regions.iter().find(|region| region.pages.contains(unit.start));
        region.unwrap_or_else(|| panic!("{unit:?} beyond the guest")).span(unit)
    }
}

impl Region {
    /// Address and length in the guest's process.
    fn span(&self, pages: PageRange) -> (*mut c_void, usize) {
        let offset = (pages.start.0 - self.pages.start.0) * PAGE_SIZE_BYTES as u64;
        ((self.address + offset) as *mut c_void, pages.len() as usize * PAGE_SIZE_BYTES)
    }
}

/// Bounds how often an operation is tried again.
struct Patience {
    since: Instant,
    tries: u32,
}

impl Patience {
    fn new() -> Self {
        Patience { since: Instant::now(), tries: 0 }
    }

    fn again(&mut self, page: PageIndex) -> Result<(), MemoryError> {
        self.tries += 1;
        let waited = self.since.elapsed();
        if waited > STALL_LIMIT {
            return Err(MemoryError::MapStalled { page, waited_ms: waited.as_millis() as u64 });
        }
        // The kernel needs microseconds as a rule; then it is worth no more than a yield.
        if self.tries < 100 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

#[allow(unsafe_code)]
fn zero_unit(uffd: &Uffd, start: *mut c_void, bytes: usize) -> Result<(), Errno> {
    let filled = if bytes == PAGE_SIZE_BYTES {
        // SAFETY: the range is in the guest's process and was registered by us; the kernel only fills
        // what is a hole there, and refuses everything else.
        unsafe { uffd.zeropage(start, bytes, true) }
    } else {
        // There is no page of zeros to map on hugetlbfs. Where what it copies is not mapped, the kernel takes a second
        // huge page of the pool for the time of the copy, which may have none.
        let zeros = vec![0u8; bytes];
        zeros.iter().step_by(PAGE_SIZE_BYTES).for_each(|byte| _ = std::hint::black_box(*byte));
        // SAFETY: as above; the kernel reads as many zeros as there are.
        unsafe { uffd.copy(zeros.as_ptr().cast(), start, bytes, true) }
    };
    filled.map(drop).map_err(|error| errno(&error))
}

/// Registers a region of guest RAM; `purpose` is "serve" or "track".
pub(super) fn register(
    uffd: &Uffd,
    region: &str,
    purpose: &'static str,
    address: u64,
    size_bytes: u64,
    mode: RegisterMode,
) -> Result<(), MemoryError> {
    let registered = uffd.register_with_mode(address as *mut c_void, size_bytes as usize, mode);
    registered.map(|_| ()).map_err(|error| match errno(&error) {
        Errno::EBUSY => MemoryError::RegisterBusy { region: region.to_owned() },
        Errno::EINVAL => MemoryError::NotServable { region: region.to_owned(), purpose },
        Errno::ESRCH | Errno::ENOMEM => MemoryError::ProcessGone,
        source => MemoryError::Userfault { action: "register guest RAM", source },
    })
}

/// A blocking userfaultfd cannot be polled.
fn set_nonblocking(uffd: &Uffd) -> Result<(), MemoryError> {
    let failed = |source| MemoryError::Userfault { action: "make it non-blocking", source };
    let flags = OFlag::from_bits_retain(fcntl(uffd, FcntlArg::F_GETFL).map_err(failed)?);
    fcntl(uffd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(failed)?;
    Ok(())
}

/// The kernel's answer inside the crate's error.
pub(super) fn errno(error: &userfaultfd::Error) -> Errno {
    match error {
        userfaultfd::Error::SystemError(errno)
        | userfaultfd::Error::CopyFailed(errno)
        | userfaultfd::Error::ZeropageFailed(errno) => Errno::from_raw(*errno as i32),
        userfaultfd::Error::OpenDevUserfaultfd(error) => {
            error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
        }
        userfaultfd::Error::PartiallyCopied(_) => Errno::EAGAIN,
        _ => Errno::from_raw(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
    }
}

fn failed(action: &'static str, source: Errno, page: PageIndex) -> MemoryError {
    match source {
        Errno::ESRCH => MemoryError::ProcessGone,
        Errno::ENOMEM | Errno::ENOSPC => MemoryError::NoSpace { page },
        source => MemoryError::Userfault { action, source },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use super::*;
    use crate::memory::{GuestMapping, GuestMemory, HostCapabilities, MemoryLayout, RegionLayout};

    const PAGES: u64 = 512;
    const ROUNDS: u64 = 400;

    /// Threads touch fresh pages all the while, so that some fault in the midst of the release.
    #[test]
    fn a_thread_that_faults_while_memory_is_let_go_is_not_left_asleep() {
        if !HostCapabilities::can_serve_faults() {
            eprintln!("*** SKIPPED: this process may not serve page faults ***");
            return;
        }
        let size_bytes = PAGES * PAGE_SIZE_BYTES as u64;
        let region = RegionLayout { name: "ram".to_owned(), size_bytes };
        let layout = MemoryLayout::new(vec![region]);
        for round in 0..ROUNDS {
            let memory = GuestMemory::create(&layout).unwrap();
            let mapping = Arc::new(GuestMapping::new(&memory).unwrap());
            let userfault = Arc::new(mapping.userfault().unwrap());
            let done = Arc::new(AtomicBool::new(false));
            let server = std::thread::spawn({
                let (userfault, done) = (userfault.clone(), done.clone());
                move || {
                    let mut faults = Vec::new();
                    while !done.load(Ordering::Relaxed) {
                        userfault.wait(Duration::from_millis(1), &mut faults).unwrap();
                        for fault in &faults {
                            // After the release there is nothing to map into any more.
                            let _ = userfault.map_zero(fault.page);
                        }
                    }
                }
            });
            let touchers: Vec<_> = (0..2)
                .map(|half| {
                    let mapping = mapping.clone();
                    std::thread::spawn(move || {
                        for page in (0..PAGES).filter(|page| page % 2 == half) {
                            mapping.page(PageIndex(page))[0].fetch_add(1, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_micros(50 * (round % 40)));
            userfault.release().unwrap();
            let begin = Instant::now();
            while touchers.iter().any(|toucher| !toucher.is_finished()) {
                assert!(begin.elapsed() < Duration::from_secs(5), "asleep since round {round}");
                std::thread::sleep(Duration::from_micros(100));
            }
            touchers.into_iter().for_each(|toucher| toucher.join().unwrap());
            done.store(true, Ordering::Relaxed);
            server.join().unwrap();
        }
    }
}
