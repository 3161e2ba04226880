//! The directory of an experiment: its scenario, and one JSON line for each run that has come to an end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::record::{Outcome, Record, key};
use super::scenario::{Cell, Scenario};

const SCENARIO: &str = "scenario.toml";
const RESULTS: &str = "results.jsonl";
/// A million runs of a hundred lines each are more than anyone has made.
const MAX_RESULTS_BYTES: u64 = 4 << 30;

/// An experiment's directory, and what is in it.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    records: Vec<Record>,
}

impl Store {
    /// Opens or makes the directory, notes the scenario there, and takes in what is finished.
    pub fn open(directory: &Path, scenario: &Scenario) -> Result<Self> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("make the directory {}", directory.display()))?;
        let store = Store { directory: directory.to_owned(), records: read(directory)? };
        let text = toml::to_string(scenario).context("write the scenario")?;
        std::fs::write(store.path(SCENARIO), text)
            .with_context(|| format!("write {}", store.path(SCENARIO).display()))?;
        Ok(store)
    }

    /// Opens a directory that there is, with the scenario that was noted last.
    pub fn existing(directory: &Path) -> Result<(Self, Scenario)> {
        let path = directory.join(SCENARIO);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("{} is no experiment's directory", directory.display()))?;
        let scenario = Scenario::noted(&text).with_context(|| path.display().to_string())?;
        Ok((Store { directory: directory.to_owned(), records: read(directory)? }, scenario))
    }

    /// A file of this name in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Whether this run has come to an end, and not to a failure.
    pub fn has(&self, scenario: &Scenario, cell: &Cell) -> bool {
        let (key, seed) = (key(scenario, cell), scenario.seed_of(cell.repetition));
        let is_it = |record: &Record| {
            record.key == key && record.repetition == cell.repetition && record.seed == seed
        };
        self.records.iter().any(|record| is_it(record) && record.outcome != Outcome::Failed)
    }

    /// All runs of the cells of this name, under whatever conditions.
    pub fn named(&self, name: &str) -> impl Iterator<Item = &Record> {
        let is_it = move |record: &&Record| record.name() == name;
        self.records.iter().filter(is_it)
    }

    /// Everything that there is.
    pub fn all(&self) -> &[Record] {
        &self.records
    }

    /// Keeps a run: on the disk when this returns.
    pub fn add(&mut self, record: Record) -> Result<()> {
        let path = self.path(RESULTS);
        let mut line = serde_json::to_string(&record)?;
        line.push('\n');
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        file.write_all(line.as_bytes())
            .and_then(|()| file.sync_data())
            .with_context(|| format!("write {}", path.display()))?;
        self.records.push(record);
        Ok(())
    }

    /// The runs that belong to the scenario as it is now, in its order; of one that was made more than
    /// once, the last.
    pub fn of(&self, scenario: &Scenario) -> Vec<&Record> {
        let mut latest: BTreeMap<(&str, u32), &Record> = BTreeMap::new();
        let has_its_seed = |record: &&Record| record.seed == scenario.seed_of(record.repetition);
        for record in self.records.iter().filter(has_its_seed) {
            latest.insert((&record.key, record.repetition), record);
        }
        let mut cells = scenario.runs(&[]);
        let position = |names: Vec<&String>, name: &String| names.iter().position(|n| *n == name);
        cells.sort_by_key(|cell| {
            (
                position(scenario.guest.iter().map(|part| &part.name).collect(), &cell.guest.name),
                position(scenario.link.iter().map(|part| &part.name).collect(), &cell.link.name),
                position(
                    scenario.method.iter().map(|part| &part.name).collect(),
                    &cell.method.name,
                ),
                cell.repetition,
            )
        });
        let of = |key: &str, repetition| latest.get(&(key, repetition)).copied();
        cells.iter().filter_map(|cell| of(&key(scenario, cell), cell.repetition)).collect()
    }
}

/// The lines that can be read. A process that was killed while it wrote leaves a part of a line: that
/// is cut off.
fn read(directory: &Path) -> Result<Vec<Record>> {
    let path = directory.join(RESULTS);
    let Ok(metadata) = path.metadata() else { return Ok(Vec::new()) };
    ensure!(metadata.len() <= MAX_RESULTS_BYTES, "{} is too large", path.display());
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    if whole < text.len() {
        File::options().write(true).open(&path)?.set_len(whole as u64)?;
    }
    let parse = |(index, line): (usize, &str)| {
        serde_json::from_str(line)
            .with_context(|| format!("{}, line {}: move it away", path.display(), index + 1))
    };
    text[..whole].lines().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{record, scenario};
    use super::*;

    #[test]
    fn what_is_finished_is_found_again_and_what_failed_or_was_edited_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let mut scenario = scenario();
        let cells = scenario.runs(&[]);
        let mut store = Store::open(directory.path(), &scenario).unwrap();
        store.add(record(&scenario, &cells[0], Outcome::Moved)).unwrap();
        store.add(record(&scenario, &cells[1], Outcome::Failed)).unwrap();
        // As a killed process leaves it.
        let mut file = File::options().append(true).open(store.path(RESULTS)).unwrap();
        file.write_all(b"{\"key\": \"half").unwrap();

        let (mut store, noted) = Store::existing(directory.path()).unwrap();
        let has =
            |store: &Store, scenario: &Scenario, index: usize| store.has(scenario, &cells[index]);
        assert_eq!(noted.runs(&[]).len(), cells.len());
        assert!(has(&store, &scenario, 0) && !has(&store, &scenario, 1));
        store.add(record(&scenario, &cells[1], Outcome::NotConverged)).unwrap();
        assert!(has(&store, &scenario, 1), "made again");
        let of: Vec<Outcome> = store.of(&scenario).iter().map(|record| record.outcome).collect();
        assert_eq!(of.len(), 2, "{of:?}");
        assert!(!of.contains(&Outcome::Failed));

        scenario.seed += 1;
        assert!(!has(&store, &scenario, 0) && store.of(&scenario).is_empty(), "other losses");
        scenario.seed -= 1;
        assert!(has(&store, &scenario, 0));
        scenario.downtime = "30ms".to_owned();
        assert!(!has(&store, &scenario, 0), "other conditions");
        assert!(store.of(&scenario).is_empty());
        assert_eq!(Store::open(directory.path(), &scenario).unwrap().all().len(), 3);
    }
}
