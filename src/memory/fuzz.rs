//! Entry points for fuzzing, shared by the tests here and the targets in `fuzz/`: what an earlier process
//! left behind, and what the kernel says of QEMU, whose file names QEMU's owner has chosen. Each tells
//! whether it was accepted.

use std::io::Write;

use super::{PageTable, adopt};

/// Opens `data` as the file of a page table, and recovers it as a restarted process does.
///
/// # Panics
/// When a table that was accepted cannot be counted.
pub fn fuzz_page_tables(data: &[u8]) -> bool {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("room in /dev/shm");
    file.write_all(data).expect("room in /dev/shm");
    let Ok(table) = PageTable::open(file.path()) else { return false };
    table.recover();
    let counts = table.counts();
    assert_eq!(counts.applying, 0);
    assert_eq!(counts.current + counts.mapped + table.incomplete().len(), table.pages());
    assert!(table.waiting_pages().is_empty());
    true
}

/// Reads `data` as `/proc/PID/maps` and as `/proc/PID/stat`.
pub fn fuzz_proc(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    adopt::reads_as_proc(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{PageTable, Stage};
    use crate::page::{PageIndex, PageRange, Version};

    #[test]
    fn any_bytes_as_the_file_of_a_page_table() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("table");
        let table = PageTable::create(&path, 100).unwrap();
        for page in (3..90).map(PageIndex) {
            table.claim(page, Version(1));
            if page.0 % 7 != 0 {
                table.finish(page, Version(1), page.0 % 3 == 0, page.0 % 2 == 0);
            }
        }
        table.want(PageIndex(95));
        table.mark_mapped(PageRange::new(8, 20));
        assert_eq!(table.state(PageIndex(8)).stage, Stage::Mapped);
        crate::fuzz_cases::run("page_tables", fuzz_page_tables, &[std::fs::read(&path).unwrap()]);
    }

    #[test]
    fn any_text_as_what_proc_says() {
        let maps = "55d0c4a00000-55d0c4a21000 rw-p 00000000 00:00 0                          [heap]\n\
                    7f0000000000-7f0008000000 rw-s 00000000 00:01 1028  /memfd:memory (deleted)\n\
                    7f0008000000-7f0010000000 r--s 08000000 00:01 1028  /memfd:memory (deleted)\n";
        let stat = "1234 (CPU 0/TCG (x)) S 1 2 3 0 -1 4194368 1 2 3 4 5 6 7 8 20 0 5 0 12345 6 7\n";
        let seeds = [maps.as_bytes().to_vec(), stat.as_bytes().to_vec()];
        crate::fuzz_cases::run("proc", fuzz_proc, &seeds);
    }
}
