//! Buffers of messages, used again once nobody has the message any more. Without that each message would be
//! memory fresh from the kernel, which clears it page by page first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::Lane;

/// Buffers that are lent or kept for later, at most: what a fast link has on its way. Beyond these a message's
/// memory is no larger than the message, however small many of them are.
const MOST: usize = 64;

/// Buffers as large as messages of the push lane get. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers(Arc<Mutex<Shelf>>);

#[derive(Debug, Default)]
struct Shelf {
    kept: Vec<Vec<u8>>,
    /// Messages that are still somewhere.
    lent: usize,
}

impl Buffers {
    /// An empty one.
    pub(crate) fn take(&self) -> Vec<u8> {
        let mut shelf = self.shelf();
        if shelf.lent >= MOST {
            return Vec::new();
        }
        shelf.kept.pop().unwrap_or_else(|| Vec::with_capacity(Lane::Push.limit_bytes()))
    }

    /// A message, whose buffer comes back when it is dropped.
    pub(crate) fn message(&self, buffer: Vec<u8>) -> Bytes {
        self.message_until(buffer, || ())
    }

    /// The same, and `gone` is called then. Of one that is sent that is when the peer's transport has acknowledged all
    /// of it, or the link has ended.
    pub(crate) fn message_until(
        &self,
        buffer: Vec<u8>,
        gone: impl FnOnce() + Send + 'static,
    ) -> Bytes {
        self.shelf().lent += 1;
        Bytes::from_owner(Lent { buffer, home: self.clone(), gone: Some(Box::new(gone)) })
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Lent {
    buffer: Vec<u8>,
    home: Buffers,
    gone: Option<Box<dyn FnOnce() + Send>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(gone) = self.gone.take() {
            gone();
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut shelf = self.home.shelf();
        shelf.lent -= 1;
        if shelf.kept.len() < MOST && buffer.capacity() >= Lane::Push.limit_bytes() {
            buffer.clear();
            shelf.kept.push(buffer);
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
        let (gone, is_gone) = std::sync::mpsc::channel();
        let message = buffers.message_until(buffer, move || gone.send(()).unwrap());
        assert_eq!(&message[..], b"pages");
        let other = buffers.take();
        assert_ne!(other.as_ptr(), place, "the message still has it");
        let part = message.slice(1..3);
        drop(message);
        assert!(is_gone.try_recv().is_err(), "a part is left");
        drop(part);
        assert!(is_gone.try_recv().is_ok());
        let again = buffers.take();
        assert!(again.as_ptr() == place && again.is_empty());
        let messages: Vec<Bytes> = (0..MOST).map(|_| buffers.message(buffers.take())).collect();
        assert_eq!(buffers.take().capacity(), 0, "a message more takes what it needs");
        drop(messages);
        assert_eq!(buffers.shelf().kept.len(), MOST);
    }
}
