//! The client of a guest that streams: it is outside of the guest, takes frames on either host, and tells afterwards
//! which of them came too late, damaged, or not at all.
//!
//! QEMU's user network hands what the guest sends to a port of its own host, so the client listens in both
//! namespaces and puts the two together by the frames' numbers. `tools/testguest/src/stream.rs` says what is sent.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::place::Place;
use crate::lab::link::SplitMix64;
use crate::lab::netns::Netns;
use crate::lab::relay::hold_received;

const PORT: u16 = 5004;
const FRAME_EVERY: Duration = Duration::from_millis(40);
const HEADER_BYTES: usize = 8;
const PAGE_BYTES: usize = 4096;
/// Of a frame, so that one word has a bit for each.
const MAX_PARTS: usize = 64;
/// Ten hours of frames.
const MAX_FRAMES: usize = 1_000_000;
/// What may come while the reader waits for a processor: seconds of the stream, with what the kernel counts beside it. A
/// datagram that finds no room would be taken for one that the migration has lost.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// How often to look whether to stop.
const READ_TIMEOUT: Duration = Duration::from_millis(50);
/// So long before the migration the player begins, so that it plays as it should when that starts.
const BEFORE: Duration = Duration::from_secs(2);
/// What a player holds back to make up for late frames, by custom of live streams.
pub const BUFFER: Duration = Duration::from_millis(200);

/// What the viewer saw of a stream, from the start of the migration on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StreamSeen {
    /// Frames that came whole and right.
    pub frames: u64,
    /// Frames that should have been shown and were not, by a player with a buffer of 200 ms.
    pub missed: u64,
    /// The same by one with a buffer of 40 ms, which is one frame.
    pub missed_with_short_buffer: u64,
    /// Frames that are not what the guest has sent.
    pub corrupt: u64,
    /// Longest time between two whole frames.
    pub longest_gap_ms: f64,
    /// For each frame from two seconds before the migration on: when it was whole, counted from the last heartbeat
    /// on the source, and how much later that was than by the least late of the frames before the migration.
    pub arrivals: Vec<(i64, i64)>,
}

/// Receives a stream, on two threads.
#[derive(Debug)]
pub struct StreamClient {
    reception: Arc<Mutex<Reception>>,
    stop: Arc<AtomicBool>,
    readers: Vec<JoinHandle<()>>,
}

impl StreamClient {
    /// Listens on both hosts for frames made of a library of so many pages.
    pub fn listen(place: &Place, library_pages: u64) -> Result<Self> {
        let reception = Arc::new(Mutex::new(Reception::new(library_pages)));
        let stop = Arc::new(AtomicBool::new(false));
        let mut client = StreamClient { reception, stop, readers: Vec::new() };
        for netns in [place.a(), place.b()] {
            let socket = socket_in(netns)?;
            let (to, until) = (Arc::clone(&client.reception), Arc::clone(&client.stop));
            client.readers.push(std::thread::spawn(move || read_all(&socket, &to, &until)));
        }
        Ok(client)
    }

    /// What came up to now, of a migration that was started at `started` and whose guest gave its last sign on the
    /// source at `stopped`.
    pub fn seen(&self, started: Instant, stopped: Instant) -> StreamSeen {
        let reception = self.reception.lock().unwrap_or_else(PoisonError::into_inner);
        let corrupt = reception.frames.values().filter(|frame| **frame == Frame::Corrupt).count();
        let mut seen = judge(&reception.completions(), started, stopped, Instant::now());
        seen.corrupt = corrupt as u64;
        seen
    }
}

impl Drop for StreamClient {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

fn socket_in(netns: &Netns) -> Result<UdpSocket> {
    let open = || Ok(OwnedFd::from(UdpSocket::bind((Ipv4Addr::LOCALHOST, PORT))?));
    let socket = netns.open_inside(open).context("listen for the guest's stream")?;
    let socket = UdpSocket::from(socket);
    hold_received(&socket, SOCKET_BUFFER_BYTES);
    socket.set_read_timeout(Some(READ_TIMEOUT))?;
    Ok(socket)
}

fn read_all(socket: &UdpSocket, to: &Mutex<Reception>, stop: &AtomicBool) {
    let mut buffer = [0; 2048];
    while !stop.load(Relaxed) {
        // An error is the end of the time to wait, mostly; a broken socket shows as missed frames.
        let Ok(count) = socket.recv(&mut buffer) else { continue };
        let at = Instant::now();
        to.lock().unwrap_or_else(PoisonError::into_inner).take(&buffer[..count], at);
    }
}

/// A frame, or what there is of it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Frame {
    /// Its bytes, and a bit for each part that has come.
    Partial(Vec<u8>, u64),
    Whole(Instant),
    Corrupt,
}

/// Puts frames together.
#[derive(Debug)]
struct Reception {
    library_pages: u64,
    frames: BTreeMap<u32, Frame>,
}

impl Reception {
    fn new(library_pages: u64) -> Self {
        Reception { library_pages, frames: BTreeMap::new() }
    }

    /// Takes a datagram; one that is none of a stream is ignored.
    fn take(&mut self, datagram: &[u8], at: Instant) {
        let Some((header, content)) = datagram.split_at_checked(HEADER_BYTES) else { return };
        let short = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let number = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let (part, parts) = (short(4), short(6));
        let is_new = !self.frames.contains_key(&number);
        if part >= parts || parts > MAX_PARTS || (is_new && self.frames.len() >= MAX_FRAMES) {
            return;
        }
        let empty = || Frame::Partial(vec![0; parts * content.len()], 0);
        let frame = self.frames.entry(number).or_insert_with(empty);
        let Frame::Partial(bytes, have) = frame else { return };
        let Some(place) = bytes.chunks_exact_mut(content.len().max(1)).nth(part) else { return };
        place.copy_from_slice(content);
        *have |= 1 << part;
        if have.count_ones() as usize == parts {
            let is_right = is_frame(bytes, number, self.library_pages);
            *frame = if is_right { Frame::Whole(at) } else { Frame::Corrupt };
        }
    }

    /// When each frame was whole, if it ever was, from the first that came to the last.
    fn completions(&self) -> Vec<Option<Instant>> {
        let whole = |number: u32| match self.frames.get(&number) {
            Some(Frame::Whole(at)) => Some(*at),
            _ => None,
        };
        let (Some((first, _)), Some((last, _))) =
            (self.frames.first_key_value(), self.frames.last_key_value())
        else {
            return Vec::new();
        };
        // A number that is far from all others was no frame's; such a stream would show as missed.
        (*first..=*last).take(MAX_FRAMES).map(whole).collect()
    }
}

/// Whether these are the pages of that frame, each as the guest has written it.
fn is_frame(bytes: &[u8], number: u32, library_pages: u64) -> bool {
    let pages = bytes.chunks_exact(PAGE_BYTES);
    let first = u64::from(number) * pages.len() as u64;
    let is_page = |(index, page): (u64, &[u8])| {
        let words: Vec<u64> = page
            .chunks_exact(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
            .collect();
        words[0] == index % library_pages.max(1) && words[CHECKSUM] == checksum(&words)
    };
    pages.remainder().is_empty() && !bytes.is_empty() && (first..).zip(pages).all(is_page)
}

/// Where a page of the guest has its checksum.
const CHECKSUM: usize = 2;

/// As `tools/testguest/src/memory.rs` has it: each word times an odd number of its position, but for itself.
fn checksum(words: &[u64]) -> u64 {
    let mut factors = SplitMix64(0);
    let product = |(position, word): (usize, &u64)| {
        let factor = factors.next() | 1;
        if position == CHECKSUM { 0 } else { word.wrapping_mul(factor) }
    };
    words.iter().enumerate().map(product).fold(0, u64::wrapping_add)
}

/// From when each frame was whole, in the order of their numbers; the last look was at `until`.
fn judge(
    whole: &[Option<Instant>],
    started: Instant,
    stopped: Instant,
    until: Instant,
) -> StreamSeen {
    let begin = started.checked_sub(BEFORE).unwrap_or(started);
    let first = whole.iter().position(|at| at.is_some_and(|at| at >= begin));
    let whole = first.map_or(&[][..], |first| &whole[first..]);
    let mut arrivals: Vec<Instant> = whole.iter().flatten().copied().collect();
    arrivals.sort_unstable();
    let gaps = arrivals.windows(2).filter(|pair| pair[1] >= started).map(|pair| pair[1] - pair[0]);
    let gap_at_end = arrivals.last().map(|last| until.saturating_duration_since(*last));
    let longest_gap = gaps.chain(gap_at_end).max().unwrap_or_default();
    StreamSeen {
        frames: arrivals.iter().filter(|at| **at >= started).count() as u64,
        missed: missed(whole, BUFFER, started, until),
        missed_with_short_buffer: missed(whole, FRAME_EVERY, started, until),
        corrupt: 0,
        longest_gap_ms: longest_gap.as_secs_f64() * 1e3,
        arrivals: lateness(whole, started, stopped),
    }
}

/// Frames that a player misses from `started` to `until`. It shows one each 40 ms, the first when it has held that
/// back for as long as its `buffer` is. When the next frame is not whole yet, the picture stands still for 40 ms, which is
/// a frame missed, and all that follow are shown that much later. One that never was whole is left out, and missed.
fn missed(whole: &[Option<Instant>], buffer: Duration, started: Instant, until: Instant) -> u64 {
    let Some(first) = whole.first().copied().flatten() else { return slots(started, until) };
    let (mut due, mut missed) = (first + buffer, 0);
    for at in whole {
        let late = at.map_or(0, |at| slots(due, at));
        let before = slots(due, started).min(late);
        missed += late - before + u64::from(at.is_none() && (started..until).contains(&due));
        due += FRAME_EVERY * (late + 1) as u32;
    }
    // Whatever should have been shown since, and did not come at all.
    missed + slots(due.max(started), until)
}

/// How many times a player looks for a frame in vain that is due and comes at `at`.
fn slots(due: Instant, at: Instant) -> u64 {
    let late = at.saturating_duration_since(due);
    late.as_nanos().div_ceil(FRAME_EVERY.as_nanos()) as u64
}

/// When each frame was whole, and how late that was.
fn lateness(whole: &[Option<Instant>], started: Instant, stopped: Instant) -> Vec<(i64, i64)> {
    let ms = |at: Instant| {
        at.saturating_duration_since(stopped).as_millis() as i64
            - stopped.saturating_duration_since(at).as_millis() as i64
    };
    let since_due = |(number, at): (i64, &Option<Instant>)| {
        at.map(|at| (at, ms(at) - number * FRAME_EVERY.as_millis() as i64))
    };
    let all: Vec<(Instant, i64)> = (0..).zip(whole).filter_map(since_due).collect();
    let before = all.iter().filter(|(at, _)| *at < started).map(|(_, late)| *late);
    let least = before.min().unwrap_or_default();
    all.into_iter().map(|(at, late)| (ms(at), late - least)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Frames that are whole so many milliseconds after the first.
    fn stream(begin: Instant, ms: impl IntoIterator<Item = u32>) -> Vec<Option<Instant>> {
        ms.into_iter().map(|ms| Some(begin + ms * MS)).collect()
    }

    #[test]
    fn a_stream_that_goes_on_misses_nothing() {
        let begin = Instant::now();
        // Each third comes 30 ms later than it could.
        let whole = stream(begin, (0..200).map(|n| n * 40 + n % 3 / 2 * 30));
        let seen = judge(&whole, begin + 4000 * MS, begin + 5000 * MS, begin + 8000 * MS);
        assert_eq!((seen.missed, seen.missed_with_short_buffer), (0, 0), "{seen:?}");
        assert_eq!((seen.frames, seen.longest_gap_ms), (100, 70.0), "{seen:?}");
        // It begins two seconds before the migration.
        assert_eq!(seen.arrivals[..4], [(-2970, 30), (-2960, 0), (-2920, 0), (-2850, 30)]);
    }

    #[test]
    fn a_stop_is_missed_as_far_as_the_buffer_does_not_reach_and_only_once() {
        let begin = Instant::now();
        let missed_of = |stop: u32| {
            let whole = stream(begin, (0..200).map(|n| n * 40 + if n < 100 { 0 } else { stop }));
            let seen = judge(&whole, begin + 3000 * MS, begin, begin + 8000 * MS);
            (seen.missed, seen.missed_with_short_buffer, seen.longest_gap_ms)
        };
        assert_eq!(missed_of(40), (0, 0, 80.0));
        assert_eq!(missed_of(41), (0, 1, 81.0));
        assert_eq!(missed_of(200), (0, 4, 240.0));
        assert_eq!(missed_of(300), (3, 7, 340.0));
    }

    #[test]
    fn a_stream_that_ends_before_the_last_look_or_never_begins_is_missed_from_there_on() {
        let begin = Instant::now();
        let whole = stream(begin, (0..100).map(|n| n * 40));
        let seen = judge(&whole, begin + 3000 * MS, begin, begin + 6000 * MS);
        // The last was shown at 3960 + 200 ms; none is shown from 4200 ms on.
        assert_eq!((seen.missed, seen.longest_gap_ms), (45, 2040.0), "{seen:?}");
        assert_eq!(judge(&[], begin, begin, begin + 400 * MS).missed, 10);
    }

    #[test]
    fn a_lost_frame_is_missed_and_what_was_before_the_migration_does_not_count() {
        let begin = Instant::now();
        let mut whole = stream(begin, (0..200).map(|n| n * 40));
        (whole[20], whole[120], whole[121]) = (None, None, None);
        let seen = judge(&whole, begin + 2000 * MS, begin, begin + 8000 * MS);
        assert_eq!((seen.missed, seen.missed_with_short_buffer), (2, 2), "{seen:?}");
        // A stop that is over when the migration starts.
        let whole = stream(begin, (0..200).map(|n| n * 40 + if n < 40 { 0 } else { 500 }));
        let seen = judge(&whole, begin + 2500 * MS, begin, begin + 8500 * MS);
        assert_eq!((seen.missed, seen.missed_with_short_buffer), (0, 0), "{seen:?}");
    }

    /// As the guest makes it.
    fn page(index: u64) -> Vec<u8> {
        let mut words: Vec<u64> = (0..512).map(|position| index << 32 | position).collect();
        words[0] = index;
        words[CHECKSUM] = checksum(&words);
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn datagrams(number: u32, frame: &[u8]) -> Vec<Vec<u8>> {
        let parts = frame.chunks(1024);
        let count = parts.len() as u16;
        let header = |part: u16| {
            [&number.to_le_bytes()[..], &part.to_le_bytes(), &count.to_le_bytes()].concat()
        };
        (0..).zip(parts).map(|(part, content)| [&header(part), content].concat()).collect()
    }

    #[test]
    fn a_frame_is_whole_when_all_of_it_is_there_in_any_order_and_right() {
        let at = Instant::now();
        let mut reception = Reception::new(10);
        // Four pages each; the library ends in the third.
        let right = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5]];
        for (number, pages) in (0..).zip(right) {
            let frame: Vec<u8> = pages.into_iter().flat_map(page).collect();
            let mut parts = datagrams(number, &frame);
            parts.reverse();
            let last = parts.pop().unwrap();
            for part in parts.iter().chain(&parts) {
                reception.take(part, at);
            }
            if number != 1 {
                reception.take(&last, at + MS);
            }
        }
        let late = Some(at + MS);
        assert_eq!(reception.completions(), [late, None, late, late]);
        let mut damaged: Vec<u8> = [6, 7, 8, 9].into_iter().flat_map(page).collect();
        damaged[9000] ^= 1;
        let elsewhere: Vec<u8> = [0, 1, 2, 4].into_iter().flat_map(page).collect();
        for (number, frame) in [(4, damaged), (5, elsewhere)] {
            datagrams(number, &frame).iter().for_each(|part| reception.take(part, at));
            assert_eq!(reception.frames[&number], Frame::Corrupt);
        }
    }

    #[test]
    fn what_is_no_frame_is_ignored() {
        let mut reception = Reception::new(10);
        let at = Instant::now();
        for datagram in
            [&b""[..], b"short", &[7, 0, 0, 0, 9, 0, 9, 0, 1], &[1, 0, 0, 0, 0, 0, 99, 0]]
        {
            reception.take(datagram, at);
        }
        assert!(reception.frames.is_empty(), "{reception:?}");
        // A part of another length than the first.
        reception.take(&[0, 0, 0, 0, 0, 0, 2, 0, 1, 2, 3], at);
        reception.take(&[0, 0, 0, 0, 1, 0, 2, 0, 1, 2, 3, 4, 5, 6], at);
        assert_eq!(reception.completions(), [None]);
    }
}
