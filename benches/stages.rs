//! What one and two threads make of each stage that a page goes through, in memory, without a network: the stages
//! of which a migration over a fast link consists, and what keeps them from being twice as fast on two cores.
//!
//! `cargo bench --bench stages` works on 1 GiB a stage; `cargo bench --bench stages -- encode` only on the stages with
//! that word in their name. Pages hold half noise and half a repetition, so that codecs have something to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use farfault::codec::CodecChoice;
use farfault::codec::Kin;
use farfault::memory::{GuestMapping, GuestMemory, MemoryLayout, RegionLayout, TrackerKind};
use farfault::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, PageSet, Version};
use farfault::wire::limits::MAX_PAGES_PER_FRAME;
use farfault::wire::{DecodeScratch, Frame, FrameEncoder, PageToSend};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

const PAGES: u64 = (1 << 30) / PAGE_SIZE_BYTES as u64;
/// Pages that a thread takes at a time, as the encoders do.
const CHUNK_PAGES: u64 = MAX_PAGES_PER_FRAME as u64;
/// The best of so many passes counts.
const PASSES: usize = 3;
/// One page in so many is written before each look for writes.
const WRITTEN_ONE_IN: usize = 100;

fn main() -> Result<()> {
    let word = std::env::args().skip(1).find(|word| word != "--bench").unwrap_or_default();
    let bench = Bench { word };
    println!("{:<22} {:>10} {:>10} {:>7}", "stage", "1 thread", "2 threads", "gain");
    println!("{:<22} {:>10} {:>10} {:>7}", "", "GiB/s", "GiB/s", "");
    let layout = MemoryLayout::new(vec![RegionLayout {
        name: "ram".to_owned(),
        size_bytes: PAGES * PAGE_SIZE_BYTES as u64,
    }]);
    let memory = Arc::new(GuestMemory::create(&layout)?);
    fill(&memory)?;
    bench.look_for_writes(&memory)?;
    bench.read(&memory);
    for codec in ["raw/off", "lz4/off", "zstd:1/off"] {
        bench.encode(&memory, codec.parse()?);
    }
    for codec in ["raw/off", "lz4/off", "zstd:1/off"] {
        bench.decode(&memory, codec.parse()?);
    }
    bench.write(&layout)?;
    bench.map(&memory)
}

fn fill(memory: &GuestMemory) -> Result<()> {
    let mut page: PageBytes = [0; PAGE_SIZE_BYTES];
    for index in 0..PAGES {
        page[..PAGE_SIZE_BYTES / 2].fill_with(|| fastrand::u8(..));
        memory.write_page(PageIndex(index), &page)?;
    }
    Ok(())
}

struct Bench {
    word: String,
}

impl Bench {
    fn wants(&self, stage: &str) -> bool {
        stage.contains(&self.word)
    }

    /// Prints a stage's line, given how long it takes with one and with two threads.
    fn report(&self, stage: &str, mut run: impl FnMut(usize) -> Duration) {
        let mut rate = |threads| {
            let best = (0..PASSES).map(|_| run(threads)).min().unwrap_or_default();
            (PAGES as f64 * PAGE_SIZE_BYTES as f64) / f64::from(1 << 30) / best.as_secs_f64()
        };
        let (one, two) = (rate(1), rate(2));
        println!("{stage:<22} {one:>10.2} {two:>10.2} {:>7.2}", two / one);
    }

    /// The tracker divides the work itself, by the cores that the process may use.
    fn look_for_writes(&self, memory: &Arc<GuestMemory>) -> Result<()> {
        let stage = "look for writes";
        if !self.wants(stage) {
            return Ok(());
        }
        let mapping = GuestMapping::new(memory)?;
        let mut tracker = mapping.tracker(TrackerKind::WriteProtect, memory)?;
        tracker.arm()?;
        let write = || {
            for page in (0..PAGES).step_by(WRITTEN_ONE_IN) {
                mapping.page(PageIndex(page))[0].fetch_add(1, Ordering::Relaxed);
            }
        };
        // So that every page is mapped.
        (0..PAGES).for_each(|page| {
            mapping.page(PageIndex(page))[0].load(Ordering::Relaxed);
        });
        let all = sched_getaffinity(Pid::from_raw(0))?;
        self.report(stage, |threads| {
            use_cores(&all, threads);
            write();
            let (begin, mut found) = (Instant::now(), PageSet::empty(PAGES));
            tracker.collect(PageRange::new(0, PAGES), &mut found).expect("a look");
            let elapsed = begin.elapsed();
            assert!(found.len() >= PAGES / WRITTEN_ONE_IN as u64);
            elapsed
        });
        sched_setaffinity(Pid::from_raw(0), &all)?;
        Ok(tracker.disarm()?)
    }

    fn read(&self, memory: &GuestMemory) {
        if self.wants("read") {
            self.report("read", |threads| {
                in_chunks(threads, |chunks| {
                    let mut pages = vec![[0; PAGE_SIZE_BYTES]; CHUNK_PAGES as usize];
                    for chunk in chunks {
                        read_chunk(memory, chunk, &mut pages);
                    }
                })
            });
        }
    }

    fn encode(&self, memory: &GuestMemory, codec: CodecChoice) {
        let stage = format!("read, encode {}", codec.to_string().trim_end_matches("/off"));
        if self.wants(&stage) {
            self.report(&stage, |threads| {
                in_chunks(threads, |chunks| {
                    let mut encoder = FrameEncoder::new(codec);
                    let mut pages = vec![[0; PAGE_SIZE_BYTES]; CHUNK_PAGES as usize];
                    let mut frame = Vec::new();
                    for chunk in chunks {
                        read_chunk(memory, chunk, &mut pages);
                        frame.clear();
                        encode_chunk(&mut encoder, chunk, &pages, &mut frame);
                    }
                })
            });
        }
    }

    fn decode(&self, memory: &GuestMemory, codec: CodecChoice) {
        let stage = format!("decode {}", codec.to_string().trim_end_matches("/off"));
        if !self.wants(&stage) {
            return;
        }
        let chunk = PageRange::new(0, CHUNK_PAGES);
        let mut pages = vec![[0; PAGE_SIZE_BYTES]; CHUNK_PAGES as usize];
        read_chunk(memory, chunk, &mut pages);
        let mut bytes = Vec::new();
        encode_chunk(&mut FrameEncoder::new(codec), chunk, &pages, &mut bytes);
        self.report(&stage, |threads| {
            in_chunks(threads, |chunks| {
                let mut scratch = DecodeScratch::default();
                for _ in chunks {
                    let (frame, _) = Frame::parse(&bytes, PAGES).expect("what was encoded");
                    frame.decode(&mut scratch, |_, _, _| false).expect("what was encoded");
                }
            })
        });
    }

    /// Into memory that is all holes, as at a destination.
    fn write(&self, layout: &MemoryLayout) -> Result<()> {
        if !self.wants("write") {
            return Ok(());
        }
        let memory = GuestMemory::create(layout)?;
        let pages = vec![[7; PAGE_SIZE_BYTES]; CHUNK_PAGES as usize];
        self.report("write", |threads| {
            memory.punch_hole(PageRange::new(0, PAGES)).expect("a hole");
            in_chunks(threads, |chunks| {
                for chunk in chunks {
                    memory.write_pages(chunk.start, &pages).expect("room");
                }
            })
        });
        Ok(())
    }

    /// What is there is given to the guest, in whole ranges.
    fn map(&self, memory: &GuestMemory) -> Result<()> {
        if self.wants("map") {
            self.report("map", |threads| {
                let mapping = GuestMapping::new(memory).expect("another mapping");
                let userfault = mapping.userfault().expect("a userfaultfd");
                let elapsed = in_chunks(threads, |chunks| {
                    for chunk in chunks {
                        userfault.map(chunk).expect("pages that are there");
                    }
                });
                userfault.release().expect("an end");
                elapsed
            });
        }
        Ok(())
    }
}

/// Lets the process use so many of its cores.
fn use_cores(all: &CpuSet, count: usize) {
    let mut some = CpuSet::new();
    let cores = (0..CpuSet::count()).filter(|core| all.is_set(*core).unwrap_or(false));
    cores.take(count).for_each(|core| some.set(core).expect("a core of the set"));
    sched_setaffinity(Pid::from_raw(0), &some).expect("fewer cores");
}

/// Threads that take chunk after chunk until there are no more; how long that took.
fn in_chunks(
    threads: usize,
    work: impl Fn(&mut dyn Iterator<Item = PageRange>) + Sync,
) -> Duration {
    let next = AtomicU64::new(0);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                work(&mut std::iter::from_fn(|| {
                    let start = next.fetch_add(CHUNK_PAGES, Ordering::Relaxed);
                    (start < PAGES).then(|| PageRange::new(start, start + CHUNK_PAGES))
                }));
            });
        }
    });
    begin.elapsed()
}

fn read_chunk(memory: &GuestMemory, chunk: PageRange, pages: &mut [PageBytes]) {
    memory.will_read(chunk);
    for (page, bytes) in chunk.pages().zip(pages) {
        memory.read_page(page, bytes);
    }
}

fn encode_chunk(
    encoder: &mut FrameEncoder,
    chunk: PageRange,
    pages: &[PageBytes],
    frame: &mut Vec<u8>,
) {
    let to_send = chunk.pages().zip(pages);
    let to_send: Vec<_> =
        to_send.map(|(page, bytes)| PageToSend { page, bytes, base: None }).collect();
    encoder.encode(Version(1), &to_send, &Kin::default(), frame);
}
