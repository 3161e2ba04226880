//! Names a process for good, also in a file that is read after it has ended.

use std::io;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::threads;
use crate::memory::MemoryError;

/// A process: its number, and when it began, since numbers are given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its number.
    pub pid: u32,
    /// In clock ticks after boot.
    pub start_ticks: u64,
}

impl ProcessIdentity {
    /// Of the process that has this number now.
    ///
    /// # Errors
    /// When there is none, or `/proc` cannot be read.
    pub fn of(pid: u32) -> Result<Self, MemoryError> {
        let stat = threads::read_stat(format!("/proc/{pid}/stat").into())?;
        Ok(ProcessIdentity { pid, start_ticks: stat.start_time })
    }

    /// This process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn own() -> Result<Self, MemoryError> {
        Self::of(std::process::id())
    }

    /// False once it has ended, also while its parent has not asked how. True when that cannot be seen, for want
    /// of a descriptor: what is taken for dead too early would be run, or sent, twice.
    pub fn lives(self) -> bool {
        self.is_seen_to_live().unwrap_or(true)
    }

    /// The same, when it matters that it is this process.
    ///
    /// # Errors
    /// When it cannot be seen.
    pub fn is_seen_to_live(self) -> Result<bool, MemoryError> {
        match threads::read_stat(format!("/proc/{}/stat", self.pid).into()) {
            Ok(stat) => Ok(stat.start_time == self.start_ticks && !"ZXx".contains(stat.state)),
            Err(MemoryError::Proc { source, .. }) if is_gone(&source) => Ok(false),
            Err(other) => Err(other),
        }
    }
}

/// It ended before its file was opened, or while that was read.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_cannot_be_seen_counts_as_living() {
        for (error, gone) in [
            (Errno::ENOENT, true),
            (Errno::ESRCH, true),
            (Errno::EMFILE, false),
            (Errno::ENOMEM, false),
            (Errno::EACCES, false),
        ] {
            assert_eq!(is_gone(&error.into()), gone, "{error}");
        }
    }

    #[test]
    fn a_process_lives_until_it_ends_and_another_with_its_number_is_not_it() {
        let me = ProcessIdentity::own().unwrap();
        assert!(me.lives());
        assert!(!ProcessIdentity { start_ticks: me.start_ticks + 1, ..me }.lives());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let sleeper = ProcessIdentity::of(child.id()).unwrap();
        assert!(sleeper.lives());
        child.kill().unwrap();
        // Not waited for: its entry in /proc is still there.
        while sleeper.lives() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!sleeper.lives());
    }
}
