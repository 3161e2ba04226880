//! Pictures of one figure after the other across links, or across guests of different sizes.

use anyhow::Result;
use plotters::prelude::*;

use super::chart::{
    Area, Axis, COLOURS, Figure, GREY, GRID, TOP, WIDTH, letters_in_the_middle, line, marker,
};
use super::panels::{LEGEND_LINE, PANEL, legend_entry, vertical};
use super::record::{Measured, Outcome};
use super::scenario::{GuestPart, Scenario};
use super::table::{CellRuns, Spread};

/// A panel: what its axis says, and which figure it shows.
type Panel = (&'static str, fn(&Measured) -> Option<f64>);

const ACROSS_LINKS: &[Panel] = &[
    ("downtime, ms", |seen| Some(seen.downtime_ms.max(1.0))),
    ("total time, s", |seen| Some(seen.total_ms / 1e3)),
];
const ACROSS_GUESTS: &[Panel] = &[
    ("total time, s", |seen| Some(seen.total_ms / 1e3)),
    ("downtime, ms", |seen| Some(seen.downtime_ms.max(1.0))),
    ("CPU of both sides, s", |seen| Some(seen.source_cpu_s? + seen.destination_cpu_s?)),
    ("extra memory at the source, MB", |seen| {
        Some(seen.source_extra_bytes?.max(1 << 20) as f64 / 1e6)
    }),
];
const PANELS_IN_A_ROW: usize = 2;
/// A panel with what stands over it and under it.
const ROW: i32 = PANEL + 70;

/// Panels, in each of which every method has a place at every link, or with every guest.
pub(super) struct AcrossFigure<'a> {
    pub(super) title: String,
    panels: &'static [Panel],
    /// Names of the links, or of the guests.
    places: Vec<&'a str>,
    methods: Vec<&'a str>,
    cells: Vec<&'a CellRuns<'a>>,
    place_of: fn(&CellRuns<'a>) -> &'a str,
}

impl<'a> AcrossFigure<'a> {
    /// Of a guest across links. `None` when it was moved over one link only.
    pub(super) fn of_links(
        scenario: &'a Scenario,
        guest: &str,
        cells: &'a [CellRuns<'a>],
    ) -> Option<Self> {
        let links = scenario.link.iter().map(|part| part.name.as_str());
        let cells = cells.iter().filter(|cell| cell.guest == guest).collect();
        let title = format!("Downtime and total time: guest {guest}");
        Self::new(title, ACROSS_LINKS, scenario, links.collect(), cells, |cell| cell.link)
    }

    /// Of those guests over a link that differ from the first in nothing but their size.
    pub(super) fn of_sizes(
        scenario: &'a Scenario,
        link: &str,
        cells: &'a [CellRuns<'a>],
    ) -> Option<Self> {
        let sizeless = |guest: &GuestPart| GuestPart {
            name: String::new(),
            memory: String::new(),
            working_set: None,
            ..guest.clone()
        };
        let first = sizeless(scenario.guest.first()?);
        let alike = scenario.guest.iter().filter(|guest| sizeless(guest) == first);
        let guests: Vec<&str> = alike.map(|part| part.name.as_str()).collect();
        let wanted = |cell: &&CellRuns<'_>| cell.link == link && guests.contains(&cell.guest);
        let cells = cells.iter().filter(wanted).collect();
        let title = format!("How the size of the guest tells: link {link}");
        Self::new(title, ACROSS_GUESTS, scenario, guests, cells, |cell| cell.guest)
    }

    fn new(
        title: String,
        panels: &'static [Panel],
        scenario: &'a Scenario,
        mut places: Vec<&'a str>,
        cells: Vec<&'a CellRuns<'a>>,
        place_of: fn(&CellRuns<'a>) -> &'a str,
    ) -> Option<Self> {
        places.retain(|name| cells.iter().any(|cell| place_of(cell) == *name));
        let methods = scenario.method.iter().map(|part| part.name.as_str());
        let has_moved = |name: &&str| {
            cells.iter().any(|cell| cell.method == *name && cell.count(Outcome::Moved) > 0)
        };
        let methods = methods.filter(has_moved).collect();
        (places.len() > 1).then_some(AcrossFigure {
            title,
            panels,
            places,
            methods,
            cells,
            place_of,
        })
    }

    fn values(&self, value: fn(&Measured) -> Option<f64>) -> Vec<(usize, usize, Spread)> {
        let of_cell = |cell: &&CellRuns<'a>| {
            let spread = cell.spread(value)?;
            let place = self.places.iter().position(|name| *name == (self.place_of)(cell))?;
            let method = self.methods.iter().position(|name| *name == cell.method)?;
            Some((place, method, spread))
        };
        self.cells.iter().filter_map(of_cell).collect()
    }
}

impl Figure for AcrossFigure<'_> {
    fn size(&self) -> (u32, u32) {
        let rows = self.panels.len().div_ceil(PANELS_IN_A_ROW) as i32;
        let legend = LEGEND_LINE * self.methods.len() as i32;
        (WIDTH as u32, (TOP + (rows * ROW).max(legend) + 4) as u32)
    }

    fn heading(&self) -> (String, String) {
        let explanation = "Medians, with lines from the least to the most. A method that is missing at a place \
             did not come to its end there.";
        (self.title.clone(), explanation.to_owned())
    }

    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        for (panel, (name, value)) in self.panels.iter().enumerate() {
            let column = (panel % PANELS_IN_A_ROW) as i32;
            let row_top = TOP + ROW * (panel / PANELS_IN_A_ROW) as i32;
            let (left, right) = (70 + 360 * column, 360 + 360 * column);
            let (top, foot) = (row_top + 24, row_top + 24 + PANEL);
            let values = self.values(*value);
            let ends = values.iter().flat_map(|(_, _, spread)| [spread.least, spread.most]);
            let axis = Axis::logarithmic(ends, (foot, top));
            let title = letters_in_the_middle(16);
            area.draw(&Text::new(*name, ((left + right) / 2, row_top + 6), title))?;
            vertical(area, &axis, (left, right))?;
            let width = (right - left) / self.places.len() as i32;
            for (index, name) in self.places.iter().enumerate() {
                let x = left + width * index as i32;
                let middle = (x + width / 2, foot + 18);
                area.draw(&Text::new((*name).to_owned(), middle, letters_in_the_middle(14)))?;
                line(area, &[(x, top), (x, foot)], GRID, 1)?;
            }
            line(area, &[(left, foot), (right, foot)], GREY, 1)?;
            for (place, method, spread) in values {
                let step = (width - 20) / self.methods.len() as i32;
                let x = left + width * place as i32 + 10 + step / 2 + step * method as i32;
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
