//! What a guest did in a migration that was traced, made ready for replays.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Touch, Touches};
use crate::engine::heat::Heat;
use crate::page::{PageIndex, PageRange, PageSet};
use crate::report::TraceRecord;

/// Most pages of a guest that is replayed: 1 TiB.
const MAX_PAGES: u64 = 1 << 28;

/// Why a trace cannot be replayed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// It does not begin as a trace does.
    #[error("the trace does not begin with the guest's size")]
    NoGuest,
    /// It names pages beyond the guest, or a guest beyond all bounds.
    #[error(
        "the trace names pages {first} to {last} of a guest of {pages}; at most {MAX_PAGES} are replayed"
    )]
    Beyond {
        /// First page of the run.
        first: u64,
        /// Its last.
        last: u64,
        /// Of the guest.
        pages: u64,
    },
    /// Nothing happened in it.
    #[error("the trace has no touches: give the destination's, of a migration with post-copy")]
    NoTouches,
}

/// From a destination's trace; a source's, of the same migration, adds what was written before.
pub fn from_trace(records: &[TraceRecord]) -> Result<Touches, TraceError> {
    let Some(TraceRecord::Guest { pages }) = records.first() else {
        return Err(TraceError::NoGuest);
    };
    let pages = *pages;
    let checked = |first: u64, count: u64| {
        let end = first.saturating_add(count);
        if pages > MAX_PAGES || end > pages || count == 0 {
            return Err(TraceError::Beyond { first, last: end.saturating_sub(1), pages });
        }
        Ok(PageRange::new(first, end))
    };
    checked(0, pages)?;
    let set = |runs: &[(u64, u64)]| {
        let mut set = PageSet::empty(pages);
        for (first, count) in runs {
            set.insert_range(checked(*first, *count)?);
        }
        Ok(set)
    };
    let (mut need, mut heat) = (PageSet::empty(pages), Heat::new(pages));
    let mut threads: BTreeMap<u32, (Vec<Touch>, Duration)> = BTreeMap::new();
    let mut begin = None;
    for record in records {
        match record {
            TraceRecord::Guest { .. } | TraceRecord::Cut => {}
            TraceRecord::Dirty { runs, .. } => heat.end_interval(&set(runs)?),
            TraceRecord::Missing { runs } => need = set(runs)?,
            TraceRecord::Touch { at_us, waited_us, thread, page } => {
                let PageIndex(first) = *page;
                checked(first, 1)?;
                let at = Duration::from_micros(*at_us);
                let begin = *begin.get_or_insert(at);
                // Work goes on from where the thread's last wait ended.
                let (touches, worked_from) = threads.entry(*thread).or_insert((Vec::new(), begin));
                touches.push(Touch { after: at.saturating_sub(*worked_from), page: *page });
                *worked_from = at + Duration::from_micros(*waited_us);
            }
        }
    }
    if threads.is_empty() {
        return Err(TraceError::NoTouches);
    }
    let threads = threads.into_values().map(|(touches, _)| touches).collect();
    Ok(Touches { pages, need, heat, threads })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(at_us: u64, waited_us: u64, thread: u32, page: u64) -> TraceRecord {
        TraceRecord::Touch { at_us, waited_us, thread, page: PageIndex(page) }
    }

    #[test]
    fn work_between_two_touches_is_the_time_less_the_waits() {
        let records = [
            TraceRecord::Guest { pages: 100 },
            TraceRecord::Dirty { at_us: 0, runs: vec![(10, 5)] },
            TraceRecord::Missing { runs: vec![(10, 20)] },
            touch(1000, 400, 7, 10),
            touch(1100, 0, 8, 50),
            touch(1500, 300, 7, 11),
        ];
        let touches = from_trace(&records).unwrap();
        let us = Duration::from_micros;
        let expected = [
            vec![
                Touch { after: us(0), page: PageIndex(10) },
                Touch { after: us(100), page: PageIndex(11) },
            ],
            vec![Touch { after: us(100), page: PageIndex(50) }],
        ];
        assert_eq!(touches.threads, expected);
        assert_eq!((touches.need.len(), touches.heat.of(PageIndex(12))), (20, 128));
    }

    #[test]
    fn a_trace_that_cannot_be_is_refused() {
        let guest = TraceRecord::Guest { pages: 100 };
        assert_eq!(from_trace(&[touch(1, 1, 1, 1)]).unwrap_err(), TraceError::NoGuest);
        assert_eq!(from_trace(std::slice::from_ref(&guest)).unwrap_err(), TraceError::NoTouches);
        for bad in [
            vec![guest.clone(), touch(1, 1, 1, 100)],
            vec![guest.clone(), TraceRecord::Missing { runs: vec![(90, 11)] }],
            vec![guest, TraceRecord::Missing { runs: vec![(90, u64::MAX)] }],
            vec![TraceRecord::Guest { pages: u64::MAX }],
        ] {
            assert!(matches!(from_trace(&bad), Err(TraceError::Beyond { .. })), "{bad:?}");
        }
    }
}
