//! One side of the demo, a process of its own: it has a guest, or awaits one, and does as it is told.

use std::io::{BufRead, Write};
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::sync::mpsc;

use super::guest::Guest;
use super::protocol::{Method, Order, SideEvent, SideSettings};
use crate::codec::SentLimits;
use crate::engine::Failure;
use crate::engine::policy::SwitchoverPolicy;
use crate::engine::pusher::PusherKind;
use crate::engine::source::{SourceConfig, SourceTimeouts};
use crate::lab::relay::MAX_DATAGRAM_BYTES;
use crate::memory::{PageTable, TrackerKind};
use crate::report::{MemoryMap, Output, Role};
use crate::session::StopSignals;
use crate::session::destination::{ReceiveOptions, receive};
use crate::session::journal::remove_state;
use crate::session::share::{default_encoders, default_limits};
use crate::session::source::{SendOptions, send};
use crate::transport::{Listener, Ticket, TransportOptions};

const GUEST_INTERVAL: Duration = Duration::from_millis(40);
/// The map is told every so many looks at the guest.
const MAP_EVERY: u64 = 3;

/// Runs a side until its standard input ends.
pub(super) fn run() -> ExitCode {
    let mut line = String::new();
    let settings = match std::io::stdin().lock().read_line(&mut line) {
        Ok(_) => serde_json::from_str::<SideSettings>(&line),
        Err(error) => Err(serde_json::Error::io(error)),
    };
    let settings = match settings {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("farfault: error: this is a part of `farfault demo`: {error}");
            return ExitCode::from(2);
        }
    };
    let (orders, queue) = mpsc::channel(4);
    let (state_dir, ram_dir) = (settings.state_dir.clone(), settings.ram_dir.clone());
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(order) => drop(orders.blocking_send(order)),
                Err(error) => tracing::error!("an order that is not understood: {error}"),
            }
        }
        // The demo is over, or was killed: nothing here is worth keeping.
        remove_state(&state_dir);
        if let Some(directory) = ram_dir {
            let _ = std::fs::remove_dir_all(directory);
        }
        std::process::exit(0);
    });
    let output = Arc::new(Output::new(true));
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output.error(&Failure::plain(format!("no threads or descriptors left: {error}")));
            return ExitCode::FAILURE;
        }
    };
    let side = Side { settings, output: output.clone(), page_table: Arc::default() };
    let Err(failure) = runtime.block_on(side.run(queue));
    output.error(&failure);
    runtime.shutdown_background();
    ExitCode::FAILURE
}

struct Side {
    settings: SideSettings,
    output: Arc<Output>,
    page_table: Arc<OnceLock<Arc<PageTable>>>,
}

impl Side {
    /// Ends only by a failure: otherwise the process does.
    async fn run(
        self,
        mut orders: mpsc::Receiver<Order>,
    ) -> Result<std::convert::Infallible, Failure> {
        let guest = match self.settings.role {
            Role::Source => {
                let guest = Guest::boot(&self.settings).await?;
                emit(&SideEvent::Booted);
                self.sample(&guest);
                guest
            }
            Role::Destination => {
                let mut guest = Guest::await_arrival(&self.settings)?;
                self.sample(&guest);
                self.receive(&mut guest).await?;
                guest
            }
        };
        while let Some(order) = orders.recv().await {
            match order {
                Order::Migrate { ticket, method } => self.send(&guest, &ticket, method).await?,
                Order::Verify => emit(&SideEvent::Verified(guest.verify().await?)),
            }
        }
        std::future::pending().await
    }

    async fn receive(&self, guest: &mut Guest) -> Result<(), Failure> {
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let (listener, ticket) = Listener::bind(address, Vec::new(), &transport())
            .map_err(|error| Failure::plain(error.to_string()))?;
        self.output.ticket(&ticket.to_string());
        let options = ReceiveOptions {
            state_dir: self.settings.state_dir.clone(),
            paused: false,
            reconnect_for: Duration::ZERO,
            page_table: self.page_table.clone(),
            huge_pages: false,
            trace: None,
        };
        let migration = ticket.migration.to_string();
        let (guest, signals) = (guest.arriving()?, StopSignals::listen()?);
        let report =
            receive(guest, &listener, &migration, options, signals, self.output.clone()).await?;
        self.output.report(&report);
        Ok(())
    }

    async fn send(&self, guest: &Guest, ticket: &str, method: Method) -> Result<(), Failure> {
        let ticket: Ticket = ticket.parse().map_err(|error: crate::transport::TicketError| {
            Failure::plain(format!("the demo's own ticket: {error}"))
        })?;
        let options = SendOptions {
            engine: SourceConfig {
                strategy: method.strategy,
                handover: method.handover,
                policy: SwitchoverPolicy {
                    downtime_budget: method.downtime,
                    max_rounds: method.max_rounds,
                },
                timeouts: SourceTimeouts::default(),
            },
            // Where nothing is kept, there is nothing that a delta could be made against.
            limits: if method.deltas { default_limits() } else { SentLimits::default() },
            encoders: default_encoders(),
            tracker: TrackerKind::Auto,
            codecs: None,
            trace: None,
            pusher: PusherKind::default(),
            state_dir: self.settings.state_dir.clone(),
            quit_source: false,
            // Both sides are on this machine: a link that is lost has lost its other side.
            reconnect_for: Duration::ZERO,
        };
        let report =
            send(guest.leaving()?, &ticket, &transport(), options, self.output.clone()).await?;
        self.output.report(&report);
        Ok(())
    }

    /// Tells of the guest and of its memory from now on until the process ends.
    fn sample(&self, guest: &Guest) {
        let (counter, page_table) = (guest.counter(), self.page_table.clone());
        let cells = self.settings.map_cells;
        thread::spawn(move || {
            for tick in 0u64.. {
                if let Some(ops) = counter() {
                    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    emit(&SideEvent::Guest { unix_us: now.as_micros() as u64, ops });
                }
                if tick % MAP_EVERY == 0
                    && let Some(table) = page_table.get()
                {
                    emit(&SideEvent::Memory(MemoryMap::of(table, cells)));
                }
                thread::sleep(GUEST_INTERVAL);
            }
        });
    }
}

fn transport() -> TransportOptions {
    TransportOptions { mtu_limit_bytes: Some(MAX_DATAGRAM_BYTES), ..TransportOptions::default() }
}

fn emit(event: &impl Serialize) {
    let mut line = serde_json::to_string(event).expect("events are plain data");
    line.push('\n');
    // In one piece: several threads print. A demo that is gone is seen at the end of stdin.
    let _ = std::io::stdout().lock().write_all(line.as_bytes());
}
