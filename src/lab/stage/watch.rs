//! What processes use of processor and memory, read from `/proc` while they run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};

/// So much of what a process uses at its very end is not seen.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Who is watched.
#[derive(Clone, Debug)]
pub enum Who {
    /// A process that is there.
    Pid(u32),
    /// One that writes, or has written, its pid to a file.
    File(PathBuf),
}

/// What a process has used while it was watched.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor time before the first look.
    pub cpu_before_s: f64,
    /// Processor time at the last look.
    pub cpu_s: f64,
    /// Private memory at the first look.
    pub first_anonymous_bytes: u64,
    /// Most private memory.
    pub peak_anonymous_bytes: u64,
    /// Most memory, with what is shared.
    pub peak_resident_bytes: u64,
}

/// A thread that looks again and again.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Usage>>>,
}

impl Watch {
    /// Begins to watch.
    pub fn start(who: Vec<Who>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen: Vec<Option<Usage>> = vec![None; who.len()];
            loop {
                let is_last = until.load(Relaxed);
                for (usage, who) in seen.iter_mut().zip(&who) {
                    look(usage, who);
                }
                if is_last {
                    return seen.into_iter().map(Option::unwrap_or_default).collect();
                }
                std::thread::sleep(LOOK_EVERY);
            }
        });
        Watch { stop, thread: Some(thread) }
    }

    /// What was seen of each, in the order in which they were given; zero of what never was there.
    pub fn end(mut self) -> Vec<Usage> {
        self.stop.store(true, Relaxed);
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

fn look(usage: &mut Option<Usage>, who: &Who) {
    let pid = match who {
        Who::Pid(pid) => Some(*pid),
        Who::File(path) => read_pid(path),
    };
    let Some(pid) = pid else { return };
    let Some(cpu_s) = cpu_seconds(pid) else { return };
    let Some([anonymous, resident]) = memory_bytes(pid) else { return };
    let usage = usage.get_or_insert(Usage {
        cpu_before_s: cpu_s,
        first_anonymous_bytes: anonymous,
        ..Usage::default()
    });
    usage.cpu_s = cpu_s;
    usage.peak_anonymous_bytes = usage.peak_anonymous_bytes.max(anonymous);
    usage.peak_resident_bytes = usage.peak_resident_bytes.max(resident);
}

fn read_pid(path: &Path) -> Option<u32> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// User and system time of all threads of a process.
fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may contain anything: fields 3 and on.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let (user, system) = (ticks()?, ticks()?);
    let ticks_per_s = sysconf(SysconfVar::CLK_TCK).ok()??;
    Some((user + system) as f64 / ticks_per_s as f64)
}

/// Private memory, and all of it; `None` of a process that has ended.
fn memory_bytes(pid: u32) -> Option<[u64; 2]> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    Some([kib("RssAnon")? << 10, kib("VmRSS")? << 10])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_and_memory_of_this_process_are_seen_and_nothing_of_one_that_is_not() {
        let who = vec![Who::Pid(std::process::id()), Who::File("/nonexistent/pid".into())];
        let watch = Watch::start(who);
        let mut memory = vec![1u8; 64 << 20];
        let since = cpu_seconds(std::process::id()).unwrap();
        while cpu_seconds(std::process::id()).unwrap() < since + 0.2 {
            memory.iter_mut().for_each(|byte| *byte = byte.wrapping_mul(3));
        }
        let seen = watch.end();
        assert!(seen[0].cpu_s - seen[0].cpu_before_s >= 0.15, "{seen:?}");
        assert!(seen[0].peak_anonymous_bytes >= 64 << 20, "{seen:?}");
        assert_eq!(seen[1], Usage::default());
    }
}
