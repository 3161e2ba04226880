//! One end of the link: a socket from which datagrams come, and to which they go, many at a time.
//!
//! Linux can take a row of datagrams of the same size in one call and keep it together until somebody wants to
//! see a single one (UDP_SEGMENT and UDP_GRO; de Bruijn and Dumazet, "Optimizing UDP for content delivery", 2018).

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::socket::{setsockopt, sockopt};
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSockRef, UdpSocketState};

/// What may come while the thread is kept from running: 50 ms of a gigabit.
const SOCKET_BUFFER_BYTES: usize = 6 << 20;
/// The most that the kernel puts together.
const LARGEST_ROW_BYTES: usize = 64 << 10;
/// Rows that are received before the other socket and the clock are looked at again.
const ROWS: usize = 8;
/// What a row may hold for IPv4 to carry it.
const MAX_PAYLOAD_BYTES: usize = 65_507;

/// A datagram on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Datagram {
    pub(super) payload: Vec<u8>,
    /// The bits that a network may change, carried as they are.
    pub(super) ecn: Option<EcnCodepoint>,
}

/// A socket on the loopback interface.
pub(super) struct End {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl End {
    pub(super) fn bind() -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        hold_received(&socket, SOCKET_BUFFER_BYTES);
        Ok(End { socket, state })
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Shows `each` the datagrams that have come, as far as `rows` holds them, with who sent them.
    pub(super) fn receive(
        &self,
        rows: &mut Rows,
        mut each: impl FnMut(&[u8], Option<EcnCodepoint>, SocketAddr),
    ) {
        let mut slices = rows.0.each_mut().map(|row| IoSliceMut::new(row));
        let mut meta = [RecvMeta::default(); ROWS];
        let socket = UdpSockRef::from(&self.socket);
        // An error is a datagram of the past that found nobody: as good as lost.
        let Ok(received) = self.state.recv(socket, &mut slices, &mut meta) else { return };
        for (row, meta) in rows.0.iter().zip(&meta[..received]) {
            for payload in row[..meta.len].chunks(meta.stride.max(1)) {
                each(payload, meta.ecn, meta.addr);
            }
        }
    }

    /// Sends a row; what the socket does not take is lost, as with a network card.
    pub(super) fn send(&self, row: &Row, destination: SocketAddr) {
        let transmit = Transmit {
            destination,
            ecn: row.ecn,
            contents: &row.payloads,
            segment_size: Some(row.each_bytes),
            src_ip: None,
        };
        let _ = self.state.send(UdpSockRef::from(&self.socket), &transmit);
    }

    /// Datagrams that the kernel takes in one row: one, where it knows of no rows.
    pub(super) fn max_row(&self) -> usize {
        self.state.max_gso_segments()
    }
}

/// Has the kernel hold so many bytes that have come until they are read. Best effort: only root may have more than the
/// system's limit.
pub(in crate::lab) fn hold_received(socket: &UdpSocket, bytes: usize) {
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &bytes);
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Room for what comes in one call.
pub(super) struct Rows([Vec<u8>; ROWS]);

impl Rows {
    pub(super) fn new() -> Self {
        Rows(std::array::from_fn(|_| vec![0; LARGEST_ROW_BYTES]))
    }
}

/// Datagrams that go together: of the same size, but for the last, which may be shorter.
#[derive(Debug, Default)]
pub(super) struct Row {
    payloads: Vec<u8>,
    each_bytes: usize,
    datagrams: usize,
    ecn: Option<EcnCodepoint>,
}

impl Row {
    /// Whether `datagram` may be the next of this row, of at most `max` datagrams.
    pub(super) fn has_room_for(&self, datagram: &Datagram, max: usize) -> bool {
        let bytes = datagram.payload.len();
        let is_begun_by_any = self.datagrams == 0;
        let is_full_so_far = self.payloads.len() == self.datagrams * self.each_bytes;
        is_begun_by_any
            || (is_full_so_far
                // An empty one would leave no trace in the row.
                && (1..=self.each_bytes).contains(&bytes)
                && datagram.ecn == self.ecn
                && self.datagrams < max
                && self.payloads.len() + bytes <= MAX_PAYLOAD_BYTES)
    }

    /// Adds one for which there is room.
    pub(super) fn push(&mut self, datagram: &Datagram) {
        if self.datagrams == 0 {
            (self.each_bytes, self.ecn) = (datagram.payload.len(), datagram.ecn);
        }
        self.payloads.extend_from_slice(&datagram.payload);
        self.datagrams += 1;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.datagrams == 0
    }

    pub(super) fn clear(&mut self) {
        self.payloads.clear();
        self.datagrams = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn datagrams() -> impl Strategy<Value = Vec<Datagram>> {
        let size = prop_oneof![Just(1452), Just(1200), 0usize..1473];
        let ecn = prop_oneof![9 => Just(Some(EcnCodepoint::Ect0)), 1 => Just(None)];
        let one = (size, any::<u8>(), ecn)
            .prop_map(|(bytes, fill, ecn)| Datagram { payload: vec![fill; bytes], ecn });
        // Each several times over, so that rows come about.
        prop::collection::vec((one, 1usize..80), 1..10).prop_map(|runs| {
            runs.into_iter().flat_map(|(one, count)| std::iter::repeat_n(one, count)).collect()
        })
    }

    proptest! {
        /// What the kernel makes of the rows is what was put into them.
        #[test]
        fn rows_cut_at_their_size_give_the_datagrams(sent in datagrams(), max in 1usize..=64) {
            let mut rows: Vec<Row> = Vec::new();
            for datagram in &sent {
                if !rows.last().is_some_and(|row| row.has_room_for(datagram, max)) {
                    rows.push(Row::default());
                }
                rows.last_mut().unwrap().push(datagram);
            }
            let mut cut: Vec<Datagram> = Vec::new();
            for row in &rows {
                prop_assert!(row.payloads.len() <= MAX_PAYLOAD_BYTES && row.datagrams <= max);
                if row.payloads.is_empty() {
                    cut.push(Datagram { payload: Vec::new(), ecn: row.ecn });
                }
                let chunks = row.payloads.chunks(row.each_bytes.max(1));
                cut.extend(chunks.map(|chunk| Datagram { payload: chunk.to_vec(), ecn: row.ecn }));
            }
            prop_assert_eq!(cut, sent);
        }
    }

    #[test]
    fn datagrams_of_one_size_share_a_row() {
        let full = Datagram { payload: vec![1; 1452], ecn: None };
        let short = Datagram { payload: vec![2; 100], ecn: None };
        let mut row = Row::default();
        for _ in 0..10 {
            assert!(row.has_room_for(&full, 64));
            row.push(&full);
        }
        row.push(&short);
        assert!(!row.has_room_for(&short, 64), "a short one ends the row");
    }
}
