//! `farfault lab`: the smoke scenario, and an end before the time.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use farfault_integration::lab::{Lab, guest_image, workspace_program};
use farfault_integration::leftovers::nothing_is_left_of;
use farfault_integration::process::{Guarded, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(180);

/// `farfault lab run smoke` into a directory. `None`, loudly, where it cannot run.
fn smoke(out: &Path, further: &[&str]) -> Result<Option<Command>> {
    // Also waits for its turn: a test that holds the machine's only place would be in the way.
    if Lab::start("1Gbit,1ms")?.is_none() {
        return Ok(None);
    }
    let kernel = guest_image()?.kernel;
    let mut command = Command::new(workspace_program("FARFAULT_BIN", "farfault")?);
    command.args(["lab", "run", "smoke", "--out"]).arg(out).arg("--image");
    command.arg(kernel.parent().context("a kernel in a directory")?).args(further);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Ok(Some(command))
}

#[test]
fn the_smoke_scenario_leaves_a_report_and_nothing_else_and_is_not_run_twice() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let Some(mut command) = smoke(directory.path(), &[])? else { return Ok(()) };
    let mut process = Guarded::spawn("farfault lab", &mut command)?;
    let status = process.wait(LIMIT)?;
    let results = std::fs::read_to_string(directory.path().join("results.jsonl"))?;
    let records: Vec<Value> =
        results.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert!(status.success(), "{records:#?}");
    assert_eq!(records.len(), 3);
    for record in &records {
        assert_eq!(record["outcome"], "moved", "{record}");
        assert_eq!(record["measured"]["corrupt_pages"], 0, "{record}");
        for number in ["total_ms", "downtime_ms", "there_bytes"] {
            assert!(record["measured"][number].as_f64() > Some(0.0), "{number} in {record}");
        }
        if record["guest"]["work"] == "stream" {
            let seen = |number: &str| record["measured"]["stream"][number].as_f64();
            // At the end the guest is given two seconds at the destination: the stream goes on there.
            let stopped = record["measured"]["downtime_ms"].as_f64().unwrap_or_default();
            assert!(seen("longest_gap_ms") < Some(stopped + 1500.0), "{record}");
            assert!(seen("frames") > Some(25.0) && seen("corrupt") == Some(0.0), "{record}");
        }
    }
    for file in ["report.md", "results.csv", "plots/qemu-fast-frames.png"] {
        assert!(directory.path().join(file).metadata()?.len() > 500, "{file}");
    }
    nothing_is_left_of(&format!("farfault-lab-{}-", process.pid()))?;

    std::fs::remove_file(directory.path().join("report.md"))?;
    let again = smoke(directory.path(), &[])?.context("it could run before")?.status()?;
    assert!(again.success());
    assert_eq!(std::fs::read_to_string(directory.path().join("results.jsonl"))?, results);
    assert!(directory.path().join("report.md").exists());
    Ok(())
}

#[test]
fn an_interrupted_experiment_takes_everything_away_with_it() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let Some(mut command) = smoke(directory.path(), &["--only", "qemu/"])? else { return Ok(()) };
    let mut process = Guarded::spawn("farfault lab", &mut command)?;
    let name = format!("farfault-lab-{}-0", process.pid());
    let qemu_runs = || {
        let output = Command::new("ip").args(["netns", "pids", &format!("{name}-a")]).output()?;
        Ok((!output.stdout.is_empty()).then_some(()))
    };
    wait_for("a guest in a namespace", LIMIT, qemu_runs)?;
    kill(Pid::from_raw(process.pid() as i32), Signal::SIGINT)?;
    let status = process.wait(Duration::from_secs(30))?;
    assert_eq!(status.code(), Some(130));
    nothing_is_left_of(&name)
}
