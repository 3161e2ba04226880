use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::engine::destination::DestinationRecord;
use crate::engine::source::SourceRecord;
use crate::guest::Whereabouts;
use crate::memory::adopt::ProcessIdentity;

fn about(migration: &str, side: Side) -> About {
    About::begin(migration, side, Whereabouts::default()).unwrap()
}

/// As if the process that wrote it had been killed.
fn orphan(mut about: About) -> About {
    about.owner = ProcessIdentity { start_ticks: about.owner.start_ticks + 1, ..about.owner };
    about
}

#[test]
fn records_are_lines_that_a_person_can_read_and_go_with_their_directory() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), &about("0badcafe", Side::Source)).unwrap();
    journal.record(&SourceRecord::Started).unwrap();
    journal.record(&SourceRecord::Decided).unwrap();
    let text = fs::read_to_string(journal.path()).unwrap();
    let records: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records[1]["record"], "decided");
    let again = Journal::create(dir.path(), &about("0badcafe", Side::Source)).unwrap_err();
    assert!(again.hint.unwrap().contains("--state-dir"));
    let directory = journal.directory().to_owned();
    journal.remove();
    assert!(!directory.exists());
}

#[test]
fn only_its_owner_can_look_into_the_state_directory() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().join("state");
    let journal = Journal::create(&state_dir, &about("0badcafe", Side::Source)).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state_dir), 0o700);
    assert_eq!(mode(journal.directory()), 0o700);
    for file in fs::read_dir(journal.directory()).unwrap() {
        assert_eq!(mode(&file.unwrap().path()), 0o600);
    }
}

#[test]
fn every_record_of_the_machines_is_read_as_an_entry() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::create(dir.path(), &about("0badcafe", Side::Source)).unwrap();
    use SourceRecord as S;
    for record in [S::Started, S::Decided, S::Void, S::Running, S::Complete] {
        journal.record(&record).unwrap();
    }
    use DestinationRecord as D;
    for record in [D::Started, D::Loaded, D::Committed, D::Refused, D::Complete] {
        journal.record(&record).unwrap();
    }
    journal.record(&Entry::RunSource).unwrap();
    journal.record(&Entry::RunDestination).unwrap();
    let found = find(dir.path(), "0bad", None).unwrap();
    let entries: Vec<Entry> = found.records.list.iter().map(|record| record.record).collect();
    use Entry::*;
    let expected = [
        Started,
        Decided,
        Void,
        Running,
        Complete,
        Started,
        Loaded,
        Committed,
        Refused,
        Complete,
        RunSource,
        RunDestination,
    ];
    assert_eq!(entries, expected);
}

#[test]
fn a_migration_is_found_by_the_beginning_of_its_id_and_its_side() {
    let dir = tempfile::tempdir().unwrap();
    assert!(list(&dir.path().join("missing")).unwrap().0.is_empty());
    let journals = [("aa01", Side::Source), ("aa01", Side::Destination), ("ab02", Side::Source)]
        .map(|(id, side)| Journal::create(dir.path(), &about(id, side)).unwrap());
    assert_eq!(find(dir.path(), "ab02", None).unwrap().name(), "ab02.source");
    assert_eq!(find(dir.path(), "aa01.d", None).unwrap().name(), "aa01.destination");
    let by_side = find(dir.path(), "aa01", Some(Side::Source)).unwrap();
    assert_eq!(by_side.name(), "aa01.source");
    // A script's empty variable names nothing, even where there is only one.
    for short in ["", "ab0"] {
        let refused = find(dir.path(), short, None).unwrap_err();
        assert!(refused.reason.contains("at least 4 characters"), "{refused}");
    }
    let either = find(dir.path(), "aa01", None).unwrap_err();
    // The older one first, if they did not begin in the same millisecond.
    let told = |names: &str| either.reason.contains(names);
    let names = ["aa01.source or aa01.destination", "aa01.destination or aa01.source"];
    assert!(names.into_iter().any(told), "{either}");
    let none = find(dir.path(), "ffff", None).unwrap_err();
    assert!(none.hint.unwrap().contains("farfault status"));
    drop(journals);
}

#[test]
fn a_journal_is_not_taken_from_who_works_on_it_but_from_the_dead() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Journal::create(dir.path(), &about("aa01", Side::Source)).unwrap();
    first.record(&SourceRecord::Started).unwrap();
    let owned = Journal::take_over(&find(dir.path(), "aa01", None).unwrap()).unwrap_err();
    assert!(owned.reason.contains("works on"), "{owned}");
    // Its process is gone as far as its file says, but the journal is held all the same.
    let mut found = find(dir.path(), "aa01", None).unwrap();
    found.about = orphan(found.about);
    assert!(Journal::take_over(&found).is_err());
    drop(first);
    let mut heir = Journal::take_over(&found).unwrap();
    heir.record(&Entry::RunSource).unwrap();
    let found = find(dir.path(), "aa01", None).unwrap();
    assert!(found.records.has(Entry::Started) && found.records.has(Entry::RunSource));
}

#[test]
fn a_line_that_was_not_finished_counts_as_not_written_and_goes_at_the_takeover() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Journal::create(dir.path(), &orphan(about("aa01", Side::Source))).unwrap();
    first.record(&SourceRecord::Started).unwrap();
    // Whole but for its end: its writer died before it could act upon it.
    first.file.write_all(b"{\"unix_ms\":2,\"record\":\"decided\"}").unwrap();
    drop(first);
    let found = find(dir.path(), "aa01", None).unwrap();
    assert!(found.records.has(Entry::Started) && !found.records.has(Entry::Decided));
    Journal::take_over(&found).unwrap().record(&Entry::RunSource).unwrap();
    let found = find(dir.path(), "aa01", None).unwrap();
    assert!(found.records.has(Entry::RunSource) && !found.records.has(Entry::Decided));
}

#[test]
fn a_damaged_journal_is_no_evidence() {
    let whole = "{\"unix_ms\":1,\"record\":\"started\"}\n";
    assert!(Records::parse(&format!("{whole}gibberish\n{whole}")).unwrap_err().contains("line 2"));
    assert!(Records::parse("{\"unix_ms\":1,\"record\":\"flown\"}\n").is_err());
}

#[test]
fn a_record_that_cannot_be_written_is_taken_back_or_ends_the_journal() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    let file = File::from(memfd_create(c"journal", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    let copy = file.try_clone().unwrap();
    let length = || copy.metadata().unwrap().len();
    let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
    let mut journal = Journal { file, directory: PathBuf::from("full"), sound: true };
    journal.record(&SourceRecord::Started).unwrap();
    let before = length();
    fcntl(&copy, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
    let failure = journal.record(&SourceRecord::Decided).unwrap_err();
    assert!(failure.reason.contains("full"), "{failure}");
    assert_eq!((length(), journal.is_sound()), (before, true));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("readable");
    fs::write(&path, "").unwrap();
    let file = Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
    let mut journal = Journal { file, directory: dir.path().to_owned(), sound: true };
    journal.record(&SourceRecord::Started).unwrap_err();
    assert!(!journal.is_sound());
    let failure = journal.record(&SourceRecord::Started).unwrap_err();
    assert!(failure.reason.contains("taken back"), "{failure}");
}

#[test]
fn a_state_directory_is_removed_with_the_page_tables_of_its_migrations() {
    let directory = tempfile::tempdir().unwrap();
    let side = directory.path().join(format!("remove-{}.destination", std::process::id()));
    fs::create_dir(&side).unwrap();
    fs::write(pages_path(&side), b"table").unwrap();
    remove_state(directory.path());
    assert!(!pages_path(&side).exists() && !directory.path().exists());
}

#[test]
fn who_is_killed_over_making_or_removing_a_journal_leaves_no_migration() {
    let dir = tempfile::tempdir().unwrap();
    let half = dir.path().join("aa01.source.unfinished");
    fs::create_dir(&half).unwrap();
    let (found, failures) = list(dir.path()).unwrap();
    assert!(found.is_empty() && failures.is_empty() && half.exists(), "{failures:?}");
    let long_ago = SystemTime::now() - UNFINISHED_FOR * 2;
    File::open(&half).unwrap().set_modified(long_ago).unwrap();
    list(dir.path()).unwrap();
    assert!(!half.exists(), "nobody works on it any more");
}
