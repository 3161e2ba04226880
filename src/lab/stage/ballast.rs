//! Memory that the laboratory has touched, and gives back as a migration needs it.
//!
//! A laboratory in a virtual machine may run on a host that takes free memory back, within seconds, and gives it again
//! at the first touch, at a rate that varies tenfold from day to day: all that a fast link can be measured by is that rate then.
//! A host that migrates has memory of its own. With a [`Ballast`] the destination gets what the host has given to
//! the laboratory before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memmap2::{Advice, MmapMut};

use crate::meminfo::meminfo_bytes;
use crate::page::PAGE_SIZE_BYTES;

/// What is given back at a time.
const PIECE_BYTES: usize = 16 << 20;
/// Stays free while the ballast is held.
const SPARED_BYTES: u64 = 1 << 30;
/// While it is given back, free memory is kept above what it was by as much.
const AHEAD_BYTES: u64 = 256 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Memory that is held.
pub struct Ballast {
    pieces: Vec<MmapMut>,
}

impl Ballast {
    /// Takes nearly all memory that is free, by all cores, and touches it. All: which free memory the kernel gives to
    /// whom cannot be told.
    ///
    /// # Errors
    /// When that would be less than `needed_bytes`, without having taken any.
    pub fn take(needed_bytes: u64) -> Result<Self> {
        let bytes = read_meminfo("MemFree")?.saturating_sub(SPARED_BYTES);
        ensure!(
            needed_bytes <= bytes,
            "ready_memory: of {} MiB that the destination needs {} MiB are free",
            needed_bytes >> 20,
            bytes >> 20
        );
        Self::of(bytes)
    }

    fn of(bytes: u64) -> Result<Self> {
        let pieces = bytes / PIECE_BYTES as u64;
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        let shares = (0..cores).map(|core| pieces * (core + 1) / cores - pieces * core / cores);
        let pieces = std::thread::scope(|scope| {
            let threads: Vec<_> = shares.map(|share| scope.spawn(move || touched(share))).collect();
            let taken = threads.into_iter().map(|thread| thread.join().expect("it does not panic"));
            taken.collect::<Result<Vec<_>>>()
        })?;
        Ok(Ballast { pieces: pieces.into_iter().flatten().collect() })
    }

    /// From now on gives back as much as is taken by others, and all of it when the result is dropped.
    pub fn give_back(self) -> Result<GivingBack> {
        Ok(self.give_back_until(read_meminfo("MemFree")? + AHEAD_BYTES))
    }

    fn give_back_until(self, wanted_free_bytes: u64) -> GivingBack {
        let Ballast { mut pieces } = self;
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !until.load(Relaxed) && !pieces.is_empty() {
                match read_meminfo("MemFree") {
                    Ok(free_bytes) if free_bytes >= wanted_free_bytes => {
                        std::thread::sleep(LOOK_EVERY);
                    }
                    _ => drop(pieces.pop()),
                }
            }
        });
        GivingBack { stop, thread: Some(thread) }
    }
}

fn touched(pieces: u64) -> Result<Vec<MmapMut>> {
    let piece = |_| {
        let mut piece = MmapMut::map_anon(PIECE_BYTES).context("take memory")?;
        // Quicker where the kernel has huge pages, and not needed.
        let _ = piece.advise(Advice::HugePage);
        piece.iter_mut().step_by(PAGE_SIZE_BYTES).for_each(|byte| *byte = 1);
        Ok(piece)
    };
    (0..pieces).map(piece).collect()
}

/// A ballast that becomes smaller.
pub struct GivingBack {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for GivingBack {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_meminfo(what: &str) -> Result<u64> {
    meminfo_bytes(what).with_context(|| format!("/proc/meminfo has no {what}"))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn more_than_there_is_is_refused() {
        let refused = Ballast::take(1 << 60).map(|_| ()).unwrap_err().to_string();
        assert!(refused.starts_with("ready_memory: of 1099511627776 MiB"), "{refused}");
    }

    #[test]
    fn what_others_take_comes_out_of_the_ballast() {
        let ballast = Ballast::of(64 << 20).unwrap();
        assert_eq!(ballast.pieces.len(), 4);
        // As if others took all that they can get.
        let giving_back = ballast.give_back_until(u64::MAX);
        let begin = Instant::now();
        while giving_back.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            assert!(begin.elapsed() < Duration::from_secs(30));
            std::thread::sleep(LOOK_EVERY);
        }
    }
}
