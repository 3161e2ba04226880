//! Entry points for fuzzing, shared by the tests here and the targets in `fuzz/`: what an operator pastes
//! as a ticket, and what strangers say before they are known. Each tells whether it was accepted.

use super::proof::{HELLO_BYTES, Hello, WELCOME_BYTES, Welcome};
use super::ticket::MAX_ADDRESSES;
use super::{MigrationId, Ticket, base32, error};

/// Reads `data` as a ticket and as a migration's id.
///
/// # Panics
/// When a word that was accepted is another one after it was printed and read again.
pub fn fuzz_tickets(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    if let Ok(bytes) = base32::decode(&text) {
        let again = base32::decode(&base32::encode(&bytes));
        assert_eq!(again.as_deref(), Ok(&bytes[..]));
    }
    let id = text.parse::<MigrationId>();
    if let Ok(id) = id {
        assert_eq!(id.to_string(), text.to_ascii_lowercase());
    }
    let ticket = text.parse::<Ticket>();
    if let Ok(ticket) = &ticket {
        assert!((1..=MAX_ADDRESSES).contains(&ticket.addresses.len()));
        assert_eq!(ticket.to_string(), text.trim().to_ascii_lowercase());
    }
    if let Err(error) = &ticket {
        assert!(!error.to_string().chars().any(char::is_control), "{error:?}");
    }
    id.is_ok() || ticket.is_ok()
}

/// Reads `data` as the first words of a connection, and as the reason with which a peer closes it.
///
/// # Panics
/// When a greeting that was accepted is another one after it was written again, or when a peer's reason
/// could do more to a terminal than be read.
pub fn fuzz_handshakes(data: &[u8]) -> bool {
    let reason = error::printable(data);
    assert!(!reason.chars().any(char::is_control) && reason.len() <= 4 * error::MAX_REASON_CHARS);
    if let Some(bytes) = data.first_chunk::<WELCOME_BYTES>() {
        assert_eq!(Welcome::decode(*bytes).encode(), *bytes);
    }
    let hello = data.first_chunk::<HELLO_BYTES>().and_then(Hello::decode);
    if let Some(hello) = &hello {
        assert_eq!(hello.encode()[..], data[..HELLO_BYTES]);
    }
    hello.is_some()
}

#[cfg(test)]
mod tests;
