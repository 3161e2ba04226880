//! `compare`: the same guest, work and link for farfault and for QEMU's own methods, one after the
//! other; prints a Markdown table.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use farfault_integration::farfault;
use farfault_integration::lab::Lab;
use farfault_integration::native::{self, METHODS, Method};
use farfault_integration::process::wait_for;
use farfault_integration::qemu::{Guest, GuestSpec, Machine, Ram};
use farfault_integration::timeline::Interruption;
use farfault_wan::spec::{LinkSpec, QueueLimit};
use serde_json::{Value, json};

const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// The guest works undisturbed for so long before it is moved, to know what it does then.
const BEFORE: Duration = Duration::from_secs(3);
/// And so long after, to see it recover.
const AFTER: Duration = Duration::from_secs(2);

/// Moves a guest with each method over the same emulated link, and compares.
///
/// Downtime, recovery and stalls are seen from outside, by the guest's heartbeat. Recovery: from the
/// stop to the first half second in which the guest does 90 % of its work before. After each
/// migration the guest verifies all its memory twice. A megabyte is 10^6 bytes, of IP packets, in
/// both directions.
#[derive(Parser)]
struct Args {
    /// Rate, round trip and loss of the link
    #[arg(long, default_value = "100Mbit,40ms")]
    link: LinkSpec,
    /// What may wait at each end of the link
    #[arg(long, default_value = "bdp")]
    queue: QueueLimit,
    /// The guest's RAM
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    memory: u64,
    /// Memory that the guest fills and works on
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    working_set: u64,
    /// Pattern of that work: idle, sparse, counter, half, random, hotcold, readseq, readrand
    #[arg(long, default_value = "sparse")]
    work: String,
    /// Pages of that work a second
    #[arg(long, default_value_t = 2000)]
    rate: u64,
    /// First content of the working set: text, random, zero
    #[arg(long, default_value = "text")]
    fill: String,
    /// Pages that the guest verifies a second, besides its work
    #[arg(long, default_value_t = 500)]
    verify: u64,
    /// Downtime that pre-copy may end with, in milliseconds
    #[arg(long, default_value_t = 300, value_name = "MS")]
    downtime: u64,
    /// Methods, in this order: farfault-hybrid, farfault-precopy, farfault-postcopy,
    /// qemu-precopy, qemu-xbzrle, qemu-multifd-zstd, qemu-postcopy, qemu-postcopy-preempt [default: all]
    #[arg(long, value_delimiter = ',')]
    methods: Vec<Mover>,
    /// A migration that takes longer is given up
    #[arg(long, default_value_t = 150, value_name = "SECONDS")]
    limit: u64,
    /// Times that each method is run
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// One line of JSON per run, instead of a table
    #[arg(long)]
    json: bool,
}

/// What moves the guest.
#[derive(Clone, Copy, Debug)]
enum Mover {
    Farfault(&'static str),
    Qemu(Method),
}

const STRATEGIES: [&str; 3] = ["hybrid", "precopy", "postcopy"];

impl FromStr for Mover {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix("farfault-")
            && let Some(strategy) = STRATEGIES.iter().find(|strategy| **strategy == name)
        {
            return Ok(Mover::Farfault(strategy));
        }
        text.parse().map(Mover::Qemu)
    }
}

impl fmt::Display for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mover::Farfault(strategy) => write!(f, "farfault-{strategy}"),
            Mover::Qemu(method) => write!(f, "{method}"),
        }
    }
}

/// What was seen of one migration.
struct Row {
    total: Duration,
    seen: Interruption,
    link_bytes: u64,
    /// farfault's own report of the destination, which serves the faults.
    report: Option<Value>,
    errors: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let all = STRATEGIES.iter().map(|strategy| Mover::Farfault(strategy));
    let all = all.chain(METHODS.iter().map(|(method, _)| Mover::Qemu(*method)));
    let movers = if args.methods.is_empty() { all.collect() } else { args.methods.clone() };
    if !args.json {
        println!(
            "{} MiB guest, {} MiB {}-filled working set, {} {} pages/s; {}, queue {} bytes\n",
            args.memory,
            args.working_set,
            args.fill,
            args.work,
            args.rate,
            args.link,
            args.queue.bytes(args.link.rate, args.link.round_trip)
        );
        println!(
            "| method | total s | downtime ms | 90 % again after ms | longest stall after ms \
             | MB on the link | remote faults | fault p50 / p99 ms | corrupt pages |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
    }
    for mover in movers {
        for _ in 0..args.repeat {
            let row = run(&args, mover).with_context(|| mover.to_string())?;
            if args.json {
                println!("{}", as_json(&args, mover, row.as_ref()));
            } else {
                println!("{}", as_table_row(&args, mover, row.as_ref()));
            }
        }
    }
    Ok(())
}

fn run(args: &Args, mover: Mover) -> Result<Option<Row>> {
    let Some(mut lab) = Lab::with_queue(&args.link.to_string(), args.queue)? else {
        bail!("the laboratory cannot be set up here");
    };
    let work = format!(
        "ff.ws={}M ff.pattern={} ff.rate={} ff.fill={} ff.verify={}",
        args.working_set, args.work, args.rate, args.fill, args.verify
    );
    let mut spec = GuestSpec::new(Machine::Pc, args.memory, &work);
    if matches!(mover, Mover::Qemu(_)) {
        spec.ram = Ram::Private;
    }
    let mut source = Guest::prepare(&lab, "source", &spec)?;
    source.start(lab.a().name(), &[])?;
    wait_for("the guest to boot", BOOT_LIMIT, || Ok(source.log.last_beat()))?;
    std::thread::sleep(BEFORE);
    let mut destination = Guest::prepare(&lab, "destination", &spec)?;
    lab.wan.command("reset")?;
    let limit = Duration::from_secs(args.limit);
    let downtime = Duration::from_millis(args.downtime);
    let (started, total, report) = match mover {
        Mover::Qemu(method) => {
            let done = native::migrate(&lab, &source, &mut destination, method, downtime, limit)?;
            let Some(done) = done else { return Ok(None) };
            (done.started, done.took, None)
        }
        Mover::Farfault(strategy) => {
            let downtime = format!("{}ms", args.downtime);
            let options = ["--strategy", strategy, "--downtime", &downtime];
            let moved = farfault::migrate(&lab, &source, &destination, &[], &options, limit)?;
            (moved.started, moved.took, Some(moved.destination))
        }
    };
    let link_bytes = lab.wan.carried_bytes()?;
    std::thread::sleep(AFTER);
    let seen = Interruption::measure(&source.log.beats(), &destination.log.beats(), started)?;
    // From here on as fast as it can: the measurement is over.
    destination.ear.say(b'v')?;
    let verified = destination.log.wait_for_sweeps(2, Duration::from_secs(120));
    let errors = destination.log.last_beat().map_or(0, |beat| beat.errors);
    if errors == 0 {
        verified?;
    }
    Ok(Some(Row { total, seen, link_bytes, report, errors }))
}

fn milliseconds(time: Duration) -> u128 {
    time.as_millis()
}

fn as_table_row(args: &Args, mover: Mover, row: Option<&Row>) -> String {
    let Some(row) = row else {
        return format!("| {mover} | not in {} | – | – | – | – | – | – | – |", args.limit);
    };
    let recovered =
        row.seen.recovered_after.map_or("–".to_owned(), |t| milliseconds(t).to_string());
    let (faults, latency) =
        row.report.as_ref().map_or(("–".to_owned(), "–".to_owned()), |report| {
            let ms = |name: &str| {
                let us = report["fault_latency_us"][name].as_f64();
                us.map_or("–".to_owned(), |us| format!("{:.1}", us / 1000.0))
            };
            (report["remote_faults"].to_string(), format!("{} / {}", ms("p50"), ms("p99")))
        });
    format!(
        "| {mover} | {:.2} | {} | {recovered} | {} | {:.2} | {faults} | {latency} | {} |",
        row.total.as_secs_f64(),
        milliseconds(row.seen.downtime),
        milliseconds(row.seen.longest_stall_after),
        row.link_bytes as f64 / 1e6,
        row.errors
    )
}

fn as_json(args: &Args, mover: Mover, row: Option<&Row>) -> Value {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    json!({
        "method": mover.to_string(),
        "link": args.link.to_string(),
        "work": args.work,
        "rate_pages_per_s": args.rate,
        "complete": row.is_some(),
        "total_ms": row.map(|row| ms(row.total)),
        "downtime_ms": row.map(|row| ms(row.seen.downtime)),
        "recovered_after_ms": row.and_then(|row| row.seen.recovered_after).map(ms),
        "longest_stall_after_ms": row.map(|row| ms(row.seen.longest_stall_after)),
        "link_bytes": row.map(|row| row.link_bytes),
        "corrupt_pages": row.map(|row| row.errors),
        "report": row.and_then(|row| row.report.as_ref()),
    })
}
