//! The lanes of a link: what travels apart from what, in which order of precedence, how large.

/// Slack over the payload for the framing of the layer above.
const FRAMING_BYTES: usize = 4 << 10;

/// Priority of the control stream, above all lanes.
pub(super) const CONTROL_PRIORITY: i32 = i32::MAX;
/// Tag of the stream on which a receiver tells how much of the push lane was consumed.
pub(super) const CREDIT_TAG: u8 = 0x43;

/// A kind of one-shot message. Each message is a QUIC stream of its own, so that a lost packet delays
/// only the message that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Lane {
    /// Pages that a guest waits for.
    FaultRequest = 1,
    /// The pages asked for, each by itself. Precedes everything but requests.
    FaultReply = 2,
    /// Bulk: goes where nothing else wants to, in order, and only as much as the link takes.
    Push = 3,
    /// The device state at the handover.
    State = 4,
    /// Pages likely to be wanted next, in the flight of a reply: ahead of bulk, behind all replies.
    Bundle = 5,
}

impl Lane {
    /// Every lane.
    pub const ALL: [Lane; 5] =
        [Lane::FaultRequest, Lane::FaultReply, Lane::Push, Lane::State, Lane::Bundle];

    pub(super) fn from_tag(tag: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|lane| *lane as u8 == tag)
    }

    /// The first byte of the lane's streams.
    pub(super) fn tag(self) -> &'static [u8] {
        match self {
            Lane::FaultRequest => &[Lane::FaultRequest as u8],
            Lane::FaultReply => &[Lane::FaultReply as u8],
            Lane::Push => &[Lane::Push as u8],
            Lane::State => &[Lane::State as u8],
            Lane::Bundle => &[Lane::Bundle as u8],
        }
    }

    pub(super) fn index(self) -> usize {
        self as usize - 1
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Lane::FaultRequest => "fault request",
            Lane::FaultReply => "fault reply",
            Lane::Push => "push",
            Lane::State => "device state",
            Lane::Bundle => "bundle",
        }
    }

    /// Largest message on this lane.
    pub const fn limit_bytes(self) -> usize {
        match self {
            Lane::FaultRequest => 64 << 10,
            Lane::FaultReply | Lane::Push => (256 << 10) + FRAMING_BYTES,
            Lane::State => (256 << 20) + FRAMING_BYTES,
            Lane::Bundle => (64 << 10) + FRAMING_BYTES,
        }
    }

    /// Priority of the lane's streams. Push streams take turns below it: see
    /// [`PushBudget`](super::push::PushBudget).
    pub(super) fn priority(self) -> i32 {
        match self {
            Lane::FaultRequest => CONTROL_PRIORITY - 1,
            Lane::FaultReply => CONTROL_PRIORITY - 2,
            Lane::State => CONTROL_PRIORITY - 3,
            Lane::Bundle => CONTROL_PRIORITY - 4,
            Lane::Push => 0,
        }
    }

    /// Messages of this lane that are put together at the same time, which with the limit per message
    /// bounds their memory.
    pub(super) fn max_in_assembly(self) -> usize {
        match self {
            Lane::FaultRequest => 256,
            Lane::FaultReply => 128,
            Lane::Push | Lane::Bundle => 512,
            Lane::State => 1,
        }
    }

    /// Complete messages that wait for their consumer. Those of the push lane are bounded in bytes, by
    /// credit.
    pub(super) fn queue_length(self) -> usize {
        match self {
            Lane::FaultRequest => 1024,
            Lane::FaultReply | Lane::Bundle => 128,
            Lane::Push => MAX_PUSH_STREAMS,
            Lane::State => 1,
        }
    }
}

/// What a push message costs of the window: its bytes, but never less than this, so that a window
/// bounds the number of messages too.
pub(super) const MIN_PUSH_COST_BYTES: u64 = 16 << 10;
/// Push streams at a time, whatever the window.
pub(super) const MAX_PUSH_STREAMS: usize = 4096;
/// Streams of the other lanes at a time.
const MAX_OTHER_STREAMS: usize = 2048;
/// Unidirectional streams that a peer may have open.
pub(super) const MAX_STREAMS: u32 = (MAX_PUSH_STREAMS + MAX_OTHER_STREAMS) as u32;
/// Largest push window: [`MAX_PUSH_STREAMS`] of it in messages of the smallest cost must fit the
/// stream limit.
pub(super) const MAX_PUSH_WINDOW_BYTES: u64 = MAX_PUSH_STREAMS as u64 * MIN_PUSH_COST_BYTES;

/// See [`MIN_PUSH_COST_BYTES`].
pub(super) fn push_cost_bytes(message_bytes: usize) -> u64 {
    (message_bytes as u64).max(MIN_PUSH_COST_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_precede_state_then_come_bundles_and_push_is_last() {
        let order = [Lane::FaultRequest, Lane::FaultReply, Lane::State, Lane::Bundle, Lane::Push];
        assert!(order.windows(2).all(|pair| pair[0].priority() > pair[1].priority()));
        assert!(CONTROL_PRIORITY > Lane::FaultRequest.priority());
    }

    #[test]
    fn a_tag_names_its_lane_and_no_other() {
        for tag in 0..=u8::MAX {
            assert_eq!(
                Lane::from_tag(tag).map(|lane| lane as u8),
                (1..=5).contains(&tag).then_some(tag)
            );
        }
        assert_eq!(Lane::from_tag(CREDIT_TAG), None);
    }
}
