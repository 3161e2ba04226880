//! What a migration can write down for later replays: which pages the guest wrote to in each round, and which
//! its threads touched after the switchover.
//!
//! A trace is a file of JSON objects, one a line. Both sides write one each; a replay needs the
//! destination's and may be given the source's too.

use std::fs::File;
use std::io::{self, BufRead, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::page::{PageIndex, PageSet};

/// Touches and runs in a trace, each; what is beyond is left out, and said at the end.
pub const TRACE_LIMIT: usize = 1 << 20;

/// A line of a trace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "lowercase")]
pub enum TraceRecord {
    /// The first line.
    Guest {
        /// Pages of its RAM.
        pages: u64,
    },
    /// Source: the pages that were dirty after a round.
    Dirty {
        /// Since the link's first message.
        at_us: u64,
        /// First page and length.
        runs: Vec<(u64, u64)>,
    },
    /// Destination: the pages that it lacked at the switchover.
    Missing {
        /// First page and length.
        runs: Vec<(u64, u64)>,
    },
    /// Destination: a thread's first touch of a page that was not mapped.
    Touch {
        /// Since faults are served.
        at_us: u64,
        /// How long the thread waited for the page.
        waited_us: u64,
        /// The thread's id.
        thread: u32,
        /// The page.
        page: PageIndex,
    },
    /// There was more than a trace holds.
    Cut,
}

/// A trace that is being gathered, in memory: writing it down must not slow what it is about.
#[derive(Debug)]
pub struct TraceFile {
    file: File,
    path: PathBuf,
    records: Vec<TraceRecord>,
    runs: usize,
    cut: bool,
}

impl TraceFile {
    /// Makes the file, so that it is known before the migration whether that can be done.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(path: &Path, pages: u64) -> io::Result<Self> {
        let records = vec![TraceRecord::Guest { pages }];
        let file = File::create(path)?;
        Ok(TraceFile { file, path: path.to_owned(), records, runs: 0, cut: false })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Pages that were dirty after a round.
    pub fn dirty(&mut self, at: Duration, set: &PageSet) {
        let runs = self.runs_of(set);
        self.records.push(TraceRecord::Dirty { at_us: at.as_micros() as u64, runs });
    }

    /// Pages that are missing at the switchover.
    pub fn missing(&mut self, set: &PageSet) {
        let runs = self.runs_of(set);
        self.records.push(TraceRecord::Missing { runs });
    }

    /// Touches of the guest; there may be more than were kept.
    pub fn touches(&mut self, touches: impl IntoIterator<Item = TraceRecord>, cut: bool) {
        self.records.extend(touches);
        self.cut |= cut;
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn finish(mut self) -> io::Result<()> {
        if self.cut {
            self.records.push(TraceRecord::Cut);
        }
        write_trace(&mut BufWriter::new(self.file), &self.records)
    }

    fn runs_of(&mut self, set: &PageSet) -> Vec<(u64, u64)> {
        let mut runs = set.runs().map(|run| (run.start.0, run.len()));
        let taken: Vec<_> = runs.by_ref().take(TRACE_LIMIT - self.runs).collect();
        self.cut |= runs.next().is_some();
        self.runs += taken.len();
        taken
    }
}

/// Writes lines.
fn write_trace<'a>(
    out: &mut impl Write,
    records: impl IntoIterator<Item = &'a TraceRecord>,
) -> io::Result<()> {
    for record in records {
        serde_json::to_writer(&mut *out, record)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Reads lines; an error names the line.
pub fn read_trace(text: impl BufRead) -> io::Result<Vec<TraceRecord>> {
    let lines = text.lines().enumerate();
    let records = lines.map(|(number, line)| {
        serde_json::from_str(&line?).map_err(|error| {
            let what = format!("line {} is no record of a trace: {error}", number + 1);
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    });
    records.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageRange;

    #[test]
    fn a_trace_comes_back_as_it_was_written_and_a_bad_line_is_named() {
        let mut set = PageSet::empty(100);
        set.insert_range(PageRange::new(3, 9));
        set.insert(PageIndex(20));
        let runs = vec![(3, 6), (20, 1)];
        let touch = TraceRecord::Touch { at_us: 7, waited_us: 0, thread: 12, page: PageIndex(4) };
        let records = vec![
            TraceRecord::Guest { pages: 100 },
            TraceRecord::Dirty { at_us: 5, runs: runs.clone() },
            TraceRecord::Missing { runs },
            touch.clone(),
            TraceRecord::Cut,
        ];
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace");
        let mut trace = TraceFile::create(&path, 100).unwrap();
        trace.dirty(Duration::from_micros(5), &set);
        trace.missing(&set);
        trace.touches([touch], true);
        trace.finish().unwrap();
        let mut text = std::fs::read(&path).unwrap();
        assert_eq!(read_trace(&text[..]).unwrap(), records);
        text.extend_from_slice(b"{\"record\":\"nonsense\"}\n");
        let error = read_trace(&text[..]).unwrap_err().to_string();
        assert!(error.starts_with("line 6 "), "{error}");
    }
}
