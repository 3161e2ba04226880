//! Accidents at random moments: before the switchover farfault is killed; after it the link is cut too, and what
//! was killed is started again. Whatever comes, the guest goes on at one place and not one page is wrong.
//!
//! `FARFAULT_ACCIDENT_RUNS` (1) migrations with accidents after the switchover, and four times as many that are
//! killed before, from seed `FARFAULT_ACCIDENT_SEED` (1) on; `just accidents`
//! has more of them. A seed gives the same accidents at about the same moments.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farfault_integration::farfault::{self, Running, command, status_of};
use farfault_integration::lab::Lab;
use farfault_integration::qemu::{Guest, GuestSpec, Machine};
use farfault_integration::recovery::{migration_id, see_through};

const LIMIT: Duration = Duration::from_secs(120);
/// Eleven seconds of post-copy, if nothing comes in between.
const LINK: &str = "50Mbit,20ms";
/// Nothing of it compresses, and it writes to whole pages faster than the link takes them.
const WORK: &str = "ff.ws=64M ff.pattern=random ff.rate=4000 ff.fill=random ff.verify=20000";

/// A reproducible source of chance: splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % limit
    }

    fn pause_ms(&mut self, limit_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.below(limit_ms)));
    }
}

/// Both processes of a migration; `None` for one that was killed.
struct Sides {
    id: String,
    send: Option<Running>,
    receive: Option<Running>,
}

impl Sides {
    /// Ends one without warning, unless it has come to its end already.
    fn kill(running: &mut Option<Running>) -> Result<bool> {
        let Some(process) = running.as_mut() else { return Ok(false) };
        if !process.is_running()? {
            return Ok(false);
        }
        process.kill()?;
        *running = None;
        Ok(true)
    }

    fn start(&mut self, lab: &Lab, command: &str) -> Result<()> {
        let (netns, running) = match command {
            "send" => (lab.a(), &mut self.send),
            _ => (lab.b(), &mut self.receive),
        };
        *running = Some(Running::start(lab, netns, &[], command, &["--resume", &self.id])?);
        Ok(())
    }

    /// One accident.
    fn suffer(&mut self, lab: &mut Lab, dice: &mut Dice) -> Result<()> {
        match dice.below(8) {
            0..3 => {
                let cut_ms = if dice.below(4) == 0 { 10_000 } else { 100 + dice.below(3000) };
                eprintln!("  the link is cut for {cut_ms} ms");
                lab.wan.command("cut")?;
                std::thread::sleep(Duration::from_millis(cut_ms));
                lab.wan.command("restore")?;
            }
            kind => {
                let commands: &[&str] = match kind {
                    3 | 4 => &["send"],
                    5 | 6 => &["receive"],
                    _ => &["send", "receive"],
                };
                let mut killed = Vec::new();
                for command in commands {
                    let running = match *command {
                        "send" => &mut self.send,
                        _ => &mut self.receive,
                    };
                    if Self::kill(running)? {
                        killed.push(*command);
                    }
                }
                eprintln!("  killed: {killed:?}");
                for command in killed {
                    dice.pause_ms(2000);
                    self.start(lab, command)?;
                }
            }
        }
        Ok(())
    }
}

/// A migration with accidents; false where there can be no laboratory.
fn moves_through_accidents(seed: u64) -> Result<bool> {
    let Some(mut lab) = Lab::start(LINK)? else { return Ok(false) };
    let mut dice = Dice(seed);
    let strategy = if dice.below(2) == 0 { "postcopy" } else { "hybrid" };
    eprintln!("seed {seed}: {strategy}");
    let spec = GuestSpec::new(Machine::Pc, 192, WORK);
    let source = Guest::boot(&lab, "source", &spec)?;
    let destination = Guest::prepare(&lab, "destination", &spec)?;
    let mut receive = Running::receive(&lab, &destination, &[])?;
    let ticket = receive.ticket()?;
    let mut send = Running::send(&lab, &source, &ticket, &["--strategy", strategy])?;
    send.wait_for_event("post-copy", LIMIT, |event| event["phase"] == "postcopy")?;
    let id = migration_id(&lab)?;
    let mut sides = Sides { id, send: Some(send), receive: Some(receive) };
    for _ in 0..1 + dice.below(4) {
        dice.pause_ms(2500);
        sides.suffer(&mut lab, &mut dice)?;
    }
    let Sides { id, send, receive } = &mut sides;
    see_through(&lab, id, send, receive, LIMIT).with_context(|| destination.diagnosis())?;
    ensure!(source.monitor()?.status()? == "postmigrate");
    ensure!(destination.monitor()?.status()? == "running");
    destination.log.wait_for_a_sweep(LIMIT).with_context(|| destination.diagnosis())?;
    for log in [&source.log, &destination.log] {
        ensure!(log.complaints().is_empty(), "{:?}", log.complaints());
    }
    // Of who was killed while he removed it nothing but that is left.
    let names = std::fs::read_dir(lab.state_directory())?.flatten().map(|entry| entry.file_name());
    let journals: Vec<_> =
        names.filter(|name| !name.to_string_lossy().ends_with(".unfinished")).collect();
    ensure!(journals.is_empty(), "{journals:?} are left");
    Ok(true)
}

/// Attempts to move a guest that end with the death of both sides before the switchover, then one that
/// succeeds; false where there can be no laboratory.
fn survives_attempts(attempts: u64, seed: u64) -> Result<bool> {
    let Some(mut lab) = Lab::start("100Mbit,10ms")? else { return Ok(false) };
    let mut dice = Dice(seed);
    let spec = GuestSpec::new(Machine::Pc, 192, WORK);
    let mut source = Guest::boot(&lab, "source", &spec)?;
    for attempt in 0..attempts {
        let destination = Guest::prepare(&lab, &format!("destination{attempt}"), &spec)?;
        let mut receive = Running::receive(&lab, &destination, &["--reconnect-for", "1s"])?;
        let ticket = receive.ticket()?;
        // It writes faster than the link takes it: there is no switchover.
        let mut send = Running::send(&lab, &source, &ticket, &["--strategy", "precopy"])?;
        // Most of what is done to QEMU is done at first.
        let limit_ms = if dice.below(2) == 0 { 200 } else { 3000 };
        dice.pause_ms(limit_ms);
        send.kill()?;
        receive.kill()?;
        for side in ["source", "destination"] {
            if let Some(status) = status_of(&lab, side)? {
                let id = status["migration"].as_str().context("an id")?;
                let told = command(&lab, &["resolve", &format!("{id}.{side}"), "--run-source"])?;
                ensure!(told.status.success(), "attempt {attempt}: {told:?}");
            }
        }
        let ended = source.process().context("it was started here")?.ended()?;
        ensure!(ended.is_none(), "attempt {attempt}: QEMU has ended: {ended:?}");
        ensure!(source.monitor()?.status()? == "running", "attempt {attempt}");
    }
    lab.wan.command("rate 1Gbit")?;
    let last = Guest::prepare(&lab, "last", &spec)?;
    farfault::migrate(&lab, &source, &last, &[], &[], LIMIT)?;
    last.log.wait_for_a_sweep(LIMIT)?;
    for log in [&source.log, &last.log] {
        ensure!(log.complaints().is_empty(), "{:?}", log.complaints());
    }
    Ok(true)
}

fn from_environment(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text} is not a number")),
        Err(_) => Ok(default),
    }
}

#[test]
fn a_guest_outlives_accidents_at_random_moments() -> Result<()> {
    let runs = from_environment("FARFAULT_ACCIDENT_RUNS", 1)?;
    let first = from_environment("FARFAULT_ACCIDENT_SEED", 1)?;
    for seed in first..first + runs {
        if !moves_through_accidents(seed).with_context(|| format!("seed {seed}"))? {
            return Ok(());
        }
    }
    eprintln!("{runs} migrations, each whole");
    Ok(())
}

#[test]
fn a_guest_outlives_farfaults_killed_at_random_moments_before_the_switchover() -> Result<()> {
    let attempts = 4 * from_environment("FARFAULT_ACCIDENT_RUNS", 1)?;
    let seed = from_environment("FARFAULT_ACCIDENT_SEED", 1)?;
    if survives_attempts(attempts, seed)? {
        eprintln!("{attempts} attempts, then a whole migration");
    }
    Ok(())
}
