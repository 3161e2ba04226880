//! What a process has mapped: `/proc/PID/maps`, with mappings that were split put together again.

/// A run of addresses in a process that one file (or none) lies behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Where in the file it starts.
    pub file_offset_bytes: u64,
    /// Major and minor number of the file's device, and its inode; zeros without a file.
    pub identity: FileIdentity,
    /// Changes go to the file (`MAP_SHARED`).
    pub shared: bool,
    /// Some of it may be executed.
    pub executable: bool,
    /// The path as the process has it, without the mark for a deleted file; empty without a file.
    pub path: String,
    /// The file has no name any more, as memory files never have.
    pub deleted: bool,
    /// The first piece as the kernel has it, which names it in `/proc/PID/map_files`.
    pub(super) first_piece: (u64, u64),
}

/// Which file, whatever its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileIdentity {
    /// Major number of the device.
    pub major: u32,
    /// Minor number of the device.
    pub minor: u32,
    /// Inode on that device.
    pub inode: u64,
}

impl Mapping {
    /// The address behind its last byte.
    pub fn end(&self) -> u64 {
        self.address + self.size_bytes
    }

    fn continues(&self, next: &Mapping) -> bool {
        self.end() == next.address
            && self.identity == next.identity
            && self.shared == next.shared
            && self.path == next.path
            && (self.identity.inode == 0
                || self.file_offset_bytes + self.size_bytes == next.file_offset_bytes)
    }
}

/// Reads the text of `/proc/PID/maps`. Neighbours that are one mapping of one file are put together:
/// the kernel splits them where flags differ, as when a part was given other advice.
///
/// # Errors
/// The line that cannot be understood.
pub(super) fn parse(text: &str) -> Result<Vec<Mapping>, String> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let next = parse_line(line).ok_or_else(|| line.to_owned())?;
        match mappings.last_mut() {
            Some(last) if last.continues(&next) => {
                last.size_bytes += next.size_bytes;
                last.executable |= next.executable;
            }
            _ => mappings.push(next),
        }
    }
    Ok(mappings)
}

/// `start-end perms offset major:minor inode    path`, all but the inode hexadecimal. The path may
/// hold spaces; a newline in it is written `\012`.
fn parse_line(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let (field, after) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = after;
        field
    };
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = field().split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let flags = field();
    let file_offset_bytes = hex(field())?;
    let (major, minor) = field().split_once(':')?;
    let (major, minor) =
        (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = field().parse().ok()?;
    let path = rest.trim_start();
    let (path, deleted) = match path.strip_suffix(" (deleted)") {
        Some(path) => (path, true),
        None => (path, false),
    };
    Some(Mapping {
        address: start,
        size_bytes: end.checked_sub(start)?,
        file_offset_bytes,
        identity: FileIdentity { major, minor, inode },
        shared: flags.as_bytes().get(3)? == &b's',
        executable: flags.as_bytes().get(2)? == &b'x',
        path: path.replace("\\012", "\n"),
        deleted,
        first_piece: (start, end),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c4a00000-55d0c4a21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0008000000 rw-s 00000000 00:01 1028                       /memfd:memory-backend-memfd (deleted)
7f0008000000-7f0010000000 r--s 08000000 00:01 1028                       /memfd:memory-backend-memfd (deleted)
7f0010000000-7f0018000000 rw-s 00000000 00:01 1028                       /memfd:memory-backend-memfd (deleted)
7f0020000000-7f0028000000 rw-s 00000000 00:1a 17                         /dev/shm/guest ram 0
7f0028000000-7f0028001000 rw-p 00000000 00:00 0 
7ffd1b5fe000-7ffd1b600000 r-xp 00000000 00:00 0                          [vdso]
";

    #[test]
    fn split_mappings_are_one_again() {
        let found = parse(MAPS).unwrap();
        let shared: Vec<_> = found.iter().filter(|m| m.shared).collect();
        assert_eq!(shared.len(), 3);
        assert_eq!((shared[0].address, shared[0].size_bytes), (0x7f00_0000_0000, 256 << 20));
        assert_eq!(shared[0].path, "/memfd:memory-backend-memfd");
        assert!(shared[0].deleted);
        assert_eq!(shared[0].first_piece, (0x7f00_0000_0000, 0x7f00_0800_0000));
        assert_eq!(shared[1].file_offset_bytes, 0, "the same file once more is another mapping");
        assert_eq!(shared[2].path, "/dev/shm/guest ram 0");
        assert_eq!(shared[2].identity, FileIdentity { major: 0, minor: 0x1a, inode: 17 });
        assert!(!shared[2].deleted);
    }

    #[test]
    fn what_is_no_mapping_is_named() {
        for line in ["x", "7f00-7e00 rw-p 0 00:00 0", "7f00-7f01 rw 0 00:00 0", "1-2 rw-s 0 0 0"] {
            assert_eq!(parse(line), Err(line.to_owned()));
        }
    }
}
