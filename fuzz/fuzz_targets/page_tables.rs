//! Any bytes as the page table that an earlier process left behind.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::memory::fuzz::fuzz_page_tables(data);
});
