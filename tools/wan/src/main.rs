//! `wan`: a link of a given rate, delay, queue and loss between two network namespaces.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use clap::Parser;
use farfault_wan::control::Answer;
use farfault_wan::emulator::{ControlSource, Emulator, StopSignals};
use farfault_wan::link::LinkConfig;
use farfault_wan::netns::Netns;
use farfault_wan::spec::{LinkSpec, Loss, QueueLimit, Rate, parse_time};
use farfault_wan::tun::Tun;

/// Emulates a wide-area link between two network namespaces.
///
/// Each direction: a tail-drop queue, serialisation at the rate, random loss, then the delay. Prints
/// {"event":"ready"} when the link is up, and the totals of both directions at the end, which is
/// SIGTERM, SIGINT, `quit`, or the end of standard input.
///
/// While it runs, it takes commands, one a line, on standard input or on a socket (--control): cut,
/// restore, rate X, delay X, loss X, queue X, totals, reset, quit. Each is answered with one line
/// of JSON.
///
/// Example:
///
///   wan --create --a left,10.0.0.1/30 --b right,10.0.0.2/30 --link 100Mbit,40ms
#[derive(Parser)]
#[command(verbatim_doc_comment)]
struct Args {
    /// One end: NAMESPACE,ADDRESS/PREFIX
    #[arg(long)]
    a: End,
    /// The other end
    #[arg(long)]
    b: End,
    /// Rate and round trip, and loss if any, in one: 100Mbit,40ms[,0.1%]
    #[arg(long, required_unless_present_all = ["rate", "delay"])]
    link: Option<LinkSpec>,
    /// Bits per second of each direction: 100Mbit
    #[arg(long, requires = "delay", conflicts_with = "link")]
    rate: Option<Rate>,
    /// One way: 20ms
    #[arg(long, value_parser = parse_time, requires = "rate", conflicts_with = "link")]
    delay: Option<Duration>,
    /// What may wait at each end: bytes (500000, 64KiB), or bandwidth-delay products (bdp, 10bdp)
    #[arg(long, default_value = "bdp")]
    queue: QueueLimit,
    /// Share of packets lost at random in each direction: 0.1%
    #[arg(long, conflicts_with = "link")]
    loss: Option<Loss>,
    /// Decides which packets are lost [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Make the two namespaces, and remove them at the end
    #[arg(long)]
    create: bool,
    /// Take commands on this Unix socket instead of standard input
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Name of the network device in both namespaces
    #[arg(long, default_value = "wan0")]
    device: String,
}

/// `NAMESPACE,ADDRESS/PREFIX`
#[derive(Clone)]
struct End {
    netns: String,
    address: String,
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(',') {
            Some((netns, address)) if !netns.is_empty() && address.contains('/') => {
                Ok(End { netns: netns.to_owned(), address: address.to_owned() })
            }
            _ => Err(format!("{text:?} is not NAMESPACE,ADDRESS/PREFIX, like left,10.0.0.1/30")),
        }
    }
}

impl Args {
    fn link_config(&self) -> LinkConfig {
        let (rate, delay, loss) = match (self.link, self.rate, self.delay) {
            (Some(link), ..) => (link.rate, link.round_trip / 2, link.loss),
            (None, Some(rate), Some(delay)) => (rate, delay, self.loss.unwrap_or_default()),
            _ => unreachable!("clap asks for --link, or both --rate and --delay"),
        };
        LinkConfig { rate, delay, queue_bytes: self.queue.bytes(rate, delay * 2), loss }
    }
}

/// The control socket's file, removed at the end.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let stop = StopSignals::hold()?;
    let open = if args.create { Netns::create } else { Netns::existing };
    let (netns_a, netns_b) = (open(&args.a.netns)?, open(&args.b.netns)?);
    let tun_a = Tun::open(&netns_a, &args.device, &args.a.address)?;
    let tun_b = Tun::open(&netns_b, &args.device, &args.b.address)?;
    let seed = args.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        now.as_nanos() as u64
    });
    let (control, _socket_file) = match &args.control {
        None => (ControlSource::Stdin, None),
        Some(path) => {
            let listener = UnixListener::bind(path)
                .with_context(|| format!("make the control socket {}", path.display()))?;
            listener.set_nonblocking(true)?;
            (ControlSource::Socket(listener), Some(SocketFile(path.clone())))
        }
    };
    let emulator = Emulator::new(tun_a, tun_b, args.link_config(), seed);
    print(&Answer::Ready)?;
    let totals = emulator.run(control, &stop)?;
    print(&Answer::Totals(totals))
}

fn print(answer: &Answer) -> Result<()> {
    let mut out = std::io::stdout();
    out.write_all(answer.to_line().as_bytes())?;
    Ok(out.flush()?)
}
