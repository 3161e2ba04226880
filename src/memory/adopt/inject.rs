//! One system call in the name of a thread of another process, by ptrace.
//!
//! The thread is stopped where it would take a signal, made to execute one `syscall` instruction of
//! the vdso, and given its registers back as they were, `orig_rax` included. So a system call that the
//! stop interrupted is restarted by the kernel as if nothing had happened. Its signals are blocked
//! meanwhile, and stay pending with all that they carry. See ptrace(2), "PTRACE_SEIZE" and "Group-stop".
#![allow(unsafe_code)]

use crate::memory::MemoryError;

/// A system call to make.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    /// For messages.
    pub(super) name: &'static str,
    pub(super) number: i64,
    pub(super) arguments: [u64; 3],
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn call_in_thread(
    _pid: u32,
    _thread: u32,
    _call: Call,
    _suspend_seccomp: bool,
    _instruction: u64,
) -> Result<i64, MemoryError> {
    Err(MemoryError::UnsupportedArchitecture)
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86_64::call_in_thread;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::time::{Duration, Instant};

    use nix::errno::Errno;
    use nix::sys::ptrace;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::Pid;

    use super::{Call, MemoryError};

    /// How long a thread may take to stop. One in uninterruptible sleep does not.
    const STOP_LIMIT: Duration = Duration::from_secs(5);
    /// Stops that may come before the one that follows the system call.
    const STEP_LIMIT: u32 = 100;
    /// `cs` of 64-bit user code.
    const USER_CODE_64: u64 = 0x33;
    /// Bytes of `syscall`.
    const INSTRUCTION_BYTES: u64 = 2;
    const TRAP_FLAG: u64 = 0x100;
    /// All but SIGTRAP, which tells that the step is done.
    const BLOCKED_SIGNALS: u64 = !(1 << (libc::SIGTRAP - 1));
    /// `PTRACE_O_SUSPEND_SECCOMP`.
    const SUSPEND_SECCOMP: i32 = 1 << 21;

    /// Makes `call` in `thread` of process `pid` and gives its result, an errno when negative.
    /// `instruction` is the address of a `syscall` instruction there.
    ///
    /// ptrace belongs to a thread, and a tracer that ends lets go of what it traces: so this works in
    /// a thread of its own, and the tracee is let go whatever happens.
    pub(crate) fn call_in_thread(
        pid: u32,
        thread: u32,
        call: Call,
        suspend_seccomp: bool,
        instruction: u64,
    ) -> Result<i64, MemoryError> {
        let work = move || Tracee::seize(pid, thread, suspend_seccomp)?.call(call, instruction);
        let name = "adopt";
        let tracer = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        let tracer = tracer.map_err(|source| MemoryError::Thread { name, source })?;
        tracer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    struct Tracee {
        thread: Pid,
    }

    impl Tracee {
        fn seize(pid: u32, thread: u32, suspend_seccomp: bool) -> Result<Self, MemoryError> {
            let tracee = Tracee { thread: Pid::from_raw(thread as i32) };
            let options = if suspend_seccomp { SUSPEND_SECCOMP } else { 0 };
            let options = ptrace::Options::from_bits_retain(options);
            match ptrace::seize(tracee.thread, options) {
                Err(Errno::EPERM) => match tracer_of(pid, thread) {
                    Some(tracer) => Err(MemoryError::AlreadyTraced { pid, tracer }),
                    None => Err(tracee.failed("trace it", Errno::EPERM)),
                },
                other => other.map(|()| tracee).map_err(|e| failed(thread, "trace it", e)),
            }
        }

        fn call(self, call: Call, instruction: u64) -> Result<i64, MemoryError> {
            self.stop()?;
            let original =
                ptrace::getregs(self.thread).map_err(|e| self.failed("read its registers", e))?;
            if original.cs != USER_CODE_64 {
                let _ = ptrace::detach(self.thread, None);
                return Err(MemoryError::UnsupportedArchitecture);
            }
            let mask = self.signal_mask()?;
            self.set_signal_mask(BLOCKED_SIGNALS)?;
            let result = self.step_over(call, instruction, original);
            // Whatever happened: the thread goes on where it was.
            ptrace::setregs(self.thread, original)
                .map_err(|e| self.failed("restore its registers", e))?;
            self.set_signal_mask(mask)?;
            ptrace::detach(self.thread, None).map_err(|e| self.failed("let it go", e))?;
            let (value, stopped_by) = result?;
            if let Some(signal) = stopped_by {
                // SIGSTOP cannot be blocked. It carries nothing, so that another one is as good.
                let _ = nix::sys::signal::kill(self.thread, signal);
            }
            Ok(value)
        }

        /// The call's result, and a signal that was held back and is due again.
        fn step_over(
            &self,
            call: Call,
            instruction: u64,
            original: libc::user_regs_struct,
        ) -> Result<(i64, Option<Signal>), MemoryError> {
            let mut registers = original;
            registers.rip = instruction;
            registers.rax = call.number as u64;
            // Not inside a system call: so nothing is restarted now.
            registers.orig_rax = u64::MAX;
            [registers.rdi, registers.rsi, registers.rdx] = call.arguments;
            registers.eflags &= !TRAP_FLAG;
            ptrace::setregs(self.thread, registers)
                .map_err(|e| self.failed("set its registers", e))?;
            let mut held_back = None;
            for _ in 0..STEP_LIMIT {
                ptrace::step(self.thread, None).map_err(|e| self.failed("step it", e))?;
                match self.wait(WaitPidFlag::empty())? {
                    WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                        let after = ptrace::getregs(self.thread)
                            .map_err(|e| self.failed("read its registers", e))?;
                        if after.rip == instruction + INSTRUCTION_BYTES {
                            return Ok((after.rax as i64, held_back));
                        }
                        return Err(self.failed("step over a system call of", Errno::EFAULT));
                    }
                    WaitStatus::Stopped(_, Signal::SIGSEGV | Signal::SIGBUS | Signal::SIGILL) => {
                        return Err(self.failed("step over a system call of", Errno::EFAULT));
                    }
                    WaitStatus::Stopped(_, signal) => held_back = Some(signal),
                    _ => {}
                }
            }
            Err(self.failed("step over a system call of", Errno::ETIMEDOUT))
        }

        /// Brings the thread to a stop where it would take a signal.
        fn stop(&self) -> Result<(), MemoryError> {
            ptrace::interrupt(self.thread).map_err(|e| self.failed("stop it", e))?;
            let asked = Instant::now();
            loop {
                match self.wait(WaitPidFlag::WNOHANG)? {
                    WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_STOP) => return Ok(()),
                    // A signal was faster: it is delivered, and our stop follows.
                    WaitStatus::Stopped(_, signal) => {
                        ptrace::cont(self.thread, signal)
                            .map_err(|e| self.failed("continue it", e))?;
                    }
                    _ if asked.elapsed() > STOP_LIMIT => {
                        return Err(self.failed("stop it", Errno::ETIMEDOUT));
                    }
                    _ if asked.elapsed() < Duration::from_millis(1) => std::thread::yield_now(),
                    _ => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        }

        /// Waits for this thread only, and only in the tracing thread: other children of this process
        /// are other people's to wait for.
        fn wait(&self, flags: WaitPidFlag) -> Result<WaitStatus, MemoryError> {
            let flags = flags | WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
            loop {
                match waitpid(self.thread, Some(flags)) {
                    Err(Errno::EINTR) => {}
                    Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(Errno::ECHILD) => {
                        return Err(MemoryError::ProcessGone);
                    }
                    other => return other.map_err(|e| self.failed("wait for it", e)),
                }
            }
        }

        fn signal_mask(&self) -> Result<u64, MemoryError> {
            let mut mask = 0u64;
            // SAFETY: the kernel writes the 8 bytes that the third argument announces.
            let done = unsafe {
                libc::ptrace(libc::PTRACE_GETSIGMASK, self.thread.as_raw(), 8usize, &raw mut mask)
            };
            Errno::result(done).map(|_| mask).map_err(|e| self.failed("read its signal mask", e))
        }

        fn set_signal_mask(&self, mask: u64) -> Result<(), MemoryError> {
            // SAFETY: the kernel reads the 8 bytes that the third argument announces.
            let done = unsafe {
                libc::ptrace(libc::PTRACE_SETSIGMASK, self.thread.as_raw(), 8usize, &raw const mask)
            };
            Errno::result(done).map(drop).map_err(|e| self.failed("set its signal mask", e))
        }

        fn failed(&self, action: &'static str, source: Errno) -> MemoryError {
            failed(self.thread.as_raw() as u32, action, source)
        }
    }

    fn failed(thread: u32, action: &'static str, source: Errno) -> MemoryError {
        match source {
            Errno::ESRCH => MemoryError::ProcessGone,
            source => MemoryError::Trace { thread, action, source },
        }
    }

    fn tracer_of(pid: u32, thread: u32) -> Option<u32> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).ok()?;
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
        tracer.trim().parse().ok().filter(|tracer| *tracer != 0)
    }
}
