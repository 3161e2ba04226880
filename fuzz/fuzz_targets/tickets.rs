//! Any text as a ticket, and as the id of a migration.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::transport::fuzz::fuzz_tickets(data);
});
