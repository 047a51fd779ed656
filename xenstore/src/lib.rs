//! The xenstore protocol without I/O: wire format, client with watches and transactions.
#![no_std]
