use proptest::prelude::*;

use super::*;

/// What a sender's kernel hands over.
#[derive(Clone, Debug)]
struct Flow {
    ip: Ip,
    transport: Transport,
    /// Options of IPv4 and TCP, in words.
    options: usize,
    each_bytes: usize,
    payload: Vec<u8>,
    id: u16,
    sequence: u32,
    tcp_flags: u8,
}

impl Flow {
    fn bytes(&self) -> Vec<u8> {
        let Flow { ip, transport, options, each_bytes, payload, .. } = self;
        let mut packet = match ip {
            Ip::V4 => {
                let mut header = vec![0; 20 + options * 4];
                header[0] = 0x40 | (5 + *options as u8);
                header[4..6].copy_from_slice(&self.id.to_be_bytes());
                header[8..10].copy_from_slice(&[64, transport.protocol()]);
                header[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
                header
            }
            Ip::V6 => {
                let mut header = vec![0; 40];
                header[0] = 0x60;
                header[6..8].copy_from_slice(&[transport.protocol(), 64]);
                (8..40).for_each(|i| header[i] = i as u8);
                header
            }
        };
        let transport_at = packet.len();
        let mut header = vec![0; if *transport == Transport::Tcp { 20 + options * 4 } else { 8 }];
        header[..4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
        if *transport == Transport::Tcp {
            header[4..8].copy_from_slice(&self.sequence.to_be_bytes());
            header[12] = (5 + *options as u8) << 4;
            header[13] = self.tcp_flags;
        } else {
            put(&mut header, 4, (8 + payload.len()) as u16);
        }
        let transport_bytes = header.len() + payload.len();
        packet.extend(header);
        packet.extend(payload);
        let length = packet.len() as u16;
        let addresses = match ip {
            Ip::V4 => {
                put(&mut packet, 2, length);
                let checksum = !fold(sum(&packet[..transport_at]));
                put(&mut packet, 10, checksum);
                12..20
            }
            Ip::V6 => {
                put(&mut packet, 4, length - 40);
                8..40
            }
        };
        let pseudo =
            sum(&packet[addresses]) + u64::from(transport.protocol()) + transport_bytes as u64;
        put(&mut packet, transport_at + transport.checksum_at(), fold(pseudo));

        let gso = match (transport, ip) {
            (Transport::Udp, _) => GSO_UDP_L4,
            (Transport::Tcp, Ip::V4) => GSO_TCP_V4,
            (Transport::Tcp, Ip::V6) => GSO_TCP_V6,
        };
        let headers_bytes = packet.len() - payload.len();
        let mut bytes = vec![FLAG_NEEDS_CHECKSUM, gso];
        for field in [headers_bytes, *each_bytes, transport_at, transport.checksum_at()] {
            bytes.extend((field as u16).to_ne_bytes());
        }
        bytes.extend(packet);
        bytes
    }
}

fn flow() -> impl Strategy<Value = Flow> {
    let ip = prop_oneof![Just(Ip::V4), Just(Ip::V6)];
    let transport = prop_oneof![Just(Transport::Tcp), Just(Transport::Udp)];
    let payload = prop::collection::vec(any::<u8>(), 1..20_000);
    let fields = (0usize..6, 200usize..1460, any::<u16>(), any::<u32>(), any::<u8>());
    (ip, transport, payload, fields).prop_map(
        |(ip, transport, payload, (options, each_bytes, id, sequence, tcp_flags))| Flow {
            ip,
            transport,
            options,
            each_bytes,
            payload,
            id,
            sequence,
            tcp_flags,
        },
    )
}

fn packets(bytes: &[u8]) -> Vec<Packet> {
    Sent::new(bytes.to_vec()).packets().collect()
}

fn written(run: &Run) -> Vec<u8> {
    let mut bytes = Vec::new();
    let payload = run.encode(&mut bytes).to_vec();
    bytes.extend(payload);
    bytes
}

/// As the far end's kernel would complete it, or a network card.
fn with_checksum(written: &[u8]) -> Vec<u8> {
    let (offload, packet) = written.split_at(OFFLOAD_HEADER_BYTES);
    let field = |at: usize| usize::from(u16::from_ne_bytes([offload[at], offload[at + 1]]));
    let (start, offset) = (field(6), field(8));
    let mut packet = packet.to_vec();
    let checksum = !fold(sum(&packet[start..]));
    put(&mut packet, start + offset, checksum);
    packet
}

proptest! {
    /// Each packet is valid by itself: lengths, checksums, place in the flow. Together they carry the payload.
    #[test]
    fn a_row_is_cut_into_packets_that_stand_alone(flow in flow()) {
        let bytes = flow.bytes();
        let packets = packets(&bytes);
        prop_assert_eq!(packets.len(), flow.payload.len().div_ceil(flow.each_bytes));
        let mut payload = Vec::new();
        for (index, packet) in packets.iter().enumerate() {
            let written = written(&Run::of(packet.clone()));
            prop_assert_eq!(written[1], GSO_NONE);
            let ip = with_checksum(&written);
            prop_assert_eq!(ip.len(), packet.bytes() as usize);
            let word = |at: usize| u16::from_be_bytes([ip[at], ip[at + 1]]);
            let (transport_at, addresses) = match flow.ip {
                Ip::V4 => {
                    prop_assert_eq!(usize::from(word(2)), ip.len());
                    prop_assert_eq!(word(4), flow.id.wrapping_add(index as u16));
                    let header_bytes = 20 + 4 * flow.options;
                    prop_assert_eq!(fold(sum(&ip[..header_bytes])), 0xffff);
                    (header_bytes, 12..20)
                }
                Ip::V6 => {
                    prop_assert_eq!(usize::from(word(4)), ip.len() - 40);
                    (40, 8..40)
                }
            };
            let transport_bytes = ip.len() - transport_at;
            let pseudo = sum(&ip[addresses])
                + u64::from(flow.transport.protocol())
                + transport_bytes as u64;
            prop_assert_eq!(fold(pseudo + sum(&ip[transport_at..])), 0xffff);
            let header_bytes = match flow.transport {
                Transport::Udp => {
                    prop_assert_eq!(usize::from(word(transport_at + 4)), transport_bytes);
                    8
                }
                Transport::Tcp => {
                    let sequence = u32::from_be_bytes([4, 5, 6, 7].map(|i| ip[transport_at + i]));
                    let expected = flow.sequence.wrapping_add(payload.len() as u32);
                    prop_assert_eq!(sequence, expected);
                    let mut flags = flow.tcp_flags;
                    if index > 0 {
                        flags &= !TCP_CWR;
                    }
                    if index + 1 < packets.len() {
                        flags &= !(TCP_FIN | TCP_PSH);
                    }
                    prop_assert_eq!(ip[transport_at + 13], flags);
                    20 + 4 * flow.options
                }
            };
            payload.extend_from_slice(&ip[transport_at + header_bytes..]);
        }
        prop_assert_eq!(payload, flow.payload);
    }

    /// A row that lost nothing is delivered as it was sent, but for the header that says how it is cut when it is
    /// a single packet.
    #[test]
    fn a_row_that_arrives_together_is_what_was_sent(flow in flow()) {
        let bytes = flow.bytes();
        let packets = packets(&bytes);
        let mut run = Run::of(packets[0].clone());
        prop_assert!(packets[1..].iter().all(|packet| run.extend(packet)));
        let mut expected = bytes;
        if packets.len() == 1 {
            expected[1] = GSO_NONE;
            expected[4..6].fill(0);
        }
        prop_assert_eq!(written(&run), expected);
    }

    /// Where packets of a row were lost, or come later, the others go in pieces which are cut into the very same
    /// packets.
    #[test]
    fn pieces_of_a_row_are_cut_into_the_same_packets(flow in flow(), lost in any::<u64>()) {
        let bytes = flow.bytes();
        let arrived: Vec<Packet> = packets(&bytes)
            .into_iter()
            .filter(|packet| lost >> (packet.index % 64) & 1 == 0)
            .collect();
        let mut runs: Vec<Run> = Vec::new();
        for packet in &arrived {
            if !runs.last_mut().is_some_and(|run| run.extend(packet)) {
                runs.push(Run::of(packet.clone()));
            }
        }
        let alone = |packet: Packet| written(&Run::of(packet));
        let expected: Vec<_> = arrived.into_iter().map(alone).collect();
        let pieces = runs.iter().flat_map(|run| packets(&written(run)));
        prop_assert_eq!(pieces.map(alone).collect::<Vec<_>>(), expected);
    }

    /// Nothing that is read makes the emulator panic.
    #[test]
    fn any_bytes_are_carried(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        gso in prop_oneof![Just(1u8), Just(4), Just(5), any::<u8>()],
        version in prop_oneof![Just(0x45u8), Just(0x60), any::<u8>()],
        transport_at in 0u16..100,
    ) {
        if bytes.len() > OFFLOAD_HEADER_BYTES {
            bytes[0] |= FLAG_NEEDS_CHECKSUM;
            bytes[1] = gso;
            bytes[6..8].copy_from_slice(&transport_at.to_ne_bytes());
            bytes[OFFLOAD_HEADER_BYTES] = version;
        }
        for packet in packets(&bytes) {
            written(&Run::of(packet));
        }
    }
}

#[test]
fn packets_of_different_rows_do_not_join() {
    let flow = Flow {
        ip: Ip::V4,
        transport: Transport::Udp,
        options: 0,
        each_bytes: 1000,
        payload: vec![7; 3000],
        id: 1,
        sequence: 0,
        tcp_flags: 0,
    };
    let (first, second) = (packets(&flow.bytes()), packets(&flow.bytes()));
    let mut run = Run::of(first[0].clone());
    assert!(!run.extend(&first[2]), "one is missing between them");
    assert!(!run.extend(&second[1]), "of another row");
    assert!(run.extend(&first[1]));
}

#[test]
fn what_is_not_a_row_is_carried_as_it_is() {
    let mut bytes = vec![0; OFFLOAD_HEADER_BYTES + 100];
    bytes[OFFLOAD_HEADER_BYTES] = 0x45;
    let packets = packets(&bytes);
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].bytes(), 100);
    assert_eq!(written(&Run::of(packets[0].clone())), bytes);
}
