//! A vCPU and its thread: running, stopping without losing an exit, and access to its state.
//!
//! Stopping follows KVM's documentation of `immediate_exit`: the flag is set and the thread gets a
//! signal. In `KVM_RUN` the signal ends it; before it, the flag makes it return at once; so there is
//! no window between. An exit that the thread is handling meanwhile is finished first, and
//! `KVM_RUN` entered once more, which completes the instruction (the register of an `in` gets its
//! value) and returns with `EINTR`: only then is the state whole.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::os::fd::AsFd;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::program::{CONSOLE_PORT, REPORT_PORT, TASK_PORT, encode, status_from};
use super::state::VcpuState;
use super::vm::{Vm, failed};
use crate::guest::GuestError;
use crate::guest::workload::{Gauge, Pacer};

/// A vCPU that has not stopped after this long waits for a page that does not come.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// What the console keeps; a guest that prints more loses the rest.
const CONSOLE_LIMIT_BYTES: usize = 64 << 10;
/// Ends `KVM_RUN`. Free for programs, ignored by default, and not used by the libraries here.
const KICK: Signal = Signal::SIGURG;

/// What all vCPUs of a guest write to.
#[derive(Debug, Default)]
pub(super) struct Outlet {
    console: Mutex<Vec<u8>>,
    failure: OnceLock<String>,
}

impl Outlet {
    pub(super) fn console(&self) -> String {
        let bytes = self.console.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Why a vCPU stopped by itself.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    fn print(&self, bytes: &[u8]) {
        let mut console = self.console.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let room = CONSOLE_LIMIT_BYTES - console.len();
        console.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}

enum Command {
    Run(Pacer),
    Save(Sender<Result<VcpuState, GuestError>>),
    Load(Box<VcpuState>, Sender<Result<(), GuestError>>),
    #[cfg(test)]
    Inspect(Box<dyn FnOnce(&VcpuFd) + Send>),
}

/// The owner's end of a vCPU: its thread holds the other.
pub(super) struct Vcpu {
    id: u32,
    // `None` only while it is dropped: then the thread ends.
    commands: Option<Sender<Command>>,
    stopped: Receiver<Result<(), String>>,
    stop: Arc<AtomicBool>,
    kick: KickFlag,
    thread: Option<JoinHandle<()>>,
    running: bool,
}

impl Vcpu {
    /// Starts the thread of a vCPU, which waits.
    pub(super) fn spawn(
        vm: Arc<Vm>,
        id: u32,
        vcpu: VcpuFd,
        gauge: Arc<Gauge>,
        outlet: Arc<Outlet>,
    ) -> Result<Vcpu, GuestError> {
        install_kick_handler()?;
        let kick = KickFlag::map(&vcpu, vm.fd.run_size())?;
        let (commands, inbox) = channel();
        let (outbox, stopped) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let runner = Runner { vcpu, vm, stop: stop.clone(), gauge, outlet };
        let thread = thread::Builder::new()
            .name(format!("vcpu-{id}"))
            .spawn(move || runner.serve(&inbox, &outbox))
            .map_err(|error| failed("start a vCPU thread", error))?;
        let (commands, thread) = (Some(commands), Some(thread));
        Ok(Vcpu { id, commands, stopped, stop, kick, thread, running: false })
    }

    /// Waits until a vCPU that was asked to stop, and had not stopped in time, has.
    pub(super) fn wait_if_late(&mut self) -> Result<(), GuestError> {
        if self.stop.load(SeqCst) { self.wait_stopped() } else { Ok(()) }
    }

    /// Lets the vCPU run; `pacer` answers its questions for work. Harmless when it runs.
    pub(super) fn run(&mut self, pacer: Pacer) -> Result<(), GuestError> {
        if self.running {
            return Ok(());
        }
        self.stop.store(false, SeqCst);
        self.kick.set(false);
        self.send(Command::Run(pacer))?;
        self.running = true;
        Ok(())
    }

    /// Asks the vCPU to stop, without waiting: so that several stop together.
    pub(super) fn ask_to_stop(&self) {
        if !self.running {
            return;
        }
        self.stop.store(true, SeqCst);
        self.kick.set(true);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
            // SAFETY: the thread has not been joined, so its id is valid; the signal has a handler.
            // It fails only when the thread has ended, which `wait_stopped` reports.
            let _ = unsafe { libc::pthread_kill(thread.as_pthread_t(), KICK as c_int) };
        }
    }

    /// Waits until a vCPU that was asked to stop has.
    pub(super) fn wait_stopped(&mut self) -> Result<(), GuestError> {
        if !self.running {
            return Ok(());
        }
        match self.stopped.recv_timeout(STOP_LIMIT) {
            Ok(outcome) => {
                self.running = false;
                outcome.map_err(|what| GuestError::new(format!("vCPU {} failed: {what}", self.id)))
            }
            Err(RecvTimeoutError::Timeout) => Err(GuestError::new(format!(
                "vCPU {} has not stopped within {STOP_LIMIT:?}: it waits for a page that does not come",
                self.id
            ))),
            Err(RecvTimeoutError::Disconnected) => Err(self.gone()),
        }
    }

    /// The state of the stopped vCPU.
    pub(super) fn save(&self) -> Result<VcpuState, GuestError> {
        let (reply, answer) = channel();
        self.send(Command::Save(reply))?;
        answer.recv().map_err(|_| self.gone())?
    }

    /// Sets the state of the stopped vCPU.
    pub(super) fn load(&self, state: VcpuState) -> Result<(), GuestError> {
        let (reply, answer) = channel();
        self.send(Command::Load(Box::new(state), reply))?;
        answer.recv().map_err(|_| self.gone())?
    }

    /// Does something with the descriptor of the stopped vCPU.
    #[cfg(test)]
    pub(super) fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> T {
        let (reply, answer) = channel();
        let look = move |vcpu: &VcpuFd| drop(reply.send(look(vcpu)));
        self.send(Command::Inspect(Box::new(look))).unwrap();
        answer.recv().unwrap()
    }

    fn send(&self, command: Command) -> Result<(), GuestError> {
        debug_assert!(!self.running, "commands are for a stopped vCPU");
        let commands = self.commands.as_ref().ok_or_else(|| self.gone())?;
        commands.send(command).map_err(|_| self.gone())
    }

    fn gone(&self) -> GuestError {
        GuestError::new(format!("the thread of vCPU {} has ended", self.id))
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.ask_to_stop();
        if let Err(error) = self.wait_stopped() {
            tracing::warn!(%error, "dropping a vCPU");
        }
        self.commands = None;
        // A thread that still waits for a page is left behind; it keeps alive all that it uses.
        if let Some(thread) = self.thread.take().filter(|_| !self.running) {
            // It cannot have panicked with anything worth passing on.
            let _ = thread.join();
        }
    }
}

struct Runner {
    // Before `vm`: the memory that the VM names goes last.
    vcpu: VcpuFd,
    vm: Arc<Vm>,
    stop: Arc<AtomicBool>,
    gauge: Arc<Gauge>,
    outlet: Arc<Outlet>,
}

impl Runner {
    fn serve(mut self, inbox: &Receiver<Command>, outbox: &Sender<Result<(), String>>) {
        // Each answer may find its receiver gone: then nobody waits for it.
        while let Ok(command) = inbox.recv() {
            match command {
                Command::Run(pacer) => {
                    let outcome = self.run(pacer);
                    if let Err(what) = &outcome {
                        let _ = self.outlet.failure.set(what.clone());
                    }
                    let _ = outbox.send(outcome);
                }
                Command::Save(reply) => {
                    let _ = reply.send(VcpuState::save(&self.vcpu, &self.vm.abilities));
                }
                Command::Load(state, reply) => {
                    let _ = reply.send(state.load(&self.vcpu, &self.vm.abilities));
                }
                #[cfg(test)]
                Command::Inspect(look) => look(&self.vcpu),
            }
        }
    }

    /// Runs the guest until it is asked to stop, with no exit left half done.
    fn run(&mut self, mut pacer: Pacer) -> Result<(), String> {
        loop {
            let report = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(CONSOLE_PORT, bytes)) => {
                    self.outlet.print(bytes);
                    false
                }
                Ok(VcpuExit::IoOut(REPORT_PORT, _)) => true,
                Ok(VcpuExit::IoIn(TASK_PORT, data)) => {
                    let task = encode(pacer.next(&self.stop)).to_le_bytes();
                    let fits = data.len().min(task.len());
                    data[..fits].copy_from_slice(&task[..fits]);
                    false
                }
                Ok(other) => return Err(format!("unexpected exit: {other:?}")),
                Err(error) => match error.errno() {
                    libc::EINTR | libc::EAGAIN if self.stop.load(SeqCst) => return Ok(()),
                    libc::EINTR | libc::EAGAIN => false,
                    _ => return Err(format!("KVM_RUN: {error}")),
                },
            };
            if report {
                let regs = self.vcpu.get_regs().map_err(|e| format!("KVM_GET_REGS: {e}"))?;
                self.gauge.report(status_from(&regs));
            }
        }
    }
}

/// A second mapping of a vCPU's `kvm_run` page, of which only the byte `immediate_exit` is used:
/// the thread that stops the vCPU writes it while the vCPU's own thread is in `KVM_RUN`.
struct KickFlag {
    page: NonNull<u8>,
    size_bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only accessed atomically.
unsafe impl Send for KickFlag {}

impl KickFlag {
    fn map(vcpu: &VcpuFd, size_bytes: usize) -> Result<KickFlag, GuestError> {
        let length = size_bytes.try_into().map_err(|error| failed("size of kvm_run", error))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the descriptor stays open during this borrow of `vcpu`.
        let fd =
            unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(vcpu)) };
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let page = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, fd.as_fd(), 0) };
        let page = page.map_err(|error| failed("map kvm_run", error))?.cast();
        Ok(KickFlag { page, size_bytes })
    }

    fn set(&self, on: bool) {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: within the mapping, which lives as long as `self`; KVM itself and the vCPU's thread
        // only read this byte.
        let flag = unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset)) };
        flag.store(u8::from(on), SeqCst);
    }
}

impl Drop for KickFlag {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this size, and not used any more.
        let unmapped = unsafe { munmap(self.page.cast(), self.size_bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

/// Gives [`KICK`] a handler that does nothing, so that it ends system calls and no more.
fn install_kick_handler() -> Result<(), GuestError> {
    extern "C" fn ignore(_: c_int) {}
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    let outcome = INSTALLED.get_or_init(|| {
        // Without SA_RESTART, or system calls would go on.
        let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, which is safe at any point.
        unsafe { sigaction(KICK, &action) }.map(drop)
    });
    outcome.map_err(|errno| failed("install the handler of SIGURG", errno))
}
