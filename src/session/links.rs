//! The links of one migration, one after another: what works on a link, when that has ended, and how
//! long there was none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::transport::{Link, LinkError, LinkStats};
use crate::wire::message::{MessageError, decode};

/// A link in the hands of a task or thread that works on it. The next link is not used before all of
/// these are dropped.
#[derive(Clone)]
pub(super) struct OnLink {
    pub(super) link: Link,
    /// Which of the migration's links.
    pub(super) number: u32,
    _work: mpsc::Sender<()>,
}

/// What comes on the control lane.
pub(super) enum Heard<M> {
    /// The peer's next message. The one behind it is only taken when the permit is dropped: when this one was
    /// dealt with.
    Message(Result<M, MessageError>, OwnedSemaphorePermit),
    /// The link is broken.
    End(LinkError),
}

impl OnLink {
    /// Gives `tell` what the peer says on the control lane, with the link's number, until the link ends or
    /// `tell` says that nobody listens any more.
    pub(super) async fn listen<M: DeserializeOwned>(self, tell: impl Fn(u32, Heard<M>) -> bool) {
        let turn = Arc::new(Semaphore::new(1));
        loop {
            let Ok(permit) = turn.clone().acquire_owned().await else { return };
            match self.link.control_recv().await {
                Ok(bytes) if tell(self.number, Heard::Message(decode(&bytes), permit)) => {}
                Ok(_) => return,
                Err(error) => {
                    tell(self.number, Heard::End(error));
                    return;
                }
            }
        }
    }
}

/// The current link, or the lack of one.
pub(super) struct Links {
    link: Link,
    number: u32,
    /// Tells when nobody works on the current link any more.
    work: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
    quiet: bool,
    /// Has come before the old one was quiet.
    next: Option<Link>,
    outage: Option<Outage>,
    /// Since when the current link is in use.
    since: Instant,
    reconnect_for: Duration,
    given_up: bool,
    /// Outages that were mended.
    reconnects: u32,
    /// Of the links before.
    carried: (u64, u64),
}

struct Outage {
    since: Instant,
    why: LinkError,
}

impl Links {
    /// The first link. An outage may last `reconnect_for`.
    pub(super) fn new(link: Link, reconnect_for: Duration) -> Self {
        Links {
            link,
            number: 0,
            work: Some(mpsc::channel(1)),
            quiet: false,
            next: None,
            outage: None,
            since: Instant::now(),
            reconnect_for,
            given_up: false,
            reconnects: 0,
            carried: (0, 0),
        }
    }

    /// The current link, or the last one.
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// The current link, to work on.
    pub(super) fn on_link(&self) -> Option<OnLink> {
        let (work, _) = self.work.as_ref()?;
        Some(OnLink { link: self.link.clone(), number: self.number, _work: work.clone() })
    }

    /// True for what comes from a link that is in use.
    pub(super) fn is_current(&self, number: u32) -> bool {
        self.work.is_some() && self.number == number
    }

    /// True when there is none.
    pub(super) fn is_down(&self) -> bool {
        self.work.is_none()
    }

    /// How long the current link, or the last one, has been in use.
    pub(super) fn in_use_for(&self) -> Duration {
        self.since.elapsed()
    }

    /// How long an outage may last.
    pub(super) fn reconnect_for(&self) -> Duration {
        self.reconnect_for
    }

    /// Mended outages.
    pub(super) fn reconnects(&self) -> u32 {
        self.reconnects
    }

    /// When to give up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let outage = self.outage.as_ref()?;
        outage.since.checked_add(self.reconnect_for)
    }

    /// No other link will be taken, and the outage is no outage any more. Says what was wrong.
    pub(super) fn give_up(&mut self) -> String {
        self.next = None;
        self.given_up = true;
        let why = self.outage.take().map_or(String::new(), |outage| outage.why.to_string());
        let limit_s = self.reconnect_for.as_secs_f64();
        format!("the other side could not be reached again within {limit_s} s: {why}")
    }

    /// The link is of no use any more. Gives the one to be awaited until nobody works on it, with its
    /// number; `None` when there was none.
    pub(super) fn lose(&mut self, why: LinkError) -> Option<(u32, mpsc::Receiver<()>)> {
        // All that holds the sender now are those who work on the link.
        let (_, quiet) = self.work.take()?;
        // Else the conversation is over: who waits for us to be found again would wait for nothing, and hears why when
        // the session closes the link.
        if why.is_mendable() {
            self.link.abandon();
        }
        self.quiet = false;
        self.next = None;
        self.outage.get_or_insert(Outage { since: Instant::now(), why });
        Some((self.number, quiet))
    }

    /// Nobody works on link `number` any more.
    pub(super) fn quiet(&mut self, number: u32) {
        self.quiet |= number == self.number;
    }

    /// Another one.
    pub(super) fn offer(&mut self, link: Link) {
        self.next = Some(link);
    }

    /// Takes the next link into use, when it is there and the old one quiet.
    pub(super) fn take_next(&mut self) -> bool {
        if !self.quiet || self.work.is_some() || self.given_up {
            return false;
        }
        let Some(link) = self.next.take() else { return false };
        let stats = self.link.stats();
        self.carried.0 += stats.sent_bytes;
        self.carried.1 += stats.received_bytes;
        self.link = link;
        self.number += 1;
        self.since = Instant::now();
        self.work = Some(mpsc::channel(1));
        true
    }

    /// Both sides have found together again. How long that took.
    pub(super) fn mended(&mut self) -> Option<Duration> {
        let outage = self.outage.take()?;
        self.reconnects += 1;
        Some(outage.since.elapsed())
    }

    /// As of the current link, with what all of them have carried.
    pub(super) fn stats(&self) -> LinkStats {
        let stats = self.link.stats();
        LinkStats {
            sent_bytes: stats.sent_bytes + self.carried.0,
            received_bytes: stats.received_bytes + self.carried.1,
            ..stats
        }
    }
}

/// Waits until then; for ever without.
pub(super) async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Waits until nobody works on a link that is lost.
pub(super) async fn until_quiet(mut quiet: mpsc::Receiver<()>) {
    while quiet.recv().await.is_some() {}
}

/// How long to wait between attempts to connect: twice as long each time, with jitter, so that two
/// sides that were cut together do not fall into step with whatever cuts them.
pub(super) struct Backoff {
    next: Duration,
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

impl Backoff {
    pub(super) fn new() -> Self {
        Backoff { next: FIRST_PAUSE }
    }

    /// From the begin of one attempt to that of the next. `random` is anything evenly spread.
    pub(super) fn pause(&mut self, random: u64) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(LONGEST_PAUSE);
        whole / 2 + (whole / 2).mul_f64((random % 1024) as f64 / 1023.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_limit_and_are_not_all_the_same() {
        let mut short = Backoff::new();
        let mut long = Backoff::new();
        for _ in 0..10 {
            let (least, most) = (short.pause(0), long.pause(1023));
            assert!(least >= FIRST_PAUSE / 2 && most <= LONGEST_PAUSE);
            assert_eq!(most, least * 2);
        }
        assert_eq!(long.pause(1023), LONGEST_PAUSE);
    }
}
