//! Jobs in progress: each makes requests when asked, and takes the replies to them.

use alloc::vec::Vec;

use super::backoff::Rng;
use super::edits::terminated;
use super::list::List;
use super::transaction::Transaction;
use super::types::{Edit, Failure, Job, Outcome, ProtocolError};
use crate::path::Path;
use crate::permissions::Permission;
use crate::wire::{ErrorCode, MessageType};

/// Time and chance, as far as jobs need them.
#[derive(Debug)]
pub(super) struct Clock {
    pub(super) now_ms: u64,
    pub(super) rng: Rng,
}

/// A request that wants to be sent.
pub(super) struct Request {
    pub(super) kind: MessageType,
    pub(super) transaction: u32,
    pub(super) payload: Vec<u8>,
    /// The job's own number for it; comes back with the reply.
    pub(super) step: usize,
}

#[derive(Debug)]
pub(super) enum JobState {
    Read { paths: Vec<Path>, sent: usize, values: Vec<Option<Result<Vec<u8>, ErrorCode>>>, answered: usize },
    List(List),
    Permissions { path: Path, sent: bool },
    Edit { edit: Edit, sent: bool },
    Transaction(Transaction),
}

impl JobState {
    /// The job at its beginning, or its outcome where there is nothing to do.
    pub(super) fn new(job: Job) -> Result<JobState, Outcome> {
        Ok(match job {
            Job::Read(paths) if paths.is_empty() => return Err(Outcome::Read(Vec::new())),
            Job::Read(paths) => {
                let values = paths.iter().map(|_| None).collect();
                JobState::Read { paths, sent: 0, values, answered: 0 }
            }
            Job::List(path) => JobState::List(List::new(path)),
            Job::Permissions(path) => JobState::Permissions { path, sent: false },
            Job::Edit(edit) => JobState::Edit { edit, sent: false },
            Job::Transaction { guards, edits } => JobState::Transaction(Transaction::new(guards, edits)),
        })
    }

    pub(super) fn next_request(&mut self, now_ms: u64, may_start: bool) -> Option<Request> {
        match self {
            JobState::Read { paths, sent, .. } => {
                let path = paths.get(*sent)?;
                let request = plain(MessageType::Read, terminated(path), *sent);
                *sent += 1;
                Some(request)
            }
            JobState::List(list) => list.next_request(),
            JobState::Permissions { path, sent } => {
                let first = !core::mem::replace(sent, true);
                first.then(|| plain(MessageType::GetPerms, terminated(path), 0))
            }
            JobState::Edit { edit, sent } => {
                let first = !core::mem::replace(sent, true);
                first.then(|| plain(edit.kind(), edit.payload(), 0))
            }
            JobState::Transaction(transaction) => transaction.next_request(now_ms, may_start),
        }
    }

    /// Takes the reply to the request `step`; the outcome, if that was the last one.
    pub(super) fn reply(
        &mut self,
        step: usize,
        result: Result<&[u8], ErrorCode>,
        clock: &mut Clock,
    ) -> Result<Option<Outcome>, ProtocolError> {
        match self {
            JobState::Read { values, answered, .. } => {
                values[step] = Some(result.map(<[u8]>::to_vec));
                *answered += 1;
                let all = *answered == values.len();
                Ok(all.then(|| Outcome::Read(core::mem::take(values).into_iter().flatten().collect())))
            }
            JobState::List(list) => list.reply(result),
            JobState::Permissions { path, .. } => match result {
                Ok(payload) => match Permission::parse_list(payload) {
                    Some(permissions) => Ok(Some(Outcome::Permissions(permissions))),
                    None => Err(ProtocolError::Malformed(MessageType::GetPerms)),
                },
                Err(code) => Ok(Some(refused(path, code))),
            },
            JobState::Edit { edit, .. } => Ok(Some(match edit.succeeded(result) {
                Ok(()) => Outcome::Done,
                Err(code) => refused(edit.path(), code),
            })),
            JobState::Transaction(transaction) => transaction.reply(step, result, clock),
        }
    }

    /// Whether the job's change may have been made although no reply said so.
    pub(super) fn maybe_applied(&self) -> bool {
        match self {
            JobState::Edit { sent, .. } => *sent,
            JobState::Transaction(transaction) => transaction.maybe_applied(),
            _ => false,
        }
    }

    /// Whether it takes up one of the few places for open transactions.
    pub(super) fn holds_transaction(&self) -> bool {
        matches!(self, JobState::Transaction(transaction) if transaction.is_open())
    }

    /// When a transaction that waits may be tried again.
    pub(super) fn not_before(&self) -> Option<u64> {
        match self {
            JobState::Transaction(transaction) => transaction.not_before(),
            _ => None,
        }
    }

    pub(super) fn retries(&self) -> u32 {
        match self {
            JobState::Transaction(transaction) => transaction.retries(),
            _ => 0,
        }
    }
}

pub(super) fn plain(kind: MessageType, payload: Vec<u8>, step: usize) -> Request {
    Request { kind, transaction: 0, payload, step }
}

pub(super) fn refused(path: &Path, code: ErrorCode) -> Outcome {
    Outcome::Failed(Failure::Refused { path: Some(path.clone()), code })
}
