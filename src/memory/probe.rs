//! What this host can do, found by trying.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use userfaultfd::FeatureFlags;

use super::tracker::TRACK_FEATURES;
use super::{FAULT_FEATURES, sys};

/// One thing that a migration may need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// What it is.
    pub name: &'static str,
    /// Which part of a migration needs it.
    pub needed_for: &'static str,
    /// Whether it is there.
    pub status: Status,
    /// How to mend it when it is missing.
    pub mend: &'static str,
}

/// Whether something is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// It works; with what was found, where that tells more.
    Ok(String),
    /// It does not, and why.
    Missing(String),
    /// Not needed, but something works less well.
    Degraded(String),
}

impl Status {
    /// True for [`Status::Missing`].
    pub fn is_missing(&self) -> bool {
        matches!(self, Status::Missing(_))
    }

    fn from_result<T>(result: Result<T, impl std::fmt::Display>) -> Self {
        match result {
            Ok(_) => Status::Ok(String::new()),
            Err(error) => Status::Missing(error.to_string()),
        }
    }
}

/// What this host can do.
#[derive(Clone, Debug)]
pub struct HostCapabilities {
    /// Everything that was probed, in the order in which a person should mend it.
    pub items: Vec<Capability>,
}

const DESTINATION: &str = "receiving a guest";
const BOTH: &str = "adopting a guest's process";
const TRACKING: &str = "sending: write tracking (without it: a scan of hashes, slower)";
const NEWER_KERNEL: &str = "use Linux 6.7 or newer";
const USERFAULTFD: &str = "run as root; the kernel needs CONFIG_USERFAULTFD";

impl HostCapabilities {
    /// Tries everything. Changes nothing on the host, and takes milliseconds.
    pub fn probe() -> Self {
        let offered = offered_features();
        let feature = |name, needed_for, wanted: FeatureFlags, mend| {
            let missing = |why: &str| Status::Missing(why.to_owned());
            let (status, mend) = match &offered {
                Ok(offered) if offered.contains(wanted) => (Status::Ok(String::new()), mend),
                Ok(_) => (missing("the kernel does not offer it"), mend),
                Err(_) => (missing("without a userfaultfd it cannot be known"), USERFAULTFD),
            };
            Capability { name, needed_for, status, mend }
        };
        let items = vec![
            kernel(),
            Capability {
                name: "userfaultfd",
                needed_for: DESTINATION,
                status: Status::from_result(offered.as_ref()),
                mend: USERFAULTFD,
            },
            device(),
            feature(
                "faults of shared memory",
                DESTINATION,
                FeatureFlags::MISSING_SHMEM,
                NEWER_KERNEL,
            ),
            feature(
                "minor faults of shared memory",
                DESTINATION,
                sys::MINOR_SHMEM,
                "use Linux 5.14 or newer, on x86_64 or arm64 (CONFIG_HAVE_ARCH_USERFAULTFD_MINOR)",
            ),
            feature("thread ids of faults", DESTINATION, FeatureFlags::THREAD_ID, NEWER_KERNEL),
            feature(
                "write protection of shared memory",
                TRACKING,
                sys::WP_HUGETLBFS_SHMEM,
                NEWER_KERNEL,
            ),
            feature("write protection of holes", TRACKING, sys::WP_UNPOPULATED, NEWER_KERNEL),
            feature("asynchronous write protection", TRACKING, sys::WP_ASYNC, NEWER_KERNEL),
            Capability {
                name: "PAGEMAP_SCAN",
                needed_for: TRACKING,
                status: Status::from_result(try_pagemap_scan()),
                mend: NEWER_KERNEL,
            },
            Capability {
                name: "pidfd_getfd",
                needed_for: BOTH,
                status: Status::from_result(try_pidfd_getfd()),
                mend: "use Linux 5.6 or newer, and run as root",
            },
            ptrace_scope(),
            privileges(),
            huge_pages(),
            kvm(),
        ];
        HostCapabilities { items }
    }

    /// True when nothing that this host needs to send and receive guests is missing.
    pub fn is_complete(&self) -> bool {
        self.items.iter().all(|item| !item.status.is_missing())
    }

    /// What this host lacks to receive guests.
    pub fn missing_to_receive(&self) -> impl Iterator<Item = &Capability> {
        self.items.iter().filter(|item| item.needed_for == DESTINATION && item.status.is_missing())
    }

    /// What this host, or this process, lacks to move QEMU guests at all, in either direction.
    pub fn missing_to_move_qemu(&self) -> impl Iterator<Item = &Capability> {
        let needed = |item: &&Capability| [DESTINATION, BOTH].contains(&item.needed_for);
        self.items.iter().filter(needed).filter(|item| item.status.is_missing())
    }

    /// Whether the kernel has all that tracking by write protection needs.
    pub(super) fn can_write_protect() -> bool {
        offered_features().is_ok_and(|offered| offered.contains(TRACK_FEATURES))
            && try_pagemap_scan().is_ok()
    }

    /// Whether the kernel has all that serving faults needs.
    pub fn can_serve_faults() -> bool {
        offered_features().is_ok_and(|offered| offered.contains(FAULT_FEATURES))
    }
}

fn offered_features() -> io::Result<FeatureFlags> {
    let uffd = sys::own_userfaultfd()?;
    Ok(sys::uffd_api(uffd.as_fd(), FeatureFlags::empty())?)
}

/// A scan of one page of this process's own, which changes nothing.
fn try_pagemap_scan() -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let local = 0u8;
    let page = &raw const local as u64 & !0xfff;
    let mut found = [sys::ScannedRegion::default()];
    let query = sys::PagemapQuery::Written;
    sys::pagemap_scan(pagemap.as_fd(), page, page + 0x1000, query, &mut found)?;
    Ok(())
}

fn try_pidfd_getfd() -> io::Result<()> {
    let me = sys::pidfd_open(std::process::id())?;
    let file = File::open("/proc/self/status")?;
    sys::pidfd_getfd(me.as_fd(), file.as_raw_fd())?;
    Ok(())
}

fn kernel() -> Capability {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let status = if cfg!(target_arch = "x86_64") {
        Status::Ok(release)
    } else {
        Status::Missing("system calls can be injected on x86_64 only".to_owned())
    };
    Capability { name: "kernel", needed_for: BOTH, status, mend: "use an x86_64 host" }
}

fn device() -> Capability {
    let opened = OpenOptions::new().read(true).write(true).open(sys::USERFAULTFD_DEVICE);
    let allowed = read("/proc/sys/vm/unprivileged_userfaultfd").is_some_and(|value| value == "1");
    let status = match opened {
        Ok(_) => Status::Ok(String::new()),
        // Then the system call does, whatever the guest's process is allowed.
        Err(error) if allowed => Status::Degraded(error.to_string()),
        Err(error) => Status::Missing(error.to_string()),
    };
    Capability {
        name: sys::USERFAULTFD_DEVICE,
        needed_for: BOTH,
        status,
        mend: "use Linux 6.1 or newer and run as root, or set vm.unprivileged_userfaultfd=1",
    }
}

fn ptrace_scope() -> Capability {
    let status = match read("/proc/sys/kernel/yama/ptrace_scope").as_deref() {
        None => Status::Ok("no Yama".to_owned()),
        Some("3") => Status::Missing("kernel.yama.ptrace_scope is 3: nobody may trace".to_owned()),
        Some(scope) => Status::Ok(format!("kernel.yama.ptrace_scope is {scope}")),
    };
    let mend = "remove kernel.yama.ptrace_scope=3 from the boot configuration and restart";
    Capability { name: "ptrace", needed_for: BOTH, status, mend }
}

/// Bits of `CapEff` in `/proc/self/status`.
const NEEDED_PRIVILEGES: [(&str, u32); 3] =
    [("CAP_SYS_PTRACE", 19), ("CAP_SYS_ADMIN", 21), ("CAP_DAC_OVERRIDE", 1)];

fn privileges() -> Capability {
    let status = read("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    let lacking = lacking_privileges(effective.unwrap_or_default());
    let status = if lacking.is_empty() {
        Status::Ok(String::new())
    } else {
        Status::Missing(format!("without {}", lacking.join(", ")))
    };
    Capability { name: "privileges", needed_for: BOTH, status, mend: "run as root" }
}

fn lacking_privileges(effective: u64) -> Vec<&'static str> {
    let lacks = |(name, bit): &(&'static str, u32)| (effective >> bit & 1 == 0).then_some(*name);
    NEEDED_PRIVILEGES.iter().filter_map(lacks).collect()
}

fn huge_pages() -> Capability {
    let setting = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let chosen = setting.split(['[', ']']).nth(1).unwrap_or("never").to_owned();
    let status = match chosen.as_str() {
        "always" | "force" | "within_size" => Status::Degraded(format!(
            "shared memory uses huge pages ({chosen}): a page that is touched takes 2 MiB"
        )),
        _ => Status::Ok(chosen),
    };
    Capability {
        name: "huge pages of shared memory",
        needed_for: "keeping holes as holes at the destination",
        status,
        mend: "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    }
}

fn kvm() -> Capability {
    let path = Path::new("/dev/kvm");
    let status = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Status::Ok(String::new()),
        Err(error) => Status::Degraded(format!("{error}; QEMU emulates (-accel tcg)")),
    };
    Capability {
        name: "/dev/kvm",
        needed_for: "guests at full speed, and the built-in microVM",
        status,
        mend: "enable virtualization in the firmware (or nested, on a virtual host), load kvm_intel or kvm_amd, and join group kvm",
    }
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_can_be_mended() {
        let host = HostCapabilities::probe();
        assert!(host.items.iter().all(|item| !item.mend.is_empty() && !item.needed_for.is_empty()));
        assert_eq!(host.is_complete(), !host.items.iter().any(|item| item.status.is_missing()));
    }

    #[test]
    fn features_that_no_kernel_has_are_missed() {
        let offered = offered_features().unwrap();
        assert!(offered.contains(FeatureFlags::MISSING_SHMEM), "{offered:?}");
        assert!(!offered.contains(FeatureFlags::from_bits_retain(1 << 60)));
    }

    #[test]
    fn privileges_are_told_by_name() {
        assert!(lacking_privileges(u64::MAX).is_empty());
        assert_eq!(lacking_privileges(1 << 21 | 1 << 1), ["CAP_SYS_PTRACE"]);
    }
}
