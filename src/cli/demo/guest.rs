//! A guest at one side of the demo: moved by the session, watched by the demo, asked for its verdict.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::machine::Machine;
use super::protocol::{SideSettings, Verified};
use super::qemu::QemuGuest;
use crate::engine::Failure;
#[cfg(target_arch = "x86_64")]
use crate::guest::kvm::KvmGuest;
use crate::guest::threads::ThreadsGuest;
use crate::guest::workload::{GuestPlan, WorkingGuest};
use crate::guest::{DestinationGuest, GuestError, SharedGuest, SourceGuest};

/// How often a guest that checks its pages is looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A built-in guest boots in milliseconds, but the machine may be busy.
const BUILT_IN_START_LIMIT: Duration = Duration::from_secs(60);

/// A guest that can be moved here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum GuestKind {
    Kvm,
    Threads,
    Qemu(Machine),
}

impl GuestKind {
    pub(super) fn name(&self) -> &'static str {
        match self {
            GuestKind::Kvm => "KVM guest",
            GuestKind::Threads => "guest of native threads",
            GuestKind::Qemu(_) => "QEMU guest",
        }
    }

    /// Whether such a guest can be as planned.
    pub(super) fn check(&self, plan: &GuestPlan) -> Result<(), Failure> {
        match self {
            GuestKind::Qemu(machine) => machine.check(plan),
            _ => plan.check().map_err(|error| Failure::plain(error.to_string())),
        }
    }

    /// How long the two sides may take to start.
    pub(super) fn start_limit(&self, plan: &GuestPlan) -> Duration {
        match self {
            GuestKind::Qemu(_) => super::machine::start_limit(plan),
            _ => BUILT_IN_START_LIMIT,
        }
    }

    /// Where the guest's memory must have a name in the file system.
    pub(super) fn ram_directory(&self) -> Option<&'static Path> {
        matches!(self, GuestKind::Qemu(_)).then(|| Path::new(super::machine::SHARED_MEMORY))
    }
}

/// A guest, running or awaited.
pub(super) enum Guest {
    BuiltIn(SharedGuest),
    Qemu(QemuGuest),
}

impl Guest {
    /// A running guest.
    pub(super) async fn boot(settings: &SideSettings) -> Result<Guest, Failure> {
        let plan = &settings.plan;
        let built_in: Box<dyn WorkingGuest> = match &settings.kind {
            #[cfg(target_arch = "x86_64")]
            GuestKind::Kvm => Box::new(KvmGuest::boot(plan)?),
            #[cfg(not(target_arch = "x86_64"))]
            GuestKind::Kvm => return Err(no_kvm()),
            GuestKind::Threads => Box::new(ThreadsGuest::boot(plan)?),
            GuestKind::Qemu(machine) => {
                return Ok(Guest::Qemu(QemuGuest::boot(machine, settings).await?));
            }
        };
        let mut guest = SharedGuest::new(built_in);
        guest.resume()?;
        Ok(Guest::BuiltIn(guest))
    }

    /// An empty guest.
    pub(super) fn await_arrival(settings: &SideSettings) -> Result<Guest, Failure> {
        let plan = &settings.plan;
        let built_in: Box<dyn WorkingGuest> = match &settings.kind {
            #[cfg(target_arch = "x86_64")]
            GuestKind::Kvm => Box::new(KvmGuest::await_arrival(plan)?),
            #[cfg(not(target_arch = "x86_64"))]
            GuestKind::Kvm => return Err(no_kvm()),
            GuestKind::Threads => Box::new(ThreadsGuest::await_arrival(plan)?),
            GuestKind::Qemu(machine) => {
                return Ok(Guest::Qemu(QemuGuest::await_arrival(machine, settings)?));
            }
        };
        Ok(Guest::BuiltIn(SharedGuest::new(built_in)))
    }

    /// The running guest, for the session that moves it away.
    pub(super) fn leaving(&self) -> Result<Box<dyn SourceGuest>, GuestError> {
        Ok(match self {
            Guest::BuiltIn(guest) => Box::new(guest.clone()),
            Guest::Qemu(guest) => Box::new(guest.leaving()?),
        })
    }

    /// The empty guest, for the session that receives into it.
    pub(super) fn arriving(&mut self) -> Result<Box<dyn DestinationGuest>, GuestError> {
        Ok(match self {
            Guest::BuiltIn(guest) => Box::new(guest.clone()),
            Guest::Qemu(guest) => guest.arriving()?,
        })
    }

    /// Tells the operations that the guest has done, as far as is known now.
    pub(super) fn counter(&self) -> Box<dyn Fn() -> Option<u64> + Send> {
        match self {
            Guest::BuiltIn(guest) => {
                let guest = guest.clone();
                Box::new(move || Some(guest.try_status()?.ops))
            }
            Guest::Qemu(guest) => {
                let console = guest.console();
                Box::new(move || console.heard().ops)
            }
        }
    }

    /// Lets the running guest check all its pages. Ends when it has, or when it has stopped by itself.
    pub(super) async fn verify(&self) -> Result<Verified, Failure> {
        match self {
            Guest::BuiltIn(guest) => verify(guest).await,
            Guest::Qemu(guest) => guest.verify().await,
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn no_kvm() -> Failure {
    Failure::plain("no built-in virtual machine here")
}

async fn verify(guest: &SharedGuest) -> Result<Verified, Failure> {
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
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
