//! What tests of VHD share: a sparse medium that crashes, and a reader of VHDs that shares no code with ours.
#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)]
#![allow(clippy::large_enum_variant, clippy::collapsible_match)]

pub mod model;
pub mod sparse;
pub mod world;
