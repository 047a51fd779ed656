//! A counted load over Linux AIO: N requests at a fixed depth, timed by the guest's own clock.
//!
//! Linux AIO and not io_uring because it is there in every kernel that might be a guest, and costs few instructions.

use crate::direct::{self, Buffer};
use crate::pattern::Pattern;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Instant;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// 4 KiB reads at pseudo-random places.
    RandomRead,
    /// 4 KiB writes at pseudo-random places.
    RandomWrite,
    /// 128 KiB reads one after another.
    SequentialRead,
    /// 128 KiB writes one after another.
    SequentialWrite,
}

impl Shape {
    /// The word of the command line.
    pub(crate) fn named(word: &str) -> Option<Shape> {
        Some(match word {
            "randread" => Shape::RandomRead,
            "randwrite" => Shape::RandomWrite,
            "read" => Shape::SequentialRead,
            "write" => Shape::SequentialWrite,
            _ => return None,
        })
    }

    fn writes(self) -> bool {
        matches!(self, Shape::RandomWrite | Shape::SequentialWrite)
    }

    fn request_bytes(self) -> usize {
        if matches!(self, Shape::RandomRead | Shape::RandomWrite) { 4096 } else { 131_072 }
    }
}

/// `struct iocb` of linux/aio_abi.h, little-endian layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    length_bytes: u64,
    offset_bytes: i64,
    reserved: u64,
    flags: u32,
    event_file: u32,
}

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Event {
    data: u64,
    iocb: u64,
    result: i64,
    result2: i64,
}

const PREAD: u16 = 0;
const PWRITE: u16 = 1;

fn failed(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

/// One AIO context.
struct Context(u64);

impl Context {
    fn new(depth: usize) -> Result<Context, String> {
        let mut id = 0u64;
        // SAFETY: io_setup writes one word through the pointer, which outlives the call.
        let code = unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut id) };
        if code < 0 { Err(failed("io_setup")) } else { Ok(Context(id)) }
    }

    /// Starts the transfers that `list` points at.
    fn submit(&self, list: &mut [*mut Iocb]) -> Result<(), String> {
        let mut done = 0;
        while done < list.len() {
            // SAFETY: each pointer names an Iocb in `Run::iocbs`, whose buffer lives in `Run::buffers`; `Run` keeps
            // both, unmoved, until every transfer has come back.
            let code = unsafe {
                libc::syscall(libc::SYS_io_submit, self.0, list.len() - done, list[done..].as_mut_ptr())
            };
            done += usize::try_from(code).map_err(|_| failed("io_submit"))?;
        }
        Ok(())
    }

    /// Waits for at least one transfer; returns how many events were filled in.
    fn wait(&self, events: &mut [Event]) -> Result<usize, String> {
        let none = std::ptr::null::<libc::timespec>();
        // SAFETY: the kernel writes at most `events.len()` events.
        let code = unsafe {
            libc::syscall(libc::SYS_io_getevents, self.0, 1, events.len(), events.as_mut_ptr(), none)
        };
        usize::try_from(code).map_err(|_| failed("io_getevents"))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: destroys a context of ours once; it waits for what is still in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

/// Everything the kernel may touch while transfers are in flight. Field order: the context goes first, because dropping
/// it waits for the transfers.
struct Run {
    context: Context,
    iocbs: Vec<Iocb>,
    buffers: Vec<Buffer>,
    file: File,
    size_bytes: u64,
    shape: Shape,
    pattern: Pattern,
    issued: u64,
}

impl Run {
    fn new(path: &str, shape: Shape, depth: usize, seed: u64) -> Result<Run, String> {
        let (file, size_bytes) = direct::open(path, shape.writes())?;
        if size_bytes < shape.request_bytes() as u64 {
            return Err(format!("{path} is too small"));
        }
        let mut pattern = Pattern::new(seed);
        let mut buffers: Vec<Buffer> = (0..depth).map(|_| Buffer::new(shape.request_bytes())).collect();
        for buffer in &mut buffers {
            pattern.fill(buffer.bytes());
        }
        let iocbs = vec![Iocb::default(); depth];
        Ok(Run { context: Context::new(depth)?, iocbs, buffers, file, size_bytes, shape, pattern, issued: 0 })
    }

    /// Prepares the next request in `slot`.
    fn prepare(&mut self, slot: usize) -> Result<*mut Iocb, String> {
        let length = self.shape.request_bytes() as u64;
        let places = self.size_bytes / length;
        let place = match self.shape {
            Shape::RandomRead | Shape::RandomWrite => self.pattern.next() % places,
            Shape::SequentialRead | Shape::SequentialWrite => self.issued % places,
        };
        self.issued += 1;
        let iocb = &mut self.iocbs[slot];
        *iocb = Iocb {
            data: slot as u64,
            opcode: if self.shape.writes() { PWRITE } else { PREAD },
            file: u32::try_from(self.file.as_raw_fd()).map_err(|e| e.to_string())?,
            buffer: self.buffers[slot].bytes().as_mut_ptr() as u64,
            length_bytes: length,
            offset_bytes: i64::try_from(place * length).map_err(|e| e.to_string())?,
            ..Iocb::default()
        };
        Ok(&raw mut *iocb)
    }

    fn all(&mut self, depth: usize, requests: u64) -> Result<(), String> {
        let mut list = Vec::with_capacity(depth);
        let mut events = vec![Event::default(); depth];
        let mut done = 0;
        self.issued = 0;
        for slot in 0..depth.min(usize::try_from(requests).unwrap_or(depth)) {
            list.push(self.prepare(slot)?);
        }
        self.context.submit(&mut list)?;
        while done < requests {
            let count = self.context.wait(&mut events)?;
            list.clear();
            for event in &events[..count] {
                if event.result != i64::try_from(self.shape.request_bytes()).map_err(|e| e.to_string())? {
                    return Err(format!("a transfer ended with {}", event.result));
                }
                done += 1;
                if self.issued < requests {
                    let slot = usize::try_from(event.data).map_err(|e| e.to_string())?;
                    list.push(self.prepare(slot)?);
                }
            }
            self.context.submit(&mut list)?;
        }
        Ok(())
    }
}

/// Runs `requests` requests of `shape` at `depth` on `path`, after as many that are not timed: what both ends keep from one
/// request to the next (mapped pages, grants, threads) is there then. Returns the line to print.
///
/// # Errors
/// When the device cannot be opened or any transfer fails or is short.
pub(crate) fn run(
    path: &str,
    shape: Shape,
    depth: usize,
    requests: u64,
    seed: u64,
) -> Result<String, String> {
    let mut run = Run::new(path, shape, depth.max(1), seed)?;
    run.all(depth.max(1), requests)?;
    let start = Instant::now();
    run.all(depth.max(1), requests)?;
    let took = start.elapsed();
    let per_request_ns = took.as_nanos() / u128::from(requests.max(1));
    Ok(format!(
        "requests={requests} depth={depth} took_us={} ns_per_request={per_request_ns} iops={}",
        took.as_micros(),
        1_000_000_000u128.checked_div(per_request_ns).unwrap_or(0)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_runs_to_its_count() {
        let path = std::env::temp_dir().join(format!("vbdd-load-{}", std::process::id()));
        std::fs::write(&path, vec![0u8; 1 << 20]).unwrap();
        for (word, requests) in [("randread", 100), ("randwrite", 100), ("read", 20), ("write", 20)] {
            for depth in [1, 8] {
                let shape = Shape::named(word).unwrap();
                let line = run(path.to_str().unwrap(), shape, depth, requests, 1).unwrap();
                assert!(line.starts_with(&format!("requests={requests} depth={depth} ")), "{line}");
            }
        }
        let small = std::env::temp_dir().join(format!("vbdd-load-small-{}", std::process::id()));
        std::fs::write(&small, [0u8; 512]).unwrap();
        assert!(run(small.to_str().unwrap(), Shape::RandomRead, 1, 1, 1).is_err());
        std::fs::remove_file(path).unwrap();
        std::fs::remove_file(small).unwrap();
    }
}
