//! What a process is not given any more, and what it is told from outside: descriptors, memory, signals, and
//! a person who lets the guest run where it does not belong.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farfault_integration::farfault::{Running, command, journal_of};
use farfault_integration::lab::Lab;
use farfault_integration::moving::{BULKY, LIMIT, Move, SHORT, WORK};
use farfault_integration::process::wait_for;
use farfault_integration::qemu::{Guest, GuestSpec, Machine};
use farfault_integration::skip::skipped;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Longer than any outage here.
const LONG: &str = "60s";
/// Every new descriptor is refused; those that are open stay.
const NO_DESCRIPTORS: &str = "--nofile=3:";
const ENOUGH_DESCRIPTORS: &str = "--nofile=1024:";
/// Every new mapping is refused.
const NO_MEMORY: &str = "--as=1:";

/// Changes a limit of a process that runs.
fn limit(running: &Running, limit: &str) -> Result<()> {
    let pid = running.pid().to_string();
    let status = Command::new("prlimit").args(["--pid", &pid, limit]).status()?;
    ensure!(status.success(), "prlimit {limit}");
    Ok(())
}

fn both(moving: &Move) -> Result<[&Running; 2]> {
    Ok([moving.send.as_ref().context("send")?, moving.receive.as_ref().context("receive")?])
}

/// Both come to the end by themselves, and the guest is whole.
fn ends_well(mut moving: Move) -> Result<()> {
    for running in [moving.send.take(), moving.receive.take()] {
        running.context("it was taken")?.wait(LIMIT)?.report()?;
    }
    moving.runs_whole_at_the_destination()
}

#[test]
fn with_too_few_descriptors_it_does_not_begin_and_says_how_many_it_needs() -> Result<()> {
    let Some(lab) = Lab::start("200Mbit,10ms")? else { return Ok(()) };
    let source = Guest::boot(&lab, "source", &GuestSpec::new(Machine::Pc, 256, WORK))?;
    let qmp = source.qmp_path().display().to_string();
    // With less than that the program is not even loaded.
    for limit in ["6", "64"] {
        let wrapper = ["prlimit", &format!("--nofile={limit}:{limit}")];
        for (netns, subcommand, arguments) in [
            (lab.a(), "send", vec!["--qmp", &qmp, "no-ticket"]),
            (lab.b(), "receive", vec!["--listen", "127.0.0.1:0", "--qmp", &qmp]),
        ] {
            let ended =
                Running::start(&lab, netns, &wrapper, subcommand, &arguments)?.wait(LIMIT)?;
            let told = ended.failure()?;
            ensure!(told.contains("ulimit -n"), "{subcommand} with {limit}: {told}");
        }
    }
    assert_eq!(source.monitor()?.status()?, "running");
    Ok(())
}

/// What the switchover needs cannot be opened: on either side the guest runs on at the source.
#[test]
fn without_descriptors_in_pre_copy_the_guest_runs_on_at_the_source() -> Result<()> {
    for at_source in [true, false] {
        let Some(mut moving) = Move::in_precopy()? else { return Ok(()) };
        let [send, receive] = both(&moving)?;
        limit(if at_source { send } else { receive }, NO_DESCRIPTORS)?;
        moving.lab.wan.command("rate 500Mbit")?;
        for running in [&mut moving.send, &mut moving.receive] {
            let told = Move::failure(running)?;
            ensure!(told.contains("Too many open files") || told.contains("EMFILE"), "{told}");
        }
        moving.source_goes_on()?;
        moving.nothing_is_left()?;
    }
    Ok(())
}

/// Nothing new is needed in post-copy but another link, should this one break: it is there when there are
/// descriptors again.
#[test]
fn without_descriptors_an_outage_lasts_until_there_are_some() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy(LONG)? else { return Ok(()) };
    for running in both(&moving)? {
        limit(running, NO_DESCRIPTORS)?;
    }
    moving.lab.wan.command("cut")?;
    let is_link = |state: &'static str| {
        move |event: &Value| event["event"] == "link" && event["state"] == state
    };
    moving.send()?.wait_for_event("the outage", LIMIT, is_link("down"))?;
    moving.lab.wan.command("restore")?;
    std::thread::sleep(Duration::from_secs(6));
    ensure!(!moving.send()?.has(is_link("up")), "a link without a descriptor");
    for running in both(&moving)? {
        limit(running, ENOUGH_DESCRIPTORS)?;
    }
    moving.send()?.wait_for_event("the next link", LIMIT, is_link("up"))?;
    ends_well(moving)
}

/// An allocation that fails ends the process, as a kill does: another one takes its place.
#[test]
fn a_side_that_gets_no_memory_in_post_copy_goes_on_or_is_taken_over() -> Result<()> {
    for at_source in [true, false] {
        let Some(mut moving) = Move::in_postcopy(LONG)? else { return Ok(()) };
        let [send, receive] = both(&moving)?;
        limit(if at_source { send } else { receive }, NO_MEMORY)?;
        let starved = if at_source { &mut moving.send } else { &mut moving.receive };
        let process = starved.as_mut().context("it runs")?;
        wait_for("it to end, well or not", LIMIT, || Ok(process.has_ended()?.then_some(())))?;
        let ended = starved.take().context("it runs")?.wait(LIMIT)?;
        match ended.report() {
            Ok(report) => {
                ensure!(report["result"] == "migrated", "{report}");
                let other = if at_source { moving.receive.take() } else { moving.send.take() };
                other.context("it runs")?.wait(LIMIT)?.report()?;
            }
            Err(_) => moving.take_over()?,
        }
        moving.runs_whole_at_the_destination()?;
    }
    Ok(())
}

#[test]
fn signals_and_cancels_after_the_switchover_are_refused_and_change_nothing() -> Result<()> {
    let Some(moving) = Move::in_postcopy(SHORT)? else { return Ok(()) };
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        for running in both(&moving)? {
            running.signal(signal)?;
        }
    }
    for side in ["source", "destination"] {
        let output = command(&moving.lab, &["cancel", &moving.name(side)?, "--json"])?;
        ensure!(!output.status.success(), "{side}");
        let told: Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!((&told["event"], &told["accepted"]), (&json!("cancel"), &json!(false)));
        assert_eq!(told["side"], side);
        let reason = told["reason"].as_str().context("a reason")?;
        ensure!(reason.contains("finishing"), "{reason}");
    }
    ends_well(moving)
}

/// Between the decision and the word that the guest runs.
#[test]
fn a_sender_that_is_told_to_end_after_the_decision_goes_on() -> Result<()> {
    let options = ["--strategy", "precopy", "--handover", "strict", "--downtime", "10s"];
    let Some(mut moving) = Move::begin("200Mbit,600ms", WORK, &options, SHORT)? else {
        return Ok(());
    };
    moving.send()?.wait_for_event("the decision", LIMIT, |event| event["phase"] == "commit")?;
    both(&moving)?[0].signal(Signal::SIGTERM)?;
    ends_well(moving)
}

#[test]
fn who_is_told_to_end_before_the_other_side_is_there_ends_at_once() -> Result<()> {
    let Some(mut moving) = Move::in_precopy()? else { return Ok(()) };
    // Nobody answers there.
    moving.lab.wan.command("cut")?;
    let (source, lab) = (&moving.source, &moving.lab);
    let ticket = moving.receive.as_mut().context("it runs")?.ticket()?;
    let qmp = source.qmp_path().display().to_string();
    Move::kill(&mut moving.send)?;
    let id = moving.name("source")?;
    ensure!(command(lab, &["resolve", &id, "--run-source"])?.status.success());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let send = Running::start(lab, lab.a(), &[], "send", &["--qmp", &qmp, &ticket])?;
        std::thread::sleep(Duration::from_millis(500));
        send.signal(signal)?;
        let told = send.wait(Duration::from_secs(5))?.failure()?;
        ensure!(told.contains("cancelled"), "{told}");
    }
    Move::failure(&mut moving.receive)?;
    moving.source_goes_on()
}

/// Whoever lets the guest run at the source, where it does not belong any more.
fn let_run_at_the_source(moving: &Move) -> Result<()> {
    moving.source.monitor()?.execute("cont", json!({}))?;
    Ok(())
}

fn is_stopped_at_the_source(moving: &Move) -> Result<()> {
    wait_for("the second guest to be stopped", Duration::from_secs(10), || {
        Ok((moving.source.monitor()?.status()? == "paused").then_some(()))
    })
}

#[test]
fn a_guest_that_somebody_lets_run_at_the_source_in_post_copy_is_stopped_again() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy(SHORT)? else { return Ok(()) };
    let_run_at_the_source(&moving)?;
    is_stopped_at_the_source(&moving)?;
    let told = Move::failure(&mut moving.send)?;
    ensure!(told.contains("let run here"), "{told}");
    Move::failure(&mut moving.receive)?;
    Ok(())
}

#[test]
fn a_successor_of_a_sender_does_not_trust_a_guest_that_has_run_since() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy(SHORT)? else { return Ok(()) };
    wait_for("the word that it runs there", LIMIT, || {
        Ok(journal_of(&moving.lab, "source").contains("running").then_some(()))
    })?;
    Move::kill(&mut moving.send)?;
    let_run_at_the_source(&moving)?;
    let id = moving.name("source")?;
    let id = id.trim_end_matches(".source");
    // Also when it stands again.
    for _ in 0..2 {
        let resumed = Running::start(&moving.lab, moving.lab.a(), &[], "send", &["--resume", id])?;
        let told = resumed.wait(LIMIT)?.failure()?;
        ensure!(told.contains("let run here"), "{told}");
        is_stopped_at_the_source(&moving)?;
    }
    Move::failure(&mut moving.receive)?;
    Ok(())
}

#[test]
fn a_successor_of_a_sender_in_doubt_stops_a_guest_that_was_let_run_and_asks_a_person() -> Result<()>
{
    let Some(mut moving) = Move::in_doubt()? else { return Ok(()) };
    let_run_at_the_source(&moving)?;
    let id = moving.name("source")?;
    let id = id.trim_end_matches(".source");
    let resumed = Running::start(&moving.lab, moving.lab.a(), &[], "send", &["--resume", id])?;
    let told = resumed.wait(LIMIT)?.failure()?;
    ensure!(told.contains("by hand"), "{told}");
    is_stopped_at_the_source(&moving)?;
    ensure!(!journal_of(&moving.lab, "source").contains("void"));
    moving.resolve("destination", "--run-source")?;
    moving.resolve("source", "--run-source")?;
    moving.source_goes_on()?;
    moving.send = None;
    Ok(())
}

/// Sets the wall clock of one process, from a file that it reads each time.
const FAKE_CLOCK: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

/// Clocks that are decades apart when the two meet, one of them as if its battery were empty, and that are set to
/// and fro in pre-copy and in post-copy: nobody waits for them, and no certificate goes by them.
#[test]
fn wall_clocks_that_differ_and_jump_do_no_harm() -> Result<()> {
    if !Path::new(FAKE_CLOCK).exists() {
        return skipped(&format!("there is no {FAKE_CLOCK} (Debian: libfaketime)"));
    }
    let Some(lab) = Lab::start("50Mbit,20ms")? else { return Ok(()) };
    let files = ["source-clock", "destination-clock"].map(|name| lab.path(name));
    let set = |[source, destination]: [&str; 2]| -> Result<()> {
        // In one step, as it is read at any moment.
        for (path, time) in [(&files[0], source), (&files[1], destination)] {
            let new = path.with_extension("new");
            std::fs::write(&new, format!("{time}\n"))?;
            std::fs::rename(&new, path)?;
        }
        Ok(())
    };
    set(["@2069-07-20 20:17:40", "@1970-01-01 00:10:00"])?;
    let wrapper = |file: &Path| {
        let file = format!("FAKETIME_TIMESTAMP_FILE={}", file.display());
        let preload = format!("LD_PRELOAD={FAKE_CLOCK}");
        ["env", &preload, &file, "FAKETIME_NO_CACHE=1", "DONT_FAKE_MONOTONIC=1"].map(str::to_owned)
    };
    let (send, receive) = (wrapper(&files[0]), wrapper(&files[1]));
    let wrappers = [send.each_ref().map(String::as_str), receive.each_ref().map(String::as_str)];
    let mut moving = Move::begin_in(lab, BULKY, &[], SHORT, [&wrappers[0], &wrappers[1]])?;
    let in_phase = |phase: &'static str| move |event: &Value| event["phase"] == phase;
    moving.send()?.wait_for_event("pre-copy", LIMIT, in_phase("precopy"))?;
    let journal = journal_of(&moving.lab, "source");
    ensure!(journal.contains("\"unix_ms\":31"), "the clock was not set: {journal}");
    set(["@1999-12-31 23:59:59", "@2038-01-19 03:14:08"])?;
    moving.send()?.wait_for_event("post-copy", LIMIT, in_phase("postcopy"))?;
    set(["@2100-02-28 12:00:00", "@1980-01-06 00:00:00"])?;
    ends_well(moving)
}
