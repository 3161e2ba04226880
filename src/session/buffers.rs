//! Buffers of messages, used again once the link is done with them. Without that each message would be
//! memory fresh from the kernel, which clears it page by page first.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::transport::Lane;

/// Buffers that are kept for later, at most: what a fast link has on its way.
const KEPT: usize = 64;

/// Buffers as large as messages of bulk get. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// An empty one.
    pub(super) fn take(&self) -> Vec<u8> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| Vec::with_capacity(Lane::Push.limit_bytes()))
    }

    /// A message, whose buffer comes back when it is dropped.
    pub(super) fn message(&self, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { buffer, home: self.clone() })
    }
}

struct Lent {
    buffer: Vec<u8>,
    home: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let mut kept = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_when_its_message_is_gone_and_no_more_are_kept_than_are_of_use() {
        let buffers = Buffers::default();
        let mut buffer = buffers.take();
        buffer.extend_from_slice(b"pages");
        let place = buffer.as_ptr();
        let message = buffers.message(buffer);
        assert_eq!(&message[..], b"pages");
        let other = buffers.take();
        assert_ne!(other.as_ptr(), place, "the message still has it");
        drop(message.slice(1..3));
        drop(message);
        let again = buffers.take();
        assert!(again.as_ptr() == place && again.is_empty());
        let messages: Vec<Bytes> = (0..KEPT + 5).map(|_| buffers.message(buffers.take())).collect();
        drop(messages);
        assert_eq!(buffers.0.lock().unwrap().len(), KEPT);
    }
}
