//! Entry point for fuzzing, shared by the tests here and the target in `fuzz/`: what people type.

use clap::Parser;

use super::Arguments;
use crate::codec::ladder::CodecChoice;
use crate::guest::workload::Workload;
use crate::lab::spec::{LinkSpec, QueueLimit, parse_time};
use crate::memory::TrackerKind;
use crate::units;

/// Most words of a command line that is tried.
const MAX_WORDS: usize = 40;

/// Reads `data` as a whole command line, and each of its words as each kind of quantity. Tells whether
/// the command line was accepted.
///
/// # Panics
/// When a link or a workload that was accepted is another one after it was printed and read again.
pub fn fuzz_words(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    for word in text.split_whitespace().take(MAX_WORDS) {
        let _ = units::parse_bytes(word).map(units::format_bytes);
        let _ = units::parse_rate(word).map(|rate| units::format_rate(rate as f64));
        let _ = (units::parse_duration(word), parse_time(word), word.parse::<QueueLimit>());
        let _ = (word.parse::<CodecChoice>(), word.parse::<TrackerKind>());
        if let Ok(link) = word.parse::<LinkSpec>() {
            let again: LinkSpec = link.to_string().parse().expect("what was printed is a link");
            assert_eq!((again.rate, again.round_trip), (link.rate, link.round_trip));
        }
        if let Ok(workload) = word.parse::<Workload>() {
            assert_eq!(workload.to_string().parse(), Ok(workload));
        }
    }
    let words = text.split_whitespace().take(MAX_WORDS);
    Arguments::try_parse_from(std::iter::once("farfault").chain(words)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_as_a_command_line() {
        let seeds = [
            "send --qmp a.sock --strategy hybrid --handover strict --downtime 300ms --bandwidth \
             100Mbit --precopy-rounds 7 --base-cache 512MiB --codec zstd:3/zstd-old:6 --tracker \
             hash-scan --quit-source --state-dir /tmp --json -",
            "receive --listen [::1]:7 --advertise 10.0.0.2:7 --paused --qemu-log l -- qemu -m 1G",
            "demo --link 100Mbit,40ms,0.1% --memory 64MiB --work sparse:2000/s --compare",
            "doctor",
        ];
        let seeds = seeds.map(|line| line.as_bytes().to_vec());
        crate::fuzz_cases::run("words", fuzz_words, &seeds);
    }
}
