//! A guest with a disk that is read past the page tables, as with `cache=none`: the kernel pins the pages of a
//! request, which counts as a write to them, and the disk writes into them later, which nothing tells of.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use super::*;
use crate::guest::workload::GuestStatus;
use crate::guest::{DestinationGuest, GuestError, Shape};
use crate::memory::{DirtyTracker, GuestMapping, GuestMemory, Userfault};
use crate::page::PageBytes;

/// Pages of one request.
const REQUEST_PAGES: usize = 128;
/// How long it is under way.
const LATENCY: Duration = Duration::from_millis(200);

#[derive(Default)]
struct Queue {
    is_stopped: bool,
    is_removed: bool,
}

struct WithDisk {
    guest: ThreadsGuest,
    /// Held while a request is under way.
    queue: Arc<Mutex<Queue>>,
    reader: Option<JoinHandle<()>>,
    pages: PageRange,
    /// How often it can still be let run.
    starts: u32,
}

/// What the disk has for a page.
fn content(page: PageIndex) -> PageBytes {
    let mut bytes = [0; PAGE_SIZE_BYTES];
    for (at, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = (page.0 << 16 | at as u64 | 1 << 63).to_le_bytes();
    }
    bytes
}

impl WithDisk {
    fn new(guest: ThreadsGuest, plan: &GuestPlan) -> Self {
        let queue = Arc::new(Mutex::new(Queue { is_stopped: true, is_removed: false }));
        let pages = unused(plan);
        WithDisk { guest, queue, reader: None, pages, starts: u32::MAX }
    }

    fn start(&mut self) {
        self.queue.lock().unwrap().is_stopped = false;
        let queue = self.queue.clone();
        let (ram, memory) = (self.guest.ram(), SourceGuest::memory(&self.guest));
        let pages: Vec<PageIndex> = self.pages.pages().collect();
        self.reader.get_or_insert_with(|| {
            std::thread::spawn(move || read_all(&pages, &queue, &ram, &memory))
        });
    }
}

/// Reads into each page once.
fn read_all(pages: &[PageIndex], queue: &Mutex<Queue>, ram: &GuestMapping, memory: &GuestMemory) {
    let mut requests = pages.chunks(REQUEST_PAGES);
    loop {
        std::thread::sleep(Duration::from_millis(1));
        let queue = queue.lock().unwrap();
        if queue.is_removed {
            return;
        }
        let Some(request) = (if queue.is_stopped { Some(&[][..]) } else { requests.next() }) else {
            return;
        };
        for page in request {
            ram.page(*page)[0].store(page.0, Ordering::Relaxed);
        }
        std::thread::sleep(if request.is_empty() { Duration::ZERO } else { LATENCY });
        for page in request {
            memory.write_page(*page, &content(*page)).unwrap();
        }
    }
}

impl Drop for WithDisk {
    fn drop(&mut self) {
        self.queue.lock().unwrap().is_removed = true;
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
    }
}

impl SourceGuest for WithDisk {
    fn shape(&self) -> &Shape {
        SourceGuest::shape(&self.guest)
    }

    fn memory(&self) -> Arc<GuestMemory> {
        SourceGuest::memory(&self.guest)
    }

    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.guest.track(kind)
    }

    fn writes_past_page_tables(&mut self) -> Result<bool, GuestError> {
        Ok(true)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.queue.lock().unwrap().is_stopped = true;
        self.guest.pause()
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        self.guest.save_device_state()
    }

    fn has_small_state(&self) -> bool {
        true
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        let starts = self.starts.checked_sub(1);
        self.starts = starts.ok_or_else(|| GuestError::new("its monitor is deaf"))?;
        self.start();
        self.guest.resume()
    }

    fn release(&mut self, quit: bool) -> Result<(), GuestError> {
        SourceGuest::release(&mut self.guest, quit)
    }
}

impl DestinationGuest for WithDisk {
    fn shape(&self) -> &Shape {
        DestinationGuest::shape(&self.guest)
    }

    fn memory(&self) -> Arc<GuestMemory> {
        DestinationGuest::memory(&self.guest)
    }

    fn userfault(&mut self) -> Result<Userfault, GuestError> {
        self.guest.userfault()
    }

    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.guest.load_device_state(state)
    }

    fn run(&mut self) -> Result<(), GuestError> {
        self.guest.run()
    }

    fn release(&mut self) -> Result<(), GuestError> {
        DestinationGuest::release(&mut self.guest)
    }

    fn discard(&mut self) -> Result<(), GuestError> {
        self.guest.discard()
    }
}

impl WorkingGuest for WithDisk {
    fn status(&self) -> GuestStatus {
        self.guest.status()
    }

    fn verify_all(&self) {
        self.guest.verify_all();
    }

    fn still_to_verify(&self) -> u64 {
        self.guest.still_to_verify()
    }

    fn failure(&self) -> Option<String> {
        self.guest.failure()
    }
}

/// Pages that the workload does not use.
fn unused(plan: &GuestPlan) -> PageRange {
    let pages = plan.memory_bytes / PAGE_SIZE_BYTES as u64;
    PageRange::new(pages / 2, pages)
}

#[test]
fn what_a_disk_writes_past_the_page_tables_arrives() {
    if !can_serve_faults("moves a guest with a disk") {
        return;
    }
    let plan = GuestPlan { used_percent: 40, ..plan(Pattern::Sparse, 2_000, 32, 2) };
    for strategy in [Strategy::Precopy, Strategy::Hybrid] {
        let boot = WithDisk::new(ThreadsGuest::boot(&plan).unwrap(), &plan);
        let mut source = SharedGuest::new(Box::new(boot));
        let arrive = WithDisk::new(ThreadsGuest::await_arrival(&plan).unwrap(), &plan);
        let destination = SharedGuest::new(Box::new(arrive));
        source.resume().unwrap();
        work_for_a_while(&source);
        let bandwidth_bytes_per_s = Some(8 << 20);
        let method = Method { strategy, bandwidth_bytes_per_s, ..Method::default() };
        let moved = run_both(&source, &destination, method);
        assert_eq!(moved.sent.result, MigrationResult::Migrated);
        let stood_still = |(part, ms)| part == "precopy.standstill" && ms > 0.0;
        assert!(moved.sent.phases_ms.iter().any(stood_still), "{:?}", moved.sent.phases_ms);
        expect_whole(&destination);
        let (here, there) = (SourceGuest::memory(&source), SourceGuest::memory(&destination));
        let (mut was, mut is) = ([0; PAGE_SIZE_BYTES], [0; PAGE_SIZE_BYTES]);
        let (mut read, mut stale) = (0, Vec::new());
        for page in unused(&plan).pages() {
            here.read_page(page, &mut was);
            there.read_page(page, &mut is);
            read += u64::from(was == content(page));
            if was != is {
                stale.push(page);
            }
        }
        assert!(stale.is_empty(), "{strategy:?}: {} pages are stale: {stale:?}", stale.len());
        assert!(read >= 200, "the disk has read {read} pages only");
    }
}

#[test]
fn a_guest_that_is_not_let_run_on_in_pre_copy_is_not_forgotten() {
    if !can_serve_faults("does not forget a guest that stands still") {
        return;
    }
    let plan = plan(Pattern::Sparse, 2_000, 8, 1);
    // Once to begin with, and once when its writes begin to be followed.
    let mut boot = WithDisk::new(ThreadsGuest::boot(&plan).unwrap(), &plan);
    boot.starts = 2;
    let mut source = SharedGuest::new(Box::new(boot));
    let destination = SharedGuest::new(waiting_threads(&plan));
    source.resume().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let state_dir = directory.path().join("state");
    std::fs::create_dir(&state_dir).unwrap();
    let method = Method::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let sent = runtime.block_on(async {
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let (listener, ticket) = Listener::bind(address, Vec::new(), &transport(method)).unwrap();
        let options = receive_options(method, &state_dir);
        let receiving = tokio::spawn(receive_from(destination, listener, ticket.clone(), options));
        let sent = send_to(&source, &ticket, method, &state_dir).await;
        assert_eq!(receiving.await.unwrap().result, MigrationResult::Refused);
        sent
    });
    assert_eq!(sent.result, MigrationResult::Stayed);
    let left: Vec<_> = std::fs::read_dir(&state_dir).unwrap().map(Result::unwrap).collect();
    let names: Vec<_> = left.iter().map(|left| left.file_name().into_string().unwrap()).collect();
    assert!(matches!(&names[..], [one] if one.contains("source")), "{names:?}");
}
