//! For tests: a process that maps a guest's RAM and does to it what it is told, in the place of a guest.
#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};

use super::GuestMemory;
use super::huge_pool::Forked;
use crate::page::{PAGE_SIZE_BYTES, PageIndex};

/// What the process can do. All work on its own mapping.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Command {
    /// Fill the page with this word, from user mode.
    Write = 1,
    /// Fill the page with this byte by read(2): a write in kernel mode.
    WriteByKernel = 2,
    /// Give the page's first word.
    Read = 3,
    /// Give a mixture of all words of the page, such that each change changes it.
    ReadWhole = 4,
    /// madvise(MADV_REMOVE), as a balloon does.
    Remove = 5,
    /// Start this many threads that block in system calls, and give how many run.
    StartThreads = 6,
    /// How often one of those system calls ended other than by its timeout or its data.
    Disturbances = 7,
}

/// The process; killed and reaped when dropped.
pub(crate) struct TestGuest {
    pid: libc::pid_t,
    socket: UnixStream,
    addresses: Vec<u64>,
    memory_layout: super::MemoryLayout,
    _forked: Forked,
}

impl TestGuest {
    /// A process with its own mapping of all RAM, nothing of it touched.
    pub(crate) fn start(memory: &GuestMemory) -> Self {
        let forked = Forked::begin();
        let files = memory.region_files().unwrap();
        let maps: Vec<_> = files
            .iter()
            .map(|region| {
                let mut options = memmap2::MmapOptions::new();
                options.offset(region.file_offset_bytes).len(region.layout.size_bytes as usize);
                options.map_raw(&region.file).unwrap()
            })
            .collect();
        let addresses = maps.iter().map(|map| map.as_ptr() as u64).collect();
        let (ours, theirs) = UnixStream::pair().unwrap();
        // SAFETY: the child runs `serve` and nothing else, and ends in it. `serve` allocates only to
        // start threads, which glibc allows after a fork.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
        if pid == 0 {
            serve(theirs);
        }
        // From here on only the child has the guest's mapping.
        drop(maps);
        (&ours).read_exact(&mut [0]).unwrap();
        let memory_layout = memory.layout().clone();
        TestGuest { pid, socket: ours, addresses, memory_layout, _forked: forked }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid as u32
    }

    /// Where the regions are in the process, in layout order.
    pub(crate) fn addresses(&self) -> &[u64] {
        &self.addresses
    }

    pub(crate) fn write(&mut self, page: PageIndex, word: u64) {
        self.command(Command::Write, self.address(page), word);
    }

    pub(crate) fn write_by_kernel(&mut self, page: PageIndex, byte: u8) {
        self.command(Command::WriteByKernel, self.address(page), u64::from(byte));
    }

    pub(crate) fn read(&mut self, page: PageIndex) -> u64 {
        self.command(Command::Read, self.address(page), 0)
    }

    pub(crate) fn read_whole(&mut self, page: PageIndex) -> u64 {
        self.command(Command::ReadWhole, self.address(page), 0)
    }

    pub(crate) fn remove(&mut self, page: PageIndex) {
        self.command(Command::Remove, self.address(page), 0);
    }

    pub(crate) fn start_threads(&mut self, count: u64) {
        assert_eq!(self.command(Command::StartThreads, count, 0), count);
    }

    pub(crate) fn disturbances(&mut self) -> u64 {
        self.command(Command::Disturbances, 0, 0)
    }

    fn address(&self, page: PageIndex) -> u64 {
        let (region, offset) = self.memory_layout.locate(page).unwrap();
        self.addresses[region] + offset
    }

    fn command(&mut self, command: Command, first: u64, second: u64) -> u64 {
        let message = [command as u64, first, second].map(u64::to_ne_bytes).concat();
        self.socket.write_all(&message).unwrap();
        let mut reply = [0; 8];
        self.socket.read_exact(&mut reply).unwrap();
        u64::from_ne_bytes(reply)
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        kill_and_reap(self.pid);
    }
}

/// Another process that does `work` again and again until it is killed, as it is when dropped.
pub(crate) struct Worker {
    pid: libc::pid_t,
    _forked: Forked,
}

impl Worker {
    pub(crate) fn start(mut work: impl FnMut()) -> Self {
        let forked = Forked::begin();
        // SAFETY: the child does its work and nothing else, until it is killed. What that allocates glibc
        // allows after a fork.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
        if pid == 0 {
            // SAFETY: plain numbers; the child must not outlive the test.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            loop {
                work();
            }
        }
        Worker { pid, _forked: forked }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        kill_and_reap(self.pid);
    }
}

fn kill_and_reap(child: libc::pid_t) {
    // SAFETY: our own child, not yet reaped, so that the number is still its own.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
}

/// What a page of `word`s gives for [`TestGuest::read_whole`].
pub(crate) fn mixture(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0, |sum, word| sum.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word ^ 1))
}

static DISTURBANCES: AtomicU64 = AtomicU64::new(0);

fn serve(mut socket: UnixStream) -> ! {
    // SAFETY: plain numbers; the child must not outlive the test.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    close_userfaultfds();
    socket.write_all(b"!").unwrap();
    let mut message = [0; 24];
    while socket.read_exact(&mut message).is_ok() {
        let part = |n: usize| u64::from_ne_bytes(message[n * 8..][..8].try_into().unwrap());
        let reply = obey(part(0), part(1), part(2));
        if socket.write_all(&reply.to_ne_bytes()).is_err() {
            break;
        }
    }
    // SAFETY: ends this process at once, without the exit handlers of the test program.
    unsafe { libc::_exit(0) }
}

/// Other tests' userfaultfds, which the fork has copied, are not this guest's.
fn close_userfaultfds() {
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let is_one = |to: std::path::PathBuf| to.to_string_lossy().contains("userfaultfd]");
        if std::fs::read_link(&path).is_ok_and(is_one) {
            let descriptor = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            // SAFETY: nothing in this process uses it.
            unsafe { libc::close(descriptor) };
        }
    }
}

fn obey(command: u64, first: u64, second: u64) -> u64 {
    let words = first as *mut u64;
    // SAFETY: the test gives addresses of whole pages in this process's own mapping of guest RAM.
    let word = |n: usize| unsafe { AtomicU64::from_ptr(words.add(n)) };
    let all = || (0..PAGE_SIZE_BYTES / 8).map(word);
    if command == Command::Write as u64 {
        all().for_each(|w| w.store(second, Ordering::Relaxed));
    } else if command == Command::WriteByKernel as u64 {
        let (mut sender, receiver) = UnixStream::pair().unwrap();
        sender.write_all(&[second as u8; PAGE_SIZE_BYTES]).unwrap();
        // SAFETY: the kernel writes within the page, see above.
        let got = unsafe { libc::read(receiver.as_raw_fd(), words.cast(), PAGE_SIZE_BYTES) };
        assert_eq!(got, PAGE_SIZE_BYTES as isize);
    } else if command == Command::Read as u64 {
        return word(0).load(Ordering::Relaxed);
    } else if command == Command::ReadWhole as u64 {
        return mixture(all().map(|w| w.load(Ordering::Relaxed)));
    } else if command == Command::Remove as u64 {
        // SAFETY: takes the page's content away, which is what is asked.
        let done = unsafe { libc::madvise(words.cast(), PAGE_SIZE_BYTES, libc::MADV_REMOVE) };
        assert_eq!(done, 0);
    } else if command == Command::StartThreads as u64 {
        let kinds: [fn() -> bool; 4] = [sleep, poll, wait_on_futex, read_pipe];
        for n in 0..first as usize {
            let call = kinds[n % kinds.len()];
            std::thread::spawn(move || {
                loop {
                    if !call() {
                        DISTURBANCES.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        return first;
    } else if command == Command::Disturbances as u64 {
        return DISTURBANCES.load(Ordering::Relaxed);
    }
    0
}

/// The four kinds of system call restart differently after an interruption. Each is true when it
/// ended as it should.
fn sleep() -> bool {
    let wait = libc::timespec { tv_sec: 0, tv_nsec: 3_000_000 };
    // SAFETY: a live structure; no remainder is asked for.
    unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &wait, std::ptr::null_mut()) == 0 }
}

fn poll() -> bool {
    // SAFETY: no descriptors, only the timeout.
    unsafe { libc::poll(std::ptr::null_mut(), 0, 3) == 0 }
}

fn wait_on_futex() -> bool {
    let futex = 0u32;
    let wait = libc::timespec { tv_sec: 0, tv_nsec: 3_000_000 };
    // SAFETY: a live word and a live structure; nobody wakes it, so that it must time out.
    let result = unsafe { libc::syscall(libc::SYS_futex, &futex, libc::FUTEX_WAIT, 0, &wait) };
    result == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ETIMEDOUT)
}

fn read_pipe() -> bool {
    let (receiver, mut sender) = std::io::pipe().unwrap();
    let writer = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(3));
        sender.write_all(b"x").unwrap();
    });
    let mut byte = 0u8;
    // SAFETY: one byte, into a live one.
    let got = unsafe { libc::read(receiver.as_raw_fd(), (&raw mut byte).cast(), 1) };
    writer.join().unwrap();
    got == 1
}
