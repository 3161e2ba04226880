//! One run of the demo: two processes, a link between them, a guest that works, moves, works on, and
//! checks its memory.

use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::audience::Audience;
use super::guest::GuestKind;
use super::process::{SAID_QUEUE, Said, Side, What, name};
use super::protocol::{Method, Order, SideEvent, SideSettings, Verified};
use crate::engine::Failure;
use crate::guest::workload::GuestPlan;
use crate::lab::relay::Relay;
use crate::lab::spec::LinkSpec;
use crate::report::{MigrationResult, Report, Role, Step};
use crate::session::journal::remove_state;
use crate::transport::{Ticket, TicketError};

const TICK: Duration = Duration::from_millis(100);
/// A migration that takes longer is cancelled.
const MIGRATION_LIMIT: Duration = Duration::from_secs(30 * 60);
/// After one side's report, for that of the other; after a cancel, for the report.
const REPORT_LIMIT: Duration = Duration::from_secs(20);
/// An emulated KVM checks hundreds of pages a second.
const VERIFY_LIMIT: Duration = Duration::from_secs(10 * 60);
/// What a run is to be.
#[derive(Clone, Debug)]
pub(super) struct RunPlan {
    /// In `--json`.
    pub(super) name: &'static str,
    pub(super) title: String,
    pub(super) kind: GuestKind,
    pub(super) guest: GuestPlan,
    pub(super) link: LinkSpec,
    /// Decides which packets a lossy link loses.
    pub(super) seed: u64,
    pub(super) method: Method,
    /// How long the guest works before it is moved, and afterwards.
    pub(super) work_for: Duration,
    /// Cancel the migration when it takes longer.
    pub(super) patience: Option<Duration>,
    pub(super) log_level: String,
}

/// What has come of it.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    /// Both sides' reports in one.
    pub(super) report: Report,
    /// The migration was cancelled since it took too long.
    pub(super) out_of_patience: bool,
    pub(super) verified: Verified,
}

impl Outcome {
    /// The guest has moved, and is whole.
    pub(super) fn is_good(&self) -> bool {
        self.report.result == MigrationResult::Migrated && self.is_whole()
    }

    /// The guest has found all its pages right, wherever it is.
    pub(super) fn is_whole(&self) -> bool {
        self.verified.wrong_pages == 0 && self.verified.pages > 0
    }
}

/// Carries out a run. All that it starts has ended when this returns or is dropped.
pub(super) async fn run(plan: &RunPlan, audience: &mut Audience) -> Result<Outcome, Failure> {
    let map_cells = audience.begin(plan.name, plan.title.clone(), &plan.link);
    let dir = StateDir(directory_in(&std::env::temp_dir())?);
    let ram_dir = plan.kind.ram_directory().map(directory_in).transpose()?;
    let (said, hears) = mpsc::channel(SAID_QUEUE);
    let settings = |role| SideSettings {
        role,
        kind: plan.kind.clone(),
        plan: plan.guest.clone(),
        state_dir: dir.0.path().to_owned(),
        ram_dir: ram_dir.as_ref().map(|dir| dir.path().to_owned()),
        map_cells,
    };
    let destination = Side::start(&settings(Role::Destination), &plan.log_level, &said).await?;
    let source = Side::start(&settings(Role::Source), &plan.log_level, &said).await?;
    let mut stage = Stage { audience, hears, known: Known::default(), relay: None };
    let mut cast = Cast { source, destination };
    let outcome = stage.play(plan, &mut cast).await;
    drop(stage.relay);
    tokio::join!(cast.source.end(), cast.destination.end());
    outcome
}

/// Goes with all that lies elsewhere of its migrations: the sides of an interrupted run cannot see to it.
struct StateDir(TempDir);

impl Drop for StateDir {
    fn drop(&mut self) {
        remove_state(self.0.path());
    }
}

/// A directory of this run, which goes with it. Nobody else may enter: the guest's memory may be in it.
fn directory_in(parent: &Path) -> Result<TempDir, Failure> {
    tempfile::Builder::new().prefix("farfault-demo-").tempdir_in(parent).map_err(|error| {
        Failure::plain(format!("no temporary directory in {}: {error}", parent.display()))
    })
}

struct Cast {
    source: Side,
    destination: Side,
}

/// What the sides have said so far.
#[derive(Default)]
struct Known {
    ticket: Option<String>,
    is_booted: bool,
    source: Option<Report>,
    destination: Option<Report>,
    verified: Option<Verified>,
    /// The first failure, and whose it is.
    failure: Option<(Role, Failure)>,
}

struct Stage<'a> {
    audience: &'a mut Audience,
    hears: mpsc::Receiver<Said>,
    known: Known,
    relay: Option<Relay>,
}

impl Stage<'_> {
    async fn play(&mut self, plan: &RunPlan, cast: &mut Cast) -> Result<Outcome, Failure> {
        let start_limit = plan.kind.start_limit(&plan.guest);
        self.until("the two sides to start", start_limit, |known| {
            known.is_booted && known.ticket.is_some()
        })
        .await?;
        let ticket = self.put_link_between(plan)?;
        self.audience.step(Step::Work);
        self.for_a_while(plan.work_for).await?;

        self.audience.step(Step::Connect);
        cast.source.order(&Order::Migrate { ticket, method: plan.method }).await?;
        let out_of_patience = self.migrate(plan, cast).await?;
        let report = self.joined_report()?;
        if let MigrationResult::InDoubt | MigrationResult::LostPages = report.result {
            let unknown = || Failure::plain("the migration broke off, and does not say why");
            return Err(self.known.failure.take().map_or_else(unknown, |(_, failure)| failure));
        }

        self.audience.step(Step::WorkOn);
        self.for_a_while(plan.work_for).await?;
        self.audience.step(Step::Verify);
        let host = match report.result {
            MigrationResult::Migrated => &mut cast.destination,
            _ => &mut cast.source,
        };
        host.order(&Order::Verify).await?;
        self.until("the guest to check its pages", VERIFY_LIMIT, |known| known.verified.is_some())
            .await?;
        self.audience.step(Step::Done);
        self.audience.link(self.relay.as_ref().map(Relay::totals));
        let verified = self.known.verified.ok_or_else(|| Failure::plain("no verdict"))?;
        Ok(Outcome { report, out_of_patience, verified })
    }

    /// Starts the link, and gives the ticket that leads through it.
    fn put_link_between(&mut self, plan: &RunPlan) -> Result<String, Failure> {
        let text = self.known.ticket.take().unwrap_or_default();
        let bad = |why: String| Failure::plain(format!("the destination's ticket: {why}"));
        let mut ticket: Ticket =
            text.parse().map_err(|error: TicketError| bad(error.to_string()))?;
        let Some(to) = ticket.addresses.first() else { return Err(bad("no address".to_owned())) };
        let relay = Relay::start(plan.link, *to, plan.seed)
            .map_err(|error| Failure::plain(format!("the emulated link: {error}")))?;
        ticket.addresses = vec![relay.address()];
        self.relay = Some(relay);
        Ok(ticket.to_string())
    }

    /// Waits for the end of the migration. True when it was cancelled, since it took too long.
    async fn migrate(&mut self, plan: &RunPlan, cast: &mut Cast) -> Result<bool, Failure> {
        let limit = plan.patience.unwrap_or(MIGRATION_LIMIT);
        let is_over = |known: &Known| known.source.is_some();
        let over = self.wait(Instant::now() + limit, is_over).await?;
        if !over {
            cast.source.cancel();
            self.until("the cancelled migration to end", REPORT_LIMIT, is_over).await?;
        }
        if self.known.source.as_ref().is_some_and(|r| r.result == MigrationResult::Migrated) {
            self.until("the destination to report", REPORT_LIMIT, |known| {
                known.destination.is_some()
            })
            .await?;
        }
        Ok(!over)
    }

    fn joined_report(&mut self) -> Result<Report, Failure> {
        let source = self.known.source.take().ok_or_else(|| Failure::plain("no report"))?;
        Ok(match &self.known.destination {
            Some(destination) => source.joined(destination),
            None => source,
        })
    }

    async fn until(
        &mut self,
        what: &str,
        limit: Duration,
        done: impl Fn(&Known) -> bool,
    ) -> Result<(), Failure> {
        if self.wait(Instant::now() + limit, done).await? {
            return Ok(());
        }
        Err(Failure::plain(format!("waited {} s in vain for {what}", limit.as_secs())))
    }

    async fn for_a_while(&mut self, time: Duration) -> Result<(), Failure> {
        self.wait(Instant::now() + time, |_| false).await.map(drop)
    }

    /// Takes in what the sides say until `done`, then true, or until the deadline.
    async fn wait(
        &mut self,
        deadline: Instant,
        done: impl Fn(&Known) -> bool,
    ) -> Result<bool, Failure> {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        while !done(&self.known) {
            tokio::select! {
                Some(said) = self.hears.recv() => self.take_in(said)?,
                _ = ticks.tick() => self.audience.link(self.relay.as_ref().map(Relay::totals)),
                () = sleep_until(deadline) => return Ok(false),
            }
        }
        Ok(true)
    }

    fn take_in(&mut self, Said { role, what }: Said) -> Result<(), Failure> {
        let (value, event) = match what {
            What::Event(value, event) => (value, event),
            What::Log(line) => {
                // What a side says as a command is in its events too.
                if !line.starts_with("farfault: ") {
                    self.audience.note(&format!("{}: {line}", name(role)));
                }
                return Ok(());
            }
            What::Ended => return Err(self.why_ended(role)),
        };
        self.audience.event(role, &event, value);
        match *event {
            SideEvent::Ticket { ticket } => self.known.ticket = Some(ticket),
            SideEvent::Booted => self.known.is_booted = true,
            SideEvent::Report(report) => match role {
                Role::Source => self.known.source = Some(*report),
                Role::Destination => self.known.destination = Some(*report),
            },
            SideEvent::Verified(verified) => self.known.verified = Some(verified),
            SideEvent::Error { message, hint } => {
                let failure = Failure { reason: message, hint };
                self.known.failure.get_or_insert((role, failure));
            }
            SideEvent::Phase { .. }
            | SideEvent::Progress(_)
            | SideEvent::Guest { .. }
            | SideEvent::Memory(_) => {}
        }
        Ok(())
    }

    /// A side must not end before it is told to.
    fn why_ended(&mut self, role: Role) -> Failure {
        match self.known.failure.take() {
            Some((of, Failure { reason, hint })) => {
                Failure { reason: format!("the {}: {reason}", name(of)), hint }
            }
            None => Failure::plain(format!("the {} has ended without a reason", name(role))),
        }
    }
}
