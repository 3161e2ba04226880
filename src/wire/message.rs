//! What the two sides say to each other beside page frames: the control lane's messages, fault
//! requests, and the flight of the switchover. All are [postcard](https://postcard.jamesmunns.com)
//! records; the transport bounds their size before they are read, and [`decode`] takes nothing that
//! has bytes left over.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::state::PackedState;
use crate::guest::Shape;
use crate::page::{PageIndex, PageSet, Version};

/// Version of everything in this module. Both sides must speak the same.
pub const PROTOCOL: u16 = 2;

/// Most pages that one fault request may name.
pub const MAX_REQUEST_PAGES: usize = 256;

/// Most pages of one round that the destination may reject before it gives the migration up: more
/// than a stray flipped bit means that something is broken.
pub const MAX_REJECTED_PAGES: usize = 4096;

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

/// A page set as it travels: its bitmap, compressed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedSet(PackedBytes);

impl PackedSet {
    /// Compresses.
    pub fn pack(set: &PageSet) -> Self {
        let mut bytes = Vec::with_capacity(size_of_val(set.words()));
        for word in set.words() {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        PackedSet(PackedBytes::pack(&bytes))
    }

    /// The set, which must be of a guest of `pages` pages.
    pub fn unpack(&self, pages: u64) -> Result<PageSet, MessageError> {
        let bytes = self.0.unpack(pages.div_ceil(64) * 8)?;
        let (words, rest) = bytes.as_chunks::<8>();
        let words = words.iter().map(|w| u64::from_le_bytes(*w)).collect();
        PageSet::from_words(words, pages).filter(|_| rest.is_empty()).ok_or_else(|| {
            MessageError::Malformed(format!("a page set that is not of {pages} pages"))
        })
    }
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
