//! What an operator does after farfault was killed: starts it again, until the migration is over.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::farfault::{Running, command, status_of};
use crate::lab::Lab;
use crate::process::wait_for;

/// The id of the migration that goes on, or was left, in the laboratory.
pub fn migration_id(lab: &Lab) -> Result<String> {
    let status = match status_of(lab, "source")? {
        Some(status) => status,
        None => status_of(lab, "destination")?.context("there is no migration")?,
    };
    Ok(status["migration"].as_str().context("an id")?.to_owned())
}

/// Starts another process for each side whose own has ended, until both have come to the end: a side
/// that has lost the other one may give up before that is there again.
pub fn see_through(
    lab: &Lab,
    id: &str,
    send: &mut Option<Running>,
    receive: &mut Option<Running>,
    limit: Duration,
) -> Result<()> {
    let sides = [("send", lab.a(), send), ("receive", lab.b(), receive)];
    let mut sides = sides.map(|(command, netns, running)| (command, netns, running, false));
    let ended = wait_for("both sides to come to the end", limit, || {
        for (command, netns, running, done) in &mut sides {
            if *done {
                continue;
            }
            let Some(process) = running.as_mut() else {
                let resume = Running::start(lab, netns, &[], command, &["--resume", id]);
                **running = Some(resume?);
                continue;
            };
            if !process.is_running()?
                && let Some(process) = running.take()
            {
                let ended = process.wait(limit)?;
                *done = ended.report().is_ok();
                if !*done {
                    eprintln!("{command}: {}", ended.failure()?);
                }
            }
        }
        Ok(sides.iter().all(|(_, _, _, done)| *done).then_some(()))
    });
    ended.with_context(|| {
        let status = command(lab, &["status"]).map(|output| output.stdout);
        String::from_utf8_lossy(&status.unwrap_or_default()).into_owned()
    })
}
