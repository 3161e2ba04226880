//! What a migration, or a failed one, must not leave behind.

use std::collections::BTreeSet;
use std::path::Path;

/// Files and processes of farfault and of laboratories, at a moment.
#[derive(Clone, Debug)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Of now.
    pub fn take() -> Self {
        let mut found = BTreeSet::new();
        let temporary = std::env::temp_dir();
        for directory in ["/dev/shm", "/run/netns", "/run", "/var/tmp"].map(Path::new) {
            collect(directory, &mut found);
        }
        collect(&temporary, &mut found);
        // Journals of migrations that are not over.
        for entry in std::fs::read_dir("/var/lib/farfault").into_iter().flatten().flatten() {
            found.insert(entry.path().display().to_string());
        }
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let is_process = entry.file_name().to_string_lossy().parse::<u32>().is_ok();
            let command_line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<_> =
                command_line.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
            let program =
                words.first().map(|word| word.rsplit('/').next().unwrap_or("").to_owned());
            let ours = program.as_deref() == Some("farfault")
                || words.iter().any(|word| word.contains(crate::lab::PREFIX));
            if is_process && ours {
                let pid = entry.file_name().to_string_lossy().into_owned();
                found.insert(format!("process {pid}: {}", words.join(" ")));
            }
        }
        Snapshot(found)
    }

    /// What is there now and was not then.
    pub fn new_since(&self) -> Vec<String> {
        Snapshot::take().0.difference(&self.0).cloned().collect()
    }
}

fn collect(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // The lock of the laboratories stays.
        if name.starts_with("farfault") && !name.ends_with(".lock") {
            found.insert(entry.path().display().to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_made_since_is_found_and_a_removed_one_is_not() {
        let before = Snapshot::take();
        let path = Path::new("/dev/shm").join(format!("farfault-leftover-{}", std::process::id()));
        std::fs::write(&path, "x").unwrap();
        let found = before.new_since();
        std::fs::remove_file(&path).unwrap();
        assert!(found.contains(&path.display().to_string()), "{found:?}");
        assert!(!before.new_since().contains(&path.display().to_string()));
    }
}
