//! How the sender proves that it holds the ticket, bound to one TLS channel.
//!
//! The proof is `HMAC-SHA256(secret, kind | migration | exporter)`, where `exporter` is keying material
//! of this very TLS session (RFC 8446, 7.5). It is worthless on any other connection, so it cannot be
//! relayed or replayed. The receiver is authenticated before, by its certificate.

use std::fmt;

use quinn::Connection;
use ring::hmac;

use super::ticket::{MigrationId, Secret};

/// Bytes of a [`Hello`] on the wire.
pub(super) const HELLO_BYTES: usize = 1 + 8 + 8 + 32;
/// Bytes of a [`Welcome`] on the wire.
pub(super) const WELCOME_BYTES: usize = 8;

/// What the sender claims to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Claim {
    /// The ticket, unused.
    Ticket = 1,
    /// The key of a session that was authenticated before.
    Session = 2,
    /// That of a link that lives: one more connection for its bulk.
    Bulk = 3,
}

/// Shared by the two ends of one authenticated connection, and by nobody else: proves on a later
/// connection that it continues the same migration.
#[derive(Clone)]
pub struct SessionKey(pub(super) Secret);

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey(..)")
    }
}

/// First message of a sender.
#[derive(Clone, Copy)]
pub(super) struct Hello {
    pub(super) claim: Claim,
    pub(super) migration: MigrationId,
    /// Push data that the speaker takes in before it is consumed.
    pub(super) push_window_bytes: u64,
    proof: [u8; 32],
}

impl Hello {
    pub(super) fn new(
        claim: Claim,
        migration: MigrationId,
        push_window_bytes: u64,
        secret: &Secret,
        connection: &Connection,
    ) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret.0);
        let tag = hmac::sign(&key, &statement(claim, migration, connection));
        let proof = tag.as_ref().try_into().expect("HMAC-SHA256 has 32 bytes");
        Hello { claim, migration, push_window_bytes, proof }
    }

    /// In constant time.
    pub(super) fn proves(&self, secret: &Secret, connection: &Connection) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret.0);
        hmac::verify(&key, &statement(self.claim, self.migration, connection), &self.proof).is_ok()
    }

    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0] = self.claim as u8;
        bytes[1..9].copy_from_slice(&self.migration.0);
        bytes[9..17].copy_from_slice(&self.push_window_bytes.to_be_bytes());
        bytes[17..].copy_from_slice(&self.proof);
        bytes
    }

    /// `None` for a claim that is not known.
    pub(super) fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let claim = match bytes[0] {
            1 => Claim::Ticket,
            2 => Claim::Session,
            3 => Claim::Bulk,
            _ => return None,
        };
        Some(Hello {
            claim,
            migration: MigrationId(bytes[1..9].try_into().expect("8 bytes")),
            push_window_bytes: u64::from_be_bytes(bytes[9..17].try_into().expect("8 bytes")),
            proof: bytes[17..].try_into().expect("32 bytes"),
        })
    }
}

/// The receiver's answer.
#[derive(Clone, Copy)]
pub(super) struct Welcome {
    pub(super) push_window_bytes: u64,
}

impl Welcome {
    pub(super) fn encode(self) -> [u8; WELCOME_BYTES] {
        self.push_window_bytes.to_be_bytes()
    }

    pub(super) fn decode(bytes: [u8; WELCOME_BYTES]) -> Self {
        Welcome { push_window_bytes: u64::from_be_bytes(bytes) }
    }
}

/// The key of the session that begins with this connection: of the ticket's secret and of this TLS
/// session, so that neither alone gives it.
pub(super) fn session_key(secret: &Secret, connection: &Connection) -> SessionKey {
    let key = hmac::Key::new(hmac::HMAC_SHA256, &secret.0);
    let tag = hmac::sign(&key, &exporter(connection, b"EXPORTER-farfault-session"));
    SessionKey(Secret(tag.as_ref().try_into().expect("HMAC-SHA256 has 32 bytes")))
}

/// The key that adds connections to the link whose main connection this is.
pub(super) fn bulk_key(connection: &Connection) -> Secret {
    Secret(exporter(connection, b"EXPORTER-farfault-bulk"))
}

fn statement(claim: Claim, migration: MigrationId, connection: &Connection) -> Vec<u8> {
    let mut statement = vec![claim as u8];
    statement.extend(migration.0);
    statement.extend(exporter(connection, b"EXPORTER-farfault-proof"));
    statement
}

fn exporter(connection: &Connection, label: &[u8]) -> [u8; 32] {
    let mut material = [0; 32];
    connection
        .export_keying_material(&mut material, label, b"")
        .expect("32 bytes are within what TLS 1.3 exports");
    material
}
