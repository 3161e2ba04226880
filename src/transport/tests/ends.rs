use super::super::connect::{dial, introduce};
use super::super::proof::Claim;
use super::*;

#[tokio::test]
async fn closing_tells_the_reason() {
    let (sender, receiver, _listener) = pair(&options()).await;
    sender.send(Lane::FaultReply, message(5, 5)).await.unwrap();
    assert_eq!(receiver.recv(Lane::FaultReply).await.unwrap().len(), 5);
    sender.close(7, "cancelled by the user").await;
    let expected = LinkError::PeerClosed { code: 7, reason: "cancelled by the user".to_owned() };
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
async fn a_sender_that_comes_back_and_hears_the_answer_too_late_may_come_once_more() {
    let options = TransportOptions { connect_timeout_ms: 500, ..options() };
    let (listener, mut ticket) = listen(&options);
    let (sender, _receiver) = meet(&listener, &ticket, &options).await;
    let session = sender.session_key();
    let relay = Relay::start(ticket.addresses[0]).await;
    ticket.addresses = vec![relay.address];
    let deadline = tokio::time::Instant::now() + Duration::from_secs(3);
    let (_, dialled) = dial(&ticket, &options, deadline).await.unwrap();
    relay.cut_the_way_back();
    let introducing = introduce(dialled, &ticket, Claim::Session, &session.0, &options);
    let (introduced, again) = tokio::join!(
        tokio::time::timeout(Duration::from_millis(500), introducing),
        listener.accept_resumed(&session, Some(Duration::from_secs(3)))
    );
    assert!(introduced.is_err(), "the answer cannot come");
    let error = again.expect("the proof was good").ended().await;
    assert!(error.is_mendable(), "{error}");
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
    assert_eq!(receiver.recv(Lane::Push).await.unwrap_err(), LinkError::TimedOut { idle_ms: 600 });
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
