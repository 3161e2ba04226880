//! The ticket: all that the sender needs to find, recognise and convince one receiver, in one word.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ring::rand::{SecureRandom, SystemRandom};
use xxhash_rust::xxh3::xxh3_64;

use super::base32;

const PREFIX: &str = "farfault1-";
/// Addresses that a ticket may carry.
pub(super) const MAX_ADDRESSES: usize = 16;
/// A longer text than any ticket has; not worth decoding.
const MAX_TEXT: usize = 1024;
const CHECKSUM_BYTES: usize = 4;

/// Names one migration, in logs, journals and between the two hosts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MigrationId(pub [u8; 8]);

impl MigrationId {
    /// A fresh random one.
    pub(super) fn random() -> Self {
        MigrationId(random_bytes())
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MigrationId {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let mut bytes = [0; 8];
        if text.len() != 16 || !text.bytes().all(|letter| letter.is_ascii_hexdigit()) {
            return Err(TicketError::MigrationId);
        }
        for (byte, at) in bytes.iter_mut().zip((0..16).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).expect("hex digits");
        }
        Ok(MigrationId(bytes))
    }
}

/// Thirty-two bytes that nobody else may see; never printed.
#[derive(Clone)]
pub struct Secret(pub(super) [u8; 32]);

impl Secret {
    pub(super) fn random() -> Self {
        Secret(random_bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

/// Trust between one sender and one receiver, good for one migration.
///
/// Printed with `Display` it is the secret itself: show it only to the person who starts the sender.
#[derive(Clone, Debug)]
pub struct Ticket {
    /// Where the receiver listens, best first; 1 to 16.
    pub addresses: Vec<SocketAddr>,
    /// SHA-256 of the receiver's certificate (DER).
    pub certificate_sha256: [u8; 32],
    /// What the sender proves to know.
    pub secret: Secret,
    /// Which migration this is.
    pub migration: MigrationId,
}

/// Why a word is not a ticket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Another kind of word.
    #[error(
        "this is not a farfault ticket: it must begin with \"{PREFIX}\"; copy the line that `farfault receive` printed"
    )]
    Prefix,
    /// A character that no ticket contains.
    #[error(
        "the ticket has the character {0:?}, which no ticket contains; copy it again, without spaces or line breaks"
    )]
    Character(char),
    /// The checksum is wrong.
    #[error("the ticket has a typo or is cut short (its checksum is wrong); copy it again")]
    Checksum,
    /// The checksum is right, the content is not.
    #[error("the ticket is not well formed ({0}); was it made by another version of farfault?")]
    Content(&'static str),
    /// Not the text of a migration id.
    #[error("a migration id is 16 hexadecimal digits")]
    MigrationId,
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(self.migration.0);
        bytes.extend(self.certificate_sha256);
        bytes.extend(self.secret.0);
        for address in self.addresses.iter().take(MAX_ADDRESSES) {
            match address.ip() {
                IpAddr::V4(ip) => {
                    bytes.push(4);
                    bytes.extend(ip.octets());
                }
                IpAddr::V6(ip) => {
                    bytes.push(6);
                    bytes.extend(ip.octets());
                }
            }
            bytes.extend(address.port().to_be_bytes());
        }
        bytes.extend(checksum(&bytes));
        write!(f, "{PREFIX}{}", base32::encode(&bytes))
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let text = text.trim();
        let coded = match text.get(..PREFIX.len()) {
            Some(prefix) if prefix.eq_ignore_ascii_case(PREFIX) => &text[PREFIX.len()..],
            _ => return Err(TicketError::Prefix),
        };
        if coded.len() > MAX_TEXT {
            return Err(TicketError::Content("too long"));
        }
        let bytes = base32::decode(coded).map_err(TicketError::Character)?;
        let (content, sum) = bytes
            .split_at_checked(bytes.len().saturating_sub(CHECKSUM_BYTES))
            .ok_or(TicketError::Checksum)?;
        // A letter lost or changed at the very end may leave only the padding bits different.
        if sum != checksum(content) || base32::encode(&bytes) != coded.to_ascii_lowercase() {
            return Err(TicketError::Checksum);
        }
        parse(content)
    }
}

fn checksum(content: &[u8]) -> [u8; CHECKSUM_BYTES] {
    (xxh3_64(content) as u32).to_be_bytes()
}

fn parse(mut content: &[u8]) -> Result<Ticket, TicketError> {
    let migration = MigrationId(take(&mut content)?);
    let certificate_sha256 = take(&mut content)?;
    let secret = Secret(take(&mut content)?);
    let mut addresses = Vec::new();
    while !content.is_empty() {
        if addresses.len() == MAX_ADDRESSES {
            return Err(TicketError::Content("too many addresses"));
        }
        let ip = match take::<1>(&mut content)? {
            [4] => IpAddr::from(take::<4>(&mut content)?),
            [6] => IpAddr::from(take::<16>(&mut content)?),
            _ => return Err(TicketError::Content("unknown kind of address")),
        };
        addresses.push(SocketAddr::new(ip, u16::from_be_bytes(take(&mut content)?)));
    }
    if addresses.is_empty() {
        return Err(TicketError::Content("no address"));
    }
    Ok(Ticket { addresses, certificate_sha256, secret, migration })
}

fn take<const N: usize>(content: &mut &[u8]) -> Result<[u8; N], TicketError> {
    let (head, rest) = content.split_first_chunk().ok_or(TicketError::Content("too short"))?;
    *content = rest;
    Ok(*head)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ticket(addresses: &[&str]) -> Ticket {
        Ticket {
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            certificate_sha256: [7; 32],
            secret: Secret([9; 32]),
            migration: MigrationId([1, 2, 3, 4, 5, 6, 7, 0xff]),
        }
    }

    #[test]
    fn a_ticket_is_one_printable_word_and_comes_back() {
        let text = ticket(&["192.0.2.7:4433", "[2001:db8::1]:9"]).to_string();
        assert!(text.starts_with("farfault1-") && !text.contains(char::is_whitespace));
        for spelling in [text.clone(), text.to_uppercase(), format!(" {text}\n")] {
            let back: Ticket = spelling.parse().unwrap();
            assert_eq!(back.to_string(), text);
            assert_eq!(back.addresses[1].port(), 9);
            assert_eq!(back.migration.to_string(), "01020304050607ff");
        }
    }

    #[test]
    fn the_secret_is_not_in_debug_output() {
        let shown = format!("{:?}", ticket(&["192.0.2.7:1"]));
        assert!(shown.contains("Secret(..)") && !shown.contains("9, 9"), "{shown}");
    }

    #[test]
    fn each_kind_of_wrong_word_is_told_apart() {
        let text = ticket(&["192.0.2.7:4433"]).to_string();
        assert_eq!("hello".parse::<Ticket>().unwrap_err(), TicketError::Prefix);
        assert_eq!("farfault1-".parse::<Ticket>().unwrap_err(), TicketError::Checksum);
        let smudged = format!("{}!{}", &text[..40], &text[41..]);
        assert_eq!(smudged.parse::<Ticket>().unwrap_err(), TicketError::Character('!'));
        assert_eq!(text[..text.len() - 1].parse::<Ticket>().unwrap_err(), TicketError::Checksum);
        let none = ticket(&[]).to_string();
        assert_eq!(none.parse::<Ticket>().unwrap_err(), TicketError::Content("no address"));
    }

    #[test]
    fn a_migration_id_reads_what_it_prints() {
        let id = MigrationId::random();
        assert_eq!(id.to_string().parse::<MigrationId>().unwrap(), id);
        assert_eq!("xyz".parse::<MigrationId>().unwrap_err(), TicketError::MigrationId);
        assert_eq!(
            "é234567890123456".parse::<MigrationId>().unwrap_err(),
            TicketError::MigrationId
        );
    }

    proptest! {
        #[test]
        fn any_one_typo_is_noticed(at in 10usize..130, letter in 0u8..32) {
            let mut text = ticket(&["192.0.2.7:4433"]).to_string().into_bytes();
            let at = at.min(text.len() - 2);
            let typo = b"abcdefghijklmnopqrstuvwxyz234567"[letter as usize];
            prop_assume!(text[at] != typo);
            text[at] = typo;
            let text = String::from_utf8(text).unwrap();
            prop_assert_eq!(text.parse::<Ticket>().unwrap_err(), TicketError::Checksum);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "(farfault1-)?\\PC{0,200}") {
            let _ = text.parse::<Ticket>();
        }
    }
}
