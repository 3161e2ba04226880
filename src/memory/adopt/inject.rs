//! One system call in the name of a thread of another process, by ptrace.
//!
//! The thread is stopped where it would take a signal, made to execute one `syscall` instruction of
//! the vdso, and given its registers back as they were, `orig_rax` included. So a system call that the
//! stop interrupted is restarted by the kernel as if nothing had happened. Its signals are blocked
//! meanwhile, and stay pending with all that they carry. See ptrace(2), "PTRACE_SEIZE" and "Group-stop".
//!
//! A tracer that ends lets go of what it traces, with the registers as they are at that moment: the other
//! process would crash. So a process of its own does all this, which a killed farfault leaves at work; a thread of
//! this one only where the other may not, as where only its ancestors may trace a process (Yama).
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
    use std::io;
    use std::time::{Duration, Instant};

    use nix::errno::Errno;
    use nix::sys::ptrace;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::Pid;

    use super::{Call, MemoryError};
    use crate::memory::adopt::outlive::outliving;

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

    /// What failed, and the kernel's answer; ESRCH where the thread has ended.
    #[derive(Clone, Copy, Debug)]
    struct Trouble {
        action: Action,
        errno: Errno,
    }

    /// What is done to a thread.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Action {
        Trace = 1,
        Stop,
        ReadRegisters,
        FindMode,
        ReadMask,
        SetMask,
        SetRegisters,
        Restore,
        Step,
        Wait,
        LetGo,
    }

    impl Action {
        const ALL: [Action; 11] = [
            Action::Trace,
            Action::Stop,
            Action::ReadRegisters,
            Action::FindMode,
            Action::ReadMask,
            Action::SetMask,
            Action::SetRegisters,
            Action::Restore,
            Action::Step,
            Action::Wait,
            Action::LetGo,
        ];

        fn text(self) -> &'static str {
            match self {
                Action::Trace => "trace it",
                Action::Stop => "stop it",
                Action::ReadRegisters => "read its registers",
                Action::FindMode => "make a 64-bit system call in it",
                Action::ReadMask => "read its signal mask",
                Action::SetMask => "set its signal mask",
                Action::SetRegisters => "set its registers",
                Action::Restore => "put it back as it was",
                Action::Step => "step over a system call of",
                Action::Wait => "wait for it",
                Action::LetGo => "let it go",
            }
        }
    }

    /// Makes `call` in `thread` of process `pid` and gives its result, an errno when negative.
    /// `instruction` is the address of a `syscall` instruction there. The tracee is let go whatever
    /// happens, also when this process is killed.
    pub(crate) fn call_in_thread(
        pid: u32,
        thread: u32,
        call: Call,
        suspend_seccomp: bool,
        instruction: u64,
    ) -> Result<i64, MemoryError> {
        let attempt = move || {
            let tracee = Tracee::seize(thread, suspend_seccomp);
            match tracee.and_then(|tracee| tracee.call(call, instruction)) {
                Ok(value) => [0, value],
                Err(Trouble { action, errno }) => [action as i64, i64::from(errno as i32)],
            }
        };
        let outcome = outliving(attempt).map_err(|source| MemoryError::Tracer { pid, source })?;
        let mut outcome = outcome.ok_or_else(|| {
            let source =
                io::Error::other("the process that did it was ended; look after the guest");
            MemoryError::Tracer { pid, source }
        })?;
        let refused = [Action::Trace as i64, i64::from(Errno::EPERM as i32)];
        if outcome == refused && tracer_of(pid, thread).is_none() {
            // What is traced belongs to a thread, which therefore has nothing else to do and ends.
            let name = "adopt";
            let tracer = std::thread::Builder::new().name(name.to_owned()).spawn(attempt);
            let tracer = tracer.map_err(|source| MemoryError::Thread { name, source })?;
            outcome = tracer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        let [kind, value] = outcome;
        let Some(action) = Action::ALL.into_iter().find(|action| *action as i64 == kind) else {
            return Ok(value);
        };
        match (action, Errno::from_raw(value as i32)) {
            (_, Errno::ESRCH) => Err(MemoryError::ProcessGone),
            (Action::FindMode, _) => Err(MemoryError::UnsupportedArchitecture),
            (Action::Trace, source @ Errno::EPERM) => Err(match tracer_of(pid, thread) {
                Some(tracer) => MemoryError::AlreadyTraced { pid, tracer },
                None => MemoryError::Trace { thread, action: action.text(), source },
            }),
            (_, source) => Err(MemoryError::Trace { thread, action: action.text(), source }),
        }
    }

    struct Tracee {
        thread: Pid,
    }

    impl Tracee {
        fn seize(thread: u32, suspend_seccomp: bool) -> Result<Self, Trouble> {
            let tracee = Tracee { thread: Pid::from_raw(thread as i32) };
            let options = if suspend_seccomp { SUSPEND_SECCOMP } else { 0 };
            let options = ptrace::Options::from_bits_retain(options);
            ptrace::seize(tracee.thread, options).map_err(trouble(Action::Trace))?;
            Ok(tracee)
        }

        fn call(self, call: Call, instruction: u64) -> Result<i64, Trouble> {
            self.stop()?;
            let original = ptrace::getregs(self.thread).map_err(trouble(Action::ReadRegisters))?;
            if original.cs != USER_CODE_64 {
                let _ = ptrace::detach(self.thread, None);
                return Err(Trouble { action: Action::FindMode, errno: Errno::ENOSYS });
            }
            let mask = self.signal_mask()?;
            self.set_signal_mask(BLOCKED_SIGNALS)?;
            let result = self.step_over(call, instruction, original);
            // Whatever happened: the thread goes on where it was.
            let restored = ptrace::setregs(self.thread, original).map_err(trouble(Action::Restore));
            self.set_signal_mask(mask)?;
            restored?;
            ptrace::detach(self.thread, None).map_err(trouble(Action::LetGo))?;
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
        ) -> Result<(i64, Option<Signal>), Trouble> {
            let mut registers = original;
            registers.rip = instruction;
            registers.rax = call.number as u64;
            // Not inside a system call: so nothing is restarted now.
            registers.orig_rax = u64::MAX;
            [registers.rdi, registers.rsi, registers.rdx] = call.arguments;
            registers.eflags &= !TRAP_FLAG;
            ptrace::setregs(self.thread, registers).map_err(trouble(Action::SetRegisters))?;
            let mut held_back = None;
            for _ in 0..STEP_LIMIT {
                ptrace::step(self.thread, None).map_err(trouble(Action::Step))?;
                match self.wait(WaitPidFlag::empty())? {
                    WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                        let after =
                            ptrace::getregs(self.thread).map_err(trouble(Action::ReadRegisters))?;
                        if after.rip == instruction + INSTRUCTION_BYTES {
                            return Ok((after.rax as i64, held_back));
                        }
                        return Err(Trouble { action: Action::Step, errno: Errno::EFAULT });
                    }
                    WaitStatus::Stopped(_, Signal::SIGSEGV | Signal::SIGBUS | Signal::SIGILL) => {
                        return Err(Trouble { action: Action::Step, errno: Errno::EFAULT });
                    }
                    WaitStatus::Stopped(_, signal) => held_back = Some(signal),
                    _ => {}
                }
            }
            Err(Trouble { action: Action::Step, errno: Errno::ETIMEDOUT })
        }

        /// Brings the thread to a stop where it would take a signal.
        fn stop(&self) -> Result<(), Trouble> {
            ptrace::interrupt(self.thread).map_err(trouble(Action::Stop))?;
            let asked = Instant::now();
            loop {
                match self.wait(WaitPidFlag::WNOHANG)? {
                    WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_STOP) => return Ok(()),
                    // A signal was faster: it is delivered, and our stop follows.
                    WaitStatus::Stopped(_, signal) => {
                        ptrace::cont(self.thread, signal).map_err(trouble(Action::Stop))?;
                    }
                    _ if asked.elapsed() > STOP_LIMIT => {
                        return Err(Trouble { action: Action::Stop, errno: Errno::ETIMEDOUT });
                    }
                    _ if asked.elapsed() < Duration::from_millis(1) => std::thread::yield_now(),
                    _ => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        }

        fn wait(&self, flags: WaitPidFlag) -> Result<WaitStatus, Trouble> {
            let flags = flags | WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
            loop {
                match waitpid(self.thread, Some(flags)) {
                    Err(Errno::EINTR) => {}
                    Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(Errno::ECHILD) => {
                        return Err(Trouble { action: Action::Wait, errno: Errno::ESRCH });
                    }
                    other => return other.map_err(trouble(Action::Wait)),
                }
            }
        }

        fn signal_mask(&self) -> Result<u64, Trouble> {
            let mut mask = 0u64;
            // SAFETY: the kernel writes the 8 bytes that the third argument announces.
            let done = unsafe {
                libc::ptrace(libc::PTRACE_GETSIGMASK, self.thread.as_raw(), 8usize, &raw mut mask)
            };
            Errno::result(done).map(|_| mask).map_err(trouble(Action::ReadMask))
        }

        fn set_signal_mask(&self, mask: u64) -> Result<(), Trouble> {
            // SAFETY: the kernel reads the 8 bytes that the third argument announces.
            let done = unsafe {
                libc::ptrace(libc::PTRACE_SETSIGMASK, self.thread.as_raw(), 8usize, &raw const mask)
            };
            Errno::result(done).map(drop).map_err(trouble(Action::SetMask))
        }
    }

    fn trouble(action: Action) -> impl Fn(Errno) -> Trouble {
        move |errno| Trouble { action, errno }
    }

    fn tracer_of(pid: u32, thread: u32) -> Option<u32> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).ok()?;
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
        tracer.trim().parse().ok().filter(|tracer| *tracer != 0)
    }
}
