//! Speed of each codec, next to XBZRLE. Throughput is in bytes of pages, whatever the coded size, which
//! is in each name.
//!
//! The pages are made up (text-like content, and sparse changes of it), and, where the environment variable
//! `FARFAULT_CORPORA` names a directory, those in its files: `NAME.full` (pages), `NAME.old` and `NAME.new`
//! (the same pages before and after a change), each a plain sequence of pages.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use farfault::codec::delta::WordMask;
use farfault::codec::{LineFingerprint, is_zero, xbzrle};
use farfault::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, Version};
use farfault::wire::limits::MAX_PAGES_PER_FRAME;
use farfault::wire::{DecodeScratch, Frame, FrameEncoder, PageToSend};
use xxhash_rust::xxh3::xxh3_64;

/// 16 MiB: more than the second-level cache of any machine.
const PAGES: usize = 4096;
const BASE: Version = Version(1);
const NOW: Version = Version(2);

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

/// Pages of words from a vocabulary of 4,000, which compress about as guest memory does.
fn text_pages() -> Vec<PageBytes> {
    let mut random = Random(1);
    let mut letters = |length: usize| -> Vec<u8> {
        (0..length).map(|_| b"etaoinshrdlucmfwypvbgkjqxz"[random.below(26)]).collect()
    };
    let vocabulary: Vec<Vec<u8>> = (0..4000).map(|i| letters(2 + i % 9)).collect();
    let mut random = Random(2);
    let mut pages = vec![[b' '; PAGE_SIZE_BYTES]; PAGES];
    for page in &mut pages {
        let mut at = 0;
        while at < PAGE_SIZE_BYTES {
            // Half of the words come from the first hundred.
            let range = if random.below(2) == 0 { 100 } else { vocabulary.len() };
            let word = &vocabulary[random.below(range)];
            let length = word.len().min(PAGE_SIZE_BYTES - at);
            page[at..at + length].copy_from_slice(&word[..length]);
            at += length + 1;
        }
    }
    pages
}

/// The same pages later: in each, up to 16 words at random places have a new value, mostly small.
fn changed(pages: &[PageBytes]) -> Vec<PageBytes> {
    let mut random = Random(3);
    let mut pages = pages.to_vec();
    for page in &mut pages {
        for _ in 0..=random.below(16) {
            let word = random.below(PAGE_SIZE_BYTES / 8) * 8;
            let value = (random.below(1 << 20) as u64).to_le_bytes();
            page[word..word + 8].copy_from_slice(&value);
        }
    }
    pages
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

fn encode_all(encoder: &mut FrameEncoder, pages: &[PageToSend<'_>], out: &mut Vec<u8>) {
    out.clear();
    for batch in pages.chunks(MAX_PAGES_PER_FRAME) {
        encoder.encode(NOW, batch, out);
    }
}

fn decode_all(wire: &[u8], bases: &[PageBytes], scratch: &mut DecodeScratch) {
    let mut rest = wire;
    while !rest.is_empty() {
        let (frame, left) = Frame::parse(rest, u64::MAX).expect("our own frame");
        let decoded = frame.decode(scratch, |_, base, into| {
            *into = bases[base.page.0 as usize];
            true
        });
        black_box(decoded.expect("our own frame"));
        rest = left;
    }
}

/// Pages and, for each of some of them, what it was and what it became.
struct Corpus {
    name: String,
    full: Vec<PageBytes>,
    old: Vec<PageBytes>,
    new: Vec<PageBytes>,
}

fn corpora() -> Vec<Corpus> {
    let full = text_pages();
    let mut corpora =
        vec![Corpus { name: "made-up".to_owned(), old: full.clone(), new: changed(&full), full }];
    let Some(directory) = std::env::var_os("FARFAULT_CORPORA") else { return corpora };
    let files = std::fs::read_dir(&directory).expect("FARFAULT_CORPORA is a directory");
    let mut paths: Vec<_> = files.map(|file| file.expect("a readable directory").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "full"));
    paths.sort();
    corpora.extend(paths.into_iter().map(|path| {
        let pages = |extension: &str| {
            let bytes = std::fs::read(path.with_extension(extension)).expect("a readable corpus");
            bytes.as_chunks::<PAGE_SIZE_BYTES>().0.to_vec()
        };
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Corpus { name, full: pages("full"), old: pages("old"), new: pages("new") }
    }));
    corpora
}

fn codecs(criterion: &mut Criterion) {
    for corpus in corpora() {
        let Corpus { name, full, old, new } = &corpus;
        let mut group = criterion.benchmark_group(name.as_str());
        let whole = ["raw/off", "lz4/off", "zstd:1/off", "zstd:3/off", "zstd:6/off"];
        let delta =
            ["raw/plain", "lz4/lz4", "zstd:1/zstd:1", "zstd:1/zstd-old:1", "zstd:3/zstd-old:3"];
        let cases = whole
            .map(|choice| ("whole", choice, to_send(full, None)))
            .into_iter()
            .chain(delta.map(|choice| ("changed", choice, to_send(new, Some(old)))));
        for (kind, choice, pages) in cases {
            let mut encoder = FrameEncoder::new(choice.parse().expect("a codec choice"));
            let mut wire = Vec::new();
            encode_all(&mut encoder, &pages, &mut wire);
            group.throughput(Throughput::Bytes((pages.len() * PAGE_SIZE_BYTES) as u64));
            let id = |step| {
                let size = format!("{} bytes a page", wire.len() / pages.len());
                BenchmarkId::new(format!("{kind} {choice} {step}"), size)
            };
            let (encode, decode) = (id("encode"), id("decode"));
            let mut scratch = DecodeScratch::default();
            group.bench_function(decode, |bench| {
                bench.iter(|| decode_all(&wire, old, &mut scratch));
            });
            group.bench_function(encode, |bench| {
                bench.iter(|| encode_all(&mut encoder, &pages, &mut wire));
            });
        }
        let mut coded = Vec::new();
        let mut encode_xbzrle = || {
            let sizes = old.iter().zip(new).map(|(old, new)| {
                let fits = xbzrle::encode(old, new, PAGE_SIZE_BYTES, &mut coded);
                if fits { coded.len() } else { PAGE_SIZE_BYTES }
            });
            sizes.sum::<usize>() / old.len()
        };
        let size = format!("{} bytes a page", encode_xbzrle());
        group.throughput(Throughput::Bytes((old.len() * PAGE_SIZE_BYTES) as u64));
        group.bench_function(BenchmarkId::new("changed XBZRLE encode", size), |bench| {
            bench.iter(&mut encode_xbzrle);
        });
        group.finish();
    }
}

fn scans(criterion: &mut Criterion) {
    let old = text_pages();
    let new = changed(&old);
    let zeros = vec![[0u8; PAGE_SIZE_BYTES]; PAGES];
    let mut group = criterion.benchmark_group("scan");
    group.throughput(Throughput::Bytes((PAGES * PAGE_SIZE_BYTES) as u64));
    group.bench_function("zero test", |bench| {
        bench.iter(|| zeros.iter().filter(|page| is_zero(black_box(page))).count());
    });
    group.bench_function("xxh3-64", |bench| {
        bench.iter(|| old.iter().fold(0, |all, page| all ^ xxh3_64(black_box(page))));
    });
    group.bench_function("changed-word mask", |bench| {
        let pairs = || old.iter().zip(&new);
        bench.iter(|| pairs().map(|(old, new)| WordMask::between(old, new).count()).sum::<usize>());
    });
    let print = LineFingerprint::of(&zeros[0]);
    group.bench_function("line fingerprints", |bench| {
        bench.iter(|| {
            old.iter().filter(|page| black_box(LineFingerprint::of(page)) == print).count()
        });
    });
    // What the machine can do at all: read one buffer, write another.
    let mut copy = zeros.clone();
    group.bench_function("memory copy", |bench| {
        bench.iter(|| copy.copy_from_slice(black_box(&old)));
    });
    group.finish();
}

fn quick() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! { name = benches; config = quick(); targets = codecs, scans }
criterion_main!(benches);
