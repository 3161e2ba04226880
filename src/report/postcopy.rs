//! What came after the switchover: how long the guest waited for pages, and how they were sent.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::FaultLatency;
use crate::memory::FaultStats;

/// The guest's faults as the destination saw them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultFigures {
    /// Pages waited for of which nothing was here.
    pub absent_pages: u64,
    /// From the fault to the page in place, for these.
    pub absent_us: FaultLatency,
    /// Pages waited for of which an older copy was here.
    pub stale_pages: u64,
    /// From the fault to the page in place, for these.
    pub stale_us: FaultLatency,
    /// Faults on pages that another thread waited for already.
    pub joined_faults: u64,
    /// Time that threads waited for pages, added up over the pages.
    pub stall_sum_ms: f64,
    /// Time in which any thread waited.
    pub stall_any_ms: f64,
    /// The longest wait.
    pub stall_longest_ms: f64,
}

impl FaultFigures {
    /// From what the fault server has seen.
    pub fn of(stats: &FaultStats) -> Self {
        let ms = |us: u64| (us as f64 / 10.0).round() / 100.0;
        FaultFigures {
            absent_pages: stats.absent_latency_us.len(),
            absent_us: FaultLatency::of(&stats.absent_latency_us),
            stale_pages: stats.stale_latency_us.len(),
            stale_us: FaultLatency::of(&stats.stale_latency_us),
            joined_faults: stats.joined_faults,
            stall_sum_ms: ms(stats.stall_sum_us),
            stall_any_ms: ms(stats.stall_any_us),
            stall_longest_ms: ms(stats.remote_latency_us.max()),
        }
    }
}

impl fmt::Display for FaultFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} ms of waiting in all, {:.1} ms with any thread waiting, {:.1} ms the longest",
            self.stall_sum_ms, self.stall_any_ms, self.stall_longest_ms
        )
    }
}

/// How the source has sent what was left at the switchover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushFigures {
    /// In which order.
    pub policy: Cow<'static, str>,
    /// Pages that went in that order.
    pub pushed_pages: u64,
    /// Pages that went along with replies to faults.
    pub bundled_pages: u64,
    /// Pages that went since a thread waited for another one of the same huge page.
    pub unit_pages: u64,
    /// Bundles after which the same thread's next fault lay in the bundle or just behind it.
    pub useful_bundles: u64,
    /// Bundles after which it did not.
    pub useless_bundles: u64,
}

impl fmt::Display for PushFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (useful, all) = (self.useful_bundles, self.useful_bundles + self.useless_bundles);
        write!(f, "{} by {}", self.pushed_pages, self.policy)?;
        if self.bundled_pages > 0 {
            write!(f, ", {} with replies ({useful} of {all} bundles useful)", self.bundled_pages)?;
        }
        if self.unit_pages > 0 {
            write!(f, ", {} to fill huge pages", self.unit_pages)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_how_pages_were_pushed() {
        let mut figures = PushFigures {
            policy: "stall".into(),
            pushed_pages: 1000,
            bundled_pages: 0,
            unit_pages: 0,
            useful_bundles: 0,
            useless_bundles: 0,
        };
        assert_eq!(figures.to_string(), "1000 by stall");
        (figures.bundled_pages, figures.useful_bundles, figures.useless_bundles) = (70, 3, 1);
        let text = "1000 by stall, 70 with replies (3 of 4 bundles useful)";
        assert_eq!(figures.to_string(), text);
        (figures.bundled_pages, figures.unit_pages) = (0, 511);
        assert_eq!(figures.to_string(), "1000 by stall, 511 to fill huge pages");
    }
}
