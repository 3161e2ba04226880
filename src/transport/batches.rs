//! Larger batches of datagrams than quinn makes.
//!
//! The kernel takes up to 64 datagrams of one size in one call, and passes them on as one packet as far as the
//! network card lets it (generic segmentation offload), so that most of what sending and receiving cost is paid
//! once for all of them. Quinn's batches have ten at most: 15 kB with Ethernet's packets. Here batches that
//! follow each other at once are put together, up to what the kernel takes.
//!
//! Nothing waits for more to come, only for room in the socket: whenever one of quinn's drivers is polled it hands over
//! what may be sent now, paced and within the congestion window, and the poll ends with a flush.

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::{self, ThreadId};
use std::time::Instant;

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};

/// UDP's largest payload over IPv4, which over IPv6 is a little larger.
const MAX_BATCH_BYTES: usize = 65_507;
/// Datagrams in one of quinn's batches, at most: as many of the largest ones ([`super::quic::MAX_PAYLOAD_BYTES`]) as
/// the kernel takes in one call.
const QUINN_BATCH_DATAGRAMS: usize = 7;

/// How often a driver is polled in a row while its batch grows. Each time it hands over some twenty datagrams, so twice is
/// usual.
const MOST_POLLS: usize = 4;

const _: () =
    assert!(QUINN_BATCH_DATAGRAMS * super::quic::MAX_PAYLOAD_BYTES as usize <= MAX_BATCH_BYTES);

/// A socket that keeps full batches of quinn's until more have come or it is flushed, as it is at the end of each poll
/// of a driver in a [`BatchingRuntime`].
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
    /// The thread whose driver has added to it last, and is to flush it.
    keeper: Option<ThreadId>,
    /// Has found no room: leaves as it is, by whichever driver comes first.
    is_late: bool,
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
        !self.is_late
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
        self.keeper = Some(thread::current().id());
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

    /// Bytes that a driver on this thread has added to what is kept.
    fn kept_here(&self) -> usize {
        let batch = self.batch();
        if batch.keeper == Some(thread::current().id()) { batch.contents.len() } else { 0 }
    }

    /// Sends what a driver on this thread has added to, and what is late. False when there is no room.
    fn flush_here(&self) -> bool {
        let mut batch = self.batch();
        let is_due = batch.is_late || batch.keeper == Some(thread::current().id());
        !is_due || self.flush(&mut batch)
    }

    /// Sends what is kept. False when there is no room, and it stays; after any other error it is lost, as a datagram
    /// may be.
    fn flush(&self, batch: &mut Batch) -> bool {
        let Some(kind) = batch.kind else { return true };
        let sent = self.inner.try_send(&Transmit {
            destination: kind.destination,
            ecn: kind.ecn,
            contents: &batch.contents,
            segment_size: Some(kind.datagram_bytes),
            src_ip: kind.source,
        });
        if matches!(sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            batch.is_late = true;
            return false;
        }
        batch.contents.clear();
        *batch = Batch { contents: std::mem::take(&mut batch.contents), ..Batch::default() };
        true
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
        // As many as it may have, so that probably more follow; and there is room for as many again.
        let more_may_follow = |kept: usize| {
            transmit.segment_size.is_some_and(|datagram_bytes| {
                bytes == datagram_bytes * self.max_transmit_segments()
                    && kept + bytes <= most_bytes(datagram_bytes, most_datagrams)
            })
        };
        if !batch.takes(transmit, most_datagrams) {
            // Never out of order: QUIC takes a datagram that three later ones overtake for lost.
            if !self.flush(&mut batch) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            if !more_may_follow(bytes) {
                drop(batch);
                return self.inner.try_send(transmit);
            }
        }
        batch.add(transmit);
        if !more_may_follow(batch.contents.len()) {
            // It is taken, whether there is room or not.
            self.flush(&mut batch);
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

    /// A plain one: what quinn wraps by itself is not batched.
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
        // A driver that has more to send asks to be polled again. While its batch grows it is, at once.
        for _ in 0..MOST_POLLS {
            let before = socket.kept_here();
            if driver.as_mut().poll(cx).is_ready() {
                // What finds no room is left to the other drivers, of which the endpoint's is the last.
                socket.flush_here();
                return Poll::Ready(());
            }
            if socket.kept_here() <= before {
                break;
            }
        }
        while !socket.flush_here() {
            if !matches!(poller.as_mut().poll_writable(cx), Poll::Ready(Ok(()))) {
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

    /// Takes what it is given when it has room.
    #[derive(Debug, Default)]
    struct Recorder {
        sent: Mutex<Vec<Sent>>,
        /// Whether there is room, for one call after another; behind the end there is.
        room: Mutex<VecDeque<bool>>,
        most_datagrams: Mutex<Option<usize>>,
    }

    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Sent {
        destination: SocketAddr,
        ecn: Option<EcnCodepoint>,
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
            Box::pin(Turnstile(self))
        }

        fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
            if self.room.lock().unwrap().pop_front() == Some(false) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let contents = transmit.contents.to_vec();
            let datagram_bytes = transmit.segment_size.unwrap_or(contents.len());
            assert!(contents.len() <= MAX_BATCH_BYTES);
            assert!(contents.len().div_ceil(datagram_bytes) <= 64);
            let Transmit { destination, ecn, .. } = *transmit;
            self.sent.lock().unwrap().push(Sent { destination, ecn, contents, datagram_bytes });
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
            self.most_datagrams.lock().unwrap().unwrap_or(64)
        }
    }

    /// Room comes with the first look, and whoever waits for it is woken.
    #[derive(Debug)]
    struct Turnstile(Arc<Recorder>);

    impl UdpPoller for Turnstile {
        fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            if self.0.room.lock().unwrap().front() != Some(&false) {
                return Poll::Ready(Ok(()));
            }
            self.0.room.lock().unwrap().clear();
            cx.waker().wake_by_ref();
            Poll::Pending
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

    #[test]
    fn what_goes_elsewhere_or_is_marked_otherwise_does_not_go_along() {
        let (recorder, socket) = Recorder::socket([]);
        let full = [7; 7 * 1_472];
        let marked = Transmit { ecn: Some(EcnCodepoint::Ect0), ..transmit(1, &full, 1_472) };
        for sent in [transmit(1, &full, 1_472), marked.clone(), marked, transmit(2, &full, 1_472)] {
            socket.try_send(&sent).unwrap();
        }
        assert!(socket.flush_here());
        let sent: Vec<_> =
            recorder.sent().iter().map(|sent| (sent.ecn, sent.contents.len())).collect();
        let marked = (Some(EcnCodepoint::Ect0), 2 * full.len());
        assert_eq!(sent, [(None, full.len()), marked, (None, full.len())]);
    }

    #[test]
    fn without_offload_nothing_is_kept() {
        let (recorder, socket) = Recorder::socket([]);
        socket.try_send(&transmit(1, &[7; 7 * 1_472], 1_472)).unwrap();
        *recorder.most_datagrams.lock().unwrap() = Some(1);
        assert_eq!(socket.max_transmit_segments(), 1);
        for number in 1..4 {
            socket.try_send(&transmit(1, &[7; 1_472], 1_472)).unwrap();
            assert_eq!(
                recorder.sent().len(),
                1 + number,
                "what was kept before, and each by itself"
            );
        }
    }

    /// Hands over three batches, one a poll, and waits for ever.
    fn three_batches(socket: Arc<BatchingSocket>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let mut polls = 0;
        Box::pin(poll_fn(move |_| {
            polls += 1;
            if polls <= 3 {
                socket.try_send(&transmit(1, &[polls; 7 * 1_472], 1_472)).unwrap();
            }
            Poll::Pending
        }))
    }

    #[tokio::test]
    async fn what_a_driver_has_handed_over_leaves_with_its_poll_and_it_is_asked_for_more_before() {
        let (recorder, socket) = Recorder::socket([]);
        BatchingRuntime::new(socket.clone()).spawn(three_batches(socket));
        tokio::task::yield_now().await;
        let lengths: Vec<usize> = recorder.sent().iter().map(|sent| sent.contents.len()).collect();
        assert_eq!(lengths, [3 * 7 * 1_472]);
    }

    #[tokio::test]
    async fn without_room_a_driver_is_woken_when_there_is_some_and_what_was_kept_leaves() {
        let (recorder, socket) = Recorder::socket([false; 10]);
        BatchingRuntime::new(socket.clone()).spawn(three_batches(socket));
        tokio::task::yield_now().await;
        let lengths: Vec<usize> = recorder.sent().iter().map(|sent| sent.contents.len()).collect();
        assert_eq!(lengths, [3 * 7 * 1_472]);
    }

    #[test]
    fn what_another_driver_is_putting_together_is_left_to_it_unless_it_is_late() {
        let (recorder, socket) = Recorder::socket([false]);
        let other = socket.clone();
        let keep = move || other.try_send(&transmit(1, &[1; 7 * 1_472], 1_472)).unwrap();
        std::thread::spawn(keep).join().unwrap();
        assert!(socket.flush_here() && recorder.sent().is_empty());
        socket.try_send(&transmit(2, &[2; 5], 1_472)).unwrap_err();
        assert!(socket.flush_here());
        assert_eq!(recorder.sent().len(), 1, "it had found no room");
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
            while !socket.flush_here() {}
            prop_assert!(recorder.datagrams() == expected);
        }
    }
}
