//! Finds the process behind a QMP socket.

use std::fs;
use std::path::Path;

use super::commands::QueryCpus;
use super::qmp::Qmp;
use super::refusal;
use crate::guest::GuestError;

/// The process that runs a QEMU.
#[derive(Debug)]
pub(super) struct QemuProcess {
    /// As our PID namespace numbers it.
    pub(super) pid: u32,
    /// Threads that run vCPUs, numbered likewise: a guest stops while one of these is stopped.
    pub(super) vcpu_threads: Vec<u32>,
}

/// The process that answers on `qmp`.
///
/// The kernel tells who made the listening socket. That is QEMU itself, unless a manager such as
/// libvirt made the socket and passed it on. So the proof is that the process has the vCPU threads
/// which QEMU names.
pub(super) fn find(qmp: &mut Qmp) -> Result<QemuProcess, GuestError> {
    let threads: Vec<u32> = qmp.execute(&QueryCpus {})?.iter().map(|cpu| cpu.thread_id).collect();
    let listener = qmp.listener_pid();
    let owner_of_thread = threads.first().and_then(|thread| group_leader(*thread));
    for pid in [listener, owner_of_thread].into_iter().flatten() {
        if let Some(vcpu_threads) = vcpu_threads(pid, &threads) {
            return Ok(QemuProcess { pid, vcpu_threads });
        }
    }
    let who = match listener {
        Some(pid) => format!("process {pid}, which made its QMP socket, does not have"),
        None => "no process is visible here that has".to_owned(),
    };
    Err(refusal(
        format!("cannot find the process of this QEMU: {who} its vCPU threads {threads:?}"),
        "run farfault on the host of QEMU, as root, and not in a container of its own",
    ))
}

/// The threads of `pid` that QEMU calls `named`, in our numbering; `None` when it lacks one of them.
fn vcpu_threads(pid: u32, named: &[u32]) -> Option<Vec<u32>> {
    let tasks = format!("/proc/{pid}/task");
    if named.iter().all(|thread| Path::new(&format!("{tasks}/{thread}")).exists()) {
        return Some(named.to_vec());
    }
    // QEMU in a PID namespace of its own: the last number in NSpid is the one that it sees.
    let entries = fs::read_dir(&tasks).ok()?;
    let known: Vec<(u32, u32)> = entries
        .filter_map(|entry| {
            let here = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let there = status_field(&format!("{tasks}/{here}"), "NSpid:")?;
            Some((there.split_whitespace().last()?.parse().ok()?, here))
        })
        .collect();
    named
        .iter()
        .map(|thread| known.iter().find(|(there, _)| there == thread).map(|(_, here)| *here))
        .collect()
}

fn group_leader(thread: u32) -> Option<u32> {
    status_field(&format!("/proc/{thread}"), "Tgid:")?.trim().parse().ok()
}

fn status_field(task: &str, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("{task}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(field)).map(str::to_owned)
}

/// The command line of a process; empty when it cannot be read.
pub(super) fn command_line(pid: u32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let arguments = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    arguments.filter(|argument| !argument.is_empty()).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_threads() {
        let me = std::process::id();
        assert_eq!(vcpu_threads(me, &[me]), Some(vec![me]));
        assert_eq!(vcpu_threads(me, &[me, u32::MAX]), None);
        assert_eq!(group_leader(me), Some(me));
    }
}
