//! The count of a round's messages at the destination.

use bytes::Bytes;

use crate::page::{PageIndex, Version};
use crate::wire::message::MAX_REJECTED_PAGES;

/// Most pages that are asked for again after pre-copy. A source that sends more of them spoilt is
/// broken or hostile, and must not fill the queue of requests.
const MAX_ASKED_AGAIN: usize = 1 << 20;

/// Messages that wait for others, at most: 16 MiB.
const MAX_WAITING: usize = 64;

/// What is left of a message whose next frame builds on pages that have not come yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unapplied {
    /// Its frames from that one on.
    pub(super) message: Bytes,
    /// Pages of those before that could not be applied.
    pub(super) rejected: Vec<PageIndex>,
    /// Whether it may wait for what has not come.
    pub(super) may_wait: bool,
}

/// Counts the messages of pre-copy rounds at the destination: a round is done when as many have been
/// applied as the source says there are, in whatever order.
#[derive(Debug, Default)]
pub(super) struct RoundLedger {
    acknowledged: Version,
    applied: u64,
    rejected: Vec<PageIndex>,
    waiting: Vec<Unapplied>,
    awaited: Option<u64>,
    closed: bool,
    /// Pages asked for again since pre-copy is over.
    asked_again: usize,
    /// The last in which a round was ended.
    outage: u32,
}

/// What follows from a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Noted {
    /// Nothing yet.
    Waiting,
    /// These are to be applied now.
    Apply(Vec<Unapplied>),
    /// The round is done but for these pages.
    RoundDone(Version, Vec<PageIndex>),
    /// Pre-copy is over: these pages must be asked for again.
    AskAgain(Vec<PageIndex>),
    /// A message of a round that is over or has not begun.
    OutOfTurn,
    /// So many pages could not be applied that something must be broken, or hostile.
    Spoilt(usize),
}

impl RoundLedger {
    /// The round whose messages may come now; none after the last that there can be.
    fn current(&self) -> Option<Version> {
        self.acknowledged.next()
    }

    /// A message was applied, except for its rejected pages.
    pub(super) fn note(&mut self, version: Version, rejected: Vec<PageIndex>) -> Noted {
        if self.closed {
            self.asked_again += rejected.len();
            if self.asked_again > MAX_ASKED_AGAIN {
                return Noted::Spoilt(self.asked_again);
            }
            return Noted::AskAgain(rejected);
        }
        if Some(version) != self.current() {
            return Noted::OutOfTurn;
        }
        self.applied += 1;
        self.rejected.extend(rejected);
        if self.rejected.len() > MAX_REJECTED_PAGES {
            return Noted::Spoilt(self.rejected.len());
        }
        self.done()
    }

    /// A message waits for pages of others: it is put aside, unless they have come meanwhile, or too many wait
    /// already.
    pub(super) fn put_aside(
        &mut self,
        version: Version,
        mut unapplied: Unapplied,
        is_ready: impl Fn(&[u8]) -> bool,
    ) -> Noted {
        if !self.closed && Some(version) != self.current() {
            return Noted::OutOfTurn;
        }
        unapplied.may_wait = !self.closed && self.waiting.len() < MAX_WAITING;
        if !unapplied.may_wait || is_ready(&unapplied.message) {
            return Noted::Apply(vec![unapplied]);
        }
        self.waiting.push(unapplied);
        self.done()
    }

    /// Those that wait no longer, now that something has been applied. To be asked before that is noted: what
    /// still waits when everything else has been applied waits for pages that were rejected.
    pub(super) fn take_ready(&mut self, is_ready: impl Fn(&[u8]) -> bool) -> Vec<Unapplied> {
        self.waiting.extract_if(.., |unapplied| is_ready(&unapplied.message)).collect()
    }

    /// The source says how many messages a round has.
    pub(super) fn expect(&mut self, round: Version, messages: u64) -> Noted {
        if self.closed || Some(round) != self.current() {
            return Noted::OutOfTurn;
        }
        self.awaited = Some(messages);
        self.done()
    }

    /// The round ends without its last messages, which were lost with the link, in this outage. An
    /// acknowledgement that was lost may make the source name a round that is over: that is as well. False
    /// when it is neither of the two. What is done late, for an outage before the last, changes nothing.
    pub(super) fn end(&mut self, round: Version, outage: u32) -> bool {
        if outage < self.outage {
            return true;
        }
        if self.closed || (round != self.acknowledged && Some(round) != self.current()) {
            return false;
        }
        *self = RoundLedger { acknowledged: round, outage, ..RoundLedger::default() };
        true
    }

    /// Whether a switchover to `version` may come now, or again: it is what would be the next round.
    pub(super) fn may_close_at(&self, version: Version) -> bool {
        self.current() == Some(version)
    }

    /// The switchover has come. Messages of the last version that were faster than the flight have been
    /// counted as those of a round; the pages they could not bring must be asked for again. No message of an
    /// honest source waits now; what does is to be applied.
    pub(super) fn close(&mut self) -> (Vec<PageIndex>, Vec<Unapplied>) {
        self.closed = true;
        (std::mem::take(&mut self.rejected), self.without_waiting())
    }

    fn without_waiting(&mut self) -> Vec<Unapplied> {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.iter_mut().for_each(|unapplied| unapplied.may_wait = false);
        waiting
    }

    fn done(&mut self) -> Noted {
        let handled = self.applied + self.waiting.len() as u64;
        if self.awaited == Some(handled) && !self.waiting.is_empty() {
            return Noted::Apply(self.without_waiting());
        }
        let Some(round) = self.current().filter(|_| self.awaited == Some(self.applied)) else {
            return Noted::Waiting;
        };
        let rejected = std::mem::take(&mut self.rejected);
        let outage = self.outage;
        *self = RoundLedger { acknowledged: round, outage, ..RoundLedger::default() };
        Noted::RoundDone(round, rejected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_done_when_its_last_message_is_applied_in_whatever_order() {
        let mut ledger = RoundLedger::default();
        let page = PageIndex(7);
        assert_eq!(ledger.note(Version(1), vec![]), Noted::Waiting);
        assert_eq!(ledger.expect(Version(1), 2), Noted::Waiting);
        let done = ledger.note(Version(1), vec![page]);
        assert_eq!(done, Noted::RoundDone(Version(1), vec![page]));
        assert_eq!(ledger.note(Version(2), vec![]), Noted::Waiting);
        assert_eq!(ledger.note(Version(1), vec![]), Noted::OutOfTurn);
        assert_eq!(ledger.expect(Version(2), 1), Noted::RoundDone(Version(2), vec![]));
        let empty = ledger.expect(Version(3), 0);
        assert_eq!(empty, Noted::RoundDone(Version(3), vec![]), "a round may be empty");
    }

    #[test]
    fn a_round_that_is_cut_short_counts_as_over() {
        let mut ledger = RoundLedger::default();
        ledger.note(Version(1), vec![PageIndex(3)]);
        assert!(!ledger.end(Version(2), 1), "a round that has not begun");
        assert!(ledger.end(Version(1), 1));
        assert!(ledger.end(Version(1), 2), "asked again after another outage");
        ledger.note(Version(2), vec![]);
        assert!(ledger.end(Version(1), 1), "a late answer to the first outage");
        let second = ledger.expect(Version(2), 1);
        assert_eq!(second, Noted::RoundDone(Version(2), vec![]), "nothing is left of the first");
        ledger.close();
        assert!(!ledger.end(Version(2), 3), "pre-copy is over");
    }

    #[test]
    fn more_spoilt_pages_than_damage_explains_end_the_migration() {
        let pages = |count| vec![PageIndex(1); count];
        let mut ledger = RoundLedger::default();
        assert_eq!(ledger.note(Version(1), pages(MAX_REJECTED_PAGES)), Noted::Waiting);
        let count = MAX_REJECTED_PAGES + 1;
        assert_eq!(ledger.note(Version(1), pages(1)), Noted::Spoilt(count));
        ledger.close();
        let most = ledger.note(Version(1), pages(MAX_ASKED_AGAIN));
        assert_eq!(most, Noted::AskAgain(pages(MAX_ASKED_AGAIN)));
        assert_eq!(ledger.note(Version(1), pages(1)), Noted::Spoilt(MAX_ASKED_AGAIN + 1));
    }

    #[test]
    fn a_page_rejected_around_the_switchover_is_asked_for_again() {
        let mut ledger = RoundLedger::default();
        ledger.note(Version(1), vec![PageIndex(1)]);
        assert_eq!(ledger.close(), (vec![PageIndex(1)], vec![]));
        let late = ledger.note(Version(1), vec![PageIndex(2)]);
        assert_eq!(late, Noted::AskAgain(vec![PageIndex(2)]));
        assert_eq!(ledger.expect(Version(1), 0), Noted::OutOfTurn);
    }

    fn unapplied(message: &'static [u8]) -> Unapplied {
        Unapplied { message: Bytes::from_static(message), rejected: vec![], may_wait: true }
    }

    #[test]
    fn a_message_waits_for_pages_of_others_and_not_for_rejected_ones() {
        let mut ledger = RoundLedger::default();
        let never = |_: &[u8]| false;
        let put = ledger.put_aside(Version(1), unapplied(b"a"), never);
        assert_eq!(put, Noted::Waiting);
        let now = ledger.put_aside(Version(1), unapplied(b"b"), |message| message == b"b");
        assert_eq!(now, Noted::Apply(vec![unapplied(b"b")]), "what it waited for came meanwhile");
        assert_eq!(ledger.put_aside(Version(1), unapplied(b"c"), never), Noted::Waiting);
        assert_eq!(ledger.take_ready(|message| message == b"c"), [unapplied(b"c")]);
        assert_eq!(ledger.note(Version(1), vec![]), Noted::Waiting);
        let given_up = Unapplied { may_wait: false, ..unapplied(b"a") };
        let last = ledger.expect(Version(1), 2);
        assert_eq!(last, Noted::Apply(vec![given_up]), "nothing else comes");
        assert_eq!(ledger.note(Version(1), vec![]), Noted::RoundDone(Version(1), vec![]));
        assert_eq!(ledger.put_aside(Version(1), unapplied(b"d"), never), Noted::OutOfTurn);
    }

    #[test]
    fn a_round_is_not_done_while_a_message_that_waited_is_being_applied() {
        let mut ledger = RoundLedger::default();
        ledger.put_aside(Version(1), unapplied(b"a"), |_| false);
        assert_eq!(ledger.take_ready(|_| true).len(), 1);
        assert_eq!(ledger.note(Version(1), vec![]), Noted::Waiting);
        assert_eq!(ledger.expect(Version(1), 2), Noted::Waiting);
        assert_eq!(ledger.note(Version(1), vec![]), Noted::RoundDone(Version(1), vec![]));
    }

    #[test]
    fn no_more_than_so_many_messages_wait_and_none_after_the_switchover() {
        let mut ledger = RoundLedger::default();
        for _ in 0..MAX_WAITING {
            assert_eq!(ledger.put_aside(Version(1), unapplied(b"a"), |_| false), Noted::Waiting);
        }
        let at_once = Noted::Apply(vec![Unapplied { may_wait: false, ..unapplied(b"b") }]);
        assert_eq!(ledger.put_aside(Version(1), unapplied(b"b"), |_| false), at_once);
        let (_, waiting) = ledger.close();
        assert!(waiting.len() == MAX_WAITING && waiting.iter().all(|one| !one.may_wait));
        assert_eq!(ledger.put_aside(Version(1), unapplied(b"b"), |_| false), at_once);
    }
}
