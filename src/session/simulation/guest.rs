//! The guest: what its memory must hold, whoever runs it, and how it works.

/// What the guest itself knows it has written, page by page. Contents are numbers, none used twice but
/// for 0, a page of zeros.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) memory: Vec<u32>,
    written: u32,
    /// Operations that it has still to do.
    pub(super) left: u32,
}

impl Guest {
    pub(super) fn new(pages: usize, operations: u32, rng: &mut fastrand::Rng) -> Self {
        let mut guest = Guest { memory: vec![0; pages], written: 0, left: operations };
        for page in 0..pages {
            if rng.u8(0..4) != 0 {
                guest.write(page, rng);
            }
        }
        guest
    }

    /// A new content for `page`, sometimes zeros.
    pub(super) fn write(&mut self, page: usize, rng: &mut fastrand::Rng) -> u32 {
        self.written += 1;
        self.memory[page] = if rng.u8(0..6) == 0 { 0 } else { self.written };
        self.memory[page]
    }
}

/// Lines of a journal, some on their way to disk.
#[derive(Debug)]
pub(super) struct Disk<R> {
    pub(super) lines: Vec<R>,
}

impl<R: Copy + PartialEq> Disk<R> {
    pub(super) fn has(&self, record: R) -> bool {
        self.lines.contains(&record)
    }
}
