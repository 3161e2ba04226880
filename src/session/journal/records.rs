//! A journal, read.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Side;
use crate::engine::Failure;

/// A journal has some ten lines; a longer file is not one.
const LIMIT_BYTES: u64 = 64 << 10;

/// All that either side writes: what the two machines record, and what a person has decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entry {
    /// The migration has begun; the guest runs at the source.
    Started,
    /// Source: the guest may run at the destination.
    Decided,
    /// Source: the decision is taken back.
    Void,
    /// Source: the guest runs at the destination.
    Running,
    /// Every page has arrived.
    Complete,
    /// Destination: the guest's device state is loaded, the guest could run.
    Loaded,
    /// Destination: the guest runs here from now on.
    Committed,
    /// Destination: the guest has not run here and never will.
    Refused,
    /// A person has decided on the source: the guest runs there.
    RunSource,
    /// A person has decided on the source: the guest runs at the destination.
    RunDestination,
}

impl Entry {
    /// What it says, for a person.
    pub fn meaning(self, side: Side) -> &'static str {
        match (self, side) {
            (Entry::Started, Side::Source) => "a migration began; the guest ran here",
            (Entry::Started, Side::Destination) => "a guest was announced; it ran at the source",
            (Entry::Decided, _) => "decided: the guest may run at the destination",
            (Entry::Void, _) => "the decision was taken back: the guest runs here",
            (Entry::Running, _) => "the guest runs at the destination",
            (Entry::Complete, _) => "every page has arrived at the destination",
            (Entry::Loaded, _) => "the guest's device state was loaded: it could run",
            (Entry::Committed, _) => "the guest runs here from now on",
            (Entry::Refused, _) => "the guest has not run here and never will",
            (Entry::RunSource, _) => "resolved by hand: the guest runs here",
            (Entry::RunDestination, _) => "resolved by hand: the guest runs at the destination",
        }
    }
}

/// One line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When it was written.
    pub unix_ms: u64,
    /// What.
    pub record: Entry,
}

/// All lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// In order.
    pub list: Vec<Record>,
    /// How much of the file they are. What follows is a line that was not written to its end, by a
    /// writer that died over it: nobody has acted upon it.
    pub(super) len_bytes: u64,
}

impl Records {
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let failed = |why: String| {
            Failure::new(
                format!("the journal {} cannot be read: {why}", path.display()),
                "look at it with a pager: what it says decides where the guest may run",
            )
        };
        let mut text = String::new();
        let file = File::open(path).map_err(|error| failed(error.to_string()))?;
        file.take(LIMIT_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(|error| failed(error.to_string()))?;
        if text.len() as u64 > LIMIT_BYTES {
            return Err(failed("it is too long".to_owned()));
        }
        Self::parse(&text).map_err(failed)
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut list = Vec::new();
        for (index, line) in text[..whole].lines().enumerate() {
            let record = serde_json::from_str(line);
            list.push(record.map_err(|error| format!("line {}: {error}", index + 1))?);
        }
        Ok(Records { list, len_bytes: whole as u64 })
    }

    /// Whether this was ever written.
    pub fn has(&self, entry: Entry) -> bool {
        self.list.iter().any(|record| record.record == entry)
    }

    #[cfg(test)]
    pub(crate) fn of(entries: &[Entry]) -> Self {
        let list = entries.iter().map(|entry| Record { unix_ms: 0, record: *entry }).collect();
        Records { list, len_bytes: 0 }
    }
}
