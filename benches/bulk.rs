//! Bulk between two network namespaces that a plain pair of virtual network cards joins: TCP, bare quinn, and
//! a link as a migration has it, of one connection and of several, each sent by one process and received by another.
//!
//! `cargo bench --bench bulk`, as root, sends 4 GiB by each, with the MTU of Ethernet and with jumbo frames;
//! `cargo bench --bench bulk -- link` only what has the word in its name. Bare quinn is as it comes, its
//! congestion controller included, but for buffers that are no limit, the cipher, and the datagrams' size.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::num::NonZero;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use farfault::lab::netns::Netns;
use farfault::transport::{Connections, Lane, Listener, Ticket, TransportOptions, connect};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::socket::{setsockopt, sockopt};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

const TOTAL_BYTES: u64 = 4 << 30;
const MESSAGE_BYTES: usize = 256 << 10;
const ADDRESS: &str = "10.78.0.2:4444";
const WAYS: [&str; 5] = ["tcp", "quinn", "link", "link of 2", "link of 4"];
const MTUS: [u16; 2] = [1_500, 9_000];
/// As large as quinn's batches of datagrams allow.
const LARGEST_PAYLOAD_BYTES: u16 = 6_500;
const SERVER_NAME: &str = "bulk";

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["receive", way, mtu] => receive(way, mtu.parse()?),
        ["send", way, mtu] => send(way, mtu.parse()?),
        [] => compare(""),
        [word] => compare(word),
        _ => bail!("at most one word"),
    }
}

fn compare(word: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("network namespaces need root: nothing is measured");
        return Ok(());
    }
    println!("{:<14} {:>6} {:>12} {:>12}", "way, MTU", "GiB/s", "sender", "receiver");
    println!("{:<14} {:>6} {:>12} {:>12}", "", "", "CPU s/GiB", "CPU s/GiB");
    let pid = std::process::id();
    let ends = [Netns::create(&format!("bulk-{pid}-a"))?, Netns::create(&format!("bulk-{pid}-b"))?];
    let [a, b] = &ends;
    a.ip(&["link", "add", "bulk", "type", "veth", "peer", "name", "bulk", "netns", b.name()])?;
    for (end, address) in [(a, "10.78.0.1/30"), (b, "10.78.0.2/30")] {
        end.ip(&["address", "add", address, "dev", "bulk"])?;
        end.ip(&["link", "set", "bulk", "up"])?;
    }
    for mtu in MTUS {
        for end in &ends {
            end.ip(&["link", "set", "bulk", "mtu", &mtu.to_string()])?;
        }
        for way in WAYS {
            let name = format!("{way}, {mtu}");
            if name.contains(word) {
                let [seconds, sender, receiver] = measure(&ends, way, mtu)?;
                let gib = TOTAL_BYTES as f64 / f64::from(1 << 30);
                let rate = gib / seconds;
                println!("{name:<14} {rate:>6.2} {:>12.2} {:>12.2}", sender / gib, receiver / gib);
            }
        }
    }
    Ok(())
}

/// Seconds that it took, and those of a processor that either side has used.
fn measure([a, b]: &[Netns; 2], way: &str, mtu: u16) -> Result<[f64; 3]> {
    let start = |end: &Netns, role: &str| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", end.name()]).arg(std::env::current_exe()?);
        command.args([role, way, &mtu.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("run `ip`")
    };
    let mut receiver = start(b, "receive")?;
    // What the sender must know, in a line.
    let mut key = String::new();
    let mut output = std::io::BufReader::new(receiver.stdout.take().context("a pipe")?);
    std::io::BufRead::read_line(&mut output, &mut key)?;
    let mut sender = start(a, "send")?;
    sender.stdin.take().context("a pipe")?.write_all(key.as_bytes())?;
    let sent = sender.wait_with_output()?;
    let mut received = String::new();
    output.read_to_string(&mut received)?;
    ensure!(sent.status.success() && receiver.wait()?.success(), "{way} has failed");
    let sent = String::from_utf8(sent.stdout)?;
    let numbers = |text: &str| -> Result<Vec<f64>> {
        text.split_whitespace().map(|word| Ok(word.parse()?)).collect()
    };
    let (sent, received) = (numbers(&sent)?, numbers(&received)?);
    ensure!(sent.len() == 2 && received.len() == 1, "{way}: {sent:?} and {received:?}");
    Ok([sent[0], sent[1], received[0]])
}

fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

fn receive(way: &str, mtu: u16) -> Result<()> {
    let received = match way {
        "tcp" => receive_tcp()?,
        "quinn" => runtime()?.block_on(receive_quinn(mtu))?,
        _ => runtime()?.block_on(receive_link())?,
    };
    ensure!(received == TOTAL_BYTES, "{received} bytes have come");
    println!("{}", cpu_seconds()?);
    Ok(())
}

fn send(way: &str, mtu: u16) -> Result<()> {
    let mut key = String::new();
    std::io::stdin().read_to_string(&mut key)?;
    // Nothing compresses on the way; different pages, so that the processor's caches do not flatter.
    let content: Vec<u8> = (0..64 << 20).map(|_| fastrand::u8(..)).collect();
    let content = Bytes::from(content);
    let messages = (0..TOTAL_BYTES as usize / MESSAGE_BYTES).map(|count| {
        let at = count * MESSAGE_BYTES % content.len();
        content.slice(at..at + MESSAGE_BYTES)
    });
    let (begun, cpu) = (Instant::now(), cpu_seconds()?);
    match way {
        "tcp" => send_tcp(messages)?,
        "quinn" => runtime()?.block_on(send_quinn(key.trim(), mtu, messages))?,
        _ => {
            let connections = way.strip_prefix("link of ").map_or(Ok(1), str::parse)?;
            let connections = NonZero::new(connections).context("no connection")?;
            runtime()?.block_on(send_link(key.trim(), connections, messages))?;
        }
    }
    println!("{} {}", begun.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
    Ok(())
}

fn receive_tcp() -> Result<u64> {
    let listener = TcpListener::bind(ADDRESS)?;
    println!("listening");
    let (mut stream, _) = listener.accept()?;
    let (mut buffer, mut received) = (vec![0; 1 << 20], 0);
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            bytes => received += bytes as u64,
        }
    }
    stream.write_all(&[1])?;
    Ok(received)
}

fn send_tcp(messages: impl Iterator<Item = Bytes>) -> Result<()> {
    let mut stream = TcpStream::connect(ADDRESS)?;
    for message in messages {
        stream.write_all(&message)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(stream.read_exact(&mut [0])?)
}

/// Quinn's defaults, with buffers that are no limit.
fn quinn_config(mtu: u16) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config.stream_receive_window(VarInt::from_u32(64 << 20));
    config.receive_window(VarInt::from_u32(64 << 20));
    config.send_window(64 << 20);
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound((mtu - 28).min(LARGEST_PAYLOAD_BYTES));
    config.mtu_discovery_config(Some(discovery));
    Arc::new(config)
}

fn quinn_endpoint(address: SocketAddr, server: Option<quinn::ServerConfig>) -> Result<Endpoint> {
    let socket = UdpSocket::bind(address)?;
    let bytes = TransportOptions::default().socket_buffer_bytes;
    setsockopt(&socket, sockopt::RcvBufForce, &bytes)?;
    setsockopt(&socket, sockopt::SndBufForce, &bytes)?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(LARGEST_PAYLOAD_BYTES)?;
    Ok(Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime))?)
}

async fn receive_quinn(mtu: u16) -> Result<u64> {
    let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let chain = vec![CertificateDer::from(made.cert.der().to_vec())];
    let mut server = quinn::ServerConfig::with_single_cert(chain, key.into())?;
    server.transport_config(quinn_config(mtu));
    let endpoint = quinn_endpoint(ADDRESS.parse()?, Some(server))?;
    let words = made.cert.der().iter().map(|byte| format!("{byte:02x}"));
    println!("{}", words.collect::<String>());
    let connection = endpoint.accept().await.context("nobody comes")?.await?;
    let mut stream = connection.accept_uni().await?;
    let mut received = 0;
    while let Some(chunk) = stream.read_chunk(usize::MAX, true).await? {
        received += chunk.bytes.len() as u64;
    }
    connection.closed().await;
    Ok(received)
}

async fn send_quinn(
    certificate: &str,
    mtu: u16,
    messages: impl Iterator<Item = Bytes>,
) -> Result<()> {
    let digits = certificate.as_bytes().chunks(2).map(|pair| Ok(std::str::from_utf8(pair)?));
    let bytes = digits.map(|pair: Result<&str>| Ok(u8::from_str_radix(pair?, 16)?));
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(bytes.collect::<Result<Vec<u8>>>()?))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let crypto = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(crypto)?));
    client.transport_config(quinn_config(mtu));
    let endpoint = quinn_endpoint("0.0.0.0:0".parse()?, None)?;
    let connection = endpoint.connect_with(client, ADDRESS.parse()?, SERVER_NAME)?.await?;
    let mut stream = connection.open_uni().await?;
    for message in messages {
        stream.write_chunk(message).await?;
    }
    stream.finish()?;
    stream.stopped().await?;
    connection.close(VarInt::from_u32(0), b"sent");
    endpoint.wait_idle().await;
    Ok(())
}

async fn receive_link() -> Result<u64> {
    let options = TransportOptions::default();
    let (listener, ticket) = Listener::bind(ADDRESS.parse()?, Vec::new(), &options)?;
    println!("{ticket}");
    let link = listener.accept(None).await?;
    let mut received = 0;
    while received < TOTAL_BYTES {
        received += link.recv(Lane::Push).await?.len() as u64;
    }
    link.ended().await;
    Ok(received)
}

async fn send_link(
    ticket: &str,
    connections: NonZero<u8>,
    messages: impl Iterator<Item = Bytes>,
) -> Result<()> {
    let ticket: Ticket = ticket.parse()?;
    let connections = Connections::Exactly(connections);
    let options = TransportOptions { connections, ..TransportOptions::default() };
    let link = connect(&ticket, &options).await?;
    link.expect_faults(false);
    for message in messages {
        link.push(message).await?;
    }
    link.push_drained().await?;
    link.close(0, "sent").await;
    Ok(())
}
