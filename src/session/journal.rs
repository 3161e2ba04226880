//! What a side must not forget: one small file a migration, a JSON object a line, on disk before the
//! migration goes on.
//!
//! A journal whose migration has ended for sure is removed. One that is found later tells where the
//! guest may run; the file can be read with any pager.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::engine::Failure;

/// The journal of one side of one migration.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
}

#[derive(Serialize)]
struct Line<'a, R> {
    unix_ms: u128,
    record: &'a R,
}

/// Where journals are kept unless the operator says otherwise: `/var/lib/farfault` for root, else
/// below the user's state directory.
pub fn default_state_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/var/lib/farfault");
    }
    let base = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")));
    base.unwrap_or_else(std::env::temp_dir).join("farfault")
}

impl Journal {
    /// A new journal `<state_dir>/<migration>.<side>`, readable by its owner only.
    pub fn create(state_dir: &Path, migration: &str, side: &str) -> Result<Self, Failure> {
        let path = state_dir.join(format!("{migration}.{side}"));
        let open = || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
            let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path)?;
            // The name must be on disk too.
            File::open(state_dir)?.sync_all()?;
            Ok::<_, std::io::Error>(file)
        };
        let file = open().map_err(|error| {
            Failure::new(
                format!("the journal {} cannot be made: {error}", path.display()),
                "name a directory that can be written with --state-dir",
            )
        })?;
        Ok(Journal { file, path })
    }

    /// Appends a record; it is on disk when this returns.
    pub fn record<R: Serialize>(&mut self, record: &R) -> Result<(), Failure> {
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        let mut line = serde_json::to_vec(&Line { unix_ms, record }).expect("plain data");
        line.push(b'\n');
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        written.map_err(|error| {
            Failure::plain(format!("the journal {} failed: {error}", self.path.display()))
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The migration has ended and nothing is in doubt.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("the journal {} stays behind: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::source::SourceRecord;

    #[test]
    fn records_are_lines_that_a_person_can_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), "0badcafe", "source").unwrap();
        journal.record(&SourceRecord::Started).unwrap();
        journal.record(&SourceRecord::Decided).unwrap();
        let text = fs::read_to_string(journal.path()).unwrap();
        let records: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(records[1]["record"], "decided");
        let again = Journal::create(dir.path(), "0badcafe", "source").unwrap_err();
        assert!(again.hint.unwrap().contains("--state-dir"));
        let path = journal.path().to_owned();
        journal.remove();
        assert!(!path.exists());
    }
}
