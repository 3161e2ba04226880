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
    let _ = tokio::time::timeout(Duration::from_secs(1), wordy_send.write_all(&[7; 1 << 20])).await;
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
async fn who_writes_the_senders_address_into_his_packets_does_not_take_its_places() {
    let (listener, ticket) = listen(&options());
    for _ in 0..8 {
        // What is answered does not reach him.
        let relay = Relay::start(ticket.addresses[0]).await;
        relay.cut_the_way_back();
        let forged = Ticket { addresses: vec![relay.address], ..ticket.clone() };
        tokio::spawn(async move {
            let _relay = relay;
            connect(&forged, &options()).await
        });
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let limit = Duration::from_secs(4);
    tokio::time::timeout(limit, meet(&listener, &ticket, &options())).await.expect("a place");
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
    assert!(!format!("{saved:?}{saved_sender:?}").contains(&kept[kept.len() - 20..kept.len() - 2]));
    let damaged = kept.replace("\"session\":\"", "\"session\":\"a");
    let damaged: SavedReceiver = serde_json::from_str(&damaged).unwrap();
    assert!(Listener::reopen(&damaged, &options).is_err());
}

/// A QUIC connection to the right receiver that has proved nothing.
async fn raw_connection(ticket: &Ticket) -> quinn::Connection {
    let endpoint = socket::endpoint(loopback(), None, &options(), None).unwrap();
    let (crypto, _) = identity::sender(ticket.certificate_sha256);
    let config = quinn::ClientConfig::new(std::sync::Arc::new(crypto));
    endpoint.connect_with(config, ticket.addresses[0], "x").unwrap().await.unwrap()
}
