//! The `farfault` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    farfault::cli::main()
}
