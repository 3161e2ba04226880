//! `farfault cancel`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{fail, state_dir};
use crate::engine::Failure;
use crate::session::control::ask_cancel;
use crate::session::journal::find;

/// Ends a migration while the guest still belongs to the source, where it runs on.
///
/// Once the source has decided it is refused: the guest runs at the destination, or will.
#[derive(Debug, Args)]
pub(super) struct Cancel {
    /// The migration's id, as `farfault status` tells it, or the beginning of it.
    id: String,
    /// Where the journals are kept [default: /var/lib/farfault for root].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl Cancel {
    pub(super) fn run(self) -> ExitCode {
        match self.cancel() {
            Ok(name) => {
                println!("{name} is cancelled: the guest stays at the source");
                ExitCode::SUCCESS
            }
            Err(failure) => fail(&failure),
        }
    }

    fn cancel(self) -> Result<String, Failure> {
        let found = find(&state_dir(self.state_dir), &self.id, None)?;
        let name = found.name();
        if !found.is_owned() {
            let text = format!("nobody works on {name}: there is nothing to cancel");
            return Err(Failure::new(text, format!("farfault resolve {name} --show")));
        }
        let verdict = ask_cancel(&found.directory)?;
        if verdict.accepted {
            return Ok(name);
        }
        let reason = verdict.reason.unwrap_or_default();
        Err(Failure::plain(format!("{name} cannot be cancelled any more: {reason}")))
    }
}
