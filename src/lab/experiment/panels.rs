//! Pictures with values on a vertical axis; and the latency of faults as one.

use anyhow::Result;
use plotters::prelude::*;

use super::chart::{
    Area, Axis, COLOURS, Figure, GREY, GRID, TOP, WIDTH, letters, letters_in_the_middle,
    letters_to_the_left, line, marker, short,
};
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
pub(super) const PANEL: i32 = 320;
pub(super) const LEGEND_LINE: i32 = 24;

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
pub(super) fn vertical<B: DrawingBackend>(
    area: &Area<B>,
    axis: &Axis,
    (left, right): (i32, i32),
) -> Result<()>
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

pub(super) fn legend_entry<B: DrawingBackend>(
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
