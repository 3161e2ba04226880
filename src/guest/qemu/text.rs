//! Reads the few tables that QEMU prints only in its monitor for people.

use std::collections::BTreeMap;

/// One line of `info ramblock`: memory that QEMU's own migration knows, RAM of the guest or of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RamBlock {
    /// Its name in the migration stream.
    pub(super) name: String,
    /// Bytes in use, which is what a migration sends.
    pub(super) used_bytes: u64,
    /// Bytes that it may grow to.
    pub(super) limit_bytes: u64,
}

/// Reads `info ramblock`. Lines that are not blocks are left out, and blocks without a name, which
/// are not migrated.
///
/// The columns are name, page size with its unit, offset, used, total; newer versions add more behind.
pub(super) fn ram_blocks(table: &str) -> Vec<RamBlock> {
    table.lines().filter_map(ram_block).collect()
}

fn ram_block(line: &str) -> Option<RamBlock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let offset = words.iter().position(|word| hex(word).is_some())?;
    let name = words[..offset.checked_sub(2)?].join(" ");
    let number = |at: usize| words.get(at).and_then(|word| hex(word));
    let (used_bytes, limit_bytes) = (number(offset + 1)?, number(offset + 2)?);
    (!name.is_empty()).then_some(RamBlock { name, used_bytes, limit_bytes })
}

/// A stretch of a memory region that the guest sees at some address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Guest physical address.
    pub(super) guest_address: u64,
    /// Bytes.
    pub(super) size_bytes: u64,
    /// Where in the region it begins, in bytes.
    pub(super) offset_bytes: u64,
}

/// Reads `info mtree -f`: for each RAM region by name, the largest piece of it that is visible in the
/// address space `memory`.
pub(super) fn largest_ram_pieces(table: &str) -> BTreeMap<String, Piece> {
    let mut largest: BTreeMap<String, Piece> = BTreeMap::new();
    for view in table.split("FlatView #").filter(|view| view.contains("AS \"memory\",")) {
        for (name, piece) in view.lines().filter_map(ram_piece) {
            let best = largest.entry(name).or_insert(piece);
            if piece.size_bytes > best.size_bytes {
                *best = piece;
            }
        }
    }
    largest
}

/// `  0000000000100000-000000000fffffff (prio 0, ram): ram0 @0000000000100000`
fn ram_piece(line: &str) -> Option<(String, Piece)> {
    let (range, rest) = line.trim().split_once(" (prio ")?;
    let (first, last) = range.split_once('-')?;
    let first = u64::from_str_radix(first, 16).ok()?;
    let last = u64::from_str_radix(last, 16).ok()?;
    let (kind, region) = rest.split_once("): ")?;
    if kind.rsplit(", ").next() != Some("ram") {
        return None;
    }
    let mut words = region.split_whitespace();
    let name = words.next()?.to_owned();
    let offset_bytes = match words.next().and_then(|word| word.strip_prefix('@')) {
        Some(offset) => u64::from_str_radix(offset, 16).ok()?,
        None => 0,
    };
    let size_bytes = last.checked_sub(first)?.checked_add(1)?;
    Some((name, Piece { guest_address: first, size_bytes, offset_bytes }))
}

/// Reads the answer to `gpa2hva`: the region's name and the address in QEMU's process.
///
/// `Host virtual address for 0x0 (ram0) is 0x7f0837fff000`
pub(super) fn host_address(answer: &str) -> Option<(String, u64)> {
    let (_, named) = answer.split_once('(')?;
    let (name, rest) = named.split_once(')')?;
    let address = rest.trim().strip_prefix("is ")?;
    Some((name.to_owned(), hex(address.trim())?))
}

fn hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_blocks_are_read_in_the_old_and_the_new_form() {
        let old = "\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
    /rom@etc/acpi/tables    4 KiB  0x00000000100c0000 0x0000000000020000 0x0000000000200000
";
        let new = "\
Block Name    PSize              Offset               Used              Total                HVA  RO
 ram0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f12fe000000  rw
";
        let ram0 =
            RamBlock { name: "ram0".to_owned(), used_bytes: 256 << 20, limit_bytes: 256 << 20 };
        assert_eq!(ram_blocks(old)[0], ram0);
        assert_eq!(ram_blocks(old)[1].limit_bytes, 2 << 20);
        assert_eq!(ram_blocks(new), [ram0]);
    }

    #[test]
    fn a_ram_block_without_a_name_is_left_out() {
        assert_eq!(ram_blocks("   4 KiB  0x0 0x1000 0x1000\n"), []);
        assert_eq!(ram_blocks("0x0 0x1000 0x1000\n"), []);
    }

    #[test]
    fn the_largest_piece_of_each_ram_region_is_found_and_other_spaces_are_ignored() {
        let table = "\
FlatView #1
 AS \"I/O\", root: io
 Root memory region: io
  0000000000000000-00000000ffffffff (prio 0, ram): n0

FlatView #2
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): n0
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-000000000fffffff (prio 0, ram): n0 @0000000000100000 KVM
  0000000010000000-000000001fffffff (prio 0, ram): n1
";
        let pieces = largest_ram_pieces(table);
        assert_eq!(pieces.keys().collect::<Vec<_>>(), ["n0", "n1"]);
        assert_eq!(
            pieces["n0"],
            Piece { guest_address: 1 << 20, size_bytes: 255 << 20, offset_bytes: 1 << 20 }
        );
    }

    #[test]
    fn a_host_address_is_read_with_the_name_of_its_region() {
        let answer = "Host virtual address for 0x10000000 (n1) is 0x7fd0afffe000\r\n";
        assert_eq!(host_address(answer), Some(("n1".to_owned(), 0x7fd0_afff_e000)));
        assert_eq!(host_address("No memory is mapped at address 0x10000000"), None);
    }
}
