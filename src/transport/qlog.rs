//! A log of every packet and of what the congestion controller makes of them, in qlog's JSON text sequences
//! (draft-ietf-quic-qlog-main-schema), for qvis and its like. No payload is in it.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use quinn::{QlogConfig, QlogStream};

/// A log is no longer than this: some minutes of a gigabit. What comes after is left out.
const LIMIT_BYTES: u64 = 4 << 30;
/// A process that is killed takes at most this much of its log along.
const FLUSH_EVERY: Duration = Duration::from_millis(200);

/// A file that the connections of one process write to; each event names its connection (`group_id`).
#[derive(Clone)]
pub struct Qlog {
    stream: QlogStream,
    path: PathBuf,
}

impl Qlog {
    /// Makes the file.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(path: &Path) -> io::Result<Self> {
        let writer = Capped::new(File::create(path)?, LIMIT_BYTES);
        let mut config = QlogConfig::default();
        config.writer(Box::new(writer)).title(Some("farfault".to_owned()));
        let stream = config.into_stream();
        let stream = stream.ok_or_else(|| io::Error::other("its first line cannot be written"))?;
        Ok(Qlog { stream, path: path.to_owned() })
    }

    pub(super) fn stream(&self) -> QlogStream {
        self.stream.clone()
    }
}

impl fmt::Debug for Qlog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Qlog").field(&self.path).finish()
    }
}

/// Two are the same when they go to the same file.
impl PartialEq for Qlog {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl Eq for Qlog {}

struct Capped<W: Write> {
    out: BufWriter<W>,
    left_bytes: u64,
    flushed: Instant,
}

impl<W: Write> Capped<W> {
    fn new(out: W, limit_bytes: u64) -> Self {
        Capped { out: BufWriter::new(out), left_bytes: limit_bytes, flushed: Instant::now() }
    }
}

impl<W: Write> Write for Capped<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = (bytes.len() as u64).min(self.left_bytes);
        self.left_bytes -= taken;
        self.out.write_all(&bytes[..taken as usize])?;
        if self.flushed.elapsed() >= FLUSH_EVERY {
            self.flushed = Instant::now();
            self.out.flush()?;
        }
        // To the logger, which would complain of each line, the rest is written too.
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_ends_at_its_limit_and_nobody_is_told_of_it() {
        let mut out = Vec::new();
        let mut capped = Capped::new(&mut out, 10);
        assert_eq!(capped.write(b"1234567").unwrap(), 7);
        assert_eq!(capped.write(b"1234567").unwrap(), 7);
        capped.flush().unwrap();
        drop(capped);
        assert_eq!(out, b"1234567123");
    }
}
