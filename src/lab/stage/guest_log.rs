//! What a test guest says, each line with the time at which the host heard it.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::process::wait_for;
use super::timeline::Beat;

/// The guest writes byte by byte: reading this long after a first byte takes whole lines, and dates them this well.
const READ_AFTER: Duration = Duration::from_micros(500);
/// How often a reader that hears nothing looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A guest says about 4 KB a second.
const MAX_LINES: usize = 2_000_000;

/// One line.
#[derive(Clone, Debug)]
pub struct Line {
    /// When its end was read.
    pub at: Instant,
    /// Without the newline.
    pub text: String,
}

/// A socket that a QEMU's debug console connects to, read by a thread.
#[derive(Debug)]
pub struct GuestLog {
    lines: Arc<Mutex<Vec<Line>>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl GuestLog {
    /// Listens; QEMU connects when it starts.
    pub fn listen(path: &Path) -> Result<Self> {
        let listener =
            UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
        listener.set_nonblocking(true)?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (to, until) = (Arc::clone(&lines), Arc::clone(&stop));
        let reader = std::thread::spawn(move || read_all(&listener, &to, &until));
        Ok(GuestLog { lines, stop, reader: Some(reader) })
    }

    /// Everything so far.
    pub fn lines(&self) -> Vec<Line> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All heartbeats so far.
    pub fn beats(&self) -> Vec<Beat> {
        self.lines().iter().filter_map(Beat::parse).collect()
    }

    /// The last heartbeat.
    pub fn last_beat(&self) -> Option<Beat> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().rev().find_map(Beat::parse)
    }

    /// How long the guest's slow touches of pages took so far, by its own clock.
    pub fn slow_touches(&self) -> Vec<Duration> {
        let us = |line: &Line| line.text.strip_prefix("slow ")?.parse().ok();
        self.lines().iter().filter_map(us).map(Duration::from_micros).collect()
    }

    /// The last line that begins so.
    pub fn last_line(&self, start: &str) -> Option<Line> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().rev().find(|line| line.text.starts_with(start)).cloned()
    }

    /// Lines of corruption, and of a guest that gave up: what makes a test fail.
    pub fn complaints(&self) -> Vec<String> {
        let bad = |text: &str| {
            text.starts_with("CORRUPT") || text.starts_with("fatal") || text.contains(" failed: ")
        };
        self.lines().into_iter().map(|line| line.text).filter(|text| bad(text)).collect()
    }

    /// Waits until the guest works and has verified all its pages once.
    pub fn wait_until_working(&self, timeout: Duration) -> Result<()> {
        wait_for("the guest to boot and verify its pages once", timeout, || {
            self.fail_on_complaints()?;
            Ok(self.last_beat().filter(|beat| beat.sweeps >= 1).map(|_| ()))
        })
    }

    /// Waits until the guest has verified all its pages once more, from the first one on.
    pub fn wait_for_a_sweep(&self, timeout: Duration) -> Result<()> {
        let first = wait_for("a heartbeat", timeout, || Ok(self.last_beat()))?.sweeps;
        wait_for("the guest to verify its pages", timeout, || {
            self.fail_on_complaints()?;
            // The sweep that is under way now began before.
            Ok(self.last_beat().filter(|beat| beat.sweeps > first + 1).map(|_| ()))
        })
    }

    /// Waits until the guest, which was told to verify all its pages anew, has done so once.
    pub fn wait_until_verified_anew(&self, timeout: Duration) -> Result<()> {
        wait_for("the guest to verify its pages anew", timeout, || {
            self.fail_on_complaints()?;
            let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(told) = lines.iter().rposition(|line| line.text == "verifying") else {
                return Ok(None);
            };
            let (before, after) = lines.split_at(told);
            let sweeps = |lines: &[Line]| Some(lines.iter().rev().find_map(Beat::parse)?.sweeps);
            Ok((sweeps(after) > sweeps(before)).then_some(()))
        })
    }

    /// Fails at the first word of corruption, or of a guest that gave up.
    pub fn fail_on_complaints(&self) -> Result<()> {
        let complaints = self.complaints();
        if let Some(first) = complaints.first() {
            bail!("the guest complains, {} times: {first}", complaints.len());
        }
        Ok(())
    }
}

impl Drop for GuestLog {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn read_all(listener: &UnixListener, to: &Mutex<Vec<Line>>, stop: &AtomicBool) {
    let mut stream = loop {
        if stop.load(Relaxed) {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    };
    if stream.set_read_timeout(Some(LOOK_EVERY)).is_err() {
        return;
    }
    let mut unfinished = Vec::new();
    let mut buffer = [0; 65_536];
    while !stop.load(Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                let at = Instant::now();
                let mut lines = to.lock().unwrap_or_else(PoisonError::into_inner);
                take_in(&buffer[..count], at, &mut unfinished, &mut lines, MAX_LINES);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                continue;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        }
        std::thread::sleep(READ_AFTER);
    }
}

/// Adds to `lines` what `read` completes of them, as far as there is room; the rest waits in `unfinished`.
fn take_in(
    read: &[u8],
    at: Instant,
    unfinished: &mut Vec<u8>,
    lines: &mut Vec<Line>,
    max_lines: usize,
) {
    for byte in read {
        if *byte != b'\n' {
            unfinished.push(*byte);
            continue;
        }
        if lines.len() < max_lines {
            lines.push(Line { at, text: String::from_utf8_lossy(unfinished).into_owned() });
        }
        unfinished.clear();
    }
}

/// The guest's ear: its first serial port.
#[derive(Debug)]
pub struct GuestEar {
    listener: UnixListener,
    stream: Option<UnixStream>,
}

impl GuestEar {
    /// Listens; QEMU connects when it starts.
    pub fn listen(path: &Path) -> Result<Self> {
        let listener =
            UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
        Ok(GuestEar { listener, stream: None })
    }

    /// Says one byte; see the test guest for what it understands.
    pub fn say(&mut self, byte: u8) -> Result<()> {
        if self.stream.is_none() {
            self.stream = Some(self.listener.accept().context("the guest's serial port")?.0);
        }
        let Some(stream) = &mut self.stream else { bail!("no serial port") };
        stream.write_all(&[byte]).context("speak to the guest")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_for_which_there_is_no_room_are_not_kept_in_any_way() {
        let (mut unfinished, mut lines) = (Vec::new(), Vec::new());
        for read in ["hb 1\nhb", " 2\nhb 3\nhb 4\nh"] {
            take_in(read.as_bytes(), Instant::now(), &mut unfinished, &mut lines, 2);
        }
        let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
        assert_eq!((texts, unfinished), (vec!["hb 1", "hb 2"], b"h".to_vec()));
    }

    #[test]
    fn a_guest_has_verified_anew_when_a_whole_verification_has_ended_that_began_after_the_word() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let log = GuestLog::listen(&path).unwrap();
        let mut guest = UnixStream::connect(&path).unwrap();
        let (short, long) = (Duration::from_millis(100), Duration::from_secs(10));
        let mut say = |lines: &str, last: &str| {
            guest.write_all(lines.as_bytes()).unwrap();
            wait_for(last, long, || Ok(log.last_line(last))).unwrap();
        };
        say("hb 1 2 3 0\nhb 2 2 4 0\n", "hb 2");
        assert!(log.wait_until_verified_anew(short).is_err());
        say("verifying\nhb 3 2 4 0\n", "hb 3");
        assert!(log.wait_until_verified_anew(short).is_err());
        say("hb 4 2 5 0\n", "hb 4");
        log.wait_until_verified_anew(short).unwrap();
        say("CORRUPT page 7: \nhb 5 2 5 1\n", "hb 5");
        assert!(log.wait_until_verified_anew(short).is_err());
    }
}
