//! Migrations of real QEMU guests over a link that is cut.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farfault_integration::farfault::Running;
use farfault_integration::lab::Lab;
use farfault_integration::qemu::{Guest, GuestSpec, Machine};

const LIMIT: Duration = Duration::from_secs(60);
/// QUIC bridges this by itself.
const SHORT: Duration = Duration::from_secs(1);
/// And not this.
const LONG_S: u64 = 10;
/// Another length of the long cut, in seconds.
const LONG_VARIABLE: &str = "FARFAULT_OUTAGE_S";
/// What a failed attempt to find the link again, and the pause behind it, may take.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(20);
/// A writing guest whose memory takes some seconds to cross the link.
const WORK: &str = "ff.ws=96M ff.pattern=sparse ff.rate=1000 ff.fill=random ff.verify=20000";
const LINK: &str = "200Mbit,10ms";

/// Whatever is said on standard error fails, as on a terminal that is gone or a disk that is full.
const UNHEARD: [&str; 4] = ["sh", "-c", "exec \"$@\" 2>/dev/full", "sh"];

/// Moves a guest by a link of so many connections, which is cut twice while `phase` goes on at the source, and
/// nobody can be told of it.
fn moves_over_cuts(strategy: &str, phase: &str, connections: u32) -> Result<()> {
    let long = match std::env::var(LONG_VARIABLE) {
        Ok(seconds) => Duration::from_secs(seconds.parse().context(LONG_VARIABLE)?),
        Err(_) => Duration::from_secs(LONG_S),
    };
    let Some(mut lab) = Lab::start(LINK)? else { return Ok(()) };
    let spec = GuestSpec::new(Machine::Pc, 192, WORK);
    let source = Guest::boot(&lab, "source", &spec)?;
    let destination = Guest::prepare(&lab, "destination", &spec)?;
    let mut receive = Running::receive_wrapped(&lab, &destination, &[], &UNHEARD)?;
    let ticket = receive.ticket()?;
    let connections_word = connections.to_string();
    let options = ["--strategy", strategy, "--connections", &connections_word];
    let mut send = Running::send_from(&lab, source.qmp_path(), &ticket, &options, &UNHEARD)?;
    send.wait_for_event(phase, LIMIT, |event| event["phase"] == phase)?;
    for cut in [SHORT, long] {
        // In the middle of the pages.
        std::thread::sleep(Duration::from_millis(400));
        lab.wan.command("cut")?;
        std::thread::sleep(cut);
        lab.wan.command("restore")?;
    }
    let sent = send.wait(LIMIT)?;
    let received = receive.wait(LIMIT)?;
    let report = sent.report().context("send")?;
    let report_there = received.report().context("receive")?;
    eprintln!("{report}\n{report_there}");
    for (ended, report) in [(&sent, report), (&received, report_there)] {
        ensure!(report["result"] == "migrated", "{report}");
        ensure!(report["connections"] == connections, "{report}");
        let back = ended.events.iter().filter(|event| event["state"] == "up").count() as u64;
        ensure!(report["reconnects"] == back, "{back} links in {report}");
        ensure!(back >= 1, "the long cut went unnoticed: {report}");
        let longest = ended.events.iter().filter_map(|event| event["outage_ms"].as_u64()).max();
        let bound_ms = (long + LONGEST_ATTEMPT).as_millis() as u64;
        ensure!(longest < Some(bound_ms), "{longest:?} ms for a cut of {long:?}");
    }
    destination.log.wait_for_a_sweep(LIMIT)?;
    ensure!(source.log.complaints().is_empty(), "{:?}", source.log.complaints());
    ensure!(destination.log.complaints().is_empty(), "{:?}", destination.log.complaints());
    ensure!(destination.monitor()?.status()? == "running");
    ensure!(source.monitor()?.status()? == "postmigrate");
    Ok(())
}

#[test]
fn a_link_that_is_cut_in_pre_copy_is_mended() -> Result<()> {
    moves_over_cuts("precopy", "precopy", 3)
}

#[test]
fn a_link_that_is_cut_in_post_copy_is_mended_and_no_page_is_wrong() -> Result<()> {
    moves_over_cuts("postcopy", "postcopy", 1)
}
