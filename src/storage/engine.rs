//! What moves bytes: the seam below [`LinuxStorage`](super::linux::LinuxStorage), and the choice of an engine.
//!
//! An engine knows nothing of alignment, files' ends or requests: it starts transfers and tells what the kernel answered.

use std::os::fd::{BorrowedFd, RawFd};

use super::aio::Aio;
use super::uring::Uring;

/// What a transfer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// File to memory.
    Read,
    /// Memory to file.
    Write,
    /// `fdatasync`; offset, address and length mean nothing.
    Sync,
}

/// One call to the kernel. The memory must stay valid until its [`Landed`]; spans of a pool always do.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Comes back in [`Landed`].
    pub tag: u32,
    /// What to do.
    pub action: Action,
    /// The open file; stays open until the transfer has landed.
    pub fd: RawFd,
    /// The number under which the engine knows the file, where [`Engine::attach`] took it.
    pub attached: Option<u32>,
    /// Where in the file.
    pub offset_bytes: u64,
    /// The memory.
    pub address: *mut u8,
    /// How much of it.
    pub length_bytes: u32,
}

/// A transfer that the kernel has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landed {
    /// Of which transfer.
    pub tag: u32,
    /// Bytes moved, or a negative errno.
    pub result: i32,
}

/// Starts transfers and collects their answers. One owner, one thread; nothing here blocks.
pub trait Engine: std::fmt::Debug {
    /// Offers a file for cheaper use under `index`. `false`: it is to be named by its descriptor.
    fn attach(&mut self, index: u32, fd: BorrowedFd<'_>) -> bool;

    /// Takes back what [`Engine::attach`] took, before the file is closed.
    fn detach(&mut self, index: u32);

    /// Takes a transfer, to be started by [`Engine::submit`]. `false` when full: try again after a submit or a reap.
    fn push(&mut self, transfer: &Transfer) -> bool;

    /// The same for `parts` pieces of memory: the transfer's address is that of as many `iovec`s, which stay valid until it
    /// has landed, and its length that of all. `false` when full, and for an engine that does not do it.
    fn push_vectored(&mut self, transfer: &Transfer, parts: usize) -> bool {
        let _ = (transfer, parts);
        false
    }

    /// Starts what was pushed. `false` when some of it could not be started now: call again soon.
    fn submit(&mut self) -> bool;

    /// Takes one answer, without a system call as a rule.
    fn reap(&mut self) -> Option<Landed>;

    /// What becomes readable when there are answers, if the engine needs watching.
    fn wake_fd(&self) -> Option<RawFd>;

    /// Makes [`Engine::wake_fd`] quiet again. Called once per wake-up, before [`Engine::reap`].
    fn acknowledge(&mut self);

    /// Whether transfers on files that go through the page cache hold up [`Engine::submit`].
    fn blocks_on_cached_files(&self) -> bool;

    /// Whether [`Action::Sync`] can be pushed.
    fn syncs(&self) -> bool;
}

/// The operator's `--engine`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the kernel lets us, else Linux AIO.
    #[default]
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Linux AIO or nothing.
    Aio,
}

impl std::str::FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "uring" => Ok(Self::Uring),
            "aio" => Ok(Self::Aio),
            other => Err(format!("unknown engine '{other}': say auto, uring or aio")),
        }
    }
}

/// The engines there are. An enum, so that the path of a request has no indirect call.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one for the life of the process")]
pub(super) enum AnyEngine {
    Uring(Uring),
    Aio(Aio),
    /// One that a test brings.
    Other(Box<dyn Engine>),
}

macro_rules! each {
    ($self:expr, $engine:ident => $body:expr) => {
        match $self {
            AnyEngine::Uring($engine) => $body,
            AnyEngine::Aio($engine) => $body,
            AnyEngine::Other($engine) => $body,
        }
    };
}

impl Engine for AnyEngine {
    fn attach(&mut self, index: u32, fd: BorrowedFd<'_>) -> bool {
        each!(self, engine => engine.attach(index, fd))
    }
    fn detach(&mut self, index: u32) {
        each!(self, engine => engine.detach(index));
    }
    #[inline]
    fn push(&mut self, transfer: &Transfer) -> bool {
        each!(self, engine => engine.push(transfer))
    }
    fn push_vectored(&mut self, transfer: &Transfer, parts: usize) -> bool {
        each!(self, engine => engine.push_vectored(transfer, parts))
    }

    #[inline]
    fn submit(&mut self) -> bool {
        each!(self, engine => engine.submit())
    }
    #[inline]
    fn reap(&mut self) -> Option<Landed> {
        each!(self, engine => engine.reap())
    }
    fn wake_fd(&self) -> Option<RawFd> {
        each!(self, engine => engine.wake_fd())
    }
    #[inline]
    fn acknowledge(&mut self) {
        each!(self, engine => engine.acknowledge());
    }
    fn blocks_on_cached_files(&self) -> bool {
        each!(self, engine => engine.blocks_on_cached_files())
    }
    fn syncs(&self) -> bool {
        each!(self, engine => engine.syncs())
    }
}

/// Starts the engine that `choice` names. Answers also with a sentence for the log: which, and why.
pub(super) fn start(choice: EngineChoice) -> Result<(AnyEngine, String), String> {
    match choice {
        EngineChoice::Uring => match Uring::new() {
            Ok(engine) => {
                let text = format!("io_uring ({}), as --engine uring asks", engine.describe());
                Ok((AnyEngine::Uring(engine), text))
            }
            Err(why) => Err(format!("io_uring cannot be used: {why}; try --engine aio or auto")),
        },
        EngineChoice::Aio => match Aio::new() {
            Ok(engine) => {
                let text = format!("Linux AIO ({}), as --engine aio asks", engine.describe());
                Ok((AnyEngine::Aio(engine), text))
            }
            Err(why) => Err(format!("Linux AIO cannot be used: {why}; try --engine uring or auto")),
        },
        EngineChoice::Auto => match Uring::new() {
            Ok(engine) => {
                let text = format!("io_uring ({}): the kernel offers all that is needed", engine.describe());
                Ok((AnyEngine::Uring(engine), text))
            }
            Err(first) => match Aio::new() {
                Ok(engine) => {
                    let text = format!("Linux AIO ({}): io_uring cannot be used: {first}", engine.describe());
                    Ok((AnyEngine::Aio(engine), text))
                }
                Err(second) => Err(format!("no engine can be used: io_uring: {first}; Linux AIO: {second}")),
            },
        },
    }
}
