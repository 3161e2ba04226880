//! What forbids a move: devices whose writes to guest RAM cannot be seen from outside, and states in
//! which there is nothing to move.

use qapi::qmp::{ObjectPropertyInfo, qom_list};

use super::commands::{QueryMigrate, QueryStatus};
use super::qmp::Qmp;
use super::refusal;
use crate::guest::GuestError;

/// A device that the user added.
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

/// Devices by the beginning of their type, and why they cannot come along.
const IMMOVABLE: [(&str, &str); 8] = [
    ("vfio-", "its hardware writes to guest RAM, and no page table tells of it"),
    ("vhost-user-", "another process writes to guest RAM through its own mapping"),
    ("vhost-vdpa-", "its hardware writes to guest RAM, and no page table tells of it"),
    ("ivshmem-", "its memory is shared with other guests"),
    ("nvdimm", "its memory is a file of this host"),
    ("virtio-pmem", "its memory is a file of this host"),
    ("virtio-mem", "it changes the size of the guest's RAM while it moves"),
    ("sgx-epc", "its memory cannot be read"),
];

/// Network back ends that no device type betrays.
const IMMOVABLE_NETWORKS: [(&str, &str); 2] = [
    ("vhost-user", "another process writes to guest RAM through its own mapping"),
    ("vhost-vdpa", "its hardware writes to guest RAM, and no page table tells of it"),
];

/// The devices that the user added to the machine, in the order of their names.
pub(super) fn devices(qmp: &mut Qmp) -> Result<Vec<Device>, GuestError> {
    let mut devices = Vec::new();
    for container in CONTAINERS {
        for property in qmp.execute(&qom_list { path: container.to_owned() })? {
            let ObjectPropertyInfo { name, type_, .. } = property;
            let kind = type_.strip_prefix("child<").and_then(|rest| rest.strip_suffix('>'));
            if let Some(kind) = kind {
                let path = format!("{container}/{name}");
                devices.push(Device { name, kind: kind.to_owned(), path });
            }
        }
    }
    devices.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(devices)
}

/// Refuses devices that write to guest RAM behind our back.
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
    Ok(())
}

/// Whether a source guest runs or is paused; any other state is refused.
pub(super) fn check_source_state(qmp: &mut Qmp) -> Result<bool, GuestError> {
    let status = qmp.execute(&QueryStatus {})?.status;
    let running = match status.as_str() {
        "running" => true,
        "paused" | "prelaunch" => false,
        "inmigrate" => {
            return Err(refusal(
                "this QEMU waits for a guest (-incoming), so it has none to send",
                "give the QMP socket of the QEMU in which the guest runs",
            ));
        }
        "postmigrate" => {
            return Err(refusal(
                "the guest of this QEMU has been migrated before, and may run elsewhere",
                "only if you are sure that it runs nowhere else, let it go on here with `cont` first",
            ));
        }
        "finish-migrate" => return Err(already_migrating()),
        other => {
            return Err(refusal(
                format!("the guest cannot be moved in the state {other}"),
                "look at QEMU's log and monitor, mend the guest and let it run",
            ));
        }
    };
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
