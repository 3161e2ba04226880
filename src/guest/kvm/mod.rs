//! The built-in microVM: a small guest of our own on KVM, whose memory checks itself.
//!
//! Its RAM is shared memory that is mapped twice in this process: [`GuestMemory`] is farfault's
//! alias, [`GuestMapping`] is what the guest sees; KVM's memory slots and userfaultfd know only the
//! second. So everything is as with a monitor in another process, and the engine cannot tell.
//!
//! | file | subject |
//! |---|---|
//! | `program.rs` | what the guest executes |
//! | `boot.rs` | its first memory and registers |
//! | `vm.rs` | the virtual machine and what KVM here can do |
//! | `vcpu.rs` | running and stopping |
//! | `state.rs` | the state that moves |
//! | `dirty_log.rs` | which pages were written |
//! | `tsc.rs` | the rate of the counter that guests see |

mod boot;
mod dirty_log;
mod ioctl;
mod program;
mod state;
#[cfg(test)]
mod tests;
mod tsc;
mod vcpu;
mod vm;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use self::dirty_log::DirtyLog;
use self::state::{STATE_VERSION, VmState};
use self::vcpu::{Outlet, Vcpu};
use self::vm::Vm;
use super::workload::{
    Gauge, GuestPlan, GuestStatus, Pacer, Pattern, Rate, WorkingGuest, Workload, total_status,
};
use super::{DestinationGuest, GuestError, Shape, SourceGuest};
use crate::memory::{DirtyTracker, GuestMapping, GuestMemory, TrackerKind, Userfault};

pub(crate) use self::tsc::khz as tsc_khz;

/// Whether guests can run here; the error says why not and what to do.
pub fn available() -> Result<(), GuestError> {
    vm::open().map(drop)
}

/// How many pages a guest here can check in a second, found by letting one do it for up to 0.3
/// seconds. Millions on hardware, hundreds where KVM is emulated: then the guest of native threads is
/// the better choice for all but small memory.
pub fn measure_speed() -> Result<u64, GuestError> {
    let workload = Workload { pattern: Pattern::Idle, rate: Rate::FlatOut };
    let plan =
        GuestPlan { memory_bytes: 2 << 20, used_percent: 100, workers: NonZeroU32::MIN, workload };
    let mut guest = KvmGuest::boot(&plan)?;
    guest.verify_all();
    let started = Instant::now();
    guest.resume()?;
    while guest.still_to_verify() > 0 && started.elapsed() < Duration::from_millis(300) {
        thread::sleep(Duration::from_micros(100));
    }
    let seconds = started.elapsed().as_secs_f64();
    guest.pause()?;
    Ok((guest.status().pages_verified as f64 / seconds) as u64)
}

/// The built-in microVM.
pub struct KvmGuest {
    // First: the vCPUs stop before anything that they use goes away.
    vcpus: Vec<Vcpu>,
    vm: Arc<Vm>,
    memory: Arc<GuestMemory>,
    shape: Shape,
    workload: Workload,
    gauges: Vec<Arc<Gauge>>,
    outlet: Arc<Outlet>,
}

impl KvmGuest {
    /// A guest that is ready to run, and paused: [`SourceGuest::resume`] starts it.
    pub fn boot(plan: &GuestPlan) -> Result<KvmGuest, GuestError> {
        let guest = Self::assemble(plan)?;
        let workers = plan.new_workers();
        boot::load(plan, &workers, &guest.vm.ram);
        Ok(guest)
    }

    /// An empty guest of the same shape, for one to arrive in.
    pub fn await_arrival(plan: &GuestPlan) -> Result<KvmGuest, GuestError> {
        Self::assemble(plan)
    }

    fn assemble(plan: &GuestPlan) -> Result<KvmGuest, GuestError> {
        plan.check().map_err(|error| GuestError::new(error.to_string()))?;
        let memory = Arc::new(GuestMemory::create(&plan.memory_layout())?);
        let vm = Arc::new(Vm::create(Arc::new(GuestMapping::new(&memory)?))?);
        let properties = BTreeMap::from(
            [
                ("vCPUs", plan.workers.to_string()),
                ("CPU (fingerprint of CPUID)", vm.cpuid_fingerprint()),
                ("XSAVE bytes", vm.abilities.xsave_bytes.to_string()),
                ("interrupt controllers", vm.abilities.irqchip.to_string()),
                ("device state version", STATE_VERSION.to_string()),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        let shape = Shape { monitor: "kvm".to_owned(), memory: plan.memory_layout(), properties };
        let outlet = Arc::new(Outlet::default());
        let mut guest = KvmGuest {
            vcpus: Vec::new(),
            vm,
            memory,
            shape,
            workload: plan.workload,
            gauges: Vec::new(),
            outlet,
        };
        for (id, worker) in (0..).zip(plan.new_workers()) {
            let vcpu = guest.vm.create_vcpu(id)?;
            boot::start(&vcpu, id, &worker)?;
            let gauge = Gauge::of(worker.pages());
            guest.gauges.push(gauge.clone());
            let (vm, outlet) = (guest.vm.clone(), guest.outlet.clone());
            guest.vcpus.push(Vcpu::spawn(vm, id, vcpu, gauge, outlet)?);
        }
        Ok(guest)
    }

    /// What the guest has printed here, up to 64 KiB.
    pub fn console(&self) -> String {
        self.outlet.console()
    }

    fn start(&mut self) -> Result<(), GuestError> {
        let vcpus = u32::try_from(self.vcpus.len()).ok().and_then(NonZeroU32::new);
        let vcpus = vcpus.ok_or_else(|| GuestError::new("the guest has been ended"))?;
        // None begins while another one has still to stop.
        let late: Vec<_> = self.vcpus.iter_mut().map(Vcpu::wait_if_late).collect();
        late.into_iter().collect::<Result<(), _>>()?;
        for (vcpu, gauge) in self.vcpus.iter_mut().zip(&self.gauges) {
            vcpu.run(Pacer::new(self.workload, vcpus, gauge.clone()))?;
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        self.vcpus.iter().for_each(Vcpu::ask_to_stop);
        // All of them, whatever becomes of one.
        let stopped: Vec<_> = self.vcpus.iter_mut().map(Vcpu::wait_stopped).collect();
        stopped.into_iter().collect()
    }
}

impl SourceGuest for KvmGuest {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        self.memory.clone()
    }

    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        match kind {
            TrackerKind::Auto if self.vm.abilities.manual_dirty_log => {
                Ok(Box::new(DirtyLog::new(self.vm.clone())?))
            }
            _ => Ok(self.vm.ram.tracker(kind, &self.memory)?),
        }
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.stop()
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        let vcpus = self.vcpus.iter().map(Vcpu::save).collect::<Result<_, _>>()?;
        let reports = self.gauges.iter().map(|gauge| (gauge.pages(), gauge.status())).collect();
        VmState::save(&self.vm, self.workload, reports, vcpus)?.encode()
    }

    fn has_small_state(&self) -> bool {
        true
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.start()
    }

    fn release(&mut self, quit: bool) -> Result<(), GuestError> {
        let stopped = self.stop();
        if quit {
            self.vcpus.clear();
        }
        stopped
    }
}

impl DestinationGuest for KvmGuest {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn memory(&self) -> Arc<GuestMemory> {
        self.memory.clone()
    }

    fn userfault(&mut self) -> Result<Userfault, GuestError> {
        let userfault = self.vm.ram.userfault()?;
        self.memory.punch_hole(userfault.pages())?;
        Ok(userfault)
    }

    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let mut state = VmState::decode(state, self.vcpus.len())?;
        for (vcpu, vcpu_state) in self.vcpus.iter().zip(state.vcpus.drain(..)) {
            vcpu.load(vcpu_state)?;
        }
        state.load(&self.vm)?;
        self.workload = state.workload;
        for (gauge, (pages, report)) in self.gauges.iter().zip(state.reports) {
            gauge.replace(pages, report);
        }
        Ok(())
    }

    fn run(&mut self) -> Result<(), GuestError> {
        self.start()
    }

    fn release(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn discard(&mut self) -> Result<(), GuestError> {
        self.vcpus.clear();
        Ok(())
    }
}

impl WorkingGuest for KvmGuest {
    fn status(&self) -> GuestStatus {
        total_status(&self.gauges)
    }

    fn verify_all(&self) {
        self.gauges.iter().for_each(|gauge| gauge.ask_to_verify());
    }

    fn still_to_verify(&self) -> u64 {
        self.gauges.iter().map(|gauge| gauge.verify_left.load(Relaxed)).sum()
    }

    fn failure(&self) -> Option<String> {
        self.outlet.failure().map(str::to_owned)
    }
}
