//! Everything that tests of formats share.
#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)]

pub mod driver;
pub mod file;
pub mod medium;
pub mod oracle;
pub mod requests;
pub mod rng;
pub mod shadow;
pub mod sweep;
pub mod witness;
pub mod world;
