//! `farfault send`

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::{address, bytes, duration, qlog, rate, state_dir};
use crate::codec::SentLimits;
use crate::codec::ladder::{CodecChoice, ParseCodecError};
use crate::engine::Failure;
use crate::engine::policy::SwitchoverPolicy;
use crate::engine::pusher::PusherKind;
use crate::engine::source::{SourceConfig, SourceTimeouts};
use crate::guest::qemu::QemuSource;
use crate::memory::TrackerKind;
use crate::report::{Output, Report};
use crate::session::journal::{Side, find};
use crate::session::share::{default_encoders, default_limits};
use crate::session::source::{SendOptions, resume_send, send};
use crate::transport::{Connections, MAX_CONNECTIONS, Ticket, TransportOptions};
use crate::wire::message::{HandoverForm, Strategy};

/// Moves a running QEMU guest to a waiting receiver.
#[derive(Debug, Args)]
#[command(
    override_usage = "farfault send [OPTIONS] --qmp <PATH> <TICKET>\n       farfault send [OPTIONS] --resume <ID>"
)]
pub(super) struct Send {
    /// The running QEMU's QMP socket.
    #[arg(long, value_name = "PATH", required_unless_present = "resume")]
    qmp: Option<PathBuf>,
    /// Take the place of a `send` that was killed, or gave up for want of a link, after the decision: send
    /// what the destination lacks. Before the decision the guest is let run on here.
    #[arg(long, value_name = "ID", conflicts_with_all = [
        "qmp", "ticket", "strategy", "handover", "downtime", "precopy_rounds", "base_cache", "line_cache", "tracker", "trace",
    ])]
    resume: Option<String>,
    /// What `farfault receive` printed; `-` reads it from standard input, which keeps it out of the list
    /// of processes.
    #[arg(required_unless_present = "resume")]
    ticket: Option<String>,
    /// hybrid: short pre-copy, then the guest runs on the other side and its last pages follow.
    /// precopy: everything before. postcopy: everything after.
    #[arg(long, value_enum, default_value_t)]
    strategy: StrategyName,
    /// one-flight: the decision travels with the device state (half a round trip of downtime).
    /// strict: the destination loads first and says so (one and a half).
    #[arg(long, value_enum, default_value_t)]
    handover: HandoverName,
    /// How long the guest may stand still. When what is left can be sent within this, the migration
    /// ends without post-copy; 40 ms and half a round trip of it are set aside for stopping and loading.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = duration)]
    downtime: Duration,
    /// Hard limit of what is sent, such as 100Mbit.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    bandwidth: Option<u64>,
    /// Most pre-copy rounds; auto goes by the trend.
    #[arg(long, value_name = "auto|N", default_value = "auto", value_parser = rounds)]
    precopy_rounds: Rounds,
    /// Memory for copies of sent pages, against which changed pages are sent as deltas; auto is an eighth
    /// of what is available. It takes no more than the guest has.
    #[arg(long, value_name = "auto|SIZE", default_value = "auto", value_parser = share)]
    base_cache: Share,
    /// Memory for fingerprints of the other sent pages, 32.5 MiB per GiB, by which their changed lines are
    /// sent; auto is a thirty-second of what is available, and nothing on a host with less than 1 GiB
    /// available.
    #[arg(long, value_name = "auto|SIZE", default_value = "auto", value_parser = share)]
    line_cache: Share,
    /// Threads that encode pages; auto is one a core, up to 8.
    #[arg(long, value_name = "auto|N", default_value = "auto", value_parser = encoders)]
    encoders: Encoders,
    /// Connections of the link; auto begins with one and takes more for bulk where the network takes more than a core
    /// sends, up to half of the cores, at most 8.
    #[arg(long, value_name = "auto|N", default_value = "auto", value_parser = connections)]
    connections: Connections,
    /// Codecs, as PAGES/DELTAS: raw, lz4, zstd:LEVEL or zstd-kin:LEVEL, and off, plain, lz4, zstd:LEVEL,
    /// zstd-old:LEVEL or xbzrle, with levels from -7 to 19; PAGES alone takes the deltas that go with it. auto
    /// follows the link's rate.
    #[arg(long, value_name = "auto|CODECS", default_value = "auto", value_parser = codecs)]
    codec: Codecs,
    /// How the guest's writes are followed: auto takes the fastest that the kernel has.
    #[arg(long, value_name = "auto|write-protect|hash-scan", default_value = "auto")]
    tracker: TrackerKind,
    /// In which order pages go after the switchover, for experiments: linear, heat, bubbling, trend, stall.
    #[arg(long, value_name = "NAME", default_value_t)]
    pusher: PusherKind,
    /// Write which pages the guest has written to after each round into a file, for `farfault replay`.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Log each packet of the link and the congestion control into a file, as qlog, for tools such as qvis. The log
    /// grows with every packet and takes time: it is for experiments.
    #[arg(long, value_name = "FILE")]
    qlog: Option<PathBuf>,
    /// End the source's QEMU when the guest runs at the destination with all its pages; otherwise it is
    /// left stopped.
    #[arg(long)]
    quit_source: bool,
    /// How long to look for the destination when the link is lost, before the migration is given up; 0s
    /// does not look.
    #[arg(long, value_name = "TIME", default_value = "5min", value_parser = duration)]
    reconnect_for: Duration,
    /// Where the journal is kept while the migration runs [default: /var/lib/farfault for root].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Answer Prometheus at this address (HTTP, without any protection) while the migration goes on.
    #[arg(long, value_name = "ADDR:PORT", value_parser = address)]
    pub(super) metrics: Option<SocketAddr>,
    /// One JSON object a line on stdout instead of text.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub(super) enum StrategyName {
    #[default]
    Hybrid,
    Precopy,
    Postcopy,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub(super) enum HandoverName {
    #[default]
    OneFlight,
    Strict,
}

impl From<StrategyName> for Strategy {
    fn from(name: StrategyName) -> Self {
        match name {
            StrategyName::Hybrid => Strategy::Hybrid,
            StrategyName::Precopy => Strategy::Precopy,
            StrategyName::Postcopy => Strategy::Postcopy,
        }
    }
}

impl From<HandoverName> for HandoverForm {
    fn from(name: HandoverName) -> Self {
        match name {
            HandoverName::OneFlight => HandoverForm::OneFlight,
            HandoverName::Strict => HandoverForm::Strict,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Rounds(pub(super) Option<u16>);

/// A size in bytes; `None` leaves it to the host.
#[derive(Clone, Copy, Debug)]
struct Share(Option<u64>);

fn share(text: &str) -> Result<Share, String> {
    match text {
        "auto" => Ok(Share(None)),
        _ => bytes(text).map(|bytes| Share(Some(bytes))).map_err(|error| error.to_string()),
    }
}

impl Share {
    fn bytes_or(self, default: usize) -> usize {
        self.0.map_or(default, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX))
    }
}

#[derive(Clone, Copy, Debug)]
struct Encoders(Option<usize>);

/// More threads than this only wait for each other.
const MAX_ENCODERS: usize = 64;

fn encoders(text: &str) -> Result<Encoders, String> {
    match text {
        "auto" => Ok(Encoders(None)),
        _ => match text.parse() {
            Ok(number) if (1..=MAX_ENCODERS).contains(&number) => Ok(Encoders(Some(number))),
            _ => Err(format!("auto, or a number from 1 to {MAX_ENCODERS}")),
        },
    }
}

fn connections(text: &str) -> Result<Connections, String> {
    match text {
        "auto" => Ok(Connections::Auto),
        _ => match text.parse::<NonZero<u8>>() {
            Ok(number) if number.get() <= MAX_CONNECTIONS => Ok(Connections::Exactly(number)),
            _ => Err(format!("auto, or a number from 1 to {MAX_CONNECTIONS}")),
        },
    }
}

#[derive(Clone, Copy, Debug)]
struct Codecs(Option<CodecChoice>);

fn codecs(text: &str) -> Result<Codecs, String> {
    match text {
        "auto" => Ok(Codecs(None)),
        _ => text
            .parse()
            .map(|choice| Codecs(Some(choice)))
            .map_err(|error: ParseCodecError| error.to_string()),
    }
}

/// More rounds than this are beyond what a page's version can count.
const MAX_ROUNDS: u16 = 1000;

pub(super) fn rounds(text: &str) -> Result<Rounds, String> {
    match text {
        "auto" => Ok(Rounds(None)),
        _ => match text.parse() {
            Ok(number) if (1..=MAX_ROUNDS).contains(&number) => Ok(Rounds(Some(number))),
            _ => Err(format!("auto, or a number from 1 to {MAX_ROUNDS}")),
        },
    }
}

impl Send {
    pub(super) async fn run(self, output: Arc<Output>) -> Result<Report, Failure> {
        let transport = TransportOptions {
            bandwidth_limit_bytes_per_s: self.bandwidth,
            connections: self.connections,
            qlog: qlog(self.qlog.as_deref())?,
            ..TransportOptions::default()
        };
        let options = SendOptions {
            engine: SourceConfig {
                strategy: self.strategy.into(),
                handover: self.handover.into(),
                policy: SwitchoverPolicy {
                    downtime_budget: self.downtime,
                    max_rounds: self.precopy_rounds.0,
                },
                timeouts: SourceTimeouts::default(),
            },
            limits: self.limits(),
            encoders: self.encoders.0.unwrap_or_else(default_encoders),
            codecs: self.codec.0,
            tracker: self.tracker,
            trace: self.trace.clone(),
            pusher: self.pusher,
            state_dir: state_dir(self.state_dir.clone()),
            quit_source: self.quit_source,
            reconnect_for: self.reconnect_for,
        };
        if let Some(id) = &self.resume {
            let found = find(&options.state_dir, id, Some(Side::Source))?;
            return resume_send(found, &transport, options, output).await;
        }
        let ticket = self.ticket()?;
        let guest = QemuSource::attach(self.qmp.as_deref().unwrap_or(Path::new("")))?;
        send(Box::new(guest), &ticket, &transport, options, output).await
    }

    fn limits(&self) -> SentLimits {
        let SentLimits { base_cache_bytes, lines_bytes } = default_limits();
        SentLimits {
            base_cache_bytes: self.base_cache.bytes_or(base_cache_bytes),
            lines_bytes: self.line_cache.bytes_or(lines_bytes),
        }
    }

    fn ticket(&self) -> Result<Ticket, Failure> {
        let mut text = self.ticket.clone().unwrap_or_default();
        if text == "-" {
            text.clear();
            if std::io::stdin().is_terminal() {
                eprintln!("paste the ticket that farfault receive printed, and press Enter");
            }
            std::io::stdin().read_line(&mut text).map_err(|error| {
                Failure::plain(format!("the ticket cannot be read from standard input: {error}"))
            })?;
            if text.trim().is_empty() {
                return Err(Failure::new(
                    "there is no ticket on standard input: its first line is empty",
                    "`ssh DESTINATION head -n1 FILE | farfault send ... -`, or `< FILE` behind it, where FILE \
                     has what `farfault receive` printed: the ticket first, or why there is none",
                ));
            }
        }
        text.trim().parse().map_err(|error: crate::transport::TicketError| {
            Failure::new(error.to_string(), "copy the whole word that farfault receive printed")
        })
    }
}
