//! What can go wrong with guest memory, and what a person can do about it.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use super::table::Stage;
use crate::page::PageIndex;

/// An operating error of this room. [`MemoryError::hint`] tells what to do where a person can act.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region's file could not be mapped, sized or otherwise used.
    #[error("guest RAM region {region}: cannot {action}: {source}")]
    Backing {
        /// Name of the region.
        region: String,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A region's file ends before the region does; touching the rest would kill the process.
    #[error(
        "guest RAM region {region} needs {need_bytes} bytes of its file, which has {have_bytes}"
    )]
    BackingTooSmall {
        /// Name of the region.
        region: String,
        /// End of the region in its file.
        need_bytes: u64,
        /// Size of the file.
        have_bytes: u64,
    },
    /// A region lies on hugetlbfs, in pages of which a guest cannot be received into.
    #[error(
        "guest RAM region {region} of {} KiB is in huge pages of {} KiB: it is received into whole ones of 2048 KiB only",
        size_bytes >> 10, unit_bytes >> 10
    )]
    HugePages {
        /// Name of the region.
        region: String,
        /// Its size.
        size_bytes: u64,
        /// The size of its huge pages.
        unit_bytes: u64,
    },
    /// The pool of huge pages is too small.
    #[error("the pool of huge pages has no room for guest RAM region {region}: {source}")]
    NoHugePages {
        /// Name of the region.
        region: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A write to memory that was mapped for reading.
    #[error("guest RAM region {region} is mapped for reading only")]
    ReadOnly {
        /// Name of the region.
        region: String,
    },
    /// The file system of the guest RAM is full.
    #[error("no space left for guest RAM (page {page})")]
    NoSpace {
        /// The page that had no room.
        page: PageIndex,
    },
    /// A page to be mapped is a hole in its file.
    #[error("page {0} is a hole")]
    Hole(PageIndex),
    /// The process whose memory is shared has ended.
    #[error("the guest's process has ended")]
    ProcessGone,
    /// The thread that serves the guest's faults has failed: touches of missing pages wait from then on.
    #[error("the thread that serves the guest's faults has failed")]
    FaultReaderGone,
    /// A userfaultfd operation failed in a way that has no name of its own.
    #[error("userfaultfd: cannot {action}: {source}")]
    Userfault {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
    /// Another process has claimed the guest: see [`GuestMemory::claim`].
    ///
    /// [`GuestMemory::claim`]: super::GuestMemory::claim
    #[error("another farfault moves or measures this guest")]
    Claimed,
    /// Another userfaultfd is registered over a region.
    #[error("guest RAM region {region} is already watched by another userfaultfd")]
    RegisterBusy {
        /// Name of the region.
        region: String,
    },
    /// A region's mapping is of a kind that userfaultfd cannot serve.
    #[error("guest RAM region {region} is not shared memory that userfaultfd can {purpose}")]
    NotServable {
        /// Name of the region.
        region: String,
        /// "serve" or "track".
        purpose: &'static str,
    },
    /// The kernel kept refusing to map a page, asking to try again.
    #[error("page {page} could not be mapped: the kernel asked to try again for {waited_ms} ms")]
    MapStalled {
        /// The page.
        page: PageIndex,
        /// How long it was tried.
        waited_ms: u64,
    },
    /// The monitor's own tracking of writes failed.
    #[error("{tracker}: cannot {action}: {source}")]
    Tracker {
        /// Which one.
        tracker: &'static str,
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// The kernel lacks a feature.
    #[error("this kernel lacks {feature}")]
    MissingFeature {
        /// Its name.
        feature: String,
    },
    /// The kernel does not do to a process what it is asked to.
    #[error("cannot {action} of process {pid}: {source}")]
    Process {
        /// Which process.
        pid: u32,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
    /// A file of a process below `/proc` could not be read.
    #[error("cannot read {path}: {source}")]
    Proc {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file below `/proc` was not what it should be.
    #[error("{path}: cannot understand {line:?}")]
    ProcFormat {
        /// The file.
        path: PathBuf,
        /// The piece of text.
        line: String,
    },
    /// There is no process of that number.
    #[error("no process {pid}: {source}")]
    NoProcess {
        /// Its number.
        pid: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file behind a mapping of the process could not be opened.
    #[error("process {pid}: cannot open the file behind its mapping of {path}")]
    NoBacking {
        /// The process.
        pid: u32,
        /// The path as the process has it.
        path: String,
    },
    /// The process is traced by something else.
    #[error("process {pid} is being traced by process {tracer}")]
    AlreadyTraced {
        /// The process.
        pid: u32,
        /// Its tracer.
        tracer: u32,
    },
    /// A ptrace request was refused.
    #[error("thread {thread}: cannot {action}: {source}")]
    Trace {
        /// The thread.
        thread: u32,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
    /// The process that borrows a thread could not be started, or was ended.
    #[error("cannot borrow a thread of process {pid}: {source}")]
    Tracer {
        /// The process whose thread it is.
        pid: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A system call made in the process's name failed.
    #[error("process {pid}: {call} inside it failed: {source}")]
    InjectedCall {
        /// The process.
        pid: u32,
        /// The system call.
        call: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
    /// A process of another machine type.
    #[error("system calls can be injected on x86_64 into 64-bit processes only")]
    UnsupportedArchitecture,
    /// A descriptor could not be taken out of the process.
    #[error("process {pid}: cannot take a copy of its descriptor {fd}: {source}")]
    TakeDescriptor {
        /// The process.
        pid: u32,
        /// The descriptor there.
        fd: i32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The page table's file could not be made or opened.
    #[error("page table {path}: cannot {action}: {source}")]
    TableFile {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file that is not a page table of ours.
    #[error("page table {path}: {reason}")]
    NotATable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// At the switchover a page that nothing more was to come for had no content.
    #[error("page {page} is {stage:?} at the switchover, but the source will not send it again")]
    UnknownContent {
        /// The page.
        page: PageIndex,
        /// Its stage.
        stage: Stage,
    },
    /// A thread could not be started.
    #[error("cannot start thread {name}: {source}")]
    Thread {
        /// Its name.
        name: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl MemoryError {
    /// What a person can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            MemoryError::BackingTooSmall { .. } => {
                "the file behind guest RAM was cut short while in use; restart the guest".to_owned()
            }
            MemoryError::HugePages { region, .. } => format!(
                "give {region} a size that is a multiple of 2 MiB, and a memory backend on a hugetlbfs that is mounted \
                 with pagesize=2M, or on tmpfs (mem-path=/dev/shm/NAME,share=on,align=2M) with receive --huge-pages"
            ),
            MemoryError::NoHugePages { .. } => {
                "enlarge the pool (vm.nr_hugepages; on NUMA that of the node), or the size= of the hugetlbfs".to_owned()
            }
            MemoryError::NoSpace { .. } => {
                "free space in /dev/shm, or enlarge it: mount -o remount,size=SIZE /dev/shm; for RAM on hugetlbfs \
                 enlarge the pool of huge pages: vm.nr_hugepages".to_owned()
            }
            MemoryError::Claimed => {
                "see `farfault status` for the migrations of this host: wait until that one has ended, or end it with \
                 `farfault cancel`; an estimate ends by itself".to_owned()
            }
            MemoryError::RegisterBusy { .. } => {
                "the guest has not yet come here with all its memory (see `farfault status`), or the monitor itself uses userfaultfd (its own postcopy or background snapshot)".to_owned()
            }
            MemoryError::NotServable { .. } => {
                "guest RAM must be shared memory: -object memory-backend-file,mem-path=/dev/shm/NAME,share=on or memory-backend-memfd,share=on".to_owned()
            }
            MemoryError::MissingFeature { .. } => {
                "run `farfault doctor` to see what this kernel offers; Linux 6.7 has everything".to_owned()
            }
            MemoryError::Proc { source, .. }
            | MemoryError::TakeDescriptor { source, .. }
            | MemoryError::NoProcess { source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                "run farfault as root, or with CAP_SYS_PTRACE, beside the guest's process".to_owned()
            }
            MemoryError::Trace { source: Errno::EPERM, .. } => {
                "run farfault as root or with CAP_SYS_PTRACE; check kernel.yama.ptrace_scope (3 forbids it altogether)".to_owned()
            }
            MemoryError::NoBacking { .. } => {
                "run farfault as root (or with CAP_SYS_ADMIN, to open /proc/PID/map_files)".to_owned()
            }
            MemoryError::AlreadyTraced { tracer, .. } => {
                format!("let process {tracer} (a debugger, strace?) go of it and try again")
            }
            MemoryError::Tracer { source, .. } if source.kind() == io::ErrorKind::WouldBlock => {
                "there may be one process more: see ulimit -u, and pids.max of the control group".to_owned()
            }
            MemoryError::InjectedCall { call: "userfaultfd", source: Errno::EPERM, .. } => {
                "set vm.unprivileged_userfaultfd=1 while it is made, or use a kernel with /dev/userfaultfd (6.1 or newer)".to_owned()
            }
            MemoryError::InjectedCall { source: Errno::ENOSYS, .. } => {
                "the process's sandbox or the kernel refuses the call; use a kernel with /dev/userfaultfd (6.1 or newer)".to_owned()
            }
            _ => return None,
        };
        Some(hint)
    }
}
