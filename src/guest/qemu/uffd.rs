//! A userfaultfd of QEMU's address space.

use std::io;
use std::os::fd::BorrowedFd;

use qapi::qmp::{closefd, getfd};
use userfaultfd::{FeatureFlags, Uffd};

use super::qmp::Qmp;
use crate::memory::MemoryError;
use crate::memory::adopt::Adopted;

/// The name under which QEMU keeps `/dev/userfaultfd` for the moment.
const DEVICE_FD: &str = "farfault-userfaultfd";

/// Makes a userfaultfd inside QEMU and takes a copy of it. No vCPU stops for it.
///
/// Passing the device by QMP works in every sandbox; without it the memory room makes the system
/// call in QEMU's name.
pub(super) fn create(
    qmp: &mut Qmp,
    process: &Adopted,
    vcpu_threads: &[u32],
    features: FeatureFlags,
) -> Result<Uffd, MemoryError> {
    let mut passed = false;
    let mut pass = |device: BorrowedFd<'_>| {
        qmp.execute_with_fd(&getfd { fdname: DEVICE_FD.to_owned() }, device)
            .map_err(io::Error::other)?;
        passed = true;
        Ok(())
    };
    let created = process.userfaultfd(Some(&mut pass), vcpu_threads, features);
    if passed && let Err(error) = qmp.execute(&closefd { fdname: DEVICE_FD.to_owned() }) {
        tracing::debug!("QEMU keeps a descriptor of /dev/userfaultfd open: {error}");
    }
    created
}
