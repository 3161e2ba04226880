//! `farfault resolve`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Args};

use super::status::monitor;
use super::{fail, state_dir};
use crate::engine::Failure;
use crate::guest::qemu;
use crate::session::journal::{Found, find};
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
    /// The guest runs at the source: here it is let run on, on the destination it is given up.
    #[arg(long)]
    run_source: bool,
    /// The guest runs at the destination: here it is let run, on the source it stays stopped.
    #[arg(long)]
    run_destination: bool,
    /// Where the journals are kept [default: /var/lib/farfault for root].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl Resolve {
    pub(super) fn run(self) -> ExitCode {
        let choice = if self.run_source { Choice::RunSource } else { Choice::RunDestination };
        let told = find(&state_dir(self.state_dir), &self.id, None).and_then(|found| {
            if self.show {
                return Ok(show(&found));
            }
            Ok(format!("{}: {}\n", found.name(), resolve(&found, choice)?))
        });
        match told {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(failure) => fail(&failure),
        }
    }
}

fn show(found: &Found) -> String {
    let side = found.about.side;
    let mut lines = vec![found.name(), format!("  {}", monitor(&found.about.guest))];
    let state = match qemu::is_running(&found.about.guest) {
        Ok(Some(true)) => "it runs".to_owned(),
        Ok(Some(false)) => "it is stopped".to_owned(),
        Ok(None) => "there is no process of it any more".to_owned(),
        Err(error) => format!("it does not say how it is: {error}"),
    };
    lines.push(format!("  the guest here: {state}"));
    for record in &found.records.list {
        lines.push(format!("  {}  {}", format_utc(record.unix_ms), record.record.meaning(side)));
    }
    if found.is_owned() {
        lines.push(format!("  farfault (process {}) works on it", found.about.owner.pid));
        return lines.join("\n") + "\n";
    }
    lines.push(format!("  {}", advise(found).situation));
    for choice in [Choice::RunSource, Choice::RunDestination] {
        let judged = match judge(side, &found.records, choice) {
            Ok(_) => "possible".to_owned(),
            Err(Failure { reason, .. }) => format!("refused: {reason}"),
        };
        lines.push(format!("  {:<18} {judged}", choice.option()));
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Whereabouts;
    use crate::memory::adopt::ProcessIdentity;
    use crate::session::journal::{About, Entry, Journal, Side};

    #[test]
    fn the_journal_is_shown_in_words_with_what_it_allows() {
        let dir = tempfile::tempdir().unwrap();
        let mut about = About::begin("aa01", Side::Destination, Whereabouts::default()).unwrap();
        about.owner = ProcessIdentity { start_ticks: 0, ..about.owner };
        let mut journal = Journal::create(dir.path(), &about).unwrap();
        journal.record(&Entry::Started).unwrap();
        journal.record(&Entry::Loaded).unwrap();
        let told = show(&find(dir.path(), "aa01", None).unwrap());
        assert!(told.contains("device state was loaded"), "{told}");
        assert!(told.contains("--run-source       possible"), "{told}");
        journal.record(&Entry::Committed).unwrap();
        let told = show(&find(dir.path(), "aa01", None).unwrap());
        assert!(told.contains("--run-source       refused"), "{told}");
    }
}
