//! What forbids a move: devices and back ends whose writes to guest RAM cannot be seen from outside, and states
//! in which there is nothing to move.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC,
    TMPFS_MAGIC, XFS_SUPER_MAGIC, statfs,
};
use qapi::qmp::{ObjectPropertyInfo, qom_list};

use super::commands::{BlockNode, QueryBlockNodes, QueryMigrate, QueryStatus};
use super::qmp::{Qmp, QmpError, Version};
use super::refusal;
use crate::guest::GuestError;

/// A device or another object that the user added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Device {
    /// Its id, or its place among those without one, such as `device[0]`.
    pub(super) name: String,
    /// Its type, such as `virtio-net-pci`.
    pub(super) kind: String,
    /// Its place in QEMU's tree of objects.
    pub(super) path: String,
}

/// Containers of the devices that the user added, with and without an id.
const CONTAINERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Container of the objects that the user added, such as back ends of devices.
const OBJECTS: &str = "/objects";

/// File systems of which a read without `O_DIRECT` is always a copy out of the page cache.
const CACHED: [FsType; 6] = [
    EXT4_SUPER_MAGIC,
    XFS_SUPER_MAGIC,
    BTRFS_SUPER_MAGIC,
    TMPFS_MAGIC,
    NFS_SUPER_MAGIC,
    OVERLAYFS_SUPER_MAGIC,
];

const BY_HARDWARE: &str = "its hardware writes to guest RAM, and no page table tells of it";
const BY_ANOTHER_PROCESS: &str = "another process writes to guest RAM through its own mapping";

/// Devices by the beginning of their type, and why they cannot come along.
const IMMOVABLE: [(&str, &str); 8] = [
    ("vfio-", BY_HARDWARE),
    ("vhost-user-", BY_ANOTHER_PROCESS),
    ("vhost-vdpa-", BY_HARDWARE),
    ("ivshmem-", "its memory is shared with other guests"),
    ("nvdimm", "its memory is a file of this host"),
    ("virtio-pmem", "its memory is a file of this host"),
    ("virtio-mem", "it changes the size of the guest's RAM while it moves"),
    ("sgx-epc", "its memory cannot be read"),
];

/// Network back ends that no device type betrays.
const IMMOVABLE_NETWORKS: [(&str, &str); 2] =
    [("vhost-user", BY_ANOTHER_PROCESS), ("vhost-vdpa", BY_HARDWARE)];

/// Drivers of the block layer that no device type betrays: they are behind an ordinary disk.
const IMMOVABLE_DRIVERS: [(&str, &str); 5] = [
    ("nvme", BY_HARDWARE),
    ("nvme-io_uring", BY_HARDWARE),
    ("virtio-blk-vfio-pci", BY_HARDWARE),
    ("virtio-blk-vhost-user", BY_ANOTHER_PROCESS),
    ("virtio-blk-vhost-vdpa", BY_HARDWARE),
];

/// Back ends behind an ordinary `virtio-crypto`.
const IMMOVABLE_OBJECTS: [(&str, &str); 2] =
    [("cryptodev-vhost-user", BY_ANOTHER_PROCESS), ("cryptodev-vhost-vdpa", BY_HARDWARE)];

/// Drivers of the block layer that open files and devices of the host.
const FILE_DRIVERS: [&str; 3] = ["file", "host_device", "host_cdrom"];

/// Devices, by the beginning of their type, that hand the guest's own disk commands to the kernel, which pins the
/// pages that these name.
const PASSING_ON: [&str; 3] = ["scsi-block", "scsi-generic", "vhost-scsi"];

/// From this version on the list of block nodes can be had without repetitions.
const LISTS_NODES_FLAT: Version = Version(5, 0, 0);

/// The devices that the user added to the machine, in the order of their names.
pub(super) fn devices(qmp: &mut Qmp) -> Result<Vec<Device>, QmpError> {
    let mut devices = Vec::new();
    for container in CONTAINERS {
        devices.extend(children(qmp, container)?);
    }
    devices.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(devices)
}

fn children(qmp: &mut Qmp, container: &str) -> Result<Vec<Device>, QmpError> {
    let properties = qmp.execute(&qom_list { path: container.to_owned() })?;
    let child = |property| {
        let ObjectPropertyInfo { name, type_, .. } = property;
        let kind = type_.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
        let path = format!("{container}/{name}");
        Some(Device { name, kind, path })
    };
    Ok(properties.into_iter().filter_map(child).collect())
}

fn block_nodes(qmp: &mut Qmp) -> Result<Vec<BlockNode>, QmpError> {
    let flat = (qmp.version() >= LISTS_NODES_FLAT).then_some(true);
    qmp.execute(&QueryBlockNodes { flat })
}

/// Refuses devices, and back ends of devices, that write to guest RAM behind our back.
pub(super) fn check_devices(qmp: &mut Qmp, devices: &[Device]) -> Result<(), GuestError> {
    let bad = devices.iter().find_map(|device| {
        let (_, reason) = IMMOVABLE.iter().find(|(kind, _)| device.kind.starts_with(kind))?;
        Some((format!("{} ({})", device.name, device.kind), *reason))
    });
    if let Some((device, reason)) = bad {
        return Err(refusal(
            format!("device {device} cannot be moved: {reason}"),
            "unplug it (device_del) before the migration",
        ));
    }
    let networks = qmp.human("info network")?;
    for (kind, reason) in IMMOVABLE_NETWORKS {
        if let Some(line) = networks.lines().find(|l| l.contains(&format!("type={kind}"))) {
            let name = line.trim().trim_start_matches("\\ ").split(':').next().unwrap_or("");
            return Err(refusal(
                format!("network back end {name} ({kind}) cannot be moved: {reason}"),
                "use a tap device, with or without vhost=on",
            ));
        }
    }
    if let Some((node, reason)) = unseen_node(&block_nodes(qmp)?) {
        return Err(refusal(
            format!("block node {} ({}) cannot be moved: {reason}", node.name, node.drv),
            "unplug its disk (device_del, blockdev-del) before the migration, or open that by the host's kernel \
             (driver host_device)",
        ));
    }
    for object in children(qmp, OBJECTS)? {
        let immovable = IMMOVABLE_OBJECTS.iter().find(|(kind, _)| object.kind == *kind);
        if let Some((kind, reason)) = immovable {
            return Err(refusal(
                format!("object {} ({kind}) cannot be moved: {reason}", object.name),
                "unplug its device (device_del, object-del) before the migration, or use cryptodev-backend-builtin",
            ));
        }
    }
    Ok(())
}

/// The first node whose data comes into guest RAM unseen, and how.
fn unseen_node(nodes: &[BlockNode]) -> Option<(&BlockNode, &'static str)> {
    nodes.iter().find_map(|node| {
        let (_, reason) = IMMOVABLE_DRIVERS.iter().find(|(driver, _)| node.drv == *driver)?;
        Some((node, *reason))
    })
}

/// Whether disks may write to guest RAM past the page tables: into pages that the kernel has pinned at the start of a
/// request. A page that was marked then, and has been collected and read since, is not marked again.
/// `pid` is QEMU's process.
pub(super) fn reads_disks_directly(qmp: &mut Qmp, pid: u32) -> Result<bool, QmpError> {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let past_the_cache = |node: &BlockNode| is_direct(node) || !is_cached(node, &root);
    Ok(block_nodes(qmp)?.iter().any(past_the_cache) || devices(qmp)?.iter().any(passes_on))
}

/// Whether what a node opens, unless it asks for the contrary, is read through the host's page cache. On network file
/// systems and FUSE that is for the mount to say, and QEMU does not know.
fn is_cached(node: &BlockNode, root: &Path) -> bool {
    if !FILE_DRIVERS.contains(&node.drv.as_str()) {
        return true;
    }
    let path = root.join(node.file.trim_start_matches('/'));
    let is_device = path.metadata().is_ok_and(|file| file.file_type().is_block_device());
    is_device || statfs(&path).is_ok_and(|on| CACHED.contains(&on.filesystem_type()))
}

/// Whether a node reads past the host's page cache; one that does not tell is taken to do so if it could.
fn is_direct(node: &BlockNode) -> bool {
    let could = || FILE_DRIVERS.contains(&node.drv.as_str());
    node.cache.as_ref().map_or_else(could, |cache| cache.direct)
}

fn passes_on(device: &Device) -> bool {
    PASSING_ON.iter().any(|kind| device.kind.starts_with(kind))
}

/// Whether a source guest runs or is paused; any other state is refused.
pub(super) fn check_source_state(qmp: &mut Qmp) -> Result<bool, GuestError> {
    let running = check_run_state(&qmp.execute(&QueryStatus {})?.status)?;
    let migration = qmp.execute(&QueryMigrate {})?;
    if migration.is_active() {
        return Err(already_migrating());
    }
    match migration.blocked_reasons.first() {
        None => Ok(running),
        Some(reason) => Err(refusal(
            format!("QEMU cannot save the state of this guest: {reason}"),
            "remove the device or option that it names",
        )),
    }
}

/// Whether a source guest in QEMU's state `status` runs, or is paused; any other state is refused.
pub(super) fn check_run_state(status: &str) -> Result<bool, GuestError> {
    match status {
        "running" => Ok(true),
        "paused" | "prelaunch" => Ok(false),
        "inmigrate" => Err(refusal(
            "this QEMU waits for a guest (-incoming), so it has none to send",
            "give the QMP socket of the QEMU in which the guest runs",
        )),
        "postmigrate" => Err(refusal(
            "the guest of this QEMU has been migrated before, and may run elsewhere",
            "only if you are sure that it runs nowhere else, let it go on here with `cont` first",
        )),
        "finish-migrate" => Err(already_migrating()),
        other => Err(refusal(
            format!("the guest cannot be moved in the state {other}"),
            "look at QEMU's log and monitor, mend the guest and let it run",
        )),
    }
}

fn already_migrating() -> GuestError {
    refusal(
        "the guest is being migrated already",
        "wait until that migration has ended, or stop it with `migrate_cancel`",
    )
}

/// A destination must wait for its guest, with the stream yet to be named and not starting by itself.
pub(super) fn check_destination_state(
    qmp: &mut Qmp,
    command_line: &[String],
) -> Result<(), GuestError> {
    let status = qmp.execute(&QueryStatus {})?.status;
    if status != "inmigrate" {
        return Err(refusal(
            format!("the destination QEMU does not wait for a guest: its state is {status}"),
            "start it with -incoming defer -S, and anew for each migration",
        ));
    }
    // Unreadable in some sandboxes; then QEMU itself refuses at the load.
    if command_line.is_empty() {
        return Ok(());
    }
    match option_value(command_line, "incoming") {
        Some("defer") | None => {}
        Some(uri) => {
            return Err(refusal(
                format!("the destination QEMU waits for its guest at {uri}"),
                "start it with -incoming defer -S in place of that",
            ));
        }
    }
    if has_option(command_line, "S") {
        return Ok(());
    }
    Err(refusal(
        "the destination QEMU was started without -S: it could run the guest too early",
        "start it with -incoming defer -S",
    ))
}

/// True for `-name` and `--name`, which QEMU takes as the same.
pub(super) fn has_option(command_line: &[String], name: &str) -> bool {
    command_line.iter().any(|argument| is_option(argument, name))
}

/// What follows `-name`.
pub(super) fn option_value<'a>(command_line: &'a [String], name: &str) -> Option<&'a str> {
    let at = command_line.iter().position(|argument| is_option(argument, name))?;
    command_line.get(at + 1).map(String::as_str)
}

fn is_option(argument: &str, name: &str) -> bool {
    let bare = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'));
    bare == Some(name)
}

#[cfg(test)]
mod tests {
    use super::super::commands::BlockCache;
    use super::*;

    fn node(drv: &str, direct: Option<bool>) -> BlockNode {
        let cache = direct.map(|direct| BlockCache { direct });
        BlockNode {
            name: format!("node of {drv}"),
            drv: drv.to_owned(),
            file: String::new(),
            cache,
        }
    }

    #[test]
    fn drivers_that_give_guest_ram_away_are_found_among_others() {
        let others = ["raw", "qcow2", "file", "host_device", "nbd", "io_uring", "null-co"];
        let nodes: Vec<_> = others.map(|drv| node(drv, Some(true))).into();
        assert!(unseen_node(&nodes).is_none());
        let cases = [
            ("nvme", "hardware"),
            ("nvme-io_uring", "hardware"),
            ("virtio-blk-vfio-pci", "hardware"),
            ("virtio-blk-vhost-user", "another process"),
            ("virtio-blk-vhost-vdpa", "hardware"),
        ];
        for (drv, expected) in cases {
            let nodes = [node("raw", Some(false)), node(drv, Some(true)), node("file", None)];
            let (found, reason) = unseen_node(&nodes).expect("it is there");
            assert!(found.drv == drv && reason.contains(expected), "{drv}: {found:?}, {reason}");
        }
    }

    #[test]
    fn a_node_that_does_not_tell_of_its_cache_is_direct_if_it_opens_files() {
        assert!(is_direct(&node("file", Some(true))) && !is_direct(&node("file", Some(false))));
        assert!(is_direct(&node("host_device", None)) && is_direct(&node("host_cdrom", None)));
        assert!(!is_direct(&node("qcow2", None)) && !is_direct(&node("nbd", None)));
    }

    #[test]
    fn a_file_on_a_file_system_that_is_not_known_to_use_the_page_cache_is_not_cached() {
        let cached = |drv, file: &str| {
            let node = BlockNode { file: file.to_owned(), ..node(drv, Some(false)) };
            is_cached(&node, Path::new("/proc/self/root"))
        };
        assert!(cached("file", "/dev/shm"), "tmpfs");
        assert!(!cached("file", "/proc/version"), "procfs");
        assert!(!cached("file", "disk-with-a-relative-name"));
        assert!(cached("nbd", ""), "it copies what a socket brings");
    }

    #[test]
    fn devices_that_hand_disk_commands_on_are_told_from_other_disks() {
        let passes = |kind: &str| {
            let kind = kind.to_owned();
            passes_on(&Device { name: String::new(), kind, path: String::new() })
        };
        assert!(["scsi-block", "scsi-generic", "vhost-scsi-pci"].into_iter().all(passes));
        assert!(!["scsi-hd", "virtio-blk-pci", "virtio-scsi-pci"].into_iter().any(passes));
    }
}
