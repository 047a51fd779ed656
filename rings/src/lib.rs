//! The blkif shared-memory ring: ABIs, request parsing, responses, both ends.
#![no_std]
