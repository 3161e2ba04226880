//! Any bytes as page frames: parsing, checking, decoding.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::wire::fuzz::fuzz_frames(data);
});
