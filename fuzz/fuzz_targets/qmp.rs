//! Any bytes as all that is said on a QMP socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    farfault::guest::qemu::fuzz::fuzz_qmp(data);
});
