//! Names a process for good, also in a file that is read after it has ended.

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

    /// False once it has ended, also while its parent has not asked how.
    pub fn lives(self) -> bool {
        let stat = threads::read_stat(format!("/proc/{}/stat", self.pid).into());
        stat.is_ok_and(|s| s.start_time == self.start_ticks && !"ZXx".contains(s.state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
