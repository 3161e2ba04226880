//! Where a command's output goes: progress for a person on stderr, or JSON lines on stdout.

use std::io::Write;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use super::{FaultFigures, PushFigures, Report};
use crate::engine::{Failure, MigrationPhase};
use crate::units::{format_bytes, format_rate};

/// Longer texts of a failure are cut.
const MAX_FAILURE_CHARS: usize = 4000;

/// A line of `--json`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event<'a> {
    /// The receiver waits; give this to the sender.
    Ticket {
        /// One word.
        ticket: &'a str,
    },
    /// A phase has begun.
    Phase {
        /// Which.
        phase: MigrationPhase,
    },
    /// The link was lost, or is there again.
    Link {
        /// Which of the two.
        state: LinkState,
        /// How long there was none; null when it was just lost.
        outage_ms: Option<u64>,
    },
    /// How far it is.
    Progress(&'a Progress),
    /// Why it did not work.
    Error {
        /// What was wrong.
        message: &'a str,
        /// What to do.
        hint: Option<&'a str>,
    },
    /// The last line.
    Report(&'a Report),
}

/// How far a migration is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Since the link's first message.
    pub elapsed_ms: u64,
    /// Pages whose content went or came, counted each time.
    pub pages: u64,
    /// Pages of guest RAM.
    pub pages_total: u64,
    /// Pages that the destination lacks, as far as this side knows.
    pub remaining_pages: u64,
    /// Sent by this side so far.
    pub wire_sent_bytes: u64,
    /// Received by this side so far.
    pub wire_received_bytes: u64,
    /// Both directions, since the last progress line.
    pub rate_bytes_per_s: u64,
    /// Remote faults so far.
    pub remote_faults: u64,
    /// How the guest waits for its pages; at the destination, once it runs there.
    pub faults: Option<FaultFigures>,
    /// How what was left at the switchover goes; at the source, from then on.
    pub push: Option<PushFigures>,
}

/// The link to the other side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// There was none yet.
    #[default]
    Waiting,
    /// It works, as far as is known.
    Up,
    /// It is lost, and another one is looked for.
    Down,
}

/// The output of one command.
pub struct Output {
    json: bool,
    bar: Mutex<Option<ProgressBar>>,
    phase: Mutex<Option<MigrationPhase>>,
    last: Mutex<(LinkState, Option<Progress>)>,
}

impl Output {
    /// JSON lines on stdout, or text: a progress line on stderr when that is a terminal, else one
    /// line a phase.
    pub fn new(json: bool) -> Self {
        Output { json, bar: Mutex::default(), phase: Mutex::default(), last: Mutex::default() }
    }

    /// True when stdout carries JSON lines.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Tells the ticket: alone on its line.
    pub fn ticket(&self, ticket: &str) {
        if self.json {
            self.emit(&Event::Ticket { ticket });
        } else {
            println(ticket);
        }
    }

    /// A phase has begun.
    pub fn phase(&self, phase: MigrationPhase) {
        let mut last = self.phase.lock().expect("no holder panics");
        if last.replace(phase) == Some(phase) {
            return;
        }
        if self.json {
            self.emit(&Event::Phase { phase });
            return;
        }
        if phase == MigrationPhase::Done {
            if let Some(bar) = self.bar.lock().expect("no holder panics").take() {
                bar.finish_and_clear();
            }
            return;
        }
        let mut bar = self.bar.lock().expect("no holder panics");
        let bar = bar.get_or_insert_with(new_bar);
        if bar.is_hidden() {
            eprintln(&format!("farfault: {}", phase.name()));
        } else {
            bar.set_prefix(phase.name());
        }
    }

    /// How the link is now.
    pub fn link(&self, state: LinkState) {
        self.last.lock().expect("no holder panics").0 = state;
    }

    /// What was told last: the phase, the link, the progress.
    pub fn last(&self) -> (Option<MigrationPhase>, LinkState, Option<Progress>) {
        let (link, progress) = self.last.lock().expect("no holder panics").clone();
        (*self.phase.lock().expect("no holder panics"), link, progress)
    }

    /// How far it is.
    pub fn progress(&self, progress: Progress) {
        if self.json {
            self.emit(&Event::Progress(&progress));
        } else if let Some(bar) = &*self.bar.lock().expect("no holder panics") {
            let done = progress.pages_total.saturating_sub(progress.remaining_pages);
            bar.set_length(progress.pages_total);
            bar.set_position(done);
            bar.set_message(format!(
                "{} left, {} on the wire, {}, {} faults",
                format_bytes(progress.remaining_pages * crate::page::PAGE_SIZE_BYTES as u64),
                format_bytes(progress.wire_sent_bytes + progress.wire_received_bytes),
                format_rate(progress.rate_bytes_per_s as f64),
                progress.remote_faults,
            ));
        }
        self.last.lock().expect("no holder panics").1 = Some(progress);
    }

    /// The link is lost; another one is looked for, for so long.
    pub fn link_down(&self, why: &str, reconnect_for: Duration) {
        self.link(LinkState::Down);
        if self.json {
            self.emit(&Event::Link { state: LinkState::Down, outage_ms: None });
        }
        let limit_s = reconnect_for.as_secs_f64();
        self.note(&format!("the link is lost ({why}); connecting again for up to {limit_s} s"));
    }

    /// The two sides have found together again.
    pub fn link_up(&self, outage: Duration) {
        self.link(LinkState::Up);
        if self.json {
            let outage_ms = Some(outage.as_millis() as u64);
            self.emit(&Event::Link { state: LinkState::Up, outage_ms });
        }
        self.note(&format!("the link is back after {:.1} s", outage.as_secs_f64()));
    }

    /// Something for a person that is no event.
    pub fn note(&self, text: &str) {
        match &*self.bar.lock().expect("no holder panics") {
            Some(bar) if !bar.is_hidden() => bar.println(text),
            _ => eprintln(&format!("farfault: {text}")),
        }
    }

    /// Why it did not work.
    pub fn error(&self, failure: &Failure) {
        if let Some(bar) = self.bar.lock().expect("no holder panics").take() {
            bar.finish_and_clear();
        }
        let reason = printable(&failure.reason);
        let hint = failure.hint.as_deref().map(printable);
        if self.json {
            self.emit(&Event::Error { message: &reason, hint: hint.as_deref() });
        }
        eprintln(&format!("farfault: error: {reason}"));
        if let Some(hint) = &hint {
            eprintln(&format!("farfault: hint: {hint}"));
        }
    }

    /// The end.
    pub fn report(&self, report: &Report) {
        self.phase(MigrationPhase::Done);
        if self.json {
            self.emit(&Event::Report(report));
        } else {
            println(&report.to_string());
        }
    }

    fn emit(&self, event: &Event<'_>) {
        println(&serde_json::to_string(event).expect("events are plain data"));
    }
}

/// A reader that has gone away, or a full disk, must not stop a migration half way: unlike `println!`, no panic.
fn println(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", line.trim_end());
    let _ = out.flush();
}

/// As [`println`].
pub(crate) fn eprintln(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn new_bar() -> ProgressBar {
    let style = "{prefix:>9} [{bar:30}] {percent:>3} % {msg}";
    let style = ProgressStyle::with_template(style).expect("the template is fixed");
    ProgressBar::new(0).with_style(style.progress_chars("=> "))
}
/// A failure's text for a terminal. Parts of it may be the other side's words: it has no control
/// characters, no line of it can be taken for one of farfault's own, and it is not endless.
fn printable(text: &str) -> String {
    let lines = text.lines().map(|line| line.replace(char::is_control, " "));
    lines.collect::<Vec<_>>().join("\n  ").chars().take(MAX_FAILURE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_other_side_says_cannot_play_tricks_on_a_terminal() {
        let hostile = "no\u{1b}[2J\r\nfarfault: error: send me your ticket";
        assert_eq!(printable(hostile), "no [2J\n  farfault: error: send me your ticket");
        assert_eq!(printable(&"x".repeat(1 << 20)).len(), MAX_FAILURE_CHARS);
    }
}
