//! Entry point for fuzzing, shared by the tests here and the target in `fuzz/`: what a QEMU that its guest
//! has taken over, or something else that listens on its socket, may answer.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use qapi::qmp::{qom_list, query_kvm};

use super::commands::{QueryCapabilities, QueryCpus, QueryMemdev, QueryMigrate, QueryStatus};
use super::qmp::Qmp;
use super::text;

/// What a socket takes without a reader.
const MAX_BYTES: usize = 64 << 10;

/// Reads `data` as all that is ever said on a QMP socket, and as the tables that QEMU prints for people.
/// Tells whether it was a QMP session with an answer to the first question.
pub fn fuzz_qmp(data: &[u8]) -> bool {
    let data = &data[..data.len().min(MAX_BYTES)];
    read_tables(&String::from_utf8_lossy(data));
    let (ours, mut theirs) = UnixStream::pair().expect("descriptors are left");
    theirs.write_all(data).expect("the socket takes this much");
    theirs.shutdown(Shutdown::Write).expect("it is open");
    let Ok(mut qmp) = Qmp::greeted(ours, Path::new("fuzz")) else { return false };
    let answered = qmp.execute(&QueryStatus {}).is_ok();
    let _ = qmp.wait_event(Duration::from_secs(60), |event| (event.name == "STOP").then_some(()));
    let _ = (qmp.execute(&QueryMemdev {}), qmp.execute(&QueryCpus {}));
    let _ = qmp.execute(&QueryMigrate {}).map(|state| state.is_active());
    let _ = (qmp.execute(&QueryCapabilities {}), qmp.execute(&query_kvm {}));
    let _ = qmp.execute(&qom_list { path: "/machine".to_owned() });
    if let Ok(table) = qmp.human("info ramblock") {
        read_tables(&table);
    }
    answered
}

fn read_tables(table: &str) {
    let _ = text::ram_blocks(table);
    let pieces = text::largest_ram_pieces(table);
    assert!(pieces.values().all(|piece| piece.size_bytes > 0));
    let _ = text::host_address(table);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_as_the_answers_of_qemu() {
        let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7},
            "package": "Debian"}, "capabilities": ["oob"]}}"#
            .replace('\n', " ");
        let stop = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;
        let answers = [
            r#"{"return": {}, "id": 1}"#,
            r#"{"return": {"status": "running", "singlestep": false, "running": true}, "id": 2}"#,
            r#"{"return": [{"id": "ram0", "size": 268435456, "share": true}], "id": 3}"#,
            r#"{"return": [{"thread-id": 25627, "qom-path": "/machine/0", "target": "x"}], "id": 4}"#,
            r#"{"return": {"status": "completed", "blocked-reasons": ["no"]}, "id": 5}"#,
            r#"{"return": [{"state": false, "capability": "xbzrle"}], "id": 6}"#,
            r#"{"error": {"class": "CommandNotFound", "desc": "The command x"}, "id": 7}"#,
            r#"{"return": [{"name": "type", "type": "string"}], "id": 8}"#,
            r#"{"return": "ram0  4 KiB  0x0 0x1000 0x1000\n", "id": 9}"#,
        ];
        let session = [&[&greeting[..], answers[0], answers[1], stop], &answers[2..]].concat();
        let table = "FlatView #2\n AS \"memory\", root: system\n  \
            0000000000000000-000000000009ffff (prio 0, ram): n0 @0000000000100000 KVM\n";
        let refused = session[..2].join("\r\n") + "\n" + r#"{"return": {"status": "x"}, "id": 2}"#;
        let seeds = [session.join("\n") + "\n" + table, refused + "\n"];
        crate::fuzz_cases::run("qmp", fuzz_qmp, &seeds.map(String::into_bytes));
    }
}
