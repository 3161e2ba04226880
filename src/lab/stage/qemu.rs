//! QEMU guests of a laboratory: the command line, the sockets, and the end.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::guest_log::{GuestEar, GuestLog};
use super::place::Place;
use super::process::{Guarded, command_in, kill_by_pid_file, wait_for};
use super::qmp::Qmp;
use crate::guest::host_tsc_khz;

const PROGRAM: &str = "qemu-system-x86_64";
/// Under emulation, on a machine that is busy with other things.
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
const DISK_BYTES: u64 = 16 << 20;

/// QEMU's machine types that are moved here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// i440FX.
    Pc,
    /// With PCI Express.
    Q35,
    /// Without PCI.
    Microvm,
}

impl Machine {
    fn name(self) -> &'static str {
        match self {
            Machine::Pc => "pc",
            Machine::Q35 => "q35",
            Machine::Microvm => "microvm",
        }
    }

    /// The suffix of virtio devices on its bus.
    fn virtio(self) -> &'static str {
        if self == Machine::Microvm { "device" } else { "pci" }
    }
}

/// Where the guest's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ram {
    /// One shared file.
    Shared,
    /// Two shared files, a NUMA node each.
    SharedTwoNodes,
    /// QEMU's own memory, which no one else can see: QEMU's default.
    Private,
}

/// Which virtio devices it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// None.
    None,
    /// A network card, for work that uses it.
    Network,
    /// A network card, a disk and a random number generator, all in use besides the work.
    All,
}

/// What is in the guest's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Programs {
    /// The test guest alone.
    TestGuest,
    /// A redis server as well.
    Redis,
    /// Python with SQLite as well, and jobs for it.
    Python,
}

/// A guest to be made; the same on both sides.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// Its machine type.
    pub machine: Machine,
    /// All its memory, in MiB.
    pub memory_mib: u64,
    /// Where that is.
    pub ram: Ram,
    /// Where the files of shared memory are made.
    pub ram_directory: PathBuf,
    /// Mapped so that huge pages fit, where it is in a file.
    pub fits_huge_pages: bool,
    /// Its virtio devices.
    pub devices: Devices,
    /// Its disk is read and written past the host's page cache (`cache=none`).
    pub direct_disk: bool,
    /// What it does: `ff.*` words of the test guest.
    pub work: String,
    /// What it needs for that.
    pub programs: Programs,
    /// Further arguments of QEMU's.
    pub further: Vec<String>,
}

impl GuestSpec {
    /// Shared memory, no devices, doing `work`.
    pub fn new(machine: Machine, memory_mib: u64, work: &str) -> Self {
        GuestSpec {
            machine,
            memory_mib,
            ram: Ram::Shared,
            ram_directory: PathBuf::from("/dev/shm"),
            fits_huge_pages: false,
            devices: Devices::None,
            direct_disk: false,
            work: work.to_owned(),
            programs: Programs::TestGuest,
            further: Vec::new(),
        }
    }
}

/// Parameters of the guest's kernel that save some of the time that it takes to boot. Not `mitigations=off`, which
/// would save more: without page table isolation, QEMU 7.2's own migration under emulation loses writes.
const QUICK_UNDER_EMULATION: &str = "nokaslr cryptomgr.notests no_timer_check";

/// A guest: prepared, and perhaps running.
#[derive(Debug)]
pub struct Guest {
    /// What it says.
    pub log: GuestLog,
    /// What it hears.
    pub ear: GuestEar,
    name: String,
    arguments: Vec<String>,
    qmp: PathBuf,
    monitor: PathBuf,
    pid_file: PathBuf,
    errors: PathBuf,
    ram_files: Vec<PathBuf>,
    process: Option<Guarded>,
}

impl Guest {
    /// Makes the sockets and the command line; starts nothing. `name` is unique in the laboratory.
    pub fn prepare(place: &Place, name: &str, spec: &GuestSpec) -> Result<Self> {
        let (console, serial) =
            (place.path(&format!("{name}.console")), place.path(&format!("{name}.tty")));
        let mut guest = Guest {
            log: GuestLog::listen(&console)?,
            ear: GuestEar::listen(&serial)?,
            name: name.to_owned(),
            arguments: Vec::new(),
            qmp: place.path(&format!("{name}.qmp")),
            monitor: place.path(&format!("{name}.monitor")),
            pid_file: place.path(&format!("{name}.pid")),
            errors: place.path(&format!("{name}.stderr")),
            ram_files: Vec::new(),
            process: None,
        };
        let image = &place.tools().image;
        let (kernel, initrd) = (image.kernel.clone(), image.initrd_with(spec.programs)?);
        let machine = guest.memory_arguments(place, spec);
        guest.add(&["-machine", &machine, "-accel", "tcg,thread=single", "-cpu", "Westmere"]);
        guest.add(&["-smp", "1", "-nodefaults", "-display", "none", "-no-reboot"]);
        guest.add(&["-kernel", &text(&kernel), "-initrd", &text(&initrd)]);
        let io = if spec.devices == Devices::All { " ff.io=1" } else { "" };
        // See `host_tsc_khz`; its watchdog too takes a busy host for a bad counter.
        let clock = match host_tsc_khz() {
            Some(khz) => format!("tsc_early_khz={khz} tsc=reliable"),
            None => String::new(),
        };
        let append = format!("quiet panic=-1 {QUICK_UNDER_EMULATION} {clock} {}{io}", spec.work);
        guest.add(&["-append", &append]);
        guest.add(&["-chardev", &format!("socket,id=console,path={}", text(&console))]);
        guest.add(&["-device", "isa-debugcon,iobase=0xe9,chardev=console"]);
        guest.add(&["-chardev", &format!("socket,id=tty,path={}", text(&serial))]);
        guest.add(&["-serial", "chardev:tty"]);
        for socket in [guest.qmp.clone(), guest.monitor.clone()] {
            guest.add(&["-qmp", &format!("unix:{},server=on,wait=off", text(&socket))]);
        }
        let pid_file = text(&guest.pid_file);
        guest.add(&["-pidfile", &pid_file]);
        let bus = spec.machine.virtio();
        if spec.devices != Devices::None {
            let card = format!("virtio-net-{bus},netdev=net");
            guest.add(&["-netdev", "user,id=net", "-device", &card]);
        }
        if spec.devices == Devices::All {
            guest.add_disk(place, bus, spec.direct_disk)?;
            guest.add(&["-device", &format!("virtio-rng-{bus}")]);
        }
        guest.arguments.extend(spec.further.iter().cloned());
        Ok(guest)
    }

    /// Prepares a guest, starts it in the source's namespace, and waits until it has verified its
    /// memory once.
    pub fn boot(place: &Place, name: &str, spec: &GuestSpec) -> Result<Self> {
        let mut guest = Self::prepare(place, name, spec)?;
        guest.start(place.a().name(), &[])?;
        let working = guest.log.wait_until_working(BOOT_TIMEOUT);
        working.with_context(|| format!("guest {name}: {}", guest.errors()))?;
        Ok(guest)
    }

    /// Starts it in a namespace, with further arguments.
    pub fn start(&mut self, netns: &str, further: &[&str]) -> Result<()> {
        let mut command = command_in(netns, PROGRAM);
        command.args(&self.arguments[1..]).args(further);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&self.errors)?);
        self.process = Some(Guarded::spawn(&self.name, &mut command)?);
        wait_for("QEMU to open its monitor", BOOT_TIMEOUT, || {
            self.must_run()?;
            Ok(self.monitor.exists().then_some(()))
        })
    }

    /// An error that says why, once QEMU has ended, if it was started here.
    pub fn must_run(&mut self) -> Result<()> {
        if let Some(process) = &mut self.process
            && process.ended()?.is_some()
        {
            bail!("QEMU has ended: {}", self.errors());
        }
        Ok(())
    }

    /// The whole command line, the program first.
    pub fn command_line(&self) -> &[String] {
        &self.arguments
    }

    /// The QMP socket for farfault.
    pub fn qmp_path(&self) -> &Path {
        &self.qmp
    }

    /// A connection to the other QMP socket, which is for the test alone.
    pub fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.monitor)
    }

    /// The files of its memory; none when that is private.
    pub fn ram_files(&self) -> &[PathBuf] {
        &self.ram_files
    }

    /// The process, if it was started here and not by farfault.
    pub fn process(&mut self) -> Option<&mut Guarded> {
        self.process.as_mut()
    }

    /// Ends it without warning, whoever has started it.
    pub fn kill(&mut self) {
        drop(self.process.take());
        kill_by_pid_file(&self.pid_file);
    }

    /// The file that has the process id of its QEMU, whoever starts it.
    pub fn pid_file(&self) -> &Path {
        &self.pid_file
    }

    /// What its threads wait for, as the kernel tells, and what the monitor says: for a test that fails.
    pub fn diagnosis(&self) -> String {
        let pid = std::fs::read_to_string(&self.pid_file).unwrap_or_default();
        let mut lines = vec![format!("QEMU {}: {}", pid.trim(), self.errors())];
        let tasks = std::fs::read_dir(format!("/proc/{}/task", pid.trim()));
        for task in tasks.into_iter().flatten().flatten() {
            let read = |name: &str| std::fs::read_to_string(task.path().join(name));
            let [name, waits] = ["comm", "wchan"].map(|file| read(file).unwrap_or_default());
            lines.push(format!("thread {} waits in {}", name.trim(), waits.trim()));
        }
        let status = self.monitor().and_then(|mut monitor| monitor.status());
        lines.push(format!("status {status:?}, last heartbeat {:?}", self.log.last_beat()));
        lines.join("\n")
    }

    /// What QEMU has written to its standard error.
    pub fn errors(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default().trim().to_owned()
    }

    fn add(&mut self, arguments: &[&str]) {
        if self.arguments.is_empty() {
            self.arguments.push(PROGRAM.to_owned());
        }
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
    }

    /// Adds the memory, and gives the value for `-machine`.
    fn memory_arguments(&mut self, place: &Place, spec: &GuestSpec) -> String {
        let machine = spec.machine.name();
        self.add(&["-m", &format!("{}M", spec.memory_mib)]);
        let nodes = match spec.ram {
            Ram::Private => return machine.to_owned(),
            Ram::Shared => 1,
            Ram::SharedTwoNodes => 2,
        };
        for node in 0..nodes {
            let file_name = format!("{}-{}-ram{node}", place.name(), self.name);
            let path = spec.ram_directory.join(file_name);
            let mib = spec.memory_mib / nodes;
            let align = if spec.fits_huge_pages { ",align=2M" } else { "" };
            self.add(&[
                "-object",
                &format!(
                    "memory-backend-file,id=ram{node},size={mib}M,mem-path={},share=on{align}",
                    text(&path)
                ),
            ]);
            if nodes > 1 {
                self.add(&["-numa", &format!("node,nodeid={node},memdev=ram{node}")]);
            }
            self.ram_files.push(path);
        }
        if nodes == 1 { format!("{machine},memory-backend=ram0") } else { machine.to_owned() }
    }

    fn add_disk(&mut self, place: &Place, bus: &str, direct: bool) -> Result<()> {
        // One disk for both sides, as from a storage that both hosts reach.
        let disk = place.path("disk");
        let file = File::options().create(true).truncate(false).write(true).open(&disk)?;
        file.set_len(DISK_BYTES)?;
        let cache = if direct { "none" } else { "writeback" };
        let file = text(&disk);
        let drive =
            format!("file={file},format=raw,if=none,id=disk,file.locking=off,cache={cache}");
        self.add(&["-drive", &drive, "-device", &format!("virtio-blk-{bus},drive=disk")]);
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
        for file in &self.ram_files {
            let _ = std::fs::remove_file(file);
        }
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
