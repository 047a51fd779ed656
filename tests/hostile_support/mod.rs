//! What the tests of hostile guests share, with the fuzz targets too: a frontend whose every byte the test decides, a
//! count of the log's lines, and whole connections played from bytes.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

pub mod indirect;
pub mod lines;
pub mod neighbour;
pub mod puppet;
pub mod script;
