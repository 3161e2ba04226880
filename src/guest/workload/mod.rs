//! What the built-in guests do with their memory: patterns, rates, self-checking pages.
//!
//! Both built-in guests (the KVM microVM in [`crate::guest::kvm`] and the native threads in
//! [`crate::guest::threads`]) run the same workers over the same kind of pages, so that an
//! experiment can name a workload without caring which of them carries it out. Every page says which
//! operation wrote it last and carries a checksum; [`page`] explains why a stale page cannot pass.

mod pacer;
pub mod page;
mod plan;
#[cfg(test)]
pub(crate) mod trial;
mod worker;

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{DestinationGuest, SourceGuest};

pub(crate) use pacer::{Pacer, Task};
pub(crate) use plan::{FIRST_WORKER_PAGE, MEMORY_UNIT_BYTES, PAGE_TABLES_PAGE, PROGRAM_PAGE, fill};
pub use plan::{GuestPlan, PlanError};
pub(crate) use worker::{Gauge, Mode, Worker, total_status};

/// Where a workload's operations fall and what each does to its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Pattern {
    /// Nothing at all: the workers sleep.
    Idle,
    /// Changes a few words of one page after the other.
    Sequential,
    /// Changes a few words of pages all over the memory.
    Sparse,
    /// Like `Sparse`, but nine of ten operations fall on a sixteenth of the pages.
    HotCold,
    /// Rewrites whole pages, one after the other.
    WholePage,
    /// Reads and checks one page after the other.
    SequentialRead,
    /// Reads and checks pages all over the memory.
    RandomRead,
}

impl Pattern {
    /// Every pattern, in the order in which help texts list them.
    pub const ALL: [Pattern; 7] = [
        Pattern::Idle,
        Pattern::Sequential,
        Pattern::Sparse,
        Pattern::HotCold,
        Pattern::WholePage,
        Pattern::SequentialRead,
        Pattern::RandomRead,
    ];

    /// The name by which a person asks for it.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Idle => "idle",
            Pattern::Sequential => "sequential",
            Pattern::Sparse => "sparse",
            Pattern::HotCold => "hotcold",
            Pattern::WholePage => "whole",
            Pattern::SequentialRead => "read",
            Pattern::RandomRead => "random-read",
        }
    }

    pub(crate) fn mode(self) -> Mode {
        let (writes, whole_pages, scattered) = match self {
            Pattern::Idle | Pattern::SequentialRead => (false, false, false),
            Pattern::RandomRead => (false, false, true),
            Pattern::Sequential => (true, false, false),
            Pattern::Sparse | Pattern::HotCold => (true, false, true),
            Pattern::WholePage => (true, true, false),
        };
        Mode { writes, whole_pages, scattered }
    }
}

/// How fast a workload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Rate {
    /// As fast as the CPU allows.
    FlatOut,
    /// So many operations a second, over all workers together.
    PerSecond(NonZeroU32),
}

/// A pattern at a rate, written `sparse:2000/s` or, flat out, `sparse`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// What is done.
    pub pattern: Pattern,
    /// How often.
    pub rate: Rate,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.pattern.name())?;
        match self.rate {
            Rate::FlatOut => Ok(()),
            Rate::PerSecond(rate) => write!(f, ":{rate}/s"),
        }
    }
}

/// A text that names no workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadParseError {
    /// The part before the colon is no pattern.
    #[error("no workload is called {0:?}; there are: {list}", list = pattern_names())]
    UnknownPattern(String),
    /// The part behind the colon is no rate.
    #[error(
        "{0:?} is no rate; write operations a second as in \"sparse:2000/s\", or leave it out to go flat out"
    )]
    BadRate(String),
}

fn pattern_names() -> String {
    Pattern::ALL.map(Pattern::name).join(", ")
}

impl FromStr for Workload {
    type Err = WorkloadParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, rate) = match text.split_once(':') {
            Some((name, rate)) => (name, Some(rate)),
            None => (text, None),
        };
        let pattern = Pattern::ALL.into_iter().find(|pattern| pattern.name() == name);
        let pattern = pattern.ok_or_else(|| WorkloadParseError::UnknownPattern(name.to_owned()))?;
        let rate = match rate {
            None => Rate::FlatOut,
            Some(text) => {
                let number = text.strip_suffix("/s").and_then(|number| number.parse().ok());
                let number = number.ok_or_else(|| WorkloadParseError::BadRate(text.to_owned()))?;
                Rate::PerSecond(number)
            }
        };
        Ok(Workload { pattern, rate })
    }
}

/// What a built-in guest has reported so far; all numbers only grow while the guest lives, on
/// whichever host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Operations of the workload.
    pub ops: u64,
    /// Complete checks of all pages, asked for with `verify_all`: the least of all workers.
    pub sweeps: u64,
    /// Pages checked from the first word to the last.
    pub pages_verified: u64,
    /// Checks that failed. Anything but 0 means that the guest's memory is not what it wrote.
    pub wrong_pages: u64,
    /// The first page that failed, and 0 while there is none (page 0 belongs to no worker).
    pub first_wrong_page: u64,
}

/// A guest that carries out a workload and can tell whether its memory is right. It can be either end
/// of a migration: one that has arrived may leave again.
pub trait WorkingGuest: SourceGuest + DestinationGuest {
    /// What the guest has reported so far. On a destination: what it had reported when it left, until
    /// it runs.
    fn status(&self) -> GuestStatus;

    /// Asks every worker to check all its pages, before it goes on with its workload.
    fn verify_all(&self);

    /// Pages still to be checked because of [`Self::verify_all`].
    fn still_to_verify(&self) -> u64;

    /// Why the guest stopped by itself, if it did.
    fn failure(&self) -> Option<String>;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn workload() -> impl Strategy<Value = Workload> {
        let rate = prop_oneof![
            Just(Rate::FlatOut),
            (1u32..).prop_map(|n| Rate::PerSecond(NonZeroU32::new(n).unwrap())),
        ];
        (prop::sample::select(&Pattern::ALL[..]), rate)
            .prop_map(|(pattern, rate)| Workload { pattern, rate })
    }

    proptest! {
        #[test]
        fn a_workload_is_read_as_it_is_written(workload in workload()) {
            prop_assert_eq!(workload.to_string().parse(), Ok(workload));
        }
    }

    #[test]
    fn a_wrong_name_is_answered_with_the_right_ones() {
        let error = "spase:10/s".parse::<Workload>().unwrap_err().to_string();
        assert!(error.contains("\"spase\"") && error.contains("hotcold"), "{error}");
    }

    #[test]
    fn a_rate_needs_its_unit_and_must_not_be_nothing() {
        for text in ["sparse:2000", "sparse:0/s", "sparse:-1/s", "sparse:/s", "sparse:9999999999/s"]
        {
            assert!(
                matches!(text.parse::<Workload>(), Err(WorkloadParseError::BadRate(_))),
                "{text}"
            );
        }
    }
}
