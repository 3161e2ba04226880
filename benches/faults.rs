//! How long faults wait, and how many are served a second, while the pusher fills the link: whole post-copy
//! migrations within this process, over an emulated link.
//!
//! The guest is a number of threads that read pages at random, each in its own part of memory, and time each
//! first touch themselves. Its memory does not compress, so that encoding is not what is measured.
//!
//! `cargo bench --bench faults` runs every case once; `cargo bench --bench faults -- loss` those whose name
//! contains the word. Root, or `vm.unprivileged_userfaultfd=1`. The link needs a core of its own.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farfault::codec::SentLimits;
use farfault::engine::policy::SwitchoverPolicy;
use farfault::engine::pusher::PusherKind;
use farfault::engine::source::{SourceConfig, SourceTimeouts};
use farfault::guest::{DestinationGuest, GuestError, Shape, SourceGuest};
use farfault::lab::relay::{MAX_DATAGRAM_BYTES, Relay};
use farfault::lab::spec::{LinkSpec, QueueLimit};
use farfault::memory::{
    DirtyTracker, GuestMapping, GuestMemory, MemoryLayout, RegionLayout, TrackerKind, Userfault,
};
use farfault::page::{PAGE_SIZE_BYTES, PageIndex};
use farfault::report::{Output, Report};
use farfault::session::StopSignals;
use farfault::session::destination::{ReceiveOptions, receive};
use farfault::session::source::{SendOptions, send};
use farfault::transport::{Listener, TransportOptions};
use farfault::wire::message::{HandoverForm, Strategy};
use hdrhistogram::Histogram;

struct Case {
    name: &'static str,
    link: &'static str,
    queue_bdp: u32,
    threads: u64,
    memory_mib: u64,
}

const fn case(
    name: &'static str,
    link: &'static str,
    queue_bdp: u32,
    threads: u64,
    memory_mib: u64,
) -> Case {
    Case { name, link, queue_bdp, threads, memory_mib }
}

const WAN: &str = "100Mbit,40ms";
const WAN_LOSS: &str = "100Mbit,40ms,1%";
const LAN: &str = "1Gbit,1ms";

const CASES: [Case; 11] = [
    case("wan 10bdp", WAN, 10, 1, 96),
    case("wan loss 1bdp", WAN_LOSS, 1, 1, 96),
    case("wan loss 10bdp", WAN_LOSS, 10, 1, 96),
    case("wan threads 1", WAN, 1, 1, 96),
    case("wan threads 2", WAN, 1, 2, 96),
    case("wan threads 4", WAN, 1, 4, 96),
    case("wan threads 8", WAN, 1, 8, 96),
    case("lan threads 1", LAN, 1, 1, 512),
    case("lan threads 2", LAN, 1, 2, 512),
    case("lan threads 4", LAN, 1, 4, 512),
    case("lan threads 8", LAN, 1, 8, 512),
];

fn main() {
    let word = std::env::args().skip(1).find(|word| !word.starts_with('-')).unwrap_or_default();
    println!(
        "{:<16} {:>7} {:>8} {:>8}  {:>7} {:>7} {:>7}  {:>7} {:>7}  {:>6}",
        "case",
        "threads",
        "faults",
        "faults/s",
        "p50 ms",
        "p99",
        "max",
        "own p50",
        "own p99",
        "goodput"
    );
    for case in CASES.iter().filter(|case| case.name.contains(&word)) {
        measure(case);
    }
}

fn measure(case: &Case) {
    let link: LinkSpec = case.link.parse().expect("a link");
    let seen = Arc::new(Seen::default());
    let source = Reader::new(case, &seen);
    source.fill();
    let destination = Reader::new(case, &seen);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (sent, received) = runtime.block_on(migrate(case, link, source, destination));
    let own = seen.histogram();
    let seconds = received.phases_ms.iter().find(|(name, _)| *name == "postcopy").unwrap().1 / 1e3;
    let payload_bytes: u64 = sent.bytes_by_codec.values().sum();
    let goodput = payload_bytes as f64 * 8.0 / seconds / link.rate.bits_per_s() as f64;
    let latency = received.fault_latency_us.unwrap_or_default();
    let ms = |us: u64| us as f64 / 1e3;
    println!(
        "{:<16} {:>7} {:>8} {:>8.0}  {:>7.2} {:>7.2} {:>7.2}  {:>7.2} {:>7.2}  {:>5.1} %",
        case.name,
        case.threads,
        received.remote_faults,
        received.remote_faults as f64 / seconds,
        ms(latency.p50),
        ms(latency.p99),
        ms(latency.max),
        ms(own.value_at_quantile(0.5)),
        ms(own.value_at_quantile(0.99)),
        goodput * 100.0
    );
}

async fn migrate(
    case: &Case,
    link: LinkSpec,
    source: Reader,
    destination: Reader,
) -> (Report, Report) {
    let transport = TransportOptions {
        mtu_limit_bytes: Some(MAX_DATAGRAM_BYTES),
        ..TransportOptions::default()
    };
    let directory = tempfile::tempdir().unwrap();
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let (listener, mut ticket) = Listener::bind(address, Vec::new(), &transport).unwrap();
    let queue = QueueLimit::Bdp(case.queue_bdp);
    let relay = Relay::with_queue(link, queue, ticket.addresses[0], 1).unwrap();
    ticket.addresses = vec![relay.address()];
    let reconnect_for = Duration::ZERO;
    let options = ReceiveOptions {
        state_dir: directory.path().to_owned(),
        paused: false,
        huge_pages: false,
        reconnect_for,
        page_table: Arc::default(),
        trace: None,
    };
    let migration = ticket.migration.to_string();
    let receiving = tokio::spawn(async move {
        let output = Arc::new(Output::new(true));
        let (guest, signals) = (Box::new(destination), StopSignals::listen().unwrap());
        receive(guest, &listener, &migration, options, signals, output).await.unwrap()
    });
    let options = SendOptions {
        engine: SourceConfig {
            strategy: Strategy::Postcopy,
            handover: HandoverForm::OneFlight,
            policy: SwitchoverPolicy {
                downtime_budget: Duration::from_millis(300),
                max_rounds: None,
            },
            timeouts: SourceTimeouts::default(),
        },
        limits: SentLimits { base_cache_bytes: 0, lines_bytes: 0 },
        encoders: 2,
        codecs: None,
        tracker: TrackerKind::Auto,
        trace: None,
        pusher: PusherKind::Linear,
        state_dir: directory.path().to_owned(),
        quit_source: false,
        reconnect_for,
    };
    let output = Arc::new(Output::new(true));
    let sent = send(Box::new(source), &ticket, &transport, options, output).await.unwrap();
    (sent, receiving.await.unwrap())
}

/// What the threads of the guest saw at the destination.
#[derive(Default)]
struct Seen(Mutex<Vec<u64>>);

impl Seen {
    /// Touches that waited for their page: a local fault takes less.
    const REMOTE_US: u64 = 500;

    fn histogram(&self) -> Histogram<u64> {
        let mut histogram = Histogram::new(3).unwrap();
        for us in self.0.lock().unwrap().iter().filter(|us| **us >= Self::REMOTE_US) {
            histogram.record(*us).unwrap();
        }
        histogram
    }
}

/// The guest.
struct Reader {
    shape: Shape,
    alias: Arc<GuestMemory>,
    ram: Arc<GuestMapping>,
    threads: u64,
    seen: Arc<Seen>,
    running: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Reader {
    fn new(case: &Case, seen: &Arc<Seen>) -> Self {
        let region = RegionLayout { name: "ram".to_owned(), size_bytes: case.memory_mib << 20 };
        let memory = MemoryLayout::new(vec![region]);
        let alias = Arc::new(GuestMemory::create(&memory).unwrap());
        let ram = Arc::new(GuestMapping::new(&alias).unwrap());
        let shape = Shape { monitor: "reader".to_owned(), memory, properties: BTreeMap::new() };
        Reader {
            shape,
            alias,
            ram,
            threads: case.threads,
            seen: seen.clone(),
            running: Vec::new(),
            stop: Arc::default(),
        }
    }

    fn fill(&self) {
        let mut random = fastrand::Rng::with_seed(1);
        let mut bytes = [0; PAGE_SIZE_BYTES];
        for page in (0..self.alias.pages()).map(PageIndex) {
            random.fill(&mut bytes);
            self.alias.write_page(page, &bytes).unwrap();
        }
    }
}

impl SourceGuest for Reader {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        self.alias.clone()
    }

    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Ok(self.ram.tracker(kind, &self.alias)?)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(Vec::new())
    }

    fn has_small_state(&self) -> bool {
        true
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn release(&mut self, _quit: bool) -> Result<(), GuestError> {
        Ok(())
    }
}

impl DestinationGuest for Reader {
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

    fn load_device_state(&mut self, _state: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }

    fn run(&mut self) -> Result<(), GuestError> {
        let slice = self.ram.pages() / self.threads;
        for thread in 0..self.threads {
            let (ram, seen, stop) = (self.ram.clone(), self.seen.clone(), self.stop.clone());
            self.running.push(std::thread::spawn(move || {
                let mut pages: Vec<u64> = (thread * slice..(thread + 1) * slice).collect();
                fastrand::Rng::with_seed(thread).shuffle(&mut pages);
                let mut took_us = Vec::with_capacity(pages.len());
                for page in pages.into_iter().map(PageIndex) {
                    if stop.load(Relaxed) {
                        break;
                    }
                    let begin = Instant::now();
                    ram.page(page)[0].load(Relaxed);
                    took_us.push(begin.elapsed().as_micros() as u64);
                    // Between two faults the guest works: a thread that only touches pages would not leave
                    // the link's emulator its core.
                    std::thread::sleep(Duration::from_micros(100));
                }
                seen.0.lock().unwrap().extend(took_us);
            }));
        }
        Ok(())
    }

    fn release(&mut self) -> Result<(), GuestError> {
        self.discard()
    }

    fn discard(&mut self) -> Result<(), GuestError> {
        self.stop.store(true, Relaxed);
        self.running.drain(..).for_each(|thread| thread.join().unwrap());
        Ok(())
    }
}
