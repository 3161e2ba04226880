//! All runs of a scenario that are not made yet, one after the other.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::record::{Machine, Outcome, Record, key};
use super::scenario::{Cell, GuestKind, Scenario, is_wanted};
use super::store::Store;
use super::{builtin, cell};
use crate::lab::stage::place::{Image, Place, Tools};
use crate::lab::stage::process::is_interrupted;

/// What a run is taken to need before any was made: to boot, work, move and verify.
const UNKNOWN: Duration = Duration::from_secs(40);

/// Which runs, and with what.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// Cells whose name contains one of these; all, when there are none.
    pub only: Vec<String>,
    /// No run is begun that would, by those before, end later than this.
    pub budget: Option<Duration>,
    /// Where `tools/build-guest` has put the test guest.
    pub image: PathBuf,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs that are in the store, and were before.
    pub kept: usize,
    /// Runs made now.
    pub made: usize,
    /// Of those, the ones that ended in an error.
    pub failed: usize,
    /// Runs that are left, since the budget was spent.
    pub left: usize,
    /// Pages found corrupt in any of these runs, whenever they were made.
    pub corrupt_pages: u64,
}

/// Makes the runs; `tell` gets lines for a person.
///
/// # Errors
/// When the laboratory cannot be set up here, the store cannot be written, or it was interrupted. A
/// run that fails is kept as such, and the next one is made.
pub fn run(
    scenario: &Scenario,
    store: &mut Store,
    options: &RunOptions,
    mut tell: impl FnMut(&str),
) -> Result<Tally> {
    let all = scenario.runs(&options.only);
    if all.is_empty() {
        let example = scenario.runs(&[]).first().map(Cell::name).unwrap_or_default();
        bail!("no cell's name contains any of {:?}; they have names like {example}", options.only);
    }
    let is_made = |cell: &Cell| store.has(scenario, cell);
    let (kept, todo): (Vec<Cell>, Vec<Cell>) = all.into_iter().partition(is_made);
    let program = std::env::current_exe().context("where is this program?")?;
    let needs_qemu = todo.iter().any(|cell| cell.guest.kind == GuestKind::Qemu);
    let tools = if needs_qemu { Some(find_tools(&program, &options.image)?) } else { None };
    if let Some(tools) = &tools {
        // Now, not hours later when it is its turn.
        let in_qemu = todo.iter().filter(|cell| cell.guest.kind == GuestKind::Qemu);
        let images = in_qemu.map(|cell| tools.image.initrd_with(cell.guest.programs()));
        images.collect::<Result<Vec<_>>>()?;
    }
    let machine = Machine::here(&program, tools.as_ref().map(|tools| &tools.image));
    let begin = Instant::now();
    let mut tally = Tally { kept: kept.len(), ..Tally::default() };
    for (index, cell) in todo.iter().enumerate() {
        let left: Duration = todo[index..].iter().map(|cell| expected(store, cell)).sum();
        let needs = expected(store, cell);
        if options.budget.is_some_and(|budget| begin.elapsed() + needs > budget) {
            tally.left = todo.len() - index;
            tell(&format!("the budget is spent, {} runs are left", tally.left));
            break;
        }
        tell(&format!(
            "[{}/{}] {} #{}; about {} min left",
            index + 1,
            todo.len(),
            cell.name(),
            cell.repetition,
            left.as_secs().div_ceil(60)
        ));
        let traces = store.path("traces");
        let record = make(scenario, cell, &program, tools.as_ref(), &machine, &traces)?;
        tell(&format!("        {}", in_a_line(&record)));
        tally.made += 1;
        tally.failed += usize::from(record.outcome == Outcome::Failed);
        store.add(record)?;
    }
    let of_these = |record: &&Record| is_wanted(&record.name(), &options.only);
    let seen = store.of(scenario).into_iter().filter(of_these).flat_map(|record| &record.measured);
    tally.corrupt_pages = seen.map(|seen| seen.corrupt_pages).sum();
    Ok(tally)
}

fn make(
    scenario: &Scenario,
    cell: &Cell,
    program: &Path,
    tools: Option<&Tools>,
    machine: &Machine,
    traces: &Path,
) -> Result<Record> {
    let begin = Instant::now();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = scenario.seed_of(cell.repetition);
    let seen = match tools.filter(|_| cell.guest.kind == GuestKind::Qemu) {
        Some(tools) => cell::run(scenario, cell, seed, tools, traces),
        None => builtin::run(scenario, cell, seed, program),
    };
    if is_interrupted() {
        return Err(seen.err().unwrap_or_else(|| anyhow::anyhow!("interrupted")));
    }
    let (outcome, measured, reports, reason) = match seen {
        Ok(seen) => (seen.outcome, seen.measured, seen.reports, None),
        Err(error) => (Outcome::Failed, None, [].into(), Some(format!("{error:#}"))),
    };
    Ok(Record {
        key: key(scenario, cell),
        repetition: cell.repetition,
        guest: cell.guest.clone(),
        link: cell.link.clone(),
        method: cell.method.clone(),
        downtime: scenario.downtime.clone(),
        limit: scenario.limit.clone(),
        ready_memory: scenario.ready_memory && cell.guest.kind == GuestKind::Qemu,
        seed,
        machine: machine.clone(),
        unix_s: now.as_secs(),
        wall_s: begin.elapsed().as_secs_f64(),
        outcome,
        reason,
        measured,
        reports,
    })
}

fn in_a_line(record: &Record) -> String {
    match &record.measured {
        Some(seen) => format!(
            "{:.1} s, downtime {:.0} ms, {:.1} MB on the link, {} corrupt pages",
            seen.total_ms / 1e3,
            seen.downtime_ms,
            (seen.there_bytes + seen.back_bytes) as f64 / 1e6,
            seen.corrupt_pages
        ),
        None if record.outcome == Outcome::NotConverged => format!("not within {}", record.limit),
        None => format!("failed: {}", record.reason.as_deref().unwrap_or_default()),
    }
}

/// By the runs of the same cell, else by those of all.
fn expected(store: &Store, cell: &Cell) -> Duration {
    let mean = |seconds: Vec<f64>| {
        (!seconds.is_empty()).then(|| seconds.iter().sum::<f64>() / seconds.len() as f64)
    };
    let same = mean(store.named(&cell.name()).map(|record| record.wall_s).collect());
    let any = || mean(store.all().iter().map(|record| record.wall_s).collect());
    same.or_else(any).map_or(UNKNOWN, Duration::from_secs_f64)
}

fn find_tools(program: &Path, image: &Path) -> Result<Tools> {
    Place::requirements()?;
    let beside = program.with_file_name("wan");
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates =
        std::iter::once(beside.clone()).chain(std::env::split_paths(&paths).map(|p| p.join("wan")));
    let wan = candidates.find(|path| path.exists()).with_context(|| {
        format!(
            "the link emulator is neither {} nor in PATH: build it in farfault's source tree with \
             cargo build --release --workspace --bins",
            beside.display()
        )
    })?;
    Ok(Tools { farfault: program.to_owned(), wan, image: Image::in_directory(image)? })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{record, scenario};
    use super::*;

    fn store() -> (tempfile::TempDir, Scenario, Store) {
        let directory = tempfile::tempdir().unwrap();
        let scenario = scenario();
        let store = Store::open(directory.path(), &scenario).unwrap();
        (directory, scenario, store)
    }

    #[test]
    fn what_is_finished_is_not_made_again() {
        let (_directory, scenario, mut store) = store();
        for cell in scenario.runs(&[]) {
            store.add(record(&scenario, &cell, Outcome::Moved)).unwrap();
        }
        let options = RunOptions::default();
        let tally = run(&scenario, &mut store, &options, |_| {}).unwrap();
        assert_eq!(tally, Tally { kept: 8, ..Tally::default() });
        let options = RunOptions { only: vec!["nothing".to_owned()], ..options };
        let error = run(&scenario, &mut store, &options, |_| {}).unwrap_err();
        assert!(error.to_string().contains("nothing"));
    }

    #[test]
    fn a_corrupt_page_of_an_earlier_run_is_not_forgotten() {
        let (_directory, scenario, mut store) = store();
        for cell in scenario.runs(&[]) {
            let mut made = record(&scenario, &cell, Outcome::Moved);
            let is_bad = cell.name() == "db/wan/xbzrle" && cell.repetition == 1;
            made.measured.as_mut().unwrap().corrupt_pages = if is_bad { 3 } else { 0 };
            store.add(made).unwrap();
        }
        let corrupt_pages_of = |store: &mut Store, only: &[&str]| {
            let only = only.iter().map(|&text| text.to_owned()).collect();
            let options = RunOptions { only, ..RunOptions::default() };
            run(&scenario, store, &options, |_| {}).unwrap().corrupt_pages
        };
        assert_eq!(corrupt_pages_of(&mut store, &[]), 3);
        assert_eq!(corrupt_pages_of(&mut store, &["wan/"]), 3);
        assert_eq!(corrupt_pages_of(&mut store, &["lan/"]), 0);
    }

    #[test]
    fn a_run_is_expected_to_take_what_it_took_before() {
        let (_directory, scenario, mut store) = store();
        let cells = scenario.runs(&[]);
        assert_eq!(expected(&store, &cells[0]), UNKNOWN);
        store.add(Record { wall_s: 10.0, ..record(&scenario, &cells[0], Outcome::Moved) }).unwrap();
        store.add(Record { wall_s: 30.0, ..record(&scenario, &cells[1], Outcome::Moved) }).unwrap();
        assert_eq!(expected(&store, &cells[0]), Duration::from_secs(10));
        assert_eq!(expected(&store, &cells[2]), Duration::from_secs(20));
    }
}
