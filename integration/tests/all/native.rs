//! QEMU's own migration in the laboratory: shows that guest, heartbeats and link are fit to judge
//! another method.

use std::time::Duration;

use anyhow::Result;
use farfault_integration::lab::Lab;
use farfault_integration::leftovers::nothing_is_left_after;
use farfault_integration::native::{self, Method};
use farfault_integration::qemu::{Guest, GuestSpec, Machine, Ram};
use farfault_integration::timeline::Interruption;

#[test]
fn a_guest_moved_by_qemu_itself_is_seen_to_stop_and_go_on_unharmed() -> Result<()> {
    let Some(lab) = Lab::start_alone("1Gbit,10ms")? else { return Ok(()) };
    let mut spec = GuestSpec::new(Machine::Pc, 256, "ff.ws=64M ff.pattern=sparse ff.rate=500");
    spec.ram = Ram::Private;
    let source = Guest::boot(&lab, "source", &spec)?;
    std::thread::sleep(Duration::from_secs(1));
    let mut destination = Guest::prepare(&lab, "destination", &spec)?;
    let limit = Duration::from_secs(60);
    let downtime = Duration::from_millis(300);
    let done = native::migrate(&lab, &source, &mut destination, Method::Precopy, downtime, limit)?;
    let done = done.ok_or_else(|| anyhow::anyhow!("not complete in {limit:?}"))?;
    destination.log.wait_for_a_sweep(limit)?;
    // Recovery is judged over half a second.
    std::thread::sleep(Duration::from_secs(1));

    let (beats, after) = (source.log.beats(), destination.log.beats());
    let seen = Interruption::measure(&beats, &after, done.started)?;
    assert!(seen.downtime < Duration::from_secs(3), "{seen:?}");
    assert!(seen.recovered_after.is_some(), "{seen:?}");
    assert_eq!(source.monitor()?.status()?, "postmigrate");
    assert_eq!(destination.monitor()?.status()?, "running");
    drop((source, destination));
    nothing_is_left_after(lab)
}
