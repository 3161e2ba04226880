//! Work that is finished also when this process is killed in the middle of it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2};

/// Two numbers, what the work gives.
pub(super) type Outcome = [i64; 2];

/// The name of the process that works, for whoever sees it.
const NAME: &std::ffi::CStr = c"farfault-adopt";

/// Does `work` in a process of its own, and gives what it gives; `None` when that process was ended.
/// It takes no signal but SIGKILL, is in no group of processes that is killed with this one, and has none of
/// this process's files open. Only who kills all processes of a control group reaches it too.
///
/// `work` may not allocate memory, take a lock or panic: other threads had the locks at the time of the
/// fork, and are not there.
///
/// # Errors
/// When there is no process to be had.
pub(super) fn outliving(work: impl FnOnce() -> Outcome) -> io::Result<Option<Outcome>> {
    let (receiver, sender) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // From the first moment on: nothing may end it half way.
    let signals = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: the child makes system calls only, and ends in `work_alone`; see above.
    let forked = unsafe { fork() };
    if matches!(forked, Ok(ForkResult::Child)) {
        work_alone(&sender, work);
    }
    let _ = signals.thread_set_mask();
    drop(sender);
    let child = match forked? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => unreachable!("it has ended in `work_alone`"),
    };
    let mut message = [0; size_of::<Outcome>()];
    let told = File::from(receiver).read_exact(&mut message);
    reap(child);
    let (numbers, _) = message.as_chunks::<8>();
    Ok(told.is_ok().then(|| [numbers[0], numbers[1]].map(i64::from_ne_bytes)))
}

fn work_alone(sender: &OwnedFd, work: impl FnOnce() -> Outcome) -> ! {
    let descriptor = sender.as_raw_fd() as u32;
    // SAFETY: nothing in this process uses the descriptors that are closed, locks are given up with their last
    // copy only, and the name is a live string.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, NAME.as_ptr());
        for (first, last) in [(0, descriptor.wrapping_sub(1)), (descriptor + 1, u32::MAX)] {
            if first <= last {
                libc::syscall(libc::SYS_close_range, first, last, 0);
            }
        }
    }
    let outcome = work();
    // SAFETY: as many bytes as the numbers have; then this process ends at once, without the exit handlers of
    // the one that it is a copy of.
    unsafe {
        libc::write(descriptor as i32, outcome.as_ptr().cast(), size_of::<Outcome>());
        libc::_exit(0)
    }
}

fn reap(child: Pid) {
    while waitpid(child, None) == Err(Errno::EINTR) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_and_a_worker_that_ends_without_is_told_apart() {
        assert_eq!(outliving(|| [-7, i64::MAX]).unwrap(), Some([-7, i64::MAX]));
        // SAFETY: ends the forked process only.
        let ended = outliving(|| unsafe { libc::_exit(0) });
        assert_eq!(ended.unwrap(), None);
    }

    #[test]
    fn it_keeps_no_file_open_and_takes_no_signal() {
        // SAFETY: both only ask; a closed descriptor is an answer.
        let looked = outliving(|| unsafe {
            let open = (0..1024).filter(|fd| libc::fcntl(*fd, libc::F_GETFD) != -1).count();
            libc::raise(libc::SIGTERM);
            [open as i64, i64::from(libc::getsid(0) == libc::getpid())]
        });
        assert_eq!(looked.unwrap(), Some([1, 1]), "the pipe, and a session of its own");
    }
}
