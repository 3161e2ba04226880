//! What goes on, for Prometheus: `--metrics ADDR` answers every HTTP request with the numbers of now.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{LinkState, Output};
use crate::page::PAGE_SIZE_BYTES;

/// One scraper at a time gets so long for its request and for taking the answer, in all.
const PATIENCE: Duration = Duration::from_secs(2);
/// A request is looked at only for its end.
const MAX_REQUEST_BYTES: usize = 8 << 10;

/// Answers at `address`, with what `output` was told last, until the process ends.
///
/// # Errors
/// When the address cannot be listened at.
pub fn serve_metrics(address: SocketAddr, output: Arc<Output>) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    std::thread::Builder::new().name("metrics".to_owned()).spawn(move || {
        for stream in listener.incoming() {
            match stream {
                // A scraper that fails comes again.
                Ok(stream) => drop(answer(&stream, &text(&output))),
                // Out of descriptors, say: not to be tried again at once.
                Err(_) => std::thread::sleep(PATIENCE),
            }
        }
    })?;
    Ok(())
}

/// Prometheus' text format, version 0.0.4.
fn text(output: &Output) -> String {
    let (phase, link, progress) = output.last();
    let progress = progress.unwrap_or_default();
    let page_bytes = PAGE_SIZE_BYTES as u64;
    let mut text = String::new();
    let mut put = |name: &str, kind: &str, help: &str, labels: &str, value: f64| {
        let _ = writeln!(text, "# HELP farfault_{name} {help}\n# TYPE farfault_{name} {kind}");
        let _ = writeln!(text, "farfault_{name}{labels} {value}");
    };
    let version = format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    put("build_info", "gauge", "Version of farfault.", &version, 1.0);
    if let Some(phase) = phase {
        let phase = format!("{{phase=\"{}\"}}", phase.name());
        put("phase_info", "gauge", "The phase of the migration.", &phase, 1.0);
    }
    let is_up = f64::from(u8::from(link == LinkState::Up));
    let gauges = [
        ("link_up", "1 while the link works, as far as is known.", is_up),
        ("elapsed_seconds", "Since the first message.", progress.elapsed_ms as f64 / 1e3),
        ("guest_memory_bytes", "RAM of the guest.", (progress.pages_total * page_bytes) as f64),
        (
            "remaining_bytes",
            "Memory that the destination lacks, as far as this side knows.",
            (progress.remaining_pages * page_bytes) as f64,
        ),
    ];
    for (name, help, value) in gauges {
        put(name, "gauge", help, "", value);
    }
    let counters = [
        ("sent_bytes_total", "Sent by this side.", progress.wire_sent_bytes),
        ("received_bytes_total", "Received by this side.", progress.wire_received_bytes),
        ("pages_total", "Pages that went or came, counted each time.", progress.pages),
        ("remote_faults_total", "Faults that asked the source.", progress.remote_faults),
    ];
    for (name, help, value) in counters {
        put(name, "counter", help, "", value as f64);
    }
    if let Some(faults) = progress.faults {
        let help = "Time in which a thread of the guest waited for a page.";
        put("stall_seconds_total", "counter", help, "", faults.stall_any_ms / 1e3);
    }
    text
}

fn answer(mut stream: &TcpStream, text: &str) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let left = || match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::Error::from(io::ErrorKind::TimedOut)),
        left => Ok(Some(left)),
    };
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        stream.set_read_timeout(left()?)?;
        let bytes = stream.read(&mut part)?;
        if bytes == 0 || request.len() + bytes > MAX_REQUEST_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        request.extend_from_slice(&part[..bytes]);
    }
    stream.set_write_timeout(left()?)?;
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n";
    let head = format!("{head}Content-Length: {}\r\nConnection: close\r\n\r\n", text.len());
    // Small enough for the socket's buffer: one write that does not wait.
    stream.write_all(format!("{head}{text}").as_bytes())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::engine::MigrationPhase;
    use crate::report::{FaultFigures, Progress};

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        let mut answer = String::new();
        // A refused request may be reset before or after all of it is written.
        let _ = stream.write_all(request);
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    #[test]
    fn a_scraper_gets_the_numbers_of_now_and_nonsense_does_not_stop_that() {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let output = Arc::new(Output::new(true));
        serve_metrics(free, output.clone()).unwrap();
        output.phase(MigrationPhase::Precopy);
        output.progress(Progress {
            wire_sent_bytes: 4711,
            remaining_pages: 2,
            faults: Some(FaultFigures { stall_any_ms: 1500.0, ..Default::default() }),
            ..Default::default()
        });
        assert_eq!(ask(free, &[b'x'; 2 * MAX_REQUEST_BYTES]), "");
        let answer = ask(free, b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        for line in [
            "farfault_sent_bytes_total 4711",
            "farfault_remaining_bytes 8192",
            "farfault_stall_seconds_total 1.5",
            "# TYPE farfault_sent_bytes_total counter",
            "farfault_phase_info{phase=\"precopy\"} 1",
        ] {
            assert!(answer.lines().any(|found| found == line), "{line} in {answer}");
        }
        assert!(serve_metrics(free, output).is_err(), "the address is taken");
    }
}
