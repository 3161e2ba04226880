//! Whole migrations inside this process: two sessions, a real QUIC link on loopback, built-in guests.

use std::cell::RefCell;
use std::io::Write;
use std::net::Ipv4Addr;
use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::codec::SentLimits;
use crate::codec::ladder::CodecChoice;
use crate::engine::policy::SwitchoverPolicy;
use crate::engine::pusher::PusherKind;
use crate::engine::source::{SourceConfig, SourceTimeouts};
#[cfg(target_arch = "x86_64")]
use crate::guest::kvm::{self, KvmGuest};
use crate::guest::threads::ThreadsGuest;
use crate::guest::workload::{GuestPlan, Pattern, WorkingGuest};
use crate::guest::{DestinationGuest, SharedGuest, SourceGuest};
use crate::lab::relay::Relay;
use crate::lab::replay::{Link, Simulation, from_trace};
use crate::memory::{HostCapabilities, TrackerKind};
use crate::page::{PAGE_SIZE_BYTES, PageIndex, PageRange, PageSet};
use crate::report::{MigrationResult, Output, Report, TraceRecord, read_trace};
use crate::session::StopSignals;
use crate::session::destination::{ReceiveOptions, receive};
use crate::session::source::{SendOptions, send};
use crate::transport::{Connections, Listener, Ticket, TransportOptions};
use crate::wire::message::{HandoverForm, Strategy};

mod bulky;
mod disk;
mod hostile;
mod outages;

/// How a guest is moved.
#[derive(Clone, Copy, Debug)]
struct Method {
    strategy: Strategy,
    handover: HandoverForm,
    tracker: TrackerKind,
    bandwidth_bytes_per_s: Option<u64>,
    pusher: PusherKind,
    traced: bool,
    reconnect_for: Duration,
    /// An emulated link in between; without one it is the loopback interface.
    link: Option<&'static str>,
    limits: SentLimits,
    /// Without any the link decides. Over the loopback interface pages then go as they are, and are not remembered.
    codecs: Option<CodecChoice>,
    connections: Connections,
}

impl Default for Method {
    fn default() -> Self {
        Method {
            strategy: Strategy::Hybrid,
            handover: HandoverForm::OneFlight,
            tracker: TrackerKind::Auto,
            bandwidth_bytes_per_s: None,
            pusher: PusherKind::default(),
            traced: false,
            reconnect_for: Duration::from_secs(30),
            link: None,
            limits: SentLimits { base_cache_bytes: 64 << 20, lines_bytes: 16 << 20 },
            codecs: None,
            connections: Connections::default(),
        }
    }
}

fn transport(method: Method) -> TransportOptions {
    TransportOptions {
        bandwidth_limit_bytes_per_s: method.bandwidth_bytes_per_s,
        keep_alive_ms: 200,
        idle_timeout_ms: 2_000,
        connections: method.connections,
        ..TransportOptions::default()
    }
}

fn plan(pattern: Pattern, rate: u32, mib: u64, workers: u32) -> GuestPlan {
    GuestPlan {
        memory_bytes: mib << 20,
        used_percent: 80,
        workers: workers.try_into().expect("at least one worker"),
        workload: format!("{}:{rate}/s", pattern.name()).parse().expect("a workload"),
    }
}

fn can_serve_faults(test: &str) -> bool {
    let can = HostCapabilities::can_serve_faults();
    if !can {
        // Past the harness's capture.
        let line = format!("\n*** SKIPPED: {test}: this process may not serve page faults ***\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    can
}

struct Moved {
    sent: Report,
    received: Report,
    /// The destination's trace and the source's behind it, where they were asked for.
    trace: Vec<TraceRecord>,
}

async fn send_to(
    source: &SharedGuest,
    ticket: &Ticket,
    method: Method,
    state_dir: &std::path::Path,
) -> Report {
    send_over(source, ticket, method, &transport(method), state_dir).await
}

async fn send_over(
    source: &SharedGuest,
    ticket: &Ticket,
    method: Method,
    transport: &TransportOptions,
    state_dir: &std::path::Path,
) -> Report {
    let options = SendOptions {
        engine: SourceConfig {
            strategy: method.strategy,
            handover: method.handover,
            policy: SwitchoverPolicy {
                downtime_budget: Duration::from_millis(300),
                max_rounds: None,
            },
            timeouts: SourceTimeouts::default(),
        },
        limits: method.limits,
        encoders: 2,
        codecs: method.codecs,
        tracker: method.tracker,
        trace: method.traced.then(|| state_dir.with_file_name("source.trace")),
        pusher: method.pusher,
        state_dir: state_dir.to_owned(),
        quit_source: false,
        reconnect_for: method.reconnect_for,
    };
    let guest = Box::new(source.clone());
    let output = Arc::new(Output::new(false));
    send(guest, ticket, transport, options, output).await.expect("the receiver is there")
}

async fn receive_from(
    destination: SharedGuest,
    listener: Listener,
    ticket: Ticket,
    options: ReceiveOptions,
) -> Report {
    let (guest, output) = (Box::new(destination), Arc::new(Output::new(false)));
    let migration = ticket.migration.to_string();
    let signals = StopSignals::listen().unwrap();
    receive(guest, &listener, &migration, options, signals, output).await.expect("a sender comes")
}

fn receive_options(method: Method, state_dir: &std::path::Path) -> ReceiveOptions {
    ReceiveOptions {
        state_dir: state_dir.to_owned(),
        paused: false,
        reconnect_for: method.reconnect_for,
        page_table: Arc::default(),
        huge_pages: false,
        trace: method.traced.then(|| state_dir.with_file_name("destination.trace")),
    }
}

fn run_both(source: &SharedGuest, destination: &SharedGuest, method: Method) -> Moved {
    let directory = tempfile::tempdir().unwrap();
    let moved = run_both_in(directory.path(), source, destination, method);
    let left: Vec<_> = std::fs::read_dir(directory.path().join("state")).unwrap().collect();
    assert!(left.is_empty(), "journals of a migration that is over: {left:?}");
    moved
}

/// The journals are in `state` of the directory.
fn run_both_in(
    directory: &std::path::Path,
    source: &SharedGuest,
    destination: &SharedGuest,
    method: Method,
) -> Moved {
    let state_dir = directory.join("state");
    std::fs::create_dir(&state_dir).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let (listener, mut ticket) =
            Listener::bind(address, Vec::new(), &transport(method)).unwrap();
        let relay = method.link.map(|link| {
            let relay = Relay::start(link.parse().unwrap(), ticket.addresses[0], 1).unwrap();
            ticket.addresses = vec![relay.address()];
            relay
        });
        let options = receive_options(method, &state_dir);
        let receiving = receive_from(destination.clone(), listener, ticket.clone(), options);
        let receiving = tokio::spawn(receiving);
        let sent = send_to(source, &ticket, method, &state_dir).await;
        let mut trace = Vec::new();
        let received = receiving.await.unwrap();
        drop(relay);
        for side in ["destination", "source"].into_iter().filter(|_| method.traced) {
            let text = std::fs::read(directory.join(format!("{side}.trace"))).unwrap();
            trace.extend(read_trace(&text[..]).unwrap());
        }
        Moved { sent, received, trace }
    })
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn work_for_a_while(guest: &SharedGuest) {
    let ops = guest.lock().status().ops;
    wait_until("the guest to work", || guest.lock().status().ops > ops + 10);
}

fn expect_whole(guest: &SharedGuest) {
    let before = guest.lock().status().pages_verified;
    guest.lock().verify_all();
    wait_until("the guest to check its pages", || {
        let guest = guest.lock();
        assert_eq!(guest.failure(), None);
        guest.still_to_verify() == 0
    });
    let status = guest.lock().status();
    assert_eq!((status.wrong_pages, status.pages_verified > before), (0, true), "{status:?}");
}

/// Moves a guest while it works, and has it check itself where it has come to.
fn moves_whole(
    boot: impl Fn(&GuestPlan) -> Box<dyn WorkingGuest>,
    await_arrival: impl Fn(&GuestPlan) -> Box<dyn WorkingGuest>,
    plan: &GuestPlan,
    method: Method,
) -> Moved {
    let mut source = SharedGuest::new(boot(plan));
    source.resume().unwrap();
    let destination = SharedGuest::new(await_arrival(plan));
    if plan.workload.pattern != Pattern::Idle {
        work_for_a_while(&source);
    }
    let moved = run_both(&source, &destination, method);
    assert_eq!(moved.sent.result, MigrationResult::Migrated, "{method:?}");
    assert_eq!(moved.received.result, MigrationResult::Migrated, "{method:?}");
    if plan.workload.pattern != Pattern::Idle {
        work_for_a_while(&destination);
    }
    expect_whole(&destination);
    let stopped = source.lock().status().ops;
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(source.lock().status().ops, stopped, "the guest must not run at both places");
    moved
}

fn threads(plan: &GuestPlan) -> Box<dyn WorkingGuest> {
    Box::new(ThreadsGuest::boot(plan).unwrap())
}

fn waiting_threads(plan: &GuestPlan) -> Box<dyn WorkingGuest> {
    Box::new(ThreadsGuest::await_arrival(plan).unwrap())
}

type MakeGuest = fn(&GuestPlan) -> Box<dyn WorkingGuest>;

/// How KVM guests are booted and awaited; `None`, loudly, without KVM.
#[cfg(target_arch = "x86_64")]
fn kvm_guests(test: &str) -> Option<(MakeGuest, MakeGuest)> {
    if let Err(error) = kvm::available() {
        let line = format!("\n*** SKIPPED: {test}: {error} ***\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        return None;
    }
    Some((
        |plan| Box::new(KvmGuest::boot(plan).unwrap()),
        |plan| Box::new(KvmGuest::await_arrival(plan).unwrap()),
    ))
}

#[test]
fn a_guest_of_threads_moves_whole_under_every_workload() {
    if !can_serve_faults("moves under every workload") {
        return;
    }
    for pattern in Pattern::ALL {
        moves_whole(threads, waiting_threads, &plan(pattern, 20_000, 32, 2), Method::default());
    }
}

#[test]
fn a_guest_moves_whole_by_several_connections() {
    if !can_serve_faults("moves by several connections") {
        return;
    }
    let connections = Connections::Exactly(NonZero::new(4).unwrap());
    for strategy in [Strategy::Hybrid, Strategy::Postcopy] {
        // Not so fast that it is over before they are there.
        let bandwidth_bytes_per_s = Some(64 << 20);
        let method = Method { strategy, connections, bandwidth_bytes_per_s, ..Method::default() };
        let plan = plan(Pattern::Sparse, 20_000, 64, 2);
        let Moved { sent, received, .. } = moves_whole(threads, waiting_threads, &plan, method);
        assert_eq!([sent.connections, received.connections], [4, 4]);
    }
}

/// Pages by what they went as, from the names of the codecs.
fn pages_as(report: &Report, prefix: &str) -> u64 {
    let pages = report.pages_by_codec.iter().filter(|(codec, _)| codec.starts_with(prefix));
    pages.map(|(_, pages)| pages).sum()
}

#[test]
fn a_guest_moves_whole_when_nearly_all_that_is_remembered_of_its_pages_is_fingerprints() {
    if !can_serve_faults("moves by lines") {
        return;
    }
    let plan = plan(Pattern::Sparse, 20_000, 32, 2);
    let limits = SentLimits { base_cache_bytes: 1 << 20, lines_bytes: 16 << 20 };
    for strategy in [Strategy::Hybrid, Strategy::Precopy] {
        let bandwidth_bytes_per_s = Some(16 << 20);
        let method = Method { strategy, limits, bandwidth_bytes_per_s, ..Method::default() };
        let Moved { sent, .. } = moves_whole(threads, waiting_threads, &plan, method);
        assert!(pages_as(&sent, "lines") > 100, "{:?}", sent.pages_by_codec);
        let account = sent.account.unwrap();
        assert!(account.base_cache_bytes < 2 << 20, "{account:?}");
    }
}

#[test]
fn a_guest_full_of_duplicates_moves_whole_and_sends_most_of_them_as_copies() {
    if !can_serve_faults("moves duplicates") {
        return;
    }
    let plan = plan(Pattern::Sparse, 5_000, 32, 2);
    let duplicate = |page: PageIndex| [(page.0 % 7 + 1) as u8; PAGE_SIZE_BYTES];
    for strategy in [Strategy::Hybrid, Strategy::Postcopy] {
        let (unused, arrived) = (RefCell::new(PageSet::empty(0)), RefCell::new(None));
        let boot = |plan: &GuestPlan| -> Box<dyn WorkingGuest> {
            let guest = ThreadsGuest::boot(plan).unwrap();
            let memory = SourceGuest::memory(&guest);
            let mut holes = PageSet::full(memory.pages());
            holes.subtract(&memory.populated(PageRange::new(0, memory.pages())).unwrap());
            holes.iter().for_each(|page| memory.write_page(page, &duplicate(page)).unwrap());
            unused.replace(holes);
            Box::new(guest)
        };
        let await_arrival = |plan: &GuestPlan| -> Box<dyn WorkingGuest> {
            let guest = ThreadsGuest::await_arrival(plan).unwrap();
            arrived.replace(Some(DestinationGuest::memory(&guest)));
            Box::new(guest)
        };
        let codecs = Some(CodecChoice::default());
        let method = Method { strategy, codecs, ..Method::default() };
        let Moved { sent, .. } = moves_whole(boot, await_arrival, &plan, method);
        let (unused, memory) = (unused.into_inner(), arrived.into_inner().unwrap());
        let mut bytes = [0; PAGE_SIZE_BYTES];
        for page in unused.iter() {
            memory.read_page(page, &mut bytes);
            assert!(bytes == duplicate(page), "{page:?} is not what it was");
        }
        let (copies, duplicates) = (pages_as(&sent, "copy"), unused.len());
        assert!(duplicates > 1000, "{duplicates}");
        match strategy {
            // A batch does not know its own pages yet, nor what another thread is about to send.
            Strategy::Hybrid => assert!(copies > duplicates / 2, "{copies} of {duplicates}"),
            _ => assert_eq!(copies, 0, "nothing is certain to be there"),
        }
    }
}

#[test]
fn a_guest_of_threads_moves_whole_by_every_strategy_and_handover() {
    if !can_serve_faults("moves by every strategy") {
        return;
    }
    let plan = plan(Pattern::Sparse, 5_000, 32, 2);
    for strategy in [Strategy::Hybrid, Strategy::Precopy, Strategy::Postcopy] {
        for handover in [HandoverForm::OneFlight, HandoverForm::Strict] {
            let method = Method { strategy, handover, ..Method::default() };
            let moved = moves_whole(threads, waiting_threads, &plan, method);
            assert_eq!(moved.sent.precopy_rounds == 0, strategy == Strategy::Postcopy);
        }
    }
}

#[test]
fn a_guest_of_threads_moves_whole_in_whatever_order_its_pages_come() {
    if !can_serve_faults("moves in every order") {
        return;
    }
    let plan = plan(Pattern::HotCold, 20_000, 16, 3);
    for pusher in PusherKind::ALL {
        // Slow enough for the guest to miss pages.
        let method = Method {
            strategy: Strategy::Postcopy,
            pusher,
            bandwidth_bytes_per_s: Some(8 << 20),
            ..Method::default()
        };
        let Moved { sent, received, .. } = moves_whole(threads, waiting_threads, &plan, method);
        let (push, faults) = (sent.push.unwrap(), received.faults.unwrap());
        assert_eq!(push.policy, pusher.name());
        let behind_faults = push.bundled_pages + sent.remote_faults;
        let pages = sent.remaining_pages_at_freeze;
        assert!(push.pushed_pages + push.bundled_pages <= pages, "each page once: {push:?}");
        assert!(push.pushed_pages + behind_faults >= pages, "{push:?} of {pages}");
        assert!(faults.stale_pages == 0 && faults.absent_pages > 0, "{faults:?}");
        assert!(faults.stall_sum_ms >= faults.stall_longest_ms, "{faults:?}");
    }
}

#[test]
fn a_guest_that_reads_on_and_on_waits_for_few_of_its_pages() {
    if !can_serve_faults("a sequential reader") {
        return;
    }
    let plan = plan(Pattern::SequentialRead, 200_000, 64, 1);
    let method =
        Method { strategy: Strategy::Postcopy, link: Some("100Mbit,40ms"), ..Method::default() };
    let Moved { sent, received, .. } = moves_whole(threads, waiting_threads, &plan, method);
    let push = sent.push.unwrap();
    assert!(push.bundled_pages > 0 && push.useful_bundles > push.useless_bundles, "{push:?}");
    let (faults, pages) = (received.remote_faults, received.remaining_pages_at_freeze);
    // Most of these wait for what is on its way; each message that arrives may bring one.
    assert!(faults * 12 <= pages, "{faults} of {pages} pages were waited for: {push:?}");
}

#[test]
fn a_move_that_was_traced_can_be_replayed() {
    if !can_serve_faults("a move that is traced") {
        return;
    }
    let plan = plan(Pattern::Sparse, 20_000, 16, 3);
    for (strategy, bandwidth_bytes_per_s) in
        [(Strategy::Postcopy, Some(8 << 20)), (Strategy::Hybrid, None)]
    {
        let method = Method { strategy, bandwidth_bytes_per_s, traced: true, ..Method::default() };
        let moved = moves_whole(threads, waiting_threads, &plan, method);
        let has_dirty =
            moved.trace.iter().any(|record| matches!(record, TraceRecord::Dirty { .. }));
        assert_eq!(has_dirty, strategy == Strategy::Hybrid);
        if strategy == Strategy::Hybrid {
            continue;
        }
        let touches = from_trace(&moved.trace).unwrap();
        assert_eq!(touches.need.len(), moved.received.remaining_pages_at_freeze);
        assert!(touches.threads.len() >= 3, "{} threads", touches.threads.len());
        let pages: usize = touches.threads.iter().map(Vec::len).sum();
        let faults = moved.received.remote_faults + moved.received.local_faults;
        assert!(pages as u64 <= faults && pages > 100, "{pages} touches, {faults} faults");
        let link = Link {
            rate_bytes_per_s: 8 << 20,
            round_trip: Duration::from_millis(1),
            page_bytes: 2000,
        };
        let outcome = Simulation::new(&touches, link, PusherKind::Linear).run();
        assert!(outcome.waits > 0 && outcome.waits <= pages as u64, "{outcome:?}");
    }
}

#[test]
fn a_guest_of_threads_moves_whole_with_every_tracker() {
    if !can_serve_faults("moves with every tracker") {
        return;
    }
    let plan = plan(Pattern::HotCold, 20_000, 32, 2);
    for tracker in [TrackerKind::WriteProtect, TrackerKind::HashScan] {
        let method = Method { tracker, ..Method::default() };
        let moved = moves_whole(threads, waiting_threads, &plan, method);
        assert_eq!(moved.sent.tracker.map(|name| name.to_string()), Some(tracker.to_string()));
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_kvm_guest_moves_whole_by_every_strategy_under_both_kinds_of_tracking() {
    let Some((boot, arrive)) = kvm_guests("moves of KVM guests") else { return };
    let vcpus = [1, 2, 2];
    let strategies = [Strategy::Hybrid, Strategy::Precopy, Strategy::Postcopy];
    for (strategy, vcpus) in strategies.into_iter().zip(vcpus) {
        for tracker in [TrackerKind::Auto, TrackerKind::WriteProtect] {
            // Small and slow, since KVM may be emulated.
            let plan = plan(Pattern::Sparse, 200, 4, vcpus);
            moves_whole(boot, arrive, &plan, Method { strategy, tracker, ..Method::default() });
        }
    }
}

/// The destination's process ends without a word while the guest's pages cross a slow link.
fn survives_the_destinations_death(
    boot: impl Fn(&GuestPlan) -> Box<dyn WorkingGuest>,
    await_arrival: impl Fn(&GuestPlan) -> Box<dyn WorkingGuest>,
    plan: &GuestPlan,
    method: Method,
) {
    let mut source = SharedGuest::new(boot(plan));
    source.resume().unwrap();
    let destination = SharedGuest::new(await_arrival(plan));
    let directory = tempfile::tempdir().unwrap();
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (doomed, own) = (runtime(), runtime());
    let (listener, ticket) = {
        let _inside = doomed.enter();
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        Listener::bind(address, Vec::new(), &transport(method)).unwrap()
    };
    let method = Method { reconnect_for: Duration::from_secs(1), ..method };
    let options = receive_options(method, directory.path());
    doomed.spawn(receive_from(destination.clone(), listener, ticket.clone(), options));
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1500));
        doomed.shutdown_background();
    });
    let report = own.block_on(send_to(&source, &ticket, method, directory.path()));
    killer.join().unwrap();
    // The guest has ended with its process: there is nothing to leave to a successor.
    let pages = format!("/dev/shm/farfault-{}.destination.pages", ticket.migration);
    assert!(!std::path::Path::new(&pages).exists(), "{pages} is left");
    assert_eq!(report.result, MigrationResult::Stayed);
    work_for_a_while(&source);
    expect_whole(&source);
    // And it can still be moved.
    let another = SharedGuest::new(await_arrival(plan));
    let unhurried = Method { bandwidth_bytes_per_s: None, ..method };
    let moved = run_both(&source, &another, unhurried);
    assert_eq!(moved.sent.result, MigrationResult::Migrated);
    expect_whole(&another);
}

#[test]
fn a_destination_that_dies_in_precopy_leaves_the_guest_running_and_whole() {
    if !can_serve_faults("a destination that dies") {
        return;
    }
    let plan = plan(Pattern::Sparse, 20_000, 64, 2);
    for tracker in [TrackerKind::WriteProtect, TrackerKind::HashScan] {
        let method = Method { tracker, bandwidth_bytes_per_s: Some(1 << 20), ..Method::default() };
        survives_the_destinations_death(threads, waiting_threads, &plan, method);
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_destination_that_dies_in_precopy_leaves_a_kvm_guest_running_and_whole() {
    let Some((boot, arrive)) = kvm_guests("a KVM guest's destination that dies") else { return };
    for tracker in [TrackerKind::Auto, TrackerKind::WriteProtect] {
        let plan = plan(Pattern::Sparse, 200, 4, 2);
        let bandwidth_bytes_per_s = Some(200 << 10);
        let method = Method { tracker, bandwidth_bytes_per_s, ..Method::default() };
        survives_the_destinations_death(boot, arrive, &plan, method);
    }
}
