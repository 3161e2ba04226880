//! Two ends of a link on loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::error::{close_code, code};
use super::*;

mod authentication;
mod bulk;
mod ends;
mod lanes;
mod logs;
mod measures;
mod moving;
mod secrets;

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

    /// From now on nothing comes back.
    fn cut_the_way_back(&self) {
        self.tasks[1].abort();
    }
}
