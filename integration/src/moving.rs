//! A guest that is being moved, and what tests do to it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::farfault::{Running, command, journal_of, status_of};
use crate::lab::Lab;
use crate::leftovers::Inventory;
use crate::process::wait_for;
use crate::qemu::{Guest, GuestSpec, Machine};
use crate::recovery::{migration_id, see_through};

/// For whatever is waited for.
pub const LIMIT: Duration = Duration::from_secs(60);
/// The guest's work, which finds a wrong byte.
pub const WORK: &str = "ff.ws=64M ff.pattern=sparse ff.rate=1000 ff.verify=20000";
/// The same with memory that does not compress: some seconds of post-copy.
pub const BULKY: &str = "ff.ws=64M ff.pattern=sparse ff.rate=1000 ff.fill=random ff.verify=20000";
/// How long a side waits for another one that does not come back.
pub const SHORT: &str = "3s";

/// A guest at work that is being moved.
pub struct Move {
    /// The guest where it ran at first.
    pub source: Guest,
    /// Where it goes to.
    pub destination: Guest,
    /// `farfault send`, unless it was taken.
    pub send: Option<Running>,
    /// `farfault receive`, unless it was taken.
    pub receive: Option<Running>,
    /// Where all this is.
    pub lab: Lab,
    /// What was there before farfault came.
    before: Inventory,
}

impl Move {
    /// Begins to move one over `link`. A side whose link is lost waits for `patience`.
    pub fn begin(
        link: &str,
        work: &str,
        send_options: &[&str],
        patience: &str,
    ) -> Result<Option<Self>> {
        let Some(lab) = Lab::start(link)? else { return Ok(None) };
        Self::begin_in(lab, work, send_options, patience, [&[], &[]]).map(Some)
    }

    /// The same in a laboratory that is there, with `send` and `receive` behind wrappers.
    pub fn begin_in(
        lab: Lab,
        work: &str,
        send_options: &[&str],
        patience: &str,
        wrappers: [&[&str]; 2],
    ) -> Result<Self> {
        let spec = GuestSpec::new(Machine::Pc, 256, work);
        Self::begin_between(lab, [&spec, &spec], send_options, patience, wrappers)
    }

    /// The same, with what differs at source and destination.
    pub fn begin_between(
        lab: Lab,
        specs: [&GuestSpec; 2],
        send_options: &[&str],
        patience: &str,
        wrappers: [&[&str]; 2],
    ) -> Result<Self> {
        let source = Guest::boot(&lab, "source", specs[0])?;
        let destination = Guest::prepare(&lab, "destination", specs[1])?;
        let before = Inventory::of(&lab)?;
        let patience = ["--reconnect-for", patience];
        let mut receive = Running::receive_wrapped(&lab, &destination, &patience, wrappers[1])?;
        let ticket = receive.ticket()?;
        let options = [send_options, &patience].concat();
        let send = Running::send_from(&lab, source.qmp_path(), &ticket, &options, wrappers[0])?;
        let (send, receive) = (Some(send), Some(receive));
        Ok(Move { source, destination, send, receive, lab, before })
    }

    /// One whose guest runs at the destination and lacks most of its pages.
    pub fn in_postcopy(patience: &str) -> Result<Option<Self>> {
        let Some(mut moving) =
            Self::begin("100Mbit,20ms", BULKY, &["--strategy", "postcopy"], patience)?
        else {
            return Ok(None);
        };
        moving.send()?.wait_for_event("post-copy", LIMIT, |event| event["phase"] == "postcopy")?;
        Ok(Some(moving))
    }

    /// Starts what was killed again, until the migration is over.
    pub fn take_over(&mut self) -> Result<()> {
        let id = migration_id(&self.lab)?;
        see_through(&self.lab, &id, &mut self.send, &mut self.receive, LIMIT)
            .with_context(|| self.destination.diagnosis())
    }

    /// It runs there alone, with all its memory as it was.
    pub fn runs_whole_at_the_destination(&self) -> Result<()> {
        assert_ne!(self.source.monitor()?.status()?, "running");
        let sweep = self.destination.log.wait_for_a_sweep(LIMIT);
        sweep.with_context(|| self.destination.diagnosis())?;
        assert_eq!(self.destination.monitor()?.status()?, "running");
        ensure!(self.source.log.complaints().is_empty(), "{:?}", self.source.log.complaints());
        let state = std::fs::read_dir(self.lab.state_directory())?.count();
        assert_eq!(state, 0, "a journal is left");
        Ok(())
    }

    /// `farfault send`.
    pub fn send(&mut self) -> Result<&mut Running> {
        self.send.as_mut().context("send was taken")
    }

    /// Ends a side without warning.
    pub fn kill(running: &mut Option<Running>) -> Result<()> {
        running.take().context("it was taken")?.kill()
    }

    /// Waits for a side that must fail, and gives its reason.
    pub fn failure(running: &mut Option<Running>) -> Result<String> {
        running.take().context("it was taken")?.wait(LIMIT)?.failure()
    }

    /// One that will be in pre-copy for long.
    pub fn in_precopy() -> Result<Option<Self>> {
        let Some(mut moving) = Self::begin("20Mbit,20ms", WORK, &["--strategy", "precopy"], SHORT)?
        else {
            return Ok(None);
        };
        moving.send()?.wait_for_event("pre-copy", LIMIT, |event| event["phase"] == "precopy")?;
        Ok(Some(moving))
    }

    /// Both sides killed at the worst moment: decided here, loaded there, and neither knows of the other.
    pub fn in_doubt() -> Result<Option<Self>> {
        // The decision is half a round trip on its way.
        let options = ["--strategy", "precopy", "--handover", "strict", "--downtime", "10s"];
        let Some(mut moving) = Self::begin("200Mbit,600ms", WORK, &options, SHORT)? else {
            return Ok(None);
        };
        wait_for("the decision", LIMIT, || {
            Ok(journal_of(&moving.lab, "source").contains("decided").then_some(()))
        })?;
        Self::kill(&mut moving.receive)?;
        Self::kill(&mut moving.send)?;
        let journal = journal_of(&moving.lab, "destination");
        ensure!(journal.contains("loaded") && !journal.contains("committed"), "{journal}");
        assert_eq!(moving.source.monitor()?.status()?, "postmigrate");
        for side in ["source", "destination"] {
            let shown = moving.resolve(side, "--show")?;
            assert!(shown.contains("in doubt"), "{shown}");
            assert_eq!(shown.matches("possible").count(), 2, "{shown}");
        }
        Ok(Some(moving))
    }

    /// The id of a side, for commands.
    pub fn name(&self, side: &str) -> Result<String> {
        let status = status_of(&self.lab, side)?.with_context(|| format!("no {side}"))?;
        Ok(format!("{}.{side}", status["migration"].as_str().context("an id")?))
    }

    /// Runs `farfault resolve` on a side; it must be done.
    pub fn resolve(&self, side: &str, choice: &str) -> Result<String> {
        let output = command(&self.lab, &["resolve", &self.name(side)?, choice])?;
        let [told, why] =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        ensure!(output.status.success(), "resolve {side} {choice}: {why}");
        Ok(told)
    }

    /// The same, when it must be refused; gives the reason.
    pub fn resolve_refused(&self, side: &str, choice: &str) -> Result<String> {
        let output = command(&self.lab, &["resolve", &self.name(side)?, choice])?;
        ensure!(!output.status.success(), "resolve {side} {choice} was not refused");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The guest runs at the source as if nothing had been.
    pub fn source_goes_on(&self) -> Result<()> {
        assert_eq!(self.source.monitor()?.status()?, "running");
        self.source.log.wait_for_a_sweep(LIMIT)
    }

    /// Neither processes nor files, also no RAM of a QEMU that was ended.
    pub fn nothing_is_left(&self) -> Result<()> {
        let mut left = Vec::new();
        let gone = wait_for("everything to be cleaned up", Duration::from_secs(20), || {
            left = self.before.new_since(&self.lab)?;
            Ok(left.is_empty().then_some(()))
        });
        gone.with_context(|| format!("left behind: {left:?}"))
    }
}
