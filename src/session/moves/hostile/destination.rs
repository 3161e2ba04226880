//! A destination that lies. Before the decision the guest runs on at the source, whatever was said; after it
//! the source never runs it again on the word of one who has said that it runs there.

use super::*;
use crate::page::{PageIndex, PageSet, Version};
use crate::wire::message::{
    DestinationStage, FaultRequest, Lacking, MAX_REQUEST_PAGES, PackedSet, Wanted,
};

/// How long the source waits here for anything.
const PATIENCE: Duration = Duration::from_millis(1500);

/// A move to a liar: what came of it, and the guest.
struct Sent {
    report: Report,
    guest: SharedGuest,
}

fn send_options(strategy: Strategy, state_dir: &std::path::Path) -> SendOptions {
    let timeouts =
        SourceTimeouts { prepare: PATIENCE, round: PATIENCE, load: PATIENCE, commit: PATIENCE };
    let policy = SwitchoverPolicy { downtime_budget: Duration::from_millis(300), max_rounds: None };
    SendOptions {
        engine: SourceConfig { strategy, handover: HandoverForm::OneFlight, policy, timeouts },
        limits: SentLimits { base_cache_bytes: 1 << 20, lines_bytes: 0 },
        encoders: 2,
        codecs: None,
        tracker: TrackerKind::Auto,
        trace: None,
        pusher: PusherKind::default(),
        state_dir: state_dir.to_owned(),
        quit_source: false,
        reconnect_for: Duration::ZERO,
    }
}

/// Sends a guest at work to a destination that does `lie`.
fn send_to_liar(strategy: Strategy, lie: impl AsyncFnOnce(Wire)) -> Sent {
    let guest = SharedGuest::new(threads(&small_plan()));
    guest.clone().resume().unwrap();
    work_for_a_while(&guest);
    let directory = tempfile::tempdir().unwrap();
    let report = runtime().block_on(async {
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let transport = TransportOptions::default();
        let (listener, ticket) = Listener::bind(address, Vec::new(), &transport).unwrap();
        let moving = Box::new(guest.clone());
        let send_options = send_options(strategy, directory.path());
        let output = Arc::new(Output::new(false));
        let sending = send(moving, &ticket, &transport, send_options, output);
        let lying = async {
            let link = listener.accept(None).await.unwrap();
            lie(link.clone()).await;
            link
        };
        // The liar's end of the link stays open, so that the source ends by itself.
        let (report, _link) = tokio::join!(sending, lying);
        report.unwrap()
    });
    Sent { report, guest }
}

impl Sent {
    /// The guest runs on at the source as if nothing had been.
    fn stays(&self) {
        assert_eq!(self.report.result, MigrationResult::Stayed);
        work_for_a_while(&self.guest);
        expect_whole(&self.guest);
    }

    fn stands_still(&self) {
        let ops = self.guest.lock().status().ops;
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(self.guest.lock().status().ops, ops, "it may run at the destination");
    }
}

/// Tells what a source says when it gives up.
async fn aborted(link: &Wire) -> String {
    loop {
        match hear(link).await {
            Ok(ToDestination::Abort { reason }) => return reason,
            Ok(_) => continue,
            Err(error) => panic!("the source ended without a word: {error}"),
        }
    }
}

/// Takes pages and throws them away, until the link ends.
fn swallow(link: &Wire) {
    for lane in [Lane::Push, Lane::FaultReply, Lane::Bundle] {
        let link = link.clone();
        tokio::spawn(async move { while link.recv(lane).await.is_ok() {} });
    }
}

/// Says that all is well until this is said; gives it.
async fn agree_until(link: &Wire, wanted: impl Fn(&ToDestination) -> bool) -> ToDestination {
    loop {
        let heard = hear::<ToDestination>(link).await.expect("the source goes on");
        if wanted(&heard) {
            return heard;
        }
        match heard {
            ToDestination::Hello { .. } => say(link, &ToSource::Prepared).await,
            ToDestination::RoundEnd { round, .. } => {
                say(link, &ToSource::RoundAck { round, rejected: Vec::new() }).await;
            }
            _ => {}
        }
    }
}

#[test]
fn whatever_is_said_out_of_turn_the_guest_runs_on_at_the_source() {
    if !can_serve_faults("a destination that speaks out of turn") {
        return;
    }
    let refused = DestinationStage::Refused { reason: "no".to_owned(), hint: None };
    let cases = [
        ToSource::Running,
        ToSource::Ready,
        ToSource::Done,
        ToSource::RoundAck { round: Version(9), rejected: Vec::new() },
        ToSource::Resync { at: DestinationStage::Done, running_us: Some(u64::MAX) },
        ToSource::Resync { at: refused, running_us: None },
        ToSource::Refused { reason: "\u{1b}[2J".repeat(1000), hint: None },
    ];
    for message in cases {
        send_to_liar(Strategy::Hybrid, async |link| {
            swallow(&link);
            say(&link, &message).await;
            if !matches!(message, ToSource::Refused { .. }) {
                assert!(aborted(&link).await.contains("destination said"));
            }
        })
        .stays();
    }
}

#[test]
fn bytes_that_are_no_message_end_the_migration_and_not_the_guest() {
    if !can_serve_faults("a destination that babbles") {
        return;
    }
    send_to_liar(Strategy::Hybrid, async |link| {
        link.control_send(Bytes::from_static(&[0xff; 1000])).await.unwrap();
        assert!(aborted(&link).await.contains("malformed"));
    })
    .stays();
}

#[test]
fn a_destination_that_acknowledges_nothing_is_given_up_in_time() {
    if !can_serve_faults("a destination that acknowledges nothing") {
        return;
    }
    send_to_liar(Strategy::Hybrid, async |link| {
        swallow(&link);
        say(&link, &ToSource::Prepared).await;
        assert!(aborted(&link).await.contains("did not acknowledge a pre-copy round in time"));
    })
    .stays();
}

#[test]
fn pages_that_no_guest_has_may_be_rejected_and_asked_for_in_vain() {
    if !can_serve_faults("a destination that names pages beyond the guest") {
        return;
    }
    let sent = send_to_liar(Strategy::Hybrid, async |link| {
        swallow(&link);
        let beyond = |nth: u64| PageIndex(u64::MAX - nth);
        let is_first = |heard: &ToDestination| matches!(heard, ToDestination::RoundEnd { .. });
        agree_until(&link, is_first).await;
        let rejected = (0..4000).map(beyond).collect();
        say(&link, &ToSource::RoundAck { round: Version(1), rejected }).await;
        agree_until(&link, |heard| *heard == ToDestination::Commit).await;
        say(&link, &ToSource::Running).await;
        for nth in 0..200 {
            let wanted = |page| Wanted { page, thread: nth };
            let pages = (0..MAX_REQUEST_PAGES as u64).map(|n| wanted(beyond(n * u64::from(nth))));
            let request = FaultRequest { pages: pages.collect(), whole: nth % 2 == 0 };
            link.send(Lane::FaultRequest, encode(&request).into()).await.unwrap();
        }
        say(&link, &ToSource::Done).await;
        agree_until(&link, |heard| matches!(heard, ToDestination::Bye { .. })).await;
    });
    assert_eq!(sent.report.result, MigrationResult::Migrated);
    assert_eq!(sent.report.remote_faults, 0, "for none of these pages");
    sent.stands_still();
}

#[test]
fn a_refusal_by_one_who_said_that_it_runs_there_does_not_run_it_here() {
    if !can_serve_faults("a destination that refuses what runs there") {
        return;
    }
    let sent = send_to_liar(Strategy::Postcopy, async |link| {
        swallow(&link);
        agree_until(&link, |heard| *heard == ToDestination::Commit).await;
        say(&link, &ToSource::Running).await;
        say(&link, &ToSource::Refused { reason: "no".to_owned(), hint: None }).await;
        link.ended().await;
    });
    assert_eq!(sent.report.result, MigrationResult::LostPages);
    sent.stands_still();
}

#[test]
fn requests_that_are_none_end_the_migration_in_postcopy() {
    if !can_serve_faults("a destination that asks for too much") {
        return;
    }
    let wanted = Wanted { page: PageIndex(1), thread: 0 };
    let too_many = FaultRequest { pages: vec![wanted; MAX_REQUEST_PAGES + 1], whole: false };
    for request in [encode(&too_many), vec![0xff; 100]] {
        let sent = send_to_liar(Strategy::Postcopy, async |link| {
            swallow(&link);
            agree_until(&link, |heard| *heard == ToDestination::Commit).await;
            say(&link, &ToSource::Running).await;
            // On another stream the request could be there first, and leave the source in doubt.
            tokio::time::sleep(Duration::from_millis(500)).await;
            link.send(Lane::FaultRequest, request.into()).await.unwrap();
            link.ended().await;
        });
        assert_eq!(sent.report.result, MigrationResult::LostPages);
        sent.stands_still();
    }
}

#[test]
fn what_is_said_out_of_turn_after_the_decision_leaves_the_guest_stopped_and_in_doubt() {
    if !can_serve_faults("a destination that lies after the decision") {
        return;
    }
    let absurd = PackedSet::pack(&PageSet::full(1 << 20));
    let lacking = Lacking { missing: absurd.clone(), without_base: absurd };
    let running = DestinationStage::Running { lacking };
    for message in [ToSource::Done, ToSource::Resync { at: running, running_us: None }] {
        let sent = send_to_liar(Strategy::Postcopy, async |link| {
            swallow(&link);
            agree_until(&link, |heard| *heard == ToDestination::Commit).await;
            say(&link, &message).await;
            link.ended().await;
        });
        assert_eq!(sent.report.result, MigrationResult::InDoubt);
        sent.stands_still();
    }
}
