//! Tests that cannot be made everywhere.

use anyhow::{Result, bail};

/// Says loudly that a test is skipped, and why.
///
/// # Errors
/// With `FARFAULT_REQUIRE_LAB=1`: then what a test needs must be there.
pub fn skipped(why: &str) -> Result<()> {
    told(why, std::env::var_os("FARFAULT_REQUIRE_LAB").is_some_and(|value| value == "1"))
}

fn told(why: &str, is_required: bool) -> Result<()> {
    if is_required {
        bail!("{why}; and FARFAULT_REQUIRE_LAB=1 lets no test be skipped");
    }
    eprintln!("\n*** SKIPPED, nothing was tested: {why} ***\n");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_required_is_not_skipped() {
        assert!(told("no root", false).is_ok());
        assert!(told("no root", true).unwrap_err().to_string().contains("no root"));
    }
}
