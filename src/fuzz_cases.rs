//! Fuzz targets as ordinary tests. A target is a function that takes any bytes; `fuzz/` gives it those
//! that libFuzzer thinks of, and [`run`] a fixed number of changed seeds.
//!
//! The seeds of a target are what the code here writes today, and the files in `fuzz/seeds/<target>`:
//! those `seed-*` are the same, for libFuzzer to begin with; others are what it found. After a change of
//! format, write them anew: `FARFAULT_WRITE_SEEDS=1 cargo test --lib fuzz`.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;

/// Changed seeds that each target is given.
const CASES: u32 = 2_000;

/// Most bytes that changes may make of a seed.
const MAX_BYTES: usize = 1 << 20;

/// Gives `target` its seeds, of which it must accept every one, and changes of them, which it may refuse
/// but must survive.
pub(crate) fn run(name: &str, target: fn(&[u8]) -> bool, seeds: &[Vec<u8>]) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
    if std::env::var_os("FARFAULT_WRITE_SEEDS").is_some() {
        fs::create_dir_all(&directory).unwrap();
        for (number, seed) in seeds.iter().enumerate() {
            fs::write(directory.join(format!("seed-{number:02}")), seed).unwrap();
        }
    }
    let mut all = seeds.to_vec();
    let files = fs::read_dir(&directory);
    for file in files.unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
        let path = file.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let accepted = target(&bytes);
        let is_seed = path.file_name().unwrap().to_string_lossy().starts_with("seed-");
        assert!(accepted || !is_seed, "{} is not accepted: see {}", path.display(), file!());
        all.push(bytes);
    }
    for seed in seeds {
        assert!(target(seed), "{name} refuses a seed: {:?}", String::from_utf8_lossy(seed));
    }
    let changes = prop::collection::vec(any::<(u8, Index, Index, u8)>(), 0..6);
    let config = ProptestConfig { cases: CASES, source_file: Some(file!()), ..Default::default() };
    let outcome = TestRunner::new(config).run(&(any::<Index>(), changes), |(seed, changes)| {
        let mut bytes = seed.get(&all).clone();
        for change in changes {
            apply(&mut bytes, &all, change);
        }
        target(&bytes);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("fuzz target {name}: {error}");
    }
}

fn apply(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], (kind, at, other, value): (u8, Index, Index, u8)) {
    let place = at.index(bytes.len() + 1);
    match kind % 8 {
        0 => bytes.truncate(place),
        1 => bytes.insert(place, value),
        2 => bytes.extend_from_within(place..),
        // A number that is as large as numbers get.
        3 => drop(bytes.splice(place..place, [0xff; 9])),
        4 => drop(bytes.splice(place.., other.get(seeds).iter().copied())),
        5 if place < bytes.len() => drop(bytes.remove(place)),
        6 if place < bytes.len() => bytes[place] ^= 1 << (value % 8),
        _ if place < bytes.len() => bytes[place] = value,
        _ => {}
    }
    bytes.truncate(MAX_BYTES);
}
