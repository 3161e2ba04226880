//! A running process whose memory we share: what it has mapped, and a userfaultfd inside it.
//!
//! Nothing has to be prepared in the process. A userfaultfd belongs to the address space that made it,
//! so one system call must be made in the process's name (see `inject.rs`); its result is then copied
//! here with `pidfd_getfd(2)`. The process's own copy stays open on purpose: as long as it does, faults
//! that wait in the kernel go on waiting when farfault dies, and its successor finds it there.

mod huge_pages;
mod identity;
mod inject;
mod maps;
#[cfg(any(target_arch = "x86_64", test))]
mod outlive;
mod threads;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use userfaultfd::{FeatureFlags, Uffd};

use self::inject::Call;
use super::{Access, MemoryError, sys};

pub use huge_pages::HugePages;
pub use identity::ProcessIdentity;
pub use maps::{FileIdentity, Mapping};

/// Hands a descriptor to the process, as QMP's `getfd` does.
pub type PassDescriptor<'a> = &'a mut dyn FnMut(BorrowedFd<'_>) -> io::Result<()>;

/// Flag in the features of `/proc/PID/fdinfo` that says `UFFDIO_API` has been called.
const UFFD_INITIALISED: u64 = 1 << 31;
/// Most bytes of one mapping that are searched for a `syscall` instruction.
const SEARCH_LIMIT_BYTES: u64 = 4 << 20;

/// A running process.
#[derive(Debug)]
pub struct Adopted {
    pid: u32,
    pidfd: OwnedFd,
    start_time: u64,
}

impl Adopted {
    /// Takes hold of process `pid`. Another process that gets its number later is not mistaken for it.
    ///
    /// # Errors
    /// [`MemoryError::NoProcess`].
    pub fn attach(pid: u32) -> Result<Self, MemoryError> {
        let pidfd =
            sys::pidfd_open(pid).map_err(|source| MemoryError::NoProcess { pid, source })?;
        let start_time = threads::read_stat(format!("/proc/{pid}/stat").into())?.start_time;
        Ok(Adopted { pid, pidfd, start_time })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// When it started, in clock ticks after boot: with the number, what names it for good.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// What names it for good.
    pub fn identity(&self) -> ProcessIdentity {
        ProcessIdentity { pid: self.pid, start_ticks: self.start_time }
    }

    /// False once it has ended.
    pub fn is_alive(&self) -> bool {
        let mut poll_fd = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut poll_fd, PollTimeout::ZERO) == Ok(0)
    }

    /// All that it has mapped, in order of address.
    pub fn mappings(&self) -> Result<Vec<Mapping>, MemoryError> {
        let path = PathBuf::from(format!("/proc/{}/maps", self.pid));
        match std::fs::read(&path) {
            // A process that has ended has an empty list.
            Ok(text) if text.is_empty() => Err(MemoryError::ProcessGone),
            Ok(text) => maps::parse(&String::from_utf8_lossy(&text))
                .map_err(|line| MemoryError::ProcFormat { path, line }),
            Err(source) => Err(MemoryError::Proc { path, source }),
        }
    }

    /// Its shared mappings of files: what can be guest RAM that we map too. Everything else that it
    /// has is in [`Self::mappings`].
    pub fn shared_mappings(&self) -> Result<Vec<Mapping>, MemoryError> {
        let mut mappings = self.mappings()?;
        mappings.retain(|mapping| mapping.shared && mapping.identity.inode != 0);
        Ok(mappings)
    }

    /// Opens the file behind a mapping anew, also one that has no name any more.
    ///
    /// # Errors
    /// [`MemoryError::NoBacking`].
    pub fn open_backing(&self, mapping: &Mapping, access: Access) -> Result<File, MemoryError> {
        let (start, end) = mapping.first_piece;
        let by_mapping = format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid).into();
        let by_name = (!mapping.deleted).then(|| {
            // As the process sees it, which may have another root directory.
            PathBuf::from(format!("/proc/{}/root{}", self.pid, mapping.path))
        });
        // For a process without the privilege to open map_files.
        let descriptors = self.descriptors()?.into_iter().map(|(_, path)| path);
        let mut places = [by_mapping].into_iter().chain(by_name).chain(descriptors);
        let is_it = |path: &Path| {
            std::fs::metadata(path).is_ok_and(|file| identity_of(&file) == mapping.identity)
        };
        let open = |path: PathBuf| {
            let writable = access == Access::ReadWrite;
            is_it(&path).then(|| OpenOptions::new().read(true).write(writable).open(&path).ok())?
        };
        places
            .find_map(open)
            .ok_or_else(|| MemoryError::NoBacking { pid: self.pid, path: mapping.path.clone() })
    }

    /// A userfaultfd of the process, agreed on `features`: the one that an earlier farfault left in
    /// it with exactly these, or else a new one.
    ///
    /// A new one is made from `/dev/userfaultfd`, which `pass_fd` hands to the process (it works
    /// under every sandbox and user id); without that, or where it fails, by the system call. The
    /// thread that is borrowed for some microseconds is none of `avoid_threads` (the vCPUs), unless
    /// there is nothing but the main thread.
    ///
    /// # Errors
    /// What stood in the way of the last method tried.
    pub fn userfaultfd(
        &self,
        pass_fd: Option<PassDescriptor<'_>>,
        avoid_threads: &[u32],
        features: FeatureFlags,
    ) -> Result<Uffd, MemoryError> {
        if let Some(earlier) = self.kept_userfaultfd(features)? {
            return Ok(earlier);
        }
        let by_device = pass_fd.map(|pass| self.userfaultfd_from_device(pass, avoid_threads));
        let descriptor = match by_device {
            Some(Ok(descriptor)) => descriptor,
            Some(Err(MemoryError::ProcessGone)) => return Err(MemoryError::ProcessGone),
            Some(Err(error)) => {
                tracing::debug!(%error, "no userfaultfd by way of {}", sys::USERFAULTFD_DEVICE);
                self.userfaultfd_from_call(avoid_threads)?
            }
            None => self.userfaultfd_from_call(avoid_threads)?,
        };
        let copy = self.take_descriptor(descriptor)?;
        let agreed = sys::uffd_api(copy.as_fd(), features);
        agreed.map_err(|source| match source {
            Errno::EINVAL => MemoryError::MissingFeature {
                feature: format!("userfaultfd features {:#x}", features.bits()),
            },
            source => MemoryError::Userfault { action: "agree on its features", source },
        })?;
        Ok(into_uffd(copy))
    }

    fn userfaultfd_from_call(&self, avoid: &[u32]) -> Result<RawFd, MemoryError> {
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        let number = libc::SYS_userfaultfd;
        self.call(avoid, Call { name: "userfaultfd", number, arguments: [flags, 0, 0] })
    }

    fn userfaultfd_from_device(
        &self,
        pass: PassDescriptor<'_>,
        avoid: &[u32],
    ) -> Result<RawFd, MemoryError> {
        let missing = |source| MemoryError::Proc { path: sys::USERFAULTFD_DEVICE.into(), source };
        let device = OpenOptions::new().read(true).write(true).open(sys::USERFAULTFD_DEVICE);
        let device = device.map_err(missing)?;
        let number = device.metadata().map_err(missing)?.rdev();
        pass(device.as_fd()).map_err(missing)?;
        let is_it = |path: &Path| {
            std::fs::metadata(path)
                .is_ok_and(|file| file.file_type().is_char_device() && file.rdev() == number)
        };
        let there = self.descriptors()?.into_iter().rev().find(|(_, path)| is_it(path));
        let (there, _) = there.ok_or_else(|| missing(io::ErrorKind::NotFound.into()))?;
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
        let arguments = [there as u64, sys::USERFAULTFD_IOC_NEW, flags];
        self.call(avoid, Call { name: "ioctl", number: libc::SYS_ioctl, arguments })
    }

    /// The userfaultfd that an earlier farfault has left open in the process, agreed on exactly these
    /// features.
    pub fn kept_userfaultfd(&self, features: FeatureFlags) -> Result<Option<Uffd>, MemoryError> {
        let is_userfaultfd = |path: &PathBuf| {
            std::fs::read_link(path).is_ok_and(|to| to == Path::new("anon_inode:[userfaultfd]"))
        };
        for (descriptor, path) in self.descriptors()? {
            if is_userfaultfd(&path) && self.features_of(descriptor) == Some(features) {
                return Ok(Some(into_uffd(self.take_descriptor(descriptor)?)));
            }
        }
        Ok(None)
    }

    /// From the line `API: aa:FEATURES:IOCTLS`, hexadecimal.
    fn features_of(&self, descriptor: RawFd) -> Option<FeatureFlags> {
        let text =
            std::fs::read_to_string(format!("/proc/{}/fdinfo/{descriptor}", self.pid)).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("API:"))?;
        let features = u64::from_str_radix(line.trim().split(':').nth(1)?, 16).ok()?;
        Some(FeatureFlags::from_bits_retain(features & !UFFD_INITIALISED))
    }

    /// Its open descriptors in ascending order, and where they are seen.
    fn descriptors(&self) -> Result<Vec<(RawFd, PathBuf)>, MemoryError> {
        let path = PathBuf::from(format!("/proc/{}/fd", self.pid));
        let entries =
            std::fs::read_dir(&path).map_err(|source| MemoryError::Proc { path, source })?;
        let number = |entry: io::Result<std::fs::DirEntry>| {
            let path = entry.ok()?.path();
            Some((path.file_name()?.to_str()?.parse().ok()?, path))
        };
        let mut descriptors: Vec<(RawFd, PathBuf)> = entries.filter_map(number).collect();
        descriptors.sort_unstable();
        Ok(descriptors)
    }

    fn take_descriptor(&self, fd: RawFd) -> Result<OwnedFd, MemoryError> {
        let copy = sys::pidfd_getfd(self.pidfd.as_fd(), fd);
        copy.map_err(|source| MemoryError::TakeDescriptor { pid: self.pid, fd, source })
    }

    /// Makes a system call that gives a descriptor, in the process's name.
    fn call(&self, avoid: &[u32], call: Call) -> Result<RawFd, MemoryError> {
        if !self.is_alive() {
            return Err(MemoryError::ProcessGone);
        }
        let instruction = self.find_syscall_instruction()?;
        let seccomp = self.is_sandboxed();
        let mut refused = MemoryError::ProcessGone;
        for thread in threads::candidates(self.pid, avoid)? {
            match inject::call_in_thread(self.pid, thread, call, seccomp, instruction) {
                Ok(descriptor @ 0..) => return Ok(descriptor as RawFd),
                Ok(error) => {
                    let source = Errno::from_raw(-error as i32);
                    return Err(MemoryError::InjectedCall {
                        pid: self.pid,
                        call: call.name,
                        source,
                    });
                }
                // This thread has ended, or cannot be traced, as while what a killed farfault has begun is under
                // way: another may.
                Err(
                    error @ (MemoryError::ProcessGone
                    | MemoryError::Trace { .. }
                    | MemoryError::AlreadyTraced { .. }),
                ) => refused = error,
                Err(other) => return Err(other),
            }
        }
        Err(refused)
    }

    /// A sandbox may kill the process for a system call that it does not expect.
    fn is_sandboxed(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid));
        let status = status.unwrap_or_default();
        let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
        mode.is_some_and(|mode| mode.trim() != "0")
    }

    /// The address of a `syscall` instruction: in the vdso, or else in other code.
    fn find_syscall_instruction(&self) -> Result<u64, MemoryError> {
        let path = PathBuf::from(format!("/proc/{}/mem", self.pid));
        let failed = |source| MemoryError::Proc { path: path.clone(), source };
        let memory = File::open(&path).map_err(failed)?;
        let mut code: Vec<Mapping> =
            self.mappings()?.into_iter().filter(|m| m.executable).collect();
        code.sort_by_key(|mapping| mapping.path != "[vdso]");
        let mut bytes = Vec::new();
        for mapping in code {
            bytes.resize(mapping.size_bytes.min(SEARCH_LIMIT_BYTES) as usize, 0);
            // Not all that is mapped can be read, the vsyscall page for one.
            if memory.read_exact_at(&mut bytes, mapping.address).is_err() {
                continue;
            }
            if let Some(at) = bytes.windows(2).position(|pair| pair == [0x0f, 0x05]) {
                return Ok(mapping.address + at as u64);
            }
        }
        Err(failed(io::Error::new(io::ErrorKind::NotFound, "no syscall instruction")))
    }
}

fn identity_of(file: &std::fs::Metadata) -> FileIdentity {
    let (major, minor) = (libc::major(file.dev()), libc::minor(file.dev()));
    FileIdentity { major, minor, inode: file.ino() }
}

#[allow(unsafe_code)]
fn into_uffd(descriptor: OwnedFd) -> Uffd {
    // SAFETY: an open userfaultfd that nobody else owns, given away here.
    unsafe { Uffd::from_raw_fd(descriptor.into_raw_fd()) }
}

/// For fuzzing: whether `text` could be what the kernel says of a process.
pub(super) fn reads_as_proc(text: &str) -> bool {
    maps::parse(text).is_ok() | threads::parse_stat(text).is_some()
}

#[cfg(test)]
mod tests;
