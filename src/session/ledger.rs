//! The count of a round's messages at the destination.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::page::{PageIndex, Version};
use crate::wire::message::MAX_REJECTED_PAGES;

/// Most pages that are asked for again after pre-copy: the queue of requests must not grow without end. Beside damage
/// it is copies of a page that the guest has written to since; once one has come, the source makes no more of them.
const MAX_ASKED_AGAIN: usize = 1 << 20;

/// Messages that wait for others, at most: 25 to 64 MiB, what may be unread otherwise. What they wait for was
/// acknowledged by the transport here before they were made, so it waits for a thread that applies it, or for
/// such another.
pub(super) const MAX_WAITING: usize = 256;

/// What is left of a message whose next frame builds on pages that have not come yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unapplied {
    /// Its frames from that one on.
    pub(super) message: Bytes,
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
    waiting: VecDeque<Unapplied>,
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
    /// This is to be applied now.
    Apply(Unapplied),
    /// No more may wait: whoever has this one is to wait with it.
    Full(Unapplied),
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
        match self.reject(rejected) {
            Some(spoilt) => spoilt,
            None => self.done(),
        }
    }

    fn reject(&mut self, rejected: Vec<PageIndex>) -> Option<Noted> {
        self.rejected.extend(rejected);
        let count = self.rejected.len();
        (count > MAX_REJECTED_PAGES).then_some(Noted::Spoilt(count))
    }

    /// A message waits for pages of others, after some of its pages have been rejected: it is put aside, unless
    /// they have come meanwhile, or too many wait already.
    pub(super) fn put_aside(
        &mut self,
        version: Version,
        rejected: Vec<PageIndex>,
        unapplied: Unapplied,
        is_ready: impl Fn(&[u8]) -> bool,
    ) -> Noted {
        // None waits once pre-copy is over.
        if self.closed || Some(version) != self.current() {
            return Noted::OutOfTurn;
        }
        if let Some(spoilt) = self.reject(rejected) {
            return spoilt;
        }
        if is_ready(&unapplied.message) {
            return Noted::Apply(unapplied);
        }
        if self.waiting.len() == MAX_WAITING {
            return Noted::Full(unapplied);
        }
        self.waiting.push_back(unapplied);
        self.done()
    }

    /// Those that wait no longer, now that something has been applied. To be asked before that is noted: what
    /// still waits when everything else has been applied waits for pages that were rejected.
    pub(super) fn take_ready(&mut self, is_ready: impl Fn(&[u8]) -> bool) -> Vec<Unapplied> {
        let waiting = std::mem::take(&mut self.waiting);
        let (ready, others) =
            waiting.into_iter().partition(|unapplied| is_ready(&unapplied.message));
        self.waiting = others;
        Vec::from(ready)
    }

    /// The source says how many messages a round has.
    pub(super) fn expect(&mut self, round: Version, messages: u64) -> Noted {
        if self.closed || self.awaited.is_some() || Some(round) != self.current() {
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
        self.current() == Some(version) && self.waiting.is_empty()
    }

    /// The switchover has come. Messages of the last version that were faster than the flight have been
    /// counted as those of a round; the pages they could not bring must be asked for again.
    pub(super) fn close(&mut self) -> Vec<PageIndex> {
        self.closed = true;
        std::mem::take(&mut self.rejected)
    }

    fn done(&mut self) -> Noted {
        let handled = self.applied + self.waiting.len() as u64;
        if self.awaited == Some(handled)
            && let Some(oldest) = self.waiting.pop_front()
        {
            // One by one: what is left of it may be what others wait for.
            return Noted::Apply(Unapplied { may_wait: false, ..oldest });
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
        assert_eq!(ledger.close(), vec![PageIndex(1)]);
        let late = ledger.note(Version(1), vec![PageIndex(2)]);
        assert_eq!(late, Noted::AskAgain(vec![PageIndex(2)]));
        assert_eq!(ledger.expect(Version(1), 0), Noted::OutOfTurn);
    }

    fn unapplied(message: &'static [u8]) -> Unapplied {
        Unapplied { message: Bytes::from_static(message), may_wait: true }
    }

    fn put(ledger: &mut RoundLedger, message: &'static [u8], ready: &[u8]) -> Noted {
        ledger.put_aside(Version(1), vec![], unapplied(message), |message| message == ready)
    }

    #[test]
    fn a_message_waits_for_pages_of_others_and_not_for_rejected_ones() {
        let mut ledger = RoundLedger::default();
        assert_eq!(put(&mut ledger, b"a", b""), Noted::Waiting);
        let now = put(&mut ledger, b"b", b"b");
        assert_eq!(now, Noted::Apply(unapplied(b"b")), "what it waited for came meanwhile");
        assert_eq!(put(&mut ledger, b"c", b""), Noted::Waiting);
        assert_eq!(put(&mut ledger, b"d", b""), Noted::Waiting);
        assert_eq!(ledger.take_ready(|message| message == b"c"), [unapplied(b"c")]);
        assert_eq!(ledger.note(Version(1), vec![]), Noted::Waiting);
        let given_up = |message| Noted::Apply(Unapplied { may_wait: false, ..unapplied(message) });
        assert_eq!(ledger.expect(Version(1), 3), given_up(b"a"), "nothing else comes");
        assert!(!ledger.may_close_at(Version(1)));
        assert_eq!(ledger.note(Version(1), vec![]), given_up(b"d"), "the next one only then");
        assert_eq!(ledger.note(Version(1), vec![]), Noted::RoundDone(Version(1), vec![]));
        assert_eq!(put(&mut ledger, b"e", b""), Noted::OutOfTurn);
    }

    #[test]
    fn a_round_is_not_done_while_a_message_that_waited_is_being_applied() {
        let mut ledger = RoundLedger::default();
        put(&mut ledger, b"a", b"");
        assert_eq!(ledger.take_ready(|_| true).len(), 1);
        assert_eq!(ledger.note(Version(1), vec![]), Noted::Waiting);
        assert_eq!(ledger.expect(Version(1), 2), Noted::Waiting);
        assert_eq!(ledger.expect(Version(1), 2), Noted::OutOfTurn, "a round ends once");
        assert_eq!(ledger.note(Version(1), vec![]), Noted::RoundDone(Version(1), vec![]));
    }

    #[test]
    fn no_more_than_so_many_messages_wait_and_none_after_the_switchover() {
        let mut ledger = RoundLedger::default();
        for _ in 0..MAX_WAITING {
            assert_eq!(put(&mut ledger, b"a", b""), Noted::Waiting);
        }
        assert_eq!(put(&mut ledger, b"b", b""), Noted::Full(unapplied(b"b")));
        assert_eq!(put(&mut ledger, b"b", b"b"), Noted::Apply(unapplied(b"b")));
        ledger.close();
        assert_eq!(put(&mut ledger, b"b", b""), Noted::OutOfTurn);
    }

    #[test]
    fn what_was_rejected_before_a_message_had_to_wait_counts() {
        let mut ledger = RoundLedger::default();
        let pages = vec![PageIndex(1); MAX_REJECTED_PAGES];
        let waits = ledger.put_aside(Version(1), pages, unapplied(b"a"), |_| false);
        assert_eq!(waits, Noted::Waiting);
        let spoilt = ledger.note(Version(1), vec![PageIndex(2)]);
        assert_eq!(spoilt, Noted::Spoilt(MAX_REJECTED_PAGES + 1));
    }

    #[test]
    fn messages_that_wait_are_gone_with_their_link() {
        let mut ledger = RoundLedger::default();
        put(&mut ledger, b"a", b"");
        assert!(ledger.end(Version(1), 1));
        assert_eq!(ledger.expect(Version(2), 0), Noted::RoundDone(Version(2), vec![]));
    }
}
