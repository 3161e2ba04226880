//! What a person may do in the end: the fences of `farfault resolve` let the guest run at one place, and at
//! one only.

use super::destination::Destination;
use super::source::Source;
use crate::engine::destination::DestinationRecord;
use crate::engine::source::SourceRecord;
use crate::session::journal::{Entry, Records, Side};
use crate::session::resolve::{Choice, judge_by};

/// Panics when what is on the two disks allows a choice that would make the guest run twice, or none.
pub(super) fn check(source: &Source, destination: &Destination) {
    let at_source: Vec<Entry> = source.journal.lines.iter().map(entry_of_source).collect();
    let at_destination: Vec<Entry> =
        destination.journal.lines.iter().map(entry_of_destination).collect();
    let permits = |choice| {
        let here = judge_by(Side::Source, &Records::of(&at_source), true, choice).is_ok();
        let there =
            judge_by(Side::Destination, &Records::of(&at_destination), true, choice).is_ok();
        (here, there)
    };
    let (source_here, source_there) = permits(Choice::RunSource);
    let (destination_here, destination_there) = permits(Choice::RunDestination);
    if destination.ran {
        assert!(!source_there, "the guest has run at the destination, which may give it up");
        assert!(destination_here && destination_there, "nobody may go on where it has run");
    }
    // Where the disk refused to take the word back, a person must look.
    if source.runs && !source.void_failed {
        assert!(!destination_here, "the guest runs at the source, which may give it up");
    }
    let one = (source_here && source_there) || (destination_here && destination_there);
    assert!(one, "the fences leave no place: {at_source:?} {at_destination:?}");
}

fn entry_of_source(record: &SourceRecord) -> Entry {
    match record {
        SourceRecord::Started => Entry::Started,
        SourceRecord::Decided => Entry::Decided,
        SourceRecord::Void => Entry::Void,
        SourceRecord::Running => Entry::Running,
        SourceRecord::Complete => Entry::Complete,
    }
}

fn entry_of_destination(record: &DestinationRecord) -> Entry {
    match record {
        DestinationRecord::Started => Entry::Started,
        DestinationRecord::Loaded => Entry::Loaded,
        DestinationRecord::Committed => Entry::Committed,
        DestinationRecord::Refused => Entry::Refused,
        DestinationRecord::Complete => Entry::Complete,
    }
}
