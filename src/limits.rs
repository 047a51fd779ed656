//! Every bound of the process, with its sum.

use std::time::Duration;

/// Pages of the largest ring that is mapped: order 4. One mapping request names them all.
pub const RING_PAGES_MAX: usize = 1 << RING_PAGE_ORDER_MAX;
/// See [`RING_PAGES_MAX`].
pub const RING_PAGE_ORDER_MAX: u8 = 4;

/// Queues of one disk. 8 rings of 16 pages for each of 1 000 disks are 128 000 mapped grants, half of what the hypervisor's
/// map track holds by default (1 024 frames of 256 entries).
pub const QUEUES_MAX: u8 = 8;

/// Requests that one queue may take before the next queue has its turn: one page's ring, so that a guest with a deeper
/// ring cannot hold the others up longer than a guest with a plain one.
pub const REQUESTS_PER_TURN: u32 = 32;

/// The queues of one guest share [`REQUESTS_PER_TURN`], but each takes at least this many, so that batches stay batches.
pub const REQUESTS_PER_TURN_MIN: u32 = 8;

/// Data of the requests that one queue takes at a time, in bytes: what 32 requests of a plain ring can name (32 × 44 KiB).
/// The request that passes it is the last, so 1 MiB more at most.
pub const BYTES_PER_TURN: u32 = 32 * 44 * 1024;

/// Segments of long requests that are copied at a time while one guest has the process for itself, at 4 KiB each: 4 MiB.
pub const COLLECT_SEGMENTS: usize = 1024;

/// Segments of long requests that are copied at a time while guests share the process: 256 KiB, some 25 us, after which it looks
/// for events. What is no longer than a plain request is copied before them.
pub const SLICE_SEGMENTS: usize = 64;

/// Events without work that are let through at once. Honest frontends cause a few: a request that was found by the last
/// look at the ring has sent its event too.
pub const IDLE_EVENTS_FREE: u32 = 4;

/// First and longest delay of an event channel whose events bring no work: 1 ms doubles up to 128 ms, so that a storm
/// costs at most 8 wake-ups a second and a port.
pub const EVENT_DELAY_MIN: Duration = Duration::from_millis(1);
/// See [`EVENT_DELAY_MIN`].
pub const EVENT_DELAY_MAX: Duration = Duration::from_millis(128);

/// Memory for data in flight, in bytes: 64 MiB hold 1 024 requests of 44 KiB and some more, or 63 of 1 MiB; whoever finds
/// none waits. A guest leaves at least as much free as it holds: one alone has 32 MiB at most, the ring of 32 requests
/// of 1 MiB; when the disks of `k` guests hang, 64 MiB / (k + 1) stay for the others, 1.3 MiB beside 46 of them.
pub const DATA_MEMORY_BYTES: usize = 64 << 20;

/// Metadata of images in memory, all disks together, in bytes, unless asked otherwise: the L2 tables of 256 GiB at 64 KiB
/// clusters, or their merged map. What does not fit is read again.
pub const METADATA_CACHE_MIB: u32 = 32;

/// Memory for metadata and copies on their way to and from images, in bytes: 64 transfers of 128 KiB, or 2 048 of a page;
/// others wait for the first to end.
pub const METADATA_MEMORY_BYTES: usize = 8 << 20;

/// Chunks of the state directory for changed metadata that a killed process must leave to its successor: 127 pages (1 020 KiB)
/// each, as many as are needed at a time; 32 MiB. Disks write what they have from 256 pages on.
pub const KEPT_CHUNKS_MAX: usize = 32;

/// How long changed metadata may stay in memory while nobody flushes.
pub const WRITE_BACK_INTERVAL: Duration = Duration::from_secs(1);

/// Pages of one queue that stay mapped: what a Linux frontend keeps for a ring of 32 requests of 32 pages and some more.
/// 100 bytes of books each.
pub const GRANTS_PER_QUEUE_MAX: usize = 1056;

/// Pages of all guests that stay mapped: each is a mapping of its own, of which Linux allows a process 65 530.
pub const GRANTS_MAX: usize = 16_384;

/// Chunks of 2 MiB of files in memory that are mapped at once, all files together: 1 GiB, in 512 pages of page table
/// (2 MiB) with 88 bytes of books each (44 KiB). What is beyond is read and written by calls.
pub const MAPPED_CHUNKS_MAX: usize = 512;

/// The largest file in memory that is mapped, in bytes: two bytes of books for each chunk, 64 KiB.
pub const MAPPED_FILE_BYTES_MAX: u64 = 64 << 30;

/// How long the first in line for memory keeps others from passing, before what it waits for counts as hung.
pub const STARVED_PATIENCE: Duration = Duration::from_secs(2);

/// What one transfer counts at a storage device besides its bytes: 16 KiB, about what a solid-state disk moves in the time that a
/// command takes by itself.
pub const TRANSFER_COST: u64 = 16 << 10;

/// What may be at a storage device at once while guests share it, before it has shown what keeps it busy: 384 KiB are 19
/// transfers of 4 KiB, 6 of 44 KiB or 2 of 128 KiB. Whoever comes with one transfer goes at once, and what does not fit
/// waits in the memory that its guest holds.
pub const DEVICE_COST_FIRST: u64 = 384 << 10;

/// The same at most, for storage that does the more the more it has.
pub const DEVICE_COST_CONTENDED: u64 = 3 << 20;

/// What may be at a storage device at once while one guest has it for itself: 4 MiB, which another that comes waits for once
/// (2 ms at 2 GB/s). 256 transfers of 4 KiB count 5 MiB.
pub const DEVICE_COST_ALONE: u64 = 4 << 20;

/// How long a device counts as shared after the last transfer of the second guest.
pub const DEVICE_CONTENDED_FOR: Duration = Duration::from_secs(1);

/// Segments of an indirect request: 1 MiB of whole pages. One page of descriptors (2 048 bytes) is copied for each in
/// flight, into data memory; at most eight pieces of 128 KiB hold its data.
pub const INDIRECT_SEGMENTS: u16 = rings::INDIRECT_SEGMENTS_MAX;

/// Memory of a queue's tables under load, in bytes: 256 for each request that was ever in flight at once, and 40 for each
/// slot of the ring; 9 KiB for a ring of 32, 148 KiB for one of 512. At rest the first part is given back: 20 KiB for a
/// ring of 512, to which its journal adds 68 KiB in the state directory (8 KiB for a ring of 32).
pub const QUEUE_BYTES_MAX: usize = 512 * (256 + 40);

/// Rounds that the pump makes before its caller looks at xenstore and timers again: 8 rounds of 32 requests a queue.
pub const ROUNDS_PER_TURN: u32 = 8;

/// Misdeeds and storage errors that wait to be logged; more are counted and dropped. 64 bytes each: 16 KiB.
pub const REPORTS_MAX: usize = 256;

/// Disks that are served at once. Each has at most one job with the xenstore client, which takes 1 024.
pub const DEVICES_MAX: usize = 1000;

/// Reads of one disk's nodes: 20 at once, then 10 a second, so that a frontend that changes its mind all the time costs
/// at most 700 xenstore requests a second: 40 nodes each, and [`WORLD_READ_NODES`] more for each further read that counts.
pub const WORLD_READS_BURST: u32 = 20;
/// See [`WORLD_READS_BURST`].
pub const WORLD_READ_INTERVAL: Duration = Duration::from_millis(100);

/// Nodes of further queues and pages that count as one more read: the largest ring's 136 count as four.
pub const WORLD_READ_NODES: u32 = 30;

/// How often the sizes of the open images are looked at while anything happens at all: one system call a disk, so 100 a
/// second for 1 000 disks. A host at rest is not woken for it.
pub const SIZES_INTERVAL: Duration = Duration::from_secs(10);

/// Nodes of one disk that count against the quota of the domain that owns its backend directory: libxl writes 16 with the
/// directory itself, xenopsd up to 20; vbdd at most 15 (`docs/xenstore.md`, "Written in BE"), and a directory for each guest.
pub const NODES_PER_DISK: u32 = 36;

/// What C xenstored lets an unprivileged domain have, if nobody has raised it: nodes and watches.
pub const XENSTORE_NODES: u32 = 1000;
/// See [`XENSTORE_NODES`].
pub const XENSTORE_WATCHES: u32 = 128;

/// How often a watch that xenstored refused is asked for again, for up to [`DEVICES_MAX`] disks: 200 requests a second.
pub const REWATCH_INTERVAL: Duration = Duration::from_secs(5);

/// Log lines about one disk: 10 at once, then one each 10 seconds; with 1 000 hostile disks 100 lines a second.
pub const NOTICES_BURST: u32 = 10;
/// See [`NOTICES_BURST`].
pub const NOTICE_INTERVAL: Duration = Duration::from_secs(10);

/// How long a stop waits for storage, after which the journal has to serve.
pub const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// Clients of the control door at once, how long one may stay, and its longest line: 16 × 1 KiB.
pub const CONTROL_SESSIONS_MAX: usize = 16;
/// See [`CONTROL_SESSIONS_MAX`].
pub const CONTROL_SESSION_AGE: Duration = Duration::from_secs(10);
/// See [`CONTROL_SESSIONS_MAX`].
pub const CONTROL_LINE_BYTES_MAX: usize = 1024;

/// How long the control door does not listen after it could not take a client.
pub const CONTROL_REST: Duration = Duration::from_secs(1);

/// Clients of the NBD server at once. Each has 64 KiB of input ([`NBD_INPUT_BYTES`]), 96 bytes of books for each of 128 requests, and
/// headers that are not sent: [`NBD_UNSENT_BYTES_MAX`] and at most 450 bytes for each request, 120 KiB. 64 of them: 13 MiB at most,
/// and next to nothing while they ask for little.
pub const NBD_CLIENTS_MAX: usize = 64;

/// Input of one client that is read at a time, in bytes: 32 requests of 4 KiB in two or three calls; and the longest message but the data
/// of a write, which go straight where they belong.
pub const NBD_INPUT_BYTES: usize = 64 << 10;

/// Requests of one client from their header to the end of their reply; the next one waits in the socket.
pub const NBD_REQUESTS_MAX: usize = 128;

/// The longest read or write of a client, in bytes; clients are told. One piece of memory.
pub const NBD_REQUEST_BYTES_MAX: u32 = 1 << 20;

/// Memory for data that every client of the NBD server has for itself, in bytes: 64 requests of 4 KiB, or 2 of 128 KiB. Nobody who
/// takes and keeps what he can get comes between a client and this.
pub const NBD_CLIENT_BYTES: u64 = 256 << 10;

/// Memory for data that all clients share, in bytes. A client leaves at least as much free as it takes: 8 MiB are the most that one
/// has. Who needs more than its own share and finds none waits at most until [`NBD_MESSAGE_AGE`] ends for those who do not take
/// their replies.
pub const NBD_SHARED_BYTES: u64 = 16 << 20;

/// Memory for the data of all clients, in bytes: 16 MiB of their own and 16 MiB shared. `vbdd serve` has it besides
/// [`DATA_MEMORY_BYTES`].
pub const NBD_MEMORY_BYTES: u64 = NBD_CLIENTS_MAX as u64 * NBD_CLIENT_BYTES + NBD_SHARED_BYTES;

/// Bytes of unsent headers above which no more is taken from a client.
pub const NBD_UNSENT_BYTES_MAX: usize = 64 << 10;

/// The longest option that is read, in bytes: a name of 4 KiB and a hundred queries.
pub const NBD_OPTION_BYTES_MAX: usize = 16 << 10;

/// Options of one handshake. The longest answer is the list of [`DEVICES_MAX`] exports, some 100 KB.
pub const NBD_OPTIONS_MAX: u32 = 256;

/// How long a handshake may take.
pub const NBD_HANDSHAKE_AGE: Duration = Duration::from_secs(10);

/// How long a client may take to send the rest of a message, or to take a piece of a reply: 1 MiB at 35 KB/s. Between messages it may
/// be silent for ever.
pub const NBD_MESSAGE_AGE: Duration = Duration::from_secs(30);

/// Clients that are accepted before those there are have their turn.
pub const NBD_ACCEPTS_PER_TURN: usize = 8;

/// How long the NBD server does not listen after it could not take a client, and how soon a request is tried again that found
/// no memory although no client holds any.
pub const NBD_REST: Duration = Duration::from_secs(1);
/// See [`NBD_REST`].
pub const NBD_RETRY: Duration = Duration::from_millis(10);

/// Memory for writes that NBD servers have answered and that no flush has covered: 64 MiB for all images, and for each of
/// them between 2 MiB (twice the longest write) and 16 MiB.
pub const NBD_UNFLUSHED_BYTES: u64 = 64 << 20;
/// See [`NBD_UNFLUSHED_BYTES`].
pub const NBD_UNFLUSHED_IMAGE_BYTES: (u64, u64) = (2 << 20, 16 << 20);

/// How long requests wait for an NBD server that does not answer before they fail, if the operator says nothing else: long
/// enough for a host to start anew, and not for ever, so that the disk of a guest that is gone can be let go of.
pub const NBD_PATIENCE: Duration = Duration::from_secs(300);

/// How long after the last request the buffers' memory goes back to the system.
pub const TRIM_AFTER: Duration = Duration::from_secs(5);
