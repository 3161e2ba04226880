//! What the guest shall do, from `ff.*` words of the kernel's command line.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::memory::Fill;
use crate::work::Pattern;

/// All parameters, with their defaults.
pub(crate) struct Params {
    /// `ff.ws=256M`: memory that is filled, written and verified; of redis about what its data take.
    pub(crate) working_set_bytes: u64,
    /// `ff.pattern=sparse`: what is written or read; see [`Pattern`].
    pub(crate) pattern: Pattern,
    /// `ff.rate=2000`: operations a second, each on a page or a key; 0 for as fast as possible.
    pub(crate) rate: u64,
    /// `ff.verify=20000`: pages or keys a second that are verified, 0 for as fast as possible.
    pub(crate) verify_rate: u64,
    /// `ff.fill=text`: the first content; see [`Fill`].
    pub(crate) fill: Fill,
    /// `ff.seed=1`: of all that is random.
    pub(crate) seed: u64,
    /// `ff.hb=10`: milliseconds between heartbeats.
    pub(crate) heartbeat: Duration,
    /// `ff.io=1`: use the virtio network, disk and random devices all the time.
    pub(crate) io: bool,
    /// `ff.job=sqlite`: a program of the image that runs besides; see [`crate::job`].
    pub(crate) job: Option<String>,
    /// `ff.net=10.0.2.15,10.0.2.2`: own address (prefix 24) and that of the host, which is pinged and gets the
    /// stream. These defaults fit QEMU's user network.
    pub(crate) address: Ipv4Addr,
    pub(crate) host: Ipv4Addr,
}

pub(crate) const PAGE_BYTES: u64 = 4096;

impl Params {
    pub(crate) fn parse(command_line: &str) -> Result<Self, String> {
        let mut params = Params {
            working_set_bytes: 64 << 20,
            pattern: Pattern::Idle,
            rate: 1000,
            verify_rate: 0,
            fill: Fill::Text,
            seed: 1,
            heartbeat: Duration::from_millis(10),
            io: false,
            job: None,
            address: Ipv4Addr::new(10, 0, 2, 15),
            host: Ipv4Addr::new(10, 0, 2, 2),
        };
        let own = command_line.split_whitespace().filter_map(|word| word.strip_prefix("ff."));
        for word in own {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<u64>().map_err(|_| format!("ff.{word}: not a number"));
            match key {
                "ws" => params.working_set_bytes = bytes(value)?,
                "pattern" => params.pattern = value.parse()?,
                "rate" => params.rate = number()?,
                "verify" => params.verify_rate = number()?,
                "fill" => params.fill = value.parse()?,
                "seed" => params.seed = number()?,
                "hb" => params.heartbeat = Duration::from_millis(number()?.max(1)),
                "io" => params.io = number()? != 0,
                "job" => params.job = Some(value.to_owned()),
                "net" => {
                    let addresses = value
                        .split_once(',')
                        .and_then(|(own, host)| Some((own.parse().ok()?, host.parse().ok()?)));
                    (params.address, params.host) =
                        addresses.ok_or_else(|| format!("ff.{word}: not OWN,HOST addresses"))?;
                }
                _ => return Err(format!("ff.{key} is not a parameter")),
            }
        }
        if params.pages() < 16 {
            return Err("ff.ws: at least 64K".to_owned());
        }
        Ok(params)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.working_set_bytes / PAGE_BYTES
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return Err(format!("{text}: not a size like 256M")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text}: not a size like 256M"))?;
    number.checked_mul(scale).ok_or_else(|| format!("{text}: too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_words_are_taken_from_the_command_line_and_the_rest_is_left() {
        let params = Params::parse(
            "console=ttyS0 panic=-1 ff.ws=256M ff.pattern=hotcold ff.rate=4000 ff.io=1\n",
        )
        .unwrap();
        assert_eq!(params.pages(), 65_536);
        assert_eq!(params.pattern, Pattern::HotCold);
        assert_eq!((params.rate, params.io), (4000, true));
    }

    #[test]
    fn a_word_that_is_not_understood_is_an_error() {
        for line in ["ff.wss=1M", "ff.ws=1Q", "ff.pattern=wild", "ff.rate=fast", "ff.ws=1K"] {
            assert!(Params::parse(line).is_err(), "{line}");
        }
    }
}
