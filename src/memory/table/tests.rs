use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;

const PAGE: PageIndex = PageIndex(0);

fn claimed(table: &PageTable, page: PageIndex, version: u16) -> PageState {
    match table.claim(page, Version(version)) {
        Claim::Claimed { previous } => previous,
        other => panic!("{page:?}: {other:?}"),
    }
}

#[derive(Clone, Debug)]
enum Op {
    Claim(u16),
    Finish { zero: bool, last: bool },
    Abandon,
    Spoil,
    Want,
    MarkMapped,
    Freeze { needed: bool },
    Recover,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1u16..6).prop_map(Op::Claim),
        4 => (any::<bool>(), any::<bool>()).prop_map(|(zero, last)| Op::Finish { zero, last }),
        1 => Just(Op::Abandon),
        1 => Just(Op::Spoil),
        3 => Just(Op::Want),
        1 => Just(Op::MarkMapped),
        1 => any::<bool>().prop_map(|needed| Op::Freeze { needed }),
        1 => Just(Op::Recover),
    ]
}

/// What the table should know of one page, written as plainly as can be.
#[derive(Default)]
struct Model {
    /// Version and zeroness of the content in place, if it is known.
    content: Option<(u16, bool)>,
    /// Version that is being written.
    writing: Option<u16>,
    last: bool,
    mapped: bool,
    waiting: bool,
}

impl Model {
    fn stage(&self) -> Stage {
        match (self.writing, self.content) {
            (Some(_), _) => Stage::Applying,
            (None, None) => Stage::Absent,
            (None, Some(_)) if self.mapped => Stage::Mapped,
            (None, Some(_)) if self.last => Stage::Current,
            (None, Some(_)) => Stage::Stale,
        }
    }
}

proptest! {
    #[test]
    fn a_page_follows_its_model(ops in prop::collection::vec(op(), 0..60)) {
        let table = PageTable::anonymous(1).unwrap();
        let mut model = Model::default();
        let mut previous = None;
        for op in ops {
            match op {
                Op::Claim(version) => {
                    let newer = model.content.is_none_or(|(held, _)| held < version);
                    let expected = match model.stage() {
                        Stage::Applying => Claim::Busy,
                        Stage::Absent | Stage::Stale if newer => {
                            Claim::Claimed { previous: table.state(PAGE) }
                        }
                        _ => Claim::AlreadyThere,
                    };
                    prop_assert_eq!(table.claim(PAGE, Version(version)), expected);
                    if let Claim::Claimed { previous: before } = expected {
                        previous = Some(before);
                        model.writing = Some(version);
                    }
                }
                Op::Finish { zero, last } => {
                    let Some(version) = model.writing.take() else { continue };
                    let waiting = table.finish(PAGE, Version(version), zero, last);
                    prop_assert_eq!(waiting, model.waiting);
                    model.content = Some((version, zero));
                    model.last = last;
                }
                Op::Abandon => {
                    if model.writing.take().is_none() { continue }
                    table.abandon(PAGE, previous.take().unwrap());
                }
                Op::Spoil => {
                    if model.writing.take().is_none() { continue }
                    table.spoil(PAGE);
                    model.content = None;
                }
                Op::Want => {
                    let expected = match (model.stage(), model.content) {
                        (Stage::Current | Stage::Mapped, Some((_, zero))) => Want::Serve { zero },
                        _ => Want::Ask { first: !std::mem::replace(&mut model.waiting, true) },
                    };
                    prop_assert_eq!(table.want(PAGE), expected);
                }
                Op::MarkMapped => {
                    table.mark_mapped(PageRange::new(0, 1));
                    if matches!(model.stage(), Stage::Current | Stage::Mapped) {
                        model.mapped = true;
                        model.waiting = false;
                    }
                }
                Op::Freeze { needed } => {
                    let need = if needed { PageSet::full(1) } else { PageSet::empty(1) };
                    match (table.freeze(&need), model.stage()) {
                        (Err(_), Stage::Absent | Stage::Applying) => prop_assert!(!needed),
                        (Ok(mapping), Stage::Stale) if !needed => {
                            prop_assert_eq!(!mapping.is_empty(), model.waiting);
                            model.last = true;
                        }
                        (Ok(mapping), _) => prop_assert!(mapping.is_empty()),
                        (refused, stage) => prop_assert!(false, "{refused:?} of {stage:?}"),
                    }
                }
                Op::Recover => {
                    let lost = model.writing.take().is_some();
                    prop_assert_eq!(table.recover(), u64::from(lost));
                    if lost { model.content = None }
                    model.waiting = false;
                }
            }
            let state = table.state(PAGE);
            prop_assert_eq!(state.stage, model.stage());
            prop_assert_eq!(state.waiting, model.waiting);
            let (version, zero) = model.content.unwrap_or_default();
            prop_assert_eq!((state.version.0, state.zero), (version, zero));
            prop_assert_eq!(table.incomplete().is_empty(), state.is_complete());
            prop_assert_eq!(!table.waiting_pages().is_empty(), state.waiting);
        }
    }
}

/// Appliers and fault readers race over all pages. In the end every page that was asked for must have
/// been mapped by somebody: the reader who was told to serve, or the applier who was told of a waiter.
#[test]
fn no_waiting_page_is_lost_in_a_race() {
    const PAGES: u64 = 20_000;
    let table = PageTable::anonymous(PAGES).unwrap();
    let wanted: Vec<AtomicBool> = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
    let served: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let applied: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let (table, wanted, served, applied) = (&table, &wanted, &served, &applied);
    let give = |page: u64| {
        assert!(table.state(PageIndex(page)).is_complete());
        served[page as usize].fetch_add(1, Ordering::Relaxed);
        table.mark_mapped(PageRange::new(page, page + 1));
    };
    std::thread::scope(|scope| {
        for applier in 0..2u64 {
            scope.spawn(move || {
                // Both go over the same pages from near places, so that they meet.
                for page in (0..PAGES).map(|n| (n + applier * 7) % PAGES) {
                    if let Claim::Claimed { .. } = table.claim(PageIndex(page), Version(1)) {
                        applied[page as usize].fetch_add(1, Ordering::Relaxed);
                        if table.finish(PageIndex(page), Version(1), false, true) {
                            give(page);
                        }
                    }
                }
            });
        }
        for reader in 0..2u64 {
            scope.spawn(move || {
                for page in (0..PAGES).map(|n| (n + reader * 3) % PAGES) {
                    wanted[page as usize].store(true, Ordering::Relaxed);
                    if let Want::Serve { .. } = table.want(PageIndex(page)) {
                        give(page);
                    }
                }
            });
        }
    });
    for page in 0..PAGES as usize {
        assert_eq!(applied[page].load(Ordering::Relaxed), 1, "page {page} applied once");
        assert!(wanted[page].load(Ordering::Relaxed));
        assert!(served[page].load(Ordering::Relaxed) >= 1, "page {page} lost its waiter");
    }
    assert!(table.waiting_pages().is_empty());
    assert_eq!(table.counts(), StageCounts { mapped: PAGES, ..Default::default() });
}

#[test]
fn the_switchover_makes_stale_pages_current_unless_they_are_needed() {
    let table = PageTable::anonymous(4).unwrap();
    for page in [0, 1, 2] {
        claimed(&table, PageIndex(page), 3);
        table.finish(PageIndex(page), Version(3), page == 2, false);
    }
    assert_eq!(table.want(PageIndex(1)), Want::Ask { first: true });
    let mut need = PageSet::empty(4);
    need.insert(PageIndex(0));
    let refused = table.freeze(&need);
    assert!(
        matches!(refused, Err(MemoryError::UnknownContent { page: PageIndex(3), .. })),
        "{refused:?}"
    );
    assert_eq!(table.counts().current, 0);
    need.insert(PageIndex(3));
    assert_eq!(table.freeze(&need).unwrap(), [PageIndex(1)]);
    assert_eq!(table.want(PageIndex(2)), Want::Serve { zero: true });
    assert_eq!(table.incomplete().iter().map(|p| p.0).collect::<Vec<_>>(), [0, 3]);
    let previous = claimed(&table, PageIndex(0), 4);
    assert_eq!((previous.stage, previous.version), (Stage::Stale, Version(3)));
}

/// Threads touch pages while the switchover comes. Each page that is not needed must be served: by whoever
/// touched it, or by whoever is told by the switchover that it is waited for.
#[test]
fn no_waiting_page_is_lost_in_the_switchover() {
    const PAGES: u64 = 4096;
    for round in 0..60 {
        let table = PageTable::anonymous(PAGES).unwrap();
        let mut need = PageSet::empty(PAGES);
        for page in (0..PAGES).map(PageIndex) {
            claimed(&table, page, 1);
            table.finish(page, Version(1), false, false);
            if page.0 % 3 == 0 {
                need.insert(page);
            }
        }
        let served: Vec<AtomicBool> = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
        let (table, need, served) = (&table, &need, &served);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for page in (0..PAGES).map(|n| PageIndex((n + round * 61) % PAGES)) {
                    if let Want::Serve { .. } = table.want(page) {
                        assert!(!need.contains(page), "{page:?} is needed, and served");
                        served[page.0 as usize].store(true, Ordering::Relaxed);
                    }
                }
            });
            scope.spawn(move || {
                std::thread::sleep(std::time::Duration::from_micros(round * 2));
                for page in table.freeze(need).unwrap() {
                    assert!(!need.contains(page), "{page:?} is needed, and mapped");
                    served[page.0 as usize].store(true, Ordering::Relaxed);
                }
            });
        });
        for page in (0..PAGES).map(PageIndex) {
            let state = table.state(page);
            if need.contains(page) {
                assert_eq!((state.stage, state.waiting), (Stage::Stale, true));
            } else {
                assert_eq!(state.stage, Stage::Current);
                assert!(served[page.0 as usize].load(Ordering::Relaxed), "{page:?} is lost");
            }
        }
    }
}

#[test]
fn the_switchover_outlives_the_process_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("table");
    let mut need = PageSet::empty(3);
    need.insert(PageIndex(2));
    {
        let table = PageTable::create(&path, 3).unwrap();
        for page in (0..3).map(PageIndex) {
            claimed(&table, page, 1);
            table.finish(page, Version(1), false, false);
        }
        table.freeze(&need).unwrap();
    }
    let table = PageTable::open(&path).unwrap();
    table.recover();
    assert_eq!(table.incomplete(), need);
    assert_eq!(table.state(PageIndex(2)).stage, Stage::Stale);
}

#[test]
fn a_hole_is_settled_where_it_could_be_claimed() {
    let table = PageTable::anonymous(3).unwrap();
    assert_eq!(table.want(PAGE), Want::Ask { first: true });
    assert_eq!(table.settle_hole(PAGE, Version(2), false), Some(true));
    assert_eq!(table.settle_hole(PAGE, Version(2), true), None, "that version is there");
    assert_eq!(table.settle_hole(PAGE, Version(3), true), Some(true));
    assert_eq!(table.settle_hole(PAGE, Version(4), true), None, "nothing more was to come");
    let state = table.state(PAGE);
    assert_eq!((state.stage, state.zero, state.version), (Stage::Current, true, Version(3)));
    claimed(&table, PageIndex(1), 1);
    assert_eq!(table.settle_hole(PageIndex(1), Version(1), true), None, "another has claimed it");
}

#[test]
fn a_table_survives_the_process_that_made_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("table");
    {
        let table = PageTable::create(&path, 1000).unwrap();
        claimed(&table, PageIndex(1), 1);
        table.finish(PageIndex(1), Version(1), false, true);
        claimed(&table, PageIndex(999), 2047);
    }
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let table = PageTable::open(&path).unwrap();
    assert_eq!(table.pages(), 1000);
    assert_eq!(table.recover(), 1);
    assert_eq!(table.state(PageIndex(1)).stage, Stage::Current);
    assert_eq!(table.state(PageIndex(999)), PageState::UNKNOWN);
    assert!(PageTable::create(&path, 1000).is_err(), "an existing table is not overwritten");
}

#[test]
fn a_file_that_is_no_table_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("table");
    let refused = || matches!(PageTable::open(&path), Err(MemoryError::NotATable { .. }));
    std::fs::write(&path, b"short").unwrap();
    assert!(refused());
    drop(PageTable::create(&directory.path().join("good"), 8).unwrap());
    let good = std::fs::read(directory.path().join("good")).unwrap();
    for (at, byte) in [(0, b'F'), (8, 1), (16, 9), (20, 1), (24, 2), (4096, 7)] {
        let mut bad = good.clone();
        bad[at] = byte;
        std::fs::write(&path, bad).unwrap();
        assert!(refused(), "byte {at} changed");
    }
    std::fs::write(&path, &good).unwrap();
    assert!(!refused());
}
