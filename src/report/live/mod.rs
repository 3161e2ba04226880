//! A migration as it happens: what both sides and the link tell is gathered in a [`Live`], which can
//! be drawn on a terminal ([`picture`]) or told in a line.

mod history;
mod memory_map;
mod picture;
mod screen;

use std::time::Duration;

use super::{Progress, Role};
use crate::engine::MigrationPhase;
use crate::page::PAGE_SIZE_BYTES;
use crate::units::{format_bytes, format_rate};

pub use history::History;
pub use memory_map::{MapShape, MemoryMap, stages_by_cell};
pub use picture::draw;
pub use screen::Screen;

/// Where a whole demonstration stands: the migration's phases between two times of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Both sides are being started.
    Boot,
    /// The guest works at the source.
    Work,
    /// The two sides meet.
    Connect,
    /// Pages are sent while the guest works.
    Precopy,
    /// The guest stands still.
    Switchover,
    /// The guest works at the destination and its last pages follow.
    Postcopy,
    /// The guest works where it is now.
    WorkOn,
    /// It checks all its pages.
    Verify,
    /// All is over.
    Done,
}

impl Step {
    /// The steps that take time, in their order.
    pub const ALL: [Step; 8] = [
        Step::Boot,
        Step::Work,
        Step::Connect,
        Step::Precopy,
        Step::Switchover,
        Step::Postcopy,
        Step::WorkOn,
        Step::Verify,
    ];

    /// For a person.
    pub fn name(self) -> &'static str {
        match self {
            Step::Boot => "boot",
            Step::Work | Step::WorkOn => "work",
            Step::Connect => "connect",
            Step::Precopy => "pre-copy",
            Step::Switchover => "switchover",
            Step::Postcopy => "post-copy",
            Step::Verify => "verify",
            Step::Done => "done",
        }
    }

    fn of(phase: MigrationPhase) -> Option<Step> {
        match phase {
            MigrationPhase::Connect | MigrationPhase::Prepare => Some(Step::Connect),
            MigrationPhase::Precopy => Some(Step::Precopy),
            MigrationPhase::Freeze | MigrationPhase::Offer | MigrationPhase::Commit => {
                Some(Step::Switchover)
            }
            MigrationPhase::Postcopy => Some(Step::Postcopy),
            // What comes then is not the migration's.
            MigrationPhase::Done => None,
        }
    }
}

/// All that is known of a migration at this moment. Times count from the begin of the demonstration.
#[derive(Debug)]
pub struct Live {
    /// What is shown: guest, work, link.
    pub title: String,
    /// Where it stands.
    pub step: Step,
    /// The destination's memory.
    pub memory: MemoryMap,
    /// Operations of the guest, wherever it runs.
    pub guest: History,
    /// Bytes that the link has carried, both ways.
    pub link: History,
    /// What the link can carry one way.
    pub link_bytes_per_s: u64,
    /// The last word of the source.
    pub progress: Progress,
    /// Pages that the destination has asked for.
    pub remote_faults: u64,
    /// When the guest was stopped, and when it ran again.
    pub stopped: Option<Duration>,
    /// See [`Self::stopped`].
    pub ran_again: Option<Duration>,
}

impl Live {
    /// Nothing has happened yet.
    pub fn new(title: String, link_bytes_per_s: u64) -> Self {
        Live {
            title,
            step: Step::Boot,
            memory: MemoryMap::default(),
            guest: History::default(),
            link: History::default(),
            link_bytes_per_s,
            progress: Progress::default(),
            remote_faults: 0,
            stopped: None,
            ran_again: None,
        }
    }

    /// The source has entered a phase. True when that is another step.
    pub fn phase(&mut self, now: Duration, phase: MigrationPhase) -> bool {
        let step = Step::of(phase);
        if step == Some(Step::Switchover) {
            self.stopped.get_or_insert(now);
        } else if self.stopped.is_some() {
            self.ran_again.get_or_insert(now);
        }
        step.is_some_and(|step| self.enter(step))
    }

    /// True when it is another step.
    pub fn enter(&mut self, step: Step) -> bool {
        std::mem::replace(&mut self.step, step) != step
    }

    /// What a side tells of its progress.
    pub fn progress(&mut self, side: Role, progress: &Progress) {
        match side {
            Role::Source => self.progress.clone_from(progress),
            Role::Destination => self.remote_faults = progress.remote_faults,
        }
    }

    /// Pages that the destination lacks: before the switchover the source knows, then the destination.
    pub fn remaining_pages(&self) -> u64 {
        match self.ran_again {
            Some(_) => self.memory.absent + self.memory.stale,
            None => self.progress.remaining_pages,
        }
    }

    /// What the guest does now, in operations a second.
    pub fn guest_rate(&self) -> f64 {
        self.guest.rate_lately(Duration::from_millis(500))
    }

    /// What the link carries now, in bytes a second.
    pub fn link_rate(&self) -> f64 {
        self.link.rate_lately(Duration::from_millis(500))
    }

    /// The state in a line of plain text.
    pub fn line(&self, now: Duration) -> String {
        let (name, seconds) = (self.step.name(), now.as_secs_f64());
        let guest = format!("guest {:.0} ops/s", self.guest_rate());
        match self.step {
            Step::Precopy | Step::Switchover | Step::Postcopy => format!(
                "{seconds:5.1} s  {name:<10} {} left, {} on the wire, {}, {} faults, {guest}",
                format_bytes(self.remaining_pages() * PAGE_SIZE_BYTES as u64),
                format_bytes(self.link.last()),
                format_rate(self.link_rate()),
                self.remote_faults,
            ),
            _ => format!("{seconds:5.1} s  {name:<10} {guest}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_stands_still_from_the_freeze_to_the_next_phase() {
        let mut live = Live::new(String::new(), 1);
        let at = Duration::from_millis;
        assert!(live.phase(at(10), MigrationPhase::Prepare));
        assert!(live.phase(at(20), MigrationPhase::Precopy));
        assert!(live.phase(at(30), MigrationPhase::Freeze));
        assert!(!live.phase(at(40), MigrationPhase::Offer), "still the switchover");
        assert!(live.phase(at(50), MigrationPhase::Postcopy));
        assert!(!live.phase(at(60), MigrationPhase::Done));
        assert_eq!((live.stopped, live.ran_again), (Some(at(30)), Some(at(50))));
        assert_eq!(live.step, Step::Postcopy);
    }
}
