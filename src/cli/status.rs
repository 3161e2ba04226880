//! `farfault status`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::{fail, state_dir};
use crate::engine::{Failure, MigrationPhase};
use crate::guest::Whereabouts;
use crate::page::PAGE_SIZE_BYTES;
use crate::report::{LinkState, Progress};
use crate::session::control::{Live, ask_status};
use crate::session::journal::{Found, Side, list};
use crate::session::resolve::advise;
use crate::units::{format_bytes, format_rate, format_utc};

/// How often `--watch` looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Tells all migrations on this host: those under way, and those that nobody works on, with what to do.
#[derive(Debug, Args)]
pub(super) struct Status {
    /// One JSON object a line on stdout instead of text.
    #[arg(long)]
    json: bool,
    /// Look again every second, until it is interrupted.
    #[arg(long)]
    watch: bool,
    /// Where the journals are kept [default: /var/lib/farfault for root].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// A line of `--json`.
#[derive(Serialize)]
struct Line<'a> {
    event: &'static str,
    migration: &'a str,
    side: Side,
    /// `running`: a farfault works on it. `left`: nobody does.
    state: &'static str,
    begun_unix_ms: u64,
    pid: u32,
    monitor_pid: Option<u32>,
    qmp: Option<&'a PathBuf>,
    phase: Option<MigrationPhase>,
    link: Option<LinkState>,
    progress: Option<Progress>,
    situation: Option<&'static str>,
    next: Option<String>,
}

impl Status {
    pub(super) fn run(self) -> ExitCode {
        if let Some(chosen) = self.state_dir.as_deref().filter(|chosen| !chosen.exists()) {
            return fail(&Failure::new(
                format!("--state-dir {}: there is no such directory", chosen.display()),
                "name the one that `send` or `receive` was given, or none",
            ));
        }
        let dir = state_dir(self.state_dir.clone());
        loop {
            let (found, failures) = match list(&dir) {
                Ok(listed) => listed,
                Err(failure) => return fail(&failure),
            };
            let terminal = console::Term::stdout();
            if self.watch && !self.json && terminal.is_term() {
                let _ = terminal.clear_screen();
            }
            if found.is_empty() && !self.json {
                println!("no migrations in {}", dir.display());
            }
            for one in &found {
                let live = if one.is_owned() { ask_status(&one.directory) } else { None };
                // It may have ended since it was listed.
                if !one.is_owned() && !one.directory.exists() {
                    continue;
                }
                if self.json {
                    let line = line(one, live);
                    println!("{}", serde_json::to_string(&line).expect("plain data"));
                } else {
                    print!("{}", text(one, live));
                }
            }
            for failure in &failures {
                fail(failure);
            }
            if !self.watch {
                let whole = failures.is_empty();
                return if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE };
            }
            std::thread::sleep(WATCH_INTERVAL);
        }
    }
}

fn line(found: &Found, live: Option<Live>) -> Line<'_> {
    let about = &found.about;
    let advice = (!found.is_owned()).then(|| advise(found));
    Line {
        event: "migration",
        migration: &about.migration,
        side: about.side,
        state: if advice.is_none() { "running" } else { "left" },
        begun_unix_ms: about.begun_unix_ms,
        pid: about.owner.pid,
        monitor_pid: about.guest.process.map(|process| process.pid),
        qmp: about.guest.qmp.as_ref(),
        phase: live.as_ref().and_then(|live| live.phase),
        link: live.as_ref().map(|live| live.link),
        progress: live.and_then(|live| live.progress),
        situation: advice.as_ref().map(|advice| advice.situation),
        next: advice.map(|advice| advice.next),
    }
}

fn text(found: &Found, live: Option<Live>) -> String {
    let about = &found.about;
    let since = format_utc(about.begun_unix_ms);
    let mut lines = Vec::new();
    if found.is_owned() {
        let how = live.map_or_else(|| "does not answer".to_owned(), |live| describe(&live));
        lines.push(format!("{}  {how}", found.name()));
        lines.push(format!("since {since}; farfault is process {}", about.owner.pid));
    } else {
        let advice = advise(found);
        lines.push(format!("{}  {}", found.name(), advice.situation));
        lines.push(format!("since {since}; farfault (process {}) has ended", about.owner.pid));
        lines.push(format!("do: {}", advice.next));
    }
    lines.insert(2, monitor(&about.guest));
    lines.join("\n    ") + "\n"
}

fn describe(live: &Live) -> String {
    let mut words = vec![live.phase.map_or("no phase yet", MigrationPhase::name).to_owned()];
    words.push(match live.link {
        LinkState::Waiting => "waiting for the other side".to_owned(),
        LinkState::Up => "link up".to_owned(),
        LinkState::Down => "link down, connecting again".to_owned(),
    });
    if let Some(progress) = &live.progress {
        words.push(format!(
            "{} left",
            format_bytes(progress.remaining_pages * PAGE_SIZE_BYTES as u64)
        ));
        words.push(format_rate(progress.rate_bytes_per_s as f64));
        words.push(format!("{} remote faults", progress.remote_faults));
    }
    words.join(", ")
}

pub(super) fn monitor(guest: &Whereabouts) -> String {
    let Some(process) = guest.process else {
        return format!("guest: {}, inside farfault", guest.monitor);
    };
    let ended = if process.lives() { "" } else { ", which has ended" };
    let qmp = guest.qmp.as_ref().map_or_else(String::new, |qmp| format!(" at {}", qmp.display()));
    format!("guest: {} (process {}{ended}){qmp}", guest.monitor, process.pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::adopt::ProcessIdentity;
    use crate::session::journal::{About, Entry, Journal, find};

    #[test]
    fn a_dead_owner_is_told_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let mut about = About::begin("aa01", Side::Source, Whereabouts::default()).unwrap();
        about.owner = ProcessIdentity { start_ticks: 0, ..about.owner };
        let mut journal = Journal::create(dir.path(), &about).unwrap();
        journal.record(&Entry::Started).unwrap();
        let found = find(dir.path(), "aa01", None).unwrap();
        let told = text(&found, None);
        assert!(told.contains("not decided"), "{told}");
        assert!(told.contains("farfault resolve aa01.source --run-source"), "{told}");
        journal.record(&Entry::Decided).unwrap();
        let found = find(dir.path(), "aa01", None).unwrap();
        let told = serde_json::to_value(line(&found, None)).unwrap();
        assert_eq!(told["state"], "left");
        assert!(told["situation"].as_str().unwrap().starts_with("in doubt"), "{told}");
    }

    #[test]
    fn a_running_one_is_told_with_its_phase_and_link() {
        let dir = tempfile::tempdir().unwrap();
        let about = About::begin("aa01", Side::Source, Whereabouts::default()).unwrap();
        let _journal = Journal::create(dir.path(), &about).unwrap();
        let found = find(dir.path(), "aa01", None).unwrap();
        let live = Live {
            phase: Some(MigrationPhase::Postcopy),
            link: LinkState::Down,
            progress: Some(Progress { remaining_pages: 256, ..Progress::default() }),
        };
        let told = text(&found, Some(live.clone()));
        assert!(told.contains("postcopy, link down, connecting again, 1.0 MiB left"), "{told}");
        assert_eq!(serde_json::to_value(line(&found, Some(live))).unwrap()["link"], "down");
    }
}
