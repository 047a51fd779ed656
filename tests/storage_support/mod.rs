//! What the storage tests share: a directory that goes away, and a storage that is waited for as the reactor does.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, clippy::panic)]

pub mod faulty;
pub mod servers;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vbdd::buffers::Span;
use vbdd::storage::engine::{Engine, EngineChoice};
use vbdd::storage::linux::{LinuxStorage, Options};
use vbdd::storage::{Access, Done, FileId, Io, IoKind, OpenError, Opened, Storage, StorageError};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A fresh directory, removed at the end.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new(parent: &str, name: &str) -> Directory {
        let path = Path::new(parent).join(format!("vbdd-test-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Directory(path.canonicalize().unwrap())
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_string()
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self.path(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Where O_DIRECT works: below the build directory.
pub fn on_disk(name: &str) -> Directory {
    Directory::new(env!("CARGO_TARGET_TMPDIR"), name)
}

pub fn in_memory(name: &str) -> Directory {
    Directory::new("/dev/shm", name)
}

/// A generator (xorshift): the seed replays a run.
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

pub struct Rig {
    pub storage: LinuxStorage,
    next: u64,
    results: HashMap<u64, Result<(), StorageError>>,
}

pub fn options(root: &Path, engine: EngineChoice) -> Options {
    Options { engine, roots: vec![root.to_path_buf()], pool_bytes: 16 << 20, ..Options::default() }
}

impl Rig {
    pub fn new(options: &Options) -> Rig {
        Rig::over(LinuxStorage::new(options).unwrap())
    }

    pub fn with_engine(options: &Options, engine: Box<dyn Engine>) -> Rig {
        Rig::over(LinuxStorage::with_engine(options, engine).unwrap())
    }

    pub fn over(storage: LinuxStorage) -> Rig {
        Rig { storage, next: 1, results: HashMap::new() }
    }

    /// Waits as the reactor does: polls the descriptors, then says so. False after a timeout.
    pub fn wait(&mut self, timeout: Duration) -> bool {
        let mut fds: Vec<libc::pollfd> =
            self.storage.fds().map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
        assert!(fds.len() <= 3);
        let timeout = i32::try_from(timeout.as_millis()).unwrap();
        // SAFETY: the array is ours and as long as said.
        let count = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if count < 0 {
            let error = std::io::Error::last_os_error();
            assert_eq!(error.kind(), std::io::ErrorKind::Interrupted, "{error}");
        }
        self.storage.ready();
        count != 0
    }

    pub fn open(&mut self, path: &str, access: Access) -> Result<Opened, OpenError> {
        let token = self.token();
        self.storage.open(token, path, access);
        let start = Instant::now();
        loop {
            if let Some((answered, result)) = self.storage.opened() {
                assert_eq!(answered, token);
                return result;
            }
            assert!(start.elapsed() < PATIENCE, "open of {path} takes too long");
            self.wait(Duration::from_secs(1));
        }
    }

    pub fn token(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub fn queue(&mut self, file: FileId, kind: IoKind, offset_bytes: u64, span: Span) -> u64 {
        let token = self.token();
        self.storage.queue(Io { token, file, kind, offset_bytes, span });
        token
    }

    /// Submits, and takes what is done.
    pub fn pump(&mut self) -> Vec<u64> {
        self.storage.submit();
        let mut taken = Vec::new();
        while let Some(Done { token, result }) = self.storage.done() {
            assert!(self.results.insert(token, result).is_none(), "token {token} answered twice");
            taken.push(token);
        }
        taken
    }

    pub fn finish(&mut self, token: u64) -> Result<(), StorageError> {
        let start = Instant::now();
        loop {
            self.pump();
            if let Some(result) = self.results.remove(&token) {
                return result;
            }
            assert!(start.elapsed() < PATIENCE, "request {token} takes too long");
            self.wait(Duration::from_secs(1));
        }
    }

    pub fn forget(&mut self, token: u64) -> Option<Result<(), StorageError>> {
        self.results.remove(&token)
    }

    pub fn alloc(&mut self, length: usize) -> Span {
        self.storage.buffers().alloc(u32::try_from(length).unwrap()).unwrap()
    }

    pub fn write(&mut self, file: FileId, offset: u64, bytes: &[u8]) -> Result<(), StorageError> {
        let span = self.alloc(bytes.len());
        assert!(self.storage.buffers().copy_in(span, bytes));
        let token = self.queue(file, IoKind::Write, offset, span);
        let result = self.finish(token);
        assert!(self.storage.buffers().free(span));
        result
    }

    pub fn read(&mut self, file: FileId, offset: u64, length: usize) -> Result<Vec<u8>, StorageError> {
        let span = self.alloc(length);
        self.storage.buffers().bytes_mut(span).fill(0xee);
        let token = self.queue(file, IoKind::Read, offset, span);
        let result = self.finish(token);
        let bytes = self.storage.buffers().bytes(span).to_vec();
        assert!(self.storage.buffers().free(span));
        result.map(|()| bytes)
    }

    pub fn flush(&mut self, file: FileId) -> Result<(), StorageError> {
        let token = self.queue(file, IoKind::Flush, 0, Span::EMPTY);
        self.finish(token)
    }
}

/// Every way a file can be served: both engines, past and through the page cache, and in memory.
pub fn everywhere(name: &str, mut test: impl FnMut(&mut Rig, &Directory, &str)) {
    for engine in [EngineChoice::Uring, EngineChoice::Aio] {
        for direct in [true, false] {
            let directory = on_disk(name);
            let mut rig = Rig::new(&Options { direct, ..options(&directory.0, engine) });
            test(&mut rig, &directory, &format!("{engine:?}, direct {direct}"));
        }
        let directory = in_memory(name);
        let mut rig = Rig::new(&options(&directory.0, engine));
        test(&mut rig, &directory, &format!("{engine:?}, in memory"));
    }
}

pub fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at / 7 + at * seed + seed) % 251).unwrap()).collect()
}
