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
    // 100,000 bytes, in datagrams of up to 8,972.
    assert!(named("transport:packet_sent") > 11, "{}", named("transport:packet_sent"));
    assert!(events.iter().any(|event| event["data"]["congestion_window"].is_u64()));
}
