//! The file that the page table lies in.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{MemoryError, PageState};

/// The header takes a whole page, so that the words are aligned whatever they become.
const HEADER_BYTES: usize = 4096;
const MAGIC: [u8; 8] = *b"farfault";
const FORMAT: u32 = 2;
/// Where in the header it stands whether the switchover has come: 0 or 1.
const SWITCHED_OVER_AT: usize = 24;
/// 16 TiB of guest RAM: a limit on what a header can make us map.
const MAX_PAGES: u64 = 1 << 32;

/// The destination's table of page states; see the module's text. Shared between threads by
/// reference.
#[derive(Debug)]
pub struct PageTable {
    map: MmapRaw,
    pages: u64,
}

impl PageTable {
    /// A new table of `pages` Absent pages in a file of its own, mode 0600, that a restarted process
    /// can [`Self::open`]. The path should be on tmpfs.
    ///
    /// # Errors
    /// [`MemoryError::TableFile`] when the file exists, or there is no room.
    pub fn create(path: &Path, pages: u64) -> Result<Self, MemoryError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path);
        Self::initialise(&file.map_err(failed(path, "create it"))?, path, pages)
    }

    /// A new table of `pages` Absent pages that ends with this process.
    pub fn anonymous(pages: u64) -> Result<Self, MemoryError> {
        let path = Path::new("memfd:farfault-table");
        let fd = memfd_create(c"farfault-table", MFdFlags::MFD_CLOEXEC);
        let file = File::from(fd.map_err(|errno| failed(path, "create it")(errno.into()))?);
        Self::initialise(&file, path, pages)
    }

    /// The table that an earlier process left. Call [`Self::recover`] before anything else uses it.
    ///
    /// # Errors
    /// [`MemoryError::NotATable`] when the file is not a table of this format, or damaged.
    pub fn open(path: &Path) -> Result<Self, MemoryError> {
        let wrong = |reason: &str| MemoryError::NotATable {
            path: PathBuf::from(path),
            reason: reason.to_owned(),
        };
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(failed(path, "open it"))?;
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0).map_err(|_| wrong("shorter than a page table"))?;
        let (magic, rest) = header.split_at(8);
        let (format, pages) = (&rest[..4], &rest[8..]);
        if magic != MAGIC {
            return Err(wrong("not a page table of farfault"));
        }
        if format != FORMAT.to_le_bytes() {
            return Err(wrong("made by another version of farfault"));
        }
        let pages = u64::from_le_bytes(pages.try_into().expect("eight bytes"));
        let length = file.metadata().map_err(failed(path, "inspect it"))?.len();
        if pages > MAX_PAGES || length != file_bytes(pages) {
            return Err(wrong("its length does not fit the number of pages in it"));
        }
        let table = Self::map(&file, path, pages)?;
        let known =
            |word: &AtomicU16| PageState::decode(word.load(Ordering::Relaxed), false).is_some();
        let is_sound = table.switched_over().load(Ordering::Relaxed) <= 1;
        if is_sound && table.words().iter().all(known) { Ok(table) } else { Err(wrong("damaged")) }
    }

    /// Pages of the guest.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    fn initialise(file: &File, path: &Path, pages: u64) -> Result<Self, MemoryError> {
        assert!(pages <= MAX_PAGES, "a guest of {pages} pages");
        // Room is taken now: a store into a hole of a full tmpfs would be a SIGBUS later.
        fallocate(file, FallocateFlags::empty(), 0, file_bytes(pages) as i64)
            .map_err(|errno| failed(path, "take room for it")(errno.into()))?;
        let mut header = [0; 24];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        header[16..].copy_from_slice(&pages.to_le_bytes());
        file.write_all_at(&header, 0).map_err(failed(path, "write its header"))?;
        Self::map(file, path, pages)
    }

    fn map(file: &File, path: &Path, pages: u64) -> Result<Self, MemoryError> {
        let map = MmapOptions::new().len(file_bytes(pages) as usize).map_raw(file);
        Ok(PageTable { map: map.map_err(failed(path, "map it"))?, pages })
    }

    /// 1 from the switchover on.
    pub(super) fn switched_over(&self) -> &AtomicU16 {
        // SAFETY: within the header, which the mapping begins with, and aligned, since a mapping starts
        // at a page; the mapping lives as long as `self`; everybody changes it only as an atomic.
        unsafe { &*self.map.as_ptr().add(SWITCHED_OVER_AT).cast::<AtomicU16>() }
    }

    pub(super) fn words(&self) -> &[AtomicU16] {
        // SAFETY: the mapping is `file_bytes(pages)` long, so that this many words follow the header;
        // they are aligned, since a mapping starts at a page; the mapping lives as long as `self`;
        // and everybody, in whatever process, changes them only as atomics.
        unsafe {
            let first = self.map.as_ptr().add(HEADER_BYTES).cast::<AtomicU16>();
            std::slice::from_raw_parts(first, self.pages as usize)
        }
    }
}

fn file_bytes(pages: u64) -> u64 {
    HEADER_BYTES as u64 + pages * size_of::<AtomicU16>() as u64
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> MemoryError + use<> {
    let path = PathBuf::from(path);
    move |source| MemoryError::TableFile { path, action, source }
}
