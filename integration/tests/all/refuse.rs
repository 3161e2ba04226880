//! What cannot work fails with a clear error, leaves the source's guest running, and leaves nothing
//! behind.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farfault_integration::farfault::{self, Ended, Running};
use farfault_integration::lab::Lab;
use farfault_integration::leftovers::Inventory;
use farfault_integration::process::wait_for;
use farfault_integration::qemu::{Guest, GuestSpec, Machine, Ram};
use farfault_integration::recovery::migration_id;

const LIMIT: Duration = Duration::from_secs(60);
const WORK: &str = "ff.ws=64M ff.pattern=sparse ff.rate=1000 ff.verify=20000";

fn small_pc() -> GuestSpec {
    GuestSpec::new(Machine::Pc, 256, WORK)
}

/// A guest at work on the source, and another one that a receiver may start.
struct Case {
    source: Guest,
    destination: Guest,
    lab: Lab,
    before: Inventory,
}

impl Case {
    fn new(link: &str, source: &GuestSpec, destination: &GuestSpec) -> Result<Option<Self>> {
        let Some(lab) = Lab::start(link)? else { return Ok(None) };
        let source = Guest::boot(&lab, "source", source)?;
        let destination = Guest::prepare(&lab, "destination", destination)?;
        let before = Inventory::of(&lab)?;
        Ok(Some(Case { source, destination, lab, before }))
    }

    fn receive(&self) -> Result<(Running, String)> {
        let mut receive = Running::receive(&self.lab, &self.destination, &[])?;
        let ticket = receive.ticket()?;
        Ok((receive, ticket))
    }

    fn send(&self, ticket: &str) -> Result<Ended> {
        Running::send(&self.lab, &self.source, ticket, &[])?.wait(LIMIT)
    }

    /// The guest on the source runs as if nothing had been.
    fn source_goes_on(&self) -> Result<()> {
        assert_eq!(self.source.monitor()?.status()?, "running");
        self.source.log.wait_for_a_sweep(LIMIT)
    }

    /// No process and no file is there that was not there before the attempt. The destination's
    /// RAM files are of its QEMU's command line: whoever wrote that removes them.
    fn nothing_is_left(&self) -> Result<()> {
        let ram: Vec<String> =
            self.destination.ram_files().iter().map(|path| path.display().to_string()).collect();
        let mut left = Vec::new();
        let gone = wait_for("everything to be cleaned up", Duration::from_secs(5), || {
            left = self.before.new_since(&self.lab)?;
            left.retain(|what| !ram.contains(what));
            Ok(left.is_empty().then_some(()))
        });
        gone.with_context(|| format!("left behind: {left:?}"))
    }

    /// What must hold after a refusal of the source: the receiver still waits, and ends when asked.
    fn refused_by_source(self, receive: Running, sent: &Ended, words: &[&str]) -> Result<()> {
        says(sent, words)?;
        self.source_goes_on()?;
        receive.terminate(LIMIT)?;
        self.nothing_is_left()
    }
}

/// It failed, and its message or hint has all these words.
fn says(ended: &Ended, words: &[&str]) -> Result<()> {
    let told = ended.failure()?;
    eprintln!("{told}");
    for word in words {
        ensure!(told.to_lowercase().contains(&word.to_lowercase()), "no word of {word:?}: {told}");
    }
    Ok(())
}

#[test]
fn a_wrong_ticket_is_refused_and_the_right_one_still_works() -> Result<()> {
    let Some(case) = Case::new("200Mbit,10ms", &small_pc(), &small_pc())? else { return Ok(()) };
    let (receive, ticket) = case.receive()?;
    let mut wrong: Vec<char> = ticket.chars().collect();
    let at = (wrong.len() * 3 / 4..wrong.len())
        .find(|at| wrong[*at].is_ascii_alphanumeric())
        .context("a ticket without letters")?;
    // Whether its letters are large or small does not matter in a ticket.
    wrong[at] = if wrong[at].eq_ignore_ascii_case(&'a') { 'b' } else { 'a' };
    let sent = case.send(&String::from_iter(wrong))?;
    says(&sent, &["ticket"])?;
    case.source_goes_on()?;
    // What the sender's own host lacks does not use up the ticket.
    let unwritable = ["--trace", "/no/such/directory/trace"];
    let sent = Running::send(&case.lab, &case.source, &ticket, &unwritable)?.wait(LIMIT)?;
    says(&sent, &["/no/such/directory/trace"])?;

    case.send(&ticket)?.report().context("with the right ticket")?;
    receive.wait(LIMIT)?.report()?;
    case.destination.log.wait_for_a_sweep(LIMIT)
}

#[test]
fn a_ticket_works_only_once() -> Result<()> {
    let Some(case) = Case::new("200Mbit,10ms", &small_pc(), &small_pc())? else { return Ok(()) };
    let other = Guest::boot(&case.lab, "other", &small_pc())?;
    let moved = farfault::migrate(&case.lab, &case.source, &case.destination, &[], &[], LIMIT)?;
    let sent = Running::send(&case.lab, &other, &moved.ticket, &[])?.wait(LIMIT)?;
    says(&sent, &[])?;
    assert_eq!(other.monitor()?.status()?, "running");
    other.log.wait_for_a_sweep(LIMIT)?;
    case.destination.log.wait_for_a_sweep(LIMIT)
}

#[test]
fn machines_of_different_types_are_refused() -> Result<()> {
    let q35 = GuestSpec::new(Machine::Q35, 256, WORK);
    let Some(case) = Case::new("200Mbit,10ms", &small_pc(), &q35)? else { return Ok(()) };
    let (receive, ticket) = case.receive()?;
    says(&case.send(&ticket)?, &["machine"])?;
    case.source_goes_on()?;
    receive.terminate(LIMIT)?;
    case.nothing_is_left()
}

#[test]
fn memories_of_different_sizes_are_refused() -> Result<()> {
    let larger = GuestSpec::new(Machine::Pc, 512, WORK);
    let Some(case) = Case::new("200Mbit,10ms", &small_pc(), &larger)? else { return Ok(()) };
    let (receive, ticket) = case.receive()?;
    says(&case.send(&ticket)?, &["256 MiB", "512 MiB"])?;
    case.source_goes_on()?;
    receive.terminate(LIMIT)?;
    case.nothing_is_left()
}

#[test]
fn private_memory_is_refused_with_the_options_to_use() -> Result<()> {
    let mut private = small_pc();
    private.ram = Ram::Private;
    let Some(case) = Case::new("200Mbit,10ms", &private, &small_pc())? else { return Ok(()) };
    let (receive, ticket) = case.receive()?;
    let sent = case.send(&ticket)?;
    case.refused_by_source(receive, &sent, &["memory-backend-file", "share=on"])
}

#[test]
fn without_privileges_it_says_which_are_missing() -> Result<()> {
    let Some(case) = Case::new("200Mbit,10ms", &small_pc(), &small_pc())? else { return Ok(()) };
    let (receive, ticket) = case.receive()?;
    // Still root by its user id, so that files and sockets are not what fails.
    let wrapper = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
    let qmp = case.source.qmp_path();
    let sent = Running::send_from(&case.lab, qmp, &ticket, &[], &wrapper)?.wait(LIMIT)?;
    case.refused_by_source(receive, &sent, &["root"])
}

#[test]
fn a_socket_that_is_not_qemu_is_refused() -> Result<()> {
    let Some(case) = Case::new("200Mbit,10ms", &small_pc(), &small_pc())? else { return Ok(()) };
    let (receive, ticket) = case.receive()?;
    let path = case.lab.path("not-qemu");
    let listener = UnixListener::bind(&path)?;
    // Ends with the test's process, when no one connects any more.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.write_all(b"220 mail.example.org ESMTP\r\n");
            std::mem::forget(stream);
        }
    });
    let sent = Running::send_from(&case.lab, &path, &ticket, &[], &[])?.wait(LIMIT)?;
    case.refused_by_source(receive, &sent, &["QMP", &path.display().to_string()])
}

#[test]
fn a_socket_that_does_not_exist_is_named() -> Result<()> {
    let Some(case) = Case::new("200Mbit,10ms", &small_pc(), &small_pc())? else { return Ok(()) };
    let (receive, ticket) = case.receive()?;
    let path = Path::new("/nonexistent/qmp.sock");
    let sent = Running::send_from(&case.lab, path, &ticket, &[], &[])?.wait(LIMIT)?;
    case.refused_by_source(receive, &sent, &["/nonexistent/qmp.sock"])
}

#[test]
fn a_destination_that_does_not_wait_for_a_migration_is_refused() -> Result<()> {
    let Some(mut case) = Case::new("200Mbit,10ms", &small_pc(), &small_pc())? else {
        return Ok(());
    };
    case.destination.start(case.lab.b().name(), &["-S"])?;
    case.before = Inventory::of(&case.lab)?;
    let received = Running::receive_attached(&case.lab, &case.destination)?.wait(LIMIT)?;
    says(&received, &["-incoming defer"])?;
    case.source_goes_on()?;
    case.nothing_is_left()
}

/// A small file system in memory; gone on drop.
struct SmallTmpfs(PathBuf);

impl SmallTmpfs {
    fn mount(path: &Path) -> Result<Self> {
        std::fs::create_dir(path)?;
        let mount = ["-t", "tmpfs", "-o", "size=32M", "farfault-lab"];
        let status = Command::new("mount").args(mount).arg(path).status()?;
        ensure!(status.success(), "cannot mount a tmpfs");
        Ok(SmallTmpfs(path.to_owned()))
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_destination_without_room_for_the_memory_ends_with_an_error() -> Result<()> {
    let Some(case) = Case::new("200Mbit,10ms", &small_pc(), &small_pc())? else { return Ok(()) };
    let directory = case.lab.path("full");
    let small = SmallTmpfs::mount(&directory)?;
    let mut spec = small_pc();
    spec.ram_directory = directory;
    let destination = Guest::prepare(&case.lab, "cramped", &spec)?;
    let mut receive = Running::receive(&case.lab, &destination, &[])?;
    // It may notice at once that the memory cannot fit, or when it is full.
    let outcome = receive.ticket();
    if let Ok(ticket) = outcome {
        says(&case.send(&ticket)?, &[])?;
    }
    says(&receive.wait(LIMIT)?, &["space"])?;
    case.source_goes_on()?;
    drop((destination, small));
    case.nothing_is_left()
}

/// A migration that is in pre-copy, and will be for long.
fn in_precopy(case: &Case) -> Result<(Running, Running)> {
    let (receive, ticket) = case.receive()?;
    let options = ["--strategy", "precopy", "--reconnect-for", "5s"];
    let mut send = Running::send(&case.lab, &case.source, &ticket, &options)?;
    send.wait_for_event("pre-copy", LIMIT, |event| event["phase"] == "precopy")?;
    std::thread::sleep(Duration::from_secs(1));
    Ok((receive, send))
}

#[test]
fn a_receiver_that_is_ended_in_precopy_leaves_nothing_and_the_source_runs() -> Result<()> {
    let Some(case) = Case::new("20Mbit,20ms", &small_pc(), &small_pc())? else { return Ok(()) };
    let (receive, send) = in_precopy(&case)?;
    says(&receive.terminate(LIMIT)?, &[])?;
    says(&send.wait(LIMIT)?, &[])?;
    case.source_goes_on()?;
    case.nothing_is_left()
}

#[test]
fn a_receiver_that_is_ended_while_it_starts_its_qemu_leaves_nothing() -> Result<()> {
    let Some(lab) = Lab::start("200Mbit,10ms")? else { return Ok(()) };
    let destination = Guest::prepare(&lab, "destination", &small_pc())?;
    let before = Inventory::of(&lab)?;
    let slowly = ["--listen", "127.0.0.1:0", "--", "sh", "-c", "sleep 2; exec \"$@\"", "sh"];
    let command = destination.command_line().iter().map(String::as_str);
    let arguments: Vec<&str> = slowly.into_iter().chain(command).collect();
    let receive = Running::start(&lab, lab.b(), &[], "receive", &arguments)?;
    std::thread::sleep(Duration::from_secs(1));
    says(&receive.terminate(LIMIT)?, &["cancelled at the destination"])?;
    let mut left = before.new_since(&lab)?;
    let ram = destination.ram_files();
    left.retain(|what| !ram.iter().any(|path| path.display().to_string() == *what));
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

#[test]
fn a_destination_host_that_dies_in_precopy_leaves_the_source_running() -> Result<()> {
    let Some(mut case) = Case::new("20Mbit,20ms", &small_pc(), &small_pc())? else {
        return Ok(());
    };
    let (mut receive, send) = in_precopy(&case)?;
    receive.kill()?;
    case.destination.kill();
    says(&send.wait(2 * LIMIT)?, &[])?;
    case.source_goes_on()?;
    // On a host that did not really die there is still what a successor would need.
    let id = migration_id(&case.lab)?;
    let side = format!("{id}.destination");
    let given_up = farfault::command(&case.lab, &["resolve", &side, "--run-source"])?;
    ensure!(given_up.status.success(), "{}", String::from_utf8_lossy(&given_up.stderr));
    let pages = format!("/dev/shm/farfault-{side}.pages");
    ensure!(!Path::new(&pages).exists(), "{pages} is left");
    Ok(())
}

#[test]
fn a_sender_that_is_ended_in_precopy_leaves_nothing_and_the_source_runs() -> Result<()> {
    let Some(case) = Case::new("20Mbit,20ms", &small_pc(), &small_pc())? else { return Ok(()) };
    let (receive, send) = in_precopy(&case)?;
    says(&send.terminate(LIMIT)?, &[])?;
    says(&receive.wait(LIMIT)?, &[])?;
    case.source_goes_on()?;
    case.nothing_is_left()
}

#[test]
fn a_source_whose_qemu_ends_in_precopy_is_told_and_the_receiver_leaves_nothing() -> Result<()> {
    let Some(mut case) = Case::new("20Mbit,20ms", &small_pc(), &small_pc())? else {
        return Ok(());
    };
    let (receive, send) = in_precopy(&case)?;
    case.source.kill();
    // Whoever notices first: the one who talks to QEMU, or the one who looks at its page tables.
    let told = send.wait(LIMIT)?;
    says(&told, &["QEMU"]).or_else(|_| says(&told, &["the guest's process has ended"]))?;
    says(&receive.wait(LIMIT)?, &["gave up"])?;
    case.nothing_is_left()
}
