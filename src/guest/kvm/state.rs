//! The complete state of the VM outside its RAM, as it travels.
//!
//! What exists is decided by KVM's capabilities, never by whether reading succeeds: a register class
//! that KVM says it has and cannot deliver is an error. The one exception is the kernel's own: its
//! list of MSRs holds some that the guest's CPUID hides, and those cannot be read.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::ioctl;
use super::vm::{Abilities, Vm, failed};
use crate::guest::workload::{GuestStatus, Workload};
use crate::guest::{DEVICE_STATE_LIMIT_BYTES, GuestError};

/// Changes whenever the encoding does; also part of the guest's shape.
pub(super) const STATE_VERSION: u16 = 1;

const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
const MSR_TSC: u32 = 0x10;
/// `KVM_SREGS2_FLAGS_PDPTRS_VALID`.
const PDPTRS_VALID: u64 = 1;
/// Clocks may differ by so much (in parts per million) without scaling: what NTP corrects.
const TSC_TOLERANCE_PPM: u64 = 250;

/// The device state of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct VmState {
    version: u16,
    /// Moves with the guest, so that it goes on at the same rate.
    pub(super) workload: Workload,
    /// How many pages each vCPU works on, and what it last reported.
    pub(super) reports: Vec<(u64, GuestStatus)>,
    pub(super) vcpus: Vec<VcpuState>,
    clock: kvm_clock_data,
    irqchips: Option<Vec<kvm_irqchip>>,
}

/// One vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct VcpuState {
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) pdptrs: Option<[u64; 4]>,
    pub(super) xsave: Vec<u32>,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debugregs: kvm_debugregs,
    pub(super) lapic: Option<kvm_lapic_state>,
    pub(super) msrs: Vec<(u32, u64)>,
    pub(super) events: kvm_vcpu_events,
    pub(super) tsc_khz: u32,
}

impl VmState {
    /// The state of a VM whose vCPUs are stopped and have given theirs.
    pub(super) fn save(
        vm: &Vm,
        workload: Workload,
        reports: Vec<(u64, GuestStatus)>,
        vcpus: Vec<VcpuState>,
    ) -> Result<VmState, GuestError> {
        let clock = vm.fd.get_clock().map_err(|error| failed("get the clock", error))?;
        let irqchip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            let got = vm.fd.get_irqchip(&mut chip);
            got.map(|()| chip).map_err(|error| failed("get an interrupt controller", error))
        };
        let irqchips = if vm.abilities.irqchip {
            Some(IRQCHIPS.into_iter().map(irqchip).collect::<Result<_, _>>()?)
        } else {
            None
        };
        Ok(VmState { version: STATE_VERSION, workload, reports, vcpus, clock, irqchips })
    }

    /// Sets what does not belong to a vCPU.
    pub(super) fn load(&self, vm: &Vm) -> Result<(), GuestError> {
        // The clock goes on from where it stopped; the flags describe the host it comes from.
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        vm.fd.set_clock(&clock).map_err(|error| failed("set the clock", error))?;
        if self.irqchips.is_some() != vm.abilities.irqchip {
            return Err(GuestError::new(
                "only one of the two hosts' KVM has interrupt controllers",
            ));
        }
        for chip in self.irqchips.iter().flatten() {
            vm.fd
                .set_irqchip(chip)
                .map_err(|error| failed("set an interrupt controller", error))?;
        }
        Ok(())
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, GuestError> {
        let bytes = postcard::to_stdvec(self)
            .map_err(|error| GuestError::new(format!("encode the device state: {error}")))?;
        assert!(bytes.len() <= DEVICE_STATE_LIMIT_BYTES, "64 vCPUs of some 10 KiB each");
        Ok(bytes)
    }

    /// Reads what [`Self::encode`] wrote, for a VM with `vcpus` vCPUs.
    pub(super) fn decode(bytes: &[u8], vcpus: usize) -> Result<VmState, GuestError> {
        let bad = |what: String| GuestError::new(format!("the device state that arrived {what}"));
        if bytes.len() > DEVICE_STATE_LIMIT_BYTES {
            return Err(bad(format!("has {} bytes", bytes.len())));
        }
        // The version stands first, so that it can be read whatever follows.
        let (version, _) = postcard::take_from_bytes::<u16>(bytes)
            .map_err(|error| bad(format!("cannot be read: {error}")))?;
        if version != STATE_VERSION {
            return Err(bad(format!("has version {version}, this program {STATE_VERSION}"))
                .hint("run the same version of farfault on both hosts"));
        }
        let (state, rest) = postcard::take_from_bytes::<VmState>(bytes)
            .map_err(|error| bad(format!("cannot be read: {error}")))?;
        if !rest.is_empty() {
            return Err(bad(format!("has {} bytes too many", rest.len())));
        }
        if state.vcpus.len() != vcpus || state.reports.len() != vcpus {
            return Err(bad(format!("is of {} vCPUs, not of {vcpus}", state.vcpus.len())));
        }
        Ok(state)
    }
}

impl VcpuState {
    /// Reads a vCPU that is out of `KVM_RUN` with nothing pending: see [`super::vcpu`].
    pub(super) fn save(vcpu: &VcpuFd, abilities: &Abilities) -> Result<VcpuState, GuestError> {
        // First, as getting it lets pending INIT and SIPI signals take effect.
        let mp_state = vcpu.get_mp_state().map_err(|error| failed("get the MP state", error))?;
        let sregs2 = match abilities.sregs2 {
            true => Some(ioctl::sregs2(vcpu).map_err(|error| failed("get sregs2", error))?),
            false => None,
        };
        Ok(VcpuState {
            mp_state,
            regs: vcpu.get_regs().map_err(|error| failed("get the registers", error))?,
            sregs: vcpu.get_sregs().map_err(|error| failed("get the segment registers", error))?,
            pdptrs: sregs2.filter(|s| s.flags & PDPTRS_VALID != 0).map(|s| s.pdptrs),
            xsave: ioctl::xsave(vcpu, abilities.xsave_bytes)
                .map_err(|error| failed("get the XSAVE state", error))?,
            xcrs: vcpu.get_xcrs().map_err(|error| failed("get the XCRs", error))?,
            debugregs: vcpu
                .get_debug_regs()
                .map_err(|error| failed("get the debug registers", error))?,
            lapic: match abilities.irqchip {
                true => Some(vcpu.get_lapic().map_err(|error| failed("get the LAPIC", error))?),
                false => None,
            },
            msrs: abilities
                .msrs
                .iter()
                .filter_map(|index| get_msr(vcpu, *index).transpose())
                .collect::<Result<_, _>>()?,
            // Last: reading other state may queue events.
            events: vcpu
                .get_vcpu_events()
                .map_err(|error| failed("get the pending events", error))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(|error| failed("get the TSC frequency", error))?,
        })
    }

    /// Sets a vCPU that has never run, or is out of `KVM_RUN` with nothing pending.
    ///
    /// The order matters: the MSR of the TSC deadline needs the LAPIC, the LAPIC its base in the
    /// segment registers.
    pub(super) fn load(&self, vcpu: &VcpuFd, abilities: &Abilities) -> Result<(), GuestError> {
        if self.xsave.len() != abilities.xsave_bytes.div_ceil(4) {
            let (there, here) = (self.xsave.len() * 4, abilities.xsave_bytes);
            return Err(GuestError::new(format!("XSAVE state of {there} bytes, KVM here: {here}")));
        }
        self.load_tsc_frequency(vcpu, abilities)?;
        vcpu.set_mp_state(self.mp_state).map_err(|error| failed("set the MP state", error))?;
        vcpu.set_regs(&self.regs).map_err(|error| failed("set the registers", error))?;
        vcpu.set_sregs(&self.sregs).map_err(|error| failed("set the segment registers", error))?;
        if let Some(pdptrs) = self.pdptrs {
            self.load_pdptrs(vcpu, abilities, pdptrs)?;
        }
        ioctl::set_xsave(vcpu, abilities.xsave_bytes, &self.xsave)
            .map_err(|error| failed("set the XSAVE state", error))?;
        vcpu.set_xcrs(&self.xcrs).map_err(|error| failed("set the XCRs", error))?;
        vcpu.set_debug_regs(&self.debugregs)
            .map_err(|error| failed("set the debug registers", error))?;
        match (&self.lapic, abilities.irqchip) {
            (Some(lapic), true) => {
                vcpu.set_lapic(lapic).map_err(|error| failed("set the LAPIC", error))?;
            }
            (None, false) => {}
            _ => return Err(GuestError::new("only one of the two hosts' KVM has a LAPIC")),
        }
        for (index, value) in &self.msrs {
            set_msr(vcpu, *index, *value)?;
        }
        self.warn_of_another_tsc(vcpu)?;
        vcpu.set_vcpu_events(&self.events).map_err(|error| failed("set the pending events", error))
    }

    fn load_pdptrs(
        &self,
        vcpu: &VcpuFd,
        abilities: &Abilities,
        pdptrs: [u64; 4],
    ) -> Result<(), GuestError> {
        if !abilities.sregs2 {
            return Err(GuestError::new(
                "the guest is in PAE mode, and KVM here cannot set page directory pointers",
            ));
        }
        let now = ioctl::sregs2(vcpu).map_err(|error| failed("get sregs2", error))?;
        let sregs = kvm_sregs2 { flags: now.flags | PDPTRS_VALID, pdptrs, ..now };
        ioctl::set_sregs2(vcpu, &sregs).map_err(|error| failed("set sregs2", error))
    }

    /// An emulated KVM may accept a TSC and go on showing the host's.
    fn warn_of_another_tsc(&self, vcpu: &VcpuFd) -> Result<(), GuestError> {
        let saved = self.msrs.iter().find(|(index, _)| *index == MSR_TSC);
        if let (Some((_, saved)), Some((_, now))) = (saved, get_msr(vcpu, MSR_TSC)?) {
            let second = u64::from(self.tsc_khz) * 1000;
            if now.wrapping_sub(*saved) > second {
                tracing::warn!(saved, now, "KVM here does not let the guest's TSC be set");
            }
        }
        Ok(())
    }

    fn load_tsc_frequency(&self, vcpu: &VcpuFd, abilities: &Abilities) -> Result<(), GuestError> {
        let here = vcpu.get_tsc_khz().map_err(|error| failed("get the TSC frequency", error))?;
        let tolerated = u64::from(here) * TSC_TOLERANCE_PPM / 1_000_000;
        if u64::from(here.abs_diff(self.tsc_khz)) <= tolerated {
            return Ok(());
        }
        if abilities.tsc_scaling {
            return vcpu
                .set_tsc_khz(self.tsc_khz)
                .map_err(|error| failed("set the TSC frequency", error));
        }
        tracing::warn!(
            source_khz = self.tsc_khz,
            here_khz = here,
            "the TSC runs at another frequency here, and this host cannot scale it"
        );
        Ok(())
    }
}

/// The value of an MSR, or `None` where this vCPU has no such MSR.
fn get_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<(u32, u64)>, GuestError> {
    let mut one = msr(index, 0)?;
    let got =
        vcpu.get_msrs(&mut one).map_err(|error| failed(&format!("get MSR {index:#x}"), error))?;
    Ok((got == 1).then(|| (index, one.as_slice()[0].data)))
}

fn set_msr(vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), GuestError> {
    // Some are read-only, and some do more than they should when written: where both hosts have the
    // same value, as mostly, nothing is to be done.
    if get_msr(vcpu, index)? == Some((index, value)) {
        return Ok(());
    }
    let set = vcpu
        .set_msrs(&msr(index, value)?)
        .map_err(|error| failed(&format!("set MSR {index:#x}"), error))?;
    if set == 1 {
        return Ok(());
    }
    Err(GuestError::new(format!("KVM here does not accept {value:#x} in MSR {index:#x}")))
}

fn msr(index: u32, data: u64) -> Result<Msrs, GuestError> {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry]).map_err(|error| failed("prepare an MSR", format!("{error:?}")))
}
