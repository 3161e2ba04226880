//! What can be said to a running emulator: one command a line, one JSON object a line as answer.

use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use crate::link::Totals;
use crate::spec::{Loss, QueueLimit, Rate, SpecError, parse_time};

/// A line from the user. All apply to both directions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Command {
    /// `cut`: lose everything, until `restore`.
    Cut,
    /// `restore`
    Restore,
    /// `rate 25Mbit`
    Rate(Rate),
    /// `delay 20ms`: one way.
    Delay(Duration),
    /// `loss 0.1%`
    Loss(Loss),
    /// `queue 64KiB`
    Queue(QueueLimit),
    /// `totals`: since the start or the last `reset`.
    Totals,
    /// `reset`: answers the totals, and counts from zero.
    Reset,
    /// `quit`
    Quit,
}

impl FromStr for Command {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next().unwrap_or(""), words.next());
        let need = || value.ok_or_else(|| format!("`{name}` needs a value"));
        let wrong = |error: SpecError| error.to_string();
        let command = match name {
            "cut" => Command::Cut,
            "restore" => Command::Restore,
            "rate" => Command::Rate(need()?.parse().map_err(wrong)?),
            "delay" => Command::Delay(parse_time(need()?).map_err(wrong)?),
            "loss" => Command::Loss(need()?.parse().map_err(wrong)?),
            "queue" => Command::Queue(need()?.parse().map_err(wrong)?),
            "totals" => Command::Totals,
            "reset" => Command::Reset,
            "quit" => Command::Quit,
            _ => {
                return Err(format!(
                    "{line:?} is not one of: cut, restore, rate X, delay X, loss X, queue X, \
                     totals, reset, quit"
                ));
            }
        };
        Ok(command)
    }
}

/// Both directions of the link; `a` and `b` are the namespaces of the command line.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct BothTotals {
    /// From a to b.
    pub a_to_b: Totals,
    /// From b to a.
    pub b_to_a: Totals,
}

/// A line to the user.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Answer {
    /// The devices are up.
    Ready,
    /// A command was carried out.
    Ok,
    /// A command was not understood.
    Error {
        /// Why, and what to write instead.
        message: String,
    },
    /// To `totals`, `reset`, and at the end.
    Totals(BothTotals),
}

impl Answer {
    /// As one line of JSON, with its newline.
    pub fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self)
            .unwrap_or_else(|error| format!(r#"{{"event":"error","message":"{error}"}}"#));
        line.push('\n');
        line
    }
}

/// Bytes to lines, with a limit on a line.
#[derive(Debug, Default)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// Up to the next newline: the line was too long.
    ignores: bool,
}

impl LineBuffer {
    const MAX_LINE_BYTES: usize = 4096;

    /// Adds bytes that came; gives the lines that they complete. Of a line beyond the limit nothing is
    /// taken for a command: in its place is one that is none.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for byte in bytes {
            if *byte == b'\n' {
                if !std::mem::take(&mut self.ignores) {
                    lines.push(String::from_utf8_lossy(&self.bytes).trim().to_owned());
                }
                self.bytes.clear();
            } else if self.bytes.len() < Self::MAX_LINE_BYTES {
                self.bytes.push(*byte);
            } else if !std::mem::replace(&mut self.ignores, true) {
                lines.push(format!("(more than {} bytes)", Self::MAX_LINE_BYTES));
            }
        }
        lines.retain(|line| !line.is_empty());
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_and_nonsense_is_answered_with_the_list() {
        assert_eq!("cut".parse(), Ok(Command::Cut));
        assert_eq!(" loss 1% ".trim().parse(), Ok(Command::Loss("1%".parse().unwrap())));
        assert_eq!("rate 25Mbit".parse(), Ok(Command::Rate("25Mbit".parse().unwrap())));
        assert!("rate".parse::<Command>().unwrap_err().contains("needs a value"));
        assert!("cutt".parse::<Command>().unwrap_err().contains("restore"));
    }

    #[test]
    fn lines_come_out_whole_however_they_came_in() {
        let mut buffer = LineBuffer::default();
        assert!(buffer.push(b"to").is_empty());
        assert_eq!(buffer.push(b"tals\n\ncut\nre"), ["totals", "cut"]);
        assert_eq!(buffer.push(b"store\n"), ["restore"]);
    }

    #[test]
    fn no_part_of_a_line_that_is_too_long_is_a_command() {
        let mut buffer = LineBuffer::default();
        let lines = buffer.push(&[&b"quit "[..], &[b' '; 4091], b"quit"].concat());
        assert_eq!(lines.len(), 1);
        assert!(lines[0].parse::<Command>().is_err(), "{lines:?}");
        assert!(buffer.push(&[b'x'; 5000]).is_empty() && buffer.push(b" quit\n").is_empty());
        assert_eq!(buffer.push(b"cut\n"), ["cut"]);
    }

    #[test]
    fn totals_are_one_json_line_with_both_directions() {
        let line = Answer::Totals(BothTotals::default()).to_line();
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(json["event"], "totals");
        assert_eq!(json["a_to_b"]["carried_bytes"], 0);
        assert_eq!(line.matches('\n').count(), 1);
    }
}
