//! Network namespaces: made and removed with iproute2, entered by a thread of our own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

/// Where iproute2 keeps the names of namespaces.
const NAMES: &str = "/run/netns";

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
        ip(&[&["-n", &self.name], args].concat())
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

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("run `ip` (package iproute2)")?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("`ip {}` failed: {}", args.join(" "), why.trim());
    }
    Ok(())
}
