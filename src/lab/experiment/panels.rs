//! Pictures with values on a vertical axis: fault latency, and downtime and total time across links.

use anyhow::Result;
use plotters::prelude::*;

use super::chart::{
    Area, Axis, COLOURS, Figure, GREY, GRID, TOP, WIDTH, letters, letters_in_the_middle,
    letters_to_the_left, line, marker, short,
};
use super::record::Outcome;
use super::scenario::Scenario;
use super::table::{CellRuns, Spread};

/// Quantiles of the latency of remote faults.
pub(super) struct FaultsFigure<'a> {
    pub(super) title: String,
    round_trip_ms: f64,
    pub(super) methods: Vec<(&'a str, [f64; 4])>,
}

const QUANTILES: [&str; 4] = ["p50", "p90", "p99", "max"];

impl<'a> FaultsFigure<'a> {
    pub(super) fn new(
        place: &str,
        round_trip_s: f64,
        cells: impl Iterator<Item = &'a CellRuns<'a>>,
    ) -> Self {
        let quantile = |cell: &CellRuns<'_>, name: &str| {
            cell.told(|report| {
                let is_any = report["remote_faults"].as_u64()? > 0;
                report["fault_latency_us"][name].as_f64().filter(|_| is_any)
            })
        };
        let methods = cells.filter_map(|cell| {
            let of = |name| quantile(cell, name).map(|spread: Spread| spread.median / 1e3);
            let [p50, p90, p99, max] = QUANTILES.map(of);
            Some((cell.method, [p50?, p90?, p99?, max?]))
        });
        FaultsFigure {
            title: format!("Latency of remote faults: {place}"),
            round_trip_ms: round_trip_s * 1e3,
            methods: methods.collect(),
        }
    }
}

/// Height of a panel with a vertical axis.
const PANEL: i32 = 320;
const LEGEND_LINE: i32 = 24;

impl Figure for FaultsFigure<'_> {
    fn size(&self) -> (u32, u32) {
        (WIDTH as u32, (TOP + PANEL + 50) as u32)
    }

    fn heading(&self) -> (String, String) {
        let explanation = "From the guest's fault to its page in place, in milliseconds; medians of the runs. \
             QEMU does not tell.";
        (self.title.clone(), explanation.to_owned())
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let (left, right, foot) = (90, WIDTH - 290, TOP + PANEL);
        let all = self.methods.iter().flat_map(|(_, values)| *values);
        let axis = Axis::logarithmic(all.chain([self.round_trip_ms]), (foot, TOP));
        vertical(area, &axis, (left, right))?;
        let x = |quantile: usize| left + (right - left) * (2 * quantile as i32 + 1) / 8;
        for (index, name) in QUANTILES.iter().enumerate() {
            area.draw(&Text::new(*name, (x(index), foot + 18), letters_in_the_middle(15)))?;
        }
        let y = axis.at(self.round_trip_ms);
        for dash in (left..right).step_by(12) {
            line(area, &[(dash, y), ((dash + 6).min(right), y)], GREY, 2)?;
        }
        let round_trip = format!("round trip of the link: {} ms", short(self.round_trip_ms));
        area.draw(&Text::new(round_trip, (left + 8, y - 20), letters(14)))?;
        for (index, (method, values)) in self.methods.iter().enumerate() {
            let points: Vec<(i32, i32)> =
                values.iter().enumerate().map(|(i, value)| (x(i), axis.at(*value))).collect();
            line(area, &points, COLOURS[index % COLOURS.len()], 2)?;
            for point in points {
                marker(area, index, point)?;
            }
            legend_entry(area, index, method, right + 30)?;
        }
        Ok(())
    }
}

/// The axis on the left, with its lines through the picture.
fn vertical<B: DrawingBackend>(area: &Area<B>, axis: &Axis, (left, right): (i32, i32)) -> Result<()>
where
    B::ErrorType: 'static,
{
    for tick in axis.ticks() {
        let y = axis.at(tick);
        line(area, &[(left, y), (right, y)], GRID, 1)?;
        area.draw(&Text::new(short(tick), (left - 10, y), letters_to_the_left(14)))?;
    }
    Ok(())
}

fn legend_entry<B: DrawingBackend>(
    area: &Area<B>,
    index: usize,
    name: &str,
    left: i32,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    let y = TOP + 14 + LEGEND_LINE * index as i32;
    marker(area, index, (left, y))?;
    area.draw(&Text::new(name.to_owned(), (left + 16, y - 9), letters(15)))?;
    Ok(())
}

/// Downtime and total time across links.
pub(super) struct LinksFigure<'a> {
    pub(super) title: String,
    pub(super) links: Vec<&'a str>,
    methods: Vec<&'a str>,
    cells: Vec<&'a CellRuns<'a>>,
}

impl<'a> LinksFigure<'a> {
    pub(super) fn new(scenario: &'a Scenario, guest: &str, cells: &[&'a CellRuns<'a>]) -> Self {
        let is_there = |name: &str| cells.iter().any(|cell| cell.link == name);
        let links = scenario.link.iter().map(|part| part.name.as_str());
        let methods = scenario.method.iter().map(|part| part.name.as_str());
        let has_moved = |name: &str| {
            cells.iter().any(|cell| cell.method == name && cell.count(Outcome::Moved) > 0)
        };
        LinksFigure {
            title: format!("Downtime and total time: guest {guest}"),
            links: links.filter(|name| is_there(name)).collect(),
            methods: methods.filter(|name| has_moved(name)).collect(),
            cells: cells.to_vec(),
        }
    }

    fn values(&self, seconds: bool) -> impl Iterator<Item = (usize, usize, Spread)> {
        self.cells.iter().filter_map(move |cell| {
            let spread = cell.spread(|seen| {
                Some(if seconds { seen.total_ms / 1e3 } else { seen.downtime_ms.max(1.0) })
            })?;
            let link = self.links.iter().position(|name| *name == cell.link)?;
            let method = self.methods.iter().position(|name| *name == cell.method)?;
            Some((link, method, spread))
        })
    }
}

impl Figure for LinksFigure<'_> {
    fn size(&self) -> (u32, u32) {
        let legend = LEGEND_LINE * self.methods.len() as i32;
        (WIDTH as u32, (TOP + 24 + PANEL.max(legend) + 50) as u32)
    }

    fn heading(&self) -> (String, String) {
        let explanation = "Medians, with lines from the least to the most. A method that is missing at a link \
             did not come to its end there.";
        (self.title.clone(), explanation.to_owned())
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let (top, foot) = (TOP + 24, TOP + 24 + PANEL);
        for (panel, name) in ["downtime, ms", "total time, s"].into_iter().enumerate() {
            let (left, right) = (70 + 360 * panel as i32, 360 + 360 * panel as i32);
            let values: Vec<(usize, usize, Spread)> = self.values(panel == 1).collect();
            let ends = values.iter().flat_map(|(_, _, spread)| [spread.least, spread.most]);
            let axis = Axis::logarithmic(ends, (foot, top));
            let title = letters_in_the_middle(16);
            area.draw(&Text::new(name, ((left + right) / 2, TOP + 6), title))?;
            vertical(area, &axis, (left, right))?;
            let width = (right - left) / self.links.len() as i32;
            for (index, name) in self.links.iter().enumerate() {
                let x = left + width * index as i32;
                let middle = (x + width / 2, foot + 18);
                area.draw(&Text::new((*name).to_owned(), middle, letters_in_the_middle(14)))?;
                line(area, &[(x, top), (x, foot)], GRID, 1)?;
            }
            line(area, &[(left, foot), (right, foot)], GREY, 1)?;
            for (link, method, spread) in values {
                let step = (width - 20) / self.methods.len() as i32;
                let x = left + width * link as i32 + 10 + step / 2 + step * method as i32;
                let colour = COLOURS[method % COLOURS.len()];
                line(area, &[(x, axis.at(spread.least)), (x, axis.at(spread.most))], colour, 2)?;
                marker(area, method, (x, axis.at(spread.median)))?;
            }
        }
        for (index, method) in self.methods.iter().enumerate() {
            legend_entry(area, index, method, 770)?;
        }
        Ok(())
    }
}
