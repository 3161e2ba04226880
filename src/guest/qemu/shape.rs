//! What two QEMUs must agree on so that the device state of one fits the other.
//!
//! Everything here has the same value in a running machine and in one that waits with `-incoming
//! defer`, and does not depend on the host: names of files, of network interfaces and of other back
//! ends are left out.

use std::collections::BTreeMap;

use qapi::qmp::{qom_get, qom_list, query_kvm};
use serde_json::Value;

use super::commands::QueryCpus;
use super::guards::Device;
use super::qmp::{Qmp, QmpError};
use super::text::RamBlock;
use crate::guest::{GuestError, Shape};
use crate::memory::MemoryLayout;

/// Kinds of machine properties that the guest can notice. Strings are left out: they are paths.
const MACHINE_PROPERTY_TYPES: [&str; 6] =
    ["bool", "OnOffAuto", "size", "int", "uint64_t", "uint64"];

/// Machine properties that concern the host alone.
const HOST_ONLY_MACHINE_PROPERTIES: [&str; 4] =
    ["dump-guest-core", "mem-merge", "suppress-vmdesc", "aux-ram-share"];

/// Properties that say where a device is plugged in: the bus, and its slot on PCI or port on USB.
const PLACE_PROPERTIES: [&str; 3] = ["parent_bus", "addr", "port"];

/// The shape of the machine behind `qmp`.
pub(super) fn of(
    qmp: &mut Qmp,
    memory: MemoryLayout,
    private_blocks: &[RamBlock],
    devices: &[Device],
) -> Result<Shape, GuestError> {
    let mut properties = BTreeMap::new();
    let version = qmp.version();
    properties.insert("QEMU version".to_owned(), format!("{}.{}", version.0, version.1));
    let accelerator = if qmp.execute(&query_kvm {})?.enabled { "kvm" } else { "another than kvm" };
    properties.insert("accelerator".to_owned(), accelerator.to_owned());
    add_machine(qmp, &mut properties)?;
    add_cpus(qmp, &mut properties)?;
    for device in devices {
        let described = describe(qmp, device)?;
        properties.insert(format!("device {}", device.name), described);
    }
    for block in private_blocks {
        let size = format!("{} KiB", block.limit_bytes >> 10);
        properties.insert(format!("device memory {}", block.name), size);
    }
    Ok(Shape { monitor: "qemu".to_owned(), memory, properties })
}

fn add_machine(qmp: &mut Qmp, properties: &mut BTreeMap<String, String>) -> Result<(), GuestError> {
    let machine = "/machine";
    let kind = property(qmp, machine, "type")?.unwrap_or_default();
    properties.insert("machine type".to_owned(), without_suffix(&kind, "-machine"));
    for entry in qmp.execute(&qom_list { path: machine.to_owned() })? {
        if !MACHINE_PROPERTY_TYPES.contains(&entry.type_.as_str())
            || HOST_ONLY_MACHINE_PROPERTIES.contains(&entry.name.as_str())
        {
            continue;
        }
        if let Some(value) = property(qmp, machine, &entry.name)? {
            properties.insert(format!("machine option {}", entry.name), value);
        }
    }
    let topology = get(qmp, machine, "smp")?;
    for (level, count) in topology.as_ref().and_then(Value::as_object).into_iter().flatten() {
        // The vCPUs at the start; those plugged in later count too, and are counted below.
        if level != "cpus" {
            properties.insert(format!("vCPU topology {level}"), plain(count));
        }
    }
    Ok(())
}

fn add_cpus(qmp: &mut Qmp, properties: &mut BTreeMap<String, String>) -> Result<(), GuestError> {
    let cpus = qmp.execute(&QueryCpus {})?;
    properties.insert("vCPUs".to_owned(), cpus.len().to_string());
    let Some(first) = cpus.first() else { return Ok(()) };
    properties.insert("architecture".to_owned(), first.target.clone());
    let kind = property(qmp, &first.qom_path, "type")?.unwrap_or_default();
    let suffix = format!("-{}-cpu", first.target);
    properties.insert("CPU model".to_owned(), without_suffix(&kind, &suffix));
    // Only x86 has these: the feature bits that the guest is shown, after all that the host lacks.
    let words = get(qmp, &first.qom_path, "feature-words")?;
    for word in words.as_ref().and_then(Value::as_array).into_iter().flatten() {
        let number = |name: &str| word.get(name).and_then(Value::as_u64);
        let (Some(leaf), Some(bits)) = (number("cpuid-input-eax"), number("features")) else {
            continue;
        };
        let register = word.get("cpuid-register").and_then(Value::as_str).unwrap_or("");
        let name = match number("cpuid-input-ecx") {
            Some(subleaf) => format!("CPU features {leaf:#x}.{subleaf} {register}"),
            None => format!("CPU features {leaf:#x} {register}"),
        };
        properties.insert(name, format!("{bits:#x}"));
    }
    Ok(())
}

fn describe(qmp: &mut Qmp, device: &Device) -> Result<String, GuestError> {
    let mut text = device.kind.clone();
    for place in PLACE_PROPERTIES {
        let Some(value) = get(qmp, &device.path, place)? else { continue };
        let value = match (place, value.as_u64()) {
            // A PCI slot and function, which QEMU takes and prints as 03.1 but tells as one number.
            ("addr", Some(number)) => format!("{:02x}.{}", number >> 3, number & 7),
            _ => plain(&value),
        };
        text.push_str(&format!(" {place}={value}"));
    }
    Ok(text)
}

/// A property as people read it; `None` when there is no such property.
fn property(qmp: &mut Qmp, path: &str, name: &str) -> Result<Option<String>, GuestError> {
    Ok(get(qmp, path, name)?.as_ref().map(plain))
}

fn get(qmp: &mut Qmp, path: &str, name: &str) -> Result<Option<Value>, GuestError> {
    let command = qom_get { path: path.to_owned(), property: name.to_owned() };
    match qmp.execute(&command) {
        Ok(value) => Ok(Some(value)),
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn without_suffix(text: &str, suffix: &str) -> String {
    text.strip_suffix(suffix).unwrap_or(text).to_owned()
}
