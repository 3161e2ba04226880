use std::num::NonZero;

use super::*;
use crate::transport::bulk::{self, MAX_CONNECTIONS};
use crate::transport::connect::{Dialler, prove};
use crate::transport::proof::Claim;
use crate::transport::quic::Peer;

fn with(connections: u8) -> TransportOptions {
    let connections = Connections::Exactly(NonZero::new(connections).unwrap());
    TransportOptions { connections, ..options() }
}

/// Waits until both ends have so many connections.
async fn have(ends: [&Link; 2], connections: u8) {
    let wide = async {
        while ends.iter().any(|link| link.stats().connections != u32::from(connections)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(10), wide).await;
    waited.unwrap_or_else(|_| panic!("{ends:?} do not get {connections} connections"));
}

async fn wide_pair(connections: u8) -> (Link, Link, Listener) {
    let (sender, receiver, listener) = pair(&with(connections)).await;
    have([&sender, &receiver], connections).await;
    (sender, receiver, listener)
}

#[tokio::test]
async fn bulk_goes_by_all_connections_and_arrives_once() {
    const MESSAGES: usize = 400;
    let (sender, receiver, _listener) = wide_pair(3).await;
    let pusher = tokio::spawn({
        let sender = sender.clone();
        async move {
            for number in 0..MESSAGES {
                let mut bytes = vec![0; 100_000];
                bytes[..8].copy_from_slice(&number.to_be_bytes());
                sender.push(bytes.into()).await.unwrap();
            }
            sender.push_drained().await.unwrap();
            sender.finish().await.unwrap();
        }
    });
    let mut seen = [false; MESSAGES];
    for _ in 0..MESSAGES {
        let message = receiver.recv(Lane::Push).await.unwrap();
        let number = usize::from_be_bytes(message[..8].try_into().unwrap());
        assert!(!std::mem::replace(&mut seen[number], true), "message {number} came twice");
    }
    pusher.await.unwrap();
    let carried = sender.bulk().into_iter().map(|connection| connection.stats().udp_tx.bytes);
    let carried: Vec<u64> = carried.collect();
    assert!(carried.iter().all(|bytes| *bytes > 100_000), "{carried:?}");
    assert!(sender.stats().sent_bytes > 40_000_000, "all of them count");
    assert_eq!(sender.stats().push_in_flight_bytes, 0);
}

#[tokio::test]
async fn faults_go_by_the_main_connection() {
    let (sender, receiver, _listener) = wide_pair(2).await;
    let before = sender.bulk()[0].stats().udp_tx.bytes;
    for _ in 0..50 {
        sender.send(Lane::FaultReply, message(4_096, 1)).await.unwrap();
        receiver.recv(Lane::FaultReply).await.unwrap();
    }
    let after = sender.bulk()[0].stats().udp_tx.bytes;
    assert!(after - before < 50 * 4_096, "{} bytes more", after - before);
}

#[tokio::test]
async fn a_link_takes_as_many_connections_as_it_may_and_no_more() {
    let options = with(MAX_CONNECTIONS);
    let (listener, ticket) = listen(&options);
    let (sender, receiver) = meet(&listener, &ticket, &options).await;
    have([&sender, &receiver], MAX_CONNECTIONS).await;
    let dialler = Dialler::new(ticket.addresses[0], &ticket, &options, None);
    // The receiver may be closing it when the sender thinks that it was let in.
    if let Ok(bulk) = bulk::open(&sender.bulk_key(), &dialler).await {
        bulk.connection.closed().await;
    }
    assert_eq!(receiver.stats().connections, u32::from(MAX_CONNECTIONS));
    assert!(sender.is_up() && receiver.is_up());
}

#[tokio::test]
async fn a_link_ends_with_any_of_its_connections() {
    // 0 is what quinn says of a connection that was dropped.
    for number in [0, close_code::BUSY, close_code::TOO_SLOW, close_code::LET_GO] {
        for from_sender in [true, false] {
            let (sender, receiver, _listener) = wide_pair(3).await;
            let one = if from_sender { &sender } else { &receiver };
            one.bulk()[1].close(code(number), b"");
            for link in [&sender, &receiver] {
                let error = link.ended().await;
                assert!(error.is_mendable(), "{number}: {error}");
                assert!(link.push(message(1, 1)).await.is_err());
                assert!(link.push_drained().await.is_err());
                assert!(link.bulk().iter().all(|bulk| bulk.close_reason().is_some()));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn closing_a_link_tells_the_reason_whichever_connection_ends_first() {
    for _ in 0..20 {
        let (sender, receiver, _listener) = wide_pair(4).await;
        let pusher = sender.clone();
        // Little, so that no socket's buffer drops the word.
        tokio::spawn(async move { while pusher.push(message(1_000, 1)).await.is_ok() {} });
        tokio::time::sleep(Duration::from_millis(5)).await;
        let closing = sender.close(3, "the guest has moved");
        let (error, ()) = tokio::join!(receiver.ended(), closing);
        let expected = LinkError::PeerClosed { code: 3, reason: "the guest has moved".to_owned() };
        assert_eq!(error, expected);
    }
}

#[tokio::test]
async fn only_bulk_may_come_on_a_connection_for_bulk() {
    for (tag, word) in [(1u8, "fault request"), (4, "device state"), (0x43, "unknown")] {
        let (sender, receiver, _listener) = wide_pair(2).await;
        let mut stream = sender.bulk()[0].open_uni().await.unwrap();
        stream.write_all(&[tag, 0]).await.unwrap();
        let error = receiver.ended().await;
        assert!(matches!(&error, LinkError::Violation(what) if what.contains(word)), "{error}");
        assert!(!sender.ended().await.is_mendable());
    }
}

#[tokio::test]
async fn a_link_that_finds_its_network_fast_takes_more_connections() {
    let (listener, ticket) = listen(&with(1));
    let (sender, receiver) = meet(&listener, &ticket, &with(1)).await;
    let widen = |most, wanted_at| {
        let dialler = Dialler::new(ticket.addresses[0], &ticket, &options(), None);
        tokio::spawn(bulk::widen(sender.downgrade(), dialler, most, wanted_at))
    };
    let (widening, waiting) = (widen(3, 100_000), widen(4, u64::MAX / 16));
    let sink = tokio::spawn({
        let receiver = receiver.clone();
        async move { while receiver.recv(Lane::Push).await.is_ok() {} }
    });
    while sender.stats().connections < 3 {
        sender.push(message(100_000, 1)).await.unwrap();
    }
    widening.await.unwrap();
    sink.abort();
    assert!(!waiting.is_finished(), "no network is as fast as that");
}

#[tokio::test]
async fn the_bandwidth_limit_holds_for_all_connections_together() {
    let capped = TransportOptions { bandwidth_limit_bytes_per_s: Some(4_000_000), ..with(4) };
    let (sender, receiver, _listener) = pair(&capped).await;
    have([&sender, &receiver], 4).await;
    let pusher = tokio::spawn({
        let sender = sender.clone();
        async move { while sender.push(message(64 << 10, 0)).await.is_ok() {} }
    });
    let sink = tokio::spawn({
        let receiver = receiver.clone();
        async move { while receiver.recv(Lane::Push).await.is_ok() {} }
    });
    let before = (sender.stats().sent_bytes, Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let rate = (sender.stats().sent_bytes - before.0) as f64 / before.1.elapsed().as_secs_f64();
    assert!(rate < 4_150_000.0, "{rate} bytes/s");
    assert!(rate > 1_000_000.0, "{rate} bytes/s");
    pusher.abort();
    sink.abort();
}

#[tokio::test]
async fn who_does_not_hold_the_link_adds_nothing_to_it() {
    let (listener, ticket) = listen(&with(2));
    let (sender, receiver) = meet(&listener, &ticket, &with(2)).await;
    have([&sender, &receiver], 2).await;
    // The ticket and the session prove another thing; and of another link there is another key.
    let (other, _, _other_listener) = pair(&options()).await;
    let dialler = Dialler::new(ticket.addresses[0], &ticket, &options(), None);
    for key in [ticket.secret.clone(), sender.session_key().0, other.bulk_key()] {
        let connection = dialler.dial(Peer::Stranger).await.unwrap().connection;
        let proved = prove(&connection, ticket.migration, Claim::Bulk, &key, &options()).await;
        let error = proved.err().unwrap();
        assert!(matches!(error, ConnectError::WrongTicket), "{error}");
    }
    assert_eq!(receiver.stats().connections, 2);
}
