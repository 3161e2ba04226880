//! `farfault demo`, as a program reads it: small guests, fast links.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use farfault_integration::farfault::{Ended, Running};
use farfault_integration::lab::{guest_image, workspace_program};
use farfault_integration::process::wait_for;
use farfault_integration::skip::skipped;
use serde_json::Value;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);

/// `farfault demo`, with a directory that no other process on this machine uses.
struct Demo {
    running: Running,
    temporary: TempDir,
}

impl Demo {
    /// `None`, loudly, where it cannot run: it needs userfaultfd.
    fn start(arguments: &str) -> Result<Option<Self>> {
        Self::start_with(&["--guest", "threads", "--memory", "16MiB"], arguments)
    }

    /// The same of Linux in QEMU.
    fn start_qemu(arguments: &str) -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            skipped("farfault demo --guest qemu: not root")?;
            return Ok(None);
        }
        let kernel = guest_image()?.kernel;
        let image = kernel.parent().unwrap_or(&kernel).display().to_string();
        let guest = ["--guest", "qemu", "--memory", "128MiB", "--image", &image];
        Self::start_with(&guest, arguments)
    }

    fn start_with(guest: &[&str], arguments: &str) -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            skipped("farfault demo: not root")?;
            return Ok(None);
        }
        let further: Vec<&str> = arguments.split(' ').collect();
        let arguments = [&["demo", "--json", "--work-for", "300ms"], guest, &further].concat();
        let temporary = tempfile::tempdir()?;
        let program = workspace_program("FARFAULT_BIN", "farfault")?;
        Ok(Some(Demo {
            running: Running::here(&program, &arguments, temporary.path())?,
            temporary,
        }))
    }

    fn wait(self) -> Result<Ended> {
        let ended = self.running.wait(LIMIT)?;
        no_process_is_left(self.temporary.path())?;
        no_file_is_left(self.temporary.path())?;
        Ok(ended)
    }
}

/// The sides of an interrupted demo end when it does, and are nobody's children then.
fn no_process_is_left(temporary: &Path) -> Result<()> {
    let mark = temporary.display().to_string();
    let started_with_it = |pid: &str| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(&mark)
    };
    wait_for("the demo's processes to end", Duration::from_secs(5), || {
        let mut processes = std::fs::read_dir("/proc")?.flatten();
        let one_lives =
            processes.any(|process| started_with_it(&process.file_name().to_string_lossy()));
        Ok((!one_lives).then_some(()))
    })
}

fn no_file_is_left(temporary: &Path) -> Result<()> {
    assert_eq!(std::fs::read_dir(temporary)?.count(), 0, "temporary files");
    Ok(())
}

/// The files in which a demo's QEMUs have their guests' memory.
fn ram_files(temporary: &Path) -> Result<Vec<PathBuf>> {
    let mark = temporary.display().to_string();
    let mut files = Vec::new();
    for process in std::fs::read_dir("/proc")?.flatten() {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if let Some((_, rest)) = line.split_once("mem-path=").filter(|_| line.contains(&mark)) {
            files.extend(rest.split(',').next().map(PathBuf::from));
        }
    }
    Ok(files)
}

fn events<'a>(ended: &'a Ended, kind: &str, side: &str) -> Vec<&'a Value> {
    let wanted = |event: &&Value| event["event"] == kind && event["side"] == side;
    ended.events.iter().filter(wanted).collect()
}

fn verdict(ended: &Ended) -> &Value {
    ended.events.last().filter(|event| event["event"] == "verdict").expect("a verdict at the end")
}

#[test]
fn the_demo_moves_a_working_guest_and_finds_it_whole() -> Result<()> {
    let Some(demo) = Demo::start("--work sparse:5000/s --link 1Gbit,10ms")? else { return Ok(()) };
    let ended = demo.wait()?;
    assert!(ended.status.success(), "{:?}", ended.events.last());
    let verdict = verdict(&ended);
    assert_eq!(verdict["ok"], true);
    assert_eq!(verdict["wrong_pages"], 0);
    assert!(verdict["pages_verified"].as_u64() > Some(3000), "{verdict}");
    assert_eq!(verdict["report"]["result"], "migrated");
    assert!(verdict["report"]["round_trip_ms"].as_f64() >= Some(10.0), "{verdict}");

    let memory = events(&ended, "memory", "destination");
    let last = memory.last().expect("the destination's memory was told of");
    assert_eq!((&last["absent"], &last["stale"]), (&0.into(), &0.into()), "{last}");
    // The guest went on from where it was, on the other side.
    let ops = |side| events(&ended, "guest", side).last().map(|event| event["ops"].as_u64());
    assert!(ops("destination") > ops("source"), "{:?} {:?}", ops("destination"), ops("source"));
    assert!(ended.events.iter().all(|event| event["event"] != "ticket"), "it is a secret");
    Ok(())
}

#[test]
fn the_demo_moves_linux_in_qemu_and_finds_it_whole() -> Result<()> {
    let Some(demo) = Demo::start_qemu("--work sparse:5000/s --link 1Gbit,10ms")? else {
        return Ok(());
    };
    let ended = demo.wait()?;
    assert!(ended.status.success(), "{:?}", ended.events.last());
    let verdict = verdict(&ended);
    assert_eq!((&verdict["ok"], &verdict["wrong_pages"]), (&true.into(), &0.into()), "{verdict}");
    assert!(verdict["pages_verified"].as_u64() > Some(10_000), "{verdict}");
    let ops = |side| events(&ended, "guest", side).last().map(|event| event["ops"].as_u64());
    assert!(ops("destination") > ops("source"), "{:?} {:?}", ops("destination"), ops("source"));
    Ok(())
}

#[test]
fn a_demo_of_qemu_that_is_interrupted_leaves_nothing_behind() -> Result<()> {
    let Some(mut demo) = Demo::start_qemu("--link 1Mbit,10ms")? else { return Ok(()) };
    let in_precopy = |event: &Value| event["event"] == "phase" && event["phase"] == "precopy";
    demo.running.wait_for_event("pre-copy", LIMIT, in_precopy)?;
    let ram_files = ram_files(demo.temporary.path())?;
    assert_eq!(ram_files.len(), 2, "{ram_files:?}");
    let ended = demo.running.terminate(Duration::from_secs(5))?;
    assert_eq!(ended.status.code(), Some(130));
    no_process_is_left(demo.temporary.path())?;
    no_file_is_left(demo.temporary.path())?;
    assert!(ram_files.iter().all(|file| !file.exists()), "{ram_files:?}");
    Ok(())
}

#[test]
fn the_demo_shows_that_deltas_move_a_guest_that_plain_pre_copy_does_not() -> Result<()> {
    // The guest rewrites all it has ten times a second: more than the link carries without deltas.
    let work = "--work sparse:35000/s --link 50Mbit,10ms --compare";
    let Some(demo) = Demo::start(work)? else { return Ok(()) };
    let ended = demo.wait()?;
    assert!(ended.status.success(), "{:?}", ended.events.last());
    let verdict = verdict(&ended);
    let compared = &verdict["compared"];
    assert_eq!(compared["cancelled"], true);
    assert_eq!(compared["report"]["result"], "stayed");
    assert_eq!(compared["wrong_pages"], 0, "the guest lives on where it was");
    assert!(
        compared["report"]["pages_by_codec"]
            .as_object()
            .is_some_and(|codecs| { codecs.keys().all(|codec| !codec.contains("delta")) })
    );
    Ok(())
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing_behind() -> Result<()> {
    let Some(mut demo) = Demo::start("--link 1Mbit,10ms")? else { return Ok(()) };
    let in_precopy = |event: &Value| event["event"] == "phase" && event["phase"] == "precopy";
    demo.running.wait_for_event("pre-copy", LIMIT, in_precopy)?;
    let ended = demo.running.terminate(Duration::from_secs(5))?;
    assert_eq!(ended.status.code(), Some(130));
    no_process_is_left(demo.temporary.path())?;
    no_file_is_left(demo.temporary.path())
}

#[test]
fn a_demo_that_is_killed_takes_its_sides_with_it() -> Result<()> {
    let Some(mut demo) = Demo::start("--link 1Mbit,10ms")? else { return Ok(()) };
    demo.running.wait_for_event("the guest", LIMIT, |event| event["event"] == "booted")?;
    demo.running.kill()?;
    no_process_is_left(demo.temporary.path())
}
