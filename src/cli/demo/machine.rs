//! The QEMU machine of the demo: what it needs of the host, and its command line.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};

use crate::engine::Failure;
use crate::guest::workload::{GuestPlan, Pattern, Rate};
use crate::units::format_bytes;

const PROGRAM: &str = "qemu-system-x86_64";
/// Where guest RAM has a name.
pub(super) const SHARED_MEMORY: &str = "/dev/shm";
const MIB: u64 = 1 << 20;
/// QEMU takes RAM in these.
const MEMORY_UNIT_BYTES: u64 = 2 * MIB;
/// Less, and the guest's Linux has no room beside what the workload uses.
const MEMORY_LEAST_BYTES: u64 = 128 * MIB;
/// The guest's Linux and what it has booted from.
const LINUX_BYTES: u64 = 64 * MIB;
/// To boot, and to fill the first GiB, emulated, on a busy host; each further GiB takes as long again.
const START_LIMIT: Duration = Duration::from_secs(180);
/// How often the guest tells what it has done.
const HEARTBEAT_MS: u32 = 20;
/// What the guest verifies a second before it is asked to verify all: nearly nothing, and not 0,
/// which means as fast as it can.
const VERIFIED_PER_S: u32 = 1;

/// What a QEMU guest is started from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Machine {
    kernel: PathBuf,
    initrd: PathBuf,
    /// KVM at the processor's speed, else TCG.
    kvm: bool,
    /// As QEMU tells it.
    pub(super) version: String,
}

impl Machine {
    /// Finds QEMU and the guest's image, in `image` or where `tools/build-guest` puts it.
    pub(super) fn find(image: Option<&Path>, kvm: bool) -> Result<Machine, Failure> {
        let version = qemu_version()?;
        let directory = match image {
            Some(directory) => directory.to_owned(),
            None => image_directories().into_iter().find(|it| has_image(it)).ok_or_else(|| {
                no_image("the guest of --guest qemu has not been built".to_owned())
            })?,
        };
        if !has_image(&directory) {
            let why = format!("there is no vmlinuz and initrd to read in {}", directory.display());
            return Err(no_image(why));
        }
        let directory = directory.canonicalize().unwrap_or(directory);
        let (kernel, initrd) = (directory.join("vmlinuz"), directory.join("initrd"));
        Ok(Machine { kernel, initrd, kvm, version })
    }

    /// Whether such a machine can be made, here and now.
    pub(super) fn check(&self, plan: &GuestPlan) -> Result<(), Failure> {
        let memory = plan.memory_bytes;
        if memory < MEMORY_LEAST_BYTES || !memory.is_multiple_of(MEMORY_UNIT_BYTES) {
            return Err(Failure::new(
                format!(
                    "guest memory of {memory} bytes: Linux in QEMU needs a multiple of 2 MiB, from \
                     128 MiB on"
                ),
                "give it with --memory, such as --memory 256MiB",
            ));
        }
        if plan.workers.get() > 1 {
            return Err(Failure::new(
                format!("{} vCPUs: the guest of --guest qemu works with one", plan.workers),
                "leave --cpus out",
            ));
        }
        let free = statvfs(SHARED_MEMORY)
            .map(|found| found.blocks_available() * found.fragment_size())
            .map_err(|error| Failure::plain(format!("{SHARED_MEMORY}: {error}")))?;
        let both = memory.saturating_mul(2);
        if both > free {
            return Err(Failure::new(
                format!(
                    "source and destination need {} in {SHARED_MEMORY}, and {} are free",
                    format_bytes(both),
                    format_bytes(free)
                ),
                "give the guest less with --memory, or enlarge it: mount -o remount,size=SIZE /dev/shm",
            ));
        }
        Ok(())
    }

    /// The command line, which both sides share but for the names of files. The guest speaks at the
    /// socket `console`, listens at `tty`, and has its memory in `ram`.
    pub(super) fn command(
        &self,
        plan: &GuestPlan,
        ram: &Path,
        console: &Path,
        tty: &Path,
    ) -> Vec<OsString> {
        let mib = plan.memory_bytes / MIB;
        let mut command: Vec<OsString> = vec![PROGRAM.into()];
        let mut add = |option: &str, value: String| command.extend([option.into(), value.into()]);
        add("-machine", "pc,memory-backend=ram0".to_owned());
        // A named model without AVX: with others QEMU emulates more than it must.
        let (accelerator, cpu) = if self.kvm { ("kvm", "host") } else { ("tcg", "Westmere") };
        add("-accel", accelerator.to_owned());
        add("-cpu", cpu.to_owned());
        add("-m", format!("{mib}M"));
        let file = format!("memory-backend-file,id=ram0,size={mib}M,mem-path={}", value(ram));
        add("-object", format!("{file},share=on"));
        add("-display", "none".to_owned());
        add("-append", kernel_words(plan));
        add("-chardev", format!("socket,id=console,path={}", value(console)));
        add("-device", "isa-debugcon,iobase=0xe9,chardev=console".to_owned());
        add("-chardev", format!("socket,id=tty,path={},server=on,wait=off", value(tty)));
        add("-serial", "chardev:tty".to_owned());
        command.extend(["-kernel".into(), self.kernel.clone().into()]);
        command.extend(["-initrd".into(), self.initrd.clone().into()]);
        command.extend(["-nodefaults".into(), "-no-reboot".into()]);
        command
    }
}

/// How long the two sides may take to start.
pub(super) fn start_limit(plan: &GuestPlan) -> Duration {
    let gibibytes = plan.memory_bytes.div_ceil(1 << 30);
    START_LIMIT * u32::try_from(gibibytes).unwrap_or(u32::MAX).clamp(1, 1000)
}

/// The plan in the words of the test guest.
fn kernel_words(plan: &GuestPlan) -> String {
    let pattern = match plan.workload.pattern {
        Pattern::Idle => "idle",
        Pattern::Sequential => "counter",
        Pattern::Sparse => "sparse",
        Pattern::HotCold => "hotcold",
        Pattern::WholePage => "random",
        Pattern::SequentialRead => "readseq",
        Pattern::RandomRead => "readrand",
    };
    let rate = match plan.workload.rate {
        Rate::FlatOut => 0,
        Rate::PerSecond(rate) => rate.get(),
    };
    let used_bytes = plan.memory_bytes / 100 * u64::from(plan.used_percent) - LINUX_BYTES;
    format!(
        "quiet panic=-1 tsc=reliable ff.ws={}M ff.pattern={pattern} ff.rate={rate} \
         ff.verify={VERIFIED_PER_S} ff.hb={HEARTBEAT_MS}",
        used_bytes / MIB
    )
}

/// A path inside of an option of QEMU's, where a comma is written twice.
pub(super) fn value(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn qemu_version() -> Result<String, Failure> {
    let output = Command::new(PROGRAM).arg("--version").output();
    let text = match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
        Ok(output) => return Err(no_qemu(format!("ends with {}", output.status))),
        Err(error) => return Err(no_qemu(error.to_string())),
    };
    let first = text.lines().next().unwrap_or_default();
    let version = first.trim_start_matches("QEMU emulator version ").split(' ').next();
    Ok(format!("QEMU {}", version.unwrap_or_default()))
}

fn no_qemu(why: String) -> Failure {
    Failure::new(
        format!("--guest qemu: {PROGRAM} cannot be started: {why}"),
        "install QEMU, on Debian and Ubuntu: apt-get install qemu-system-x86",
    )
}

fn no_image(why: String) -> Failure {
    Failure::new(
        why,
        "run tools/build-guest in the source tree, and farfault there or with --image DIRECTORY; it \
         needs Debian packages: apt-get install linux-image-cloud-amd64 cpio kmod",
    )
}

/// `target/guest` of the tree that this program was built in, and of the one we are in.
fn image_directories() -> Vec<PathBuf> {
    let built_in = env::current_exe().ok().and_then(|program| {
        let target = program.parent()?.parent()?;
        Some(target.join("guest"))
    });
    built_in.into_iter().chain([PathBuf::from("target/guest")]).collect()
}

fn has_image(directory: &Path) -> bool {
    ["vmlinuz", "initrd"].iter().all(|name| std::fs::File::open(directory.join(name)).is_ok())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    fn machine() -> Machine {
        let (kernel, initrd) = ("/g/vmlinuz".into(), "/g/initrd".into());
        Machine { kernel, initrd, kvm: false, version: "QEMU 7.2".to_owned() }
    }

    fn plan(memory_bytes: u64, work: &str) -> GuestPlan {
        let workload = work.parse().unwrap();
        GuestPlan { memory_bytes, used_percent: 85, workers: NonZeroU32::MIN, workload }
    }

    #[test]
    fn the_workload_is_told_in_the_guests_own_words() {
        let words = kernel_words(&plan(256 * MIB, "whole:700/s"));
        assert!(words.contains(" ff.ws=153M ff.pattern=random ff.rate=700 "), "{words}");
        let words = kernel_words(&plan(MEMORY_LEAST_BYTES, "read"));
        assert!(words.contains(" ff.ws=44M ff.pattern=readseq ff.rate=0 "), "{words}");
    }

    #[test]
    fn a_comma_in_a_name_does_not_end_it() {
        let ram = Path::new("/dev/shm/a,b/source");
        let command = machine().command(&plan(256 * MIB, "idle"), ram, ram, ram);
        let object = command.iter().find(|word| word.to_string_lossy().contains("mem-path"));
        let object = object.unwrap().to_string_lossy().into_owned();
        assert!(object.ends_with(",mem-path=/dev/shm/a,,b/source,share=on"), "{object}");
    }

    #[test]
    fn memory_that_linux_cannot_live_with_is_refused_with_advice() {
        for memory in [0, 8 * MIB, 256 * MIB + 4096, 1 << 50] {
            assert!(machine().check(&plan(memory, "idle")).unwrap_err().hint.is_some(), "{memory}");
        }
        assert_eq!(machine().check(&plan(128 * MIB, "idle")), Ok(()));
        let two = GuestPlan { workers: NonZeroU32::new(2).unwrap(), ..plan(128 * MIB, "idle") };
        assert!(machine().check(&two).unwrap_err().reason.contains("2 vCPUs"));
    }

    #[test]
    fn an_image_that_is_not_there_is_told_with_the_command_that_makes_it() {
        let failure = no_image("none".to_owned());
        assert!(failure.hint.unwrap().contains("tools/build-guest"));
        assert!(!has_image(Path::new("/no/such")));
    }
}
