//! What a migration, or a failed one, must not leave behind.
//!
//! Everything in a laboratory has a place that is its own: its namespaces, its name in shared
//! memory, and the directories that farfault is given for its journal and its temporary files; page tables in shared
//! memory have the names of its migrations. So what other migrations on this machine do is not mistaken for a leftover.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;

/// Processes and files in a laboratory, at a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory(BTreeSet<String>);

impl Inventory {
    /// Of now.
    pub fn of(lab: &Lab) -> Result<Self> {
        let mut found = BTreeSet::new();
        for netns in [lab.a(), lab.b()] {
            for pid in netns.pids()? {
                let command_line =
                    std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let words = String::from_utf8_lossy(&command_line).replace('\0', " ");
                // One that has ended and waits to be reaped, by init perhaps, has no words.
                if !words.trim().is_empty() {
                    found.insert(format!("process {pid}: {words}"));
                }
            }
        }
        collect(Path::new("/dev/shm"), lab.name(), &mut found);
        for directory in [lab.state_directory(), lab.temporary_directory()] {
            collect(&directory, "", &mut found);
        }
        found.extend(lab.page_tables().found().iter().map(|path| path.display().to_string()));
        Ok(Inventory(found))
    }

    /// What is there now and was not then.
    pub fn new_since(&self, lab: &Lab) -> Result<Vec<String>> {
        Ok(Inventory::of(lab)?.0.difference(&self.0).cloned().collect())
    }
}

/// Drops a laboratory, and fails when anything is left of it.
pub fn nothing_is_left_after(lab: Lab) -> Result<()> {
    let (name, page_tables) = (lab.name().to_owned(), lab.page_tables().clone());
    drop(lab);
    let left = page_tables.found();
    ensure!(left.is_empty(), "left behind: {left:?}");
    nothing_is_left_of(&name)
}

/// Fails when anything is left that has the name of a laboratory, which has been dropped.
pub fn nothing_is_left_of(lab_name: &str) -> Result<()> {
    let mut found = BTreeSet::new();
    for directory in [Path::new("/dev/shm"), Path::new("/run/netns"), &std::env::temp_dir()] {
        collect(directory, lab_name, &mut found);
    }
    for entry in std::fs::read_dir("/proc").context("/proc")?.flatten() {
        let command_line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&command_line).replace('\0', " ");
        if words.contains(lab_name) {
            found.insert(format!("process {}: {words}", entry.file_name().display()));
        }
    }
    ensure!(found.is_empty(), "left behind: {found:?}");
    Ok(())
}

fn collect(directory: &Path, name_contains: &str, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(name_contains) {
            found.insert(entry.path().display().to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_shared_memory_is_a_leftover_until_it_is_removed() {
        let name = format!("leftover-test-{}", std::process::id());
        assert!(nothing_is_left_of(&name).is_ok());
        let path = Path::new("/dev/shm").join(&name);
        std::fs::write(&path, "x").unwrap();
        let found = nothing_is_left_of(&name);
        std::fs::remove_file(&path).unwrap();
        assert!(found.unwrap_err().to_string().contains(&name));
        assert!(nothing_is_left_of(&name).is_ok());
    }
}
