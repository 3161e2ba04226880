//! Links as people write them: `100Mbit`, `40ms`, `0.1%`, and all of it as `100Mbit,40ms,0.1%`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Why a description of a link was not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    what: &'static str,
    given: String,
    example: &'static str,
}

impl SpecError {
    fn new(what: &'static str, given: &str, example: &'static str) -> Self {
        SpecError { what, given: given.to_owned(), example }
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not {}; write it like {}", self.given, self.what, self.example)
    }
}

impl std::error::Error for SpecError {}

/// Splits `12.5Mbit` into its number and its unit.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..split].parse().ok()?;
    number.is_finite().then_some((number, text[split..].trim()))
}

/// How fast a link serialises, in bits per second: at least 1 kbit/s, at most 1 Tbit/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(u64);

impl Rate {
    const MIN_BITS_PER_S: u64 = 1_000;
    const MAX_BITS_PER_S: u64 = 1_000_000_000_000;

    /// A rate in bits per second; `None` outside of the range above.
    pub fn from_bits_per_s(bits_per_s: u64) -> Option<Self> {
        (Self::MIN_BITS_PER_S..=Self::MAX_BITS_PER_S)
            .contains(&bits_per_s)
            .then_some(Rate(bits_per_s))
    }

    /// Bits per second.
    pub fn bits_per_s(self) -> u64 {
        self.0
    }

    /// Bytes that cross in `time`, rounded down.
    pub fn bytes_in(self, time: Duration) -> u64 {
        (u128::from(self.0) * time.as_nanos() / 8_000_000_000) as u64
    }
}

impl FromStr for Rate {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError::new("a rate from 1kbit to 1Tbit a second", text, "100Mbit");
        let (number, unit) = number_and_unit(text).ok_or_else(error)?;
        let scale = match unit.to_ascii_lowercase().trim_end_matches("/s") {
            "bit" => 1.0,
            "kbit" => 1e3,
            "mbit" => 1e6,
            "gbit" => 1e9,
            "tbit" => 1e12,
            _ => return Err(error()),
        };
        Rate::from_bits_per_s((number * scale).round() as u64).ok_or_else(error)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (scale, unit) in [(1_000_000_000, "Gbit"), (1_000_000, "Mbit"), (1_000, "kbit")] {
            if self.0.is_multiple_of(scale) {
                return write!(f, "{}{unit}", self.0 / scale);
            }
        }
        write!(f, "{}bit", self.0)
    }
}

/// The probability that a packet is lost on the way, independent of all others.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Loss(f64);

impl Loss {
    /// No packet is lost.
    pub const NONE: Loss = Loss(0.0);

    /// A probability; `None` outside of `0.0..=1.0`.
    pub fn from_probability(probability: f64) -> Option<Self> {
        (0.0..=1.0).contains(&probability).then_some(Loss(probability))
    }

    /// Between 0.0 and 1.0.
    pub fn probability(self) -> f64 {
        self.0
    }
}

impl FromStr for Loss {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError::new("a share of packets from 0% to 100%", text, "0.1%");
        match number_and_unit(text).ok_or_else(error)? {
            (number, "%") => Loss::from_probability(number / 100.0).ok_or_else(error),
            (0.0, "") => Ok(Loss::NONE),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0 * 100.0)
    }
}

/// Reads a time like `40ms`, `0.5ms`, `250us` or `1s`: at most an hour.
pub fn parse_time(text: &str) -> Result<Duration, SpecError> {
    let error = || SpecError::new("a time of at most an hour", text, "40ms");
    let (number, unit) = number_and_unit(text).ok_or_else(error)?;
    let scale = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "" if number == 0.0 => 1.0,
        _ => return Err(error()),
    };
    let seconds = number * scale;
    if seconds > 3600.0 {
        return Err(error());
    }
    Ok(Duration::from_nanos((seconds * 1e9).round() as u64))
}

/// How many bytes may wait in front of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueLimit {
    /// The bandwidth-delay product: what the link carries in one round trip.
    Bdp(u32),
    /// So many bytes.
    Bytes(u64),
}

impl QueueLimit {
    /// The smallest queue: one full packet, so that every link can carry something.
    pub const MIN_BYTES: u64 = 1500;

    /// The limit in bytes on a link of this rate and *round-trip* time.
    pub fn bytes(self, rate: Rate, round_trip: Duration) -> u64 {
        let wanted = match self {
            QueueLimit::Bdp(times) => rate.bytes_in(round_trip).saturating_mul(u64::from(times)),
            QueueLimit::Bytes(bytes) => bytes,
        };
        wanted.max(Self::MIN_BYTES)
    }
}

impl FromStr for QueueLimit {
    type Err = SpecError;

    /// `bdp`, `10bdp`, or bytes: `500000`, `64KiB`, `1MiB`.
    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError::new("a queue length", text, "bdp, 10bdp or 64KiB");
        if text.trim() == "bdp" {
            return Ok(QueueLimit::Bdp(1));
        }
        let (number, unit) = number_and_unit(text).ok_or_else(error)?;
        let scale = match unit {
            "bdp" if number.fract() == 0.0 && (1.0..=1000.0).contains(&number) => {
                return Ok(QueueLimit::Bdp(number as u32));
            }
            "" | "B" => 1.0,
            "KiB" => 1024.0,
            "MiB" => 1024.0 * 1024.0,
            _ => return Err(error()),
        };
        let bytes = number * scale;
        (bytes <= 1e12).then_some(QueueLimit::Bytes(bytes as u64)).ok_or_else(error)
    }
}

/// A whole link, the same in both directions: `RATE,ROUND_TRIP[,LOSS]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkSpec {
    /// Of each direction.
    pub rate: Rate,
    /// There and back again, without queues.
    pub round_trip: Duration,
    /// In each direction.
    pub loss: Loss,
}

impl FromStr for LinkSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let parts: Vec<&str> = text.split(',').collect();
        let (rate, round_trip, loss) = match parts[..] {
            [rate, time] => (rate, time, Loss::NONE),
            [rate, time, loss] => (rate, time, loss.parse()?),
            _ => return Err(SpecError::new("a link", text, "100Mbit,40ms or 100Mbit,40ms,0.1%")),
        };
        Ok(LinkSpec { rate: rate.parse()?, round_trip: parse_time(round_trip)?, loss })
    }
}

impl fmt::Display for LinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}ms", self.rate, self.round_trip.as_nanos() as f64 / 1e6)?;
        if self.loss == Loss::NONE { Ok(()) } else { write!(f, ",{}", self.loss) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn links_are_read_as_people_write_them() {
        let link: LinkSpec = "100Mbit,40ms,0.1%".parse().unwrap();
        assert_eq!(link.rate.bits_per_s(), 100_000_000);
        assert_eq!(link.round_trip, Duration::from_millis(40));
        assert!((link.loss.probability() - 0.001).abs() < 1e-12);
        let link: LinkSpec = "2.5Gbit/s, 0.5ms".parse().unwrap();
        assert_eq!(link.rate.bits_per_s(), 2_500_000_000);
        assert_eq!(link.round_trip, Duration::from_micros(500));
        assert_eq!(link.loss, Loss::NONE);
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        for text in
            ["", "100Mbit", "fast,40ms", "0bit,1ms", "100Mbit,40", "1Mbit,1ms,101%", "1Mbit,2h"]
        {
            let error = text.parse::<LinkSpec>().unwrap_err().to_string();
            assert!(error.contains("write it like"), "{text}: {error}");
        }
    }

    #[test]
    fn a_queue_of_one_bdp_holds_one_round_trip() {
        let rate: Rate = "100Mbit".parse().unwrap();
        let round_trip = Duration::from_millis(40);
        assert_eq!("bdp".parse::<QueueLimit>().unwrap().bytes(rate, round_trip), 500_000);
        assert_eq!("10bdp".parse::<QueueLimit>().unwrap().bytes(rate, round_trip), 5_000_000);
        assert_eq!("64KiB".parse::<QueueLimit>().unwrap().bytes(rate, round_trip), 65_536);
        assert_eq!("bdp".parse::<QueueLimit>().unwrap().bytes(rate, Duration::ZERO), 1500);
    }

    proptest! {
        #[test]
        fn a_rate_that_is_printed_can_be_read_again(bits in 1_000u64..=1_000_000_000_000) {
            let rate = Rate::from_bits_per_s(bits).unwrap();
            prop_assert_eq!(rate.to_string().parse::<Rate>(), Ok(rate));
        }

        #[test]
        fn a_link_that_is_printed_can_be_read_again(kbit in 1u64..1_000_000, us in 0u64..10_000_000) {
            let rate = Rate::from_bits_per_s(kbit * 1000).unwrap();
            let loss = Loss::from_probability(0.25).unwrap();
            let link = LinkSpec { rate, round_trip: Duration::from_micros(us), loss };
            prop_assert_eq!(link.to_string().parse::<LinkSpec>(), Ok(link));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,40}") {
            let _ = text.parse::<LinkSpec>();
            let _ = text.parse::<QueueLimit>();
        }
    }
}
