//! The working set: pages that can tell by themselves whether they are whole, and up to date.
//!
//! A page is 512 words of 8 bytes, little endian:
//!
//! | word | content |
//! |---|---|
//! | 0 | index of the page in the working set |
//! | 1 | sequence number: how many times the page was written |
//! | 2 | checksum of all other words |
//! | 3 | the counter of the pattern `counter` |
//! | 4.. | fill, and whatever the patterns write |
//!
//! The same sequence numbers are kept in a table apart from the pages. So a page of another place
//! shows by its index, a torn or damaged one by its checksum, and one that is whole but *old*,
//! the typical fault of a migration, by its sequence number.
//!
//! The checksum is linear: the sum of each word times an odd constant of its position, modulo 2^64.
//! Any single changed word changes it, exchanged words too, and writing a few words updates it
//! without reading the rest of the page: so a sparse write touches only a few cache lines, as the
//! programs do that it stands for.

use std::str::FromStr;

use crate::random::Random;

pub(crate) const WORDS: usize = 512;
const INDEX: usize = 0;
const SEQUENCE: usize = 1;
const CHECKSUM: usize = 2;
/// The word that the pattern `counter` counts in.
pub(crate) const COUNTER: usize = 3;
/// The first word that is free for any content.
pub(crate) const BODY: usize = 4;

const FACTORS: [u64; WORDS] = factors();

/// Odd constants, from SplitMix64. The checksum itself has no part in the sum.
const fn factors() -> [u64; WORDS] {
    let mut table = [0; WORDS];
    let mut state = 0u64;
    let mut i = 0;
    while i < WORDS {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        table[i] = (z ^ (z >> 31)) | 1;
        i += 1;
    }
    table[CHECKSUM] = 0;
    table
}

/// The first content of the pages' bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// English-like: words of a small vocabulary in random order, with a space after each. lz4 and
    /// zstd find in it about what they find in the used memory of servers.
    Text,
    /// Nothing can be compressed.
    Random,
    /// All zero.
    Zero,
}

impl FromStr for Fill {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "text" => Ok(Fill::Text),
            "random" => Ok(Fill::Random),
            "zero" => Ok(Fill::Zero),
            _ => Err(format!("ff.fill={name}: text, random or zero")),
        }
    }
}

/// Aligned, so that a page of the working set is a page of the guest.
#[derive(Clone, Copy)]
#[repr(align(4096))]
struct Page([u64; WORDS]);

/// All pages and the table of their sequence numbers.
pub(crate) struct WorkingSet {
    pages: Vec<Page>,
    sequences: Vec<u64>,
}

impl WorkingSet {
    /// Pages with index, fill and checksum, each written once.
    pub(crate) fn filled(pages: u64, fill: Fill, seed: u64) -> Result<Self, String> {
        let count = usize::try_from(pages).map_err(|_| "ff.ws: too large".to_owned())?;
        let mut set = WorkingSet { pages: Vec::new(), sequences: vec![0; count] };
        set.pages.try_reserve_exact(count).map_err(|e| format!("ff.ws: {e}"))?;
        let mut filler = Filler::new(fill, seed);
        for index in 0..count {
            set.pages.push(Page([0; WORDS]));
            let page = &mut set.pages[index];
            page.0[INDEX] = index as u64;
            filler.fill(&mut page.0[BODY..]);
            page.0[CHECKSUM] = checksum(page);
            set.write(index, |_| {});
        }
        Ok(set)
    }

    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Appends the bytes of a page.
    pub(crate) fn read(&self, index: usize, to: &mut Vec<u8>) {
        to.extend(self.pages[index].0.iter().flat_map(|word| word.to_le_bytes()));
    }

    /// Changes words of a page, counts its sequence number up, and makes its checksum right.
    pub(crate) fn write(&mut self, index: usize, change: impl FnOnce(&mut Change<'_>)) {
        let sequence = self.sequences[index] + 1;
        let mut change_of = Change { page: &mut self.pages[index].0, sum: 0 };
        change(&mut change_of);
        change_of.set(SEQUENCE, sequence);
        let sum = change_of.sum;
        let checksum = &mut self.pages[index].0[CHECKSUM];
        *checksum = checksum.wrapping_add(sum);
        self.sequences[index] = sequence;
    }

    /// What is wrong with a page, if anything.
    pub(crate) fn verify(&self, index: usize) -> Result<(), String> {
        let Page(page) = &self.pages[index];
        let (sum, sequence) = (checksum(&self.pages[index]), self.sequences[index]);
        if page[INDEX] == index as u64 && page[SEQUENCE] == sequence && page[CHECKSUM] == sum {
            return Ok(());
        }
        Err(format!(
            "index {} sequence {} (of {sequence}) checksum {:016x} (computed {sum:016x})",
            page[INDEX], page[SEQUENCE], page[CHECKSUM]
        ))
    }
}

fn checksum(page: &Page) -> u64 {
    let products = page.0.iter().zip(&FACTORS).map(|(word, factor)| word.wrapping_mul(*factor));
    products.fold(0, u64::wrapping_add)
}

/// A page that is being written to; keeps what its checksum will have to change by.
pub(crate) struct Change<'a> {
    page: &'a mut [u64; WORDS],
    sum: u64,
}

impl Change<'_> {
    pub(crate) fn get(&self, word: usize) -> u64 {
        self.page[word]
    }

    pub(crate) fn set(&mut self, word: usize, value: u64) {
        let difference = value.wrapping_sub(self.page[word]);
        self.sum = self.sum.wrapping_add(difference.wrapping_mul(FACTORS[word]));
        self.page[word] = value;
    }
}

/// Makes content.
pub(crate) struct Filler {
    fill: Fill,
    random: Random,
    vocabulary: Vec<Padded>,
    text: Vec<u8>,
}

/// A word with a space after it, and its length with that, in as many bytes as any of them needs: a fixed length is
/// copied without a call, and under emulation every instruction counts.
type Padded = ([u8; LONGEST_WORD], usize);
const LONGEST_WORD: usize = 16;

const VOCABULARY: &str = "the of and to in is that for it as was with be by on not he his but at are \
    this have from or had an they which one you were all her she there would their we him been has \
    when who will no more if out so up said what its about than into them can only other time new \
    some could these two may first then do any like my now over such our man me even most made \
    after also did many before must through years where much your way well down should because each \
    just those people how too little state good very make world still see own work long here get \
    both between life being under never day same another know while last might great year off come \
    since against go came right used take three himself few house use during without again place \
    around however home small found thought went say part once general high upon school every \
    connection memory record account customer transaction request response session index value key \
    table column string number address server process thread cache buffer segment network packet \
    error warning message status created updated deleted user group permission token version";

/// The words that texts are made of.
pub(crate) fn vocabulary() -> Vec<&'static [u8]> {
    VOCABULARY.split_whitespace().map(str::as_bytes).collect()
}

impl Filler {
    pub(crate) fn new(fill: Fill, seed: u64) -> Self {
        let padded = |word: &[u8]| {
            assert!(word.len() < LONGEST_WORD, "no room for a space after it");
            let mut bytes = [b' '; LONGEST_WORD];
            bytes[..word.len()].copy_from_slice(word);
            (bytes, word.len() + 1)
        };
        let vocabulary = vocabulary().into_iter().map(padded).collect();
        Filler { fill, random: Random::new(seed), vocabulary, text: Vec::new() }
    }

    pub(crate) fn fill(&mut self, words: &mut [u64]) {
        match self.fill {
            Fill::Zero => words.fill(0),
            Fill::Random => words.fill_with(|| self.random.next()),
            Fill::Text => self.fill_text(words),
        }
    }

    fn fill_text(&mut self, words: &mut [u64]) {
        let length = words.len() * 8;
        self.text.resize(length + LONGEST_WORD, 0);
        let mut at = 0;
        while at < length {
            let choice = self.random.below(self.vocabulary.len() as u64) as usize;
            let (bytes, its_length) = &self.vocabulary[choice];
            self.text[at..at + LONGEST_WORD].copy_from_slice(bytes);
            at += its_length;
        }
        for (word, bytes) in words.iter_mut().zip(self.text.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> WorkingSet {
        WorkingSet::filled(16, Fill::Text, 1).unwrap()
    }

    #[test]
    fn a_filled_and_written_set_is_right() {
        let mut set = set();
        for i in 0..16 {
            set.write(i, |page| {
                page.set(100, page.get(100) ^ 0xffff);
                page.set(511, 7);
            });
            assert_eq!(set.verify(i), Ok(()));
        }
    }

    #[test]
    fn one_changed_word_anywhere_is_found() {
        for word in 0..WORDS {
            let mut set = set();
            set.pages[3].0[word] ^= 1 << 63;
            assert!(set.verify(3).is_err(), "word {word}");
        }
    }

    #[test]
    fn an_old_page_and_a_page_of_another_place_are_found() {
        let mut set = set();
        let old = set.pages[3];
        set.write(3, |page| page.set(9, 1));
        let new = set.pages[3];
        set.pages[3] = old;
        assert!(set.verify(3).unwrap_err().contains("sequence 1 (of 2)"));
        set.pages[3] = new;
        assert_eq!(set.verify(3), Ok(()));
        set.pages[4] = new;
        assert!(set.verify(4).is_err());
    }

    #[test]
    fn text_looks_like_text() {
        let set = set();
        let bytes: Vec<u8> = set.pages[0].0[BODY..].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert!(bytes.iter().all(|b| b.is_ascii_lowercase() || *b == b' '));
    }
}
