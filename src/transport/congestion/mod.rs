//! Congestion control, one algorithm a file, behind [`quinn::congestion::Controller`].
//!
//! A migration wants two things from a link at once: all of its bandwidth for the push of pages, and
//! a short queue, because every page fault of the resumed guest travels behind that queue. The
//! loss-based controllers that come with quinn fill whatever buffer the path has and collapse under
//! random loss, so the default here is [`DelayTarget`], which regulates the queueing delay itself.

mod calm;
mod cut;
mod delay_target;
mod fixed;
mod gauges;
mod patience;
#[cfg(test)]
mod simulation;
mod trains;

use std::sync::Arc;

use quinn::congestion::ControllerFactory;

pub use delay_target::{DelayTarget, DelayTargetConfig};
pub use fixed::{Fixed, FixedConfig};
pub(crate) use gauges::Gauges;

/// Which congestion controller a connection uses.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Congestion {
    /// Holds a small queueing delay: see [`DelayTarget`].
    #[default]
    DelayTarget,
    /// A constant number of bytes in flight, for experiments on a link that is known.
    Fixed {
        /// The window, in bytes.
        window_bytes: u64,
    },
}

impl Congestion {
    pub(crate) fn factory(
        &self,
        gauges: Arc<Gauges>,
    ) -> Arc<dyn ControllerFactory + Send + Sync + 'static> {
        match self {
            Congestion::DelayTarget => {
                Arc::new(DelayTargetConfig { gauges, ..DelayTargetConfig::default() })
            }
            Congestion::Fixed { window_bytes } => {
                Arc::new(FixedConfig { window_bytes: *window_bytes, gauges })
            }
        }
    }
}
