//! Sizes, rates and times as people write them: `512MiB`, `100Mbit`, `40ms`.

use std::time::Duration;

/// A quantity that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not {what}; write it like {example}")]
pub struct UnitError {
    text: String,
    what: &'static str,
    example: &'static str,
}

fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    Some((number, text[end..].trim()))
}

/// Bytes: `4096`, `512MiB`, `512M`, `8G`. All units are powers of 1024, as QEMU has them.
pub fn parse_bytes(text: &str) -> Result<u64, UnitError> {
    let error = || UnitError { text: text.to_owned(), what: "a size", example: "512MiB or 2G" };
    let (number, unit) = split(text).ok_or_else(error)?;
    let shift = match unit.to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(error()),
    };
    let bytes = number * (1u64 << shift) as f64;
    (bytes < 2f64.powi(60)).then_some(bytes as u64).ok_or_else(error)
}

/// A link rate, in bytes per second: `100Mbit`, `1Gbit`, `25Mbit/s`. Bits, in powers of 1000.
pub fn parse_rate(text: &str) -> Result<u64, UnitError> {
    let error = || UnitError { text: text.to_owned(), what: "a rate", example: "100Mbit or 1Gbit" };
    let (number, unit) = split(text).ok_or_else(error)?;
    let unit = unit.to_ascii_lowercase();
    let factor = match unit.trim_end_matches("/s").trim_end_matches("ps") {
        "bit" => 1.0,
        "kbit" => 1e3,
        "mbit" => 1e6,
        "gbit" => 1e9,
        _ => return Err(error()),
    };
    let bytes_per_s = number * factor / 8.0;
    (1.0..1e15).contains(&bytes_per_s).then_some(bytes_per_s as u64).ok_or_else(error)
}

/// A time: `300ms`, `40us`, `2s`, `5min`.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let error = || UnitError { text: text.to_owned(), what: "a time", example: "300ms or 2s" };
    let (number, unit) = split(text).ok_or_else(error)?;
    let seconds = match unit.to_ascii_lowercase().as_str() {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        "min" | "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(error()),
    };
    (seconds < 1e9).then(|| Duration::from_secs_f64(seconds)).ok_or_else(error)
}

/// Bytes for a person: `1.4 GiB`.
pub fn format_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// A rate for a person: `93.4 Mbit/s`.
pub fn format_rate(bytes_per_s: f64) -> String {
    let bits = bytes_per_s * 8.0;
    if bits >= 1e9 {
        format!("{:.2} Gbit/s", bits / 1e9)
    } else if bits >= 1e6 {
        format!("{:.1} Mbit/s", bits / 1e6)
    } else {
        format!("{:.1} kbit/s", bits / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("512MiB"), Ok(512 << 20));
        assert_eq!(parse_bytes("1.5g"), Ok(3 << 29));
        assert_eq!(parse_bytes("2 TB"), Ok(2 << 40));
        assert_eq!(parse_rate("100Mbit"), Ok(12_500_000));
        assert_eq!(parse_rate("2.5 Gbit/s"), Ok(312_500_000));
        assert_eq!(parse_duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
    }

    #[test]
    fn says_what_it_wanted_when_it_cannot_read() {
        for bad in ["", "fast", "10", "10Mb", "-3Mbit", "0Mbit"] {
            assert!(parse_rate(bad).unwrap_err().to_string().contains("100Mbit"), "{bad}");
        }
        assert!(parse_bytes("12 parsecs").is_err());
        assert!(parse_bytes("99999999T").is_err());
        assert!(parse_duration("300").is_err(), "a time without a unit is a guess");
    }
}
