//! Contents of some pages, and what they cost when they are sent.

use std::collections::BTreeMap;
use std::ops::Add;
use std::time::{Duration, Instant};

use crate::codec::ladder::Ladder;
use crate::codec::{CodecCounts, CodecId, Kin};
use crate::memory::GuestMemory;
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageSet, Version};
use crate::wire::limits::MAX_PAGES_PER_FRAME;
use crate::wire::{FrameEncoder, PageToSend};

/// Contents of pages.
#[derive(Clone, Default)]
pub(super) struct Copies(BTreeMap<PageIndex, Box<PageBytes>>);

impl Copies {
    /// Of those of `pages` that are no holes: reading a hole would fill it.
    pub(super) fn of(memory: &GuestMemory, pages: Vec<PageIndex>, populated: &PageSet) -> Self {
        let copy = |page: PageIndex| {
            let mut bytes = Box::new([0; PAGE_SIZE_BYTES]);
            memory.read_page(page, &mut bytes);
            (page, bytes)
        };
        Copies(pages.into_iter().filter(|page| populated.contains(*page)).map(copy).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn pages(&self) -> impl Iterator<Item = PageIndex> {
        self.0.keys().copied()
    }

    /// Encodes all of them as they would be sent, against `bases` where there are such.
    pub(super) fn encode(
        &self,
        ladder: &mut Ladder,
        link_bytes_per_s: f64,
        bases: Option<&Copies>,
    ) -> Costs {
        let mut encoder = FrameEncoder::default();
        let mut costs = Costs::default();
        let pages: Vec<(&PageIndex, &Box<PageBytes>)> = self.0.iter().collect();
        for batch in pages.chunks(MAX_PAGES_PER_FRAME) {
            let base = |page: &PageIndex| Some((Version(1), &**bases?.0.get(page)?));
            let to_send: Vec<PageToSend<'_>> = batch
                .iter()
                .map(|(page, bytes)| PageToSend { page: **page, bytes, base: base(page) })
                .collect();
            let choice = ladder.choose(link_bytes_per_s, 1);
            let mut frames = Vec::new();
            let begin = Instant::now();
            encoder.set_choice(choice);
            let counts = encoder.encode(Version(2), &to_send, &Kin::default(), &mut frames);
            let time = begin.elapsed();
            ladder.observe(choice, &counts, time);
            costs = costs + Costs { counts, time };
        }
        costs
    }
}

/// What encoding has shown.
#[derive(Clone, Copy, Default)]
pub(super) struct Costs {
    counts: CodecCounts,
    time: Duration,
}

impl Costs {
    pub(super) fn pages(&self) -> u64 {
        self.counts.total_pages()
    }

    pub(super) fn zero_share(&self) -> f64 {
        self.counts.pages(CodecId::Zero) as f64 / self.pages().max(1) as f64
    }

    /// Of those that are not zero.
    pub(super) fn bytes_per_page(&self) -> f64 {
        match self.pages() - self.counts.pages(CodecId::Zero) {
            0 => PAGE_SIZE_BYTES as f64,
            pages => self.counts.total_bytes() as f64 / pages as f64,
        }
    }

    /// Of all: a page that was changed may be zero now, or what it was.
    pub(super) fn bytes_per_changed_page(&self) -> f64 {
        self.counts.total_bytes() as f64 / self.pages().max(1) as f64
    }

    pub(super) fn input_bytes_per_s(&self) -> f64 {
        let input = self.pages() as f64 * PAGE_SIZE_BYTES as f64;
        if input == 0.0 { f64::INFINITY } else { input / self.time.as_secs_f64().max(1e-6) }
    }
}

impl Add for Costs {
    type Output = Costs;

    fn add(mut self, other: Costs) -> Costs {
        self.counts += other.counts;
        self.time += other.time;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_of_a_page_is_that_of_its_frames() {
        let mut old = Copies::default();
        let mut new = Copies::default();
        for page in 0..100u64 {
            let mut bytes = Box::new([0u8; PAGE_SIZE_BYTES]);
            if page % 2 == 0 {
                let noise = |i: usize| {
                    (xxhash_rust::xxh3::xxh3_64(&[page as u8, i as u8, (i >> 8) as u8])) as u8
                };
                bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = noise(i));
            }
            old.0.insert(PageIndex(page), bytes.clone());
            bytes[100] ^= 1;
            new.0.insert(PageIndex(page), bytes);
        }
        let mut ladder = Ladder::default();
        let whole = old.encode(&mut ladder, 12e6, None);
        assert_eq!((whole.pages(), whole.zero_share()), (100, 0.5));
        assert!((4000.0..4300.0).contains(&whole.bytes_per_page()), "{}", whole.bytes_per_page());
        let delta = new.encode(&mut ladder, 12e6, Some(&old));
        assert!(delta.bytes_per_changed_page() < 100.0, "{}", delta.bytes_per_changed_page());
        assert_eq!((delta + whole).pages(), 200);
    }
}
