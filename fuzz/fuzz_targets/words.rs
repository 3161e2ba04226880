//! Any text as a command line, and each word as a quantity.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::cli::fuzz::fuzz_words(data);
});
