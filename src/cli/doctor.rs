//! `farfault doctor`

use std::process::ExitCode;

use clap::Args;

/// Tells what this host can do, and how to mend what it cannot.
#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// One JSON object a line on stdout instead of text.
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self) -> ExitCode {
        ExitCode::SUCCESS
    }
}
