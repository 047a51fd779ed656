//! A transaction from start to commit, as often as it takes.
//!
//! Start; read the guards; if they hold, make the edits; when all of them were taken, commit. The server may refuse the
//! commit because something that was read has changed: then everything is done again, guards included, after a pause.

use alloc::vec::Vec;

use super::edits::terminated;
use super::jobs::{Clock, Request, refused};
use super::limits::{TRANSACTION_AGE_MS_MAX, TRANSACTION_ATTEMPTS_MAX};
use super::types::{Edit, Failure, Guard, Outcome, ProtocolError};
use crate::path::Path;
use crate::wire::{ErrorCode, MessageType};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not open; may be started from this time on.
    Ready { not_before_ms: u64 },
    /// The start was sent.
    Starting,
    /// Guards are read.
    Guards,
    /// Edits are made.
    Edits,
    /// To be committed or discarded; nothing is outstanding.
    Ended { commit: bool },
    /// The end was sent.
    Ending { commit: bool },
}

/// Why an attempt is discarded.
#[derive(Debug)]
enum Verdict {
    /// The job ends so.
    Final(Outcome),
    /// To be tried again.
    Retry,
}

#[derive(Debug)]
pub(super) struct Transaction {
    guards: Vec<(Path, Guard)>,
    edits: Vec<Edit>,
    phase: Phase,
    /// The server's number for it, while it is open.
    number: u32,
    sent: usize,
    answered: usize,
    verdict: Option<Verdict>,
    attempts: u32,
    first_try_ms: Option<u64>,
}

impl Transaction {
    pub(super) fn new(guards: Vec<(Path, Guard)>, edits: Vec<Edit>) -> Transaction {
        Transaction {
            guards,
            edits,
            phase: Phase::Ready { not_before_ms: 0 },
            number: 0,
            sent: 0,
            answered: 0,
            verdict: None,
            attempts: 0,
            first_try_ms: None,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        !matches!(self.phase, Phase::Ready { .. })
    }

    pub(super) fn not_before(&self) -> Option<u64> {
        match self.phase {
            Phase::Ready { not_before_ms } => Some(not_before_ms),
            _ => None,
        }
    }

    pub(super) fn maybe_applied(&self) -> bool {
        self.phase == Phase::Ending { commit: true } && !self.edits.is_empty()
    }

    pub(super) fn retries(&self) -> u32 {
        self.attempts.saturating_sub(1)
    }

    pub(super) fn next_request(&mut self, now_ms: u64, may_start: bool) -> Option<Request> {
        let (kind, payload) = match self.phase {
            Phase::Ready { not_before_ms } if may_start && now_ms >= not_before_ms => {
                self.phase = Phase::Starting;
                self.attempts += 1;
                self.first_try_ms.get_or_insert(now_ms);
                (self.number, self.verdict) = (0, None);
                (MessageType::TransactionStart, alloc::vec![0])
            }
            Phase::Guards if self.verdict.is_none() => {
                let (path, _) = self.guards.get(self.sent)?;
                self.sent += 1;
                (MessageType::Read, terminated(path))
            }
            Phase::Edits if self.verdict.is_none() => {
                let edit = self.edits.get(self.sent)?;
                self.sent += 1;
                (edit.kind(), edit.payload())
            }
            Phase::Ended { commit } => {
                self.phase = Phase::Ending { commit };
                (MessageType::TransactionEnd, if commit { b"T\0".to_vec() } else { b"F\0".to_vec() })
            }
            _ => return None,
        };
        Some(Request { kind, transaction: self.number, payload, step: self.sent.saturating_sub(1) })
    }

    pub(super) fn reply(
        &mut self,
        step: usize,
        result: Result<&[u8], ErrorCode>,
        clock: &mut Clock,
    ) -> Result<Option<Outcome>, ProtocolError> {
        match self.phase {
            Phase::Starting => return self.started(result, clock),
            Phase::Guards => self.guard_read(step, result),
            Phase::Edits => self.edit_made(step, result),
            Phase::Ending { commit: true } => return Ok(self.committed(result, clock)),
            Phase::Ending { commit: false } => {
                return Ok(match self.verdict.take() {
                    Some(Verdict::Final(outcome)) => Some(outcome),
                    _ => self.try_again(clock),
                });
            }
            // No request is outstanding in these phases, so the client finds no owner for such a reply.
            Phase::Ready { .. } | Phase::Ended { .. } => return Ok(None),
        }
        self.answered += 1;
        if self.answered == self.sent {
            self.advance();
        }
        Ok(None)
    }

    fn started(
        &mut self,
        result: Result<&[u8], ErrorCode>,
        clock: &mut Clock,
    ) -> Result<Option<Outcome>, ProtocolError> {
        match result {
            Ok(payload) => {
                let malformed = ProtocolError::Malformed(MessageType::TransactionStart);
                let digits = payload.strip_suffix(b"\0").ok_or(malformed)?;
                let text = core::str::from_utf8(digits).map_err(|_| malformed)?;
                self.number = text.parse().map_err(|_| malformed)?;
                if self.number == 0 {
                    // 0 means "outside any transaction": our edits would take effect one by one.
                    return Err(malformed);
                }
                (self.sent, self.answered) = (0, 0);
                self.phase = Phase::Guards;
                if self.guards.is_empty() {
                    self.advance();
                }
                Ok(None)
            }
            // Too many transactions are open, perhaps by others of our domain: that passes.
            Err(ErrorCode::Again | ErrorCode::Busy | ErrorCode::NoSpace | ErrorCode::Quota) => {
                Ok(self.try_again(clock))
            }
            Err(code) => Ok(Some(Outcome::Failed(Failure::Refused { path: None, code }))),
        }
    }

    fn guard_read(&mut self, step: usize, result: Result<&[u8], ErrorCode>) {
        if result == Err(ErrorCode::Again) {
            self.verdict = Some(Verdict::Retry);
            return;
        }
        let (path, guard) = &self.guards[step];
        let holds = match (guard, result) {
            (Guard::Exists, Ok(_)) | (Guard::Absent, Err(ErrorCode::Missing)) => true,
            (Guard::Equals(wanted), Ok(found)) => wanted == found,
            _ => false,
        };
        if !holds && self.verdict.is_none() {
            let found = result.map(<[u8]>::to_vec);
            self.verdict = Some(Verdict::Final(Outcome::GuardFailed { path: path.clone(), found }));
        }
    }

    fn edit_made(&mut self, step: usize, result: Result<&[u8], ErrorCode>) {
        let edit = &self.edits[step];
        match edit.succeeded(result) {
            Ok(()) => {}
            Err(ErrorCode::Again) => self.verdict = Some(Verdict::Retry),
            Err(code) if self.verdict.is_none() => {
                self.verdict = Some(Verdict::Final(refused(edit.path(), code)));
            }
            Err(_) => {}
        }
    }

    /// Nothing is outstanding: on to what comes next.
    fn advance(&mut self) {
        if self.verdict.is_some() {
            self.phase = Phase::Ended { commit: false };
            return;
        }
        if self.phase == Phase::Guards && self.sent == self.guards.len() {
            self.phase = Phase::Edits;
            (self.sent, self.answered) = (0, 0);
        }
        if self.phase == Phase::Edits && self.sent == self.edits.len() {
            self.phase = Phase::Ended { commit: true };
        }
    }

    fn committed(&mut self, result: Result<&[u8], ErrorCode>, clock: &mut Clock) -> Option<Outcome> {
        match result {
            Ok(_) => Some(Outcome::Committed { attempts: self.attempts }),
            // ENOENT: the server does not know the transaction any more, so it did not take it.
            Err(ErrorCode::Again | ErrorCode::Missing) => self.try_again(clock),
            Err(code) => Some(Outcome::Failed(Failure::Refused { path: None, code })),
        }
    }

    fn try_again(&mut self, clock: &mut Clock) -> Option<Outcome> {
        let age_ms = clock.now_ms.saturating_sub(self.first_try_ms.unwrap_or(clock.now_ms));
        if self.attempts >= TRANSACTION_ATTEMPTS_MAX || age_ms >= TRANSACTION_AGE_MS_MAX {
            return Some(Outcome::Failed(Failure::Conflict { attempts: self.attempts }));
        }
        self.phase = Phase::Ready { not_before_ms: clock.now_ms + clock.rng.delay_ms(self.attempts) };
        (self.number, self.verdict) = (0, None);
        None
    }
}
