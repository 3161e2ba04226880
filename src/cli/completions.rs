//! `farfault completions` and `farfault man`: written from the argument parser itself.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Arguments;

/// Prints what a shell needs to complete farfault's arguments.
#[derive(Debug, Args)]
pub(super) struct Completions {
    /// Which shell.
    shell: Shell,
}

/// Prints the manual page of farfault, or of one of its commands, in roff.
#[derive(Debug, Args)]
pub(super) struct Man {
    /// The command, such as `send` or `lab run`; without one, farfault itself.
    command: Vec<String>,
}

impl Completions {
    pub(super) fn run(self) -> ExitCode {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Arguments::command(), "farfault", &mut text);
        print(&text)
    }
}

impl Man {
    pub(super) fn run(self) -> ExitCode {
        match page(&self.command) {
            Ok(text) => print(&text),
            Err(why) => {
                eprintln!("farfault: error: {why}");
                ExitCode::from(2)
            }
        }
    }
}

fn page(words: &[String]) -> Result<Vec<u8>, String> {
    let mut command = Arguments::command();
    command.build();
    let mut found = &command;
    for word in words {
        found = found
            .find_subcommand(word)
            .ok_or_else(|| format!("farfault has no command {:?}", words.join(" ")))?;
    }
    let page = clap_mangen::Man::new(found.clone());
    let mut text = Vec::new();
    page.render(&mut text).map_err(|error| error.to_string())?;
    Ok(text)
}

/// Whoever reads may be gone.
fn print(text: &[u8]) -> ExitCode {
    match std::io::stdout().lock().write_all(text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_shell_is_told_of_every_command() {
        for shell in Shell::value_variants() {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "farfault", &mut text);
            let text = String::from_utf8(text).unwrap();
            for word in ["receive", "send", "doctor", "precopy-rounds"] {
                assert!(text.contains(word), "{shell}: {word}");
            }
        }
    }

    #[test]
    fn a_manual_page_is_that_of_the_command_asked_for() {
        let of = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            page(&words).map(|text| String::from_utf8(text).unwrap())
        };
        assert!(of(&[]).unwrap().contains("receive"));
        let send = of(&["send"]).unwrap();
        assert!(send.contains(".TH farfault-send 1") && send.contains("downtime"), "{send}");
        assert!(of(&["lab", "run"]).unwrap().contains("budget"));
        assert!(of(&["fly"]).unwrap_err().contains("fly"));
    }
}
