//! What the memory of a guest is like at farfault's destination, again and again while it is moved: read
//! from the table of page states, which the receiver has in a file in shared memory. It is only looked at;
//! the receiver does not notice.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::farfault::directory_of;
use crate::memory::PageTable;
use crate::report::stages_by_cell;
use crate::session::journal::pages_path;

/// Parts that the memory is divided into.
const CELLS: usize = 64;
/// Two frames are at least so far apart.
const FRAME_EVERY: Duration = Duration::from_millis(50);
/// And so many times as long as it takes to look: a share of one core.
const REST: u32 = 50;
/// Frames kept; beyond, every other one is given up.
const MAX_FRAMES: usize = 240;
/// How often to look for a receiver that has not begun yet.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Stages of a page, as far as a film shows them.
pub const STAGES: usize = 5;
/// Shares of a cell are told in so many parts, by one hexadecimal digit.
const PARTS: u64 = 15;

/// The memory over time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFilm {
    /// In order.
    pub frames: Vec<Frame>,
}

/// The memory at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Counted from the last heartbeat on the source; negative before.
    pub at_ms: i64,
    /// For each part of the memory four hexadecimal digits: how many fifteenths of its pages are absent,
    /// stale, current, and known to be zero. The rest is mapped.
    pub cells: String,
}

impl Frame {
    /// For each part of the memory the shares of its pages that are absent, stale, current, known to be
    /// zero, and mapped; together 1.
    pub fn shares(&self) -> Vec<[f64; STAGES]> {
        let digits: Vec<u32> = self.cells.chars().filter_map(|digit| digit.to_digit(16)).collect();
        let of_cell = |cell: &[u32]| {
            let mut shares = [0.0; STAGES];
            for (share, digit) in shares.iter_mut().zip(cell) {
                *share = f64::from(*digit) / PARTS as f64;
            }
            shares[STAGES - 1] = (1.0 - shares[..STAGES - 1].iter().sum::<f64>()).max(0.0);
            shares
        };
        digits.chunks_exact(STAGES - 1).map(of_cell).collect()
    }
}

/// Shares in fifteenths, which add up to as many; the largest takes what rounding leaves.
fn digits(count: [u64; STAGES]) -> [u64; STAGES] {
    let pages = count.iter().sum::<u64>().max(1);
    let mut parts = count.map(|count| (count * PARTS + pages / 2) / pages);
    let largest = (0..STAGES).max_by_key(|stage| count[*stage]).unwrap_or(0);
    let others = parts.iter().sum::<u64>() - parts[largest];
    parts[largest] = PARTS.saturating_sub(others);
    parts
}

/// A thread that takes the film.
#[derive(Debug)]
pub struct Camera {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<(Instant, String)>>>,
}

impl Camera {
    /// Begins, as soon as a receiver that keeps its journal in this directory has a page table.
    pub fn start(state_directory: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let take = move || {
            let Some(table) = find_table(&state_directory, &until) else { return Vec::new() };
            film(&table, &until)
        };
        Camera { stop, thread: Some(std::thread::spawn(take)) }
    }

    /// The film, with the memory as it is now as its end; `stopped` is the last heartbeat on the source.
    pub fn end(mut self, stopped: Instant) -> MemoryFilm {
        self.stop.store(true, Relaxed);
        let taken = self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        let at_ms = |at: Instant| {
            at.saturating_duration_since(stopped).as_millis() as i64
                - stopped.saturating_duration_since(at).as_millis() as i64
        };
        let frames = taken.into_iter().map(|(at, cells)| Frame { at_ms: at_ms(at), cells });
        MemoryFilm { frames: frames.collect() }
    }
}

impl Drop for Camera {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

fn find_table(state_directory: &Path, stop: &AtomicBool) -> Option<PageTable> {
    while !stop.load(Relaxed) {
        // A table that is not whole yet cannot be opened.
        let table = directory_of(state_directory, "destination")
            .and_then(|directory| PageTable::open(&pages_path(&directory)).ok());
        if table.is_some() {
            return table;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    None
}

fn film(table: &PageTable, stop: &AtomicBool) -> Vec<(Instant, String)> {
    let mut frames: Vec<(Instant, String)> = Vec::new();
    let mut every = FRAME_EVERY;
    loop {
        let is_last = stop.load(Relaxed);
        let begin = Instant::now();
        frames.push((begin, frame(table)));
        if is_last {
            return frames;
        }
        if frames.len() >= MAX_FRAMES {
            let mut keep = false;
            frames.retain(|_| {
                keep = !keep;
                keep
            });
            every *= 2;
        }
        let pause = every.max(begin.elapsed() * REST);
        while begin.elapsed() < pause && !stop.load(Relaxed) {
            std::thread::sleep(LOOK_EVERY.min(pause));
        }
    }
}

fn frame(table: &PageTable) -> String {
    let digit = |part: u64| char::from_digit(part as u32, 16).unwrap_or('f');
    let cells = stages_by_cell(table, CELLS);
    cells.flat_map(|count| digits(count).into_iter().take(STAGES - 1)).map(digit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PageIndex, PageRange, Version};

    #[test]
    fn a_frame_tells_the_share_of_each_stage_in_each_part_of_the_memory() {
        let pages = 40 * CELLS as u64;
        let table = PageTable::anonymous(pages).unwrap();
        let arrive = |page: u64, zero, last| {
            let _ = table.claim(PageIndex(page), Version(1));
            table.finish(PageIndex(page), Version(1), zero, last);
        };
        (0..8).for_each(|page| arrive(page, false, false));
        (40..80).for_each(|page| arrive(page, false, true));
        (80..120).for_each(|page| arrive(page, true, true));
        table.mark_mapped(PageRange::new(60, 80));
        let frame = Frame { at_ms: 0, cells: frame(&table) };
        assert_eq!(frame.cells.len(), CELLS * (STAGES - 1));
        let shares = frame.shares();
        let is = |cell: usize, expected: [f64; STAGES]| {
            let near = |(a, b): (&f64, f64)| (a - b).abs() <= 0.5 / PARTS as f64 + 1e-9;
            assert!(shares[cell].iter().zip(expected).all(near), "{cell}: {:?}", shares[cell]);
        };
        is(0, [0.8, 0.2, 0.0, 0.0, 0.0]);
        is(1, [0.0, 0.0, 0.5, 0.0, 0.5]);
        is(2, [0.0, 0.0, 0.0, 1.0, 0.0]);
        is(CELLS - 1, [1.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn shares_add_up_whatever_rounding_does() {
        for count in [[1, 1, 1, 1, 1], [100, 3, 3, 3, 3], [0; STAGES], [7, 0, 0, 0, 9]] {
            let parts = digits(count);
            assert_eq!(parts.iter().sum::<u64>(), PARTS, "{count:?}: {parts:?}");
        }
    }

    #[test]
    fn a_film_begins_with_the_table_of_a_receiver_and_ends_with_its_last_state() {
        let state = tempfile::tempdir().unwrap();
        let name = format!("film-test-{}.destination", std::process::id());
        let directory = state.path().join(name);
        let camera = Camera::start(state.path().to_owned());
        std::fs::create_dir(&directory).unwrap();
        let path = pages_path(&directory);
        let table = PageTable::create(&path, 640).unwrap();
        let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap();
        while mapped().matches(&*path.to_string_lossy()).count() < 2 {
            std::thread::sleep(LOOK_EVERY);
        }
        // As the receiver leaves it: the table is mapped still.
        std::fs::remove_file(&path).unwrap();
        for page in 0..640 {
            let _ = table.claim(PageIndex(page), Version(1));
            table.finish(PageIndex(page), Version(1), false, true);
        }
        let film = camera.end(Instant::now());
        let last = film.frames.last().expect("the table was found").shares();
        assert!(last.iter().all(|shares| shares[2] > 0.99), "{last:?}");
    }
}
