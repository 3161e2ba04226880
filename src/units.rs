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

/// A moment as people write it, in UTC: `2026-11-22 13:06:01 UTC`.
pub fn format_utc(unix_ms: u64) -> String {
    let (days, seconds) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400);
    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (seconds / 3600, seconds / 60 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02} UTC", seconds % 60)
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

    #[test]
    fn moments_are_those_of_the_calendar() {
        for (unix_ms, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400_000, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199_999, "2024-02-29 23:59:59 UTC"),
            (1_795_345_877_318, "2026-11-22 11:11:17 UTC"),
        ] {
            assert_eq!(format_utc(unix_ms), text);
        }
    }
}
