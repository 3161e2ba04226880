//! The queue of pages to be asked for, from whoever finds that they are missing to the task that sends the requests.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use super::*;

/// A fault lane's request as it leaves the fault reader, and whether the page must come whole.
pub(super) type Asked = (Wanted, bool);

/// Where pages are put in.
///
/// Bounded by the guest: a page is put in once, once more after an outage, and again when it is overdue: that only
/// when nothing stands in the queue. Nobody may be there to take it, without a link and before the freeze.
#[derive(Clone)]
pub(super) struct AskSender {
    queue: mpsc::UnboundedSender<Asked>,
    standing: Arc<AtomicUsize>,
}

/// Where they are taken out.
pub(super) struct AskReceiver {
    queue: mpsc::UnboundedReceiver<Asked>,
    standing: Arc<AtomicUsize>,
}

pub(super) fn ask_queue() -> (AskSender, AskReceiver) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let standing = Arc::<AtomicUsize>::default();
    let sender = AskSender { queue: sender, standing: standing.clone() };
    (sender, AskReceiver { queue: receiver, standing })
}

impl AskSender {
    /// A queue whose other end is gone takes it too: the session is over.
    pub(super) fn send(&self, asked: Asked) {
        self.standing.fetch_add(1, Ordering::Relaxed);
        let _ = self.queue.send(asked);
    }

    /// True when all that was put in was taken.
    pub(super) fn is_empty(&self) -> bool {
        self.standing.load(Ordering::Relaxed) == 0
    }
}

impl AskReceiver {
    /// As [`mpsc::UnboundedReceiver::recv_many`].
    pub(super) async fn recv_many(&mut self, into: &mut Vec<Asked>, limit: usize) -> usize {
        let count = self.queue.recv_many(into, limit).await;
        self.standing.fetch_sub(count, Ordering::Relaxed);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_stands_in_the_queue_is_known() {
        let (sender, mut receiver) = ask_queue();
        assert!(sender.is_empty());
        for page in 0..3 {
            sender.send((Wanted { page: PageIndex(page), thread: 1 }, false));
        }
        let mut taken = Vec::new();
        assert_eq!(receiver.recv_many(&mut taken, 2).await, 2);
        assert!(!sender.clone().is_empty());
        assert_eq!(receiver.recv_many(&mut taken, 2).await, 1);
        assert!(sender.is_empty());
    }
}
