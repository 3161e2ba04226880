//! A few lines of a terminal that are drawn over and over. Only the cursor is hidden meanwhile, and
//! shown again however the screen ends, so the terminal is left as it was found.

use console::Term;

use super::MapShape;
use super::picture::OTHER_LINES;

/// Of standard error. What was drawn last stays.
#[derive(Debug)]
pub struct Screen {
    term: Term,
    drawn_lines: usize,
}

impl Screen {
    /// `None` when standard error is no terminal, or one that cannot move its cursor.
    pub fn open() -> Option<Screen> {
        let term = Term::stderr();
        if !term.features().is_attended() || !term.is_term() {
            return None;
        }
        if std::env::var_os("TERM").is_none_or(|name| name == "dumb") {
            return None;
        }
        let _ = term.hide_cursor();
        Some(Screen { term, drawn_lines: 0 })
    }

    /// Columns that may be drawn.
    pub fn width(&self) -> usize {
        usize::from(self.term.size().1)
    }

    /// The map of memory that fits with the rest of the picture; without rows on a tiny terminal.
    pub fn map_shape(&self) -> MapShape {
        let (height, width) = self.term.size();
        let columns = usize::from(width).saturating_sub(2).clamp(1, 76);
        // One line more: the cursor stands below the picture.
        let rows = usize::from(height).saturating_sub(OTHER_LINES + 1).min(8);
        MapShape { columns, rows }
    }

    /// Draws over what was drawn before.
    pub fn draw(&mut self, lines: &[String]) {
        // In one piece, so that no half picture is seen.
        let mut text = self.erase();
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
        self.drawn_lines = lines.len();
        let _ = self.term.write_str(&text);
    }

    /// Puts a line above the picture, which is gone until it is drawn again.
    pub fn note(&mut self, line: &str) {
        let text = format!("{}{line}\n", self.erase());
        self.drawn_lines = 0;
        let _ = self.term.write_str(&text);
    }

    /// What is drawn next comes below what is there.
    pub fn keep(&mut self) {
        self.drawn_lines = 0;
    }

    /// Back to the begin of the picture, and nothing below.
    fn erase(&self) -> String {
        match self.drawn_lines {
            0 => String::new(),
            lines => format!("\x1b[{lines}A\r\x1b[J"),
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.term.show_cursor();
    }
}
