//! What the source remembers of what it has sent, and what that was good for.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::SentMemory;
use crate::units::format_bytes;

/// Of the report: see its fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountFigures {
    /// Threads that encode pages.
    pub encoders: u64,
    /// The exact bytes of sent pages, in memory.
    pub base_cache_bytes: u64,
    /// Line fingerprints of the others.
    pub lines_bytes: u64,
    /// The index by which copies are found.
    pub copies_bytes: u64,
    /// The index by which pages are found that share stretches of bytes with others.
    pub kin_bytes: u64,
    /// Duplicates that were put off from the first round to the second.
    pub put_off_pages: u64,
    /// Pages that were left to the freeze when pre-copy ended, since the guest writes to them all the time.
    pub held_back_pages: u64,
}

impl AccountFigures {
    /// With what the account occupies.
    #[must_use]
    pub fn occupying(self, memory: SentMemory) -> Self {
        let SentMemory { base_cache_bytes, lines_bytes, copies_bytes, kin_bytes } = memory;
        AccountFigures { base_cache_bytes, lines_bytes, copies_bytes, kin_bytes, ..self }
    }
}

impl fmt::Display for AccountFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of pages, {} of lines, {} of copies, {} of kin",
            format_bytes(self.base_cache_bytes),
            format_bytes(self.lines_bytes),
            format_bytes(self.copies_bytes),
            format_bytes(self.kin_bytes),
        )?;
        if self.put_off_pages > 0 {
            write!(f, "; {} duplicates put off", self.put_off_pages)?;
        }
        if self.held_back_pages > 0 {
            write!(f, "; {} hot pages held back", self.held_back_pages)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_what_is_kept_and_what_was_not_sent_twice() {
        let memory = SentMemory {
            base_cache_bytes: 8 << 20,
            lines_bytes: 0,
            copies_bytes: 2048,
            kin_bytes: 1 << 20,
        };
        let mut figures = AccountFigures { encoders: 2, ..Default::default() }.occupying(memory);
        let expected = "8.0 MiB of pages, 0 B of lines, 2.0 KiB of copies, 1.0 MiB of kin";
        assert_eq!(figures.to_string(), expected);
        (figures.put_off_pages, figures.held_back_pages) = (5, 7);
        assert!(figures.to_string().ends_with("; 5 duplicates put off; 7 hot pages held back"));
    }
}
