//! Sets of pages.

use std::fmt;

use super::{PageIndex, PageRange};

/// Pages of a chunk: 128 MiB of guest memory, 4 KiB of bits.
const CHUNK_PAGES: u64 = 32768;
const CHUNK_WORDS: usize = CHUNK_PAGES as usize / 64;

/// A set of pages of a guest, as a bitmap that is walked by word: at most one bit per page of RAM (32 KiB per GiB). Where
/// all pages of 128 MiB are members, or none is, there are no bits: so the sets of a huge guest, most of which is
/// alike, take hardly any memory, and are made, copied and combined in no time. Two sets that are combined must be of
/// guests of the same size.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    chunks: Vec<Chunk>,
    pages: u64,
    count: u64,
}

/// The members among [`CHUNK_PAGES`] pages; in the last chunk of a guest, among what is left of them.
#[derive(Clone, Default, PartialEq, Eq)]
struct Chunk {
    count: u32,
    /// `None` exactly when none or all are members.
    words: Option<Box<[u64; CHUNK_WORDS]>>,
}

impl Chunk {
    fn full(pages: u64) -> Self {
        Chunk { count: pages as u32, words: None }
    }

    fn is_full(&self) -> bool {
        self.count > 0 && self.words.is_none()
    }

    fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Word `index` of a chunk of `pages` pages.
    fn word(&self, index: usize, pages: u64) -> u64 {
        match &self.words {
            Some(words) => words[index],
            None if self.is_empty() => 0,
            None => full_word(index, pages),
        }
    }

    fn set_word(&mut self, index: usize, word: u64, pages: u64) {
        let before = self.word(index, pages);
        if before == word {
            return;
        }
        let was_full = self.is_full();
        self.count = self.count - before.count_ones() + word.count_ones();
        if self.count == 0 || u64::from(self.count) == pages {
            self.words = None;
            return;
        }
        let words = self.words.get_or_insert_with(|| {
            let uniform = |index| if was_full { full_word(index, pages) } else { 0 };
            Box::new(std::array::from_fn(uniform))
        });
        words[index] = word;
    }

    /// Makes each word `op` of itself and of the other's.
    fn combine(&mut self, other: &Chunk, pages: u64, op: impl Fn(u64, u64) -> u64) {
        let mut words: Box<[u64; CHUNK_WORDS]> = match self.words.take() {
            Some(words) => words,
            None => Box::new(std::array::from_fn(|index| self.word(index, pages))),
        };
        for (index, word) in words.iter_mut().enumerate() {
            *word = op(*word, other.word(index, pages));
        }
        self.count = words.iter().map(|word| word.count_ones()).sum();
        if self.count != 0 && u64::from(self.count) != pages {
            self.words = Some(words);
        }
    }
}

/// All bits of a word of a chunk of `pages` pages.
fn full_word(index: usize, pages: u64) -> u64 {
    match pages.saturating_sub(index as u64 * 64) {
        0 => 0,
        left @ 1..64 => u64::MAX >> (64 - left),
        _ => u64::MAX,
    }
}

impl PageSet {
    /// The empty set over a guest of `pages` pages.
    pub fn empty(pages: u64) -> Self {
        let chunks = vec![Chunk::default(); pages.div_ceil(CHUNK_PAGES) as usize];
        PageSet { chunks, pages, count: 0 }
    }

    /// Every page of a guest of `pages` pages.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.insert_range(PageRange::new(0, pages));
        set
    }

    /// From bitmap words, least significant bit first. Bits beyond `pages` are an error (`None`), so
    /// that words from the network cannot name pages that do not exist.
    pub fn from_words(words: impl ExactSizeIterator<Item = u64>, pages: u64) -> Option<Self> {
        if words.len() as u64 != pages.div_ceil(64) {
            return None;
        }
        let mut set = Self::empty(pages);
        words.enumerate().try_for_each(|(index, word)| set.insert_word(index, word))?;
        Some(set)
    }

    /// Adds the members of a word of the bitmap; `None`, and nothing, when it names a page beyond the guest.
    pub fn insert_word(&mut self, index: usize, word: u64) -> Option<()> {
        let first = index as u64 * 64;
        let left = self.pages.saturating_sub(first);
        let is_beyond = left < 64 && word >> left != 0;
        if word == 0 || is_beyond {
            return (!is_beyond).then_some(());
        }
        self.set_word(index, self.word(index) | word);
        Some(())
    }

    /// How many words the bitmap has.
    pub fn word_count(&self) -> usize {
        self.pages.div_ceil(64) as usize
    }

    /// A word of the bitmap, least significant bit first.
    ///
    /// # Panics
    /// When there is no such word.
    pub fn word(&self, index: usize) -> u64 {
        let chunk = index / CHUNK_WORDS;
        self.chunks[chunk].word(index % CHUNK_WORDS, self.pages_in(chunk))
    }

    /// Size of the guest, in pages: the capacity, not the number of members.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many members.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// True when there is no member.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many members are in `range`.
    pub fn len_in(&self, range: PageRange) -> u64 {
        self.words_in(range).map(|(_, word)| u64::from(word.count_ones())).sum()
    }

    /// True when no page in `range` is a member.
    pub fn is_empty_in(&self, range: PageRange) -> bool {
        self.first_in(range, true).is_none()
    }

    /// True when `page` is a member. Pages beyond the guest never are.
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.word((page.0 / 64) as usize) >> (page.0 % 64) & 1 == 1
    }

    /// Adds a page; true when it was not a member before.
    ///
    /// # Panics
    /// When the page is beyond the guest: the caller has not checked its input.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        assert!(page.0 < self.pages, "{page:?} beyond a guest of {} pages", self.pages);
        let before = self.count;
        let index = (page.0 / 64) as usize;
        self.set_word(index, self.word(index) | 1 << (page.0 % 64));
        self.count != before
    }

    /// Removes a page; true when it was a member.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        if !self.contains(page) {
            return false;
        }
        let index = (page.0 / 64) as usize;
        self.set_word(index, self.word(index) & !(1 << (page.0 % 64)));
        true
    }

    /// Adds a run of pages.
    ///
    /// # Panics
    /// When the run ends beyond the guest.
    pub fn insert_range(&mut self, range: PageRange) {
        assert!(range.is_empty() || range.end.0 <= self.pages, "{range:?} beyond the guest");
        for piece in pieces(range) {
            let pages = self.pages_in(piece.chunk);
            if piece.pages.len() == pages {
                self.set_chunk(piece.chunk, Chunk::full(pages));
                continue;
            }
            for (index, mask) in words_of(piece.pages) {
                self.set_word(index, self.word(index) | mask);
            }
        }
    }

    /// Removes a run of pages.
    pub fn remove_range(&mut self, range: PageRange) {
        for piece in pieces(self.clip(range)) {
            if piece.pages.len() == self.pages_in(piece.chunk) {
                self.set_chunk(piece.chunk, Chunk::default());
                continue;
            }
            for (index, mask) in words_of(piece.pages) {
                self.set_word(index, self.word(index) & !mask);
            }
        }
    }

    /// Removes all members.
    pub fn clear(&mut self) {
        self.remove_range(PageRange::new(0, self.pages));
    }

    /// Adds every member of `other`.
    pub fn union_with(&mut self, other: &PageSet) {
        self.union_in(PageRange::new(0, self.pages), other);
    }

    /// Keeps the members that are in `other` too.
    pub fn intersect_with(&mut self, other: &PageSet) {
        self.intersect_in(PageRange::new(0, self.pages), other);
    }

    /// Removes every member of `other`.
    pub fn subtract(&mut self, other: &PageSet) {
        self.subtract_in(PageRange::new(0, self.pages), other);
    }

    /// Adds the members of `other` that lie in `range`.
    pub fn union_in(&mut self, range: PageRange, other: &PageSet) {
        let quick = |own: &Chunk, other: &Chunk| match () {
            () if other.is_empty() || own.is_full() => Quick::Own,
            () if own.is_empty() || other.is_full() => Quick::Other,
            () => Quick::No,
        };
        self.combine_in(range, other, quick, |own, other| own | other);
    }

    /// Keeps of the members in `range` those that are in `other` too.
    pub fn intersect_in(&mut self, range: PageRange, other: &PageSet) {
        let quick = |own: &Chunk, other: &Chunk| match () {
            () if own.is_empty() || other.is_full() => Quick::Own,
            () if other.is_empty() || own.is_full() => Quick::Other,
            () => Quick::No,
        };
        self.combine_in(range, other, quick, |own, other| own & other);
    }

    /// Removes the members of `other` that lie in `range`.
    pub fn subtract_in(&mut self, range: PageRange, other: &PageSet) {
        let quick = |own: &Chunk, other: &Chunk| match () {
            () if own.is_empty() || other.is_empty() => Quick::Own,
            () if other.is_full() => Quick::None,
            () => Quick::No,
        };
        self.combine_in(range, other, quick, |own, other| own & !other);
    }

    fn combine_in(
        &mut self,
        range: PageRange,
        other: &PageSet,
        quick: impl Fn(&Chunk, &Chunk) -> Quick,
        op: impl Fn(u64, u64) -> u64,
    ) {
        assert_eq!(self.pages, other.pages, "page sets of different guests");
        for piece in pieces(self.clip(range)) {
            let pages = self.pages_in(piece.chunk);
            let theirs = &other.chunks[piece.chunk];
            let quick = quick(&self.chunks[piece.chunk], theirs);
            match quick {
                Quick::Own => {}
                _ if piece.pages.len() < pages => {
                    for (index, mask) in words_of(piece.pages) {
                        let own = self.word(index);
                        let combined = op(own, other.word(index));
                        self.set_word(index, own & !mask | combined & mask);
                    }
                }
                Quick::Other => self.set_chunk(piece.chunk, theirs.clone()),
                Quick::None => self.set_chunk(piece.chunk, Chunk::default()),
                Quick::No => {
                    let own = &mut self.chunks[piece.chunk];
                    self.count -= u64::from(own.count);
                    own.combine(theirs, pages, &op);
                    self.count += u64::from(own.count);
                }
            }
        }
    }

    /// How many members are in `other` too.
    pub fn intersection_len(&self, other: &PageSet) -> u64 {
        assert_eq!(self.pages, other.pages, "page sets of different guests");
        let common =
            |(index, word): (usize, u64)| u64::from((word & other.word(index)).count_ones());
        self.words_in(PageRange::new(0, self.pages)).map(common).sum()
    }

    /// The members in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.iter_in(PageRange::new(0, self.pages))
    }

    /// The members in `range`, ascending.
    pub fn iter_in(&self, range: PageRange) -> impl Iterator<Item = PageIndex> + '_ {
        self.words_in(range).flat_map(|(index, mut word)| {
            std::iter::from_fn(move || {
                (word != 0).then(|| {
                    let bit = word.trailing_zeros();
                    word &= word - 1;
                    PageIndex(index as u64 * 64 + u64::from(bit))
                })
            })
        })
    }

    /// The words with members in `range`, each with its number and without bits beside the range.
    fn words_in(&self, range: PageRange) -> impl Iterator<Item = (usize, u64)> + '_ {
        let some = pieces(self.clip(range)).filter(|piece| !self.chunks[piece.chunk].is_empty());
        let words = some.flat_map(|piece| words_of(piece.pages));
        words.map(|(index, mask)| (index, self.word(index) & mask)).filter(|(_, word)| *word != 0)
    }

    /// The members as maximal runs, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.runs_in(PageRange::new(0, self.pages))
    }

    /// The members in `range` as maximal runs, in ascending order.
    pub fn runs_in(&self, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        self.alike_in(range, true)
    }

    /// The pages in `range` that are no members, as maximal runs, in ascending order.
    pub fn gaps_in(&self, range: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        self.alike_in(range, false)
    }

    fn alike_in(&self, range: PageRange, members: bool) -> impl Iterator<Item = PageRange> + '_ {
        let end = range.end.0.min(self.pages);
        let mut from = range.start.0;
        std::iter::from_fn(move || {
            let start = self.first_in(PageRange::new(from, end), members)?;
            from = self.first_in(PageRange::new(start.0, end), !members).map_or(end, |page| page.0);
            Some(PageRange::new(start.0, from))
        })
    }

    /// The first member at or after `from`.
    pub fn first_from(&self, from: PageIndex) -> Option<PageIndex> {
        self.first_in(PageRange::new(from.0, self.pages), true)
    }

    /// The first page in `range` that is a member, or that is none.
    fn first_in(&self, range: PageRange, member: bool) -> Option<PageIndex> {
        pieces(self.clip(range)).find_map(|piece| {
            let chunk = &self.chunks[piece.chunk];
            if chunk.words.is_none() {
                return (chunk.is_full() == member).then_some(piece.pages.start);
            }
            words_of(piece.pages).find_map(|(index, mask)| {
                let word = self.word(index);
                let found = if member { word & mask } else { !word & mask };
                (found != 0)
                    .then(|| PageIndex(index as u64 * 64 + u64::from(found.trailing_zeros())))
            })
        })
    }

    fn set_word(&mut self, index: usize, word: u64) {
        let number = index / CHUNK_WORDS;
        let pages = self.pages_in(number);
        let chunk = &mut self.chunks[number];
        self.count -= u64::from(chunk.count);
        chunk.set_word(index % CHUNK_WORDS, word, pages);
        self.count += u64::from(chunk.count);
    }

    fn set_chunk(&mut self, number: usize, chunk: Chunk) {
        self.count -= u64::from(self.chunks[number].count);
        self.count += u64::from(chunk.count);
        self.chunks[number] = chunk;
    }

    /// Pages of a chunk.
    fn pages_in(&self, chunk: usize) -> u64 {
        (self.pages - chunk as u64 * CHUNK_PAGES).min(CHUNK_PAGES)
    }

    /// What of `range` is of this guest.
    fn clip(&self, range: PageRange) -> PageRange {
        PageRange::new(range.start.0.min(self.pages), range.end.0.min(self.pages))
    }
}

/// What two chunks become, where that is known without a look at their words.
enum Quick {
    Own,
    Other,
    None,
    No,
}

/// Part of one chunk.
struct Piece {
    chunk: usize,
    pages: PageRange,
}

/// A range, chunk by chunk.
fn pieces(range: PageRange) -> impl Iterator<Item = Piece> {
    let (mut at, end) = (range.start.0, range.end.0);
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let chunk = at / CHUNK_PAGES;
            let piece_end = ((chunk + 1) * CHUNK_PAGES).min(end);
            let pages = PageRange::new(at, piece_end);
            at = piece_end;
            Piece { chunk: chunk as usize, pages }
        })
    })
}

/// The words that hold `range`, each with the bits of it.
fn words_of(range: PageRange) -> impl Iterator<Item = (usize, u64)> {
    let (mut at, end) = (range.start.0, range.end.0);
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let bit = at % 64;
            let take = (64 - bit).min(end - at);
            let word = (at / 64) as usize;
            at += take;
            (word, (u64::MAX >> (64 - take)) << bit)
        })
    })
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {})", self.count, self.pages)
    }
}

#[cfg(test)]
mod tests;
