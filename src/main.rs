//! The `vbdd` command.
fn main() {}
