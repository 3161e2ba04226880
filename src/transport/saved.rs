//! What one end keeps on disk, so that another process can go on with the session when this one is killed.
//!
//! Both hold secrets: they belong into files that only their owner can read, and are good for this one
//! migration, until it ends.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::proof::SessionKey;
use super::ticket::{MigrationId, Secret, Ticket};
use super::{Link, Listener, base32};

/// A sender's end of a session.
#[derive(Clone, Serialize, Deserialize)]
pub struct SavedSender {
    ticket: String,
    session: String,
}

/// A receiver's end of a session.
#[derive(Clone, Serialize, Deserialize)]
pub struct SavedReceiver {
    pub(super) listen: SocketAddr,
    migration: String,
    certificate: String,
    key: String,
    session: String,
}

/// What was saved cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved session is damaged: {0}")]
pub struct SavedError(&'static str);

impl SavedSender {
    /// Of a sender that `link` connects.
    pub fn of(ticket: &Ticket, link: &Link) -> Self {
        SavedSender { ticket: ticket.to_string(), session: base32::encode(&link.session_key().0.0) }
    }

    /// What [`reconnect`](super::reconnect) needs.
    ///
    /// # Errors
    /// [`SavedError`].
    pub fn open(&self) -> Result<(Ticket, SessionKey), SavedError> {
        let ticket = self.ticket.parse().map_err(|_| SavedError("ticket"))?;
        Ok((ticket, session(&self.session)?))
    }
}

impl SavedReceiver {
    /// Of a receiver that `link` connects.
    pub fn of(listener: &Listener, link: &Link) -> Self {
        let (identity, listen, migration) = listener.identity();
        SavedReceiver {
            listen,
            migration: migration.to_string(),
            certificate: base32::encode(&identity.certificate),
            key: base32::encode(&identity.key),
            session: base32::encode(&link.session_key().0.0),
        }
    }

    /// What [`Listener::accept_resumed`] needs.
    ///
    /// # Errors
    /// [`SavedError`].
    pub fn session(&self) -> Result<SessionKey, SavedError> {
        session(&self.session)
    }

    pub(super) fn identity(&self) -> Result<(Identity, MigrationId), SavedError> {
        let certificate = decode(&self.certificate, "certificate")?;
        let key = decode(&self.key, "key")?;
        let migration = self.migration.parse().map_err(|_| SavedError("migration"))?;
        Ok((Identity { certificate, key }, migration))
    }
}

impl std::fmt::Debug for SavedSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SavedSender(..)")
    }
}

impl std::fmt::Debug for SavedReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SavedReceiver").field("listen", &self.listen).finish_non_exhaustive()
    }
}

fn session(text: &str) -> Result<SessionKey, SavedError> {
    let bytes = decode(text, "session")?;
    Ok(SessionKey(Secret(bytes.try_into().map_err(|_| SavedError("session"))?)))
}

fn decode(text: &str, what: &'static str) -> Result<Vec<u8>, SavedError> {
    base32::decode(text).map_err(|_| SavedError(what))
}
