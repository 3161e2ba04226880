//! Network namespaces: made and removed with iproute2, entered by a thread of our own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where iproute2 keeps the names of namespaces.
const NAMES: &str = "/run/netns";
/// For killed processes to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A network namespace that iproute2 knows by name. Removed on drop if it was created here.
#[derive(Debug)]
pub struct Netns {
    name: String,
    owned: bool,
}

impl Netns {
    /// One that exists.
    pub fn existing(name: &str) -> Result<Self> {
        let path = Path::new(NAMES).join(name);
        if !path.exists() {
            bail!("there is no network namespace {name:?}: make it with `ip netns add {name}`");
        }
        Ok(Netns { name: name.to_owned(), owned: false })
    }

    /// A new one, with its loopback device up.
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let netns = Netns { name: name.to_owned(), owned: true };
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// As `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new(NAMES).join(&self.name)
    }

    /// Runs `ip -n NAME args...`.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], args].concat()).map(drop)
    }

    /// The processes that are in it.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let pids = ip(&["netns", "pids", &self.name])?;
        pids.split_whitespace()
            .map(|pid| pid.parse().context("what `ip netns pids` shows"))
            .collect()
    }

    /// Kills the processes that are in it, whoever has started them, and waits until they have ended.
    pub fn end_all(&self) -> Result<()> {
        let since = Instant::now();
        loop {
            // One of them may have started another meanwhile.
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            if since.elapsed() > END_TIMEOUT {
                bail!("the processes {pids:?} in the namespace {} do not end", self.name);
            }
            for pid in pids {
                // It may have ended by itself.
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// What `open` opens inside of the namespace. It runs on a thread of its own, which enters the
    /// namespace and ends there: this process's other threads stay where they are.
    pub fn open_inside(
        &self,
        open: impl FnOnce() -> Result<OwnedFd> + Send + 'static,
    ) -> Result<OwnedFd> {
        let path = self.path();
        let inside = move || {
            let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
            setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| {
                format!("enter the namespace {}; are you root?", path.display())
            })?;
            open()
        };
        match std::thread::spawn(inside).join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = ip(&["netns", "del", &self.name])
        {
            eprintln!("cannot remove the network namespace {}: {error:#}", self.name);
        }
    }
}

/// Gives what it shows.
fn ip(args: &[&str]) -> Result<String> {
    let output = Command::new("ip").args(args).output().context("run `ip` (package iproute2)")?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("`ip {}` failed: {}", args.join(" "), why.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_in_a_namespace_end_with_all_that_they_have_started() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("*** SKIPPED: not root ***");
            return;
        }
        let netns = Netns::create(&format!("farfault-test-{}", std::process::id())).unwrap();
        let mut command = Command::new("ip");
        command.args(["netns", "exec", netns.name(), "sh", "-c", "sleep 60 & exec sleep 61"]);
        let mut child = command.spawn().unwrap();
        let since = Instant::now();
        while netns.pids().unwrap().len() < 2 && since.elapsed() < END_TIMEOUT {
            std::thread::sleep(LOOK_EVERY);
        }
        let pids = netns.pids().unwrap();
        netns.end_all().unwrap();
        assert!(pids.len() == 2 && pids.contains(&child.id()), "{pids:?}");
        assert!(netns.pids().unwrap().is_empty());
        assert!(!child.wait().unwrap().success());
    }
}
