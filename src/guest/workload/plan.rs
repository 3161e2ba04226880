//! How a built-in guest is laid out: RAM, workers, and which pages each of them works on.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::page::{PageWords, Stream, write_whole};
use super::worker::{COLD_EVERY, Worker};
use super::{Pattern, Workload};
use crate::memory::{MemoryLayout, RegionLayout};
use crate::page::PAGE_SIZE_BYTES;

/// RAM of a built-in guest comes in these units: the pages that the microVM's page tables map.
pub(crate) const MEMORY_UNIT_BYTES: u64 = 2 << 20;
/// Largest RAM of a built-in guest: what one page directory pointer table maps.
pub(crate) const MEMORY_LIMIT_BYTES: u64 = 512 << 30;
/// Most workers (vCPUs, threads).
pub(crate) const WORKERS_LIMIT: u32 = 64;

/// First page of the guest program.
pub(crate) const PROGRAM_PAGE: u64 = 1;
/// The page of the first worker's fields and stack; one page for each worker follows.
pub(crate) const FIRST_WORKER_PAGE: u64 = 2;
/// Page tables, behind the pages of all possible workers.
pub(crate) const PAGE_TABLES_PAGE: u64 = FIRST_WORKER_PAGE + WORKERS_LIMIT as u64;

/// What a built-in guest is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestPlan {
    /// RAM in bytes: a multiple of 2 MiB, up to 512 GiB.
    pub memory_bytes: u64,
    /// How much of the RAM the workload uses, in percent; the rest stays holes.
    pub used_percent: u32,
    /// vCPUs or threads, up to 64; they share the used memory evenly.
    pub workers: NonZeroU32,
    /// What they do. A destination takes over the workload of the guest that arrives.
    pub workload: Workload,
}

/// A plan that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The RAM size does not suit the page tables.
    #[error("guest memory of {0} bytes: it must be a multiple of 2 MiB, from 2 MiB to 512 GiB")]
    Memory(u64),
    /// Too many workers.
    #[error("{0} vCPUs: a built-in guest has at most {WORKERS_LIMIT}")]
    Workers(u32),
    /// More than everything or nothing used.
    #[error("{0} % of memory used by the workload: it must be from 1 to 100")]
    Used(u32),
    /// Some worker would have too little to work on.
    #[error(
        "{pages} pages used by {workers} workers: each needs at least 16; give the guest more memory"
    )]
    TooSmall {
        /// Pages for all workers.
        pages: u64,
        /// How many share them.
        workers: u32,
    },
}

impl GuestPlan {
    /// Whether the plan can be carried out.
    pub fn check(&self) -> Result<(), PlanError> {
        let (memory, workers) = (self.memory_bytes, self.workers.get());
        if !memory.is_multiple_of(MEMORY_UNIT_BYTES)
            || !(MEMORY_UNIT_BYTES..=MEMORY_LIMIT_BYTES).contains(&memory)
        {
            return Err(PlanError::Memory(memory));
        }
        if workers > WORKERS_LIMIT {
            return Err(PlanError::Workers(workers));
        }
        if !(1..=100).contains(&self.used_percent) {
            return Err(PlanError::Used(self.used_percent));
        }
        if self.slice_pages() < 16 {
            let pages = self.used_pages();
            return Err(PlanError::TooSmall { pages, workers });
        }
        Ok(())
    }

    /// The RAM as one region, named "ram".
    pub fn memory_layout(&self) -> MemoryLayout {
        let region = RegionLayout { name: "ram".to_owned(), size_bytes: self.memory_bytes };
        MemoryLayout::new(vec![region])
    }

    /// First page behind program, workers and page tables.
    pub(crate) fn first_used_page(&self) -> u64 {
        PAGE_TABLES_PAGE + 2 + self.memory_bytes.div_ceil(1 << 30)
    }

    fn used_pages(&self) -> u64 {
        let free = self.memory_bytes / PAGE_SIZE_BYTES as u64 - self.first_used_page();
        free * u64::from(self.used_percent) / 100
    }

    fn slice_pages(&self) -> u64 {
        self.used_pages() / u64::from(self.workers.get())
    }

    /// The workers before their first operation.
    pub(crate) fn new_workers(&self) -> Vec<Worker> {
        let count = self.slice_pages();
        let slices = (0..u64::from(self.workers.get())).map(|i| self.first_used_page() + i * count);
        let worker = |first: u64| {
            let hot_cold = self.workload.pattern == Pattern::HotCold;
            let hot = if hot_cold { count.div_ceil(16) } else { count };
            Worker {
                mode: self.workload.pattern.mode(),
                cold_every: if hot_cold { COLD_EVERY } else { 0 },
                streams: [Stream::new(first, hot), Stream::new(first + hot, count - hot)],
                ..Worker::default()
            }
        };
        slices.map(worker).collect()
    }
}

/// Writes the initial content of a worker's pages: the first cycle of each stream.
pub(crate) fn fill<'a>(worker: &Worker, page: impl Fn(u64) -> &'a PageWords) {
    for stream in &worker.streams {
        for sequence in 0..stream.count {
            let number = stream.page_of(sequence, worker.mode.scattered);
            write_whole(page(number), number, sequence);
        }
    }
}
