//! A connection that is closed, and why is said, unless somebody keeps it.

use quinn::Connection;

use super::error::code;

/// Closes its connection when dropped. QUIC by itself would give no reason, which the peer could not tell from a refusal.
pub(super) struct CloseUnlessKept {
    connection: Connection,
    /// `None`: it is kept.
    close: Option<(u32, &'static str)>,
}

impl CloseUnlessKept {
    /// Closed with this number (see [`close_code`](super::error::close_code)) and reason.
    pub(super) fn new(connection: Connection, close: (u32, &'static str)) -> Self {
        CloseUnlessKept { connection, close: Some(close) }
    }

    pub(super) fn keep(mut self) {
        self.close = None;
    }

    /// Closes it now, with another reason.
    pub(super) fn close(mut self, close: (u32, &'static str)) {
        self.close = Some(close);
    }
}

impl Drop for CloseUnlessKept {
    fn drop(&mut self) {
        if let Some((number, reason)) = self.close {
            self.connection.close(code(number), reason.as_bytes());
        }
    }
}
