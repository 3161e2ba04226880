//! What the codecs do to the memory of real guests, next to XBZRLE: size, and speed of one core.
//!
//! The pages are those in `target/corpus`, which `tools/build-guest-with redis`, `tools/build-guest-with python` and
//! `cargo run --release -p farfault-corpus` make, or in the directory that `FARFAULT_CORPORA` names: `NAME.full`
//! (pages), `NAME.old` and `NAME.new` (the same pages before and after a change), and `NAME.guest` (all pages of
//! the guest that are not zero, each content once), each a plain sequence of pages. Where there are none, the pages
//! are made up, and the tables say so.
//!
//! `cargo bench --bench codec` prints all tables; `cargo bench --bench codec -- zstd:1 scan` only the rows
//! whose name has one of the words in it. A speed is the best of up to `PASSES` passes over a whole corpus, in
//! bytes of pages whatever their coded size; of all corpora together it is all their bytes over the sum of the
//! times.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use farfault::codec::delta::{DeltaPacker, WordMask};
use farfault::codec::pack::Compressor;
use farfault::codec::{
    CodecChoice, DeltaCodec, Kin, KinFinder, LineFingerprint, PageCodec, SentLimits, SentPages,
    is_zero, xbzrle,
};
use farfault::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, Version};
use farfault::wire::limits::MAX_PAGES_PER_FRAME;
use farfault::wire::{DecodeScratch, DecodedPage, Frame, FrameEncoder, PageToSend};
use xxhash_rust::xxh3::xxh3_64;

/// Of which the best counts: other things run on the machine.
const PASSES: usize = 25;
/// Slow codecs get fewer.
const TIME_LIMIT: Duration = Duration::from_secs(2);
/// 64 MiB: more than the caches of most machines.
const SCAN_PAGES: usize = 16 << 10;
const MADE_UP_PAGES: usize = 4096;
const BASE: Version = Version(1);
const NOW: Version = Version(2);

const WHOLE: [&str; 13] = [
    "raw/off",
    "lz4/off",
    "zstd:-5/off",
    "zstd:-3/off",
    "zstd:-1/off",
    "zstd:1/off",
    "zstd:2/off",
    "zstd:3/off",
    "zstd:6/off",
    "zstd:9/off",
    "zstd:12/off",
    "zstd:15/off",
    "zstd:19/off",
];
const CHANGED: [&str; 17] = [
    "raw/xbzrle",
    "raw/plain",
    "lz4/lz4",
    "lz4/zstd-old:-1",
    "zstd:1/zstd:-3",
    "zstd:-1/zstd:-2",
    "zstd:-1/zstd:-1",
    "zstd:1/zstd:-1",
    "zstd:1/zstd:1",
    "zstd:3/zstd:3",
    "zstd:1/zstd-old:-3",
    "zstd:1/zstd-old:-1",
    "zstd:1/zstd-old:1",
    "zstd:3/zstd-old:3",
    "zstd:6/zstd-old:6",
    "zstd:9/zstd-old:9",
    "zstd:15/zstd-old:15",
];

/// In the order in which a guest's first copies go, where some are kin of others.
const GUESTS: [&str; 13] = [
    "lz4/off",
    "zstd:1/off",
    "zstd:3/off",
    "zstd:6/off",
    "zstd:9/off",
    "zstd-kin:2/off",
    "zstd-kin:3/off",
    "zstd-kin:5/off",
    "zstd-kin:6/off",
    "zstd-kin:7/off",
    "zstd-kin:9/off",
    "zstd-kin:16/off",
    "zstd-kin:18/off",
];

/// For replies to faults.
const WHOLE_SINGLE: [&str; 5] = ["raw/off", "lz4/off", "zstd:-3/off", "zstd:1/off", "zstd:3/off"];
const CHANGED_SINGLE: [&str; 4] =
    ["raw/plain", "lz4/zstd-old:-3", "zstd:1/zstd-old:1", "zstd:3/zstd-old:3"];

/// Pages and, for each of some of them, what it was and what it became.
struct Corpus {
    name: String,
    full: Vec<PageBytes>,
    old: Vec<PageBytes>,
    new: Vec<PageBytes>,
    guest: Vec<PageBytes>,
}

fn corpora() -> Vec<Corpus> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/corpus");
    let directory = std::env::var_os("FARFAULT_CORPORA").map_or_else(beside, PathBuf::from);
    let files = std::fs::read_dir(&directory).into_iter().flatten().flatten();
    let mut paths: Vec<_> = files.map(|file| file.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "full"));
    paths.sort();
    if paths.is_empty() {
        println!(
            "**There are no corpora in {}: these pages are made up, and tell nothing about real \
             guests.** To make them: see the head of benches/codec.rs.\n",
            directory.display()
        );
        return vec![made_up()];
    }
    let read = |path: PathBuf| {
        let pages = |extension: &str| {
            let path = path.with_extension(extension);
            let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            bytes.as_chunks::<PAGE_SIZE_BYTES>().0.to_vec()
        };
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let (full, guest) = (pages("full"), pages("guest"));
        let corpus = Corpus { name, full, old: pages("old"), new: pages("new"), guest };
        assert_eq!(corpus.old.len(), corpus.new.len(), "{}: pairs", corpus.name);
        corpus
    };
    paths.into_iter().map(read).collect()
}

/// Pages of words from a vocabulary; and later: in each, up to 16 words at random places have a new
/// value, mostly small.
fn made_up() -> Corpus {
    let mut random = fastrand::Rng::with_seed(1);
    let vocabulary: Vec<Vec<u8>> =
        (0..4000).map(|i| (0..2 + i % 9).map(|_| random.lowercase() as u8).collect()).collect();
    let mut full = vec![[b' '; PAGE_SIZE_BYTES]; MADE_UP_PAGES];
    for page in &mut full {
        let mut at = 0;
        while at < PAGE_SIZE_BYTES {
            // Half of the words come from the first hundred.
            let range = if random.bool() { 100 } else { vocabulary.len() };
            let word = &vocabulary[random.usize(..range)];
            let length = word.len().min(PAGE_SIZE_BYTES - at);
            page[at..at + length].copy_from_slice(&word[..length]);
            at += length + 1;
        }
    }
    let mut new = full.clone();
    for page in &mut new {
        for _ in 0..=random.usize(..16) {
            let at = random.usize(..PAGE_SIZE_BYTES / 8) * 8;
            page[at..at + 8].copy_from_slice(&random.u64(..1 << 20).to_le_bytes());
        }
    }
    Corpus { name: "made-up".to_owned(), old: full.clone(), new, guest: full.clone(), full }
}

/// The pairs that do not go whole: where at most three quarters of the words have changed.
fn changed_in_words(corpus: &Corpus) -> Corpus {
    let most = WordMask::UNITS_PER_PAGE * 3 / 4;
    let pairs = corpus.old.iter().zip(&corpus.new);
    let (old, new) = pairs.filter(|(old, new)| WordMask::between(old, new).count() <= most).unzip();
    Corpus { name: corpus.name.clone(), full: Vec::new(), old, new, guest: Vec::new() }
}

/// What became of a corpus, or of all.
#[derive(Clone, Copy, Default)]
struct Done {
    input_bytes: usize,
    coded_bytes: usize,
    encode_s: f64,
    decode_s: f64,
    bare_s: f64,
}

impl std::iter::Sum for Done {
    fn sum<I: Iterator<Item = Done>>(all: I) -> Done {
        all.fold(Done::default(), |a, b| Done {
            input_bytes: a.input_bytes + b.input_bytes,
            coded_bytes: a.coded_bytes + b.coded_bytes,
            encode_s: a.encode_s + b.encode_s,
            decode_s: a.decode_s + b.decode_s,
            bare_s: a.bare_s + b.bare_s,
        })
    }
}

impl Done {
    fn ratio(&self) -> f64 {
        self.coded_bytes as f64 / self.input_bytes as f64
    }

    fn gb_per_s(&self, seconds: f64) -> f64 {
        self.input_bytes as f64 / seconds / 1e9
    }
}

/// The shortest time of several passes, in seconds.
fn best(mut pass: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pass();
        best = best.min(start.elapsed().as_secs_f64());
        if begin.elapsed() > TIME_LIMIT {
            break;
        }
    }
    best
}

fn to_send<'a>(pages: &'a [PageBytes], bases: Option<&'a [PageBytes]>) -> Vec<PageToSend<'a>> {
    let pages = pages.iter().enumerate();
    let send = pages.map(|(i, bytes)| PageToSend {
        page: PageIndex(i as u64),
        bytes,
        base: bases.map(|bases| (BASE, &bases[i])),
    });
    send.collect()
}

/// Through the encoder that a migration has, frames, checks and all, and back.
fn through_frames(
    choice: CodecChoice,
    pages: &[PageBytes],
    bases: Option<&[PageBytes]>,
    together: usize,
) -> Done {
    let send = to_send(pages, bases);
    let (mut encoder, mut wire) = (FrameEncoder::new(choice), Vec::new());
    let encode_s = best(|| {
        wire.clear();
        for batch in send.chunks(together) {
            encoder.encode(NOW, batch, &Kin::default(), &mut wire);
        }
    });
    let mut scratch = DecodeScratch::default();
    let bases = bases.unwrap_or_default();
    let mut decode = |check: bool| {
        let mut rest = wire.as_slice();
        while !rest.is_empty() {
            let (frame, left) = Frame::parse(rest, u64::MAX).expect("our own frame");
            let decoded = frame.decode(&mut scratch, |_, base, into| {
                *into = bases[base.page.0 as usize];
                true
            });
            let decoded = decoded.expect("our own frame");
            if check {
                for (position, entry) in frame.pages().enumerate() {
                    if let DecodedPage::Bytes(bytes) = decoded.get(position) {
                        assert!(*bytes == pages[entry.page.0 as usize], "{choice}: another page");
                    }
                }
            }
            black_box(decoded);
            rest = left;
        }
    };
    decode(true);
    let decode_s = best(|| decode(false));
    Done {
        input_bytes: pages.len() * PAGE_SIZE_BYTES,
        coded_bytes: wire.len(),
        encode_s,
        decode_s,
        bare_s: bare(choice, pages, bases, together),
    }
}

/// As a first round does, with all that is remembered of it: once, since a guest is large.
fn through_first_round(choice: CodecChoice, pages: &[PageBytes]) -> Done {
    let limits = SentLimits { base_cache_bytes: 2 << 30, lines_bytes: 0 };
    let sent = SentPages::new(limits, pages.len() as u64);
    let (mut encoder, mut finder) = (FrameEncoder::new(choice), KinFinder::default());
    let (mut wire, with_kin) = (Vec::new(), matches!(choice.page, PageCodec::ZstdKin { .. }));
    let send = to_send(pages, None);
    let begin = Instant::now();
    for batch in send.chunks(MAX_PAGES_PER_FRAME) {
        finder.begin();
        for page in batch {
            match with_kin {
                true => finder.look_at(page.bytes),
                false => finder.pass_over(),
            }
        }
        let kin = finder.find(&sent, |_| true, |_, _| true);
        encoder.encode(NOW, batch, kin, &mut wire);
        for (position, page) in batch.iter().enumerate() {
            sent.remember(page.page, NOW, page.bytes, None, finder.anchors_of(position));
            finder.sent(page.page);
        }
    }
    let encode_s = begin.elapsed().as_secs_f64();
    let (mut scratch, mut rest) = (DecodeScratch::default(), wire.as_slice());
    let mut decode_s = 0.0;
    while !rest.is_empty() {
        let begin = Instant::now();
        let (frame, left) = Frame::parse(rest, u64::MAX).expect("our own frame");
        let decoded = frame.decode(&mut scratch, |_, base, into| {
            *into = pages[base.page.0 as usize];
            true
        });
        let decoded = decoded.expect("our own frame");
        decode_s += begin.elapsed().as_secs_f64();
        for (position, entry) in frame.pages().enumerate() {
            let right = DecodedPage::Bytes(&pages[entry.page.0 as usize]);
            assert!(decoded.get(position) == right, "{choice}: another page");
        }
        rest = left;
    }
    Done {
        input_bytes: pages.len() * PAGE_SIZE_BYTES,
        coded_bytes: wire.len(),
        encode_s,
        decode_s,
        bare_s: bare(choice, pages, &[], MAX_PAGES_PER_FRAME),
    }
}

/// The codec alone: no zero test, no checks, no frames.
fn bare(choice: CodecChoice, pages: &[PageBytes], bases: &[PageBytes], together: usize) -> f64 {
    let (mut compressor, mut coded) = (Compressor::default(), Vec::new());
    if bases.is_empty() {
        return best(|| {
            for batch in pages.chunks(together) {
                let how = choice.page.compression();
                black_box(compressor.pack(batch.as_flattened(), how, &mut coded));
            }
        });
    }
    let (mut packer, mut packed, mut old_words) =
        (DeltaPacker::<64, 8>::default(), Vec::new(), Vec::new());
    best(|| {
        let batches = pages.chunks(together).zip(bases.chunks(together));
        for (new, old) in batches {
            packer.clear();
            old_words.clear();
            for (new, old) in new.iter().zip(old) {
                let mask = WordMask::between(old, new);
                packer.push(&mask, new);
                if matches!(choice.delta, DeltaCodec::ZstdOld { .. }) {
                    mask.gather(old, &mut old_words);
                }
            }
            packer.finish(&mut packed);
            if let DeltaCodec::ZstdOld { level } = choice.delta {
                let (masks, words) = packed.split_at(new.len() * WordMask::BYTES);
                black_box(compressor.pack_with_old(masks, words, &old_words, level, &mut coded));
            } else {
                black_box(compressor.pack(&packed, choice.delta.compression(), &mut coded));
            }
        }
    })
}

/// As QEMU codes it: page by page, and whole where that is no shorter.
fn through_xbzrle(pages: &[PageBytes], bases: &[PageBytes]) -> Done {
    let mut coded: Vec<Option<Vec<u8>>> = Vec::new();
    let encode_s = best(|| {
        coded.clear();
        for (old, new) in bases.iter().zip(pages) {
            let mut one = Vec::with_capacity(PAGE_SIZE_BYTES + 4);
            let fits = xbzrle::encode(old, new, PAGE_SIZE_BYTES, &mut one);
            coded.push(fits.then_some(one));
        }
    });
    let decode_s = best(|| {
        for ((old, new), coded) in bases.iter().zip(pages).zip(&coded) {
            let mut page = *old;
            match coded {
                Some(coded) => drop(xbzrle::decode(coded, &mut page)),
                None => page = *new,
            }
            black_box(&page);
        }
    });
    Done {
        input_bytes: pages.len() * PAGE_SIZE_BYTES,
        coded_bytes: coded.iter().map(|one| one.as_ref().map_or(PAGE_SIZE_BYTES, Vec::len)).sum(),
        encode_s,
        decode_s,
        bare_s: encode_s,
    }
}

fn row(name: &str, each: &[Done], xbzrle: Option<&Done>) {
    let all: Done = each.iter().copied().sum();
    let speed = |done: &Done, seconds| {
        let gb_per_s = done.gb_per_s(seconds);
        format!("{gb_per_s:.digits$}", digits = if gb_per_s < 0.1 { 4 } else { 2 })
    };
    let ratios: Vec<_> = each.iter().map(|done| format!("{:.3}", done.ratio())).collect();
    let of_xbzrle = xbzrle.map_or(String::new(), |xbzrle| {
        format!(" {:.3} |", all.coded_bytes as f64 / xbzrle.coded_bytes as f64)
    });
    println!(
        "| {name} | {} | {:.3} |{of_xbzrle} {} | {} | {} |",
        ratios.join(" | "),
        all.ratio(),
        speed(&all, all.encode_s),
        speed(&all, all.bare_s),
        speed(&all, all.decode_s)
    );
}

fn head(what: &str, corpora: &[Corpus], xbzrle: bool) {
    let names: Vec<_> = corpora.iter().map(|corpus| corpus.name.as_str()).collect();
    let of_xbzrle = if xbzrle { " of XBZRLE |" } else { "" };
    println!(
        "| {what} | {} | all |{of_xbzrle} encode GB/s | bare codec GB/s | decode GB/s |",
        names.join(" | ")
    );
    println!("|{}", "---|".repeat(names.len() + 5 + usize::from(xbzrle)));
}

fn scans(wanted: &dyn Fn(&str) -> bool) {
    let mut random = fastrand::Rng::with_seed(2);
    let mut old = vec![[0u8; PAGE_SIZE_BYTES]; SCAN_PAGES];
    old.iter_mut().for_each(|page| random.fill(page));
    let mut new = old.clone();
    new.iter_mut().for_each(|page| page[random.usize(..PAGE_SIZE_BYTES)] ^= 1);
    let zeros = vec![[0u8; PAGE_SIZE_BYTES]; SCAN_PAGES];
    let print = LineFingerprint::of(&zeros[0]);
    let mut copy = zeros.clone();
    // Sums of eight words at a time are as fast as a core can read.
    let sum = |page: &PageBytes| {
        let (words, _) = page.as_chunks::<8>();
        words.iter().fold(0u64, |sum, word| sum.wrapping_add(u64::from_ne_bytes(*word)))
    };
    println!("| scan of one core | from memory, GB/s | from the cache, GB/s |\n|---|---|---|");
    let scan = |name: &str, pages: &mut dyn FnMut(usize)| {
        if wanted(name) {
            let (hot_pages, rounds) = (32, SCAN_PAGES / 32);
            let bytes = (SCAN_PAGES * PAGE_SIZE_BYTES) as f64 / 1e9;
            let cold = bytes / best(|| pages(SCAN_PAGES));
            let hot = bytes / best(|| (0..rounds).for_each(|_| pages(hot_pages)));
            println!("| {name} | {cold:.1} | {hot:.1} |");
        }
    };
    scan("scan: read memory (sum of words)", &mut |n| {
        black_box(old[..n].iter().fold(0u64, |all, page| all.wrapping_add(sum(black_box(page)))));
    });
    scan("scan: copy memory", &mut |n| copy[..n].copy_from_slice(black_box(&old[..n])));
    scan("scan: zero test", &mut |n| {
        black_box(zeros[..n].iter().filter(|page| is_zero(black_box(page))).count());
    });
    scan("scan: xxh3-64", &mut |n| {
        black_box(old[..n].iter().fold(0, |all, page| all ^ xxh3_64(black_box(page))));
    });
    scan("scan: changed-word mask", &mut |n| {
        let pairs = old[..n].iter().zip(&new[..n]);
        black_box(pairs.map(|(old, new)| WordMask::between(old, new).count()).sum::<usize>());
    });
    scan("scan: line fingerprints", &mut |n| {
        let equal = old[..n].iter().filter(|page| LineFingerprint::of(black_box(page)) == print);
        black_box(equal.count());
    });
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted =
        |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let corpora = corpora();

    let table = |what: &str, corpora: &[Corpus], names: &[&str], together: usize| {
        head(what, corpora, false);
        for name in names.iter().filter(|name| wanted(name)) {
            let choice = name.parse().expect("a codec choice");
            let code = |corpus: &Corpus| through_frames(choice, &corpus.full, None, together);
            row(name, &corpora.iter().map(code).collect::<Vec<_>>(), None);
        }
        println!();
    };
    let deltas = |what: &str, corpora: &[Corpus], names: &[&str], together: usize| {
        head(what, corpora, true);
        let xbzrle = |corpus: &Corpus| through_xbzrle(&corpus.new, &corpus.old);
        let xbzrle: Vec<_> = corpora.iter().map(xbzrle).collect();
        let of_xbzrle: Done = xbzrle.iter().copied().sum();
        row("XBZRLE", &xbzrle, Some(&of_xbzrle));
        for name in names.iter().filter(|name| wanted(name)) {
            let choice = name.parse().expect("a codec choice");
            let code = |c: &Corpus| through_frames(choice, &c.new, Some(&c.old), together);
            row(name, &corpora.iter().map(code).collect::<Vec<_>>(), Some(&of_xbzrle));
        }
        println!();
    };
    table("whole pages, 64 together", &corpora, &WHOLE, MAX_PAGES_PER_FRAME);
    head("whole guests, 64 pages together", &corpora, false);
    for name in GUESTS.iter().filter(|name| wanted(name)) {
        let choice = name.parse().expect("a codec choice");
        let code = |corpus: &Corpus| through_first_round(choice, &corpus.guest);
        row(name, &corpora.iter().map(code).collect::<Vec<_>>(), None);
    }
    println!();
    table("whole pages, one by one", &corpora, &WHOLE_SINGLE, 1);
    deltas("changed pages, 64 together", &corpora, &CHANGED, MAX_PAGES_PER_FRAME);
    let in_words: Vec<_> = corpora.iter().map(changed_in_words).collect();
    deltas("changed in words, 64 together", &in_words, &CHANGED, MAX_PAGES_PER_FRAME);
    deltas("changed in words, one by one", &in_words, &CHANGED_SINGLE, 1);
    scans(&wanted);
}
