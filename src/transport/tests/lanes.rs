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
    let cancelled = tokio::time::timeout(Duration::from_millis(5), sender.send(Lane::State, huge));
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
    keeps_to(4_000_000).await;
    // As fast as batches of datagrams are put together.
    keeps_to(40_000_000).await;
}

async fn keeps_to(bytes_per_s: u64) {
    let capped = TransportOptions { bandwidth_limit_bytes_per_s: Some(bytes_per_s), ..options() };
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
    let share = sent / before.1.elapsed().as_secs_f64() / bytes_per_s as f64;
    assert!((0.25..1.025).contains(&share), "{share} of {bytes_per_s} bytes/s");
}
