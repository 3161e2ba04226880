//! What the test guest says on QEMU's debug port (`tools/testguest` tells the words): how much it has
//! done, and whether its memory is whole.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::guest::GuestError;

/// The guest speaks byte by byte: with a rest between two looks, lines are read at once.
const READ_EVERY: Duration = Duration::from_millis(2);
/// The guest's lines are shorter.
const LINE_LIMIT_BYTES: usize = 4096;

/// What the guest has said so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// Its memory is filled, and it works.
    pub(super) is_ready: bool,
    /// Operations of its workload, as of the last heartbeat.
    pub(super) ops: Option<u64>,
    /// Complete verifications of all its pages, as of the last heartbeat.
    pub(super) sweeps: u64,
    /// Pages that it found wrong, as of the last heartbeat.
    pub(super) wrong_pages: u64,
    /// The first of them, if that was on this host.
    pub(super) first_wrong_page: Option<u64>,
    /// Pages of the last verification.
    pub(super) swept_pages: u64,
    /// Why it cannot go on.
    pub(super) fatal: Option<String>,
    /// QEMU is gone.
    pub(super) has_ended: bool,
}

impl Heard {
    /// A line; what is none of the guest's words is nothing.
    fn line(&mut self, line: &str) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let number = |at: usize| rest.split([' ', ':']).nth(at)?.parse().ok();
        match word {
            "ready" => self.is_ready = true,
            "hb" => {
                if let (Some(ops), Some(sweeps), Some(wrong)) = (number(1), number(2), number(3)) {
                    (self.ops, self.sweeps, self.wrong_pages) = (Some(ops), sweeps, wrong);
                }
            }
            "sweep" => self.swept_pages = number(2).unwrap_or(self.swept_pages),
            "CORRUPT" => self.first_wrong_page = self.first_wrong_page.or(number(1)),
            "fatal" => self.fatal = Some(rest.to_owned()),
            _ => {}
        }
    }
}

/// The listening end of a debug port; clones are the same.
#[derive(Clone)]
pub(super) struct Console {
    heard: Arc<Mutex<Heard>>,
}

impl Console {
    /// Listens at `path`, for the one QEMU that is going to connect.
    pub(super) fn listen(path: &Path) -> Result<Console, GuestError> {
        let listener = UnixListener::bind(path).map_err(|error| {
            GuestError::new(format!("cannot listen at {}: {error}", path.display()))
        })?;
        let console = Console { heard: Arc::default() };
        let heard = console.heard.clone();
        thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                read(stream, &heard);
            }
            change(&heard, |heard| heard.has_ended = true);
        });
        Ok(console)
    }

    pub(super) fn heard(&self) -> Heard {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn read(mut stream: UnixStream, heard: &Mutex<Heard>) {
    let (mut unfinished, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        for byte in &buffer[..count] {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&unfinished).into_owned();
                change(heard, |heard| heard.line(&line));
                unfinished.clear();
            } else if unfinished.len() < LINE_LIMIT_BYTES {
                unfinished.push(*byte);
            }
        }
        thread::sleep(READ_EVERY);
    }
}

fn change(heard: &Mutex<Heard>, change: impl FnOnce(&mut Heard)) {
    change(&mut heard.lock().unwrap_or_else(PoisonError::into_inner));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(lines: &[&str]) -> Heard {
        let mut heard = Heard::default();
        lines.iter().for_each(|line| heard.line(line));
        heard
    }

    #[test]
    fn the_words_of_the_test_guest_are_understood() {
        let all = heard(&[
            "module virtio_net.ko: unfit for this machine",
            "ready 16384",
            "hb 40 1234 2 0",
            "sweep 3 pages 16384 ok",
        ]);
        assert!(all.is_ready);
        assert_eq!((all.ops, all.sweeps, all.wrong_pages), (Some(1234), 2, 0));
        assert_eq!((all.swept_pages, all.first_wrong_page), (16384, None));
    }

    #[test]
    fn wrong_pages_and_a_guest_that_gives_up_are_heard() {
        let all = heard(&[
            "CORRUPT page 77: index 77 sequence 1 (of 2) checksum 0 (computed 1)",
            "CORRUPT page 99: index 98",
            "sweep 1 pages 16384 errors 2",
            "hb 40 7 1 2",
            "fatal ff.ws: memory allocation failed",
        ]);
        assert_eq!((all.wrong_pages, all.first_wrong_page), (2, Some(77)));
        assert_eq!(all.fatal.as_deref(), Some("ff.ws: memory allocation failed"));
    }

    #[test]
    fn what_is_cut_off_changes_nothing() {
        assert_eq!(heard(&["hb 40 7", "hb 1 x 2 3", "", "sweep"]), Heard::default());
    }
}
