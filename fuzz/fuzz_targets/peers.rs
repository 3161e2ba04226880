//! A peer that says anything to the machines of the handover, in any order.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::engine::fuzz::fuzz_peer(data);
});
