//! The pictures of an experiment, as SVG and PNG.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::across::AcrossFigure;
use super::chart::{
    Area, Axis, COLOURS, Figure, GREY, GRID, TOP, WIDTH, letters, letters_in_the_middle,
    letters_to_the_left, line, save, short, time,
};
use super::frames::FramesFigure;
use super::memory::MemoryFigure;
use super::panels::FaultsFigure;
use super::record::Outcome;
use super::scenario::Scenario;
use super::table::{BytesByKind, CellRuns};

/// Where the data begin; in front are names.
pub(super) const LEFT: i32 = 210;
pub(super) const RIGHT: i32 = WIDTH - 30;

/// What an axis of time says.
pub(super) const SINCE_THE_STOP: &str = "seconds since the guest's last sign on the source";

/// A picture that was drawn.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    /// `None`: of all guests.
    pub(super) guest: Option<String>,
    /// `None`: of all links.
    pub(super) link: Option<String>,
    pub(super) caption: String,
    /// Without its ending.
    pub(super) file: String,
}

/// Draws all pictures that there is something to draw for.
pub(super) fn draw_all(
    scenario: &Scenario,
    cells: &[CellRuns<'_>],
    directory: &Path,
) -> Result<Vec<Plot>> {
    std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let mut plots = Vec::new();
    let mut add = |guest: Option<&str>, link: Option<&str>, kind: &str, caption: String| {
        let parts: Vec<&str> = guest.into_iter().chain(link).chain([kind]).collect();
        let file = parts.join("-");
        let (guest, link) = (guest.map(str::to_owned), link.map(str::to_owned));
        plots.push(Plot { guest, link, caption, file: file.clone() });
        file
    };
    for guest in &scenario.guest {
        for link in &scenario.link {
            let here = |cell: &&CellRuns<'_>| cell.guest == guest.name && cell.link == link.name;
            let cells: Vec<&CellRuns<'_>> = cells.iter().filter(here).collect();
            let moved = || cells.iter().copied().filter(|cell| cell.count(Outcome::Moved) > 0);
            if moved().next().is_none() {
                continue;
            }
            let place = format!("guest {}, link {} ({})", guest.name, link.name, link.link);
            let throughput = ThroughputFigure::new(&place, moved().collect());
            let file =
                add(Some(&guest.name), Some(&link.name), "throughput", throughput.title.clone());
            save(&throughput, directory, &file)?;
            if let Some(frames) = FramesFigure::new(&place, moved()) {
                let file = add(Some(&guest.name), Some(&link.name), "frames", frames.title.clone());
                save(&frames, directory, &file)?;
            }
            let bytes = BytesFigure { title: format!("Bytes on the link: {place}"), cells: &cells };
            let file = add(Some(&guest.name), Some(&link.name), "bytes", bytes.title.clone());
            save(&bytes, directory, &file)?;
            // Latency is drawn beside the round trip, which only an emulated link has.
            if let Some(spec) = link.spec()? {
                let faults = FaultsFigure::new(&place, spec.round_trip.as_secs_f64(), moved());
                if !faults.methods.is_empty() {
                    let file =
                        add(Some(&guest.name), Some(&link.name), "faults", faults.title.clone());
                    save(&faults, directory, &file)?;
                }
            }
            for cell in moved() {
                let Some((record, seen)) = cell.typical() else { continue };
                let Some(film) = &seen.memory else { continue };
                let memory = MemoryFigure {
                    title: format!("Memory at the destination: {}, {place}", cell.method),
                    film,
                    memory_bytes: record.guest.memory_bytes()?,
                    downtime_ms: seen.downtime_ms,
                };
                let kind = format!("memory-{}", cell.method);
                let file = add(Some(&guest.name), Some(&link.name), &kind, memory.title.clone());
                save(&memory, directory, &file)?;
            }
        }
        if let Some(figure) = AcrossFigure::of_links(scenario, &guest.name, cells) {
            let file = add(Some(&guest.name), None, "links", figure.title.clone());
            save(&figure, directory, &file)?;
        }
    }
    for link in &scenario.link {
        if let Some(figure) = AcrossFigure::of_sizes(scenario, &link.name, cells) {
            let file = add(None, Some(&link.name), "sizes", figure.title.clone());
            save(&figure, directory, &file)?;
        }
    }
    Ok(plots)
}

/// The axis at the foot, with its lines through the picture.
pub(super) fn horizontal<B: DrawingBackend>(
    area: &Area<B>,
    axis: &Axis,
    (top, foot): (i32, i32),
    name: &str,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    for tick in axis.ticks() {
        let x = axis.at(tick);
        line(area, &[(x, top), (x, foot)], GRID, 1)?;
        area.draw(&Text::new(short(tick), (x, foot + 14), letters_in_the_middle(14)))?;
    }
    let middle = (LEFT + RIGHT) / 2;
    area.draw(&Text::new(name.to_owned(), (middle, foot + 36), letters_in_the_middle(15)))?;
    Ok(())
}

/// What the guest did around the switchover, a strip for each method.
struct ThroughputFigure<'a> {
    title: String,
    cells: Vec<&'a CellRuns<'a>>,
    /// Seconds, the stop being 0.
    span: (f64, f64),
    most_per_s: f64,
}

/// Before the stop.
const SPAN_BEFORE_S: f64 = 5.0;
/// Behind the last recovery, and at most in all.
const SPAN_AFTER_S: f64 = 2.0;
const SPAN_MOST_S: f64 = 40.0;
const STRIP: i32 = 74;

impl<'a> ThroughputFigure<'a> {
    fn new(place: &str, cells: Vec<&'a CellRuns<'a>>) -> Self {
        let typical = || cells.iter().filter_map(|cell| cell.typical());
        let last_ms = typical()
            .map(|(_, seen)| seen.recovered_after_ms.unwrap_or(seen.downtime_ms))
            .fold(0.0, f64::max);
        let mut rates: Vec<f64> =
            typical().flat_map(|(_, seen)| seen.throughput.operations_per_s.clone()).collect();
        rates.sort_by(f64::total_cmp);
        // A few bins may have caught up with what a stall has delayed.
        let high = rates.get(rates.len() * 98 / 100).copied().unwrap_or(1.0);
        ThroughputFigure {
            title: format!("Work around the switchover: {place}"),
            cells,
            span: (-SPAN_BEFORE_S, (last_ms / 1e3 + SPAN_AFTER_S).min(SPAN_MOST_S)),
            most_per_s: round_up(high.max(1.0) * 1.1),
        }
    }
}

/// To two digits.
fn round_up(value: f64) -> f64 {
    let ten = 10f64.powf(value.log10().floor() - 1.0);
    (value / ten).ceil() * ten
}

impl Figure for ThroughputFigure<'_> {
    fn size(&self) -> (u32, u32) {
        (WIDTH as u32, (TOP + STRIP * self.cells.len() as i32 + 60) as u32)
    }

    fn heading(&self) -> (String, String) {
        let explanation = format!(
            "Operations a second; each strip is 0 to {}. The run with the median downtime.",
            short(self.most_per_s)
        );
        (self.title.clone(), explanation)
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let foot = TOP + STRIP * self.cells.len() as i32;
        let x_axis = Axis::linear(self.span.0, self.span.1, (LEFT, RIGHT));
        horizontal(area, &x_axis, (TOP, foot), SINCE_THE_STOP)?;
        for (index, cell) in self.cells.iter().enumerate() {
            let Some((_, seen)) = cell.typical() else { continue };
            let top = TOP + STRIP * index as i32;
            let (floor, colour) = (top + STRIP - 8, COLOURS[index % COLOURS.len()]);
            let y_axis = Axis::linear(0.0, self.most_per_s, (floor, top + 4));
            area.draw(&Text::new(
                cell.method.to_owned(),
                (LEFT - 12, top + 26),
                letters_to_the_left(16),
            ))?;
            let recovered = match seen.recovered_after_ms {
                Some(ms) => format!("down {}, 90 % after {}", time(seen.downtime_ms), time(ms)),
                None => format!("down {}", time(seen.downtime_ms)),
            };
            area.draw(&Text::new(recovered, (LEFT - 12, top + 46), letters_to_the_left(13)))?;
            let throughput = &seen.throughput;
            let second = |bin: usize| {
                (throughput.first_ms as f64 + bin as f64 * throughput.bin_ms as f64) / 1e3
            };
            let mut outline = Vec::new();
            for (bin, rate) in throughput.operations_per_s.iter().enumerate() {
                let (from, to) = (second(bin).max(self.span.0), second(bin + 1).min(self.span.1));
                if from < to {
                    let y = y_axis.at(rate.min(self.most_per_s));
                    outline.extend([(x_axis.at(from), y), (x_axis.at(to), y)]);
                }
            }
            if let (Some(first), Some(last)) = (outline.first(), outline.last()) {
                let corners = [(last.0, floor), (first.0, floor)];
                let shape: Vec<(i32, i32)> = outline.iter().copied().chain(corners).collect();
                area.draw(&Polygon::new(shape, colour.mix(0.25).filled()))?;
                line(area, &outline, colour, 2)?;
            }
            line(area, &[(LEFT, floor), (RIGHT, floor)], GREY, 1)?;
        }
        let stop = x_axis.at(0.0);
        line(area, &[(stop, TOP), (stop, foot)], GREY, 2)
    }
}

/// What crossed the link, by kind, a bar for each method.
struct BytesFigure<'a> {
    title: String,
    cells: &'a [&'a CellRuns<'a>],
}

const BAR: i32 = 40;
const KINDS: [(&str, RGBColor); 4] = [
    ("whole pages", COLOURS[0]),
    ("deltas", COLOURS[1]),
    ("everything else", GREY),
    ("back to the source", COLOURS[5]),
];

impl Figure for BytesFigure<'_> {
    fn size(&self) -> (u32, u32) {
        (WIDTH as u32, (TOP + 30 + BAR * self.cells.len() as i32 + 60) as u32)
    }

    fn heading(&self) -> (String, String) {
        let explanation = "Mean of the runs; all IP packets. Which of them were pages is each method's own \
             count.";
        (self.title.clone(), explanation.to_owned())
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let mean = |cell: &CellRuns<'_>| {
            let all: Vec<[f64; 4]> = cell
                .moved()
                .map(|(record, seen)| BytesByKind::of(record, seen).parts().map(|n| n / 1e6))
                .collect();
            let count = all.len().max(1) as f64;
            std::array::from_fn(|kind| all.iter().map(|parts| parts[kind]).sum::<f64>() / count)
        };
        let means: Vec<[f64; 4]> = self.cells.iter().map(|cell| mean(cell)).collect();
        let most = means.iter().map(|parts| parts.iter().sum::<f64>()).fold(0.0, f64::max);
        let top = TOP + 30;
        let foot = top + BAR * self.cells.len() as i32;
        // Room for the number behind the longest bar.
        let axis = Axis::linear(0.0, most, (LEFT, RIGHT - 70));
        horizontal(area, &axis, (top, foot), "MB (10⁶ bytes)")?;
        for (index, (name, colour)) in KINDS.iter().enumerate() {
            let x = LEFT + 185 * index as i32;
            area.draw(&Rectangle::new([(x, TOP), (x + 16, TOP + 16)], colour.filled()))?;
            area.draw(&Text::new(*name, (x + 24, TOP + 1), letters(15)))?;
        }
        for ((index, cell), parts) in self.cells.iter().enumerate().zip(&means) {
            let y = top + BAR * index as i32;
            let middle = y + BAR / 2;
            area.draw(&Text::new(
                cell.method.to_owned(),
                (LEFT - 12, middle),
                letters_to_the_left(16),
            ))?;
            let mut done = 0.0;
            for (part, (_, colour)) in parts.iter().zip(KINDS) {
                let corners = [(axis.at(done), y + 6), (axis.at(done + part), y + BAR - 6)];
                if corners[0].0 < corners[1].0 {
                    area.draw(&Rectangle::new(corners, colour.filled()))?;
                }
                done += part;
            }
            let text = match cell.count(Outcome::Moved) {
                0 => "did not come to its end".to_owned(),
                _ => format!("{done:.1}"),
            };
            area.draw(&Text::new(text, (axis.at(done) + 8, middle - 8), letters(15)))?;
        }
        Ok(())
    }
}
