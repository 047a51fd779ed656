//! Requests that change a node, and the checks that a job passes before anything of it is sent.

use alloc::string::String;
use alloc::vec::Vec;

use super::limits::NODES_PER_JOB_MAX;
use super::types::{Edit, Job, SubmitError};
use crate::path::Path;
use crate::wire::{ErrorCode, MessageType};

impl Edit {
    pub(super) fn kind(&self) -> MessageType {
        match self {
            Edit::Write(..) => MessageType::Write,
            Edit::Mkdir(_) => MessageType::Mkdir,
            Edit::Remove(_) => MessageType::Rm,
            Edit::SetPermissions(..) => MessageType::SetPerms,
        }
    }

    pub(super) fn payload(&self) -> Vec<u8> {
        let mut payload = terminated(self.path());
        match self {
            Edit::Write(_, value) => payload.extend_from_slice(value),
            Edit::Mkdir(_) | Edit::Remove(_) => {}
            Edit::SetPermissions(_, permissions) => {
                let mut text = String::new();
                for permission in permissions {
                    permission.encode(&mut text);
                    text.push('\0');
                }
                payload.extend_from_slice(text.as_bytes());
            }
        }
        payload
    }

    /// Whether the reply means that all is as the edit wants it. Removing what is not there is well: xenstored says
    /// ENOENT only where even the parent is missing.
    pub(super) fn succeeded(&self, result: Result<&[u8], ErrorCode>) -> Result<(), ErrorCode> {
        match (self, result) {
            (_, Ok(_)) | (Edit::Remove(_), Err(ErrorCode::Missing)) => Ok(()),
            (_, Err(code)) => Err(code),
        }
    }

    fn payload_bytes(&self) -> usize {
        match self {
            Edit::Write(path, value) => path.as_str().len() + 1 + value.len(),
            _ => self.payload().len(),
        }
    }
}

/// A path as it stands in a payload: with a NUL behind it.
pub(super) fn terminated(path: &Path) -> Vec<u8> {
    let text = path.as_str().as_bytes();
    let mut payload = Vec::with_capacity(text.len() + 1);
    payload.extend_from_slice(text);
    payload.push(0);
    payload
}

impl Job {
    /// Whether every request of the job can be sent. The longest path with its NUL fits any message, so only values and
    /// long lists of permissions can be too big.
    pub(super) fn check(&self, payload_bytes_max: usize) -> Result<(), SubmitError> {
        let no_edits: &[Edit] = &[];
        let (nodes, edits): (Vec<&Path>, &[Edit]) = match self {
            Job::Read(paths) => (paths.iter().collect(), no_edits),
            Job::List(path) | Job::Permissions(path) => (alloc::vec![path], no_edits),
            Job::Edit(edit) => (Vec::new(), core::slice::from_ref(edit)),
            Job::Transaction { guards, edits } => (guards.iter().map(|(path, _)| path).collect(), edits),
        };
        if nodes.len() + edits.len() > NODES_PER_JOB_MAX {
            return Err(SubmitError::TooManyNodes);
        }
        for path in nodes.into_iter().chain(edits.iter().map(Edit::path)) {
            if path.is_special() {
                return Err(SubmitError::NotANode(path.clone()));
            }
        }
        match edits.iter().find(|edit| edit.payload_bytes() > payload_bytes_max) {
            Some(edit) => Err(SubmitError::TooBig(edit.path().clone())),
            None => Ok(()),
        }
    }
}
