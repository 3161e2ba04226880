//! Which codec for which link.
//!
//! The slower the link, the more work a byte is worth. A codec that takes pages at `speed` and leaves
//! `ratio` of their bytes moves `min(speed, link / ratio)` of pages a second, and the one that moves most is
//! chosen: on a slow link the densest, on a fast one a quicker one, at last none, so that the encoder is
//! never the bottleneck. A fault reply is one page that somebody waits for: there the sum of the times to
//! encode, send and decode it counts.
//!
//! The tables say how codecs compare, measured on the memory of real guests (redis, SQLite, a compiler, idle)
//! by one core: docs/codecs.md. How fast this machine is and how well this guest compresses is
//! measured on the way ([`Ladder::observe`]).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::pack::Compression;
use super::{CodecCounts, Content};
use crate::page::PAGE_SIZE_BYTES;

/// How whole pages are coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageCodec {
    /// As they are.
    Raw,
    /// Together in one LZ4 block; as they are if that is no smaller.
    #[default]
    Lz4,
    /// Together in one zstd frame; as they are if that is no smaller.
    Zstd {
        /// zstd's own number.
        level: i32,
    },
    /// The same, with pages like them as the prefix where there are some ([`super::kin`]).
    ZstdKin {
        /// zstd's own number.
        level: i32,
    },
}

/// How pages with a base are coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeltaCodec {
    /// As whole pages.
    Off,
    /// What changed, as it is.
    Plain,
    /// What changed in all pages, in one LZ4 block.
    #[default]
    Lz4,
    /// What changed in all pages, in one zstd frame.
    Zstd {
        /// zstd's own number.
        level: i32,
    },
    /// The same, with what was there before as the prefix.
    ZstdOld {
        /// zstd's own number.
        level: i32,
    },
    /// As QEMU does, page by page: for comparison in experiments, never chosen.
    Xbzrle,
}

impl PageCodec {
    /// How the block of pages is compressed.
    pub fn compression(self) -> Compression {
        match self {
            PageCodec::Raw => Compression::None,
            PageCodec::Lz4 => Compression::Lz4,
            PageCodec::Zstd { level } | PageCodec::ZstdKin { level } => Compression::Zstd { level },
        }
    }
}

impl DeltaCodec {
    /// How masks and units are compressed when the old units are not used.
    pub fn compression(self) -> Compression {
        match self {
            DeltaCodec::Off | DeltaCodec::Plain | DeltaCodec::Xbzrle => Compression::None,
            DeltaCodec::Lz4 => Compression::Lz4,
            DeltaCodec::Zstd { level } | DeltaCodec::ZstdOld { level } => {
                Compression::Zstd { level }
            }
        }
    }
}

/// Which codecs an encoder uses. Zero and unchanged pages are always told apart.
///
/// Written as `PAGES/DELTAS`, for instance `zstd:3/zstd-old:1`, `lz4/off`, `raw/plain`; `PAGES` alone
/// takes the deltas that go with it. `xbzrle` alone is `raw/xbzrle`, what QEMU does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodecChoice {
    /// For pages that go whole.
    pub page: PageCodec,
    /// For pages that go as a difference.
    pub delta: DeltaCodec,
}

impl fmt::Display for CodecChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.page {
            PageCodec::Raw => f.write_str("raw/")?,
            PageCodec::Lz4 => f.write_str("lz4/")?,
            PageCodec::Zstd { level } => write!(f, "zstd:{level}/")?,
            PageCodec::ZstdKin { level } => write!(f, "zstd-kin:{level}/")?,
        }
        match self.delta {
            DeltaCodec::Off => f.write_str("off"),
            DeltaCodec::Plain => f.write_str("plain"),
            DeltaCodec::Lz4 => f.write_str("lz4"),
            DeltaCodec::Zstd { level } => write!(f, "zstd:{level}"),
            DeltaCodec::ZstdOld { level } => write!(f, "zstd-old:{level}"),
            DeltaCodec::Xbzrle => f.write_str("xbzrle"),
        }
    }
}

/// A codec choice that was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no codec {text:?}: write PAGES or PAGES/DELTAS, where PAGES is raw, lz4, zstd:LEVEL or zstd-kin:LEVEL and \
     DELTAS is off, plain, lz4, zstd:LEVEL, zstd-old:LEVEL or xbzrle, with levels from -7 to 19"
)]
pub struct ParseCodecError {
    text: String,
}

impl FromStr for CodecChoice {
    type Err = ParseCodecError;

    fn from_str(text: &str) -> Result<Self, ParseCodecError> {
        parse_choice(text).ok_or_else(|| ParseCodecError { text: text.to_owned() })
    }
}

fn parse_choice(text: &str) -> Option<CodecChoice> {
    let text = if text == "xbzrle" { "raw/xbzrle" } else { text };
    let (page, delta) = match text.split_once('/') {
        Some((page, delta)) => (page, Some(delta)),
        None => (text, None),
    };
    let page = match split_level(page)? {
        ("raw", None) => PageCodec::Raw,
        ("lz4", None) => PageCodec::Lz4,
        ("zstd", Some(level)) => PageCodec::Zstd { level },
        ("zstd-kin", Some(level)) => PageCodec::ZstdKin { level },
        _ => return None,
    };
    let delta = match delta.map(split_level) {
        None => match page {
            PageCodec::Raw => DeltaCodec::Plain,
            PageCodec::Lz4 => DeltaCodec::Lz4,
            PageCodec::Zstd { level } | PageCodec::ZstdKin { level } => {
                DeltaCodec::ZstdOld { level }
            }
        },
        Some(delta) => match delta? {
            ("off", None) => DeltaCodec::Off,
            ("plain", None) => DeltaCodec::Plain,
            ("lz4", None) => DeltaCodec::Lz4,
            ("zstd", Some(level)) => DeltaCodec::Zstd { level },
            ("zstd-old", Some(level)) => DeltaCodec::ZstdOld { level },
            ("xbzrle", None) => DeltaCodec::Xbzrle,
            _ => return None,
        },
    };
    Some(CodecChoice { page, delta })
}

fn split_level(text: &str) -> Option<(&str, Option<i32>)> {
    let Some((name, level)) = text.split_once(':') else { return Some((text, None)) };
    let level = level.parse().ok().filter(|level| (-7..=19).contains(level))?;
    Some((name, Some(level)))
}

/// What a codec does to pages of 4,096 bytes.
#[derive(Clone, Copy, Debug)]
struct Rung<C> {
    codec: C,
    /// Bytes that are left of each.
    ratio: f64,
    /// How fast one core takes them in.
    encode_mb_per_s: f64,
    /// How fast one core gives them back.
    decode_mb_per_s: f64,
}

const fn rung<C: Copy>(codec: C, ratio: f64, encode: f64, decode: f64) -> Rung<C> {
    Rung { codec, ratio, encode_mb_per_s: encode, decode_mb_per_s: decode }
}

/// Whole pages, 64 together. What is denser takes a whole core for less than 30 Mbit/s: a guest that runs at the destination
/// already may wait for such a page.
const PAGES: [Rung<PageCodec>; 6] = [
    rung(PageCodec::Raw, 1.0, 4_730.0, 18_000.0),
    rung(PageCodec::Lz4, 0.480, 680.0, 2_700.0),
    rung(PageCodec::Zstd { level: 1 }, 0.355, 440.0, 1_280.0),
    rung(PageCodec::Zstd { level: 3 }, 0.339, 310.0, 1_200.0),
    rung(PageCodec::Zstd { level: 6 }, 0.329, 110.0, 1_310.0),
    rung(PageCodec::Zstd { level: 9 }, 0.323, 60.0, 1_310.0),
];

/// The same in pre-copy, where there may be kin: what that changed of each level in size and speed on whole guests, on a
/// slower machine, times the figures above.
const PAGES_WITH_KIN: [Rung<PageCodec>; 9] = [
    PAGES[0],
    PAGES[1],
    PAGES[2],
    rung(PageCodec::ZstdKin { level: 3 }, 0.304, 200.0, 1_200.0),
    rung(PageCodec::ZstdKin { level: 5 }, 0.300, 114.0, 1_310.0),
    rung(PageCodec::ZstdKin { level: 6 }, 0.293, 81.0, 1_310.0),
    rung(PageCodec::ZstdKin { level: 9 }, 0.290, 49.0, 1_310.0),
    // Optimal parsing, for several cores. Levels 12 to 15 are at most 2 % smaller than 9.
    rung(PageCodec::ZstdKin { level: 16 }, 0.273, 4.9, 1_300.0),
    rung(PageCodec::ZstdKin { level: 18 }, 0.258, 2.9, 1_090.0),
];

/// How fast a core tries another codec than none.
const TRIAL_MB_PER_S: f64 = PAGES[1].encode_mb_per_s;

/// Changed pages, 64 together.
const DELTAS: [Rung<DeltaCodec>; 7] = [
    rung(DeltaCodec::Plain, 0.141, 6_120.0, 8_860.0),
    rung(DeltaCodec::Lz4, 0.059, 2_650.0, 5_800.0),
    rung(DeltaCodec::Zstd { level: 1 }, 0.040, 1_990.0, 4_180.0),
    rung(DeltaCodec::ZstdOld { level: 1 }, 0.029, 1_660.0, 3_600.0),
    rung(DeltaCodec::ZstdOld { level: 3 }, 0.028, 1_460.0, 3_560.0),
    rung(DeltaCodec::ZstdOld { level: 6 }, 0.026, 540.0, 3_550.0),
    rung(DeltaCodec::ZstdOld { level: 9 }, 0.025, 310.0, 3_550.0),
];

/// A whole page by itself.
const SINGLE_PAGE: [Rung<PageCodec>; 3] = [
    rung(PageCodec::Raw, 1.0, 5_700.0, 18_000.0),
    rung(PageCodec::Lz4, 0.535, 680.0, 2_370.0),
    rung(PageCodec::Zstd { level: 1 }, 0.397, 280.0, 730.0),
];

/// A changed page by itself.
const SINGLE_DELTA: [Rung<DeltaCodec>; 2] = [
    rung(DeltaCodec::Plain, 0.146, 5_760.0, 8_790.0),
    rung(DeltaCodec::ZstdOld { level: 1 }, 0.048, 780.0, 2_180.0),
];

/// How fast one core finds a page to be zero or unchanged.
const SCAN_MB_PER_S: f64 = 12_000.0;
/// A codec stays until another moves so much more: measurements are never quite steady.
const SWITCH_GAIN: f64 = 1.05;
/// How much of an encoder's speed is counted on: with less to spare, whatever else the processor does for a moment is
/// time in which the link has nothing to carry.
const HEADROOM: f64 = 0.75;
/// Of two that move the same but for this, the quicker is taken: the processor has other work too.
const SAME_GAIN: f64 = 0.99;
/// Pages that go as they are do not tell how they would compress. What was known fades, so that now and then
/// another codec is tried: the sooner, the less of the link's time a trial takes of the processor's. Where they are
/// equal, so many times as many pages must go as with another codec until as much is forgotten.
const RAW_FADES: f64 = 256.0;
/// Input over which measurements are averaged.
const AVERAGE_OVER_BYTES: f64 = (8 << 20) as f64;

/// Chooses codecs.
#[derive(Clone, Debug)]
pub struct Ladder {
    pages: &'static [Rung<PageCodec>],
    current: CodecChoice,
    /// Time that encoding takes here, over what the tables say.
    slowness: f64,
    page_bulk: Bulk,
    /// How quickly that fades, of 1: see [`RAW_FADES`].
    fading: f64,
    /// Coded size of this guest's changes over what the tables say.
    delta_bulk: f64,
}

/// How this guest's pages compress, beside those of the tables.
///
/// Pages that compress worse are taken for a mixture: a share that nothing compresses, memory that holds packed or
/// encrypted data, among others that are as in the tables. So a codec that gains nothing says that no other
/// would, and they are not all tried.
#[derive(Clone, Copy, Debug, Default)]
struct Bulk {
    /// The share that does not compress; below zero, how much smaller than in the tables all are.
    excess: f64,
    /// Input that this is an average of.
    seen_bytes: f64,
}

impl Bulk {
    /// What a codec leaves of these pages that leaves `ratio` of those of the tables.
    fn left_of(self, ratio: f64) -> f64 {
        if self.excess < 0.0 {
            ratio * (1.0 + self.excess)
        } else {
            self.excess + (1.0 - self.excess) * ratio
        }
    }

    /// So much was left of `input_bytes` where the tables have `ratio`.
    fn saw(&mut self, left: f64, ratio: f64, input_bytes: f64) {
        if input_bytes > 0.0 {
            let found =
                if left < ratio { left / ratio - 1.0 } else { (left - ratio) / (1.0 - ratio) };
            let weight = input_bytes / (input_bytes + self.seen_bytes);
            self.excess += (found.clamp(-0.99, 1.0) - self.excess) * weight;
            self.seen_bytes = (self.seen_bytes + input_bytes).min(AVERAGE_OVER_BYTES);
        }
    }

    /// These pages went as they are: a share of what was seen is forgotten in favour of the tables, and what
    /// is seen next weighs more.
    fn fade(&mut self, input_bytes: f64, share: f64) {
        let faded_bytes = input_bytes * share;
        self.excess -= self.excess * faded_bytes / (faded_bytes + AVERAGE_OVER_BYTES);
        self.seen_bytes = self.seen_bytes.min(input_bytes);
    }
}

impl Default for Ladder {
    fn default() -> Self {
        Ladder::of(&PAGES)
    }
}

impl Ladder {
    /// One that takes it that there are pages like those to be coded.
    pub fn with_kin() -> Self {
        Ladder::of(&PAGES_WITH_KIN)
    }

    fn of(pages: &'static [Rung<PageCodec>]) -> Self {
        let current = CodecChoice {
            page: pages[pages.len() - 1].codec,
            delta: DELTAS[DELTAS.len() - 1].codec,
        };
        let page_bulk = Bulk::default();
        Ladder { pages, current, slowness: 1.0, page_bulk, fading: 0.0, delta_bulk: 1.0 }
    }

    /// Takes note of what one core did in `encode_time` with `choice`.
    pub fn observe(&mut self, choice: CodecChoice, counts: &CodecCounts, encode_time: Duration) {
        let of = |content: Content| {
            let used = counts.used().filter(|(codec, ..)| codec.content() == content);
            used.fold((0.0, 0.0), |(input, coded), (_, pages, bytes)| {
                (input + pages as f64 * PAGE_SIZE_BYTES as f64, coded + bytes as f64)
            })
        };
        let (page_input, page_coded) = of(Content::Whole);
        let (delta_input, delta_coded) = of(Content::Words);
        let page = find(self.pages, |codec| codec == choice.page);
        let delta = find(&DELTAS, |codec| codec == choice.delta);
        let scanned = of(Content::Zero).0 + of(Content::Unchanged).0;
        let mut expected_s = scanned / (SCAN_MB_PER_S * 1e6);
        if let Some(rung) = page {
            expected_s += page_input / (rung.encode_mb_per_s * 1e6);
            if choice.page == PageCodec::Raw {
                self.page_bulk.fade(page_input, self.fading);
            } else {
                self.page_bulk.saw(page_coded / page_input, rung.ratio, page_input);
            }
        }
        if let Some(rung) = delta {
            expected_s += delta_input / (rung.encode_mb_per_s * 1e6);
            average(&mut self.delta_bulk, delta_coded / (delta_input * rung.ratio), delta_input);
        }
        if expected_s > 0.0 {
            let slowness = encode_time.as_secs_f64() / expected_s;
            average(&mut self.slowness, slowness, scanned + page_input + delta_input);
        }
    }

    /// The codecs for bulk on a link that takes `link_bytes_per_s`, with `encoders` cores at work.
    pub fn choose(&mut self, link_bytes_per_s: f64, encoders: usize) -> CodecChoice {
        let speed = encoders.max(1) as f64 * 1e6 / self.slowness;
        self.fading = (TRIAL_MB_PER_S * speed / link_bytes_per_s / RAW_FADES).min(1.0);
        let speed = HEADROOM * speed;
        self.current = CodecChoice {
            page: best(self.pages, self.current.page, |rung| {
                let ratio = self.page_bulk.left_of(rung.ratio);
                (rung.encode_mb_per_s * speed).min(link_bytes_per_s / ratio)
            }),
            delta: best(&DELTAS, self.current.delta, |rung| {
                let ratio = rung.ratio * self.delta_bulk;
                (rung.encode_mb_per_s * speed).min(link_bytes_per_s / ratio)
            }),
        };
        self.current
    }

    /// The codecs for fault replies on such a link.
    pub fn choose_for_fault(&self, link_bytes_per_s: f64) -> CodecChoice {
        let replies_per_s = |ratio: f64, encode_mb_per_s: f64, decode_mb_per_s: f64| {
            let cpu = self.slowness * (1.0 / encode_mb_per_s + 1.0 / decode_mb_per_s) / 1e6;
            1.0 / (cpu + ratio / link_bytes_per_s)
        };
        CodecChoice {
            page: best(&SINGLE_PAGE, PageCodec::Raw, |rung| {
                let ratio = self.page_bulk.left_of(rung.ratio);
                replies_per_s(ratio, rung.encode_mb_per_s, rung.decode_mb_per_s)
            }),
            delta: best(&SINGLE_DELTA, DeltaCodec::Plain, |rung| {
                let ratio = rung.ratio * self.delta_bulk;
                replies_per_s(ratio, rung.encode_mb_per_s, rung.decode_mb_per_s)
            }),
        }
    }
}

fn find<C: Copy>(rungs: &[Rung<C>], is: impl Fn(C) -> bool) -> Option<&Rung<C>> {
    rungs.iter().find(|rung| is(rung.codec))
}

/// The rung that gains most; `current` unless that is clearly more. The rungs are in order, the quickest first.
fn best<C: Copy + PartialEq>(rungs: &[Rung<C>], current: C, gain: impl Fn(&Rung<C>) -> f64) -> C {
    let mut best = (current, find(rungs, |codec| codec == current).map_or(0.0, &gain));
    let mut bar = best.1 * SWITCH_GAIN;
    for rung in rungs {
        let found = gain(rung);
        if found > bar {
            best = (rung.codec, found);
            bar = found;
        }
    }
    let as_good = rungs.iter().find(|rung| gain(rung) >= best.1 * SAME_GAIN);
    as_good.map_or(best.0, |rung| rung.codec)
}

/// Moves `value` towards what was found over `input_bytes`. Bounded, so that one odd measurement does
/// no lasting harm.
fn average(value: &mut f64, found: f64, input_bytes: f64) {
    if input_bytes > 0.0 {
        let weight = input_bytes / (input_bytes + AVERAGE_OVER_BYTES);
        *value += (found.clamp(0.01, 100.0) - *value) * weight;
    }
}

#[cfg(test)]
mod tests;
