//! Migrations over a link that is cut for longer than QUIC waits.

use super::*;
use crate::lab::relay::Relay;
use crate::memory::{PageTable, StageCounts};

/// QUIC gives a silent link up after this.
const IDLE: Duration = Duration::from_millis(1200);
const OUTAGE: Duration = Duration::from_millis(1800);

/// When the link is cut.
type Moment = fn(&StageCounts) -> bool;

/// In the middle of pre-copy.
const PRECOPY: Moment = |counts| counts.stale > 1000 && counts.current + counts.mapped == 0;
/// In the middle of a later round, or as soon as the flight has come.
const LATER: Moment = |counts| counts.absent == 0;
/// As soon as the flight has come: the decision may have been made or not.
const SWITCHOVER: Moment = |counts| counts.current + counts.mapped > 0;
/// While the guest runs at the destination and lacks pages.
const POSTCOPY: Moment = |counts| counts.mapped > 500 && counts.absent + counts.stale > 1000;

/// Moves a guest while its link is cut at each of `moments` in turn.
fn moves_in_spite_of(moments: &[Moment], plan: &GuestPlan, method: Method) -> Moved {
    let mut source = SharedGuest::new(threads(plan));
    source.resume().unwrap();
    let destination = SharedGuest::new(waiting_threads(plan));
    work_for_a_while(&source);
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let options = TransportOptions {
        idle_timeout_ms: IDLE.as_millis() as u64,
        keep_alive_ms: 100,
        ..transport(method)
    };
    let (listener, mut ticket) = {
        let _inside = runtime.enter();
        Listener::bind((Ipv4Addr::LOCALHOST, 0).into(), Vec::new(), &options).unwrap()
    };
    let link = "32Mbit,4ms".parse().unwrap();
    let relay = Relay::start(link, ticket.addresses[0], 1).unwrap();
    ticket.addresses = vec![relay.address()];
    let receive_options = receive_options(method, directory.path());
    let table = receive_options.page_table.clone();
    let receiving = receive_from(destination.clone(), listener, ticket.clone(), receive_options);
    let receiving = runtime.spawn(receiving);
    let sent = std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            runtime.block_on(send_over(&source, &ticket, method, &options, directory.path()))
        });
        for moment in moments {
            let is_due = |table: &Arc<PageTable>| moment(&table.counts());
            while !table.get().is_some_and(is_due) && !sending.is_finished() {
                std::thread::sleep(Duration::from_millis(1));
            }
            relay.cut(true);
            std::thread::sleep(OUTAGE);
            relay.cut(false);
        }
        sending.join().unwrap()
    });
    let received = runtime.block_on(receiving).unwrap();
    let moved = Moved { sent, received, trace: Vec::new() };
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert!(left.is_empty(), "journals of a migration that is over: {left:?}");
    let (here, there) = (moved.sent.result, moved.received.result);
    let lives = match (here, there) {
        (MigrationResult::Migrated, MigrationResult::Migrated) => &destination,
        (MigrationResult::Stayed, MigrationResult::Refused) => &source,
        other => panic!("{other:?}"),
    };
    work_for_a_while(lives);
    expect_whole(lives);
    moved
}

fn slow(strategy: Strategy, handover: HandoverForm) -> Method {
    Method { strategy, handover, ..Method::default() }
}

#[test]
fn a_link_that_is_cut_in_pre_copy_is_mended_and_the_guest_moves_whole() {
    if !can_serve_faults("a link that is cut in pre-copy") {
        return;
    }
    let plan = plan(Pattern::Sparse, 2_000, 16, 2);
    for (strategy, handover) in
        [(Strategy::Hybrid, HandoverForm::OneFlight), (Strategy::Precopy, HandoverForm::Strict)]
    {
        let moved = moves_in_spite_of(&[PRECOPY], &plan, slow(strategy, handover));
        assert_eq!(moved.sent.result, MigrationResult::Migrated);
        assert!(moved.sent.reconnects >= 1 && moved.received.reconnects >= 1);
    }
}

#[test]
fn a_link_that_is_cut_again_and_again_in_post_copy_loses_no_page() {
    if !can_serve_faults("a link that is cut in post-copy") {
        return;
    }
    let plan = plan(Pattern::Sparse, 2_000, 24, 2);
    for handover in [HandoverForm::OneFlight, HandoverForm::Strict] {
        let method = slow(Strategy::Postcopy, handover);
        let moved = moves_in_spite_of(&[POSTCOPY, POSTCOPY], &plan, method);
        assert_eq!(moved.sent.result, MigrationResult::Migrated);
        assert!(moved.sent.reconnects >= 1 && moved.received.reconnects >= 1);
    }
}

#[test]
fn a_link_that_is_cut_around_the_switchover_leaves_the_guest_whole_at_one_place() {
    if !can_serve_faults("a link that is cut around the switchover") {
        return;
    }
    let plan = plan(Pattern::HotCold, 5_000, 8, 2);
    for strategy in [Strategy::Hybrid, Strategy::Precopy, Strategy::Postcopy] {
        for handover in [HandoverForm::OneFlight, HandoverForm::Strict] {
            let first = if strategy == Strategy::Postcopy { SWITCHOVER } else { LATER };
            moves_in_spite_of(&[first, SWITCHOVER], &plan, slow(strategy, handover));
        }
    }
}
