//! Which RAM a QEMU has, and where: its memory backends, each found as one shared mapping in its process.
//!
//! Three answers are put together. `query-memdev` tells the backends and `info ramblock` which of them
//! the machine uses. The memory map tells at which guest address a backend begins, and `gpa2hva` where
//! that is in the process: names in `/proc/PID/maps` would not do, since all memfds have the same one.

use std::fs::File;

use nix::sys::statfs::{self, FsType};
use qapi::qmp::qom_get;

use super::commands::{MemoryBackend, QueryMemdev};
use super::qmp::{Qmp, Version};
use super::text::{self, RamBlock};
use super::{failure, refusal};
use crate::guest::{DEVICE_STATE_LIMIT_BYTES, GuestError};
use crate::memory::adopt::{Adopted, Mapping};
use crate::memory::{Access, MemoryLayout, RegionBacking, RegionLayout};
use crate::page::PAGE_SIZE_BYTES;

/// From this version on, `x-ignore-shared` leaves out only shared RAM that has a name in the file system.
const SKIPS_NAMED_FILES_ONLY: Version = Version(8, 0, 0);

/// The RAM of a QEMU.
pub(super) struct Ram {
    /// What RAM there is.
    pub(super) layout: MemoryLayout,
    /// The files behind it, in the order of the layout.
    pub(super) backings: Vec<RegionBacking>,
    /// Where each region is in QEMU's process, in the order of the layout.
    pub(super) addresses: Vec<u64>,
    /// Memory that QEMU's own migration carries: ROMs, video memory, firmware tables.
    pub(super) private_blocks: Vec<RamBlock>,
}

/// Finds all RAM of the guest and opens its files for `access`, or refuses with the option that would
/// make it movable.
pub(super) fn ram(qmp: &mut Qmp, process: &Adopted, access: Access) -> Result<Ram, GuestError> {
    let blocks = text::ram_blocks(&qmp.human("info ramblock")?);
    let mut private_blocks = blocks.clone();
    let mut found = Vec::new();
    let pieces = text::largest_ram_pieces(&qmp.human("info mtree -f")?);
    let mappings = process.shared_mappings()?;
    for backend in qmp.execute(&QueryMemdev {})? {
        let Some(id) = backend.id.clone() else { continue };
        // Machine types before 4.0 name the block after the whole path.
        let names = [id.clone(), format!("/objects/{id}")];
        if !blocks.iter().any(|block| names.contains(&block.name)) {
            continue;
        }
        private_blocks.retain(|block| !names.contains(&block.name));
        check_kind(qmp, &id, &backend)?;
        let piece = names.iter().find_map(|name| pieces.get(name)).ok_or_else(|| {
            failure(format!("QEMU uses memory backend {id}, but not in the guest's memory map"))
        })?;
        let answer = qmp.human(&format!("gpa2hva {:#x}", piece.guest_address))?;
        let address = text::host_address(&answer)
            .filter(|(name, _)| names.contains(name))
            .and_then(|(_, address)| address.checked_sub(piece.offset_bytes))
            .ok_or_else(|| {
                failure(format!(
                    "QEMU does not tell where memory backend {id} is: {:?}",
                    answer.trim()
                ))
            })?;
        let mapping = mapping_at(&mappings, &id, address, backend.size)?;
        let file = process.open_backing(mapping, access)?;
        let file_offset_bytes = mapping.file_offset_bytes + (address - mapping.address);
        check_file_system(&file, &id, backend.size)?;
        let layout = RegionLayout { name: id, size_bytes: backend.size };
        found.push((address, RegionBacking { layout, file, file_offset_bytes }));
    }
    if found.is_empty() {
        return Err(failure("this QEMU has no RAM that a guest could use"));
    }
    check_private_size(&private_blocks)?;
    found.sort_by(|(_, a), (_, b)| a.layout.name.cmp(&b.layout.name));
    let layout = MemoryLayout::new(found.iter().map(|(_, r)| r.layout.clone()).collect());
    let (addresses, backings) = found.into_iter().unzip();
    Ok(Ram { layout, backings, addresses, private_blocks })
}

/// RAM must be shared, and of a kind that this QEMU leaves out of its migration.
fn check_kind(qmp: &mut Qmp, id: &str, backend: &MemoryBackend) -> Result<(), GuestError> {
    let get = qom_get { path: format!("/objects/{id}"), property: "type".to_owned() };
    let kind = qmp.execute(&get)?.as_str().unwrap_or_default().to_owned();
    let size = size_option(backend.size);
    if !backend.size.is_multiple_of(PAGE_SIZE_BYTES as u64) {
        return Err(failure(format!("memory backend {id} is not a whole number of pages")));
    }
    let movable = match kind.as_str() {
        "memory-backend-file" => true,
        "memory-backend-memfd" => qmp.version() < SKIPS_NAMED_FILES_ONLY,
        _ => false,
    };
    if movable && backend.share {
        return Ok(());
    }
    let file = format!("memory-backend-file,id=ID,size={size},mem-path=/dev/shm/NAME,share=on");
    if movable {
        return Err(refusal(
            format!("guest RAM {id} is private to QEMU: its {kind} has no share=on"),
            format!("add share=on to -object {kind},id={id}"),
        ));
    }
    if kind == "memory-backend-memfd" {
        return Err(refusal(
            format!("QEMU {} moves the memfd {id} by itself and not by sharing", qmp.version()),
            format!("use -object {} in its place", file.replace("ID", id)),
        ));
    }
    // The RAM that -m alone makes has the machine's name for it, with a dot, which no user's id needs.
    let hint = if id.contains('.') {
        format!(
            "start QEMU with -object {} -machine memory-backend=ram0",
            file.replace("ID", "ram0")
        )
    } else {
        format!("use -object {} in the place of {kind}", file.replace("ID", id))
    };
    Err(refusal(format!("guest RAM {id} is private to QEMU: it is a {kind}"), hint))
}

/// As people write it in `size=`.
fn size_option(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) { format!("{}M", bytes >> 20) } else { bytes.to_string() }
}

/// The shared mapping that holds all of `size` bytes at `address`.
pub(super) fn mapping_at<'a>(
    mappings: &'a [Mapping],
    id: &str,
    address: u64,
    size: u64,
) -> Result<&'a Mapping, GuestError> {
    let holds_it = |m: &&Mapping| m.address <= address && address + size <= m.end();
    mappings.iter().find(holds_it).ok_or_else(|| {
        refusal(
            format!("guest RAM {id} at {address:#x} is not one shared mapping of QEMU"),
            "use memory-backend-file with share=on and no other option on how it is mapped",
        )
    })
}

/// Only memory takes both kinds of faults. Into which huge pages a guest can be received, [`GuestMemory::map`]
/// tells.
///
/// [`GuestMemory::map`]: crate::memory::GuestMemory::map
fn check_file_system(file: &File, id: &str, size: u64) -> Result<(), GuestError> {
    let kind = statfs::fstatfs(file)
        .map_err(|e| failure(format!("cannot tell where guest RAM {id} lives: {e}")))?
        .filesystem_type();
    let shmem = format!(
        "use -object memory-backend-file,id={id},size={},mem-path=/dev/shm/NAME,share=on",
        size_option(size)
    );
    match kind {
        statfs::TMPFS_MAGIC | statfs::HUGETLBFS_MAGIC => Ok(()),
        FsType(magic) => Err(refusal(
            format!(
                "guest RAM {id} is in a file that is not in memory (file system {magic:#x}), where its pages \
                 cannot be tracked one by one"
            ),
            shmem,
        )),
    }
}

fn check_private_size(blocks: &[RamBlock]) -> Result<(), GuestError> {
    let total: u64 = blocks.iter().map(|block| block.used_bytes).sum();
    if total <= DEVICE_STATE_LIMIT_BYTES as u64 {
        return Ok(());
    }
    let largest = blocks.iter().max_by_key(|block| block.used_bytes);
    let name = largest.map_or("", |block| &block.name);
    Err(refusal(
        format!(
            "{} MiB of memory is private to QEMU's devices, most of it {name}; {} MiB can move with them",
            total >> 20,
            DEVICE_STATE_LIMIT_BYTES >> 20
        ),
        "give that device less memory",
    ))
}
