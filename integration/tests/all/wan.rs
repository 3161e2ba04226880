//! The link emulator between real sockets.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Result;
use farfault_integration::lab::{ADDRESS_A, ADDRESS_B, Lab};
use farfault_integration::leftovers::nothing_is_left_after;
use farfault_wan::netns::Netns;

fn udp(netns: &Netns, address: &str) -> Result<UdpSocket> {
    let address = (address.to_owned(), 5000);
    let socket: UdpSocket = netns.open_inside(move || Ok(UdpSocket::bind(address)?.into()))?.into();
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    Ok(socket)
}

/// Sends one packet there and back again.
fn round_trip(near: &UdpSocket, far: &UdpSocket) -> Result<Duration> {
    let mut buffer = [0; 100];
    let since = Instant::now();
    near.send_to(b"there", (ADDRESS_B, 5000))?;
    let (_, from) = far.recv_from(&mut buffer)?;
    far.send_to(b"back", from)?;
    near.recv_from(&mut buffer)?;
    Ok(since.elapsed())
}

#[test]
fn packets_take_the_round_trip_time_and_cuts_and_changes_apply_at_once() -> Result<()> {
    let Some(mut lab) = Lab::start_alone("100Mbit,40ms")? else { return Ok(()) };
    let (near, far) = (udp(lab.a(), ADDRESS_A)?, udp(lab.b(), ADDRESS_B)?);
    let mut times: Vec<Duration> =
        (0..20).map(|_| round_trip(&near, &far)).collect::<Result<_>>()?;
    times.sort();
    assert!(times[0] >= Duration::from_millis(40), "{times:?}");
    // The others may have waited for a processor.
    assert!(times[0] < Duration::from_millis(41), "{times:?}");

    lab.wan.command("cut")?;
    assert!(round_trip(&near, &far).is_err(), "a packet crossed a cut link");
    lab.wan.command("restore")?;
    lab.wan.command("delay 5ms")?;
    assert!(round_trip(&near, &far)? < Duration::from_millis(30));
    assert!(lab.wan.command("rate fast").is_err());

    let totals = lab.wan.command("reset")?;
    assert!(totals["a_to_b"]["dropped_cut_packets"].as_u64() > Some(0), "{totals}");
    drop((near, far));
    nothing_is_left_after(lab)
}

#[test]
fn tcp_gets_the_rate_of_the_link() -> Result<()> {
    const BYTES: usize = 25_000_000;
    let Some(mut lab) = Lab::start_alone("100Mbit,10ms")? else { return Ok(()) };
    let listen = || Ok(TcpListener::bind((ADDRESS_B, 5000))?.into());
    let listener: TcpListener = lab.b().open_inside(listen)?.into();
    let receiver = std::thread::spawn(move || -> Result<usize> {
        let (mut stream, _) = listener.accept()?;
        Ok(std::io::copy(&mut stream, &mut std::io::sink())? as usize)
    });
    let connect = || Ok(TcpStream::connect((ADDRESS_B, 5000))?.into());
    let mut stream: TcpStream = lab.a().open_inside(connect)?.into();
    let since = Instant::now();
    stream.write_all(&vec![7; BYTES])?;
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    let seconds = since.elapsed().as_secs_f64();
    let received = receiver.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    assert_eq!(received, BYTES);
    let mbit_per_s = BYTES as f64 * 8.0 / 1e6 / seconds;
    assert!((80.0..=97.0).contains(&mbit_per_s), "{mbit_per_s} of 100 Mbit/s");
    assert!(lab.wan.carried_bytes()? > BYTES as u64);
    Ok(())
}
