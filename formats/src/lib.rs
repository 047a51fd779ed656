//! Disk-image formats as state machines without I/O.
#![no_std]
