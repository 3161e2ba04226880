//! Larger batches of datagrams than quinn makes.
//!
//! The kernel takes up to 64 datagrams of one size in one call, and passes them on as one packet as far as the
//! network card lets it (generic segmentation offload), so that most of what sending and receiving cost is paid
//! once for all of them. Quinn's batches have ten at most: 15 kB with Ethernet's packets. Here batches that
//! follow each other at once are put together, up to what the kernel takes.
//!
//! Nothing waits for more to come: whenever one of quinn's drivers is polled it hands over what may be sent now,
//! paced and within the congestion window, and the poll ends with a flush.

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};

/// UDP's largest payload over IPv4, which over IPv6 is a little larger.
const MAX_BATCH_BYTES: usize = 65_507;
/// Datagrams in one of quinn's batches, at most: of the largest ones ([`super::quic::MAX_PAYLOAD_BYTES`]) so many are
/// what the kernel takes in one call.
const QUINN_BATCH_DATAGRAMS: usize = 7;

const _: () =
    assert!(QUINN_BATCH_DATAGRAMS * super::quic::MAX_PAYLOAD_BYTES as usize <= MAX_BATCH_BYTES);

/// A socket that keeps full batches until more have come or it is flushed, which the drivers of a
/// [`BatchingRuntime`] do.
#[derive(Debug)]
pub(super) struct BatchingSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    batch: Mutex<Batch>,
}

#[derive(Debug, Default)]
struct Batch {
    contents: Vec<u8>,
    /// What all its datagrams have in common; `None` while there are none.
    kind: Option<Kind>,
    /// Nothing fits behind what it has.
    is_complete: bool,
    /// How often something was added, ever.
    additions: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    destination: SocketAddr,
    source: Option<IpAddr>,
    ecn: Option<EcnCodepoint>,
    /// Of the last one at most.
    datagram_bytes: usize,
}

impl Batch {
    /// True when `transmit` can leave by the same call, with which there are `most_datagrams` at most.
    fn takes(&self, transmit: &Transmit<'_>, most_datagrams: usize) -> bool {
        let Some(kind) = self.kind else { return false };
        let Transmit { destination, src_ip: source, ecn, segment_size, contents } = *transmit;
        let datagram_bytes = match segment_size {
            None if contents.len() <= kind.datagram_bytes => kind.datagram_bytes,
            None => contents.len(),
            Some(bytes) => bytes,
        };
        !self.is_complete
            && kind == Kind { destination, source, ecn, datagram_bytes }
            && self.contents.len() + contents.len() <= most_bytes(datagram_bytes, most_datagrams)
    }

    fn add(&mut self, transmit: &Transmit<'_>) {
        self.kind.get_or_insert(Kind {
            destination: transmit.destination,
            source: transmit.src_ip,
            ecn: transmit.ecn,
            datagram_bytes: transmit.segment_size.unwrap_or(transmit.contents.len()),
        });
        self.contents.extend_from_slice(transmit.contents);
        self.additions += 1;
    }
}

fn most_bytes(datagram_bytes: usize, most_datagrams: usize) -> usize {
    (datagram_bytes * most_datagrams).min(MAX_BATCH_BYTES)
}

impl BatchingSocket {
    pub(super) fn new(inner: Arc<dyn AsyncUdpSocket>) -> Arc<Self> {
        Arc::new(BatchingSocket { inner, batch: Mutex::default() })
    }

    fn batch(&self) -> MutexGuard<'_, Batch> {
        self.batch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what was kept. After [`io::ErrorKind::WouldBlock`] it is still kept; what any other error was about is
    /// lost, as a datagram may be.
    fn flush(&self, batch: &mut Batch) -> io::Result<()> {
        let Some(kind) = batch.kind else { return Ok(()) };
        let sent = self.inner.try_send(&Transmit {
            destination: kind.destination,
            ecn: kind.ecn,
            contents: &batch.contents,
            segment_size: Some(kind.datagram_bytes),
            src_ip: kind.source,
        });
        if !matches!(&sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            batch.contents.clear();
            batch.kind = None;
            batch.is_complete = false;
        }
        sent
    }
}

impl AsyncUdpSocket for BatchingSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut batch = self.batch();
        let most_datagrams = self.inner.max_transmit_segments();
        let bytes = transmit.contents.len();
        // As many as quinn may hand over, so that probably more follow; and there is room for as many again.
        let more_may_follow = |kept: usize| {
            transmit.segment_size.is_some_and(|datagram_bytes| {
                bytes == datagram_bytes * self.max_transmit_segments()
                    && kept + bytes <= most_bytes(datagram_bytes, most_datagrams)
            })
        };
        if !batch.takes(transmit, most_datagrams) {
            // Never out of order: QUIC takes a datagram that three later ones overtake for lost.
            self.flush(&mut batch)?;
            if !more_may_follow(bytes) {
                return self.inner.try_send(transmit);
            }
        }
        batch.add(transmit);
        if !more_may_follow(batch.contents.len()) {
            batch.is_complete = true;
            // Without room it is kept until the driver has waited for some.
            let _ = self.flush(&mut batch);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(QUINN_BATCH_DATAGRAMS)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// Runs quinn's drivers in tokio, and flushes the socket behind them.
#[derive(Debug)]
pub(super) struct BatchingRuntime {
    socket: Arc<BatchingSocket>,
}

impl BatchingRuntime {
    pub(super) fn new(socket: Arc<BatchingSocket>) -> Self {
        BatchingRuntime { socket }
    }
}

impl Runtime for BatchingRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, driver: Pin<Box<dyn Future<Output = ()> + Send>>) {
        let poller = self.socket.clone().create_io_poller();
        tokio::spawn(Flushing { driver, socket: self.socket.clone(), poller });
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

/// A driver of quinn's, each poll of which ends with a flush.
struct Flushing {
    driver: Pin<Box<dyn Future<Output = ()> + Send>>,
    socket: Arc<BatchingSocket>,
    poller: Pin<Box<dyn UdpPoller>>,
}

impl Future for Flushing {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Flushing { driver, socket, poller } = &mut *self;
        // A driver hands over some twenty datagrams and asks to be polled again. While the batch may grow it is, at
        // once.
        loop {
            let before = socket.batch().additions;
            if driver.as_mut().poll(cx).is_ready() {
                // Nobody is left who could wait for room.
                let _ = socket.flush(&mut socket.batch());
                return Poll::Ready(());
            }
            let batch = socket.batch();
            if batch.kind.is_none() || batch.is_complete || batch.additions == before {
                break;
            }
        }
        while let Err(error) = socket.flush(&mut socket.batch()) {
            // Other errors are met again by the driver, if they last.
            if error.kind() != io::ErrorKind::WouldBlock
                || poller.as_mut().poll_writable(cx).is_pending()
            {
                break;
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::future::poll_fn;

    use proptest::prelude::*;

    use super::*;

    /// Takes what it is given as long as it has room, which comes back when someone waits for it.
    #[derive(Debug, Default)]
    struct Recorder {
        sent: Mutex<Vec<Sent>>,
        /// Whether there is room, for one call after another; behind the end there is.
        room: Mutex<VecDeque<bool>>,
    }

    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Sent {
        destination: SocketAddr,
        contents: Vec<u8>,
        datagram_bytes: usize,
    }

    impl Recorder {
        fn socket(room: impl IntoIterator<Item = bool>) -> (Arc<Recorder>, Arc<BatchingSocket>) {
            let room = Mutex::new(room.into_iter().collect());
            let recorder = Arc::new(Recorder { room, ..Recorder::default() });
            (recorder.clone(), BatchingSocket::new(recorder))
        }

        fn sent(&self) -> Vec<Sent> {
            self.sent.lock().unwrap().clone()
        }

        fn datagrams(&self) -> Vec<(SocketAddr, Vec<u8>)> {
            let sent = self.sent();
            let datagrams = |sent: &Sent| {
                let parts = sent.contents.chunks(sent.datagram_bytes);
                parts.map(|part| (sent.destination, part.to_vec())).collect::<Vec<_>>()
            };
            sent.iter().flat_map(datagrams).collect()
        }
    }

    impl AsyncUdpSocket for Recorder {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            Box::pin(AtOnce)
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            if self.room.lock().unwrap().pop_front() == Some(false) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let contents = transmit.contents.to_vec();
            let datagram_bytes = transmit.segment_size.unwrap_or(contents.len());
            assert!(contents.len() <= MAX_BATCH_BYTES);
            assert!(contents.len().div_ceil(datagram_bytes) <= self.max_transmit_segments());
            let destination = transmit.destination;
            self.sent.lock().unwrap().push(Sent { destination, contents, datagram_bytes });
            Ok(())
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            _: &mut [IoSliceMut<'_>],
            _: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Ok(address(0))
        }

        fn max_transmit_segments(&self) -> usize {
            64
        }
    }

    #[derive(Debug)]
    struct AtOnce;

    impl UdpPoller for AtOnce {
        fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn address(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    fn transmit(port: u16, contents: &[u8], datagram_bytes: usize) -> Transmit<'_> {
        Transmit {
            destination: address(port),
            ecn: None,
            contents,
            segment_size: (contents.len() > datagram_bytes).then_some(datagram_bytes),
            src_ip: None,
        }
    }

    #[test]
    fn full_batches_leave_together_and_what_is_not_full_ends_them() {
        let (recorder, socket) = Recorder::socket([]);
        let full = [7; 7 * 1_472];
        for _ in 0..9 {
            socket.try_send(&transmit(1, &full, 1_472)).unwrap();
        }
        assert_eq!(recorder.sent().len(), 1, "the kernel takes no more at once");
        assert_eq!(recorder.sent()[0].contents.len(), 6 * full.len());
        socket.try_send(&transmit(1, &full[..2 * 1_472 + 5], 1_472)).unwrap();
        socket.try_send(&transmit(1, &full[..5], 1_472)).unwrap();
        let lengths: Vec<usize> = recorder.sent().iter().map(|sent| sent.contents.len()).collect();
        assert_eq!(lengths, [6 * full.len(), 3 * full.len() + 2 * 1_472 + 5, 5]);
    }

    #[test]
    fn jumbo_frames_leave_as_quinn_hands_them_over() {
        let (recorder, socket) = Recorder::socket([]);
        socket.try_send(&transmit(1, &[7; 7 * 8_972], 8_972)).unwrap();
        assert_eq!(recorder.sent().len(), 1);
    }

    #[tokio::test]
    async fn what_a_driver_has_handed_over_leaves_with_its_poll_and_it_is_asked_for_more_before() {
        let (recorder, socket) = Recorder::socket([false, false]);
        let (mut polls, handed_over) = (0, socket.clone());
        let driver = poll_fn(move |_| {
            polls += 1;
            if polls <= 3 {
                handed_over.try_send(&transmit(1, &[polls; 7 * 1_472], 1_472)).unwrap();
            }
            Poll::Pending
        });
        BatchingRuntime::new(socket).spawn(Box::pin(driver));
        tokio::task::yield_now().await;
        let [sent] = &recorder.sent()[..] else { panic!("one batch: {:?}", recorder.sent().len()) };
        assert_eq!(sent.contents.len(), 3 * 7 * 1_472);
    }

    #[tokio::test]
    async fn the_last_words_of_a_driver_leave() {
        let (recorder, socket) = Recorder::socket([]);
        let last = socket.clone();
        BatchingRuntime::new(socket).spawn(Box::pin(async move {
            last.try_send(&transmit(1, &[1; 7 * 1_200], 1_200)).unwrap();
        }));
        tokio::task::yield_now().await;
        assert_eq!(recorder.sent().len(), 1);
    }

    proptest! {
        /// Every datagram leaves once, and in order, whatever comes and whenever there is room.
        #[test]
        fn nothing_is_lost_doubled_or_overtaken(
            handed_over in prop::collection::vec((1u16..3, 1usize..8, prop::sample::select(vec![1_200, 1_472, 8_972]), any::<bool>()), 0..60),
            room in prop::collection::vec(any::<bool>(), 0..200),
        ) {
            let (recorder, socket) = Recorder::socket(room);
            let mut expected = Vec::new();
            for (number, (port, datagrams, datagram_bytes, is_short)) in handed_over.into_iter().enumerate() {
                let bytes = datagrams * datagram_bytes - usize::from(is_short);
                let contents = vec![number as u8; bytes];
                while socket.try_send(&transmit(port, &contents, datagram_bytes)).is_err() {}
                let parts = contents.chunks(datagram_bytes);
                expected.extend(parts.map(|part| (address(port), part.to_vec())));
            }
            while socket.flush(&mut socket.batch()).is_err() {}
            prop_assert!(recorder.datagrams() == expected);
        }
    }
}
