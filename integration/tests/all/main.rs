//! Tests of the programs, as a user runs them: migrations of real guests between network namespaces. One program, so
//! that it is linked once.

mod accidents;
mod demo;
mod huge_pages;
mod lab;
mod migrate;
mod native;
mod outage;
mod refuse;
mod resources;
mod takeover;
mod wan;
