//! Work that is finished also when this process is killed in the middle of it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, pipe2};

/// Two numbers, what the work gives.
pub(super) type Outcome = [i64; 2];

/// The name of the process that works, for whoever sees it. Not one that who kills `farfault` by name finds.
const NAME: &std::ffi::CStr = c"adopt";

/// Does `work` in a process of its own, and gives what it gives; `None` when that process was ended.
/// It takes no signal but SIGKILL, is in no group of processes that is killed with this one, and has none of
/// this process's files open. Only who kills all processes of a control group, or all with this command line,
/// reaches it too.
///
/// `work` may not allocate memory, take a lock or panic: other threads had the locks at the time of the
/// fork, and are not there.
///
/// # Errors
/// When there is no process to be had.
pub(super) fn outliving(work: impl FnOnce() -> Outcome) -> io::Result<Option<Outcome>> {
    // What is written has room, and is read when it must be there.
    let (receiver, sender) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
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
    while waitpid(child, None) == Err(Errno::EINTR) {}
    let mut message = [0; size_of::<Outcome>()];
    let told = File::from(receiver).read_exact(&mut message);
    let (numbers, _) = message.as_chunks::<8>();
    Ok(told.is_ok().then(|| [numbers[0], numbers[1]].map(i64::from_ne_bytes)))
}

/// Ends this process, a copy of another one, without the exit handlers and destructors of that.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        // SAFETY: nothing of this process is needed any more.
        unsafe { libc::_exit(0) }
    }
}

fn work_alone(sender: &OwnedFd, work: impl FnOnce() -> Outcome) -> ! {
    let end = End;
    let descriptor = sender.as_raw_fd() as u32;
    // SAFETY: nothing in this process uses the descriptors that are closed, locks are given up with their last
    // copy only, and the name is a live string.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, NAME.as_ptr());
        if descriptor > 0 {
            libc::syscall(libc::SYS_close_range, 0, descriptor - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, descriptor + 1, u32::MAX, 0);
    }
    let outcome = work();
    // SAFETY: as many bytes as the numbers have.
    unsafe { libc::write(descriptor as i32, outcome.as_ptr().cast(), size_of::<Outcome>()) };
    drop(end);
    unreachable!("it has ended")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::huge_pool::Forked;

    #[test]
    fn numbers_come_back_and_a_worker_that_ends_without_is_told_apart() {
        let _forked = Forked::begin();
        assert_eq!(outliving(|| [-7, i64::MAX]).unwrap(), Some([-7, i64::MAX]));
        // SAFETY: ends the forked process only.
        let ended = outliving(|| unsafe { libc::_exit(0) });
        assert_eq!(ended.unwrap(), None);
    }

    #[test]
    fn it_keeps_no_file_open_and_takes_no_signal() {
        let _forked = Forked::begin();
        // SAFETY: both only ask; a closed descriptor is an answer.
        let looked = outliving(|| unsafe {
            let open = (0..1024).filter(|fd| libc::fcntl(*fd, libc::F_GETFD) != -1).count();
            libc::raise(libc::SIGTERM);
            [open as i64, i64::from(libc::getsid(0) == libc::getpid())]
        });
        assert_eq!(looked.unwrap(), Some([1, 1]), "the pipe, and a session of its own");
    }
}
