//! What a TUN device gives at once, and the packets that it is on the wire.
//!
//! The kernel hands a row of packets of one flow to a device as a single large one, with a header that says how it
//! is to be cut (`struct virtio_net_hdr`; Linux's `Documentation/networking/segmentation-offloads.rst`), and takes
//! such a row back. So one read and one write do for many packets. On the link each packet counts by itself: it
//! has headers of its own, waits by itself, and is lost by itself. Those that arrive together and follow each other
//! go to the far end in one piece again. Nothing is copied until then.

use std::ops::Range;
use std::rc::Rc;

/// Of `struct virtio_net_hdr`, which stands before each packet.
pub const OFFLOAD_HEADER_BYTES: usize = 10;

// From <linux/virtio_net.h>.
const FLAG_NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP_V4: u8 = 1;
const GSO_TCP_V6: u8 = 4;
const GSO_UDP_L4: u8 = 5;

const IPV6_HEADER_BYTES: usize = 40;
const UDP_HEADER_BYTES: usize = 8;
const TCP_HEADER_BYTES: usize = 20;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// What one read has brought: one packet, or several of one flow.
#[derive(Debug)]
pub struct Sent {
    /// With the offload header in front.
    bytes: Vec<u8>,
    /// How it is cut into packets.
    cut: Option<Cut>,
}

/// The positions are counted from the first byte of the IP header.
#[derive(Clone, Copy, Debug)]
struct Cut {
    ip: Ip,
    transport: Transport,
    transport_at: usize,
    payload_at: usize,
    /// Payload of each packet; the last may have less.
    each_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ip {
    V4,
    V6,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    fn protocol(self) -> u8 {
        match self {
            Transport::Tcp => 6,
            Transport::Udp => 17,
        }
    }

    /// Where the checksum stands in the header.
    fn checksum_at(self) -> usize {
        match self {
            Transport::Tcp => 16,
            Transport::Udp => 6,
        }
    }
}

impl Sent {
    /// `bytes` as they were read, with the offload header. What says that it is to be cut in a way that is not
    /// known here is one packet, and reaches the far end as it is.
    pub fn new(bytes: Vec<u8>) -> Self {
        let cut = Cut::of(&bytes);
        Sent { bytes, cut }
    }

    /// The packets of it, in order.
    pub fn packets(self) -> impl Iterator<Item = Packet> {
        let sent = Rc::new(self);
        (0..sent.count()).map(move |index| Packet { sent: sent.clone(), index })
    }

    fn ip_packet(&self) -> &[u8] {
        self.bytes.get(OFFLOAD_HEADER_BYTES..).unwrap_or_default()
    }

    fn count(&self) -> usize {
        self.cut.map_or(1, |cut| (self.ip_packet().len() - cut.payload_at).div_ceil(cut.each_bytes))
    }
}

impl Cut {
    fn of(bytes: &[u8]) -> Option<Self> {
        let (header, packet) = bytes.split_at_checked(OFFLOAD_HEADER_BYTES)?;
        let (ip, transport) = match (header[1], packet.first()? >> 4) {
            (GSO_TCP_V4, 4) => (Ip::V4, Transport::Tcp),
            (GSO_TCP_V6, 6) => (Ip::V6, Transport::Tcp),
            (GSO_UDP_L4, 4) => (Ip::V4, Transport::Udp),
            (GSO_UDP_L4, 6) => (Ip::V6, Transport::Udp),
            _ => return None,
        };
        // The kernel never leaves out either for these kinds.
        let needs_checksum = header[0] & FLAG_NEEDS_CHECKSUM != 0;
        let each_bytes = usize::from(u16::from_ne_bytes([header[4], header[5]]));
        let transport_at = usize::from(u16::from_ne_bytes([header[6], header[7]]));
        let ip_header_bytes = match ip {
            Ip::V4 => usize::from(packet[0] & 0xf) * 4,
            Ip::V6 => IPV6_HEADER_BYTES,
        };
        if !needs_checksum || each_bytes == 0 || transport_at < ip_header_bytes.max(20) {
            return None;
        }
        let transport_header_bytes = match transport {
            Transport::Tcp => usize::from(packet.get(transport_at + 12)? >> 4) * 4,
            Transport::Udp => UDP_HEADER_BYTES,
        };
        let least_bytes = match transport {
            Transport::Tcp => TCP_HEADER_BYTES,
            Transport::Udp => UDP_HEADER_BYTES,
        };
        let payload_at = transport_at + transport_header_bytes;
        let is_whole = transport_header_bytes >= least_bytes && payload_at < packet.len();
        is_whole.then_some(Cut { ip, transport, transport_at, payload_at, each_bytes })
    }
}

/// One packet on the wire.
#[derive(Clone, Debug)]
pub struct Packet {
    sent: Rc<Sent>,
    index: usize,
}

impl Packet {
    /// With its headers from IP on.
    pub fn bytes(&self) -> u32 {
        let packet_bytes = self.sent.ip_packet().len();
        let bytes = self.sent.cut.map_or(packet_bytes, |cut| {
            let left = packet_bytes - cut.payload_at - self.index * cut.each_bytes;
            cut.payload_at + left.min(cut.each_bytes)
        });
        bytes as u32
    }
}

/// Packets that follow each other in what was sent, to be delivered in one piece.
#[derive(Debug)]
pub struct Run {
    sent: Rc<Sent>,
    packets: Range<usize>,
}

impl Run {
    /// A run of one.
    pub fn of(packet: Packet) -> Self {
        Run { sent: packet.sent, packets: packet.index..packet.index + 1 }
    }

    /// Adds a packet, if it is the one that follows.
    pub fn extend(&mut self, packet: &Packet) -> bool {
        let follows = Rc::ptr_eq(&self.sent, &packet.sent) && self.packets.end == packet.index;
        self.packets.end += usize::from(follows);
        follows
    }

    /// The bytes to write: `headers` is filled with the headers, and what is returned goes behind them.
    pub fn encode(&self, headers: &mut Vec<u8>) -> &[u8] {
        headers.clear();
        let Sent { bytes, cut } = &*self.sent;
        let packet = self.sent.ip_packet();
        let Some(cut) = cut else { return bytes };
        let all_bytes = packet.len() - cut.payload_at;
        let payload = cut.payload_at + self.packets.start * cut.each_bytes
            ..cut.payload_at + (self.packets.end * cut.each_bytes).min(all_bytes);
        headers.extend_from_slice(&bytes[..OFFLOAD_HEADER_BYTES + cut.payload_at]);
        let (offload, protocol) = headers.split_at_mut(OFFLOAD_HEADER_BYTES);
        if self.packets.len() == 1 {
            offload[1] = GSO_NONE;
            offload[4..6].fill(0);
        }
        offload[2..4].copy_from_slice(&(cut.payload_at as u16).to_ne_bytes());
        cut.rewrite(protocol, payload.len(), &self.packets, self.sent.count());
        &packet[payload]
    }
}

impl Cut {
    /// Makes the headers of all those of `packets`, with `payload_bytes`.
    fn rewrite(
        &self,
        headers: &mut [u8],
        payload_bytes: usize,
        packets: &Range<usize>,
        count: usize,
    ) {
        // No longer than what was read, for which IP had a length.
        let length = headers.len() + payload_bytes;
        let transport_bytes = (length - self.transport_at) as u16;
        match self.ip {
            Ip::V4 => {
                put(headers, 2, length as u16);
                let id = u16::from_be_bytes([headers[4], headers[5]]);
                put(headers, 4, id.wrapping_add(packets.start as u16));
                put(headers, 10, 0);
                let ip_header_bytes = usize::from(headers[0] & 0xf) * 4;
                put(headers, 10, !fold(sum(&headers[..ip_header_bytes])));
            }
            Ip::V6 => put(headers, 4, (length - IPV6_HEADER_BYTES) as u16),
        }
        let at = self.transport_at;
        match self.transport {
            Transport::Tcp => {
                let sequence = u32::from_be_bytes([4, 5, 6, 7].map(|i| headers[at + i]));
                let skipped = (packets.start * self.each_bytes) as u32;
                headers[at + 4..at + 8]
                    .copy_from_slice(&sequence.wrapping_add(skipped).to_be_bytes());
                if packets.end < count {
                    headers[at + 13] &= !(TCP_FIN | TCP_PSH);
                }
                if packets.start > 0 {
                    headers[at + 13] &= !TCP_CWR;
                }
            }
            Transport::Udp => put(headers, at + 4, transport_bytes),
        }
        // What the kernel wants in the place of a checksum that it is still to make: the sum of the addresses,
        // the protocol and the length.
        let addresses = match self.ip {
            Ip::V4 => &headers[12..20],
            Ip::V6 => &headers[8..IPV6_HEADER_BYTES],
        };
        let protocol = u64::from(self.transport.protocol());
        let partial = fold(sum(addresses) + protocol + u64::from(transport_bytes));
        put(headers, at + self.transport.checksum_at(), partial);
    }
}

fn put(headers: &mut [u8], at: usize, value: u16) {
    headers[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Of 16-bit words; an odd byte at the end counts as the upper half of one.
fn sum(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    bytes.chunks(2).map(word).sum()
}

/// The ones' complement sum of RFC 1071.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

#[cfg(test)]
mod tests;
