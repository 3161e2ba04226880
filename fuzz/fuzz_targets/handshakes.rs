//! Any bytes as the first words of a connection, and as the last.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::transport::fuzz::fuzz_handshakes(data);
});
