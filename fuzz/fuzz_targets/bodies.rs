//! Any bytes as the body of a frame, past the checksum that keeps nearly all of them out.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::wire::fuzz::fuzz_bodies(data);
});
