//! `farfault receive`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgGroup, Args};

use super::{address, duration, qlog, state_dir};
use crate::engine::Failure;
use crate::guest::DestinationGuest;
use crate::guest::qemu::{QemuDestination, SpawnOptions};
use crate::report::{Output, Report};
use crate::session::StopSignals;
use crate::session::destination::{ReceiveOptions, receive, resume_receive};
use crate::session::journal::{Side, find};
use crate::transport::{Listener, TransportOptions};

/// Port used unless another is asked for: 0xFA17.
const DEFAULT_PORT: u16 = 64023;

/// Waits for a guest: prints a ticket for `farfault send`.
#[derive(Debug, Args)]
#[command(
    override_usage = "farfault receive [OPTIONS] -- <QEMU COMMAND LINE>\n       farfault receive [OPTIONS] --qmp <PATH>\n       farfault receive [OPTIONS] --resume <ID>"
)]
#[command(group(ArgGroup::new("guest").required(true).args(["qmp", "command", "resume"])))]
pub(super) struct Receive {
    /// Address to listen at, with or without a port (UDP); a wildcard address is told to the sender as
    /// the addresses of this host.
    #[arg(long, value_name = "ADDR[:PORT]", default_value = "[::]", value_parser = listen_address)]
    listen: SocketAddr,
    /// Address that the ticket names instead of those of this host, for a host behind a translating
    /// router; may be given several times.
    #[arg(long, value_name = "ADDR:PORT", value_parser = address)]
    advertise: Vec<SocketAddr>,
    /// Attach to a QEMU that already waits with `-incoming defer -S`.
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,
    /// Take the place of a `receive` that was killed, or gave up for want of a link, after the guest had begun
    /// to run here. Before that the guest is given up here, and the source lets it run on.
    #[arg(long, value_name = "ID", conflicts_with_all = ["listen", "advertise", "paused", "trace", "huge_pages"])]
    resume: Option<String>,
    /// Where the output of the QEMU that is started goes; without this it can be read in
    /// /proc/PID/fd/2 while that QEMU lives.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["qmp", "resume"])]
    qemu_log: Option<PathBuf>,
    /// Leave the guest stopped when all of it has arrived.
    #[arg(long)]
    paused: bool,
    /// Write which pages the guest touches after the switchover into a file, for `farfault replay`. Each
    /// page is then mapped only when it is touched, which slows the guest.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// When all pages have come, gather them into huge pages of 2 MiB, where QEMU has mapped guest RAM so
    /// that they fit: `align=2M` of its memory backend. Some seconds of a core a GiB, and the guest runs.
    #[arg(long)]
    huge_pages: bool,
    /// Log each packet of the link and the congestion control into a file, as qlog, for tools such as qvis. The log
    /// grows with every packet and takes time: it is for experiments.
    #[arg(long, value_name = "FILE")]
    qlog: Option<PathBuf>,
    /// How long to wait for the source when the link is lost, before the migration is given up; 0s does
    /// not wait.
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
    /// After `--`, the QEMU to start, with the source's options; `-incoming defer` and `-S` are added.
    #[arg(last = true, value_name = "QEMU COMMAND LINE")]
    pub(super) command: Vec<String>,
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    text.parse()
        .or_else(|_| bare.parse().map(|ip| SocketAddr::new(ip, DEFAULT_PORT)))
        .map_err(|_| "write it like 10.0.0.2, 10.0.0.2:4711 or [::]:4711".to_owned())
}

impl Receive {
    pub(super) async fn run(self, output: Arc<Output>) -> Result<Report, Failure> {
        let transport =
            TransportOptions { qlog: qlog(self.qlog.as_deref())?, ..TransportOptions::default() };
        if let Some(id) = &self.resume {
            let found = find(&state_dir(self.state_dir.clone()), id, Some(Side::Destination))?;
            return resume_receive(found, &transport, self.reconnect_for, output).await;
        }
        // Before there is a QEMU: one that is being started is ended too when we are.
        let signals = StopSignals::listen()?;
        let advertised = self.advertise.clone();
        let (listener, ticket) = Listener::bind(self.listen, advertised, &transport)
            .map_err(|error| Failure::plain(error.to_string()))?;
        let guest: Box<dyn DestinationGuest> = match &self.qmp {
            Some(qmp) => Box::new(QemuDestination::attach(qmp)?),
            None => Box::new(QemuDestination::spawn(&SpawnOptions {
                command: self.command.iter().map(Into::into).collect(),
                log: self.qemu_log.clone(),
            })?),
        };
        output.ticket(&ticket.to_string());
        let options = ReceiveOptions {
            state_dir: state_dir(self.state_dir.clone()),
            paused: self.paused,
            reconnect_for: self.reconnect_for,
            page_table: Arc::default(),
            huge_pages: self.huge_pages,
            trace: self.trace.clone(),
        };
        let migration = ticket.migration.to_string();
        receive(guest, &listener, &migration, options, signals, output).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_come_without_a_port() {
        let port = |text| listen_address(text).map(|address| address.port());
        assert_eq!(port("10.0.0.2"), Ok(DEFAULT_PORT));
        assert_eq!(port("[::]"), Ok(DEFAULT_PORT));
        assert_eq!(port("[::1]:7"), Ok(7));
        assert!(listen_address("host.example:7").unwrap_err().contains("10.0.0.2:4711"));
    }
}
