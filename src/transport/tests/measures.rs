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
