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
