//! The RAM files of two guests, compared byte by byte. A hole is zero.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

const PAGE_BYTES: usize = 4096;

/// How many pages of two files differ, and where the first ten do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Number of pages that differ.
    pub pages: u64,
    /// The first of them.
    pub first: Vec<u64>,
}

/// Compares two files of equal length without filling their holes.
pub fn compare(left: &Path, right: &Path) -> Result<Difference> {
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let (left_file, right_file) = (open(left)?, open(right)?);
    let bytes = left_file.metadata()?.len();
    ensure!(
        bytes == right_file.metadata()?.len(),
        "{} and {} have different lengths",
        left.display(),
        right.display()
    );
    let mut difference = Difference::default();
    let (mut left_page, mut right_page) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    let mut at = 0;
    // Behind this, one of the files is known to have data up to that place.
    while let Some(data) = next_data(&left_file, &right_file, at)? {
        at = data - data % PAGE_BYTES as u64;
        if at >= bytes {
            break;
        }
        let length = PAGE_BYTES.min((bytes - at) as usize);
        left_file.read_exact_at(&mut left_page[..length], at)?;
        right_file.read_exact_at(&mut right_page[..length], at)?;
        if left_page[..length] != right_page[..length] {
            difference.pages += 1;
            if difference.first.len() < 10 {
                difference.first.push(at / PAGE_BYTES as u64);
            }
        }
        at += PAGE_BYTES as u64;
    }
    Ok(difference)
}

/// The first byte at or behind `at` that one of the files does not have as a hole.
fn next_data(left: &File, right: &File, at: u64) -> Result<Option<u64>> {
    let data_of = |file: &File| match lseek(file, at as i64, Whence::SeekData) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => bail!("SEEK_DATA: {error}"),
    };
    Ok([data_of(left)?, data_of(right)?].into_iter().flatten().min())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_equal_zeros_and_differing_pages_are_found() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let (left, right) = (directory.path().join("left"), directory.path().join("right"));
        let make = |path: &Path| {
            let file = File::create(path).unwrap();
            file.set_len(1 << 20).unwrap();
            file
        };
        let (left_file, right_file) = (make(&left), make(&right));
        left_file.write_all_at(&[0; 3 * PAGE_BYTES], 4096).unwrap();
        for file in [&left_file, &right_file] {
            file.write_all_at(b"same", 40 * 4096).unwrap();
        }
        assert_eq!(compare(&left, &right).unwrap(), Difference::default());
        left_file.write_all_at(b"x", 40 * 4096 + 17).unwrap();
        right_file.write_all_at(b"x", (1 << 20) - 1).unwrap();
        let difference = Difference { pages: 2, first: vec![40, 255] };
        assert_eq!(compare(&left, &right).unwrap(), difference);
    }
}
