//! `farfault resolve`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Args};
use serde::Serialize;

use super::state_dir;
use super::status::monitor;
use crate::engine::Failure;
use crate::guest::qemu;
use crate::report::Output;
use crate::session::journal::{About, Found, Record, Side, find};
use crate::session::resolve::{Choice, advise, judge, resolve};
use crate::units::format_utc;

/// Decides by hand where the guest runs, when a migration ended in doubt.
///
/// It settles this host's side. What the journal here proves is not overruled; where it proves nothing, look
/// at the other host, and make the same choice on both: first on the one that gives the guest up.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("choice").required(true).args(["show", "run_source", "run_destination"])))]
pub(super) struct Resolve {
    /// The migration's id, as `farfault status` tells it, or the beginning of it.
    id: String,
    /// Print the journal in words, and what it allows.
    #[arg(long)]
    show: bool,
    /// The guest runs at the source: on the source it is let run on, on the destination it is given up.
    #[arg(long)]
    run_source: bool,
    /// The guest runs at the destination: on the source it stays stopped; on the destination that is written down,
    /// and `farfault receive --resume` lets it run.
    #[arg(long)]
    run_destination: bool,
    /// A JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
    /// Where the journals are kept [default: /var/lib/farfault for root].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// What `--json` prints when a choice was made.
#[derive(Serialize)]
struct Resolved<'a> {
    event: &'static str,
    migration: &'a str,
    side: Side,
    choice: Choice,
    outcome: &'static str,
}

/// What is known of a side.
#[derive(Serialize)]
struct Evidence<'a> {
    event: &'static str,
    migration: &'a str,
    side: Side,
    monitor_pid: Option<u32>,
    qmp: Option<&'a PathBuf>,
    guest: GuestState,
    /// Why that is unknown.
    guest_error: Option<String>,
    records: &'a [Record],
    /// The farfault that works on it.
    pid: Option<u32>,
    /// How it stands, when nobody does.
    situation: Option<&'static str>,
    run_source: Judged,
    run_destination: Judged,
}

/// Whether the guest here runs, as its monitor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum GuestState {
    Running,
    Stopped,
    /// There is no process of it any more.
    Gone,
    /// Its monitor does not say.
    Unknown,
}

/// What a choice comes to.
#[derive(Serialize)]
struct Judged {
    possible: bool,
    /// Why not.
    reason: Option<String>,
}

impl Resolve {
    pub(super) fn run(self) -> ExitCode {
        let output = Output::new(self.json);
        match self.resolve() {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(failure) => {
                output.error(&failure);
                ExitCode::FAILURE
            }
        }
    }

    fn resolve(self) -> Result<String, Failure> {
        let found = find(&state_dir(self.state_dir), &self.id, None)?;
        if self.show {
            let evidence = Evidence::of(&found);
            return Ok(if self.json { json(&evidence) } else { evidence.text(&found) });
        }
        let choice = if self.run_source { Choice::RunSource } else { Choice::RunDestination };
        let outcome = resolve(&found, choice)?;
        if !self.json {
            return Ok(format!("{}: {outcome}\n", found.name()));
        }
        let About { migration, side, .. } = &found.about;
        let event = "resolved";
        Ok(json(&Resolved { event, migration, side: *side, choice, outcome }))
    }
}

fn json(line: &impl Serialize) -> String {
    serde_json::to_string(line).expect("plain data") + "\n"
}

impl<'a> Evidence<'a> {
    fn of(found: &'a Found) -> Self {
        let About { migration, side, guest: place, .. } = &found.about;
        let (guest, guest_error) = match qemu::is_running(place) {
            Ok(Some(true)) => (GuestState::Running, None),
            Ok(Some(false)) => (GuestState::Stopped, None),
            Ok(None) => (GuestState::Gone, None),
            Err(error) => (GuestState::Unknown, Some(error.to_string())),
        };
        let owned = found.is_owned();
        let judged = |choice| {
            let refused = if owned {
                Some("a farfault works on it".to_owned())
            } else {
                judge(found, choice).err().map(|failure| failure.reason)
            };
            Judged { possible: refused.is_none(), reason: refused }
        };
        Evidence {
            event: "evidence",
            migration,
            side: *side,
            monitor_pid: place.process.map(|process| process.pid),
            qmp: place.qmp.as_ref(),
            guest,
            guest_error,
            records: &found.records.list,
            pid: owned.then_some(found.about.owner.pid),
            situation: (!owned).then(|| advise(found).situation),
            run_source: judged(Choice::RunSource),
            run_destination: judged(Choice::RunDestination),
        }
    }

    fn text(&self, found: &Found) -> String {
        let mut lines = vec![found.name(), format!("  {}", monitor(&found.about.guest))];
        let state = match self.guest {
            GuestState::Running => "it runs".to_owned(),
            GuestState::Stopped => "it is stopped".to_owned(),
            GuestState::Gone => "there is no process of it any more".to_owned(),
            GuestState::Unknown => {
                let error = self.guest_error.as_deref().unwrap_or_default();
                format!("it does not say how it is: {error}")
            }
        };
        lines.push(format!("  the guest here: {state}"));
        for Record { unix_ms, record } in self.records {
            lines.push(format!("  {}  {}", format_utc(*unix_ms), record.meaning(self.side)));
        }
        if let Some(pid) = self.pid {
            lines.push(format!("  farfault (process {pid}) works on it"));
            return lines.join("\n") + "\n";
        }
        lines.extend(self.situation.map(|situation| format!("  {situation}")));
        let choices = [
            (Choice::RunSource, &self.run_source),
            (Choice::RunDestination, &self.run_destination),
        ];
        for (choice, judged) in choices {
            let told = match &judged.reason {
                None => "possible".to_owned(),
                Some(reason) => format!("refused: {reason}"),
            };
            lines.push(format!("  {:<18} {told}", choice.option()));
        }
        lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Whereabouts;
    use crate::memory::adopt::ProcessIdentity;
    use crate::session::journal::{Entry, Journal};

    #[test]
    fn the_journal_is_shown_in_words_with_what_it_allows() {
        let dir = tempfile::tempdir().unwrap();
        let mut about = About::begin("aa01", Side::Destination, Whereabouts::default()).unwrap();
        about.owner = ProcessIdentity { start_ticks: 0, ..about.owner };
        let mut journal = Journal::create(dir.path(), &about).unwrap();
        journal.record(&Entry::Started).unwrap();
        journal.record(&Entry::Loaded).unwrap();
        let found = find(dir.path(), "aa01", None).unwrap();
        let told = Evidence::of(&found).text(&found);
        assert!(told.contains("device state was loaded"), "{told}");
        assert!(told.contains("--run-source       possible"), "{told}");
        journal.record(&Entry::Committed).unwrap();
        let found = find(dir.path(), "aa01", None).unwrap();
        let told = Evidence::of(&found).text(&found);
        assert!(told.contains("--run-source       refused"), "{told}");
        let told: serde_json::Value =
            serde_json::from_str(&json(&Evidence::of(&found))).expect("one object");
        assert_eq!((&told["event"], &told["guest"]), (&"evidence".into(), &"gone".into()));
        assert_eq!(told["records"][2]["record"], "committed", "{told}");
        assert_eq!(told["run_source"]["possible"], false, "{told}");
        assert_eq!(told["run_destination"]["possible"], false, "{told}");
        assert_eq!(told["pid"], serde_json::Value::Null, "{told}");
    }
}
