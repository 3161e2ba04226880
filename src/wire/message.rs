//! What the two sides say to each other beside page frames: the control lane's messages, fault
//! requests, and the flight of the switchover. All are [postcard](https://postcard.jamesmunns.com)
//! records; the transport bounds their size before they are read, and [`decode`] takes nothing that
//! has bytes left over.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::state::PackedState;
use crate::guest::Shape;
use crate::page::{PageIndex, PageRange, PageSet, Version};

/// Version of everything in this module. Both sides must speak the same.
pub const PROTOCOL: u16 = 4;

/// Most pages that one fault request may name.
pub const MAX_REQUEST_PAGES: usize = 256;

/// Most pages of one round that the destination may reject before it gives the migration up: more
/// than stray flipped bits, and than changed lines that do not show by their fingerprints (one of 65,536: as many pages for
/// 1 TiB of changed lines), means that something is broken.
pub const MAX_REJECTED_PAGES: usize = 1 << 18;

/// How the guest moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Short pre-copy, then the guest runs on the destination and its last pages follow.
    #[default]
    Hybrid,
    /// Everything is sent before the guest runs on the destination.
    Precopy,
    /// The guest runs on the destination at once and all its pages follow.
    Postcopy,
}

/// Who must have said what before the guest runs on the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandoverForm {
    /// The decision travels with the device state: half a round trip of downtime.
    #[default]
    OneFlight,
    /// The destination loads and says so before the decision: one and a half round trips.
    Strict,
}

/// When the destination may let the guest run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunWhen {
    /// As soon as its device state is loaded; missing pages are faulted in.
    Loaded,
    /// When every page has arrived too.
    Complete,
}

/// Source to destination, on the control lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDestination {
    /// First message.
    Hello {
        /// [`PROTOCOL`] of the sender.
        protocol: u16,
        /// The guest that wants to move.
        shape: Box<Shape>,
        /// For the report.
        strategy: Strategy,
        /// False: its owner has paused it, and it is to be left so.
        runs: bool,
    },
    /// All messages of a pre-copy round are on their way.
    RoundEnd {
        /// The round.
        round: Version,
        /// How many push messages it had.
        messages: u64,
    },
    /// The guest is stopped on the source. The [`Flight`] travels on the state lane.
    Offer {
        /// The version of every page sent from here on.
        final_version: Version,
        /// When the guest may run, once Commit has come too.
        run_when: RunWhen,
    },
    /// The source has decided: the destination may run the guest, the source never will. In the
    /// one-flight handover it follows the offer at once, in the strict one it answers Ready.
    Commit,
    /// The migration is off; the guest stays at the source.
    Abort {
        /// For the destination's report.
        reason: String,
    },
    /// The destination's `Done` has arrived.
    Bye {
        /// For the destination's report: from the order to stop the guest to word that it ran again.
        downtime_us: Option<u64>,
    },
    /// The first message on a link that replaces a lost one. The destination answers with
    /// [`ToSource::Resync`]; until then the source says nothing else but `Abort`.
    Resync {
        /// Where the source stands.
        at: SourceStage,
    },
    /// The device state of a rehearsal, during pre-copy: to be kept as the base of that of the
    /// [`Flight`].
    Rehearsal(PackedState),
}

/// Where the source stands when a new link has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceStage {
    /// It waits for Prepared.
    Preparing,
    /// It was in this round, which ends here: no page of it comes any more.
    Round(Version),
    /// The decision is on its disk, and perhaps on its way.
    Decided,
}

/// Destination to source, on the control lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// The guest fits here, its memory is registered, faults are served.
    Prepared,
    /// Every message of a round has been applied.
    RoundAck {
        /// The round.
        round: Version,
        /// Pages of the round that could not be applied (checksum, unknown base): send them whole.
        rejected: Vec<PageIndex>,
    },
    /// Device state is loaded (and every page has come, where the offer asks for that): the guest
    /// could run.
    Ready,
    /// The guest runs here, or is loaded and left paused as the operator wished.
    Running,
    /// The guest has not run here and never will: the source may let it run on.
    Refused {
        /// What was wrong.
        reason: String,
        /// What a person can do.
        hint: Option<String>,
    },
    /// Every page has arrived.
    Done,
    /// Answers [`ToDestination::Resync`]. Whatever was said on the lost link counts for nothing
    /// beside it.
    Resync {
        /// Where the destination stands.
        at: DestinationStage,
        /// How long ago the guest began to run here, if it did.
        running_us: Option<u64>,
    },
    /// The device state of a rehearsal is kept.
    Rehearsed {
        /// Its [`super::state::RehearsedState::check`].
        check: u64,
    },
}

/// Where the destination stands when a new link has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DestinationStage {
    /// No Hello has come.
    Waiting,
    /// Its guest is being prepared; Prepared follows.
    Preparing,
    /// Prepared, and no flight has come.
    Receiving {
        /// The pages that it holds at the version of the round that the source named, if it did.
        /// This acknowledges the round.
        held: Option<PackedSet>,
    },
    /// The flight has come, the guest does not run yet.
    Loading {
        /// The decision has come too.
        committed: bool,
        /// What must still be sent.
        lacking: Lacking,
    },
    /// The guest runs, or is loaded and left paused as its owner wished.
    Running {
        /// What must still be sent.
        lacking: Lacking,
    },
    /// It runs, and every page has come.
    Done,
    /// As [`ToSource::Refused`].
    Refused {
        /// What was wrong.
        reason: String,
        /// What a person can do.
        hint: Option<String>,
    },
}

/// The pages that must still come after the switchover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lacking {
    /// Those whose final content is not there.
    pub missing: PackedSet,
    /// Of these, the ones of which nothing older is there either: no delta helps.
    pub without_base: PackedSet,
}

/// Destination to source, on the fault lane: pages that a guest thread waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultRequest {
    /// At most [`MAX_REQUEST_PAGES`].
    pub pages: Vec<Wanted>,
    /// True when the older copies at the destination are spoilt: no deltas.
    pub whole: bool,
}

/// A page for which a thread of the guest waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The page.
    pub page: PageIndex,
    /// Any number that tells threads (vCPUs) apart, or one of those below.
    pub thread: u32,
}

impl Wanted {
    /// For nobody in particular: the page is wanted together with others. It is sent unless it is on its way already.
    pub const TOGETHER: u32 = 0;
    /// As [`Self::TOGETHER`], but the page has not come for long: it is sent, once on a link, even if it was pushed.
    /// Never the id of a thread, of which the kernel has 2^22.
    pub const OVERDUE: u32 = u32::MAX;

    /// A thread waits, and it is not known which: an id that no thread of a guest has.
    pub const SOME_THREAD: u32 = 1;

    /// True when a thread of the guest is named: there is something to be learnt from it.
    pub fn names_thread(self) -> bool {
        self.thread != Self::TOGETHER && self.thread != Self::OVERDUE
    }
}

/// What the destination needs to run the guest, besides pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flight {
    /// The version of every page sent from the freeze on; the same as in the offer.
    pub final_version: Version,
    /// Pages whose content the destination does not have yet.
    pub need: PackedSet,
    /// Pages that are zero now and that the destination must treat so.
    pub zero: PackedSet,
    /// The monitor's device state.
    pub device_state: PackedState,
}

/// Bytes as they travel: compressed with lz4.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedBytes {
    plain_bytes: u64,
    lz4: Vec<u8>,
}

impl std::fmt::Debug for PackedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedBytes({} as {})", self.plain_bytes, self.lz4.len())
    }
}

impl PackedBytes {
    /// Compresses.
    pub fn pack(plain: &[u8]) -> Self {
        PackedBytes { plain_bytes: plain.len() as u64, lz4: lz4_flex::block::compress(plain) }
    }

    /// The plain bytes, at most `limit_bytes` of them.
    pub fn unpack(&self, limit_bytes: u64) -> Result<Vec<u8>, MessageError> {
        if self.plain_bytes > limit_bytes {
            return Err(MessageError::TooLarge { bytes: self.plain_bytes, limit_bytes });
        }
        let plain = lz4_flex::block::decompress(&self.lz4, self.plain_bytes as usize)
            .map_err(|e| MessageError::Malformed(e.to_string()))?;
        if plain.len() as u64 != self.plain_bytes {
            return Err(MessageError::Malformed("lz4 data shorter than announced".to_owned()));
        }
        Ok(plain)
    }
}

/// Pages of a stretch of a page set on the wire.
const STRETCH_PAGES: u64 = 32768;

/// No page of the stretch is a member,
const NONE: u8 = 0;
/// all are,
const ALL: u8 = 1;
/// or some: its words follow.
const SOME: u8 = 2;

/// A page set as it travels: for each stretch of 32,768 pages a byte that says which pages of it are members; and of the
/// stretches of which some are, the words of the bitmap. So it takes what the pages in it take, however large the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedSet {
    /// Of the guest.
    pages: u64,
    stretches: PackedBytes,
    words: PackedBytes,
}

impl PackedSet {
    /// Compresses.
    pub fn pack(set: &PageSet) -> Self {
        let (mut kinds, mut bytes) = (Vec::new(), Vec::new());
        for stretch in stretches(set.pages()) {
            let kind = match () {
                () if set.is_empty_in(stretch) => NONE,
                () if set.gaps_in(stretch).next().is_none() => ALL,
                () => SOME,
            };
            kinds.push(kind);
            if kind == SOME {
                for index in words_of(stretch) {
                    bytes.extend_from_slice(&set.word(index).to_le_bytes());
                }
            }
        }
        let (stretches, words) = (PackedBytes::pack(&kinds), PackedBytes::pack(&bytes));
        PackedSet { pages: set.pages(), stretches, words }
    }

    /// The set, which must be of a guest of `pages` pages.
    pub fn unpack(&self, pages: u64) -> Result<PageSet, MessageError> {
        let other = || MessageError::Malformed(format!("a page set that is not of {pages} pages"));
        if self.pages != pages {
            return Err(other());
        }
        let kinds = self.stretches.unpack(pages.div_ceil(STRETCH_PAGES))?;
        let bytes = self.words.unpack(pages.div_ceil(64) * 8)?;
        unpacked(&kinds, &bytes, pages).ok_or_else(other)
    }
}

fn unpacked(kinds: &[u8], bytes: &[u8], pages: u64) -> Option<PageSet> {
    let mut set = PageSet::empty(pages);
    let (words, []) = bytes.as_chunks::<8>() else { return None };
    let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
    if kinds.len() as u64 != pages.div_ceil(STRETCH_PAGES) {
        return None;
    }
    for (kind, stretch) in kinds.iter().zip(stretches(pages)) {
        match *kind {
            NONE => {}
            ALL => set.insert_range(stretch),
            SOME => {
                words_of(stretch).try_for_each(|index| set.insert_word(index, words.next()?))?
            }
            _ => return None,
        }
    }
    words.next().is_none().then_some(set)
}

fn stretches(pages: u64) -> impl Iterator<Item = PageRange> {
    let starts = (0..pages).step_by(STRETCH_PAGES as usize);
    starts.map(move |start| PageRange::new(start, (start + STRETCH_PAGES).min(pages)))
}

/// Of the bitmap, those that hold a stretch.
fn words_of(stretch: PageRange) -> std::ops::Range<usize> {
    (stretch.start.0 / 64) as usize..stretch.end.0.div_ceil(64) as usize
}

/// Bytes that are not the message they should be.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Does not decode.
    #[error("malformed message from the other side: {0}")]
    Malformed(String),
    /// Announces more than is allowed.
    #[error("the other side announces {bytes} bytes where {limit_bytes} are allowed")]
    TooLarge {
        /// Announced.
        bytes: u64,
        /// Allowed.
        limit_bytes: u64,
    },
}

/// A message as bytes.
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    postcard::to_stdvec(message).expect("messages are plain data, which always encodes")
}

/// The message in `bytes`, all of them.
pub fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, MessageError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => {
            Err(MessageError::Malformed(format!("{} bytes behind the message", rest.len())))
        }
        Err(error) => Err(MessageError::Malformed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_flight_comes_back_as_it_was() {
        let mut need = PageSet::empty(1000);
        need.insert(PageIndex(999));
        let flight = Flight {
            final_version: Version(3),
            need: PackedSet::pack(&need),
            zero: PackedSet::pack(&PageSet::full(1000)),
            device_state: PackedState::pack(&[7; 5000], None),
        };
        let back: Flight = decode(&encode(&flight)).unwrap();
        assert_eq!(back.need.unpack(1000).unwrap(), need);
        assert_eq!(back.zero.unpack(1000).unwrap().len(), 1000);
        assert_eq!(back.device_state.unpack(None).unwrap(), vec![7; 5000]);
        assert!(back.need.unpack(999).is_err(), "a set of another guest");
    }

    #[test]
    fn a_page_set_takes_what_its_members_take_and_comes_back() {
        let pages = 20 * STRETCH_PAGES + 100;
        let mut some = PageSet::empty(pages);
        some.insert_range(PageRange::new(7, 3 * STRETCH_PAGES + 5));
        some.insert(PageIndex(pages - 1));
        for (set, most) in [(PageSet::empty(pages), 60), (PageSet::full(pages), 60), (some, 300)] {
            let packed = PackedSet::pack(&set);
            assert!(encode(&packed).len() < most, "{packed:?}");
            assert_eq!(packed.unpack(pages).unwrap(), set);
            assert!(packed.unpack(pages - 1).is_err(), "a set of another guest");
        }
    }

    #[test]
    fn a_page_set_that_is_none_is_refused() {
        let pages = STRETCH_PAGES + 100;
        let set = |kinds: &[u8], bytes: &[u8]| {
            let (stretches, words) = (PackedBytes::pack(kinds), PackedBytes::pack(bytes));
            PackedSet { pages, stretches, words }.unpack(pages)
        };
        let last = [0xff; 16];
        let mut beyond = last;
        beyond[12] = 0x1f;
        let mut within = last;
        within[12..].copy_from_slice(&[0x0f, 0, 0, 0]);
        assert_eq!(set(&[NONE, SOME], &within).unwrap().len(), 100);
        for (kinds, bytes) in [
            (&[NONE, SOME][..], &last[..]),
            (&[NONE, SOME], &beyond),
            (&[NONE, SOME], &within[..8]),
            (&[NONE, SOME], &within[..15]),
            (&[NONE, NONE], &within),
            (&[NONE], &[]),
            (&[NONE, NONE, NONE], &[]),
            (&[NONE, 3], &[]),
        ] {
            assert!(set(kinds, bytes).is_err(), "{kinds:?} {bytes:?}");
        }
    }

    #[test]
    fn a_decompression_bomb_is_refused_before_it_unpacks() {
        let bomb = PackedBytes { plain_bytes: 1 << 40, lz4: vec![0; 10] };
        assert!(matches!(bomb.unpack(1 << 20), Err(MessageError::TooLarge { .. })));
        let short = PackedBytes { plain_bytes: 100, ..PackedBytes::pack(&[1; 50]) };
        assert!(short.unpack(1 << 20).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<ToDestination>(&bytes);
            let _ = decode::<ToSource>(&bytes);
            let _ = decode::<FaultRequest>(&bytes);
            if let Ok(flight) = decode::<Flight>(&bytes) {
                let _ = (flight.need.unpack(64), flight.device_state.unpack(None));
            }
        }
    }
}
