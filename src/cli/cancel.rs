//! `farfault cancel`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::state_dir;
use crate::engine::Failure;
use crate::report::Output;
use crate::session::control::{Verdict, ask_cancel};
use crate::session::journal::{Found, Side, find};

/// Ends a migration while the guest still belongs to the source, where it runs on.
///
/// Once the source has decided it is refused: the guest runs at the destination, or will.
#[derive(Debug, Args)]
pub(super) struct Cancel {
    /// The migration's id, as `farfault status` tells it, or the beginning of it.
    id: String,
    /// A JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
    /// Where the journals are kept [default: /var/lib/farfault for root].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Line<'a> {
    event: &'static str,
    migration: &'a str,
    side: Side,
    accepted: bool,
    reason: Option<&'a str>,
}

impl Cancel {
    pub(super) fn run(self) -> ExitCode {
        let output = Output::new(self.json);
        match self.cancel() {
            Ok((found, verdict)) => {
                if self.json {
                    println!("{}", line(&found, &verdict));
                } else if verdict.accepted {
                    println!("{} is cancelled: the guest stays at the source", found.name());
                }
                if verdict.accepted {
                    return ExitCode::SUCCESS;
                }
                let (name, reason) = (found.name(), verdict.reason.unwrap_or_default());
                let text = format!("{name} cannot be cancelled any more: {reason}");
                super::fail(&Failure::plain(text))
            }
            Err(failure) => {
                output.error(&failure);
                ExitCode::FAILURE
            }
        }
    }

    fn cancel(&self) -> Result<(Found, Verdict), Failure> {
        let found = find(&state_dir(self.state_dir.clone()), &self.id, None)?;
        if !found.is_owned() {
            let name = found.name();
            let text = format!("nobody works on {name}: there is nothing to cancel");
            return Err(Failure::new(text, format!("farfault resolve {name} --show")));
        }
        let verdict = ask_cancel(&found.directory)?;
        Ok((found, verdict))
    }
}

fn line(found: &Found, verdict: &Verdict) -> String {
    let line = Line {
        event: "cancel",
        migration: &found.about.migration,
        side: found.about.side,
        accepted: verdict.accepted,
        reason: verdict.reason.as_deref(),
    };
    serde_json::to_string(&line).expect("plain data")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Whereabouts;
    use crate::session::journal::{About, Journal};

    #[test]
    fn a_verdict_is_told_as_an_object() {
        let dir = tempfile::tempdir().unwrap();
        let about = About::begin("aa01", Side::Source, Whereabouts::default()).unwrap();
        let _journal = Journal::create(dir.path(), &about).unwrap();
        let found = find(dir.path(), "aa01", None).unwrap();
        let refused = Verdict { accepted: false, reason: Some("it is \"decided\"".to_owned()) };
        let told: serde_json::Value = serde_json::from_str(&line(&found, &refused)).unwrap();
        assert_eq!((&told["event"], &told["accepted"]), (&"cancel".into(), &false.into()));
        assert_eq!((&told["migration"], &told["side"]), (&"aa01".into(), &"source".into()));
        assert_eq!(told["reason"], "it is \"decided\"");
    }
}
