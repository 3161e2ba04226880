//! A source that lies. What it moves is its own guest; the receiver must refuse it, say why to both, and end.

use std::future::Future;
use std::path::PathBuf;

use super::*;
use crate::codec::Kin;
use crate::page::{PAGE_SIZE_BYTES, PageIndex, PageSet, Version};
use crate::wire::message::{Flight, PROTOCOL, PackedSet, RunWhen, SourceStage};
use crate::wire::state::PackedState;
use crate::wire::{FrameEncoder, PageToSend};

/// Pages of the guest that is announced.
fn pages() -> u64 {
    small_plan().memory_layout().pages()
}

fn hello() -> ToDestination {
    let guest = waiting_threads(&small_plan());
    let shape = Box::new(SourceGuest::shape(&*guest).clone());
    let strategy = Strategy::Hybrid;
    ToDestination::Hello { protocol: PROTOCOL, shape, strategy, runs: true }
}

/// A message of one page.
fn page_message(version: Version, page: PageIndex) -> Bytes {
    let bytes = [7; PAGE_SIZE_BYTES];
    let mut out = Vec::new();
    FrameEncoder::default().encode(
        version,
        &[PageToSend { page, bytes: &bytes, base: None }],
        &Kin::default(),
        &mut out,
    );
    out.into()
}

fn flight(version: Version, need: &PageSet, zero: &PageSet) -> Bytes {
    flight_of(b"no device has this state", version, need, zero)
}

fn flight_of(device_state: &[u8], version: Version, need: &PageSet, zero: &PageSet) -> Bytes {
    let device_state = PackedState::pack(device_state, None);
    let (need, zero) = (PackedSet::pack(need), PackedSet::pack(zero));
    encode(&Flight { final_version: version, need, zero, device_state }).into()
}

fn offer(version: Version) -> ToDestination {
    ToDestination::Offer { final_version: version, run_when: RunWhen::Loaded }
}

/// Receives from a source that does `lie`, which is also told the receiver's directory. Gives the report, and what
/// the receiver has left behind.
fn receive_lies<F: Future<Output = ()>>(
    lie: impl FnOnce(Wire, PathBuf) -> F,
) -> (Report, Vec<PathBuf>) {
    let guest = SharedGuest::new(waiting_threads(&small_plan()));
    let directory = tempfile::tempdir().unwrap();
    let options = TransportOptions::default();
    let report = runtime().block_on(async {
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let (listener, ticket) = Listener::bind(address, Vec::new(), &options).unwrap();
        let method = Method { reconnect_for: Duration::ZERO, ..Method::default() };
        let receive_options = receive_options(method, directory.path());
        let own = directory.path().join(format!("{}.destination", ticket.migration));
        let receiving = receive_from(guest, listener, ticket.clone(), receive_options);
        let receiving = tokio::spawn(receiving);
        let link = connect(&ticket, &options).await.unwrap();
        lie(link.clone(), own).await;
        receiving.await.unwrap()
    });
    let left = std::fs::read_dir(directory.path()).unwrap();
    (report, left.map(|entry| entry.unwrap().path()).collect())
}

/// The same. Whatever the lie was, the receiver ends without a guest and leaves nothing behind.
fn refuse<F: Future<Output = ()>>(lie: impl FnOnce(Wire, PathBuf) -> F) {
    let (report, left) = receive_lies(lie);
    assert_eq!(report.result, MigrationResult::Refused);
    assert!(left.is_empty(), "{left:?}");
}

/// The same, with a `lie` after an honest beginning; gives the reason that the source is told.
fn refused<F: Future<Output = ()>>(lie: impl FnOnce(Wire, PathBuf) -> F) -> String {
    let mut told = None;
    refuse(async |link, directory| {
        say(&link, &hello()).await;
        assert_eq!(hear(&link).await, Ok(ToSource::Prepared));
        lie(link.clone(), directory).await;
        while let Ok(message) = hear(&link).await {
            if let ToSource::Refused { reason, .. } = message {
                told = Some(reason);
            }
        }
    });
    told.expect("a source that is refused is told why")
}

#[test]
fn pages_that_are_no_pages_are_refused() {
    if !can_serve_faults("a source that lies about pages") {
        return;
    }
    let beyond = PageIndex(pages());
    let truncated = page_message(Version(1), PageIndex(3)).slice(..20);
    let cases: [(Bytes, &str); 5] = [
        (Bytes::from_static(b"these are no frames"), "frame"),
        (truncated, "frame"),
        (page_message(Version(1), beyond), "guest"),
        (page_message(Version(2), PageIndex(3)), "out of turn"),
        (Bytes::new(), "empty"),
    ];
    for (message, word) in cases {
        let told = refused(async |link, _| {
            let _ = link.push(message).await;
        });
        assert!(told.contains(word), "{told}");
    }
}

#[test]
fn what_is_said_out_of_turn_is_refused() {
    if !can_serve_faults("a source that speaks out of turn") {
        return;
    }
    let cases = [
        hello(),
        ToDestination::Commit,
        ToDestination::Bye { downtime_us: Some(u64::MAX) },
        ToDestination::Resync { at: SourceStage::Decided },
        ToDestination::RoundEnd { round: Version(7), messages: 0 },
        ToDestination::RoundEnd { round: Version(u16::MAX), messages: u64::MAX },
        offer(Version::NONE),
        offer(Version(9)),
        offer(Version(u16::MAX)),
    ];
    for message in cases {
        let told = refused(async |link, _| {
            if let ToDestination::Offer { final_version, .. } = &message {
                let none = PageSet::empty(pages());
                let _ = link.send(Lane::State, flight(*final_version, &none, &none)).await;
            }
            say(&link, &message).await;
        });
        assert!(told.contains("the source"), "{told}");
    }
}

#[test]
fn a_flight_that_is_none_is_refused() {
    if !can_serve_faults("a source whose flight lies") {
        return;
    }
    let (none, all) = (PageSet::empty(pages()), PageSet::full(pages()));
    let other = PageSet::full(pages() + 64);
    let last = Version(1);
    let cases: [(Bytes, &str); 5] = [
        (flight(Version(2), &all, &none), "not the one that was offered"),
        (flight(last, &all, &all), "both"),
        // Of these nothing has come, and nothing is to come.
        (flight(last, &none, &none), "page"),
        (flight(last, &other, &none), "a page set that is not of"),
        (Bytes::from_static(&[0xff; 300]), "malformed"),
    ];
    for (flight, word) in cases {
        let told = refused(async |link, _| {
            say(&link, &offer(last)).await;
            let _ = link.send(Lane::State, flight).await;
        });
        assert!(told.contains(word), "{told}");
    }
}

#[test]
fn a_device_state_that_no_device_has_is_refused_also_after_the_decision() {
    if !can_serve_faults("a source whose device state lies") {
        return;
    }
    let told = refused(async |link, _| {
        let (none, all) = (PageSet::empty(pages()), PageSet::full(pages()));
        say(&link, &offer(Version(1))).await;
        let _ = link.send(Lane::State, flight(Version(1), &all, &none)).await;
        say(&link, &ToDestination::Commit).await;
    });
    assert!(told.contains("device state"), "{told}");
}

#[test]
fn rounds_without_end_come_to_an_end() {
    if !can_serve_faults("a source whose rounds do not end") {
        return;
    }
    let told = refused(async |link, _| {
        for round in 1..=Version::MAX.0 + 1 {
            say(&link, &ToDestination::RoundEnd { round: Version(round), messages: 0 }).await;
        }
    });
    assert!(told.contains("out of turn"), "{told}");
}

#[test]
fn a_decision_about_nothing_can_be_cancelled() {
    if !can_serve_faults("a source that decides and falls silent") {
        return;
    }
    let told = refused(async |link, directory| {
        say(&link, &offer(Version(1))).await;
        say(&link, &ToDestination::Commit).await;
        let cancelled = tokio::task::spawn_blocking(move || {
            // The receiver has heard of the decision by then, or it is too early to matter.
            std::thread::sleep(Duration::from_millis(100));
            ask_cancel(&directory).unwrap()
        });
        let verdict = cancelled.await.unwrap();
        assert!(verdict.accepted, "{verdict:?}");
    });
    assert!(told.contains("cancelled"), "{told}");
}

#[test]
fn a_receiver_whose_source_does_not_say_farewell_can_be_told_not_to_wait() {
    if !can_serve_faults("a source that falls silent at the end") {
        return;
    }
    let mut left = ThreadsGuest::boot(&small_plan()).unwrap();
    left.pause().unwrap();
    let device_state = left.save_device_state().unwrap();
    let (report, _) = receive_lies(async |link, directory| {
        say(&link, &hello()).await;
        assert_eq!(hear(&link).await, Ok(ToSource::Prepared));
        let (none, all) = (PageSet::empty(pages()), PageSet::full(pages()));
        say(&link, &offer(Version(1))).await;
        let _ = link.send(Lane::State, flight_of(&device_state, Version(1), &none, &all)).await;
        say(&link, &ToDestination::Commit).await;
        loop {
            match hear(&link).await.expect("the receiver goes on") {
                ToSource::Done => break,
                ToSource::Refused { reason, .. } => panic!("{reason}"),
                _ => {}
            }
        }
        tokio::task::spawn_blocking(move || ask_cancel(&directory).unwrap()).await.unwrap();
        // The link is up all the time.
        assert!(!link.ended().await.is_mendable());
    });
    assert_eq!(report.result, MigrationResult::Migrated);
}

/// Most memory that this process has had.
fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

#[test]
#[ignore = "measures the whole process, so alone: see docs/testing.md"]
fn a_flood_on_every_lane_at_once_takes_bounded_memory() {
    let noise: Vec<u8> = (0..32 << 20).map(|_| fastrand::u8(..)).collect();
    let rehearsal = encode(&ToDestination::Rehearsal(PackedState::pack(&noise, None)));
    let (rehearsal, noise) = (Bytes::from(rehearsal), Bytes::from(noise));
    let before = peak_rss_bytes();
    refuse(async |link, _| {
        say(&link, &hello()).await;
        assert_eq!(hear(&link).await, Ok(ToSource::Prepared));
        let pages = page_message(Version(1), PageIndex(3));
        let floods = [
            (Lane::FaultRequest, noise.slice(..60 << 10)),
            (Lane::State, noise.clone()),
            (Lane::Push, pages.clone()),
            (Lane::FaultReply, pages.clone()),
            (Lane::Bundle, pages),
        ];
        for (lane, message) in floods.iter().flat_map(|flood| [flood; 64]).cloned() {
            let link = link.clone();
            tokio::spawn(async move { while link.send(lane, message.clone()).await.is_ok() {} });
        }
        let flood = async { while link.control_send(rehearsal.clone()).await.is_ok() {} };
        let _ = tokio::time::timeout(Duration::from_secs(20), flood).await;
        link.close(1, "enough").await;
    });
    let grown_mib = (peak_rss_bytes() - before) >> 20;
    eprintln!("{grown_mib} MiB more, of both sides in one process");
    assert!(grown_mib < 2048, "{grown_mib} MiB");
}
