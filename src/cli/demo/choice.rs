//! Which guest is moved, and whether this host can move it.

use std::path::Path;

use clap::ValueEnum;

use super::guest::GuestKind;
use super::machine::Machine;
use crate::engine::Failure;
use crate::guest::GuestError;
#[cfg(target_arch = "x86_64")]
use crate::guest::kvm;
use crate::guest::workload::GuestPlan;
use crate::meminfo::meminfo_bytes;
use crate::memory::{Capability, HostCapabilities, Status};
use crate::units::format_bytes;

/// A KVM that checks fewer pages a second than this is an emulated one: hardware does millions.
const NATIVE_PAGES_PER_S: u64 = 100_000;

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum GuestChoice {
    /// KVM where it runs at the processor's speed, else threads.
    #[default]
    Auto,
    /// A small virtual machine of farfault's own.
    Kvm,
    /// Native threads that do the same work on the same kind of memory.
    Threads,
    /// Linux in a QEMU, as `farfault send` and `receive` move it. Needs root, QEMU, and what
    /// tools/build-guest makes.
    Qemu,
}

/// A guest, and why this one.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) kind: GuestKind,
    /// A thousand times slower than hardware: little memory, then.
    pub(super) slow: bool,
    pub(super) why: String,
}

impl GuestChoice {
    /// Settles on a guest, having tried KVM. `image` is where the kernel of a QEMU guest is.
    pub(super) fn settle(self, image: Option<&Path>) -> Result<Chosen, Failure> {
        check_host(self)?;
        if self == GuestChoice::Threads {
            let why = "native threads, as asked for".to_owned();
            return Ok(Chosen { kind: GuestKind::Threads, slow: false, why });
        }
        let speed = kvm_speed();
        let is_native = speed.as_ref().is_ok_and(|speed| *speed >= NATIVE_PAGES_PER_S);
        match (self, speed) {
            (GuestChoice::Qemu, speed) => {
                let machine = Machine::find(image, is_native)?;
                let how = match speed {
                    Ok(speed) if is_native => format!("with KVM, which {}", pace(speed)),
                    Ok(speed) => {
                        format!("which emulates (TCG), as KVM does here: it {}", pace(speed))
                    }
                    Err(error) => format!("which emulates (TCG), since there is no KVM: {error}"),
                };
                let why = format!("Linux in {}, {how}", machine.version);
                Ok(Chosen { kind: GuestKind::Qemu(machine), slow: false, why })
            }
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

/// Whether this process may do to a guest what a migration does.
fn check_host(choice: GuestChoice) -> Result<(), Failure> {
    let told = |item: &Capability| match &item.status {
        Status::Missing(why) => format!("{}: {why}", item.name),
        Status::Ok(_) | Status::Degraded(_) => item.name.to_owned(),
    };
    if choice == GuestChoice::Qemu {
        let host = HostCapabilities::probe();
        // Last: the privileges, from which most of the rest follows.
        let Some(missing) = host.missing_to_move_qemu().last().map(told) else { return Ok(()) };
        return Err(Failure::new(
            format!("this process cannot move a QEMU guest: {missing}"),
            "run as root, such as with sudo, and not in a container; `farfault doctor` tells more",
        ));
    }
    if HostCapabilities::can_serve_faults() {
        return Ok(());
    }
    let host = HostCapabilities::probe();
    // The rest follows from the first.
    let missing = host.missing_to_receive().next().map(told);
    Err(Failure::new(
        format!(
            "this process cannot serve a guest's page faults: {}",
            missing.unwrap_or_else(|| "the kernel lacks some of userfaultfd".to_owned())
        ),
        "run as root, or let others use userfaultfd: sysctl vm.unprivileged_userfaultfd=1; \
         `farfault doctor` tells more",
    ))
}

/// Both guests, of which the second is a copy, must find room in this host's memory.
pub(super) fn check_room(plan: &GuestPlan) -> Result<(), Failure> {
    let needed = plan.memory_bytes / 100 * u64::from(plan.used_percent) * 2;
    match meminfo_bytes("MemAvailable") {
        Some(available) if needed > available => Err(Failure::new(
            format!(
                "source and destination, guests of {}, use {} of memory, and {} are available",
                format_bytes(plan.memory_bytes),
                format_bytes(needed),
                format_bytes(available)
            ),
            "give the guest less with --memory",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn a_guest_on_a_slow_kvm_is_replaced_by_threads_unless_it_was_asked_for() {
        let auto = GuestChoice::Auto.settle(None).unwrap();
        assert!(!auto.slow, "{}", auto.why);
        let threads = GuestChoice::Threads.settle(None).unwrap();
        assert_eq!(threads.kind, GuestKind::Threads);
        match GuestChoice::Kvm.settle(None) {
            Ok(kvm) => assert_eq!(kvm.slow, auto.kind == GuestKind::Threads, "{}", kvm.why),
            Err(_) => assert_eq!(auto.kind, GuestKind::Threads, "{}", auto.why),
        }
    }

    #[test]
    fn a_qemu_guest_that_was_asked_for_is_not_replaced() {
        let failure = GuestChoice::Qemu.settle(Some(Path::new("/no/such/image"))).unwrap_err();
        assert!(failure.hint.is_some(), "{failure:?}");
    }

    #[test]
    fn guests_that_do_not_fit_are_refused_before_they_take_all_memory() {
        let plan = |memory_bytes| GuestPlan {
            memory_bytes,
            used_percent: 85,
            workers: NonZeroU32::MIN,
            workload: "idle".parse().unwrap(),
        };
        assert!(check_room(&plan(2 << 20)).is_ok());
        let failure = check_room(&plan(1 << 50)).unwrap_err();
        assert!(failure.hint.is_some_and(|hint| hint.contains("--memory")));
    }
}
