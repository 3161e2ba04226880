//! Any bytes as each kind of message beside page frames.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::wire::fuzz::fuzz_messages(data);
});
