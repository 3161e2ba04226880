//! The link: an ordered control lane each way, and lanes of messages that arrive in any order. When it
//! breaks, any part of what is on its way is lost, and each side learns of it at a time of its own.

use std::collections::VecDeque;

use crate::page::{PageIndex, PageSet, Version};
use crate::wire::message::{ToDestination, ToSource};

/// What a page is to become.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageSent {
    pub(super) page: PageIndex,
    /// Sent as a delta against this version, which had this content.
    pub(super) base: Option<(Version, u32)>,
    pub(super) content: u32,
}

/// A push message or a fault reply.
#[derive(Clone, Debug)]
pub(super) struct PageMessage {
    pub(super) version: Version,
    pub(super) pages: Vec<PageSent>,
}

#[derive(Clone, Debug)]
pub(super) struct FlightSent {
    pub(super) version: Version,
    pub(super) need: PageSet,
    pub(super) zero: PageSet,
}

/// How a side sees the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    Up,
    /// It was told that the link is down.
    Down,
    /// A new link is there, and it was not told yet.
    Coming,
    /// It has given up, or is gone.
    Over,
}

#[derive(Debug)]
pub(super) struct Network {
    /// What is sent now arrives.
    pub(super) carries: bool,
    pub(super) at_source: View,
    pub(super) at_destination: View,
    pub(super) to_destination: VecDeque<ToDestination>,
    pub(super) to_source: VecDeque<ToSource>,
    pub(super) flight: Option<FlightSent>,
    /// Pushed pages and fault replies.
    pub(super) pages: Vec<PageMessage>,
    /// Fault requests: the page, and whether it must come whole.
    pub(super) requests: Vec<(PageIndex, bool)>,
}

impl Network {
    pub(super) fn new() -> Self {
        Network {
            carries: true,
            at_source: View::Up,
            at_destination: View::Up,
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            flight: None,
            pages: Vec::new(),
            requests: Vec::new(),
        }
    }

    /// The link breaks: of each lane any part has arrived before, in order where it is ordered.
    pub(super) fn cut(&mut self, rng: &mut fastrand::Rng) {
        self.carries = false;
        self.to_destination.truncate(rng.usize(0..=self.to_destination.len()));
        self.to_source.truncate(rng.usize(0..=self.to_source.len()));
        self.flight = self.flight.take().filter(|_| rng.bool());
        self.pages.retain(|_| rng.bool());
        self.requests.retain(|_| rng.bool());
    }

    /// The source hears nothing more of the old link.
    pub(super) fn deafen_source(&mut self) {
        self.to_source.clear();
        self.requests.clear();
    }

    /// The destination hears nothing more of the old link.
    pub(super) fn deafen_destination(&mut self) {
        self.to_destination.clear();
        self.flight = None;
        self.pages.clear();
    }

    /// The source's process has ended, and another one knows nothing of its link.
    pub(super) fn lose_source(&mut self) {
        self.carries = false;
        self.at_source = View::Down;
        self.deafen_source();
    }

    /// The same at the destination.
    pub(super) fn lose_destination(&mut self) {
        self.carries = false;
        self.at_destination = View::Down;
        self.deafen_destination();
    }

    /// Messages on their way.
    pub(super) fn len(&self) -> usize {
        self.to_destination.len()
            + self.to_source.len()
            + usize::from(self.flight.is_some())
            + self.pages.len()
            + self.requests.len()
    }
}
