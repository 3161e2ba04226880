//! `farfault doctor`

use std::process::{Command, ExitCode};

use clap::Args;
use serde::Serialize;

use crate::memory::{HostCapabilities, Status};

/// Tells what this host can do, and how to mend what it cannot.
///
/// Each thing is tried, not looked up. The exit status is 0 when nothing is missing that sending and
/// receiving guests needs.
#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// One JSON object a line on stdout instead of text.
    #[arg(long)]
    json: bool,
}

/// A line of the examination.
#[derive(Serialize)]
struct Finding {
    event: &'static str,
    name: &'static str,
    needed_for: &'static str,
    status: &'static str,
    detail: String,
    mend: Option<&'static str>,
}

const QEMU: &str = "qemu-system-x86_64";

impl Doctor {
    pub(super) fn run(self) -> ExitCode {
        let host = HostCapabilities::probe();
        let mut findings: Vec<Finding> = host
            .items
            .iter()
            .map(|item| {
                let (status, detail) = match &item.status {
                    Status::Ok(detail) => ("ok", detail),
                    Status::Degraded(detail) => ("degraded", detail),
                    Status::Missing(detail) => ("missing", detail),
                };
                Finding {
                    event: "finding",
                    name: item.name,
                    needed_for: item.needed_for,
                    status,
                    detail: detail.clone(),
                    mend: (status != "ok").then_some(item.mend),
                }
            })
            .collect();
        findings.push(qemu());
        for finding in &findings {
            if self.json {
                println!("{}", serde_json::to_string(finding).expect("plain data"));
                continue;
            }
            let Finding { name, status, detail, needed_for, .. } = finding;
            println!(
                "{status:<9}{name}{}",
                if detail.is_empty() { "" } else { ": " }.to_owned() + detail
            );
            if let Some(mend) = finding.mend {
                println!("         needed for {needed_for}; to mend it: {mend}");
            }
        }
        if host.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Farfault attaches to any QEMU that it is pointed at; this one is only the likeliest.
fn qemu() -> Finding {
    let version = Command::new(QEMU).arg("--version").output();
    let version = version.ok().filter(|output| output.status.success()).and_then(|output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().next().map(str::to_owned)
    });
    Finding {
        event: "finding",
        name: "QEMU",
        needed_for: "moving QEMU guests",
        status: if version.is_some() { "ok" } else { "missing" },
        mend: version.is_none().then_some("install qemu-system-x86, or name another QEMU's socket"),
        detail: version.unwrap_or_else(|| format!("no {QEMU} in PATH")),
    }
}
