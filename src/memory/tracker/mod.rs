//! Dirty tracking: which pages has the guest changed?

mod hash_scan;
mod huge;
mod pagemap;
mod reads;
mod touched;
mod write_protect;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use userfaultfd::{FeatureFlags, Uffd};

use super::{GuestMemory, HostCapabilities, MemoryError};
use crate::page::{PageBytes, PageIndex, PageRange, PageSet};

pub use hash_scan::HashScan;
use huge::HugeWriteProtect;
pub use write_protect::{TRACK_FEATURES, WriteProtect};

/// Follows a guest's writes.
pub trait DirtyTracker: Send {
    /// Its name, as [`TrackerKind`] spells it.
    fn name(&self) -> &'static str;

    /// From now on; called once, before the first read of any page.
    fn arm(&mut self) -> Result<(), MemoryError>;

    /// Adds to `into` every page of `range` whose content may have changed since it was last collected
    /// (or armed), and starts to watch those anew, before this returns: so who reads a page after
    /// this, and the guest writes to it again, gets it in the next collection. Changed pages beside `range` may be added
    /// too. That a page became a hole
    /// is certain to be reported only where the witness was told that the page was sent.
    fn collect(&mut self, range: PageRange, into: &mut PageSet) -> Result<(), MemoryError>;

    /// Where this gives a witness, it must be told of everything that is sent: see [`ReadWitness`].
    fn witness(&self) -> Option<Arc<dyn ReadWitness>> {
        None
    }

    /// False when a collection reads the guest's memory: then not oftener than it must be.
    fn is_quick(&self) -> bool {
        true
    }

    /// True when a change is found by the content alone, whoever made it and however.
    fn compares_content(&self) -> bool {
        false
    }

    /// Stops tracking and leaves the process as it was. Also done on drop.
    fn disarm(&mut self) -> Result<(), MemoryError>;
}

/// Who must know what the caller has sent of each page, to tell later whether the page is still so: one
/// may change, be read, and change back between two collections. May be told from any thread.
///
/// The caller reads a page of which this was told again only when it is to be sent again, whatever the
/// next collection says.
pub trait ReadWitness: Send + Sync {
    /// This copy of `page` is the one that is sent.
    fn saw(&self, page: PageIndex, copy: &PageBytes);

    /// These pages were holes, and are sent as zeros without having been read.
    fn saw_holes(&self, holes: PageRange);

    /// Those of `pages` that were no holes at the last collection, as far as that is known here.
    fn known_populated(&self, pages: &PageSet) -> PageSet {
        PageSet::empty(pages.pages())
    }
}

/// Which tracker to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrackerKind {
    /// Write protection where the kernel has it, otherwise the hash scan.
    #[default]
    Auto,
    /// Asynchronous write protection by userfaultfd, Linux 6.7.
    WriteProtect,
    /// Hashes of all pages, any kernel.
    HashScan,
}

const NAMES: [(TrackerKind, &str); 3] = [
    (TrackerKind::Auto, "auto"),
    (TrackerKind::WriteProtect, "write-protect"),
    (TrackerKind::HashScan, "hash-scan"),
];

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(kind, _)| kind == self).map_or("", |(_, name)| name);
        f.pad(name)
    }
}

/// No tracker has that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no dirty tracker {0:?}: auto, write-protect or hash-scan")]
pub struct UnknownTracker(String);

impl FromStr for TrackerKind {
    type Err = UnknownTracker;

    fn from_str(text: &str) -> Result<Self, UnknownTracker> {
        let found = NAMES.iter().find(|(_, name)| *name == text);
        found.map(|(kind, _)| *kind).ok_or_else(|| UnknownTracker(text.to_owned()))
    }
}

/// Makes the tracker for a guest whose process `pid` has its RAM regions mapped at `addresses`, in
/// layout order. `uffd` gives a userfaultfd of that process with the features asked for; it is
/// called at most once, and not at all for a hash scan.
///
/// # Errors
/// With [`TrackerKind::WriteProtect`] what stands in its way. [`TrackerKind::Auto`] falls back to the
/// hash scan instead, with a warning when the kernel would have been able.
pub fn open_tracker(
    kind: TrackerKind,
    memory: Arc<GuestMemory>,
    pid: u32,
    addresses: &[u64],
    uffd: impl FnOnce(FeatureFlags) -> Result<Uffd, MemoryError>,
) -> Result<Box<dyn DirtyTracker>, MemoryError> {
    let able = HostCapabilities::can_write_protect();
    let write_protect = |memory: &Arc<GuestMemory>| -> Result<Box<dyn DirtyTracker>, MemoryError> {
        let largest = memory.unit_pages().max().unwrap_or(1);
        if largest > huge::HUGE_PAGES {
            let feature = "write tracking in pages of more than 2 MiB".to_owned();
            return Err(MemoryError::MissingFeature { feature });
        }
        let (memory, uffd) = (Arc::clone(memory), uffd(TRACK_FEATURES)?);
        Ok(match largest {
            1 => Box::new(WriteProtect::new(memory, pid, addresses, uffd)?),
            _ => Box::new(HugeWriteProtect::new(memory, pid, addresses, uffd)?),
        })
    };
    match kind {
        TrackerKind::WriteProtect if !able => {
            Err(MemoryError::MissingFeature { feature: "asynchronous write tracking".to_owned() })
        }
        TrackerKind::WriteProtect => write_protect(&memory),
        TrackerKind::Auto if able => match write_protect(&memory) {
            Ok(tracker) => Ok(tracker),
            Err(error) => {
                tracing::warn!(%error, "no write tracking in the guest's process: scanning hashes");
                Ok(Box::new(HashScan::new(memory)))
            }
        },
        TrackerKind::Auto | TrackerKind::HashScan => Ok(Box::new(HashScan::new(memory))),
    }
}

#[cfg(test)]
mod tests;
