//! A [`Live`] drawn as lines for a terminal.

use std::time::Duration;

use console::{Style, truncate_str};

use super::{Live, MapShape, Step};
use crate::page::PAGE_SIZE_BYTES;
use crate::units::{format_bytes, format_rate};

/// Lines beside those of the map.
pub(super) const OTHER_LINES: usize = 9;

const STOP_MARK: char = '│';
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// In front of a sparkline: what it is and its rate now.
const LABEL_COLUMNS: usize = 24;

/// How a stage of a page is shown: its letter in the map, its sign, its colour, its name.
fn stages() -> [(char, char, Style, &'static str); 5] {
    let style = Style::new().for_stderr();
    [
        ('m', '█', style.clone().green(), "mapped"),
        ('c', '▓', style.clone().cyan(), "current"),
        ('z', '▫', style.clone().green(), "zero"),
        ('s', '▒', style.clone().yellow(), "stale"),
        ('a', '·', style.dim(), "absent"),
    ]
}

/// The lines, none wider than `width`. The memory map has the shape `map`; until one of that shape was
/// told, nothing is known of the memory.
pub fn draw(live: &Live, now: Duration, map: MapShape, width: usize) -> Vec<String> {
    let mut lines = vec![format!(" {}", bold(&live.title)), String::new()];
    lines.push(format!(" {}  {:.1} s", steps(live.step), now.as_secs_f64()));
    lines.push(String::new());
    lines.extend(memory(live, map));
    lines.push(legend(live));
    lines.push(String::new());
    let columns = map.columns.saturating_sub(LABEL_COLUMNS).max(10);
    lines.push(guest(live, now, columns));
    lines.push(link(live, now, columns));
    lines.push(format!(
        " {} left, {} on the wire, {} remote faults",
        format_bytes(live.remaining_pages() * PAGE_SIZE_BYTES as u64),
        format_bytes(live.link.last()),
        live.remote_faults,
    ));
    lines.iter().map(|line| truncate_str(line, width, "").into_owned()).collect()
}

fn style() -> Style {
    Style::new().for_stderr()
}

fn bold(text: &str) -> String {
    style().bold().apply_to(text).to_string()
}

fn steps(now: Step) -> String {
    let step = |step: Step| match step.cmp(&now) {
        std::cmp::Ordering::Less => style().green().apply_to(step.name()),
        std::cmp::Ordering::Equal => style().bold().reverse().apply_to(step.name()),
        std::cmp::Ordering::Greater => style().dim().apply_to(step.name()),
    };
    Step::ALL.map(|each| step(each).to_string()).join(" ─ ")
}

fn memory(live: &Live, map: MapShape) -> Vec<String> {
    let stages = stages();
    let told = Some(live.memory.cells.chars().collect::<Vec<_>>());
    let cells = told.filter(|cells| cells.len() == map.cells());
    let cells = cells.unwrap_or_else(|| vec!['a'; map.cells()]);
    let draw_row = move |row: &[char]| {
        // One escape sequence for each run of equal cells: the picture is drawn ten times a second.
        let runs = row.chunk_by(|a, b| a == b).map(|run| {
            let shown = stages.iter().find(|stage| stage.0 == run[0]).unwrap_or(&stages[4]);
            shown.2.apply_to(shown.1.to_string().repeat(run.len())).to_string()
        });
        format!(" {}", runs.collect::<String>())
    };
    cells.chunks(map.columns.max(1)).map(draw_row).collect()
}

fn legend(live: &Live) -> String {
    let memory = &live.memory;
    let counts = [memory.mapped, memory.current, memory.zero, memory.stale, memory.absent];
    let entries = stages().into_iter().zip(counts).map(|((_, sign, style, name), pages)| {
        let percent = 100.0 * pages as f64 / memory.pages().max(1) as f64;
        format!("{} {name} {percent:.0} %", style.apply_to(sign))
    });
    format!(" destination:  {}", entries.collect::<Vec<_>>().join("   "))
}

/// The guest's own throughput, in the colour of the host that it runs on. The moment at which it was
/// stopped is marked, since a good pause is shorter than a column.
fn guest(live: &Live, now: Duration, columns: usize) -> String {
    let rates = live.guest.rates(columns, now);
    let most = rates.iter().copied().fold(1.0, f64::max);
    let column_of = |time: Duration| {
        (time.as_secs_f64() / now.as_secs_f64().max(1e-3) * columns as f64) as usize
    };
    let (stopped, ran_again) = (live.stopped.map(column_of), live.ran_again.map(column_of));
    let bars = rates.iter().enumerate().map(|(column, rate)| {
        let bar = if stopped == Some(column) { STOP_MARK } else { level(*rate, most) };
        let colour = match (stopped, ran_again) {
            (Some(from), _) if column < from => style().cyan(),
            (Some(_), Some(to)) if column > to => style().green(),
            (Some(_), _) => style().red().bold(),
            (None, _) => style().cyan(),
        };
        colour.apply_to(bar).to_string()
    });
    let label = format!("guest {:>8.0} ops/s", live.guest_rate());
    let place = match (live.stopped, live.ran_again) {
        (None, _) => style().cyan().apply_to("at the source"),
        (Some(_), None) => style().red().bold().apply_to("stopped"),
        (Some(_), Some(_)) => style().green().apply_to("at the destination"),
    };
    format!(" {label:<LABEL_COLUMNS$}{} {place}", bars.collect::<String>())
}

fn link(live: &Live, now: Duration, columns: usize) -> String {
    let rates = live.link.rates(columns, now);
    let most = live.link_bytes_per_s as f64;
    let bars: String = rates.iter().map(|rate| level(*rate, most)).collect();
    let label = format!("link  {:>14}", format_rate(live.link_rate()));
    format!(" {label:<LABEL_COLUMNS$}{} of {}", style().blue().apply_to(bars), format_rate(most))
}

/// A bar for `rate`; nothing at all shows as a gap.
fn level(rate: f64, most: f64) -> char {
    let share = rate / most.max(1.0);
    if share < 0.01 {
        return ' ';
    }
    LEVELS[((share * LEVELS.len() as f64) as usize).min(LEVELS.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::MemoryMap;

    const MAP: MapShape = MapShape { columns: 40, rows: 2 };

    fn plain(live: &Live, now: Duration, width: usize) -> Vec<String> {
        let lines = draw(live, now, MAP, width);
        lines.iter().map(|line| console::strip_ansi_codes(line).into_owned()).collect()
    }

    fn live() -> Live {
        let mut live = Live::new("a guest".to_owned(), 1000);
        for second in 0..=8 {
            let ops = if second < 5 { second * 100 } else { (second - 1) * 100 };
            live.guest.add(Duration::from_secs(second), ops);
        }
        (live.stopped, live.ran_again) =
            (Some(Duration::from_secs(4)), Some(Duration::from_secs(5)));
        let cells = "m".repeat(40) + &"s".repeat(40);
        live.memory = MemoryMap { mapped: 3, stale: 1, cells, ..MemoryMap::default() };
        live
    }

    #[test]
    fn the_map_and_the_pause_can_be_seen() {
        let lines = plain(&live(), Duration::from_secs(8), 100);
        assert_eq!(lines.len(), OTHER_LINES + MAP.rows);
        assert!(lines.iter().any(|line| line.trim() == "█".repeat(40)));
        assert!(lines.iter().any(|line| line.trim() == "▒".repeat(40)));
        assert!(lines.iter().any(|line| line.contains("mapped 75 %")));
        let guest = lines.iter().find(|line| line.contains("ops/s")).unwrap();
        assert!(guest.contains("100 ops/s    ████████│ ██████ at the destination"), "{guest:?}");
    }

    #[test]
    fn the_picture_keeps_its_height_from_the_first_moment_on() {
        let nothing = plain(&Live::new("a guest".to_owned(), 1000), Duration::ZERO, 100);
        assert_eq!(nothing.len(), OTHER_LINES + MAP.rows);
        assert!(nothing.iter().any(|line| line.trim() == "·".repeat(40)));
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in [1, 20, 79] {
            for line in plain(&live(), Duration::from_secs(8), width) {
                assert!(console::measure_text_width(&line) <= width, "{line:?}");
            }
        }
    }
}
