//! How fast this host's time-stamp counter runs. A guest under emulation sees that counter too.

#![allow(unsafe_code)]

use std::arch::x86_64::_rdtsc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Long enough for an error below one in a thousand when the host is busy.
const MEASURED_OVER: Duration = Duration::from_millis(100);

/// The counter's rate in kHz, measured once.
///
/// A guest measures it itself against its timers, which fails on a busy host: QEMU's machine
/// `microvm` has no timer but one that needs interrupts in time. A kernel that fails there hangs
/// while it boots.
pub(crate) fn khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (since, first) = (Instant::now(), ticks());
        std::thread::sleep(MEASURED_OVER);
        let (time, last) = (since.elapsed(), ticks());
        ((last - first) as f64 / time.as_secs_f64() / 1e3).round() as u64
    })
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and it only reads a counter.
    unsafe { _rdtsc() }
}
