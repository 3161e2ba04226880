//! Two ends of a link on loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::error::code;
use super::*;

fn options() -> TransportOptions {
    TransportOptions { connect_timeout_ms: 3_000, ..TransportOptions::default() }
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn listen(options: &TransportOptions) -> (Listener, Ticket) {
    Listener::bind(loopback(), Vec::new(), options).unwrap()
}

/// The sender's link and the receiver's.
async fn meet(listener: &Listener, ticket: &Ticket, options: &TransportOptions) -> (Link, Link) {
    let (sender, receiver) = tokio::join!(connect(ticket, options), listener.accept(None));
    (sender.unwrap(), receiver.unwrap())
}

/// The sender's link, the receiver's link, and the listener.
async fn pair(options: &TransportOptions) -> (Link, Link, Listener) {
    let (listener, ticket) = listen(options);
    let (sender, receiver) = meet(&listener, &ticket, options).await;
    (sender, receiver, listener)
}

fn message(size: usize, fill: u8) -> Bytes {
    vec![fill; size].into()
}

mod authentication {
    use super::*;

    #[tokio::test]
    async fn the_holder_of_the_ticket_gets_a_link() {
        let (sender, receiver, _listener) = pair(&options()).await;
        sender.control_send(Bytes::from_static(b"hello")).await.unwrap();
        assert_eq!(receiver.control_recv().await.unwrap(), "hello");
        receiver.control_send(Bytes::from_static(b"welcome")).await.unwrap();
        assert_eq!(sender.control_recv().await.unwrap(), "welcome");
        assert_eq!(sender.session_key().0.0, receiver.session_key().0.0);
    }

    #[tokio::test]
    async fn a_wrong_secret_is_refused_and_the_right_one_still_works() {
        let (listener, ticket) = listen(&options());
        let wrong = Ticket { secret: Secret::random(), ..ticket.clone() };
        assert!(matches!(connect(&wrong, &options()).await, Err(ConnectError::WrongTicket)));
        let other = Ticket { migration: MigrationId::random(), ..ticket.clone() };
        assert!(matches!(connect(&other, &options()).await, Err(ConnectError::WrongTicket)));
        meet(&listener, &ticket, &options()).await;
    }

    #[tokio::test]
    async fn another_certificate_is_told_as_another_receiver() {
        let (_listener, ticket) = listen(&options());
        let wrong = Ticket { certificate_sha256: [1; 32], ..ticket };
        let error = connect(&wrong, &options()).await.unwrap_err();
        assert!(
            matches!(error, ConnectError::AnotherReceiver { address } if address == wrong.addresses[0])
        );
        assert!(error.to_string().contains("another receiver answers"), "{error}");
    }

    #[tokio::test]
    async fn a_ticket_works_once_and_a_second_sender_does_not_disturb_the_first() {
        let (listener, ticket) = listen(&options());
        let (first, receiver) = meet(&listener, &ticket, &options()).await;
        let error = connect(&ticket, &options()).await.unwrap_err();
        assert!(matches!(error, ConnectError::TicketUsed), "{error}");
        assert!(error.to_string().contains("already used"));
        first.control_send(Bytes::from_static(b"still here")).await.unwrap();
        assert_eq!(receiver.control_recv().await.unwrap(), "still here");
    }

    #[tokio::test]
    async fn two_senders_at_the_same_moment_get_one_link() {
        let (_listener, ticket) = listen(&options());
        let (options_a, options_b) = (options(), options());
        let (a, b) = tokio::join!(connect(&ticket, &options_a), connect(&ticket, &options_b));
        assert_eq!([&a, &b].iter().filter(|link| link.is_ok()).count(), 1);
    }

    #[tokio::test]
    async fn garbage_and_silent_strangers_do_not_keep_the_sender_out() {
        let (listener, ticket) = listen(&options());
        let noise = std::net::UdpSocket::bind(loopback()).unwrap();
        for size in 1..200 {
            noise.send_to(&vec![0xc0 | size as u8; size * 7], ticket.addresses[0]).unwrap();
        }
        let silent = raw_connection(&ticket).await;
        let slow = raw_connection(&ticket).await;
        let (mut slow_send, _slow_recv) = slow.open_bi().await.unwrap();
        slow_send.write_all(&[1, 2, 3]).await.unwrap();
        let wordy = raw_connection(&ticket).await;
        let (mut wordy_send, _wordy_recv) = wordy.open_bi().await.unwrap();
        let _ =
            tokio::time::timeout(Duration::from_secs(1), wordy_send.write_all(&[7; 1 << 20])).await;
        let lane = tokio::time::timeout(Duration::from_millis(100), slow.open_uni()).await;
        assert!(lane.is_err(), "no lanes for strangers");

        let (sender, receiver) = meet(&listener, &ticket, &options()).await;
        let begun = Instant::now();
        silent.closed().await;
        slow.closed().await;
        assert!(begun.elapsed() < Duration::from_secs(7), "strangers are shown the door");
        sender.control_send(Bytes::from_static(b"undisturbed")).await.unwrap();
        assert_eq!(receiver.control_recv().await.unwrap(), "undisturbed");
    }

    #[tokio::test]
    async fn a_closed_port_and_a_good_one_make_a_link() {
        let (listener, mut ticket) = listen(&options());
        ticket.addresses.insert(0, "127.0.0.1:9".parse().unwrap());
        meet(&listener, &ticket, &options()).await;
    }

    #[tokio::test]
    async fn nobody_there_is_told_in_time_with_the_address() {
        let (listener, ticket) = listen(&options());
        drop(listener);
        let options = TransportOptions { connect_timeout_ms: 500, ..options() };
        let begun = Instant::now();
        let error = connect(&ticket, &options).await.unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(2));
        assert!(error.to_string().contains(&ticket.addresses[0].to_string()), "{error}");
    }

    #[tokio::test]
    async fn nobody_coming_is_told_in_time() {
        let (listener, _ticket) = listen(&options());
        let error = listener.accept(Some(Duration::from_millis(50))).await.unwrap_err();
        assert!(matches!(error, ListenError::TimedOut(50)));
    }

    #[tokio::test]
    async fn the_session_key_continues_the_migration_on_a_new_connection() {
        let (listener, ticket) = listen(&options());
        let (sender, receiver) = meet(&listener, &ticket, &options()).await;
        let session = sender.session_key();
        drop(sender);
        let receiver_session = receiver.session_key();
        let options = options();
        let (again, accepted) = tokio::join!(
            reconnect(&ticket, &session, &options),
            listener.accept_resumed(&receiver_session, Some(Duration::from_secs(3)))
        );
        let (again, accepted) = (again.unwrap(), accepted.unwrap());
        again.send(Lane::FaultRequest, message(3, 1)).await.unwrap();
        assert_eq!(accepted.recv(Lane::FaultRequest).await.unwrap(), message(3, 1));

        let forged = SessionKey(Secret::random());
        let error = reconnect(&ticket, &forged, &options).await.unwrap_err();
        assert!(matches!(error, ConnectError::WrongTicket), "{error}");
    }

    #[tokio::test]
    async fn a_sender_and_a_receiver_find_each_other_again_by_what_they_kept() {
        let (listener, ticket) = listen(&options());
        let (sender, receiver) = meet(&listener, &ticket, &options()).await;
        // As read from disk by two other processes.
        let kept = serde_json::to_string(&SavedReceiver::of(&listener, &receiver)).unwrap();
        let kept_by_sender = serde_json::to_string(&SavedSender::of(&ticket, &sender)).unwrap();
        drop((sender, receiver, listener));
        let saved: SavedReceiver = serde_json::from_str(&kept).unwrap();
        let saved_sender: SavedSender = serde_json::from_str(&kept_by_sender).unwrap();
        let (ticket_again, session) = saved_sender.open().unwrap();
        let mut tries = 0;
        // The socket of the first one is closed a little later.
        let opened = loop {
            match Listener::reopen(&saved, &options()) {
                Err(ListenError::Bind { .. }) if tries < 500 => tries += 1,
                other => break other.unwrap(),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let receiver_session = saved.session().unwrap();
        let options = options();
        let (sender, receiver) = tokio::join!(
            reconnect(&ticket_again, &session, &options),
            opened.accept_resumed(&receiver_session, Some(Duration::from_secs(3)))
        );
        let (sender, receiver) = (sender.unwrap(), receiver.unwrap());
        sender.send(Lane::FaultRequest, message(3, 1)).await.unwrap();
        assert_eq!(receiver.recv(Lane::FaultRequest).await.unwrap(), message(3, 1));
        // The ticket itself is as used as before, and secrets are not shown.
        connect(&ticket, &options).await.unwrap_err();
        assert!(
            !format!("{saved:?}{saved_sender:?}").contains(&kept[kept.len() - 20..kept.len() - 2])
        );
        let damaged = kept.replace("\"session\":\"", "\"session\":\"a");
        let damaged: SavedReceiver = serde_json::from_str(&damaged).unwrap();
        assert!(Listener::reopen(&damaged, &options).is_err());
    }

    /// A QUIC connection to the right receiver that has proved nothing.
    async fn raw_connection(ticket: &Ticket) -> quinn::Connection {
        let endpoint = socket::endpoint(loopback(), None, &options()).unwrap();
        let (crypto, _) = identity::sender(ticket.certificate_sha256);
        let config = quinn::ClientConfig::new(std::sync::Arc::new(crypto));
        endpoint.connect_with(config, ticket.addresses[0], "x").unwrap().await.unwrap()
    }
}

mod lanes {
    use super::*;

    #[tokio::test]
    async fn every_lane_carries_its_largest_message() {
        let (sender, receiver, _listener) = pair(&options()).await;
        for lane in [Lane::FaultRequest, Lane::FaultReply, Lane::Push] {
            sender.send(lane, message(lane.limit_bytes(), lane as u8)).await.unwrap();
            assert_eq!(receiver.recv(lane).await.unwrap(), message(lane.limit_bytes(), lane as u8));
        }
        let state = message(9 << 20, 4);
        let (sent, received) =
            tokio::join!(sender.send(Lane::State, state.clone()), receiver.recv(Lane::State));
        sent.unwrap();
        assert_eq!(received.unwrap(), state);
        sender.send(Lane::FaultReply, Bytes::new()).await.unwrap();
        assert_eq!(receiver.recv(Lane::FaultReply).await.unwrap(), Bytes::new());
    }

    #[tokio::test]
    async fn control_messages_arrive_whole_and_in_order() {
        let (sender, receiver, _listener) = pair(&options()).await;
        let reading = tokio::spawn(async move {
            for size in [0usize, 1, 70_000, 3 << 20, 5] {
                assert_eq!(receiver.control_recv().await.unwrap(), message(size, size as u8));
            }
            assert_eq!(receiver.control_recv().await.unwrap_err(), LinkError::Finished);
            receiver
        });
        for size in [0usize, 1, 70_000, 3 << 20, 5] {
            sender.control_send(message(size, size as u8)).await.unwrap();
        }
        sender.finish().await.unwrap();
        reading.await.unwrap();
    }

    #[tokio::test]
    async fn a_message_that_is_too_large_is_refused_here_and_names_its_lane() {
        let (sender, _receiver, _listener) = pair(&options()).await;
        for lane in [Lane::FaultRequest, Lane::FaultReply, Lane::Push] {
            let error = sender.send(lane, message(lane.limit_bytes() + 1, 0)).await.unwrap_err();
            assert!(error.to_string().contains(lane.name()), "{error}");
        }
        let limit_bytes = options().control_message_limit_bytes;
        let error = sender.control_send(message(limit_bytes + 1, 0)).await.unwrap_err();
        assert!(error.to_string().contains("control lane"), "{error}");
        sender.send(Lane::Push, message(1, 0)).await.unwrap();
    }

    #[tokio::test]
    async fn a_peer_that_sends_too_much_is_cut_off_with_the_lane_named() {
        for (first_byte, size, word) in
            [(1u8, 70_000, "fault request"), (2, 300_000, "fault reply"), (9, 1, "unknown lane 9")]
        {
            let (sender, receiver, _listener) = pair(&options()).await;
            let mut stream = sender.quic().open_uni().await.unwrap();
            stream.write_all(&[first_byte]).await.unwrap();
            let _ = stream.write_all(&message(size, 0)).await;
            let _ = stream.finish();
            let error = receiver.recv(Lane::FaultRequest).await.unwrap_err();
            assert!(matches!(&error, LinkError::Violation(what) if what.contains(word)), "{error}");
            let told = sender.ended().await;
            assert!(
                matches!(&told, LinkError::Refused { reason, .. } if reason.contains(word)),
                "{told}"
            );
        }
    }

    #[tokio::test]
    async fn a_peer_that_announces_a_huge_control_message_is_cut_off() {
        let small = TransportOptions { control_message_limit_bytes: 1_000, ..options() };
        let (listener, ticket) = listen(&small);
        let (sender, receiver) = meet(&listener, &ticket, &options()).await;
        sender.control_send(message(1_001, 0)).await.unwrap();
        let error = receiver.control_recv().await.unwrap_err();
        assert!(
            matches!(&error, LinkError::Violation(what) if what.contains("control lane")),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_message_given_up_half_way_never_arrives() {
        let (sender, receiver, _listener) = pair(&options()).await;
        let huge = message(100 << 20, 1);
        let cancelled =
            tokio::time::timeout(Duration::from_millis(5), sender.send(Lane::State, huge));
        if cancelled.await.is_ok() {
            panic!("100 MiB in 5 ms without a reader");
        }
        sender.send(Lane::State, message(10, 2)).await.unwrap();
        assert_eq!(receiver.recv(Lane::State).await.unwrap(), message(10, 2));
    }

    #[tokio::test]
    async fn a_consumer_of_push_that_sleeps_stops_the_pusher_and_not_the_faults() {
        let options = TransportOptions { push_window_bytes: 2 << 20, ..options() };
        let (sender, receiver, _listener) = pair(&options).await;
        let pusher = tokio::spawn({
            let sender = sender.clone();
            async move {
                let mut pushed = 0usize;
                while pushed < 64 {
                    sender.push(message(128 << 10, pushed as u8)).await.unwrap();
                    pushed += 1;
                }
                sender.push_drained().await.unwrap();
            }
        });
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!pusher.is_finished());
        assert!(sender.stats().sent_bytes < 4 << 20, "{:?}", sender.stats());
        for _ in 0..100 {
            sender.send(Lane::FaultReply, message(4_096, 7)).await.unwrap();
            assert_eq!(receiver.recv(Lane::FaultReply).await.unwrap().len(), 4_096);
        }
        let mut seen = [false; 64];
        for _ in 0..64 {
            seen[receiver.recv(Lane::Push).await.unwrap()[0] as usize] = true;
        }
        assert_eq!(seen, [true; 64]);
        pusher.await.unwrap();
    }

    #[tokio::test]
    async fn fault_replies_overtake_bulk() {
        let capped = TransportOptions { bandwidth_limit_bytes_per_s: Some(5_000_000), ..options() };
        let (sender, receiver, _listener) = pair(&capped).await;
        let pusher = tokio::spawn({
            let sender = sender.clone();
            async move { while sender.push(message(128 << 10, 0)).await.is_ok() {} }
        });
        let sink = tokio::spawn({
            let receiver = receiver.clone();
            async move { while receiver.recv(Lane::Push).await.is_ok() {} }
        });
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut waits = Vec::new();
        for _ in 0..20 {
            let sent = Instant::now();
            sender.send(Lane::FaultReply, message(4_096, 1)).await.unwrap();
            receiver.recv(Lane::FaultReply).await.unwrap();
            waits.push(sent.elapsed());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        waits.sort();
        // One 128 KiB message alone takes 26 ms at this rate. The median, as a busy machine may delay
        // some.
        assert!(sender.stats().push_in_flight_bytes > 0, "the pusher had nothing under way");
        assert!(waits[10] < Duration::from_millis(20), "replies waited {waits:?}");
        pusher.abort();
        sink.abort();
    }

    #[tokio::test]
    async fn the_bandwidth_limit_holds_for_everything_that_leaves() {
        let capped = TransportOptions { bandwidth_limit_bytes_per_s: Some(4_000_000), ..options() };
        let (sender, receiver, _listener) = pair(&capped).await;
        for lane in [Lane::Push, Lane::FaultReply] {
            let (sender, receiver) = (sender.clone(), receiver.clone());
            tokio::spawn({
                async move { while sender.send(lane, message(64 << 10, 0)).await.is_ok() {} }
            });
            tokio::spawn(async move { while receiver.recv(lane).await.is_ok() {} });
        }
        let before = (sender.stats().sent_bytes, Instant::now());
        tokio::time::sleep(Duration::from_secs(2)).await;
        let sent = (sender.stats().sent_bytes - before.0) as f64;
        let rate = sent / before.1.elapsed().as_secs_f64();
        assert!(rate < 4_100_000.0, "{rate} bytes/s");
        assert!(rate > 1_000_000.0, "{rate} bytes/s");
    }
}

mod secrets {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing::level_filters::LevelFilter;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The ways in which bytes are usually written.
    fn spellings(secret: &[u8; 32]) -> [String; 3] {
        let hex = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        [hex, format!("{secret:?}"), String::from_utf8_lossy(secret).into_owned()]
    }

    #[tokio::test]
    async fn neither_tickets_nor_keys_are_logged_however_much_is() {
        let log = Log::default();
        let (written, options) = (log.clone(), options());
        // Everything here is on this one thread.
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(LevelFilter::TRACE)
            .with_writer(move || written.clone())
            .finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let (listener, ticket) = listen(&options);
        let wrong = Ticket { secret: Secret::random(), ..ticket.clone() };
        assert!(connect(&wrong, &options).await.is_err());
        let (sender, receiver) = meet(&listener, &ticket, &options).await;
        let key = sender.session_key();
        tracing::info!("{ticket:?} {key:?} {sender:?} {receiver:?} {listener:?}");
        sender.abandon();
        let (again, _back) =
            tokio::join!(reconnect(&ticket, &key, &options), listener.accept_resumed(&key, None));
        again.unwrap().close(0, "done").await;
        let text = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
        assert!(text.contains("TRACE") && text.contains("Secret(..)"), "it says much: {text}");
        let word = ticket.to_string();
        let mut secrets = vec![word.clone(), word[word.len() / 2..].to_owned()];
        secrets.extend(spellings(&ticket.secret.0));
        secrets.extend(spellings(&key.0.0));
        secrets.extend(spellings(&wrong.secret.0));
        for secret in secrets {
            assert!(!text.contains(&secret), "a secret is logged: {secret}");
        }
    }
}

mod measures {
    use super::congestion::Congestion;
    use super::*;

    async fn push_eight_mebibytes(options: &TransportOptions) -> LinkStats {
        let (sender, receiver, _listener) = pair(options).await;
        let sink = tokio::spawn(async move { while receiver.recv(Lane::Push).await.is_ok() {} });
        for _ in 0..64 {
            sender.push(message(128 << 10, 3)).await.unwrap();
        }
        sender.push_drained().await.unwrap();
        sink.abort();
        sender.stats()
    }

    #[tokio::test]
    async fn a_link_knows_what_it_sent_and_how_fast() {
        let stats = push_eight_mebibytes(&options()).await;
        assert!(stats.sent_bytes > 8 << 20, "{stats:?}");
        assert!(stats.rtt_us > 0 && stats.min_rtt_us > 0, "{stats:?}");
        assert!(stats.delivery_rate_bytes_per_s > 1_000_000, "{stats:?}");
        assert_eq!(stats.push_in_flight_bytes, 0);
    }

    #[tokio::test]
    async fn a_fixed_window_is_kept() {
        let congestion = Congestion::Fixed { window_bytes: 300_000 };
        let stats = push_eight_mebibytes(&TransportOptions { congestion, ..options() }).await;
        assert_eq!(stats.window_bytes, 300_000);
        assert!(stats.delivery_rate_bytes_per_s > 1_000_000, "{stats:?}");
    }
}

mod ends {
    use super::*;

    #[tokio::test]
    async fn closing_tells_the_reason() {
        let (sender, receiver, _listener) = pair(&options()).await;
        sender.send(Lane::FaultReply, message(5, 5)).await.unwrap();
        assert_eq!(receiver.recv(Lane::FaultReply).await.unwrap().len(), 5);
        sender.close(7, "cancelled by the user").await;
        let expected =
            LinkError::PeerClosed { code: 7, reason: "cancelled by the user".to_owned() };
        assert_eq!(receiver.recv(Lane::Push).await.unwrap_err(), expected);
        assert_eq!(receiver.control_recv().await.unwrap_err(), expected);
        assert_eq!(receiver.push(message(1, 1)).await.unwrap_err(), expected);
        assert_eq!(receiver.push_drained().await.unwrap_err(), expected);
        assert!(!expected.is_mendable(), "the other side has ended it");
        assert_eq!(sender.push(message(1, 1)).await.unwrap_err(), LinkError::Closed);
    }

    #[tokio::test]
    async fn a_link_that_is_dropped_is_closed() {
        let (sender, receiver, _listener) = pair(&options()).await;
        drop(sender);
        let error = receiver.control_recv().await.unwrap_err();
        assert!(matches!(error, LinkError::Refused { .. }) && error.is_mendable(), "{error}");
    }

    #[tokio::test]
    async fn a_peer_that_vanishes_is_a_timeout() {
        let options = TransportOptions { idle_timeout_ms: 600, keep_alive_ms: 100, ..options() };
        let (listener, mut ticket) = listen(&options);
        let relay = Relay::start(ticket.addresses[0]).await;
        ticket.addresses = vec![relay.address];
        let (sender, receiver) = meet(&listener, &ticket, &options).await;
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        sender.control_send(Bytes::from_static(b"kept alive")).await.unwrap();
        receiver.control_recv().await.unwrap();
        relay.cut();
        let _ = sender.push(message(1_000, 1)).await;
        let drained = sender.push_drained().await.unwrap_err();
        assert_eq!(drained, LinkError::TimedOut { idle_ms: 600 });
        assert_eq!(
            receiver.recv(Lane::Push).await.unwrap_err(),
            LinkError::TimedOut { idle_ms: 600 }
        );
    }

    #[tokio::test]
    async fn a_peer_that_takes_no_control_message_is_as_good_as_silent() {
        let options = TransportOptions { idle_timeout_ms: 500, keep_alive_ms: 100, ..options() };
        let (sender, receiver, _listener) = pair(&options).await;
        let flood = async {
            loop {
                if let Err(error) = sender.control_send(message(1 << 20, 1)).await {
                    return error;
                }
            }
        };
        let error = tokio::time::timeout(Duration::from_secs(20), flood).await.unwrap();
        assert_eq!(error, LinkError::TimedOut { idle_ms: 500 });
        assert!(receiver.quic().close_reason().is_none(), "it lives");
    }

    #[tokio::test]
    async fn control_characters_of_a_peer_do_not_reach_the_terminal() {
        let (sender, receiver, _listener) = pair(&options()).await;
        sender.quic().close(code(20), b"\x1b[2Jboo");
        let error = receiver.ended().await;
        assert_eq!(error, LinkError::PeerClosed { code: 4, reason: "[2Jboo".to_owned() });
    }
}

mod moving {
    use super::*;

    /// Bulk and faults go on while `change` happens; the longest that a reply took after it.
    async fn longest_wait(
        sender: &Link,
        receiver: &Link,
        change: impl Future<Output = ()>,
    ) -> Duration {
        let pusher = tokio::spawn({
            let sender = sender.clone();
            async move { while sender.push(message(64 << 10, 0)).await.is_ok() {} }
        });
        let sink = tokio::spawn({
            let receiver = receiver.clone();
            async move { while receiver.recv(Lane::Push).await.is_ok() {} }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        let before = receiver.remote_address();
        change.await;
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let asked = Instant::now();
            receiver.send(Lane::FaultRequest, message(10, 1)).await.unwrap();
            sender.recv(Lane::FaultRequest).await.unwrap();
            sender.send(Lane::FaultReply, message(4_096, 1)).await.unwrap();
            receiver.recv(Lane::FaultReply).await.unwrap();
            longest = longest.max(asked.elapsed());
        }
        pusher.abort();
        sink.abort();
        assert_ne!(receiver.remote_address(), before, "the receiver has seen the change");
        longest
    }

    /// Less than it takes to notice a dead link; on a quiet machine it is some milliseconds.
    const NO_OUTAGE: Duration = Duration::from_secs(2);

    #[tokio::test]
    async fn a_link_outlives_a_change_of_the_senders_address() {
        let capped = TransportOptions { bandwidth_limit_bytes_per_s: Some(5_000_000), ..options() };
        let (sender, receiver, _listener) = pair(&capped).await;
        let moved = sender.clone();
        let change = async move { moved.move_to(std::net::UdpSocket::bind(loopback()).unwrap()) };
        let longest = longest_wait(&sender, &receiver, change).await;
        assert!(longest < NO_OUTAGE, "{longest:?}");
    }

    #[tokio::test]
    async fn a_link_outlives_a_router_that_translates_its_address_anew() {
        let capped = TransportOptions { bandwidth_limit_bytes_per_s: Some(5_000_000), ..options() };
        let (listener, mut ticket) = listen(&capped);
        let relay = Relay::start(ticket.addresses[0]).await;
        ticket.addresses = vec![relay.address];
        let (sender, receiver) = meet(&listener, &ticket, &capped).await;
        let longest = longest_wait(&sender, &receiver, relay.forget()).await;
        assert!(longest < NO_OUTAGE, "{longest:?}");
        relay.cut();
    }
}

mod logs {
    use super::*;

    #[tokio::test]
    async fn packets_and_the_window_are_in_the_log_that_was_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link.qlog");
        let logged = TransportOptions { qlog: Some(Qlog::create(&path).unwrap()), ..options() };
        let (listener, ticket) = listen(&options());
        let (sender, receiver) = meet(&listener, &ticket, &logged).await;
        sender.send(Lane::FaultReply, message(100_000, 1)).await.unwrap();
        receiver.recv(Lane::FaultReply).await.unwrap();
        // What is written after this long makes all before it leave for the file.
        tokio::time::sleep(Duration::from_millis(300)).await;
        sender.send(Lane::FaultReply, message(1_000, 1)).await.unwrap();
        receiver.recv(Lane::FaultReply).await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let events = text.split('\u{1e}').filter(|line| line.ends_with('\n'));
        let events: Vec<serde_json::Value> =
            events.map(|line| serde_json::from_str(line).unwrap()).collect();
        let named = |name: &str| events.iter().filter(|event| event["name"] == name).count();
        // 100,000 bytes, in datagrams of up to 6,500.
        assert!(named("transport:packet_sent") > 15, "{}", named("transport:packet_sent"));
        assert!(events.iter().any(|event| event["data"]["congestion_window"].is_u64()));
    }
}

/// Forwards datagrams, from an address of its own, until it is cut.
struct Relay {
    address: SocketAddr,
    /// Where the target sees the datagrams come from.
    back: watch::Sender<Arc<UdpSocket>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Relay {
    async fn start(target: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind(loopback()).await.unwrap());
        let address = front.local_addr().unwrap();
        let (back, mut backs) =
            watch::channel(Arc::new(UdpSocket::bind(loopback()).await.unwrap()));
        let (client_sender, client) = watch::channel(None);
        let forth = tokio::spawn({
            let (front, backs) = (front.clone(), backs.clone());
            async move {
                let mut buffer = vec![0; 65_536];
                while let Ok((size, from)) = front.recv_from(&mut buffer).await {
                    client_sender.send_replace(Some(from));
                    let back = backs.borrow().clone();
                    let _ = back.send_to(&buffer[..size], target).await;
                }
            }
        });
        let home = tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            loop {
                let back = backs.borrow_and_update().clone();
                let size = tokio::select! {
                    Ok((size, _)) = back.recv_from(&mut buffer) => size,
                    Ok(()) = backs.changed() => continue,
                    else => return,
                };
                let to = *client.borrow();
                if let Some(to) = to {
                    let _ = front.send_to(&buffer[..size], to).await;
                }
            }
        });
        Relay { address, back, tasks: vec![forth, home] }
    }

    /// As a translating router does that has forgotten: from now on another address, and what is sent to
    /// the old one is lost.
    async fn forget(&self) {
        self.back.send_replace(Arc::new(UdpSocket::bind(loopback()).await.unwrap()));
    }

    fn cut(self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}
