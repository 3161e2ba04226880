//! The demo's guests: which one, and whether it is whole.

use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::protocol::Verified;
use crate::engine::Failure;
#[cfg(target_arch = "x86_64")]
use crate::guest::kvm::{self, KvmGuest};
use crate::guest::threads::ThreadsGuest;
use crate::guest::workload::GuestPlan;
use crate::guest::{GuestError, SharedGuest, SourceGuest};
use crate::memory::{HostCapabilities, Status};

/// A KVM that checks fewer pages a second than this is an emulated one: hardware does millions.
const NATIVE_PAGES_PER_S: u64 = 100_000;

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum GuestChoice {
    /// KVM where it runs at the processor's speed, else threads.
    #[default]
    Auto,
    /// A virtual machine.
    Kvm,
    /// Native threads that do the same work on the same kind of memory.
    Threads,
}

/// A guest that can be moved here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum GuestKind {
    Kvm,
    Threads,
}

impl GuestKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            GuestKind::Kvm => "KVM guest",
            GuestKind::Threads => "guest of native threads",
        }
    }
}

/// A guest, and why this one.
pub(super) struct Chosen {
    pub(super) kind: GuestKind,
    /// A thousand times slower than hardware: little memory, then.
    pub(super) slow: bool,
    pub(super) why: String,
}

impl GuestChoice {
    /// Settles on a guest, having tried KVM.
    pub(super) fn settle(self) -> Result<Chosen, Failure> {
        if self == GuestChoice::Threads {
            let why = "native threads, as asked for".to_owned();
            return Ok(Chosen { kind: GuestKind::Threads, slow: false, why });
        }
        let speed = kvm_speed();
        let is_native = speed.as_ref().is_ok_and(|speed| *speed >= NATIVE_PAGES_PER_S);
        match (self, speed) {
            (GuestChoice::Kvm, Err(error)) => Err(error.into()),
            (GuestChoice::Kvm, Ok(speed)) if !is_native => {
                let why = format!("KVM, as asked for; it is emulated: {}", pace(speed));
                Ok(Chosen { kind: GuestKind::Kvm, slow: true, why })
            }
            (_, Ok(speed)) if is_native => {
                let why = format!("a virtual machine on KVM, which {}", pace(speed));
                Ok(Chosen { kind: GuestKind::Kvm, slow: false, why })
            }
            (_, Ok(speed)) => {
                let why = format!("native threads, since KVM is emulated here: it {}", pace(speed));
                Ok(Chosen { kind: GuestKind::Threads, slow: false, why })
            }
            (_, Err(error)) => {
                let why = format!("native threads, since there is no KVM: {error}");
                Ok(Chosen { kind: GuestKind::Threads, slow: false, why })
            }
        }
    }
}

fn pace(pages_per_s: u64) -> String {
    format!("checks {pages_per_s} pages a second")
}

fn kvm_speed() -> Result<u64, GuestError> {
    #[cfg(target_arch = "x86_64")]
    return kvm::measure_speed();
    #[cfg(not(target_arch = "x86_64"))]
    return Err(GuestError::new("the built-in virtual machine is for x86_64"));
}

/// Whether this process may have and serve a guest's page faults.
pub(super) fn check_host() -> Result<(), Failure> {
    if HostCapabilities::can_serve_faults() {
        return Ok(());
    }
    let host = HostCapabilities::probe();
    // The rest follows from the first.
    let missing = host.missing_to_receive().next().map(|item| match &item.status {
        Status::Missing(why) => format!("{}: {why}", item.name),
        Status::Ok(_) | Status::Degraded(_) => item.name.to_owned(),
    });
    Err(Failure::new(
        format!(
            "this process cannot serve a guest's page faults: {}",
            missing.unwrap_or_else(|| "the kernel lacks some of userfaultfd".to_owned())
        ),
        "run as root, or let others use userfaultfd: sysctl vm.unprivileged_userfaultfd=1; \
         `farfault doctor` tells more",
    ))
}

impl GuestKind {
    /// A running guest.
    pub(super) fn boot(self, plan: &GuestPlan) -> Result<SharedGuest, GuestError> {
        let mut guest = SharedGuest::new(match self {
            #[cfg(target_arch = "x86_64")]
            GuestKind::Kvm => Box::new(KvmGuest::boot(plan)?),
            #[cfg(not(target_arch = "x86_64"))]
            GuestKind::Kvm => return Err(GuestError::new("no built-in virtual machine here")),
            GuestKind::Threads => Box::new(ThreadsGuest::boot(plan)?),
        });
        guest.resume()?;
        Ok(guest)
    }

    /// An empty guest.
    pub(super) fn await_arrival(self, plan: &GuestPlan) -> Result<SharedGuest, GuestError> {
        Ok(SharedGuest::new(match self {
            #[cfg(target_arch = "x86_64")]
            GuestKind::Kvm => Box::new(KvmGuest::await_arrival(plan)?),
            #[cfg(not(target_arch = "x86_64"))]
            GuestKind::Kvm => return Err(GuestError::new("no built-in virtual machine here")),
            GuestKind::Threads => Box::new(ThreadsGuest::await_arrival(plan)?),
        }))
    }
}

/// Lets the running guest check all its pages. Ends when it has, or when it has stopped by itself.
pub(super) async fn verify(guest: &SharedGuest) -> Result<Verified, Failure> {
    let pages = {
        let guest = guest.lock();
        guest.verify_all();
        guest.still_to_verify()
    };
    loop {
        {
            let guest = guest.lock();
            if let Some(failure) = guest.failure() {
                return Err(Failure::plain(format!("the guest has stopped: {failure}")));
            }
            if guest.still_to_verify() == 0 {
                let status = guest.status();
                return Ok(Verified {
                    pages,
                    wrong_pages: status.wrong_pages,
                    first_wrong_page: (status.wrong_pages > 0).then_some(status.first_wrong_page),
                });
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_on_a_slow_kvm_is_replaced_by_threads_unless_it_was_asked_for() {
        let auto = GuestChoice::Auto.settle().unwrap();
        assert!(!auto.slow, "{}", auto.why);
        let threads = GuestChoice::Threads.settle().unwrap();
        assert_eq!(threads.kind, GuestKind::Threads);
        match GuestChoice::Kvm.settle() {
            Ok(kvm) => assert_eq!(kvm.slow, auto.kind == GuestKind::Threads, "{}", kvm.why),
            Err(_) => assert_eq!(auto.kind, GuestKind::Threads, "{}", auto.why),
        }
    }
}
