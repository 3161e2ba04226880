//! Counters that the session's threads share.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec::CodecCounts;

/// What has happened so far, on one side.
#[derive(Debug, Default)]
pub struct Counters {
    codecs: Mutex<CodecCounts>,
    /// Pages whose content went (source) or came (destination).
    pub pages: AtomicU64,
    /// Pages that the destination does not have yet, as far as this side knows.
    pub remaining_pages: AtomicU64,
    /// Fault requests answered (source) or sent (destination).
    pub remote_faults: AtomicU64,
    /// Pages that went in the pusher's order, after the switchover (source).
    pub pushed_pages: AtomicU64,
    /// Pages that went along with the replies to faults (source).
    pub bundled_pages: AtomicU64,
    /// Pages that went since a thread waited for another one of the same huge page (source).
    pub unit_pages: AtomicU64,
    /// Duplicates that were put off from the first round to the second (source).
    pub put_off_pages: AtomicU64,
    /// Hot pages that the last round has left to the freeze (source).
    pub held_back_pages: AtomicU64,
    /// Pages that came a second time and were dropped (destination).
    pub duplicate_pages: AtomicU64,
    /// The most memory that this process was seen to take for itself.
    pub peak_rss_bytes: AtomicU64,
}

impl Counters {
    /// Adds what some frames held.
    pub fn add_frames(&self, counts: &CodecCounts) {
        self.pages.fetch_add(counts.total_pages(), Ordering::Relaxed);
        let mut codecs = self.codecs.lock().expect("no holder panics");
        for (codec, pages, bytes) in counts.used() {
            codecs.add(codec, pages, bytes);
        }
    }

    /// Looks how much memory this process takes for itself now.
    pub fn note_own_memory(&self) {
        let now = super::memory::own_memory_bytes().unwrap_or(0);
        self.peak_rss_bytes.fetch_max(now, Ordering::Relaxed);
    }

    /// Pages and bytes by codec so far.
    pub fn codecs(&self) -> CodecCounts {
        *self.codecs.lock().expect("no holder panics")
    }
}
