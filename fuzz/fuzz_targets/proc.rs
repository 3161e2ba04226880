//! Any text as what the kernel says of a process.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::memory::fuzz::fuzz_proc(data);
});
